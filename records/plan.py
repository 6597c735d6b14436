"""How many runs a claim needs, decided before the first one.

The loss rule passes by luck once in a hundred, and far more often if it is tried again after every run:
choose a number of runs and test once. Probabilities are exact (noncentral t)."""
import json
import math
from bisect import bisect_left

import scipy

from records.errors import RecordError
from records.statistics import power
from records.tracks import TRACKS, Track, choose

HELP = "runs that a margin in loss or a gap in time needs"
EXAMPLE = "python -m records plan --margin 0.001 --gap 0.3 --time-sd 0.07"
MOST_RUNS = 10_000  # nobody runs more; a tiny margin is answered by an error instead of a search without end
SAFE_MARGIN = 100  # standard deviations; a larger difference is one of units


def runs_needed(margin: float, sd: float, alpha: float, wanted: float, sigma: float | None = None) -> int:
    """The fewest runs that pass the test with the wanted probability: of the t-test, or of the
    z-test with sigma."""
    return fewest(range(1 if sigma else 2, MOST_RUNS + 1), lambda n: power(n, margin, sd, alpha, sigma),
                  wanted)


def two_sample_power(n: int, gap: float, sd: float, alpha: float) -> float:
    """Probability that the one-sided two-sample t-test of n runs each shows the gap."""
    df = 2 * n - 2
    return float(scipy.stats.nct.sf(scipy.stats.t.isf(alpha, df), df, gap / sd * (n / 2) ** 0.5))


def runs_per_arm(gap: float, sd: float, alpha: float, wanted: float) -> int:
    """The fewest runs of each, candidate and baseline, that show the gap with the wanted probability."""
    return fewest(range(2, MOST_RUNS + 1), lambda n: two_sample_power(n, gap, sd, alpha), wanted)


def fewest(numbers: range, power_of, wanted: float) -> int:
    at = bisect_left(numbers, wanted, key=power_of)
    if at == len(numbers):
        raise RecordError("expected a difference that some number of runs can show, found that "
                          f"{MOST_RUNS:,} show it in "
                          f"{power_of(numbers[-1]):.1%} of cases; plan for a larger one")
    return numbers[at]


def add_arguments(parser):
    parser.add_argument("--margin", type=float, help="by how much the true mean loss is below the target")
    parser.add_argument("--sd", type=float,
                        help="standard deviation of the loss between runs (default: the track's)")
    parser.add_argument("--gap", type=float,
                        help="difference in mean time of candidate and baseline, seconds")
    parser.add_argument("--time-sd", type=float,
                        help="standard deviation of the time between runs on one host, seconds")
    parser.add_argument("--power", type=float, default=0.8,
                        help="probability with which it shall succeed (default: 0.8)")
    parser.add_argument("--alpha", type=float,
                        help="probability with which it may succeed by luck (default: the track's)")
    parser.add_argument("--track", default="small",
                        help=f"whose loss rule: {', '.join(TRACKS)} (default: small)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def check(args, track: Track):
    if args.margin is None and args.gap is None:
        raise RecordError("expected --margin or --gap, found neither; say what the runs shall show, as "
                          "--margin=0.001")
    if (args.gap is None) != (args.time_sd is None):
        raise RecordError("expected --gap and --time-sd together, found one of them; add the other, as "
                          "--gap=0.3 --time-sd=0.07")

    for name in ("margin", "sd", "gap", "time_sd"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise RecordError(f"--{name.replace('_', '-')}: expected a number above 0, found {value}; give a "
                              "size, as 0.001")
    for name, size, sd in (("margin", args.margin, args.sd or track.loss_sd),
                           ("gap", args.gap, args.time_sd)):
        if size is not None and size > SAFE_MARGIN * sd:
            raise RecordError(f"--{name}: expected at most {SAFE_MARGIN} standard deviations of {sd:g}, "
                              f"found {size:g}; "
                              "check the units: nats per token, seconds")
    for name, low, high in (("power", 0.5, 0.9999), ("alpha", 1e-6, 0.5)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise RecordError(f"--{name}: expected a probability from {low:g} to {high:g}, found {value}; "
                              "give one, as 0.8 "
                              "for power or 0.01 for alpha")


def plan_loss(track: Track, margin: float, sd: float, alpha: float | None, wanted: float) -> dict:
    sigma = track.rule_options.get("sigma")
    if alpha is None:
        alpha = float(scipy.stats.norm.sf(track.rule_options["needed"] / sigma)) if sigma else track.alpha
    runs = runs_needed(margin, sd, alpha, wanted, sigma)
    return dict(track=track.name, rule=track.rule, margin=margin, sd=sd, alpha=alpha, runs=runs,
                power=power(runs, margin, sd, alpha, sigma))


def plan_time(gap: float, sd: float, alpha: float, wanted: float) -> dict:
    runs = runs_per_arm(gap, sd, alpha, wanted)
    return dict(gap=gap, sd=sd, alpha=alpha, runs_per_arm=runs, power=two_sample_power(runs, gap, sd, alpha))


def sentences(loss: dict | None, time: dict | None):
    if loss:
        yield (f"Loss rule of track {loss['track']} ({loss['rule'].replace('_', '-')} at "
               f"{loss['alpha']:.2g}), true mean "
               f"{loss['margin']:g} below the target, standard deviation {loss['sd']:g} between runs:")
        yield f"tested once, after {loss['runs']}, the runs pass with probability {loss['power']:.2f}."
    if time:
        yield (f"Time: {time['runs_per_arm']} runs of the candidate and {time['runs_per_arm']} of the "
               "baseline on one host "
               f"show a gap of {time['gap']:g} s, at a standard deviation")
        test = f"one-sided t-test at {time['alpha']:g}"
        yield f"of {time['sd']:g} s, with probability {time['power']:.2f} ({test})."


def run(args) -> int:
    track = choose(args.track, [])
    check(args, track)
    loss = time = None
    if args.margin is not None:
        loss = plan_loss(track, args.margin, args.sd or track.loss_sd, args.alpha, args.power)
    if args.gap is not None:
        time = plan_time(args.gap, args.time_sd, args.alpha or track.alpha, args.power)
    print(json.dumps(dict(loss=loss, time=time), indent=2) if args.json else "\n".join(sentences(loss, time)))
    return 0
