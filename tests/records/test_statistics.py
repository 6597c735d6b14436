"""records.statistics against formulas written out here from other pieces (the standard library, incomplete
beta functions), and against p-values computed from the public logs by others."""
import csv
import dataclasses
import math
import random
import statistics as stdlib
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import betainc, ndtr
from scipy.stats import t as t_distribution

from data.errors import UsageError
from records import statistics
from records.tracks import TRACKS, choose

HERE = Path(__file__).parent
HISTORY = HERE.parents[1] / "records" / "history" / "finals.csv"


def random_losses(rng: random.Random) -> list[float]:
    """Two to forty losses as logs print them."""
    return [rng.randint(32_000, 33_500) / 1e4 for _ in range(rng.randint(2, 40))]


def t_cdf(t: float, df: float) -> float:
    """P(T < t) by the incomplete beta function."""
    tail = betainc(df / 2, 0.5, df / (df + t * t)) / 2
    return tail if t < 0 else 1 - tail


@pytest.mark.parametrize("losses, passes", [
    ([3.276], True), ([3.27601], False), ([3.278] * 4, True), ([3.27801] * 4, False),
    ([3.277, 3.279] * 2, True)])
def test_z_rule_is_the_published_condition(losses, passes):
    result = statistics.z_rule(losses, 3.28)
    score = (3.28 - stdlib.mean(losses)) * len(losses) ** 0.5
    assert result.passes is passes and result.score == pytest.approx(score)
    assert result.p == pytest.approx(1 - ndtr(score / 0.0013))


@pytest.mark.parametrize("losses, baseline, steps, passes", [
    ([3.276], [3.276 + 0.004 * 2 ** 0.5], 0, True), ([3.276], [3.2816], 0, False),
    ([3.28] * 4, [3.28] * 4, 62, False), ([3.28] * 4, [3.28] * 4, 63, True),  # 0.004 / sqrt 2 = 62.85 steps
    ([3.281] * 8, [3.28] * 8, 66, False), ([3.281] * 8, [3.28] * 8, 67, True),
    ([3.28] * 9, [3.28], -10, False)])
def test_pairwise_rule(losses, baseline, steps, passes):
    assert statistics.pairwise_rule(losses, baseline, steps).passes is passes


@pytest.mark.parametrize("seed", range(20))
def test_welch_is_the_textbook_formula(seed):
    rng = random.Random(seed)
    a, b = random_losses(rng), random_losses(rng)
    result = statistics.welch(a, b)
    u, v = stdlib.variance(a) / len(a), stdlib.variance(b) / len(b)
    gap, df = stdlib.mean(a) - stdlib.mean(b), (u + v) ** 2 / (u ** 2 / (len(a) - 1) + v ** 2 / (len(b) - 1))
    half = t_distribution.ppf(0.975, df) * math.sqrt(u + v)
    assert result.p == pytest.approx(t_cdf(gap / math.sqrt(u + v), df), rel=1e-5, abs=1e-12)
    assert [result.low, result.high] == pytest.approx([gap - half, gap + half], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 7, 30])
def test_paired_is_the_t_test_of_the_differences(n):
    rng = random.Random(n)
    a, b = ([rng.randint(70_000, 90_000) for _ in range(n)] for _ in range(2))
    result, gaps = statistics.paired(a, b), [x - y for x, y in zip(a, b)]
    mean, error = stdlib.mean(gaps), stdlib.stdev(gaps) / math.sqrt(n)
    half, t = t_distribution.ppf(0.975, n - 1) * error, mean / error
    found = result.difference
    assert (found.value, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-9)
    assert found.p == pytest.approx(t_cdf(t, n - 1), rel=1e-6, abs=1e-12)
    assert found.p + result.p_above == pytest.approx(1)
    assert statistics.power(n, result.floor, result.sd, 0.01) == pytest.approx(0.8)


# Ratio of means


def fieller(a, b, confidence):
    """Fieller's interval of mean(a) / mean(b), with the degrees of freedom of Welch and Satterthwaite at the
    estimate: the ratios r for which mean(a) - r mean(b) is within its t interval around 0, found on a fine
    grid."""
    u, v, ratio = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b), np.mean(a) / np.mean(b)
    df = (u + ratio ** 2 * v) ** 2 / (u ** 2 / (len(a) - 1) + (ratio ** 2 * v) ** 2 / (len(b) - 1))
    r = ratio * np.linspace(0.5, 1.5, 1_000_001)
    inside = r[abs(np.mean(a) - r * np.mean(b)) <= t_distribution.ppf((1 + confidence) / 2,
                                                                      df) * np.sqrt(u + r ** 2 * v)]
    return inside[0], inside[-1]


def test_ratio_interval_agrees_with_fieller_where_spreads_are_those_of_times():
    rng = np.random.default_rng(1)
    for spread in (0.0008, 0.01, 0.06):  # a good host, a bad one, a shared virtual machine
        for n in (4, 10):
            a, b = 160 * (1 + spread * rng.standard_normal(n)), 86 * (1 + spread * rng.standard_normal(n + 2))
            ours, other = statistics.ratio_interval(a, b), fieller(a, b, 0.95)
            width = ours.high - ours.low
            assert abs(ours.low - other[0]) < 0.05 * width and abs(ours.high - other[1]) < 0.05 * width


