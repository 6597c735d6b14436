"""Groups of runs, as compare and report see them: a PATH that is a log is a group of its own; the logs in a folder are a group of
seeds, those of each subfolder another one."""
import os
import re
from dataclasses import dataclass
from pathlib import Path

from records import logs
from records.errors import RecordError

UUID = re.compile(r"([0-9a-f]{8})(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
NAME_LIMIT = 40  # characters of the name of a group


@dataclass
class Group:
    name: str  # to show: printable, short
    logs: list[logs.Log]
    runs: list[logs.Run]  # those with a validation

    @property
    def sources(self) -> dict[str, str]:
        """Source files by name, of the first log that embeds some."""
        return next((log.sources for log in self.logs if log.sources), {})


def short(name: str) -> str:
    """A name like that of our logs by its first 8 characters."""
    return UUID.sub(r"\1", logs.printable(name))


def find_groups(paths: list[str]) -> tuple[list[Group], list[tuple[str, str]]]:
    """Groups in the order of the paths, and (file, why) of each file without a run. RecordError where there is no group."""
    groups, left_out, seen = {}, [], set()
    for path in map(Path, paths):
        for file in sorted(logs.find([path]), key=lambda file: (file.parent, file)):  # a folder before its subfolders
            place = os.path.abspath(file.parent if path.is_dir() else file)
            if (place, os.path.abspath(file)) in seen:
                continue
            seen.add((place, os.path.abspath(file)))
            group = groups.setdefault(place, Group(place, [], []))
            try:
                log = logs.read(file)
            except RecordError as e:  # one file that cannot be opened does not hide the others
                left_out.append((os.fspath(file), str(e)))
                continue
            runs = [run for run in log.runs if run.val_points]
            group.logs.append(log)
            group.runs.extend(runs)
            if not runs:
                left_out.append((os.fspath(file), "; ".join(log.problems)))
    groups = [group for group in groups.values() if group.runs]
    if not groups:
        raise RecordError(f"{paths[0]}: expected logs with validations, found none; check the path")
    common = os.path.commonpath([os.path.dirname(group.name) for group in groups])
    for group in groups:
        name = os.path.relpath(group.name, common)
        name = short(os.path.splitext(name)[0] if os.path.isfile(group.name) else name)
        group.name = name if len(name) <= NAME_LIMIT else "…" + name[1 - NAME_LIMIT:]  # paths differ at their end
    return groups, left_out
