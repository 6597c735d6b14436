"""The rules of a submission. Each is a small function from a Submission to its verdict and the evidence."""
import ast
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from records import statistics
from records.difference import differences, summed
from records.lines import Details, details_of
from records.logs import LogFile, RunFacts, ValPoint, losses_of, times_of
from records.text import listed, printable, short_name
from records.tracks import Track

PASS, FAIL, WAIVED, NOT_APPLICABLE = "pass", "fail", "waived", "n/a"
SEED_VALUE = re.compile(r"(seed\w{0,20}\s{0,9}(?::\s{0,9}int\s{0,9})?[=(]\s{0,9})\d{1,18}", re.I)
NOT_TRAINING = {"seed", "log_dir", "save_every", "save_final",
                "wandb"}  # settings that do not change what is trained


def last_point(run: RunFacts) -> ValPoint | None:
    return run.val_points[-1] if run.val_points else None


def changed_settings(before: dict, after: dict) -> list[tuple]:
    """(name, before, after) of the settings that change what is trained."""
    return [(name, before.get(name), after.get(name)) for name in {**before, **after}
            if name not in NOT_TRAINING and before.get(name) != after.get(name)]


@dataclass(frozen=True)
class Submission:
    """Runs for which something is claimed, and what a person says of them."""
    track: Track
    logs: list[LogFile]
    baseline: list[LogFile] = field(default_factory=list)
    excluded: list[tuple[LogFile, str]] = field(default_factory=list)  # with the reason
    step: int | None = None  # whose validation counts; None: the last
    planned: int | None = None  # runs that were planned before the first one
    waivers: dict[str, str] = field(default_factory=dict)  # reason by rule

    @property
    def runs(self) -> list[RunFacts]:
        return [run for log in self.logs for run in log.runs]

    @property
    def baseline_runs(self) -> list[RunFacts]:
        return [run for log in self.baseline for run in log.runs]

    @property
    def counted(self) -> list[LogFile]:
        return [*self.logs, *self.baseline]

    @property
    def all_logs(self) -> list[LogFile]:
        return [*self.counted, *(log for log, _ in self.excluded)]

    @cached_property
    def details(self) -> dict[Path, Details]:
        return {log.path: details_of(log) for log in self.all_logs}

    def point(self, run: RunFacts) -> ValPoint | None:
        """The validation that counts."""
        return last_point(run) if self.step is None else run.at(self.step)

    def loss_test(self, runs: list[RunFacts] | None = None) -> statistics.RuleResult:
        """The track's loss rule on these runs, or on all that count."""
        points = [self.point(run) for run in (self.runs if runs is None else runs)]
        return statistics.loss_rule(self.track, losses_of(points))

    def speed(self) -> statistics.Estimate:
        """Times of the runs, in ms, against those of the baseline at its last step."""
        return statistics.welch(times_of([self.point(run) for run in self.runs]),
                                times_of([last_point(run) for run in self.baseline_runs]))


@dataclass(frozen=True)
class Verdict:
    rule: str
    verdict: str  # PASS, FAIL, WAIVED or NOT_APPLICABLE
    evidence: str
    reason: str = ""  # of a waiver


def names(items: Iterable[RunFacts | LogFile]) -> str:
    return listed(short_name(item.run_id if isinstance(item, RunFacts) else item.path.stem)[:60]
                  for item in items)


def judged(wrong: Iterable[str], good: str) -> tuple[str, str]:
    wrong = list(wrong)
    return (FAIL, listed(wrong, between="; ")) if wrong else (PASS, good)


def same(runs: Iterable, value: Callable, plural: str = "runs") -> tuple[str, str]:
    """Whether a fact is the same in all.

    Evidence: each value with those that have it, the largest group first.
    """
    groups = {}
    for run in runs:
        groups.setdefault(value(run), []).append(run)
    known = {key: "not stated" if key is None else str(key)[:120] for key in groups}
    if set(groups) <= {None}:
        return NOT_APPLICABLE, "the logs do not say"
    (most, members), *others = sorted(groups.items(), key=lambda group: -len(group[1]))
    if not others:
        return PASS, f"{known[most]} in all {len(members)} {plural}"
    return FAIL, listed([f"{known[most]} in {len(members)} {plural}",
                         *(f"{known[key]} in {names(few)}" for key, few in others)], between="; ")


# The first line of each docstring is the manual. An asterisk: a person may waive it.


