"""The difference of two source files, line by line, in bounded time whatever the files hold."""
import difflib
from collections import Counter
from dataclasses import dataclass

# Lines of a file. difflib's time can be made to grow with their cube, and is a second here; the longest
# source in the public logs has 3,500.
MOST_LINES = 4000


@dataclass(frozen=True)
class Difference:
    file: str
    added: int  # lines
    removed: int
    lines: list[str]  # of a unified diff; [] where it would take too long


def differences(before: dict[str, str], after: dict[str, str]) -> list[Difference]:
    """Return the difference of each file that is not the same in both; a missing file counts as empty."""
    found = []
    for file in sorted(before | after):
        old, new = before.get(file, ""), after.get(file, "")
        if old != new:
            found.append(difference(file, old, new))
    return found


def summed(changes: list[Difference]) -> str:
    return ", ".join(f"{change.file} +{change.added:,} -{change.removed:,}" for change in changes)


def difference(file: str, before: str, after: str) -> Difference:
    old, new = before.splitlines(), after.splitlines()
    if max(len(old), len(new)) > MOST_LINES:
        gone, come = Counter(old), Counter(new)
        return Difference(file, (come - gone).total(), (gone - come).total(), [])
    lines = [*difflib.unified_diff(old, new, lineterm="")][2:]
    signs = Counter(line[0] for line in lines)
    return Difference(file, signs["+"], signs["-"], lines)
