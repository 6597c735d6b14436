"""What a search and the fresh seeds of its winners say: estimates with intervals, tables, and a plot."""
import math
import statistics
from types import SimpleNamespace

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import trials
from bench.page import OPTIMIZER_NAMES as NAMES
from bench.page import grid
from bench.pictures import Theme, finish, two_plots
from bench.tune.results import SearchResults
from bench.tune.search import OPTIMIZERS, QUANTITIES, TRACK
from bench.tune.training import FACTORS
from data.errors import UsageError
from records import compare

WORST = math.log(TRACK.vocab_size)  # loss of a guess, which stands for that of a diverged trial in means
DRAWS = 2000  # of a bootstrap

# ------------------------------------------------------------------------------------------------------------
# Arithmetic


def expected_best(losses, k: int) -> float:
    """Return the expected lowest of k of these losses, drawn without putting any back: unbiased for the
    lowest of k trials (Tang et al. 2020, "Showing Your Work Doesn't Always Work")."""
    ranked = np.sort(losses)
    n = len(ranked)
    # The i-th is the lowest where the others are from the n - 1 - i above it.
    chances = [math.comb(n - 1 - i, k - 1) / math.comb(n, k) for i in range(n)]
    return float(np.dot(ranked, chances))


def best_interval(losses, k: int) -> tuple[float, float]:
    """Return an interval of 95 % of that expectation, by a bootstrap over the trials."""
    rng = np.random.default_rng(0)
    found = [expected_best(rng.choice(losses, len(losses)), k) for _ in range(DRAWS)]
    return tuple(np.percentile(found, (2.5, 97.5)))


def first_rung(results: SearchResults, optimizer: str) -> list[float]:
    """Return the losses of all trials after the first rung, diverged ones as the loss of a guess."""
    found = results.losses(optimizer, results.search.rungs[0]).values()
    return [min(loss, WORST) if math.isfinite(loss) else WORST for loss in found]


def rank_correlation(before: dict[int, float], after: dict[int, float]) -> float:
    """Return Spearman's correlation of the losses of those trials that both rungs have."""
    pairs = [(before[trial], loss) for trial, loss in after.items() if trial in before]
    finite = [pair for pair in pairs if np.isfinite(pair).all()]
    if len(finite) < 3:
        return math.nan
    return float(scipy.stats.spearmanr(*zip(*finite)).statistic)


def steps_ratio(target: float, steps: tuple[int, int], losses: tuple[float, float]) -> float:
    """Return how many times as many steps as the first number a schedule needs that ends at the target.

    Between two lengths the loss is a straight line in the logarithm of the steps. Outside of them it is not
    known: the answer is then 0 or infinity.
    """
    short, long = losses
    if target > short:
        return 0.0
    if target < long:
        return math.inf
    if short <= long:
        return steps[1] / steps[0]
    return trials.crossing(1, short, steps[1] / steps[0], long, target)


def ratio_interval(results: SearchResults, fixed: str, moving: str) -> tuple | None:
    """Return AdamW's steps over Muon's to the loss of the last rung's winner of `fixed`, the ends of its 95 %
    interval by a bootstrap over the fresh seeds, and the two lengths of `moving` around that loss."""
    lengths = results.lengths(moving)
    losses = [results.final_losses(f"{fixed}_{results.search.rungs[-1]}"),
              *(results.final_losses(f"{moving}_{steps}") for steps in lengths)]
    if min(map(len, losses)) < 2 or len(lengths) != 2 or not np.isfinite(np.concatenate(losses)).all():
        return None

    def ratio(target, short, long) -> float:
        moved = steps_ratio(np.mean(target), lengths, (np.mean(short), np.mean(long)))
        if moving == "adamw":  # its shorter length is the last rung
            return moved
        return lengths[1] / lengths[0] / moved if moved else math.inf

    rng = np.random.default_rng(0)
    draws = [ratio(*(rng.choice(values, len(values)) for values in losses)) for _ in range(DRAWS)]
    low, high = np.quantile(draws, (0.025, 0.975), method="nearest")
    return ratio(*losses), low, high, *lengths


