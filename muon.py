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
rows. This file is the optimizer, newton_schulz.py has `orthogonalize`, muon_ranks.py shares the work out over ranks; for
DTensor parameters (FSDP2) muon_fsdp.py does so. Take them into another project: they need nothing but torch.

Use it for the hidden matrices of a network. Embeddings, the output head, gains and biases belong to AdamW;
muon_tools.py proposes which is which.

Sources: Muon, https://kellerjordan.github.io/posts/muon/; decay and RMS matching, arXiv 2502.16982 (Moonlight);
default coefficients, arXiv 2505.16932 (Polar Express); variance normalization, arXiv 2510.05491 (NorMuon); cautious
decay, arXiv 2510.12402; iteration on the Gram matrix, https://github.com/Dao-AILab/gram-newton-schulz.
"""

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from muon_ranks import (Bucket, Unit, as_bank, expect_agreement, plan_units, state_kinds, state_shape, units_of, whole,
                        world_and_rank)
from newton_schulz import (COEFFICIENTS, FORMS, expect, gram_pays, is_schedule, iteration_dtype, largest,
                           newton_schulz_flops, orthogonalize, symmetric_product)

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
    ok = torch.isfinite(largest(G).float())  # fp64 may be finite there only
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
# The optimizer

def is_split(x) -> bool:
    return x is None or all(type(m) is int and m > 0 for m in (x if isinstance(x, Sequence) and len(x) else (x,)))


def is_rate(x) -> bool:
    if isinstance(x, Tensor):  # on a GPU its value stays there: reading it would make the host wait
        return x.numel() == 1 and (not x.is_cpu or 0 <= float(x) < math.inf)
    return isinstance(x, (int, float)) and 0 <= x < math.inf


RULES = {  # setting of a group -> (what is expected, test)
    "lr": ("one number, 0 or more", is_rate),
    "momentum": ("0 <= momentum < 1", lambda x: 0 <= x < 1),
    "weight_decay": ("0 or more", is_rate),
    "ns_steps": ("a whole number above 0", lambda x: type(x) is int and x > 0),
    "coefficients": (f"one of {list(COEFFICIENTS)} or a sequence of (a, b, c)", is_schedule),
    "ns_form": (f"one of {FORMS}", lambda x: x in FORMS),
    "adjust_lr": (f"one of {list(ADJUST_LR)}", lambda x: x in ADJUST_LR),
    "normuon_beta2": ("None or 0 <= beta2 < 1", lambda x: x is None or 0 <= x < 1),
    "split": ("None, a number of equal blocks, or the rows of each block", is_split),
    **{key: ("True or False", lambda x: isinstance(x, bool)) for key in ("nesterov", "cautious", "split_mantissa", "flatten")},
}


def check_settings(group: dict, number: int) -> None:
    for key, (expected, rule) in RULES.items():
        try:
            holds = rule(group[key])
        except (TypeError, ValueError):  # of another kind altogether
            holds = False
        expect(holds, f"{key} of group {number}: expected {expected}", repr(group[key]), "change it")


TORCH_NAMES = "ns_coefficients", "adjust_lr_fn", "eps"


def from_torch(settings: dict) -> dict:
    """torch.optim.Muon's names for the same settings, ours first; its adjust_lr_fn=None means original, and eps, which
    would make the result depend on the gradient's scale, has no use here."""
    renamed = {key: value for key, value in settings.items() if key not in TORCH_NAMES}
    if "ns_coefficients" in settings:
        renamed.setdefault("coefficients", (tuple(settings["ns_coefficients"]),))
    if "adjust_lr_fn" in settings:
        renamed.setdefault("adjust_lr", settings["adjust_lr_fn"] or "original")
    return renamed


def for_torch(group: dict) -> dict:
    """What torch.optim.Muon reads from a saved group. It has one triple for all steps and no "spectral"."""
    triples = COEFFICIENTS["jordan"][1] if isinstance(group["coefficients"], str) else group["coefficients"]
    return {**group, "ns_coefficients": triples[-1], "adjust_lr_fn": group["adjust_lr"] or "none", "eps": 1e-7}


