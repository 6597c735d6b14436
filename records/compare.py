"""Compare runs: time and steps to a loss, curves side by side, where they part, what differs in sources and settings.

A PATH that is a log is a group of its own; the logs in a folder are a group of seeds, those of each subfolder another one.
The first group is what the others are compared with. Numbers are mean ± standard deviation over the runs of a group;
intervals are of 95 %. Between validations a curve is a straight line.
"""
import json
import math
from pathlib import Path

from records import logs, show
from records.difference import differences
from records.errors import RecordError
from records.groups import Group, find_groups
from records.logs import printable

HELP = "groups of runs side by side: speed-up, loss by step, tokens and time, changes of the source"
EXAMPLE = ("python -m records compare bench/results/2026-11-22_shakespeare_cpu/adamw "
           "bench/results/2026-11-22_shakespeare_cpu/muon")

FACTS = {  # what runs that are compared should have in common
    "hardware": show.hardware,
    "torch": lambda run: show.shown(run.torch),
    "world size": lambda run: show.shown(run.world_size),
    "tokens of a validation": lambda run: show.shown(run.val_tokens, "{:,}"),
}
AXES = ("step", "tokens", "time")
ROWS = 12  # most rows of a table of losses
ALPHA = 0.01  # probability that equal curves are said to part
SUFFIXES = (".png", ".svg", ".pdf")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, for the colour-blind, too
DASHES = ("-", "--", ":")


def add_arguments(parser):
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a log, or a folder of logs or of such folders")
    parser.add_argument("--target", type=show.target_loss, metavar="LOSS",
                        help="validation loss to reach (default: that of the track of the first log, or 3.28)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw the curves; ends in {', '.join(SUFFIXES)}")
    parser.add_argument("--diff", action="store_true", help="print the changes of the embedded sources line by line")


def run(args) -> int:
    groups, left_out = find_groups(args.paths)
    if len(groups) < 2:
        raise RecordError(f"{args.paths[0]}: expected two groups of runs or more, found one; name another log or folder")
    first, *others = groups
    target = args.target or show.target_of(first.logs[0])
    if args.plot:
        plot(groups, target, args.plot)
    console = show.terminal()
    console.print(summary(groups, target))
    for warning in [*warnings(groups), *(f"{file} is left out: {why}" for file, why in left_out)]:
        console.print(printable(f"warning: {warning}"), style="yellow", soft_wrap=True)
    for axis in AXES:
        title, table = losses_by(axis, groups)
        console.print(f"\n{printable(title)}", style="bold", soft_wrap=True)
        if table:
            console.print(table)
    for group in others:
        console.print(f"\n{group.name} against {first.name}", style="bold", soft_wrap=True)
        for sentence in against(first, group, target):
            console.print(printable(f"  {sentence}"), soft_wrap=True)
        if args.diff:
            print_differences(console, first, group)
    return 0


def spread(values: list, form: str, factor: float = 1) -> str:
    """Mean ± standard deviation of those that are known."""
    from records.statistics import mean_sd
    mean, sd = mean_sd([factor * value for value in values if value is not None])
    return "-" if mean is None else f"{mean:{form}}" if sd is None else f"{mean:{form}} ± {sd:{form}}"


def summary(groups: list[Group], target: float):
    table = show.new_table("group", "runs", "steps", "final loss", "time, s", "ms/step", f"reach {target:g}", "after, s",
                           "at step", words=("group",))
    for group in groups:
        runs, reached = group.runs, [run.steps_to(target) for run in group.runs]
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


def warnings(groups: list[Group]):
    """What makes a comparison doubtful."""
    for name, fact in FACTS.items():
        values = {group.name: sorted({fact(run) for run in group.runs}) for group in groups}
        if len({value for found in values.values() for value in found}) > 1:
            yield f"{name} differs: " + "; ".join(f"{group} {' and '.join(found)}" for group, found in values.items())
    for group in groups:
        if short := [run.run_id for run in group.runs if not run.complete and run.total_steps is not None]:
            yield f"{len(short)} of {len(group.runs)} runs of {group.name} did not reach their last step, {short[0]} for one"
        if (copies := len(group.runs) - len({repr(run.val_points) for run in group.runs})):
            yield f"{copies} of {len(group.runs)} runs of {group.name} are copies of others to the last digit, and count too"
        if (number := len({run.source_sha256 for run in group.runs})) > 1:
            yield f"the runs of {group.name} have {number} different sources; the first one is compared"


# Curves side by side

