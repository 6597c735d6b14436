"""The convergence bound of Muon against Muon itself, on a noisy quadratic all of whose constants are known.

    python -m bench.theory run OUT.json             measure, in less than a minute of one core
    python -m bench.theory table OUT.json [--page=bench/THEORY.md]

f(W) = 1/2 <W - W*, H (W - W*)> for W of 16 x 24, H positive. With gradients in the nuclear norm |.|_* and
steps in the spectral norm, f is smooth with L = tr H; the noise of a gradient of batch b is Gaussian and has
the expected norm sigma / sqrt(b). For plain momentum (M starts at zero) and exact orthogonalization,

    f(W_t+1) <= f(W_t) - lr |G_t|_* + 2 lr |M_t - G_t|_* + lr^2 L / 2,

    M_t - G_t = -beta^(t+1) G_0 + sum_s beta^(t-s+1) (G_s-1 - G_s) + (1 - beta) sum_s beta^(t-s) noise_s,

where |G_s-1 - G_s|_* <= lr L, and the last sum has the expected norm of the noise times
sqrt((1 - beta) / (1 + beta)) at most. Summed up over T steps:

    mean |G|_* <= f(W_0) / (lr T) + lr L / 2                            descent
                  + 2 beta |G_0|_* / ((1 - beta) T) + 2 lr L beta / (1 - beta)    lag of the momentum
                  + 2 sigma / sqrt(b) sqrt((1 - beta) / (1 + beta))     noise

This is the bound X / T + Y / sqrt(b) + Z of arXiv 2507.01598, with this problem's constants. It assumes exact
orthogonalization. With decay, |W| <= 1 / decay in the spectral norm as soon as it holds once and lr decay
<= 1.
"""
import json
import math
import statistics
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.measurement import Measurement, read_json
from bench.page import grid
from bench.pictures import Theme, finish, two_plots
from data.errors import run_program
from data.files import written_whole
from muon import Muon

ROWS, COLUMNS = 16, 24
EXACT = "exact"  # thirty steps of a slow iteration that converges
ITERATIONS = {
    EXACT: dict(ns_coefficients=((1.875, -1.25, 0.375),), ns_steps=30),
    "polar": dict(ns_coefficients="polar"),
    "quintic": dict(ns_coefficients="quintic"),
    "jordan": dict(ns_coefficients="jordan"),
}
LR, BETA, STEPS = 0.02, 0.95, 1000  # where not said
BATCHES = 1, 4, 16, 64, 256
RATES = 0.005, 0.01, 0.02, 0.04, 0.08
NEVER = math.inf  # batch without noise
DECAY = 0.5
SEED = 0  # of problem and noise


class Case(NamedTuple):
    """One run of Muon: its length, rate, momentum, batch (inf: no noise) and iteration."""
    steps: int = STEPS
    lr: float = LR
    beta: float = BETA
    batch: float = NEVER
    iteration: str = EXACT


CASES = [
    *(Case(lr=lr, beta=0.0, iteration=name) for lr in (LR, 0.1) for name in ITERATIONS),
    *(Case(beta=beta) for beta in (0.8, 0.95)),
    *(Case(steps=steps) for steps in (100, 300)),
    *(Case(batch=batch) for batch in BATCHES),
    *(Case(lr=lr, batch=16) for lr in RATES if lr != LR),
    *(Case(beta=beta, batch=16) for beta in (0.0, 0.8, 0.98)),
]


class Quadratic:
    """The problem of a seed: H with eigenvalues from 0.05 to 1, the minimum W*, the noise."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(self.normal(ROWS, ROWS).double())
        eigenvalues = torch.logspace(math.log10(0.05), 0, ROWS, dtype=torch.float64)
        self.H = (basis * eigenvalues) @ basis.T
        self.minimum = self.normal(ROWS, COLUMNS).double() * self.distance
        self.L = self.H.trace().item()
        self.sigma = statistics.mean(nuclear(self.normal(ROWS, COLUMNS)) for _ in range(1000)) * self.noise

    noise = 0.05     # standard deviation of an entry of the gradient at batch 1
    distance = 0.2   # and of W* from the start

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def gradient(self, W: Tensor) -> Tensor:
        return self.H @ (W.double() - self.minimum)

    def value(self, W: Tensor) -> float:
        return ((W.double() - self.minimum) * self.gradient(W)).sum().item() / 2


def nuclear(X: Tensor) -> float:
    return torch.linalg.matrix_norm(X.double(), "nuc").item()


def spectral(X: Tensor) -> float:
    return torch.linalg.matrix_norm(X.double(), 2).item()


# ------------------------------------------------------------------------------------------------------------
# Measured and bound


def descend(problem: Quadratic, case: Case, decay: float = 0.0) -> tuple[list[float], float]:
    """Run Muon from zero. Return (|G|_* before each step, largest |W| in the spectral norm)."""
    W = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS))
    optimizer = Muon([W], lr=case.lr, momentum=case.beta, weight_decay=decay, nesterov=False,
                     adjust_lr_fn="identity", ns_dtype=torch.float32, **ITERATIONS[case.iteration])
    norms = []
    largest = 0.0
    for _ in range(case.steps):
        G = problem.gradient(W.detach())
        norms.append(nuclear(G))
        if case.batch != NEVER:
            G = G + problem.normal(ROWS, COLUMNS) * problem.noise / math.sqrt(case.batch)
        W.grad = G.float()
        optimizer.step()
        if decay:
            largest = max(largest, spectral(W.detach()))
    return norms, largest


def bound(problem: Quadratic, case: Case) -> float:
    """Return the right-hand side of the inequality of this file's docstring."""
    start = torch.zeros(ROWS, COLUMNS)
    T, lr, beta = case.steps, case.lr, case.beta
    descent = problem.value(start) / (lr * T) + lr * problem.L / 2
    first = nuclear(problem.gradient(start)) * beta / ((1 - beta) * T)
    lag = lr * problem.L * beta / (1 - beta)
    noise = problem.sigma / math.sqrt(case.batch) * math.sqrt((1 - beta) / (1 + beta))
    return descent + 2 * (first + lag + noise)