def test_ratio_interval_of_the_swapped_groups_is_the_reciprocal():
    one, other = statistics.ratio_interval([10, 11, 12.5],
                                           [4, 5]), statistics.ratio_interval([4, 5], [10, 11, 12.5])
    assert (other.value, other.low, other.high) == pytest.approx((1 / one.value, 1 / one.high,
                                                                     1 / one.low))


# What cannot be judged


@pytest.mark.parametrize("values, why", [
    ([], "found 0"), ([3.2], "found 1"), ([3.2, 3.2, 3.2], "equal"), ([3.2, math.nan], "1 of 2"),
    ([math.inf, 3.2, 3.1], "inf"),
    ([3.2, -math.inf], "inf"), ([3.2, 1e200], "1e+200"), ([0.1 + 0.2, 0.3], "equal"),
    ([0.0, 5e-324], "equal")])
def test_no_number_where_there_is_none(values, why):
    good = [3.1, 3.2, 3.4]
    results = [statistics.t_test(values, 3.28), statistics.mean_interval(values),
               statistics.welch(values, good),
               statistics.welch(good, values), statistics.ratio_interval(values, good),
               statistics.ratio_interval(good, values),
               statistics.paired(values, [0.0] * len(values)).difference]
    for result in results:
        assert why in result.why, result
        facts = dataclasses.asdict(result)
        assert all(facts.get(name) is None for name in ("score", "p", "low", "high")), result
        assert not getattr(result, "passes", False)


ODD = 0.0, -0.0, 3.28, 1e15, -1e15, 1e99, -1e300, 5e-324, math.nan, math.inf, -math.inf


@pytest.mark.parametrize("seed", range(100))
def test_whatever_goes_in_no_wrong_number_comes_out(seed):
    rng = random.Random(seed)
    a, b = ([rng.choice([*ODD, rng.uniform(3.27, 3.29), 10 ** rng.uniform(-300, 300)])
             for _ in range(rng.randint(0, 6))] for _ in range(2))
    n = min(len(a), len(b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [statistics.t_test(a, 3.28), statistics.z_rule(a, 3.28), statistics.pairwise_rule(a, b, 3),
                   statistics.welch(a, b), statistics.ratio_interval(a, b), statistics.mean_interval(a),
                   statistics.paired(a[:n], b[:n]).difference]
    for result in results:
        numbers = {name: value for name, value in vars(result).items() if isinstance(value, float)}
        assert all(map(math.isfinite, (numbers.get(name, 0)
                                       for name in ("score", "low", "high")))), result
        assert 0 <= numbers.get("p", 0) <= 1, result
        assert str(result) and (result.why or "cannot be judged" not in str(result))


# Published figures


def published():
    with open(HERE / "published_p.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses_of_records() -> dict[tuple[str, str], list[float]]:
    """Losses of the runs of each record at the step that it claims."""
    losses = defaultdict(list)
    with open(HERE / "claim_losses.csv",
              newline="") as file:  # records that claim an earlier step than the last
        for row in csv.DictReader(file):
            losses[row["track"], row["number"]].append(float(row["val_loss"]))
    early = set(losses)
    with open(HISTORY, newline="") as file:
        for row in csv.DictReader(file):
            key, total = (row["track"], row["number"]), row["total_steps"]
            incomplete = row["track"] == "small" and total and int(row["final_step"]) < int(total)
            if key not in early and not incomplete:
                losses[key].append(float(row["final_val_loss"]))
    return losses


def test_every_published_p_value_is_reproduced():
    """104 records with three or more runs: n, mean, spread and p as printed (two significant digits)."""
    losses, rows = losses_of_records(), published()
    assert len(rows) == 104
    for row in rows:
        result = statistics.t_test(losses[row["track"], row["number"]], 3.28)
        found = (str(result.n), f"{result.mean:.5f}", f"{result.sd:.5f}", f"{result.p:.2g}")
        assert found == (row["n"], row["mean"], row["sd"], f"{float(row['p']):.2g}"), (row["track"],
                                                                                       row["number"])


# Tracks


def test_rules_of_the_tracks_are_applied():
    losses = [3.2785, 3.2790, 3.2795, 3.2788, 3.2786]
    assert statistics.loss_rule(TRACKS["small"], losses) == statistics.t_test(losses, 3.28, 0.01)
    assert statistics.loss_rule(TRACKS["optimization"], losses) == statistics.z_rule(losses, 3.28, 0.0013,
                                                                                     0.004)
    assert statistics.loss_rule(TRACKS["medium"], losses) == statistics.t_test(losses, 2.92, 0.01)
    assert {track.folder for track in TRACKS.values()} == {
        "track_0_laptop", "track_1_short", "track_2_medium", "track_3_optimization"}


def log(path: str, track: str | None):
    return SimpleNamespace(path=Path(path), runs=[SimpleNamespace(config={"track": track} if track else {})])


def test_track_is_named_or_seen():
    assert choose([log("logs/x.txt", "shakespeare")]).name == "shakespeare"
    assert choose([log("records/track_3_optimization/results/x.txt", None)]).name == "optimization"
    for logs in ([], [log("x.txt", None)], [log("x.txt", "small"), log("y.txt", "shakespeare")]):
        with pytest.raises(UsageError, match="expected .*, found .*; "):
            choose(logs)
