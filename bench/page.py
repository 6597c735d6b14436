"""Pages whose figures are put in by a program."""
import argparse
from pathlib import Path

from data.errors import UsageError
from data.files import written_whole

MARKS = "<!-- figures of ", "<!-- end of figures -->"
OPTIMIZER_NAMES = {"muon": "Muon", "sgd": "SGD", "adamw": "AdamW"}


def count(text: str) -> int:
    """Parse a number of an option that is 1 or more; a type of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


def grid(header: list[str], rows: list[list]) -> str:
    """Return a Markdown table; a bar inside a cell becomes a slash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def with_tables(page: Path, source: str, tables: str) -> str:
    """Return the text of a page with tables between its two marks, of which the first names this source.
    Raises UsageError without them."""
    mark = f"{MARKS[0]}{source} -->"
    try:
        before, found, rest = page.read_text(encoding="utf-8").partition(mark)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--page: expected a page to put tables into, found none ({error}); name one that "
                         "is there") from None
    if not found:
        raise UsageError(f"{page}: expected a line {mark!r}, found none; write it where the tables shall "
                         f"stand, and below it {MARKS[1]!r}")
    after = rest.partition(MARKS[1])[2]
    return f"{before}{mark}\n\n{tables}\n{MARKS[1]}{after}"


def write_page(page: Path, source: str, tables: str) -> None:
    text = with_tables(page, source, tables)
    with written_whole(page, "w") as file:
        file.write(text)
