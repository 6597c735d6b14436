"""bench.tune: both optimizers are searched alike, trials halve and go on, the arithmetic of its page, and its
trainings."""
import dataclasses
import json
import math
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from bench import trials
from bench.tune import __main__ as tune
from bench.tune import analysis, results, training
from bench.tune.search import OPTIMIZERS, QUANTITIES, read_search, value_at
from data.errors import RunError, run_program
from muon import ADJUST_LR
from tests.helpers.runs import TINY, make_shards
from train_gpt import Run, optimizer_table

@pytest.fixture
def small(monkeypatch, in_this_process):
    """The committed search with few trials, whose losses are made up."""
    few = dataclasses.replace(read_search(), trials=8, rungs=(10, 20, 40), longer={"adamw": 80})
    monkeypatch.setattr(results, "read_search", lambda: few)
    monkeypatch.setattr(trials, "train", made_up)


def made_up(job):
    """A loss that falls with the steps; trials 3 and 6 diverge, and 0 is the best."""
    steps = trials.config(job.settings, job.seed).train_steps
    trial = job.labels.get("trial", 0)
    loss = math.nan if trial in (3, 6) else 1.5 + 0.01 * trial + 10 / steps
    return dict(job.labels, settings=job.settings, seed=job.seed, steps=steps, loss=loss, seconds=1.0)


# ------------------------------------------------------------------------------------------------------------
# The search


def test_both_optimizers_get_the_same_points_and_as_wide_ranges():
    search = read_search()
    assert (search.trials, search.rungs, search.longer) == (32, (55, 110, 220, 440), {"adamw": 880})
    assert {*search.ranges} == {*OPTIMIZERS}
    for trial in range(search.trials):
        muon, adamw = (search.point(optimizer, trial) for optimizer in OPTIMIZERS)
        assert [*muon] == [*adamw] == [*QUANTITIES]
        for name in QUANTITIES:
            rules = [search.ranges[optimizer][name] for optimizer in OPTIMIZERS]
            if "one_of" in rules[0]:
                assert rules[0] == rules[1] and muon[name] == adamw[name]
                continue
            decades = [math.log10(rule["log"][1] / rule["log"][0]) for rule in rules]
            assert decades[0] == pytest.approx(decades[1], abs=0.01) and decades[0] > 0
            assert rules[0].get("zero") == rules[1].get("zero")
            if not muon[name]:
                assert adamw[name] == 0
            else:
                parts = [math.log(x / rule["log"][0]) / math.log(rule["log"][1] / rule["log"][0])
                         for x, rule in zip((muon[name], adamw[name]), rules)]
                assert parts[0] == pytest.approx(parts[1], abs=0.01)  # three digits


def test_the_trainer_takes_every_trial_and_its_steps_keep_their_part_of_the_schedule():
    search = read_search()
    for optimizer in OPTIMIZERS:
        found = {trials.config(search.settings(optimizer, trial, 440), 0) for trial in range(search.trials)}
        assert len(found) == search.trials and {cfg.optimizer for cfg in found} == {optimizer}
    warmed = next(trial for trial in range(32) if search.point("muon", trial)["warmup"] == 0.2)
    track, short = (trials.config(search.settings("muon", warmed, steps), 0) for steps in (440, 55))
    assert (track.extension_steps, track.momentum_warmup, track.momentum_cooldown) == (10, 50, 20)
    assert (short.extension_steps, short.momentum_warmup) == (1, 6)
    assert round(short.warmup_steps / 55, 2) == round(track.warmup_steps / 440, 2) == 0.2
    assert short.muon_lr == track.muon_lr


def test_the_settings_reach_the_optimizers():
    search = read_search()
    point = search.point("adamw", 1)
    table = optimizer_table(trials.config(search.settings("adamw", 1, 440), 0))
    assert table["attn_qk"].lr == point["matrix_rate"] and table["attn_qk"].wd == point["matrix_decay"]
    assert table["mlp_out"].lr == point["matrix_rate"] * point["out_factor"]
    betas = 1 - point["forgets_gradient"], 1 - point["forgets_square"]
    assert table["mlp_in"].betas == pytest.approx(betas, abs=0.001)
    point = search.point("muon", 1)
    table = optimizer_table(trials.config(search.settings("muon", 1, 440), 0))
    assert table["mlp_out"].lr == pytest.approx(point["matrix_rate"] * point["out_factor"])


