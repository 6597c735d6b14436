"""Who computes what, and how it travels: the part of Muon that knows of ranks. muon.py has the optimizer itself.

Every matrix, or block of rows of a matrix, is a *unit* that belongs to one rank. The owner alone keeps its momentum and
orthogonalizes it; every rank receives the rounded result and applies it. Units are placed by FLOPs and travel in
*buckets*: one is gathered while the next is computed. A unit whose gradient is missing or not finite is skipped by all
ranks alike: a flag travels beside the data, no host waits.

Legend: a matrix is m x n as stored; B matrices of one parameter, owner and shape make a stack (B, m, n), a *run*.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from newton_schulz import expect, one_by_one


def world_and_rank(group) -> tuple[int, int]:
    """Ranks of a process group and the place of this one; a process by itself is the only rank."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_world_size(group), dist.get_rank(group)) if ready else (1, 0)


def expect_agreement(group, facts: list[str]) -> None:
    """Ranks that disagree would hang or mix up their matrices: raise on all, naming the first difference."""
    found = [facts] * world_and_rank(group)[0]
    if len(found) > 1:
        dist.all_gather_object(found, facts, group=group)
    for rank, theirs in enumerate(found):
        for a, b in zip_longest(found[0], theirs, fillvalue="nothing"):
            expect(a == b, "expected the same parameters and settings on all ranks", f"{a} on rank 0 and {b} on rank {rank}",
                   "build the optimizer alike on every rank")


@dataclass(frozen=True)
class Plan:
    buckets: list[list[list[int]]]  # bucket -> rank -> units it owns
    loads: list[int]                # Newton-Schulz FLOPs per rank and step

    @property
    def efficiency(self) -> float:
        """Mean load over the busiest rank's: 1 is perfect balance."""
        return sum(self.loads) / (len(self.loads) * max(self.loads)) if any(self.loads) else 1.0


def plan_units(costs: Sequence[int], sizes: Sequence[int], world_size: int, cap: int) -> Plan:
    """Place units, the costliest (FLOPs) first, each on the least loaded rank (longest processing time first); then, while
    that lowers the load of the busiest rank, let it hand a unit over or swap it for another's. A rank's bucket closes at
    `cap` elements (sizes). The cheapest units come last, because no computation hides the last gather. Depends on its
    arguments only, so that all ranks plan alike."""
    ranks, order = range(world_size), lambda u: (-costs[u], u)
    loads, held, mine = [0] * world_size, [0] * world_size, [[] for _ in ranks]

    def place(u, rank, sign=1):
        (mine[rank].append if sign > 0 else mine[rank].remove)(u)
        loads[rank] += sign * costs[u]
        held[rank] += sign * sizes[u]

    for u in sorted(range(len(costs)), key=order):
        place(u, min(ranks, key=lambda r: (loads[r], held[r], r)))
    while True:
        busiest = max(ranks, key=lambda r: (loads[r], -r))
        kinds = [{costs[u]: [u] for u in units} for units in mine]  # units of one cost are alike here
        swaps = [(max(loads[busiest] - a + b, loads[r] + a - b), r, give, take) for r in ranks if loads[r] < loads[busiest]
                 for a, give in kinds[busiest].items() for b, take in (kinds[r] | {0: []}).items()]
        top, rank, give, take = min(swaps, default=(loads[busiest], None, [], []))
        if top >= loads[busiest]:
            break
        for units, source, target in (give, busiest, rank), (take, rank, busiest):
            for u in units:
                place(u, source, -1)
                place(u, target)
    buckets = []
    for rank in ranks:
        number, fill = -1, cap
        for u in sorted(mine[rank], key=order):
            if fill >= cap:
                number, fill = number + 1, 0
            if number == len(buckets):
                buckets.append([[] for _ in ranks])
            buckets[number][rank].append(u)
            fill += sizes[u]
    return Plan([[sorted(ids) for ids in bucket] for bucket in buckets], loads)


def as_bank(x: Tensor, flatten: bool) -> Tensor:
    """(matrices, rows, columns ...) of a tensor that is shaped like a parameter."""
    return x if x.ndim == 3 and not flatten else x[None]


