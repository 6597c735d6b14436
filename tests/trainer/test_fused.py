"""Fused functions against their plain formulas, in values and gradients."""
import functools

import pytest
import torch

from engine import products
from engine.fused import (
    NormAndRotary, RmsNorm, RotaryOfNorm, SquaredReluMlp, norm, residual, residual_sum, rotary,
    squared_relu_mlp)
from engine.kernels import Kernels
from muon import ONEDNN
from tests.helpers.tiny import THREE_LAYERS, build, config, context, docs_of


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


def mlp(x, w_in, w_out, onednn, dtype):
    return SquaredReluMlp.apply(x, w_in, w_out, onednn, dtype)


def test_the_mlp_equals_its_formula():
    arguments = leaves((11, 6), (13, 6), (6, 13))
    fused = functools.partial(mlp, onednn=False, dtype=torch.float64)
    assert_same(fused, squared_relu_mlp, arguments, 1e-14)


@pytest.mark.skipif(ONEDNN is None, reason="needs oneDNN with AVX-512")
def test_the_mlp_by_onednn_equals_its_formula():
    arguments = leaves((70, 32), (96, 32), (32, 96), dtype=torch.float32)
    fused = functools.partial(mlp, onednn=True, dtype=torch.float32)
    assert_same(fused, squared_relu_mlp, arguments, 1e-5)


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=pytest.mark.skipif(
    ONEDNN is None, reason="needs oneDNN with AVX-512"))])
def test_the_mlp_with_factors_in_bf16_is_near_its_formula_and_gives_fp32(onednn):
    arguments = leaves((70, 32), (96, 32), (32, 96), dtype=torch.float32)
    fused = functools.partial(mlp, onednn=onednn, dtype=torch.bfloat16)
    assert_same(fused, squared_relu_mlp, arguments, 1e-2)  # each factor is rounded by up to 2^-9


@pytest.mark.parametrize("shape", [(7, 6), (5, 2, 3, 8)])
def test_the_norm_equals_its_formula(shape):
    assert_same(RmsNorm.apply, norm, leaves(shape), 1e-12)


@pytest.mark.parametrize("heads", [1, 3])
def test_norm_and_rotary_equal_their_formulas(heads):
    """Tables of plain heads are alike for all heads, those of paired ones are not; two channels are left."""
    x, = leaves((5, 2, 3, 8))
    angle = torch.rand(5, 1, heads, 3, dtype=torch.float64)
    assert_same(lambda x: NormAndRotary.apply(x, angle.cos(), angle.sin()),
                lambda x: rotary(norm(x), angle.cos(), angle.sin()), [x], 1e-12)


@pytest.mark.parametrize("heads", [1, 3])
def test_norm_and_rotary_for_a_gpu_equal_their_formulas(heads):
    x, = leaves((5, 3, 8), dtype=torch.float32)
    angle = torch.rand(5, heads, 3)
    size = torch.tensor(0.3)
    assert_same(lambda x: RotaryOfNorm.apply(x, angle.cos(), angle.sin(), size),
                lambda x: size * rotary(norm(x), angle.cos(), angle.sin()), [x], 1e-6)


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_the_residual_update_equals_its_formula(terms):
    arguments = [*leaves(*[()] * terms), *leaves(*[(7, 6)] * terms)]
    assert_same(lambda *args: residual(args[:terms], args[terms:]),
                lambda *args: residual_sum(args[:terms], args[terms:]), arguments, 1e-14)


def test_only_an_eager_cpu_fuses_and_the_model_stays_the_same():
    cfg = config()
    chosen = Kernels.choose(cfg, torch.device("cpu"))
    assert chosen.fused and not Kernels.plain().fused
    results = []
    for kernels in (Kernels.plain(), chosen):
        model = build(cfg, kernels=kernels)
        tokens = torch.arange(18) * 7 % cfg.vocab_size
        loss = model(tokens[:-1], tokens[1:], context(model, docs_of([5, 1, 7, 4])), torch.tensor([1.0, 0.5]))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss, gradients))
    (plain, expected), (fused, found) = results
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)  # fp32
    whole = sum(g.square().sum() for g in expected.values()).sqrt()
    for name, g in expected.items():
        assert (found[name] - g).norm() < 2e-5 * g.norm() + 1e-6 * whole, name


def test_operations_of_a_gpu_leave_the_model_the_same_recomputed_too(monkeypatch):
    plain = Kernels.plain()
    found = []
    for ours in (False, True):
        monkeypatch.setattr(Kernels, "own_kernels", ours)
        model = build(config(THREE_LAYERS, recompute=ours), kernels=plain)
        tokens = torch.arange(18) * 7 % 256
        loss = model(tokens[:-1], tokens[1:], context(model, docs_of([5, 1, 7, 4])), torch.ones(1))
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((loss.detach(), *gradients))
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= 1e-5 * exact.norm()


def test_recomputing_the_layers_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        cfg = config(recompute=recompute)
        model = build(cfg, kernels=Kernels.choose(cfg, torch.device("cpu")))
        tokens = torch.arange(18) * 7 % cfg.vocab_size
        model(tokens[:-1], tokens[1:], context(model, docs_of([5, 1, 7, 4])), torch.ones(1)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10 and all(map(torch.equal, *gradients))


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
