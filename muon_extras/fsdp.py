"""Muon for DTensor parameters, as FSDP2 makes them; muon.py chooses these buckets by itself.

A parameter sharded along one mesh dimension, by rows or columns of its matrices, goes through two packed all-to-alls per
bucket: every rank sends its pieces of each look-ahead gradient U to the unit's owner, which assembles and
orthogonalizes the matrix, and gets its pieces of the result back. Momentum and mantissa are DTensors placed as the
parameter is: N / W elements per rank, and torch.distributed.checkpoint can save them. Sizes follow from the shapes by the
rule of torch.chunk, so uneven and empty shards need neither padding nor headers.

    by rows or columns: Shard(0), (1) of a matrix or convolution, (1), (2) of a bank    Exchanged, as just described
    by matrices: Shard(0) of a bank, such as experts                                    Whole: no traffic at all
    the same, and Replicate on further mesh dimensions (HSDP)                           as above; each replica repeats it, and
                                                                                        all must lack the same gradients
    anything else: two sharded dimensions, strided shards                               Gathered: correct, but slow

The owner of a unit decides whether its gradient is finite; the answer, and V of NorMuon, travel with the result.
"""
import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muon import decay_and_step, step_master
from muon_ranks import Bucket, Run, as_bank, local, state_kinds, state_shape
from newton_schulz import expect, largest

_all_to_all = getattr(dist, "all_to_all_single", None)


def sharded_dims(p: DTensor) -> list[int]:
    """Mesh dimensions over which a parameter is not simply repeated."""
    return [i for i, placement in enumerate(p.placements) if not isinstance(placement, Replicate)]


def kind_of(p: DTensor, flatten: bool) -> type[Bucket]:
    dims = sharded_dims(p)
    if len(dims) > 1 or type(p.placements[dims[0] if dims else 0]) is not Shard or shard_axis(p, flatten) > 1:
        return Gathered
    return Whole if shard_axis(p, flatten) < 0 else Exchanged


def lane(p: DTensor, group: dict) -> tuple[type[Bucket], object]:
    """(kind of bucket, process group) for a parameter whose group has these settings."""
    mesh, kind = p.device_mesh, kind_of(p, group["flatten"])
    if kind is not Gathered:
        dim, = sharded_dims(p)
        ranks = mesh.get_group(dim)
        expect(mesh.get_coordinate()[dim] == dist.get_rank(ranks), "expected a mesh with its ranks in order", mesh,
               "sort its ranks")
        return kind, ranks
    expect(not group["split_mantissa"], "expected a parameter sharded along one mesh dimension for split_mantissa",
           p.placements, "turn that off for this group")
    return Gathered, mesh.get_group(0)


def state_of(optimizer, p: DTensor, group: dict) -> dict[str, DTensor]:
    """The whole state of a parameter, in optimizer.state, made of zeros at first use. second_moment (matrices, numbers) is
    sharded with a bank's matrices, and otherwise the same on all ranks."""
    state, whole = optimizer.state[p], kind_of(p, group["flatten"]) is Whole
    for key, dtype in state_kinds(group).items():
        if key not in state and key != "second_moment":
            state[key] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        elif key not in state:
            rows, numbers = state_shape(key, p, group)
            state[key] = DTensor.from_local(
                torch.zeros(p.to_local().size(0) if whole else rows, numbers, device=p.device), p.device_mesh,
                p.placements if whole else [Replicate()] * p.device_mesh.ndim, run_check=False,
                shape=torch.Size((rows, numbers)), stride=(numbers, 1))
    return {key: state[key] for key in state_kinds(group)}


def sharded_params(optimizer):
    return [(p, group) for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor)]


def gather_state(optimizer, state: dict[Tensor, dict[str, Tensor]]) -> None:
    """Add the state of all DTensor parameters, as it is."""
    state.update((p, state_of(optimizer, p, group)) for p, group in sharded_params(optimizer))