# ------------------------------------------------------------------------------------------------------------
# The page


def rung_table(results: SearchResults) -> str:
    lines = []
    for optimizer in OPTIMIZERS:
        before = None
        for rung, steps in enumerate(results.rungs(optimizer)):
            found = results.losses(optimizer, steps)
            if not found:
                break
            finite = [loss for loss in found.values() if math.isfinite(loss)]
            planned = len(results.wanted(optimizer, rung))
            correlation = "" if before is None else f"{rank_correlation(before, found):.2f}"
            ends = [f"{f(finite):.4f}" if finite else "" for f in (min, statistics.median)]
            count = f"{len(found)} of {planned}"
            diverged = len(found) - len(finite)
            lines.append([NAMES[optimizer], steps, count, diverged, *ends, correlation])
            before = found
    return grid(["optimizer", "steps", "trials", "diverged", "best", "median",
                 "rank correlation with the rung before"], lines)


def winners_table(results: SearchResults) -> str:
    """Return the searched quantities of the winners beside their ranges, as far as there are winners."""
    found = {}
    for optimizer, steps, trial in results.winners().values():
        found[f"{NAMES[optimizer]}, {steps} steps (trial {trial})"] = results.search.point(optimizer, trial)
    if not found:
        return ""

    lines = []
    ranges_of = results.search.ranges
    for name, meaning in QUANTITIES.items():
        ranges = [range_of(ranges_of[optimizer][name]) for optimizer in OPTIMIZERS]
        lines.append([meaning, *ranges, *(point[name] for point in found.values())])
    return grid(["searched", "Muon's range", "AdamW's range", *found], lines)


def range_of(rule: dict) -> str:
    if "one_of" in rule:
        return ", ".join(map(str, rule["one_of"]))
    low, high = rule["log"]
    return f"{low:g} to {high:g}" + (f", or 0 ({rule['zero']:.0%})" if rule.get("zero") else "")


def best_table(results: SearchResults) -> str:
    sizes = [k for k in (1, 2, 4, 8, 16, 32) if k <= results.search.trials]
    lines = []
    for optimizer in OPTIMIZERS:
        losses = first_rung(results, optimizer)
        cells = []
        for k in (k for k in sizes if k <= len(losses)):
            low, high = best_interval(losses, k)
            cells.append(f"{expected_best(losses, k):.3f} ({low:.3f} to {high:.3f})")
        lines.append([f"{NAMES[optimizer]}, {len(losses)} trials", *cells, *[""] * (len(sizes) - len(cells))])
    return grid(["best after so many trials", *sizes], lines)


def final_text(results: SearchResults) -> str:
    """Return what `records compare` says of the fresh seeds, and the ratio of steps and of time."""
    folders = [str(results.folder / group) for group in results.winners() if results.final_losses(group)]
    if len(folders) < 2:
        return "No fresh seeds yet: `python -m bench.tune final`."

    options = dict(track=None, target=None, step=None, history=None)
    found = compare.examine(SimpleNamespace(paths=folders, **options))
    parts = [grid(found.summary.titles, found.summary.rows)]
    for group, sentences in found.against:
        said = [f"- {sentence}" for sentence in sentences if not sentence.startswith(("source", "settings"))]
        parts.append("\n".join([f"{group.name} against {found.groups[0].name}:", "", *said]))
    return "\n\n".join([*parts, ratio_text(results)])


def ratio_text(results: SearchResults) -> str:
    """Say how many times as many steps AdamW needs, at the losses where each of both ends."""
    last = results.search.rungs[-1]
    lines = []
    for fixed, moving in (("adamw", "muon"), ("muon", "adamw")):
        found = ratio_interval(results, fixed, moving)
        if found is None:
            continue
        *ratios, short, long = found
        middle, low, high = (shown_ratio(ratio, long / short) for ratio in ratios)
        lengths = f"{NAMES[moving]}'s schedules of {short} and {long} steps"
        lines.append(
            f"- **To the loss at which {NAMES[fixed]}'s {last} steps end, AdamW needs {middle} times as many "
            f"steps as Muon** (95 %: {low} to {high}), by {lengths} and a straight line in the logarithm of "
            "the steps between them.")
    if not lines:
        return "The ratio of steps needs two fresh seeds or more of each winner."
    speed = statistics.mean(ms_per_step(results, "adamw")) / statistics.mean(ms_per_step(results, "muon"))
    return "\n".join([*lines, f"- A step of AdamW took {speed:.3f} of the time of one of Muon."])


