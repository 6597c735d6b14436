"""What only a GPU can show: kernels against the definition, and the full model of track small taking
correct steps.

    ./test.sh tests/gpu        then   python -m bench.step --track=small
"""
import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bench.step import synthetic_shards
from data.loader import Docs
from engine.attention import BACKENDS
from engine.head_loss import choose_fp8
from engine.ranks import Runtime
from train_gpt import Config, Run

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("window", [1, 128, 1000])
@pytest.mark.parametrize("backend", ["varlen", "flex", "blocked"])
def test_backend_equals_the_definition_in_values_and_gradients(backend, window):
    T, H, d = 1000, 6, 128
    torch.manual_seed(0)
    starts = torch.tensor([0, 1, 300, 301, 777], device=DEVICE, dtype=torch.int32)
    ids = torch.zeros(T, device=DEVICE, dtype=torch.int32)
    ids[starts[1:].long()] = 1
    padded = torch.full((16,), T, device=DEVICE, dtype=torch.int32)
    padded[: len(starts)] = starts
    docs = Docs(padded, ids.cumsum(0, dtype=torch.int32), T)
    q, k, v, g = torch.randn(4, T, H, d, device=DEVICE).bfloat16().unbind()

    def run(name, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        make, attend = BACKENDS[name]
        y = attend(*leaves, make(docs, window), 0.1)
        return [y, *torch.autograd.grad(y, leaves, g.to(dtype))]

    for ours, exact in zip(run(backend, torch.bfloat16), run("masked", torch.float64)):
        assert (ours.double() - exact).norm() / exact.norm() < 0.02  # a few bfloat16 roundings of 2^-9


def test_fp8_head_follows_the_compute_capability(monkeypatch):
    monkeypatch.delenv("DISABLE_FP8", raising=False)
    use, reason = choose_fp8("auto", DEVICE)
    assert use == (torch.cuda.get_device_capability() >= (8, 9)), reason


@pytest.mark.parametrize("compile", ["off", "on"])
def test_full_model_of_track_small_learns_which_tokens_occur(tmp_path, monkeypatch, compile):
    """Of 50257 ids only 64 occur, so the loss falls far from ln 50304 within a few steps."""
    cfg = Config.for_track("small", compile=compile, val_tokens=262_144)
    synthetic_shards(cfg, tmp_path, 30_000_000, ids_used=64)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    cfg = Config.for_track("small", compile=compile, val_tokens=262_144, max_epochs=1000)
    run = Run(cfg, Runtime())
    assert sum(p.numel() for p in run.model.parameters()) > 600e6
    assert run.model.attn_qk.dtype == torch.bfloat16
    first = run.evaluate()
    run.warm_up()
    run.train_step()
    torch.cuda.set_sync_debug_mode("error")  # a step may not make the host wait for the device
    try:
        for _ in range(11):
            run.accumulate(run.loader.next(), run.step)
            run.update(run.step)
            run.step += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert abs(first - math.log(50304)) < 0.1 and run.evaluate() < first - 1 and run.muon.skipped == 0
