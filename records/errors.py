"""The one error of this package that a person can act on."""


class RecordError(Exception):
    """The command, its arguments or its files are wrong: exit code 2. One sentence: expected X, found Y; do Z."""
