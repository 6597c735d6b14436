"""pack: what it builds, that it is the same twice, what it refuses, and that it writes nothing else."""
import json
import os
import re
import statistics
from pathlib import Path

import pytest
import scipy.stats
from tests.helpers.claims import RUNS, log, replaced, runs, slow, uuid, write

from records import pack, schema
from records.__main__ import guarded

NOTE = "Twice as good.\n\nBecause *of* everything.\n"


@pytest.fixture
def inputs(tmp_path):
    """A folder to pack into, logs, and the arguments that pack them."""
    write(tmp_path / "logs", runs())
    write(tmp_path / "base", slow(), first=1001)
    (tmp_path / "note.md").write_text(NOTE)
    (tmp_path / "out").mkdir()
    return tmp_path


def arguments(inputs: Path, *more: str, name: str = "Twice", output: str = "out",
              date: str = "2026-11-24") -> list[str]:
    return ["pack", "--name", name, "--date", date, "--logs", str(inputs / "logs"), "--baseline",
            str(inputs / "base"), "--note",
            str(inputs / "note.md"), "-o", str(inputs / output), *more]


FOLDER = "out/track_0_laptop/2026-11-24_Twice"  # where they are packed


def content(folder: Path) -> dict:
    return json.loads((folder / schema.FILE).read_text())


def readme(inputs: Path) -> str:
    return (inputs / FOLDER / "README.md").read_text()


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")}


def test_a_folder_is_built_of_logs_and_of_what_follows_from_them(inputs, capsys):
    before = snapshot(inputs)
    assert guarded(arguments(inputs, "--contributor", "A. Person", "--description", "Twice as good",
                             "--planned", "8")) == 0
    after = snapshot(inputs)
    built = {name.removeprefix(FOLDER + "/"): content for name, content in after.items()
             if name.startswith(FOLDER + "/")}
    assert {**before, "out/track_0_laptop": None, FOLDER: None,
            **{f"{FOLDER}/{name}": built[name] for name in built}} == after
    assert built.keys() == {
        "README.md", "record.json", "runs", "baseline",
        *(f"runs/{uuid(k)}.txt" for k in range(1, RUNS + 1)),
        *(f"baseline/{uuid(k)}.txt" for k in range(1001, 1005))}
    assert built[f"runs/{uuid(3)}.txt"] == before[f"logs/{uuid(3)}.txt"]
    record = content(inputs / FOLDER)
    assert (record["track"], record["name"], record["kind"], record["contributors"]) == (
        "shakespeare", "Twice", "record", ["A. Person"])
    assert (record["runs"]["n"], record["runs"]["step"], record["planned_runs"]) == (RUNS, 20, 8)
    assert (record["world_size"], record["torch"]) == (2, "2.13.0+cpu")
    losses = [float(re.findall(r"val_loss:(\S+)", text)[-1]) for text in runs()]
    p = scipy.stats.ttest_1samp(losses, 1.6, alternative="less").pvalue
    assert record["loss_test"]["p"] == float(f"{p:.3g}") and record["loss_test"]["passes"]
    assert record["runs"]["loss_mean"] == round(statistics.mean(losses), 5)
    times, before = ([int(re.findall(r"val_loss:\S+ train_time:(\d+)", text)[-1]) for text in texts]
                     for texts in (runs(), slow()))
    assert record["speed"]["difference_ms"] == round(statistics.mean(times) - statistics.mean(before), 1)
    p = scipy.stats.ttest_ind(times, before, equal_var=False, alternative="less").pvalue
    assert record["speed"]["p"] == float(f"{p:.3g}")
    assert os.stat(inputs / FOLDER).st_mode & 0o777 == 0o755


def test_the_readme_holds_note_losses_and_a_p_value_that_its_code_prints(inputs, capsys):
    assert guarded(arguments(inputs)) == 0
    text = readme(inputs)
    assert NOTE.strip() in text and "no number was planned" in text
    finals = [re.findall(r"val_loss:(\S+)", text)[-1] for text in runs()]
    assert f"losses = [{', '.join(finals)}]" in text
    run_code(text, capsys)