def local(x: Tensor) -> Tensor:
    """What this rank holds of a DTensor; anything else is returned as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """The full tensor of a DTensor; a collective. int16, which no backend sends, travels as int32."""
    return x.int().full_tensor().short() if x.dtype == torch.int16 else x.full_tensor()


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


# torch 2.13 renamed both. Outputs stay flat: gloo refuses the stacked form that NCCL accepts.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Bucket:
    """Units that travel together, per rank of a process group, and their way through one step: `start` asks for what
    other ranks hold of their gradients, `receive` waits for it, `update` computes, `send` shares the results, `apply` waits
    for those of others and changes the weights."""
    alone = False             # True: every rank computes by itself what it holds
    owners_keep_state = True  # False: optimizer.state holds it
    part = staticmethod(lambda p: p)  # the tensor whose matrices are the units of p
    announce = staticmethod(lambda params: None)  # say what the user should know of these parameters' way

    def __init__(self, optimizer, group, rank: int, units: list[list[Unit]]):
        self.optimizer, self.group, self.rank, self.world_size = optimizer, group, rank, len(units)
        self.runs, sizes = [[] for _ in units], [0] * len(units)
        self.pending = self.received = self.sent = None
        for runs, mine, r in zip(self.runs, units, range(len(units))):
            for flag, unit in enumerate(mine):
                if not (runs and self.merges(unit) and runs[-1].takes(unit)):
                    runs.append(Run(unit, optimizer.param_groups[unit.group]["flatten"], sizes[r], flag))
                sizes[r] += unit.m * unit.n
        params = [unit.param for mine in units for unit in mine]
        self.num_units, self.like = len(params), local(params[0])  # like: buffers are made on its device
        self.num_flags, self.num_elements = max(map(len, units)), max(sizes)  # per rank, padded to the fullest
        self.grad_dtype = torch.bfloat16 if {p.dtype for p in params} == {torch.bfloat16} else torch.float32

    def merges(self, unit: Unit) -> bool:
        """Whether the unit may be computed in one stack with others."""
        return not self.optimizer.deterministic

    def settings(self, run: Run) -> dict:
        return self.optimizer.param_groups[run.unit.group]

    def state(self, run: Run) -> dict[str, Tensor]:
        """The kinds of state that a run's group asks for, each zero at first use: (B, m, n), or (B, numbers)."""
        kinds = state_kinds(self.settings(run))
        for key in kinds.keys() - run.state.keys():
            shape = (run.count, max(run.shape[1:])) if key == "second_moment" else run.shape
            run.state[key] = torch.zeros(shape, dtype=kinds[key], device=self.like.device)
        return {key: run.state[key] for key in kinds}

    def gradient(self, run: Run) -> Tensor:
        """(B, m, n), often p.grad itself. A missing one is NaN, as is then any mean with it: the owner skips it."""
        grad = run.unit.param.grad
        return self.like.new_full(run.shape, math.nan) if grad is None else run.of(grad).reshape(run.shape)

    def start(self) -> None:
        """With sync_grads: launch the sum of the gradients over ranks; each owner receives its own part."""
        if self.world_size == 1 or not self.optimizer.sync_grads or self.pending is not None:
            return
        packed = self.like.new_empty((self.world_size, self.num_elements), dtype=self.grad_dtype)
        for part, runs in zip(packed, self.runs):
            for run in runs:
                run.slot(part).copy_(self.gradient(run))
        mine = torch.empty_like(packed[0])
        handle = _reduce_scatter(mine, packed.view(-1), group=self.group, async_op=True)
        self.pending = handle, mine, packed  # packed must live until the wait

    def receive(self) -> None:
        """Wait for what `start` launched, if it did, and let go of what it sent."""
        if self.pending is not None:
            (handle, self.received, _), self.pending = self.pending, None
            handle.wait()

    def update(self) -> list[tuple[Run, Tensor, Tensor]]:
        """(run, its update or with split_mantissa its new weights (B, m, n), ok (B,)) for all I own in the bucket."""
        mean, entries = None, []
        if self.received is not None:
            mean, self.received = self.received.float().div_(self.world_size), None
        for run in self.runs[self.rank]:
            group, G = self.settings(run), self.gradient(run) if mean is None else run.slot(mean)
            M = self.state(run)["momentum_buffer"].view(run.shape)
            entries.append((run, *self.optimizer._momentum_update(M, G, group["momentum"], group["nesterov"])))
        results = []
        for run, O, ok in self.orthogonalize(entries):
            if "mantissa" in (state := self.state(run)):
                W, low = run.of(local(run.unit.param)).reshape(run.shape), state["mantissa"].view(run.shape)
                O = self.optimizer._step_master(W, low, O, ok, *self.optimizer.rates(run.unit))
            results.append((run, O, ok))
        return results

    def orthogonalize(self, entries: list[tuple[Run, Tensor, Tensor]]) -> list[tuple[Run, Tensor, Tensor]]:
        """(run, O (B, m, n) rounded as everybody applies it, ok) from (run, U, ok): one iteration for all matrices of a
        kind, the tall ones lying on their side, unless they are faster one by one."""
        kinds, results, optimizer = {}, [], self.optimizer
        for run, U, ok in entries:
            group, U = self.settings(run), U if U.size(1) <= U.size(2) else U.mT
            kind = (U.shape[1:], group["ns_steps"], str(group["coefficients"]), group["ns_form"],
                    run.flag if optimizer.deterministic or one_by_one(U, optimizer.dtype) else None)
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
                results.append((run, part.to(self.optimizer.wire), ok))
        return results

    def send(self, results: list) -> None:
        """Launch the exchange of the results."""
        def flags(run, part):
            return part[self.num_elements + run.flag:][:run.count]

        if self.world_size == 1:
            self.sent = None, results, None
            return
        size = self.num_elements + self.num_flags  # of a rank's part: all elements, then all flags
        gathered = self.like.new_empty((self.world_size, size), dtype=self.optimizer.wire)
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
                self.optimizer._decay_and_step(W, value.reshape(W.shape), ok, *self.optimizer.rates(run.unit))
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
