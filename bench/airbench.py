"""Epochs that Muon, SGD and AdamW need to 90 % on Fashion-MNIST: examples/convnet.py, each tuned alike.

    python -m bench.airbench run OUT.jsonl                            train what OUT.jsonl lacks
    python -m bench.airbench table OUT.jsonl [--page=bench/AIRBENCH.md]    the tables, or page and pictures

The search has as many trials for each optimizer, and no run of it counts later: half an epoch on the first
50,000 training images, judged by the other 10,000. All rates of the filters are tried with all rates of the
head; at the best pair, other momenta.

Then fresh seeds train on all 60,000 images at growing lengths, each with its own fall of the rate to zero,
until their mean accuracy on the test images has passed the target clearly. Epochs to the target lie on a
straight line in their logarithm from the last length below it to the first one above; a target that is not
reached is said so. Intervals come from drawing seeds anew, the same for both optimizers of a ratio.

OUT.jsonl begins with this plan and is refused when the plan has changed. It gets a line for each run, so that
an interrupted sweep goes on where it stopped. Nothing here depends on how fast the machine is.
"""
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from bench import trials
from bench.measurement import Measurement
from bench.page import OPTIMIZER_NAMES as NAMES
from bench.page import grid
from bench.pictures import Theme, finish, two_plots
from data.errors import UsageError, run_program
from examples.convnet import AirbenchSettings, run_once, standardized
from examples.images import ImageSet, Labelled, load_images
from records.compare import spread

TARGET = 0.90
HELD_OUT = 10_000  # of the training images, for the search
SEARCH_EPOCHS = 0.5
SEARCH_SEED = 1000
CLEARLY = 0.003  # above the target, three standard errors of a mean: then no longer runs are needed
LENGTHS = (0.5, 0.75, 1.1, 1.6, 2.4)  # epochs; each a whole number of steps
SEEDS = 8
GRID = {  # optimizer -> rates of the filters, rates of the head
    "muon": ((0.02, 0.06, 0.18, 0.54), (0.18, 0.54)),
    "sgd": ((0.0003, 0.001, 0.003, 0.01), (0.18, 0.54)),
    "adamw": ((0.001, 0.003, 0.01, 0.03), (0.003, 0.01)),
}
MOMENTUM, MOMENTA = 0.85, (0.6, 0.95)
TRIALS = 4 * 2 + len(MOMENTA)  # of each optimizer
DRAWS = 10_000  # of seeds, for an interval


class SearchedSettings(NamedTuple):
    """The settings that the search looks for."""
    lr: float
    head_lr: float
    momentum: float


LABELS = "stage", "optimizer", *SearchedSettings._fields, "epochs", "seed"  # of a run


def plan() -> dict:
    """Return all that decides which runs there are."""
    return dict(target=TARGET, held_out=HELD_OUT, search_epochs=SEARCH_EPOCHS, search_seed=SEARCH_SEED,
                clearly=CLEARLY, lengths=LENGTHS, seeds=SEEDS, grid=GRID, momentum=MOMENTUM,
                momenta=MOMENTA, batch_size=AirbenchSettings.batch_size)


def read_results(path: Path) -> list[dict]:
    """Return the runs in a file; none where there is no file. Raises UsageError for another plan."""
    if not path.exists():
        return []
    first, *rows = trials.read(path) or [{}]
    found = first.get("plan")
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected a plan in the first line, found none; name a file that `run` has "
                         "begun")
    expected = json.loads(json.dumps(plan()))
    if found != expected:
        changed = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise UsageError(f"{path}: expected runs of this plan, found those of one with other values of "
                         f"{', '.join(changed)}; name a new file")
    return rows


# ------------------------------------------------------------------------------------------------------------
# Which runs


def tuned(optimizer: str, rows: list[dict]) -> SearchedSettings:
    """Return the best trial of the search so far."""
    found = [row for row in rows if row["stage"] == "search" and row["optimizer"] == optimizer]
    best = max(found, key=lambda row: row["accuracy"])
    return SearchedSettings(best["lr"], best["head_lr"], best["momentum"])


def runs_in_order(optimizer: str, rows: list[dict]) -> Iterator[dict]:
    """Yield the labels of all runs of an optimizer. Each must be among the rows before the next one is asked
    for, which may follow from it."""
    def search(settings: SearchedSettings) -> dict:
        return dict(stage="search", optimizer=optimizer, **settings._asdict(), epochs=SEARCH_EPOCHS,
                    seed=SEARCH_SEED)

    for lr, head_lr in itertools.product(*GRID[optimizer]):
        yield search(SearchedSettings(lr, head_lr, MOMENTUM))
    best = tuned(optimizer, rows)
    for momentum in MOMENTA:
        yield search(best._replace(momentum=momentum))
    best = tuned(optimizer, rows)
    for epochs in LENGTHS:
        for seed in range(SEEDS):
            yield dict(stage="final", optimizer=optimizer, **best._asdict(), epochs=epochs, seed=seed)
        if dict(curve(optimizer, rows))[epochs] >= TARGET + CLEARLY:
            return


