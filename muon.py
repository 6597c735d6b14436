"""Muon for one process or many: momentum, then the nearest semi-orthogonal matrix.

For every weight matrix W with gradient G, at learning rate lr, weight decay wd and momentum mu:

    M <- mu M + (1 - mu) G                        momentum, fp32
    U  = (1 - mu) G + mu M                        Nesterov look-ahead (or U = M)
    O  = orthogonalize(U)                         all singular values near 1, by Newton-Schulz
    O <- O / sqrt(V), rescaled to its old norm    normuon_beta2 only; V: running mean square per row or column
    W <- W - lr wd W                              decoupled decay (cautious: only entries where O W >= 0)
    W <- W - lr scale O                           scale: see ADJUST_LR

A gradient that is zero throughout, as of an expert without tokens, moves nothing: momentum fades, W decays.
A gradient that is missing or not finite skips its matrix, and so does an iteration that overflows; `skipped`
counts them.

Legend: a matrix is m x n as stored, s and l are its short and its long side; B matrices make a stack
(B, m, n). A 2-D parameter is one matrix, a 3-D parameter (k, m, n) a bank of k matrices or, with flatten, one
matrix (o, i k) of a 1-D convolution, a convolution (o, i, h, w) the matrix (o, i h w); `split` cuts a matrix
into blocks of rows. The work is shared over ranks: each owns some of the matrices and computes them for all.

Use it for the hidden matrices of a network. Embeddings, the output head, routers, gains and biases belong to
AdamW. This file needs nothing but torch and can be copied alone. For DTensor parameters (FSDP2) there is
muon_extras/fsdp.py.

Sources: Muon, https://kellerjordan.github.io/posts/muon/; decay and RMS matching, arXiv 2502.16982
(Moonlight); default coefficients, arXiv 2505.16932 (Polar Express); variance normalization, arXiv 2510.05491
(NorMuon); cautious decay, arXiv 2510.12402; iteration on the Gram matrix,
https://github.com/Dao-AILab/gram-newton-schulz.
"""
import collections
import contextlib
import copy
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def refusal(expected: str, found, remedy: str, where: str = "", error: type = ValueError) -> Exception:
    """Return an error with its sentence, for the caller to raise."""
    return error(f"Muon: {where + ': ' if where else ''}expected {expected}, found {found}; {remedy}")


# ----------------------------------------------------------------------------------------------------------
# Newton-Schulz: the nearest semi-orthogonal matrix by matrix products alone

# name -> (safety, one (a, b, c) per step; the last one repeats). A step maps each singular value x to
# a x + b x^3 + c x^5, and the matrix enters with Frobenius norm 1 / safety.
COEFFICIENTS = {
    # Keller Jordan's post: one triple with a steep slope at 0; values end anywhere in about 0.7 .. 1.2.
    "jordan": (1.0, ((3.4445, -4.7750, 2.0315),)),
    # YouJiacheng, https://x.com/YouJiacheng/status/1893704552689303901: the tightest band after five steps.
    "quintic": (1.0, (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012))),
    # Polar Express, optimal for five steps with a margin of 2 % against rounding; the best lift of tiny
    # values.
    "polar": (1.02, (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))),
}
LARGE = 384  # rows from which a matrix is worth a method of its own on a CPU


def expect_matrices(name: str, x: Tensor) -> None:
    if x.ndim < 2 or x.numel() == 0 or not x.is_floating_point() or x.itemsize < 2:
        raise refusal("real matrices of some size", f"shape {tuple(x.shape)} in {x.dtype}",
                      "leave it to another optimizer, such as AdamW", name)


def schedule(ns_coefficients: str | Sequence, steps: int) -> tuple[float, list[Sequence[float]]]:
    """Return (safety, one (a, b, c) per step) of a name, one (a, b, c), or a sequence of them."""
    safety = 1.0
    triples = ns_coefficients
    if isinstance(ns_coefficients, str):
        safety, triples = COEFFICIENTS[ns_coefficients]
    elif not isinstance(ns_coefficients[0], Sequence):
        triples = (ns_coefficients,)
    return safety, [triples[min(i, len(triples) - 1)] for i in range(steps)]


def is_schedule(x) -> bool:
    _, triples = schedule(x, len(x))
    return all(len(triple) == 3 and all(map(math.isfinite, triple)) for triple in triples)


# Values of ONEDNN_MAX_CPU_ISA that keep oneDNN from bf16 units, which torch's own answers do not know of.
WITHOUT_BF16_UNITS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def has_bf16_units() -> bool:
    """Return whether this processor multiplies bf16 matrices in hardware (Intel AMX or AVX-512 BF16) and
    oneDNN may use it. Otherwise a product in bf16 takes 3 times as long as in fp32, with AVX2 alone 12
    times."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    if not torch.backends.mkldnn.is_available() or limit.upper() in WITHOUT_BF16_UNITS:
        return False
    names = "_is_amx_tile_supported", "_is_avx512_bf16_supported"  # private in torch, and younger than 2.0
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Return the default dtype of the iteration."""
    return torch.float32 if device.type == "cpu" and not has_bf16_units() else torch.bfloat16


