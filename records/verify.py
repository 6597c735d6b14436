"""Compare what a folder, or a whole archive, says with the logs beside it. Offline; nothing is run, nothing
is written.

A folder built by pack is built again from its logs and compared: record.json, README.md, and the rules of
check. Any other folder, as those of the public archive, is one record where its name begins with a date, and
its README is read for lists of losses and times, for probabilities, and for table rows that name a log. Kinds
of findings:

{kinds}
and the rules of check, on the logs of one folder. A finding is a fact to look at, not a verdict: two sources
in a folder are fine where one is the baseline, if somebody says so.
"""
import json
import os
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import zip_longest
from pathlib import Path

from records import check, logs, pack, readme, schema, statistics
from records.errors import RecordError
from records.logs import UUID, LogFile, RunFacts
from records.rules import FAIL, RULES, Submission, curve, last_point, names, plain, some
from records.tracks import TRACKS, Track

HELP = "what a reviewer runs: numbers of a record, or of a whole archive, against its logs"
EXAMPLE = "python -m records verify records/track_0_laptop"

KINDS = {
    "altered": "a file of a packed folder is not what its logs give, or does not belong there",
    "record-file": "record.json does not follow its schema",
    "link": "a symbolic link or a device, which is not followed",
    "folder-name": "a folder is not called <date>_<Name>, or a name is not the usual one",
    "log-name": "logs are not called <uuid>.txt",
    "no-readme": "there are logs, and no Markdown file says anything of them",
    "broken-link": "a README links to a file that is not there",
    "date": "runs began after the date of their folder",
    "not-a-log": "a file with the suffix of a log is none",
    "odd-log": "a log is cut, binary, repeated or hard to read",
    "incomplete-run": "a run has no validation at its last step",
    "missing-facts": "logs do not say from what source, with what torch, or on what they ran",
    "number-without-log": "a listed loss or time is in none of the logs",
    "unlisted-runs": "a list leaves out runs of the same kind",
    "pairing": "losses and times stand side by side that are not of one run",
    "unread": "a README is longer, or has more lists, than is compared",
    "p-value": "a probability does not follow from the losses listed near it",
    "p-without-list": "a probability stands there without the losses it comes from",
    "table-row": "a row about a log has another loss or time than the log",
    "no-baseline": "time counts, and no log or list of a baseline is there",
    "duplicate-files": "logs are in two folders",
    "duplicate-folder": "two folders have the same logs",
    "duplicate-curves": "logs of two folders have the same losses",
    "other-hardware": "logs come from other hardware than most of a track where time counts",
}
__doc__ = __doc__.format(kinds="\n".join(f"  {kind:<19} {meaning}" for kind, meaning in KINDS.items()))

DATED = re.compile(r"(\d{4}-\d\d-\d\d|\d{8}(?=_|$))(?!\d)", re.A)
FOLDER_NAME = re.compile(r"(\d{4}-\d\d-\d\d_[A-Za-z0-9]|\d{8}_[a-z0-9])[\w-]*", re.A)
BASELINE = re.compile(r"base|prev|prior|retim|rerun|master|control", re.I)
GROUP_RULES = (  # those that hold among the logs of any folder
    "same-source", "same-settings", "same-data", "validation-data", "same-hardware", "same-torch",
    "same-world-size", "validation-tokens", "finite-losses", "distinct-curves", "distinct-seeds",
    "compile-flags", "not-resumed", "consistent-lines",
)
NEAR = 15  # lines between a probability and the losses that it may come from


@dataclass(frozen=True, order=True)
class Finding:
    path: str  # below the path that is verified
    kind: str  # of KINDS, or a rule
    evidence: str


@dataclass(frozen=True)
class ComparedRun:
    """What a comparison of folders needs of a run."""
    record: str  # folder of the record
    folder: str  # of the log
    log: str
    sha256: str  # of the log
    curve: frozenset
    hardware: str | None
    timed_track: str | None  # name of the track, where it ranks by time


Find = Callable[[Path, str, str], None]  # path, kind, evidence


