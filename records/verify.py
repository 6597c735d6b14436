"""Compare what a folder, or a whole archive, says with the logs beside it. Offline; nothing is run, nothing
is written.

A folder built by pack is built again from its logs and compared: record.json, README.md, and the rules of
check. Of any other folder, as those of the public archive, the logs are held to the rules that need no
statement. Kinds of findings:

{kinds}
and the rules of check. A finding is a fact to look at, not a verdict: two sources in a folder are fine where
one is the baseline, if somebody says so.
"""
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

from data.errors import UsageError
from records import check, logs, pack, schema
from records.logs import LogFile
from records.rules import FAIL, RULES, Submission, curve, plain
from records.tracks import TRACKS, only

HELP = "what a reviewer runs: a record, or a whole archive, against its logs"
EXAMPLE = "python -m records verify records/track_0_laptop"

KINDS = {
    "altered": "a file of a packed folder is not what its logs give, or does not belong there",
    "record-file": "record.json does not follow its schema",
    "folder-name": "the folder is not the one that record.json says",
    "link": "a symbolic link or a device, which is not followed",
    "not-a-log": "a file with the suffix of a log is none",
    "duplicate-runs": "runs of two folders are the same",
}
__doc__ = __doc__.format(kinds="\n".join(f"  {kind:<19} {meaning}" for kind, meaning in KINDS.items()))

STATED_RULES = {  # those that ask what a person says of the runs, or of their baseline
    "right-track", "same-validations", "planned-runs", "exclusions", "loss-rule", "faster-than-baseline",
}
TRACK_RULES = {"validation-data", "validation-tokens", "compile-flags"}  # those that ask the track


@dataclass(frozen=True, order=True)
class Finding:
    path: str  # below the path that is verified
    kind: str  # of KINDS, or a rule
    evidence: str


@dataclass(frozen=True)
class ComparedRun:
    """What a comparison of folders needs of a run."""
    folder: str  # of the log
    identity: frozenset | str  # the curve; of one too short to tell, the hash of the log


Find = Callable[[Path, str, str], None]  # path, kind, evidence


def add_arguments(parser):
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of a record, or an archive of them")
    parser.add_argument("--json", action="store_true", help="findings for a program")


def run(args) -> int:
    if not args.path.is_dir():
        found = "a file" if args.path.exists() else "nothing there"
        raise UsageError(f"{args.path}: expected a folder, found {found}; name one that holds logs")
    folders = records_in(args.path)
    jobs = [(args.path, folder, files) for folder, files in folders.items()]
    if sum(map(len, folders.values())) > 100:
        with ProcessPoolExecutor() as pool:
            results = [*pool.map(examine, *zip(*jobs))]
    else:
        results = [examine(*job) for job in jobs]
    runs = [run for _, found in results for run in found]
    findings = sorted({*(finding for found, _ in results for finding in found), *runs_twice(runs)})
    if not runs and not findings:
        raise UsageError(f"{args.path}: expected logs or a record.json, found none below it; check the path")
    if args.json:
        print(json.dumps({"runs": len(runs), "findings": [asdict(f) for f in findings]}, indent=1))
    else:
        show(findings, f"{len(runs)} runs in {len({run.folder for run in runs})} folders")
    return int(bool(findings))


def show(findings: list[Finding], what: str):
    folder = None
    for finding in findings:
        if folder != (folder := finding.path):
            print(folder)
        print(f"    {finding.kind}: {finding.evidence}")
    for kind, count in Counter(f.kind for f in findings).most_common():
        print(f"{count:6} {kind:<20} {KINDS.get(kind) or RULES[kind].__doc__.lstrip('* ')}")
    print(f"{what}: {len(findings)} findings" if findings else f"{what}: every number follows from the logs")


def records_in(root: Path) -> dict[Path, list[Path]]:
    """Files by the folder of the record that they belong to, the outermost one with a record.json, else by
    their own. Folders without logs are left out."""
    files, home = {}, {}
    for name, subfolders, members in os.walk(root):
        folder = Path(name)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        home[folder] = home.get(folder.parent)
        if home[folder] is None and schema.FILE in members:
            home[folder] = folder
        members = [name for name in members if not name.startswith(".")]  # macOS leaves such files behind
        members += [name for name in subfolders if (folder / name).is_symlink()]
        files.setdefault(home[folder] or folder, []).extend(folder / name for name in sorted(members))
    return {folder: group for folder, group in files.items()
            if any(file.suffix in logs.SUFFIXES or file.name == schema.FILE for file in group)}


