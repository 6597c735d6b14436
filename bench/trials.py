"""Trainings of the miniature (--recipe=miniature of track shakespeare), each by the trainer's own class in a
process with one thread, and the JSONL file that gathers them: a line for every result as soon as it is there,
so that an interrupted sweep goes on where it stopped."""
import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.page import count
from data.errors import RunError, UsageError
from data.machine import output
from engine.ranks import Runtime
from train_gpt import Config, Run, parse_config


class Job(NamedTuple):
    """One training: what its line in the file is known by, its settings as on the command line, its seed."""
    labels: dict
    settings: list[str]
    seed: int
    prepare: Callable[[Run], None] | None = None  # changes the run before its first step

    def __str__(self) -> str:
        return ", ".join([*map(str, self.labels.values()), f"seed {self.seed}"])


def config(settings: list[str], seed: int) -> Config:
    """Return the settings of a run that validates at its end alone."""
    _, changes = parse_config([f"--val_every={10**9}", f"--seed={seed}", *settings])
    return Config.for_track("shakespeare", **{"recipe": "miniature", **changes})


# ------------------------------------------------------------------------------------------------------------
# The file


def read(path: Path, *entries: str) -> list[dict]:
    """Return the lines of a file of results, each with these entries; [] without one. Raises UsageError."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a file of results, found {error}; name another") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not {*entries} <= row.keys():
            parts = f" with {', '.join(entries)}" if entries else ""
            raise UsageError(f"{path}, line {number}: expected a result as JSON{parts}, found {line[:60]!r}; "
                             "remove the line, and its run is done again")
        rows.append(row)
    return rows


def append(path: Path, row: dict) -> dict:
    """Add a line to a file of results. Return it: the row and the commit that made it."""
    row = row | dict(commit=commit())
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def commit() -> str:
    return output("git", "describe", "--always", "--dirty", "--abbrev=10")


def crossing(x: float, y: float, next_x: float, next_y: float, target: float) -> float:
    """Return the x at which a line through two points, straight in the logarithm of x, is at the target."""
    return x * (next_x / x) ** ((target - y) / (next_y - y))


# ------------------------------------------------------------------------------------------------------------
# Training


def train(job: Job) -> dict:
    """Train once and return the line of the result. A run that diverges is a result too: its loss is nan."""
    run = Run(config(job.settings, job.seed), Runtime())
    if job.prepare:
        job.prepare(run)
    start = time.perf_counter()
    try:
        while run.step < run.cfg.train_steps:
            run.train_step()
        loss = run.evaluate()
    except RunError as error:
        loss = math.nan
        print(f"{job}: {error}", file=sys.stderr)
    return dict(job.labels, settings=job.settings, seed=job.seed, steps=run.cfg.train_steps,
                loss=round(loss, 5), seconds=round(time.perf_counter() - start, 1))


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=count, default=1, help="trainings at a time, one thread each")


def run_all(jobs: list, function: Callable, workers: int, path: Path) -> list[dict]:
    """Call the function for each job in a pool of processes with one thread each; append what each returns to
    the file, say how far it is, and return all."""
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.perf_counter()
    rows = []
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        for number, row in enumerate(pool.imap_unordered(function, jobs), 1):
            append(path, row)
            left = (time.perf_counter() - start) / number * (len(jobs) - number)
            print(f"{number} of {len(jobs)}: {said(row)}; about {left / 60:.0f} min to go", file=sys.stderr,
                  flush=True)
            rows.append(row)
    return rows


def said(row: dict) -> str:
    """Say a result in one line."""
    unsaid = "settings", "search", "kind", "commit"
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in unsaid)
