"""The statistics of a claim, by scipy: loss rules, comparisons of times, intervals, and power.

Every result says so where it cannot be judged: its numbers are then None, `why` tells the reason, and it
never passes. Nothing is left out or replaced to make a number possible; a run that ended in nan is part of
the set it was in. Probabilities are one-sided, since a claim has a direction: below the target, faster than
the baseline. Intervals are of 95 %.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # scipy.stats, 0.5 s, is imported by its first use

ALPHA = 0.01  # probability allowed to a difference of two recipes that is none
CONFIDENCE = 0.95
WANTED = 0.8  # probability to show a difference that is there
LARGEST = 1e15  # no loss and no time is larger; beyond, squares of squares overflow
SMALLEST_SPREAD = 1e-12  # in units, and relative to the values; below, there is nothing but rounding


def unfit(values: Sequence[float], at_least: int = 2, what: str = "values") -> str:
    """Say why the mean of these values cannot be judged, or return "" if it can. Two values or more must have
    a spread: runs that all print the same number do not tell how much runs differ."""
    wild = [value for value in values if not abs(value) < LARGEST]  # nan, too
    if wild:
        return f"{len(wild)} of {len(values)} {what} not finite: {wild[0]}"
    if len(values) < at_least:
        return f"expected at least {at_least} {what}, found {len(values)}"
    # Asked of the values themselves: the variance of equal ones is rounding noise, and rarely 0.
    if at_least > 1 and max(values) - min(values) <= SMALLEST_SPREAD * max(1, *map(abs, values)):
        return f"all {len(values)} {what} are equal, so that their spread is unknown"
    return ""


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None of too few values, nan or inf where a value is."""
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(np.mean(values)) if len(values) else None
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return mean, sd


# Loss rules

@dataclass(frozen=True)
class RuleResult:
    """A loss rule on a set of runs."""
    passes: bool
    p: float | None
    said: str  # the formula with its figures, or why it cannot be judged

    def __str__(self):
        return self.said if self.p is None else f"{self.said}: {'passes' if self.passes else 'fails'}"


def t_test(losses: Sequence[float], target: float, alpha: float) -> RuleResult:
    """One-sample t-test that the mean is below the target."""
    if why := unfit(losses, what="losses"):
        return RuleResult(False, None, f"cannot be judged: {why}")
    mean, sd = mean_sd(losses)
    result = scipy.stats.ttest_1samp(losses, target, alternative="less")
    p = float(result.pvalue)
    said = (f"mean {mean:.5f} of {len(losses)}, sd {sd:.5f}, against {target}: t = {result.statistic:.2f}, "
            f"p = {p:.3g}, needed < {alpha}")
    return RuleResult(p < alpha, p, said)


def z_rule(losses: Sequence[float], target: float, sigma: float, needed: float) -> RuleResult:
    """(target - mean) sqrt(n) against what is needed. p: of a z-test with the assumed sigma."""
    if why := unfit(losses, 1, "losses"):
        return RuleResult(False, None, f"cannot be judged: {why}")
    n = len(losses)
    mean, _ = mean_sd(losses)
    score = (target - mean) * n ** 0.5
    p = float(scipy.stats.norm.sf(score / sigma))
    # Less a hair, by which 3.28 - 3.276 is off 0.004 in binary.
    said = (f"({target} - {mean:.5f}) sqrt({n}) = {score:.5f}, needed >= {needed} (p = {p:.3g} at an assumed "
            f"sd of {sigma})")
    return RuleResult(score >= needed - 1e-9, p, said)


LOSS_RULES = {"t_test": t_test, "z_rule": z_rule}


def loss_rule(track, losses: Sequence[float]) -> RuleResult:
    """The loss rule of a records.tracks.Track on the losses of all runs at the claimed step."""
    return LOSS_RULES[track.rule](losses, track.target, **track.rule_options)


# Estimates with their intervals

@dataclass(frozen=True)
class Estimate:
    """A mean, a difference or a ratio with its interval."""
    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None  # of a difference: that it is below 0
    why: str = ""

    def __format__(self, form: str) -> str:
        if self.why:
            value = "unknown" if self.value is None else format(self.value, form)
            return f"{value} (no interval: {self.why})"
        return f"{self.value:{form}} ({100 * CONFIDENCE:g} %: {self.low:{form}} to {self.high:{form}})"


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean with a two-sided t interval. p: that of a mean of differences below 0."""
    if why := unfit(values):
        return Estimate(mean_sd(values)[0], why=why)
    mean = float(np.mean(values))
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    p = scipy.stats.ttest_1samp(values, 0, alternative="less").pvalue
    return Estimate(mean, float(low), float(high), float(p))


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """mean(a) - mean(b) by Welch's test; variances may differ."""
    judged = not (unfit(a, 1) or unfit(b, 1))
    difference = float(np.mean(a) - np.mean(b)) if judged else None
    if why := unfit(a) or unfit(b):
        return Estimate(difference, why=why)
    low, high = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(CONFIDENCE)
    p = scipy.stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue
    return Estimate(difference, float(low), float(high), float(p))


def paired(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The mean of a - b, pair by pair."""
    return mean_interval([x - y for x, y in zip(a, b, strict=True)])


def ratio(compare: Callable, a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The ratio of the geometric means of positive values by `welch` or `paired` of their logarithms: a
    speed-up, if a are the times of the baseline. That of b / a is its reciprocal, limits included.

    At the spread of times (6 % and less) the ratio of the usual means is the same to 0.2 %.
    """
    def logarithms(values):
        return [math.log(value) if 1 / LARGEST < value < LARGEST else math.nan for value in values]

    found = compare(logarithms(a), logarithms(b))
    value, low, high = (None if x is None else math.exp(x) for x in (found.value, found.low, found.high))
    return Estimate(value, low, high, why=found.why)


# Power

def t_power(df: float, shift: float, alpha: float) -> float:
    """Probability that a one-sided t-test at alpha succeeds (exact, noncentral t). shift: the true difference
    over its standard error."""
    return float(scipy.stats.nct.sf(scipy.stats.t.isf(alpha, df), df, shift))


def power(n: int, margin: float, sd: float, alpha: float) -> float:
    """Probability that the mean of n values, in truth `margin` above 0, is shown to be so."""
    return t_power(n - 1, margin * n ** 0.5 / sd, alpha)


def detectable(n: int, sd: float) -> float:
    """The difference that the mean of n values shows with the probability WANTED."""
    return sd * scipy.optimize.brentq(lambda margin: power(n, margin, 1.0, ALPHA) - WANTED, 0, 1e3)
