"""bench.cross finds what it is made to find: graphs made too late, and lines at which the host waits."""
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys

import pytest

from data.files import ROOT

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
""".split()


def cross(before: str = "", *more: str) -> subprocess.CompletedProcess:
    """What bench.cross says of a run of a few layers; `before` is executed once the device is pretended."""
    code = f"""
import sys
from bench.cross import __main__ as cross, device
pretend = device.pretend
def then(*args):
    pretend(*args)
    import torch, train_gpt
    {before or "pass"}
device.pretend = then
sys.exit(cross.main({[*FEW, *more]!r}))
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    torch = importlib.metadata.version("torch")
    if "libtorch" in child.stderr and not torch.endswith("+cpu"):
        pytest.skip(f"torch {torch} has another libtorch than the one for CPUs: {child.stderr[:200]}")
    return child


def test_the_trainer_compiles_all_in_its_warm_up_and_never_waits_in_a_step():
    child = cross("", "--parts", "costs")
    assert child.returncode == 0, child.stdout + child.stderr
    assert "| inside the clock | 0 |" in child.stdout and "| in steps |" not in child.stdout
    assert "| 0 | 3 | 3 | 0 | 0 |\n| 1 | 1 | 1 | 1 | 1 |" in child.stdout  # steps with and without Adam
    assert "Resumed from steps 6." in child.stdout
    assert "Stage 1: the least time of a step" in child.stdout


def test_a_number_that_a_step_reads_is_found_with_its_line():
    child = cross("train_gpt.Run.set_rates = lambda run, step: torch.ones((), device='cuda').item()",
                  "--save_every=0")
    assert child.returncode == 1, child.stderr
    assert "| in steps | a number read at train_gpt.py:" in child.stdout


def test_a_graph_made_in_a_step_is_found():
    child = cross("train_gpt.Config.graph_starts = property(lambda cfg: [0])", "--save_every=0")
    assert child.returncode == 1, child.stderr
    assert "| inside the clock | 2 | 1 GPT, 1 GPT backward |" in child.stdout


def test_a_graph_that_only_a_resumed_run_makes_is_found():
    """A number of Adam's that is compiled in, and another one after the checkpoint was read."""
    child = cross("load = train_gpt.Run.load_state; train_gpt.Run.load_state = lambda run, state: "
                  "(load(run, state), setattr(run.adam, 'eps', 1e-8))")
    assert child.returncode == 1, child.stderr
    row = child.stdout.partition("| inside the clock | ")[2].partition("\n")[0]
    assert "adam_update_" in row and "GPT" not in row
