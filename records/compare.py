"""Compare runs: the loss rule of their track, time and steps to a loss, curves side by side, where they part,
what differs.

A PATH that is a log is a group of its own; the logs in a folder are a group of seeds, those of each subfolder
another one. The first group is what the others are compared with; of an A/B experiment that is its baseline,
and with --history a record of the public speedrun. Numbers are mean ± standard deviation over the runs of a
group; intervals are of 95 %, probabilities one-sided. All runs count: a set that holds a run without the
validation that counts cannot be judged, and to leave one out is to name the logs that stay. Between
validations a curve is a straight line.
"""
import itertools
import json
import math
from pathlib import Path

import numpy as np

from records import history, show, statistics
from records.difference import differences
from records.errors import RecordError
from records.groups import FACTS, Counted, RunGroup, count, find_groups
from records.logs import RunFacts, ValPoint, printable
from records.palette import COLORS, dashed
from records.rules import NOT_TRAINING
from records.tracks import TRACKS, Track, choose

HELP = "groups of runs side by side: loss rule, speed-up, loss by step and time, changes of the source"
EXAMPLE = ("python -m records compare records/track_0_laptop/2026-11-22_AdamW "
           "records/track_0_laptop/2026-11-22_Muon")

AXES = ("step", "tokens", "time")
ROWS = 12  # most rows of a table of losses
ALPHA = 0.01  # probability that equal curves are said to part
SUFFIXES = (".png", ".svg", ".pdf")


def add_arguments(parser):
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="a log, or a folder of logs or of such folders")
    parser.add_argument("--track", metavar="TRACK",
                        help=f"{', '.join(TRACKS)} (default: that of the first log)")
    parser.add_argument("--target", type=show.target_loss, metavar="LOSS",
                        help="validation loss to reach (default: that of the track, or 3.28)")
    parser.add_argument("--step", type=int, metavar="N",
                        help="step whose validation counts (default: the last one)")
    parser.add_argument("--history", type=int, metavar="N",
                        help="is my loss normal? Compare with public record N of the track, or of track "
                             "small")
    parser.add_argument("--plot", type=Path, metavar="FILE",
                        help=f"draw the curves; ends in {', '.join(SUFFIXES)}")
    parser.add_argument("--diff", action="store_true",
                        help="print the changes of the embedded sources line by line")
    parser.add_argument("--json", action="store_true", help="figures for a program")


def run(args) -> int:
    groups, left_out = find_groups(args.paths)
    track = choose(args.track, []) if args.track else show.track_of(groups[0].logs[0])
    target = args.target or (track or TRACKS["small"]).target
    if args.history is not None:
        groups.insert(0, public_group(track, args.history))
    counted = [count(group, track, args.step) for group in groups]

    if args.plot:
        plot(groups, target, args.plot)
    if args.json:
        print(json.dumps(statistics.plain(as_json(groups, counted, track, left_out)), indent=1))
        return 0
    print_groups(groups, counted, track, target, left_out)
    for group, its in zip(groups[1:], counted[1:]):
        console = show.terminal()
        console.print(f"\n{group.name} against {groups[0].name}", style="bold", soft_wrap=True)
        for sentence in against(groups[0], counted[0], group, its, track, target):
            console.print(printable(f"  {sentence}"), soft_wrap=True)
        if args.history is not None:
            console.print(f"  {beside(groups[0], group)}", soft_wrap=True)
        if args.diff:
            print_differences(console, groups[0], group)
    return 0


def print_groups(groups: list[RunGroup], counted: list[Counted], track: Track | None, target: float,
                 left_out):
    """The table of groups, what makes it doubtful, the loss rule of each, and their curves side by side."""
    console = show.terminal()
    console.print(summary(groups, target))
    for warning in [*warnings(groups, counted), *(f"{file} is left out: {why}" for file, why in left_out)]:
        console.print(printable(f"warning: {warning}"), style="yellow", soft_wrap=True)
    if track:
        for group, its in zip(groups, counted):
            if group.logs:  # of a public record only some runs are here
                rule = statistics.loss_rule(track, its.losses)
                console.print(printable(f"loss rule of track {track.name}, {group.name}: {rule}"),
                              soft_wrap=True)
    for axis in AXES:
        title, table = losses_by(axis, groups)
        console.print(f"\n{printable(title)}", style="bold", soft_wrap=True)
        if table:
            console.print(table)


