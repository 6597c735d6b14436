"""How many runs a claim needs, decided before the first one.

The loss rule passes by luck once in a hundred. It does so far more often if it is tried again after every run, so choose
a number of runs and test once, or choose two looks, each at half the probability: two halves add up to at most the whole.
Probabilities are exact (noncentral t) where not called simulated."""
import json
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass

from records.errors import RecordError
from records.tracks import TRACKS, choose

HELP = "runs that a margin in loss or a gap in time needs"
EXAMPLE = "python -m records plan --margin 0.001 --gap 0.3 --time-sd 0.07"
MOST_RUNS = 10_000  # nobody runs more; a tiny margin is answered by an error instead of a search without end


def runs_needed(margin: float, sd: float, alpha: float, wanted: float, sigma: float | None = None) -> int:
    """The fewest runs that pass the test with the wanted probability: of the t-test, or of the z-test with sigma."""
    from records.statistics import power
    return fewest(range(1 if sigma else 2, MOST_RUNS + 1), lambda n: power(n, margin, sd, alpha, sigma), wanted)


def two_sample_power(n: int, gap: float, sd: float, alpha: float) -> float:
    """Probability that the one-sided two-sample t-test of n runs each shows the gap."""
    import scipy
    df = 2 * n - 2
    return float(scipy.stats.nct.sf(scipy.stats.t.isf(alpha, df), df, gap / sd * (n / 2) ** 0.5))


def runs_per_arm(gap: float, sd: float, alpha: float, wanted: float) -> int:
    """The fewest runs of each, candidate and baseline, that show the gap with the wanted probability."""
    return fewest(range(2, MOST_RUNS + 1), lambda n: two_sample_power(n, gap, sd, alpha), wanted)


def fewest(numbers: range, power, wanted: float) -> int:
    at = bisect_left(numbers, wanted, key=power)
    if at == len(numbers):
        raise RecordError(f"expected a difference that some number of runs can show, found that {MOST_RUNS:,} show it in "
                          f"{power(numbers[-1]):.1%} of cases; plan for a larger one")
    return numbers[at]


@dataclass(frozen=True)
class TwoLooks:
    first: int  # runs before the first look
    last: int  # runs before the second, and last one
    alpha: float  # of each look
    power: float  # at least
    mean_runs: float


def two_looks(margin: float, sd: float, alpha: float, wanted: float, sigma: float | None = None) -> TwoLooks:
    """The design that takes the fewest runs on average at this margin. By the union bound its false passes are at most
    alpha, whatever the spread of the losses; its power is at least that of the last look alone."""
    from records.statistics import power
    last = runs_needed(margin, sd, alpha / 2, wanted, sigma)
    passes = {n: power(n, margin, sd, alpha / 2, sigma) for n in range(1 if sigma else 2, last + 1)}
    mean_runs = {n: last - (last - n) * passes[n] for n in passes}
    first = min(mean_runs, key=mean_runs.get)
    return TwoLooks(first, last, alpha / 2, passes[last], mean_runs[first])


def false_passes(looks, alpha: float, sigma: float | None = None, sets: int = 100_000, seed: int = 0) -> float:
    """Simulated: the part of recipes exactly at the target that pass at one of the looks, each at alpha.
    sigma: of the z-test, in true standard deviations."""
    import numpy as np
    import scipy
    n, at = np.arange(1, max(looks) + 1), np.array(sorted(looks)) - 1
    losses = np.random.default_rng(seed).standard_normal((sets, len(n)))
    total, squares = losses.cumsum(axis=1)[:, at], (losses ** 2).cumsum(axis=1)[:, at]
    n = n[at]
    if sigma is not None:
        return float((total / n ** 0.5 < sigma * scipy.stats.norm.ppf(alpha)).any(axis=1).mean())
    sd = ((squares - total ** 2 / n) / (n - 1)) ** 0.5
    return float((total / n ** 0.5 < sd * scipy.stats.t.ppf(alpha, n - 1)).any(axis=1).mean())


