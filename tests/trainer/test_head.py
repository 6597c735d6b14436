"""Head and loss in one against their definition, and against the definition's formula; products by oneDNN;
FP8 on a CPU that emulates the float8 matrix product, and its off switch."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.errors import UsageError
from engine import mlp, products
from engine.fp8 import to_fp8
from engine.head_loss import choose_fp8, head_loss, multi_token_loss, softcap
from engine.mlp import choose_mlp_fp8
from engine.products import CpuLinear, choose_bf16, choose_onednn
from muon import ONEDNN, has_bf16_units

CPU = torch.device("cpu")
CAP = 23.0, 5.0, 7.5
needs_onednn = pytest.mark.skipif(ONEDNN is None, reason="needs AVX-512")


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (0.7, 0.2, 0.1, 0.05)])
def test_the_multi_token_loss_equals_its_formula_in_value_and_gradient(weights):
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.tensor([1, 4, 0, 0, 3, 2, 1, 4, 2])
    exact = logits.detach().double().requires_grad_()
    expected = sum(-w * torch.log(exact[t].exp()[targets[t + k]] / exact[t].exp().sum())
                   for k, w in enumerate(weights) for t in range(9 - k))
    loss = multi_token_loss(logits, targets, torch.tensor(weights))
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)  # fp32
    found, = torch.autograd.grad(loss, logits)
    gradient, = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-7)  # fp32


def example(T=37, V=50, D=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return x, head, torch.randint(0, V, (T,), generator=generator)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def both(x, head, targets, weights, cap, size, fp8=False, onednn=False, apply=head_loss, prefixes=None):
    """(loss, its gradients of x and head) in one pass and by the definition, of which twice the loss is
    used."""
    weights = torch.tensor(weights)
    ours = apply(x, head, targets, weights, cap, size, fp8, onednn, prefixes)
    exact = multi_token_loss(softcap((x.double() @ head.double().t()), cap), targets, weights, prefixes)
    return [(loss, *torch.autograd.grad(2 * loss, (x, head))) for loss in (ours, exact)]


def assert_near(found, expected, relative):
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape and (ours - exact).norm() < relative * exact.norm()


PREFIXES = torch.randint(-5, 50, (37,), generator=torch.Generator().manual_seed(3)).clamp(min=-1)
assert 2 <= (PREFIXES < 0).sum() <= 15


@pytest.mark.parametrize("cap", [(), CAP])
@pytest.mark.parametrize("weights, prefixes", [
    ((1.0,), None), ((1.0, 0.5, 0.25), None), ((0.7, 0.0), None), ((1.0, 0.25), PREFIXES),
    ((1.0, 0.5, 0.25, 0.125), PREFIXES)])
def test_head_and_loss_in_one_equal_their_definition_eager_and_compiled(cap, weights, prefixes):
    for size, apply in (*((size, head_loss) for size in (1, 10, 37, 100)), (15, compiled(head_loss))):
        found, exact = both(*example(), weights, cap, size, apply=apply, prefixes=prefixes)
        assert_near(found, exact, 1e-5)  # fp32
    if ONEDNN is not None:
        assert_near(*both(*example(), weights, cap, 10, onednn=True, prefixes=prefixes), 1e-5)


def test_a_prefix_token_is_one_more_target_of_the_same_logits():
    _, _, targets = example()
    logits = torch.randn(37, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_p = torch.log_softmax(logits, -1)
    extra = -sum(log_p[t, prefix] for t, prefix in enumerate(PREFIXES.tolist()) if prefix >= 0)
    without = multi_token_loss(logits, targets, torch.tensor([1.0, 0.5]))
    full = multi_token_loss(logits, targets, torch.tensor([1.0, 0.5, 0.25]), PREFIXES)
    torch.testing.assert_close((full - without).double(), 0.25 * extra, rtol=1e-4, atol=0)  # fp32


@pytest.mark.parametrize("dtype, tolerance", [
    pytest.param(torch.float32, 1e-6, marks=needs_onednn), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("T, D, N", [(1, 1, 1), (37, 12, 50), (512, 128, 384), (200, 33, 7)])
def test_a_product_on_a_cpu_equals_the_plain_one_in_value_and_gradients(T, D, N, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(3, N, D, generator=generator)
    x, w = torch.randn(T, D, generator=generator).requires_grad_(), bank[1].requires_grad_()
    g = torch.randn(N, T).t()
    y, exact = CpuLinear.apply(x, w, dtype), F.linear(x.double(), w.double())
    found = y, *torch.autograd.grad(y, (x, w), g)
    assert {part.dtype for part in found} == {torch.float32}
    assert_near(found, (exact, *torch.autograd.grad(exact, (x, w), g.double())), tolerance)


@pytest.mark.parametrize("has", [True, False])
def test_products_are_in_bf16_where_the_processor_has_units_for_it(monkeypatch, has):
    monkeypatch.setattr(products, "has_bf16_units", lambda: has)
    assert choose_bf16("auto", CPU, torch.float32, False)[0] == has
    assert choose_bf16("bfloat16", CPU, torch.float32, False)[0]
    assert not choose_bf16("float32", CPU, torch.float32, False)[0]
    for elsewhere in ((torch.device("cuda"), torch.float32, False), (CPU, torch.bfloat16, False),
                      (CPU, torch.float32, True)):
        assert not choose_bf16("auto", *elsewhere)[0]
        with pytest.raises(UsageError, match="--products: expected bfloat16 with fp32 weights on a CPU"):
            choose_bf16("bfloat16", *elsewhere)


@pytest.mark.parametrize("limit, has", [
    ("", True), ("DEFAULT", True), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX", True),
    ("AVX512_CORE", False), ("avx512_core_vnni", False), ("AVX2", False)])
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_units_that_onednn_may_not_use_do_not_count(monkeypatch, name, limit, has):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setenv(name, limit)
    assert has_bf16_units() == has
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # as in torch for macOS
    assert not has_bf16_units()


def test_onednn_is_for_eager_fp32_on_a_cpu_of_the_kind_that_gains(monkeypatch):
    assert not choose_onednn(torch.device("cuda"), torch.float32, False)[0]
    assert not choose_onednn(CPU, torch.bfloat16, False)[0]
    assert not choose_onednn(CPU, torch.float32, True)[0]
    amd = Path("/proc/cpuinfo").exists() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    assert choose_onednn(CPU, torch.float32, False)[0] == (amd and ONEDNN is not None)
    monkeypatch.setattr(products, "ONEDNN", None)
    assert not choose_onednn(CPU, torch.float32, False)[0]


def test_a_confident_prediction_keeps_its_small_gradient_in_bfloat16():
    """p - 1 of the target is small there: rounding p first would leave noise."""
    x, head, targets = example(dtype=torch.bfloat16)
    with torch.no_grad():
        x.zero_()
        head.zero_()
        x[:, 0] = 4
        head[targets[0], 0] = 2  # p = 0.99 of the first target's token, everywhere
    ours, exact = both(x, head, torch.full_like(targets, targets[0]), (1.0,), (), 16)
    assert (ours[1] - exact[1]).norm() < 0.01 * exact[1].norm()


@pytest.mark.parametrize("wrap", [lambda function: function, compiled], ids=["eager", "compiled"])
def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass(wrap):
    (x, head, targets), kept = example(T=64, V=200), []
    apply = wrap(head_loss)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        apply(x, head, targets, torch.ones(2), CAP, 16)
    assert sum(kept) == x.numel() + head.numel()


# ------------------------------------------------------------------------------------------------------------
# FP8


@pytest.mark.parametrize("scale", [1e-3, 3.0])
@pytest.mark.parametrize("cap", [(), CAP])
def test_fp8_gradients_are_near_the_exact_ones_at_any_scale(scale, cap):
    x, head, targets = example(T=64, V=128, D=32, dtype=torch.bfloat16)
    with torch.no_grad():
        x.mul_(scale)
        head.mul_(0.3)
    ours, exact = both(x, head, targets, (1.0, 0.5), cap, 32, fp8=True)
    # A product of e4m3 numbers (3 bits after the point) is off by 2^-4 per factor at most, a third of that on
    # average; e5m2 gradients have one bit less.
    for a, b, bound in zip(ours, exact, (0.01, 0.1, 0.1)):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert 0 < error < bound, error
    bf16, _ = both(x, head, targets, (1.0, 0.5), cap, 32)
    assert all(not torch.equal(a, b) for a, b in zip(ours[1:], bf16[1:]))  # it really went through FP8


def test_largest_entry_becomes_the_largest_float8_number_and_zero_stays_zero():
    x = torch.tensor([[3.0, -6.0, 0.0]])
    q, s = to_fp8(x, torch.float8_e4m3fn)
    assert q.float().abs().max() == torch.finfo(torch.float8_e4m3fn).max and torch.allclose(q.float() * s, x)
    assert to_fp8(torch.zeros(2, 2), torch.float8_e5m2)[0].float().abs().max() == 0


def choose_fp8_of_mlp(wish, device):
    return choose_mlp_fp8(wish, device, 32, 80)


CHOICES = {"fp8_head": choose_fp8, "mlp_fp8": choose_fp8_of_mlp}


@pytest.fixture(params=CHOICES)
def setting(request, monkeypatch):
    monkeypatch.delenv("DISABLE_FP8", raising=False)
    return request.param


def test_off_switches_really_switch_it_off(setting, monkeypatch):
    choose = CHOICES[setting]
    chosen, reason = choose("on", CPU)
    assert chosen and "self-test" in reason
    assert not choose("off", CPU)[0] and not choose("auto", CPU)[0]
    monkeypatch.setenv("DISABLE_FP8", "1")
    assert choose("on", CPU) == (False, "DISABLE_FP8 is set")


def test_asking_for_fp8_where_it_does_not_run_or_is_wrong_is_refused_with_the_reason(setting, monkeypatch):
    right = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: 1.3 * right(*args, **kwargs))
    with pytest.raises(UsageError, match=f"--{setting}: expected .*self-test error"):
        CHOICES[setting]("on", CPU)

    def missing(*args, **kwargs):
        raise RuntimeError("torch._scaled_mm is only supported on devices with compute capability >= 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    with pytest.raises(UsageError, match=f"--{setting}: expected .*compute capability"):
        CHOICES[setting]("on", CPU)


@pytest.mark.parametrize("wish", ["auto", "on"])
def test_no_race_decides_whether_a_gpu_computes_in_fp8(wish, monkeypatch):
    """Ranks, and a run and its resumed rest, would compute differently by chance."""
    monkeypatch.delenv("DISABLE_FP8", raising=False)
    monkeypatch.setattr(mlp, "self_test_error", lambda *args: 0.05)
    monkeypatch.setattr(mlp, "race", lambda *args: (1.1, 1.0))
    assert choose_fp8_of_mlp(wish, torch.device("cuda")) == (True, "self-test error 5.0e-02")
