"""Takes from a Python on Linux what one on macOS lacks: put this folder first in PYTHONPATH.

It also gives what macOS has: spawn as the way to start processes, 256 open files, a torch without oneDNN. The
rest of torch stays that of Linux; what its own modules do on macOS cannot be tried here.
"""
import builtins
import functools
import io
import os
import resource
import signal
import socket
import sys
import sysconfig
import time

LINUX_ONLY = {
    os: ("sched_getaffinity", "sched_setaffinity", "memfd_create", "posix_fadvise", "posix_fallocate",
         "pidfd_open", "eventfd", "pipe2", "copy_file_range", "splice", "getrandom", "unshare", "setns"),
    signal: ("sigtimedwait", "sigwaitinfo", "pidfd_send_signal"),
    socket: ("SOCK_SEQPACKET", "SOCK_CLOEXEC", "SOCK_NONBLOCK"),
    time: ("CLOCK_BOOTTIME",),
}
FOLDERS = ("/proc", "/sys", "/dev/shm")


def without_linux_folders(function):
    """Return the function of a path as it is where these folders do not exist."""
    def call(path, *args, **options):
        is_path = isinstance(path, (str, os.PathLike))
        if is_path and any(os.fspath(path).startswith(folder) for folder in FOLDERS):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(path, *args, **options)

    return functools.partial(call)  # no method where a class takes it up, as pathlib's does in Python 3.10


class NoOnednn:
    """Tells torch, as it is imported, that it was built without oneDNN."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch.backends.mkldnn":
            sys.modules["torch._C"]._has_mkldnn = False


for module, names in LINUX_ONLY.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
builtins.open = io.open = without_linux_folders(io.open)
os.stat = without_linux_folders(os.stat)
os.listdir = without_linux_folders(os.listdir)
os.environ["ATEN_CPU_CAPABILITY"] = "default"
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sys.meta_path.insert(0, NoOnednn)
sysconfig.get_config_vars()  # reads a file named after the platform, once
sys.platform = "darwin"  # multiprocessing then spawns
