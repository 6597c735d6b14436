"""The error of this package that a person can act on."""
from data.errors import UsageError


class RecordError(UsageError):
    """One sentence: expected X, found Y; do Z."""
