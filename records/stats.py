"""Judge a set of runs: the loss rule of their track, the spread of losses and times, and both against a baseline.

All runs of all logs count, also several in one file. None is left out silently: a set that holds a run without the
validation that counts cannot be judged, and to leave one out is to name the logs that stay."""
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, is_dataclass

from records import logs
from records.errors import RecordError
from records.tracks import TRACKS, Track, choose

HELP = "the loss rule of a track, intervals, losses and times against a baseline"
EXAMPLE = ("python -m records stats bench/results/2026-11-22_shakespeare_cpu/muon "
           "--baseline bench/results/2026-11-22_shakespeare_cpu/adamw")
FACTS = {"torch": "torch", "gpu_name": "hardware", "world_size": "world size", "total_steps": "number of steps"}  # Run -> words
NAMED = 5  # examples in a note


@dataclass(frozen=True)
class Group:
    """Runs with what counts of them: loss and time at `step`, nan where a run has none."""
    runs: list[logs.Run]
    step: int | None  # None: the last one of each run, and these differ
    losses: list[float]
    seconds: list[float]
    notes: list[str]


def listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def gather(files: list[logs.Log], track: Track, step: int | None) -> Group:
    """The runs of these logs at a step; without one, at the last, which a track with stated steps wants to be the same."""
    runs, no_logs, copies, notes = {}, [], [], []
    for log in files:
        if not any(run.val_points for run in log.runs):
            no_logs.append(log.path.name)
        for run in log.runs:
            if run.val_points and runs.setdefault(repr(run.val_points), run) is not run:
                copies.append(run.run_id)
    runs = list(runs.values())
    if not runs:
        raise RecordError(f"expected logs with validations, found none in {len(files)} files; check the paths")
    if no_logs:
        notes.append(f"Left out, for there is no validation in them: {listed(no_logs)}.")
    if copies:
        notes.append(f"Counted once, for they are the same as another run to the millisecond: {listed(copies)}.")
    steps = {run.final_step for run in runs}
    if step is None and len(steps) > 1 and track.claim_step == "stated":
        raise RecordError(f"expected runs that end at the same step, found {', '.join(map(str, sorted(steps)[:5]))}; say which "
                          "step counts: --step=N, --baseline-step=N")
    points = []
    for run in runs:
        if step is not None or track.claim_step == "stated":
            points.append(run.at(run.final_step if step is None else step))
        else:  # llm.c does not print the total; any other run must have reached it
            points.append(run.val_points[-1] if run.complete or run.total_steps is None else None)
        if points[-1] is None:
            notes.append(f"{run.run_id} has no validation at {'its last step' if step is None else f'step {step}'} and ends "
                         f"at {run.final_step} of {run.total_steps}: name the logs that count to leave it out.")
    for field, name in FACTS.items():
        values = Counter(str(getattr(run, field)) for run in runs)
        if len(values) > 1:
            notes.append(f"Runs differ in {name}: {listed([f'{value} ({n} runs)' for value, n in values.most_common()])}.")
    seeds = Counter(run.seed for run in runs if run.seed is not None)
    if repeated := [str(seed) for seed, n in seeds.items() if n > 1]:
        notes.append(f"Runs share a seed, and the rule wants independent ones: {listed(repeated)}.")
    if step is None and len(steps) == 1:
        step = steps.pop()
    return Group(runs, step, [p.val_loss if p else math.nan for p in points],
                 [p.train_time_ms / 1000 if p and p.train_time_ms is not None else math.nan for p in points], notes)


def compare(group: Group, baseline: Group, track: Track) -> dict:
    """Tests against the baseline, None where there is nothing to compare: times of different hardware, say."""
    from records import statistics
    other = [name for field, name in FACTS.items() if field != "total_steps"
             and {getattr(run, field) for run in group.runs} != {getattr(run, field) for run in baseline.runs}]
    group.notes.extend(f"Other {name} than the baseline." for name in other)
    seconds = speed_up = pairwise = None
    if not {"hardware", "world size"} & set(other):
        seconds = statistics.welch(group.seconds, baseline.seconds)
        speed_up = statistics.ratio_interval(baseline.seconds, group.seconds)
    if None not in (track.loss_per_step, group.step, baseline.step):
        pairwise = statistics.pairwise_rule(group.losses, baseline.losses, baseline.step - group.step, track.loss_per_step)
    return dict(loss=statistics.welch(group.losses, baseline.losses), seconds=seconds, speed_up=speed_up, pairwise=pairwise)


