"""Compare runs: the loss rule of their track, time and steps to a loss, losses step by step, what differs.

A PATH that is a log is a group of its own; the logs in a folder are a group of seeds, those of each subfolder
another one. The first group is what the others are compared with; of an A/B experiment that is its baseline,
and with --history a record of the public speedrun. Numbers are mean ± standard deviation over the runs of a
group; intervals are of 95 %, probabilities one-sided. All runs count: a set that holds a run without the
validation that counts cannot be judged, and to leave one out is to name the logs that stay. Between
validations a curve is a straight line.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import UsageError
from records import charts, history, rules, statistics
from records.difference import differences, summed
from records.formatting import Grid, above_zero, printable, terminal
from records.groups import RunGroup, find_groups
from records.logs import RunFacts
from records.rules import Submission
from records.tracks import TRACKS, Track, only

HELP = "groups of runs side by side: loss rule, speed-up, loss by step, changes of settings and source"
EXAMPLE = ("python -m records compare records/track_0_laptop/2026-11-22_AdamW "
           "records/track_0_laptop/2026-11-22_Muon")
ROWS = 12  # most rows of a table of losses


@dataclass
class Comparison:
    """What is said of groups of runs, as text."""
    groups: list[RunGroup]
    track: Track | None
    target: float
    summary: Grid
    warnings: list[str]
    rules: list[str]  # the loss rule of each group
    by_step: Grid
    against: list[tuple[RunGroup, list[str]]]  # sentences on each other group against the first


def add_group_arguments(parser):
    """Add the arguments that compare and report share."""
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="a log, or a folder of logs or of such folders")
    parser.add_argument("--track", choices=TRACKS, help="default: that of the first log")
    parser.add_argument("--target", type=above_zero, metavar="LOSS",
                        help="validation loss to reach (default: that of the track, or 3.28)")
    parser.add_argument("--step", type=int, metavar="N",
                        help="step whose validation counts (default: the last one)")
    parser.add_argument("--history", type=int, metavar="N",
                        help="is my loss normal? Compare with public record N of the track, or of track "
                             "small")


def add_arguments(parser):
    add_group_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE",
                        help=f"draw the curves; ends in {', '.join(charts.SUFFIXES)}")


def run(args) -> int:
    found = examine(args)
    if args.plot:
        charts.plot(found.groups, found.target, args.plot)
    console = terminal()
    found.summary.print(console)
    for warning in found.warnings:
        console.print(printable(f"warning: {warning}"), style="yellow")
    for rule in found.rules:
        console.print(printable(f"loss rule of track {found.track.name}, {rule}"))
    console.print("\nloss by step", style="bold")
    found.by_step.print(console)
    for group, sentences in found.against:
        console.print(f"\n{group.name} against {found.groups[0].name}", style="bold")
        for sentence in sentences:
            console.print(printable(f"  {sentence}"))
    return 0


def examine(args) -> Comparison:
    groups, left_out = find_groups(args.paths)
    track = TRACKS[args.track] if args.track else only(groups[0].logs[:1])
    target = args.target or (track or TRACKS["small"]).target
    warnings = [*rules.doubts(dict(groups), track, args.step), *left_out]
    loss_rules = []
    if track:
        loss_rules = [f"{group.name}: {Submission(track, group.logs, step=args.step).loss_test()}"
                      for group in groups]
    if args.history is not None:
        groups.insert(0, public_group(track, args.history))
    against = []
    for group in groups[1:]:
        sentences = [*gains(groups[0], group, target, args.step)]
        if args.history is not None:
            sentences.append(beside(groups[0], group))
        against.append((group, sentences))
    return Comparison(groups, track, target, summary(groups, target), warnings, loss_rules,
                      losses_by_step(groups), against)


def spread(values: list, form: str, factor: float = 1) -> str:
    """Return mean ± standard deviation of the values that are known."""
    mean, sd = statistics.mean_sd([factor * value for value in values if value is not None])
    return "-" if mean is None else f"{mean:{form}}" if sd is None else f"{mean:{form}} ± {sd:{form}}"


def summary(groups: list[RunGroup], target: float) -> Grid:
    rows = []
    for group in groups:
        runs = group.runs
        reached = [run.steps_to(target) for run in runs]
        ends = sorted({run.final_step for run in runs})
        rows.append([
            group.name,
            str(len(runs)),
            f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,} to {ends[-1]:,}",
            spread([run.final_val_loss for run in runs], ".4f"),
            spread([run.final_time_ms for run in runs], ",.2f", 1e-3),
            spread([run.step_avg_ms for run in runs], ",.2f"),
            f"{len(runs) - reached.count(None)} of {len(runs)}",
            spread([run.time_to(target) for run in runs], ",.2f", 1e-3),
            spread(reached, ",.1f"),
        ])
    titles = ["group", "runs", "steps", "final loss", "time, s", "ms/step", f"reach {target:g}", "after, s",
              "at step"]
    return Grid(titles, rows)


# Losses step by step

def shared_steps(group: RunGroup) -> list[int]:
    """Steps, after the first, at which every run has a validation."""
    steps = set.intersection(*({point.step for point in run.val_points} for run in group.runs))
    return sorted(steps - {0})


def losses_by_step(groups: list[RunGroup]) -> Grid:
    """Mean losses at the validations of the first group."""
    steps = shared_steps(groups[0])
    if len(steps) > ROWS:
        steps = [steps[k * (len(steps) - 1) // (ROWS - 1)] for k in range(ROWS)]
    columns = [[losses_at(steps, run) for run in group.runs] for group in groups]
    rows = []
    for k, step in enumerate(steps):
        losses = [[curve[k] for curve in curves] for curves in columns]
        rows.append([f"{step:,}", *("-" if np.isnan(of_group).any() else spread(of_group, ".4f")
                                    for of_group in losses)])
    return Grid(["step", *(group.name for group in groups)], rows)


def losses_at(steps: list[int], run: RunFacts) -> list[float]:
    """The loss of a run at each step, on a straight line between validations; nan where it has none."""
    points = run.val_points[len(run.val_points) > 1:]  # up to the second one a curve is no straight line
    return np.interp(steps, [point.step for point in points], [point.val_loss for point in points],
                     left=math.nan, right=math.nan).tolist()


# One group against another

def gains(first: RunGroup, group: RunGroup, target: float, step: int | None):
    """Yield sentences about what a group gains over the first one, and by what it may do so."""
    after, before = (Submission(None, side.logs, step=step) for side in (group, first))
    losses = statistics.welch(after.losses(after.runs), before.losses(before.runs))
    yield f"loss: {in_words(losses, '+.5f')}"
    yield speed_up(f"steps to {target:g}", first, group, lambda run: run.steps_to(target))
    verdict, _ = rules.same_hardware(Submission(None, group.logs, first.logs))
    if verdict == rules.FAIL:
        yield "times are not compared: they are of different hardware"
    else:
        times = [rules.seconds_of(map(side.point, side.runs)) for side in (after, before)]
        yield f"seconds: {in_words(statistics.welch(*times), '+.2f')}"
        yield speed_up(f"time to {target:g}", first, group, lambda run: run.time_to(target))
        yield f"speed-up in time of the whole run: {statistics.ratio(statistics.welch, *times[::-1]):.3f}"
    if first.sources and group.sources:
        yield f"source: {summed(differences(first.sources, group.sources)) or 'the same'}"
    if (old := first.runs[0].config) and (new := group.runs[0].config):
        changes = [f"{name} {json.dumps(value)[:60]} -> {json.dumps(now)[:60]}"
                   for name, value, now in rules.changed_settings(old, new)]
        yield "settings: " + (", ".join(changes) or "the same")


def in_words(found: statistics.Estimate, form: str) -> str:
    p = "" if found.why else f", below 0 with p = {found.p:.3g} (Welch's test)"
    return f"{found:{form}}{p}"


def speed_up(name: str, first: RunGroup, group: RunGroup, fact) -> str:
    before, after = ([fact(run) for run in side.runs] for side in (first, group))
    if missing := (before + after).count(None):
        return f"speed-up in {name}: unknown, {missing} of {len(before + after)} runs have none"
    return f"speed-up in {name}: {statistics.ratio(statistics.welch, before, after):.3f}"


# Public records

def public_group(track: Track | None, number: int) -> RunGroup:
    """The runs of a public record whose curves are kept in records/history, as a group."""
    name = track.name if track else "small"
    known = history.numbers_with_curves(name)
    if number not in known:
        choice = f"choose one from {known[0]} to {known[-1]}" if known else "the track has none: leave it out"
        raise UsageError(f"--history: expected the number of a public record of track {name} whose curve is "
                         f"kept, found {number}; {choice}, see records/README.md")
    return RunGroup(f"public record {number}", [history.as_log(name, number)])


def beside(public: RunGroup, group: RunGroup) -> str:
    """Say how far the mean loss of a group is from that of a public record at the validations of both."""
    steps = shared_steps(group)[1:]
    means = [np.mean([losses_at(steps, run) for run in side.runs], axis=0)
             for side in (group, public)] if steps else ([], [])
    gaps = {step: gap for step, gap in zip(steps, np.subtract(*means)) if math.isfinite(gap)}
    if not gaps:
        return "beside its curve: unknown, there is no validation after the first within it"
    widest = max(gaps, key=lambda step: abs(gaps[step]))
    last = max(gaps)
    return (f"beside its curve, at {len(gaps)} validations: {gaps[last]:+.4f} at step {last:,}, "
            f"{np.mean([*gaps.values()]):+.4f} on average, at most {gaps[widest]:+.4f} at step {widest:,}")
