"""bench.gpu, tried without a GPU at a tiny size: its files, its table, and what becomes of a part that
fails or hangs."""
import importlib.util
import json

import pytest

from bench import gpu

TINY = """--num_layers=2 --long_layers=1 --skip= --cache_layer=0 --value_embed_layers=0 --attn_gate_layers=1
    --batch_tokens=512 --val_slice=512 --val_tokens=1024 --bigram_rows=64""".split()


@pytest.fixture
def modules_in_this_process(monkeypatch, capsys):
    """Parts that are modules run here instead of in a child, which would import torch again."""
    call = gpu.Parts.call

    def call_here(self, limit_s, *command, codes=(0,)):
        if command[0] != "-m":
            return call(self, limit_s, *command, codes=codes)
        capsys.readouterr()
        code = importlib.import_module(command[1]).main([*command[2:]])
        assert (code or 0) in codes
        return capsys.readouterr().out

    monkeypatch.setattr(gpu.Parts, "call", call_here)


def test_parts_run_and_both_files_tell_what_came_of_them(
        tmp_path, monkeypatch, capsys, modules_in_this_process):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setitem(gpu.LIMITS_S, "memory", 60)
    monkeypatch.setattr(gpu.Parts, "tests", lambda self, limit_s: self.call(limit_s, "-c", "input()"))
    assert gpu.main(["--cpu", "--only", "cold start", "head", "tests", "memory", *TINY]) == 0
    result, page = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    parts = result["parts"]
    assert list(parts) == ["cold start", "head", "tests", "memory"] and "gpu.md" in capsys.readouterr().out
    assert parts["tests"]["why"].startswith("ended with exit code 1")
    assert "| tests |  | not measured: ended" in page
    assert parts["cold start"]["seconds"] > 0 and "stage 2" in parts["cold start"]["text"]
    head = parts["head"]
    assert 0 < head["bf16"]["dx"] < 0.02 < head["fp8"]["dx"] < 0.15  # three and two bits against eight
    assert 0 < parts["memory"]["planned_mib"] < 1024
    assert "| muon |  | not measured: left out | - |" in page and "says anything about a GPU" in page
    assert "| FP8 head: error | < 0.15 |" in page and "**no**" not in page


def test_a_part_that_hangs_or_fails_says_so_and_one_without_time_is_not_begun(tmp_path):
    parts = gpu.Parts(True, ["--track=shakespeare"], tmp_path)
    with pytest.raises(gpu.Failed, match="gave no answer in 0 s"):
        parts.call(0.4, "-c", "import time; time.sleep(60)")
    with pytest.raises(gpu.Failed, match="ended with exit code 3: no such thing"):
        parts.call(60, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)")
    assert parts.run("doctor", 4.0)["why"] == "not begun: no time left"


def test_without_pytest_the_part_of_the_tests_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = gpu.Parts(True, [], tmp_path).run("tests", 30)
    assert "pip install -r requirements-dev.txt" in found["why"] and "text" not in found


def result_of(**parts) -> dict:
    machine = dict(device="NVIDIA H100 80GB HBM3", cpu=False, date="2026-01-01", torch="2.13.0", commit="abc")
    named = {name.replace("_", " "): part | dict(took=1.0) for name, part in parts.items()}
    return dict(flags=["--track=small"], machine=machine, parts=named)


def step_of(ms: list[float], device="NVIDIA H100 80GB HBM3") -> dict:
    whole = dict(part="all, wall clock", costs=dict(gflop=90e3, ms=190.0))
    rows = [dict(stage=s, tokens=n, ms=t, parts=[dict(whole)])
            for s, (n, t) in enumerate(zip((131_072, 262_144, 393_216, 393_216), ms))]
    return dict(device=device, rows=rows, tflops=989.4, peak_mib=33_000)


def test_figures_are_judged_as_required():
    result = result_of(
        step=step_of([200, 400, 600, 600]), memory=dict(planned_mib=30_000 / 1.0001),
        cold_start=dict(seconds=120.0), warm_start=dict(why="gave no answer in 35 s"))
    met = {what: (measured, ok) for what, _, measured, ok in gpu.figures(result)}
    assert met["tokens/s of one process"] == ("655,360", True)
    # 90 TFLOP in 0.2 to 0.6 s.
    assert met["part of the peak, mean over the schedule"][1] is False
    assert met["a step of stage 0"] == ("200.0 ms", True) and met["a step of stage 1"] == ("400.0 ms", False)
    assert met["peak memory against tools.plan"] == ("+10.0%", False)
    assert met["cold start: launch to first timed step"][1] is True
    assert met["warm start"] == ("not measured: gave no answer in 35 s", None)
    other = gpu.figures(result_of(step=step_of([1, 1, 1, 1], "NVIDIA B200")))
    assert other[0][3] is None  # faster than an H100 is no merit of the code


def test_speed_weighs_the_stages_by_their_steps():
    cfg = gpu.config(["--track=small"])
    tokens, share = gpu.speed(cfg, step_of([100, 100, 100, 100]))
    assert tokens == pytest.approx(cfg.train_tokens / cfg.train_steps * 10)
    assert share == pytest.approx(90 / 0.1 / 989.4)
    unknown = step_of([100, 100, 100, 100])
    for row in unknown["rows"]:
        row["parts"][-1]["costs"] = None
    assert gpu.speed(cfg, unknown) == (tokens, None)


def test_the_page_judges_and_holds_what_the_parts_printed():
    step = step_of([200, 400, 600, 600]) | dict(text="| a |\n|---|")
    text = gpu.page(result_of(step=step, doctor=dict(text="fine")))
    assert "| 655,360 | yes |" in text and "\n| a |\n|---|\n" in text and "```\nfine\n```" in text
