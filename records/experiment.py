"""The folder of an A/B experiment: plan.json, logs of both arms in a/ and b/, their output in output/.

plan.json is written before the first run, and tells which arm was which and how many pairs were planned.
"""
import json
from dataclasses import dataclass
from pathlib import Path

PLAN = "plan.json"
SIZE_LIMIT = 1 << 20  # bytes of a plan
ROLES = {"b": "baseline", "a": "candidate"}  # by the name of the arm, in the order in which they are compared


@dataclass(frozen=True)
class Pair:
    """One run of each arm with the same seed; order: "ab" or "ba"."""
    seed: int
    order: str


@dataclass(frozen=True)
class Experiment:
    a: str  # command of the candidate
    b: str  # command of the baseline
    pairs: tuple[Pair, ...]


def read_experiment(folder: Path) -> Experiment | None:
    """The experiment whose plan lies in a folder; None where there is none that can be read."""
    try:
        with open(Path(folder) / PLAN, encoding="utf-8") as file:
            plan = json.loads(file.read(SIZE_LIMIT))
        pairs = tuple(Pair(int(pair["seed"]), "".join(pair["order"])) for pair in plan["pairs"])
        if not all(sorted(pair.order) == ["a", "b"] for pair in pairs):
            return None
        return Experiment(str(plan["a"]), str(plan["b"]), pairs)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def role_of(folder: Path) -> str | None:
    """"baseline" or "candidate" for the folder of an arm, None for any other."""
    if folder.name in ROLES and read_experiment(folder.parent):
        return ROLES[folder.name]
    return None
