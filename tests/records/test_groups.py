"""Groups of runs: which runs count, what is said about the others, and the figures of compare --json."""
import json
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.fake_trainer import log_text

from records.__main__ import guarded
from records.statistics import ratio_interval, t_test, welch

LOSSES = [1.571, 1.582, 1.590, 1.5777, 1.5812]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(folder: str, losses, ms=85_000, total=100, first_seed=0, **changes) -> list[float]:
    """Logs with these final losses; returns their times in seconds."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for seed, loss in enumerate(losses, first_seed):
        Path(folder, f"run{seed}.txt").write_text(log_text(seed, loss, ms + 100 * seed, total, **changes))
    return [round(ms + 100 * seed) / 1000 for seed in range(first_seed, first_seed + len(losses))]


@pytest.fixture
def compare(capsys):
    """What compare --json says of the groups of these paths."""
    def call(*arguments, code=0):
        assert guarded(["compare", *map(str, arguments), "--json"]) == code
        out, err = capsys.readouterr()
        return json.loads(out) if code == 0 else err
    return call


def test_figures_are_those_of_the_statistics(compare):
    others, seconds = make("old", LOSSES[::-1], ms=90_000), make("new", LOSSES)
    found = compare("old", "new")
    old, new = found["groups"]
    rule = t_test(LOSSES, 1.6)
    assert found["track"] == "shakespeare" and new["rule"]["passes"] is True
    assert (new["rule"]["p"], new["rule"]["t"], new["loss"]["mean"]["estimate"]) == (rule.p, rule.t,
                                                                                     rule.mean)
    assert [run["seconds"] for run in new["runs"]] == seconds
    assert [run["loss"] for run in new["runs"]] == LOSSES
    assert new["against"]["seconds"]["p"] == welch(seconds, others).p
    assert new["against"]["speed_up"]["high"] == ratio_interval(others, seconds).high
    assert new["against"]["pairwise"] is None
    assert new["notes"] == []
    assert old["against"] is None
    assert old["n"] == 5


def test_the_loss_rule_is_said(capsys):
    make("good", LOSSES), make("bad", [1.61, 1.595, 1.6])
    for path, words in (("good", "mean 1.58038 of 5"), ("good", "needed < 0.01: passes"), ("bad", ": fails"),
                        ("good/run0.txt", "cannot be judged: expected at least 2 losses, found 1")):
        assert guarded(["compare", path]) == 0
        assert words in capsys.readouterr().out


def test_several_runs_in_one_file_count_as_several(compare):
    first, *others = (log_text(0, loss, 84_000) for loss in (1.57, 1.58, 1.575))
    Path("many.txt").write_text(first + "".join(text.rpartition("=" * 100 + "\n")[2] for text in others))
    group, = compare("many.txt")["groups"]
    assert [run["loss"] for run in group["runs"]] == [1.57, 1.58, 1.575]
    assert any("share a seed" in note for note in group["notes"])


def test_a_copy_counts_once(compare):
    make("new", LOSSES)
    Path("new/copy.txt").write_text(Path("new/run3.txt").read_text())
    group, = compare("new")["groups"]
    assert group["n"] == 5 and "Counted once" in group["notes"][0]


def test_an_incomplete_run_is_not_left_out_silently(compare):
    make("new", LOSSES)
    path = Path("new/run2.txt")
    path.write_text(path.read_text().rpartition("step:100/100 val_loss")[0])
    group, = compare("new")["groups"]
    assert any("run2 has no validation at its last step and ends at 50 of 100" in note
               for note in group["notes"])
    assert group["rule"]["p"] is None and "1 of 5 losses not finite" in group["rule"]["why"]
    assert compare("new", "--step", 50)["groups"][0]["rule"]["p"] == pytest.approx(1, abs=1e-4)
    assert compare("new", "--step", 51)["groups"][0]["rule"]["p"] is None


def test_a_diverged_run_is_not_left_out(compare):
    make("new", LOSSES)
    path = Path("new/run2.txt")
    path.write_text(path.read_text().replace("val_loss:1.5900", "val_loss:nan"))
    group, = compare("new")["groups"]
    assert group["rule"]["passes"] is False
    assert group["rule"]["p"] is None
    assert group["runs"][2]["loss"] is None


def test_files_that_are_no_logs_are_named(compare):
    make("new", LOSSES)
    Path("new/notes.txt").write_text("lr 0.02\n")
    assert "new/notes.txt" in compare("new")["left_out"]
    Path("empty").mkdir()
    for path in ("empty", "new/notes.txt"):
        assert "found none" in compare(path, "--track", "small", code=2)


def test_times_of_other_hardware_are_not_compared(compare, capsys):
    make("new", LOSSES), make("old", LOSSES[:3], world=8)
    new = compare("old", "new")["groups"][1]
    assert new["against"]["seconds"] is None and new["against"]["loss"]["p"] is not None
    assert guarded(["compare", "old", "new"]) == 0
    out = capsys.readouterr().out
    assert "times are not compared" in out and "world size differs: old 8; new 2" in out


def test_differences_between_runs_of_a_group_are_named(compare):
    make("mixed", LOSSES[:2])
    make("mixed", LOSSES[2:], first_seed=2, total=120)
    group, = compare("mixed")["groups"]
    assert group["step"] is None
    assert "Runs differ in number of steps: 120 (3 runs), 100 (2 runs)." in group["notes"]


def test_a_track_with_stated_steps(compare):
    make("new", [3.2761, 3.2765, 3.2770, 3.2772], total=3000)
    make("old", [3.2763, 3.2765, 3.2771, 3.2772], total=3040, first_seed=7)
    new = compare("old", "new", "--track", "optimization")["groups"][1]
    assert new["rule"]["score"] == pytest.approx((3.28 - np.mean([3.2761, 3.2765, 3.2770, 3.2772])) * 2)
    assert new["rule"]["passes"] and new["against"]["pairwise"]["steps_saved"] == 40
    assert new["against"]["pairwise"]["score"] == pytest.approx((0.000075 + 40 * 0.000045) / 0.5 ** 0.5)
    make("new", [3.27], total=2900, first_seed=20)
    assert "expected runs that end at the same step, found 2900, 3000; say" in compare(
        "new", "--track", "optimization", code=2)


def test_hostile_names_do_not_reach_the_terminal(capsys):
    make("new", LOSSES)
    Path("new/\x1b[2J.txt").write_text("no log")
    assert guarded(["compare", "new"]) == 0
    assert "\x1b" not in capsys.readouterr().out
