"""A measurement: a program that gathers results in one place and puts what they say on a page, with plots.

    python -m bench.NAME run OUT                            do what OUT lacks
    python -m bench.NAME table OUT [--page=bench/PAGE.md]   print the tables, or write the page and plots
"""
import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.page import write_page
from bench.pictures import THEMES, Theme, svg_text
from data.errors import CommandLine, UsageError
from data.files import ROOT, written_whole

PICTURES = ROOT / "docs/pictures"
SIZE = 760 / 72, 400 / 72  # inches, of 72 units of SVG


def read_json(path: Path, tables: Callable[[Any], str]) -> Any:
    """Return results of which these tables can be made. Raises UsageError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tables(found)
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: expected results that the verb run wrote, found none ({error}); run "
                         "it") from None


@dataclass(frozen=True)
class Measurement:
    """What one measurement has of its own. Its command adds the rest."""
    name: str  # of the module, and of the plots in docs/pictures
    title: str  # of the plots
    about: str  # what --help says
    out: str  # how --help names the place of the results
    runs: dict[str, Callable]  # verb -> what adds results; called with the options
    read: Callable[[Path], Any]  # what the place holds
    tables: Callable[[Any], str]
    draw: Callable[[Any, Theme, Figure], None] | None = None
    add_options: Callable[[argparse.ArgumentParser], Any] = lambda parser: None

    def main(self, argv: list[str]) -> None:
        parser = CommandLine(self.about, f"python -m bench.{self.name}")
        parser.add_argument("verb", choices=(*self.runs, "table"))
        parser.add_argument("out", type=Path, metavar=self.out, help="results, read and added to")
        parser.add_argument("--page", type=Path, help="table: a page to put it into, between its marks")
        self.add_options(parser)
        options = parser.parse_args(argv)
        if options.verb == "table":
            self.publish(options.out, options.page)
        else:
            self.runs[options.verb](options)

    def publish(self, source: Path, page: Path | None) -> None:
        """Print the tables of some results; or put them into a page and write its plots."""
        found = self.read(source)
        if page is None:
            print(self.tables(found), end="")
            return
        write_page(page, source.as_posix(), self.tables(found))
        for theme in THEMES if self.draw else ():
            with written_whole(PICTURES / f"{self.name}_{theme.name}.svg", "w") as file:
                file.write(svg_text(self.figure(found, theme), self.title, self.name))

    def figure(self, found: Any, theme: Theme) -> Figure:
        figure = Figure(figsize=SIZE, facecolor="none")
        self.draw(found, theme, figure)
        return figure
