"""Muon for one process or many: momentum, then the nearest semi-orthogonal matrix, with the work shared over ranks.

For every weight matrix W with gradient G, at learning rate lr, weight decay wd and momentum mu:

    M <- mu M + (1 - mu) G                        momentum, fp32
    U  = (1 - mu) G + mu M                        Nesterov look-ahead (or U = M)
    O  = orthogonalize(U)                         all singular values near 1, by Newton-Schulz
    O <- O / sqrt(V), rescaled to its old norm    only with normuon_beta2; V: running mean square per row or column
    W <- W - lr wd W                              decoupled decay (cautious: only entries where O W >= 0)
    W <- W - lr scale O                           scale: see ADJUST_LR

Legend: a matrix is m x n as stored; B matrices make a stack (B, m, n). A 2-D parameter is one matrix, a 3-D parameter
(k, m, n) a bank of k matrices, a convolution (o, i, h, w) the matrix (o, i h w). Every matrix is a *unit* that belongs
to one rank. The owner alone keeps its momentum and orthogonalizes it; every rank receives the rounded result and
applies it. Units are placed by FLOPs and travel in *buckets*: one is gathered while the next is computed. A unit whose
gradient is missing or not finite is skipped by all ranks alike: a flag travels beside the data, no host waits.

Use it for the hidden matrices of a network. Embeddings, the output head, gains and biases belong to AdamW.

Sources: Muon, https://kellerjordan.github.io/posts/muon/; decay and RMS matching, arXiv 2502.16982 (Moonlight);
default coefficients, arXiv 2505.16932 (Polar Express); variance normalization, arXiv 2510.05491 (NorMuon);
cautious decay, arXiv 2510.12402.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

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


def largest(G: Tensor) -> Tensor:
    """(..., 1, 1): the largest absolute entry of every matrix, NaN if any is; unlike G.abs(), without a copy of G."""
    return torch.maximum(G.amax((-2, -1), keepdim=True), -G.amin((-2, -1), keepdim=True))


def wire_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it fast; on a CPU without such units it is four times slower than fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalize(G: Tensor, steps: int = 5, coefficients: str | Sequence = "polar",
                  dtype: torch.dtype | None = None) -> Tensor:
    """Approximate U V^T of the SVD U S V^T of every (m, n) matrix of G: (..., m, n), which is not modified.
    coefficients: a name in COEFFICIENTS or a sequence of (a, b, c). dtype: of the iteration and the result, default
    `wire_dtype`. Only the direction of G counts: dividing by the largest entry first keeps the squares in range for
    entries from 1e-30 to 1e30. Zero in, zero out."""
    if G.size(-2) > G.size(-1):
        return orthogonalize(G.mT, steps, coefficients, dtype).mT  # the Gram matrix is smallest on the short side
    safety, triples = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else (1.0, coefficients)
    tiny = torch.finfo(torch.float32).tiny
    X = G.reshape(-1, *G.shape[-2:]).float()
    X = X / largest(X).clamp(min=tiny)
    X = X.div_(X.norm(dim=(-2, -1), keepdim=True).clamp(min=tiny) * safety).to(dtype or wire_dtype(G.device))
    for a, b, c in (triples[min(i, len(triples) - 1)] for i in range(steps)):
        A = X @ X.mT
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, P, X, beta=a)
    return X.reshape(G.shape)


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
    V is (B, m, 1) or (B, 1, n) fp32 and moves in place where ok. It starts at 0 without bias correction: the rescaling
    cancels any common factor."""
    O, dim = O.float(), -1 if V.size(-1) == 1 else -2
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
        return sum(self.loads) / (len(self.loads) * max(self.loads))


