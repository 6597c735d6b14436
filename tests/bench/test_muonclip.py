"""bench.muonclip: the claims of bench/MUONCLIP.md hold in the committed logs, and its figures are theirs."""
import statistics
import sys

import pytest

from bench import muonclip
from bench.muonclip import COMPARED, TAU
from data.errors import run_program
from data.files import ROOT

FOLDER = ROOT / "bench/results/2026-11-28_kimi"
SANE, CLIPPED, HIGH, HELD, ADAMW = COMPARED


@pytest.fixture(scope="module")
def found():
    return muonclip.journals(FOLDER)


def test_logits_explode_without_the_clip_and_are_held_with_it(found):
    assert all(run.settled_logit() > 100 for run in muonclip.group(found, HIGH))
    for settings in (CLIPPED, HELD):
        assert all(run.settled_logit() < 1.1 * TAU for run in muonclip.group(found, settings))


def test_the_clip_costs_no_loss_and_saves_some_where_logits_explode(found):
    assert statistics.mean(muonclip.loss_differences(found, CLIPPED, SANE)) < 0.02
    assert max(muonclip.loss_differences(found, HELD, HIGH)) < 0


def test_muon_is_ahead_of_adamw(found):
    assert max(muonclip.loss_differences(found, CLIPPED, ADAMW)) < 0


def test_two_ranks_train_as_one(found):
    assert muonclip.gap_of_ranks(found) <= 1e-4


def test_each_log_is_of_the_settings_in_its_name(found):
    for trial in [trial for trial in muonclip.TRIALS if trial.name in found]:
        first, _ = (FOLDER / f"{trial.name}.txt").read_text(encoding="utf-8").split("\n", 1)
        named = dict(word.split("=") for word in first.split())
        named["clip"] = named["clip"].replace("off", "0.0")  # as it was written once
        expected = dict(trial._asdict(), clip=float(trial.clip))
        assert {name: named[name] for name in expected} == {name: str(x) for name, x in expected.items()}


def test_the_page_names_the_runs_that_are_not_there(found):
    some = {name: run for name, run in found.items() if name != muonclip.SCAN[-1].name}
    assert muonclip.tables(some).endswith(f"Not there, or not ended well: {muonclip.SCAN[-1].name}.\n")
    assert "Not there" not in muonclip.tables(found)


def test_run_trains_what_is_missing_alone_and_goes_on_past_a_failure(tmp_path, capsys, monkeypatch):
    fails = "import sys; sys.exit('no luck')"
    programs = {"second": fails, "first": "print(1)"}
    commands = {name: [sys.executable, "-c", program] for name, program in programs.items()}
    monkeypatch.setattr(muonclip, "commands", lambda: commands)
    assert run_program(muonclip.MEASUREMENT.main, ["run", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith(
        "second: expected the example to end well, but it ended with exit code 1: no luck\n")
    assert [path.name for path in tmp_path.iterdir()] == ["first.txt"]
    capsys.readouterr()
    assert run_program(muonclip.MEASUREMENT.main, ["run", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "1/1 second\n"
