"""Muon for one process or many: momentum, then the nearest semi-orthogonal matrix, with the work shared over ranks.

For every weight matrix W with gradient G, at learning rate lr, weight decay wd and momentum mu:

    M <- mu M + (1 - mu) G                        momentum, fp32
    U  = (1 - mu) G + mu M                        Nesterov look-ahead (or U = M)
    O  = orthogonalize(U)                         all singular values near 1, by Newton-Schulz
    O <- O / sqrt(V), rescaled to its old norm    only with normuon_beta2; V: running mean square per row or column
    W <- W - lr wd W                              decoupled decay (cautious: only entries where O W >= 0)
    W <- W - lr scale O                           scale: see `lr_scale`

Legend: m x n is a matrix as stored, s and l its short and long side, B matrices in a stack, K Newton-Schulz steps,
R ranks. A 2-D parameter is one matrix, a 3-D parameter (k, m, n) is a bank of k independent matrices, and a convolution
(o, i, h, w) is the matrix (o, i h w). Each matrix is a *unit* with one owner among the ranks. The owner alone keeps its
momentum and runs its Newton-Schulz iteration; everybody receives the rounded result and applies it. Units are placed by
FLOPs, and travel in *buckets*: while one bucket is gathered the next one is computed. A unit whose gradient is missing
or not finite is skipped on all ranks alike: a flag travels beside the data, so nothing waits for the host.

Use it for the hidden matrices of a network. Embeddings, the output head, gains and biases belong to AdamW.

Sources: Muon, https://kellerjordan.github.io/posts/muon/; decay and RMS matching, arXiv 2502.16982 (Moonlight);
default coefficients, arXiv 2505.16932 (Polar Express); variance normalization, arXiv 2510.05491 (NorMuon);
cautious decay, arXiv 2510.12402.
"""

import hashlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------------
# Newton-Schulz

# name -> (safety, (a, b, c) per step). A step maps each singular value x to a x + b x^3 + c x^5. The matrix enters with
# Frobenius norm 1 / safety. Steps beyond the end of a list repeat its last entry.
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


def ns_schedule(coefficients: str | Sequence, steps: int) -> tuple[float, list]:
    """(safety, one (a, b, c) per step) for a name in COEFFICIENTS or a sequence of triples."""
    if isinstance(coefficients, str) and coefficients not in COEFFICIENTS:
        raise ValueError(f"Muon: coefficients: expected one of {sorted(COEFFICIENTS)} or a sequence of (a, b, c), "
                         f"found {coefficients!r}; pick a name from the list")
    safety, triples = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else (1.0, coefficients)
    if not len(triples) or any(not isinstance(t, Sequence) or len(t) != 3 for t in triples):
        raise ValueError(f"Muon: coefficients: expected a sequence of (a, b, c), found {triples!r}; "
                         "write [(a, b, c)] to use one triple for every step")
    return safety, [triples[min(i, len(triples) - 1)] for i in range(steps)]


def wire_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it fast; on CPUs without such units it is four times slower than fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalize(G: Tensor, steps: int = 5, coefficients: str | Sequence = "polar",
                  dtype: torch.dtype | None = None) -> Tensor:
    """Approximate U V^T of the SVD U S V^T of every (m, n) matrix of G: (..., m, n), which is not modified.
    The iteration runs in `dtype` (default: `wire_dtype`), which is also the result's. Only the direction of G counts:
    dividing by the largest entry first keeps the squares in range from 1e-30 to 1e30. Zero in, zero out."""
    if G.size(-2) > G.size(-1):
        return orthogonalize(G.mT, steps, coefficients, dtype).mT  # the Gram matrix is smallest on the short side
    safety, schedule = ns_schedule(coefficients, steps)
    X = G.reshape(-1, *G.shape[-2:]).float()
    tiny = torch.finfo(torch.float32).tiny
    X = X / X.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
    X = X / (X.norm(dim=(-2, -1), keepdim=True).clamp(min=tiny) * safety)
    X = X.to(dtype or wire_dtype(G.device))
    for a, b, c in schedule:
        A = X @ X.mT
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, P, X, beta=a)
    return X.reshape(G.shape)


