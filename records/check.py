"""Judge a submission rule by rule: what each rule asks, whether the logs meet it, and the evidence.

PATH is a folder that pack has built, the folder of an A/B experiment, or logs and folders of logs. A rule
that does not hold is a failure. Those with an asterisk can be waived by a person with a reason that a
reviewer may weigh, the loss rule only for a kind of change that the track exempts: --waive
'loss-rule=systems: the same training, faster kernels'.

{rules}
"""
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from data.errors import UsageError
from records import logs, schema
from records.experiment import read_experiment
from records.formatting import Grid, terminal
from records.rules import FAIL, NOT_APPLICABLE, PASS, RULES, WAIVABLE, WAIVED, Submission, Verdict, judge
from records.tracks import TRACKS, only

HELP = "every rule of a track on a submission, with the evidence"
EXAMPLE = "python -m records check records/track_0_laptop/2026-11-24_TailAverage"

FOLDERS = ("runs", "baseline")  # of logs, in the folder of a submission

__doc__ = __doc__.format(rules="\n".join(f"  {name:<21} {rule.__doc__}" for name, rule in RULES.items()))


def add_claim_arguments(parser):
    """Add the arguments for what a person says of the runs, which check and pack share."""
    parser.add_argument("--baseline", nargs="+", default=[], metavar="PATH",
                        help="the record before, run on this machine")
    parser.add_argument("--track", choices=TRACKS, help="default: as the logs say")
    parser.add_argument("--step", type=int, metavar="N",
                        help="step whose validation counts, where the track wants it stated")
    parser.add_argument("--planned", type=int, metavar="N",
                        help="runs that were planned before the first one (default: as in ab's plan)")
    parser.add_argument("--waive", action="append", default=[], metavar="RULE=REASON",
                        help="accept a failure (repeatable)")


def add_arguments(parser):
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="a folder built by pack or ab, or logs and folders of logs")
    add_claim_arguments(parser)
    parser.add_argument("--json", action="store_true", help="verdicts for a program")


def run(args) -> int:
    folder = Path(args.paths[0])
    packed = len(args.paths) == 1 and (folder / schema.FILE).is_file()
    if packed and (args.baseline or args.track or args.step is not None or args.planned or args.waive):
        raise UsageError(f"{folder}: expected this folder alone, whose record.json says the rest, found "
                         "other arguments; leave them out, or name the folders of its logs")
    submission = from_folder(folder, schema.read(folder / schema.FILE)) if packed else from_arguments(args)
    found = judge(submission)
    if args.json:
        print(json.dumps([asdict(verdict) for verdict in found], indent=1))
    else:
        print_verdicts(found, submission)
    return int(any(v.verdict == FAIL for v in found))


# A folder built by pack

def from_folder(folder: Path, statement: schema.Statement) -> Submission:
    """The submission in a folder built by pack: all logs that lie there now."""
    runs, baseline = ([logs.read(path) for path in members(folder / name)] for name in FOLDERS)
    if statement.baseline_record:
        elsewhere = folder.resolve().parent / statement.baseline_record / "runs"
        baseline += [logs.read(path) for path in members(elsewhere)]
    return Submission(TRACKS[statement.track], runs, baseline, statement.step, statement.planned_runs,
                      statement.waivers)


def members(folder: Path) -> list[Path]:
    """The logs in a folder of a submission. Hidden files, as macOS leaves them behind, are none."""
    found = sorted(path for path in folder.glob("*") if not path.name.startswith(".")
                   and not path.is_symlink())
    for path in found:
        if not re.fullmatch(schema.LOG_NAME, path.name) or not path.is_file():
            raise UsageError(f"{folder}: expected logs, with names of letters, digits and . _ -, found "
                             f"{path.name!r}; rename it or take it away")
    return found


# Logs named on the command line

def from_arguments(args) -> Submission:
    paths, baseline, planned_runs = args.paths, args.baseline, args.planned
    folder = Path(paths[0])
    if len(paths) == 1 and not baseline and (experiment := read_experiment(folder)):
        paths, baseline = [folder / "a"], [folder / "b"]
        planned_runs = planned_runs or len(experiment.pairs)
    submitted, before = ([*map(logs.read, logs.find(group))] for group in (paths, baseline))
    if not any(log.runs for log in submitted):
        raise UsageError(f"{args.paths[0]}: expected logs of runs, found none that counts; check the path")

    track = TRACKS[args.track] if args.track else only(submitted)
    if track is None:
        raise UsageError(f"expected logs of one track, found none or several; say --track={'|'.join(TRACKS)}")
    step = args.step
    if step is None and track.claim_step == "stated":
        step = max((run.final_step for log in submitted for run in log.runs if run.val_points), default=None)
    return Submission(track, *(sorted(group, key=lambda log: log.path.name) for group in (submitted, before)),
                      step, planned_runs, waivers(args.waive))


def waivers(texts: list[str]) -> dict[str, str]:
    """Return {rule: reason} from RULE=REASON arguments. Raises UsageError."""
    found = dict(text.partition("=")[::2] for text in texts)
    for rule, reason in found.items():
        if rule not in WAIVABLE:
            raise UsageError(f"--waive: expected one of {', '.join(sorted(WAIVABLE))}, found {rule!r}; no "
                             "other rule can be waived")
        if not reason.strip():
            raise UsageError(f"--waive: expected RULE=REASON, found {rule!r} without a reason; say why")
    return found


def print_verdicts(found: list[Verdict], s: Submission):
    print(f"track {s.track.name}: {len(s.runs)} runs, {len(s.baseline_runs)} of the baseline")
    rows = [[v.rule, v.verdict, f"{v.evidence} (accepted: {v.reason})" if v.reason else v.evidence]
            for v in found]
    Grid(["rule", "verdict", "evidence"], rows).print(terminal())
    counts = Counter(v.verdict for v in found)
    print(", ".join(f"{counts[kind]} {kind}" for kind in (PASS, FAIL, WAIVED, NOT_APPLICABLE)))