def plan_units(units: Sequence[tuple[int, int, int]], world_size: int, cap: int) -> Plan:
    """Place units (m, n, steps), the costliest first, each on the least loaded rank (longest processing time first).
    A bucket closes once every rank has `cap` elements in it; loads carry over. The cheapest units come last, because no
    computation hides the last gather. Depends on its arguments only, so that all ranks plan alike."""
    costs = [steps * (4 * min(m, n) ** 2 * max(m, n) + 2 * min(m, n) ** 3) for m, n, steps in units]
    loads, fill, buckets = [0] * world_size, [cap] * world_size, []
    for u in sorted(range(len(units)), key=lambda u: (-costs[u], u)):
        if min(fill) >= cap:
            buckets.append([[] for _ in range(world_size)])
            fill = [0] * world_size
        rank = min(range(world_size), key=lambda r: (loads[r], fill[r], r))
        buckets[-1][rank].append(u)
        loads[rank] += costs[u]
        fill[rank] += units[u][0] * units[u][1]
    return Plan([[sorted(ids) for ids in bucket] for bucket in buckets], loads)


def bank_shape(p: Tensor) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a parameter."""
    return tuple(p.shape) if p.ndim == 3 else (1, p.size(0), p.numel() // p.size(0))


@dataclass
class Run:
    """Matrices first, first + stride, ... of one parameter with the same owner: a stack (B, m, n), found at `offset`
    in the owner's flat part of a bucket, with its B flags at `flag`."""
    param: Tensor
    group: int  # index into param_groups
    first: int
    offset: int
    flag: int
    stride: int = 1
    count: int = 1
    state: dict[str, Tensor] = field(default_factory=dict)  # on the owner only

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.count, *bank_shape(self.param)[1:]

    def of(self, x: Tensor) -> Tensor:
        """View (B, ...) of these matrices in a tensor that is shaped like the parameter."""
        return x[self.first:self.first + self.stride * self.count:self.stride] if x.ndim == 3 else x.unsqueeze(0)

    def slot(self, part: Tensor) -> Tensor:
        return part[self.offset:self.offset + math.prod(self.shape)].view(self.shape)

    def gradient(self) -> Tensor:
        """(B, m, n), often p.grad itself. A missing one is NaN, as is then any mean with it: the owner skips it."""
        grad = self.param.grad
        return self.param.new_full(self.shape, math.nan) if grad is None else self.of(grad).reshape(self.shape)


class Bucket:
    """Per rank the runs of its units (group, parameter, matrix index). single: one matrix per run."""

    def __init__(self, units: list[list[tuple[int, Tensor, int]]], single: bool):
        self.runs, sizes = [[] for _ in units], [0] * len(units)
        for rank, runs in enumerate(self.runs):
            for flag, (group, p, index) in enumerate(units[rank]):
                last = runs[-1] if runs and runs[-1].param is p and not single else None
                if last and (last.count == 1 or index == last.first + last.stride * last.count):
                    last.stride, last.count = (index - last.first) // last.count, last.count + 1
                else:
                    runs.append(Run(p, group, index, sizes[rank], flag))
                sizes[rank] += math.prod(bank_shape(p)[1:])
        params = [p for mine in units for _, p, _ in mine]
        self.num_units, self.like = len(params), params[0]  # like: buffers are made on its device
        self.num_flags, self.num_elements = max(map(len, units)), max(sizes)  # per rank, padded to the fullest
        self.grad_dtype = torch.bfloat16 if {p.dtype for p in params} == {torch.bfloat16} else torch.float32

    def flags(self, run: Run, part: Tensor) -> Tensor:
        """(B,) of a run, in a rank's part of what is gathered: all elements, then all flags."""
        return part[self.num_elements + run.flag:][:run.count]


# torch 2.13 renamed both. Outputs stay flat: gloo refuses the stacked form that NCCL accepts.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

# ----------------------------------------------------------------------------------------------------------------------
# The optimizer

def expect(holds: bool, expected: str, found, remedy: str, error: type = ValueError) -> None:
    if not holds:
        raise error(f"Muon: {expected}, found {found}; {remedy}")


