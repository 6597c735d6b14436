"""verify: a packed folder in which anything is altered, and folders of the public kind with each of the known
failures.

MODES says for each failure mode seen in the public archive which test shows that a tool finds it, or why no
tool can.

    ARCHIVE=<folder of the public records> pytest tests/records/test_verify.py -k archive
"""
import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import scipy.stats
from tests.helpers.claims import RUNS, finals, log, public, replaced, runs, slow, uuid, write

from records import readme, schema, verify
from records.__main__ import guarded

MODES = {  # numbers of the survey of the public records
    1: ("numbers without logs", "test_public[a log is missing]"),
    2: ("baseline not run again", "test_public[no baseline]"),
    3: ("no embedded source, no torch version", "test_public[no source]"),
    4: ("hardware told in three styles, or not at all", "test_public[no hardware]"),
    5: ("mixed torch builds", "test_public[another torch]"),
    6: ("several sources in a folder", "test_public[another source]"),
    7: ("file names of all kinds", "test_public[odd log name]"),
    8: ("folders twice, under other dates and spellings", "test_archive_of_several_folders"),
    9: ("other hardware, not labelled", "test_archive_of_several_folders"),
    10: ("incomplete or foreign logs in the set", "test_public[an unfinished run]"),
    11: ("several trials in a file", "test_several_trials_in_a_file"),
    12: ("claimed step before the last one", "test_claimed_step_before_the_last"),
    13: ("a log put together by hand", "test_public[a log by hand]"),
    14: ("settings printed that nothing uses",
         "no tool: whether a setting is used shows only in a run, and logs are never run; "
         "same-settings compares what is printed"),
    15: ("4 decimals here, 5 there", "test_fewer_decimals_than_the_log"),
    16: ("seeds used twice",
         "test_check.py::test_doctored[a seed copied]; where logs hold no seed, no tool, unless a curve is "
         "there twice"),
    "changed loss": ("a loss changed in a packed log", "test_packed[a loss changed]"),
    "changed loss before packing": ("a loss changed with nothing else",
                                    "no tool: a loss is printed once and nothing else in the "
                                    "log depends on it; only another run of the embedded source shows it"),
    "swapped time": ("the time of another run", "test_check.py::test_doctored[times of two runs swapped]"),
    "removed line": ("a line removed", "test_check.py::test_doctored[a validation removed]"),
    "copied file": ("a log twice", "test_check.py::test_doctored[a copy with another seed and final loss]"),
    "added run": ("runs added until it passed",
                  "test_check.py::test_runs_added_until_it_passed; no tool sees a run that was "
                  "thrown away before packing"),
}


