"""The rules of a submission. Each is a small function from a Submission to its verdict and the evidence."""
import ast
import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations

from records import statistics
from records.difference import differences, summed
from records.formatting import listed, printable, short_name
from records.logs import LogFile, RunFacts, ValPoint
from records.tracks import Track

PASS, FAIL, WAIVED, NOT_APPLICABLE = "pass", "fail", "waived", "n/a"
SEED_VALUE = re.compile(r"(seed\w{0,20}\s{0,9}(?::\s{0,9}int\s{0,9})?[=(]\s{0,9})\d{1,18}", re.I)
NOT_TRAINING = {"seed", "log_dir", "save_every", "save_final",
                "wandb"}  # settings that do not change what is trained


def runs_of(logs: Iterable[LogFile]) -> list[RunFacts]:
    return [run for log in logs for run in log.runs]


def changed_settings(before: dict, after: dict) -> list[tuple]:
    """Return (name, before, after) of the settings that change what is trained."""
    return [(name, before.get(name), after.get(name)) for name in {**before, **after}
            if name not in NOT_TRAINING and before.get(name) != after.get(name)]


@dataclass(frozen=True)
class Submission:
    """Runs for which something is claimed, and what a person says of them."""
    track: Track | None  # None where runs are only compared
    logs: list[LogFile]
    baseline: list[LogFile] = field(default_factory=list)
    step: int | None = None  # whose validation counts; None: the last
    planned: int | None = None  # runs that were planned before the first one
    waivers: dict[str, str] = field(default_factory=dict)  # reason by rule

    @property
    def runs(self) -> list[RunFacts]:
        return runs_of(self.logs)

    @property
    def baseline_runs(self) -> list[RunFacts]:
        return runs_of(self.baseline)

    @property
    def counted(self) -> list[LogFile]:
        return [*self.logs, *self.baseline]

    def point(self, run: RunFacts) -> ValPoint | None:
        """The validation that counts of a run: at the claimed step, or at its end."""
        return run.end if self.step is None else run.at(self.step)

    def losses(self, runs: Iterable[RunFacts]) -> list[float]:
        """The losses of runs at the validation that counts, nan where there is none."""
        return [math.nan if point is None else point.val_loss for point in map(self.point, runs)]

    def loss_test(self) -> statistics.RuleResult:
        """The track's loss rule on all runs."""
        return statistics.loss_rule(self.track, self.losses(self.runs))

    def speed(self) -> statistics.Estimate:
        """Seconds of the runs less those of the baseline."""
        return statistics.welch(seconds_of(map(self.point, self.runs)),
                                seconds_of(run.end for run in self.baseline_runs))


def seconds_of(points: Iterable[ValPoint | None]) -> list[float]:
    """Training seconds of validations, nan where there are none."""
    return [math.nan if point is None or point.train_time_ms is None else point.train_time_ms / 1000
            for point in points]


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