def add_arguments(parser):
    parser.add_argument("--margin", type=float, help="by how much the true mean loss is below the target")
    parser.add_argument("--sd", type=float, help="standard deviation of the loss between runs (default: the track's)")
    parser.add_argument("--gap", type=float, help="difference in mean time of candidate and baseline, seconds")
    parser.add_argument("--time-sd", type=float, help="standard deviation of the time between runs on one host, seconds")
    parser.add_argument("--power", type=float, default=0.8, help="probability with which it shall succeed (default: 0.8)")
    parser.add_argument("--alpha", type=float, help="probability with which it may succeed by luck (default: the track's)")
    parser.add_argument("--track", default="small", help=f"whose loss rule: {', '.join(TRACKS)} (default: small)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def check(args, track):
    if args.margin is None and args.gap is None:
        raise RecordError("expected --margin or --gap, found neither; say what the runs shall show, as --margin=0.001")
    if (args.gap is None) != (args.time_sd is None):
        raise RecordError("expected --gap and --time-sd together, found one of them; add the other, as --gap=0.3 --time-sd=0.07")
    for name in ("margin", "sd", "gap", "time_sd"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise RecordError(f"--{name.replace('_', '-')}: expected a number above 0, found {value}; give a size, as 0.001")
    for name, size, sd in (("margin", args.margin, args.sd or track.loss_sd), ("gap", args.gap, args.time_sd)):
        if size is not None and size > 100 * sd:
            raise RecordError(f"--{name}: expected at most 100 standard deviations of {sd:g}, found {size:g}; check the units: "
                              "nats per token, seconds")
    for name, low, high in (("power", 0.5, 0.9999), ("alpha", 1e-6, 0.5)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise RecordError(f"--{name}: expected a probability from {low:g} to {high:g}, found {value}; give one, as 0.8 for "
                              "power or 0.01 for alpha")


def plan_loss(track, margin: float, sd: float, alpha: float | None, wanted: float) -> dict:
    import scipy

    from records.statistics import power
    sigma = track.rule_options.get("sigma")
    if alpha is None:
        alpha = scipy.stats.norm.sf(track.rule_options["needed"] / sigma) if sigma else track.alpha
    fixed = runs_needed(margin, sd, alpha, wanted, sigma)
    first, looks, peeking = min(1 if sigma else 3, fixed), two_looks(margin, sd, alpha, wanted, sigma), None
    if first < fixed:
        peeking = dict(first=first, last=fixed, false_passes=false_passes(
            range(first, fixed + 1), alpha, sigma and sigma / sd, sets=min(100_000, 4_000_000 // fixed)))
    return dict(track=track.name, rule=track.rule, margin=margin, sd=sd, alpha=float(alpha), runs=fixed,
                power=power(fixed, margin, sd, alpha, sigma), two_looks=asdict(looks) if looks.first < looks.last else None,
                testing_after_every_run=peeking)


def sentences(loss: dict | None, time: dict | None):
    if loss:
        yield (f"Loss rule of track {loss['track']} ({loss['rule'].replace('_', '-')} at {loss['alpha']:.2g}), true mean "
               f"{loss['margin']:g} below the target, standard deviation {loss['sd']:g} between runs:")
        yield f"  fixed number  Tested once, after {loss['runs']}, the runs pass with probability {loss['power']:.2f}."
        if looks := loss["two_looks"]:
            yield (f"  two looks     Tested after {looks['first']} and, if need be, after {looks['last']} runs, each time at "
                   f"{looks['alpha']:.2g}, they pass with probability\n{'':16}{looks['power']:.2f} or more, after "
                   f"{looks['mean_runs']:.1f} runs on average, and falsely with {loss['alpha']:.2g} at most.")
        if peeking := loss["testing_after_every_run"]:
            yield (f"  never         Tested after every run from {peeking['first']} to {peeking['last']}, a recipe that is only "
                   f"at the target passes with\n{'':16}probability {peeking['false_passes']:.3f} (simulated) instead of "
                   f"{loss['alpha']:.2g}.")
    if time:
        yield (f"Time: {time['runs_per_arm']} runs of the candidate and {time['runs_per_arm']} of the baseline on one host show "
               f"a gap of {time['gap']:g} s, at a standard deviation\nof {time['sd']:g} s, with probability {time['power']:.2f} "
               f"(one-sided t-test at {time['alpha']:g}).")


def run(args) -> int:
    track = choose(args.track, [])
    check(args, track)
    loss = time = None
    if args.margin is not None:
        loss = plan_loss(track, args.margin, args.sd or track.loss_sd, args.alpha, args.power)
    if args.gap is not None:
        alpha = args.alpha or track.alpha
        runs = runs_per_arm(args.gap, args.time_sd, alpha, args.power)
        time = dict(gap=args.gap, sd=args.time_sd, alpha=alpha, runs_per_arm=runs, power=two_sample_power(
            runs, args.gap, args.time_sd, alpha))
    print(json.dumps(dict(loss=loss, time=time), indent=2) if args.json else "\n".join(sentences(loss, time)))
    return 0
