"""Text, numbers and tables as terminals, pages and JSON want them."""
import argparse
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
UUID = re.compile(r"([0-9a-f]{8})(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CELL_OF_NUMBERS = re.compile(r"[-+]?[\d,.]+( ± [\d,.]+| of [\d,]+)?|-|\.\.\.|nan|inf")


def above_zero(text: str) -> float:
    """Parse a number of an option; a type of argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def printable(text: str, limit: int = 1000) -> str:
    """Text of a file, or its name, as a line of bounded length without what could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


def short_name(name: str) -> str:
    """A name, printable, with each UUID in it cut to its first part, as people do."""
    return UUID.sub(r"\1", printable(name))


def markdown(text) -> str:
    """Text of a log or a person as Markdown that shows it and does nothing else."""
    return re.sub(r"([\\`*_~\[\]<>|&#])", r"\\\1", printable(str(text)))


def listed(texts: Iterable[str], between: str = ", ") -> str:
    """The first four of many texts, and how many more there are."""
    texts = [*texts]
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return between.join(texts[:4]) + more


def shown(value, form: str = "{}") -> str:
    """A value that may be missing."""
    return "-" if value is None else form.format(value)


def seconds(ms: float | None) -> str:
    return shown(None if ms is None else ms / 1000, "{:,.2f}")


def nats(loss: float | None) -> str:
    """A loss with the decimals of its log, or four."""
    return shown(loss, "{:.4f}" if loss == round(loss or 0, 4) else "{}")


@dataclass(frozen=True)
class Grid:
    """A table, the same for a terminal and for the page of report."""
    titles: list[str]
    rows: list[list[str]]

    def is_of_numbers(self, column: int) -> bool:
        return column > 0 and all(CELL_OF_NUMBERS.fullmatch(row[column]) for row in self.rows)

    def without_common(self) -> tuple["Grid", str]:
        """The grid without the columns that say the same in several rows, and what these say."""
        if len(self.rows) < 2:
            return self, ""
        common = {title: column[0] for title, column in zip(self.titles, zip(*self.rows))
                  if len({*column}) == 1}
        kept = [k for k, title in enumerate(self.titles) if title not in common]
        grid = Grid([self.titles[k] for k in kept], [[row[k] for k in kept] for row in self.rows])
        said = [f"{title} {value}" for title, value in common.items() if value not in ("", "-")]
        return grid, ", ".join(said)

    def print(self, console):
        from rich import box
        from rich.table import Table
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for k, title in enumerate(self.titles):
            table.add_column(title, justify="right" if self.is_of_numbers(k) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def terminal():
    """A rich console that takes no text for markup; wide where no terminal sets a limit."""
    from rich.console import Console
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)
