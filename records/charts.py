"""Curves of groups of runs, for compare --plot and for the page of report."""
import math
from collections import defaultdict
from pathlib import Path

from data.errors import UsageError
from records.groups import RunGroup

# No two groups share a colour. The first four are Okabe and Ito's, which the colour-blind tell apart; all
# have a contrast of 3 or more to white and to the dark paper of the report. The second four are dashed.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a63d2", "#7a8b1e", "#d7263d", "#8c6d46")
GREY = "#7a7a7a"
SUFFIXES = (".png", ".svg", ".pdf")
LARGEST_LOSS, LARGEST_SECONDS = 1e3, 1e9  # that a chart shows; a log can claim any number
SETTINGS = {
    "svg.hashsalt": "records",  # equal logs give equal bytes
    "svg.fonttype": "path",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.labelcolor": GREY,
    "legend.framealpha": 0,
}


def band(group: RunGroup, by_time: bool) -> list[tuple[float, float, float, float]]:
    """Return (place, mean, lowest and highest loss) at each step that half of the runs or more have. The
    place is a step, or the mean of the seconds."""
    at = defaultdict(list)
    for run in group.runs:
        for point in run.val_points:
            place = point.step
            if by_time:
                place = math.inf if point.train_time_ms is None else point.train_time_ms / 1000
            if 0 < point.val_loss <= LARGEST_LOSS and place <= LARGEST_SECONDS:
                at[point.step].append((place, point.val_loss))
    columns = [zip(*found) for _, found in sorted(at.items()) if 2 * len(found) >= len(group.runs)]
    return [(sum(places) / len(places), sum(losses) / len(losses), min(losses), max(losses))
            for places, losses in columns]


def figure(groups: list[RunGroup], target: float):
    """Mean losses against steps and seconds, each in a band from the lowest to the highest run. Losses before
    a tenth of the training say little and would take most of the height: they are left out. All words stand
    outside the curves."""
    from matplotlib.figure import Figure  # draws without pyplot and a screen; half a second to import
    legend_rows = (len(groups) + 2) // 2  # groups and target, in two columns
    drawing = Figure(figsize=(11, 4.5 + 0.25 * legend_rows), layout="constrained")
    axes = drawing.subplots(1, 2, sharey=True)
    for ax, by_time in zip(axes, (False, True)):
        bands = {k: rows for k, group in enumerate(groups) if (rows := band(group, by_time))}
        for k, rows in bands.items():
            place, mean, low, high = zip(*rows)
            # No name becomes a formula, and none is left out for its first letter.
            label = f" {groups[k].name} (n = {len(groups[k].runs)})".replace("$", r"\$")
            ax.plot(place, mean, marker=".", color=COLORS[k], linestyle="-" if k < 4 else "--", label=label)
            ax.fill_between(place, low, high, color=COLORS[k], alpha=0.2, linewidth=0)
        ax.axhline(target, color=GREY, linewidth=1, linestyle=":", label=f"target {target:g}")
        ax.set_xlabel("training time, seconds" if by_time else "steps")
        ax.grid(alpha=0.3)
        if bands and not by_time:
            set_height(ax, [*bands.values()], target)
    axes[0].set_ylabel("validation loss")
    named = axes[0].get_legend_handles_labels()
    drawing.legend(*named, loc="outside lower center", ncols=2, title="mean, and lowest to highest run")
    return drawing


def set_height(ax, bands: list[list[tuple]], target: float):
    end = max(rows[-1][0] for rows in bands)
    top = max(next((high for place, _, _, high in rows if place >= 0.1 * end), rows[-1][3]) for rows in bands)
    bottom = min(low for rows in bands for _, _, low, _ in rows)
    top, bottom = max(top, target), min(bottom, target)
    margin = 0.05 * max(top - bottom, 0.01 * target)
    ax.set_ylim(bottom - margin, top + margin)


def save(groups: list[RunGroup], target: float, file, kind: str):
    """Draw the curves into a file, as png, svg or pdf; a svg is for paper of any colour."""
    import matplotlib
    with matplotlib.rc_context(SETTINGS):
        options = {"metadata": {"Date": None}, "transparent": True} if kind == "svg" else {}
        figure(groups, target).savefig(file, format=kind, dpi=150, **options)


def plot(groups: list[RunGroup], target: float, path: Path):
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot: expected a name that ends in {', '.join(SUFFIXES)}, found {path.name!r}; "
                         "change it")
    if len(groups) > len(COLORS):
        raise UsageError(f"--plot: expected at most {len(COLORS)} groups, which have as many colours, found "
                         f"{len(groups)}; name fewer")
    try:
        save(groups, target, path, path.suffix[1:])
    except OSError as e:
        raise UsageError(f"--plot: expected to write {path}, found: {e.strerror}; choose another "
                         "folder") from None
