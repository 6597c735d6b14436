"""verify: a packed folder in which anything is altered, and archives of them."""
import ast
import json
import shutil
from pathlib import Path

import pytest
from tests.helpers.claims import log, replaced, runs, slow, uuid, write

from data.files import ROOT
from records import schema
from records.__main__ import guarded


@pytest.fixture
def findings(records):
    """(place below the path, kind) of each finding; the exit code must fit."""
    def call(path: Path) -> set[tuple[str, str]]:
        code, out, _ = records("verify", path, "--json")
        found = json.loads(out)["findings"]
        assert code == int(bool(found))
        return {(finding["path"], finding["kind"]) for finding in found}
    return call


def pack(root: Path, name: str, logs: str, *more: str, date: str = "2026-11-24") -> Path:
    """Logs of root/logs, packed into root/out."""
    (root / "out").mkdir(exist_ok=True)
    assert guarded(["pack", "--name", name, "--date", date, "--logs", str(root / logs), "-o",
                    str(root / "out"), *map(str, more)]) == 0
    return root / "out/track_0_laptop" / f"{date}_{name}"


FIRST = "--waive", "faster-than-baseline=the first record"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Logs in logs/ and base/, packed into out/."""
    root = tmp_path_factory.mktemp("original")
    write(root / "logs", runs())
    write(root / "base", slow(), first=1001)
    (root / "note.md").write_text("An idea.")
    pack(root, "Idea", "logs", "--baseline", root / "base", "--note", root / "note.md")
    return root


@pytest.fixture
def packed(original, tmp_path, capsys) -> Path:
    """The packed folder, in a copy of all."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out/track_0_laptop/2026-11-24_Idea"


# A folder built by pack

def edit(name: str, pattern: str, new: str, count: int = 0):
    def change(folder):
        path = folder / name
        path.write_text(replaced(path.read_text(), pattern, new, count=count))
    return change


def link(path: Path, target: Path):
    path.unlink()
    path.symlink_to(target)


RUN = f"runs/{uuid(1)}.txt"
RECORD, README = "record.json", "README.md"
BOTH = {(RECORD, "altered"), (README, "altered")}
ALTERED = {
    "a loss changed": (edit(RUN, r"^(step:20/20 val_loss:)\S+", r"\g<1>1.5001"), BOTH),
    "an early loss changed": (edit(RUN, r"^(step:5/20 val_loss:)\S+", r"\g<1>2.5001"), {(RECORD, "altered")}),
    "a time changed": (edit(RUN, r"^(step:20/20 val_loss:\S+ train_time:)\d+", r"\g<1>1600"),
                       {*BOTH, (".", "intact-logs")}),
    "a line added to a log": (edit(RUN, r"\Z", "a remark\n", 1), {(RECORD, "altered")}),
    "a run removed": (lambda folder: (folder / RUN).unlink(), BOTH),
    "a run added": (lambda folder: write(folder / "runs", [log(77)], first=77), BOTH),
    "a run renamed": (lambda folder: (folder / RUN).rename(folder / "runs/a.txt"), BOTH),
    "a baseline removed": (lambda folder: shutil.rmtree(folder / "baseline"),
                           {*BOTH, (".", "faster-than-baseline")}),
    "a source edited": (edit(RUN, "^# the optimizer", "# the  optimizer"), {*BOTH, (".", "same-source")}),
    "a number in the README": (edit(README, r"± 0\.00", "± 0.01", 1), {(README, "altered")}),
    "the probability in the README": (edit(README, r"# p=0\.\d+", "# p=0.0001"), {(README, "altered")}),
    "a line of the README removed": (edit(README, r"^- Time:.*\n", ""), {(README, "altered")}),
    "a row added to the README": (edit(README, r"\Z", "| 1 |", 1), {(README, "altered")}),
    "the marks of the note removed": (edit(README, r"^<!--.*\n", ""), {(README, "altered")}),
    "the README removed": (lambda folder: (folder / README).unlink(), {(README, "altered")}),
    "nothing": (lambda folder: None, set()),
    "the note edited": (edit(README, "^An idea.", "A better idea, with\n\n| a | table |"), set()),
    "a picture for the note": (lambda folder: write(folder / "media", ["png"]), set()),
    "the mean in record.json": (edit(RECORD, r'"loss_mean": 1\.\d', '"loss_mean": 1.4', 1),
                                {(RECORD, "altered")}),
    "a hash in record.json": (edit(RECORD, r'"sha256": "..', '"sha256": "00', 1), {(RECORD, "altered")}),
    "a verdict in record.json": (edit(RECORD, '"passes": true', '"passes": false'), {(RECORD, "altered")}),
    "a name in record.json": (edit(RECORD, '"name": "Idea"', '"name": "Ideal"'),
                              {(README, "altered"), (".", "folder-name")}),
    "a waiver in record.json": (edit(RECORD, '"waivers": {}', '"waivers": {\n    "same-torch": "why"\n  }'),
                                set()),
    "record.json in another order": (edit(RECORD, r"\A\{\n(.*\n)(.*\n)", r"{\n\2\1"), {(RECORD, "altered")}),
    "a key twice in record.json": (edit(RECORD, r'^(  "name": ")', r'  "name": "Other",\n\1'),
                                   {(RECORD, "altered")}),
    "an unknown key": (edit(RECORD, r"\A\{", '{"more": 1,'), {(RECORD, "altered")}),
    "a record with a reason why not": (edit(RECORD, '"why_no_record": null', '"why_no_record": "x"'),
                                       {(RECORD, "record-file")}),
    "another version": (edit(RECORD, '"version": 1', '"version": 2'), {(RECORD, "record-file")}),
    "a path that escapes": (edit(RECORD, rf'"file": "{uuid(1)}', f'"file": "../{uuid(1)}'),
                            {(RECORD, "altered")}),
    "a baseline that escapes": (edit(RECORD, '"baseline_record": null',
                                     '"baseline_record": "../2026-11-24_Idea"'), {(RECORD, "record-file")}),
    "no JSON": (edit(RECORD, r"\}\n\Z", ""), {(RECORD, "record-file")}),
    "a huge record.json": (edit(RECORD, r"\Z", " " * schema.SIZE_LIMIT, 1), {(RECORD, "record-file")}),
    "another track": (edit(RECORD, '"track": "shakespeare"', '"track": "medium"'), None),
    "files of macOS": (lambda folder: [(folder / name).write_bytes(b"\0\5\x16\7") for name in (
        ".DS_Store", "runs/.DS_Store", f"runs/._{uuid(1)}.txt")], set()),
    "a log with an odd name": (lambda folder: shutil.copy(folder / RUN, folder / "runs/my log.txt"),
                               {(RECORD, "record-file")}),
    "a folder among the runs": (lambda folder: write(folder / "runs/more", [log(77)]),
                                {(RECORD, "record-file")}),
    "a file added": (lambda folder: write(folder / "source", ["print()"]),
                     {(f"source/{uuid(1)}.txt", "altered")}),
    "a link to a log": (lambda folder: link(folder / RUN, folder / f"runs/{uuid(2)}.txt"),
                        {(RUN, "link"), *BOTH}),
    "a link out of the folder": (lambda folder: link(folder / RECORD, Path("/etc/hostname")), None),
    "a folder that is a link": (lambda folder: (folder / "media").symlink_to("/etc"), {("media", "link")}),
}


