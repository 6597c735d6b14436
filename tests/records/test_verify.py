"""verify: a packed folder in which anything is altered, and folders and archives of the public kind.

    ARCHIVE=<folder of the public records> pytest tests/records/test_verify.py -k archive
"""
import ast
import json
import os
import shutil
from pathlib import Path

import pytest
from tests.helpers.claims import RUNS, log, public, replaced, runs, slow, uuid, write
from tests.helpers.committed import ROOT

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
                       {*BOTH, (".", "consistent-lines")}),
    "a line added to a log": (edit(RUN, r"\Z", "a remark\n", 1), {(RECORD, "altered")}),
    "a run removed": (lambda folder: (folder / RUN).unlink(), BOTH),
    "a run added": (lambda folder: write(folder / "runs", [log(77)], first=77), BOTH),
    "a run renamed": (lambda folder: (folder / RUN).rename(folder / "runs/a.txt"), BOTH),
    "a run moved to excluded": (lambda folder: shutil.move(folder / RUN, write(folder / "excluded", [])),
                                {*BOTH, (".", "exclusions")}),
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
    "an unknown key": (edit(RECORD, r"\A\{", '{"more": 1,'), {(RECORD, "record-file")}),
    "a record with a reason why not": (edit(RECORD, '"why_no_record": null', '"why_no_record": "x"'),
                                       {(RECORD, "record-file")}),
    "another version": (edit(RECORD, '"version": 1', '"version": 2'), {(RECORD, "record-file")}),
    "a path that escapes": (edit(RECORD, rf'"file": "{uuid(1)}', f'"file": "../{uuid(1)}'),
                            {(RECORD, "record-file")}),
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
def test_packed(name, packed, findings):
    change, expected = ALTERED[name]
    change(packed)
    before = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    found = findings(packed)
    assert found if expected is None else found == expected, found
    assert before == {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}


def test_a_record_that_breaks_a_rule(packed, findings, tmp_path, capsys):
    """A non-record that calls itself a record."""
    write(tmp_path / "slower", runs(pace=150.0))
    folder = pack(tmp_path, "Slow", "slower", "--baseline", tmp_path / "base", "--non-record", "slow")
    capsys.readouterr()
    assert not findings(folder)
    edit(RECORD, '"kind": "non-record",\n  "why_no_record": "slow"',
         '"kind": "record",\n  "why_no_record": null')(folder)
    assert (".", "faster-than-baseline") in findings(folder)


def test_folder_moved_or_twice(packed, findings):
    shutil.copytree(packed, packed.parent / "2026-11-25_Again")
    assert findings(packed.parents[1]) == {("track_0_laptop/2026-11-24_Idea/runs", "duplicate-runs"),
                                           ("track_0_laptop/2026-11-25_Again", "folder-name")}
    other = packed.parents[1] / "track_1_short"
    other.mkdir()
    packed.rename(other / packed.name)
    assert ("track_1_short/2026-11-24_Idea", "folder-name") in findings(packed.parents[1])


def test_a_baseline_elsewhere(tmp_path, findings, capsys):
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


# Folders of the public kind

def public_folder(root: Path, name: str = "2025-01-02_Idea", first: int = 1) -> Path:
    folder = root / "track_1_short" / name
    write(folder / "this_pr", [public(seed) for seed in range(first, first + RUNS)], first)
    write(folder / "baseline", [public(seed, pace=110.0) for seed in range(first + 500, first + 504)],
          first + 500)
    (folder / README).write_text("losses = [1.0, 2.0]\n")
    return folder


