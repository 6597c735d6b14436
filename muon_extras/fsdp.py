"""FsdpMuon: Muon for DTensor parameters, as FSDP2 makes them, beside plain ones.

A parameter sharded along one mesh dimension, by rows or columns of its matrices, goes through two packed
all-to-alls per bucket: every rank sends its pieces of each look-ahead gradient U to the unit's owner, which
assembles and orthogonalizes the matrix, and gets its pieces of the result back. Momentum and mantissa are
DTensors placed as the parameter is: N / W elements per rank; torch.distributed.checkpoint can save them.
Sizes follow from the shapes by the rule of torch.chunk, so uneven and empty shards need no padding.

    by rows or columns: Shard(0), (1) of a matrix or convolution, (1), (2) of a bank  Exchanged, as described
    by matrices: Shard(0) of a bank, such as experts                                  Whole: no traffic at all
    the same, and Replicate on further mesh dimensions (HSDP)       as above; each replica repeats it, and all
                                                                    must lack the same gradients
    anything else: two sharded dimensions, strided shards           Gathered: correct, but slow

The owner of a unit decides whether its gradient is finite; that, and NorMuon's V, travel with the result.
"""

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muon import (
    Bucket,
    Flight,
    Muon,
    Stack,
    as_bank,
    decay_and_step,
    iteration_dtype,
    largest,
    local,
    of_all_ranks,
    refusal,
    state_kinds,
    state_shape,
    step_master,
)

_all_to_all = getattr(dist, "all_to_all_single", None)


class FsdpMuon(Muon):
    """Muon, with the same arguments, for parameters of which some or all are DTensors. Their state is
    DTensors too."""

    def _check_kind(self, name: str, p: Tensor) -> None:
        if self.replicate_state and isinstance(p, DTensor):
            raise refusal(
                "plain tensors for replicate_state",
                "a DTensor",
                "leave it out: its state is a DTensor",
                name,
            )

    def _lane(self, p: Tensor, group: dict) -> tuple[type[Bucket], object]:
        if not isinstance(p, DTensor):
            return super()._lane(p, group)
        mesh = p.device_mesh
        kind = kind_of(p, group["flatten"])
        if kind is Gathered:
            if group["split_mantissa"]:
                raise refusal(
                    "a parameter sharded along one mesh dimension for split_mantissa",
                    p.placements,
                    "turn that off for this group",
                )
            return Gathered, mesh.get_group(0)
        (dim,) = sharded_dims(p)
        ranks = mesh.get_group(dim)
        if mesh.get_coordinate()[dim] != dist.get_rank(ranks):
            raise refusal("a mesh with its ranks in order", mesh, "sort its ranks")
        return kind, ranks

    def _agreed_dtype(self, process_group, p: Tensor) -> torch.dtype:
        if self.ns_dtype is not None or not isinstance(p, DTensor) or p.device.type != "cpu":
            return super()._agreed_dtype(process_group, p)
        names = {str(iteration_dtype(p.device))}
        for group in p.device_mesh.get_all_groups():  # one by one, so that replicas agree as well
            names = set().union(*of_all_ranks(names, group))
        return iteration_dtype(p.device) if len(names) == 1 else torch.float32

    def _adopt(self, key: str, value: Tensor, dtype: torch.dtype, p: Tensor, group: dict) -> Tensor:
        if not isinstance(p, DTensor):
            return super()._adopt(key, value, dtype, p, group)
        mine = new_state(key, dtype, p, group)
        value = value.int() if dtype == torch.int16 else value  # no backend sends int16
        if not isinstance(value, DTensor):
            everywhere = [Replicate()] * p.device_mesh.ndim
            value = distribute_tensor(value.to(p.device), p.device_mesh, everywhere, src_data_rank=None)
        mine.to_local().copy_(value.redistribute(mine.device_mesh, mine.placements).to_local())
        return mine

    def _keep_my_share(self) -> None:
        super()._keep_my_share()
        for group in self.param_groups:  # on every rank, so that checkpoints have the same keys everywhere
            for p in group["params"]:
                if isinstance(p, DTensor):
                    state_of(self, p, group)


