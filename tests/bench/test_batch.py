"""bench.batch: which trainings it asks for, its fits, and that its trainings know nothing of their length."""
import math

import numpy as np
import pytest
import torch

from bench import batch, trials
from bench.batch import BETA, Average, Cell, job_of
from data.errors import RunError, UsageError
from engine.ranks import Runtime
from tests.helpers.runs import make_shards
from train_gpt import Run

CELL = Cell("muon", BETA, 512)


def rows_of(cell, steps, seeds=3, factors=(0.5, 1.0, 2.0)):
    """The lines of a cell that needs so many steps, a percent more with every seed, at factor 1; others need
    twice as many. None: none reaches the loss."""
    def found(factor, seed):
        return steps and steps * (1 + seed / 100) * (1 if factor == 1 else 2)

    return [dict(cell._asdict(), factor=factor, seed=seed, target=2.15, cap=100, steps=found(factor, seed),
                 ending="reached") for factor in factors for seed in range(seeds)]


# ------------------------------------------------------------------------------------------------------------
# The search


def test_the_search_goes_on_until_the_best_factor_lies_inside():
    def steps(factor):  # fewest at 8
        return 100 + 50 * abs(math.log2(factor / 8))

    found, asked = {}, []
    while jobs := batch.wanted(found):
        for factor, seed in jobs:
            found.setdefault(factor, {})[seed] = steps(factor) + seed
            asked.append((factor, seed))
    assert len(set(asked)) == len(asked)
    assert {factor for factor, _ in asked} == {0.5, 1.0, 2.0, 4.0, 8.0, 16.0}
    assert {factor for factor, seed in asked if seed} == {4.0, 8.0, 16.0}


def test_a_factor_that_other_seeds_prefer_gets_neighbours_too():
    found = {}
    while jobs := batch.wanted(found):
        for factor, seed in jobs:
            by_others = {1.0: 90, 2.0: 70}.get(factor, 200)
            found.setdefault(factor, {})[seed] = by_others if seed else 100 + 10 * abs(math.log2(factor))
    assert {factor: len(seeds) for factor, seeds in found.items()} == {0.5: 3, 1.0: 3, 2.0: 3, 4.0: 3}
    assert batch.best_factor(found) == 2


def test_a_search_without_an_end_or_without_a_result_stops():
    endless = {2.0**k: {0: 100 - k} for k in range(-1, batch.LARGEST_SEARCH - 1)}
    assert batch.wanted(endless) == []
    assert batch.wanted({factor: {0: math.inf} for factor in (0.5, 1.0, 2.0)}) == []


def test_a_run_goes_on_and_gives_up_what_is_twice_as_slow(tmp_path, monkeypatch, capsys, in_this_process):
    caps = []

    def made_up(job):
        caps.append(job.labels["cap"])
        steps = 100.0 if job.labels["factor"] == 1 else 150.0
        return dict(job.labels, seed=job.seed, steps=steps, loss=2.1, seconds=1.0, ending="reached")

    for name, value in dict(train=made_up, BATCHES=(512, 1024), BETAS=(0.8,), SEEDS=2, CAP=900).items():
        monkeypatch.setattr(batch, name, value)
    out = tmp_path / "out.jsonl"
    batch.MEASUREMENT.main(["run", str(out)])
    lines = out.read_text().splitlines()
    assert len(lines) == 6 * 6  # six cells, three factors, two seeds
    assert set(caps) == {900, 200}
    out.write_text("\n".join(lines[:20]) + "\n")
    batch.MEASUREMENT.main(["run", str(out)])
    assert len(out.read_text().splitlines()) == 36
    monkeypatch.setattr(batch, "LOSS", 2.0)
    with pytest.raises(UsageError, match="expected trainings to the loss 2, found some to 2.15; name"):
        batch.read(out)
    for workers in ("0", "1.5"):
        with pytest.raises(UsageError, match="expected a whole number from 1 on, found"):
            batch.MEASUREMENT.main(["run", str(out), f"--workers={workers}"])


# ------------------------------------------------------------------------------------------------------------
# Fits


