"""bench.gpu, tried without a GPU at a tiny size: its files, its table, and what becomes of a part that fails or hangs."""
import json
import sys
import time

import pytest

from bench import gpu

TINY = ["--num_layers=2", "--long_layers=1", "--skip=", "--cache_layer=0", "--value_embed_layers=0", "--attn_gate_layers=1",
        "--batch_tokens=512", "--val_tokens=8192", "--bigram_rows=64"]


def test_parts_run_and_both_files_tell_what_came_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setitem(gpu.LIMITS, "eager", 0.3)
    assert gpu.main(["--cpu", "--only", "cold start", "attention", "head", "eager", *TINY]) == 0
    result, page = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    parts = result["parts"]
    assert list(parts) == ["cold start", "attention", "head", "eager"] and "gpu.md" in capsys.readouterr().out
    assert parts["eager"]["why"].startswith("stopped after 0 s") and "| eager |  | not measured: stopped" in page
    assert 0 < parts["cold start"]["at"]["log opened"] < parts["cold start"]["seconds"] < parts["cold start"]["at"]["third ends"]
    assert all(b["error"] < 1e-5 and b["ms"]["paired"] > 0 for b in parts["attention"]["backends"].values())
    assert 0 < parts["head"]["bf16"]["dx"] < 0.02 < parts["head"]["fp8"]["dx"] < 0.15  # three and two bits against eight
    assert "| muon |  | not measured: left out | - |" in page and "says anything about a GPU" in page
    assert "| FP8 head: error | < 0.15 |" in page and "**no**" not in page


def test_a_part_that_hangs_is_ended_with_its_children_and_one_that_fails_says_why(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    with pytest.raises(gpu.Failed, match="stopped after 0 s; last line: begun"):
        gpu.execute([sys.executable, "-c", f"import subprocess, sys; print('begun', flush=True); "
                     f"subprocess.run([sys.executable, '-c', {child!r}])"], 0.4, {})
    with pytest.raises(gpu.Failed, match="exit code 3: no such thing"):
        gpu.execute([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"], 20, {})
    with pytest.raises(gpu.Failed, match="exit code 0: other"):  # it never said what was waited for
        gpu.execute([sys.executable, "-c", "print('other')"], 20, {}, until="step")
    endless = "import time; print('a\\nstep:1', flush=True); time.sleep(60)"
    lines = gpu.execute([sys.executable, "-c", endless], 20, {}, until="step")
    assert [line for _, line in lines] == ["a", "step:1"]
    time.sleep(1.3)
    assert not mark.exists()


def result_of(**parts) -> dict:
    machine = dict(device="NVIDIA H100 80GB HBM3", cpu=False, date="2026-01-01", torch="2.13.0", python="3.12.3", commit="abc")
    return dict(flags=["--track=small"], machine=machine, parts={name.replace("_", " "): p for name, p in parts.items()})


def step_of(ms: list[float], device="NVIDIA H100 80GB HBM3") -> dict:
    rows = [dict(stage=s, tokens=n, ms=t, parts=[dict(part="MLP", gflop=90e3), dict(part="Muon", gflop=5e6)])
            for s, (n, t) in enumerate(zip((131_072, 262_144, 393_216, 393_216), ms))]
    return dict(device=device, rows=rows, peak=dict(tflops=989.4), peak_mib=33_000)


def test_figures_are_judged_as_required():
    met = {what: (measured, ok) for what, _, measured, ok in gpu.figures(result_of(
        step=step_of([200, 400, 600, 600]), memory=dict(planned_mib=30_000, peak_mib=33_001), cold_start=dict(seconds=120.0),
        warm_start=dict(why="stopped after 30 s")))}
    assert met["tokens/s of one process"] == ("655,360", True)
    assert met["part of the peak, mean over the schedule"][1] is False  # 90 TFLOP, the optimizer's left out, in 0.2 to 0.6 s
    assert met["peak memory against --plan"] == ("+10.0%", False) and met["cold start: launch to first timed step"][1] is True
    assert met["warm start"] == ("not measured: stopped after 30 s", None)
    other = gpu.figures(result_of(step=step_of([1, 1, 1, 1], "NVIDIA B200")))
    assert other[0][3] is None  # faster than an H100 is no merit of the code


def test_speed_weighs_the_stages_by_their_steps():
    cfg = gpu.config(["--track=small"])
    tokens, share = gpu.speed(cfg, step_of([100, 100, 100, 100]))
    assert tokens == pytest.approx(cfg.train_tokens / cfg.train_steps * 10)
    assert share == pytest.approx(90 / 0.1 / 989.4)
    assert "| 655,360 | yes |" in gpu.page(result_of(step=step_of([200, 400, 600, 600]) | dict(text="| a |\n|---|")))


def test_limits_fit_into_nine_minutes():
    assert sum(gpu.LIMITS.values()) <= gpu.BUDGET < 540