OTHERS = "this_pr"
THIS = f"{OTHERS}/{uuid(1)}.txt"
PUBLIC = {
    "nothing": (lambda folder: None, set()),
    "no source": (edit(THIS, r"\A# the trainer\n\n", ""), {"same-source"}),
    "another source": (edit(THIS, r"\A# the trainer", "# a trainer"), {"same-source"}),
    "no hardware": (edit(THIS, r"^\|.*\n", ""), {"same-hardware"}),
    "another GPU": (edit(THIS, "NVIDIA H100 80GB HBM3", "NVIDIA H200"), {"same-hardware"}),
    "fewer GPUs": (edit(THIS, r"^\|   [1-7] .*\n", ""), {"same-hardware"}),
    "no torch": (edit(THIS, r"^(Running P)yTorch.*\n", r"\1ython 3.12.9\n"), {"same-torch"}),
    "another torch": (edit(THIS, r"2\.8\.0", "2.9.0"), {"same-torch"}),
    "a seed in one log only": (edit(THIS, r"\Z", "Using seed=5\n", 1), {"distinct-seeds"}),
    "an unfinished run": (edit(THIS, r"^step:20/20 val_loss.*\n", ""), {"final-validation"}),
    "a cut log": (lambda folder: (folder / THIS).write_text((folder / THIS).read_text()[:-70]),
                  {"intact-logs", "final-validation"}),
    "a shorter run": (lambda folder: [edit(THIS, r"^step:(16|17|18|19|20)/.*\n", "")(folder),
                                      edit(THIS, r"^(step:\d+)/20", r"\1/15")(folder)], {"same-settings"}),
    "a time edited": (edit(THIS, r"^(step:15/20 val_loss:\S+ train_time:)\d+", r"\g<1>1300"),
                      {"consistent-lines"}),
    "a copy": (lambda folder: shutil.copy(folder / THIS, folder / f"this_pr/{uuid(99)}.txt"),
               {"distinct-curves"}),
    "a banned flag": (lambda folder: [
        edit(f"{OTHERS}/{path.name}", r"\A# the trainer", "torch._inductor.config.a = 1")(folder)
        for path in folder.glob("this_pr/*")], {"compile-flags"}),
    "hidden files": (lambda folder: write(folder / ".pack-1", ["no log"]), set()),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public(name, tmp_path, findings):
    folder = public_folder(tmp_path)
    change, expected = PUBLIC[name]
    change(folder)
    assert findings(folder) == {(OTHERS, rule) for rule in expected}


def test_files_that_are_no_logs(tmp_path, findings):
    folder = public_folder(tmp_path)
    (folder / "this_pr/requirements.txt").write_text("torch\n")
    link(folder / THIS, Path("/etc/passwd"))
    assert findings(folder) == {("this_pr/requirements.txt", "not-a-log"), (THIS, "link")}


def test_an_archive_in_which_runs_are_twice(tmp_path, findings):
    """A whole folder under another name, and one log with a remark in another folder."""
    for k in range(3):
        public_folder(tmp_path, f"2025-01-0{k + 1}_Idea{k}", first=10 * k + 1)
    track = tmp_path / "track_1_short"
    assert not findings(tmp_path)
    shutil.copytree(track / "2025-01-02_Idea1/this_pr", track / "2025-02-01-Idea1")
    (track / f"2025-01-03_Idea2/this_pr/{uuid(61)}.txt").write_text(
        (track / "2025-01-01_Idea0" / THIS).read_text() + "a remark\n")
    assert findings(tmp_path) == {("track_1_short/2025-01-02_Idea1/this_pr", "duplicate-runs"),
                                  ("track_1_short/2025-01-01_Idea0/this_pr", "duplicate-runs")}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 10**6, b"<!-- A note" * 10**5])
def test_hostile_readme(content, packed, findings):
    (packed / README).write_bytes(content)
    assert findings(packed) == {(README, "altered")}


def test_paths(tmp_path, records):
    def refusal(path) -> str:
        code, _, err = records("verify", path)
        assert code == 2
        return err
    assert "found none" in refusal(tmp_path) and "nothing there" in refusal(tmp_path / "none")
    (tmp_path / "requirements.txt").write_text("numpy\n")
    assert "found none" in refusal(tmp_path) and "found a file" in refusal(tmp_path / "requirements.txt")


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


@pytest.mark.skipif("ARCHIVE" not in os.environ, reason="set ARCHIVE to the folder of the public records")
def test_the_public_archive(records):
    """What a survey of the archive (commit f411b3d3) found by hand."""
    found = json.loads(records("verify", os.environ["ARCHIVE"], "--json")[1])
    evidence = {}
    for finding in found["findings"]:
        evidence.setdefault(finding["kind"], {})[finding["path"]] = finding["evidence"]
    assert any("20 of 20" in text and "SkipMLPBlocks" in path + text
               for path, text in evidence["duplicate-runs"].items())
    assert any("1500 of 1555" in text for text in evidence["final-validation"].values())
    assert any("2026-01-10_FusedLinearReLUSquare" in path for path in evidence["same-hardware"])
    assert len(evidence["not-a-log"]) == 19
    assert found["runs"] == 1734