def run_code(page: str, capsys):
    """The p-value that a page shows is what its own code prints."""
    code = page.partition("```python\n")[2].partition("```")[0]
    capsys.readouterr()
    exec(code, {})
    out = capsys.readouterr().out
    assert out.startswith("p=") and f"# {out.strip()}\n" in code


def test_an_existing_folder_stays_as_it_is(inputs, capsys):
    assert guarded(arguments(inputs)) == 0
    before = snapshot(inputs)
    assert guarded(arguments(inputs, "--description", "other")) == 2
    assert "expected no folder of that name" in capsys.readouterr().err
    assert snapshot(inputs) == before


def test_dry_run_writes_nothing(inputs, capsys):
    before = snapshot(inputs)
    assert guarded(arguments(inputs, "--dry-run")) == 0
    assert "## Result" in capsys.readouterr().out
    assert snapshot(inputs) == before


def test_what_check_fails_is_refused(inputs, capsys):
    (inputs / "logs" / f"{uuid(1)}.txt").write_text(replaced(log(1), r"step_avg:\S+", "step_avg:1.00ms"))
    before = snapshot(inputs)
    assert guarded(arguments(inputs)) == 1
    assert "intact-logs" in capsys.readouterr().err
    assert snapshot(inputs) == before
    assert guarded(arguments(inputs, "--non-record", "a lesson")) == 0
    assert "**No record:** a lesson" in readme(inputs) and "`intact-logs`" in readme(inputs)
    assert content(inputs / FOLDER)["why_no_record"] == "a lesson"


def test_waivers_are_shown(inputs, capsys):
    (inputs / "logs" / f"{uuid(1)}.txt").write_text(replaced(log(1), "PyTorch 2.13.0", "PyTorch 2.13.1"))
    assert guarded(arguments(inputs, "--planned", "9", "--waive", "planned-runs=one lost power", "--waive",
                             "same-torch=a fix of no effect")) == 0
    text = readme(inputs)
    assert "9 were planned beforehand, 8 were made." in text
    assert "`planned-runs`, waived: one lost power (planned 9, found 8)" in text
    assert "`same-torch`, waived: a fix of no effect (torch 2.13.0" in text


def rename(inputs: Path, name: str):
    (inputs / "logs" / f"{uuid(1)}.txt").rename(inputs / "logs" / name)


@pytest.mark.parametrize("change, more, sentence", [
    (None, {"name": "../Twice"}, "at name"),
    (None, {"name": "Twice/x"}, "at name"),
    (None, {"name": ""}, "at name"),
    (None, {"name": "x" * 65}, "at name"),
    (None, {"date": "2026-02-30"}, "at date"),
    (None, {"date": "24.11.2026"}, "at date"),
    (None, {"date": "1764028800"}, "at date"),
    (None, {"output": "nowhere"}, "-o: expected a folder"),
    (lambda inputs: rename(inputs, "with space.txt"), {}, "rename it"),
    (lambda inputs: rename(inputs, "-dash.txt"), {}, "rename it"),
    (lambda inputs: write(inputs / "logs/more", [log(77)]), {}, "two called"),
    (lambda inputs: (write(inputs / "logs/more", [log(77)], first=0xabc),
                     rename(inputs, f"{uuid(0xabc).upper()}.txt")), {}, "two called"),
    (lambda inputs: (inputs / "note.md").write_text(pack.NOTE_END), {}, "no marks of a note"),
    (lambda inputs: (inputs / "note.md").write_bytes(b"\xff"), {}, "--note: expected a readable text"),
    (lambda inputs: (inputs / "note.md").unlink(), {}, "--note: expected a readable text"),
    (lambda inputs: (inputs / "note.md").write_text("x" * (pack.NOTE_LIMIT + 1)), {}, "at most 262,144"),
])
def test_unusable_names_dates_logs_and_notes_are_refused(change, more, sentence, inputs, capsys):
    if change:
        change(inputs)
    before = snapshot(inputs)
    assert guarded(arguments(inputs, **more)) == 2
    assert sentence in capsys.readouterr().err
    assert snapshot(inputs) == before


