"""Show the facts of logs: one log in full, several as a table with a row for each run.

Formats of the public speedrun have the ids of records/logs.py; "own" is train_gpt.py's, "X" is no log. Time
and steps to the target are those of the first validation at or below it, less what a straight line from the
validation before saves. With --json: one object for a file, a list of them for a folder or several paths.
What a log does not say is null, and so is a loss that is not a finite number.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

from records import logs, tracks
from records.errors import RecordError
from records.logs import printable

HELP = "facts of any log: losses, times, versions, hardware, hashes, time to the target"
EXAMPLE = "python -m records show records/track_0_laptop/2026-11-24_TailAverage"

POINTS_SHOWN = 40  # validations of a run in the terminal; --json has all


def target_loss(text: str) -> float:
    """An argument of the command line."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a loss above 0, found {text}")
    return value


def add_arguments(parser):
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a log, or a folder of logs")
    parser.add_argument("--target", type=target_loss, metavar="LOSS",
                        help="validation loss to reach (default: that of the log's track, or 3.28)")
    parser.add_argument("--source", metavar="FILE",
                        help="print a source file that the log embeds, such as train_gpt.py")
    parser.add_argument("--json", action="store_true", help="facts for a program, with every validation")


def run(args) -> int:
    paths = logs.find(args.paths)
    if not paths:
        raise RecordError(f"{args.paths[0]}: expected logs ({', '.join(sorted(logs.SUFFIXES))}), found none; "
                          "check the path")
    found, errors = [], []
    for path in paths:
        try:
            found.append(logs.read(path))
        except RecordError as e:  # one file that cannot be opened does not hide the others
            errors.append(e)
    if not found:
        raise errors[0]
    for error in errors:
        print(f"records: {error}", file=sys.stderr)

    if args.source:
        print(source_of(found[0], args.source), end="")
    elif args.json:
        facts = [as_json(log, args.target or target_of(log)) for log in found]
        one_file = len(args.paths) == 1 and not Path(args.paths[0]).is_dir()
        print(json.dumps(facts[0] if one_file else facts, indent=1, allow_nan=False))
    else:
        print_facts(found, args.target)
    return int(bool(errors) or any(log.variant == "X" for log in found))


def source_of(log: logs.LogFile, name: str) -> str:
    if name not in log.sources:
        raise RecordError(f"--source: expected a file that {log.path} embeds "
                          f"({', '.join(log.sources) or 'it has none'}), "
                          f"found {name!r}; choose one of these")
    return log.sources[name]


def track_of(log: logs.LogFile) -> tracks.Track | None:
    """The track that a log is of, None where it does not say."""
    try:
        return tracks.choose(None, [log])
    except RecordError:
        return None


def target_of(log: logs.LogFile) -> float:
    return (track_of(log) or tracks.TRACKS["small"]).target


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def as_json(log: logs.LogFile, target: float) -> dict:
    """Facts by names that do not change; new ones are only ever added at an end."""
    return {
        "path": os.fspath(log.path),
        "variant": log.variant,
        "runs": [{
            "run_id": run.run_id,
            "val_points": [{"step": point.step, "val_loss": finite(point.val_loss),
                            "train_time_ms": point.train_time_ms}
                           for point in run.val_points],
            "first_val_loss": finite(run.first_val_loss),
            "final_val_loss": finite(run.final_val_loss),
            "final_time_ms": run.final_time_ms,
            "final_step": run.final_step,
            "total_steps": run.total_steps,
            "complete": run.complete,
            "torch": run.torch,
            "gpu_name": run.gpu_name,
            "num_gpus": run.num_gpus,
            "world_size": run.world_size,
            "seed": run.seed,
            "peak_mib": run.peak_mib,
            "source_sha256": run.source_sha256,
            "target": target,
            "time_to_target_ms": run.time_to(target),
            "steps_to_target": run.steps_to(target),
            "step_avg_ms": run.step_avg_ms,
            "cuda": run.cuda,
            "triton": run.triton,
            "python": run.python,
            "val_tokens": run.val_tokens,
        } for run in log.runs],
        "sha256": log.sha256,
        "size": log.size,
        "problems": log.problems,
        "sources": {name: len(text.splitlines()) for name, text in log.sources.items()},
    }


def shown(value, form: str = "{}") -> str:
    return "-" if value is None else form.format(value)


def seconds(ms: float | None) -> str:
    return shown(None if ms is None else ms / 1000, "{:,.2f}")


def nats(loss: float | None) -> str:
    """A loss with the decimals of its log, or four."""
    return shown(loss, "{:.4f}" if loss == round(loss or 0, 4) else "{}")