def findings(path: Path, capsys) -> set[tuple[str, str]]:
    """(place below the path, kind) of each finding; the exit code must fit."""
    code = guarded(["verify", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert code == int(bool(found))
    return {(finding["path"], finding["kind"]) for finding in found}


def test_modes_name_tests_that_exist(request):
    known = {item.nodeid.partition("test_verify.py::")[2] for item in request.session.items}
    assert set(range(1, 17)) <= MODES.keys()
    here = [place for _, place in MODES.values() if place.startswith("test_") and ".py" not in place]
    assert len(here) >= 13
    if len(known) > len(here):  # not where a part of the tests was selected
        assert not [place for place in here if place.partition("[")[0] not in {name.partition("[")[0]
                                                                               for name in known}]
    text = (Path(__file__).parent / "test_check.py").read_text() + Path(__file__).read_text()
    for _, place in MODES.values():
        if place.startswith("test_") and "[" in place:
            assert f'"{place.partition("[")[2].partition("]")[0]}":' in text, place


# A folder built by pack


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Logs in logs/ and base/, packed into out/."""
    root = tmp_path_factory.mktemp("original")
    write(root / "logs", runs())
    write(root / "base", slow(), first=1001)
    (root / "note.md").write_text("An idea.")
    (root / "out").mkdir()
    assert guarded(["pack", "--name", "Idea", "--date", "2026-11-24", "--logs", str(root / "logs"),
                    "--baseline",
                    str(root / "base"), "--note", str(root / "note.md"), "-o", str(root / "out")]) == 0
    return root


@pytest.fixture
def packed(original, tmp_path) -> Path:
    """The packed folder, in a copy of all."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out/track_0_laptop/2026-11-24_Idea"


def edit(name: str, pattern: str, new: str, count: int = 0):
    def change(folder):
        path = folder / name
        path.write_text(replaced(path.read_text(), pattern, new, count=count))
    return change


RUN = f"runs/{uuid(1)}.txt"
RECORD, README = "record.json", "README.md"
ALTERED = {
    "a loss changed": (edit(RUN, r"^(step:20/20 val_loss:)\S+", r"\g<1>1.5001"),
                       {(RECORD, "altered"), (README, "altered")}),
    "an early loss changed": (edit(RUN, r"^(step:5/20 val_loss:)\S+", r"\g<1>2.5001"), {(RECORD, "altered")}),
    "a time changed": (edit(RUN, r"^(step:20/20 val_loss:\S+ train_time:)\d+", r"\g<1>1600"),
                       {(RECORD, "altered"), (README, "altered"), (".", "consistent-lines")}),
    "a line added to a log": (edit(RUN, r"\Z", "a remark\n", 1), {(RECORD, "altered")}),
    "a run removed": (lambda folder: (folder / RUN).unlink(), {(RECORD, "altered"), (README, "altered")}),
    "a run added": (lambda folder: write(folder / "runs", [log(77)], first=77),
                    {(RECORD, "altered"), (README, "altered")}),
    "a run renamed": (lambda folder: (folder / RUN).rename(folder / "runs/a.txt"),
                      {(RECORD, "altered"), (README, "altered")}),
    "a run moved to excluded": (lambda folder: shutil.move(folder / RUN, write(folder / "excluded", [])),
                                {(RECORD, "altered"), (README, "altered"), (".", "exclusions")}),
    "a baseline removed": (lambda folder: shutil.rmtree(folder / "baseline"),
                           {(RECORD, "altered"), (README, "altered"), (".", "faster-than-baseline")}),
    "a number in the README": (edit(README, r"± 0\.00", "± 0.01", 1), {(README, "altered")}),
    "the probability in the README": (edit(README, r"# p=0\.\d+", "# p=0.0001"), {(README, "altered")}),
    "a line of the README removed": (edit(README, r"^- Time:.*\n", ""), {(README, "altered")}),
    "a row added to the README": (edit(README, r"\Z", "| 1 |", 1), {(README, "altered")}),
    "the marks of the note removed": (edit(README, r"^<!--.*\n", ""), {(README, "altered")}),
    "the README removed": (lambda folder: (folder / README).unlink(), {(README, "altered")}),
    "nothing": (lambda folder: None, set()),
    "the note edited": (edit(README, "^An idea.", "A better idea, with\n\n| a | table |"), set()),
    "a list in the note": (edit(README, "^An idea.", "losses = [1.4001, 1.4002]"),
                           {(README, "number-without-log")}),
    "a picture for the note": (lambda folder: write(folder / "media", ["png"]), set()),
    "the mean in record.json": (edit(RECORD, r'"loss_mean": 1\.\d', '"loss_mean": 1.4', 1),
                                {(RECORD, "altered")}),
    "a hash in record.json": (edit(RECORD, r'"sha256": "..', '"sha256": "00', 1), {(RECORD, "altered")}),
    "a seed in record.json": (edit(RECORD, r'"seed": 1,', '"seed": 91,'), {(RECORD, "altered")}),
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
    "no JSON": (edit(RECORD, r"\}\n\Z", ""), {(RECORD, "record-file")}),
    "a huge record.json": (edit(RECORD, r"\Z", " " * schema.SIZE_LIMIT, 1), {(RECORD, "record-file")}),
    "another track": (edit(RECORD, '"track": "shakespeare"', '"track": "medium"'), None),
    "a source edited": (edit(RUN, "^# the optimizer", "# the  optimizer"), {
        (RECORD, "altered"), (README, "altered"), (".", "same-source")}),
    "files of macOS": (lambda folder: [(folder / name).write_bytes(b"\0\5\x16\7") for name in (
        ".DS_Store", "runs/.DS_Store", f"runs/._{uuid(1)}.txt")], set()),
    "a log with an odd name": (lambda folder: shutil.copy(folder / RUN, folder / "runs/my log.txt"), {
        (RECORD, "record-file"), ("runs", "duplicate-files")}),
    "a folder among the runs": (lambda folder: write(folder / "runs/more", [log(77)]),
                                {(RECORD, "record-file")}),
    "a file added": (lambda folder: write(folder / "source", ["print()"]),
                     {(f"source/{uuid(1)}.txt", "altered")}),
    "a link to a log": (lambda folder: link(folder / RUN, folder / f"runs/{uuid(2)}.txt"),
                        {(RUN, "link"), (RECORD, "altered"), (README, "altered")}),
    "a link out of the folder": (lambda folder: link(folder / RECORD, Path("/etc/hostname")), None),
    "a folder that is a link": (lambda folder: (folder / "media").symlink_to("/etc"), {("media", "link")}),
}


def link(path: Path, target: Path):
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("name", ALTERED)
def test_packed(name, packed, capsys):
    change, expected = ALTERED[name]
    change(packed)
    found = findings(packed, capsys)
    assert found if expected is None else found == expected, found


def test_a_record_that_breaks_a_rule(packed, capsys, tmp_path):
    """A non-record that calls itself a record."""
    logs = write(tmp_path / "slower", runs(pace=150.0))
    command = ["pack", "--name", "Slow", "--date", "2026-11-24", "--logs", str(logs), "--baseline",
               str(tmp_path / "base"), "-o",
               str(tmp_path / "out"), "--non-record", "slow"]
    assert guarded(command) == 0
    capsys.readouterr()
    folder = packed.parent / "2026-11-24_Slow"
    assert not findings(folder, capsys)
    edit(RECORD, '"kind": "non-record",\n  "why_no_record": "slow"',
         '"kind": "record",\n  "why_no_record": null')(folder)
    assert (".", "faster-than-baseline") in findings(folder, capsys)


def test_folder_moved_or_twice(packed, capsys):
    shutil.copytree(packed, packed.parent / "2026-11-25_Again")
    found = findings(packed.parents[1], capsys)
    assert found == {("track_0_laptop/2026-11-24_Idea/runs", "duplicate-folder"),
                     ("track_0_laptop/2026-11-25_Again", "folder-name")}
    other = packed.parents[1] / "track_1_short"
    other.mkdir()
    packed.rename(other / packed.name)
    assert ("track_1_short/2026-11-24_Idea", "folder-name") in findings(packed.parents[1], capsys)


def test_baseline_of_one_record_may_be_the_runs_of_another(packed, tmp_path, capsys):
    assert guarded(["pack", "--name", "Before", "--date", "2026-11-23", "--logs", str(tmp_path / "base"),
                    "-o",
                    str(tmp_path / "out"), "--waive", "faster-than-baseline=the first record"]) == 0
    capsys.readouterr()
    assert not findings(tmp_path / "out", capsys)


def test_a_baseline_elsewhere(original, tmp_path, capsys):
    """The runs of another record are the baseline of this one: what happens to them is told."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out/track_0_laptop")
    base = ["pack", "--date", "2026-11-24", "-o", str(tmp_path / "out")]
    assert guarded([*base, "--name", "Before", "--logs", str(tmp_path / "base"), "--waive",
                    "faster-than-baseline=first"]) == 0
    assert guarded([*base, "--name", "Idea", "--logs", str(tmp_path / "logs"), "--baseline",
                    str(tmp_path / "base")]) == 0
    capsys.readouterr()
    folder = tmp_path / "out/track_0_laptop"
    assert not findings(folder, capsys)
    edit("2026-11-24_Before/" + f"runs/{uuid(1001)}.txt", r"^(step:5/20 val_loss:)\S+",
         r"\g<1>2.5001")(folder)
    assert {("2026-11-24_Before/record.json", "altered"),
            ("2026-11-24_Idea/record.json", "altered")} <= findings(folder, capsys)
    shutil.rmtree(folder / "2026-11-24_Before")
    assert {("2026-11-24_Idea/record.json", "altered"),
            ("2026-11-24_Idea", "faster-than-baseline")} <= findings(folder, capsys)


def test_a_name_that_leads_out_of_the_track_is_no_baseline(packed, capsys):
    for name in ("../2026-11-24_Idea", "2026-11-24_Idea/..", "/etc"):
        text = (packed / RECORD).read_text()
        edit(RECORD, '"baseline_record": null', f'"baseline_record": "{name}"')(packed)
        assert findings(packed, capsys) == {(RECORD, "record-file")}
        (packed / RECORD).write_text(text)


def test_nothing_is_written(packed, capsys):
    def snapshot():
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
                for path in packed.rglob("*")}
    edit(README, "± 0", "± 1")(packed)
    before = snapshot()
    findings(packed, capsys)
    assert snapshot() == before


# Folders of the public kind


def page(texts: list[str], p: str | None = None, baseline: list[str] = ()) -> str:
    losses, times = finals(texts)
    if p is None:
        p = f"{scipy.stats.ttest_1samp([*map(float, losses)], 3.28, alternative='less').pvalue:.4f}"
    text = f"## Idea\n\n```\nlosses = [{', '.join(losses)}]\ntimes  = [{', '.join(times)}]\n\n# p={p}\n```\n"
    return text + (f"\nPrior record: [{', '.join(finals(baseline)[1])}]\n" if baseline else "")


def public_folder(root: Path, name: str = "2025-01-02_Idea", first: int = 1, **options) -> Path:
    texts = [public(seed, **options) for seed in range(first, first + RUNS)]
    baseline = [public(seed, pace=110.0) for seed in range(first + 500, first + 504)]
    folder = root / "track_1_short" / name
    write(folder / "this_pr", texts, first)
    write(folder / "baseline", baseline, first + 500)
    (folder / README).write_text(page(texts, baseline=baseline))
    return folder


def edit_all(pattern: str, new: str):
    """A change in each log of the runs."""
    return lambda folder: [edit(str(path.relative_to(folder)), pattern, new)(folder)
                           for path in folder.glob("this_pr/*")]


def right_row(folder):
    losses, times = finals([(folder / THIS).read_text()])
    with open(folder / README, "a") as file:
        file.write(f"\n| run | loss | time |\n|-|-|-|\n| {uuid(1)[:8]} | {losses[0]} | "
                   f"{float(times[0]) * 1000:.0f}ms |\n")


def no_baseline(folder):
    shutil.rmtree(folder / "baseline")
    edit(README, "^Prior.*", "")(folder)


def by_hand(folder):
    path = folder / THIS
    path.write_text(replaced(path.read_text(), r"^Running P.*\n|^\|.*\n", ""))
    path.rename(folder / "this_pr/fake_log_from_seed0.txt")


def shorter(folder):
    edit(THIS, r"^step:(16|17|18|19|20)/.*\n", "")(folder)
    edit(THIS, r"^(step:\d+)/20", r"\1/15")(folder)


THIS, OTHERS = f"this_pr/{uuid(1)}.txt", "this_pr"
PUBLIC = {
    "nothing": (lambda folder: None, set()),
    "a log is missing": (lambda folder: (folder / THIS).unlink(), {(README, "number-without-log")}),
    "a loss typed wrong": (edit(README, r"losses = \[3\.2", "losses = [3.3"), {
        (README, "number-without-log"), (README, "p-value")}),
    "a time typed wrong": (edit(README, r"times  = \[\d", "times  = [3"), {(README, "number-without-log")}),
    "a probability typed wrong": (edit(README, r"# p=0\.\d+", "# p=0.0001"), {(README, "p-value")}),
    "a run left out of the list": (edit(README, r"(losses = \[)[\d.]+, ", r"\1"),
                                   {(README, "unlisted-runs")}),
    "times of other runs": (edit(README, r"(times  = \[)([\d.]+), ([\d.]+)", r"\1\3, \2"),
                            {(README, "pairing")}),
    "a probability without losses": (edit(README, r"\Z", "\n" * 20 + "It is significant, p = 0.0001.\n", 1),
                                     {(README, "p-without-list")}),
    "a table row": (edit(README, r"\Z",
                         f"\n| run | loss | time |\n|-|-|-|\n| {uuid(1)[:8]} | 3.1111 | 999ms |\n", 1),
                    {(README, "table-row")}),
    "a right table row": (right_row, set()),
    "a link to nowhere": (edit(README, r"\Z", "\nSee [the log](this_pr/none.txt).\n", 1),
                          {(README, "broken-link")}),
    "a link to a log": (edit(README, r"\Z",
                             f"\nSee [the log]({THIS}) and [that](https://example.org/x.txt).\n", 1), set()),
    "no README": (lambda folder: (folder / README).unlink(), {(".", "no-readme")}),
    "no baseline": (no_baseline, {(".", "no-baseline")}),
    "baseline without logs": (lambda folder: shutil.rmtree(folder / "baseline"),
                              {(README, "number-without-log")}),
    "no source": (edit(THIS, r"\A# the trainer\n\n", ""), {(OTHERS, "missing-facts")}),
    "no hardware": (edit(THIS, r"^\|.*\n", ""), {(OTHERS, "missing-facts"), (OTHERS, "same-hardware")}),
    "no torch": (edit(THIS, r"^(Running P)yTorch.*\n", r"\1ython 3.12.9\n"),
                 {(OTHERS, "missing-facts"), (OTHERS, "same-torch")}),
    "a log by hand": (by_hand, {(OTHERS, "missing-facts"), (OTHERS, "log-name"), *(
        (OTHERS, rule) for rule in ("same-source", "same-hardware", "same-torch"))}),
    "another torch": (edit(THIS, r"2\.8\.0", "2.9.0"), {(OTHERS, "same-torch")}),
    "another source": (edit(THIS, r"\A# the trainer", "# a trainer"), {(OTHERS, "same-source")}),
    "another GPU": (edit(THIS, "NVIDIA H100 80GB HBM3", "NVIDIA H200"),
                    {(OTHERS, "same-hardware"), (".", "other-hardware")}),
    "fewer GPUs": (edit(THIS, r"^\|   [1-7] .*\n", ""), {(OTHERS, "same-hardware"), (".", "other-hardware")}),
    "odd log name": (lambda folder: (folder / THIS).rename(folder / "this_pr/seed 1.txt"),
                     {(OTHERS, "log-name")}),
    "a seed in one log only": (edit(THIS, r"\Z", "Using seed=5\n", 1), {(OTHERS, "distinct-seeds")}),
    "an unfinished run": (edit(THIS, r"^step:20/20 val_loss.*\n", ""), {
        (THIS, "incomplete-run"), (README, "number-without-log")}),
    "a cut log": (lambda folder: (folder / THIS).write_text((folder / THIS).read_text()[:-70]), {
        (THIS, "incomplete-run"), (THIS, "odd-log"), (README, "number-without-log")}),
    "a shorter run": (shorter, {(OTHERS, "same-settings"), (README, "number-without-log")}),
    "a time edited": (edit(THIS, r"^(step:15/20 val_loss:\S+ train_time:)\d+", r"\g<1>1300"),
                      {(OTHERS, "consistent-lines")}),
    "a copy": (lambda folder: shutil.copy(folder / THIS, folder / f"this_pr/{uuid(99)}.txt"), {
        (OTHERS, "duplicate-files"), (OTHERS, "distinct-curves"), (README, "unlisted-runs")}),
    "no log": (lambda folder: (folder / "this_pr/requirements.txt").write_text("torch\n"), {
        ("this_pr/requirements.txt", "not-a-log"), (OTHERS, "log-name")}),
    "a spelling of README": (lambda folder: (folder / README).rename(folder / "ReadMe.md"),
                             {("ReadMe.md", "folder-name")}),
    "a link out": (lambda folder: link(folder / THIS, Path("/etc/passwd")),
                   {(THIS, "link"), (README, "number-without-log")}),
    "a list of whole numbers": (edit(README, r"\Z", "\nlayers: [3, 3, 3]\n", 1), set()),
    "a folder of tools": (lambda folder: write(folder / ".pack-1", ["no log"]), set()),
    "code in the README": (edit(README, r"\Z", "\nlosses = [__import__('os').system('touch x'), 3.1]\n", 1),
                           set()),
    "a banned flag": (edit_all(r"\A# the trainer", "torch._inductor.config.a = 1"),
                      {(OTHERS, "compile-flags")}),
    "runs after the date": (edit_all("^Thu Jan  2", "Thu Jan  9"), {(OTHERS, "date")}),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public(name, tmp_path, capsys):
    folder = public_folder(tmp_path)
    change, expected = PUBLIC[name]
    change(folder)
    assert findings(folder, capsys) == expected


def test_archive_of_several_folders(tmp_path, capsys):
    """Folders twice under swapped dates and another spelling, and hardware that the rest of the track
    did not use."""
    for k in range(3):
        public_folder(tmp_path, f"2025-01-0{k + 1}_Idea{k}", first=10 * k + 1)
    folder = tmp_path / "track_1_short/2025-01-02_Idea1"
    shutil.copytree(folder, tmp_path / "track_1_short/2025-02-01-Idea1")
    public_folder(tmp_path, "2025-01-03_Other", first=61, gpu="NVIDIA H200")
    found = findings(tmp_path, capsys)
    assert found == {("track_1_short/2025-01-02_Idea1/baseline", "duplicate-folder"),
                     ("track_1_short/2025-01-02_Idea1/this_pr", "duplicate-folder"),
                     ("track_1_short/2025-02-01-Idea1", "folder-name"),
                     ("track_1_short/2025-01-03_Other", "other-hardware")}


def test_lists_in_a_text():
    text = "a\nlosses = [1.50, 1.6]\nagain: [1.5, 1.6]\ntimes = ['10.125',\n 2e1]\n[1.5]\n[1, 2]\n[1.5, x]\n"
    found = [(listed.line, listed.before.strip(), listed.values, listed.digits)
             for listed in readme.lists(text)]
    assert found == [(2, "losses =", (1.5, 1.6), 2), (4, "times =", (10.125, 20.0), 3)]


def test_probabilities_in_a_text():
    text = ("p=0.0060 and (`p=0.0001`), p-value: 4.53e-04\n"
            "z test: p = 0.3, p < 0.01, top=0.5, p = 12, p = 2.5, P = 1e-3\n")
    found = [(line, p) for line, p, _ in readme.probabilities(text)]
    assert found == [(1, 0.006), (1, 0.0001), (1, 4.53e-4), (2, 0.3), (2, 1e-3)]
    assert [half for *_, half in readme.probabilities(text)] == pytest.approx([5e-5, 5e-5, 5e-7, 0.05, 5e-4])


def kinds(*facts) -> list[tuple[str, str]]:
    """Findings across runs, each given as record, folder, log, sha256, curve, hardware."""
    found = verify.across([verify.ComparedRun(*fact[:4], frozenset(fact[4]), fact[5], "small")
                           for fact in facts])
    return sorted((finding.path, finding.kind) for finding in found)


def test_across_folders():
    def run(folder, log, sha, curve=(), hardware="8 x H100"):
        return folder, folder, log, sha, curve, hardware
    assert kinds(run("a", "1", "x"), run("a", "2", "y")) == []
    assert kinds(run("a", "1", "x"), run("b", "1", "x")) == [("a", "duplicate-files")]
    assert kinds(run("a", "1", "x"), run("a", "2", "x"), run("a", "3", "y"),
                 run("a", "4", "y")) == [("a", "duplicate-files")]
    pair = run("a", "1", "x"), run("a", "2", "y")
    assert kinds(*pair, run("b", "1", "x"), run("b", "3", "y")) == [("a", "duplicate-folder")]
    assert kinds(*pair, run("b", "1", "x"), run("b", "3", "y"),
                 run("b", "4", "z")) == [("a", "duplicate-files")]
    assert kinds(run("a", "1", "x", "123"), run("b", "1", "y", "123")) == [("a", "duplicate-curves")]
    assert kinds(run("a", "1", "x", "12"), run("b", "1", "y", "12")) == []  # too short to tell
    assert kinds(run("a", "1", "x", "123"), run("a", "2", "y", "123")) == []  # a rule says that
    other = run("b", "1", "z", hardware="1 x H100")
    assert kinds(*pair, other) == [("b", "other-hardware")]
    assert kinds(pair[0], other) == []  # no majority
    assert kinds(*pair, run("b", "1", "z", hardware=None)) == []


def test_curves_twice_in_other_files(tmp_path, capsys):
    public_folder(tmp_path)
    other = public_folder(tmp_path, "2025-01-03_Other", first=61)
    text = (tmp_path / "track_1_short/2025-01-02_Idea" / THIS).read_text()
    (other / f"this_pr/{uuid(61)}.txt").write_text(text + "a remark\n")
    assert ("track_1_short/2025-01-02_Idea/this_pr", "duplicate-curves") in findings(tmp_path, capsys)


def test_several_trials_in_a_file(tmp_path, capsys):
    """A list of all trials in one file is found; a list with one more is not."""
    from tests.helpers.synthetic import make
    folder = tmp_path / "track_3_optimization/results/20260502_trials"
    folder.mkdir(parents=True)
    made = make("T2m", seed=1)
    made.write(folder / f"{uuid(1)}.txt")
    losses = [run["val_points"][-1][1] for run in made.runs]
    (folder / README).write_text(f"losses = {losses}\n")
    assert not findings(folder, capsys)
    (folder / README).write_text(f"losses = {[*losses, 3.27]}\n")
    assert findings(folder, capsys) == {(README, "number-without-log")}


def track_3(tmp_path, decimals: int) -> tuple[Path, list[str]]:
    folder = tmp_path / "track_3_optimization/results/20250102_idea"
    texts = [public(seed, final=3.0, decimals=decimals) for seed in range(1, RUNS + 1)]
    write(folder, texts)
    return folder, texts


def test_claimed_step_before_the_last(tmp_path, capsys):
    folder, texts = track_3(tmp_path, 4)
    losses = [text.partition("step:15/20 val_loss:")[2].split()[0] for text in texts]
    (folder / README).write_text(f"losses = [{', '.join(losses)}]\n")
    assert not findings(folder, capsys)
    mixed = [*losses[:-1], texts[-1].partition("step:20/20 val_loss:")[2].split()[0]]
    (folder / README).write_text(f"losses = [{', '.join(mixed)}]\n")
    assert findings(folder, capsys) == {(README, "number-without-log")}


def test_fewer_decimals_than_the_log(tmp_path, capsys):
    folder, texts = track_3(tmp_path, 5)
    losses = [f"{float(loss):.4f}" for loss in finals(texts)[0]]
    (folder / README).write_text(f"losses = [{', '.join(losses)}]\n")
    found = findings(folder, capsys)
    assert found <= {(README, "number-without-log")}  # the target is far from these losses
    folder, texts = tmp_path / "track_1_short/2025-01-02_Idea", [public(seed, decimals=5)
                                                                 for seed in range(1, RUNS + 1)]
    write(folder / "baseline", texts)
    losses = [f"{float(loss):.4f}" for loss in finals(texts)[0]]
    (folder / README).write_text(f"losses = [{', '.join(losses)}]\n")
    assert not findings(folder, capsys)


def test_plain_folders(tmp_path, capsys):
    """Without a date in any name, all below the path is one record."""
    write(tmp_path / "logs/a", [public(1), public(2)])
    write(tmp_path / "logs/b", [public(3), public(4)], first=3)
    lists = [f"losses = [{', '.join(finals([public(seed) for seed in seeds])[0])}]"
             for seeds in ((1, 2), (3, 4))]
    (tmp_path / "logs" / README).write_text("\n".join(lists))
    assert findings(tmp_path / "logs", capsys) == set()


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"[" * 10**6, b"losses = [" + b"1.5, " * 10**5, b"| a" * 10**5, b"](" * 10**5,
    b"p=" * 10**5,
    b"[1.5 " * 10**5, b"[" + b"1.5\n" * 10**5 + b"]", b"losses = [1e308, 1e999, nan, -1.0]",
    b"[3.2, 9" + b"9" * 5000 + b".5]",
    b"p=1e-999 p=0.e9 p=1e999 p=0e999", b"[a](b\0c)", "[a]({})".format("é" * 200).encode(),
    b"[a](" + b"x" * 299 + b")"])
def test_hostile_readme(content, tmp_path, capsys):
    folder = public_folder(tmp_path)
    (folder / README).write_bytes(content)
    findings(folder, capsys)


def test_other_texts_beside_records(packed, capsys):
    """records/ itself holds requirements.txt and a README of its own."""
    (packed.parents[1] / "requirements.txt").write_text("numpy\n")
    (packed.parents[1] / README).write_text("# Records\n")
    assert not findings(packed.parents[1], capsys)


def test_paths(tmp_path, capsys):
    (tmp_path / "requirements.txt").write_text("numpy\n")
    assert guarded(["verify", str(tmp_path)]) == 2 and "other texts only" in capsys.readouterr().err
    (tmp_path / "requirements.txt").unlink()
    assert guarded(["verify", str(tmp_path / "none")]) == 2 and "nothing there" in capsys.readouterr().err
    assert guarded(["verify", str(tmp_path)]) == 2 and "expected logs" in capsys.readouterr().err
    (tmp_path / "file.txt").write_text("")
    assert guarded(["verify", str(tmp_path / "file.txt")]) == 2 and "found a file" in capsys.readouterr().err


def test_never_runs_what_it_reads():
    """No module of records evaluates, imports or unpickles text."""
    for path in (Path(__file__).parents[2] / "records").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), (path, node.lineno)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not {"pickle", "marshal", "shelve", "torch", "yaml"} & {module.split(".")[0]
                                                                               for module in modules}, path


@pytest.mark.skipif("ARCHIVE" not in os.environ, reason="set ARCHIVE to the folder of the public records")
def test_the_public_archive(capsys):
    """What a survey of the archive (commit f411b3d3) found by hand."""
    guarded(["verify", os.environ["ARCHIVE"], "--json"])
    found = json.loads(capsys.readouterr().out)
    evidence = {}
    for finding in found["findings"]:
        evidence.setdefault(finding["kind"], {}).setdefault(finding["path"], []).append(finding["evidence"])
    for folder, text in {"2024-12-17_SparsifyEmbeds": "1260 of 1261", "2025-01-04_SoftCap": "79 of 80",
                         "2025-01-16_Sub3Min": "31 of 32", "2025-01-26_BatchSize": "80 of 81",
                         "2025-10-31_AdamSyncGradientHook": "9 of 10",
                         "2026-02-02_KernelTuning": "9 of 9"}.items():
        assert any(text in line
                   for line in evidence["number-without-log"][f"track_1_short/{folder}/README.md"]), folder
    assert "20 logs" in evidence["duplicate-folder"]["track_1_short/2025-05-09_SkipMLPBlocks"][0]
    other = evidence["other-hardware"]["track_1_short/2026-04-29_XSAGatedLayers"][0]
    assert "30 runs on 8 x NVIDIA H200" in other
    assert "1500 of 1555" in next(lines[0] for path, lines in evidence["incomplete-run"].items()
                                  if "6037e443" in path)
    assert "track_1_short/2026-01-10_FusedLinearReLUSquare" in evidence["same-hardware"]
    assert len(evidence["not-a-log"]) == 19
    assert found["runs"] == 1734