def tokens_of(run: logs.Run) -> list[float] | None:
    """Tokens trained on at each validation, from the settings in the log, where the batch is given by stage as by
    train_gpt.py's Config.stage_starts. None where the log does not say."""
    names = ("train_steps", "extension_steps", "stages", "adam_every", "batch_tokens")
    try:
        total, extension, stages, every, batches = (run.config[name] for name in names)
        if not (0 < stages <= 100 and 0 < every <= total):
            return None
        scheduled = total - extension
        starts = [min(round(scheduled * k / stages / every) * every, scheduled) for k in range(stages)] + [scheduled]
        ends, batches = [*starts[1:], total], [batches[min(k, len(batches) - 1)] for k in range(len(starts))]
        return [float(sum(batch * max(min(point.step, end) - start, 0) for start, end, batch in zip(starts, ends, batches)))
                for point in run.val_points]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):  # a config line can hold anything
        return None


def places(run: logs.Run, axis: str) -> list[float] | None:
    """Where the validations of a run stand: steps, tokens or seconds."""
    if axis == "tokens":
        return tokens_of(run)
    if axis == "step":
        return [point.step for point in run.val_points]
    times = [point.train_time_ms for point in run.val_points]
    return None if None in times else [ms / 1000 for ms in times]


def shared_steps(groups: list[Group]) -> list[int]:
    """Steps, after the first, at which every run has a validation."""
    steps = set.intersection(*({point.step for point in run.val_points} for group in groups for run in group.runs))
    return sorted(steps - {0})