def scatter_state(optimizer, state: dict[Tensor, dict[str, Tensor]]) -> None:
    """Take what `gather_state` added, or the same placed otherwise or whole. What is absent starts at zero."""
    for p, group in sharded_params(optimizer):
        for key, mine in state_of(optimizer, p, group).items():
            given = state.get(p, {}).get(key)
            if given is None:
                mine.to_local().zero_()
            elif given is not mine:
                given = given.int() if mine.dtype == torch.int16 else given  # no backend sends int16
                if not isinstance(given, DTensor):
                    given = distribute_tensor(given.to(mine.device), mine.device_mesh,
                                              [Replicate()] * mine.device_mesh.ndim, src_data_rank=None)
                mine.to_local().copy_(given.redistribute(mine.device_mesh, mine.placements).to_local())


def shard_axis(p: DTensor, flatten: bool) -> int:
    """What the shards of a parameter cut: -1 its bank of matrices, 0 rows, 1 columns, above that pieces of columns."""
    dim = next(placement.dim for placement in p.placements if isinstance(placement, Shard))
    return dim - 1 if p.ndim == 3 and not flatten else dim


def gradient(p: DTensor) -> Tensor:
    """The local part of p.grad, placed as p is; NaN where it is missing."""
    if p.grad is None:
        return torch.full_like(p.to_local(), math.nan)
    expect(p.grad.placements == p.placements, f"expected gradients placed as their parameters, {p.placements}",
           p.grad.placements, "redistribute them before the step")
    return p.grad.to_local()


def look_ahead(M: Tensor, G: Tensor, group: dict) -> Tensor:
    """U of muon.momentum_update, with M left as it is: whether it may move, the owner will say."""
    M = M.lerp(G, 1 - group["momentum"])
    return G.lerp(M, group["momentum"]) if group["nesterov"] else M


