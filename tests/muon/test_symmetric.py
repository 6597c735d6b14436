"""Muon's symmetric products: half of them on a CPU; a kernel that works is used, one that does not is named
and left out."""
import pytest
import torch

import muon
from engine.products import choose_symmetric, correct_symmetric
from muon import orthogonalize, symmetric_product

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
    assert product is not symmetric_product and len(calls) >= 10
    assert reason.startswith("quack-kernels: self-test error")
    calls.clear()
    X = torch.randn(2, 300, 400)
    torch.testing.assert_close(product(X, X.mT), X @ X.mT)
    A = X @ X.mT
    exact = torch.baddbmm(A, A, A, beta=-2.0, alpha=0.5)
    torch.testing.assert_close(product(A, A, A, alpha=0.5, beta=-2.0), exact, rtol=1e-4, atol=1e-2)
    assert len(calls) == 2
    product(X[:, :256], X[:, :256].mT)
    assert len(calls) == 2


@pytest.mark.parametrize("kernel, reason", [
    (lambda A, B, C=None, alpha=1.0, beta=1.0: symmetric_product(A, B, C, alpha, beta).tril(), "error of"),
    (lambda A, B, C=None, alpha=1.0, beta=1.0: symmetric_product(A, B, C, beta, alpha), "error of"),
    (lambda A, B, C=None, alpha=1.0, beta=1.0: A @ B if C is None else 1 / 0, "ZeroDivisionError: division")])
def test_a_broken_kernel_is_left_out_and_named(kernel, reason):
    product, why = correct_symmetric(kernel, CPU)
    assert product is symmetric_product and why.startswith("torch, as quack-kernels") and reason in why


def whole(function):
    return torch.compile(function, backend="eager", dynamic=False, fullgraph=True)


def test_a_kernel_that_no_graph_can_hold_is_left_out_before_the_run_compiles_it():
    assert correct_symmetric(half, CPU, whole)[1].startswith("quack-kernels: self-test error")
    alone = torch.compiler.disable(half)
    assert correct_symmetric(alone, CPU)[1].startswith("quack-kernels: self-test error")
    product, why = correct_symmetric(alone, CPU, whole)
    assert product is symmetric_product and why.startswith("torch, as quack-kernels fails: ")


@pytest.fixture(params=["oneDNN", "without"])
def onednn(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(muon, "ONEDNN", None)
    elif muon.ONEDNN is None:
        pytest.skip("no AVX-512, or torch without oneDNN")


def plain(A, B, C=None, alpha=1.0, beta=1.0):
    A, B, C = (x if x is None else x.double() for x in (A, B, C))
    return A @ B if C is None else torch.baddbmm(C, A, B, alpha=alpha, beta=beta)


# bf16 rounds by 2^-9 = 0.002
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("B, s, l", [(1, 385, 401), (1, 200, 333), (3, 390, 400), (1, 1, 400)])
def test_half_of_a_product_is_the_whole(onednn, dtype, B, s, l):
    if dtype == torch.float16 and s > 200:
        pytest.skip("slow on a CPU, and computed as torch does")
    X = torch.randn(B, s, l, generator=torch.Generator().manual_seed(0)).div_(l**0.5).to(dtype)
    for A, right in ((X, X.mT), (X.mT.contiguous().mT, X.mT), (X, X.mT.contiguous())):
        found = symmetric_product(A, right)
        assert (found - plain(A, right)).abs().max() < BOUNDS[dtype] * found.abs().max()
    R = found
    for left, right in ((R, R), (R, R.mT)):
        exact = plain(left, right, R, 0.7, -1.3)
        found = symmetric_product(left, right, R, alpha=0.7, beta=-1.3)
        assert found.dtype == dtype and (found - exact).abs().max() < BOUNDS[dtype] * exact.abs().max()
        if muon.one_by_one(X) and B == 1 and s >= muon.LARGE:
            assert torch.equal(found.tril(-muon.BLOCK_ROWS), found.triu(muon.BLOCK_ROWS).mT)  # mirrored


@pytest.mark.parametrize(
    "gram, dtype", [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("shape", [(500, 390), (2, 390, 390), (2, 130, 520)])
def test_one_by_one_is_as_exact_as_a_stack(onednn, monkeypatch, shape, gram, dtype):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kept, found = G.clone(), orthogonalize(G, 5, "jordan", dtype, gram)
    one = orthogonalize(G.view(-1, *shape[-2:])[-1].clone(), 5, "jordan", dtype, gram)
    if muon.one_by_one(torch.empty(1, *sorted(shape[-2:]), dtype=dtype)):
        assert torch.equal(found.view(-1, *shape[-2:])[-1], one)
    assert torch.equal(G, kept) and found.dtype == dtype and found.shape == G.shape
    monkeypatch.setattr(muon, "one_by_one", lambda *args: False)
    exact = orthogonalize(G.double(), 5, "jordan", torch.float64, False)
    before = orthogonalize(G, 5, "jordan", dtype, gram)
    error, usual = ((x - exact).norm() / exact.norm() for x in (found, before))
    assert error < 2 * usual


def test_a_compiler_sees_what_it_saw():
    graphs = []
    compiled = torch.compile(orthogonalize, fullgraph=True,
                             backend=lambda graph, _: graphs.append(graph) or graph)
    compiled(torch.randn(400, 400))
    assert "mkldnn" not in graphs[0].code and "baddbmm" in graphs[0].code
