"""The statistics of a claim: loss rules, comparisons of times, intervals, and the power to see a difference.
All from scipy.

Every result says so where it cannot be judged: its numbers are then None, `why` tells the reason, and it
never passes. Nothing is left out or replaced to make a number possible; a run that ended in nan is part of
the set it was in. Probabilities are one-sided, since a claim has a direction: below the target, faster than
the baseline.
"""
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass

import numpy as np
import scipy  # scipy.stats, 0.5 s, is imported by its first use


LARGEST = 1e15  # no loss and no time is larger; beyond, squares of squares overflow
SMALLEST_SPREAD = 1e-12  # in units, and relative to the values; below, there is nothing but rounding


def unfit(values: Sequence[float], at_least: int = 2, what: str = "values") -> str:
    """Why the mean of these values cannot be judged, or "" if it can. A spread is needed wherever two values
    are: runs that all print the same number do not tell how much runs differ."""
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


class RuleResult:
    """What the results of loss rules share."""

    @property
    def verdict(self) -> str:
        return f"cannot be judged: {self.why}" if self.why else "passes" if self.passes else "fails"

    def __str__(self):
        return self.verdict if self.why else f"{self.formula}: {self.verdict}"


@dataclass(frozen=True)
class TTest(RuleResult):
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

    @property
    def formula(self) -> str:
        return (f"mean {self.mean:.5f} of {self.n}, sd {self.sd:.5f}, against {self.target}: t = "
                f"{self.t:.2f}, p = {self.p:.3g}, "
                f"needed < {self.alpha}")


def t_test(losses: Sequence[float], target: float, alpha: float = 0.01) -> TTest:
    mean, sd = mean_sd(losses)
    if why := unfit(losses, what="losses"):
        return TTest(len(losses), mean, sd, target, alpha, None, None, why)
    result = scipy.stats.ttest_1samp(losses, target, alternative="less")
    return TTest(len(losses), mean, sd, target, alpha, float(result.statistic), float(result.pvalue))


@dataclass(frozen=True)
class ZRule(RuleResult):
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

    @property
    def formula(self) -> str:
        return (f"({self.target} - {self.mean:.5f}) sqrt({self.n}) = {self.score:.5f}, needed >= "
                f"{self.needed} "
                f"(p = {self.p:.3g} at an assumed sd of {self.sigma})")


def reaches(score: float, needed: float) -> bool:
    """score >= needed for decimal figures: 3.28 - 3.276 is a hair off 0.004 in binary."""
    return score >= needed - 1e-9


def z_rule(losses: Sequence[float], target: float, sigma: float = 0.0013, needed: float = 0.004) -> ZRule:
    mean, sd = mean_sd(losses)
    if why := unfit(losses, 1, "losses"):
        return ZRule(len(losses), mean, sd, target, sigma, needed, None, None, why)
    score = (target - mean) * len(losses) ** 0.5
    return ZRule(len(losses), mean, sd, target, sigma, needed, score,
                 float(scipy.stats.norm.sf(score / sigma)))


LOSS_RULES = {"t_test": t_test, "z_rule": z_rule}


def loss_rule(track, losses: Sequence[float]) -> TTest | ZRule:
    """The loss rule of a records.tracks.Track on the losses of all runs at the claimed step."""
    return LOSS_RULES[track.rule](losses, track.target, **track.rule_options)


@dataclass(frozen=True)
class PairwiseRule(RuleResult):
    """Candidate against predecessor: (loss gained + loss that the saved steps are worth) / sqrt(1/n
    + 1/n_baseline)."""
    n: int
    n_baseline: int
    loss_gain: float | None
    steps_saved: int
    step_gain: float  # what these steps are worth in loss
    score: float | None
    needed: float
    why: str = ""

    @property
    def passes(self) -> bool:
        return self.score is not None and reaches(self.score, self.needed)

    @property
    def formula(self) -> str:
        return (f"({self.loss_gain:.5f} + {self.step_gain:.5f} for {self.steps_saved} steps) / "
                f"sqrt(1/{self.n} + "
                f"1/{self.n_baseline}) = {self.score:.5f}, needed >= {self.needed}")


def pairwise_rule(losses: Sequence[float], baseline: Sequence[float], steps_saved: int = 0,
                  loss_per_step: float = 0.0045 / 100, needed: float = 0.004) -> PairwiseRule:
    n, n_baseline = len(losses), len(baseline)
    if why := unfit(losses, 1, "losses") or unfit(baseline, 1, "losses of the baseline"):
        return PairwiseRule(n, n_baseline, None, steps_saved, steps_saved * loss_per_step, None, needed, why)
    gain = float(np.mean(baseline) - np.mean(losses))
    score = (gain + steps_saved * loss_per_step) / (1 / n + 1 / n_baseline) ** 0.5
    return PairwiseRule(n, n_baseline, gain, steps_saved, steps_saved * loss_per_step, score, needed)