def fuse(function):
    """Compile once per shape. Numbers enter as tensors: a number would be compiled in, anew for every value."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    fused = torch.compile(function, dynamic=False, fullgraph=True)
    return lambda *args: fused(*(torch.tensor(x, dtype=torch.float32) if isinstance(x, float) else x for x in args))


def rebuild(kind: type, groups: list[dict], options: dict, state: dict, skipped) -> "Muon":
    """From a pickle."""
    optimizer = kind(groups, **options)
    optimizer.load_state_dict(state)
    optimizer._skipped = skipped
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
    bucket_mb: fp32 megabytes per rank and bucket, which also bounds the working memory: two exchanges are in flight at most.
    deterministic: one matrix per call, so that the bits do not depend on the number of ranks or buckets.
    compile: fuse the update functions with torch.compile. symmetric: a kernel like `symmetric_product`."""

    def __init__(self, params, lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=True, *, ns_steps=5,
                 coefficients="polar", adjust_lr="original", cautious=False, normuon_beta2=None, split_mantissa=False,
                 split=None, flatten=False, ns_form="auto", ns_dtype=None, process_group=None, sync_grads=False,
                 bucket_mb=16, deterministic=False, compile=False, symmetric=symmetric_product, **torch_names):
        expect(ns_dtype in (None, torch.bfloat16, torch.float16, torch.float32) and bucket_mb > 0, "expected ns_dtype None, "
               "torch.bfloat16, torch.float16 or torch.float32 and bucket_mb above 0", f"{ns_dtype} and {bucket_mb}",
               "leave both out for the defaults")
        unknown = sorted(torch_names.keys() - set(TORCH_NAMES))
        expect(not unknown, "expected settings of Muon", unknown, "see its docstring", TypeError)
        self.options = dict(ns_dtype=ns_dtype, process_group=process_group, sync_grads=sync_grads, bucket_mb=bucket_mb,
                            deterministic=deterministic, compile=compile, symmetric=symmetric)
        vars(self).update(self.options)
        self.world_size, self.rank = world_and_rank(process_group)
        expect(self.rank >= 0, "expected a process_group that this rank belongs to", "another",
               "build the optimizer on the ranks of the group only")
        self.buckets, self.plans, self._names, self._consolidated, self._skipped, self._fsdp = [], [], {}, None, 0, None
        for function in (momentum_update, orthogonalize, normalize_variance, decay_and_step, step_master):
            setattr(self, f"_{function.__name__}", fuse(function) if compile else function)
        super().__init__(params, dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, ns_steps=ns_steps,
            coefficients=coefficients, adjust_lr=adjust_lr, cautious=cautious, normuon_beta2=normuon_beta2,
            split_mantissa=split_mantissa, split=split, flatten=flatten, ns_form=ns_form) | from_torch(torch_names))
        self._lay_out()

    def __reduce__(self):
        return rebuild, (type(self), self.param_groups, self.options, self.state_dict(), self._skipped)

    @property
    def skipped(self) -> int:
        """Units skipped so far for want of a finite gradient, over all steps and ranks (but only this rank's own units of
        banks that are sharded by matrices). Reading it waits."""
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
        expect(group["ns_form"] != "gram" or self.ns_dtype != torch.bfloat16, "expected fp16 or fp32 for the Gram form",
               self.ns_dtype, "leave out ns_dtype")
        expect(not isinstance(group["params"], set), "expected parameters in an order", "a set", "pass a list", TypeError)
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
        before, self._names = self._names, names
        try:
            if self.buckets:
                self._lay_out()
        except Exception:
            self.param_groups.pop()
            self._names = before
            raise

    def _facts(self, params: set[Tensor]) -> list[str]:
        """What all ranks must have alike to share the work on some parameters."""
        lines = [f"{key} {self.options[key]}" for key in ("ns_dtype", "sync_grads", "bucket_mb", "deterministic")]
        for i, group in enumerate(self.param_groups):
            mine = [f"{self._names[p]} of shape {tuple(p.shape)} in {p.dtype}" for p in group["params"] if p in params]
            lines += [*(f"{key} {group[key]} of group {i}" for key in self.defaults if key in group), *mine] if mine else []
        return lines

    def _lay_out(self) -> None:
        """Plan the units and cut them into buckets. State that exists already moves to its new owners."""
        state, lanes, buckets, plans = self._gather_state(), {}, [], []
        devices = sorted({p.device for p in self._names}, key=str)
        expect(len(devices) > 0, "expected parameters", "none", "pass the hidden matrices")
        expect(len(devices) == 1, "expected all parameters on one device", devices, "build one optimizer per device")
        self.dtype = dtype = self.ns_dtype or iteration_dtype(devices[0])
        self.wire = dtype if dtype == torch.float32 else torch.bfloat16  # dtype of updates as all ranks receive them
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                lanes.setdefault(self._lane(p, group), []).append((p, i, group))
        for (kind, process_group), members in lanes.items():
            world_size, rank = world_and_rank(process_group)
            expect_agreement(process_group, self._facts({p for p, _, _ in members}))
            kind.announce([p for p, _, _ in members])
            world_size, rank = (1, 0) if kind.alone else (world_size, rank)
            units = [unit for p, i, group in members for unit in units_of(p, kind.part(p), i, group)]
            costs = [self._cost(unit, dtype) for unit in units]
            plans.append(plan_units(costs, [u.m * u.n for u in units], world_size, max(1, int(self.bucket_mb * 1e6 / 4))))
            buckets += [kind(self, process_group, rank, [[units[u] for u in ids] for ids in bucket])
                        for bucket in plans[-1].buckets]
        buckets.sort(key=lambda bucket: bucket.alone)  # ranks may have unlike numbers of these: no exchange between them
        self.buckets, self.plans = buckets, plans
        self._scatter_state(state)

    def _lane(self, p: Tensor, group: dict) -> tuple[type[Bucket], object]:
        """(kind of bucket, process group) for a parameter."""
        if not hasattr(p, "device_mesh"):
            return Bucket, self.process_group
        try:
            from muon_extras import fsdp as muon_fsdp
        except ImportError:
            expect(False, "expected muon_fsdp.py for DTensor parameters", "none", "put it beside muon.py", ImportError)
        self._fsdp = muon_fsdp
        return muon_fsdp.lane(p, group)

    def _cost(self, unit: Unit, dtype: torch.dtype) -> int:
        group = self.param_groups[unit.group]
        return newton_schulz_flops(unit.m, unit.n, group["ns_steps"], gram_pays(unit.m, unit.n, group["ns_form"], dtype))

    def rates(self, unit: Unit) -> tuple:
        """The last arguments of `decay_and_step`."""
        group = self.param_groups[unit.group]
        return (group["lr"] * ADJUST_LR[group["adjust_lr"]](unit.m, unit.n), group["lr"] * group["weight_decay"],
                group["cautious"])

    @torch.no_grad()
    def start(self) -> None:
        """With sync_grads: begin to average the gradients of the first two buckets and return at once. step() calls it if
        nobody has."""
        self._check_world()
        for bucket in self.buckets[:2] if self.sync_grads else ():
            bucket.start()

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for number, group in enumerate(self.param_groups):
            check_settings(group, number)  # they may change between steps
        self.start()
        self._consolidated, sent = None, deque()

        def room_for(more):  # at most two exchanges are in flight
            return sum(bucket.pending is not None for bucket in self.buckets) + len(sent) + more <= 2
        try:
            for i, bucket in enumerate(self.buckets):
                bucket.start()
                bucket.receive()                                # 1: my gradients are here, those of the next bucket
                for following in self.buckets[i + 1:i + 2]:     # get under way;
                    following.start()
                results = bucket.update()                       # 2: update what I own,
                while not room_for(1):
                    self._skipped += sent.popleft().apply()     # 3: apply the bucket before,
                bucket.send(results)                            # 4: and send mine off while the next is computed
                sent.append(bucket)
                while len(sent) >= min(2, bucket.world_size):
                    self._skipped += sent.popleft().apply()
            while sent:
                self._skipped += sent.popleft().apply()
        finally:
            for bucket in self.buckets:  # after an error nothing of this step may enter the next
                bucket.pending = bucket.received = bucket.sent = None
        return loss

    def _keepers(self) -> list[Bucket]:
        """Buckets whose owners keep the state; that of DTensor parameters lies in self.state."""
        return [bucket for bucket in self.buckets if bucket.owners_keep_state]

    @torch.no_grad()
    def _gather_state(self, to: int | None = None) -> dict[Tensor, dict[str, Tensor]]:
        state = {}
        for bucket in self._keepers():
            bucket.gather_state(to, state)
        if self._fsdp:
            self._fsdp.gather_state(self, state)
        return state

    @torch.no_grad()
    def _scatter_state(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        for bucket in self._keepers():
            bucket.scatter_state(state)
        if self._fsdp:
            self._fsdp.scatter_state(self, state)

    def consolidate_state_dict(self, to: int | None = None) -> None:
        """Bring the state of all owners to all ranks, or to rank `to`, for the next state_dict(). All ranks call it."""
        self._check_world()
        state = self._gather_state(to)
        self._consolidated = state if to in (None, self.rank) else None

    def state_dict(self) -> dict:
        """torch's layout at any number of ranks: {parameter number: {"momentum_buffer": fp32 in full shape, ...}}; what
        torch.optim.Muon reads is in it too. The state of DTensor parameters is DTensors."""
        alone = all(bucket.world_size == 1 for bucket in self._keepers())
        expect(alone or self._consolidated is not None, "expected the state of all ranks", "this rank's share only",
               "call consolidate_state_dict() on every rank after the last step, and then state_dict()", RuntimeError)
        kept = dict(self.state)
        self.state.update(self._consolidated or self._gather_state())
        try:
            saved = super().state_dict()
            return {**saved, "param_groups": [for_torch(group) for group in saved["param_groups"]]}
        finally:
            self.state.clear()
            self.state.update(kept)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the whole, on every rank, from state_dict() at any number of ranks or from torch.optim.Muon."""
        groups, state, saved = [], {}, state_dict["param_groups"]
        found, kinds = [len(group["params"]) for group in saved], set().union(*state_dict["state"].values())
        expect(found == [len(group["params"]) for group in self.param_groups], "expected groups of "
               f"{[len(group['params']) for group in self.param_groups]} parameters", found, "load a checkpoint of this model")
        for number, (theirs, ours) in enumerate(zip(saved, self.param_groups)):
            settings = {key: ours[key] for key in self.defaults if key in ours} | from_torch(theirs)
            groups.append(settings | {key: ours[key] for key in ("split", "flatten", "ns_form")})  # these shape the state
            check_settings(groups[-1], number)
            known = ours.get("param_names") or ()  # other names may be the same model, wrapped
            for name, other in zip(known, theirs.get("param_names") or ()):
                expect(other == name or other not in known, f"group {number}: expected {name}", f"{other} in its place",
                       "build the optimizer with its parameters in the order of the checkpoint")
            for i, p in zip(theirs["params"], ours["params"]):
                state[p] = dict(state_dict["state"].get(i, {}))
                for key in (key for key in state_kinds(groups[-1]) if key in kinds):
                    expect(key in state[p], f"{self._names[p]}: expected a {key}", "none, though others have one",
                           "save the state of all ranks, see consolidate_state_dict()")
                    if hasattr(state[p][key], "device_mesh") and not hasattr(p, "device_mesh"):
                        state[p][key] = whole(state[p][key])
                    value, expected = state[p][key], state_shape(key, p, groups[-1])
                    real = isinstance(value, Tensor) and not value.is_complex()
                    found = tuple(value.shape) if real else f"{type(value).__name__}, {getattr(value, 'dtype', 'no tensor')}"
                    expect(found == expected, f"{self._names[p]}: expected a {key} of shape {expected}", found,
                           "load a checkpoint of this model")
        kept = dict(self.state)
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})  # torch would round fp32 to bf16
        self.state.update(kept)
        self._scatter_state(state)
        self._consolidated = None