def test_the_fit_finds_what_made_the_points():
    batches = np.array([512, 1024, 2048, 8192])
    least, critical, misfit = batch.fit_critical(batches, 50 * (1 + 2000 / batches))
    assert (least, critical) == (pytest.approx(50, rel=1e-4), pytest.approx(2000, rel=1e-4)) and misfit < 1e-6
    power, misfit = batch.fit_power(batches, 900 * batches**-0.5)
    assert power == pytest.approx(-0.5) and misfit < 1e-9


def test_the_bootstrap_draws_seeds_and_the_search_anew():
    factors = {1.0: {0: 100, 1: 100}, 2.0: {0: 50, 1: 200}}
    rng = np.random.default_rng(0)
    drawn = {round(batch.draw_steps(factors, rng)) for _ in range(50)}
    assert drawn == {50, 100}  # 50: seed 0 twice, where factor 2 is the best


def test_what_does_not_reach_the_loss_is_said_and_not_fitted():
    rows = []
    for tokens in (512, 2048, 8192):
        rows += rows_of(Cell("muon", BETA, tokens), 60 * (1 + 2000 / tokens))
        rows += rows_of(Cell("adamw", 0.9, tokens), 200.0 if tokens > 512 else None)
    rows += rows_of(Cell("muon", 0.8, 512), 100.0, factors=(1.0, 2.0))  # the best at the edge
    text = batch.tables(rows)
    assert "| 512 | AdamW | 0.9 | 0.5 1 2 | 0.5 | 3 | not reached |  |  |" in text
    assert "| AdamW | 0.9 | 2 | no fit: fewer than three batches |" in text
    assert "| Muon | 0.95 | 3 | 61 (60 to 61) | 2000 (" in text
    assert "| 2048 | 120 | 202 | 1.69 |" in text
    assert "| 512 | Muon | 0.8 | 1 2 | 1 | 3 | 101 | 100 to 102 | no |" in text
    assert "\n| Muon | 0.8 |" not in text  # no fit with it


def test_a_best_factor_that_is_the_largest_tried_is_not_called_inside():
    """Seed 0 alone finds factor 1, all seeds together factor 2."""
    rows = rows_of(CELL, 100.0)
    for row in rows:
        if row["factor"] == 2 and row["seed"]:
            row["steps"] = 60.0
    line, = batch.cell_rows(rows)
    assert (line[4], line[-1]) == ("2", "no")


# ------------------------------------------------------------------------------------------------------------
# Trainings


def test_the_average_counts_late_weights_by_a_power_of_their_step():
    weight = torch.zeros(1)
    average = Average([weight])
    for step in range(1, 51):
        weight.fill_(step)
        average.add()
    value = average.values[0].item()
    assert value == pytest.approx(50 * 7 / 8, rel=0.03)  # the mean of x over [0, 1] with density 7 x^6
    average.swap()
    assert weight.item() == pytest.approx(value) and average.values[0].item() == 50


def test_between_two_looks_the_loss_is_straight_in_the_logarithm_of_the_steps():
    assert trials.crossing(100, 2.2, 400, 2.0, 2.1) == pytest.approx(200)


def test_a_training_does_not_know_how_long_it_may_take(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(make_shards(tmp_path)))
    monkeypatch.setattr(batch, "CONSTANT", [*batch.CONSTANT, "--val_tokens=1024", "--val_slice=256"])
    losses = []
    for optimizer in ("muon", "adamw"):
        for cap in (15, 40):
            job = job_of(Cell(optimizer, 0.9, 1024), 1.0, 0, cap)
            run = Run(trials.config(job.settings, job.seed), Runtime())
            losses.append([run.train_step() for _ in range(15)])
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]


def test_a_training_ends_at_its_loss_or_says_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(make_shards(tmp_path)))
    monkeypatch.setattr(batch, "CONSTANT", [*batch.CONSTANT, "--val_tokens=1024", "--val_slice=256"])
    cell = Cell("muon", BETA, 512)
    job = job_of(cell, 1.0, 0, 60, loss=4.5)
    row = batch.train(job)
    assert row["ending"] == "reached" and 1 < row["steps"] < 60 and row["loss"] <= 4.5
    assert batch.train(job_of(cell, 1.0, 0, 3, loss=0.1))["ending"] == "not reached"

    def diverge(self):
        raise RunError("expected a finite training loss, found nan")
    monkeypatch.setattr(Run, "train_step", diverge)
    row = batch.train(job)
    assert (row["ending"], row["steps"]) == ("diverged", None)