def intact_logs(s: Submission):
    """Every log is whole: nothing is cut, binary, unreadable or repeated in it."""
    incomplete = "the run is incomplete"  # final-validation says that
    wrong = [f"{names([log])}: {problem}" for log in s.counted for problem in log.problems
             if not problem.startswith(incomplete)]
    return judged(wrong, f"{len(s.counted)} logs")


def consistent_lines(s: Submission):
    """The lines of a log agree: no step is missing, times never fall, averages are time / steps."""
    details = [(log, s.details[log.path]) for log in s.counted]
    wrong = [f"{names([log])}: {text}" for log, found in details for text in found.contradictions]
    return judged(wrong, f"{sum(found.num_training for _, found in details):,} training lines")


def right_track(s: Submission):
    """The settings in the logs are those of this track, with the values that it fixes."""
    if not any(run.config for run in s.runs):
        return NOT_APPLICABLE, "the logs hold no settings"
    wrong = [run for run in s.runs if run.config.get("track") != s.track.name]
    if wrong:
        return FAIL, f"expected {s.track.name}, found another in {names(wrong)}"
    changed = [f"{name} {run.config.get(name)} in {names([run])}, the track has {value}"
               for name, value in s.track.fixed.items() for run in s.runs if run.config.get(name) != value]
    return judged(changed, s.track.name)


def same_source(s: Submission):
    """* Every log embeds its source, the same in all runs but for the value of a seed."""
    if bare := [log for log in s.logs if not log.sources]:
        return FAIL, f"no source in {names(bare)}"
    groups = {}
    for log in s.logs:
        code = {name: SEED_VALUE.sub(r"\1", text) for name, text in log.sources.items()}
        groups.setdefault(repr(code), []).append(log)
    (first, *_), *others = sorted(groups.values(), key=len, reverse=True)
    return judged((f"{names(group)}: {summed(differences(first.sources, group[0].sources))}"
                   for group in others),
                  f"{', '.join(first.sources)} in all {len(s.logs)} logs")


def same_settings(s: Submission):
    """All runs have as many steps and the same settings, those aside that do not change the training."""
    def settings(run):
        trained_with = {key: value for key, value in run.config.items() if key not in NOT_TRAINING}
        return {"total_steps": run.total_steps, **trained_with}
    keys = {key: None for run in s.runs for key in settings(run)}
    found = {key: same(s.runs, lambda run: repr(settings(run).get(key))) for key in keys}
    wrong = [f"{key}: {evidence}" for key, (verdict, evidence) in found.items() if verdict == FAIL]
    return judged(wrong, f"{len(keys)} settings")


def same_validations(s: Submission):
    """All runs are validated at the same steps, so that no line is missing."""
    return same(s.runs, lambda run: ", ".join(str(point.step) for point in run.val_points) or None)


def same_data(s: Submission):
    """All runs train on the same shards, by their fingerprint in the logs."""
    return same(s.logs, lambda log: s.details[log.path].training_data, "logs")


def validation_data(s: Submission):
    """Runs and baseline are judged on the same tokens, by their hash: those of the track, where known."""
    hashes = {log.path: s.details[log.path].validation_data for log in s.counted}
    known = s.track.val_sha256
    if known and (wrong := [log for log in s.counted if hashes[log.path] not in (known, None)]):
        found = (hashes[wrong[0].path] or "")[:12]
        return FAIL, f"expected tokens with SHA-256 {known[:12]}..., found {found}... in {names(wrong)}"
    return same(s.counted, lambda log: hashes[log.path], "logs")


def same_hardware(s: Submission):
    """Runs and baseline have the same model of GPU or CPU, as many of them, and as many ranks."""
    def machine(run):
        ranks = f", {run.world_size} ranks" if run.world_size else ""
        return run.hardware and run.hardware + ranks
    return same([*s.runs, *s.baseline_runs], machine)


def same_torch(s: Submission):
    """* All runs have the same build of torch; so have all of the baseline."""
    verdict = same(s.runs, torch_build)
    baseline = same(s.baseline_runs, torch_build)
    return baseline if baseline[0] == FAIL != verdict[0] else verdict


def torch_build(run: RunFacts) -> str | None:
    triton = f", Triton {run.triton}" if run.triton else ""
    return run.torch and f"torch {run.torch}, CUDA {run.cuda}{triton}"