def test_values_are_uniform_in_the_logarithm_with_a_share_of_zeros():
    rule = {"log": [0.01, 1], "zero": 0.2}
    assert value_at(rule, 0.1) == 0 and value_at(rule, 0.2) == 0.01
    assert value_at(rule, 0.6) == pytest.approx(0.1) and value_at(rule, 0.9999) == pytest.approx(1, abs=0.01)
    assert [value_at({"one_of": [1, 2, 4]}, u) for u in (0, 0.34, 0.99)] == [1, 2, 4]


# ------------------------------------------------------------------------------------------------------------
# Halving and going on


def test_trials_halve_diverged_ones_stay_behind_and_a_search_goes_on(tmp_path, small, capsys):
    out = tmp_path / "out"
    command = ["run", str(out)]
    assert run_program(tune.MEASUREMENT.main, ["final", str(out)]) == 2
    assert "expected whole results of muon at 40 steps, found 0" in capsys.readouterr().err
    tune.MEASUREMENT.main(command)
    found = results.read(out)
    assert [len(found.losses("adamw", steps)) for steps in (10, 20, 40, 80)] == [8, 4, 2, 2]
    assert [*found.losses("muon", 20)] == [0, 1, 2, 4] and found.losses("muon", 80) == {}
    assert (found.winner("muon", 40), found.winner("adamw", 80)) == (0, 0)
    assert "rung 1: 16 trainings to do" in capsys.readouterr().err

    path = out / "trials.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]))  # as after an interruption
    tune.MEASUREMENT.main(command)
    again = [json.loads(line) for line in path.read_text().splitlines()]
    key = [(row["optimizer"], row["trial"], row["steps"]) for row in again]
    assert len(again) == len(lines) and len(set(key)) == len(key)

    path.write_text(path.read_text().replace(read_search().sha256, "of another file"))
    assert run_program(tune.MEASUREMENT.main, command) == 2
    assert "put that one back" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Arithmetic


def test_the_expected_best_is_the_mean_over_all_draws():
    losses = [3.0, 1.0, 2.5, 7.0, 1.5]
    for k in range(1, 6):
        exact = np.mean([*map(min, combinations(losses, k))])
        assert analysis.expected_best(losses, k) == pytest.approx(exact)


def test_the_ratio_is_read_off_a_line_in_logarithms_and_never_beyond_it():
    assert analysis.steps_ratio(1.6, (440, 880), (1.7, 1.5)) == pytest.approx(2 ** 0.5)
    assert analysis.steps_ratio(1.5, (440, 880), (1.7, 1.5)) == pytest.approx(2)
    assert analysis.steps_ratio(1.7, (440, 880), (1.7, 1.5)) == pytest.approx(1)
    assert analysis.steps_ratio(1.49, (440, 880), (1.7, 1.5)) == math.inf
    assert analysis.steps_ratio(1.71, (440, 880), (1.7, 1.5)) == 0
    assert analysis.shown_ratio(math.inf, 2) == "more than 2.00"


def test_rank_correlation_counts_what_both_rungs_have():
    before = {0: 1.0, 1: 2.0, 2: 3.0, 3: math.nan, 4: 4.0}
    assert analysis.rank_correlation(before, {0: 5.0, 1: 6.0, 2: 7.0, 3: 1.0}) == pytest.approx(1)
    assert analysis.rank_correlation(before, {0: 7.0, 1: 6.0, 2: 5.0}) == pytest.approx(-1)
    assert math.isnan(analysis.rank_correlation(before, {0: 5.0, 1: 6.0}))


def test_the_tables_of_a_whole_search(tmp_path, monkeypatch, small):
    monkeypatch.setattr(training, "FINAL_SEEDS", 3)
    monkeypatch.setattr(training, "REUSE_SEEDS", 3)
    monkeypatch.setattr(training, "train_with_log", lambda settings, seed, steps, folder:
                        (1.5 + 10 / steps - 0.2 * ("muon" in folder.name) + 0.001 * (seed % 3), 0.1 * steps))
    monkeypatch.setattr(analysis, "compare", SimpleNamespace(examine=lambda args: SimpleNamespace(
        summary=SimpleNamespace(titles=["group"], rows=[[path] for path in args.paths]), against=[])))
    out = tmp_path / "out"
    for verb in ("run", "final", "reuse"):
        tune.MEASUREMENT.main([verb, str(out)])
        rows = len(results.read(out).rows)
        tune.MEASUREMENT.main([verb, str(out)])
        assert len(results.read(out).rows) == rows  # nothing was left to do
    text = analysis.tables(results.read(out))
    assert "| Muon | 10 | 8 of 8 | 2 | 2.5000 | 2.5300 |  |" in text
    assert "| AdamW | 80 | 2 of 2 | 0 | 1.6250 | 1.6300 | nan |" in text
    # AdamW ends at 1.75, a fifth of the way from Muon's 1.8 at 20 steps to 1.55 at 40; 1.55 is beyond 1.625.
    assert "loss at which AdamW's 40 steps end, AdamW needs 1.74 times as many" in text
    assert "loss at which Muon's 40 steps end, AdamW needs more than 2.00 times as many" in text
    assert "| 0.5 | 3 | 1.7500 1.7500 1.7500 | 1.7500 |" in text
    assert "| learning rate of the hidden matrices | 0.005 to 0.32 | 0.0002 to 0.0128 |" in text


