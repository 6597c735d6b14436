"""The FP8 head against the exact product, on a CPU that emulates the float8 matrix product, and its off switch."""
import pytest
import torch

from kernels import Fp8Linear, choose_fp8, to_fp8
from runtime import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_product_and_gradients_are_near_the_exact_ones_at_any_scale(scale):
    torch.manual_seed(0)
    x = (torch.randn(64, 32) * scale).bfloat16().requires_grad_()
    w = (torch.randn(128, 32) * 0.01).bfloat16().requires_grad_()
    g = torch.randn(64, 128).bfloat16() / scale
    y, exact = Fp8Linear.apply(x, w), x.double() @ w.double().t()
    # A product of e4m3 numbers (3 bits after the point) is off by 2^-4 per factor at most, a third of that on average;
    # e5m2 gradients have one bit less.
    for ours, true, bound in ((y, exact, 0.05), *zip(torch.autograd.grad(y, (x, w), g),
                                                     torch.autograd.grad(exact, (x, w), g.double()), (0.1, 0.1))):
        error = (ours.double() - true).norm() / true.norm()
        assert 1e-4 < error < bound, error  # above zero: it really went through FP8


def test_largest_entry_becomes_the_largest_float8_number_and_zero_stays_zero():
    x = torch.tensor([[3.0, -6.0, 0.0]])
    q, s = to_fp8(x, torch.float8_e4m3fn)
    assert q.float().abs().max() == torch.finfo(torch.float8_e4m3fn).max and torch.allclose(q.float() * s, x)
    assert to_fp8(torch.zeros(2, 2), torch.float8_e5m2)[0].float().abs().max() == 0


def test_off_switches_really_switch_it_off(monkeypatch):
    monkeypatch.delenv("DISABLE_FP8", raising=False)
    assert choose_fp8("on", CPU)[0] and "self-test" in choose_fp8("on", CPU)[1]
    assert not choose_fp8("off", CPU)[0] and not choose_fp8("auto", CPU)[0]
    monkeypatch.setenv("DISABLE_FP8", "1")
    assert choose_fp8("on", CPU) == (False, "DISABLE_FP8 is set")


def test_asking_for_fp8_where_it_does_not_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("DISABLE_FP8", raising=False)

    def missing(*args, **kwargs):
        raise RuntimeError("torch._scaled_mm is only supported on devices with compute capability >= 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    with pytest.raises(UsageError, match="--fp8_head: expected .*compute capability.*leave it out"):
        choose_fp8("on", CPU)


def test_wrong_numbers_are_refused(monkeypatch):
    monkeypatch.delenv("DISABLE_FP8", raising=False)
    right = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: 1.3 * right(*args, **kwargs))
    with pytest.raises(UsageError, match="self-test error"):
        choose_fp8("on", CPU)
