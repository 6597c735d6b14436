"""How many runs a claim needs, decided before the first one.

The loss rule passes by luck once in a hundred, and far more often if it is tried again after every run:
choose a number of runs and test once. Probabilities are exact (noncentral t)."""
from bisect import bisect_left
from functools import partial

import scipy

from data.errors import UsageError
from records.formatting import above_zero
from records.statistics import WANTED, power, t_power
from records.tracks import TRACKS

HELP = "runs that a margin in loss or a gap in time needs"
EXAMPLE = "python -m records plan --margin 0.001 --gap 0.3 --time-sd 0.07"
MOST_RUNS = 10_000  # nobody runs more; a tiny margin is answered by an error instead of a search without end
SAFE_MARGIN = 100  # standard deviations; a larger difference is one of units


def fewest(least: int, chance, difference: float) -> int:
    """The fewest runs, `least` or more, that succeed in 8 cases of 10; difference: in standard deviations."""
    numbers = range(least, MOST_RUNS + 1)
    if difference > SAFE_MARGIN:
        raise UsageError(f"expected a difference of at most {SAFE_MARGIN} standard deviations, found "
                         f"{difference:g}; check the units: nats per token, seconds")
    at = bisect_left(numbers, WANTED, key=chance)
    if at == len(numbers):
        raise UsageError(f"expected a difference that some number of runs can show, found that {MOST_RUNS:,} "
                         f"show it in {chance(MOST_RUNS):.1%} of cases; plan for a larger one")
    return numbers[at]


def add_arguments(parser):
    parser.add_argument("--margin", type=above_zero,
                        help="distance of the true mean loss below the target")
    parser.add_argument("--sd", type=above_zero,
                        help="standard deviation of the loss between runs (default: the track's)")
    parser.add_argument("--gap", type=above_zero,
                        help="difference in mean time of candidate and baseline, seconds")
    parser.add_argument("--time-sd", type=above_zero,
                        help="standard deviation of the time between runs on one host, seconds")
    parser.add_argument("--track", choices=TRACKS, default="small", help="whose loss rule (default: small)")


def plan_loss(track, margin: float, sd: float) -> str:
    needed = track.rule_options.get("needed")
    if needed is None:
        rule, least = f"t-test at {track.alpha:g}", 2
        chance = partial(power, margin=margin, sd=sd, alpha=track.alpha)
    else:
        rule, least = f"({track.target:g} - mean) sqrt(n) >= {needed:g}", 1

        def chance(n):
            return scipy.stats.norm.cdf((margin * n ** 0.5 - needed) / sd)
    runs = fewest(least, chance, margin / sd)
    return (f"Loss rule of track {track.name} ({rule}), true mean {margin:g} below the target, standard\n"
            f"deviation {sd:g} between runs: tested once, after {runs}, the runs pass with probability "
            f"{chance(runs):.2f}.")


def plan_time(gap: float, sd: float, alpha: float) -> str:
    def chance(n):
        return t_power(2 * n - 2, gap / sd * (n / 2) ** 0.5, alpha)
    runs = fewest(2, chance, gap / sd)
    return (f"Time: {runs} runs of the candidate and {runs} of the baseline on one host show a gap of "
            f"{gap:g} s, at a standard\ndeviation of {sd:g} s, with probability {chance(runs):.2f} "
            f"(one-sided t-test at {alpha:g}).")


def run(args) -> int:
    track = TRACKS[args.track]
    if args.margin is None and args.gap is None:
        raise UsageError("expected --margin or --gap, found neither; say what the runs shall show, as "
                         "--margin=0.001")
    if (args.gap is None) != (args.time_sd is None):
        raise UsageError("expected --gap and --time-sd together, found one of them; add the other, as "
                         "--gap=0.3 --time-sd=0.07")
    if args.margin is not None:
        print(plan_loss(track, args.margin, args.sd or track.loss_sd))
    if args.gap is not None:
        print(plan_time(args.gap, args.time_sd, track.alpha))
    return 0