def gram_pays(m: int, n: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether to iterate on the Gram matrix. On a CPU core that is 1.1 times as fast for matrices
    twice as long as wide; four times as long, 1.55 times in fp32 and 1.25 times in bf16. In bf16 it raises
    the error of the result from 1 to 2 % to 1 to 5 %, and to 20 % in small matrices and those of rank 1. So
    small ones do without, and so do other devices, on which nobody has measured it."""
    fine = dtype != torch.bfloat16 or device.type == "cpu" and min(m, n) >= 256
    return fine and max(m, n) >= 2 * min(m, n)


def segments(triples: Sequence, gram: bool, dtype: torch.dtype) -> list[Sequence]:
    """Cut the steps into those that share one Gram matrix: in the standard form each has its own. Computing
    it anew restores its small eigenvalues, whose relative error the steep first steps would carry on: bf16
    affords two steps, other dtypes three after the first two."""
    if not gram:
        return [triples[i:i + 1] for i in range(len(triples))]
    later = 2 if dtype == torch.bfloat16 else 3
    starts = range(2, len(triples), later)
    return [triples[:2], *(triples[i:i + later] for i in starts)]


def newton_schulz_flops(m: int, n: int, steps: int, gram: bool, dtype: torch.dtype) -> int:
    """Count the operations of the matrix products of one m x n matrix, 2 for a multiply-add."""
    s = min(m, n)
    l = max(m, n)
    lengths = map(len, segments(range(steps), gram, dtype))
    return sum(4 * s * s * l + 2 * s**3 * (4 * length - 3) for length in lengths)


# A CPU multiplies large matrices fastest one at a time. For fp32 torch calls MKL, which on an AMD processor
# (Zen 5) reaches 105 GFLOP/s per core where oneDNN reaches 240; torch has both, and its compiler calls oneDNN
# by this name.
ONEDNN = None
if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512":
    ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
BLOCK_ROWS = 256  # of a symmetric product of large matrices: fewer save more, but call more often


def on_a_cpu(x: Tensor) -> bool:
    """Return whether x lies on a CPU, where Python can look at its values without waiting, and may be changed
    in place."""
    return type(x) is Tensor and x.is_cpu and not x.requires_grad and not torch.compiler.is_compiling()


def raise_mmap_threshold() -> None:
    """Let glibc keep up to 64 MB of what a step frees, as it does in a program that has once freed 31 MB in
    one piece: see M_MMAP_THRESHOLD in mallopt(3). Otherwise the next step gets every page anew, which takes a
    third of its time for matrices of 128 to 256 rows."""
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")  # never touched, so that it costs nothing


def one_by_one(X: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether to iterate wide matrices one at a time, by the products below. Measured on one and two
    cores, that pays for large ones, in bf16 later than in fp32; in fp32 also for smaller ones where oneDNN is
    there and a call is worth its 10 us."""
    dtype = dtype or X.dtype
    if dtype not in (torch.float32, torch.bfloat16) or not on_a_cpu(X):
        return False
    if dtype == torch.float32 and ONEDNN is not None and X[0].numel() >= 2**16:
        return True
    return X.size(-2) >= (512 if dtype == torch.bfloat16 else LARGE)


def product(A: Tensor, W: Tensor, C: Tensor | None = None, alpha=1.0, beta=1.0) -> Tensor:
    """Return alpha A W^T + beta C of matrices on a CPU. oneDNN takes a second if W has gaps in memory."""
    if ONEDNN is not None and A.dtype == torch.float32:
        D = ONEDNN(A, W, None, "none", [], "")
        return D if C is None else D.mul_(alpha).add_(C, alpha=beta)
    return A @ W.mT if C is None else torch.addmm(C, A, W.mT, alpha=alpha, beta=beta)


def symmetric_product(A: Tensor, B: Tensor, C: Tensor | None = None, alpha=1.0, beta=1.0) -> Tensor:
    """Return alpha A B + beta C of stacks whose result is symmetric: a kernel with this signature needs to
    compute only half. This one does so for what is large on a CPU: blocks of rows up to the diagonal."""
    # A stack of one in bf16 takes twice as long as its matrix.
    alone = len(A) == 1 and (one_by_one(A) or A.dtype == torch.bfloat16 and on_a_cpu(A))
    if not alone:
        return A @ B if C is None else torch.baddbmm(C, A, B, beta=beta, alpha=alpha)
    s = A.size(1)
    W = B[0].mT.contiguous() if A.dtype == torch.float32 else B[0].mT
    if s < LARGE:
        return product(A[0], W, None if C is None else C[0], alpha, beta)[None]
    out = A.new_empty(s, s)
    for i in range(0, s, BLOCK_ROWS):
        j = i + BLOCK_ROWS
        above = None if C is None else C[0, i:j, :j]
        out[i:j, :j] = product(A[0, i:j], W[:j], above, alpha, beta)
        out[:i, i:j] = out[i:j, :i].mT
    return out[None]


def iterate(X: Tensor, segments: list[Sequence], symmetric: Callable) -> Tensor:
    """Take all steps on a wide stack. With R = X X^T one step multiplies X by a I + P, where P = b R + c R^2,
    and R by its square; all of these are polynomials in R and commute. So steps that share a Gram matrix need
    X only at the end. Their product is kept as q I + Q: in 16 bits the sum would lose the digits of Q."""
    for segment in segments:
        R = symmetric(X, X.mT)
        for i, (a, b, c) in enumerate(segment):
            P = symmetric(R, R, R, alpha=c, beta=b)
            if i == 0:
                q = a
                Q = P
            else:
                Q = symmetric(Q, P, Q, beta=a).add_(P, alpha=q)
                q = q * a
            if i + 1 < len(segment):
                half_way = symmetric(R, P, R, beta=a)
                R = symmetric(half_way, P, half_way, beta=a)
        alone = len(X) == 1 and one_by_one(X)
        X = product(Q[0], X[0].mT, X[0], beta=q)[None] if alone else torch.baddbmm(X, Q, X, beta=q)
    return X


def largest(G: Tensor) -> Tensor:
    """Return (..., 1, 1): the largest absolute entry of every matrix, NaN if any is; unlike G.abs(), without
    a copy of G. Reducing one flat dimension is 100 times as fast on a CPU as reducing two."""
    flat = G.flatten(-2)
    top = torch.maximum(flat.amax(-1), -flat.amin(-1))
    return top[..., None, None]


def plain_norms(G: Tensor) -> Tensor | None:
    """Return (B, 1, 1): the Frobenius norms of a stack on a CPU; None unless all are of a size at which fp32
    sums their squares without loss, so that no matrix is zero or not finite."""
    if not on_a_cpu(G):
        return None
    norms = G.norm(dim=(-2, -1), keepdim=True).float()
    return norms if all(1e-15 < norm < 1e15 for norm in norms.flatten().tolist()) else None


def normalize(G: Tensor, dtype: torch.dtype, safety: float, eps: float) -> Tensor:
    """Return the wide stack G with Frobenius norms 1 / safety, in dtype. Dividing by the largest entry first
    keeps the squares in range: for entries from 1e-30 to 1e30 in fp32, and from 1e-300 to 1e300 in fp64."""
    norms = plain_norms(G) if dtype == torch.bfloat16 and G.dtype == torch.float32 else None
    if norms is not None:  # one pass over few bytes; bf16 has the range of fp32
        X = G.to(dtype)
        scales = 1 / (norms.view(-1).clamp(min=eps) * safety)
        for x, scale in zip(X, scales):
            x.mul_(scale)
        return X
    X = G.to(torch.promote_types(torch.promote_types(G.dtype, dtype), torch.float32))
    X = X.contiguous() if one_by_one(X, dtype) else X
    tiny = torch.finfo(X.dtype).tiny
    top = largest(X).clamp(min=tiny)
    X = X / top
    norm = torch.maximum(X.norm(dim=(-2, -1), keepdim=True), eps / top)
    norm = norm.clamp(min=tiny) * safety
    X = X / norm if X.requires_grad else X.div_(norm)
    return X.to(dtype)


def orthogonalize(G: Tensor, steps: int = 5, ns_coefficients: str | Sequence = "polar",
                  dtype: torch.dtype | None = None, gram: bool | None = None,
                  symmetric: Callable = symmetric_product, eps: float = 0.0) -> Tensor:
    """Approximate U V^T of the SVD U S V^T of every (m, n) matrix of G: (..., m, n), which is not modified.
    ns_coefficients: a name in COEFFICIENTS, one (a, b, c), or a sequence of them. dtype: of the iteration and
    the result, default `iteration_dtype`. gram: whether to iterate on the Gram matrix, default `gram_pays`.
    symmetric: see `symmetric_product`. Only the direction of G counts, unless its norm is below eps. Zero in,
    zero out. In bf16 a matrix of low rank keeps two digits: its null space comes out with singular values up
    to 0.5 instead of 0; ask for torch.float32 where that matters (LoRA)."""
    expect_matrices("", G)
    steps = checked("ns_steps", steps)
    ns_coefficients = checked("ns_coefficients", ns_coefficients)
    dtype = dtype or iteration_dtype(G.device)
    if G.size(-2) > G.size(-1):  # R = X X^T is smallest on the short side
        return orthogonalize(G.mT, steps, ns_coefficients, dtype, gram, symmetric, eps).mT
    safety, triples = schedule(ns_coefficients, steps)
    stack = G.reshape(-1, *G.shape[-2:])
    X = normalize(stack, dtype, safety, eps)
    gram = gram_pays(*X.shape[-2:], dtype, X.device) if gram is None else gram
    parts = segments(triples, gram, dtype)
    as_asked = contextlib.nullcontext()
    if not X.is_meta and torch.is_autocast_enabled(X.device.type):
        # Only then: torch's cache takes no compiled graph that switches autocast.
        as_asked = torch.autocast(X.device.type, enabled=False)
    with as_asked:
        results = [iterate(x, parts, symmetric) for x in X.split(1 if one_by_one(X) else len(X))]
    O = results[0] if len(results) == 1 else torch.cat(results)
    return O.reshape(G.shape)


# ----------------------------------------------------------------------------------------------------------
# The update of one stack of B matrices: functions of tensors alone, so that torch.compile can fuse each of
# them

ADJUST_LR = {  # the factor on lr for an m x n matrix; weight decay never sees it
    None: lambda m, n: math.sqrt(max(1, m / n)),                 # as in torch: original
    "original": lambda m, n: math.sqrt(max(1, m / n)),           # Keller Jordan; torch calls it the same
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # Moonlight: the root mean square is 0.2
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),         # torch 2.14; below 1 for wide matrices
    "identity": lambda m, n: 1.0,
}


