"""Stands for the module that urllib asks for proxies on macOS."""


def _get_proxy_settings():
    return {}


def _get_proxies():
    return {}