def examine(root: Path, folder: Path, files: list[Path]) -> tuple[list[Finding], list[ComparedRun]]:
    """Findings in the folder of one record, and what a comparison with others needs."""
    findings = []

    def find(path: Path, kind: str, evidence: str):
        findings.append(Finding(plain(path.relative_to(root).as_posix()), kind, plain(evidence)))

    links = [path for path in files if path.is_symlink() or not path.is_file()]
    for path in links:
        find(path, "link", f"to {os.readlink(path)}" if path.is_symlink() else "no regular file")
    files = [path for path in files if path not in links]
    read = [logs.read(path) for path in files if path.suffix in logs.SUFFIXES]
    packed = folder / schema.FILE in files
    if not packed and not any(log.runs for log in read):
        return findings, []  # texts of other kinds, such as requirements.txt
    if packed:
        rebuild(folder, files, find)
        # its baseline may well be the runs of another record
        read = [log for log in read if log.path.parent != folder / "baseline"]
    else:
        hold_to_rules(read, find)
    return findings, [
        ComparedRun(str(log.path.parent.relative_to(root)),
                    frozenset(points) if len(points := curve(run)) >= 3 else log.sha256)
        for log in read for run in log.runs]


def hold_to_rules(read: list[LogFile], find: Find):
    """The rules that hold among the logs of one folder, whatever is claimed of them."""
    track = only(read)
    groups = defaultdict(list)
    for log in read:
        if not log.runs:
            find(log.path, "not-a-log", f"{log.size:,} bytes without a validation")
        else:
            groups[log.path.parent].append(log)
    skipped = STATED_RULES | (set() if track else TRACK_RULES)
    for place, members in groups.items():
        submission = Submission(track or TRACKS["small"], members)
        for name, rule in RULES.items():
            if name not in skipped:
                verdict, evidence = rule(submission)
                if verdict == FAIL:
                    find(place, name, evidence)


# A folder built by pack

def rebuild(folder: Path, files: list[Path], find: Find):
    """Build the folder again from its logs and what a person said, and compare."""
    try:
        record = schema.read(folder / schema.FILE)
        text = content_of(folder / "README.md", 2 * pack.NOTE_LIMIT).decode("utf-8", "replace")
        note = text.partition(pack.NOTE_BEGIN)[2].partition(pack.NOTE_END)[0]
        _, verdicts, expected = pack.compose(folder, record, note.strip())
    except UsageError as e:
        return find(folder / schema.FILE, "record-file", str(e))

    if Path(record.folder).parts != folder.resolve().parts[-2:]:
        find(folder, "folder-name", f"record.json says {record.folder}")
    compare_files(folder, files, expected, find)
    if record.kind == "record":
        for verdict in verdicts:
            if verdict.verdict == FAIL:
                find(folder, verdict.rule, verdict.evidence)


def compare_files(folder: Path, files: list[Path], expected: dict[str, bytes], find: Find):
    """The files of a packed folder, byte by byte."""
    there = {path.relative_to(folder).as_posix(): path for path in files}
    for name, content in expected.items():
        if name not in there:
            find(folder / name, "altered", "is missing")
        elif (found := content_of(there[name], len(content) + 1)) != content:
            find(folder / name, "altered", first_difference(found, content))
    for name in there.keys() - expected.keys():
        if name.partition("/")[0] not in (*check.FOLDERS, "media"):
            find(folder / name, "altered",
                 "does not belong here; pictures for the note have their place in media/")


def first_difference(found: bytes, expected: bytes) -> str:
    found, expected = (content.decode("utf-8", "backslashreplace").split("\n")
                       for content in (found, expected))
    pairs = enumerate(zip_longest(found, expected, fillvalue="nothing"), start=1)
    number, (line, wanted) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    return f"line {number} says {line[:150]!r}, the logs give {wanted[:150]!r}"


def content_of(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError:
        return b""


def runs_twice(runs: list[ComparedRun]) -> Iterable[Finding]:
    """Runs that are there twice in the archive."""
    folders_of = defaultdict(set)
    for run in runs:
        folders_of[run.identity].add(run.folder)
    counts = Counter(tuple(sorted(folders)) for folders in folders_of.values() if len(folders) > 1)
    in_folder = Counter(run.folder for run in runs)
    for (first, *others), count in counts.items():
        yield Finding(first, "duplicate-runs",
                      f"{count} of {in_folder[first]} runs are also in {', '.join(others)}")