def finite(U: Tensor, missing: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """(U with zeros for each of the B matrices that is not finite, which are); none is where `missing` is NaN."""
    ok = torch.isfinite(largest(U) + missing)
    return torch.where(ok, U, 0), ok.view(-1)


def chunk(size: int, parts: int, i: int) -> tuple[int, int]:
    """Bounds of the i-th part, as torch.chunk cuts it and FSDP2 shards it."""
    step = -(-size // parts)
    return min(i * step, size), min((i + 1) * step, size)


class Sharded(Bucket):
    """What all kinds share: state is DTensors in optimizer.state, present on every rank from the start."""
    owners_keep_state = False

    def state(self, run: Run) -> dict[str, Tensor]:
        return {key: run.of_state(key, whole.to_local()) if key == "second_moment" else self.view(run, whole.to_local())
                for key, whole in state_of(self.optimizer, run.unit.param, self.settings(run)).items()}


class Whole(Sharded):
    """Every rank holds whole matrices or none: ordinary units of a world of one."""
    alone, part = True, staticmethod(local)

    def view(self, run: Run, x: Tensor) -> Tensor:
        return run.of(x)

    def gradient(self, run: Run) -> Tensor:
        return run.of(gradient(run.unit.param)).reshape(run.shape)


class Exchanged(Sharded):
    """Pieces of a unit lie on all ranks. Per rank the runs of its units, as everywhere; `cut` tells which piece is whose."""

    def __init__(self, *args):
        super().__init__(*args)
        ranks = range(self.world_size)
        self.given = [sum(self.numel(run, self.rank) for run in self.runs[r]) for r in ranks]  # my elements of r's units
        self.taken = [sum(self.numel(run, r) for run in self.runs[self.rank]) for r in ranks]  # r's elements of my units

    def merges(self, unit) -> bool:
        return super().merges(unit) and self.optimizer.param_groups[unit.group]["split"] is None  # blocks are cut unlike

    def axis(self, run: Run) -> int:
        return shard_axis(run.unit.param, run.flatten)

    def cut(self, run: Run, rank: int) -> tuple[int, int]:
        """Rows or columns of a unit that lie on a rank: from, to."""
        _, M, C, *inner = as_bank(run.unit.param, run.flatten).shape
        if self.axis(run) == 1:
            return tuple(math.prod(inner) * bound for bound in chunk(C, self.world_size, rank))
        return tuple(min(max(bound - run.unit.place[1], 0), run.unit.m) for bound in chunk(M, self.world_size, rank))

    def numel(self, run: Run, rank: int) -> int:
        begin, end = self.cut(run, rank)
        return run.count * (end - begin) * (run.unit.m if self.axis(run) else run.unit.n)

    def view(self, run: Run, x: Tensor) -> Tensor:
        """(B, rows, ...): my piece of each matrix in the local part of something that is shaped like the parameter."""
        (k, row, _), count, rows = run.unit.place, run.unit.m, as_bank(run.unit.param, run.flatten).size(1)
        if self.axis(run) == 0:
            begin, end = self.cut(run, self.rank)
            row, count = row + begin - chunk(rows, self.world_size, self.rank)[0], end - begin
        return as_bank(x, run.flatten)[k:k + max(run.step[0], 1) * run.count:max(run.step[0], 1), max(row, 0):max(row, 0) + count]

    def pieces(self, flat: Tensor, runs: list[Run], rank: int) -> list[Tensor]:
        """The pieces (B, rows, columns) of these runs on a rank, out of a flat buffer in which they follow each other."""
        sizes = [self.numel(run, rank) for run in runs]
        return [x.view(run.count, -1, run.unit.n) if self.axis(run) == 0 else x.view(run.count, run.unit.m, -1)
                for run, x in zip(runs, flat[:sum(sizes)].split(sizes))]

    def exchange(self, parts: list[Tensor], given: list[int], taken: list[int]) -> tuple:
        nothing = self.like.new_empty(0, dtype=self.optimizer.wire)  # a rank may own no unit of a bucket
        send = torch.cat([nothing, *(part.reshape(-1).to(nothing.dtype) for part in parts)])
        received = send.new_empty(sum(taken))
        return _all_to_all(received, send, taken, given, group=self.group, async_op=True), received.split(taken), send

    def start(self) -> None:
        if self.pending is not None:
            return
        parts = []
        for runs in self.runs:
            for run in runs:
                M, G = self.state(run)["momentum_buffer"], self.view(run, gradient(run.unit.param)).float()
                parts.append(look_ahead(M, G, self.settings(run)))
            parts.append(self.like.new_zeros(len(runs)))  # and NaN where the gradient is missing, even of an empty piece
            for i, run in enumerate(runs):
                if run.unit.param.grad is None:
                    parts[-1][i] = math.nan
        mine = len(self.runs[self.rank])
        self.pending = self.exchange(parts, [n + len(runs) for n, runs in zip(self.given, self.runs)],
                                     [n + mine for n in self.taken])

    def update(self) -> list[tuple[Run, Tensor, Tensor]]:
        entries, runs, sources, self.received = [], self.runs[self.rank], self.received, None
        missing = sum(source[n:] for source, n in zip(sources, self.taken))
        for i, (run, *parts) in enumerate(zip(runs, *(self.pieces(x, runs, rank) for rank, x in enumerate(sources)))):
            entries.append((run, *finite(torch.cat(parts, 1 + self.axis(run)), missing[i])))
        return self.orthogonalize(entries)

    def tail(self, rank: int) -> list[int]:
        """Lengths of what follows the pieces from a rank: flags of each run, then the bits of its V."""
        wide = 4 // self.optimizer.wire.itemsize
        return [size for run in self.runs[rank] for size in (run.count, 0 if self.settings(run)["normuon_beta2"] is None else
                                                             run.count * max(run.shape[1:]) * wide)]

    def send(self, results: list) -> None:
        found, tail, parts = {id(run): (O, ok) for run, O, ok in results}, [], []
        for run in self.runs[self.rank]:
            V = self.state(run).get("second_moment")
            tail += [found[id(run)][1], *([] if V is None else [V.reshape(-1).view(self.optimizer.wire)])]
        for rank in range(self.world_size):
            for run in self.runs[self.rank]:
                begin, end = self.cut(run, rank)
                parts.append(found[id(run)][0].narrow(1 + self.axis(run), begin, end - begin))
            parts += tail
        mine, ranks = sum(self.tail(self.rank)), range(self.world_size)
        self.sent = self.exchange(parts, [self.taken[r] + mine for r in ranks],
                                  [self.given[r] + sum(self.tail(r)) for r in ranks])

    def apply(self) -> Tensor:
        (handle, sources, _), self.sent = self.sent, None
        handle.wait()
        done = torch.zeros((), dtype=torch.int64, device=self.like.device)
        for rank, source in enumerate(sources):
            runs, tail = self.runs[rank], source[self.given[rank]:].split(self.tail(rank))
            for run, O, ok, V in zip(runs, self.pieces(source, runs, self.rank), tail[::2], tail[1::2]):
                group, p, state = self.settings(run), local(run.unit.param), self.state(run)
                W, M, G = self.view(run, p), state["momentum_buffer"], self.view(run, gradient(run.unit.param))
                M.lerp_(torch.where(ok.bool().view(-1, *[1] * (M.ndim - 1)), G.float(), M), 1 - group["momentum"])
                if len(V):
                    state["second_moment"].copy_(V.clone().view(torch.float32).view(run.count, -1))
                if "mantissa" in state:
                    W.copy_(step_master(W, state["mantissa"], O.reshape(W.shape), ok, *self.optimizer.rates(run.unit)))
                else:
                    decay_and_step(W, O.reshape(W.shape), ok, *self.optimizer.rates(run.unit))
                done += ok.sum().long()
        return self.num_units - done


class Gathered(Sharded):
    """For placements without a way of their own: every rank gathers U and computes everything."""
    alone = True

    @staticmethod
    def announce(params: list[DTensor]) -> None:
        warnings.warn(f"Muon: {len(params)} parameters, the first placed as {params[0].placements}, are gathered whole on every "
                      "rank, which is slow; shard them along one mesh dimension")

    def view(self, run: Run, x: Tensor) -> Tensor:
        return x

    def params(self) -> dict[Tensor, list[Run]]:
        found = {}
        for run in self.runs[0]:
            found.setdefault(run.unit.param, []).append(run)
        return found

    def update(self) -> list[tuple[Run, Tensor, Tensor]]:
        entries = []
        for p, runs in self.params().items():
            group, M, G = self.settings(runs[0]), self.state(runs[0])["momentum_buffer"], gradient(p).float()
            U = DTensor.from_local(look_ahead(M, G, group), p.device_mesh, p.placements, run_check=False, shape=p.shape,
                                   stride=p.stride()).full_tensor()
            for run in runs:
                entries.append((run, *finite(run.of(U).reshape(run.shape))))
        return self.orthogonalize(entries)

    def apply(self) -> Tensor:
        (_, results, _), self.sent = self.sent, None
        found = {id(run): (O, ok) for run, O, ok in results}
        for p, runs in self.params().items():
            group, M = self.settings(runs[0]), self.state(runs[0])["momentum_buffer"]
            step, moves = (torch.zeros(p.shape, device=self.like.device) for _ in range(2))
            for run in runs:
                (O, ok), factor, view = found[id(run)], self.optimizer.rates(run.unit)[0], run.of(step)
                view.copy_((factor * O.float()).view(view.shape))
                run.of(moves).copy_(ok.view(-1, *[1] * (view.ndim - 1)).expand(view.shape))
            W, O, ok = local(p), self.place(step, p), self.place(moves, p) > 0
            moved, decay, cautious = W[None].clone(), *self.optimizer.rates(runs[0].unit)[1:]
            decay_and_step(moved, O[None], torch.ones(1, device=W.device), 1.0, decay, cautious)
            W.copy_(torch.where(ok, moved[0], W))
            M.lerp_(torch.where(ok, gradient(p).float(), M), 1 - group["momentum"])
        return self.num_units - torch.cat([ok for _, _, ok in results]).sum(dtype=torch.int64)

    def place(self, whole: Tensor, p: DTensor) -> Tensor:
        """The local part of what every rank holds whole, placed as p is."""
        mesh = p.device_mesh
        return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
            mesh, p.placements).to_local()
