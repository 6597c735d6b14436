"""Show the facts of logs: one log in full, several as a table with a row for each run.

Time and steps to the target are those of the first validation at or below it, less what a straight line from
the validation before saves. With --json what a log does not say is null, and so is a loss that is not finite.
"""
import os
from dataclasses import asdict

from pydantic_core import to_json

from data.errors import UsageError
from records import logs, tracks
from records.formatting import Grid, above_zero, listed, nats, printable, seconds, short_name, shown, terminal

HELP = "facts of any log: losses, times, versions, hardware, hashes, time to the target"
EXAMPLE = "python -m records show records/track_0_laptop/2026-11-24_TailAverage"


def add_arguments(parser):
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a log, or a folder of logs")
    parser.add_argument("--target", type=above_zero, metavar="LOSS",
                        help="validation loss to reach (default: that of the log's track, or 3.28)")
    parser.add_argument("--source", metavar="FILE",
                        help="print a source file that the log embeds, such as train_gpt.py")
    parser.add_argument("--json", action="store_true", help="facts for a program, with every validation")


def run(args) -> int:
    paths = logs.find(args.paths)
    if not paths:
        raise UsageError(f"{args.paths[0]}: expected logs ({', '.join(sorted(logs.SUFFIXES))}), found none; "
                         "check the path")
    found = [logs.read(path) for path in paths]
    if args.source:
        print(source_of(found[0], args.source), end="")
    elif args.json:
        facts = [as_json(log, args.target or target_of(log)) for log in found]
        print(to_json(facts, indent=1, inf_nan_mode="null").decode())
    else:
        print_facts(found, args.target)
    return int(any(not log.runs for log in found))


def source_of(log: logs.LogFile, name: str) -> str:
    if name not in log.sources:
        raise UsageError(f"--source: expected a file that {log.path} embeds "
                         f"({', '.join(log.sources) or 'it has none'}), found {name!r}; choose one of these")
    return log.sources[name]


def target_of(log: logs.LogFile) -> float:
    return (tracks.only([log]) or tracks.TRACKS["small"]).target


def as_json(log: logs.LogFile, target: float) -> dict:
    """Return the facts of a log under names that do not change."""
    return {
        "path": printable(str(log.path)),
        "runs": [asdict(run) | {
            "run_id": printable(run.run_id),
            "final_val_loss": run.final_val_loss,
            "final_time_ms": run.final_time_ms,
            "final_step": run.final_step,
            "target": target,
            "time_to_target_ms": run.time_to(target),
            "steps_to_target": run.steps_to(target),
        } for run in log.runs],
        "sha256": log.sha256,
        "size": log.size,
        "problems": log.problems,
        "sources": {name: len(text.splitlines()) for name, text in log.sources.items()},
    }


def print_facts(found: list[logs.LogFile], target: float | None):
    """One row for each run; of a single log also what is known of the file, and its validations."""
    console = terminal()
    if len(found) == 1:
        facts = facts_of(found[0])
        for name, value in facts.items():
            console.print(f"{name:<{max(map(len, facts))}}  {value}")
    grid, common = run_grid(found, target).without_common()
    if grid.rows:
        grid.print(console)
    if common:
        console.print(f"in all: {common}")
    if len(found) == len(found[0].runs) == 1 and found[0].runs[0].val_points:
        rows = [[f"{point.step:,}", nats(point.val_loss), seconds(point.train_time_ms)]
                for point in found[0].runs[0].val_points]
        Grid(["step", "validation loss", "time, s"], rows).print(console)
    for log in found:
        for problem in log.problems:
            console.print(f"{printable(str(log.path))}: {problem}", style="yellow")


def facts_of(log: logs.LogFile) -> dict[str, str]:
    """Return what is known of a file and of all runs in it."""
    facts = {"file": printable(str(log.path)), "bytes": f"{log.size:,}", "SHA-256": log.sha256}
    if log.sources:
        lines = {name: len(text.splitlines()) for name, text in log.sources.items()}
        named = listed(f"{name} ({count:,} lines)" for name, count in lines.items())
        facts["source"] = f"{named}, {sum(lines.values()):,} lines in all; --source NAME prints one"
    for run in log.runs[:1]:
        known = {
            "its SHA-256": run.source_sha256,
            "commit": run.commit,
            "recipe": run.config.get("recipe"),
            "training data": run.training_data,
            "validation data": judged_on(run, tracks.only([log])),
            "resumed": "from a checkpoint: such a run is no record" if run.resumed else None,
            "Python": run.python,
            "CUDA": run.cuda,
            "Triton": run.triton,
            "peak memory": run.peak_mib and f"{run.peak_mib:,} MiB",
        }
        facts |= {name: printable(str(value)) for name, value in known.items() if value}
    return facts


def judged_on(run: logs.RunFacts, track: tracks.Track | None) -> str | None:
    """Say on which tokens a run was judged, and whether they are its track's, where that is known."""
    if run.validation_data is None:
        return None
    said = f"{shown(run.val_tokens, '{:,}')} tokens, SHA-256 {run.validation_data[:12]}..."
    if track is None or track.val_sha256 is None:
        return said
    wanted = (track.val_tokens, track.val_sha256)
    those = (run.val_tokens, run.validation_data) == wanted
    return f"{said}, {'those' if those else 'other than those'} of track {track.name}"


RUN_TITLES = ["run", "steps", "final loss", "time, s", "ms/step", "target", "reached, s", "at step", "seed",
              "ranks", "hardware", "torch"]


def run_row(name: str, run: logs.RunFacts, target: float) -> list[str]:
    """The facts of a run as text, a cell for each of RUN_TITLES."""
    return [
        name,
        shown(run.final_step) + ("" if run.complete else f" of {shown(run.total_steps)}"),
        nats(run.final_val_loss),
        seconds(run.final_time_ms),
        shown(run.step_avg_ms, "{:,.2f}"),
        f"{target:g}",
        seconds(run.time_to(target)),
        shown(run.steps_to(target), "{:,.1f}"),
        shown(run.seed),
        shown(run.world_size),
        shown(run.hardware),
        shown(run.torch),
    ]


def run_grid(found: list[logs.LogFile], target: float | None) -> Grid:
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(log.path)) for log in found])
    rows = []
    for log in found:
        name = short_name(os.path.relpath(os.path.abspath(log.path), folder))
        rows += [run_row(name + run.run_id[len(log.path.stem):], run, target or target_of(log))
                 for run in log.runs]
    return Grid(RUN_TITLES, rows)