def sharded_dims(p: DTensor) -> list[int]:
    """Return the mesh dimensions over which a parameter is not simply repeated."""
    return [i for i, placement in enumerate(p.placements) if not isinstance(placement, Replicate)]


def shard_axis(p: DTensor, flatten: bool | None) -> int:
    """Return what the shards of a parameter cut: -1 its bank of matrices, 0 rows, 1 columns, above that
    pieces of columns."""
    dim = next(placement.dim for placement in p.placements if isinstance(placement, Shard))
    return dim - 1 if p.ndim == 3 and not flatten else dim


def kind_of(p: DTensor, flatten: bool | None) -> type[Bucket]:
    dims = sharded_dims(p)
    if len(dims) != 1 or type(p.placements[dims[0]]) is not Shard or shard_axis(p, flatten) > 1:
        return Gathered
    return Whole if shard_axis(p, flatten) < 0 else Exchanged


def new_state(key: str, dtype: torch.dtype, p: DTensor, group: dict) -> DTensor:
    """Return zeros for a parameter, placed as it is; second_moment (matrices, numbers) is sharded with a
    bank's matrices, and otherwise the same on all ranks."""
    if key != "second_moment":
        return torch.zeros_like(p, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)
    by_matrices = kind_of(p, group["flatten"]) is Whole
    rows, numbers = state_shape(key, p, group)
    mine = torch.zeros(p.to_local().size(0) if by_matrices else rows, numbers, device=p.device)
    placements = p.placements if by_matrices else [Replicate()] * p.device_mesh.ndim
    return DTensor.from_local(
        mine,
        p.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size((rows, numbers)),
        stride=(numbers, 1),
    )


def state_of(optimizer: Muon, p: DTensor, group: dict) -> dict[str, DTensor]:
    """Return the whole state of a parameter, in optimizer.state, made of zeros at first use."""
    state = optimizer.state[p]
    for key, dtype in state_kinds(group).items():
        if key not in state:
            state[key] = new_state(key, dtype, p, group)
    return {key: state[key] for key in state_kinds(group)}


def local_gradient(p: DTensor) -> Tensor | None:
    """Return the local part of p.grad, which must be placed as p is."""
    if p.grad is None:
        return None
    if p.grad.placements != p.placements:
        raise refusal(
            f"gradients placed as their parameters, {p.placements}",
            p.grad.placements,
            "redistribute them before the step",
        )
    return p.grad.to_local()


def look_ahead(M: Tensor, G: Tensor, group: dict) -> Tensor:
    """Return U of muon.momentum_update, with M left as it is: whether it may move, the owner will say."""
    M = M.lerp(G, 1 - group["momentum"])
    return G.lerp(M, group["momentum"]) if group["nesterov"] else M