@pytest.mark.parametrize("name", ALTERED)
def test_what_is_altered_in_a_packed_folder_is_found_and_nothing_is_written(name, packed, findings):
    change, expected = ALTERED[name]
    change(packed)
    before = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    found = findings(packed)
    assert found if expected is None else found == expected, found
    assert before == {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}


def test_a_record_that_breaks_a_rule_is_found(packed, findings, tmp_path, capsys):
    """A non-record that calls itself a record."""
    write(tmp_path / "slower", runs(pace=150.0))
    folder = pack(tmp_path, "Slow", "slower", "--baseline", tmp_path / "base", "--non-record", "slow")
    capsys.readouterr()
    assert not findings(folder)
    edit(RECORD, '"kind": "non-record",\n  "why_no_record": "slow"',
         '"kind": "record",\n  "why_no_record": null')(folder)
    assert (".", "faster-than-baseline") in findings(folder)


def test_a_folder_moved_or_copied_is_found(packed, findings):
    shutil.copytree(packed, packed.parent / "2026-11-25_Again")
    assert findings(packed.parents[1]) == {("track_0_laptop/2026-11-24_Idea", "duplicate-runs"),
                                           ("track_0_laptop/2026-11-25_Again", "folder-name")}
    other = packed.parents[1] / "track_1_short"
    other.mkdir()
    packed.rename(other / packed.name)
    assert ("track_1_short/2026-11-24_Idea", "folder-name") in findings(packed.parents[1])


def test_what_happens_to_a_baseline_elsewhere_is_told(tmp_path, findings, capsys):
    """The runs of another record are the baseline of this one: what happens to them is told."""
    write(tmp_path / "logs", runs())
    write(tmp_path / "base", slow(), first=1001)
    before = pack(tmp_path, "Before", "base", *FIRST)
    folder = pack(tmp_path, "Idea", "logs", "--baseline", tmp_path / "base").parent
    capsys.readouterr()
    (folder.parent / "requirements.txt").write_text("numpy\n")  # as in records/ itself
    assert not findings(folder.parent)
    edit(f"runs/{uuid(1001)}.txt", r"^(step:5/20 val_loss:)\S+", r"\g<1>2.5001")(before)
    assert {("2026-11-24_Before/record.json", "altered"),
            ("2026-11-24_Idea/record.json", "altered")} <= findings(folder)
    shutil.rmtree(before)
    assert {("2026-11-24_Idea/record.json", "altered"),
            ("2026-11-24_Idea", "faster-than-baseline")} <= findings(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 10**6, b"<!-- A note" * 10**5])
def test_a_hostile_readme_is_altered(content, packed, findings):
    (packed / README).write_bytes(content)
    assert findings(packed) == {(README, "altered")}


def test_paths_without_a_record_are_refused(tmp_path, records):
    def refusal(path) -> str:
        code, _, err = records("verify", path)
        assert code == 2
        return err
    write(tmp_path / "logs", runs(1))
    assert "expected a record.json, found none" in refusal(tmp_path)
    assert "nothing there" in refusal(tmp_path / "none")
    assert "found a file" in refusal(tmp_path / "logs" / f"{uuid(1)}.txt")


def test_never_runs_what_it_reads():
    """No module of records evaluates, imports or unpickles text, nor imports torch or the trainer."""
    for path in (ROOT / "records").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), (path, node.lineno)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not {"pickle", "marshal", "shelve", "yaml", "torch", "train_gpt", "muon", "engine"} & {
                    module.split(".")[0] for module in modules}, path