def momentum_update(M: Tensor, G: Tensor, mu, nesterov: bool) -> tuple[Tensor, Tensor]:
    """Return (U, which of the B gradients are finite). M (B, m, n) fp32 moves in place where they are; G is
    read only. U is zero where G is zero throughout."""
    size = plain_norms(G)
    plain = size is not None  # spares three passes
    if not plain:
        size = largest(G).float()  # fp64 may be finite there only
    ok = size.isfinite()
    G = G.float() if plain else torch.where(ok, G.float(), M)  # blending M with M leaves M as it is
    M.lerp_(G, 1 - mu)
    U = G.lerp(M, mu) if nesterov else M
    return U if plain else torch.where(size > 0, U, 0.0), ok.view(-1)


def finite_only(O: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
    """Return O with zeros where the iteration has overflowed, and ok without these."""
    finite = torch.linalg.vector_norm(O.flatten(1), dim=1).isfinite()
    if on_a_cpu(O) and bool(finite.all()):
        return O, ok
    return torch.where(finite[:, None, None], O, 0), ok & finite


def normalize_variance(O: Tensor, V: Tensor, ok: Tensor, beta2) -> Tensor:
    """NorMuon: divide each row (m >= n) or column (m < n) of O by its running root mean square, and keep O's
    norm. V is (B, m) or (B, n) fp32 and moves in place where ok. It starts at 0 without bias correction: the
    rescaling cancels any common factor."""
    O = O.float()
    dim = -1 if O.size(-2) >= O.size(-1) else -2
    V = V.unsqueeze(dim)
    square = O.square().mean(dim, keepdim=True)
    V.lerp_(torch.where(ok[:, None, None], square, V), 1 - beta2)
    inverse = V.clamp(min=1e-10).rsqrt()
    before = square.sum((-2, -1), keepdim=True).sqrt()  # both norms lack the same factor sqrt(O.size(dim))
    after = (square * inverse.square()).sum((-2, -1), keepdim=True).sqrt()
    return O * (inverse * (before / after.clamp(min=1e-10)))


def decay_and_step(W: Tensor, O: Tensor, ok: Tensor, lr, decay, cautious: bool) -> None:
    """W <- W - decay W - lr O in place; bf16 is rounded once, at the end. A matrix that is not ok stays.
    W, O: (B, ...); ok: (B,) bool, or 0 and 1 as they come off the wire; decay: already times lr."""
    X = W if W.dtype.itemsize >= 4 else W.float()
    O = O.to(X.dtype)
    ok = ok.to(X.dtype).view(-1, *[1] * (W.ndim - 1))
    keep = 1 - decay * ok
    if cautious:
        keep = (O * X).ge_(0).mul_(-decay * ok).add_(1)  # a mask of 0.0 and 1.0: thrice as fast as where
    X.mul_(keep).addcmul_(O, -lr * ok)
    if X is not W:
        W.copy_(X)


def step_master(W: Tensor, low: Tensor, O: Tensor, ok: Tensor, lr, decay, cautious: bool) -> Tensor:
    """`decay_and_step` on fp32 master weights: the bf16 W holds their upper 16 bits, the int16 `low` the
    lower ones. Returns the new upper halves as bf16, truncated; W is not modified, `low` is."""
    master = join_halves(W, low)
    decay_and_step(master, O, ok, lr, decay, cautious)
    return upper_half(master, low)


def join_halves(upper: Tensor, low: Tensor) -> Tensor:
    """Return the fp32 numbers whose upper 16 bits are a bf16 tensor and whose lower ones an int16 tensor."""
    bits = upper.view(torch.int16).int() << 16
    bits |= low.int() & 0xFFFF
    return bits.view(torch.float32)


def upper_half(master: Tensor, low: Tensor) -> Tensor:
    """Return the upper halves of fp32 numbers as bf16, truncated; the lower ones go to the int16 `low`."""
    bits = master.view(torch.int32)
    low.copy_(bits.to(torch.int16))
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------
# Who owns what: every matrix, or block of rows of a matrix, belongs to one rank

def as_bank(x: Tensor, flatten: bool | None) -> Tensor:
    """Return (matrices, rows, columns ...) of a tensor that is shaped like a parameter."""
    return x if x.ndim == 3 and not flatten else x[None]


def cut(bank: Tensor, blocks: Sequence[int], n: int = 0) -> Sequence[Tensor]:
    """Return the stacks (B, rows, ...) of a bank (matrices, all rows, ...) whose matrices consist of blocks
    of so many rows: a stack of each block over all matrices, but of equal blocks of a single matrix one in
    all. n: of variances, where a block has as many numbers as its long side."""
    if len(bank) == 1 and len(set(blocks)) == 1:
        return [bank[0].unflatten(0, (len(blocks), -1))]
    return bank.split([max(m, n) for m in blocks], 1)


@dataclass(eq=False)
class Stack:
    """Matrices (B, m, n) of one parameter that have one owner and are computed together. All fields stay as
    they were at the layout, so that the state of a parameter is still found after it has changed."""
    param: Tensor
    group: dict             # its settings
    whole: Sequence[int]    # shape of the parameter
    bank: Sequence[int]     # the same as (matrices, all rows, columns ...)
    flatten: bool | None
    blocks: Sequence[int]   # rows of the blocks of a matrix
    number: int             # place of the stack in what `cut` returns
    start: int              # its first matrix there
    stop: int               # the one after its last
    m: int
    n: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self), self.m, self.n

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def flops(self, dtype: torch.dtype) -> int:
        """Count the operations that one of its matrices takes in a step."""
        gram = gram_pays(self.m, self.n, dtype, self.param.device)
        return newton_schulz_flops(self.m, self.n, self.group["ns_steps"], gram, dtype)

    def state_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if name != "second_moment" else (len(self), max(self.m, self.n))

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter's whole state: its own, or (matrices, numbers) of variances."""
        if name != "second_moment":
            return tuple(self.whole)
        return self.bank[0], sum(max(m, self.n) for m in self.blocks)

    def within(self, bank: Tensor, n: int = 0) -> Tensor:
        return cut(bank, self.blocks, n)[self.number][self.start:self.stop]

    def of(self, x: Tensor) -> Tensor:
        """Return the view (B, m, ...) of these matrices in a tensor that is shaped like the parameter."""
        return self.within(as_bank(x, self.flatten))

    def of_state(self, name: str, x: Tensor) -> Tensor:
        """Return the view (B, m, n), or (B, numbers) for second_moment, in the whole state of a parameter."""
        return self.within(x, self.n) if name == "second_moment" else self.of(x).view(self.shape)


