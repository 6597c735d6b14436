"""Numbers in a README: lists of losses and times, probabilities, table rows and links. Text is never run."""
import re
from dataclasses import dataclass
from itertools import islice

SIZE_LIMIT = 1 << 20  # bytes; a longer file is not read (the longest of the public archive has 21,000)
LIST_LIMIT = 1000  # of a file
LIST = re.compile(r"^(?P<before>[^\[\n]{0,200})\[(?P<values>[\s\d.,eE+'\"-]{3,100000})\]", re.M)
P_VALUE = re.compile(r"\bp(?:-value)?\W{0,3}[:=]\W{0,3}(\d(?:\.\d{1,20})?(?:e-?\d{1,3})?)(?!\d)", re.I)
ROW = re.compile(r"^\|[ `\[]{0,4}([\w.-]{6,80})[^|\n]{0,200}\|(.{1,300})$", re.M)
ROW_LOSS = re.compile(r"\|\s*(\d{1,2}\.\d{4,6})\s*(?=\|)")
ROW_MS = re.compile(r"\|\s*(\d{3,9})\s?ms\s*(?=\|)")
LINK = re.compile(r"\]\(([^()\s#]{1,300})[^()\s]{0,100}\)")


@dataclass(frozen=True)
class NumberList:
    line: int
    before: str  # what stands before it on its line, such as "losses ="
    values: tuple[float, ...]
    digits: int  # decimals printed


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def lists(text: str) -> list[NumberList]:
    """Lists of two or more decimal numbers; a list that comes again counts once."""
    found = {}
    for match in LIST.finditer(text):
        tokens = [token.strip(" \t\n'\"") for token in match["values"].split(",") if token.strip()]
        try:
            values = tuple(map(float, tokens))
        except ValueError:
            continue
        digits = max(len(token.partition(".")[2]) for token in tokens)
        if len(found) == LIST_LIMIT:
            break
        if len(values) > 1 and digits:
            found.setdefault(values, NumberList(line_of(text, match.start()), match["before"].lower(), values,
                                                min(digits, 9)))
    return [*found.values()]


def probabilities(text: str) -> list[tuple[int, float, float]]:
    """(line, p, half a unit of its last digit) of everything like p = 0.0012."""
    found = []
    for match in islice(P_VALUE.finditer(text), LIST_LIMIT):
        digits, _, power = match[1].lower().partition("e")
        unit = float(f"1e{int(power or 0) - len(digits.partition('.')[2])}")
        found.append((line_of(text, match.start()), float(match[1]), unit / 2))
    return [(line, p, half) for line, p, half in found if 0 <= p <= 1]


def rows(text: str) -> list[tuple[int, str, list[str], list[str]]]:
    """(line, name in the first cell, losses, milliseconds) of each table row whose first cell may
    name a log."""
    return [(line_of(text, match.start()), match[1], ROW_LOSS.findall("|" + match[2]),
             ROW_MS.findall("|" + match[2]))
            for match in ROW.finditer(text)]


def links(text: str) -> list[tuple[int, str]]:
    """(line, target) of each link to a place beside the file."""
    return [(line_of(text, match.start()), match[1]) for match in LINK.finditer(text) if ":" not in match[1]]
