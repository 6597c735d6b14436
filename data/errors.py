"""The two ancestors of every error that a person can act on. They lie on the ground floor, since every room raises them."""


class UsageError(ValueError):
    """The command, its settings or its files are wrong: exit code 2."""


class RunError(RuntimeError):
    """The run itself failed: exit code 1."""
