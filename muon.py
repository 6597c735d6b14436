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
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def refusal(expected: str, found, remedy: str, where: str = "", error: type = ValueError) -> Exception:
    """The sentence that an error says, to be raised by the caller."""
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
FORMS = "auto", "standard", "gram"
LARGE = 384  # rows from which a matrix is worth a method of its own on a CPU


def is_triple(x) -> bool:
    return len(x) == 3 and all(isinstance(number, (int, float)) and math.isfinite(number) for number in x)


def is_schedule(x) -> bool:
    """Whether x is a name, one (a, b, c) for all steps, or a sequence of them."""
    if isinstance(x, str):
        return x in COEFFICIENTS
    return len(x) > 0 and (all(map(is_triple, x)) if isinstance(x[0], Sequence) else is_triple(x))


def schedule(ns_coefficients: str | Sequence, steps: int) -> tuple[float, list[Sequence[float]]]:
    """Return (safety, one (a, b, c) per step)."""
    safety = 1.0
    triples = ns_coefficients
    if isinstance(ns_coefficients, str):
        safety, triples = COEFFICIENTS[ns_coefficients]
    elif not isinstance(ns_coefficients[0], Sequence):
        triples = (ns_coefficients,)
    return safety, [triples[min(i, len(triples) - 1)] for i in range(steps)]


def has_bf16_units() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware: Intel AMX, AVX-512 BF16."""
    names = "_is_amx_tile_supported", "_is_avx512_bf16_supported"  # private in torch, and younger than 2.0
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Return the default dtype of the iteration."""
    return torch.float32 if device.type == "cpu" and not has_bf16_units() else torch.bfloat16


