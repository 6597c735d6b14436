"""Pages whose figures are put in by a program."""
import statistics
from collections.abc import Sequence
from pathlib import Path

from data.errors import UsageError

MARKS = "<!-- figures of ", "<!-- end of figures -->"
OPTIMIZER_NAMES = {"muon": "Muon", "sgd": "SGD", "adamw": "AdamW"}


def grid(header: list[str], rows: list[list]) -> str:
    """Return a Markdown table; a bar inside a cell becomes a slash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Say mean and standard deviation; of one value there is no deviation."""
    around = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{around}"


def write_page(page: Path, source: str, tables: str) -> None:
    """Put tables between the two marks of a page of which the first names this source. Raises UsageError
    without them."""
    mark = f"{MARKS[0]}{source} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(mark)
    if not found:
        raise UsageError(f"{page}: expected a line {mark!r}, found none; write it where the tables shall "
                         f"stand, and below it {MARKS[1]!r}")
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{mark}\n\n{tables}\n{MARKS[1]}{after}", encoding="utf-8")
