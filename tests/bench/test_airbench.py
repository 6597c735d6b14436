"""The search and the crossing of the target, on made-up accuracies; nothing is trained but a few images."""
import json
import math

import numpy as np
import pytest

from bench import airbench
from bench.airbench import GRID, LENGTHS, SEEDS, TARGET, TRIALS
from bench.airbench import compared, epochs_to, finished, next_run, read_results, tuned
from data.errors import UsageError
from data.files import ROOT
from examples.convnet import RATES
from tests.helpers.pictures import made_up

COMMITTED = ROOT / "bench/results/2026-11-28_airbench/airbench.jsonl"
BEST = {"muon": 0.1, "sgd": 0.002, "adamw": 0.006}  # rate of the filters at which the made-up trials do best
HALF = {"muon": 0.6, "sgd": 0.9, "adamw": 1.2}  # epochs to the target in the made-up runs


def accuracy(row: dict) -> float:
    """A made-up law: best at one rate and at momentum 0.95, and a little luck of the seed."""
    if row["stage"] == "search":
        distance = abs(math.log(row["lr"] / BEST[row["optimizer"]]))
        return 0.9 - 0.01 * distance - 0.02 * (0.95 - row["momentum"])
    return TARGET + 0.02 * math.log(row["epochs"] / HALF[row["optimizer"]]) + 0.001 * math.sin(row["seed"])


def all_rows(law=accuracy) -> list[dict]:
    rows = []
    while labels := next_run(rows):
        rows.append(labels | dict(accuracy=law(labels), seconds=1.0))
    return rows


@pytest.fixture(scope="module")
def rows():
    return all_rows()


@pytest.fixture
def written(tmp_path, rows):
    """A file of results in which nothing is missing."""
    path = tmp_path / "out.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [dict(plan=airbench.plan()), *rows]) + "\n")
    return path


def test_each_optimizer_has_as_many_trials_and_they_end_at_the_best(rows):
    for optimizer in GRID:
        tried = [row for row in rows if row["stage"] == "search" and row["optimizer"] == optimizer]
        assert len(tried) == TRIALS and len({json.dumps(row) for row in tried}) == TRIALS
        best = tuned(optimizer, rows)
        won = accuracy(dict(stage="search", optimizer=optimizer, **best._asdict()))
        assert max(map(accuracy, tried)) == won
        assert best.momentum == 0.95 and abs(math.log(best.lr / BEST[optimizer])) < math.log(2)


def test_runs_that_count_have_the_best_rates_and_end_above_the_target(rows):
    for optimizer in GRID:
        counted = [row for row in rows if row["stage"] == "final" and row["optimizer"] == optimizer]
        assert {(row["lr"], row["head_lr"], row["momentum"]) for row in counted} == {tuned(optimizer, rows)}
        lengths = sorted({row["epochs"] for row in counted})
        assert lengths == list(LENGTHS[:len(lengths)]) and len(counted) == SEEDS * len(lengths)
        assert lengths[-2] < HALF[optimizer] * math.exp(airbench.CLEARLY / 0.02) * 1.01 < lengths[-1] * 1.01


@pytest.mark.parametrize("points, expected", [
    ([(0.5, 0.88), (1.0, 0.92)], 0.5**0.5), ([(0.5, 0.89), (1.0, 0.9)], 1.0),
    ([(0.5, 0.91), (1.0, 0.92)], 0.5),
    ([(0.5, 0.8), (1.0, 0.89)], math.inf), ([(0.5, 0.8), (1.0, 0.91), (2.0, 0.89)], 0.5 * 2**(10 / 11))])
def test_the_target_is_passed_between_two_lengths_and_never_beyond(points, expected):
    assert epochs_to(points) == pytest.approx(expected, rel=1e-12)