def losses_by(axis: str, groups: list[Group]):
    """A title, and a table of mean losses along the runs of the first group, by step, tokens or time, or None where the title
    says it all."""
    import numpy as np
    found = {group.name: [places(run, axis) for run in group.runs] for group in groups}
    if unknown := [name for name, curves in found.items() if None in curves]:
        return f"loss by {axis}: unknown, the logs of {' and '.join(unknown)} do not tell it", None
    if axis == "tokens":
        batches = {tokens / point.step for group in groups for run, curve in zip(group.runs, found[group.name])
                   for tokens, point in zip(curve, run.val_points) if point.step}
        if len(batches) == 1:
            return f"loss by tokens: as by step, for every step is of {batches.pop():,.0f} tokens", None
    grid = shared_steps(groups[:1])
    if axis != "step":
        # From the second validation on: up to there a curve is far from a straight line.
        curves = found[groups[0].name]
        begin, end = max(sorted(curve)[:2][-1] for curve in curves), min(max(curve) for curve in curves)
        grid = np.linspace(begin, max(begin, end), ROWS).tolist()
    if len(grid) > ROWS:
        grid = [grid[k * (len(grid) - 1) // (ROWS - 1)] for k in range(ROWS)]
    table = show.new_table("time, s" if axis == "time" else axis, *found)
    columns = [np.transpose([losses_at(grid, run, curve, axis) for run, curve in zip(group.runs, found[group.name])])
               for group in groups]
    for place, *losses in zip(grid, *columns):
        table.add_row(f"{place:,.1f}" if axis == "time" else f"{place:,.0f}",
                      *("-" if np.isnan(column).any() else spread(column.tolist(), ".4f") for column in losses))
    return f"loss by {axis}", table


def losses_at(grid: list[float], run: logs.Run, curve: list[float], axis: str) -> list[float]:
    """The loss of a run at each place of a grid, nan where it has none; `curve` tells where its validations stand."""
    import numpy as np
    pairs = sorted(zip(curve, (point.val_loss for point in run.val_points)))
    if axis == "step":
        return [dict(pairs).get(step, math.nan) for step in grid]
    return np.interp(grid, *zip(*pairs[len(pairs) > 1:]), left=math.nan, right=math.nan).tolist()


# One group against another

def against(first: Group, group: Group, target: float):
    """Sentences about what a group gains over the first one, and by what it may do so."""
    from records.statistics import ratio_interval, welch
    yield f"final loss: {welch(*([run.final_val_loss for run in side.runs] for side in (group, first))).difference:+.4f}"
    for name, fact in (
        (f"time to {target:g}", lambda run: run.time_to(target)),
        (f"steps to {target:g}", lambda run: run.steps_to(target)),
        ("time of the whole run", lambda run: run.final_time_ms),
    ):
        before, after = ([fact(run) for run in side.runs] for side in (first, group))
        if missing := (before + after).count(None):
            yield f"speed-up in {name}: unknown, {missing} of {len(before + after)} runs have none"
        else:
            yield f"speed-up in {name}: {ratio_interval(before, after):.3f}"
    yield parting(first, group)
    if not (first.sources and group.sources):
        yield "source: not in the logs of both"
    else:
        changes = [f"{change.file} +{change.added:,} -{change.removed:,}" for change in differences(first.sources, group.sources)]
        yield "source: " + (", ".join(changes) or "the same")
    yield from changed_settings(first, group)


def parting(first: Group, group: Group) -> str:
    """Where the curves part: the first validation at which their means differ significantly."""
    from records.statistics import welch
    steps = shared_steps([first, group])
    if not steps:
        return "where the curves part: unknown, there is no step at which all have a validation"
    results = [welch(*([run.at(step).val_loss for run in side.runs] for side in (group, first))) for step in steps]
    if all(result.p is None for result in results):
        return f"where the curves part: unknown, {results[0].why}"
    test = f"Welch's t-test at {len(steps)} validations, two-sided, {ALPHA:g} shared out over them (Bonferroni)"
    for step, result in zip(steps, results):
        p = 1 if result.p is None else 2 * min(result.p, 1 - result.p)
        if p < ALPHA / len(steps):
            return f"the curves part by step {step:,}: {result.difference.estimate:+.4f}, p = {p:.2g} ({test})"
    return f"the curves do not part ({test})"


def changed_settings(first: Group, group: Group):
    """Settings of our own logs, of the first run of each group."""
    from records.rules import NOT_TRAINING
    before, after = first.runs[0].config, group.runs[0].config
    if before and after:
        changes = [f"{name} {json.dumps(before.get(name))[:60]} -> {json.dumps(after.get(name))[:60]}"
                   for name in before | after if name not in NOT_TRAINING and before.get(name) != after.get(name)]
        yield "settings: " + (", ".join(changes) or "the same")


def print_differences(console, first: Group, group: Group):
    for change in differences(first.sources, group.sources):
        console.print(f"\n--- {first.name}: {change.file}\n+++ {group.name}: {change.file}", style="bold", soft_wrap=True)
        for kind, line in change.lines or [("same", "too different to be laid out line by line")]:
            style = {"added": "green", "removed": "red", "place": "cyan"}.get(kind)
            console.print(printable(line.expandtabs(4)), style=style, soft_wrap=True)


# The plot

def band(group: Group, axis: str) -> list[tuple[float, float, float, float]]:
    """(place, mean, lowest and highest loss) at each step at which all runs of a group have a validation."""
    rows = {}
    for run in group.runs:
        for place, point in zip(places(run, axis) or [], run.val_points):
            if math.isfinite(point.val_loss):
                rows.setdefault(point.step, []).append((place, point.val_loss))
    columns = [tuple(zip(*row)) for _, row in sorted(rows.items()) if len(row) == len(group.runs)]
    return [(sum(where) / len(where), sum(losses) / len(losses), min(losses), max(losses)) for where, losses in columns]


def plot(groups: list[Group], target: float, path: Path):
    """Mean loss of each group, in a band from its lowest to its highest run, against steps and time: all but the steep start
    above, what is near the target below."""
    from matplotlib.figure import Figure  # draws into a file, without pyplot and a screen

    if path.suffix not in SUFFIXES:
        raise RecordError(f"--plot: expected a name that ends in {', '.join(SUFFIXES)}, found {path.name!r}; change it")
    bands = {axis: [band(group, axis) for group in groups] for axis in ("step", "time")}
    drawn = [rows for rows in bands["step"] if rows]
    lowest = min([target, *(row[2] for rows in drawn for row in rows)])
    start = max([target, *(rows[len(rows) > 2][1] for rows in drawn)])  # after the first validation, if there are enough
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for ax_row, top in zip(axes, (start, min(start, target + 3 * max(target - lowest, 0.01 * target)))):
        margin = 0.05 * max(top - lowest, 0.01 * target)
        for ax, axis in zip(ax_row, bands):
            for k, (group, rows) in enumerate(zip(groups, bands[axis])):
                if rows:
                    (x, mean, low, high), color = zip(*rows), COLORS[k % len(COLORS)]
                    label = f" {group.name} (n = {len(group.runs)})".replace("$", r"\$")  # no formula, and none to be left out
                    ax.plot(x, mean, marker=".", color=color, linestyle=DASHES[k // len(COLORS) % len(DASHES)], label=label)
                    ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            ax.axhline(target, color="gray", linewidth=1, linestyle=":")
            ax.set_ylim(lowest - margin, top + margin)
            if shown := [row[0] for rows in bands[axis] for row in rows if row[2] <= top]:
                ax.set_xlim(min(shown) - 0.03 * (max(shown) + 1), max(shown) + 0.03 * (max(shown) + 1))
            ax.grid(alpha=0.3)
            ax.set_xlabel("steps" if axis == "step" else "training time, seconds")
        ax_row[0].set_ylabel("validation loss")
    axes[0, 0].legend(title="mean, and lowest to highest run")
    axes[0, 0].annotate(f"target {target:g}", (0.01, target), xycoords=("axes fraction", "data"), va="bottom", color="gray")
    try:
        figure.savefig(path, dpi=150)
    except OSError as e:
        raise RecordError(f"--plot: expected to write {path}, found: {e.strerror}; choose another folder") from None
