"""Read training logs of the NanoGPT speedrun, judge a claim, pack a submission, check an archive."""
import importlib
import sys

from data.errors import CommandLine, UsageError, run_program

VERBS = {  # in the order of the manual
    "read": ("show", "compare", "report"),
    "run and judge": ("plan", "ab", "check"),
    "submit and review": ("pack", "verify", "table"),
}
OTHER_NAMES = {"plan": "sample_size"}  # modules that are not called as their verbs are

MANUAL = """usage: python -m records VERB [ARGUMENTS]

{about}
A PATH is a log, or a folder of logs. Logs of every format of the public speedrun are read, and those of
train_gpt.py. Nothing that is read is ever run, no network is used, and neither torch nor a GPU is needed.

{verbs}
python -m records VERB --help tells the arguments of a verb, with an example.

exit codes:
  0  done, and nothing to complain about
  1  done, and the answer is no: a rule is broken, a claim does not hold, a file cannot be read as a log
  2  the command or its input must be changed; one sentence on standard error says how
"""


def module_of(verb: str):
    """Import the module of a verb alone, as some load scipy and matplotlib."""
    return importlib.import_module(f"records.{OTHER_NAMES.get(verb, verb)}")


def manual() -> str:
    lines = []
    for title, verbs in VERBS.items():
        lines.append(f"{title}:")
        lines += [f"  {verb:<10} {module_of(verb).HELP}" for verb in verbs]
        lines.append("")
    return MANUAL.format(about=__doc__, verbs="\n".join(lines))


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(manual(), end="")
        return 0 if argv else 2
    verb = argv[0]
    known = [verb for verbs in VERBS.values() for verb in verbs]
    if verb not in known:
        raise UsageError(f"expected a verb ({', '.join(known)}), found {verb!r}; see python -m records -h")
    module = module_of(verb)
    parser = CommandLine(module.__doc__, f"python -m records {verb}", epilog=f"example: {module.EXAMPLE}")
    module.add_arguments(parser)
    code = module.run(parser.parse_args(argv[1:]))
    sys.stdout.flush()
    return code


def guarded(argv: list[str]) -> int:
    """Call main with its errors turned into an exit code and one sentence."""
    return run_program(main, argv, "records", "records/requirements.txt")


if __name__ == "__main__":
    sys.exit(guarded(sys.argv[1:]))