def test_a_ratio_is_that_of_the_law_and_its_interval_holds_it(rows):
    ratio = compared("muon", "sgd", rows)
    assert ratio.value == pytest.approx(HALF["muon"] / HALF["sgd"], rel=0.01)
    assert ratio.low <= ratio.value <= ratio.high and ratio.high - ratio.low < 0.02


def test_an_interval_is_as_wide_as_luck_makes_it(rows):
    """Seeds that are lucky under Muon alone: the log of the ratio has a known spread."""
    spread = 0.004
    noise = np.random.default_rng(1).normal(0, spread, SEEDS)
    noisy = [row | dict(accuracy=row["accuracy"] + (noise[row["seed"]] if row["optimizer"] == "muon" else 0))
             if row["stage"] == "final" else row for row in rows]
    ratio = compared("muon", "sgd", noisy)
    expected = 2 * 1.96 * noise.std() / math.sqrt(SEEDS) / 0.02 * ratio.value
    assert ratio.high - ratio.low == pytest.approx(expected, rel=0.15)


def test_a_target_that_is_not_reached_is_said_and_compared_with_nothing():
    text = airbench.summary(all_rows(lambda row: min(accuracy(row), 0.89) if row["optimizer"] == "sgd" else
                                     accuracy(row)))
    assert "SGD does not reach 90% in" in text and "over SGD's" not in text and "over AdamW's" in text


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    images = made_up(tmp_path / "images", train=400)
    accuracies = iter((1, 2, 3, None, 4, None))  # None: Ctrl-C

    def run_or_stop(cfg, images, seed) -> dict:
        assert len(images.train.images) == 300
        if not (accuracy := next(accuracies)):
            raise KeyboardInterrupt
        return dict(accuracy=accuracy, seconds=0.0)

    for name, value in dict(load_images=lambda source: images, HELD_OUT=100, run_once=run_or_stop).items():
        monkeypatch.setattr(airbench, name, value)
    monkeypatch.setattr(airbench.torch, "set_num_threads", lambda n: None)
    path = tmp_path / "new/out.jsonl"
    for expected in ([1, 2, 3], [1, 2, 3, 4]):
        with pytest.raises(KeyboardInterrupt):
            airbench.MEASUREMENT.main(["run", str(path)])
        assert [row["accuracy"] for row in read_results(path)] == expected


@pytest.mark.parametrize("change, message", [
    (lambda text: text.replace('"target": 0.9', '"target": 0.91'), "runs of this plan.*values of target"),
    (lambda text: text.partition("\n")[2], "expected a plan in the first line"),
    (lambda text: "", "expected a plan")])
def test_a_file_of_another_plan_or_none_is_refused(written, change, message):
    written.write_text(change(written.read_text()))
    with pytest.raises(UsageError, match=f"{message}.*; name a"):
        read_results(written)


def test_tables_hold_the_optimizers_that_are_complete(rows, written):
    whole = airbench.tables(rows)
    assert "Muon reaches 90% after 0.60 epochs." in whole and f"n = {SEEDS}." in whole
    assert "Muon's epochs over SGD's: 0.67 (95 %: 0.6" in whole
    first = next(k for k, row in enumerate(rows) if row["optimizer"] == "adamw")
    lines = written.read_text().splitlines()
    written.write_text("\n".join(lines[:first + 20]) + "\n")
    out = airbench.tables(read_results(written))
    assert "AdamW's runs are not complete." in out and "Muon's epochs over SGD's: 0.67" in out
    assert "over AdamW's" not in out and "| epochs | Muon | SGD |\n" in out

    written.write_text("\n".join(lines[:12]) + "\n")
    with pytest.raises(UsageError, match="expected all runs of an optimizer or more, found 11 runs"):
        airbench.tables(read_results(written))


def test_the_example_has_the_rates_that_the_committed_runs_found():
    rows = read_results(COMMITTED)
    assert finished(rows) == [*GRID]
    for optimizer in GRID:
        assert tuned(optimizer, rows)._asdict() == pytest.approx(RATES[optimizer], rel=0.01)