def add_arguments(parser):
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of a record, or an archive of them")
    parser.add_argument("--track", choices=TRACKS,
                        help="track of all of it (default: by the names of folders, else by the logs)")
    parser.add_argument("--json", action="store_true", help="findings for a program")


def run(args) -> int:
    if not args.path.is_dir():
        found = "a file" if args.path.exists() else "nothing there"
        raise RecordError(f"{args.path}: expected a folder, found {found}; name one that holds logs")
    folders = records_in(args.path)
    if not folders:
        raise RecordError(f"{args.path}: expected logs or a record.json, found none below it; check the path")
    jobs = [(args.path, folder, files, args.track) for folder, files in folders.items()]
    if sum(map(len, folders.values())) > 100:
        with ProcessPoolExecutor() as pool:
            results = [*pool.map(examine, *zip(*jobs))]
    else:
        results = [examine(*job) for job in jobs]
    facts = [fact for _, found in results for fact in found]
    findings = sorted({*(finding for found, _ in results for finding in found), *across(facts)})
    if not facts and not findings:
        raise RecordError(f"{args.path}: expected logs or a record.json, found other texts only; check the "
                          "path")
    if args.json:
        print(json.dumps({"records": len(folders), "runs": len(facts),
                          "findings": [asdict(f) for f in findings],
                          "counts": Counter(f.kind for f in findings)}, indent=1))
    else:
        show(findings, f"{len(facts)} runs in {len(folders)} folders")
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


def is_record(folder: Path, files: Iterable[Path]) -> bool:
    return bool(DATED.match(folder.resolve().name)) or folder / schema.FILE in files


def records_in(root: Path) -> dict[Path, list[Path]]:
    """Files by the folder of the record that they belong to: the outermost one with a record.json or a date
    for a name, else their own; all of `root` where there is none such. Folders without logs are left out."""
    files, home = {}, {}
    for name, subfolders, members in os.walk(root):
        folder = Path(name)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        home[folder] = home.get(folder.parent)
        if home[folder] is None and is_record(folder, map(folder.joinpath, members)):
            home[folder] = folder
        members = [name for name in members if not name.startswith(".")]  # macOS leaves such files behind
        members += [name for name in subfolders if (folder / name).is_symlink()]
        files.setdefault(home[folder] or folder, []).extend(folder / name for name in sorted(members))
    if not any(home.values()):
        files = {root: [file for group in files.values() for file in group]}
    return {folder: group for folder, group in files.items()
            if any(file.suffix in logs.SUFFIXES or file.name == schema.FILE for file in group)}


def examine(root: Path, folder: Path, files: list[Path],
            track_name: str | None) -> tuple[list[Finding], list[ComparedRun]]:
    """Findings in the folder of one record, and what a comparison with others needs."""
    findings = []

    def find(path: Path, kind: str, evidence: str):
        findings.append(Finding(plain(path.relative_to(root).as_posix()), kind, plain(evidence)))

    for path in files:
        if path.is_symlink() or not path.is_file():
            find(path, "link", f"to {os.readlink(path)}" if path.is_symlink() else "no regular file")
    files = [path for path in files if path.is_file() and not path.is_symlink()]
    read = []
    for path in files:
        try:
            read += [logs.read(path)] if path.suffix in logs.SUFFIXES else []
        except RecordError as e:
            find(path, "odd-log", str(e))
    if not any(log.variant != "X" for log in read) and not is_record(folder, files):
        return [], []  # texts of other kinds, such as requirements.txt
    track = track_of(folder, read, track_name)
    if folder / schema.FILE in files:
        packed(folder, files, read, track, find)
        read = [log for log in read
                if log.path.parent != folder / "baseline"]  # its logs may well be the runs of another record
    else:
        submitted(folder, files, read, track, find)
    timed = track.name if track and track.ranked_by == "time" else None
    return findings, [
        ComparedRun(str(folder.relative_to(root)), str(log.path.parent.relative_to(root)), log.path.name,
                    log.sha256,
                    frozenset(curve(run)), run.hardware, timed)
        for log in read for run in log.runs]