def facts(group: Group) -> dict:
    from records import statistics
    return dict(n=len(group.runs), step=group.step, **{
        name: dict(mean=statistics.mean_interval(values), sd=statistics.mean_sd(values)[1], min=min(values), max=max(values))
        for name, values in (("loss", group.losses), ("seconds", group.seconds))})


def sentences(track: Track, rule, against: dict | None):
    yield f"Loss rule of track {track.name}: {rule}."
    if against is None:
        return
    yield f"Loss against the baseline: {against['loss']:+.5f}."
    if against["seconds"]:
        yield f"Seconds against the baseline: {against['seconds']:+.2f}."
        yield f"Speed-up: {against['speed_up']:.3f}."
    else:
        yield "Times are not compared: they are of other hardware than the baseline's."
    if against["pairwise"]:
        yield f"Pairwise rule: {against['pairwise']}."


def table(columns: dict[str, dict]):
    """A rich table of what facts() gives."""
    from rich.table import Table
    result = Table("", *columns)
    result.add_row("runs", *(str(column["n"]) for column in columns.values()))
    result.add_row("step", *("various" if column["step"] is None else str(column["step"]) for column in columns.values()))
    for name, digits in (("loss", 5), ("seconds", 2)):
        for key in ("mean", "sd", "min", "max"):
            values = [column[name][key] for column in columns.values()]
            result.add_row(f"{name}: {key}", *("none" if value is None else format(value, f".{digits}f") for value in values))
    return result


def plain(value):
    """For JSON: results as dictionaries, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if is_dataclass(value):
        passes = {"passes": value.passes} if hasattr(value, "passes") else {}
        return plain(asdict(value) | passes)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """Names out of files are hostile, and a terminal obeys control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def add_arguments(parser):
    parser.add_argument("paths", nargs="+", metavar="PATH", help="log, or folder of logs")
    parser.add_argument("--baseline", nargs="+", metavar="PATH", help="logs to compare with; they count no more among PATH")
    parser.add_argument("--track", help=f"{', '.join(TRACKS)} (default: the one of the logs)")
    parser.add_argument("--step", type=int, metavar="N", help="step that counts (default: the last one)")
    parser.add_argument("--baseline-step", type=int, metavar="N", help="the same for the baseline (default: its last one)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args) -> int:
    from records import statistics
    others = logs.find(args.baseline or [])
    resolved = {path.resolve() for path in others}
    found = [logs.read(path) for path in logs.find(args.paths) if path.resolve() not in resolved]
    track = choose(args.track, found)
    group, baseline, against = gather(found, track, args.step), None, None
    if args.baseline:
        baseline = gather([logs.read(path) for path in others], track, args.baseline_step)
        against = compare(group, baseline, track)
    rule = statistics.loss_rule(track, group.losses)
    columns = {"candidate": facts(group)} | ({"baseline": facts(baseline)} if baseline else {})
    notes = [*group.notes, *(f"Baseline: {note}" for note in (baseline.notes if baseline else ()))]
    if args.json:
        runs = [dict(run_id=run.run_id, loss=loss, seconds=seconds)
                for run, loss, seconds in zip(group.runs, group.losses, group.seconds)]
        print(json.dumps(plain(dict(track=track.name, **columns, runs=runs, rule=rule, against=against, notes=notes)), indent=2))
    else:
        from rich.console import Console
        Console(width=None if sys.stdout.isatty() else 120).print(table(columns))
        for line in (*notes, *sentences(track, rule, against)):
            print(printable(line))
    return 0 if rule.passes else 1