def next_run(rows: list[dict], optimizers: Iterable[str] = tuple(GRID)) -> dict | None:
    """Return the labels of the next run of these optimizers that is missing; None when all is done."""
    done = {tuple(row[name] for name in LABELS) for row in rows}
    for optimizer in optimizers:
        for labels in runs_in_order(optimizer, rows):
            if tuple(labels.values()) not in done:
                return labels
    return None


# ------------------------------------------------------------------------------------------------------------
# Runs


def search_split(images: ImageSet) -> ImageSet:
    """Return the training images cut into those to train on and those to judge a trial by."""
    (pixels, labels), _ = images
    return ImageSet(Labelled(pixels[:-HELD_OUT], labels[:-HELD_OUT]),
                    Labelled(pixels[-HELD_OUT:], labels[-HELD_OUT:]))


def run_all(options) -> None:
    """Do the missing runs, one after the other, and keep each."""
    torch.set_num_threads(1)  # a second thread gains little on images so small
    path = options.out
    rows = read_results(path)
    images = load_images("fashion")
    data = dict(search=standardized(search_split(images)), final=standardized(images))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        trials.append(path, dict(plan=plan(), torch=torch.__version__))
    while labels := next_run(rows):
        chosen = {key: value for key, value in labels.items() if key not in ("stage", "seed")}
        found = run_once(AirbenchSettings(**chosen), data[labels["stage"]], labels["seed"])
        rows.append(trials.append(path, labels | found))
        print(trials.said(rows[-1]), file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Results


def finals(optimizer: str, rows: list[dict]) -> dict[float, list[float]]:
    """Return epochs -> test accuracy of each seed in order, for the lengths that all seeds have run."""
    found = {}
    for epochs in LENGTHS:
        labels = dict(stage="final", optimizer=optimizer, epochs=epochs)
        of_seed = {row["seed"]: row["accuracy"] for row in rows if labels.items() <= row.items()}
        if len(of_seed) >= SEEDS:
            found[epochs] = [of_seed[seed] for seed in sorted(of_seed)]
    return found


def curve(optimizer: str, rows: list[dict]) -> list[tuple[float, float]]:
    """Return (epochs, mean test accuracy), ascending."""
    return [(epochs, statistics.mean(accuracies)) for epochs, accuracies in finals(optimizer, rows).items()]


def epochs_to(points: list[tuple[float, float]]) -> float:
    """Return the epochs at which the mean accuracy passes the target: infinite where it never does, the
    shortest length where it does there already."""
    before = None
    for epochs, accuracy in points:
        if accuracy >= TARGET:
            return trials.crossing(*before, epochs, accuracy, TARGET) if before else epochs
        before = epochs, accuracy
    return math.inf


def drawn_epochs(optimizer: str, rows: list[dict], draws: np.ndarray) -> np.ndarray:
    """Return the epochs to the target for each draw of seeds. draws: (n, SEEDS) numbers of seeds."""
    found = finals(optimizer, rows)
    means = np.array([np.array(accuracies)[draws].mean(1) for accuracies in found.values()])
    return np.array([epochs_to(list(zip(found, column))) for column in means.T])


class Interval(NamedTuple):
    """A figure and the middle 95 % of the draws."""
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} (95 %: {self.low:.2f} to {self.high:.2f})"


def compared(first: str, second: str, rows: list[dict]) -> Interval:
    """Return the epochs of the first optimizer as a part of those of the second."""
    draws = np.random.default_rng(0).integers(0, SEEDS, (DRAWS, SEEDS))
    ratios = drawn_epochs(first, rows, draws) / drawn_epochs(second, rows, draws)
    value = epochs_to(curve(first, rows)) / epochs_to(curve(second, rows))
    return Interval(value, *np.quantile(ratios, (0.025, 0.975)).tolist())


def finished(rows: list[dict]) -> list[str]:
    """Return the optimizers of which no run is missing."""
    return [optimizer for optimizer in GRID if next_run(rows, [optimizer]) is None]