def track_of(folder: Path, read: list[LogFile], name: str | None) -> Track | None:
    by_folder = [track for track in TRACKS.values() if track.folder in folder.resolve().parts]
    by_settings = {run.config["track"] for log in read for run in log.runs
                   if isinstance(run.config.get("track"), str)}
    if name or by_folder:
        return TRACKS[name] if name else by_folder[0]
    return TRACKS.get(by_settings.pop()) if len(by_settings) == 1 else None


# A folder built by pack


def packed(folder: Path, files: list[Path], read: list[LogFile], track: Track | None, find: Find):
    """Build the folder again from its logs and what a person said, and compare."""
    try:
        record = schema.read(folder / schema.FILE)
        before, _, rest = text_of(folder / "README.md").partition(pack.NOTE_BEGIN)
        note = rest.partition(pack.NOTE_END)[0]
        expected_record, verdicts, expected = pack.compose(folder, record, note.strip())
    except RecordError as e:
        return find(folder / schema.FILE, "record-file", str(e))

    numbers(folder / "README.md", "\n" * before.count("\n") + note, read, track, find)
    if Path(record.folder).parts != folder.resolve().parts[-2:]:
        find(folder, "folder-name", f"record.json says {record.folder}")
    for where, says, is_now in differences(record.model_dump(mode="json"),
                                           expected_record.model_dump(mode="json")):
        find(folder / schema.FILE, "altered", f"{where}: says {says}, the logs give {is_now}")
    compare_files(folder, files, expected, record == expected_record, find)
    if record.kind == "record":
        for verdict in verdicts:
            if verdict.verdict == FAIL:
                find(folder, verdict.rule, verdict.evidence)


def compare_files(folder: Path, files: list[Path], expected: dict[str, bytes], same_record: bool, find: Find):
    """The files of a packed folder, byte by byte.

    A record.json that says something else has its own findings.
    """
    there = {path.relative_to(folder).as_posix(): path for path in files}
    for name, content in expected.items():
        if name not in there:
            find(folder / name, "altered", "is missing")
        elif name != schema.FILE or same_record:
            found = content_of(there[name], len(content) + 1)
            if found != content:
                find(folder / name, "altered", first_difference(found, content))
    for name in there.keys() - expected.keys():
        if name.partition("/")[0] not in (*check.FOLDERS, "media"):
            find(folder / name, "altered",
                 "does not belong here; pictures for the note have their place in media/")


