"""bench.muon: its questions are put to muon.py, and it measures what it says."""
import json
import re
import sys
import time

import pytest
import torch

import muon
from bench.muon import speed
from bench.muon.__main__ import MEASUREMENT
from bench.muon.markdown import tables
from bench.muon.peers import SUBJECTS, Subject, load_subject, load_subjects
from bench.muon.processes import ChildFailed, isolated, ranks
from bench.muon.questions import GPT2_BLOCK, QUESTIONS, judge
from muon import newton_schulz_flops, orthogonalize
from data.errors import UsageError
from data.files import ROOT
from tools.children import run_limited

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and reads /proc")
torch.set_num_threads(1)  # a pool of threads survives no fork


@pytest.mark.parametrize("number", QUESTIONS, ids=lambda number: f"{number}, {QUESTIONS[number][0]}")
def test_muon_passes(number):
    assert judge(load_subject("muon.py"), number, limit_s=600) == ("pass", "")


# ----------------------------------------------------------------------------------------------------
# Verdicts


class FaultyMuon(torch.optim.Optimizer):
    """Muon in a few lines, with faults to be found."""

    def __init__(self, params, lr, weight_decay, fault):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.fault = fault

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        for p in group["params"]:
            M = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            if self.fault == "hang":
                time.sleep(100)
            if p.grad is None and self.fault == "crash":
                raise KeyError("no gradient")
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.fault != "writes p.grad":
                grad = grad.clone()
            M.lerp_(grad, 0.05)
            O = orthogonalize(grad.lerp_(M, 0.95), ns_coefficients="jordan", dtype=torch.float32)
            if self.fault == "wrong scale":
                O *= 0.9
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(O.to(p.dtype), alpha=group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def faulty(fault: str) -> Subject:
    return Subject("faulty", lambda params, lr, weight_decay: FaultyMuon(params, lr, weight_decay, fault))


@pytest.mark.parametrize("fault, number, expected", [
    ("", "6a", "pass"), ("writes p.grad", "6a", "fail"),
    ("", "10", "pass"), ("wrong scale", "10", "fail"),
    ("", "7", "pass"), ("", "12", "pass"), ("", "16", "pass"),
    ("", "8b", "fail"), ("crash", "8b", "fail"), ("hang", "8a", "fail"), ("", "9a", "fail"),
    ("", "14a", "-"), ("", "8c", "-")])
def test_the_verdict_follows_from_the_behaviour(fault, number, expected):
    outcome, why = judge(faulty(fault), number, limit_s=0.5 if fault == "hang" else 600)
    assert outcome == expected, why
    assert bool(why) == (expected != "pass")
    if fault in ("hang", "crash"):
        assert why == {"hang": "no answer within 0.5 s", "crash": "KeyError: 'no gradient'"}[fault]


def test_torch_refuses_a_convolution_by_a_sentence_that_is_kept():
    outcome, why = judge(load_subject("torch.optim.Muon"), "13a")
    assert outcome == "refused" and why.startswith("ValueError: Muon only supports 2D")


def test_an_error_on_one_rank_ends_the_others():
    def run(rank):
        if rank == 1:
            raise ValueError("one of us")
        time.sleep(1000)
    with pytest.raises(ChildFailed, match="ValueError: one of us"):
        isolated(100, ranks, 2, run)


# ----------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("gram", [False, True])
def test_counted_flops_are_those_of_the_formula(monkeypatch, gram):
    monkeypatch.setattr(muon, "gram_pays", lambda *args: gram)
    shapes = [(m // 16, n // 16) for m, n in GPT2_BLOCK]
    settings = dict(ns_dtype=torch.float32)
    found = isolated(100, lambda: speed.costs(0, load_subject("muon.py"), settings, shapes))
    assert found["flops"] == sum(newton_schulz_flops(m, n, 5, gram, torch.float32) for m, n in shapes)
    assert found["sent"] == 0 and found["peak"] >= 0


def test_traffic_and_balance_of_two_ranks_are_those_of_the_model():
    subjects = {"muon.py": load_subject("muon.py")}
    rows = speed.worlds(subjects, blocks=2, scale=32, limit_s=600, world_sizes=(1, 2))
    assert [row["world"] for row in rows] == [1, 2] * 3
    work = 2 * sum(newton_schulz_flops(m, n, 5, False, torch.float32) for m, n in GPT2_BLOCK)
    for row in rows:
        assert abs(row["sent"] - row["model"]) <= 0.02 * row["model"] and row["balance"] == 1.0
        assert row["flops"] * row["world"] == work


def test_memory_counts_what_a_function_holds_at_once():
    """Asked in a fresh process: what other tests of this one have freed may not have gone back to the
    system."""
    program = """
import ctypes
import torch
from bench.muon.speed import resident_peak

ctypes.CDLL(None).mallopt(-3, 65536)  # freed blocks go back to the system, as where memory is reported

def hold():
    return torch.ones(2**22).sum()

hold()  # brings in the code
print(resident_peak(hold))
"""
    done = run_limited([sys.executable, "-c", program], 100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 0.9 < int(done.stdout) / 2**24 < 1.1  # the kernel counts pages in batches


def test_accuracy_is_measured_against_fp64():
    settings = dict(ns_dtype=torch.float32, ns_coefficients="jordan")
    found = isolated(100, speed.accuracy, load_subject("muon.py"), settings, 16, 32)
    assert found["error"] < 1e-4 and 0.1 < found["polar"] < 0.3 and 0.6 < found["low"] < found["high"] < 1.21
    assert list(found["by_size"]) == [-100, -33, 33, 100] and max(found["by_size"].values()) < 1e-5


# ----------------------------------------------------------------------------------------------------
# The command and the page


def test_what_is_missing_is_named_and_skipped(monkeypatch):
    monkeypatch.setitem(SUBJECTS, "heavyball", (SUBJECTS["heavyball"][0], "no_such_module"))
    subjects, missing = load_subjects(["torch.optim.Muon", "heavyball"])
    assert list(subjects) == ["torch.optim.Muon"]
    assert missing == {"heavyball": "ModuleNotFoundError: No module named 'no_such_module'"}


@pytest.fixture(autouse=True)
def threads_as_before():
    """The command sets a number of threads, which other tests of this process would inherit."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_command_writes_the_results_and_prints_the_tables(tmp_path, monkeypatch, capsys):
    small = {"two": [(16, 8), (8, 16)], "a bank": [(2, 8, 16)]}
    monkeypatch.setattr(speed, "shape_sets", lambda blocks: small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "r.json"
    options = "--only times questions --subjects muon.py torch.optim.Muon --questions 6b --reps=3".split()
    MEASUREMENT.main(["run", str(out), *options])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert printed[:-1] == tables(result)
    rows = {(row["subject"], row["shapes"]): row for row in result["times"]}
    assert len(rows["muon.py", "two"]["seconds"]) == 3
    assert "Refused" in rows["torch.optim.Muon", "a bank"]["why"]
    assert f"| 6b | {QUESTIONS['6b'][0]}" in printed
    assert re.search(r"^\| torch.optim.Muon \| [\d.,]+ \([\d.,]+-[\d.,]+\) \| 3 \| 1 \|", printed, re.M)
    assert re.search(r"^\| torch.optim.Muon \| [^|]+ \| refused \|$", printed, re.M)
    with pytest.raises(UsageError, match="found: argument --only: invalid choice: 'time'"):
        MEASUREMENT.main(["run", str(out), "--only", "time"])
