"""Build the folder of a submission: records/<folder of the track>/<date>_<NAME>/ with

  README.md    your note, and around it the results
  record.json  the same for programs
  runs/        the logs, unchanged; what ran is embedded in them
  baseline/    likewise, where there are some

A baseline that is the runs of another record of the track is named, not copied. Every number comes from the
logs. What check fails is refused, unless --non-record says why the result is worth keeping. A folder that
exists is never touched, and the same inputs give the same bytes. The note may be edited later.
"""
import hashlib
import math
import os
import re
import shlex
import shutil
import tempfile
import textwrap
from pathlib import Path

import jinja2
from pydantic_core import to_json

from data.errors import RunError, UsageError
from data.files import sha256_of
from records import check, logs, schema
from records.formatting import TEMPLATES, markdown, short_name
from records.logs import LogFile, RunFacts
from records.rules import FAIL, NOT_APPLICABLE, NOT_TRAINING, PASS
from records.rules import Submission, Verdict, changed_settings, judge, runs_of, seconds_of
from records.schema import Statement
from records.statistics import mean_sd

HELP = "build the folder of a submission from logs and a note"
EXAMPLE = ("python -m records pack --dry-run --name Again --date 2026-11-25 --logs "
           "records/track_0_laptop/2026-11-24_TailAverage --baseline "
           "records/track_0_laptop/2026-11-24_Reference")

NOTE_BEGIN = "<!-- A note, which its author may edit. The numbers outside it come from the logs. -->"
NOTE_END = "<!-- End of the note. -->"
NOTE_LIMIT = 1 << 18  # bytes


def add_arguments(parser):
    parser.add_argument("--name", required=True, help="name of the folder: letters, digits, - and _")
    parser.add_argument("--logs", required=True, nargs="+", metavar="PATH", dest="paths",
                        help="all runs, or folders of them")
    check.add_claim_arguments(parser)
    parser.add_argument("--note", metavar="FILE", help="Markdown: the idea, and what others should know")
    parser.add_argument("--description", metavar="TEXT",
                        help="one line for the table of records (default: the name)")
    parser.add_argument("--contributor", action="append", default=[], metavar="NAME",
                        help="who did it (repeatable)")
    parser.add_argument("--date", required=True, help="YYYY-MM-DD")
    parser.add_argument("--non-record", metavar="REASON", help="keep it though it is no record, and say why")
    parser.add_argument("--dry-run", action="store_true",
                        help="write nothing: print the verdicts and the README")
    parser.add_argument("-o", "--output", type=Path, default=Path("records"), metavar="FOLDER",
                        help="folder that holds the tracks' folders (default: records)")


def run(args) -> int:
    if not args.output.is_dir():
        raise UsageError(f"-o: expected a folder, found none at {args.output}; make it first")
    note = read_note(args.note)
    submission = check.from_arguments(args)
    statement = schema.parse({
        "version": 1,
        "track": submission.track.name,
        "name": args.name,
        "date": args.date,
        "kind": "record" if args.non_record is None else "non-record",
        "why_no_record": args.non_record,
        "description": args.description or args.name,
        "contributors": args.contributor,
        "step": submission.step,
        "planned_runs": submission.planned,
        "baseline_record": record_of(submission.baseline, args.output / submission.track.folder),
        "waivers": submission.waivers,
    }, "the arguments of pack")
    target = args.output / statement.folder
    if target.exists() and not args.dry_run:
        raise UsageError(f"{target}: expected no folder of that name, found one; choose another --name or "
                         "--date")

    verdicts, files = compose(submission, statement, note)
    check.print_verdicts(verdicts, submission)
    failed = [verdict.rule for verdict in verdicts if verdict.verdict == FAIL]
    if failed and statement.kind == "record":
        raise RunError(f"expected that every rule holds, found that these do not: {', '.join(failed)}; run "
                       "what is missing, waive what can be waived (check --help), or keep it with "
                       "--non-record REASON")
    sources = paths_in_folder(submission, statement)
    if args.dry_run:
        print(files["README.md"].decode())
    else:
        write(target, files, sources)
        print(f"{target}: {len(submission.runs)} runs; python -m records verify {target}")
    return 0


