"""The difference of two source files, line by line, in bounded time whatever the files hold."""
import difflib
from collections import Counter
from dataclasses import dataclass

WORK_LIMIT = 2_000_000  # comparisons of lines, about a second; sources of the public archive need 35,000


@dataclass(frozen=True)
class Difference:
    file: str
    added: int  # lines
    removed: int
    lines: list[str]  # of a unified diff; [] where it would take too long


class TooLong(Exception):
    pass


class BoundedMatcher(difflib.SequenceMatcher):
    """difflib's time grows with the cube of the lines where somebody wants it to; this one gives up."""
    work = 0

    def find_longest_match(self, alo=0, ahi=None, blo=0, bhi=None):
        self.work += sum(1 + len(self.b2j.get(line, ())) for line in self.a[alo:ahi])
        if self.work > WORK_LIMIT:
            raise TooLong
        return super().find_longest_match(alo, ahi, blo, bhi)


def differences(before: dict[str, str], after: dict[str, str]) -> list[Difference]:
    """Of each file that is not the same in both; a file that is missing counts as empty."""
    return [difference(file, before.get(file, ""), after.get(file, "")) for file in sorted(before | after)
            if before.get(file, "") != after.get(file, "")]


def summed(changes: list[Difference]) -> str:
    return ", ".join(f"{change.file} +{change.added:,} -{change.removed:,}" for change in changes)


def difference(file: str, before: str, after: str) -> Difference:
    old, new = before.splitlines(), after.splitlines()
    lines = []
    try:
        for block in BoundedMatcher(None, old, new).get_grouped_opcodes(3):
            (_, a0, _, b0, _), (_, _, a1, _, b1) = block[0], block[-1]
            lines.append(f"@@ -{a0 + 1},{a1 - a0} +{b0 + 1},{b1 - b0} @@")
            for kind, i0, i1, j0, j1 in block:
                if kind == "equal":
                    lines += [" " + line for line in old[i0:i1]]
                else:
                    lines += ["-" + line for line in old[i0:i1]]
                    lines += ["+" + line for line in new[j0:j1]]
    except TooLong:
        gone, come = Counter(old), Counter(new)
        return Difference(file, (come - gone).total(), (gone - come).total(), [])
    signs = Counter(line[0] for line in lines)
    return Difference(file, signs["+"], signs["-"], lines)