def slope(xs, ys) -> float:
    """Return the exponent of the power law through these points."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def measure() -> dict:
    """Return the results, as JSON keeps them."""
    rows = []
    for case in CASES:
        problem = Quadratic(SEED)
        norms, _ = descend(problem, case)
        rows.append(dict(case._asdict(), batch=0 if case.batch == NEVER else case.batch,
                         measured=statistics.mean(norms), bound=bound(problem, case),
                         stationary=statistics.mean(norms[len(norms) // 2:])))
    ball = {}
    for name in ITERATIONS:
        problem = Quadratic(SEED)
        problem.minimum *= 100 / DECAY  # far outside, so that Muon pushes against the ball
        ball[name] = descend(problem, Case(beta=0.0, iteration=name), DECAY)[1] * DECAY
    return dict(seed=SEED, lr=LR, decay=DECAY, L=problem.L, sigma=problem.sigma, rows=rows, ball=ball)


def run(options) -> None:
    torch.set_num_threads(1)
    with written_whole(options.out, "w") as file:
        json.dump(measure(), file, indent=1)


# ------------------------------------------------------------------------------------------------------------
# The page


def chosen(found: dict, **wanted) -> list[dict]:
    """Return the rows with these values, the others as in Case."""
    values = dict(Case()._asdict(), batch=0) | wanted
    return [row for row in found["rows"]
            if all(value is None or row[name] == value for name, value in values.items())]


def by_batch(found: dict) -> list[dict]:
    return [row for row in chosen(found, batch=None) if row["batch"]]


def by_rate(found: dict) -> list[dict]:
    return sorted(chosen(found, batch=16, lr=None), key=lambda row: row["lr"])


def tables(found: dict) -> str:
    lines = []
    for row in found["rows"]:
        lines.append([
            row["iteration"], row["steps"], f"{row['lr']:g}", f"{row['beta']:g}", row["batch"] or "no noise",
            f"{row['measured']:.4f}", f"{row['bound']:.4f}", f"{row['measured'] / row['bound']:.4f}"])
    slopes = [
        ["b", "-0.5", f"{slope(*columns(by_batch(found), 'batch')):.2f}"],
        ["lr", "1", f"{slope(*columns(by_rate(found), 'lr')):.2f}"],
    ]
    ball = [[name, f"{largest:.4f}"] for name, largest in found["ball"].items()]
    return "\n\n".join([
        f"Seed {found['seed']}, L = tr H = {found['L']:.4f}, sigma = {found['sigma']:.4f}.",
        grid(["iteration", "T", "lr", "beta", "b", "measured", "bound", "measured / bound"], lines),
        "Beyond the bound where it is tight, at beta 0 without noise:",
        grid(["lr", *ITERATIONS], excess_rows(found)),
        f"Largest |W| in units of 1 / decay, lr {found['lr']:g}, decay {found['decay']:g}, {STEPS} steps:",
        grid(["iteration", "largest"], ball),
        "Exponent of the mean gradient of the second half of the steps, and that of the bound's term:",
        grid(["in", "bound", "measured"], slopes)]) + "\n"


def excess_rows(found: dict) -> list[list[str]]:
    tight = chosen(found, lr=None, beta=0.0, iteration=None)
    rates = sorted({row["lr"] for row in tight})
    return [[f"{lr:g}", *(f"{row['measured'] / row['bound'] - 1:+.2%}" for row in tight if row["lr"] == lr)]
            for lr in rates]


def columns(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    return [row[name] for row in rows], [row["stationary"] for row in rows]


def draw(found: dict, theme: Theme, figure: Figure) -> None:
    """Draw measured mean gradients below their bounds, against the batch and against the rate."""
    titles = "mean |G| in the nuclear norm", "the same at b = 16"
    axes = two_plots(figure, theme, titles, ("batch b", "learning rate"))
    for axis, rows, name in zip(axes, (by_batch(found), by_rate(found)), ("batch", "lr")):
        xs = [row[name] for row in rows]
        for label, key, color in (("bound", "bound", "adamw"), ("measured", "measured", "muon"),
                                  ("second half", "stationary", "nanogpt")):
            axis.plot(xs, [row[key] for row in rows], color=theme.colors[color], linewidth=3, marker="o",
                      label=f"{label} by {name}" if axis is axes[1] else label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_yticks((0.3, 1, 3, 10), ("0.3", "1", "3", "10"))
    finish(axes[0], theme, BATCHES)
    finish(axes[1], theme, RATES, legend=False)


MEASUREMENT = Measurement(
    "theory", "The bound of Muon and Muon itself", __doc__, "OUT.json", {"run": run},
    partial(read_json, tables=tables), tables, draw)

if __name__ == "__main__":
    sys.exit(run_program(MEASUREMENT.main, sys.argv[1:], "bench.theory"))