RULES = {  # setting of a group -> (what is expected, test)
    "lr": ("one number, 0 or more", lambda x: (not isinstance(x, Tensor) or x.numel() == 1) and float(x) >= 0),
    "momentum": ("0 <= momentum < 1", lambda x: 0 <= x < 1),
    "weight_decay": ("0 or more", lambda x: x >= 0),
    "ns_steps": ("a whole number above 0", lambda x: isinstance(x, int) and x > 0),
    "coefficients": (f"one of {list(COEFFICIENTS)} or a sequence of (a, b, c)", lambda x: x in COEFFICIENTS
                     if isinstance(x, str) else len(x) > 0 and all(isinstance(t, Sequence) and len(t) == 3 for t in x)),
    "adjust_lr": (f"one of {list(ADJUST_LR)}", lambda x: x in ADJUST_LR),
    "normuon_beta2": ("None or 0 <= beta2 < 1", lambda x: x is None or 0 <= x < 1),
}


def check_settings(group: dict, number: int) -> None:
    for key, (expected, holds) in RULES.items():
        expect(holds(group[key]), f"{key} of group {number}: expected {expected}", repr(group[key]), "change it")


def world_and_rank(group) -> tuple[int, int]:
    """Ranks of a process group and the place of this one; a process by itself is the only rank."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_world_size(group), dist.get_rank(group)) if ready else (1, 0)


def fuse(function):
    """Compile once per shape. Numbers enter as tensors: a number would be compiled in, anew for every value."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    fused = torch.compile(function, dynamic=False, fullgraph=True)
    return lambda *args: fused(*(torch.tensor(x, dtype=torch.float32) if isinstance(x, float) else x for x in args))