def gram_pays(m: int, n: int, form: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to iterate on the Gram matrix. On a CPU core it is 1.55 times as fast in fp32 at an aspect of 4
    and 1.1 times at 2, in bf16 1.3 and 1.1 times. In bf16 the result is then off by 1 to 4 % instead of 1 to
    2 %, where the polynomial itself leaves singular values 3 to 30 % off 1, and by more for small matrices,
    whose values start large; it is not measured on other devices. `auto` leaves out both."""
    if form != "auto":
        return form == "gram"
    fine = dtype != torch.bfloat16 or device.type == "cpu" and min(m, n) >= LARGE
    return fine and max(m, n) >= 2 * min(m, n)


def gram_segments(triples: Sequence, dtype: torch.dtype) -> list[Sequence]:
    """Cut the steps into those that share one Gram matrix. Computing it anew restores its small eigenvalues,
    whose relative error the steep first steps would carry on: bf16 affords two steps, other dtypes three
    after the first two."""
    later = 2 if dtype == torch.bfloat16 else 3
    return [triples[:2], *(triples[i:i + later] for i in range(2, len(triples), later))]


def newton_schulz_flops(m: int, n: int, steps: int, gram: bool, dtype: torch.dtype) -> int:
    """Count the operations of the matrix products of one m x n matrix, 2 for a multiply-add."""
    s = min(m, n)
    l = max(m, n)
    if not gram:
        return steps * (4 * s * s * l + 2 * s**3)
    lengths = map(len, gram_segments(range(steps), dtype))
    return sum(4 * s * s * l + 2 * s**3 * (4 * length - 3) for length in lengths)


# A CPU multiplies large matrices fastest one at a time. For fp32 torch calls MKL, which on an AMD processor
# (Zen 5) reaches 105 GFLOP/s per core where oneDNN reaches 240; torch has both, and its compiler calls oneDNN
# by this name.
ONEDNN = None
if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512":
    ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
BLOCK_ROWS = 256  # of a symmetric product of large matrices: fewer save more, but call more often; see
                  # bench/muon/blocks.py


def one_by_one(X: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the wide matrices of a stack are iterated one at a time, by the products below, as measured on
    one and two cores: it pays for what is large, and in fp32 where oneDNN is there and a call is worth
    its 10 us."""
    dtype = dtype or X.dtype
    if type(X) is not Tensor or X.device.type != "cpu" or X.requires_grad or torch.compiler.is_compiling():
        return False
    if dtype in (torch.float32, torch.bfloat16) and X.size(-2) >= LARGE:
        return True
    return dtype == torch.float32 and ONEDNN is not None and X[0].numel() >= 2**16


def product(A: Tensor, W: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Return alpha A W^T + beta C of matrices on a CPU. W lies in memory without gaps: else oneDNN takes a
    second."""
    if ONEDNN is not None and A.dtype == torch.float32:
        D = ONEDNN(A, W, None, "none", [], "")
        return D if C is None else D.mul_(alpha).add_(C, alpha=beta)
    return A @ W.mT if C is None else torch.addmm(C, A, W.mT, alpha=alpha, beta=beta)


def symmetric_product(A: Tensor, B: Tensor, C: Tensor | None = None, alpha: float = 1.0,
                      beta: float = 1.0) -> Tensor:
    """Return alpha A B + beta C of stacks whose result is symmetric: a kernel with this signature needs to
    compute only half. This one does so for what is large on a CPU: blocks of rows up to the diagonal."""
    if len(A) > 1 or not one_by_one(A):
        return A @ B if C is None else torch.baddbmm(C, A, B, beta=beta, alpha=alpha)
    s = A.size(1)
    rows = BLOCK_ROWS if s >= LARGE else s
    W = B[0].mT.contiguous() if A.dtype == torch.float32 else B[0].mT
    out = A.new_empty(1, s, s)
    for i in range(0, s, rows):
        j = i + rows
        above = None if C is None else C[0, i:j, :j]
        out[0, i:j, :j] = product(A[0, i:j], W[:j], above, alpha, beta)
        out[0, :i, i:j] = out[0, i:j, :i].mT
    return out


def apply_to(X: Tensor, P: Tensor, a: float = 0.0) -> Tensor:
    """Return P X + a X of stacks."""
    if len(X) == 1 and one_by_one(X):
        return product(P[0], X[0].mT, X[0] if a else None, 1.0, a)[None]
    return torch.baddbmm(X, P, X, beta=a) if a else P @ X


def standard_steps(X: Tensor, triples: Sequence, symmetric: Callable) -> Tensor:
    for a, b, c in triples:
        A = symmetric(X, X.mT)
        X = apply_to(X, symmetric(A, A, A, alpha=c, beta=b), a)
    return X


def gram_steps(X: Tensor, triples: Sequence, symmetric: Callable) -> Tensor:
    """The same map through R = X X^T. One step multiplies X by a I + P, where P = b R + c R^2, and R by its
    square; all of these are polynomials in R and commute. The products of the steps are kept as q I + Q,
    because in 16 bits the sum would lose the digits of Q."""
    for segment in gram_segments(triples, X.dtype):
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
        X = apply_to(X, Q, q)
    return X


def largest(G: Tensor) -> Tensor:
    """Return (..., 1, 1): the largest absolute entry of every matrix, NaN if any is; unlike G.abs(), without
    a copy of G. Reducing one flat dimension is 100 times as fast on a CPU as reducing two."""
    flat = G.flatten(-2)
    return torch.maximum(flat.amax(-1), -flat.amin(-1))[..., None, None]


def may_read(x: Tensor) -> bool:
    """Whether Python may look at values of x: on a CPU, where it costs no wait, and outside of graphs."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def plain_norms(G: Tensor) -> Tensor | None:
    """Return (B, 1, 1): the Frobenius norms of a stack on a CPU; None unless all are of a size at which fp32
    sums their squares without loss, so that no matrix is zero or not finite."""
    if not may_read(G) or G.requires_grad:
        return None
    norms = G.norm(dim=(-2, -1), keepdim=True)
    return norms if bool(((norms > 1e-15) & (norms < 1e15)).all()) else None


def normalize(G: Tensor, dtype: torch.dtype, safety: float, eps: float) -> Tensor:
    """Return the wide stack G with Frobenius norms 1 / safety, in dtype. Dividing by the largest entry first
    keeps the squares in range: for entries from 1e-30 to 1e30 in fp32, and from 1e-300 to 1e300 in fp64."""
    norms = plain_norms(G) if dtype == torch.bfloat16 and G.dtype == torch.float32 else None
    if norms is not None:  # one pass over few bytes; bf16 has the range of fp32
        X = G.to(dtype)
        for x, norm in zip(X, norms.view(-1)):
            x.mul_(1 / (norm.clamp(min=eps) * safety))
        return X
    X = G.to(torch.promote_types(torch.promote_types(G.dtype, dtype), torch.float32))
    X = X.contiguous() if one_by_one(X, dtype) else X
    tiny = torch.finfo(X.dtype).tiny
    top = largest(X).clamp(min=tiny)
    X = X / top
    norm = torch.maximum(X.norm(dim=(-2, -1), keepdim=True), eps / top).clamp(min=tiny) * safety
    return (X / norm if X.requires_grad else X.div_(norm)).to(dtype)


def orthogonalize(G: Tensor, steps: int = 5, ns_coefficients: str | Sequence = "polar",
                  dtype: torch.dtype | None = None, form: str = "auto",
                  symmetric: Callable = symmetric_product, eps: float = 0.0) -> Tensor:
    """Approximate U V^T of the SVD U S V^T of every (m, n) matrix of G: (..., m, n), which is not modified.
    ns_coefficients: a name in COEFFICIENTS, one (a, b, c), or a sequence of them. dtype: of the iteration and
    the result, default `iteration_dtype`. form: see `gram_pays`. symmetric: see `symmetric_product`. Only the
    direction of G counts, unless its norm is below eps. Zero in, zero out. In bf16 a matrix of low rank keeps
    two digits: its null space comes out with singular values up to 0.4 instead of 0; ask for torch.float32
    where that matters (LoRA)."""
    if G.ndim < 2 or G.numel() == 0 or not G.is_floating_point():
        raise refusal("real matrices of some size", f"{tuple(G.shape)} in {G.dtype}",
                      "leave it to another optimizer")
    if not (is_schedule(ns_coefficients) and form in FORMS and steps > 0):
        raise refusal("known coefficients, one of auto, standard and gram, and a step or more",
                      f"{ns_coefficients}, {form} and {steps}", "see the docstring")
    dtype = dtype or iteration_dtype(G.device)
    if G.size(-2) > G.size(-1):  # R = X X^T is smallest on the short side
        return orthogonalize(G.mT, steps, ns_coefficients, dtype, form, symmetric, eps).mT
    safety, triples = schedule(ns_coefficients, steps)
    X = normalize(G.reshape(-1, *G.shape[-2:]), dtype, safety, eps)
    iterate = gram_steps if gram_pays(*X.shape[-2:], form, dtype, X.device) else standard_steps
    if not one_by_one(X):
        return iterate(X, triples, symmetric).reshape(G.shape)
    results = [iterate(x, triples, symmetric)[0] for x in X.split(1)]
    return (results[0] if len(X) == 1 else torch.stack(results)).reshape(G.shape)


# ----------------------------------------------------------------------------------------------------------
# The update of one stack of B matrices: functions of tensors alone, so that torch.compile can fuse each of
# them

ADJUST_LR = {  # the factor on lr for an m x n matrix; weight decay never sees it
    None: lambda m, n: math.sqrt(max(1, m / n)),                 # as in torch: original
    "original": lambda m, n: math.sqrt(max(1, m / n)),           # Keller Jordan; torch calls it the same
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # Moonlight: the root mean square is 0.2
    "spectral": lambda m, n: math.sqrt(m / n),                   # unclamped: below 1 for wide matrices
    "identity": lambda m, n: 1.0,
}


def momentum_update(M: Tensor, G: Tensor, mu, nesterov: bool) -> tuple[Tensor, Tensor]:
    """Return (U, which of the B gradients are finite). M (B, m, n) fp32 moves in place where they are; G is
    read only. U is zero where G is zero throughout."""
    if G.dtype != torch.float16 and plain_norms(G) is not None:  # spares three passes
        G = G.float()
        M.lerp_(G, 1 - mu)
        return (G.lerp(M, mu) if nesterov else M), torch.ones(len(G), dtype=torch.bool)
    size = largest(G).float()  # fp64 may be finite there only
    ok = torch.isfinite(size)
    G = torch.where(ok, G.float(), M)  # blending M with M leaves M as it is
    M.lerp_(G, 1 - mu)
    U = G.lerp(M, mu) if nesterov else M
    return torch.where(size > 0, U, 0.0), ok.view(-1)


def finite_only(O: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
    """Return O with zeros where the iteration has overflowed, and ok without these."""
    finite = torch.linalg.vector_norm(O.flatten(1), dim=1).isfinite()
    if may_read(O) and bool(finite.all()):
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
    """W <- W - decay W - lr O in place; bf16 is rounded once, at the end. A matrix that is not ok keeps its
    bits. W, O: (B, ...); ok: (B,) bool, or 0 and 1 as they come off the wire; decay is a fraction, already
    times lr."""
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
    return ((upper.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def upper_half(master: Tensor, low: Tensor) -> Tensor:
    """Return the upper halves of fp32 numbers as bf16, truncated, and write the lower ones to the int16
    `low`."""
    bits = master.view(torch.int32)
    low.copy_(bits.to(torch.int16))
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------
# Who owns what: every matrix, or block of rows of a matrix, is a unit that belongs to one rank

class Unit(NamedTuple):
    param: Tensor
    group: int   # index into param_groups
    matrix: int  # of the bank
    row: int     # first row in it
    mark: int    # first of its numbers in a row of second_moment
    m: int
    n: int


def as_bank(x: Tensor, flatten: bool | None) -> Tensor:
    """Return (matrices, rows, columns ...) of a tensor that is shaped like a parameter."""
    return x if x.ndim == 3 and not flatten else x[None]


def units_of(p: Tensor, held: Tensor, number: int, group: dict) -> list[Unit]:
    """Return the units of a parameter p of group `number`, or of the part `held` of it that a rank has."""
    matrices, rows, *columns = as_bank(held, group["flatten"]).shape
    n = math.prod(columns)
    blocks = group["split"] or (rows,)
    if isinstance(blocks, int):
        blocks = (rows // blocks,) * blocks
    units = []
    for k in range(matrices):
        row = mark = 0
        for m in blocks:
            units.append(Unit(p, number, k, row, mark, m, n))
            row += m
            mark += max(m, n)
    return units


def state_kinds(group: dict) -> dict[str, torch.dtype]:
    """Return the state that a group's settings ask for."""
    kinds = {"momentum_buffer": torch.float32}
    if group["normuon_beta2"] is not None:
        kinds["second_moment"] = torch.float32
    if group["split_mantissa"]:
        kinds["mantissa"] = torch.int16
    return kinds


def state_shape(name: str, p: Tensor, group: dict) -> tuple[int, ...]:
    """Return the shape of a parameter's whole state: that of the parameter, but (matrices, numbers) for
    second_moment."""
    if name != "second_moment":
        return tuple(p.shape)
    last = units_of(p, p, 0, group)[-1]
    return last.matrix + 1, last.mark + max(last.m, last.n)


@dataclass(frozen=True)
class Placement:
    buckets: list[list[list[int]]]  # bucket -> rank -> units it owns
    loads: list[int]                # Newton-Schulz FLOPs per rank and step

    @property
    def efficiency(self) -> float:
        """Mean load over the busiest rank's: 1 is perfect balance."""
        return sum(self.loads) / (len(self.loads) * max(self.loads)) if any(self.loads) else 1.0


def place_units(costs: Sequence[int], sizes: Sequence[int], world_size: int, cap: int) -> Placement:
    """Place units, the costliest (FLOPs) first, each on the least loaded rank (longest processing time
    first), and improve that by swaps. A rank's bucket closes at `cap` elements (sizes); the cheapest units
    come last, because no computation hides the last gather. Depends on its arguments only, so that all ranks
    place alike."""
    def dearest_first(u: int) -> tuple[int, int]:
        return -costs[u], u

    mine = [[] for _ in range(world_size)]
    loads = [0] * world_size
    held = [0] * world_size
    for u in sorted(range(len(costs)), key=dearest_first):
        rank = min(range(world_size), key=lambda r: (loads[r], held[r]))
        mine[rank].append(u)
        loads[rank] += costs[u]
        held[rank] += sizes[u]
    while swap_one(costs, mine, loads):
        pass
    buckets = []
    for rank, units in enumerate(mine):
        number = -1
        fill = cap
        for u in sorted(units, key=dearest_first):
            if fill >= cap:
                number = number + 1
                fill = 0
            if number == len(buckets):
                buckets.append([[] for _ in mine])
            buckets[number][rank].append(u)
            fill += sizes[u]
    return Placement([[sorted(units) for units in bucket] for bucket in buckets], loads)


def swap_one(costs: Sequence[int], mine: list[list[int]], loads: list[int]) -> bool:
    """Let the busiest rank hand a unit over, or swap it for another's, as lowers the larger of both loads
    most. Returns whether that lowered the load of the busiest rank; else nothing has changed."""
    busiest = max(range(len(mine)), key=lambda r: (loads[r], -r))
    kinds = [{costs[u]: u for u in units} for units in mine]  # units of one cost are alike here
    swaps = [(max(loads[busiest] - a + b, loads[rank] + a - b), rank, a, b)
             for rank in range(len(mine)) if loads[rank] < loads[busiest]
             for a in kinds[busiest] for b in (0, *kinds[rank])]
    top, rank, a, b = min(swaps, default=(loads[busiest], busiest, 0, 0))
    if top >= loads[busiest]:
        return False
    moves = [(kinds[busiest][a], busiest, rank)] + ([(kinds[rank][b], rank, busiest)] if b else [])
    for u, source, target in moves:
        mine[source].remove(u)
        mine[target].append(u)
        loads[source] -= costs[u]
        loads[target] += costs[u]
    return True


@dataclass(eq=False)
class Stack:
    """`count` units of one owner and parameter at equal distances, (B, m, n): matrices of a bank `step`
    apart, or (step 0) blocks of rows of one matrix that follow each other."""
    unit: Unit
    flatten: bool | None
    count: int = 1
    step: int = 1

    def takes(self, unit: Unit) -> bool:
        """Add the unit if it continues this stack."""
        first = self.unit
        step = unit.matrix - first.matrix if self.count == 1 else self.step
        if step:
            following = first._replace(matrix=first.matrix + self.count * step)
        else:
            following = first._replace(row=first.row + self.count * first.m, mark=unit.mark)
        if unit.param is not first.param or unit[1:] != following[1:]:
            return False
        self.count = self.count + 1
        self.step = step
        return True

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.count, self.unit.m, self.unit.n

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, bank: Tensor, row: int, rows: int) -> Tensor:
        """Return (B, rows, ...) of (matrices, all rows, ...), from this row on in each unit."""
        k = self.unit.matrix
        if self.step == 0:
            return bank[k, row:row + self.count * rows].unflatten(0, (self.count, rows))
        return bank[k:k + (self.count - 1) * self.step + 1:self.step, row:row + rows]

    def of(self, x: Tensor) -> Tensor:
        """Return the view (B, m, ...) of these matrices in a tensor that is shaped like the parameter."""
        return self.view(as_bank(x, self.flatten), self.unit.row, self.unit.m)

    def state_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if name != "second_moment" else (self.count, max(self.shape[1:]))

    def state_of(self, name: str, x: Tensor) -> Tensor:
        """Return the view (B, m, n), or (B, numbers) for second_moment, in the whole state of a parameter."""
        numbers = max(self.shape[1:])
        found = self.of(x) if name != "second_moment" else self.view(x, self.unit.mark, numbers)
        return found.view(self.state_shape(name))


def views(flat: Tensor, stacks: list[Stack]) -> list[Tensor]:
    """Return the views (B, m, n) of stacks whose values follow each other at the start of a flat buffer."""
    sizes = [stack.numel for stack in stacks]
    return [x.view(stack.shape) for stack, x in zip(stacks, flat[:sum(sizes)].split(sizes))]


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


def sum_to_owners(packed: Tensor, everywhere: bool, group) -> Flight:
    """Sum (ranks, elements) over ranks; each receives its own row or, with `everywhere`, all of them."""
    if everywhere:
        return Flight(dist.all_reduce(packed, group=group, async_op=True), packed, None)
    mine = torch.empty_like(packed[0])
    return Flight(reduce_scatter_flat(mine, packed.view(-1), group=group, async_op=True), mine, packed)


def share_with_all(mine: Tensor, world_size: int, group) -> Flight:
    """Give every rank the rows (ranks, elements) of which each has one."""
    gathered = mine.new_empty((world_size, len(mine)))
    return Flight(all_gather_flat(gathered.view(-1), mine, group=group, async_op=True), gathered, mine)


def world_and_rank(group) -> tuple[int, int]:
    """Return the number of ranks of a process group and the place of this one; a process by itself is the
    only rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def of_all_ranks(fact, group) -> list:
    """Return what each rank says."""
    found = [fact] * world_and_rank(group)[0]
    if len(found) > 1:
        dist.all_gather_object(found, fact, group=group)
    return found


def expect_agreement(group, facts: list[str]) -> None:
    """Ranks that disagree would hang or mix up their matrices: raise on all, naming the first difference."""
    found = of_all_ranks(facts, group)
    for rank, theirs in enumerate(found):
        for a, b in zip_longest(found[0], theirs, fillvalue="nothing"):
            if a != b:
                raise refusal("the same parameters and settings on all ranks",
                              f"{a} on rank 0 and {b} on rank {rank}",
                              "build the optimizer alike on every rank")


class Bucket:
    """Units that travel together, per rank of a process group, and their way through one step: `start` asks
    for what other ranks hold of their gradients, `receive` waits for it, `update` computes, `send` shares the
    results, `apply` waits for those of others and changes the weights.

    A rank computes the updates of its own units. Momentum, and what else is kept, moves on the owner alone,
    which then sends what is final; with replicate_state it moves on all ranks, from the same numbers."""
    alone = False  # True: every rank computes by itself what it holds
    part = staticmethod(lambda p: p)  # the tensor whose matrices are the units of p

    def __init__(self, optimizer: "Muon", group, rank: int, units: list[list[Unit]], dtype: torch.dtype):
        self.optimizer = optimizer
        self.group = group
        self.rank = rank
        self.world_size = len(units)
        self.dtype = dtype  # of the iteration
        self.wire = dtype if dtype == torch.float32 else torch.bfloat16  # of updates as ranks receive them
        self.pending = self.received = self.sent = None
        self.stacks = [self.stack_up(mine) for mine in units]
        params = [unit.param for mine in units for unit in mine]
        self.num_units = len(params)
        self.num_elements = max(sum(stack.numel for stack in stacks) for stacks in self.stacks)
        self.device = params[0].device
        self.grad_dtype = torch.bfloat16 if {p.dtype for p in params} == {torch.bfloat16} else torch.float32

    def stack_up(self, units: list[Unit]) -> list[Stack]:
        stacks = []
        for unit in units:
            if not (stacks and self.merges(unit) and stacks[-1].takes(unit)):
                stacks.append(Stack(unit, self.optimizer._groups[unit.group]["flatten"]))
        return stacks

    def merges(self, unit: Unit) -> bool:
        """Whether the unit may be computed in one stack with others."""
        return not self.optimizer.deterministic

    @property
    def divided(self) -> bool:
        """Whether owners alone keep the state."""
        return self.world_size > 1 and not self.optimizer.replicate_state

    def settings(self, stack: Stack) -> dict:
        return self.optimizer._groups[stack.unit.group]

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.wire, device=self.device)

    def state_key(self, stack: Stack, name: str) -> str | tuple[str, int, int]:
        """Return where optimizer.state[p] holds this state: the whole under its name, the share of an owner
        of some units under (name, matrix, row)."""
        if not self.divided or stack.numel == stack.unit.param.numel():
            return name
        return name, stack.unit.matrix, stack.unit.row

    def state(self, stack: Stack) -> dict[str, Tensor]:
        """Return (B, m, n), or (B, numbers) for second_moment, of the kinds of state that the group of a
        stack asks for, each zero at first use."""
        p = stack.unit.param
        state = self.optimizer.state[p]
        found = {}
        for name, dtype in state_kinds(self.settings(stack)).items():
            key = self.state_key(stack, name)
            if key not in state:
                shape = state_shape(name, p, self.settings(stack)) if key == name else stack.state_shape(name)
                state[key] = torch.zeros(shape, dtype=dtype, device=p.device)
            found[name] = stack.state_of(name, state[key]) if key == name else state[key]
        return found

    def gradient(self, stack: Stack) -> Tensor | None:
        """Return (B, m, n), often p.grad itself, or None."""
        grad = stack.unit.param.grad
        if grad is None:
            return None
        if grad.layout != torch.strided:
            raise refusal("a dense gradient", grad.layout, "make the layer with sparse=False",
                          self.optimizer._names[stack.unit.param], RuntimeError)
        return stack.of(grad).reshape(stack.shape)

    def weights(self, stack: Stack) -> Tensor:
        return stack.of(local(stack.unit.param))

    def start(self) -> None:
        """With sync_grads: launch the sum of the gradients over ranks; each owner receives its own part."""
        if self.world_size == 1 or not self.optimizer.sync_grads or self.pending is not None:
            return
        packed = self.new(self.world_size, self.num_elements, dtype=self.grad_dtype)
        for part, stacks in zip(packed, self.stacks):
            for stack, slot in zip(stacks, views(part, stacks)):
                grad = self.gradient(stack)  # where one is missing, the mean is NaN and the owner skips it
                slot.fill_(math.nan) if grad is None else slot.copy_(grad)
        self.pending = sum_to_owners(packed, self.optimizer.replicate_state, self.group)

    def receive(self) -> None:
        """Wait for what `start` launched, if it did, and let go of what it sent."""
        if self.pending is not None:
            flight = self.pending
            self.pending = None
            self.received = flight.wait()

    def gradients(self, owner: int) -> list[Tensor | None]:
        """Return (B, m, n) of each stack of a rank, averaged over ranks with sync_grads."""
        stacks = self.stacks[owner]
        if self.received is None:
            return [self.gradient(stack) for stack in stacks]
        total = self.received if self.divided else self.received[owner]
        return views(total.float().div_(self.world_size), stacks)

    def update(self) -> dict[Stack, tuple[Tensor, Tensor]]:
        """Return {stack: (what travels (B, m, n), ok (B,))} for all I own."""
        entries = []
        results = {}
        for owner in [self.rank] if self.divided else range(self.world_size):
            for stack, G in zip(self.stacks[owner], self.gradients(owner)):
                mine = owner == self.rank
                if G is not None:
                    U, ok = self.move_momentum(stack, G)
                    entries += [(stack, U, ok)] if mine else []
                elif mine:
                    ok = torch.zeros(stack.count, dtype=torch.bool, device=self.device)
                    results[stack] = torch.zeros(stack.shape, dtype=self.wire, device=self.device), ok
        self.received = None
        results |= self.orthogonalize(entries)
        return self.settled(results) if self.divided else results

    def move_momentum(self, stack: Stack, G: Tensor) -> tuple[Tensor, Tensor]:
        group = self.settings(stack)
        M = self.state(stack)["momentum_buffer"]
        return self.optimizer._momentum_update(M, G, group["momentum"], group["nesterov"])

    def orthogonalize(self, entries: list[tuple]) -> dict[Stack, tuple[Tensor, Tensor]]:
        """Return {stack: (O (B, m, n), rounded as it travels; ok)} from (stack, U, ok): one iteration for all
        matrices of a kind, the tall ones lying on their side, unless they are faster one by one."""
        kinds = {}
        results = {}
        for stack, U, ok in entries:
            group = self.settings(stack)
            U = U if U.size(1) <= U.size(2) else U.mT
            apart = self.optimizer.deterministic or one_by_one(U, self.dtype)
            how = group["ns_steps"], group["ns_coefficients"], self.dtype, group["ns_form"]
            kind = how, group["eps"], U.shape[1:], stack if apart else None
            kinds.setdefault(kind, []).append((stack, U, ok))
        for (how, eps, *_), members in kinds.items():
            stacks, Us, oks = zip(*members)
            U = Us[0] if len(Us) == 1 else torch.cat(Us)
            found = self.optimizer._orthogonalize(U, *how, self.optimizer.symmetric, eps)
            for stack, O, ok in zip(stacks, found.split([stack.count for stack in stacks]), oks):
                O, ok = self.optimizer._finite_only(O, ok)
                O = O if O.shape == stack.shape else O.mT.contiguous()
                results[stack] = O.to(self.wire), ok
        return results

    def settled(self, results: dict[Stack, tuple[Tensor, Tensor]]) -> dict[Stack, tuple[Tensor, Tensor]]:
        """Move what is kept beside momentum. Returns the results with NorMuon's variance taken out and, with
        split_mantissa, with the upper halves of the new weights in place of the updates."""
        found = {}
        for stack, (O, ok) in results.items():
            O = self.normalized(stack, O, ok.bool())
            if self.settings(stack)["split_mantissa"]:
                W = self.weights(stack).reshape(stack.shape)
                low = self.state(stack)["mantissa"]
                O = self.optimizer._step_master(W, low, O, ok, *self.optimizer.rates(stack.unit))
            found[stack] = O, ok
        return found

    def normalized(self, stack: Stack, O: Tensor, ok: Tensor) -> Tensor:
        beta2 = self.settings(stack)["normuon_beta2"]
        if beta2 is None:
            return O
        V = self.state(stack)["second_moment"]
        return self.optimizer._normalize_variance(O, V, ok, beta2).to(self.wire)

    def send(self, results: dict[Stack, tuple[Tensor, Tensor]]) -> None:
        """Launch the exchange of the results."""
        if self.world_size == 1:
            self.sent = results
            return
        stacks = self.stacks[self.rank]
        flags = max(sum(stack.count for stack in stacks) for stacks in self.stacks)
        mine = self.new(self.num_elements + flags)
        for stack, slot in zip(stacks, views(mine, stacks)):
            slot.copy_(results[stack][0])
        for stack, slot in zip(stacks, self.flags(mine, stacks)):
            slot.copy_(results[stack][1])
        self.sent = share_with_all(mine, self.world_size, self.group)

    def flags(self, part: Tensor, stacks: list[Stack]) -> list[Tensor]:
        """Return ok (B,) of each stack, which follow all values."""
        counts = [stack.count for stack in stacks]
        return list(part[self.num_elements:self.num_elements + sum(counts)].split(counts))

    def arrived(self) -> dict[Stack, tuple[Tensor, Tensor]]:
        """Wait for the results of all ranks."""
        sent = self.sent
        self.sent = None
        if self.world_size == 1:
            return sent
        results = {}
        for part, stacks in zip(sent.wait(), self.stacks):
            results |= zip(stacks, zip(views(part, stacks), self.flags(part, stacks)))
        return results

    def apply(self) -> Tensor:
        """Change the weights, on every rank with the same numbers. Returns how many units were skipped."""
        results = self.arrived() if self.divided else self.settled(self.arrived())
        for stack, (value, ok) in results.items():
            W = self.weights(stack)
            value = value.reshape(W.shape)
            if self.settings(stack)["split_mantissa"]:
                W.copy_(value)
            else:
                self.optimizer._decay_and_step(W, value, ok, *self.optimizer.rates(stack.unit))
        return self.num_units - torch.cat([ok for _, ok in results.values()]).sum(dtype=torch.int64)

    def fetch_state(self, stack: Stack, owner: int) -> dict[str, Tensor]:
        """Return the owner's state of a stack; a collective."""
        found = {}
        for name, dtype in state_kinds(self.settings(stack)).items():
            part = self.new(*stack.state_shape(name), dtype=dtype)
            if owner == self.rank:
                part.copy_(self.state(stack)[name])
            # As bytes: no backend sends int16.
            dist.broadcast(part.view(torch.uint8), group_src=owner, group=self.group)
            found[name] = part
        return found


# ----------------------------------------------------------------------------------------------------------
# The optimizer

def local(x: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor; anything else as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def plain(x):
    """Return numpy's numbers as Python's and lists as tuples, so that settings compare and are saved; tensors
    stay."""
    if isinstance(x, Sequence) and not isinstance(x, str):
        return tuple(map(plain, x))
    return plain(x.tolist()) if hasattr(x, "tolist") and not isinstance(x, Tensor) else x


def is_split(x) -> bool:
    rows = x if isinstance(x, tuple) and len(x) else (x,)
    return x is None or all(type(m) is int and m > 0 for m in rows)


def is_rate(x) -> bool:
    if isinstance(x, Tensor):  # on a GPU its value stays there: reading it would make the host wait
        return x.numel() == 1 and (not x.is_cpu or 0 <= float(x) < math.inf)
    return isinstance(x, (int, float)) and 0 <= x < math.inf


def is_switch(x) -> bool:
    return isinstance(x, bool)


RULES = {  # setting of a group -> (what is expected, test)
    "lr": ("one number, 0 or more", is_rate),
    "momentum": ("0 <= momentum < 1", lambda x: 0 <= x < 1),
    "weight_decay": ("0 or more", is_rate),
    "nesterov": ("True or False", is_switch),
    "ns_coefficients": (f"one of {list(COEFFICIENTS)}, (a, b, c), or a sequence of them", is_schedule),
    "eps": ("0 or more", is_rate),
    "ns_steps": ("a whole number above 0", lambda x: type(x) is int and x > 0),
    "adjust_lr_fn": (f"one of {list(ADJUST_LR)}", lambda x: x in ADJUST_LR),
    "cautious": ("True or False", is_switch),
    "normuon_beta2": ("None or 0 <= beta2 < 1", lambda x: x is None or 0 <= x < 1),
    "split_mantissa": ("True or False", is_switch),
    "split": ("None, a number of equal blocks, or the rows of each block", is_split),
    "flatten": ("None, True or False", lambda x: x is None or is_switch(x)),
    "ns_form": (f"one of {FORMS}", lambda x: x in FORMS),
}
SHAPING = "split", "flatten", "ns_form"  # settings that say what the matrices are, or what they cost


def checked(key: str, value, number: int):
    """Return the value of a setting of group `number` as it is kept."""
    expected, rule = RULES[key]
    value = plain(value)
    try:
        holds = rule(value)
    except (TypeError, ValueError):  # of another kind altogether
        holds = False
    if not holds:
        raise refusal(expected, repr(value), "change it", f"{key} of group {number}")
    return value


def check_parameter(name: str, p: Tensor, group: dict) -> None:
    """Say what Muon cannot take, and why."""
    if not isinstance(p, Tensor):
        raise refusal("tensors", type(p).__name__, "pass model.parameters()", name, TypeError)
    if isinstance(p, torch.nn.parameter.UninitializedTensorMixin):
        raise refusal("a parameter with a shape", "a lazy one", "run one batch through the model first", name)
    shape = f"shape {tuple(p.shape)}"
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise refusal("a real floating-point parameter", p.dtype, "leave it to another one", name)
    if p.ndim < 2:
        raise refusal("a matrix, a bank or a convolution", shape, "give it to AdamW", name)
    if p.numel() == 0:
        raise refusal("at least one element", shape, "leave it out", name)
    if p.ndim == 3 and group["flatten"] is None:
        raise refusal("flatten=False for a bank of matrices or flatten=True for a 1-D convolution",
                      f"{shape} without", "say which in its group", name)
    if group["split_mantissa"] and p.dtype != torch.bfloat16:
        raise refusal("torch.bfloat16 for split_mantissa", p.dtype, "turn that off for this group", name)
    rows = as_bank(p, group["flatten"]).size(1)
    split = group["split"]
    if split is not None and (rows % split if isinstance(split, int) else sum(split) != rows):
        raise refusal(f"a split of its {rows} rows", split, "change it for this group", name)


def fuse(function: Callable) -> Callable:
    """Compile once per shape. Numbers enter as tensors: a number would be compiled in, anew for every
    value."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    fused = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*args):
        return fused(*(torch.tensor(x, dtype=torch.float32) if isinstance(x, float) else x for x in args))
    return call


FUSED = momentum_update, orthogonalize, finite_only, normalize_variance, decay_and_step, step_master


class Muon(torch.optim.Optimizer):
    """Muon over the ranks of `process_group` (default: all ranks; one process needs no torch.distributed).

    Settings of a group, which may change between steps; the first eight are named as in torch.optim.Muon:
        lr                a number or a 0-D tensor
        weight_decay, momentum, nesterov
        ns_coefficients   a name in COEFFICIENTS, one (a, b, c), or one per step
        eps               norm below which an update shrinks with its gradient; 0: never
        ns_steps, adjust_lr_fn (see ADJUST_LR), cautious
        normuon_beta2     memory of NorMuon's variance; None: off
        split_mantissa    the owner of a bf16 parameter keeps 16 more bits, so that weights are fp32 in truth;
                          bf16 weights travel, not updates
    Settings of a group that say what its matrices are:
        split             a matrix is that many blocks of rows, or blocks of these rows: query, key and
                          value, or heads, each orthogonalized and scaled by itself
        flatten           a 3-D parameter is one matrix (o, i k), as a 1-D convolution; False: a bank
        ns_form           see `gram_pays`
    Of the optimizer:
        ns_dtype          of the iteration; None: bf16 where there are units for it, else fp32 (some CPUs);
                          alike on all ranks. Gradients of low rank (LoRA) lose their digits in bf16: ask for
                          torch.float32. What is gathered is fp32 for fp32, else bf16
        sync_grads        gradients differ per rank and the optimizer averages them, in bf16 for a bucket of
                          bf16 parameters, else in fp32; without it they are equal already, as DDP leaves them
        replicate_state   all ranks keep all state, not its owner alone: each can save and load by itself
        bucket_mb         fp32 megabytes per rank and bucket, which also bounds the working memory: two
                          exchanges are in flight at most
        deterministic     one matrix per call, so that bits do not depend on the number of ranks or buckets
        compile           fuse the update functions with torch.compile
        symmetric         a kernel like `symmetric_product`

    p.grad is read, never written. optimizer.state holds each momentum_buffer in full shape at one process or
    with replicate_state, else a rank's share of it, see `Bucket.state_key`."""

    def __init__(
            self, params: Iterable, lr: float | Tensor = 0.02, weight_decay: float = 0.0,
            momentum: float = 0.95, nesterov: bool = True, ns_coefficients: str | Sequence = "polar",
            eps: float = 0.0, ns_steps: int = 5, adjust_lr_fn: str | None = None, *, cautious: bool = False,
            normuon_beta2: float | None = None, split_mantissa: bool = False,
            split: int | Sequence[int] | None = None, flatten: bool | None = None,
            ns_form: str = "auto", ns_dtype: torch.dtype | None = None, process_group=None,
            sync_grads: bool = False, replicate_state: bool = False, bucket_mb: float = 16,
            deterministic: bool = False, compile: bool = False, symmetric: Callable = symmetric_product):
        if isinstance(params, torch.nn.Module):
            raise refusal("parameters", "a module",
                          "pass model.parameters(), or what split_params(model) proposes", error=TypeError)
        if ns_dtype not in (None, torch.bfloat16, torch.float16, torch.float32) or not bucket_mb > 0:
            raise refusal("ns_dtype None, torch.bfloat16, torch.float16 or torch.float32 and bucket_mb "
                          "above 0", f"{ns_dtype} and {bucket_mb}", "leave both out for the defaults")
        self.ns_dtype = ns_dtype
        self.process_group = process_group
        self.sync_grads = sync_grads
        self.replicate_state = replicate_state
        self.bucket_mb = bucket_mb
        self.deterministic = deterministic
        self.compile = compile
        self.symmetric = symmetric
        self.world_size, self.rank = world_and_rank(process_group)
        if self.rank < 0:
            raise refusal("a process_group that this rank belongs to", "another",
                          "build the optimizer on the ranks of the group only")
        self._skipped = 0
        self._whole = True  # self.state holds all there is, not this rank's share
        self._reset()
        super().__init__(params, dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
            cautious=cautious, normuon_beta2=normuon_beta2, split_mantissa=split_mantissa, split=split,
            flatten=flatten, ns_form=ns_form))
        self._lay_out()

    def _reset(self) -> None:
        """Set up what a copy does not take along."""
        self.buckets = []
        self.placements = []
        self._groups = []  # param_groups as the units number them
        self._names = {}
        self._checked = []  # per group, its settings when they were checked
        self._layout_of = None
        self._started = False
        for function in FUSED:
            setattr(self, f"_{function.__name__}", fuse(function) if self.compile else function)

    def __getstate__(self) -> dict:
        self._expect_whole_state()
        left = {"step", "buckets", "placements"}  # a scheduler puts a step of its own into the instance
        left |= {f"_{function.__name__}" for function in FUSED}
        kept = {key: value for key, value in vars(self).items()
                if key not in left and not key.startswith("_optimizer_")}
        return kept | {"process_group": getattr(self.process_group, "group_name", None)}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "process_group" not in state:  # a load, not a copy
            return
        name = self.process_group
        if name is not None:
            try:
                self.process_group = dist.distributed_c10d._resolve_process_group(name)
            except (RuntimeError, AttributeError, KeyError):
                raise refusal("the process group of the copied optimizer", f"none of its name, {name}",
                              "make the group first, or copy an optimizer without one",
                              error=RuntimeError) from None
        self._reset()

    @property
    def skipped(self) -> int:
        """Units skipped so far for want of a finite gradient or update, over all steps and ranks (but only
        this rank's own units of banks that are sharded by matrices). Reading it waits."""
        return int(self._skipped)

    # --- settings and parameters, and changes of them ---

    def add_param_group(self, group: dict) -> None:
        """Check and add a group. After construction all ranks call it together, as every unit is placed
        anew."""
        if isinstance(group["params"], set):
            raise refusal("parameters in an order", "a set", "pass a list", error=TypeError)
        unknown = sorted(key for key in group if key in ("coefficients", "adjust_lr"))
        if unknown:
            raise refusal("ns_coefficients and adjust_lr_fn", unknown, "use torch's names", error=TypeError)
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        number = len(self.param_groups)
        group = {**self.defaults, **group, "params": given}
        group |= {key: checked(key, group[key], number) for key in RULES}
        self._check_parameters([*self.param_groups, group])
        super().add_param_group(group)
        try:
            if self.buckets:
                self._lay_out()
        except Exception:
            self.param_groups.pop()
            raise

    def _check_parameters(self, groups: list[dict]) -> dict[Tensor, str]:
        """Return the name of every parameter."""
        names = {}
        for number, group in enumerate(groups):
            known = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = known[i] if known else f"parameter {i} of group {number}"
                name, p = p if isinstance(p, tuple) else (name, p)
                check_parameter(name, p, group)
                self._check_kind(name, p)
                if p in names:
                    raise refusal("each parameter once", "it again", "remove it here or there", name)
                names[p] = name
        return names

    def _check_kind(self, name: str, p: Tensor) -> None:
        if hasattr(p, "device_mesh"):
            raise refusal("a plain tensor", "a DTensor", "use FsdpMuon of muon_extras/fsdp.py", name,
                          TypeError)

    def _check_settings(self) -> None:
        """Check what was set since the last step; to see that nothing was takes microseconds."""
        self._checked += [{} for _ in self.param_groups[len(self._checked):]]
        for number, group in enumerate(self.param_groups):
            known = self._checked[number]
            for key in RULES:
                if group.get(key) is not known.get(key, known):
                    group[key] = known[key] = checked(key, group.get(key, self.defaults[key]), number)

    def _facts(self, params: Iterable[Tensor]) -> list[str]:
        """Return what ranks that share the work on these parameters must have alike."""
        lines = [f"{key} {getattr(self, key)}" for key in
                 ("ns_dtype", "sync_grads", "replicate_state", "bucket_mb", "deterministic")]
        for i, group in enumerate(self.param_groups):
            unnamed = [f"parameter {k} of group {i}" for k in range(len(group["params"]))]
            known = group.get("param_names") or unnamed
            mine = [f"{name} of shape {tuple(p.shape)} in {p.dtype}"
                    for name, p in zip(known, group["params"]) if p in params]
            lines += [*(f"{key} {group[key]} of group {i}" for key in RULES), *mine] if mine else []
        return lines

    def _check_world(self) -> None:
        found, _ = world_and_rank(self.process_group)
        if found != self.world_size and any(type(bucket) is Bucket for bucket in self.buckets):
            raise refusal(f"a world of {self.world_size} as at construction", found, "call torch.distributed."
                          "init_process_group first and build the optimizer after it")

    # --- the layout ---

    def _what_shapes_it(self) -> list:
        """Return what the layout depends on, to be compared at every step."""
        return [([(id(p), p.shape, p.dtype, p.device) for p in group["params"]],
                 [group[key] for key in SHAPING]) for group in self.param_groups]

    def _follow(self) -> None:
        """Lay out anew if parameters or what shapes their matrices has changed since the last step."""
        self._check_settings()
        self._check_world()
        changed = self._what_shapes_it() != self._layout_of
        for group, device in {b.group: b.device for b in self.buckets if b.world_size > 1}.items():
            self._agree_on_change(changed, group, device)
        if changed:
            self._lay_out()
        self._groups = list(self.param_groups)

    def _agree_on_change(self, changed: bool, group, device: torch.device) -> None:
        """Raise where some ranks lay out anew and others do not: they would wait for each other. A rank whose
        own parameters are as before does not wait for a GPU's answer."""
        any_or_none = torch.zeros(2, dtype=torch.int32, device=device)
        any_or_none[0 if changed else 1].fill_(1)  # on the device: a copy would make the host wait
        dist.all_reduce(any_or_none, op=dist.ReduceOp.MAX, group=group)
        if (changed or device.type == "cpu") and bool(any_or_none.all()):
            if device.type == "cpu":
                expect_agreement(group, self._facts({p for g in self.param_groups for p in g["params"]}))
            raise refusal("parameters that change on all ranks or on none", "a change on some only",
                          "change param_groups alike on every rank", error=RuntimeError)

    def _lay_out(self) -> None:
        """Place the units and cut them into buckets. What state there is stays with its parameter."""
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)
        names = self._check_parameters(self.param_groups)
        devices = sorted({p.device for p in names}, key=str)
        if not devices:
            raise refusal("parameters", "none", "pass the hidden matrices")
        if len(devices) > 1:
            raise refusal("all parameters on one device", devices, "build one optimizer per device")
        lanes = {}
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                lanes.setdefault(self._lane(p, group), []).append((p, i))
        for (_, process_group), members in lanes.items():
            expect_agreement(process_group, self._facts({p for p, _ in members}))
        self._make_whole()
        self.buckets = []
        self.placements = []
        self._groups = list(self.param_groups)
        self._names = names
        for lane, members in lanes.items():
            self._fill_buckets(*lane, members)
        self.buckets.sort(key=lambda bucket: bucket.alone)  # of these, ranks may have unlike numbers
        self._forget()
        self._checked = [{key: group[key] for key in RULES} for group in self.param_groups]
        self._layout_of = self._what_shapes_it()

    def _lane(self, p: Tensor, group: dict) -> tuple[type[Bucket], object]:
        """Return (kind of bucket, process group) for a parameter."""
        return Bucket, self.process_group

    def _fill_buckets(self, kind: type[Bucket], process_group, members: list) -> None:
        dtype = self._agreed_dtype(process_group, members[0][0])
        world_size, rank = (1, 0) if kind.alone else world_and_rank(process_group)
        units = [unit for p, i in members for unit in units_of(p, kind.part(p), i, self._groups[i])]
        sizes = [unit.m * unit.n for unit in units]
        costs = [self.cost(unit, dtype) for unit in units]
        placement = place_units(costs, sizes, world_size, cap=max(1, int(self.bucket_mb * 1e6 / 4)))
        self.placements.append(placement)
        for bucket in placement.buckets:
            mine = [[units[u] for u in ids] for ids in bucket]
            self.buckets.append(kind(self, process_group, rank, mine, dtype))

    def _agreed_dtype(self, process_group, p: Tensor) -> torch.dtype:
        """Return the dtype of the iteration: the default of all ranks, or fp32 where processors differ."""
        if self.ns_dtype is not None:
            return self.ns_dtype
        mine = iteration_dtype(p.device)
        names = {str(mine)}
        for group in self._who_must_agree(process_group, p) if p.device.type == "cpu" else ():
            names = set().union(*of_all_ranks(names, group))
        return mine if len(names) == 1 else torch.float32

    def _who_must_agree(self, process_group, p: Tensor) -> list:
        return [process_group]

    def cost(self, unit: Unit, dtype: torch.dtype) -> int:
        group = self._groups[unit.group]
        gram = gram_pays(unit.m, unit.n, group["ns_form"], dtype, unit.param.device)
        return newton_schulz_flops(unit.m, unit.n, group["ns_steps"], gram, dtype)

    def rates(self, unit: Unit) -> tuple:
        """Return the last arguments of `decay_and_step`."""
        group = self._groups[unit.group]
        scale = ADJUST_LR[group["adjust_lr_fn"]](unit.m, unit.n)
        return group["lr"] * scale, group["lr"] * group["weight_decay"], group["cautious"]

    # --- state: self.state holds it, whole or this rank's share ---

    def _shared_stacks(self) -> list[tuple[Bucket, int, Stack]]:
        """Return (bucket, owner, stack) of all whose owner alone keeps the state."""
        return [(bucket, owner, stack) for bucket in self.buckets if bucket.divided
                for owner, stacks in enumerate(bucket.stacks) for stack in stacks]

    def _keep_my_share(self) -> None:
        """Let go of the state of units that others own, which a load or a consolidation has left here."""
        mine = {}
        for bucket, owner, stack in self._shared_stacks() if self._whole else ():
            share = mine.setdefault(stack.unit.param, {})  # on every rank, or it would seem a fresh optimizer
            state = self.state[stack.unit.param]
            known = state.keys() & state_kinds(bucket.settings(stack)).keys()
            for name in known if owner == bucket.rank else ():
                key = bucket.state_key(stack, name)
                share[key] = state[name] if key == name else stack.state_of(name, state[name]).clone()
        self.state.update(mine)
        self._whole = self._whole and not mine

    @torch.no_grad()
    def _make_whole(self, to: int | None = None) -> None:
        """Gather the state of all owners in full shape per parameter, on rank `to` or (None) on all."""
        self._keep_my_share()
        wanted = to in (None, self.rank)
        found = {}
        for bucket, owner, stack in self._shared_stacks():
            p = stack.unit.param
            parts = bucket.fetch_state(stack, owner)
            for name, part in parts.items() if wanted else ():
                whole = found.setdefault(p, {})
                if name not in whole:
                    whole[name] = part.new_empty(state_shape(name, p, bucket.settings(stack)))
                stack.state_of(name, whole[name]).copy_(part)
        self.state.update(found)
        self._whole = self._whole or wanted

    def _forget(self) -> None:
        """Drop the state of parameters that have left, and what no longer fits one."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p in [p for p in self.state if p not in groups]:
            del self.state[p]
        for p, state in self.state.items() if self._whole else ():
            for name in state.keys() & state_kinds(groups[p]).keys():
                found = tuple(state[name].shape)
                if found != state_shape(name, p, groups[p]):
                    warnings.warn(f"Muon: {self._names.get(p)}: its {name} of shape {found} no longer fits "
                                  f"shape {tuple(p.shape)}; it starts at zero")
                    del state[name]
                elif state[name].device != p.device:
                    state[name] = state[name].to(p.device)

    def _expect_whole_state(self) -> None:
        if not self._whole:
            raise refusal("the state of all ranks", "this rank's share only",
                          "call consolidate_state_dict() on every rank after the last step, and then "
                          "state_dict()", error=RuntimeError)

    def consolidate_state_dict(self, to: int | None = None) -> None:
        """Bring the state of all owners to all ranks, or to rank `to`, until the next step. All ranks call
        it."""
        self._check_world()
        self._make_whole(to)

    def state_dict(self) -> dict:
        """Return torch's layout at any number of ranks: {parameter number: {"momentum_buffer": fp32 in full
        shape}}. The state of DTensor parameters is DTensors."""
        self._expect_whole_state()
        self._forget()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the whole, on every rank, from state_dict() at any number of ranks or from torch.optim.Muon.
        Hooks run as torch runs them; torch itself would round fp32 state to the dtype of its parameter, so it
        loads no state."""
        loaded = {}

        def take_state(_, hooked: dict) -> dict:
            groups = self._merged_groups(hooked["param_groups"])
            loaded.update(self._checked_state(hooked["state"], hooked["param_groups"], groups))
            return {**hooked, "state": {}, "param_groups": groups}

        def put_state(_) -> None:
            self.state.update(loaded)
            self._whole = True
            self._groups = list(self.param_groups)
        handles = [self.register_load_state_dict_pre_hook(take_state),
                   self.register_load_state_dict_post_hook(put_state, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _merged_groups(self, saved: list[dict]) -> list[dict]:
        """Return saved groups with what they lack, and with what shapes the state, from ours."""
        expected = [len(group["params"]) for group in self.param_groups]
        found = [len(group["params"]) for group in saved]
        if found != expected:
            raise refusal(f"groups of {expected} parameters", found, "load a checkpoint of this model")
        groups = []
        for number, (theirs, ours) in enumerate(zip(saved, self.param_groups)):
            known = {key: ours.get(key, default) for key, default in self.defaults.items()}
            groups.append(known | theirs | {key: known[key] for key in SHAPING})
            groups[-1] |= {key: checked(key, groups[-1][key], number) for key in RULES}
            names = ours.get("param_names") or ()
            for name, other in zip(names, theirs.get("param_names") or ()):
                if other != name and other in names:  # other names may be the same model, wrapped
                    raise refusal(name, f"{other} in its place",
                                  "build the optimizer with its parameters in the order of the checkpoint",
                                  f"group {number}")
        return groups

    def _checked_state(self, state: dict, saved: list[dict], groups: list[dict]) -> dict[Tensor, dict]:
        """Return the state of each parameter as it is kept."""
        found = {}
        kinds = set().union(*state.values())
        for theirs, ours, group in zip(saved, self.param_groups, groups):
            for i, p in zip(theirs["params"], ours["params"]):
                given = dict(state.get(i, {}))
                for name, dtype in state_kinds(group).items():
                    if name in kinds and name not in given:
                        raise refusal(f"a {name}", "none, though others have one",
                                      "save the state of all ranks, see consolidate_state_dict()",
                                      self._names[p])
                    if name in given:
                        found_shape = tuple(getattr(given[name], "shape", ()))
                        expected = state_shape(name, p, group)
                        if found_shape != expected:
                            raise refusal(f"a {name} of shape {expected}", found_shape,
                                          "load a checkpoint of this model", self._names[p])
                        given[name] = self._adopt(name, given[name], dtype, p, group)
                if given:
                    found[p] = given
        return found

    def _adopt(self, name: str, value: Tensor, dtype: torch.dtype, p: Tensor, group: dict) -> Tensor:
        """Return a copy of saved state as a parameter keeps it."""
        return whole(value).to(p.device, dtype, copy=True).contiguous()

    # --- the step ---

    @torch.no_grad()
    def start(self) -> None:
        """With sync_grads: begin to average the gradients of the first two buckets and return at once. step()
        calls it if nobody has."""
        if not self._started:
            self._follow()
            self._keep_my_share()
            self._started = True
        for bucket in self.buckets[:2] if self.sync_grads else ():
            bucket.start()

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Move the weights once. closure: computes gradients, and the loss that is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sent = deque()
        try:
            self.start()
            self._check_settings()  # they may have changed since an early start
            for i, bucket in enumerate(self.buckets):
                bucket.start()
                bucket.receive()                             # 1: receive my gradients,
                for following in self.buckets[i + 1:i + 2]:
                    following.start()                        # 2: start the next bucket,
                results = bucket.update()                    # 3: update what I own,
                while sent and self._flying() + len(sent) >= 2:
                    self._skipped += sent.popleft().apply()  # 4: apply what has arrived,
                bucket.send(results)                         # 5: send mine; two exchanges fly at most
                sent.append(bucket)
                while len(sent) >= min(2, bucket.world_size):
                    self._skipped += sent.popleft().apply()
            while sent:
                self._skipped += sent.popleft().apply()
        finally:
            self._started = False
            for bucket in self.buckets:  # after an error nothing of this step may enter the next
                bucket.pending = bucket.received = bucket.sent = None
        return loss

    def _flying(self) -> int:
        return sum(bucket.pending is not None for bucket in self.buckets)


def whole(x: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, a collective; anything else as it is. No backend sends int16."""
    if not hasattr(x, "full_tensor"):
        return x
    return x.int().full_tensor().short() if x.dtype == torch.int16 else x.full_tensor()
