"""records.plan against published figures, against scipy's normal approximation, and against simulated
runs."""
import json
import math
from types import SimpleNamespace

import pytest
from scipy.stats import norm

from records import plan
from records.errors import RecordError
from records.tracks import TRACKS


@pytest.mark.parametrize("margin, runs", [(0.0005, 71), (0.001, 20), (0.0015, 11), (0.002, 8), (0.003, 5)])
def test_runs_for_a_margin_are_the_published_ones(margin, runs):
    """Exact noncentral t; the normal approximation would say 68, 17, 8, 5, 2, for it takes the spread
    as known."""
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


def arguments(**changes):
    return SimpleNamespace(**{**dict(margin=0.001, sd=None, gap=None, time_sd=None, power=0.8, alpha=None,
                                     track="small",
                                     json=False), **changes})


def test_what_is_printed(capsys):
    assert plan.run(arguments(gap=0.3, time_sd=0.07)) == 0
    text = capsys.readouterr().out
    for part in ("after 20, the runs pass", "Time: 3 runs"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 130
    assert plan.run(arguments(margin=None, gap=0.3, time_sd=0.2, power=0.9, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": None, "time": pytest.approx(
        dict(gap=0.3, sd=0.2, alpha=0.01, runs_per_arm=14, power=0.9), abs=0.03)}


def test_track_decides_test_spread_and_alpha(capsys):
    plan.run(arguments(track="optimization", margin=0.002, json=True))
    loss = json.loads(capsys.readouterr().out)["loss"]
    # (margin sqrt(n) - 0.004) / sd is standard normal
    by_hand = ((0.004 + norm.ppf(0.8) * 0.0013) / 0.002) ** 2
    assert loss["runs"] == math.ceil(by_hand) and loss["sd"] == TRACKS["optimization"].loss_sd
    plan.run(arguments(track="shakespeare", margin=0.02, json=True))
    assert json.loads(capsys.readouterr().out)["loss"]["sd"] == TRACKS["shakespeare"].loss_sd


def test_one_run_can_be_enough(capsys):
    plan.run(arguments(track="optimization", margin=0.01))
    assert "after 1, the runs" in capsys.readouterr().out


@pytest.mark.parametrize("changes, message", [
    (dict(margin=None), "--margin or --gap"), (dict(margin=0.0), "--margin"),
    (dict(margin=math.nan), "--margin"),
    (dict(margin=-0.001), "--margin"), (dict(margin=1e-9), "larger"),
    (dict(margin=3.28), "standard deviations"),
    (dict(gap=0.3), "--time-sd"), (dict(time_sd=0.3), "--gap"), (dict(gap=0.3, time_sd=0.0), "--time-sd"),
    (dict(gap=1e-9, time_sd=1.0), "larger"), (dict(power=1.0), "--power"), (dict(power=math.nan), "--power"),
    (dict(alpha=0.0), "--alpha"), (dict(alpha=1e-30), "--alpha"), (dict(sd=math.inf), "--sd"),
    (dict(track="huge"), "--track")])
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(RecordError, match="expected .*, found .*; ") as error:
        plan.run(arguments(**changes))
    assert message in str(error.value)