def stacks_of(p: Tensor, shape: Sequence[int], group: dict) -> list[Stack]:
    """Return the stacks of a parameter, or of the part of this shape that a rank has."""
    flatten = group["flatten"]
    bank = as_bank(torch.empty(shape, device="meta"), flatten)
    blocks = group["split"] or (bank.size(1),)
    if isinstance(blocks, int):
        blocks = (bank.size(1) // blocks,) * blocks
    stacks = []
    for number, stack in enumerate(cut(bank, blocks)):
        B, m, *columns = stack.shape
        n = math.prod(columns)
        stacks.append(Stack(p, group, shape, bank.shape, flatten, blocks, number, 0, B, m, n))
    return [stack for stack in stacks if len(stack)]


KINDS = {  # kind of state -> (dtype, whether the settings of a group ask for it)
    "momentum_buffer": (torch.float32, lambda group: True),
    "second_moment": (torch.float32, lambda group: group["normuon_beta2"] is not None),
    "mantissa": (torch.int16, lambda group: group["split_mantissa"]),
}


def state_kinds(group: dict) -> dict[str, torch.dtype]:
    """Return the state that a group's settings ask for."""
    return {name: dtype for name, (dtype, asked_for) in KINDS.items() if asked_for(group)}


class Placement(NamedTuple):
    buckets: list[list[list[int]]]  # bucket -> rank -> units it owns
    loads: list[int]                # Newton-Schulz FLOPs per rank and step

    @property
    def efficiency(self) -> float:
        """Return the mean load over that of the busiest rank: 1 is perfect balance."""
        mean = sum(self.loads) / len(self.loads)
        return mean / max(self.loads) if mean else 1.0


def place_units(costs: Sequence[int], sizes: Sequence[int], world_size: int, cap: int) -> Placement:
    """Place units, the costliest (FLOPs) first, each on the least loaded rank (longest processing time
    first), and improve that by swaps. A rank's bucket closes at `cap` elements (sizes); the cheapest units
    come last, because no computation hides the last gather. Depends on its arguments only, so that all ranks
    place alike."""
    def dearest_first(u: int) -> tuple[int, int]:
        return -costs[u], u

    def filled(units: set[int]) -> list[list[int]]:
        buckets = []
        fill = cap
        for u in sorted(units, key=dearest_first):
            if fill >= cap:
                buckets.append([])
                fill = 0
            buckets[-1].append(u)
            fill += sizes[u]
        return [sorted(bucket) for bucket in buckets]

    mine = [set() for _ in range(world_size)]
    loads = [0] * world_size
    held = [0] * world_size
    for u in sorted(range(len(costs)), key=dearest_first):
        rank = min(range(world_size), key=lambda r: (loads[r], held[r]))
        mine[rank].add(u)
        loads[rank] += costs[u]
        held[rank] += sizes[u]
    while swap_one(costs, mine, loads):
        pass
    return Placement(list(zip_longest(*map(filled, mine), fillvalue=[])), loads)


def swap_one(costs: Sequence[int], mine: list[set[int]], loads: list[int]) -> bool:
    """Let the busiest rank hand a unit over, or swap it for another's, as lowers the larger of both loads
    most. Returns whether that lowered the load of the busiest rank; else nothing has changed."""
    busiest = loads.index(max(loads))
    kinds = [{0: None} | {costs[u]: u for u in sorted(units)} for units in mine]  # of one cost all are alike
    swaps = [(max(loads[busiest] - a + b, loads[rank] + a - b), rank, a, b)
             for rank in range(len(mine)) if loads[rank] < loads[busiest]
             for a in kinds[busiest] for b in kinds[rank]]
    top, rank, a, b = min(swaps, default=(loads[busiest], busiest, 0, 0))
    if top >= loads[busiest]:
        return False
    moving = {kinds[busiest][a], kinds[rank][b]} - {None}
    mine[busiest] ^= moving
    mine[rank] ^= moving
    loads[busiest] += b - a
    loads[rank] += a - b
    return True


def runs(matrices: Iterable[Stack], given: collections.Counter, together: Callable) -> list[Stack]:
    """Return the next matrices of every stack, as often as it occurs: in one run, as the matrices of a stack
    are alike and what lies together needs no copy, or one by one. given: what was returned before, moves."""
    found = []
    for stack, count in collections.Counter(matrices).items():
        length = count if together(stack) else 1
        start = given[stack]
        given[stack] += count
        found += [replace(stack, start=i, stop=i + length) for i in range(start, start + count, length)]
    return found


# ----------------------------------------------------------------------------------------------------------
# Transport: knows tensors only

# torch 2.13 renamed both. Outputs stay flat: gloo refuses the stacked form that NCCL accepts.
RENAMED = hasattr(dist, "all_gather_single")
all_gather_flat = getattr(dist, "all_gather_single" if RENAMED else "all_gather_into_tensor", None)
reduce_scatter_flat = getattr(dist, "reduce_scatter_single" if RENAMED else "reduce_scatter_tensor", None)


class Flight(NamedTuple):
    """A collective under way."""
    handle: object
    result: Tensor
    sent: Tensor | None  # must live until the wait

    def wait(self) -> Tensor:
        self.handle.wait()
        return self.result


def copy_all(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Copy the second of each pair, if there is one, into the first: on a GPU, many by one kernel."""
    pairs = [pair for pair in pairs if pair[1] is not None]
    if pairs:
        targets, sources = zip(*pairs)
        torch._foreach_copy_(targets, sources)


def sum_to_owners(packed: Tensor, everywhere: bool, group) -> Flight:
    """Sum (ranks, elements) over ranks; each receives its own row or, with `everywhere`, all of them."""
    if everywhere:
        handle = dist.all_reduce(packed, group=group, async_op=True)
        return Flight(handle, packed, None)
    mine = torch.empty_like(packed[0])
    handle = reduce_scatter_flat(mine, packed.view(-1), group=group, async_op=True)
    return Flight(handle, mine, packed)


def share_with_all(mine: Tensor, world_size: int, group) -> Flight:
    """Give every rank the rows (ranks, elements) of which each has one."""
    gathered = mine.new_empty((world_size, len(mine)))
    handle = all_gather_flat(gathered.view(-1), mine, group=group, async_op=True)
    return Flight(handle, gathered, mine)


def world_and_rank(group) -> tuple[int, int]:
    """Return the number of ranks of a process group and the place of this one; 1 and 0 without any."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def of_all_ranks(fact, group) -> list:
    """Return this fact of all ranks, in their order."""
    found = [fact] * world_and_rank(group)[0]
    if len(found) > 1:
        dist.all_gather_object(found, fact, group=group)
    return found


def expect_agreement(found: list[list[str]]) -> None:
    """Raise on all ranks, naming the first difference, if they disagree: they would hang or mix up their
    matrices."""
    for rank, theirs in enumerate(found):
        for a, b in zip_longest(found[0], theirs, fillvalue="nothing"):
            if a != b:
                raise refusal("the same parameters and settings on all ranks",
                              f"{a} on rank 0 and {b} on rank {rank}",
                              "build the optimizer alike on every rank")


# ----------------------------------------------------------------------------------------------------------
# A bucket: some units of every rank, and their way through one step


Results = dict[Stack, tuple[Tensor, Tensor]]  # (what travels (B, m, n), which of B matrices move (B,))


class Bucket:
    """Units that travel together, per rank of a process group, and their way through one step: `start` asks
    for what other ranks hold of their gradients, `receive` waits for it, `update` computes, `send` shares the
    results, `apply` waits for those of others and changes the weights.

    A rank computes the updates of its own units. Momentum, and what else is kept, moves on the owner alone,
    which then sends what is final; with replicate_state it moves on all ranks, from the same numbers."""
    alone = False  # True: every rank computes by itself what it holds

    def __init__(self, optimizer: "Muon", group, rank: int, stacks: list[list[Stack]], dtype: torch.dtype):
        self.optimizer = optimizer
        self.group = group
        self.rank = rank
        self.world_size = len(stacks)
        self.divided = self.world_size > 1 and not optimizer.replicate_state  # owners alone keep the state
        self.dtype = dtype  # of the iteration
        self.wire = dtype if dtype == torch.float32 else torch.bfloat16  # dtype in which updates travel
        self.pending = self.sent = None
        self.stacks = stacks
        self.num_matrices = sum(len(stack) for mine in stacks for stack in mine)
        params = {stack.param for mine in stacks for stack in mine}
        self.device = next(iter(params)).device
        low = all(p.dtype == torch.bfloat16 for p in params)
        self.grad_dtype = torch.bfloat16 if low else torch.float32

    @staticmethod
    def local(x: Tensor) -> Tensor:
        """Return what this rank has of something that is shaped like a parameter."""
        return x

    @staticmethod
    def stackable(stack: Stack) -> bool:
        """Return whether the matrices of a stack may be computed together."""
        return True

    def key(self, stack: Stack, name: str) -> str | tuple[str, int, int]:
        """Return where optimizer.state[p] holds a kind of state: the whole under its name, an owner's share
        of it under (name, number of the stack, first matrix)."""
        return (name, stack.number, stack.start) if self.divided else name

    def state(self, stack: Stack) -> dict[str, Tensor]:
        """Return each kind of state that its group asks for: (B, m, n), or (B, numbers); 0 at first use."""
        state = self.optimizer.state[stack.param]
        found = {}
        for name, dtype in state_kinds(stack.group).items():
            key = self.key(stack, name)
            if key not in state:
                shape = stack.state_shape(name) if self.divided else stack.whole_shape(name)
                state[key] = torch.zeros(shape, dtype=dtype, device=stack.param.device)
            found[name] = state[key] if self.divided else stack.of_state(name, state[key])
        return found

    def gradient(self, stack: Stack) -> Tensor | None:
        """Return (B, m, n), often p.grad itself, or None."""
        p = stack.param
        where = self.optimizer._names[p]
        if p.is_meta and p.grad is None:
            raise refusal("a parameter with values", "one on the meta device", "put the new parameters "
                          "that to_empty() has made into param_groups", where, RuntimeError)
        if p.grad is None:
            return None
        if p.grad.layout != torch.strided:
            raise refusal("a dense gradient", p.grad.layout, "make the layer with sparse=False", where,
                          RuntimeError)
        return stack.of(self.local(p.grad)).reshape(stack.shape)

    def weights(self, stack: Stack) -> Tensor:
        return stack.of(self.local(stack.param))

    def start(self) -> None:
        """Launch the sum of the gradients over ranks, with sync_grads; each owner receives its own part."""
        if self.world_size == 1 or not self.optimizer.sync_grads or self.pending is not None:
            return
        size = self.world_size, max(sum(stack.numel for stack in stacks) for stacks in self.stacks)
        # Where a gradient is missing, NaN: so is the mean, and the owner skips it.
        packed = torch.full(size, math.nan, dtype=self.grad_dtype, device=self.device)
        copy_all((slot, self.gradient(stack)) for owner, part in enumerate(packed)
                 for stack, slot in self.slots(part, owner).items())
        self.pending = sum_to_owners(packed, not self.divided, self.group)

    def receive(self) -> dict[Stack, Tensor]:
        """Return the gradients (B, m, n) of all whose state moves here, with sync_grads their means."""
        owners = [self.rank] if self.divided else range(self.world_size)
        if self.pending is None:
            found = {stack: self.gradient(stack) for owner in owners for stack in self.stacks[owner]}
            # In the layout in which they arrive from other ranks: the last bits of products depend on it.
            return {stack: G.contiguous() for stack, G in found.items() if G is not None}
        mean = self.pending.wait().float().div_(self.world_size)
        self.pending = None
        found = {}
        for owner, part in zip(owners, mean.view(len(owners), -1)):
            found |= self.slots(part, owner)
        return found

    def slots(self, part: Tensor, owner: int) -> dict[Stack, Tensor]:
        """Return the views (B, m, n) of what an owner receives or sends."""
        stacks = self.stacks[owner]
        sizes = [stack.numel for stack in stacks]
        parts = part[:sum(sizes)].split(sizes)
        return {stack: x.view(stack.shape) for stack, x in zip(stacks, parts)}

    def update(self, gradients: dict[Stack, Tensor]) -> Results:
        """Move the momentum, and return the results of what I own."""
        ahead = {}
        for stack, G in gradients.items():
            M = self.state(stack)["momentum_buffer"]
            how = stack.group["momentum"], stack.group["nesterov"]
            ahead[stack] = self.optimizer.call(momentum_update, M, G, *how)
        mine = [stack for stack in self.stacks[self.rank] if stack in ahead]
        results = self.orthogonalize({stack: ahead[stack] for stack in mine})
        return self.settled(results) if self.divided else results

    def orthogonalize(self, ahead: Results) -> Results:
        """Return {stack: (O (B, m, n), rounded as it travels; ok)} from {stack: (U, ok)}: one iteration for
        all matrices of a kind, the tall ones lying on their side, unless they are faster one by one."""
        kinds = collections.defaultdict(dict)
        for stack, (U, _) in ahead.items():
            U = U if stack.m <= stack.n else U.mT
            how = [stack.group[key] for key in ("ns_steps", "ns_coefficients", "eps")]
            apart = self.optimizer.deterministic or one_by_one(U, self.dtype)
            kinds[(*how, U.shape[1:], stack if apart else None)][stack] = U
        results = {}
        for (steps, coefficients, eps, *_), Us in kinds.items():
            U, *others = Us.values()
            U = torch.cat([U, *others]) if others else U
            O = self.optimizer.call(orthogonalize, U, steps, coefficients, self.dtype, None,
                                    self.optimizer.symmetric, eps)
            O, ok = self.optimizer.call(finite_only, O, torch.cat([ahead[stack][1] for stack in Us]))
            sizes = [*map(len, Us)]
            for stack, O, ok in zip(Us, O.split(sizes), ok.split(sizes)):
                O = O if O.shape == stack.shape else O.mT.contiguous()
                results[stack] = O.to(self.wire), ok
        return results

    def settled(self, results: Results) -> Results:
        """Move what is kept beside momentum. Returns the results with NorMuon's variance taken out and, with
        split_mantissa, with the upper halves of the new weights in place of the updates."""
        found = {}
        for stack, (O, ok) in results.items():
            O = self.normalized(stack, O, ok.bool())
            if stack.group["split_mantissa"]:
                W = self.weights(stack).reshape(stack.shape)
                low = self.state(stack)["mantissa"]
                O = self.optimizer.call(step_master, W, low, O, ok, *self.optimizer.rates(stack))
            found[stack] = O, ok
        return found

    def normalized(self, stack: Stack, O: Tensor, ok: Tensor) -> Tensor:
        beta2 = stack.group["normuon_beta2"]
        if beta2 is None:
            return O
        V = self.state(stack)["second_moment"]
        return self.optimizer.call(normalize_variance, O, V, ok, beta2).to(self.wire)

    def send(self, results: Results) -> None:
        """Launch the exchange of the results."""
        if self.world_size == 1:
            self.sent = results
            return
        length = max(sum(stack.numel + len(stack) for stack in stacks) for stacks in self.stacks)
        mine = torch.zeros(length, dtype=self.wire, device=self.device)  # where nothing follows, 0 is not ok
        if self.divided:  # weights that travel do so as they are where nothing has moved them
            masters = [stack for stack in self.stacks[self.rank] if stack.group["split_mantissa"]]
            results = {stack: (self.weights(stack).reshape(stack.shape),) for stack in masters} | results
        copy_all(pair for stack, slots in self.contents(mine, self.rank).items()
                 for pair in zip(slots, results.get(stack, ())))
        self.sent = share_with_all(mine, self.world_size, self.group)

    def contents(self, part: Tensor, owner: int) -> Results:
        """Return the views of what an owner sends: all that travels, then all flags."""
        values = self.slots(part, owner)
        flags = part[sum(stack.numel for stack in values):]
        lengths = [len(stack) for stack in values]
        oks = flags[:sum(lengths)].split(lengths)
        return {stack: (value, ok) for (stack, value), ok in zip(values.items(), oks)}

    def arrived(self) -> Results:
        """Wait for the results of all ranks."""
        sent = self.sent
        self.sent = None
        if self.world_size == 1:
            return sent
        found = {}
        for owner, part in enumerate(sent.wait()):
            found |= self.contents(part, owner)
        return found

    def apply(self) -> Tensor:
        """Change the weights, on every rank with the same numbers. Returns how many matrices were skipped."""
        results = self.arrived() if self.divided else self.settled(self.arrived())
        weights = []
        for stack, (value, ok) in results.items():
            W = self.weights(stack)
            value = value.reshape(W.shape)
            if stack.group["split_mantissa"]:
                weights.append((W, value))
            else:
                self.optimizer.call(decay_and_step, W, value, ok, *self.optimizer.rates(stack))
        copy_all(weights)
        moved = [ok for _, ok in results.values()]
        return self.num_matrices - (torch.cat(moved).sum(dtype=torch.int64) if moved else 0)


# ----------------------------------------------------------------------------------------------------------
# Settings and parameters, checked when they are set or changed

def plain(x):
    """Return numpy's numbers as Python's and lists as tuples, which compare and are saved; tensors stay."""
    if type(x) in (int, float):  # also those that change, as torch.compile sees them
        return x
    if isinstance(x, Sequence) and not isinstance(x, str):
        return tuple(map(plain, x))
    return plain(x.tolist()) if hasattr(x, "tolist") and not isinstance(x, Tensor) else x


def is_rate(x) -> bool:
    if isinstance(x, Tensor):  # on a GPU its value stays there: reading it would make the host wait
        return x.numel() == 1 and (not x.is_cpu or 0 <= float(x) < math.inf)
    return isinstance(x, (int, float)) and 0 <= x < math.inf


def is_split(x) -> bool:
    rows = x if isinstance(x, tuple) and x else (x,)
    return x is None or all(type(m) is int and m > 0 for m in rows)


RATE = "one number, 0 or more", is_rate
SWITCH = "True or False", lambda x: isinstance(x, bool)
NS_DTYPES = None, torch.bfloat16, torch.float16, torch.float32
RULES = {  # setting of a group -> (what is expected, test)
    "lr": RATE,
    "momentum": ("0 <= momentum < 1", lambda x: 0 <= x < 1),
    "weight_decay": RATE,
    "nesterov": SWITCH,
    "ns_coefficients": (f"one of {list(COEFFICIENTS)}, (a, b, c), or a sequence of them", is_schedule),
    "eps": RATE,
    "ns_steps": ("a whole number above 0", lambda x: type(x) is int and x > 0),
    "adjust_lr_fn": (f"one of {list(ADJUST_LR)}", lambda x: x in ADJUST_LR),
    "cautious": SWITCH,
    "normuon_beta2": ("None or 0 <= beta2 < 1", lambda x: x is None or 0 <= x < 1),
    "split_mantissa": SWITCH,
    "split": ("None, a number of equal blocks, or the rows of each block", is_split),
    "flatten": ("None, True or False", lambda x: x is None or isinstance(x, bool)),
}
OPTIONS = {  # the same for settings of the optimizer; where one changes, all is laid out anew
    "ns_dtype": (f"one of {NS_DTYPES}", lambda x: x in NS_DTYPES),
    "sync_grads": SWITCH,
    "replicate_state": SWITCH,
    "bucket_mb": ("a number above 0", lambda x: 0 < x < math.inf),
    "deterministic": SWITCH,
}
SHAPING = "split", "flatten"  # settings that say what the matrices are


def checked(key: str, value, of: str = ""):
    """Return the value of a setting as it is kept."""
    expected, rule = (RULES | OPTIONS)[key]
    value = plain(value)
    try:
        holds = rule(value)
    except (TypeError, ValueError, LookupError):  # of another kind altogether
        holds = False
    if not holds:
        raise refusal(expected, repr(value), "change it", key + of)
    return value


def names_in(group: dict, number: int) -> list[str]:
    """Return the names of a group's parameters; without names for all of them, their places."""
    known = group.get("param_names") or ()
    places = [f"parameter {i} of group {number}" for i in range(len(group["params"]))]
    return known if len(known) == len(places) else places


def expect_order(ours: Sequence[str], theirs: Sequence[str]) -> None:
    """Raise if a checkpoint has our names in another order. Others may name the same model, wrapped."""
    for name, other in zip(ours, theirs):
        if other != name and other in ours:
            raise refusal(name, f"{other} in its place",
                          "build the optimizer with its parameters in the order of the checkpoint")


def check_parameter(name: str, p: Tensor, group: dict) -> None:
    """Raise where Muon cannot take a parameter, and say why."""
    if isinstance(p, torch.nn.parameter.UninitializedTensorMixin):
        raise refusal("a parameter with a shape", "a lazy one", "run one batch through the model first", name)
    expect_matrices(name, p)
    if p.ndim == 3 and group["flatten"] is None:
        raise refusal("flatten=False for a bank of matrices or flatten=True for a 1-D convolution",
                      f"shape {tuple(p.shape)} without", "say which in its group", name)
    if group["split_mantissa"] and p.dtype != torch.bfloat16:
        raise refusal("torch.bfloat16 for split_mantissa", p.dtype, "turn that off for this group", name)
    rows = as_bank(p, group["flatten"]).size(1)
    split = group["split"]
    if split is not None and (rows % split if isinstance(split, int) else sum(split) != rows):
        raise refusal(f"a split of its {rows} rows", split, "change it for this group", name)


# ----------------------------------------------------------------------------------------------------------
# The optimizer

@functools.cache
def fuse(function: Callable) -> Callable:
    """Compile once per shape. Numbers enter as tensors: else each value would be compiled in."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    fused = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*args):
        return fused(*(torch.tensor(x, dtype=torch.float32) if isinstance(x, float) else x for x in args))
    return call


class Muon(torch.optim.Optimizer):
    """Muon over the ranks of `process_group` (default: all ranks; one process needs no torch.distributed).
    They are replicas, which hold the same weights: pipeline stages or parts of tensors need a group each.

    All settings may change between steps, on all ranks alike.
    Those of a group, of which the first eight are named as in torch.optim.Muon, whose defaults are others (lr
    0.001, weight_decay 0.1, its own coefficients, eps 1e-7):
        lr                a number or a 0-D tensor
        weight_decay, momentum, nesterov
        ns_coefficients   a name in COEFFICIENTS, one (a, b, c), or one per step
        eps               norm below which an update shrinks with its gradient; 0: never
        ns_steps, adjust_lr_fn (see ADJUST_LR), cautious
        normuon_beta2     memory of NorMuon's variance; None: off
        split_mantissa    the owner of a bf16 parameter keeps 16 more bits, so that weights are fp32 in truth;
                          bf16 weights travel, not updates
    Those of a group that say what its matrices are:
        split             a matrix is that many blocks of rows, or blocks of these rows: query, key and
                          value, or heads, each orthogonalized and scaled by itself
        flatten           a 3-D parameter is one matrix (o, i k), as a 1-D convolution; False: a bank
    Of the optimizer:
        ns_dtype          of the iteration; None: bf16 where there are units for it, else fp32 (some CPUs);
                          alike on all ranks. Gradients of low rank (LoRA) lose their digits in bf16: ask for
                          torch.float32. What is gathered is fp32 for fp32, else bf16
        sync_grads        gradients differ per rank and the optimizer averages them, in bf16 for a bucket of
                          bf16 parameters, else in fp32; without it they are equal already, as DDP leaves
                          them, and as clip_grad_norm_ must find them to clip their mean
        replicate_state   all ranks keep all state, not its owner alone: each can save and load by itself
        bucket_mb         fp32 megabytes per rank and bucket, which also bounds the working memory: two
                          exchanges are in flight at most
        deterministic     one matrix per call, so that bits do not depend on the number of ranks or buckets
        compile           fuse the update functions with torch.compile
        symmetric         a kernel like `symmetric_product`

    p.grad is read, never written. optimizer.state holds each momentum_buffer in full shape at one process or
    with replicate_state, else a rank's share of it, see `Bucket.key`."""

    def __init__(
            self, params: Iterable, lr: float | Tensor = 0.02, weight_decay: float = 0.0,
            momentum: float = 0.95, nesterov: bool = True, ns_coefficients: str | Sequence = "polar",
            eps: float = 0.0, ns_steps: int = 5, adjust_lr_fn: str | None = None, *, cautious: bool = False,
            normuon_beta2: float | None = None, split_mantissa: bool = False,
            split: int | Sequence[int] | None = None, flatten: bool | None = None,
            ns_dtype: torch.dtype | None = None, process_group: "dist.ProcessGroup | None" = None,
            sync_grads: bool = False, replicate_state: bool = False, bucket_mb: float = 16,
            deterministic: bool = False, compile: bool = False, symmetric: Callable = symmetric_product):
        if isinstance(params, torch.nn.Module):
            raise refusal("parameters", "a module",
                          "pass model.parameters(), or what split_params(model) proposes", error=TypeError)
        self.ns_dtype = ns_dtype
        self.process_group = process_group
        self.sync_grads = sync_grads
        self.replicate_state = replicate_state
        self.bucket_mb = bucket_mb
        self.deterministic = deterministic
        self.compile = compile
        self.symmetric = symmetric
        if world_and_rank(process_group)[1] < 0:
            raise refusal("a process_group that this rank belongs to", "another",
                          "build the optimizer on the ranks of the group only")
        self._skipped = 0
        self._whole = True  # self.state holds all there is, not this rank's share
        self._reset()
        super().__init__(params, dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
            cautious=cautious, normuon_beta2=normuon_beta2, split_mantissa=split_mantissa, split=split,
            flatten=flatten))
        self._lay_out()

    def _reset(self) -> None:
        """Set up what a copy does not take along."""
        self.buckets = []
        self.placements = []
        self._names = {}    # of parameters
        self._checked = {}  # number of a group -> its settings when they were checked
        self._layout_of = None
        self._unlike = None  # what said, at the last layout, that ranks hold unlike weights

    def __getstate__(self) -> dict:
        self._expect_whole_state()
        left = {"step", "buckets", "placements"}  # a scheduler puts a step of its own into the instance
        kept = {key: value for key, value in vars(self).items()
                if key not in left and not key.startswith("_optimizer_")}
        return kept | {"process_group": getattr(self.process_group, "group_name", None)}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "process_group" not in state:  # a load, not a copy
            return
        if self.process_group is not None:
            self.process_group = dist.distributed_c10d._resolve_process_group(self.process_group)
        self._reset()

    @property
    def skipped(self) -> int:
        """Matrices skipped so far for want of a finite gradient or update, over all steps and ranks (but only
        this rank's own of banks that are sharded by matrices). Reading it waits."""
        return int(self._skipped)

    def add_param_group(self, group: dict) -> None:
        """Add a group. After construction all ranks call it together, as all is placed anew."""
        super().add_param_group(group)
        if self.buckets:
            try:
                self._lay_out()
            except Exception:
                self.param_groups.pop()
                raise

    def _check_settings(self, groups: list[dict]) -> None:
        """Check what has been set since the last step; to see that nothing has takes microseconds."""
        for number, group in enumerate(groups):
            known = self._checked.setdefault(number, {})
            for key in RULES:
                value = group.setdefault(key, self.defaults[key])
                if value is not known.get(key, known):
                    group[key] = known[key] = checked(key, value, f" of group {number}")

    # --- the layout ---

    def _options(self) -> list:
        return [getattr(self, key) for key in OPTIONS]

    def _what_shapes_it(self) -> list:
        """Return what the layout and its checks depend on, to be compared at every step."""
        facts = [world_and_rank(self.process_group), *self._options()]
        for group in self.param_groups:
            params = [(id(p), p.shape, p.dtype, p.device) for p in group["params"]]
            facts.append((id(group), params, [group[key] for key in SHAPING], [*state_kinds(group)]))
        return facts

    def _facts(self, params: Iterable[Tensor]) -> list[str]:
        """Return what ranks that share the work on these parameters must have alike."""
        lines = [f"{key} {value}" for key, value in zip(OPTIONS, self._options())]
        for i, group in enumerate(self.param_groups):
            mine = [f"{name} of shape {tuple(p.shape)} in {p.dtype}"
                    for name, p in zip(names_in(group, i), group["params"]) if p in params]
            if mine:
                lines += [f"{key} {group[key]} of group {i}" for key in RULES]
                lines += mine
        return lines

    def _follow(self, changed: bool) -> None:
        """Lay out anew if parameters, or what they are made of, have changed since the last step. Raise if
        that is so on some ranks only, which would wait for the others. A rank on which nothing has changed
        does not wait for a GPU's answer."""
        params = {p for group in self.param_groups for p in group["params"]}
        device = next((p.device for p in params), None)
        # Once ranks have left the group, each goes on by itself with the whole state.
        shared = [b for b in self.buckets if 1 < b.world_size == world_and_rank(b.group)[0]]
        for group in dict.fromkeys(bucket.group for bucket in shared):
            changes = torch.full((1,), int(changed), device=device)
            dist.all_reduce(changes, group=group)
            if (changed or changes.is_cpu) and 0 < changes < dist.get_world_size(group):
                if changes.is_cpu:
                    expect_agreement(of_all_ranks(self._facts(params), group))
                raise refusal("parameters that change on all ranks or on none", "a change on some only",
                              "change param_groups alike on every rank", error=RuntimeError)
        if changed:
            self._lay_out()

    def _lay_out(self) -> None:
        """Place the units and cut them into buckets. Existing state stays with its parameter."""
        self.consolidate_state_dict()
        self._check_settings(self.param_groups)
        for key, value in zip(OPTIONS, self._options()):
            setattr(self, key, checked(key, value))
        names = {}
        lanes = collections.defaultdict(dict)
        for number, group in enumerate(self.param_groups):
            for name, p in zip(names_in(group, number), group["params"]):
                if p in names:
                    raise refusal("each parameter once", "it twice", "remove it from a group", name)
                check_parameter(name, p, group)
                names[p] = name
                lanes[self._lane(name, p, group)][p] = group
        devices = sorted({str(p.device) for p in names})
        if len(devices) != 1:
            raise refusal("parameters, all on one device", ", ".join(devices) or "none",
                          "pass the hidden matrices, and build one optimizer per device")
        if devices == ["cpu"]:
            raise_mmap_threshold()
        filled = [self._fill_buckets(*lane, members) for lane, members in lanes.items()]
        self.placements = [placement for placement, _ in filled]
        self.buckets = [bucket for _, buckets in filled for bucket in buckets]
        self.buckets.sort(key=lambda bucket: bucket.alone)  # of these, ranks may have unlike numbers
        self._names = names
        self._forget()
        self._layout_of = self._what_shapes_it()
        self._unlike = self._unlike_weights()

    def _unlike_weights(self) -> str | None:
        """Return where ranks that share the work hold other weights. A sum over the bits stands for them."""
        shared = {p: name for p, name in self._names.items() if not (hasattr(p, "device_mesh") or p.is_meta)}
        if not shared or world_and_rank(self.process_group)[0] == 1:
            return None
        sums = [p.detach().contiguous().view(torch.int16).sum(dtype=torch.int64) for p in shared]
        found = of_all_ranks(torch.stack(sums).tolist(), self.process_group)
        unlike = ((name, rank) for k, name in enumerate(shared.values())
                  for rank, theirs in enumerate(found) if theirs[k] != found[0][k])
        return next((f"others in {name} on rank {rank}" for name, rank in unlike), None)

    def _expect_like_weights(self) -> None:
        """Raise where ranks still hold unlike weights: DDP may have made them alike since the layout."""
        self._unlike = self._unlike and self._unlike_weights()
        if self._unlike:
            raise refusal("the same weights on all ranks", self._unlike,
                          "copy those of one rank to the others, or pass a process_group of ranks that hold "
                          "the same", error=RuntimeError)

    def _lane(self, name: str, p: Tensor, group: dict) -> tuple[type[Bucket], object, tuple]:
        """Return (kind of bucket, its process group, all process groups whose ranks compute alike)."""
        if hasattr(p, "device_mesh"):
            raise refusal("a plain tensor", "a DTensor", "use FsdpMuon of muon_extras/fsdp.py", name,
                          TypeError)
        return Bucket, self.process_group, (self.process_group,)

    def _agreed_dtype(self, process_groups: tuple, params: dict[Tensor, dict]) -> torch.dtype:
        """Return the dtype of the iteration: fp32 where processors differ. Raises where facts differ."""
        dtypes = {self.ns_dtype or iteration_dtype(next(iter(params)).device)}
        for group in process_groups:
            found = of_all_ranks((dtypes, self._facts(params)), group)
            expect_agreement([facts for _, facts in found])
            dtypes = set().union(*(theirs for theirs, _ in found))
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _fill_buckets(self, kind: type[Bucket], process_group, everyone: tuple,
                      members: dict[Tensor, dict]) -> tuple[Placement, list[Bucket]]:
        """Place what the parameters of a lane, {parameter: its group}, are made of."""
        dtype = self._agreed_dtype(everyone, members)
        world_size, rank = (1, 0) if kind.alone else world_and_rank(process_group)
        cap = max(1, int(self.bucket_mb * 1e6 / 4))
        matrices = []  # the stack of each
        for p, group in members.items():
            for stack in stacks_of(p, kind.local(p).shape, group):
                matrices += [stack] * len(stack)
        costs = [stack.flops(dtype) for stack in matrices]
        sizes = [stack.m * stack.n for stack in matrices]
        placement = place_units(costs, sizes, world_size, cap)
        together = (lambda stack: False) if self.deterministic else kind.stackable
        given = collections.Counter()
        buckets = []
        for ranks in placement.buckets:
            stacks = [runs([matrices[u] for u in units], given, together) for units in ranks]
            buckets.append(kind(self, process_group, rank, stacks, dtype))
        return placement, buckets

    def call(self, function: Callable, *args):
        """Call a function of tensors, fused if compile says so."""
        return (fuse(function) if self.compile else function)(*args)

    def rates(self, stack: Stack) -> tuple:
        """Return the last arguments of `decay_and_step`."""
        group = stack.group
        scale = ADJUST_LR[group["adjust_lr_fn"]](stack.m, stack.n)
        return group["lr"] * scale, group["lr"] * group["weight_decay"], group["cautious"]

    # --- state: self.state holds it, whole or this rank's share ---

    def _shared(self) -> Iterable[tuple[Bucket, Stack, bool]]:
        """Yield (bucket, stack, whether it is mine) of all whose owner alone keeps its state."""
        for bucket in self.buckets:
            for owner, stacks in enumerate(bucket.stacks if bucket.divided else ()):
                for stack in stacks:
                    yield bucket, stack, owner == bucket.rank

    def _keep_my_share(self) -> None:
        """Let go of the state of units that others own, which a load or a consolidation has left here."""
        if not self._whole:
            return
        shares = collections.defaultdict(dict)
        for bucket, stack, mine in self._shared():
            share = shares[stack.param]  # on every rank, or it would seem a fresh optimizer
            whole = self.state[stack.param]
            for name in state_kinds(stack.group):
                if mine and name in whole:
                    share[bucket.key(stack, name)] = stack.of_state(name, whole[name]).clone()
        self.state.update(shares)
        self._whole = not shares

    def consolidate_state_dict(self) -> None:
        """Bring all state to all ranks, in full shape, until the next step. All ranks call it."""
        if self._whole:
            return
        found = collections.defaultdict(dict)
        for bucket, stack, mine in self._shared():
            whole = found[stack.param]
            for name, dtype in state_kinds(stack.group).items():
                if name not in whole:
                    whole[name] = torch.zeros(stack.whole_shape(name), dtype=dtype, device=bucket.device)
            for name, x in bucket.state(stack).items() if mine else ():
                stack.of_state(name, whole[name]).copy_(x)
        for x in [x for whole in found.values() for x in whole.values()]:
            # As bytes, to which all but the owner add 0: no backend sends int16.
            dist.all_reduce(x.view(torch.uint8), group=self.process_group)
        self.state.update(found)
        self._whole = True

    def _forget(self) -> None:
        """Drop the state of parameters that have left, of those whose shape it no longer fits, and of kinds
        that are no longer asked for: it would be out of date when they are asked for again."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p in self.state.keys() - groups.keys():
            del self.state[p]
        for p, state in self.state.items() if self._whole else ():
            try:
                self._check_state(p, state, groups[p])
            except ValueError as error:
                warnings.warn(f"{error}; it starts at zero")
                state.clear()
            kinds = state_kinds(groups[p]).keys()
            for name in state.keys() & (KINDS.keys() - kinds):
                del state[name]
            for name in state.keys() & kinds:
                state[name] = state[name].to(p.device)

    def _check_state(self, p: Tensor, state: dict, group: dict, kinds: Iterable[str] = ()) -> None:
        """Raise if the state of a parameter has another shape than it needs, or lacks one of `kinds`."""
        for name in state_kinds(group):
            if name in state or name in kinds:
                expected = stacks_of(p, p.shape, group)[0].whole_shape(name)
                found = tuple(state[name].shape) if isinstance(state.get(name), Tensor) else "none"
                if found != expected:
                    raise refusal(f"a {name} of shape {expected}", found,
                                  "load the whole state of this model, see consolidate_state_dict()",
                                  self._names.get(p, ""))

    def _expect_whole_state(self) -> None:
        if not self._whole:
            raise refusal("the state of all ranks", "this rank's share only",
                          "call consolidate_state_dict() on every rank after the last step, and then "
                          "state_dict(), or build the optimizer with replicate_state=True",
                          error=RuntimeError)

    def state_dict(self) -> dict:
        """Return torch's layout at any number of ranks, all in full shape; state of DTensors is DTensors."""
        self._forget()
        found = super().state_dict()
        self._expect_whole_state()  # now, as its pre-hooks may have consolidated it
        return found

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the whole state, on every rank, from state_dict() at any number of ranks or from
        torch.optim.Muon. Hooks run as torch runs them; its own method would round fp32 state to the dtype of
        the parameter. A load that is refused changes nothing."""
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._check_settings(self.param_groups)
        saved = state_dict["state"]
        groups = copy.deepcopy(state_dict["param_groups"])
        expected = [len(group["params"]) for group in self.param_groups]
        found = [len(group["params"]) for group in groups]
        if found != expected:
            raise refusal(f"groups of {expected} parameters", found, "load a checkpoint of this model")
        for number, (ours, group) in enumerate(zip(self.param_groups, groups)):
            expect_order(names_in(ours, number), group.get("param_names") or ())
            groups[number] = ours | group | {key: ours[key] for key in SHAPING}
        self._check_settings(groups)
        kinds = {"momentum_buffer"}.union(*saved.values())
        kept = {}
        for ours, group in zip(self.param_groups, groups):
            for p, i in zip(ours["params"], group["params"]):
                name = self._names.get(p, "")
                check_parameter(name, p, group)
                state = saved.get(i)
                if state:
                    self._check_state(p, state, group, kinds)
                    kept[p] = state | {kind: self._adopt(kind, state[kind], dtype, p, group)
                                       for kind, dtype in state_kinds(group).items() if kind in state}
                elif saved:  # torch saves nothing of a parameter that never had a gradient
                    warnings.warn(f"Muon: {name} has no state in the checkpoint; it starts at zero")
        for ours, group in zip(self.param_groups, groups):
            ours.update(group, params=ours["params"])
        self.state = collections.defaultdict(dict, kept)
        self._whole = True
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _adopt(self, name: str, value: Tensor, dtype: torch.dtype, p: Tensor, group: dict) -> Tensor:
        """Return a copy of saved state as a parameter keeps it."""
        return value.to(p.device, dtype, copy=True).contiguous()

    # --- the step ---

    @torch.no_grad()
    def start(self) -> None:
        """Begin to average the first gradients, with sync_grads, and return at once. step() calls it too."""
        self._check_settings(self.param_groups)
        changed = self._what_shapes_it() != self._layout_of
        if all(bucket.pending is None for bucket in self.buckets):
            self._follow(changed)
            self._expect_like_weights()
        elif changed:
            raise refusal("the parameters that start() found", "others",
                          "change them before start() or after step()", error=RuntimeError)
        self._keep_my_share()
        for bucket in self.buckets[:2] if self.sync_grads else ():
            bucket.start()

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Move the weights once. closure: computes gradients, and the loss that is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self.start()
            sent = None  # the bucket whose results are on their way: two exchanges fly at most
            for bucket, following in zip_longest(self.buckets, self.buckets[1:]):
                bucket.start()
                gradients = bucket.receive()        # 1: receive my gradients,
                if following:
                    following.start()               # 2: start the next bucket,
                results = bucket.update(gradients)  # 3: update what I own,
                if sent:
                    self._skipped += sent.apply()   # 4: apply what has arrived,
                bucket.send(results)                # 5: send mine
                sent = bucket
                if bucket.world_size == 1:          # nothing to wait for, or to hold
                    self._skipped += bucket.apply()
                    sent = None
            if sent:
                self._skipped += sent.apply()
        finally:
            for bucket in self.buckets:  # after an error nothing of this step may enter the next
                bucket.pending = bucket.sent = None
        return loss
