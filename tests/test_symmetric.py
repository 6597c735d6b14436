"""The choice of a kernel for Muon's symmetric products: one that works is used, one that does not is named and left out."""
import pytest
import torch

from kernels import choose_symmetric, correct_symmetric
from muon import symmetric_product

CPU = torch.device("cpu")


def half(A, B, C=None, alpha=1.0, beta=1.0):
    """One triangle, mirrored, as the kernels do it."""
    lower = symmetric_product(A, B, C, alpha, beta).tril()
    return lower + lower.tril(-1).mT


def test_a_cpu_uses_torch():
    assert choose_symmetric(CPU)[0] is symmetric_product


def test_a_correct_kernel_is_used_for_large_matrices_only():
    calls = []

    def kernel(A, B, C=None, alpha=1.0, beta=1.0):
        calls.append(A.shape)
        return half(A, B, C, alpha, beta)

    product, reason = correct_symmetric(kernel, CPU)
    assert product is not symmetric_product and reason.startswith("quack-kernels: self-test error") and len(calls) == 10
    X = torch.randn(2, 300, 400)
    torch.testing.assert_close(product(X, X.mT), X @ X.mT)
    A = X @ X.mT
    exact = torch.baddbmm(A, A, A, beta=-2.0, alpha=0.5)
    torch.testing.assert_close(product(A, A, A, alpha=0.5, beta=-2.0), exact, rtol=1e-4, atol=1e-2)
    assert len(calls) == 12
    product(X[:, :256], X[:, :256].mT)
    assert len(calls) == 12


@pytest.mark.parametrize("kernel, reason", [
    (lambda A, B, C=None, alpha=1.0, beta=1.0: symmetric_product(A, B, C, alpha, beta).tril(), "self-test error of"),
    (lambda A, B, C=None, alpha=1.0, beta=1.0: symmetric_product(A, B, C, beta, alpha), "self-test error of"),
    (lambda A, B, C=None, alpha=1.0, beta=1.0: A @ B if C is None else 1 / 0, "ZeroDivisionError: division by zero")])
def test_a_broken_kernel_is_left_out_and_named(kernel, reason):
    product, why = correct_symmetric(kernel, CPU)
    assert product is symmetric_product and why.startswith("torch, as quack-kernels") and reason in why