def terminal():
    """A rich console that takes no text for markup; wide where no terminal sets a limit."""
    from rich.console import Console
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)


def new_table(*names: str, words: tuple[str, ...] = ()):
    """An empty rich table; columns of words stand to the left, those of numbers to the right."""
    from rich import box
    from rich.table import Table
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in words else "right", overflow="fold")
    return table


def print_facts(found: list[logs.LogFile], target: float | None):
    console = terminal()
    if len(found) == 1:
        print_one(console, found[0], target or target_of(found[0]))
    else:
        print_runs(console, found, target)
    for log in found:
        for problem in log.problems:
            console.print(f"{printable(str(log.path))}: {problem}", style="yellow", soft_wrap=True)


def print_runs(console, found: list[logs.LogFile], target: float | None):
    """One row for each run. What is the same in all of them stands below the table once."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(log.path)) for log in found])
    rows = []
    for log in found:
        loss = target or target_of(log)
        name = os.path.relpath(os.path.abspath(printable(str(log.path))), folder)
        for run in log.runs:
            rows.append({
                "run": name + run.run_id[len(log.path.stem):],
                "format": log.variant,
                "steps": shown(run.final_step) + ("" if run.complete else f" of {shown(run.total_steps)}"),
                "final loss": nats(run.final_val_loss),
                "time, s": seconds(run.final_time_ms),
                "ms/step": shown(run.step_avg_ms, "{:,.2f}"),
                "target": f"{loss:g}",
                "reached, s": seconds(run.time_to(loss)),
                "at step": shown(run.steps_to(loss), "{:,.1f}"),
                "seed": shown(run.seed),
                "ranks": shown(run.world_size),
                "hardware": shown(run.hardware),
                "torch": shown(run.torch),
            })
    if not rows:
        return
    common = {name: value for name, value in rows[0].items() if len(rows) > 1
              and all(row[name] == value for row in rows)}
    table = new_table(*(name for name in rows[0] if name not in common),
                      words=("run", "format", "hardware", "torch"))
    for row in rows:
        table.add_row(*(value for name, value in row.items() if name not in common))
    console.print(table)
    if common:
        console.print("in all: " + ", ".join(f"{name} {value}" for name, value in common.items()
                                             if value != "-"))


def print_one(console, log: logs.LogFile, target: float):
    """Facts of the file, then of its run with the validations, or of its runs as a table."""
    from rich.table import Table

    facts = [("file", printable(str(log.path))), ("format", log.variant), ("bytes", f"{log.size:,}"),
             ("SHA-256", log.sha256)]
    if log.sources:
        facts.append(("source", ", ".join(f"{name} ({len(text.splitlines()):,} lines)" for name,
                                          text in log.sources.items())))
    if log.runs:
        run = log.runs[0]
        facts += [("its SHA-256", shown(run.source_sha256)), ("Python", shown(run.python)),
                  ("torch", shown(run.torch)),
                  ("CUDA", shown(run.cuda)), ("Triton", shown(run.triton)), ("hardware", shown(run.hardware)),
                  ("world size", shown(run.world_size)), ("peak memory", shown(run.peak_mib, "{:,} MiB"))]
    if len(log.runs) == 1:
        time, steps = run.time_to(target), run.steps_to(target)
        reached = "never" if steps is None else f"at step {steps:,.1f} (interpolated)"
        if time is not None:
            reached += f", after {seconds(time)} s"
        facts += [("seed", shown(run.seed)),
                  ("steps", f"{shown(run.final_step)} of "
                            f"{shown(run.total_steps)}{'' if run.complete else ': not complete'}"),
                  ("final loss", nats(run.final_val_loss)),
                  ("training time", f"{seconds(run.final_time_ms)} s"),
                  ("time per step", shown(run.step_avg_ms, "{:,.2f} ms")), (f"loss {target:g}", reached)]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    console.print(table)
    if len(log.runs) > 1:
        print_runs(console, [log], target)
    elif log.runs and run.val_points:
        console.print(points_table(run))


def points_table(run: logs.RunFacts):
    """The validations; of very many the first ten and the last ones."""
    points = run.val_points
    names = list(dict.fromkeys(name for point in points for name in point.extra))
    table = new_table("step", "validation loss", "time, s", *names)
    for i, point in enumerate(points):
        if len(points) <= POINTS_SHOWN or i < 10 or i >= len(points) - POINTS_SHOWN + 10:
            table.add_row(f"{point.step:,}", nats(point.val_loss), seconds(point.train_time_ms),
                          *(nats(point.extra.get(name)) for name in names))
        elif i == 10:
            table.add_row(*["..."] * (3 + len(names)))
    return table
