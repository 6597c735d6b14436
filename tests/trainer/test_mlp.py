"""The GPU's MLP against its formula, in FP8 against products of the rounded factors, and its Triton kernels
in Triton's interpreter; its off switches."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from engine import mlp
from engine.fused import norm, squared_relu_mlp
from engine.kernels import Kernels
from engine.mlp import E4M3, GpuMlp, choose_fused_mlp, squared_relu_in_fp8
from tests.helpers.triton import interpret

CPU = torch.device("cpu")
GPU = torch.device("cuda")
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
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, exact)]


def plain_mlp(*leaves):
    return GpuMlp.apply(*leaves, False, False)


@pytest.mark.parametrize("function", [
    plain_mlp, torch.compile(plain_mlp, backend="aot_eager", fullgraph=True)], ids=["eager", "compiled"])
def test_value_and_gradients_are_those_of_the_formula(function):
    leaves, g = example()
    exact = results(squared_relu_mlp(*leaves), leaves, g)
    assert max(errors(results(function(*leaves), leaves, g), exact)) < 1e-14


def test_one_hidden_tensor_is_kept_for_the_backward_pass():
    (leaves, _), kept = example(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        plain_mlp(*leaves)
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


# ------------------------------------------------------------------------------------------------------------
# Triton


@pytest.mark.parametrize("training", [False, True])
def test_kernels_that_the_log_names_are_used_with_and_without_torch_compile(training, monkeypatch):
    (x, w_in, w_out), _ = example(torch.float32)
    kernel = mock.Mock(side_effect=lambda x, w: F.relu(F.linear(x, w)).square())
    monkeypatch.setattr(mlp, "mlp_kernels", mock.Mock(squared_relu_mm=kernel))
    fused = dataclasses.replace(Kernels.plain(), fused_mlp=True)
    with torch.set_grad_enabled(training):
        assert torch.equal(fused.mlp(x, w_in, w_out), Kernels.plain().mlp(x, w_in, w_out))
    assert kernel.call_count == 1


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("wrong", [None, "bf16", "fp8", "raises", "slow"])
def test_kernels_are_used_where_those_of_training_and_validation_are_right_and_fast(wrong, fp8, monkeypatch):
    def error(fp8, fused, *sizes):
        if wrong == "raises":
            raise RuntimeError("no such kernel\non this GPU")
        bad = wrong == ("fp8" if fp8 else "bf16")
        return math.nan if bad else 0.01

    monkeypatch.setattr(mlp, "mlp_kernels", mlp)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(mlp, "self_test_error", error)
    monkeypatch.setattr(mlp, "race", lambda *args: (2.0 if wrong == "slow" else 0.5, 1.0))
    good, reason = choose_fused_mlp(fp8, GPU, torch.bfloat16, D, M)
    assert good == (wrong is None or (wrong == "fp8" and not fp8))
    words = {"raises": "RuntimeError: no such kernel", "slow": "2.00 ms instead of 1.00"}
    assert words.get(wrong, "self-test error") in reason
    assert not choose_fused_mlp(fp8, GPU, torch.float32, D, M)[0]
    assert not choose_fused_mlp(fp8, CPU, torch.bfloat16, D, M)[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not choose_fused_mlp(fp8, GPU, torch.bfloat16, D, M)[0]


def test_kernels_that_lose_their_race_on_one_rank_are_used_on_none():
    reasons = {"fused_mlp": "0.90 ms instead of 1.00"}
    won = dataclasses.replace(Kernels.plain(), fused_mlp=True, reasons=reasons)
    assert won.agreed(lambda fact: fact) == won and won.agreed(lambda fact: fact).reasons == reasons
    alike = won.agreed(lambda fact: False)
    assert not alike.fused_mlp
    assert alike.reasons["fused_mlp"] == "not on another rank; here 0.90 ms instead of 1.00"


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


def test_the_kernels_compute_their_definitions():
    interpret(KERNELS, loops=True)
