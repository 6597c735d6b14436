"""`records plan` against published figures, against scipy's normal approximation, and by hand."""
import math
import re

import numpy as np
import pytest
from scipy.stats import norm, ttest_ind

from records.statistics import power


@pytest.fixture
def runs(records):
    """The number of runs that plan prints."""
    def runs(*arguments) -> int:
        code, out, err = records("plan", *arguments)
        assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 130
        return int(re.search(r"after (\d+), the runs pass|Time: (\d+) runs", out).expand(r"\1\2"))
    return runs


@pytest.mark.parametrize("margin, expected", [
    (0.0005, 71), (0.001, 20), (0.0015, 11), (0.002, 8), (0.003, 5)])
def test_runs_for_a_margin_are_the_published_ones(runs, margin, expected):
    """Exact noncentral t; the normal approximation would say 68, 17, 8, 5, 2, for it takes the spread
    as known."""
    assert runs("--margin", margin) == expected
    approximation = ((norm.ppf(0.99) + norm.ppf(0.8)) * 0.0013 / margin) ** 2
    assert 2 <= expected - approximation < 4
    assert power(expected, margin, 0.0013, 0.01) >= 0.8 > power(expected - 1, margin, 0.0013, 0.01)


@pytest.mark.parametrize("gap, sd", [(0.3, 0.07), (0.3, 0.2), (0.1, 0.07)])
def test_runs_for_a_time_gap_are_as_few_as_have_the_power(runs, gap, sd):
    """The power of the two-sample t-test is simulated, as scipy has no function for it."""
    n = runs("--gap", gap, "--time-sd", sd)
    rng = np.random.default_rng(0)
    shown = []
    for number in (n - 1, n):
        before, after = rng.normal(gap, sd, (20_000, number)), rng.normal(0, sd, (20_000, number))
        shown.append(np.mean(ttest_ind(after, before, axis=1, alternative="less").pvalue < 0.01))
    assert shown[0] < 0.81 and shown[1] > 0.79  # 20,000 draws tell 0.01 apart


def test_the_track_decides_test_and_spread(runs, records):
    # (margin sqrt(n) - 0.004) / sd is standard normal
    by_hand = ((0.004 + norm.ppf(0.8) * 0.0013) / 0.002) ** 2
    assert runs("--track", "optimization", "--margin", 0.002) == math.ceil(by_hand)
    assert runs("--track", "optimization", "--margin", 0.01) == 1
    assert "(3.28 - mean) sqrt(n) >= 0.004" in records("plan", "--track", "optimization", "--margin", 0.01)[1]
    assert runs("--track", "shakespeare", "--margin", 0.003) == runs("--margin", 0.0013) == runs(
        "--margin", 0.01, "--sd", 0.01)


@pytest.mark.parametrize("arguments, message", [
    ([], "--margin or --gap"), (["--margin=0"], "--margin"), (["--margin=nan"], "--margin"),
    (["--margin=-0.001"], "--margin"), (["--margin=1e-9"], "larger"),
    (["--margin=3.28"], "standard deviations"), (["--gap=0.3"], "--time-sd"),
    (["--time-sd=0.3", "--margin=0.001"], "--gap"),
    (["--gap=0.3", "--time-sd=0"], "--time-sd"), (["--gap=1e-9", "--time-sd=1"], "larger"),
    (["--margin=0.001", "--sd=inf"], "--sd")])
def test_impossible_plans_are_refused(records, arguments, message):
    code, out, err = records("plan", *arguments)
    assert (code, out) == (2, "") and re.search("expected .*, found .*; ", err) and message in err
