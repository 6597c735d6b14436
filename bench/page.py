"""Pages whose figures are put in by a program: prose, and between two marks the tables of the file that the first mark names."""
from pathlib import Path

MARKS = "<!-- figures of ", "<!-- end of figures -->"


def write_page(page: Path, source: str, tables: str) -> None:
    """Put the tables between the marks of a page that name this source."""
    mark = f"{MARKS[0]}{source} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(mark)
    if not found:
        raise ValueError(f"{page}: expected a line {mark!r}, found none; write it where the tables shall stand, and below it "
                         f"{MARKS[1]!r}")
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{mark}\n\n{tables}\n{MARKS[1]}{after}", encoding="utf-8")
