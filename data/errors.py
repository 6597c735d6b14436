"""The two ancestors of every error that a person can act on, and the one place that prints them.

They lie on the ground floor, because every room raises them.
"""
import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable

ADVICE = {  # what the system refuses wherever one is -> what to do
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EIO: "see whether disk and terminal are still there",
    errno.EMFILE: "raise the limit of open files (ulimit -n 1024)",
    errno.ENFILE: "close other programs",
}


class UsageError(ValueError):
    """The command, its settings or its files are wrong: exit code 2. The sentence may quote a file or its
    name: what could steer a terminal is shown as a question mark."""

    def __str__(self):
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in super().__str__())


class RunError(RuntimeError):
    """The run itself failed: exit code 1."""


class CommandLine(argparse.ArgumentParser):
    """A command line whose description is shown as it is written, and whose errors are UsageErrors."""

    def __init__(self, about: str, program: str = "", **options):
        super().__init__(prog=program or None, description=about, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.manual = f"{program} --help".strip()

    def error(self, message: str):
        raise UsageError(f"expected arguments as in {self.manual}, found: {message}; correct them")


def steady_streams() -> None:
    """Let no text be an error of standard output or error: what their encoding lacks becomes a question mark,
    and where one is closed (2>&-) it goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
            if only_reads(stream):
                silence(stream)


def only_reads(stream) -> bool:
    """Return whether a stream cannot be written to: bash opens its script in the place of one that is closed,
    and leaves it open for the program that it becomes."""
    try:
        os.write(stream.fileno(), b"")
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def silence(stream) -> None:
    """Send the rest of a stream nowhere, or Python would complain about it while it exits."""
    with contextlib.suppress(OSError):  # no file can be opened any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def refused_by_system(error: OSError) -> str:
    return (f"expected files to open and to write, found: {error.strerror}; {ADVICE[error.errno]} and start "
            "again")


def run_program(main: Callable[[list[str]], int | None], argv: list[str], name: str = "",
                requirements: str = "requirements.txt") -> int:
    """Call main(argv) and return the exit code; an error becomes one sentence on standard error.

    Exit codes: what main returns (None: 0), 2 for a UsageError or a package that is not installed, 1 for a
    RunError, 130 for Ctrl-C, 0 where the reader of our output, such as head, has seen enough. `name` goes
    before the sentence; `requirements` is the file that lists the packages.
    """
    prefix = f"{name}: " if name else ""
    steady_streams()
    try:
        return main(argv) or 0
    except (UsageError, RunError) as error:
        print(f"{prefix}{error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ModuleNotFoundError as error:
        print(f"{prefix}expected the Python package {error.name}, found none; run `{sys.executable} -m pip "
              f"install -r {requirements}`", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        advice = f"; {error}" if str(error) else ""
        print(f"\n{prefix}interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        silence(sys.stdout)
        return 0
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        silence(sys.stdout)
        print(f"{prefix}{refused_by_system(error)}", file=sys.stderr)
        return 1
