"""Steps to a loss against the batch, for Muon and AdamW: where does a larger batch stop to save steps?

    python -m bench.batch run OUT.jsonl [--workers=1]
    python -m bench.batch table OUT.jsonl [--page=bench/BATCH.md]

A miniature of the trainer (two layers, width 64, sequences of 512 bytes of Shakespeare, windows of 64, no
decay) is trained at a constant rate until the average of its last weights is at the loss; nothing in its
settings depends on the length of the run. All learning rates have one factor; for every optimizer, momentum
and batch it is searched in steps of 2 until the best lies inside those tried, with one seed, then that and
its two neighbours get all seeds, and so do the neighbours of what is best then. OUT.jsonl gets a line for
every training, so what was interrupted goes on. A training that diverges, or is not at the loss in time, is a
result; nothing is extrapolated from it.
"""
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench import trials
from bench.measurement import Measurement
from bench.page import OPTIMIZER_NAMES as NAMES
from bench.page import grid
from bench.pictures import Theme, finish, two_plots
from data.errors import RunError, UsageError, run_program
from engine.ranks import Runtime
from train_gpt import Run

SEQUENCE = 512  # tokens; a batch is a number of them
CONSTANT = [
    # the model
    "--num_layers=2", "--model_dim=64", "--head_dim=32", "--long_layers=", "--paired_layers=",
    "--cache_layer=0", "--backout=off", "--skip=", "--value_embed_layers=", "--attn_gate_layers=",
    "--xsa_layers=", "--bigram_rows=0", "--smear=off", "--inject_x0=off",
    # no schedule
    "--stages=1", "--extension_steps=0", "--cooldown_frac=0", "--warmup_steps=10", "--mtp_weights=1",
    "--untie_stage=0", "--window_short=64", "--window_long=64", "--window_final=64", "--ema_frac=0",
    "--momentum_warmup=0", "--momentum_cooldown=0", "--yarn=off", "--max_epochs=1000",
    "--ngram_rows=0", "--muon_wd=0", "--adamw_wd=0", "--adam_wd=0", "--cautious=off", "--val_tokens=16384"]
LOSS = 2.15  # validation loss to reach
CAP = 1500  # steps after which a training is given up
SEEDS = 3  # of the best factor and its neighbours
BATCHES = 512, 1024, 2048, 4096, 8192  # tokens
BETA = 0.95  # Muon's momentum where it is not the question; AdamW has 0.9 and 0.95
BETAS = 0.8, BETA, 0.98
FIRST_FACTORS = 0.5, 1.0, 2.0  # of the track's rates, at BASE_BATCH; they grow as the root of the batch
BASE_BATCH = 2048
LARGEST_SEARCH = 8  # factors of one cell
AVERAGE_POWER = 6  # the weights of step s enter the average as s^6: it looks back over a seventh of the run
LOOK = 1.04  # factor between the steps of two looks at the validation loss
NEAR = 0.4  # nats above the loss at which these begin, in training losses
DRAWS = 500  # of a bootstrap
ENTRIES = "optimizer", "beta", "batch", "factor", "seed", "target", "steps", "ending"  # of a line of results


class Cell(NamedTuple):
    """A combination of settings that gets a learning rate of its own."""
    optimizer: str
    beta: float
    batch: int

    def __str__(self) -> str:
        return f"{NAMES[self.optimizer]}, {self.beta:g}"


# ------------------------------------------------------------------------------------------------------------
# One training


