"""A search over settings that is fixed in a file before its first run: bench/tune/search.json.

Each trial is a point of the unit cube, with one coordinate per quantity. The same points serve both
optimizers, each with its own ranges; a test sees to it that they have the same quantities and choices, and
ranges of as many decades. Results of another file than the one that is there are refused.

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

import numpy as np

from data.files import ROOT
from train_gpt import Config

SEARCH_FILE = ROOT / "bench/tune/search.json"
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
        """Return the settings of a trial, as on the command line, for a schedule of so many steps. What the
        track gives in steps keeps its part of the schedule."""
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
        """Return the trials of a rung: the best ones of the rung before, whose losses these are. What has
        diverged never goes on, however few remain."""
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


def read_search() -> Search:
    """Return the committed search."""
    raw = SEARCH_FILE.read_bytes()
    found = json.loads(raw)
    return Search(**{**found, "rungs": tuple(found["rungs"])}, sha256=hashlib.sha256(raw).hexdigest()[:16])
