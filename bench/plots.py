"""Plots of the pages of this room: two side by side, in the style of README's pictures, each for a light and
a dark page."""
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.page import write_page
from bench.pictures import THEMES, Theme, svg_text
from data.files import ROOT, written_whole

PICTURES = ROOT / "docs/pictures"
SIZE = 760 / 72, 400 / 72  # inches, of 72 units of SVG


def publish(page: Path | None, source: Path, tables: str, name: str, title: str,
            draw: Callable[[Theme, Figure], None]) -> None:
    """Print the tables of a source; or put them into a page and write its plots."""
    if page is None:
        print(tables, end="")
        return
    write_page(page, source.as_posix(), tables)
    write_plots(name, title, draw)


def write_plots(name: str, title: str, draw: Callable[[Theme, Figure], None]) -> None:
    """Write docs/pictures/NAME_light.svg and NAME_dark.svg of a figure that `draw` fills."""
    for theme in THEMES:
        figure = Figure(figsize=SIZE, facecolor="none")
        draw(theme, figure)
        text = svg_text(figure, title, name)

        path = PICTURES / f"{name}_{theme.name}.svg"
        with written_whole(path, "w") as file:
            file.write(text)


def two_plots(
        figure: Figure, theme: Theme, titles: Sequence[str], labels: Sequence[str]) -> list[Axes]:
    """Return two axes side by side, with titles and labels of their x axes."""
    found = []
    for k, (title, label) in enumerate(zip(titles, labels)):
        left = 0.075 + 0.5 * k
        axes = figure.add_axes((left, 0.17, 0.41, 0.71), facecolor="none")

        axes.set_title(title, fontsize=16, color=theme.text, loc="left", pad=8)
        axes.set_xlabel(label, fontsize=15, color=theme.text)

        axes.grid(axis="y", color=theme.faint, alpha=0.25, linewidth=1)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(theme.faint)
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