class Muon(torch.optim.Optimizer):
    """Muon over the ranks of `process_group` (default: all ranks; one process needs no torch.distributed at all).

    Settings of a group, which may change between steps: lr (a number or a 0-D tensor), momentum, nesterov,
    weight_decay, ns_steps, coefficients, adjust_lr, cautious, normuon_beta2 (None: off), and split_mantissa (the owner
    of a bf16 parameter keeps 16 more bits, so that the weights are fp32 in truth; bf16 weights travel, not updates).
    ns_dtype: dtype of the iteration and of what is gathered, default `wire_dtype`.
    sync_grads: gradients differ per rank and the optimizer averages them, in bf16 for a bucket of bf16 parameters, else
    in fp32. Without it they must already be equal on all ranks, as DDP leaves them. p.grad is read, never written.
    bucket_mb: fp32 megabytes per rank and bucket, which also bounds the working memory.
    deterministic: one matrix per call, so that the bits do not depend on the number of ranks or buckets.
    compile: fuse the update functions with torch.compile."""

    def __init__(self, params, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0, ns_steps=5,
                 coefficients="polar", adjust_lr="original", cautious=False, normuon_beta2=None, split_mantissa=False,
                 ns_dtype=None, process_group=None, sync_grads=False, bucket_mb=16, deterministic=False, compile=False):
        expect(ns_dtype in (None, torch.bfloat16, torch.float32) and bucket_mb > 0,
               "expected ns_dtype None, torch.bfloat16 or torch.float32 and bucket_mb above 0",
               f"{ns_dtype} and {bucket_mb}", "leave both out for the defaults")
        self.process_group, self.sync_grads, self.bucket_mb = process_group, sync_grads, bucket_mb
        self.ns_dtype, self.deterministic = ns_dtype, deterministic
        self.world_size, self.rank = world_and_rank(process_group)
        expect(self.rank >= 0, "expected a process_group that this rank belongs to", "another",
               "build the optimizer on the ranks of the group only")
        self.buckets, self._names, self._pending, self._consolidated, self._skipped = [], {}, None, None, 0
        for function in (momentum_update, orthogonalize, normalize_variance, decay_and_step, step_master):
            setattr(self, f"_{function.__name__}", fuse(function) if compile else function)
        super().__init__(params, dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, ns_steps=ns_steps,
            coefficients=coefficients, adjust_lr=adjust_lr, cautious=cautious, normuon_beta2=normuon_beta2,
            split_mantissa=split_mantissa))
        self._lay_out()

    @property
    def skipped(self) -> int:
        """Matrices skipped so far, over all ranks and steps, for want of a finite gradient. Reading it waits."""
        return int(self._skipped)

    def _check_world(self) -> None:
        found, _ = world_and_rank(self.process_group)
        expect(found == self.world_size, f"expected a world of {self.world_size} as at construction", found,
               "call torch.distributed.init_process_group first and build the optimizer after it")

    def add_param_group(self, group: dict) -> None:
        """Check and add a group. After construction all ranks call it together, as every unit is placed anew."""
        number, names, group = len(self.param_groups), dict(self._names), {**self.defaults, **group}
        check_settings(group, number)
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        dtypes = torch.float32, torch.bfloat16, torch.float16, torch.float64
        for i, p in enumerate(group["params"]):
            name, p = p if isinstance(p, tuple) else (f"parameter {i} of group {number}", p)
            shape = f"shape {tuple(p.shape)}"
            for holds, expected, found, remedy in (
                    (p.dtype in dtypes, "a real floating-point parameter", p.dtype, "leave it to another one"),
                    (p.ndim >= 2, "a matrix, a bank or a convolution", shape, "give it to AdamW"),
                    (p.numel() > 0, "at least one element", shape, "leave it out"),
                    (p not in names, "each parameter once", "it again", "remove it here or there"),
                    (p.dtype == torch.bfloat16 or not group["split_mantissa"], "torch.bfloat16 for split_mantissa",
                     p.dtype, "turn that off for this group")):
                expect(holds, f"{name}: expected {expected}", found, remedy)
            names[p] = name
        super().add_param_group(group)
        self._names = names
        if self.buckets:
            self._lay_out()

    def _check_ranks_agree(self) -> None:
        """Ranks that disagree would hang or mix up their matrices: raise on all, naming the first difference."""
        lines = [f"{key} {getattr(self, key)}" for key in ("ns_dtype", "sync_grads", "bucket_mb", "deterministic")]
        for i, group in enumerate(self.param_groups):
            lines += [f"{key} {group[key]} of group {i}" for key in self.defaults]
            lines += [f"{self._names[p]} of shape {tuple(p.shape)} in {p.dtype}" for p in group["params"]]
        found = [None] * self.world_size
        dist.all_gather_object(found, lines, group=self.process_group)
        for rank, theirs in enumerate(found):
            for a, b in zip_longest(found[0], theirs, fillvalue="nothing"):
                expect(a == b, "expected the same parameters and settings on all ranks",
                       f"{a} on rank 0 and {b} on rank {rank}", "build the optimizer alike on every rank")

    def _lay_out(self) -> None:
        """Plan the units and cut them into buckets of runs. State that exists already moves to its new owners."""
        state = self._gather_state()
        devices = sorted({str(p.device) for p in self._names})
        expect(len(devices) == 1, "expected all parameters on one device", devices, "build one optimizer per device")
        if self.world_size > 1:
            self._check_ranks_agree()
        units = [(i, p, index) for i, group in enumerate(self.param_groups) for p in group["params"]
                 for index in range(bank_shape(p)[0])]
        self.plan = plan_units([(*bank_shape(p)[1:], self.param_groups[i]["ns_steps"]) for i, p, _ in units],
                               self.world_size, max(1, int(self.bucket_mb * 1e6 / 4)))
        self.buckets = [Bucket([[units[u] for u in ids] for ids in bucket], self.deterministic)
                        for bucket in self.plan.buckets]
        self._scatter_state(state)

    @torch.no_grad()
    def start(self) -> None:
        """With sync_grads: begin to average all gradients and return at once. step() calls it if nobody has."""
        self._check_world()
        if self._pending is None:
            average = self.sync_grads and self.world_size > 1
            self._pending = [self._reduce(bucket) if average else None for bucket in self.buckets]

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.start()                                                    # 1: all reductions are under way
        reductions, inflight = deque(self._pending), deque()
        self._pending = self._consolidated = None
        for bucket in self.buckets:
            results = self._update(bucket, reductions.popleft())        # 2: update what I own,
            inflight.append(self._gather(bucket, results))              # send it off,
            if len(inflight) == min(2, self.world_size):
                self._apply(*inflight.popleft())                        # 3: and meanwhile apply the bucket before
        while inflight:
            self._apply(*inflight.popleft())
        return loss

    def _reduce(self, bucket: Bucket) -> tuple:
        """Launch the sum of one bucket's gradients over ranks; each owner receives its own part."""
        packed = bucket.like.new_empty((self.world_size, bucket.num_elements), dtype=bucket.grad_dtype)
        for part, runs in zip(packed, bucket.runs):
            for run in runs:
                run.slot(part).copy_(run.gradient())
        mine = torch.empty_like(packed[0])
        handle = _reduce_scatter(mine, packed.view(-1), group=self.process_group, async_op=True)
        return handle, mine, packed  # packed must live until the wait

    def _state(self, run: Run) -> dict[str, Tensor]:
        """The kinds of state that a run's group asks for, each zero at first use: (B, m, n) as the parameter stores it,
        but one number per row or column for second_moment."""
        group, (B, m, n), whole = self.param_groups[run.group], run.shape, run.of(run.param).shape
        kinds = {"momentum_buffer": (whole, torch.float32)}
        if group["normuon_beta2"] is not None:
            kinds["second_moment"] = (B, m, 1) if m >= n else (B, 1, n), torch.float32
        if group["split_mantissa"]:
            kinds["mantissa"] = whole, torch.int16
        for key in kinds.keys() - run.state.keys():
            run.state[key] = torch.zeros(kinds[key][0], dtype=kinds[key][1], device=run.param.device)
        return {key: run.state[key] for key in kinds}

    def _rates(self, run: Run) -> tuple:
        """The last arguments of `decay_and_step`."""
        group, (_, m, n) = self.param_groups[run.group], run.shape
        return group["lr"] * ADJUST_LR[group["adjust_lr"]](m, n), group["lr"] * group["weight_decay"], group["cautious"]

    def _update(self, bucket: Bucket, reduction: tuple | None) -> list[tuple[Run, Tensor, Tensor]]:
        """(run, its update or with split_mantissa its new weights (B, m, n), ok (B,)) for all I own in the bucket."""
        if reduction is not None:
            reduction[0].wait()
            mean = reduction[1].float().div_(self.world_size)
        kinds, results = {}, []
        for run in bucket.runs[self.rank]:
            group, M = self.param_groups[run.group], self._state(run)["momentum_buffer"].view(run.shape)
            G = run.gradient() if reduction is None else run.slot(mean)
            U, ok = self._momentum_update(M, G, group["momentum"], group["nesterov"])
            U = U if U.size(1) <= U.size(2) else U.mT
            kind = U.shape[1:], group["ns_steps"], str(group["coefficients"]), self.deterministic and run.flag
            kinds.setdefault(kind, []).append((run, ok, U))
        for members in kinds.values():  # one iteration for all matrices of a kind, the tall ones lying on their side
            runs, oks, U = zip(*members)
            group = self.param_groups[runs[0].group]
            O = self._orthogonalize(U[0] if len(U) == 1 else torch.cat(U), group["ns_steps"], group["coefficients"],
                                    self.ns_dtype)
            for run, ok, part in zip(runs, oks, O.split([run.count for run in runs])):
                state, beta2 = self._state(run), self.param_groups[run.group]["normuon_beta2"]
                part = part if part.shape == run.shape else part.mT.contiguous()
                if "second_moment" in state:  # rounded for everybody, the owner included
                    part = self._normalize_variance(part, state["second_moment"], ok, beta2).to(part.dtype)
                if "mantissa" in state:
                    W, low = run.of(run.param).reshape(run.shape), state["mantissa"].view(run.shape)
                    part = self._step_master(W, low, part, ok, *self._rates(run))
                results.append((run, part, ok))
        return results

    def _gather(self, bucket: Bucket, results: list) -> tuple:
        """Launch the exchange of a bucket: (bucket, results of all ranks, handle, what must live until the wait)."""
        if self.world_size == 1:
            return bucket, results, None, None
        size, dtype = bucket.num_elements + bucket.num_flags, self.ns_dtype or wire_dtype(bucket.like.device)
        gathered = bucket.like.new_empty((self.world_size, size), dtype=dtype)
        mine = torch.empty_like(gathered[0])
        for run, value, ok in results:
            run.slot(mine).copy_(value)
            bucket.flags(run, mine).copy_(ok)
        handle = _all_gather(gathered.view(-1), mine, group=self.process_group, async_op=True)
        results = [(run, run.slot(part), bucket.flags(run, part))
                   for part, runs in zip(gathered, bucket.runs) for run in runs]
        return bucket, results, handle, mine

    def _apply(self, bucket: Bucket, results: list, handle, mine: Tensor | None) -> None:
        """Change the weights of a bucket, on every rank with the same numbers."""
        if handle is not None:
            handle.wait()
        for run, value, ok in results:
            W = run.of(run.param)
            if self.param_groups[run.group]["split_mantissa"]:
                W.copy_(value.reshape(W.shape))
            else:
                self._decay_and_step(W, value.reshape(W.shape), ok, *self._rates(run))
        self._skipped += bucket.num_units - torch.cat([ok for _, _, ok in results]).sum(dtype=torch.int64)

    @torch.no_grad()
    def _gather_state(self, to: int | None = None) -> dict[Tensor, dict[str, Tensor]] | None:
        """All state in full shape per parameter, on rank `to` or (None) on all ranks. All ranks call it."""
        state, keep = {}, to in (None, self.rank)
        for owner, run in ((r, run) for bucket in self.buckets for r, mine in enumerate(bucket.runs) for run in mine):
            for key, part in self._state(run).items():
                if self.world_size > 1:  # as bytes: no backend sends int16
                    dist.broadcast(part.view(torch.uint8), group_src=owner, group=self.process_group)
                if keep:
                    shape = (len(run.param), *part.shape[1:]) if run.param.ndim == 3 else part.shape[1:]
                    run.of(state.setdefault(run.param, {}).setdefault(key, part.new_empty(shape))).copy_(part)
            if owner != self.rank:
                run.state.clear()
        return state if keep else None

    @torch.no_grad()
    def _scatter_state(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        """Take my part of what `_gather_state` returned. What is absent starts at zero."""
        for run in (run for bucket in self.buckets for run in bucket.runs[self.rank]):
            run.state.clear()
            for key, whole in state.get(run.param, {}).items():
                if key in (mine := self._state(run)):
                    mine[key].copy_(run.of(whole))

    def consolidate_state_dict(self, to: int | None = None) -> None:
        """Bring the state of all owners to all ranks, or to rank `to`, for the next state_dict(). All ranks call it."""
        self._check_world()
        self._consolidated = self._gather_state(to)

    def state_dict(self) -> dict:
        """torch's layout at any number of ranks: {parameter number: {"momentum_buffer": fp32 in full shape, ...}}."""
        expect(self.world_size == 1 or self._consolidated is not None, "expected the state of all ranks", "this rank's "
               "share only", "call consolidate_state_dict() on every rank after the last step, and then state_dict()",
               RuntimeError)
        self.state.update(self._consolidated or self._gather_state())
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the whole, on every rank, from state_dict() at any number of ranks or from torch.optim.Muon."""
        groups, state = [], {}
        for number, (theirs, ours) in enumerate(zip(state_dict["param_groups"], self.param_groups)):
            theirs = dict(theirs)
            if "ns_coefficients" in theirs:  # torch.optim.Muon: the same update under other names
                theirs["coefficients"] = (tuple(theirs.pop("ns_coefficients")),)
                theirs["adjust_lr"] = theirs.pop("adjust_lr_fn") or "original"
                del theirs["eps"]
            groups.append({**{key: ours[key] for key in self.defaults}, **theirs})
            check_settings(groups[-1], number)
        for i, (p, name) in zip((i for group in groups for i in group["params"]), self._names.items()):
            state[p] = state_dict["state"].get(i, {})
            found = tuple(state[p].get("momentum_buffer", p).shape)
            expect(found == p.shape, f"{name}: expected a momentum_buffer of shape {tuple(p.shape)}", found,
                   "load a checkpoint of this model")
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})  # torch would round fp32 to bf16
        self._scatter_state(state)
        self._consolidated = None
