"""Command line to settings: one flag for each field of a dataclass."""
import argparse
import dataclasses
import difflib

from data.errors import UsageError


ACTIONS = {  # flags that are no settings, and what argparse wants to know of them
    "resume": dict(metavar="PATH", help="continue from a checkpoint, with its settings"),
    "check": dict(action="store_true", help="test causality and probabilities of the model, then end"),
    "doctor": dict(action="store_true", help="try on this machine every piece that the run would use, then end"),
    "plan": dict(action="store_true", help="say what the run takes: memory, settings that fit, minutes, data; then end"),
    "gpu": dict(metavar="NAME", help="--plan: for this GPU, such as 'RTX 4090', instead of the one found"),
    "gpu_gib": dict(metavar="GIB", type=float, help="--plan: for a GPU with so much memory"),
}


def parse_settings(settings: type, argv: list[str], about: str) -> tuple[argparse.Namespace, dict]:
    """Command line to (actions, changed settings). One flag for each field of the dataclass `settings`, with the meaning in
    its metadata as help."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UsageError(f"expected --name=value, found: {message}; see --help")

    def parse_bool(text: str) -> bool:
        if text.lower() not in ("true", "false", "1", "0", "on", "off"):
            raise ValueError(text)
        return text.lower() in ("true", "1", "on")

    def parse_value(text: str, kind):
        if hasattr(kind, "__args__"):  # tuple[int, ...]
            return tuple(kind.__args__[0](part) for part in text.split(",") if part)
        return parse_bool(text) if kind is bool else kind(text)

    def show(value) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    parser = Parser(allow_abbrev=False, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("actions")
    for name, options in ACTIONS.items():
        group.add_argument(f"--{name}", **options)
    group, fields = parser.add_argument_group("settings [default; tuples as 1,2,3]"), dataclasses.fields(settings)
    for f in fields:
        group.add_argument(f"--{f.name}", metavar="VALUE", help=f"{f.metadata['help']} [{show(f.default)}]".replace("%", "%%"))
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), [*(f.name for f in fields), *ACTIONS], n=1)
        raise UsageError(f"expected a setting of --help, found {unknown[0]!r}; "
                         + (f"did you mean --{near[0]}?" if near else "see --help"))
    changes = {}
    for f in fields:
        if (text := getattr(options, f.name)) is not None:
            try:
                changes[f.name] = parse_value(text, f.type)
            except ValueError:
                raise UsageError(f"--{f.name}: expected a value like {show(f.default)!r}, found {text!r}; see --help") from None
    return options, changes
