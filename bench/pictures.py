"""The two pictures of README.md, each for a light and a dark page, and the style of all plots of this room.
`python -m bench.docs` draws the two into docs/pictures.

The picture of the loss shows validation loss against training seconds, from committed logs. That of Muon is a
diagram of one step over four ranks and no measurement. Words stay text, to be selected and read aloud.
"""
import io
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.errors import UsageError
from records import logs

RUNS = Path("bench/results/2026-11-28_shakespeare_cpu")
DIAGRAM = Path(__file__).with_name("muon_step.svg")
NANOGPT_LINE = re.compile(
    r"^step (\d+): val loss (\d+\.\d+) \(whole validation set\), training time (\d+)ms$", re.M)


@dataclass(frozen=True)
class Theme:
    name: str
    text: str
    faint: str    # axes, grid and what is said in passing
    page: str     # what lies behind: only drawn under text that crosses a line
    colors: dict  # of the curves and of the ranks


LIGHT = Theme("light", "#1f2328", "#59636e", "#ffffff", {
    "muon": "#0969da", "adamw": "#bc4c00", "nanogpt": "#6e40aa", "target": "#1a7f37",
    "ranks": ("#0969da", "#bc4c00", "#1a7f37", "#8250df")})
DARK = Theme("dark", "#f0f6fc", "#9198a1", "#0d1117", {
    "muon": "#58a6ff", "adamw": "#f0883e", "nanogpt": "#bc8cff", "target": "#3fb950",
    "ranks": ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff")})
THEMES = LIGHT, DARK


# ------------------------------------------------------------------------------------------------------------
# Validation loss against training seconds


class CurvePoint(NamedTuple):
    """One validation of several runs of the same settings."""
    seconds: float  # mean over the runs
    loss: float     # mean over the runs
    low: float
    high: float


def nanogpt_run(path: Path) -> list[tuple[int, float, float]]:
    """Return [(step, training seconds, validation loss)] from a log of nanoGPT with our timer."""
    found = NANOGPT_LINE.findall(path.read_text(encoding="utf-8"))
    if not found:
        raise UsageError(f"{path}: expected lines like 'step 250: val loss 2.4592 (whole validation set), "
                         "training time 7651ms', found none; take the log of bench/results/*/nanogpt")
    return [(int(step), int(ms) / 1000, float(loss)) for step, loss, ms in found]


def own_run(path: Path) -> list[tuple[int, float, float]]:
    """Return the same from a log of train_gpt.py."""
    points = logs.read(path).runs[0].val_points
    return [(point.step, point.train_time_ms / 1000, point.val_loss) for point in points]


def runs_of(folder: Path) -> list[list[tuple[int, float, float]]]:
    """Return the runs of a folder of logs: nanoGPT's if the folder is called so, else ours."""
    read = nanogpt_run if folder.name == "nanogpt" else own_run
    return [read(path) for path in sorted(folder.glob("*.txt"))]


def curve(group: str) -> list[CurvePoint]:
    """Return means and extremes over the runs of a group at each validation but the one before the first
    step: a straight line from there would say nothing about the way."""
    points = []
    for together in list(zip(*runs_of(RUNS / group), strict=True))[1:]:
        steps, seconds, losses = zip(*together)
        if len(set(steps)) > 1:
            raise UsageError(f"{RUNS / group}: expected runs with validations at the same steps, found "
                             f"{sorted(set(steps))}; leave out the odd one")
        points.append(CurvePoint(statistics.mean(seconds), statistics.mean(losses), min(losses), max(losses)))
    return points


def figure_of_loss(theme: Theme, target: float) -> Figure:
    """The picture as a matplotlib figure, 760 by 460 units of SVG."""
    fig = Figure(figsize=(760 / 72, 460 / 72), facecolor="none")
    axes = fig.add_axes((0.08, 0.14, 0.905, 0.79), facecolor="none")
    ends = {}
    for group in ("nanogpt", "adamw", "muon"):
        points = curve(group)
        color = theme.colors[group]
        seconds, losses, low, high = zip(*points)
        axes.fill_between(seconds, low, high, color=color, alpha=0.22, linewidth=0)
        axes.plot(seconds, losses, color=color, linewidth=3, marker="o", markersize=5,
                  solid_joinstyle="round", label=group)
        ends[group] = points[-1]

    axes.axhline(target, color=theme.colors["target"], linewidth=2, linestyle=(0, (5, 3)),
                 label="target")
    axes.set_xscale("log")  # the longest takes many times as long as the shortest
    axes.set_xlim(0.9, 80)
    axes.set_xticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    axes.minorticks_off()
    axes.set_ylim(target - 0.13, 2.53)
    label_curves(axes, theme, target, ends)

    axes.set_xlabel("training seconds", fontsize=18, color=theme.text, labelpad=6)
    axes.set_title("validation loss, nats per byte", fontsize=18, color=theme.text, loc="left", pad=10)
    axes.tick_params(colors=theme.faint, labelsize=17, length=0, pad=6)
    plain_axes(axes, theme)
    return fig


def plain_axes(axes: Axes, theme: Theme) -> None:
    """Leave only the lower side of the frame, and faint lines across."""
    axes.grid(axis="y", color=theme.faint, alpha=0.25, linewidth=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)


def label_curves(axes, theme: Theme, target: float, ends: dict[str, CurvePoint]):
    """Name each curve beside it, in its colour, so that no legend is needed."""
    def say(x, y, text, name, across="left"):
        axes.text(x, y, text, color=theme.colors[name], fontsize=18, fontweight="bold", ha=across,
                  va="center", linespacing=1.25)

    muon = ends["muon"]
    adamw = ends["adamw"]
    nanogpt = ends["nanogpt"]
    said = {name: f"{end.loss:.2f} after {end.seconds:.1f} s" for name, end in ends.items()}
    say(muon.seconds * 1.1, target - 0.085, f"this repository: {said['muon']}", "muon")
    say(nanogpt.seconds, nanogpt.loss + 0.53, f"nanoGPT's quickstart:\n{said['nanogpt']}", "nanogpt", "right")
    say(adamw.seconds * 1.1, target + 0.08, f"the same with AdamW: {said['adamw']}", "adamw")
    say(78, target - 0.045, f"target {target:g}", "target", "right")


def loss_picture(theme: Theme, target: float) -> str:
    return svg_text(figure_of_loss(theme, target), "Validation loss against training seconds", "loss")


def svg_text(figure: Figure, title: str, salt: str) -> str:
    """The SVG text; ids and dates are fixed, so that one matplotlib writes equal files from equal data."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings):
        out = io.StringIO()
        about = {"Title": title, "Date": None, "Description": json.dumps(drawn_data(figure)),
                 "Creator": f"matplotlib {matplotlib.__version__}"}
        figure.savefig(out, format="svg", metadata=about, transparent=True)
    text = re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.M)
    return text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, Helvetica, Arial")


def drawn_data(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Return what a figure shows: the points of each line by its label."""
    drawn = {}
    for axes in figure.axes:
        for line in axes.lines:
            points = zip(*line.get_data())
            drawn[line.get_label()] = [(round(float(x), 3), round(float(y), 4)) for x, y in points]
    return drawn


# ------------------------------------------------------------------------------------------------------------
# Plots of the pages of this room: two side by side


def two_plots(figure: Figure, theme: Theme, titles: Sequence[str], labels: Sequence[str]) -> list[Axes]:
    """Return two axes side by side, with titles and labels of their x axes."""
    found = []
    for k, (title, label) in enumerate(zip(titles, labels)):
        axes = figure.add_axes((0.075 + 0.5 * k, 0.17, 0.41, 0.71), facecolor="none")
        axes.set_title(title, fontsize=16, color=theme.text, loc="left", pad=8)
        axes.set_xlabel(label, fontsize=15, color=theme.text)
        plain_axes(axes, theme)
        found.append(axes)
    return found


def finish(axes: Axes, theme: Theme, ticks: Sequence[float] = (), legend: bool = True) -> None:
    """Name the curves and set the ticks of x, after scales have been chosen."""
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(which="both", colors=theme.faint, labelsize=14, length=0, pad=5)
    if legend:
        axes.legend(frameon=False, labelcolor=theme.text, fontsize=14)


# ------------------------------------------------------------------------------------------------------------
# One Muon step over four ranks


def muon_picture(theme: Theme) -> str:
    """The SVG text of bench/muon_step.svg in the colours of a theme: above, what happens to four matrices on
    four ranks; below, three buckets that overlap."""
    ranks = {f"rank{rank}": color for rank, color in enumerate(theme.colors["ranks"])}
    drawing = Template(DIAGRAM.read_text(encoding="utf-8"))
    return drawing.substitute(ranks, text=theme.text, faint=theme.faint, page=theme.page)