# ----------------------------------------------------------------------------------------------------------------------
# The update of one stack of B equal matrices: pure functions of tensors, so that torch.compile can fuse each of them

ADJUST_LR = {
    "original": lambda m, n: math.sqrt(max(1, m / n)),                 # Keller Jordan; torch calls it the same
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),        # Moonlight: root mean square 0.2, as AdamW's
    "spectral": lambda m, n: math.sqrt(m / n),                         # unclamped: below 1 for wide matrices
    None: lambda m, n: 1.0,
}


def lr_scale(adjust_lr: str | None, m: int, n: int) -> float:
    """The factor on lr for an m x n matrix. Weight decay never sees it: decay is lr wd in every convention."""
    if adjust_lr not in ADJUST_LR:
        raise ValueError(f"Muon: adjust_lr: expected one of {list(ADJUST_LR)}, found {adjust_lr!r}; pick one of these")
    return ADJUST_LR[adjust_lr](m, n)


def momentum_update(M: Tensor, G: Tensor, mu, nesterov: bool) -> tuple[Tensor, Tensor]:
    """The direction U, and which of the B gradients are finite. M (B, m, n) fp32 moves in place where they are."""
    ok = torch.isfinite(G.abs().amax((-2, -1)))
    G = torch.where(ok[:, None, None], G.float(), M)  # blending M with M leaves M as it is
    M.lerp_(G, 1 - mu)
    return (G.lerp(M, mu) if nesterov else M), ok


def normalize_variance(O: Tensor, V: Tensor, ok: Tensor, beta2) -> Tensor:
    """NorMuon: divide each row (m >= n) or column (m < n) of O by its running root mean square, keep O's norm.
    V is (B, m, 1) or (B, 1, n) fp32 and moves in place where ok. It starts at 0 without bias correction, as the
    rescaling cancels any common factor."""
    O = O.float()
    dim = -1 if V.size(-1) == 1 else -2
    square = O.square().mean(dim, keepdim=True)
    V.lerp_(torch.where(ok[:, None, None], square, V), 1 - beta2)
    inverse = V.clamp(min=1e-10).rsqrt()
    before = square.sum((-2, -1), keepdim=True).sqrt()  # both norms lack the same factor sqrt(O.size(dim))
    after = (square * inverse.square()).sum((-2, -1), keepdim=True).sqrt()
    return O * (inverse * (before / after.clamp(min=1e-10)))


def decay_and_step(W: Tensor, O: Tensor, ok: Tensor, lr, decay, cautious: bool) -> None:
    """W <- W - decay W - lr O in place, in fp32, with one rounding. A matrix that is not ok keeps its bits.
    W, O: (B, ...); ok: (B,) bool, or 0 and 1 as they come off the wire; decay is a fraction, already times lr."""
    X = W if W.dtype.itemsize >= 4 else W.float()
    O, ok = O.to(X.dtype), ok.to(X.dtype).view(-1, *[1] * (W.ndim - 1))
    keep = 1 - decay * ok
    if cautious:
        keep = torch.where(O * X >= 0, keep, 1.0)
    X.mul_(keep).addcmul_(O, -lr * ok)
    if X is not W:
        W.copy_(X)