def differences(a, b, where: str = "") -> Iterable[tuple[str, str, str]]:
    """(place, value in a, value in b) where two JSON values differ; logs are compared by name."""
    if isinstance(a, list) and all(isinstance(item, dict) and "file" in item for item in [*a, *b]):
        a, b = ({item["file"]: item for item in items} for items in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from differences(a.get(key), b.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (left, right) in enumerate(zip(a, b)):
            yield from differences(left, right, f"{where}[{i}]")
    elif a != b:
        yield where, *("nothing" if value is None else json.dumps(value)[:100] for value in (a, b))


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


def text_of(path: Path) -> str:
    return content_of(path, readme.SIZE_LIMIT).decode("utf-8", "replace")


# Any other folder


def submitted(folder: Path, files: list[Path], read: list[LogFile], track: Track | None, find: Find):
    texts = {path: text_of(path) for path in files if path.suffix.lower() == ".md"}
    groups = defaultdict(list)
    for log in read:
        groups[log.path.parent].append(log)
    names_of_folder(folder, groups, texts, find)
    for place, members in groups.items():
        facts_of_group(place, [log for log in members if log.variant != "X"], track, find)
        for log in members:
            if log.variant == "X":
                find(log.path, "not-a-log", f"{log.size:,} bytes without a validation")
    runs = [run for log in read for run in log.runs if run.val_points]
    times = [listed for path, text in texts.items() for listed in numbers(path, text, read, track, find)]
    timed = track is not None and track.ranked_by == "time" and DATED.match(folder.resolve().name) and runs
    baseline = any(BASELINE.search(log.path.relative_to(folder).as_posix()) for log in read)
    if timed and len(times) < 2 and not baseline:
        find(folder, "no-baseline", f"{len(runs)} runs, {len(times)} lists of times")


def names_of_folder(folder: Path, groups: dict, texts: dict, find: Find):
    if DATED.match(folder.resolve().name) and not FOLDER_NAME.fullmatch(folder.resolve().name):
        find(folder, "folder-name", "expected <date>_<Name>")
    for path in texts:
        if path.name.lower() == "readme.md" and path.name != "README.md":
            find(path, "folder-name", "expected README.md")
    if not texts:
        find(folder, "no-readme", f"{sum(map(len, groups.values()))} logs")
    for place, members in groups.items():
        if odd := [log for log in members if not UUID.fullmatch(log.path.stem)]:
            find(place, "log-name", f"{len(odd)} of {len(members)}: {names(odd)}")
    for path, text in texts.items():
        for line, target in readme.links(text):
            if not os.path.exists(path.parent / target):
                find(path, "broken-link", f"line {line}: {target}")


def facts_of_group(place: Path, members: list[LogFile], track: Track | None, find: Find):
    """The rules that hold among the logs of one folder, and what single logs lack."""
    if not members:
        return
    s = Submission(track or TRACKS["small"], members)
    for rule in GROUP_RULES:
        if track or rule not in ("validation-tokens", "compile-flags"):
            verdict, evidence = RULES[rule](s)
            if verdict == FAIL and not evidence.startswith("no source"):
                find(place, rule, evidence)
    for log in members:
        for problem in log.problems:
            if problem.startswith("the run is incomplete"):
                ends = [f"ends at step {run.final_step} of {run.total_steps}" for run in log.runs
                        if not run.complete]
                find(log.path, "incomplete-run", "; ".join(ends))
            else:
                find(log.path, "odd-log", problem)
    for fact, missing in (("source", [log for log in members if not log.sources]),
                          ("torch", [log for log in members if not any(run.torch for run in log.runs)]),
                          ("GPU", [log for log in members if not any(run.gpu_name for run in log.runs)])):
        if missing:
            find(place, "missing-facts",
                 f"no {fact} in {len(missing)} of {len(members)} logs: {names(missing)}")
    dates = [details.date for details in s.details.values() if details.date]
    # a day, and another for time zones
    if (day := day_of(place)) and dates and min(dates) > day + timedelta(days=2):
        find(place, "date", f"the first run began on {min(dates):%Y-%m-%d}")


def day_of(place: Path) -> datetime | None:
    """The date in the name of the folder of a record."""
    for part in reversed(place.resolve().parts):
        if match := DATED.match(part):
            try:
                return datetime.strptime(match[0].replace("-", ""), "%Y%m%d")
            except ValueError:
                return None
    return None


def numbers(path: Path, text: str, read: list[LogFile], track: Track | None,
            find: Find) -> list[readme.NumberList]:
    """Compare what a README lists with the logs. Returns its lists of times."""
    choices = groups_of(read)
    all_times = [point.train_time_ms / 1000 for runs in choices.values() for run in runs
                 if (point := last_point(run)) and point.train_time_ms]
    lists = [(listed, kind) for listed in readme.lists(text) if (kind := kind_of(listed, track, all_times))]
    if len(text) >= readme.SIZE_LIMIT or len(lists) >= readme.LIST_LIMIT:
        find(path, "unread", f"{len(text):,} characters, {len(lists):,} lists")
    matched = {}
    for listed, kind in lists:
        count, label, values = best_group(listed, kind, choices, track)
        where = f"{kind} in line {listed.line}"
        if count < len(listed.values):
            missing = Counter(rounded(listed.values, listed)) - Counter(rounded(values, listed))
            find(path, "number-without-log",
                 f"{where}: {missing.total()} of {len(listed.values)} values are in no log, such as "
                 f"{[*missing][0]:.{listed.digits}f}")
        else:
            matched[listed] = label
            if len(values) > count:
                find(path, "unlisted-runs", f"{where}: {count} of {len(values)} runs in {label}")
    pairings(path, lists, matched, choices, find)
    probabilities(path, text, [listed for listed, kind in lists if kind == "losses"], track, find)
    rows(path, text, read, find)
    return [listed for listed, kind in lists if kind == "times"]


def rows(path: Path, text: str, read: list[LogFile], find: Find):
    """Table rows whose first cell is the name of a log, or its beginning, must have its last loss
    and time."""
    logs_by_name = sorted(((log.path.stem, log.runs[0]) for log in read if len(log.runs) == 1
                           and log.runs[0].val_points),
                          key=lambda pair: pair[0])
    for line, name, losses, times in readme.rows(text):
        name = name.removesuffix(".txt")
        at = bisect_left(logs_by_name, name, key=lambda pair: pair[0])
        points = [last_point(run) for stem, run in logs_by_name[at:at + 20] if stem.startswith(name)]
        if not points:
            continue
        if losses and not any(abs(float(loss) - point.val_loss) < 1e-4 for loss in losses
                              for point in points):
            find(path, "table-row", f"line {line}: {losses[0]}, the log says {points[0].val_loss}")
        if times and not any(abs(int(ms) - (point.train_time_ms or 0)) <= 1 for ms in times
                             for point in points):
            says = f"{points[0].train_time_ms} ms"
            find(path, "table-row", f"line {line}: {times[0]} ms, the log says {says}")


def groups_of(read: list[LogFile]) -> dict[str, list[RunFacts]]:
    """Sets of runs that a list may be about, by description: a folder, or the runs of one source
    and length in it."""
    groups = defaultdict(list)
    for log in read:
        for run in log.runs:
            if run.val_points:
                folder = f"{log.path.parent.name}/"
                source = (run.source_sha256 or "none")[:8]
                groups[folder].append(run)
                groups[f"{folder}, source {source}, {run.total_steps} steps"].append(run)
    return groups


def kind_of(listed: readme.NumberList, track: Track | None, times: list[float]) -> str | None:
    """Whether a list is of losses or times: by its name, else by its values; None where it is of neither."""
    if named := re.search(r"(loss|accs)|tim(?:e|ing)", listed.before[-40:]):
        return "losses" if named[1] else "times"
    if track and all(abs(value - track.target) < 0.3 for value in listed.values):
        return "losses"
    return "times" if times and all(min(times) / 1.5 < value < max(times) * 1.5
                                    for value in listed.values) else None


def rounded(values: Iterable[float], listed: readme.NumberList) -> list[float]:
    return [round(value, listed.digits) for value in values]


def best_group(listed: readme.NumberList, kind: str, choices: dict[str, list[RunFacts]], track: Track | None):
    """(number of values found, label, values) of the smallest group of runs in which most of the
    values are."""
    results, wanted = [(0, 0, "none", [])], Counter(rounded(listed.values, listed))
    for label, runs in choices.items():
        if kind == "times":
            options = [[point.train_time_ms / 1000 for run in runs
                        if (point := last_point(run)).train_time_ms is not None]]
        else:
            stated = track is not None and track.claim_step == "stated"
            steps = set.intersection(*({point.step for point in run.val_points}
                                       for run in runs)) if stated else ()
            options = [[last_point(run).val_loss for run in runs],
                       *([run.at(step).val_loss for run in runs] for step in sorted(steps, reverse=True))]
        for values in options:
            shared = Counter(rounded(values, listed)) & wanted
            results.append((shared.total(), -len(values), label, values))
    count, _, label, values = max(results, key=lambda result: result[:2])
    return count, label, values


def pairings(path: Path, lists: list, matched: dict, choices: dict[str, list[RunFacts]], find: Find):
    """Losses and times that stand side by side, both of one group, must be of the same runs."""
    for (losses, kind), (times, next_kind) in zip(lists, lists[1:]):
        if (kind, next_kind) != ("losses", "times") or not 0 <= times.line - losses.line <= 4:
            continue
        if len(losses.values) != len(times.values) or matched.get(losses, 0) != matched.get(times):
            continue
        points = [last_point(run) for run in choices[matched[losses]]]
        real = Counter((round(point.val_loss, losses.digits), round(point.train_time_ms / 1000, times.digits))
                       for point in points if point.train_time_ms is not None)
        wrong = Counter(zip(rounded(losses.values, losses), rounded(times.values, times))) - real
        if wrong:
            find(path, "pairing",
                 f"lines {losses.line} and {times.line}: {wrong.total()} of {len(losses.values)} "
                 f"pairs are of no run, such as {[*wrong][0]}")


def probabilities(path: Path, text: str, losses: list[readme.NumberList], track: Track | None, find: Find):
    """Probabilities that stand near lists of losses must follow from one of them by the test of the
    track, or a t-test."""
    alone = []
    for line, p, half in readme.probabilities(text):
        near = [listed for listed in losses if abs(listed.line - line) <= NEAR]
        if not near or not track:
            alone.append(line)
            continue
        tests = (test(listed.values, track.target) for listed in near
                 for test in (statistics.t_test, statistics.z_rule))
        given = [test.p for test in tests if test.p is not None]
        if not any(abs(p - value) <= 1.02 * half for value in given):
            find(path, "p-value",
                 f"line {line}: p = {p:g}, the losses near it give {f'{given[0]:.4g}' if given else 'none'}")
    if alone:
        find(path, "p-without-list", f"{len(alone)} in lines {some(map(str, alone))}")


# Across folders


def across(facts: list[ComparedRun]) -> Iterable[Finding]:
    """Files, folders and curves that are there twice, and hardware that most of a track did not run on."""
    yield from files_twice(facts)
    yield from curves_twice(facts)
    yield from other_hardware(facts)


def files_twice(facts: list[ComparedRun]) -> Iterable[Finding]:
    places_of = defaultdict(set)  # (folder, log) by hash
    hashes_in = defaultdict(set)  # by folder
    for fact in facts:
        places_of[fact.sha256].add((fact.folder, fact.log))
        hashes_in[fact.folder].add(fact.sha256)

    copies = defaultdict(set)  # hashes by the folders that they are in
    for sha256, places in places_of.items():
        if len(places) > 1:
            copies[tuple(sorted(folder for folder, _ in places))].add(sha256)
    for folders, hashes in copies.items():
        several = len(set(folders)) > 1 and len(hashes) > 1
        whole = several and all(hashes_in[folder] == hashes for folder in folders)
        yield Finding(folders[0], "duplicate-folder" if whole else "duplicate-files",
                      f"{len(hashes)} logs are also in {', '.join(folders[1:])}")


def curves_twice(facts: list[ComparedRun]) -> Iterable[Finding]:
    by_curve = defaultdict(set)
    for fact in facts:
        if len(fact.curve) >= 3:
            by_curve[fact.curve].add((fact.sha256, fact.folder))

    counts = Counter()
    for places in by_curve.values():
        hashes, folders = map(set, zip(*places))
        if len(hashes) > 1 and len(folders) > 1:
            counts[tuple(sorted(folders))] += 1
    for folders, count in counts.items():
        yield Finding(folders[0], "duplicate-curves",
                      f"{count} curves are also in {', '.join(folders[1:])}, in other files")


def other_hardware(facts: list[ComparedRun]) -> Iterable[Finding]:
    for track in {fact.timed_track for fact in facts} - {None}:
        of_track = [fact for fact in facts if fact.timed_track == track and fact.hardware]
        (usual, most), = Counter(fact.hardware for fact in of_track).most_common(1) or [(None, 0)]
        if 2 * most <= len(of_track):
            continue
        for (record, hardware), count in Counter((fact.record, fact.hardware) for fact in of_track).items():
            if hardware != usual:
                yield Finding(record, "other-hardware",
                              f"{count} runs on {hardware}; {most} of {len(of_track)} "
                              f"runs of track {track} on {usual}")
