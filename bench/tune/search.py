"""A search over settings that is fixed in a file before its first run: bench/tune/search.json.

Each trial is a point of the unit cube, with one coordinate per quantity. The same points serve both
optimizers, each with its own ranges; a file that gives one of them more quantities, wider ranges or other
choices is refused.

    trials       number of points
    seed         of the points, and of the weights of every training of the search
    rungs        steps of successive halving: all trials are trained for the first number of steps, the better
                 half of them, from the start and with a schedule of its own, for the second, and so on
    longer       optimizer -> a further number of steps for all trials that reach the last rung
    val_tokens   tokens of a validation during the search
    ranges       optimizer -> quantity -> {"log": [lowest, highest]}, uniform in its logarithm, perhaps with
                 "zero": the probability of 0 instead; or {"one_of": [...]}
"""
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import UsageError
from train_gpt import Config

OPTIMIZERS = "muon", "adamw"
QUANTITIES = {
    "matrix_rate": "learning rate of the hidden matrices",
    "matrix_decay": "their weight decay",
    "out_factor": "factor of their learning rate for the MLP outputs",
    "table_and_scalar_rate": "Adam's learning rate of everything else",
    "table_factor": "factor of it for value and bigram embeddings",
    "forgets_gradient": "1 minus the momentum (Muon), 1 minus beta1 (AdamW)",
    "forgets_square": "1 minus beta2, of NorMuon's variance per neuron or of AdamW",
    "warmup": "part of the steps over which the learning rates rise",
    "floor": "factor of the learning rates at the end",
    "cautious": "decay a weight only where the update shrinks it too",
}
TRACK = Config.for_track("shakespeare", recipe="miniature")
STEPS, EXTENSION, RISE, FALL = 440, 10, 50, 20  # of the recipe when the search was fixed: schedule, momentum
SINCE = dict(  # what else the recipe has changed since, as it was then
    ngram_rows=0,
    untie_stage=2,
    untie_delay=0,
    mtp_weights="1.0,0.5,0.25",
)


@dataclass(frozen=True)
class Search:
    trials: int
    seed: int
    rungs: tuple[int, ...]
    longer: dict[str, int]
    val_tokens: int
    ranges: dict[str, dict[str, dict]]
    sha256: str  # first digits of the file's

    def point(self, optimizer: str, trial: int) -> dict:
        """Return the quantities of a trial. Those of a trial do not depend on how many there are."""
        cube = np.random.default_rng((self.seed, trial)).random(len(QUANTITIES))
        return {name: value_at(self.ranges[optimizer][name], u) for name, u in zip(QUANTITIES, cube)}

    def settings(self, optimizer: str, trial: int, steps: int) -> list[str]:
        """Return the settings of a trial, as on the command line, for a schedule of so many steps.

        What the track gives in steps keeps its part of the schedule.
        """
        def part(of_track: int) -> int:
            return round(of_track * steps / STEPS)

        q = self.point(optimizer, trial)
        found = dict(
            **SINCE,
            optimizer=optimizer,
            train_steps=steps,
            extension_steps=part(EXTENSION),
            warmup_steps=round(q["warmup"] * steps),
            lr_floor=q["floor"],
            cautious=q["cautious"],
            adam_lr=q["table_and_scalar_rate"],
            table_lr_mul=q["table_factor"])
        kept = three_digits(1 - q["forgets_gradient"])
        beta2 = three_digits(1 - q["forgets_square"])
        if optimizer == "muon":
            # The track's 0.85, 0.95 are one pair of this family.
            first = three_digits(1 - 3 * q["forgets_gradient"])
            found.update(
                muon_lr=q["matrix_rate"],
                muon_wd=q["matrix_decay"],
                mlp_out_lr_mul=q["out_factor"],
                momentum=f"{first},{kept}",
                momentum_warmup=part(RISE),
                momentum_cooldown=part(FALL),
                normuon_beta2=beta2)
        else:
            found.update(
                adamw_lr=q["matrix_rate"],
                adamw_wd=q["matrix_decay"],
                adamw_out_lr_mul=q["out_factor"],
                adamw_betas=f"{kept},{beta2}")
        return [f"--{name}={value}" for name, value in found.items()]

    def next_trials(self, losses: dict[int, float], rung: int) -> list[int]:
        """Return the trials of a rung: the best ones of the rung before, whose losses these are.

        What has diverged never goes on, however few remain.
        """
        if rung == 0:
            return list(range(self.trials))
        ranked = sorted((loss, trial) for trial, loss in losses.items() if math.isfinite(loss))
        return [trial for _, trial in ranked[: max(self.trials >> rung, 1)]]


