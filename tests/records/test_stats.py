"""The verb stats: which runs count, what is said about the others, and exit codes. The numbers are test_statistics' matter."""
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.helpers.fake_trainer import log_text

from records import stats
from records.__main__ import guarded
from records.errors import RecordError
from records.statistics import ratio_interval, t_test, welch


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(folder: str, losses, ms=85_000, total=100, first_seed=0, **changes) -> list[float]:
    """Logs with these final losses; returns their times in seconds."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for seed, loss in enumerate(losses, first_seed):
        Path(folder, f"run{seed}.txt").write_text(log_text(seed, loss, ms + 100 * seed, total, **changes))
    return [round(ms + 100 * seed) / 1000 for seed in range(first_seed, first_seed + len(losses))]


def run(*paths, code=None, **options):
    defaults = dict(paths=paths, baseline=None, track=None, step=None, baseline_step=None, json=False)
    found = stats.run(SimpleNamespace(**{**defaults, **options}))
    assert code is None or found == code


def result(capsys, *paths, **options) -> dict:
    capsys.readouterr()
    run(*paths, json=True, **options)
    return json.loads(capsys.readouterr().out)


LOSSES = [1.571, 1.582, 1.590, 1.5777, 1.5812]


def test_numbers_are_those_of_the_statistics(capsys):
    seconds, others = make("new", LOSSES), make("old", LOSSES[::-1], ms=90_000)
    found = result(capsys, "new", baseline=["old"])
    rule = t_test(LOSSES, 1.6)
    assert found["track"] == "shakespeare" and found["rule"]["passes"] is True
    assert (found["rule"]["p"], found["rule"]["t"], found["candidate"]["loss"]["mean"]["estimate"]) == (rule.p, rule.t, rule.mean)
    assert [run["seconds"] for run in found["runs"]] == seconds and [run["loss"] for run in found["runs"]] == LOSSES
    assert found["against"]["seconds"]["p"] == welch(seconds, others).p
    assert found["against"]["speed_up"]["high"] == ratio_interval(others, seconds).high
    assert found["against"]["pairwise"] is None and found["notes"] == [] and found["baseline"]["n"] == 5


def test_what_is_printed_and_exit_codes(capsys):
    make("new", LOSSES)
    make("bad", [1.61, 1.595, 1.6])
    run("new", code=0)
    assert "mean 1.58038 of 5" in (text := capsys.readouterr().out) and "needed < 0.01: passes." in text
    run("bad", code=1)
    assert ": fails." in capsys.readouterr().out
    run("new/run0.txt", code=1)
    assert "cannot be judged: expected at least 2 losses, found 1." in capsys.readouterr().out


def test_several_runs_in_one_file_count_as_several(capsys):
    first, *others = (log_text(0, loss, 84_000) for loss in (1.57, 1.58, 1.575))
    Path("many.txt").write_text(first + "".join(text.rpartition("=" * 100 + "\n")[2] for text in others))
    found = result(capsys, "many.txt")
    assert [run["loss"] for run in found["runs"]] == [1.57, 1.58, 1.575]
    assert any("share a seed" in note for note in found["notes"])


def test_copy_counts_once(capsys):
    make("new", LOSSES)
    Path("new/copy.txt").write_text(Path("new/run3.txt").read_text())
    found = result(capsys, "new", "new/run0.txt")
    assert found["candidate"]["n"] == 5 and "Counted once" in found["notes"][0]


def test_incomplete_run_is_not_left_out_silently(capsys):
    make("new", LOSSES)
    path = Path("new/run2.txt")
    path.write_text(path.read_text().rpartition("step:100/100 val_loss")[0])
    run("new", code=1)
    text = capsys.readouterr().out
    assert "run2 has no validation at its last step and ends at 50 of 100" in text and "1 of 5 losses not finite" in text
    found = result(capsys, "new", step=50)
    assert found["rule"]["n"] == 5 and found["rule"]["p"] == pytest.approx(1)
    assert result(capsys, "new", step=51)["rule"]["p"] is None


def test_diverged_run_is_not_left_out(capsys):
    make("new", LOSSES)
    path = Path("new/run2.txt")
    path.write_text(path.read_text().replace("val_loss:1.5900", "val_loss:nan"))
    run("new", code=1)
    found = result(capsys, "new")
    assert found["rule"]["passes"] is False and found["rule"]["p"] is None and found["runs"][2]["loss"] is None


def test_files_that_are_no_logs_are_named(capsys):
    make("new", LOSSES)
    Path("new/notes.txt").write_text("lr 0.02\n")
    assert "notes.txt" in result(capsys, "new")["notes"][0]
    Path("empty").mkdir()
    for path in ("empty", "new/notes.txt"):
        with pytest.raises(RecordError, match="expected .*, found .*; "):
            run(path, track="small")


def test_differences_between_runs_are_named_and_times_of_other_hardware_not_compared(capsys):
    make("new", LOSSES)
    make("old", LOSSES[:3], world=8)
    make("mixed", LOSSES[:2], first_seed=0)
    make("mixed", LOSSES[2:], first_seed=2, total=120)
    found = result(capsys, "new", baseline=["old"])
    assert found["against"]["seconds"] is None and found["against"]["loss"]["p"] is not None
    assert "Other world size than the baseline." in found["notes"]
    found = result(capsys, "mixed")
    assert found["candidate"]["step"] is None and "Runs differ in number of steps: 120 (3 runs), 100 (2 runs)." in found["notes"]
    run("new", baseline=["old"])
    assert "Times are not compared" in capsys.readouterr().out


def test_baseline_inside_the_folder_counts_as_baseline_only(capsys):
    make("rec", LOSSES)
    make("rec/baseline", LOSSES, ms=90_000, first_seed=9)
    found = result(capsys, "rec", baseline=["rec/baseline"])
    assert found["candidate"]["n"] == found["baseline"]["n"] == 5


def test_track_with_stated_steps(capsys):
    make("new", [3.2761, 3.2765, 3.2770, 3.2772], total=3000)
    make("old", [3.2763, 3.2765, 3.2771, 3.2772], total=3040, first_seed=7)
    found = result(capsys, "new", track="optimization", baseline=["old"])
    score = (3.28 - np.mean([3.2761, 3.2765, 3.2770, 3.2772])) * 2
    assert found["rule"]["score"] == pytest.approx(score) and found["rule"]["passes"]
    assert found["against"]["pairwise"]["steps_saved"] == 40
    assert found["against"]["pairwise"]["score"] == pytest.approx((0.000075 + 40 * 0.000045) / 0.5 ** 0.5)
    make("new", [3.27], total=2900, first_seed=20)
    with pytest.raises(RecordError, match="expected runs that end at the same step, found 2900, 3000; "):
        run("new", track="optimization")


def test_hostile_names_do_not_reach_the_terminal(capsys):
    make("new", LOSSES)
    Path("new/\x1b[2J.txt").write_text("no log")
    run("new")
    assert "\x1b" not in capsys.readouterr().out


def test_example_and_command_line(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert guarded(shlex.split(stats.EXAMPLE)[3:]) == 0
    assert "Speed-up: 1.859" in capsys.readouterr().out
    assert guarded(["stats", "no/such/folder"]) == 2