def spread(values: list, form: str, factor: float = 1) -> str:
    """Mean ± standard deviation of those that are known."""
    mean, sd = statistics.mean_sd([factor * value for value in values if value is not None])
    return "-" if mean is None else f"{mean:{form}}" if sd is None else f"{mean:{form}} ± {sd:{form}}"


def summary(groups: list[RunGroup], target: float):
    table = show.new_table("group", "runs", "steps", "final loss", "time, s", "ms/step", f"reach {target:g}",
                           "after, s",
                           "at step", words=("group",))
    for group in groups:
        runs = group.runs
        reached = [run.steps_to(target) for run in runs]
        ends = sorted({run.final_step for run in runs})
        table.add_row(
            group.name,
            str(len(runs)),
            f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,} to {ends[-1]:,}",
            spread([run.final_val_loss for run in runs], ".4f"),
            spread([run.final_time_ms for run in runs], ",.2f", 1e-3),
            spread([run.step_avg_ms for run in runs], ",.2f"),
            f"{len(runs) - reached.count(None)} of {len(runs)}",
            spread([run.time_to(target) for run in runs], ",.2f", 1e-3),
            spread(reached, ",.1f"),
        )
    return table


def warnings(groups: list[RunGroup], counted: list[Counted]):
    """What makes a comparison doubtful: facts that differ between groups, and the notes of each group."""
    for name, fact in FACTS.items():
        values = {group.name: sorted({shown(fact(run)) for run in group.runs}) for group in groups}
        if len({value for found in values.values() for value in found}) > 1:
            yield f"{name} differs: " + "; ".join(f"{group} {' and '.join(found)}" for group,
                                                  found in values.items())
    for group, its in zip(groups, counted):
        for note in [*group.notes, *its.notes]:
            yield note if len(groups) == 1 else f"{group.name}: {note}"


def shown(value) -> str:
    return f"{value:,}" if isinstance(value, int) else show.shown(value)


# Curves side by side

def tokens_of(run: RunFacts) -> list[float] | None:
    """Tokens trained on at each validation; None where the log does not say.

    They follow from the settings in the log, where the batch is given by stage as by train_gpt.py's
    Config.stage_starts.
    """
    names = ("train_steps", "extension_steps", "stages", "adam_every", "batch_tokens")
    try:
        total, extension, stages, every, batches = (run.config[name] for name in names)
        if not (0 < stages <= 100 and 0 < every <= total):
            return None
        scheduled = total - extension
        starts = [min(round(scheduled * k / stages / every) * every, scheduled)
                  for k in range(stages)] + [scheduled]
        ends = [*starts[1:], total]
        batches = [batches[min(k, len(batches) - 1)] for k in range(len(starts))]
        return [float(sum(batch * max(min(point.step, end) - start, 0)
                          for start, end, batch in zip(starts, ends, batches))) for point in run.val_points]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):  # a config line can hold anything
        return None


def places(run: RunFacts, axis: str) -> list[float] | None:
    """Where the validations of a run stand: steps, tokens or seconds."""
    if axis == "tokens":
        return tokens_of(run)
    if axis == "step":
        return [point.step for point in run.val_points]
    times = [point.train_time_ms for point in run.val_points]
    return None if None in times else [ms / 1000 for ms in times]


def shared_steps(groups: list[RunGroup]) -> list[int]:
    """Steps, after the first, at which every run has a validation."""
    steps = set.intersection(*({point.step for point in run.val_points} for group in groups
                               for run in group.runs))
    return sorted(steps - {0})