class Average:
    """The average of weights over the steps, in which those of step s count as s^AVERAGE_POWER."""

    def __init__(self, weights: list[Tensor]):
        self.weights = weights
        self.values = [w.detach().clone() for w in weights]
        self.steps = 0

    @torch.no_grad()
    def add(self) -> None:
        self.steps += 1
        part = (AVERAGE_POWER + 1) / (AVERAGE_POWER + self.steps)
        torch._foreach_lerp_(self.values, [w.detach() for w in self.weights], part)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average."""
        for weight, value in zip(self.weights, self.values):
            kept = weight.clone()
            weight.copy_(value)
            value.copy_(kept)


def job_of(cell: Cell, factor: float, seed: int, cap: int, loss: float = LOSS) -> trials.Job:
    """Return the training of a cell at a factor until the loss, given up after `cap` steps."""
    rate = f"--lr_mul={factor * math.sqrt(cell.batch / BASE_BATCH):.5g}"
    momentum = f"--momentum={cell.beta},{cell.beta}"
    settings = [*CONSTANT, f"--optimizer={cell.optimizer}", momentum, rate, f"--batch_tokens={cell.batch}",
                f"--slices={cell.batch // SEQUENCE}", f"--train_steps={cap}"]
    return trials.Job(dict(cell._asdict(), factor=factor, target=loss, cap=cap), settings, seed)


def train(job: trials.Job) -> dict:
    """Train until the averaged weights are at the loss. Returns the line of the result; steps may be None."""
    run = Run(trials.config(job.settings, job.seed), Runtime())
    start = time.perf_counter()
    try:
        steps = steps_to(run, job.labels["target"])
        ending = "reached" if steps else "not reached"
    except RunError:
        steps, ending = None, "diverged"
    loss = math.nan if run.val_loss is None else round(run.val_loss, 4)
    seconds = round(time.perf_counter() - start, 1)
    return dict(job.labels, seed=job.seed, steps=steps, loss=loss, seconds=seconds, ending=ending)


def steps_to(run: Run, target: float) -> float | None:
    """Return after how many steps the averaged weights are at the loss, on a straight line in the logarithm
    of the steps between two looks; None within the run's steps."""
    average = Average([p for p in run.model.parameters()])
    before = None  # (step, loss) of the look before
    look = 1
    while run.step < run.cfg.train_steps:
        training_loss = run.train_step()
        average.add()
        if run.step < look or training_loss > target + NEAR:
            continue
        average.swap()
        loss = run.evaluate()
        average.swap()
        if loss <= target:
            return round(trials.crossing(*before, run.step, loss, target), 2) if before else run.step
        before = run.step, loss
        look = max(run.step + 1, round(run.step * LOOK))
    return None


# ------------------------------------------------------------------------------------------------------------
# Which trainings


def read(path: Path) -> list[dict]:
    """Return the trainings in a file. Raises UsageError where they have another loss to reach."""
    rows = trials.read(path, *ENTRIES)
    others = {row["target"] for row in rows} - {LOSS}
    if others:
        raise UsageError(f"{path}: expected trainings to the loss {LOSS:g}, found some to {others.pop():g}; "
                         "name another file")
    return rows


def by_cell(rows: list[dict]) -> dict[Cell, dict[float, dict[int, float]]]:
    """Return cell -> factor -> seed -> steps, infinite where the loss was not reached."""
    found = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cell = Cell(row["optimizer"], row["beta"], row["batch"])
        found[cell][row["factor"]][row["seed"]] = row["steps"] or math.inf
    return found


def best_factor(factors: dict[float, dict[int, float]]) -> float:
    """Return the factor with the fewest steps at seed 0 or, of it and its neighbours, the one that has the
    fewest by all seeds that they share; the smaller one of two alike."""
    first = min(sorted(factors), key=lambda factor: factors[factor].get(0, math.inf))
    around = [factor for factor in neighbours(first) if factor in factors]
    seeds = set.intersection(*(set(factors[factor]) for factor in around))
    if not seeds:
        return first
    return min(around, key=lambda factor: mean_steps([factors[factor][seed] for seed in seeds]))


def neighbours(factor: float) -> list[float]:
    return [factor / 2, factor, factor * 2]


def wanted(factors: dict[float, dict[int, float]]) -> list[tuple[float, int]]:
    """Return the (factor, seed) that a cell lacks now; more may follow from what they find."""
    missing = [(factor, 0) for factor in FIRST_FACTORS if 0 not in factors.get(factor, {})]
    if missing:
        return missing
    best = best_factor(factors)
    if all(math.isinf(steps[0]) for steps in factors.values() if 0 in steps):
        return []
    around = [(factor, 0) for factor in neighbours(best) if factor not in factors]
    if around:
        return around if len(factors) < LARGEST_SEARCH else []
    return [(factor, seed) for seed in range(1, SEEDS) for factor in neighbours(best)
            if seed not in factors[factor]]


def cells() -> list[Cell]:
    """Return all cells, those that compare the optimizers first."""
    both = [Cell(optimizer, beta, batch) for batch in BATCHES
            for optimizer, beta in (("muon", BETA), ("adamw", 0.9))]
    return [*both, *(Cell("muon", beta, batch) for beta in BETAS if beta != BETA for batch in BATCHES)]


