"""Groups of runs, as compare sees them, and which validation counts of each run.

A PATH that is a log is a group of its own; the logs in a folder are a group of seeds, those of each subfolder
another one. In the folder of an A/B experiment the baseline comes first, as its plan says which arm that is.
"""
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.errors import UsageError
from records import logs
from records.experiment import ROLES, role_of
from records.logs import LogFile, RunFacts, ValPoint, losses_of, times_of
from records.text import listed, short_name
from records.tracks import Track

NAME_LIMIT = 40  # characters of the name of a group

FACTS = {  # what runs that are compared should have in common
    "hardware": lambda run: run.hardware,
    "torch": lambda run: run.torch,
    "world size": lambda run: run.world_size,
    "tokens of a validation": lambda run: run.val_tokens,
}
# what seeds of one recipe have in common beside these
LENGTH = {"number of steps": lambda run: run.total_steps}


@dataclass
class RunGroup:
    name: str  # to show: printable, short
    logs: list[LogFile]
    runs: list[RunFacts]  # those with a validation, copies left out
    notes: list[str]  # what is odd about the group

    @property
    def sources(self) -> dict[str, str]:
        """Source files by name, of the first log that embeds some."""
        return next((log.sources for log in self.logs if log.sources), {})


@dataclass
class Counted:
    """Loss and time of each run of a group at the step that counts, nan where a run has none."""
    step: int | None  # None where the last steps of the runs differ
    losses: list[float]
    seconds: list[float]
    notes: list[str]


def find_groups(paths: list[str]) -> tuple[list[RunGroup], list[str]]:
    """Groups in the order of the paths, and for each file without a run why it is left out.

    UsageError where there is no group.
    """
    members, left_out = {}, []
    for path in map(Path, paths):
        for file in sorted(logs.find([path]), key=folder_before_subfolders):
            place = os.path.abspath(file.parent if path.is_dir() else file)
            files = members.setdefault(place, {})
            if os.path.abspath(file) in files:
                continue
            try:
                files[os.path.abspath(file)] = log = logs.read(file)
            except UsageError as e:  # one file that cannot be opened does not hide the others
                left_out.append(f"{file} is left out: {e}")
                continue
            if not any(run.val_points for run in log.runs):
                left_out.append(f"{file} is left out: {'; '.join(log.problems)}")

    groups = {place: make_group([*files.values()]) for place, files in members.items()}
    groups = {place: group for place, group in groups.items() if group.runs}
    if not groups:
        raise UsageError(f"{paths[0]}: expected logs with validations, found none; check the path")
    common = os.path.commonpath([os.path.dirname(place) for place in groups])
    for place, group in groups.items():
        group.name = name_of(place, common)
    return [*groups.values()], left_out


def folder_before_subfolders(file: Path) -> tuple[Path, Path]:
    """The order of logs; of an A/B experiment the baseline, b, comes before the candidate, a."""
    folder = file.parent
    if role_of(folder):
        other, = ROLES.keys() - {folder.name}
        folder = folder.with_name(other)
    return folder, file


def name_of(place: str, common: str) -> str:
    """A short name for a folder or a file below a common folder."""
    name = os.path.relpath(place, common)
    if os.path.isfile(place):
        name = os.path.splitext(name)[0]
    elif role := role_of(Path(place)):
        name += f" ({role})"
    elif os.path.isfile(os.path.join(os.path.dirname(place), logs.RECORD_FILE)):
        name = os.path.dirname(name) or os.path.basename(os.path.dirname(place))
    name = short_name(name)
    return name if len(name) <= NAME_LIMIT else "…" + name[1 - NAME_LIMIT:]  # paths differ at their end


def make_group(members: list[LogFile], name: str = "") -> RunGroup:
    """The group of all runs in these logs. A run that is there twice, to the last digit, counts once."""
    distinct, copies, notes = {}, [], []
    for run in (run for log in members for run in log.runs if run.val_points):
        if distinct.setdefault(repr(run.val_points), run) is not run:
            copies.append(run.run_id)
    runs = [*distinct.values()]
    if copies:
        notes.append("Counted once, for they are the same as another run to the millisecond: "
                     f"{listed(copies)}.")

    for name_of_fact, fact in {**FACTS, **LENGTH}.items():
        values = Counter(str(fact(run)) for run in runs)
        if len(values) > 1:
            found = listed(f"{value} ({n} runs)" for value, n in values.most_common())
            notes.append(f"Runs differ in {name_of_fact}: {found}.")
    if (number := len({run.source_sha256 for run in runs})) > 1:
        notes.append(f"The runs have {number} different sources; the first one is compared.")
    seeds = Counter(run.seed for run in runs if run.seed is not None)
    if repeated := [str(seed) for seed, n in seeds.items() if n > 1]:
        notes.append(f"Runs share a seed, and the rule wants independent ones: {listed(repeated)}.")
    return RunGroup(name, members, runs, notes)


def count(group: RunGroup, track: Track | None, step: int | None = None) -> Counted:
    """What counts of each run: the validation at a step, or the last one of a run that came to its end.

    UsageError where the track wants the same step in all runs and none is named.
    """
    steps = {run.final_step for run in group.runs}
    stated = track is not None and track.claim_step == "stated"
    if step is None and stated and len(steps) > 1:
        found = listed(map(str, sorted(steps)))
        raise UsageError(f"expected runs that end at the same step, found {found}; say which step counts: "
                         "--step=N")

    points, notes = [], []
    for run in group.runs:
        points.append(counting_point(run, step, stated))
        if points[-1] is None:
            where = "its last step" if step is None else f"step {step}"
            notes.append(f"{run.run_id} has no validation at {where} and ends at {run.final_step} of "
                         f"{run.total_steps}: name the logs that count to leave it out.")
    if step is None and len(steps) == 1:
        step, = steps
    return Counted(step, losses_of(points), [ms / 1000 for ms in times_of(points)], notes)


def counting_point(run: RunFacts, step: int | None, stated: bool) -> ValPoint | None:
    if step is not None:
        return run.at(step)
    reached_its_end = run.complete or run.total_steps is None  # llm.c does not print the total
    return run.val_points[-1] if stated or reached_its_end else None
