"""The GPU's MLP against its formula, in FP8 against products of the rounded factors, and its Triton kernels
in Triton's interpreter; its off switches."""

import dataclasses
import importlib.util
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from data.errors import UsageError
from data.files import ROOT
from engine.fused import norm, squared_relu_mlp
from engine.kernels import Kernels
from engine.mlp import E4M3, GpuMlp, choose_fused_mlp, choose_mlp_fp8, squared_relu_in_fp8

CPU = torch.device("cpu")
T, D, M = 48, 32, 80


def example(dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = norm(normal(T, D))
    w_in = scale * normal(M, D)
    w_out = normal(D, M) / scale
    leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, w_in, w_out)]
    return leaves, normal(T, D).to(dtype)


def results(y, leaves, g):
    return y, *torch.autograd.grad(y, leaves, g)


def errors(found, exact):
    return [
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, exact)
    ]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda function: function,
        lambda function: torch.compile(function, backend="aot_eager", fullgraph=True),
    ],
    ids=["eager", "compiled"],
)
def test_value_and_gradients_are_those_of_the_formula(wrap):
    leaves, g = example()
    mlp = wrap(lambda *leaves: GpuMlp.apply(*leaves, False, False))
    exact = results(squared_relu_mlp(*leaves), leaves, g)
    assert max(errors(results(mlp(*leaves), leaves, g), exact)) < 1e-14


def test_one_hidden_tensor_is_kept_for_the_backward_pass():
    (leaves, _), kept = example(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        GpuMlp.apply(*leaves, False, False)
    assert sum(kept) == T * D + 2 * M * D + T * M


# ------------------------------------------------------------------------------------------------------------
# FP8


def rounded(x, largest):
    scale = largest / torch.finfo(E4M3).max
    return (x.float() / scale).to(E4M3).double() * scale.double()


def by_rounded_factors(x, w_in, w_out):
    """The MLP in float64, of factors that e4m3 has; bf16 lies between its products."""
    longest = w_in.norm(dim=1).amax()
    hidden = rounded(x, torch.tensor(math.sqrt(D))) @ rounded(w_in, longest).t()
    squared = F.relu(hidden.bfloat16().double()).square()
    squared8 = rounded(squared, ((1 + 2**-4) ** 2 * math.sqrt(D) * longest).square())
    return squared8 @ rounded(w_out, w_out.norm(dim=1).amax()).t()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_in_fp8_it_is_the_mlp_of_rounded_factors_at_any_scale(scale):
    leaves, g = example(torch.bfloat16, scale)
    found = results(GpuMlp.apply(*leaves, True, False), leaves, g)
    oracle = by_rounded_factors(*(leaf.detach().float() for leaf in leaves))
    assert errors(found, [oracle])[0] < 2**-8
    exact = results(squared_relu_mlp(*(leaf.double() for leaf in leaves)).bfloat16(), leaves, g)
    # e4m3 has 3 bits: each entry is off by 2^-4 at most, a third of that on average.
    assert all(0.01 < error < 0.08 for error in errors(found, exact)[:1])
    assert max(errors(found, exact)[1:]) < 0.08


def test_no_entry_passes_the_bound_that_stands_for_the_largest_one():
    """x along the longest row, all of its entries rounded up."""
    x = torch.full((1, D), 1.0, dtype=torch.bfloat16)
    w = torch.full((2, D), 17 / 16 * 1.001, dtype=torch.bfloat16)
    squared, squared8, scale = squared_relu_in_fp8(x, w, False)
    assert squared8.float().max() > 300 and squared8.float().isfinite().all()
    assert torch.allclose(squared8.float() * scale, squared.float(), rtol=2**-4)


def test_of_weights_that_are_zero_all_is_zero():
    leaves, g = example(torch.bfloat16)
    with torch.no_grad():
        leaves[1].zero_()
        leaves[2].zero_()
    assert all((part == 0).all() for part in results(GpuMlp.apply(*leaves, True, False), leaves, g))


def test_only_training_is_in_fp8():
    (x, w_in, w_out), _ = example(torch.float32)
    plain = Kernels.plain()
    fp8 = dataclasses.replace(plain, mlp_fp8=True)
    assert not torch.equal(fp8.mlp(x, w_in, w_out), plain.mlp(x, w_in, w_out))
    with torch.no_grad():
        assert torch.equal(fp8.mlp(x, w_in, w_out), plain.mlp(x, w_in, w_out))


def test_off_switches_really_switch_it_off(monkeypatch):
    monkeypatch.delenv("DISABLE_FP8", raising=False)
    assert choose_mlp_fp8("on", CPU, D, M)[0] and "self-test" in choose_mlp_fp8("on", CPU, D, M)[1]
    assert not choose_mlp_fp8("off", CPU, D, M)[0] and not choose_mlp_fp8("auto", CPU, D, M)[0]
    assert not choose_fused_mlp(False, CPU, torch.bfloat16, D, M)[0]
    monkeypatch.setenv("DISABLE_FP8", "1")
    assert choose_mlp_fp8("on", CPU, D, M) == (False, "DISABLE_FP8 is set")


def test_asking_for_fp8_where_it_is_wrong_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("DISABLE_FP8", raising=False)
    right = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: 1.3 * right(*args, **kwargs))
    with pytest.raises(UsageError, match="--mlp_fp8: expected .*self-test error.*leave it out"):
        choose_mlp_fp8("on", CPU, D, M)


# ------------------------------------------------------------------------------------------------------------
# Triton

# The interpreter has no products in bf16, and cuts bits off where a GPU rounds to e4m3.
KERNELS = """
import torch
from engine import mlp_kernels
generator = torch.Generator().manual_seed(0)
def check(found, exact, bound):
    assert (found.double() - exact).norm() < bound * exact.norm()
for T, D, M in ((200, 64, 304), (128, 192, 128)):
    x, w, g, w_out = (torch.randn(shape, generator=generator).half()
                      for shape in ((T, D), (M, D), (T, D), (D, M)))
    squared = mlp_kernels.squared_relu_mm(x, w)
    check(squared, torch.relu(x.double() @ w.double().t()).square(), 1e-3)
    found = mlp_kernels.squared_relu_backward_mm(g, w_out, squared)
    check(found, (g.double() @ w_out.double()) * 2 * squared.double().sqrt(), 1e-3)
    x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    squared, squared8 = mlp_kernels.squared_relu_scaled_mm(x, w, torch.tensor([0.5, 0.25]))
    exact = torch.relu(0.5 * x.double() @ w.double().t()).square()
    check(squared, exact, 0.01)
    check(4 * squared8.float(), exact, 0.1)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: bench/cross/requirements.txt"
)
def test_the_kernels_compute_their_definitions():
    command = [sys.executable, "-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n" + KERNELS]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