def same(runs: Iterable[RunFacts], value: Callable) -> tuple[str, str]:
    """Judge whether a fact is the same in all.

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
        return PASS, f"{known[most]} in all {len(members)} runs"
    return FAIL, listed([f"{known[most]} in {len(members)} runs",
                         *(f"{known[key]} in {names(few)}" for key, few in others)], between="; ")


# The first line of each docstring is the manual. An asterisk: a person may waive it.


def intact_logs(s: Submission):
    """Every log is whole, its lines agree: nothing is cut, binary or missing, no time falls or is made up."""
    incomplete = "the run is incomplete"  # final-validation says that
    wrong = [f"{names([log])}: {problem}" for log in s.counted for problem in log.problems
             if not problem.startswith(incomplete)]
    return judged(wrong, f"{len(s.counted)} logs")


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


def same_data(s: Submission):
    """All runs train on the same shards, by their fingerprint in the logs."""
    return same(s.runs, lambda run: run.training_data)


def validation_data(s: Submission):
    """Runs and baseline are judged on the same tokens, by number and hash: those of the track."""
    runs = [*s.runs, *s.baseline_runs]
    known = (s.track.val_tokens, s.track.val_sha256) if s.track else (None, None)
    wrong = []
    for run in runs:
        for name, wanted, found in zip(("tokens", "SHA-256"), known, (run.val_tokens, run.validation_data)):
            if None not in (wanted, found) and found != wanted:
                wrong.append(f"{name} {wanted}, found {found} in {names([run])}")
    if wrong:
        return FAIL, "expected " + listed(wrong, between="; ")
    return same(runs, lambda run: run.validation_data)


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
    counting = [(run, s.point(run)) for run in s.runs] + [(run, run.end) for run in s.baseline_runs]
    for run, point in counting:
        if point is None:
            wrong.append(f"{names([run])}: ends at step {run.final_step} of {run.total_steps}"
                         + ("" if s.step is None else f", without a validation at step {s.step}"))
    return judged(wrong, f"{len(counting)} runs")


def distinct_curves(s: Submission):
    """No two runs share their losses: a copy with another header or last line still has the rest.

    A run and one of the baseline with its seed may share losses: a change that only saves time leaves them.
    """
    pairs = [*combinations(s.runs, 2), *combinations(s.baseline_runs, 2)]
    pairs += [(a, b) for a in s.runs for b in s.baseline_runs if not are_pair(a, b)]
    curves = {id(run): curve(run) for run in runs_of(s.counted)}
    found = []
    for a, b in pairs:
        of_a, of_b = curves[id(a)], curves[id(b)]
        shared = len(of_a & of_b)
        many = shared >= 3 and 4 * shared >= 3 * len(of_b)  # by chance once in 10,000 pairs
        if of_b and (many or of_a == of_b):
            found.append(f"{shared} of {len(of_b)} losses are the same in {names([a, b])}")
        elif len(clock(a)) >= 3 and clock(a) == clock(b):
            found.append(f"all times are the same in {names([a, b])}")
    return judged(found, f"{len(curves)} runs")


def are_pair(a: RunFacts, b: RunFacts) -> bool:
    """Return whether both have the same seed and other times."""
    times_of_a, times_of_b = ([point.train_time_ms for point in run.val_points] for run in (a, b))
    return a.seed is not None and a.seed == b.seed and times_of_a != times_of_b


def curve(run: RunFacts) -> frozenset:
    """Return (step, loss) after step 0; a single one, which can be equal by chance, with its time."""
    points = [point for point in run.val_points if point.step > 0]
    found = {(point.step, point.val_loss) for point in points}
    if len(points) == 1:
        found.add(points[0].train_time_ms)
    return frozenset(found)


def clock(run: RunFacts) -> list[float]:
    """The times of the validations after step 0, which no two runs share to the millisecond."""
    return [point.train_time_ms for point in run.val_points if point.step and point.train_time_ms is not None]


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
    resumed = [run for run in [*s.runs, *s.baseline_runs] if run.resumed]
    return judged([f"resumed: {names(resumed)}"] if resumed else [], f"{len(s.counted)} logs")


def planned_runs(s: Submission):
    """* There are as many runs as were planned: none was added after a look at the others, or left out."""
    n = len(s.runs)
    if s.planned is None:
        return NOT_APPLICABLE, f"no plan is stated for the {n} runs"
    return judged([f"planned {s.planned}, found {n}"] if n != s.planned else [], f"{n} of {n}")


def loss_rule(s: Submission):
    """* The mean loss is below the target by the test of the track."""
    result = s.loss_test()
    return PASS if result.passes else FAIL, result.said


def faster_than_baseline(s: Submission):
    """* Where time counts: the runs are faster than the baseline on the same machine, by Welch's test."""
    if s.track.ranked_by != "time":
        return NOT_APPLICABLE, "the track counts steps"
    if not s.baseline:
        return FAIL, "no baseline: run the record before on the same machine, or say why there is none"
    found = s.speed()
    if found.why:
        return FAIL, found.why
    return PASS if found.p < s.track.alpha else FAIL, (
        f"seconds against the baseline: {found:+.3f}, p = {found.p:.2g}, {s.track.alpha:g} is asked")


AMONG_RUNS = intact_logs, same_source, same_settings, final_validation, distinct_curves, distinct_seeds
AMONG_GROUPS = same_hardware, same_torch, validation_data
RULES = {rule.__name__.replace("_", "-"): rule for rule in (
    right_track, *AMONG_RUNS, *AMONG_GROUPS, same_data, compile_flags, not_resumed, planned_runs, loss_rule,
    faster_than_baseline,
)}
WAIVABLE = {name for name, rule in RULES.items() if rule.__doc__.startswith("*")}


def judge(s: Submission) -> list[Verdict]:
    """Judge a submission by every rule; a failure is waived where a person gave a reason that counts."""
    found = []
    for name, rule in RULES.items():
        verdict, evidence = rule(s)
        reason = s.waivers.get(name, "") if verdict == FAIL and can_be_waived(name, s) else ""
        found.append(Verdict(name, WAIVED if reason else verdict, printable(evidence), printable(reason)))
    return found


def can_be_waived(name: str, s: Submission) -> bool:
    """Return whether a reason counts: for the loss rule one that begins with a kind of change that the track
    exempts, for speed only where there is no baseline to measure it by."""
    if name == "loss-rule":
        return s.waivers.get(name, "").startswith(s.track.waived_for)
    if name == "faster-than-baseline":
        return not s.baseline
    return name in WAIVABLE


def doubts(groups: dict[str, list[LogFile]], track: Track | None = None,
           step: int | None = None) -> Iterable[str]:
    """Yield what makes a comparison of groups doubtful: rules broken in a group, or by all together."""
    for name, members in groups.items():
        for rule in AMONG_RUNS:
            verdict, evidence = rule(Submission(track, members, step=step))
            if verdict == FAIL:
                yield f"{rule.__name__.replace('_', '-')} of {name}: {evidence}"
    everything = Submission(track, [log for members in groups.values() for log in members])
    for rule in AMONG_GROUPS:
        verdict, evidence = rule(everything)
        if verdict == FAIL:
            yield f"{rule.__name__.replace('_', '-')}: {evidence}"