def three_digits(x: float) -> float:
    return float(f"{x:.3g}")


def value_at(rule: dict, u: float):
    """Return the value of a quantity at u in [0, 1)."""
    if "one_of" in rule:
        return rule["one_of"][int(u * len(rule["one_of"]))]
    zero = rule.get("zero", 0)
    if u < zero:
        return 0.0
    low, high = rule["log"]
    return three_digits(low * (high / low) ** ((u - zero) / (1 - zero)))


# ------------------------------------------------------------------------------------------------------------
# The file


def read_search(path: Path) -> Search:
    """Read and check a search file. Raises UsageError."""
    try:
        raw = path.read_bytes()
        found = json.loads(raw)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: expected a search file in JSON, found {error}; see "
                         "bench/tune/search.json") from None
    fields = [name for name in Search.__annotations__ if name != "sha256"]
    if not isinstance(found, dict) or sorted(found) != sorted(fields):
        raise UsageError(f"{path}: expected exactly the entries {', '.join(fields)}; see "
                         "bench/tune/search.json")

    def check(expected: str, holds: bool, name: str):
        if not holds:
            raise UsageError(f"{path}: expected {name} as {expected}, found {found[name]!r}; correct it")

    check("a number from 2 on", whole(found["trials"], 2), "trials")
    check("a number from 0 on", whole(found["seed"], 0), "seed")
    rungs = found["rungs"]
    steps = isinstance(rungs, list) and len(rungs) > 0 and all(whole(n, 10) for n in rungs)
    check("rising numbers of steps from 10 on", steps and rungs == sorted(set(rungs)), "rungs")
    longer = found["longer"]
    beyond = isinstance(longer, dict) and all(whole(n, rungs[-1] + 1) for n in longer.values())
    check("an optimizer and more steps than the last rung", beyond and {*longer} <= {*OPTIMIZERS}, "longer")
    slices = whole(found["val_tokens"], 1) and found["val_tokens"] % TRACK.val_slice == 0
    check(f"a multiple of {TRACK.val_slice}", slices, "val_tokens")
    ranges = found["ranges"]
    check(f"an entry for each of {', '.join(OPTIMIZERS)}",
          isinstance(ranges, dict) and sorted(ranges) == sorted(OPTIMIZERS), "ranges")
    check_ranges(path, ranges)
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return Search(**{**found, "rungs": tuple(rungs)}, sha256=digest)


def whole(x, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def check_ranges(path: Path, ranges: dict[str, dict]) -> None:
    """Raise UsageError unless both optimizers are searched alike: in the same quantities and choices, over as
    many decades."""
    shapes = {}
    for optimizer, rules in ranges.items():
        if not isinstance(rules, dict) or sorted(rules) != sorted(QUANTITIES):
            raise UsageError(f"{path}: expected of {optimizer} exactly the quantities "
                             f"{', '.join(QUANTITIES)}; add or remove some")
        shapes[optimizer] = {name: shape_of(path, f"{optimizer}, {name}", rules[name]) for name in QUANTITIES}
    for name in QUANTITIES:
        one, other = (shapes[optimizer][name] for optimizer in OPTIMIZERS)
        if one != other:
            raise UsageError(f"{path}: expected {name} to be searched alike for both optimizers, found {one} "
                             f"and {other}; a baseline with less search is none")


def shape_of(path: Path, where: str, rule) -> tuple:
    """Return what must be equal for both optimizers: choices, or decades and the probability of zero."""
    if isinstance(rule, dict) and [*rule] == ["one_of"]:
        choices = rule["one_of"]
        if isinstance(choices, list) and choices:
            return tuple(choices)
    try:
        low, high = rule["log"]
        zero = rule.get("zero", 0)
        known = {*rule} <= {"log", "zero"} and 0 < low < high < math.inf and 0 <= zero < 1
    except (TypeError, KeyError, ValueError, AttributeError):
        known = False
    if not known:
        raise UsageError(f'{path}: expected for {where} {{"log": [lowest, highest]}} or {{"one_of": [...]}}, '
                         f"found {rule!r}; correct it")
    return round(math.log10(high / low), 2), zero