def shown_ratio(ratio: float, largest: float) -> str:
    """Say a ratio, which is 0 or infinity where it lies outside of the lengths that were run."""
    if ratio == 0:
        return "less than 1"
    return f"{ratio:.2f}" if math.isfinite(ratio) else f"more than {largest:.2f}"


def ms_per_step(results: SearchResults, optimizer: str) -> list[float]:
    """Return the mean milliseconds of a step of each fresh seed of this optimizer."""
    return [1000 * row["seconds"] / row["steps"] for row in results.of("final")
            if row["group"].startswith(optimizer)]


def reuse_table(results: SearchResults) -> str:
    rows = results.of("reuse")
    if not rows:
        return "Not run yet: `python -m bench.tune reuse`."
    lines = []
    for factor in FACTORS:
        losses = [row["loss"] for row in rows if row["factor"] == factor]
        shown = " ".join(f"{loss:.4f}" for loss in losses)
        lines.append([f"{factor:g}", len(losses), shown, f"{statistics.mean(losses):.4f}" if losses else ""])
    return grid(["rate, in units of AdamW's winner", "n", "final losses", "mean"], lines)


def tables(results: SearchResults) -> str:
    """Return the tables. Raises UsageError where an optimizer has no trials."""
    rungs = results.search.rungs
    if not all(results.losses(optimizer, rungs[0]) for optimizer in OPTIMIZERS):
        raise UsageError(f"{results.path}: expected trials of both optimizers, found too few; see "
                         "`python -m bench.tune run`")
    return "\n\n".join([
        "### The search", rung_table(results),
        f"### Expected best of k trials after {rungs[0]} steps", best_table(results),
        "### The winners", winners_table(results),
        "### Fresh seeds of the winners", final_text(results),
        f"### AdamW's rate and decay reused by Muon, {rungs[-1]} steps", reuse_table(results)]) + "\n"


# ------------------------------------------------------------------------------------------------------------
# The picture


def draw(results: SearchResults, theme: Theme, figure: Figure) -> None:
    """Draw the expected best of k trials after the first rung, left, and the losses of every rung, right."""
    first = results.search.rungs[0]
    titles = "expected best loss of k trials", "losses of all rungs"
    left, right = two_plots(figure, theme, titles, (f"k trials of {first} steps", "steps of the schedule"))
    for optimizer in OPTIMIZERS:
        draw_best(left, theme.colors[optimizer], NAMES[optimizer], first_rung(results, optimizer))
        draw_rungs(right, theme.colors[optimizer], NAMES[optimizer], results, optimizer)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
    right.set_ylim(1.5, 3.6)
    finish(left, theme, [2**i for i in range(int(math.log2(results.search.trials)) + 1)])
    finish(right, theme, results.rungs("adamw"), legend=False)


def draw_best(axes: Axes, color: str, name: str, losses: list[float]) -> None:
    sizes = range(1, len(losses) + 1)
    bands = [best_interval(losses, k) for k in sizes]
    axes.fill_between(sizes, *zip(*bands), color=color, alpha=0.22, linewidth=0)
    axes.plot(sizes, [expected_best(losses, k) for k in sizes], color=color, linewidth=3, label=name)


def draw_rungs(axes: Axes, color: str, name: str, results: SearchResults, optimizer: str) -> None:
    points = [(steps, loss) for steps in results.rungs(optimizer)
              for loss in results.losses(optimizer, steps).values() if math.isfinite(loss)]
    best = {steps: min(loss for at, loss in points if at == steps) for steps, _ in points}
    axes.scatter(*zip(*points), color=color, s=22, alpha=0.6, linewidth=0)
    axes.plot([*best], [*best.values()], color=color, linewidth=3, label=f"best of {name}")
