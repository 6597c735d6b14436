"""Fused functions against their plain formulas, in values and gradients."""
import dataclasses
import math

import pytest
import torch

from engine import products
from engine.fused import (
    NormAndRotary, NormAndScaled, RmsNorm, RotaryOfNorm, SquaredReluMlp, StoredGradient, norm, residual,
    residual_sum, rotary, squared_relu_mlp)
from engine.kernels import Kernels
from muon import ONEDNN
from tests.helpers.tiny import build, config, context, docs_of


def leaves(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def assert_same(fused, plain, arguments, tolerance):
    """Both give the same values, and gradients of all arguments."""
    found, expected = fused(*arguments), plain(*arguments)
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    gradients = [torch.autograd.grad(y, arguments, g) for y in (found, expected)]
    for ours, exact in [(found, expected), *zip(*gradients, strict=True)]:
        assert ours.shape == exact.shape and ours.dtype == exact.dtype
        assert (ours - exact).norm() <= tolerance * exact.norm()


needs_onednn = pytest.mark.skipif(ONEDNN is None, reason="needs oneDNN with AVX-512")


@pytest.mark.parametrize("leaf, dtype, onednn, tolerance", [
    (torch.float64, torch.float64, False, 1e-14),
    pytest.param(torch.float32, torch.float32, True, 1e-5, marks=needs_onednn),
    (torch.float32, torch.bfloat16, False, 1e-2),  # each factor is rounded by up to 2^-9
    pytest.param(torch.float32, torch.bfloat16, True, 1e-2, marks=needs_onednn)])
def test_the_mlp_equals_its_formula_and_keeps_the_type(leaf, dtype, onednn, tolerance):
    arguments = leaves((70, 32), (96, 32), (32, 96), dtype=leaf)
    assert_same(lambda *leaves: SquaredReluMlp.apply(*leaves, onednn, dtype), squared_relu_mlp, arguments,
                tolerance)


@pytest.mark.parametrize("shape", [(7, 6), (5, 2, 3, 8)])
def test_the_norm_equals_its_formula(shape):
    assert_same(RmsNorm.apply, norm, leaves(shape), 1e-12)


@pytest.mark.parametrize("shape", [(), (7, 1)])
def test_norm_and_scaled_equal_their_formulas_whether_one_factor_or_one_a_token(shape):
    def both(x, factor):  # in one tensor, so that each has its own gradient
        return torch.cat([norm(x), factor * x])

    assert_same(lambda x, factor: torch.cat(NormAndScaled.apply(x, factor)), both,
                leaves((7, 6), shape, dtype=torch.float32), 1e-6)


def test_a_stored_gradient_is_the_gradient():
    assert_same(StoredGradient.apply, lambda x: x.clone(), leaves((7, 6)), 0.0)


@pytest.mark.parametrize("fused, shape, dtype, tolerance", [
    (NormAndRotary, (5, 2, 3, 8), torch.float64, 1e-12), (RotaryOfNorm, (5, 3, 8), torch.float32, 1e-6)])
@pytest.mark.parametrize("heads", [1, 3])
def test_norm_and_rotary_equal_their_formulas(heads, fused, shape, dtype, tolerance):
    """Tables of plain heads are alike for all heads, those of paired ones are not; two channels are left."""
    angle = torch.rand(*shape[:1], *[1] * (len(shape) - 3), heads, 3, dtype=dtype)
    sizes = [torch.tensor(0.3)] if fused is RotaryOfNorm else []
    assert_same(lambda x: fused.apply(x, angle.cos(), angle.sin(), *sizes),
                lambda x: math.prod(sizes) * rotary(norm(x), angle.cos(), angle.sin()),
                leaves(shape, dtype=dtype), tolerance)


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_the_residual_update_equals_its_formula(terms):
    arguments = [*leaves(*[()] * terms), *leaves(*[(7, 6)] * (terms + 1))]
    assert_same(lambda *args: residual(args[-1], args[:terms], args[terms:-1]),
                lambda *args: residual_sum(args[-1], args[:terms], args[terms:-1]), arguments, 1e-14)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_fused_functions_of_an_eager_cpu_and_of_a_gpu_leave_the_model_the_same(monkeypatch, gpu, recompute):
    chosen = Kernels.choose(config(), torch.device("cpu"))
    assert chosen.fused and not Kernels.plain().fused
    results = []
    for ours in (False, True):
        monkeypatch.setattr(Kernels, "own_kernels", gpu and ours)
        kernels = chosen if ours and not gpu else Kernels.plain()
        model = build(config(recompute=recompute and ours), kernels=kernels)
        tokens = torch.arange(18) * 7 % 257
        loss = model(tokens[:-1], tokens[1:], context(model, docs_of([5, 1, 7, 4])), torch.tensor([1.0, 0.5]))
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain, expected), (fused, found) = results
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)  # fp32
    whole = sum(g.square().sum() for g in expected.values()).sqrt()
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert (found[name] - g).norm() < 2e-5 * g.norm() + 1e-6 * whole, name


@pytest.mark.parametrize("capability", [(9, 0), (8, 9)])
def test_what_a_gpu_does_without_although_nobody_asked_for_that_is_told(monkeypatch, capability):
    reasons = dict(attention="asked for", fp8_head="asked for", mlp_fp8="not asked for")
    kernels = dataclasses.replace(Kernels.plain(torch.bfloat16, "flex"), device=torch.device("cuda"),
                                  reasons=reasons)
    wishes = dict(attention="auto", fp8_head="auto", mlp_fp8="auto")
    assert kernels.fallbacks(config(**wishes)) == [
        "attention by flex, not by FlashAttention: asked for", "head in bfloat16, not in FP8: asked for",
        "MLP in bfloat16, not in FP8: not asked for"]
    assert kernels.fallbacks(config(attention="blocked", fp8_head="off", mlp_fp8="off")) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for reason in ("varlen: self-test error 1.0e-03; varlen FA4: ...", "varlen FA4: self-test error 1.0e-03"):
        found = dataclasses.replace(kernels, attention="varlen", reasons=reasons | {"attention": reason})
        notes = found.fallbacks(config(attention="auto", fp8_head="off", mlp_fp8="off"))
        older = capability[0] == 9 and "FA4: self-test" not in reason
        said = "attention by FlashAttention 2; what requirements-gpu.txt brings is tried first"
        assert notes == ([said] if older else [])
    assert Kernels.plain().fallbacks(config(**wishes)) == []


def test_batches_go_to_onednn_only_where_it_computes_in_fp32(monkeypatch):
    A = torch.randn(3, 70, 130, generator=torch.Generator().manual_seed(0))
    before = torch.backends.mkldnn.matmul.fp32_precision
    with products.onednn_batches():
        assert (torch.backends.mkldnn.matmul.fp32_precision != before) == products.exact_onednn_batches()
        exact = A.double() @ A.mT.double()
        torch.testing.assert_close((A @ A.mT).double(), exact, rtol=1e-5, atol=1e-4)  # fp32
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    monkeypatch.setattr(products, "largest_error", lambda *args: 2e-3)  # as with factors in bf16
    assert not products.exact_onednn_batches.__wrapped__()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
