"""What a folder holds of a search: which trials are there, which are wanted, which has won."""
import contextlib
import math
from pathlib import Path

from bench import trials
from bench.tune.search import OPTIMIZERS, Search, read_search
from data.errors import UsageError


class SearchResults:
    """What a folder holds of a search."""

    def __init__(self, folder: Path, search: Search):
        self.folder, self.search = folder, search
        self.path = folder / "trials.jsonl"
        self.rows = trials.read(self.path)
        others = {row.get("search") for row in self.rows} - {search.sha256}
        if others:
            raise UsageError(f"{self.path}: expected trials of the search file as it is, {search.sha256}, "
                             f"found some of another, {', '.join(map(str, others))}; put that one back, or "
                             "choose another OUT")

    def of(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row["kind"] == kind]

    def losses(self, optimizer: str, steps: int) -> dict[int, float]:
        """Return trial -> loss of a rung, as far as it is there."""
        return {
            row["trial"]: row["loss"]
            for row in self.of("search")
            if row["optimizer"] == optimizer and row["steps"] == steps
        }

    def rungs(self, optimizer: str) -> list[int]:
        found = list(self.search.rungs)
        if optimizer in self.search.longer:
            found.append(self.search.longer[optimizer])
        return found

    def wanted(self, optimizer: str, rung: int) -> list[int]:
        """Return the trials of a rung, which is known once the one before is whole."""
        steps = self.rungs(optimizer)
        before = self.losses(optimizer, steps[rung - 1]) if rung else {}
        if rung < len(self.search.rungs):
            return self.search.next_trials(before, rung)
        return [trial for trial, loss in before.items() if math.isfinite(loss)]

    def winner(self, optimizer: str, steps: int) -> int:
        """Return the best trial of a rung. Raises UsageError where the rung is not whole."""
        rung = self.rungs(optimizer).index(steps)
        losses = self.losses(optimizer, steps)
        missing = [trial for trial in self.wanted(optimizer, rung) if trial not in losses]
        finite = {trial: loss for trial, loss in losses.items() if math.isfinite(loss)}
        if missing or not finite:
            raise UsageError(f"{self.path}: expected whole results of {optimizer} at {steps} steps, found "
                             f"{len(losses)}; finish `python -m bench.tune run {self.folder}`")
        return min(finite, key=finite.get)

    def lengths(self, optimizer: str) -> list[int]:
        """Return the steps of the two longest schedules, whose winners get fresh seeds.

        Of Muon these are the last two rungs, of AdamW the last and a longer one, so that the loss of each at
        the last rung lies between two of the other.
        """
        return self.rungs(optimizer)[-2:]

    def winners(self) -> dict[str, tuple[str, int, int]]:
        """Return folder -> (optimizer, steps, trial) of all known winners, those of the last rung first."""
        found = {}
        lengths = [(optimizer, steps) for optimizer in OPTIMIZERS for steps in self.lengths(optimizer)]
        for optimizer, steps in sorted(lengths, key=lambda item: item[1] != self.search.rungs[-1]):
            with contextlib.suppress(UsageError):
                found[f"{optimizer}_{steps}"] = optimizer, steps, self.winner(optimizer, steps)
        return found

    def final_losses(self, group: str) -> list[float]:
        return [row["loss"] for row in self.of("final") if row["group"] == group]


def read(folder: Path) -> SearchResults:
    """Return what a folder holds of the committed search, which makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return SearchResults(folder, read_search())