def paths_in_folder(submission: Submission, statement: Statement) -> dict[str, Path]:
    """The logs by their place in the folder, under names that are plain and differ, whatever their case."""
    found = {}
    baseline = [] if statement.baseline_record else submission.baseline
    for folder, members in zip(check.FOLDERS, (submission.logs, baseline)):
        for log in members:
            name = log.path.name
            if log.path.suffix not in logs.SUFFIXES or not re.fullmatch(schema.LOG_NAME, name):
                raise UsageError("expected names of letters, digits and . _ - that end in .txt, found "
                                 f"{name!r}; rename it")
            if any(f"{folder}/{name}".lower() == other.lower() for other in found):
                raise UsageError(f"expected logs of different names in {folder}, found two called {name}; "
                                 "rename one")
            found[f"{folder}/{name}"] = log.path
    return found


def write(target: Path, files: dict[str, bytes], sources: dict[str, Path]):
    """Make the folder whole or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=".pack-", dir=target.parents[1]))
    try:
        for name, source in sources.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, temporary / name)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        target.parent.mkdir(exist_ok=True)
        temporary.rename(target)
    except OSError as e:
        raise UsageError(f"{target}: expected to write it, found: {e.strerror}; check names, space and "
                         "permissions") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_note(path: str | None) -> str:
    try:
        note = Path(path or os.devnull).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--note: expected a readable text file, found: {e}; check {path}") from None
    if len(note) > NOTE_LIMIT or NOTE_BEGIN in note or NOTE_END in note:
        raise UsageError(f"--note: expected at most {NOTE_LIMIT:,} characters and no marks of a note, found "
                         f"more in {path}; pass the text between the marks, and link to the rest")
    return note


def record_of(baseline: list[LogFile], track_folder: Path) -> str | None:
    """The name of the record whose runs are these logs and no others; None where there is none."""
    wanted = {log.sha256 for log in baseline}
    for folder in sorted(path for path in track_folder.glob("*")
                         if re.fullmatch(schema.FOLDER_NAME, path.name)):
        files = check.members(folder / "runs")
        if files and len(files) == len(baseline):
            if set(map(sha256_of, files)) == wanted:
                return folder.name
    return None


def compose(s: Submission, statement: Statement, note: str) -> tuple[list[Verdict], dict[str, bytes]]:
    """Return what belongs into a folder beside its logs: the verdicts on them, and its files by name."""
    record = describe(s, statement)
    verdicts = judge(s)
    return verdicts, {schema.FILE: to_json(record, indent=2) + b"\n",
                      "README.md": readme(s, record, verdicts, note).encode()}


def describe(s: Submission, statement: Statement) -> dict:
    """The content of record.json: what a person says of a submission, and what its logs say.

    Losses are nats per token with 5 decimals, times training milliseconds with 1, probabilities have 3
    significant digits. None is a number that the logs do not hold, or not a finite one; a fact that differs
    between the runs; no run, no baseline.
    """
    test = s.loss_test()
    speed = s.speed() if s.baseline else None
    sources = next((log.sources for log in s.logs if log.sources), {})
    return statement.model_dump() | {
        "hardware": common(run.hardware for run in s.runs),
        "torch": common(run.torch for run in s.runs),
        "world_size": common(run.world_size for run in s.runs),
        "runs": summary(s.logs, s.point),
        "loss_test": {"rule": s.track.rule, "target": s.track.target, "alpha": s.track.alpha,
                      "p": significant(test.p), "passes": test.passes},
        "baseline": summary(s.baseline, lambda run: run.end) if s.baseline else None,
        "speed": speed and {"difference_ms": decimals(speed.value, 1, 1000),
                            "low_ms": decimals(speed.low, 1, 1000),
                            "high_ms": decimals(speed.high, 1, 1000), "p": significant(speed.p)},
        "sources": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()},
    }


def common(values):
    """The value that all have in common, None where they differ."""
    values = {*values}
    return values.pop() if len(values) == 1 else None


def entry(log: LogFile, point) -> dict:
    """A log with its runs; point: the validation that counts of a run."""
    runs = [{"run_id": run.run_id, "seed": run.seed, "step": at and at.step,
             "loss": at and decimals(at.val_loss, 9), "time_ms": at and decimals(at.train_time_ms, 3)}
            for run in log.runs for at in [point(run)]]
    return {"file": log.path.name, "sha256": log.sha256, "runs": runs}


def summary(members: list[LogFile], point) -> dict:
    """Mean and sample standard deviation of the runs of one recipe."""
    points = [point(run) for run in runs_of(members)]
    loss, loss_sd = mean_sd([math.nan if at is None else at.val_loss for at in points])
    time, time_sd = mean_sd(seconds_of(points))
    return {"n": len(points), "step": common(at and at.step for at in points),
            "loss_mean": decimals(loss, 5), "loss_sd": decimals(loss_sd, 5),
            "time_ms_mean": decimals(time, 1, 1000), "time_ms_sd": decimals(time_sd, 1, 1000),
            "logs": [entry(log, point) for log in members]}


def decimals(value: float | None, digits: int, factor: int = 1) -> float | None:
    return round(factor * value, digits) if value is not None and math.isfinite(value) else None


def significant(p: float | None) -> float | None:
    return float(f"{p:.3g}") if p is not None and math.isfinite(p) else None


# The README

def readme(s: Submission, record: dict, verdicts: list[Verdict], note: str) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES),
                                     undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
                                     autoescape=False)
    environment.filters |= {"escaped": markdown, "loss": exact_loss, "seconds": exact_seconds,
                            "short": short_name, "setting": shown_setting}
    first, before = ([*runs, None][0] for runs in (s.runs, s.baseline_runs))
    elsewhere = record["baseline_record"]
    return environment.get_template("record.md").render(
        r=record,
        note=note,
        note_begin=NOTE_BEGIN,
        note_end=NOTE_END,
        sigma=s.track.rule_options.get("sigma"),
        test={"t_test": "one-sided t-test", "z_rule": "z-test with an assumed spread"}[s.track.rule],
        baseline_folder=f"../{elsewhere}/runs" if elsewhere else "baseline",
        open=[verdict for verdict in verdicts if verdict.verdict not in (PASS, NOT_APPLICABLE)],
        commits=sorted({run.commit for run in s.runs if run.commit}),
        differences=changed_settings(first.config, before.config)
        if first and before and first.config and before.config else [],
        command=command(first, s.track.program),
    )


def exact_loss(value: float | None) -> str:
    """A loss as logs print it: with 4 decimals, or more where there are more."""
    return "nan" if value is None else max(f"{value:.4f}", f"{value:.9f}".rstrip("0"), key=len)


def exact_seconds(ms: float | None) -> str:
    return "nan" if ms is None else f"{ms / 1000:.3f}"


def shown_setting(value) -> str:
    """A setting as an argument of train_gpt.py."""
    if isinstance(value, list):
        return ",".join(map(shown_setting, value))[:200]
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else str(value)[:200]


def command(run: RunFacts | None, program: str) -> str:
    """A command line that trains as the run did, made of its settings; "" where the log holds none. Only
    plain values: a reader may well paste it into a shell."""
    settings = run.config if run else {}
    texts = {key: shown_setting(value) for key, value in settings.items()
             if key not in NOT_TRAINING and value is not None}
    flags = [f"--{key}={shlex.quote(text)}" for key, text in texts.items()
             if re.fullmatch(r"[a-z]\w{0,40}=[\w.,*/+-]*", f"{key}={text}", re.A)]
    if not flags:
        return ""
    ranks = run.world_size or 1
    start = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    return textwrap.fill(f"{start} {program} --seed={run.seed or 0} {' '.join(flags)}", 110,
                         subsequent_indent="    ", break_long_words=False,
                         break_on_hyphens=False).replace("\n", " \\\n")
