"""Tables of text, the same for a terminal and for the page of report."""
import re
import sys
from dataclasses import dataclass

NUMBER = re.compile(r"[-+]?[\d,.]+( ± [\d,.]+| of [\d,]+)?|-|\.\.\.|nan|inf")


@dataclass(frozen=True)
class Grid:
    titles: list[str]
    rows: list[list[str]]

    def is_of_numbers(self, column: int) -> bool:
        return column > 0 and all(NUMBER.fullmatch(row[column]) for row in self.rows)

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
