"""records.statistics against formulas written out here from other pieces (the standard library, incomplete
beta functions), and against p-values computed from the public logs by others."""
import csv
import math
import random
import statistics as stdlib
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy.special import betainc, ndtr
from scipy.stats import gmean
from scipy.stats import t as t_distribution

from records import statistics
from records.tracks import TRACKS, only

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
    result = statistics.z_rule(losses, 3.28, sigma=0.0013, needed=0.004)
    score = (3.28 - stdlib.mean(losses)) * len(losses) ** 0.5
    assert result.passes is passes and f"= {score:.5f}, needed >= 0.004" in str(result)
    assert result.p == pytest.approx(1 - ndtr(score / 0.0013))


@pytest.mark.parametrize("seed", range(5))
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
    found, gaps = statistics.paired(a, b), [x - y for x, y in zip(a, b)]
    mean, error = stdlib.mean(gaps), stdlib.stdev(gaps) / math.sqrt(n)
    half, t = t_distribution.ppf(0.975, n - 1) * error, mean / error
    assert (found.value, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-9)
    assert found.p == pytest.approx(t_cdf(t, n - 1), rel=1e-6, abs=1e-12)
    floor = statistics.detectable(n, stdlib.stdev(gaps))
    assert statistics.power(n, floor, stdlib.stdev(gaps), 0.01) == pytest.approx(0.8)


def test_a_ratio_is_that_of_geometric_means_and_turns_with_its_groups():
    a, b = [10, 11, 12.5], [4, 5]
    one, other = statistics.ratio(statistics.welch, a, b), statistics.ratio(statistics.welch, b, a)
    assert one.value == pytest.approx(gmean(a) / gmean(b))
    assert (other.value, other.low, other.high) == pytest.approx((1 / one.value, 1 / one.high, 1 / one.low))
    pairs = statistics.ratio(statistics.paired, a, [value / 2 for value in a[:2]] + [6])
    assert pairs.value == pytest.approx((2 * 2 * 12.5 / 6) ** (1 / 3))


# What cannot be judged


@pytest.mark.parametrize("values, why", [
    ([], "found 0"), ([3.2], "found 1"), ([3.2, 3.2, 3.2], "equal"), ([3.2, math.nan], "1 of 2"),
    ([math.inf, 3.2, 3.1], "inf"),
    ([3.2, -math.inf], "inf"), ([3.2, 1e200], "1e+200"), ([0.1 + 0.2, 0.3], "equal"),
    ([0.0, 5e-324], "equal")])
def test_no_number_where_there_is_none(values, why):
    good = [3.1, 3.2, 3.4]
    results = [statistics.mean_interval(values), statistics.welch(values, good),
               statistics.welch(good, values), statistics.paired(values, [0.0] * len(values))]
    for result in results:
        assert why in result.why and result.low is result.high is result.p is None, result
    assert statistics.ratio(statistics.welch, values, good).low is None
    rule = statistics.t_test(values, 3.28, 0.01)
    assert not rule.passes and rule.p is None and why in str(rule)


ODD = 0.0, -0.0, 3.28, 1e15, -1e15, 1e99, -1e300, 5e-324, math.nan, math.inf, -math.inf


@pytest.mark.parametrize("seed", range(40))
def test_whatever_goes_in_no_wrong_number_comes_out(seed):
    rng = random.Random(seed)
    a, b = ([rng.choice([*ODD, rng.uniform(3.27, 3.29), 10 ** rng.uniform(-300, 300)])
             for _ in range(rng.randint(0, 6))] for _ in range(2))
    n = min(len(a), len(b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules = [statistics.t_test(a, 3.28, 0.01), statistics.z_rule(a, 3.28, 0.0013, 0.004)]
        results = [statistics.welch(a, b), statistics.mean_interval(a), statistics.paired(a[:n], b[:n]),
                   statistics.ratio(statistics.welch, a, b)]
    for result in results:
        limits = [limit for limit in (result.low, result.high) if limit is not None]
        assert all(map(math.isfinite, limits)) and len(limits) == (0 if result.why else 2), result
    for result in [*rules, *results]:
        assert result.p is None or 0 <= result.p <= 1, result


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
        values = losses[row["track"], row["number"]]
        mean, sd = statistics.mean_sd(values)
        p = statistics.t_test(values, 3.28, 0.01).p
        found = (str(len(values)), f"{mean:.5f}", f"{sd:.5f}", f"{p:.2g}")
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
    assert only([log("logs/x.txt", "shakespeare")]).name == "shakespeare"
    assert only([log("records/track_3_optimization/results/x.txt", None)]).name == "optimization"
    for logs in ([], [log("x.txt", None)], [log("x.txt", "small"), log("y.txt", "shakespeare")]):
        assert only(logs) is None
