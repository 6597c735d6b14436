"""Compare what a record, or an archive of them, says with the logs beside it. Nothing is run or written.

Each folder with a record.json is built again from its logs and compared: record.json, README.md, the rules of
check, and whether the runs of two records are the same. Logs without a record are judged by check.
"""
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from data.errors import UsageError
from records import check, pack, schema
from records.formatting import printable
from records.rules import FAIL, Submission, curve

HELP = "what a reviewer runs: a record, or a whole archive, against its logs"
EXAMPLE = "python -m records verify records/track_0_laptop"


def add_arguments(parser):
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of a record, or an archive of them")
    parser.add_argument("--json", action="store_true", help="findings for a program")


def run(args) -> int:
    if not args.path.is_dir():
        found = "a file" if args.path.exists() else "nothing there"
        raise UsageError(f"{args.path}: expected a folder, found {found}; name that of a record")
    folders = sorted(path.parent for path in args.path.rglob(schema.FILE)
                     if not any(part.startswith(".") for part in path.relative_to(args.path).parts))
    if not folders:
        raise UsageError(f"{args.path}: expected a record.json, found none below it; check the path, or "
                         "judge logs by python -m records check")
    findings, submissions = [], {}
    for folder in folders:
        findings += examine(folder, submissions)
    findings += runs_twice(submissions)
    findings = sorted((printable(path.relative_to(args.path).as_posix()), kind, printable(evidence))
                      for path, kind, evidence in findings)

    num_runs = sum(len(s.runs) for s in submissions.values())
    if args.json:
        named = [dict(zip(("path", "kind", "evidence"), finding)) for finding in findings]
        print(json.dumps({"runs": num_runs, "findings": named}, indent=1))
    else:
        said = f"{len(findings)} findings" if findings else "every number follows from the logs"
        print("\n".join([*map(": ".join, findings), f"{num_runs} runs in {len(folders)} records: {said}"]))
    return int(bool(findings))


def examine(folder: Path, submissions: dict[Path, Submission]) -> Iterable[tuple[Path, str, str]]:
    """Yield (path, kind, evidence) of what is wrong in the folder of a record, which joins the submissions.
    Kinds: altered, record-file, folder-name, link, and the rules of check."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            yield path, "link", f"to {os.readlink(path)}, which is not followed"
        elif path.is_file() and not path.name.startswith("."):  # macOS leaves such files behind
            files[path.relative_to(folder).as_posix()] = path
    if schema.FILE not in files:
        return  # a link
    try:
        statement = schema.read(folder / schema.FILE)
        submissions[folder] = s = check.from_folder(folder, statement)
        text = content_of(files.get("README.md"), 2 * pack.NOTE_LIMIT).decode("utf-8", "replace")
        note = text.partition(pack.NOTE_BEGIN)[2].partition(pack.NOTE_END)[0]
        verdicts, expected = pack.compose(s, statement, note.strip())
    except UsageError as e:
        yield folder / schema.FILE, "record-file", str(e)
        return

    if Path(statement.folder).parts != folder.resolve().parts[-2:]:
        yield folder, "folder-name", f"record.json says {statement.folder}"
    for name, content in expected.items():
        if (found := content_of(files.get(name), len(content) + 1)) != content:
            yield folder / name, "altered", first_difference(found, content)
    for name in files.keys() - expected.keys():
        if name.partition("/")[0] not in (*check.FOLDERS, "media"):
            yield (folder / name, "altered",
                   "does not belong here; pictures for the note have their place in media/")
    for verdict in verdicts:
        if verdict.verdict == FAIL and statement.kind == "record":
            yield folder, verdict.rule, verdict.evidence


def first_difference(found: bytes, expected: bytes) -> str:
    found, expected = (content.decode("utf-8", "backslashreplace").split("\n")
                       for content in (found, expected))
    pairs = enumerate(zip_longest(found, expected, fillvalue="nothing"), start=1)
    number, (line, wanted) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    return f"line {number} says {line[:150]!r}, the logs give {wanted[:150]!r}"


def content_of(path: Path | None, limit: int) -> bytes:
    try:
        with open(path or os.devnull, "rb") as file:
            return file.read(limit)
    except OSError:
        return b""


def runs_twice(submissions: dict[Path, Submission]) -> Iterable[tuple[Path, str, str]]:
    """Yield the runs of one record that are those of another, too."""
    folders_of = defaultdict(set)
    for folder, s in submissions.items():
        for run in s.runs:
            if len(run.val_points) > 1:  # a single loss can be the same by chance
                folders_of[curve(run)].add(folder)
    for first, *others in {tuple(sorted(folders)) for folders in folders_of.values()}:
        if others:
            yield first, "duplicate-runs", f"runs are also in {', '.join(folder.name for folder in others)}"
