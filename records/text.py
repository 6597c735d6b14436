"""Text and numbers as terminals, pages and JSON want them."""
import math
import re
from collections.abc import Iterable

UUID = re.compile(r"([0-9a-f]{8})(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def printable(text: str) -> str:
    """Text of a file, or its name, without what could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def short_name(name: str) -> str:
    """A name, printable, with each UUID in it cut to its first part, as people do."""
    return UUID.sub(r"\1", printable(name))


def listed(texts: Iterable[str], limit: int = 4, between: str = ", ") -> str:
    """The first few of many texts, and how many more there are."""
    texts = [*texts]
    shown_first = between.join(texts[:limit])
    more = len(texts) - limit
    return f"{shown_first} and {more} more" if more > 0 else shown_first


def shown(value, form: str = "{}") -> str:
    """A value that may be missing."""
    return "-" if value is None else form.format(value)


def seconds(ms: float | None) -> str:
    return shown(None if ms is None else ms / 1000, "{:,.2f}")


def nats(loss: float | None) -> str:
    """A loss with the decimals of its log, or four."""
    return shown(loss, "{:.4f}" if loss == round(loss or 0, 4) else "{}")


def for_json(value):
    """A value as JSON holds it: numbers that are not finite as null."""
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
