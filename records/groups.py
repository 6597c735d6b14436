"""Groups of runs, as compare sees them.

A PATH that is a log is a group of its own; the logs in a folder are a group of seeds, those of each subfolder
another one. In the folder of an A/B experiment the baseline comes first, as its plan says which arm that is.
"""
import os
from pathlib import Path
from typing import NamedTuple

from data.errors import UsageError
from records import logs
from records.experiment import ROLES, role_of
from records.formatting import short_name
from records.logs import LogFile, RunFacts

NAME_LIMIT = 40  # characters of the name of a group


class RunGroup(NamedTuple):
    name: str  # to show: printable, short
    logs: list[LogFile]

    @property
    def runs(self) -> list[RunFacts]:
        """The runs with a validation."""
        return [run for log in self.logs for run in log.runs if run.val_points]

    @property
    def sources(self) -> dict[str, str]:
        """Source files by name, of the first log that embeds some."""
        return next((log.sources for log in self.logs if log.sources), {})


def find_groups(paths: list[str]) -> tuple[list[RunGroup], list[str]]:
    """Return groups in the order of the paths, and for each file without a run why it is left out. UsageError
    where there is no group."""
    members, left_out, seen = {}, [], set()
    for path in map(Path, paths):
        for file in sorted(logs.find([path]), key=folder_before_subfolders):
            if os.path.abspath(file) in seen:
                continue
            seen.add(os.path.abspath(file))
            log = logs.read(file)
            if any(run.val_points for run in log.runs):
                members.setdefault(os.path.abspath(file.parent if path.is_dir() else file), []).append(log)
            else:
                left_out.append(f"{file} is left out: {'; '.join(log.problems)}")
    if not members:
        raise UsageError(f"{paths[0]}: expected logs with validations, found none; check the path")
    common = os.path.commonpath([os.path.dirname(place) for place in members])
    return [RunGroup(group_name(place, common), found) for place, found in members.items()], left_out


def folder_before_subfolders(file: Path) -> tuple[Path, Path]:
    """The order of logs; of an A/B experiment the baseline, b, comes before the candidate, a."""
    folder = file.parent
    if role_of(folder):
        other, = ROLES.keys() - {folder.name}
        folder = folder.with_name(other)
    return folder, file


def group_name(place: str, common: str) -> str:
    """A short name for a folder or a file below a common folder."""
    name = os.path.relpath(place, common)
    if os.path.isfile(place):
        name = os.path.splitext(name)[0]
    elif role := role_of(Path(place)):
        name += f" ({role})"
    elif os.path.isfile(os.path.join(os.path.dirname(place), logs.RECORD_FILE)):
        record = os.path.dirname(name) or os.path.basename(os.path.dirname(place))
        inside = os.path.basename(place)
        name = record if inside == "runs" else f"{record} ({inside})"
    name = short_name(name)
    return name if len(name) <= NAME_LIMIT else "…" + name[1 - NAME_LIMIT:]  # paths differ at their end
