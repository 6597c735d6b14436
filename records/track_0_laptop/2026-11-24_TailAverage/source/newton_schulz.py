"""Newton-Schulz: the nearest semi-orthogonal matrix by matrix products alone. `orthogonalize` is all of Muon but its
bookkeeping; muon.py has the optimizer.

Legend: m x n as stored, s and l its short and long side; a stack is (B, m, n). Sources: muon.py names them.
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def expect(holds: bool, expected: str, found, remedy: str, error: type = ValueError) -> None:
    if not holds:
        raise error(f"Muon: {expected}, found {found}; {remedy}")


# name -> (safety, one (a, b, c) per step; the last one repeats). A step maps each singular value x to
# a x + b x^3 + c x^5, and the matrix enters with Frobenius norm 1 / safety.
COEFFICIENTS = {
    # Keller Jordan's post: one triple with a steep slope at 0; values end anywhere in about 0.7 .. 1.2.
    "jordan": (1.0, ((3.4445, -4.7750, 2.0315),)),
    # YouJiacheng, https://x.com/YouJiacheng/status/1893704552689303901: tuned per step, the tightest band after five.
    "quintic": (1.0, ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                      (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))),
    # Polar Express, optimal for five steps with a margin of 2 % against rounding; the best lift of tiny values.
    "polar": (1.02, ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                     (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                     (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                     (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                     (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))),
}
FORMS = "auto", "standard", "gram"


def largest(G: Tensor) -> Tensor:
    """(..., 1, 1): the largest absolute entry of every matrix, NaN if any is; unlike G.abs(), without a copy of G. Reducing
    one flat dimension is 100 times as fast on a CPU as reducing two."""
    flat = G.flatten(-2)
    return torch.maximum(flat.amax(-1), -flat.amin(-1))[..., None, None]


def iteration_dtype(device: torch.device, form: str = "auto") -> torch.dtype:
    """fp32 on a CPU, as many have no bf16 units (bench/MUON.md); bf16 elsewhere, but fp16 for the Gram form: it has digits."""
    return torch.float32 if device.type == "cpu" else torch.float16 if form == "gram" else torch.bfloat16


def gram_pays(m: int, n: int, form: str, dtype: torch.dtype) -> bool:
    """Whether to iterate on the Gram matrix. On a CPU core in fp32 it is 1.55 times as fast at an aspect of 4, 1.1 times at 2,
    and even at 1.25; `auto` leaves out bf16, in which a I + b R + c R^2 would lose R."""
    return form == "gram" or (form == "auto" and max(m, n) >= 2 * min(m, n) and dtype != torch.bfloat16)


def newton_schulz_flops(m: int, n: int, steps: int, gram: bool) -> int:
    """Of the matrix products, 2 for a multiply-add; s and l are the short and the long side."""
    s, l, restarts = min(m, n), max(m, n), -(-(steps - 2) // 3) if steps > 2 else 0
    if gram:
        return 4 * s * s * l * (1 + restarts) + 2 * s**3 * (4 * steps - 3 * (1 + restarts))
    return steps * (4 * s * s * l + 2 * s**3)


# A CPU multiplies large matrices fastest one at a time. For fp32 torch calls MKL, which on an AMD processor (Zen 5) reaches
# 105 GFLOP/s per core where oneDNN reaches 240; torch has both, and its compiler calls oneDNN by this name.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512") else None
BLOCK_ROWS = 192  # of a symmetric product: fewer save more products, but call more often


def one_by_one(X: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the wide matrices of a stack are iterated one at a time, by the products below, as measured on one and two
    cores: bf16 pays from two blocks of rows, fp32 where oneDNN is there and a call is worth its 10 microseconds."""
    dtype = dtype or X.dtype
    if type(X) is not Tensor or X.device.type != "cpu" or X.requires_grad or torch.compiler.is_compiling():
        return False
    return (X.size(-2) >= 2 * BLOCK_ROWS and dtype in (torch.float32, torch.bfloat16)
            or X[0].numel() >= 2**16 and dtype == torch.float32 and ONEDNN is not None)