def run_all(options) -> None:
    """Train what is missing, as long as the search asks for more."""
    while True:
        found = by_cell(read(options.out))
        jobs = []
        for cell in cells():
            factors = found.get(cell, {})
            steps = [n for of_factor in factors.values() for n in of_factor.values() if math.isfinite(n)]
            cap = min(CAP, round(2 * min(steps))) if steps else CAP
            jobs += [job_of(cell, factor, seed, cap) for factor, seed in wanted(factors)]
        if not jobs:
            return
        jobs.sort(key=lambda job: job.seed)  # searches first
        trials.run_all(jobs, train, options.workers, options.out)


# ------------------------------------------------------------------------------------------------------------
# Fits


def best_steps(factors: dict[float, dict[int, float]]) -> tuple[float, list[float]]:
    """Return (factor, steps of its seeds) that needs the fewest, by the mean logarithm; inf: never."""
    best = min(sorted(factors), key=lambda factor: mean_steps([*factors[factor].values()]))
    return best, [steps for _, steps in sorted(factors[best].items())]


def mean_steps(steps: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(np.mean(np.log(steps)))


def mean_steps_by_batch(curve: dict[int, dict]) -> list[float]:
    """Return the mean steps of each batch of a curve."""
    return [mean_steps(best_steps(factors)[1]) for factors in curve.values()]


def whole_seeds(factors: dict[float, dict[int, float]]) -> dict[float, dict[int, float]]:
    """Return the best factor and its neighbours, each with the seeds that all of them have."""
    kept = {factor: factors[factor] for factor in neighbours(best_factor(factors)) if factor in factors}
    seeds = set.intersection(*map(set, kept.values()))
    return {factor: {seed: steps[seed] for seed in seeds} for factor, steps in kept.items()}


def fit_critical(batches, steps) -> tuple[float, float, float]:
    """Fit S = S_min (1 + B_crit / B) in logarithms. Return (S_min, B_crit, root mean square misfit)."""
    def misfit(x):
        return x[0] + np.log1p(np.exp(x[1]) / np.array(batches)) - np.log(steps)

    start = [math.log(min(steps)), math.log(np.median(batches))]
    found = scipy.optimize.least_squares(misfit, start)
    return math.exp(found.x[0]), math.exp(found.x[1]), float(np.sqrt(np.mean(found.fun**2)))


def fit_power(batches, steps) -> tuple[float, float]:
    """Fit S = c B^p. Return (p, root mean square misfit in logarithms)."""
    line = np.polyfit(np.log(batches), np.log(steps), 1)
    return float(line[0]), float(np.sqrt(np.mean((np.polyval(line, np.log(batches)) - np.log(steps)) ** 2)))


def draw_steps(factors: dict[float, dict[int, float]], rng) -> float:
    """Return the mean steps at the best factor of a draw of seeds, so that the search is drawn again too."""
    known = sorted(next(iter(factors.values())))
    seeds = rng.choice(known, len(known))
    return min(mean_steps([steps[seed] for seed in seeds]) for steps in factors.values())


def interval(curve: dict[int, dict]) -> list[tuple[float, float]]:
    """Return intervals of 95 % of S_min and B_crit by a bootstrap over seeds and factors."""
    rng = np.random.default_rng(0)
    found = [fit_critical([*curve], [draw_steps(factors, rng) for factors in curve.values()])[:2]
             for _ in range(DRAWS)]
    return [tuple(np.percentile(values, (2.5, 97.5))) for values in zip(*found)]


# ------------------------------------------------------------------------------------------------------------
# The page


def curves(rows: list[dict]) -> dict[tuple[str, float], dict[int, dict]]:
    """Return (optimizer, beta) -> batch -> factors with whole seeds, of cells whose search has ended."""
    found = defaultdict(dict)
    for cell, factors in sorted(by_cell(rows).items(), key=lambda item: (item[0].batch, item[0])):
        kept = whole_seeds(factors)
        reached = math.isfinite(mean_steps(best_steps(kept)[1]))
        if reached and len(kept) == len(neighbours(1)):
            found[cell.optimizer, cell.beta][cell.batch] = kept
    return found


def cell_rows(rows: list[dict]) -> list[list]:
    lines = []
    for cell, factors in sorted(by_cell(rows).items(), key=lambda item: (item[0].batch, item[0])):
        tried = " ".join(f"{factor:g}" for factor in sorted(factors))
        best, steps = best_steps(whole_seeds(factors))
        line = [cell.batch, NAMES[cell.optimizer], f"{cell.beta:g}", tried, f"{best:g}", len(steps)]
        if math.isinf(mean_steps(steps)):
            lines.append([*line, "not reached", "", ""])
            continue
        inside = min(factors) < best < max(factors)
        lines.append([*line, f"{mean_steps(steps):.0f}", f"{min(steps):.0f} to {max(steps):.0f}",
                      "yes" if inside else "no"])
    return lines


def ratio_rows(found: dict) -> list[list]:
    muon, adamw = found.get(("muon", BETA), {}), found.get(("adamw", 0.9), {})
    lines = []
    for batch in sorted({*muon} & {*adamw}):
        few, many = mean_steps_by_batch({"muon": muon[batch], "adamw": adamw[batch]})
        lines.append([batch, f"{few:.0f}", f"{many:.0f}", f"{many / few:.2f}"])
    return lines


def fit_rows(found: dict) -> list[list]:
    lines = []
    for (optimizer, beta), curve in sorted(found.items()):
        name = [NAMES[optimizer], f"{beta:g}", len(curve)]
        if len(curve) < 3:
            lines.append([*name, "no fit: fewer than three batches", "", "", "", ""])
            continue
        steps = mean_steps_by_batch(curve)
        least, critical, misfit = fit_critical([*curve], steps)
        power, power_misfit = fit_power([*curve], steps)
        smallest, tokens = f"{least:.0f}", f"{critical:.0f}"
        if min(len(next(iter(factors.values()))) for factors in curve.values()) > 1:
            (low, high), (near, far) = interval(curve)
            smallest += f" ({low:.0f} to {high:.0f})"
            tokens += f" ({near:.0f} to {far:.0f})"
        lines.append([*name, smallest, tokens, f"{misfit:.1%}", f"{power:.2f}", f"{power_misfit:.1%}"])
    return lines


def tables(rows: list[dict]) -> str:
    if not rows:
        raise UsageError("expected results, found none; see `python -m bench.batch run`")
    found = curves(rows)
    endings = [row["ending"] for row in rows]
    fits = ["optimizer", "momentum", "batches", "S_min (95 %)", "B_crit, tokens (95 %)", "misfit",
            "exponent of a power law", "its misfit"]
    return "\n\n".join([
        f"{len(rows)} trainings to the loss {rows[0]['target']:g}: {endings.count('not reached')} did not "
        f"reach it in time, {endings.count('diverged')} diverged.",
        grid(["tokens a batch", "optimizer", "momentum", "factors tried", "best", "n", "steps", "range",
              "best inside"], cell_rows(rows)),
        "Steps of AdamW in units of Muon's, where the best factor of both lies inside those tried:",
        grid(["tokens a batch", "Muon", "AdamW", "ratio"], ratio_rows(found)),
        "Fits of S = S_min (1 + B_crit / B), and of a power law; intervals where every cell has several "
        "seeds:",
        grid(fits, fit_rows(found))]) + "\n"


def draw(rows: list[dict], theme: Theme, figure: Figure) -> None:
    """Draw steps against the batch: of both optimizers on the left, of Muon's momenta on the right."""
    found = curves(rows)
    titles = f"steps to {rows[0]['target']:g}", "Muon's, by its momentum"
    left, right = two_plots(figure, theme, titles, ("tokens a batch", "tokens a batch"))
    dashes = iter(((1, 1.5), (), (5, 2)))
    batches = sorted({batch for curve in found.values() for batch in curve})
    for (optimizer, beta), curve in sorted(found.items()):
        steps = mean_steps_by_batch(curve)
        shown = dict(color=theme.colors[optimizer], linewidth=3, marker="o")
        if (optimizer, beta) in (("muon", BETA), ("adamw", 0.9)):
            left.plot([*curve], steps, label=NAMES[optimizer], **shown)
        if optimizer == "muon":
            right.plot([*curve], steps, dashes=next(dashes, ()), label=f"{beta:g}", **shown)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_yticks((50, 100, 200, 400), ("50", "100", "200", "400"))
        axes.set_ylim(45, 400)
        finish(axes, theme, batches)


MEASUREMENT = Measurement("batch", "Steps to a loss against the batch", __doc__, "OUT.jsonl",
                          {"run": run_all}, read, tables, draw, trials.add_workers)

if __name__ == "__main__":
    sys.exit(run_program(MEASUREMENT.main, sys.argv[1:], "bench.batch"))
