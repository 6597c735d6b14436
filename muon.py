"""Muon for one process or many: momentum, then the nearest semi-orthogonal matrix, with the work shared over ranks.

For every weight matrix W with gradient G, at learning rate lr, weight decay wd and momentum mu:

    M <- mu M + (1 - mu) G                        momentum, fp32
    U  = (1 - mu) G + mu M                        Nesterov look-ahead (or U = M)
    O  = orthogonalize(U)                         all singular values near 1, by Newton-Schulz
    O <- O / sqrt(V), rescaled to its old norm    only with normuon_beta2; V: running mean square per row or column
    W <- W - lr wd W                              decoupled decay (cautious: only entries where O W >= 0)
    W <- W - lr scale O                           scale: see ADJUST_LR

Legend: a matrix is m x n as stored; B matrices make a stack (B, m, n). A 2-D parameter is one matrix, a 3-D parameter
(k, m, n) a bank of k matrices, a convolution (o, i, h, w) the matrix (o, i h w); `split` cuts a matrix into blocks of
rows. Every matrix or block is a *unit* that belongs to one rank. The owner alone keeps its momentum and orthogonalizes
it; every rank receives the rounded result and applies it. Units are placed by FLOPs and travel in *buckets*: one is
gathered while the next is computed. A unit whose gradient is missing or not finite is skipped by all ranks alike: a
flag travels beside the data, no host waits. DTensor parameters (FSDP2) need muon_fsdp.py beside this file.

Use it for the hidden matrices of a network. Embeddings, the output head, gains and biases belong to AdamW;
muon_tools.py proposes which is which.

Sources: Muon, https://kellerjordan.github.io/posts/muon/; decay and RMS matching, arXiv 2502.16982 (Moonlight);
default coefficients, arXiv 2505.16932 (Polar Express); variance normalization, arXiv 2510.05491 (NorMuon); cautious
decay, arXiv 2510.12402; iteration on the Gram matrix, https://github.com/Dao-AILab/gram-newton-schulz.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------------
# Newton-Schulz

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
    """(..., 1, 1): the largest absolute entry of every matrix, NaN if any is; unlike G.abs(), without a copy of G."""
    return torch.maximum(G.amax((-2, -1), keepdim=True), -G.amin((-2, -1), keepdim=True))


def iteration_dtype(device: torch.device, form: str = "auto") -> torch.dtype:
    """fp32 on a CPU, where bf16 is four times slower; bf16 elsewhere, but fp16 for the Gram form, which needs its digits."""
    return torch.float32 if device.type == "cpu" else torch.float16 if form == "gram" else torch.bfloat16


def gram_pays(m: int, n: int, form: str, dtype: torch.dtype) -> bool:
    """Whether to iterate on the Gram matrix. On two CPU cores it is 1.5 times as fast at an aspect of 4, 1.15 times at 2,
    and even at 1.5; `auto` leaves out bf16, in which a I + b R + c R^2 would lose R."""
    return form == "gram" or (form == "auto" and max(m, n) >= 2 * min(m, n) and dtype != torch.bfloat16)


def newton_schulz_flops(m: int, n: int, steps: int, gram: bool) -> int:
    """Of the matrix products, 2 for a multiply-add; s and l are the short and the long side."""
    s, l, restarts = min(m, n), max(m, n), -(-(steps - 2) // 3) if steps > 2 else 0
    if gram:
        return 4 * s * s * l * (1 + restarts) + 2 * s**3 * (4 * steps - 3 * (1 + restarts))
    return steps * (4 * s * s * l + 2 * s**3)


def symmetric_product(A: Tensor, B: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha A B + beta C of stacks whose result is symmetric: a kernel with this signature needs to compute only half."""
    return A @ B if C is None else torch.baddbmm(C, A, B, beta=beta, alpha=alpha)


def standard_steps(X: Tensor, triples: Sequence, symmetric) -> Tensor:
    for a, b, c in triples:
        A = symmetric(X, X.mT)
        X = torch.baddbmm(X, symmetric(A, A, A, alpha=c, beta=b), X, beta=a)
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
        X = Q @ X
    return X