def test_hostile_settings_do_no_harm(inputs, capsys):
    """Settings go into a command that a reader may paste, and into a table."""
    nasty = '"stages": "$(touch x)", "evil\\"; rm -rf ~": 1, "b": "`id`", "c": "```", "d": "<script>|"'
    for path in inputs.glob("logs/*"):
        path.write_text(replaced(path.read_text(), '"stages": 3', nasty.replace("\\", "\\\\")))
    assert guarded(arguments(inputs)) == 0
    text = readme(inputs)
    command = text.partition("```sh\n")[2].partition("```")[0]
    assert "train_gpt.py --seed=1" in command
    assert not re.search(r"[$`<;|\"()]", command) and "<script>" not in text


def test_the_same_bytes_whatever_the_order_and_age_of_logs(inputs, capsys, monkeypatch):
    (inputs / "again").mkdir()
    assert guarded(arguments(inputs)) == 0
    files = sorted(map(str, inputs.glob("logs/*")), reverse=True)
    for path in files:
        os.utime(path, (1, 1))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    command = arguments(inputs, output="again")
    at = command.index(str(inputs / "logs"))
    assert guarded([*command[:at], *files, *command[at + 1:]]) == 0
    assert snapshot(inputs / "out") == snapshot(inputs / "again")


@pytest.mark.parametrize("more", [[], [log(200, pace=120.0)]])
def test_a_baseline_that_is_all_runs_of_another_record_is_named_and_else_copied(inputs, capsys, more):
    write(inputs / "before", [*slow(), *more], first=1001)
    assert guarded(["pack", "--name", "Before", "--date", "2026-11-23", "--logs", str(inputs / "before"),
                    "-o", str(inputs / "out"), "--waive", "faster-than-baseline=the first record"]) == 0
    assert guarded(arguments(inputs)) == 0
    folder = inputs / FOLDER
    record = content(folder)
    assert record["baseline"]["n"] == 4 and len([*folder.glob("baseline/*")]) == (4 if more else 0)
    assert record["baseline_record"] == (None if more else "2026-11-23_Before")
    place = "baseline" if more else "../2026-11-23_Before/runs"
    assert f"({place}/{uuid(1001)}.txt)" in readme(inputs)
    assert guarded(["verify", str(folder)]) == 0 and guarded(["check", str(folder)]) == 0


def test_a_failure_leaves_nothing_behind(inputs, capsys, monkeypatch):
    before = snapshot(inputs)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert guarded(arguments(inputs)) == 2
    assert "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert snapshot(inputs) == before


def test_a_log_of_several_runs_is_packed_with_each_of_their_losses(tmp_path, capsys):
    from tests.helpers.synthetic import make
    logs = tmp_path / "logs"
    logs.mkdir()
    make("T2m", seed=1).write(logs / "a.txt")
    (tmp_path / "out").mkdir()
    command = ["pack", "--name", "Trials", "--track", "optimization", "--date", "2026-11-24", "--logs",
               str(logs), "-o",
               str(tmp_path / "out"), "--non-record", "an example"]
    assert guarded(command) == 0, capsys.readouterr()
    record = content(tmp_path / "out/track_3_optimization/2026-11-24_Trials")
    assert record["runs"]["n"] == 3 and len(record["runs"]["logs"]) == 1
    losses = [f"{run['loss']:.5f}" for run in record["runs"]["logs"][0]["runs"]]
    text = (tmp_path / "out/track_3_optimization/2026-11-24_Trials/README.md").read_text()
    assert all(loss.rstrip("0") in text for loss in losses)
    run_code(text, capsys)
