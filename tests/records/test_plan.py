"""records.plan against published figures, against scipy's normal approximation, and against simulated runs."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm

from records import plan
from records.errors import RecordError
from records.statistics import t_test
from records.tracks import TRACKS


@pytest.mark.parametrize("margin, runs", [(0.0005, 71), (0.001, 20), (0.0015, 11), (0.002, 8), (0.003, 5)])
def test_runs_for_a_margin_are_the_published_ones(margin, runs):
    """Exact noncentral t; the normal approximation would say 68, 17, 8, 5, 2, for it takes the spread as known."""
    assert plan.runs_needed(margin, 0.0013, 0.01, 0.8) == runs
    approximation = ((norm.ppf(0.99) + norm.ppf(0.8)) * 0.0013 / margin) ** 2
    assert 2 <= runs - approximation < 4


@pytest.mark.parametrize("gap, sd, runs", [(0.3, 0.07, 4), (0.3, 0.2, 14), (0.1, 0.07, 15), (0.1, 0.2, 106)])
def test_runs_for_a_time_gap_are_the_published_ones(gap, sd, runs):
    assert plan.runs_per_arm(gap, sd, 0.01, 0.9) == runs


def test_fewest_runs_is_the_first_that_reaches_the_power():
    from records.statistics import power
    for margin in (0.0004, 0.0011, 0.0023):
        n = plan.runs_needed(margin, 0.0013, 0.01, 0.8)
        assert power(n, margin, 0.0013, 0.01) >= 0.8 > power(n - 1, margin, 0.0013, 0.01)


@pytest.mark.parametrize("margin, sigma", [(0.0005, None), (0.001, None), (0.002, None), (0.003, None), (0.001, 0.0013)])
def test_two_looks_pass_falsely_in_one_of_a_hundred_at_most(margin, sigma):
    """400,000 (or fewer, for long designs) sets of runs exactly at the target; three standard errors are 0.0005."""
    design = plan.two_looks(margin, 0.0013, 0.01, 0.8, sigma)
    assert 2 <= design.first < design.last
    sets = min(400_000, 12_000_000 // design.last)
    rate = plan.false_passes((design.first, design.last), design.alpha, sigma and 1.0, sets, seed=11)
    assert 0.008 < rate <= 0.01, rate


def test_two_looks_keep_their_power_and_mean_number_of_runs():
    """Runs judged by t_test itself, as a user would: an oracle for both the design and the simulation in the module."""
    design, rng, passed, runs = plan.two_looks(0.002, 0.0013, 0.01, 0.8), np.random.default_rng(5), 0, 0
    for losses in 3.278 + 0.0013 * rng.standard_normal((3000, design.last)):
        early = t_test(losses[:design.first], 3.28, design.alpha).passes
        passed += early or t_test(losses, 3.28, design.alpha).passes
        runs += design.first if early else design.last
    assert passed / 3000 >= design.power - 3 * (0.13 / 3000) ** 0.5
    assert runs / 3000 == pytest.approx(design.mean_runs, abs=0.1)


def test_testing_after_every_run_passes_falsely_five_times_as_often():
    """18 looks from 3 to 20: 5.5 % (published: 6.0 %)."""
    assert 0.050 < plan.false_passes(range(3, 21), 0.01, seed=1) < 0.060
    assert plan.false_passes([20], 0.01, seed=1) == pytest.approx(0.01, abs=0.001)


def test_simulation_agrees_with_tests_one_by_one():
    losses = np.random.default_rng(7).standard_normal((2000, 6))
    expected = np.mean([any(t_test(row[:n], 0, 0.05).passes for n in (3, 6)) for row in losses])
    assert plan.false_passes([6, 3], 0.05, sets=2000, seed=7) == expected


def arguments(**changes):
    return SimpleNamespace(**{**dict(margin=0.001, sd=None, gap=None, time_sd=None, power=0.8, alpha=None, track="small",
                                     json=False), **changes})


def test_what_is_printed(capsys):
    assert plan.run(arguments(gap=0.3, time_sd=0.07)) == 0
    text = capsys.readouterr().out
    for part in ("after 20, the runs pass", "after 14 and, if need be, after 24", "every run from 3 to 20", "Time: 3 runs"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 130
    assert plan.run(arguments(margin=None, gap=0.3, time_sd=0.2, power=0.9, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": None, "time": pytest.approx(
        dict(gap=0.3, sd=0.2, alpha=0.01, runs_per_arm=14, power=0.9), abs=0.03)}


def test_track_decides_test_spread_and_alpha(capsys):
    plan.run(arguments(track="optimization", margin=0.002, json=True))
    loss = json.loads(capsys.readouterr().out)["loss"]
    by_hand = ((0.004 + norm.ppf(0.8) * 0.0013) / 0.002) ** 2  # (margin sqrt(n) - 0.004) / sd is standard normal
    assert loss["runs"] == math.ceil(by_hand) and loss["sd"] == TRACKS["optimization"].loss_sd
    plan.run(arguments(track="shakespeare", margin=0.02, json=True))
    assert json.loads(capsys.readouterr().out)["loss"]["sd"] == TRACKS["shakespeare"].loss_sd


def test_one_run_can_be_enough_and_nothing_is_said_of_looks(capsys):
    plan.run(arguments(track="optimization", margin=0.01))
    text = capsys.readouterr().out
    assert "after 1, the runs" in text and "never" not in text and "two looks" not in text


@pytest.mark.parametrize("changes, message", [
    (dict(margin=None), "--margin or --gap"), (dict(margin=0.0), "--margin"), (dict(margin=math.nan), "--margin"),
    (dict(margin=-0.001), "--margin"), (dict(margin=1e-9), "larger"), (dict(margin=3.28), "standard deviations"),
    (dict(gap=0.3), "--time-sd"), (dict(time_sd=0.3), "--gap"), (dict(gap=0.3, time_sd=0.0), "--time-sd"),
    (dict(gap=1e-9, time_sd=1.0), "larger"), (dict(power=1.0), "--power"), (dict(power=math.nan), "--power"),
    (dict(alpha=0.0), "--alpha"), (dict(alpha=1e-30), "--alpha"), (dict(sd=math.inf), "--sd"), (dict(track="huge"), "--track")])
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(RecordError, match="expected .*, found .*; ") as error:
        plan.run(arguments(**changes))
    assert message in str(error.value)