def join_mantissa(W: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers whose upper halves are the bf16 W and whose lower halves are the int16 `low`."""
    return ((W.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def step_master(W: Tensor, low: Tensor, O: Tensor, ok: Tensor, lr, decay, cautious: bool) -> Tensor:
    """`decay_and_step` on the fp32 master weights of the bf16 W (B, m, n), which is not modified.
    Returns the new upper halves as bf16 and leaves the new lower halves in `low`."""
    master = join_mantissa(W, low)
    decay_and_step(master, O, ok, lr, decay, cautious)
    bits = master.view(torch.int32)
    low.copy_(bits.to(torch.int16))  # keeps the lower 16 bits
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------------------
# Who computes what

@dataclass(frozen=True)
class Plan:
    buckets: list[list[list[int]]]  # bucket -> rank -> indices of the units it owns, neighbours alike in shape
    loads: list[int]                # Newton-Schulz FLOPs per rank and step

    @property
    def efficiency(self) -> float:
        """Mean load over the busiest rank's: 1 is perfect balance."""
        return sum(self.loads) / (len(self.loads) * max(self.loads))


def ns_flops(m: int, n: int, steps: int) -> int:
    s, l = min(m, n), max(m, n)
    return steps * (4 * s * s * l + 2 * s**3)


def plan_units(units: Sequence[tuple[int, int, int]], world_size: int, cap: int) -> Plan:
    """Place units (m, n, steps): the costliest first, each on the least loaded rank (longest processing time first).
    A bucket closes once every rank has `cap` elements in it; loads carry over. The cheapest units come last, because
    the last gather is the one that no computation hides. Depends on its arguments only, so all ranks plan alike."""
    cost = [ns_flops(*unit) for unit in units]
    loads, fill = [0] * world_size, [0] * world_size
    buckets = [[[] for _ in range(world_size)]]
    for u in sorted(range(len(units)), key=lambda u: (-cost[u], u)):
        if min(fill) >= cap:
            buckets.append([[] for _ in range(world_size)])
            fill = [0] * world_size
        rank = min(range(world_size), key=lambda r: (loads[r], fill[r], r))
        buckets[-1][rank].append(u)
        loads[rank] += cost[u]
        fill[rank] += units[u][0] * units[u][1]

    def alike(u):
        m, n, _ = units[u]
        return min(m, n), max(m, n), m, u
    return Plan([[sorted(ids, key=alike) for ids in bucket] for bucket in buckets], loads)


def num_matrices(p: Tensor) -> int:
    return p.size(0) if p.ndim == 3 else 1


def matrix_shape(p: Tensor) -> tuple[int, int]:
    return (p.size(1), p.size(2)) if p.ndim == 3 else (p.size(0), p.numel() // p.size(0))


@dataclass
class Piece:
    """Matrices first, first + stride, ... of one parameter, which are matrices start, start + 1, ... of a run."""
    param: Tensor
    first: int
    start: int
    stride: int = 1
    count: int = 1

    def of(self, x: Tensor) -> Tensor:
        """The view (count, ...) of a tensor shaped like the parameter."""
        return x[self.first:self.first + self.stride * self.count:self.stride] if x.ndim == 3 else x.unsqueeze(0)

    def within(self, stack: Tensor) -> Tensor:
        """The same matrices in a stack that covers the run."""
        return stack[self.start:self.start + self.count]


@dataclass
class Run:
    """Equal matrices of one group that lie side by side in their owner's part of a bucket: B of them, (B, m, n)."""
    group: int    # index into param_groups
    shape: tuple  # (B, m, n)
    first: int    # position of the first flag among the owner's flags
    offset: int   # and of the first element among the owner's elements
    pieces: list[Piece]
    state: dict[str, Tensor] = field(default_factory=dict)  # on the owner only; allocated at first use

    def within(self, flat: Tensor) -> Tensor:
        return flat[self.offset:self.offset + math.prod(self.shape)].view(self.shape)

    def flags(self, flat: Tensor) -> Tensor:
        return flat[self.first:self.first + self.shape[0]]


def make_runs(units: Sequence[tuple[int, Tensor, int]], single: bool) -> list[Run]:
    """Runs of one rank in one bucket, from (group, parameter, matrix index) in order. single: one matrix per run."""
    runs, first, offset = [], 0, 0
    for key, members in groupby(enumerate(units), lambda e: (e[1][0], matrix_shape(e[1][1]), e[0] if single else 0)):
        pieces = []
        for start, (_, (_, p, index)) in enumerate(members):
            last = pieces[-1] if pieces else None
            if last and last.param is p and (last.count == 1 or index == last.first + last.stride * last.count):
                last.stride, last.count = (index - last.first) // last.count, last.count + 1
            else:
                pieces.append(Piece(p, index, start))
        shape = (start + 1, *key[1])
        runs.append(Run(key[0], shape, first, offset, pieces))
        first, offset = first + shape[0], offset + math.prod(shape)
    return runs


@dataclass
class Bucket:
    runs: list[list[Run]]  # per rank

    def __post_init__(self):
        self.num_units = sum(run.shape[0] for runs in self.runs for run in runs)
        self.num_flags = max(sum(run.shape[0] for run in runs) for runs in self.runs)          # per rank, padded
        self.chunk = max(sum(math.prod(run.shape) for run in runs) for runs in self.runs)      # elements, likewise
        dtypes = {piece.param.dtype for runs in self.runs for run in runs for piece in run.pieces}
        self.grad_dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


# torch 2.13 renamed both. Outputs stay flat: gloo refuses the stacked form that NCCL accepts.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

# ----------------------------------------------------------------------------------------------------------------------
# The optimizer


class Muon(torch.optim.Optimizer):
    """Muon over the ranks of `process_group` (default: all ranks; one process needs no torch.distributed at all).

    Settings of a group, which may change between steps: lr (a number or a 0-D tensor), momentum, nesterov, weight_decay,
    ns_steps, coefficients, adjust_lr, cautious, normuon_beta2 (None: off), split_mantissa.
    split_mantissa: bf16 parameters whose owner keeps the lower 16 bits too, so that the weights are fp32 in truth.
    ns_dtype: dtype of the iteration and of the gathered updates, default `wire_dtype`.
    sync_grads: gradients differ per rank and the optimizer averages them, in bf16 where all parameters of a bucket are
    bf16, else in fp32. `start()` launches that early. Without it gradients must already be equal on all ranks, as DDP
    leaves them. p.grad is read, never written.
    bucket_mb: fp32 megabytes per rank and bucket, which bounds the working memory.
    deterministic: one matrix per call, so that the bits do not depend on the number of ranks or buckets.
    compile: fuse the update functions with torch.compile."""

    def __init__(self, params, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0, ns_steps=5,
                 coefficients="polar", adjust_lr="original", cautious=False, normuon_beta2=None, split_mantissa=False,
                 ns_dtype=None, process_group=None, sync_grads=False, bucket_mb=16, deterministic=False, compile=False):
        if ns_dtype not in (None, torch.bfloat16, torch.float32):
            raise ValueError(f"Muon: ns_dtype: expected None, torch.bfloat16 or torch.float32, found {ns_dtype}; "
                             "leave it out to choose by device")
        if not bucket_mb > 0:
            raise ValueError(f"Muon: bucket_mb: expected a size above 0, found {bucket_mb}; leave it out for 16")
        self.process_group, self.sync_grads, self.bucket_mb = process_group, sync_grads, bucket_mb
        self.deterministic, self.compile, self.ns_dtype = deterministic, compile, ns_dtype
        self.world_size, self.rank = self._find_world()
        self.buckets: list[Bucket] = []
        self._pending = self._consolidated = None
        self._slots, self._skipped = [], 0
        self._functions = {}
        for function in (momentum_update, orthogonalize, normalize_variance, decay_and_step, step_master):
            self._functions[function] = torch.compile(function, dynamic=False, fullgraph=True) if compile else function
        if compile:  # every stack shape is a graph of its own
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        super().__init__(params, dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, ns_steps=ns_steps,
            coefficients=coefficients, adjust_lr=adjust_lr, cautious=cautious, normuon_beta2=normuon_beta2,
            split_mantissa=split_mantissa))
        self._lay_out()

    @property
    def skipped(self) -> int:
        """Matrices skipped so far for want of a finite gradient, over all ranks and steps. Reading it waits."""
        return int(self._skipped)

    @property
    def _device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device

    # --- checks ---

    def _find_world(self) -> tuple[int, int]:
        if not (dist.is_available() and dist.is_initialized()):
            return 1, 0
        size, rank = dist.get_world_size(self.process_group), dist.get_rank(self.process_group)
        if rank < 0:
            raise ValueError("Muon: process_group: expected a group with this rank in it, found one without; "
                             "build the optimizer on the group's own ranks only")
        return size, rank

    def _check_world(self) -> None:
        if (found := self._find_world()[0]) != self.world_size:
            raise ValueError(f"Muon: expected {self.world_size} rank(s) as at construction, found {found}; "
                             "call torch.distributed.init_process_group first and build the optimizer after it")

    def add_param_group(self, group: dict) -> None:
        """Check and add a group. After construction all ranks must call it together: the units are placed anew."""
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        number, seen = len(self.param_groups), {p for other in self.param_groups for p in other["params"]}
        for i, item in enumerate(params):
            name, p = item if isinstance(item, tuple) else (f"parameter {i} of group {number}", item)
            name = group["param_names"][i] if "param_names" in group else name
            self._check_param(name, p, group.get("split_mantissa", self.defaults["split_mantissa"]), seen)
            seen.add(p)
        self._check_settings({**self.defaults, **group}, number)
        super().add_param_group({**group, "params": params})
        if self.buckets:
            self._lay_out()

    @staticmethod
    def _check_param(name: str, p: Tensor, split_mantissa: bool, seen: set) -> None:
        def refuse(expected, found, remedy):
            raise ValueError(f"Muon: {name}: expected {expected}, found {found}; {remedy}")
        if not isinstance(p, Tensor):
            refuse("a tensor", type(p).__name__, "pass parameters or (name, parameter) pairs")
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            refuse("a real floating-point parameter", p.dtype, "leave it to another optimizer")
        if p.ndim < 2:
            refuse("a matrix, a bank of matrices or a convolution", f"shape {tuple(p.shape)}", "give it to AdamW")
        if p.numel() == 0:
            refuse("at least one element", f"shape {tuple(p.shape)}", "leave it out")
        if p in seen:
            refuse("each parameter once", "it a second time", "remove one of the two (tied weights count once)")
        if split_mantissa and p.dtype != torch.bfloat16:
            refuse("bfloat16 with split_mantissa", p.dtype, "turn split_mantissa off for it")

    @staticmethod
    def _check_settings(group: dict, number: int) -> None:
        def require(holds, key, expected):
            if not holds:
                raise ValueError(f"Muon: {key} of group {number}: expected {expected}, found {group[key]!r}; change it")
        lr, beta2 = group["lr"], group["normuon_beta2"]
        require(not isinstance(lr, Tensor) or lr.numel() == 1, "lr", "one number")
        require(float(lr) >= 0, "lr", "0 or more")
        require(0 <= group["momentum"] < 1, "momentum", "0 <= momentum < 1")
        require(group["weight_decay"] >= 0, "weight_decay", "0 or more")
        require(isinstance(group["ns_steps"], int) and group["ns_steps"] > 0, "ns_steps", "a whole number above 0")
        require(beta2 is None or 0 <= beta2 < 1, "normuon_beta2", "None or 0 <= beta2 < 1")
        ns_schedule(group["coefficients"], group["ns_steps"])
        lr_scale(group["adjust_lr"], 1, 1)

    def _named(self):
        """(group number, name, parameter) of all parameters in order."""
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"parameter {i} of group {number}" for i in range(len(group["params"]))]
            yield from ((number, name, p) for name, p in zip(names, group["params"]))

    def _check_ranks_agree(self) -> None:
        """Ranks that disagree would hang or mix up their matrices: raise on all of them, naming the difference."""
        lines = [f"{key}={getattr(self, key)}" for key in ("ns_dtype", "sync_grads", "bucket_mb", "deterministic")]
        lines += [f"group {number}: " + ", ".join(f"{key}={group[key]}" for key in self.defaults)
                  for number, group in enumerate(self.param_groups)]
        lines += [f"{name}: shape {tuple(p.shape)}, {p.dtype}, group {number}" for number, name, p in self._named()]
        found = [None] * self.world_size
        dist.all_gather_object(found, hashlib.sha256("\n".join(lines).encode()).hexdigest(), group=self.process_group)
        if len(set(found)) == 1:
            return
        dist.all_gather_object(found, lines, group=self.process_group)
        rank = next(r for r in range(self.world_size) if found[r] != found[0])
        ours, theirs = next(pair for pair in zip_longest(found[0], found[rank], fillvalue="nothing") if len(set(pair)) > 1)
        raise ValueError(f"Muon: expected the same parameters and settings on all ranks, found '{ours}' on rank 0 and "
                         f"'{theirs}' on rank {rank}; build the optimizer alike everywhere")

    # --- layout ---

    def _lay_out(self) -> None:
        """Plan the units and cut buckets into runs. State that exists already moves to its new owners."""
        state = self._gather_state() if self.buckets else {}
        params = [p for _, _, p in self._named()]
        if len(devices := {p.device for p in params}) > 1:
            raise ValueError(f"Muon: expected all parameters on one device, found {sorted(map(str, devices))}; "
                             "move them or build one optimizer per device")
        if self.world_size > 1:
            self._check_ranks_agree()
        units = [(number, p, i) for number, _, p in self._named() for i in range(num_matrices(p))]
        costs = [(*matrix_shape(p), self.param_groups[number]["ns_steps"]) for number, p, _ in units]
        self.plan = plan_units(costs, self.world_size, int(self.bucket_mb * 2**20 / 4))
        self.buckets = [Bucket([make_runs([units[u] for u in ids], self.deterministic) for ids in ranks])
                        for ranks in self.plan.buckets]
        self._slots = []
        self._scatter_state(state)

    def _buffer(self, run: Run, key: str) -> Tensor:
        """One kind of state of a run that this rank owns, zero at first use."""
        if key not in run.state:
            B, m, n = run.shape
            shape = run.shape if key != "second_moment" else (B, m, 1) if m >= n else (B, 1, n)
            run.state[key] = torch.zeros(shape, dtype=torch.int16 if key == "mantissa" else torch.float32,
                                         device=self._device)
        return run.state[key]

    # --- the step ---

    @torch.no_grad()
    def start(self) -> None:
        """With sync_grads: begin to average all gradients and return at once. step() calls it if nobody has."""
        self._check_world()
        if self._pending is None:
            reduce = self.sync_grads and self.world_size > 1
            self._pending = [self._reduce(bucket) if reduce else None for bucket in self.buckets]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.start()                                                  # 1: all reductions are under way
        pending, self._pending, self._consolidated = self._pending, None, None
        inflight = deque()
        for number, (bucket, reduction) in enumerate(zip(self.buckets, pending)):
            results = self._update(bucket, reduction)                 # 2: compute what I own,
            inflight.append(self._gather(bucket, results, number % 2))  # send it on its way,
            if len(inflight) == min(2, self.world_size):
                self._apply(*inflight.popleft())                      # 3: and meanwhile apply the bucket before
        while inflight:
            self._apply(*inflight.popleft())
        return loss

    def _reduce(self, bucket: Bucket):
        """Launch the sum of one bucket's gradients, each owner receiving its own part."""
        packed = torch.empty(self.world_size, bucket.chunk, dtype=bucket.grad_dtype, device=self._device)
        targets, sources = [], []
        for flat, runs in zip(packed, bucket.runs):
            for run in runs:
                for piece in run.pieces:
                    target = piece.within(run.within(flat))
                    if piece.param.grad is None:
                        target.fill_(float("nan"))  # makes the mean NaN, so that the owner skips the matrix
                    else:
                        targets.append(target)
                        sources.append(piece.of(piece.param.grad).reshape(target.shape))
        if targets:
            torch._foreach_copy_(targets, sources)
        mine = torch.empty(bucket.chunk, dtype=bucket.grad_dtype, device=self._device)
        handle = _reduce_scatter(mine, packed.view(-1), group=self.process_group, async_op=True)
        return handle, mine, packed  # packed must live until the wait

    def _gradient(self, run: Run, mean: Tensor | None) -> Tensor:
        """(B, m, n) gradients of a run I own. Missing ones are NaN. May be p.grad itself: read only."""
        if mean is not None:
            return run.within(mean)
        parts = [piece.of(piece.param.grad).reshape(-1, *run.shape[1:]) if piece.param.grad is not None else
                 torch.full((piece.count, *run.shape[1:]), float("nan"), device=piece.param.device)
                 for piece in run.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _scalar(self, x):
        """Numbers go into compiled functions as tensors: a number would be compiled in, anew for each new value."""
        return torch.as_tensor(x, dtype=torch.float32).reshape(()) if self.compile else x

    def _rates(self, group: dict, m: int, n: int) -> tuple:
        """(lr on the update, fraction to decay)."""
        lr, scale = group["lr"], lr_scale(group["adjust_lr"], m, n)
        return self._scalar(lr * scale), self._scalar(lr * group["weight_decay"])

    def _update(self, bucket: Bucket, reduction) -> list[tuple[Run, Tensor, Tensor]]:
        """(run, update (B, m, n) or new weights with split_mantissa, ok (B,)) for everything I own in the bucket."""
        mean = None
        if reduction is not None:
            reduction[0].wait()
            mean = reduction[1].float().div_(self.world_size)
        call, classes, results = self._functions, {}, []
        for run in bucket.runs[self.rank]:
            group, (B, m, n) = self.param_groups[run.group], run.shape
            U, ok = call[momentum_update](self._buffer(run, "momentum_buffer"), self._gradient(run, mean),
                                          self._scalar(group["momentum"]), group["nesterov"])
            key = (min(m, n), max(m, n), group["ns_steps"], str(group["coefficients"]), run.first * self.deterministic)
            classes.setdefault(key, []).append((run, U if m <= n else U.mT, ok))
        for members in classes.values():  # one iteration for all matrices of a class, tall ones lying on their side
            group, stacks = self.param_groups[members[0][0].group], [U for _, U, _ in members]
            O = call[orthogonalize](stacks[0] if len(stacks) == 1 else torch.cat(stacks), group["ns_steps"],
                                    group["coefficients"], self.ns_dtype)
            for (run, _, ok), part in zip(members, O.split([run.shape[0] for run, _, _ in members])):
                results.append((run, self._finish(run, part if part.shape[1:] == run.shape[1:] else part.mT, ok), ok))
        return results

    def _finish(self, run: Run, O: Tensor, ok: Tensor) -> Tensor:
        """What travels for a run: its update, variance normalized if asked for, or the new bf16 weights."""
        group, call, dtype = self.param_groups[run.group], self._functions, O.dtype
        if group["normuon_beta2"] is not None:
            O = call[normalize_variance](O, self._buffer(run, "second_moment"), ok, self._scalar(group["normuon_beta2"]))
        O = O.to(dtype)  # rounded for everybody, the owner and a lone rank included
        if not group["split_mantissa"]:
            return O
        W = torch.cat([piece.of(piece.param).reshape(-1, *run.shape[1:]) for piece in run.pieces])
        return call[step_master](W, self._buffer(run, "mantissa"), O, ok, *self._rates(group, *run.shape[1:]),
                                 group["cautious"])

    def _gather(self, bucket: Bucket, results: list, slot: int) -> tuple:
        """Launch the exchange of one bucket: (bucket, handle, the results of all ranks, valid after handle.wait())."""
        if self.world_size == 1:
            return bucket, None, results
        if not self._slots:  # two, used in turn: a slot is free again once the bucket before the last was applied
            size = max(b.chunk + b.num_flags for b in self.buckets)
            dtype = self.ns_dtype or wire_dtype(self._device)
            self._slots = [torch.empty((1 + self.world_size) * size, dtype=dtype, device=self._device) for _ in "ab"]
        size = bucket.chunk + bucket.num_flags
        mine, everything = self._slots[slot][:(1 + self.world_size) * size].split([size, self.world_size * size])
        mine[bucket.chunk:].zero_()
        for run, value, ok in results:
            run.within(mine).copy_(value)
            run.flags(mine[bucket.chunk:]).copy_(ok)
        handle = _all_gather(everything, mine, group=self.process_group, async_op=True)
        return bucket, handle, [(run, run.within(row), run.flags(row[bucket.chunk:]))
                                for row, runs in zip(everything.view(self.world_size, size), bucket.runs) for run in runs]

    def _apply(self, bucket: Bucket, handle, results: list) -> None:
        """Change the weights of one bucket, on every rank with the same numbers."""
        if handle is not None:
            handle.wait()
        for run, value, ok in results:
            group = self.param_groups[run.group]
            rates = self._rates(group, *run.shape[1:])
            for piece in run.pieces:
                W = piece.of(piece.param)
                V = piece.within(value).reshape(W.shape)
                if group["split_mantissa"]:
                    W.copy_(V)
                else:
                    self._functions[decay_and_step](W, V, piece.within(ok), *rates, group["cautious"])
        self._skipped += bucket.num_units - torch.cat([ok for _, _, ok in results]).sum(dtype=torch.int64)

    # --- checkpoints: {parameter number: {"momentum_buffer": ..., ...}} in full shape, as torch.optim.Muon has them ---

    def _state_keys(self, run: Run) -> list[str]:
        group = self.param_groups[run.group]
        return ["momentum_buffer", *["second_moment"] * (group["normuon_beta2"] is not None),
                *["mantissa"] * group["split_mantissa"]]

    def _gather_state(self, to: int | None = None) -> dict[Tensor, dict[str, Tensor]] | None:
        """The state of all parameters, put together on rank `to` or (None) on all ranks. All ranks call it."""
        state = {p: {} for _, _, p in self._named()}
        keep = to is None or to == self.rank
        for owner, run in ((r, run) for bucket in self.buckets for r, runs in enumerate(bucket.runs) for run in runs):
            for key in self._state_keys(run):
                stack = self._buffer(run, key)
                if self.world_size > 1:
                    dist.broadcast(stack.view(torch.uint8), group_src=owner, group=self.process_group)
                for piece in run.pieces if keep else ():
                    p = piece.param
                    shape = p.shape if key != "second_moment" else (*p.shape[:p.ndim == 3], *stack.shape[1:])
                    whole = state[p].setdefault(key, torch.empty(shape, dtype=stack.dtype, device=stack.device))
                    target = piece.of(whole)
                    target.copy_(piece.within(stack).reshape(target.shape))
            if owner != self.rank:
                run.state.clear()
        return state if keep else None

    def _scatter_state(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        """Take my part of what `_gather_state` returned. What is absent starts at zero."""
        for run in (run for bucket in self.buckets for run in bucket.runs[self.rank]):
            run.state.clear()
            for key in self._state_keys(run):
                for piece in run.pieces:
                    if key in state.get(piece.param, {}):
                        target = piece.within(self._buffer(run, key))
                        target.copy_(piece.of(state[piece.param][key]).reshape(target.shape))

    @torch.no_grad()
    def consolidate_state_dict(self, to: int | None = None) -> None:
        """Bring the state of all owners to all ranks, or to rank `to`, for the next state_dict(). All ranks call it."""
        self._check_world()
        self._consolidated = self._gather_state(to)

    @torch.no_grad()
    def state_dict(self) -> dict:
        if self.world_size > 1 and self._consolidated is None:
            raise RuntimeError("Muon: expected the state of all ranks to be consolidated, found only this rank's share; "
                               "call consolidate_state_dict() on every rank, after the last step, then state_dict()")
        self.state.update(self._consolidated or self._gather_state())
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load what state_dict() gave at any number of ranks, or torch.optim.Muon's. Every rank loads the whole."""
        groups, saved = [], [i for group in state_dict["param_groups"] for i in group["params"]]
        for number, (theirs, ours) in enumerate(zip(state_dict["param_groups"], self.param_groups)):
            theirs = dict(theirs)
            if "ns_coefficients" in theirs:  # torch.optim.Muon: the same update under other names
                theirs["coefficients"] = (tuple(theirs.pop("ns_coefficients")),)
                theirs["adjust_lr"] = theirs.pop("adjust_lr_fn") or "original"
                del theirs["eps"]
            groups.append({**{key: ours[key] for key in self.defaults}, **theirs})
            self._check_settings(groups[-1], number)
        state = {}
        for i, (_, name, p) in zip(saved, self._named()):
            state[p] = entry = state_dict["state"].get(i, {})
            if "momentum_buffer" in entry and entry["momentum_buffer"].shape != p.shape:
                raise ValueError(f"Muon: {name}: expected a momentum_buffer of shape {tuple(p.shape)}, found "
                                 f"{tuple(entry['momentum_buffer'].shape)}; load the checkpoint of this model")
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})  # would round fp32 to bf16
        self._scatter_state(state)
        self._consolidated = None