def product(A: Tensor, W: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha A W^T + beta C of matrices on a CPU. W lies in memory without gaps: else oneDNN takes a second."""
    if ONEDNN is not None and A.dtype == torch.float32:
        D = ONEDNN(A, W, None, "none", [], "")
        return D if C is None else D.mul_(alpha).add_(C, alpha=beta)
    return A @ W.mT if C is None else torch.addmm(C, A, W.mT, alpha=alpha, beta=beta)


def symmetric_product(A: Tensor, B: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha A B + beta C of stacks whose result is symmetric: a kernel with this signature needs to compute only half. This
    one does so for what is large on a CPU: blocks of rows up to the diagonal."""
    if len(A) > 1 or not one_by_one(A):
        return A @ B if C is None else torch.baddbmm(C, A, B, beta=beta, alpha=alpha)
    s, W = A.size(1), B[0].mT.contiguous() if A.dtype == torch.float32 else B[0].mT
    out, rows = A.new_empty(1, s, s), BLOCK_ROWS if s >= 2 * BLOCK_ROWS else s
    for i in range(0, s, rows):
        j = i + rows
        out[0, i:j, :j] = product(A[0, i:j], W[:j], None if C is None else C[0, i:j, :j], alpha, beta)
        out[0, :i, i:j] = out[0, i:j, :i].mT
    return out


def apply_to(X: Tensor, P: Tensor, a: float = 0.0) -> Tensor:
    """P X + a X of stacks."""
    if len(X) == 1 and one_by_one(X):
        return product(P[0], X[0].mT, X[0] if a else None, 1.0, a)[None]
    return torch.baddbmm(X, P, X, beta=a) if a else P @ X


def standard_steps(X: Tensor, triples: Sequence, symmetric) -> Tensor:
    for a, b, c in triples:
        A = symmetric(X, X.mT)
        X = apply_to(X, symmetric(A, A, A, alpha=c, beta=b), a)
    return X


def gram_steps(X: Tensor, triples: Sequence, symmetric) -> Tensor:
    """The same map through R = X X^T. One step multiplies X by P = a I + b R + c R^2 and R by P^2; all of these are
    polynomials in R and commute. Restarting after the second step, and every three from there, renews the small
    eigenvalues of R, whose relative error the steep first steps would carry on."""
    for first, last in [(0, 2)] + [(i, i + 3) for i in range(2, len(triples), 3)]:
        R, Q, segment = symmetric(X, X.mT), None, triples[first:last]
        for i, (a, b, c) in enumerate(segment, 1):
            P = symmetric(R, R, R, alpha=c, beta=b)
            P.diagonal(dim1=-2, dim2=-1).add_(a)
            Q = P if Q is None else symmetric(Q, P)
            R = symmetric(symmetric(R, P), P) if i < len(segment) else R
        X = apply_to(X, Q)
    return X


def is_schedule(x) -> bool:
    return x in COEFFICIENTS if isinstance(x, str) else len(x) > 0 and all(
        len(triple) == 3 and all(math.isfinite(number) for number in triple) for triple in x)


def orthogonalize(G: Tensor, steps: int = 5, coefficients: str | Sequence = "polar", dtype: torch.dtype | None = None,
                  form: str = "auto", symmetric=symmetric_product) -> Tensor:
    """Approximate U V^T of the SVD U S V^T of every (m, n) matrix of G: (..., m, n), which is not modified.
    coefficients: a name in COEFFICIENTS or a sequence of (a, b, c). dtype: of the iteration and the result, default
    `iteration_dtype`. form: see `gram_pays`. symmetric: see `symmetric_product`. Only the direction of G counts: dividing
    by the largest entry first keeps the squares in range for entries from 1e-30 to 1e30. Zero in, zero out."""
    expect(G.ndim >= 2 and G.numel() > 0 and G.is_floating_point(), "expected real matrices of some size",
           f"{tuple(G.shape)} in {G.dtype}", "leave it to another optimizer")
    if G.size(-2) > G.size(-1):
        return orthogonalize(G.mT, steps, coefficients, dtype, form, symmetric).mT  # R is smallest on the short side
    known = is_schedule(coefficients) and form in FORMS and steps > 0
    expect(known, "expected known coefficients, one of auto, standard and gram, and a step or more",
           f"{coefficients}, {form} and {steps}", "see the docstring")
    dtype = dtype or iteration_dtype(G.device, form)
    expect(form != "gram" or dtype != torch.bfloat16, "expected fp16, fp32 or fp64 for the Gram form", dtype, "name one")
    safety, triples = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else (1.0, coefficients)
    triples = [triples[min(i, len(triples) - 1)] for i in range(steps)]
    tiny = torch.finfo(torch.float32).tiny
    X = G.reshape(-1, *G.shape[-2:]).float()
    alone = one_by_one(X, dtype)
    X = X.contiguous() if alone else X
    X = X / largest(X).clamp(min=tiny)
    X = X.div_(X.norm(dim=(-2, -1), keepdim=True).clamp(min=tiny) * safety).to(dtype)
    iterate = gram_steps if gram_pays(*X.shape[-2:], form, dtype) else standard_steps
    if alone and len(X) > 1:
        for x in X.split(1):
            x.copy_(iterate(x, triples, symmetric))
        return X.reshape(G.shape)
    return iterate(X, triples, symmetric).reshape(G.shape)
