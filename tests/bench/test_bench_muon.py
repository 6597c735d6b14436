"""bench.muon measures what it says: counted work and traffic, verdicts that catch a bad optimizer, a page of its results."""
import argparse
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import muon as bench
from bench.page import MARKS
from bench.muon_checks import CHECKS, judge
from bench.muon_peers import SUBJECTS, Failed, Subject, isolated, load, load_all, ranks, resident_peak
import muon

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "bench" / "MUON.md"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and reads /proc")


class Plain(torch.optim.Optimizer):
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
            grad = p.grad if self.fault == "writes p.grad" else torch.zeros_like(p) if p.grad is None else p.grad.clone()
            M.lerp_(grad, 0.05)
            O = muon.orthogonalize(grad.lerp_(M, 0.95), ns_coefficients="jordan", form="standard")
            O = O * 0.9 if self.fault == "wrong scale" else O
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(O.to(p.dtype), alpha=group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def plain(fault: str) -> Subject:
    return Subject(f"plain, {fault}", "0", lambda params, lr, weight_decay: Plain(params, lr, weight_decay, fault))


@pytest.mark.parametrize("fault, key, expected", [
    ("", "6a", "pass"), ("writes p.grad", "6a", "fail"), ("", "16", "pass"), ("", "10", "pass"), ("wrong scale", "10", "fail"),
    ("", "7", "pass"), ("", "12", "pass"), ("crash", "8b", "fail"), ("", "8b", "fail"), ("", "9a", "fail"), ("", "14a", "-"),
    ("", "8c", "-"), ("hang", "8a", "fail")])
def test_the_verdict_follows_from_the_behaviour(fault, key, expected):
    outcome, why = judge(plain(fault), key, seconds=3 if fault == "hang" else 60)
    assert outcome == expected, why
    assert bool(why) == (expected != "pass")
    if fault in ("hang", "crash"):
        assert why == {"hang": "no answer within 3 s", "crash": "KeyError: 'no gradient'"}[fault]


@pytest.mark.parametrize("key", ["2", "3", "5a", "8c", "9a", "10", "18a"])
def test_muon_passes(key):
    assert judge(load("muon.py"), key) == ("pass", "")


def test_torch_refuses_a_convolution_by_a_sentence_that_is_kept():
    outcome, why = judge(load("torch.optim.Muon"), "13a")
    assert outcome == "refused" and why.startswith("ValueError: Muon only supports 2D")


@pytest.mark.parametrize("form, gram", [("standard", False), ("gram", True)])
def test_counted_flops_are_those_of_the_formula(form, gram):
    found = isolated(30, bench.work_of, load("muon.py"), dict(ns_form=form, ns_dtype=torch.float32, coefficients="jordan"), 32)
    assert found["gflop"] * 1e9 == sum(muon.newton_schulz_flops(m, n, 5, gram) for m, n in bench.BLOCK)
    assert found["products"] > 0 and found["peak"] >= 0


def test_traffic_and_balance_of_two_ranks_are_those_of_the_model():
    rows = bench.worlds({"muon.py": load("muon.py")}, 2, 32, 60, world_sizes=(2,))
    assert [(row["subject"], row["world"]) for row in rows] == [
        ("muon.py, bf16", 1), ("muon.py, bf16", 2), ("muon.py, bf16, sync_grads", 1), ("muon.py, bf16, sync_grads", 2)]
    for row in rows:
        assert abs(row["sent"] - row["model"]) <= 0.02 * row["model"] and row["balance"] == 1.0
        assert row["flops"] * row["world"] == 2 * sum(muon.newton_schulz_flops(*s, 5, False) for s in bench.BLOCK)


def test_memory_counts_what_a_function_holds_at_once():
    def measured():
        bench.release_at_once()
        run = lambda: torch.ones(2**22).sum()
        run()  # brings in the code
        return resident_peak(run)
    assert 0.95 < isolated(30, measured) / 2**24 < 1.1  # the kernel counts pages in batches


def test_accuracy_is_measured_against_fp64():
    found = isolated(30, bench.accuracy_of, load("muon.py"), dict(ns_dtype=torch.float32, coefficients="jordan"), 16, 32)
    assert found["map"] < 1e-4 and 0.1 < found["polar"] < 0.3 and 0.6 < found["low"] < found["high"] < 1.21
    assert list(found["sizes"]) == [-100, -33, 33, 100] and max(found["sizes"].values()) < 1e-5


def test_parts_that_fork_run_without_cuda_in_a_process_of_their_own():
    args = argparse.Namespace(only=["plans", "times"], subjects=["muon.py"], checks=["1"], scale=32, seconds=30, peers=None)
    assert bench.measure_without_cuda(args)["plans"] == json.loads(json.dumps(bench.plans()))


def test_planned_balance_of_gpt2_on_8_ranks():
    assert bench.plans((8,))[0]["efficiency"][8] >= 0.97


def test_an_error_on_one_rank_ends_the_others():
    def run(rank):
        if rank == 1:
            raise ValueError("one of us")
        time.sleep(100)
    start = time.monotonic()
    with pytest.raises(Failed, match="ValueError: one of us"):
        isolated(30, ranks, 2, run)
    assert time.monotonic() - start < 20


def test_what_is_missing_is_named_and_skipped(monkeypatch):
    monkeypatch.setitem(SUBJECTS, "heavyball", (SUBJECTS["heavyball"][0], "no_such_module", False))
    subjects, missing = load_all(["torch.optim.Muon", "heavyball"])
    assert list(subjects) == ["torch.optim.Muon"]
    assert missing == {"heavyball": "ModuleNotFoundError: No module named 'no_such_module'"}


def test_one_command_prints_one_table_and_writes_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "shape_sets", lambda blocks: {"two": [(16, 8), (8, 16)], "a bank": [(2, 8, 16)]})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}{tmp_path}/a/r.json -->\nold\n{MARKS[1]}\nafter\n")
    assert bench.main(["--only=times,plans,checks", "--subjects=muon.py,torch.optim.Muon", "--checks=6b", "--reps=3",
                       "--device=cpu", f"--json={tmp_path}/a/r.json", f"--markdown={tmp_path}/r.md", f"--page={page}"]) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "a" / "r.json").read_text())
    assert (tmp_path / "r.md").read_text() == bench.tables(result) == printed[:-1]
    assert page.read_text() == f"before\n{MARKS[0]}{tmp_path}/a/r.json -->\n\n{printed}{MARKS[1]}\nafter\n"
    rows = {(row["subject"], row["shapes"]): row for row in result["times"]}
    assert len(rows["muon.py", "two"]["seconds"]) == 3 and "Refused" in rows["torch.optim.Muon", "a bank"]["why"]
    assert re.search(r"^\| torch.optim.Muon \| [\d.,]+ \([\d.,]+-[\d.,]+\) \| 3 \| 1.00 \|", printed, re.M)
    assert re.search(r"^\| torch.optim.Muon \| [^|]+ \| refused \|$", printed, re.M) and "| 6b | " + CHECKS["6b"][0] in printed
    assert bench.main([f"--load={tmp_path}/a/r.json"]) == 0 and capsys.readouterr().out == printed
    bench.main([f"--load={tmp_path}/a/r.json", "--only=plans", "--subjects=muon.py", f"--json={tmp_path}/b.json"])
    assert json.loads((tmp_path / "b.json").read_text())["times"] == result["times"]


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only=time"])
    assert "found time" in capsys.readouterr().err


def test_the_page_shows_the_committed_results():
    parts = PAGE.read_text(encoding="utf-8").split(MARKS[0])[1:]
    assert parts
    for part in parts:
        source, _, rest = part.partition(" -->\n\n")
        assert rest.split("\n" + MARKS[1])[0] == bench.tables(json.loads((ROOT / source).read_text())), source


def test_a_page_without_the_mark_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(ValueError, match="expected a line '<!-- figures of r.json -->', found none"):
        bench.write_page(page, "r.json", {})
    assert page.read_text() == "text"


def test_the_page_names_every_pinned_peer_and_files_that_exist():
    text, pins = PAGE.read_text(), (ROOT / "bench" / "requirements.txt").read_text()
    for name, version in re.findall(r"^([a-z-]+)==([\d.]+)", pins, re.M):
        assert name == "opt-einsum" or f"{name} {version}" in text
    for path in re.findall(r"`((?:bench|tests)/[\w/.-]+\.(?:py|txt|json))`", text):
        assert (ROOT / path).exists(), path
