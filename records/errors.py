"""The error of this package that a person can act on."""
from data.errors import UsageError


class RecordError(UsageError):
    """One sentence: expected X, found Y; do Z. It may quote a file or its name."""

    def __str__(self):
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in super().__str__())
