"""Settings: a dataclass whose fields carry their meaning and their rule, and a command line made from it."""
import argparse
import dataclasses
import difflib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from data.errors import CommandLine, UsageError


class Rule(NamedTuple):
    """What a value must be: in words, for the error message, and as a test."""
    expected: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("a positive number", lambda x: x > 0)
ZERO_OR_MORE = Rule("zero or more", lambda x: x >= 0)
SEED = Rule("zero or more and less than 2^63", lambda x: 0 <= x < 2**63)
ALL_POSITIVE = Rule("one or more positive numbers", lambda xs: len(xs) > 0 and min(xs) > 0)


def between(low: float, high: float) -> Rule:
    return Rule(f"{low} to {high}", lambda x: low <= x <= high)


def one_of(*choices: str) -> Rule:
    return Rule("one of " + ", ".join(choices), lambda x: x in choices)


def setting(default, meaning: str, rule: Rule | None = None):
    """Declare a field of a settings dataclass."""
    return dataclasses.field(default=default, metadata={"help": meaning, "rule": rule})


def require(settings, name: str, expected: str, holds: bool) -> None:
    """Raise UsageError with the setting's name and value unless the condition holds."""
    if not holds:
        found = getattr(settings, name)
        raise UsageError(f"--{name}: expected {expected}, found {found!r}; see --help")


def check_rules(settings) -> None:
    """Check every field by itself: numbers are finite, and its own rule holds."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(part) for part in parts if isinstance(part, float))
        require(settings, field.name, "finite numbers", finite)

        rule = field.metadata["rule"]
        if rule is not None:
            require(settings, field.name, rule.expected, rule.holds(value))


def parse_settings(settings: type, argv: list[str], about: str,
                   actions: dict[str, dict]) -> tuple[argparse.Namespace, dict]:
    """Parse a command line to (actions, changed settings).

    There is one flag for each field of the dataclass `settings`, with the meaning in its metadata as help.
    actions: flags that are no settings, each with what argparse wants to know of it.
    """
    fields = dataclasses.fields(settings)
    # Without it usage would be all flags in a row.
    parser = CommandLine(about, usage="%(prog)s [--name=value ...]")
    group = parser.add_argument_group("actions")
    for name, options in actions.items():
        group.add_argument(f"--{name}", **options)
    group = parser.add_argument_group("settings [default; tuples as 1,2,3]")
    for field in fields:
        meaning = f"{field.metadata['help']} [{show_value(field.default)}]"
        group.add_argument(f"--{field.name}", metavar="VALUE", help=meaning.replace("%", "%%"))

    options, unknown = parser.parse_known_args(list(map(underscored, argv)))
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        near = difflib.get_close_matches(name, [*(field.name for field in fields), *actions], n=1)
        advice = f"did you mean --{near[0]}?" if near else "see --help"
        raise UsageError(f"expected a setting of --help, found {unknown[0]!r}; {advice}")

    changes = {}
    for field in fields:
        text = getattr(options, field.name)
        if text is None:
            continue
        try:
            changes[field.name] = parse_value(text, field.type)
        except ValueError:
            example = show_value(field.default)
            raise UsageError(f"--{field.name}: expected a value like {example!r}, found {text!r}; see "
                             "--help") from None
    return options, changes


def underscored(argument: str) -> str:
    """Write --train-steps=100 as --train_steps=100; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def parse_value(text: str, kind):
    """Turn a flag's text into a value of its field's type; a tuple is written 1,2,3. Raises ValueError."""
    if hasattr(kind, "__args__"):  # tuple[int, ...]
        element = kind.__args__[0]
        return tuple(element(part) for part in text.split(",") if part)
    if kind is str and text.startswith("~/"):  # in --name=~/path the shell leaves it as it is
        return os.path.expanduser(text)
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false", "1", "0", "on", "off"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "on")


def show_value(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
