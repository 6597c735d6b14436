"""The statistics of a claim: loss rules, comparisons of times, intervals, and the power to see a difference. All from scipy.

Every result says so where it cannot be judged: its numbers are then None, `why` tells the reason, and it never passes.
Nothing is left out or replaced to make a number possible; a run that ended in nan is part of the set it was in.
Probabilities are one-sided, since a claim has a direction: below the target, faster than the baseline.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # scipy.stats, 0.5 s, is imported by its first use


def unfit(values: Sequence[float], at_least: int, what: str = "value") -> str:
    """Why these values cannot be judged, or "" if they can."""
    bad = [value for value in values if not math.isfinite(value)]
    if bad:
        return f"{len(bad)} of {len(values)} {what}s {'is' if len(bad) == 1 else 'are'} {bad[0]}"
    if len(values) < at_least:
        return f"needs at least {at_least} {what}s, found {len(values)}"
    return ""


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values for one. Not finite if a value is not."""
    if not len(values):
        return None, None
    with np.errstate(invalid="ignore"):
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def constant(*groups: Sequence[float]) -> bool:
    """No spread in any group. Asked of the values themselves: a computed variance would be rounding noise."""
    return all(min(group) == max(group) for group in groups)


@dataclass(frozen=True)
class TTest:
    """One-sample t-test that the mean is below the target."""
    n: int
    mean: float | None
    sd: float | None
    target: float
    alpha: float
    t: float | None
    p: float | None
    why: str = ""

    @property
    def passes(self) -> bool:
        return self.p is not None and self.p < self.alpha


def t_test(losses: Sequence[float], target: float, alpha: float = 0.01) -> TTest:
    why = unfit(losses, 2, "loss") or ("all losses are equal, so their spread is unknown" if constant(losses) else "")
    mean, sd = mean_sd(losses)
    if why:
        return TTest(len(losses), mean, sd, target, alpha, None, None, why)
    result = scipy.stats.ttest_1samp(losses, target, alternative="less")
    return TTest(len(losses), mean, sd, target, alpha, float(result.statistic), float(result.pvalue))


@dataclass(frozen=True)
class ZRule:
    """(target - mean) sqrt(n) against what is needed. p: of a z-test with the assumed sigma."""
    n: int
    mean: float | None
    sd: float | None
    target: float
    sigma: float
    needed: float
    score: float | None
    p: float | None
    why: str = ""

    @property
    def passes(self) -> bool:
        return self.score is not None and reaches(self.score, self.needed)


def reaches(score: float, needed: float) -> bool:
    """score >= needed for decimal figures: 3.28 - 3.276 is a hair off 0.004 in binary."""
    return score >= needed - 1e-9


def z_rule(losses: Sequence[float], target: float, sigma: float = 0.0013, needed: float = 0.004) -> ZRule:
    why = unfit(losses, 1, "loss")
    mean, sd = mean_sd(losses)
    if why:
        return ZRule(len(losses), mean, sd, target, sigma, needed, None, None, why)
    score = (target - mean) * len(losses) ** 0.5
    return ZRule(len(losses), mean, sd, target, sigma, needed, score, float(scipy.stats.norm.sf(score / sigma)))


LOSS_RULES = {"t_test": t_test, "z_rule": z_rule}


def loss_rule(track, losses: Sequence[float]) -> TTest | ZRule:
    """The loss rule of a records.tracks.Track on the losses of all runs at the claimed step."""
    return LOSS_RULES[track.rule](losses, track.target, **track.rule_options)


@dataclass(frozen=True)
class PairwiseRule:
    """Candidate against predecessor: (loss gained + loss that the saved steps are worth) / sqrt(1/n + 1/n_baseline)."""
    n: int
    n_baseline: int
    loss_gain: float | None
    steps_saved: float
    score: float | None
    needed: float
    why: str = ""

    @property
    def passes(self) -> bool:
        return self.score is not None and reaches(self.score, self.needed)


def pairwise_rule(losses: Sequence[float], baseline: Sequence[float], steps_saved: float = 0,
                  loss_per_step: float = 0.0045 / 100, needed: float = 0.004) -> PairwiseRule:
    n, n_baseline = len(losses), len(baseline)
    if why := unfit(losses, 1, "loss") or unfit(baseline, 1, "baseline loss"):
        return PairwiseRule(n, n_baseline, None, steps_saved, None, needed, why)
    gain = float(np.mean(baseline) - np.mean(losses))
    score = (gain + steps_saved * loss_per_step) / (1 / n + 1 / n_baseline) ** 0.5
    return PairwiseRule(n, n_baseline, gain, steps_saved, score, needed)


@dataclass(frozen=True)
class Interval:
    estimate: float | None
    low: float | None
    high: float | None
    confidence: float
    why: str = ""


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean with a two-sided t interval."""
    why = unfit(values, 2) or ("all values are equal, so their spread is unknown" if constant(values) else "")
    if why:
        return Interval(mean_sd(values)[0], None, None, confidence, why)
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval(confidence)
    return Interval(float(np.mean(values)), float(interval.low), float(interval.high), confidence)


@dataclass(frozen=True)
class Welch:
    """Welch's test that the mean of a is below that of b; variances may differ. difference: a minus b."""
    n_a: int
    n_b: int
    difference: Interval
    t: float | None
    df: float | None
    p: float | None
    why: str = ""


def welch(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Welch:
    why = unfit(a, 2) or unfit(b, 2) or ("no spread within either group" if constant(a, b) else "")
    if why:
        (mean_a, _), (mean_b, _) = mean_sd(a), mean_sd(b)
        difference = None if mean_a is None or mean_b is None else mean_a - mean_b
        return Welch(len(a), len(b), Interval(difference, None, None, confidence, why), None, None, None, why)
    two_sided = scipy.stats.ttest_ind(a, b, equal_var=False)
    low, high = two_sided.confidence_interval(confidence)
    p = scipy.stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue
    difference = Interval(float(np.mean(a) - np.mean(b)), float(low), float(high), confidence)
    return Welch(len(a), len(b), difference, float(two_sided.statistic), float(two_sided.df), float(p))


def ratio_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """mean(a) / mean(b) of independent groups of positive values: a speed-up, if a are the times of the baseline.

    Delta method on the logarithm, where both relative errors add, with Welch and Satterthwaite's degrees of freedom. Spreads
    may differ; the interval is positive, and that of b / a is its reciprocal. Fieller's differs by less than the spread of
    the spread itself at the relative errors of times (a few percent), and is unbounded or not an interval beyond them."""
    why = unfit(a, 2) or unfit(b, 2) or ("no spread within either group" if constant(a, b) else "")
    if not why and min(*a, *b) <= 0:
        why = "needs positive values"
    if why:
        (mean_a, _), (mean_b, _) = mean_sd(a), mean_sd(b)
        return Interval(mean_a / mean_b if mean_a is not None and mean_b else None, None, None, confidence, why)
    squared = [np.var(group, ddof=1) / len(group) / np.mean(group) ** 2 for group in (a, b)]
    df = sum(squared) ** 2 / sum(part ** 2 / (len(group) - 1) for part, group in zip(squared, (a, b)))
    factor = math.exp(scipy.stats.t.ppf((1 + confidence) / 2, df) * sum(squared) ** 0.5)
    ratio = float(np.mean(a) / np.mean(b))
    return Interval(ratio, ratio / factor, ratio * factor, confidence)