def final_validation(s: Submission):
    """Every run is validated at the step that counts; where that is the last one, the run is complete."""
    wrong = [f"{names([log])}: no run in it" for log in s.counted if not log.runs]
    counting = [(run, s.point(run)) for run in s.runs]
    counting += [(run, last_point(run)) for run in s.baseline_runs]
    for run, point in counting:
        if point is None:
            wrong.append(f"{names([run])}: no validation" + ("" if s.step is None else f" at step {s.step}"))
        elif s.track.claim_step == "last" and run.total_steps is not None and not run.complete:
            wrong.append(f"{names([run])}: ends at step {run.final_step} of {run.total_steps}")
    return judged(wrong, f"{len(counting)} runs")


def validation_tokens(s: Submission):
    """Every run is validated on as many tokens as the track asks."""
    stated = [run for run in [*s.runs, *s.baseline_runs] if run.val_tokens is not None]
    if not stated:
        return NOT_APPLICABLE, f"the logs do not say; the track asks for {s.track.val_tokens:,}"
    wrong = [f"{names([run])}: {run.val_tokens:,}, expected {s.track.val_tokens:,}"
             for run in stated if run.val_tokens != s.track.val_tokens]
    return judged(wrong, f"{s.track.val_tokens:,} in {len(stated)} runs")


def distinct_curves(s: Submission):
    """No two runs share their losses or times: a copy with another header or last line still has the rest.

    A run and one of the baseline with its seed may share losses: a change that only saves time leaves them.
    """
    runs = [run for log in s.all_logs for run in log.runs if run.val_points]
    candidates = {id(run) for log in s.logs for run in log.runs}

    def paired(a: RunFacts, b: RunFacts) -> bool:
        other_side = (id(a) in candidates) != (id(b) in candidates)
        other_times = times_of(a.val_points) != times_of(b.val_points)
        return other_side and other_times and a.seed is not None and a.seed == b.seed

    curves = [curve(run) for run in runs]
    found = []
    for (i, j), shared in overlaps(curves).items():
        many = shared >= 3 and 4 * shared >= 3 * len(curves[j])  # by chance once in 10,000 pairs
        if (many or curves[i] == curves[j]) and not paired(runs[i], runs[j]):
            found.append(f"{shared} of {len(curves[j])} losses are the same in {names([runs[i], runs[j]])}")

    clocks = [s.details[log.path].clock for log in s.all_logs]
    for (i, j), shared in overlaps(clocks).items():
        if shared >= 10 and 2 * shared > len(clocks[j]):
            both = names([s.all_logs[i], s.all_logs[j]])
            found.append(f"{shared} of {len(clocks[j])} times are the same in {both}")
    return judged(found, f"{len(runs)} runs")


def overlaps(sets: list[Iterable]) -> Counter:
    """For pairs of sets that share something, i < j, how much.

    What 50 sets share is not compared with further ones, so that many copies take linear time.
    """
    shared, holders = Counter(), defaultdict(list)
    for j, items in enumerate(sets):
        for item in items:
            shared.update((i, j) for i in holders[item])
            if len(holders[item]) < 50:
                holders[item].append(j)
    return shared


def curve(run: RunFacts) -> set:
    """(step, loss) after step 0; of a run with a single one its time too, since one loss can be the
    same by chance."""
    points = [point for point in run.val_points if point.step > 0]
    found = {(point.step, point.val_loss) for point in points}
    if len(points) == 1:
        found.add(points[0].train_time_ms)
    return found


def distinct_seeds(s: Submission):
    """* Every run logs its seed, and no two have the same."""
    groups = {}
    for run in s.runs:
        groups.setdefault(run.seed, []).append(run)
    if None in groups:
        applies = len(groups) > 1 or any(run.config for run in s.runs)
        return FAIL if applies else NOT_APPLICABLE, f"no seed in {names(groups[None])}"
    wrong = [f"seed {seed} in {names(group)}" for seed, group in groups.items() if len(group) > 1]
    return judged(wrong, ", ".join(map(str, sorted(groups)))[:120])


def compile_flags(s: Submission):
    """The embedded source sets no compile flag that the track bans, comments and docstrings aside."""
    if not s.track.banned_flags:
        return NOT_APPLICABLE, "the track bans none"
    sources = {(name, text): log for log in s.logs for name, text in log.sources.items()}
    pattern = re.compile("|".join(s.track.banned_flags))
    wrong = []
    for (name, text), log in sources.items():
        if pattern.search(text) and (match := pattern.search(code_of(text))):  # the second search is slow
            wrong.append(f"{' '.join(match[0].split())} in {name} of {names([log])}")
    return judged(wrong, f"{len(sources)} source files")


