"""bench.cross finds what it is made to find: graphs made too late, and lines at which the host waits."""
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch

from bench.cross.costs import by_part
from bench.cross.figures import launches, page
from data.files import ROOT
from tools import plan
from tools.gpus import GPUS
from tools.traced import settings_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                       reason="needs Triton: bench/cross/requirements.txt"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

FEW = """
    --ranks=1 --optimizer=adamw --num_layers=2 --long_layers=1 --no_attn_layers= --late_attn_layers=
    --cache_layer=0 --paired_layers=0 --skip= --backout=off --smear=off --value_embed_layers=1
    --attn_gate_layers= --xsa_layers= --bigram_rows=0 --stages=1 --untie_stage=-1 --train_steps=8
    --extension_steps=2 --save_every=5 --batch_tokens=32768 --val_slice=8192 --val_tokens=8192
    --max_doc_len=2048 --mtp_weights=1
""".split()


def cross(before: str, *more: str) -> subprocess.CompletedProcess:
    """What bench.cross says of a run of a few layers; `before` is executed once the device is pretended."""
    code = f"""
import sys
from bench.cross import __main__ as cross, device
pretend = device.pretend
def then(*args):
    pretend(*args)
    import torch, train_gpt
    {before}
device.pretend = then
sys.exit(cross.main({[*FEW, *more]!r}))
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    version = importlib.metadata.version("torch")
    if "libtorch" in child.stderr and not version.endswith("+cpu"):
        said = child.stderr.splitlines()[-1]
        pytest.skip(f"torch {version} has another libtorch than the one for CPUs: {said}")
    return child


def test_the_trainer_compiles_all_in_its_warm_up_and_never_waits_in_a_step(tmp_path):
    child = cross("pass", "--parts", "costs", f"--out={tmp_path}/few")
    assert child.returncode == 0, child.stdout + child.stderr
    assert "| inside the clock | 0 |" in child.stdout and "| in steps |" not in child.stdout
    assert "| 0 | 3 | 3 | 0 | 0 |\n| 1 | 1 | 1 | 1 | 1 |" in child.stdout  # steps with and without Adam
    assert "Resumed from steps 6." in child.stdout
    warm_up = child.stdout.partition("| warm-up | ")[2].partition("\n")[0]
    assert "1 GPT, 1 GPT backward" in warm_up  # of both stages, whose windows and softmax scales differ
    assert "not kept for a second start" not in child.stdout

    found = json.loads((tmp_path / "few.json").read_text(encoding="utf-8"))
    assert (tmp_path / "few.md").read_text(encoding="utf-8") == page(found)
    peaks = found["peak_gib"]
    assert peaks["resumed: warm-up"] == peaks["warm-up"]  # the first run is gone when the second begins
    cfg = settings_of(found["flags"])
    for _, tokens, kept, _ in found["passes"]:  # as planned by what a larger model keeps
        assert plan.step_bytes(cfg, torch.bfloat16, True, tokens)[0] == pytest.approx(kept, rel=0.25)
    for rows in launches(found):  # 6 FLOPs a weight and token
        parts = by_part(rows, GPUS["H100"])
        assert "Adam" in parts and "Muon" not in parts  # though Adam calls functions of muon.py
        products = sum(parts[name]["gflop"] for name in ("projections", "MLP", "head and loss"))
        assert products == pytest.approx(6e-9 * 32_768 * plan.shapes_of(cfg).matmul_params(), rel=0.01)


def test_a_number_that_a_step_reads_and_graphs_that_come_too_late_or_are_not_kept_are_found():
    """One graph in the second stage, which the warm-up left out, and one in a resumed run, by a number of
    Adam's that is compiled in. None of the model's is kept where torch may not keep autograd functions."""
    child = cross("""
    train_gpt.Run.set_rates = lambda run, step: torch.ones((), device='cuda').item()
    train_gpt.Config.graph_starts = property(lambda cfg: [0])
    load = train_gpt.Run.load_state
    train_gpt.Run.load_state = lambda run, state: (load(run, state), setattr(run.adam, 'eps', 1e-8))
    from bench.cross import trace
    trace.keep_compiled = lambda: setattr(torch._dynamo.config, 'recompile_limit', 64)
    """, "--batch_tokens=32768,65536")
    assert child.returncode == 1, child.stderr
    assert "| in steps | a number read at train_gpt.py:" in child.stdout
    row = child.stdout.partition("| inside the clock | ")[2].partition("\n")[0]
    assert "1 GPT, 1 GPT backward" in row and "adam_update_" in row
    row = child.stdout.partition("| not kept for a second start | ")[2].partition("\n")[0]
    assert row.startswith("2 | 2 GPT: ") and "autograd_function_apply" in row