def finite(U: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Return (U with zeros for each of the B matrices that does not move, which are finite). alive (B,): 0
    for a gradient that is zero throughout, NaN for one that is missing, else above 0."""
    alive = alive.view(-1, 1, 1)
    ok = torch.isfinite(largest(U) + alive)
    return torch.where(ok & (alive > 0), U, 0), ok.view(-1)


def chunk(size: int, parts: int, i: int) -> tuple[int, int]:
    """Return the bounds of the i-th part, as torch.chunk cuts it and FSDP2 shards it."""
    step = -(-size // parts)
    return min(i * step, size), min((i + 1) * step, size)


class Sharded(Bucket):
    """What all kinds share: state is DTensors in optimizer.state, present on every rank from the first step
    on."""

    def state(self, stack: Stack) -> dict[str, Tensor]:
        views = {}
        for key, x in state_of(self.optimizer, stack.unit.param, self.settings(stack)).items():
            by_shape = self.piece if key != "second_moment" else lambda stack, x: stack.state_view(key, x)
            views[key] = by_shape(stack, x.to_local())
        return views

    def piece(self, stack: Stack, x: Tensor) -> Tensor:
        """Return what this rank holds of the matrices of a stack, in the local part of something shaped like
        p."""
        return x


class Whole(Sharded):
    """Every rank holds whole matrices or none: ordinary units of a world of one."""

    alone = True
    part = staticmethod(local)

    def piece(self, stack: Stack, x: Tensor) -> Tensor:
        return stack.of(x)

    def gradient(self, stack: Stack) -> Tensor | None:
        grad = local_gradient(stack.unit.param)
        return None if grad is None else stack.of(grad).reshape(stack.shape)


class Exchanged(Sharded):
    """Pieces of a unit lie on all ranks. Per rank the stacks of its units, as everywhere; `cut` tells which
    piece is whose."""

    def __init__(self, *args):
        super().__init__(*args)
        ranks = range(self.world_size)
        mine = self.stacks[self.rank]
        # Numbers of elements: my part of the units of each rank, and each rank's part of mine.
        self.given = [sum(self.numel(stack, self.rank) for stack in self.stacks[r]) for r in ranks]
        self.taken = [sum(self.numel(stack, r) for stack in mine) for r in ranks]

    def merges(self, unit) -> bool:
        blocks = self.optimizer._groups[unit.group]["split"] is not None  # shards cut them unlike
        return super().merges(unit) and not blocks

    def axis(self, stack: Stack) -> int:
        return shard_axis(stack.unit.param, stack.flatten)

    def cut(self, stack: Stack, rank: int) -> tuple[int, int]:
        """Return the rows or columns of a unit that lie on a rank: from, to."""
        _, rows, columns, *inner = as_bank(stack.unit.param, stack.flatten).shape
        if self.axis(stack) == 1:
            begin, end = chunk(columns, self.world_size, rank)
            return begin * math.prod(inner), end * math.prod(inner)
        first = stack.unit.row
        m = stack.unit.m
        begin, end = chunk(rows, self.world_size, rank)
        return min(max(begin - first, 0), m), min(max(end - first, 0), m)

    def numel(self, stack: Stack, rank: int) -> int:
        begin, end = self.cut(stack, rank)
        return stack.count * (end - begin) * (stack.unit.m if self.axis(stack) else stack.unit.n)

    def piece(self, stack: Stack, x: Tensor) -> Tensor:
        """Return (B, rows, ...): my piece of each matrix in the local part of something shaped like the
        parameter."""
        row = stack.unit.row
        count = stack.unit.m
        if self.axis(stack) == 0:
            begin, end = self.cut(stack, self.rank)
            rows = as_bank(stack.unit.param, stack.flatten).size(1)
            row += begin - chunk(rows, self.world_size, self.rank)[0]
            count = end - begin
        return stack.view(as_bank(x, stack.flatten), max(row, 0), count)

    def pieces(self, flat: Tensor, stacks: list[Stack], rank: int) -> list[Tensor]:
        """Return the pieces (B, rows, columns) of these stacks on a rank, out of a flat buffer in which they
        follow each other."""
        sizes = [self.numel(stack, rank) for stack in stacks]
        parts = flat[: sum(sizes)].split(sizes)
        pieces = []
        for stack, x in zip(stacks, parts):
            count, m, n = stack.shape
            pieces.append(x.view(count, m, -1) if self.axis(stack) else x.view(count, -1, n))
        return pieces

    def exchange(self, parts: list[Tensor], given: list[int], taken: list[int]) -> Flight:
        nothing = self.new(0)  # a rank may own no unit of a bucket
        send = torch.cat([nothing, *(part.reshape(-1).to(nothing.dtype) for part in parts)])
        received = send.new_empty(sum(taken))
        handle = _all_to_all(received, send, taken, given, group=self.group, async_op=True)
        return Flight(handle, received, send)

    def start(self) -> None:
        if self.pending is not None:
            return
        parts = []
        for stacks in self.stacks:
            alive = []
            for stack in stacks:
                G = local_gradient(stack.unit.param)
                M = self.state(stack)["momentum_buffer"]
                G = None if G is None else self.piece(stack, G).float()
                parts.append(torch.zeros_like(M) if G is None else look_ahead(M, G, self.settings(stack)))
                alive.append(self.signs_of_life(stack, G))
            parts += alive
        mine = sum(stack.count for stack in self.stacks[self.rank])
        theirs = [sum(stack.count for stack in stacks) for stacks in self.stacks]
        self.pending = self.exchange(
            parts, [n + flags for n, flags in zip(self.given, theirs)], [n + mine for n in self.taken]
        )
        self.flags = mine

    def signs_of_life(self, stack: Stack, G: Tensor | None) -> Tensor:
        """Return (B,): 1 where my piece of a gradient has an entry that is not 0, else 0; NaN for a missing
        gradient, even of an empty piece."""
        if G is None:
            return torch.full((stack.count,), math.nan, device=self.device)
        return (G.flatten(1) != 0).any(1).float()

    def receive(self) -> None:
        super().receive()
        if self.received is not None:
            self.received = self.received.split([n + self.flags for n in self.taken])

    def update(self) -> dict[Stack, tuple[Tensor, Tensor]]:
        stacks = self.stacks[self.rank]
        sources = self.received
        self.received = None
        alive = sum(source[n:].float() for source, n in zip(sources, self.taken))
        alive = alive.split([stack.count for stack in stacks])
        pieces = zip(*(self.pieces(source, stacks, rank) for rank, source in enumerate(sources)))
        entries = []
        for stack, parts, signs in zip(stacks, pieces, alive):
            entries.append((stack, *finite(torch.cat(parts, 1 + self.axis(stack)), signs)))
        return self.orthogonalize(entries)

    def extras(self, stack: Stack) -> list[str]:
        return ["second_moment"] if self.settings(stack)["normuon_beta2"] is not None else []

    def send(self, results: dict[Stack, tuple[Tensor, Tensor]]) -> None:
        stacks = self.stacks[self.rank]
        ranks = range(self.world_size)
        tail = []
        parts = []
        for stack in stacks:
            tail.append(results[stack][1])
            if self.extras(stack):
                tail.append(self.state(stack)["second_moment"].reshape(-1).view(self.wire))
        for rank in ranks:
            for stack in stacks:
                begin, end = self.cut(stack, rank)
                parts.append(results[stack][0].narrow(1 + self.axis(stack), begin, end - begin))
            parts += tail
        sizes = [sum(sum(self.tail(stack)) for stack in stacks) for stacks in self.stacks]
        self.sent = self.exchange(
            parts,
            [self.taken[r] + sizes[self.rank] for r in ranks],
            [self.given[r] + sizes[r] for r in ranks],
        )
        self.sizes = [self.given[r] + sizes[r] for r in ranks]

    def apply(self) -> Tensor:
        sent = self.sent
        self.sent = None
        done = torch.zeros((), dtype=torch.int64, device=self.device)
        for rank, source in enumerate(sent.wait().split(self.sizes)):
            stacks = self.stacks[rank]
            place = self.given[rank]
            for stack, O in zip(stacks, self.pieces(source, stacks, self.rank)):
                ok, *V = source[place : place + sum(self.tail(stack))].split(self.tail(stack))
                place += sum(self.tail(stack))
                self.apply_piece(stack, O, ok, *V)
                done += ok.sum().long()
        return self.num_units - done

    def apply_piece(self, stack: Stack, O: Tensor, ok: Tensor, V: Tensor | None = None) -> None:
        """Move my piece of the momentum and of the weights."""
        p = stack.unit.param
        state = self.state(stack)
        rates = self.optimizer.rates(stack.unit)
        W = self.piece(stack, local(p))
        M = state["momentum_buffer"]
        G = local_gradient(p)
        if G is not None:
            moves = ok.bool().view(-1, *[1] * (M.ndim - 1))
            M.lerp_(
                torch.where(moves, self.piece(stack, G).float(), M), 1 - self.settings(stack)["momentum"]
            )
        if V is not None:
            state["second_moment"].copy_(V.clone().view(torch.float32).view(stack.count, -1))
        if "mantissa" in state:
            W.copy_(step_master(W, state["mantissa"], O.reshape(W.shape), ok, *rates))
        else:
            decay_and_step(W, O.reshape(W.shape), ok, *rates)


class Gathered(Sharded):
    """For placements without a way of their own: every rank gathers U and computes everything."""

    alone = True

    @staticmethod
    def announce(params: list[DTensor]) -> None:
        warnings.warn(
            f"Muon: {len(params)} parameters, the first placed as {params[0].placements}, are "
            "gathered whole on every rank, which is slow; shard them along one mesh dimension"
        )

    def params(self) -> dict[Tensor, list[Stack]]:
        found = {}
        for stack in self.stacks[0]:
            found.setdefault(stack.unit.param, []).append(stack)
        return found

    def update(self) -> dict[Stack, tuple[Tensor, Tensor]]:
        entries = []
        for p, stacks in self.params().items():
            group = self.settings(stacks[0])
            G = local_gradient(p)
            M = self.state(stacks[0])["momentum_buffer"]
            G = torch.full_like(M, math.nan) if G is None else G.float()
            U = self.gather(look_ahead(M, G, group), p)
            alive = self.gather((G != 0).to(torch.uint8), p)
            for stack in stacks:
                signs = stack.of(alive).flatten(1).amax(1).float()
                entries.append((stack, *finite(stack.of(U).reshape(stack.shape), signs)))
        return self.orthogonalize(entries)

    def apply(self) -> Tensor:
        results = self.sent
        self.sent = None
        for p, stacks in self.params().items():
            self.apply_to(p, stacks, results)
        return self.num_units - torch.cat([ok for _, ok in results.values()]).sum(dtype=torch.int64)

    def apply_to(self, p: DTensor, stacks: list[Stack], results: dict) -> None:
        group = self.settings(stacks[0])
        G = local_gradient(p)
        M = self.state(stacks[0])["momentum_buffer"]
        step, moves = (torch.zeros(p.shape, device=self.device) for _ in range(2))
        for stack in stacks:
            O, ok = results[stack]
            view = stack.of(step)
            view.copy_((self.optimizer.rates(stack.unit)[0] * O.float()).view(view.shape))
            stack.of(moves).copy_(ok.view(-1, *[1] * (view.ndim - 1)).expand(view.shape))
        W = local(p)
        O = self.place(step, p)
        ok = self.place(moves, p) > 0
        _, decay, cautious = self.optimizer.rates(stacks[0].unit)
        moved = W[None].clone()
        decay_and_step(moved, O[None], torch.ones(1, device=W.device), 1.0, decay, cautious)
        W.copy_(torch.where(ok, moved[0], W))
        if G is not None:
            M.lerp_(torch.where(ok, G.float(), M), 1 - group["momentum"])

    def gather(self, x: Tensor, p: DTensor) -> Tensor:
        """Return the whole of which x is the local part, placed as p is."""
        return DTensor.from_local(
            x, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        ).full_tensor()

    def place(self, x: Tensor, p: DTensor) -> Tensor:
        """Return the local part of what every rank holds whole, placed as p is."""
        mesh = p.device_mesh
        everywhere = [Replicate()] * mesh.ndim
        x = DTensor.from_local(x, mesh, everywhere, run_check=False)
        return x.redistribute(mesh, p.placements).to_local()