def code_of(source: str) -> str:
    """Python source without comments and docstrings; all of it where it cannot be parsed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in its strings
        try:
            tree = ast.parse(source)
            for node in ast.walk(tree):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    node.value = ast.Constant(None)
            return ast.unparse(tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return source


def not_resumed(s: Submission):
    """No run went on from a checkpoint."""
    resumed = [log for log in s.counted if s.details[log.path].resumed]
    return (FAIL, f"resumed: {names(resumed)}") if resumed else (PASS, f"{len(s.counted)} logs")


def planned_runs(s: Submission):
    """* There are as many runs, excluded ones included, as were planned: none was added after a look."""
    n = len(s.runs) + sum(len(log.runs) for log, _ in s.excluded)
    if s.planned is not None:
        return judged([f"planned {s.planned}, found {n}"] if n != s.planned else [], f"{n} of {n}")

    return NOT_APPLICABLE, f"no plan is stated for the {n} runs"


def exclusions(s: Submission):
    """* Runs are left out for a stated reason, and the loss rule holds with those of one source put back."""
    if not s.excluded:
        return NOT_APPLICABLE, "no run is left out"
    if unexplained := [log for log, reason in s.excluded if not reason]:
        return FAIL, f"no reason to leave out {names(unexplained)}"

    alike = {(run.source_sha256, run.world_size) for run in s.runs}
    back = [run for log, _ in s.excluded for run in log.runs
            if (run.source_sha256, run.world_size) in alike and says_something(run, s)]
    evidence = listed((f"{names([log])}: {reason}" for log, reason in s.excluded), between="; ")
    if back and s.loss_test().passes and not s.loss_test([*s.runs, *back]).passes:
        return FAIL, f"the loss rule does not hold with {names(back)} put back ({evidence})"
    return PASS, evidence


def says_something(run: RunFacts, s: Submission) -> bool:
    """Whether an excluded run tells anything about its recipe: it came to the step that counts, or
    it diverged."""
    point = s.point(run)
    return point is not None and (run.complete or s.step is not None or not math.isfinite(point.val_loss))


def loss_rule(s: Submission):
    """* The mean loss is below the target by the test of the track."""
    result = s.loss_test()
    if result.p is None:
        return FAIL, result.why
    sd = "" if result.sd is None else f" ± {result.sd:.5f}"
    return PASS if result.passes else FAIL, (
        f"{result.mean:.5f}{sd} (n = {result.n}) against {s.track.target:g}: p = {result.p:.2g}, "
        f"{s.track.alpha:g} is asked")


def faster_than_baseline(s: Submission):
    """* Where time counts: the runs are faster than the baseline on the same machine, by Welch's test."""
    if s.track.ranked_by != "time":
        return NOT_APPLICABLE, "the track counts steps"
    if not s.baseline:
        return FAIL, "no baseline: run the record before on the same machine, or say why there is none"
    result = s.speed()
    if result.p is None:
        return FAIL, result.why
    return PASS if result.p < s.track.alpha else FAIL, (
        f"{result.value / 1000:+.3f} s against the baseline (95 % interval {result.low / 1000:+.3f} to "
        f"{result.high / 1000:+.3f}): p = {result.p:.2g}, {s.track.alpha:g} is asked")


RULES = {rule.__name__.replace("_", "-"): rule for rule in (
    intact_logs, consistent_lines, right_track,
    same_source, same_settings, same_validations, same_data, validation_data, same_hardware, same_torch,
    final_validation, validation_tokens, distinct_curves, distinct_seeds,
    compile_flags, not_resumed, planned_runs, exclusions, loss_rule, faster_than_baseline,
)}
WAIVABLE = {name for name, rule in RULES.items() if rule.__doc__.startswith("*")}


def judge(s: Submission) -> list[Verdict]:
    """Every rule on a submission; a failure is waived where a person gave a reason that counts."""
    found = []
    for name, rule in RULES.items():
        verdict, evidence = rule(s)
        reason = s.waivers.get(name, "") if verdict == FAIL and can_be_waived(name, s) else ""
        found.append(Verdict(name, WAIVED if reason else verdict, plain(evidence), plain(reason)))
    return found


def can_be_waived(name: str, s: Submission) -> bool:
    """Whether a reason counts: for the loss rule one that begins with a kind of change that the track
    exempts, for speed only where there is no baseline to measure it by."""
    if name == "loss-rule":
        return s.waivers.get(name, "").startswith(s.track.waived_for)
    if name == "faster-than-baseline":
        return not s.baseline
    return name in WAIVABLE


def plain(text: str) -> str:
    """Text out of a log for a terminal or a README: one line of bounded length, nothing invisible in it."""
    return printable(text[:1000])