def orthogonalize(G: Tensor, steps: int = 5, coefficients: str | Sequence = "polar", dtype: torch.dtype | None = None,
                  form: str = "auto", symmetric=symmetric_product) -> Tensor:
    """Approximate U V^T of the SVD U S V^T of every (m, n) matrix of G: (..., m, n), which is not modified.
    coefficients: a name in COEFFICIENTS or a sequence of (a, b, c). dtype: of the iteration and the result, default
    `iteration_dtype`. form: see `gram_pays`. symmetric: see `symmetric_product`. Only the direction of G counts: dividing
    by the largest entry first keeps the squares in range for entries from 1e-30 to 1e30. Zero in, zero out."""
    if G.size(-2) > G.size(-1):
        return orthogonalize(G.mT, steps, coefficients, dtype, form, symmetric).mT  # R is smallest on the short side
    dtype = dtype or iteration_dtype(G.device, form)
    expect(form != "gram" or dtype != torch.bfloat16, "expected fp16, fp32 or fp64 for the Gram form", dtype, "name one")
    safety, triples = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else (1.0, coefficients)
    triples = [triples[min(i, len(triples) - 1)] for i in range(steps)]
    tiny = torch.finfo(torch.float32).tiny
    X = G.reshape(-1, *G.shape[-2:]).float()
    X = X / largest(X).clamp(min=tiny)
    X = X.div_(X.norm(dim=(-2, -1), keepdim=True).clamp(min=tiny) * safety).to(dtype)
    iterate = gram_steps if gram_pays(*X.shape[-2:], form, dtype) else standard_steps
    return iterate(X, triples, symmetric).reshape(G.shape)


# ----------------------------------------------------------------------------------------------------------------------
# The update of one stack of B matrices: functions of tensors alone, so that torch.compile can fuse each of them

ADJUST_LR = {  # the factor on lr for an m x n matrix; weight decay never sees it
    "original": lambda m, n: math.sqrt(max(1, m / n)),           # Keller Jordan; torch calls it the same
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # Moonlight: the update's root mean square is 0.2
    "spectral": lambda m, n: math.sqrt(m / n),                   # unclamped: below 1 for wide matrices
    None: lambda m, n: 1.0,
}


def momentum_update(M: Tensor, G: Tensor, mu, nesterov: bool) -> tuple[Tensor, Tensor]:
    """(U, which of the B gradients are finite). M (B, m, n) fp32 moves in place where they are; G is read only."""
    ok = torch.isfinite(largest(G))
    G = torch.where(ok, G.float(), M)  # blending M with M leaves M as it is
    M.lerp_(G, 1 - mu)
    return (G.lerp(M, mu) if nesterov else M), ok.view(-1)


def normalize_variance(O: Tensor, V: Tensor, ok: Tensor, beta2) -> Tensor:
    """NorMuon: divide each row (m >= n) or column (m < n) of O by its running root mean square, and keep O's norm.
    V is (B, m) or (B, n) fp32 and moves in place where ok. It starts at 0 without bias correction: the rescaling
    cancels any common factor."""
    O, dim = O.float(), -1 if O.size(-2) >= O.size(-1) else -2
    V = V.unsqueeze(dim)
    square = O.square().mean(dim, keepdim=True)
    V.lerp_(torch.where(ok[:, None, None], square, V), 1 - beta2)
    inverse = V.clamp(min=1e-10).rsqrt()
    before = square.sum((-2, -1), keepdim=True).sqrt()  # both norms lack the same factor sqrt(O.size(dim))
    after = (square * inverse.square()).sum((-2, -1), keepdim=True).sqrt()
    return O * (inverse * (before / after.clamp(min=1e-10)))


def decay_and_step(W: Tensor, O: Tensor, ok: Tensor, lr, decay, cautious: bool) -> None:
    """W <- W - decay W - lr O in place; bf16 is rounded once, at the end. A matrix that is not ok keeps its bits.
    W, O: (B, ...); ok: (B,) bool, or 0 and 1 as they come off the wire; decay is a fraction, already times lr."""
    X = W if W.dtype.itemsize >= 4 else W.float()
    O, ok = O.to(X.dtype), ok.to(X.dtype).view(-1, *[1] * (W.ndim - 1))
    keep = 1 - decay * ok
    if cautious:
        keep = (O * X).ge_(0).mul_(-decay * ok).add_(1)  # a mask of 0.0 and 1.0: on a CPU three times faster than where
    X.mul_(keep).addcmul_(O, -lr * ok)
    if X is not W:
        W.copy_(X)