@dataclass(frozen=True)
class Interval:
    estimate: float | None
    low: float | None
    high: float | None
    confidence: float
    why: str = ""

    def __format__(self, digits: str) -> str:
        """f"{interval:.2f}": the estimate with its limits."""
        if self.why:
            estimate = "unknown" if self.estimate is None else format(self.estimate, digits)
            return f"{estimate} (no interval: {self.why})"
        limits = f"{self.low:{digits}} to {self.high:{digits}}"
        return f"{self.estimate:{digits}} ({100 * self.confidence:g} %: {limits})"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean with a two-sided t interval."""
    if why := unfit(values):
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

    def __format__(self, digits: str) -> str:
        p = "" if self.why else f", below 0 with p = {self.p:.3g} (Welch's test)"
        return f"{self.difference:{digits}}{p}"


def welch(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Welch:
    if why := unfit(a) or unfit(b):
        difference = float(np.mean(a) - np.mean(b)) if not (unfit(a, 1) or unfit(b, 1)) else None
        return Welch(len(a), len(b), Interval(difference, None, None, confidence, why), None, None, None, why)
    two_sided = scipy.stats.ttest_ind(a, b, equal_var=False)
    low, high = two_sided.confidence_interval(confidence)
    p = scipy.stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue
    difference = Interval(float(np.mean(a) - np.mean(b)), float(low), float(high), confidence)
    return Welch(len(a), len(b), difference, float(two_sided.statistic), float(two_sided.df), float(p))


def ratio_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """mean(a) / mean(b) of independent groups of positive values: a speed-up, if a are the times of the
    baseline.

    Delta method on the logarithm, where both relative errors add, with Welch and Satterthwaite's degrees of
    freedom: spreads may differ, the interval stays positive, and that of b / a is its reciprocal. At the
    relative spread of times (6 % and less) it agrees with Fieller's to a twentieth of the width; where the
    spread is so large that Fieller's is unbounded, neither means much."""
    ratio = None
    if not (unfit(a, 1) or unfit(b, 1)) and min(*a, *b) > 0:
        ratio = float(np.mean(a)) / float(np.mean(b))
        if not math.isfinite(ratio) or ratio == 0:  # numbers too far apart for a float
            ratio = None
    if why := unfit(a) or unfit(b) or ("" if ratio else "expected positive values of like size"):
        return Interval(ratio, None, None, confidence, why)
    squared = [np.var(group, ddof=1) / len(group) / np.mean(group) ** 2 for group in (a, b)]
    df = sum(squared) ** 2 / sum(part ** 2 / (len(group) - 1) for part, group in zip(squared, (a, b)))
    factor = math.exp(scipy.stats.t.ppf((1 + confidence) / 2, df) * sum(squared) ** 0.5)
    return Interval(ratio, ratio / factor, ratio * factor, confidence)


@dataclass(frozen=True)
class Paired:
    """Paired t-test on a minus b. floor: the difference that so many pairs show in 8 cases of 10."""
    n: int
    sd: float | None  # of the differences
    difference: Interval
    p_below: float | None  # that a is below b
    p_above: float | None
    alpha: float
    floor: float | None
    why: str = ""


def paired(a: Sequence[float], b: Sequence[float], alpha: float = 0.01, confidence: float = 0.95) -> Paired:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    _, sd = mean_sd(differences)
    if why := unfit(differences, what="differences"):
        return Paired(len(differences), sd, mean_interval(differences, confidence), None, None, alpha, None,
                      why)
    below, above = (float(scipy.stats.ttest_1samp(differences, 0, alternative=side).pvalue)
                    for side in ("less", "greater"))
    return Paired(len(differences), sd, mean_interval(differences, confidence), below, above, alpha,
                  sd * detectable(len(differences), alpha))


def power(n: int, margin: float, sd: float, alpha: float, sigma: float | None = None) -> float:
    """Probability that n runs, whose true mean is `margin` below the target and whose standard deviation is
    sd, pass the t-test at alpha (exact, noncentral t), or the z-test at alpha with an assumed sigma."""
    if sigma is not None:
        return float(scipy.stats.norm.cdf((margin * n ** 0.5 - sigma * scipy.stats.norm.isf(alpha)) / sd))
    return float(scipy.stats.nct.sf(scipy.stats.t.isf(alpha, n - 1), n - 1, margin * n ** 0.5 / sd))


def detectable(n: int, alpha: float, wanted: float = 0.8) -> float:
    """The difference, in standard deviations, at which the t-test of n values has the wanted power."""
    return scipy.optimize.brentq(lambda margin: power(n, margin, 1.0, alpha) - wanted, 0, 1e3)


def plain(value):
    """Results as JSON holds them: dataclasses as dictionaries, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if is_dataclass(value):
        passes = {"passes": value.passes} if hasattr(value, "passes") else {}
        return plain(asdict(value) | passes)
    return None if isinstance(value, float) and not math.isfinite(value) else value
