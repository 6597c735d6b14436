"""Plots of the pages of this room: two side by side, in the style of README's pictures."""
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.pictures import Theme, plain_axes


def two_plots(
        figure: Figure, theme: Theme, titles: Sequence[str], labels: Sequence[str]) -> list[Axes]:
    """Return two axes side by side, with titles and labels of their x axes."""
    found = []
    for k, (title, label) in enumerate(zip(titles, labels)):
        axes = figure.add_axes((0.075 + 0.5 * k, 0.17, 0.41, 0.71), facecolor="none")
        axes.set_title(title, fontsize=16, color=theme.text, loc="left", pad=8)
        axes.set_xlabel(label, fontsize=15, color=theme.text)
        plain_axes(axes, theme)
        found.append(axes)
    return found


def finish(
        axes: Axes, theme: Theme, ticks: Sequence[float] = (), legend: bool = True) -> None:
    """Name the curves and set the ticks of x, after scales have been chosen."""
    if ticks:
        labels = [f"{tick:g}" for tick in ticks]
        axes.set_xticks(ticks, labels)
    axes.minorticks_off()
    axes.tick_params(which="both", colors=theme.faint, labelsize=14, length=0, pad=5)
    if legend:
        axes.legend(frameon=False, labelcolor=theme.text, fontsize=14)