def test_winners_of_half_and_twice_the_length_lie_around_the_other_optimizer(tmp_path, small):
    out = tmp_path / "out"
    tune.MEASUREMENT.main(["run", str(out)])
    found = results.read(out)
    assert [*found.winners()] == ["muon_40", "adamw_40", "muon_20", "adamw_80"]
    for group, losses in {"muon_40": (1.60, 1.62), "muon_20": (1.80, 1.82), "adamw_40": (1.70, 1.72)}.items():
        for seed, loss in enumerate(losses):
            found.rows.append(dict(kind="final", group=group, seed=seed, steps=40, loss=loss, seconds=4.0))
    ratio, low, high, *lengths = analysis.ratio_interval(found, "adamw", "muon")
    assert (ratio, lengths) == (pytest.approx(2**0.5), [20, 40]) and low < ratio < high
    assert analysis.ratio_interval(found, "muon", "adamw") is None  # no seeds at 80 steps
    assert "AdamW needs 1.41 times as many" in analysis.ratio_text(found)
    found.rows = [row for row in found.rows if row["steps"] != 80]  # the longest are not there yet
    assert [*found.winners()] == ["muon_40", "adamw_40", "muon_20"]


# ------------------------------------------------------------------------------------------------------------
# Trainings


def small_model(settings):
    """The settings of a trial for the tiny model of the tests."""
    return [*TINY[1:], *settings]


def test_a_trial_trains_and_one_that_diverges_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(make_shards(tmp_path)))
    settings = small_model(read_search().settings("adamw", 0, 10))
    row = trials.train(trials.Job(dict(kind="search", trial=0), settings, 0))
    assert row["trial"] == 0 and row["steps"] == 10 and 2 < row["loss"] < 6

    def diverge(self):
        raise RunError("expected a finite training loss, found nan")
    monkeypatch.setattr(Run, "train_step", diverge)
    assert math.isnan(trials.train(trials.Job(dict(trial=0), settings, 0))["loss"])


def test_muon_gets_the_rate_of_adamw_and_updates_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(make_shards(tmp_path)))
    winner = small_model(read_search().settings("adamw", 2, 10))
    job = training.reuse_job(winner, 2.0, 1000, "")
    cfg = trials.config(job.settings, 0)
    before = trials.config(winner, 0)
    assert cfg.optimizer == "muon" and cfg.adamw_lr == pytest.approx(2 * before.adamw_lr, rel=1e-3)
    moved = []

    def watch(run):
        training.match_rms(run)
        groups = {name: group for group in run.muon.param_groups for name, p in run.model.named_parameters()
                  if p is group["params"][0]}
        assert {group["adjust_lr_fn"] for group in groups.values()} == {"match_rms_adamw"} <= {*ADJUST_LR}
        run.set_rates(5)
        moved.append({name: (group["lr"], group["weight_decay"]) for name, group in groups.items()})
        run.cfg = before  # the schedule of AdamW
        factor = groups["attn_qk"]["lr"] / cfg.adamw_lr
        assert groups["mlp_out"]["lr"] == pytest.approx(cfg.adamw_lr * cfg.adamw_out_lr_mul * factor)
        assert {group["weight_decay"] for group in groups.values()} == {cfg.adamw_wd}
        run.cfg = cfg

    assert math.isfinite(trials.train(job._replace(prepare=watch))["loss"]) and len(moved) == 1


def test_a_fresh_seed_leaves_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(make_shards(tmp_path)))
    loss, seconds = training.train_with_log(TINY[1:], 1000, 12, tmp_path / "muon_12")
    log, = (tmp_path / "muon_12").glob("*.txt")
    text = log.read_text()
    assert f"step:12/12 val_loss:{loss:.4f}" in text and seconds > 0
    assert '"log_dir": "logs"' in text
    with pytest.raises(RunError, match="to train to its end, but it ended with exit code 2"):
        training.train_with_log(["--train_steps=0"], 1000, 12, tmp_path / "muon_0")