def step_master(W: Tensor, low: Tensor, O: Tensor, ok: Tensor, lr, decay, cautious: bool) -> Tensor:
    """`decay_and_step` on fp32 master weights: the bf16 W holds their upper 16 bits, the int16 `low` the lower ones.
    Returns the new upper halves as bf16, truncated; W is not modified, `low` is."""
    master = ((W.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)
    decay_and_step(master, O, ok, lr, decay, cautious)
    bits = master.view(torch.int32)
    low.copy_(bits.to(torch.int16))
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------------------
# Who computes what

@dataclass(frozen=True)
class Plan:
    buckets: list[list[list[int]]]  # bucket -> rank -> units it owns
    loads: list[int]                # Newton-Schulz FLOPs per rank and step

    @property
    def efficiency(self) -> float:
        """Mean load over the busiest rank's: 1 is perfect balance."""
        return sum(self.loads) / (len(self.loads) * max(self.loads)) if any(self.loads) else 1.0


def plan_units(costs: Sequence[int], sizes: Sequence[int], world_size: int, cap: int) -> Plan:
    """Place units, the costliest (FLOPs) first, each on the least loaded rank (longest processing time first). A bucket
    closes once every rank has `cap` elements (sizes) in it; loads carry over. The cheapest units come last, because no
    computation hides the last gather. Depends on its arguments only, so that all ranks plan alike."""
    loads, fill, buckets = [0] * world_size, [cap] * world_size, []
    for u in sorted(range(len(costs)), key=lambda u: (-costs[u], u)):
        if min(fill) >= cap:
            buckets.append([[] for _ in range(world_size)])
            fill = [0] * world_size
        rank = min(range(world_size), key=lambda r: (loads[r], fill[r], r))
        buckets[-1][rank].append(u)
        loads[rank] += costs[u]
        fill[rank] += sizes[u]
    return Plan([[sorted(ids) for ids in bucket] for bucket in buckets], loads)


def as_bank(x: Tensor, flatten: bool) -> Tensor:
    """(matrices, rows, columns ...) of a tensor that is shaped like a parameter."""
    return x if x.ndim == 3 and not flatten else x[None]


def local(x: Tensor) -> Tensor:
    """What this rank holds of a DTensor; anything else is returned as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


class Unit(NamedTuple):
    param: Tensor
    group: int    # index into param_groups
    place: tuple  # (matrix of the bank, first row in it, first of its numbers in a row of second_moment)
    m: int
    n: int


def units_of(p: Tensor, shape: Tensor, number: int, group: dict) -> list[Unit]:
    """The units of a parameter, or of the part `shape` of it that a rank holds."""
    K, M, *columns = as_bank(shape, group["flatten"]).shape
    n, split, units = math.prod(columns), group["split"], []
    for k in range(K):
        row = mark = 0
        for m in (M,) if split is None else (M // split,) * split if isinstance(split, int) else split:
            units.append(Unit(p, number, (k, row, mark), m, n))
            row, mark = row + m, mark + max(m, n)
    return units


@dataclass
class Run:
    """`count` units of one owner and parameter at equal distances: a stack (B, m, n), found at `offset` in the owner's
    flat part of a bucket, with its B flags at `flag`."""
    unit: Unit
    flatten: bool
    offset: int
    flag: int
    count: int = 1
    step: tuple = (0, 0, 0)
    state: dict[str, Tensor] = field(default_factory=dict)  # on the owner only

    def takes(self, unit: Unit) -> bool:
        """Add the unit if it continues this run."""
        first, step = self.unit, tuple((b - a) // self.count for a, b in zip(self.unit.place, unit.place))
        follows = all(a + s * self.count == b for a, s, b in zip(first.place, step, unit.place)) and (
            self.count == 1 or step == self.step)
        if unit.param is not first.param or unit[3:] != first[3:] or not follows:
            return False
        self.count, self.step = self.count + 1, step
        return True

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.count, self.unit.m, self.unit.n

    def of(self, x: Tensor) -> Tensor:
        """View (B, m, ...) of these matrices in a tensor that is shaped like the parameter."""
        x, (k, row, _), (dk, drow, _) = as_bank(x, self.flatten), self.unit.place, self.step
        K, R, *columns = x.stride()
        return x.as_strided((self.count, self.unit.m, *x.shape[2:]), (dk * K + drow * R, R, *columns),
                            x.storage_offset() + k * K + row * R)

    def of_state(self, key: str, x: Tensor) -> Tensor:
        """The same in a parameter's whole state; (B, rows or columns) in second_moment, which is (matrices, numbers)."""
        if key != "second_moment":
            return self.of(x)
        (k, _, mark), (dk, _, dmark), (K, one) = self.unit.place, self.step, x.stride()
        return x.as_strided((self.count, max(self.shape[1:])), (dk * K + dmark * one, one),
                            x.storage_offset() + k * K + mark * one)

    def slot(self, part: Tensor) -> Tensor:
        return part[self.offset:self.offset + math.prod(self.shape)].view(self.shape)

    def gradient(self) -> Tensor:
        """(B, m, n), often p.grad itself. A missing one is NaN, as is then any mean with it: the owner skips it."""
        p = self.unit.param
        return (local(p).new_full(self.shape, math.nan) if p.grad is None else
                self.of(local(p.grad)).reshape(self.shape))


# torch 2.13 renamed both. Outputs stay flat: gloo refuses the stacked form that NCCL accepts.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Bucket:
    """Units that travel together, per rank of a process group, and their way through one step: `start` fetches what
    other ranks hold of their gradients, `update` computes, `send` shares the results, `apply` changes the weights."""
    alone = False             # True: every rank computes by itself what it holds
    owners_keep_state = True  # False: optimizer.state holds it
    part = staticmethod(lambda p: p)  # the tensor whose matrices are the units of p

    def __init__(self, optimizer: "Muon", group, rank: int, units: list[list[Unit]]):
        self.optimizer, self.group, self.rank, self.world_size = optimizer, group, rank, len(units)
        self.runs, sizes, self.pending, self.sent = [[] for _ in units], [0] * len(units), None, None
        for runs, mine, r in zip(self.runs, units, range(len(units))):
            for flag, unit in enumerate(mine):
                if not (runs and self.merges(unit) and runs[-1].takes(unit)):
                    runs.append(Run(unit, optimizer.param_groups[unit.group]["flatten"], sizes[r], flag))
                sizes[r] += unit.m * unit.n
        params = [unit.param for mine in units for unit in mine]
        self.num_units, self.like = len(params), local(params[0])  # like: buffers are made on its device
        self.num_flags, self.num_elements = max(map(len, units)), max(sizes)  # per rank, padded to the fullest
        self.grad_dtype = torch.bfloat16 if {p.dtype for p in params} == {torch.bfloat16} else torch.float32
        ns_dtype = optimizer.ns_dtype or iteration_dtype(self.like.device)
        self.wire = ns_dtype if ns_dtype == torch.float32 else torch.bfloat16

    def merges(self, unit: Unit) -> bool:
        """Whether the unit may be computed in one stack with others."""
        return not self.optimizer.deterministic

    def settings(self, run: Run) -> dict:
        return self.optimizer.param_groups[run.unit.group]

    def rates(self, run: Run) -> tuple:
        """The last arguments of `decay_and_step`."""
        group = self.settings(run)
        return (group["lr"] * ADJUST_LR[group["adjust_lr"]](*run.shape[1:]), group["lr"] * group["weight_decay"],
                group["cautious"])

    def state(self, run: Run) -> dict[str, Tensor]:
        """The kinds of state that a run's group asks for, each zero at first use: (B, m, n), or (B, numbers)."""
        kinds = state_kinds(self.settings(run))
        for key in kinds.keys() - run.state.keys():
            shape = (run.count, max(run.shape[1:])) if key == "second_moment" else run.shape
            run.state[key] = torch.zeros(shape, dtype=kinds[key], device=self.like.device)
        return {key: run.state[key] for key in kinds}

    def start(self) -> None:
        """With sync_grads: launch the sum of the gradients over ranks; each owner receives its own part."""
        if self.world_size == 1 or not self.optimizer.sync_grads or self.pending is not None:
            return
        packed = self.like.new_empty((self.world_size, self.num_elements), dtype=self.grad_dtype)
        for part, runs in zip(packed, self.runs):
            for run in runs:
                run.slot(part).copy_(run.gradient())
        mine = torch.empty_like(packed[0])
        handle = _reduce_scatter(mine, packed.view(-1), group=self.group, async_op=True)
        self.pending = handle, mine, packed  # packed must live until the wait

    def update(self) -> list[tuple[Run, Tensor, Tensor]]:
        """(run, its update or with split_mantissa its new weights (B, m, n), ok (B,)) for all I own in the bucket."""
        mean, entries = None, []
        if self.pending is not None:
            handle, mine, _ = self.pending
            handle.wait()
            mean, self.pending = mine.float().div_(self.world_size), None
        for run in self.runs[self.rank]:
            group, G = self.settings(run), run.gradient() if mean is None else run.slot(mean)
            M = self.state(run)["momentum_buffer"].view(run.shape)
            entries.append((run, *self.optimizer._momentum_update(M, G, group["momentum"], group["nesterov"])))
        results = []
        for run, O, ok in self.orthogonalize(entries):
            if "mantissa" in (state := self.state(run)):
                W, low = run.of(local(run.unit.param)).reshape(run.shape), state["mantissa"].view(run.shape)
                O = self.optimizer._step_master(W, low, O, ok, *self.rates(run))
            results.append((run, O, ok))
        return results

    def orthogonalize(self, entries: list[tuple[Run, Tensor, Tensor]]) -> list[tuple[Run, Tensor, Tensor]]:
        """(run, O (B, m, n) rounded as everybody applies it, ok) from (run, U, ok): one iteration for all matrices of a
        kind, the tall ones lying on their side."""
        kinds, results, optimizer = {}, [], self.optimizer
        for run, U, ok in entries:
            group, U = self.settings(run), U if U.size(1) <= U.size(2) else U.mT
            kind = (U.shape[1:], group["ns_steps"], str(group["coefficients"]), group["ns_form"],
                    optimizer.deterministic and run.flag)
            kinds.setdefault(kind, []).append((run, ok, U))
        for members in kinds.values():
            runs, oks, U = zip(*members)
            group = self.settings(runs[0])
            O = optimizer._orthogonalize(U[0] if len(U) == 1 else torch.cat(U), group["ns_steps"], group["coefficients"],
                                         optimizer.ns_dtype, group["ns_form"], optimizer.symmetric)
            for run, ok, part in zip(runs, oks, O.split([run.count for run in runs])):
                part = part if part.shape == run.shape else part.mT.contiguous()
                if (beta2 := self.settings(run)["normuon_beta2"]) is not None:
                    part = optimizer._normalize_variance(part, self.state(run)["second_moment"], ok, beta2)
                results.append((run, part.to(self.wire), ok))
        return results

    def send(self, results: list) -> None:
        """Launch the exchange of the results."""
        def flags(run, part):
            return part[self.num_elements + run.flag:][:run.count]

        if self.world_size == 1:
            self.sent = None, results, None
            return
        size = self.num_elements + self.num_flags  # of a rank's part: all elements, then all flags
        gathered = self.like.new_empty((self.world_size, size), dtype=self.wire)
        mine = torch.empty_like(gathered[0])
        for run, value, ok in results:
            run.slot(mine).copy_(value)
            flags(run, mine).copy_(ok)
        handle = _all_gather(gathered.view(-1), mine, group=self.group, async_op=True)
        self.sent = handle, [(run, run.slot(part), flags(run, part))
                             for part, runs in zip(gathered, self.runs) for run in runs], mine  # mine: until the wait

    def apply(self) -> Tensor:
        """Change the weights, on every rank with the same numbers. Returns how many units were skipped."""
        (handle, results, _), self.sent = self.sent, None
        if handle is not None:
            handle.wait()
        for run, value, ok in results:
            W = run.of(local(run.unit.param))
            if self.settings(run)["split_mantissa"]:
                W.copy_(value.reshape(W.shape))
            else:
                self.optimizer._decay_and_step(W, value.reshape(W.shape), ok, *self.rates(run))
        return self.num_units - torch.cat([ok for _, _, ok in results]).sum(dtype=torch.int64)

    def gather_state(self, to: int | None, state: dict[Tensor, dict[str, Tensor]]) -> None:
        """Add the state of all owners in full shape per parameter, on rank `to` or (None) on all. All ranks call it."""
        for owner, run in ((r, run) for r, mine in enumerate(self.runs) for run in mine):
            for key, part in self.state(run).items():
                if self.world_size > 1:  # as bytes: no backend sends int16
                    dist.broadcast(part.view(torch.uint8), group_src=owner, group=self.group)
                if to in (None, self.rank):
                    wholes = state.setdefault(run.unit.param, {})
                    if key not in wholes:
                        wholes[key] = part.new_empty(state_shape(key, run.unit.param, self.settings(run)))
                    view = run.of_state(key, wholes[key])
                    view.copy_(part.view(view.shape))
            if owner != self.rank:
                run.state.clear()

    def scatter_state(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        """Take my part of what `gather_state` added. What is absent starts at zero."""
        for run in self.runs[self.rank]:
            run.state.clear()
            for key, mine in self.state(run).items():
                if (whole := state.get(run.unit.param, {}).get(key)) is not None:
                    mine.copy_(run.of_state(key, whole).reshape(mine.shape))


def state_kinds(group: dict) -> dict[str, torch.dtype]:
    """The state that a group's settings ask for."""
    return {"momentum_buffer": torch.float32,
            **({} if group["normuon_beta2"] is None else {"second_moment": torch.float32}),
            **({"mantissa": torch.int16} if group["split_mantissa"] else {})}


def state_shape(key: str, p: Tensor, group: dict) -> tuple[int, ...]:
    """Of a parameter's whole state: as the parameter, but (matrices, numbers) for second_moment."""
    units = units_of(p, p, 0, group)
    last = units[-1]
    return (last.place[0] + 1, last.place[2] + max(last.m, last.n)) if key == "second_moment" else tuple(p.shape)


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer

def expect(holds: bool, expected: str, found, remedy: str, error: type = ValueError) -> None:
    if not holds:
        raise error(f"Muon: {expected}, found {found}; {remedy}")


def is_split(x) -> bool:
    return all(isinstance(m, int) and m > 0 for m in (x if isinstance(x, Sequence) and len(x) else (x,)))


RULES = {  # setting of a group -> (what is expected, test)
    "lr": ("one number, 0 or more", lambda x: (not isinstance(x, Tensor) or x.numel() == 1) and float(x) >= 0),
    "momentum": ("0 <= momentum < 1", lambda x: 0 <= x < 1),
    "weight_decay": ("0 or more", lambda x: x >= 0),
    "ns_steps": ("a whole number above 0", lambda x: isinstance(x, int) and x > 0),
    "coefficients": (f"one of {list(COEFFICIENTS)} or a sequence of (a, b, c)", lambda x: x in COEFFICIENTS
                     if isinstance(x, str) else len(x) > 0 and all(isinstance(t, Sequence) and len(t) == 3 for t in x)),
    "ns_form": (f"one of {FORMS}", lambda x: x in FORMS),
    "adjust_lr": (f"one of {list(ADJUST_LR)}", lambda x: x in ADJUST_LR),
    "normuon_beta2": ("None or 0 <= beta2 < 1", lambda x: x is None or 0 <= x < 1),
    "split": ("None, a number of equal blocks, or the rows of each block", lambda x: x is None or is_split(x)),
}


def check_settings(group: dict, number: int) -> None:
    for key, (expected, holds) in RULES.items():
        expect(holds(group[key]), f"{key} of group {number}: expected {expected}", repr(group[key]), "change it")


def from_torch(settings: dict) -> dict:
    """torch.optim.Muon's names for the same settings; its adjust_lr_fn=None means original, and eps has no use here."""
    renamed = {key: value for key, value in settings.items() if key not in ("ns_coefficients", "adjust_lr_fn", "eps")}
    if "ns_coefficients" in settings:
        renamed["coefficients"] = (tuple(settings["ns_coefficients"]),)
    if "adjust_lr_fn" in settings:
        renamed["adjust_lr"] = settings["adjust_lr_fn"] or "original"
    return renamed


def world_and_rank(group) -> tuple[int, int]:
    """Ranks of a process group and the place of this one; a process by itself is the only rank."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_world_size(group), dist.get_rank(group)) if ready else (1, 0)


def fuse(function):
    """Compile once per shape. Numbers enter as tensors: a number would be compiled in, anew for every value."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    fused = torch.compile(function, dynamic=False, fullgraph=True)
    return lambda *args: fused(*(torch.tensor(x, dtype=torch.float32) if isinstance(x, float) else x for x in args))


def rebuild(groups: list[dict], options: dict, state: dict) -> "Muon":
    """From a pickle."""
    optimizer = Muon(groups, **options)
    optimizer.load_state_dict(state)
    return optimizer


class Muon(torch.optim.Optimizer):
    """Muon over the ranks of `process_group` (default: all ranks; one process needs no torch.distributed at all).

    Settings of a group, which may change between steps: lr (a number or a 0-D tensor), momentum, nesterov,
    weight_decay, ns_steps, coefficients, adjust_lr, cautious, normuon_beta2 (None: off), and split_mantissa (the owner
    of a bf16 parameter keeps 16 more bits, so that the weights are fp32 in truth; bf16 weights travel, not updates).
    Settings of a group that stay: split (a matrix is that many blocks of rows, or blocks of these rows: query, key and
    value, or heads, each orthogonalized and scaled by itself), flatten (a 3-D parameter is one matrix (o, i k), as a
    1-D convolution), ns_form (see `gram_pays`). torch.optim.Muon's names ns_coefficients, adjust_lr_fn, eps are taken.
    ns_dtype: of the iteration, default `iteration_dtype`; what is gathered is fp32 for fp32, else bf16.
    sync_grads: gradients differ per rank and the optimizer averages them, in bf16 for a bucket of bf16 parameters, else
    in fp32. Without it they must already be equal on all ranks, as DDP leaves them. p.grad is read, never written.
    bucket_mb: fp32 megabytes per rank and bucket, which also bounds the working memory.
    deterministic: one matrix per call, so that the bits do not depend on the number of ranks or buckets.
    compile: fuse the update functions with torch.compile. symmetric: a kernel like `symmetric_product`."""

    def __init__(self, params, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0, ns_steps=5,
                 coefficients="polar", adjust_lr="original", cautious=False, normuon_beta2=None, split_mantissa=False,
                 split=None, flatten=False, ns_form="auto", ns_dtype=None, process_group=None, sync_grads=False,
                 bucket_mb=16, deterministic=False, compile=False, symmetric=symmetric_product, **torch_names):
        expect(ns_dtype in (None, torch.bfloat16, torch.float16, torch.float32) and bucket_mb > 0, "expected ns_dtype None, "
               "torch.bfloat16, torch.float16 or torch.float32 and bucket_mb above 0", f"{ns_dtype} and {bucket_mb}",
               "leave both out for the defaults")
        unknown = sorted(torch_names.keys() - {"ns_coefficients", "adjust_lr_fn", "eps"})
        expect(not unknown, "expected settings of Muon", unknown, "see its docstring", TypeError)
        self.options = dict(ns_dtype=ns_dtype, process_group=process_group, sync_grads=sync_grads, bucket_mb=bucket_mb,
                            deterministic=deterministic, compile=compile, symmetric=symmetric)
        vars(self).update(self.options)
        self.world_size, self.rank = world_and_rank(process_group)
        expect(self.rank >= 0, "expected a process_group that this rank belongs to", "another",
               "build the optimizer on the ranks of the group only")
        self.buckets, self.plans, self._names, self._consolidated, self._skipped = [], [], {}, None, 0
        for function in (momentum_update, orthogonalize, normalize_variance, decay_and_step, step_master):
            setattr(self, f"_{function.__name__}", fuse(function) if compile else function)
        super().__init__(params, dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, ns_steps=ns_steps,
            coefficients=coefficients, adjust_lr=adjust_lr, cautious=cautious, normuon_beta2=normuon_beta2,
            split_mantissa=split_mantissa, split=split, flatten=flatten, ns_form=ns_form) | from_torch(torch_names))
        self._lay_out()

    def __reduce__(self):
        return rebuild, (self.param_groups, self.options, self.state_dict())

    @property
    def skipped(self) -> int:
        """Units skipped so far, over all ranks and steps, for want of a finite gradient. Reading it waits."""
        return int(self._skipped)

    def _check_world(self) -> None:
        found, _ = world_and_rank(self.process_group)
        plain = any(type(bucket) is Bucket for bucket in self.buckets)
        expect(found == self.world_size or not plain, f"expected a world of {self.world_size} as at construction", found,
               "call torch.distributed.init_process_group first and build the optimizer after it")

    def add_param_group(self, group: dict) -> None:
        """Check and add a group. After construction all ranks call it together, as every unit is placed anew."""
        number, names, group = len(self.param_groups), dict(self._names), {**self.defaults, **from_torch(group)}
        check_settings(group, number)
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        dtypes = torch.float32, torch.bfloat16, torch.float16, torch.float64
        split, given = group["split"], group.get("param_names") or [f"parameter {i} of group {number}" for i in
                                                                    range(len(group["params"]))]
        for name, p in zip(given, group["params"]):
            name, p = p if isinstance(p, tuple) else (name, p)
            shape = f"shape {tuple(p.shape)}"
            for holds, expected, found, remedy in (
                    (p.dtype in dtypes, "a real floating-point parameter", p.dtype, "leave it to another one"),
                    (p.ndim >= 2, "a matrix, a bank or a convolution", shape, "give it to AdamW"),
                    (p.numel() > 0, "at least one element", shape, "leave it out"),
                    (p not in names, "each parameter once", "it again", "remove it here or there"),
                    (p.dtype == torch.bfloat16 or not group["split_mantissa"], "torch.bfloat16 for split_mantissa",
                     p.dtype, "turn that off for this group")):
                expect(holds, f"{name}: expected {expected}", found, remedy)
            rows = as_bank(p, group["flatten"]).size(1)
            expect(split is None or (rows % split == 0 if isinstance(split, int) else sum(split) == rows),
                   f"{name}: expected a split of its {rows} rows", f"{split}", "change it for this group")
            names[p] = name
        super().add_param_group(group)
        self._names = names
        if self.buckets:
            self._lay_out()

    def _check_ranks_agree(self, process_group, world_size: int, params: set[Tensor]) -> None:
        """Ranks that disagree would hang or mix up their matrices: raise on all, naming the first difference."""
        lines = [f"{key} {self.options[key]}" for key in ("ns_dtype", "sync_grads", "bucket_mb", "deterministic")]
        for i, group in enumerate(self.param_groups):
            mine = [f"{self._names[p]} of shape {tuple(p.shape)} in {p.dtype}" for p in group["params"] if p in params]
            lines += [*(f"{key} {group[key]} of group {i}" for key in self.defaults), *mine] if mine else []
        found = [None] * world_size
        dist.all_gather_object(found, lines, group=process_group)
        for rank, theirs in enumerate(found):
            for a, b in zip_longest(found[0], theirs, fillvalue="nothing"):
                expect(a == b, "expected the same parameters and settings on all ranks",
                       f"{a} on rank 0 and {b} on rank {rank}", "build the optimizer alike on every rank")

    def _lay_out(self) -> None:
        """Plan the units and cut them into buckets of runs. State that exists already moves to its new owners."""
        state, lanes = self._gather_state(), {}
        devices = sorted({str(p.device) for p in self._names})
        expect(len(devices) == 1, "expected all parameters on one device", devices, "build one optimizer per device")
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                lanes.setdefault(self._lane(p, group), []).append((p, i, group))
        self.buckets, self.plans = [], []
        for (kind, process_group), members in lanes.items():
            world_size, rank = world_and_rank(process_group)
            if world_size > 1:
                self._check_ranks_agree(process_group, world_size, {p for p, _, _ in members})
            world_size, rank = (1, 0) if kind.alone else (world_size, rank)
            units = [unit for p, i, group in members for unit in units_of(p, kind.part(p), i, group)]
            costs = [self._cost(unit) for unit in units]
            self.plans.append(plan_units(costs, [u.m * u.n for u in units], world_size, max(1, int(self.bucket_mb * 1e6 / 4))))
            self.buckets += [kind(self, process_group, rank, [[units[u] for u in ids] for ids in bucket])
                             for bucket in self.plans[-1].buckets]
        self.buckets.sort(key=lambda bucket: bucket.alone)  # ranks may have unlike numbers of these: no exchange between them
        self._scatter_state(state)

    def _lane(self, p: Tensor, group: dict) -> tuple[type[Bucket], object]:
        """(kind of bucket, process group) for a parameter."""
        if not hasattr(p, "device_mesh"):
            return Bucket, self.process_group
        try:
            import muon_fsdp
        except ImportError:
            expect(False, "expected muon_fsdp.py for DTensor parameters", "none", "put it beside muon.py", ImportError)
        muon_fsdp.state_of(self, p, group)  # on every rank, also where no part of p lies
        return muon_fsdp.lane(p, group)

    def _cost(self, unit: Unit) -> int:
        group, dtype = self.param_groups[unit.group], self.ns_dtype or iteration_dtype(unit.param.device)
        return newton_schulz_flops(unit.m, unit.n, group["ns_steps"], gram_pays(unit.m, unit.n, group["ns_form"], dtype))

    @torch.no_grad()
    def start(self) -> None:
        """With sync_grads: begin to average all gradients and return at once. step() calls it if nobody has."""
        self._check_world()
        for bucket in self.buckets if self.sync_grads else ():
            bucket.start()

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.start()
        self._consolidated, inflight = None, deque()
        for i, bucket in enumerate(self.buckets):
            for near in self.buckets[i:i + 2]:
                near.start()                           # 1: gradients of the next bucket are under way,
            bucket.send(bucket.update())               # 2: update what I own and send it off,
            inflight.append(bucket)
            if len(inflight) == min(2, bucket.world_size):
                self._skipped += inflight.popleft().apply()  # 3: and meanwhile apply the bucket before
        while inflight:
            self._skipped += inflight.popleft().apply()
        return loss

    @torch.no_grad()
    def _gather_state(self, to: int | None = None) -> dict[Tensor, dict[str, Tensor]]:
        state = {}
        for bucket in self.buckets:
            bucket.gather_state(to, state)
        return state

    @torch.no_grad()
    def _scatter_state(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        for bucket in self.buckets:
            bucket.scatter_state(state)

    def consolidate_state_dict(self, to: int | None = None) -> None:
        """Bring the state of all owners to all ranks, or to rank `to`, for the next state_dict(). All ranks call it."""
        self._check_world()
        state = self._gather_state(to)
        self._consolidated = state if to in (None, self.rank) else None

    def state_dict(self) -> dict:
        """torch's layout at any number of ranks: {parameter number: {"momentum_buffer": fp32 in full shape, ...}}. The
        state of DTensor parameters is DTensors."""
        alone = all(bucket.world_size == 1 or not bucket.owners_keep_state for bucket in self.buckets)
        expect(alone or self._consolidated is not None, "expected the state of all ranks", "this rank's share only",
               "call consolidate_state_dict() on every rank after the last step, and then state_dict()", RuntimeError)
        kept = dict(self.state)
        self.state.update(self._consolidated or self._gather_state())
        try:
            return super().state_dict()
        finally:
            self.state.clear()
            self.state.update(kept)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the whole, on every rank, from state_dict() at any number of ranks or from torch.optim.Muon."""
        groups, state = [], {}
        for number, (theirs, ours) in enumerate(zip(state_dict["param_groups"], self.param_groups)):
            settings = {key: ours[key] for key in self.defaults} | from_torch(theirs)
            groups.append(settings | {key: ours[key] for key in ("split", "flatten", "ns_form")})  # these shape the state
            check_settings(groups[-1], number)
            for i, p in zip(theirs["params"], ours["params"]):
                state[p] = state_dict["state"].get(i, {})
                expect("momentum_buffer" in state[p] or not state_dict["state"], f"{self._names[p]}: expected a momentum_buffer",
                       "none, though others have one", "save the state of all ranks, see consolidate_state_dict()")
                for key in state_kinds(groups[-1]).keys() & state[p].keys():
                    expected, found = state_shape(key, p, groups[-1]), tuple(state[p][key].shape)
                    expect(found == expected, f"{self._names[p]}: expected a {key} of shape {expected}", found,
                           "load a checkpoint of this model")
        kept = dict(self.state)
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})  # torch would round fp32 to bf16
        self.state.update(kept)
        self._scatter_state(state)
        self._consolidated = None