def search_table(rows: list[dict]) -> str:
    """Return what the search found, and how the two rates did around it."""
    lines = []
    for optimizer in finished(rows):
        rates, head_rates = GRID[optimizer]
        best = tuned(optimizer, rows)
        found = sorted((row["accuracy"] for row in rows
                        if row["stage"] == "search" and row["optimizer"] == optimizer), reverse=True)
        chosen = ("filters", best.lr, rates), ("head", best.head_lr, head_rates)
        edge = [name for name, value, tried in chosen if not min(tried) < value < max(tried)]
        lines.append([NAMES[optimizer], TRIALS, f"{best.lr:g}", f"{best.head_lr:g}", f"{best.momentum:g}",
                      f"{100 * found[0]:.2f} %", f"{100 * found[1]:.2f} %", " and ".join(edge) or "none"])
    return grid(["optimizer", "trials", "rate of the filters", "of the head", "momentum",
                 "best of the held-out images", "second best", "rates at an edge of the grid"], lines)


def length_table(rows: list[dict]) -> str:
    """Return the accuracy at each length."""
    lines = []
    for epochs in LENGTHS:
        cells = []
        for optimizer in finished(rows):
            accuracies = [100 * accuracy for accuracy in finals(optimizer, rows).get(epochs, [])]
            cells.append(spread(accuracies, ".2f") if accuracies else "")
        if any(cells):
            lines.append([f"{epochs:g}", *cells])
    return grid(["epochs", *map(NAMES.get, finished(rows))], lines)


def summary(rows: list[dict]) -> str:
    """Return a sentence for each optimizer, and Muon compared with the others."""
    sentences = []
    whole = finished(rows)
    for optimizer, name in NAMES.items():
        needed = epochs_to(curve(optimizer, rows))
        if optimizer not in whole:
            sentences.append(f"{name}'s runs are not complete.")
        elif math.isinf(needed):
            longest = max(finals(optimizer, rows))
            sentences.append(f"{name} does not reach {TARGET:.0%} in {longest:g} epochs.")
        else:
            bound = ", the shortest length, or earlier" if needed == LENGTHS[0] else ""
            sentences.append(f"{name} reaches {TARGET:.0%} after {needed:.2f} epochs{bound}.")
    reached = [optimizer for optimizer in whole if math.isfinite(epochs_to(curve(optimizer, rows)))]
    if "muon" in reached:
        sentences += [f"Muon's epochs over {NAMES[other]}'s: {compared('muon', other, rows)}, n = {SEEDS}."
                      for other in reached if other != "muon"]
    return " ".join(sentences)


def tables(rows: list[dict]) -> str:
    """Return the figures of the optimizers whose runs are all there. Raises UsageError where none are."""
    if not finished(rows):
        raise UsageError(f"expected all runs of an optimizer or more, found {len(rows)} runs; go on with "
                         "`python -m bench.airbench run`")
    return "\n\n".join([summary(rows), length_table(rows), "The search:", search_table(rows)]) + "\n"


def draw(rows: list[dict], theme: Theme, figure: Figure) -> None:
    """Draw the accuracy against the length, and that of the search against the rate of the filters."""
    left, right = two_plots(figure, theme, ("test accuracy, %", "search: held-out accuracy, %"),
                            ("epochs", "rate of the filters / the best one"))
    for optimizer, color in zip(finished(rows), theme.colors["ranks"]):
        found = finals(optimizer, rows)
        style = dict(color=color, marker="o", markersize=4, linewidth=2, label=NAMES[optimizer])
        percent = 100 * np.array(list(found.values()))
        left.fill_between(list(found), percent.min(1), percent.max(1), color=color, alpha=0.2, linewidth=0)
        left.plot(list(found), percent.mean(1), **style)

        best_at = {}
        for row in rows:
            if row["stage"] == "search" and row["optimizer"] == optimizer:
                best_at[row["lr"]] = max(best_at.get(row["lr"], 0), 100 * row["accuracy"])
        relative = sorted((lr / tuned(optimizer, rows).lr, accuracy) for lr, accuracy in best_at.items())
        right.plot(*zip(*relative), **style)
    left.axhline(100 * TARGET, color=theme.colors["target"], linewidth=1.5, linestyle=(0, (5, 3)))
    left.set_xscale("log")
    right.set_xscale("log")
    right.set_ylim(80, 92)
    finish(left, theme, [epochs for epochs in LENGTHS if left.get_xlim()[0] < epochs < left.get_xlim()[1]])
    finish(right, theme, (0.01, 0.1, 1, 10), legend=False)


MEASUREMENT = Measurement("airbench", "Accuracy on Fashion-MNIST", __doc__, "OUT.jsonl", {"run": run_all},
                          read_results, tables, draw)

if __name__ == "__main__":
    sys.exit(run_program(MEASUREMENT.main, sys.argv[1:], "bench.airbench"))