def losses_by(axis: str, groups: list[RunGroup]):
    """A title, and a table of mean losses along the runs of the first group by step, tokens or time.

    The table is None where the title says it all.
    """
    found = {group.name: [places(run, axis) for run in group.runs] for group in groups}
    if unknown := [name for name, curves in found.items() if None in curves]:
        return f"loss by {axis}: unknown, the logs of {' and '.join(unknown)} do not tell it", None
    if axis == "tokens" and (batch := only_batch(groups, found)):
        return f"loss by tokens: as by step, for every step is of {batch:,.0f} tokens", None

    grid = shared_steps(groups[:1]) if axis == "step" else even_grid(found[groups[0].name])
    if len(grid) > ROWS:
        grid = [grid[k * (len(grid) - 1) // (ROWS - 1)] for k in range(ROWS)]
    table = show.new_table("time, s" if axis == "time" else axis, *found)
    columns = [np.transpose([losses_at(grid, run, curve) for run,
                             curve in zip(group.runs, found[group.name])])
               for group in groups]
    for place, *losses in zip(grid, *columns):
        cells = ["-" if np.isnan(column).any() else spread(column.tolist(), ".4f") for column in losses]
        table.add_row(f"{place:,.1f}" if axis == "time" else f"{place:,.0f}", *cells)
    return f"loss by {axis}", table


def only_batch(groups: list[RunGroup], found: dict[str, list]) -> float | None:
    """Tokens of a step, where they are the same in all steps of all runs."""
    batches = {tokens / point.step for group in groups for run, curve in zip(group.runs, found[group.name])
               for tokens, point in zip(curve, run.val_points) if point.step}
    return batches.pop() if len(batches) == 1 else None


def even_grid(curves: list[list[float]]) -> list[float]:
    """Places at even distances from the second validation on: up to there a curve is far from a
    straight line."""
    begin = max(sorted(curve)[:2][-1] for curve in curves)
    end = min(max(curve) for curve in curves)
    return np.linspace(begin, max(begin, end), ROWS).tolist()


def losses_at(grid: list[float], run: RunFacts, curve: list[float]) -> list[float]:
    """The loss of a run at each place of a grid, nan where it has none; `curve` tells where its
    validations stand."""
    pairs = sorted(zip(curve, (point.val_loss for point in run.val_points)))
    where, losses = zip(*pairs[len(pairs) > 1:])
    return np.interp(grid, where, losses, left=math.nan, right=math.nan).tolist()


# One group against another

def tests_against(first: RunGroup, its_first: Counted, group: RunGroup, its: Counted,
                  track: Track | None) -> dict:
    """Tests of a group against the first one; None where there is nothing to compare, such as times
    of different hardware."""
    same_machine = all({fact(run) for run in group.runs} == {fact(run) for run in first.runs}
                       for fact in (FACTS["hardware"], FACTS["world size"]))
    pairwise = None
    if track and None not in (track.loss_per_step, its.step, its_first.step):
        pairwise = statistics.pairwise_rule(its.losses, its_first.losses, its_first.step - its.step,
                                            track.loss_per_step)
    return {
        "loss": statistics.welch(its.losses, its_first.losses),
        "seconds": statistics.welch(its.seconds, its_first.seconds) if same_machine else None,
        "speed_up": statistics.ratio_interval(its_first.seconds, its.seconds) if same_machine else None,
        "pairwise": pairwise,
    }


def against(first: RunGroup, its_first: Counted, group: RunGroup, its: Counted, track: Track | None,
            target: float):
    """Sentences about what a group gains over the first one, and by what it may do so."""
    tests = tests_against(first, its_first, group, its, track)
    yield f"loss: {tests['loss']:+.5f}"
    if tests["pairwise"]:
        yield f"pairwise rule: {tests['pairwise']}"
    yield speed_up(f"steps to {target:g}", first, group, lambda run: run.steps_to(target))
    if tests["seconds"]:
        yield f"seconds: {tests['seconds']:+.2f}"
        yield speed_up(f"time to {target:g}", first, group, lambda run: run.time_to(target))
        yield f"speed-up in time of the whole run: {tests['speed_up']:.3f}"
    else:
        yield "times are not compared: they are of different hardware"
    yield parting(first, group)
    yield changed_sources(first, group)
    yield from changed_settings(first, group)


def speed_up(name: str, first: RunGroup, group: RunGroup, fact) -> str:
    before, after = ([fact(run) for run in side.runs] for side in (first, group))
    if missing := (before + after).count(None):
        return f"speed-up in {name}: unknown, {missing} of {len(before + after)} runs have none"
    return f"speed-up in {name}: {statistics.ratio_interval(before, after):.3f}"


def parting(first: RunGroup, group: RunGroup) -> str:
    """Where the curves part: the first validation at which their means differ significantly."""
    steps = shared_steps([first, group])
    if not steps:
        return "where the curves part: unknown, there is no step at which all have a validation"
    results = [statistics.welch(*([run.at(step).val_loss for run in side.runs] for side in (group, first)))
               for step in steps]
    if all(result.p is None for result in results):
        return f"where the curves part: unknown, {results[0].why}"
    test = (f"Welch's t-test at {len(steps)} validations, two-sided, {ALPHA:g} shared out over them "
            "(Bonferroni)")
    for step, result in zip(steps, results):
        p = 1 if result.p is None else 2 * min(result.p, 1 - result.p)
        if p < ALPHA / len(steps):
            gap = result.difference.estimate
            return f"the curves part by step {step:,}: {gap:+.4f}, p = {p:.2g} ({test})"
    return f"the curves do not part ({test})"


def changed_sources(first: RunGroup, group: RunGroup) -> str:
    if not (first.sources and group.sources):
        return "source: not in the logs of both"
    changes = [f"{change.file} +{change.added:,} -{change.removed:,}"
               for change in differences(first.sources, group.sources)]
    return "source: " + (", ".join(changes) or "the same")


def changed_settings(first: RunGroup, group: RunGroup):
    """Settings of our own logs, of the first run of each group."""
    before, after = first.runs[0].config, group.runs[0].config
    if before and after:
        changes = [f"{name} {json.dumps(before.get(name))[:60]} -> {json.dumps(after.get(name))[:60]}"
                   for name in before | after if name not in NOT_TRAINING
                   and before.get(name) != after.get(name)]
        yield "settings: " + (", ".join(changes) or "the same")


def print_differences(console, first: RunGroup, group: RunGroup):
    for change in differences(first.sources, group.sources):
        title = f"\n--- {first.name}: {change.file}\n+++ {group.name}: {change.file}"
        console.print(title, style="bold", soft_wrap=True)
        for kind, line in change.lines or [("same", "too different to be laid out line by line")]:
            style = {"added": "green", "removed": "red", "place": "cyan"}.get(kind)
            console.print(printable(line.expandtabs(4)), style=style, soft_wrap=True)


# Public records

def public_group(track: Track | None, number: int) -> RunGroup:
    """The runs of a public record whose curves are kept in records/history, as a group."""
    name = track.name if track else "small"
    kept = {run_id: points for (of_track, its_number, run_id), points in history.curves().items()
            if (of_track, its_number) == (name, number)}
    if not any(of_track == name for of_track, *_ in history.curves()):
        raise RecordError(f"--history: expected a log of a track with public records, found track {name}; "
                          "leave it out")
    if not kept:
        known = sorted({its_number for of_track, its_number, _ in history.curves() if of_track == name})
        raise RecordError(f"--history: expected the number of a public record of track {name} whose curve is "
                          "kept, found "
                          f"{number}; choose one from {known[0]} to {known[-1]}, see records/README.md")
    finals = {final.run_id: final for final in history.finals()
              if (final.track, final.number) == (name, number)}
    return RunGroup(f"public record {number}", [],
                    [public_run(points, finals[run_id]) for run_id, points in kept.items()], [])


def public_run(points: tuple, final: history.HistoryFinal) -> RunFacts:
    return RunFacts(
        run_id=final.run_id,
        val_points=tuple(ValPoint(point.step, point.val_loss, point.train_time_ms, {}) for point in points),
        total_steps=final.total_steps,
        complete=final.final_step == final.total_steps,
        torch=final.torch_version or None,
        gpu_name=final.gpu_name or None,
        num_gpus=final.n_gpus,
        world_size=final.world_size,
        step_avg_ms=final.final_train_time_ms and final.final_train_time_ms / final.final_step,
    )


def beside(public: RunGroup, group: RunGroup) -> str:
    """How far the mean loss of a group is from that of a public record, at the validations of the
    group within both."""
    steps = shared_steps([group])[1:]
    means = [np.mean([losses_at(steps, run, places(run, "step")) for run in side.runs], axis=0)
             for side in (group, public)] if steps else ([], [])
    gaps = {step: gap for step, gap in zip(steps, np.subtract(*means)) if math.isfinite(gap)}
    if not gaps:
        return "beside its curve: unknown, there is no validation after the first within it"
    widest = max(gaps, key=lambda step: abs(gaps[step]))
    last = max(gaps)
    return (f"beside its curve, at {len(gaps)} validations: {gaps[last]:+.4f} at step {last:,}, "
            f"{np.mean([*gaps.values()]):+.4f} on average, at most {gaps[widest]:+.4f} at step {widest:,}")


# For programs

def as_json(groups: list[RunGroup], counted: list[Counted], track: Track | None, left_out) -> dict:
    return {
        "track": track and track.name,
        "groups": [{
            "name": group.name,
            "n": len(group.runs),
            "step": its.step,
            **figures(its),
            "rule": track and statistics.loss_rule(track, its.losses),
            "against": tests_against(groups[0], counted[0], group, its, track) if k else None,
            "notes": [*group.notes, *its.notes],
            "runs": [dict(run_id=run.run_id, loss=loss, seconds=seconds)
                     for run, loss, seconds in zip(group.runs, its.losses, its.seconds)],
        } for k, (group, its) in enumerate(zip(groups, counted))],
        "left_out": dict(left_out),
    }


def figures(its: Counted) -> dict:
    """Mean with its interval, standard deviation and extremes of losses and seconds."""
    return {name: dict(mean=statistics.mean_interval(values), sd=statistics.mean_sd(values)[1],
                       min=min(values), max=max(values))
            for name, values in (("loss", its.losses), ("seconds", its.seconds))}


# The plot

def band(group: RunGroup, axis: str) -> list[tuple[float, float, float, float]]:
    """(place, mean, lowest and highest loss) at each step at which all runs of a group have a validation."""
    rows = {}
    for run in group.runs:
        for place, point in zip(places(run, axis) or [], run.val_points):
            if math.isfinite(point.val_loss):
                rows.setdefault(point.step, []).append((place, point.val_loss))
    columns = [tuple(zip(*row)) for _, row in sorted(rows.items()) if len(row) == len(group.runs)]
    return [(sum(where) / len(where), sum(losses) / len(losses), min(losses), max(losses)) for where,
            losses in columns]


def plot(groups: list[RunGroup], target: float, path: Path):
    """Draw the mean loss of each group, in a band from its lowest to its highest run, against steps and time.

    All but the steep start is shown above, what is near the target below.
    """
    # draws into a file, without pyplot and a screen; half a second to import
    from matplotlib.figure import Figure

    if path.suffix not in SUFFIXES:
        raise RecordError(f"--plot: expected a name that ends in {', '.join(SUFFIXES)}, found {path.name!r}; "
                          "change it")
    if len(groups) > len(COLORS):
        raise RecordError(f"--plot: expected at most {len(COLORS)} groups, which have as many colours, found "
                          f"{len(groups)}; "
                          "name fewer")
    bands = {axis: [band(group, axis) for group in groups] for axis in ("step", "time")}
    drawn = [rows for rows in bands["step"] if rows]
    lowest = min([target, *(row[2] for rows in drawn for row in rows)])
    start = max([target, *(rows[len(rows) > 2][1]
                           for rows in drawn)])  # after the first validation, if there are enough
    near = min(start, target + 3 * max(target - lowest, 0.01 * target))

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for (ax_row, top), (column, axis) in itertools.product(zip(axes, (start, near)), enumerate(bands)):
        draw(ax_row[column], groups, bands[axis], target, (lowest, top))
        ax_row[column].set_xlabel("steps" if axis == "step" else "training time, seconds")
    for ax_row in axes:
        ax_row[0].set_ylabel("validation loss")
    axes[0, 0].legend(title="mean, and lowest to highest run")
    axes[0, 0].annotate(f"target {target:g}", (0.01, target), xycoords=("axes fraction", "data"), va="bottom",
                        color="gray")
    try:
        figure.savefig(path, dpi=150)
    except OSError as e:
        raise RecordError(f"--plot: expected to write {path}, found: {e.strerror}; "
                          "choose another folder") from None


def draw(ax, groups: list[RunGroup], bands: list, target: float, losses: tuple[float, float]):
    """One panel: the bands of all groups between two losses."""
    lowest, top = losses
    for k, (group, rows) in enumerate(zip(groups, bands)):
        if rows:
            x, mean, low, high = zip(*rows)
            # no formula, and none to be left out
            label = f" {group.name} (n = {len(group.runs)})".replace("$", r"\$")
            ax.plot(x, mean, marker=".", color=COLORS[k], linestyle="--" if dashed(k) else "-", label=label)
            ax.fill_between(x, low, high, color=COLORS[k], alpha=0.2, linewidth=0)
    ax.axhline(target, color="gray", linewidth=1, linestyle=":")
    margin = 0.05 * max(top - lowest, 0.01 * target)
    ax.set_ylim(lowest - margin, top + margin)
    if shown_places := [row[0] for rows in bands for row in rows if row[2] <= top]:
        margin = 0.03 * (max(shown_places) + 1)
        ax.set_xlim(min(shown_places) - margin, max(shown_places) + margin)
    ax.grid(alpha=0.3)
