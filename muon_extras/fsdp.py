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
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muon import (
    Bucket,
    Flight,
    Muon,
    Placement,
    Stack,
    as_bank,
    decay_and_step,
    largest,
    refusal,
    state_kinds,
    stacks_of,
    step_master,
)

_all_to_all = getattr(dist, "all_to_all_single", None)


class FsdpMuon(Muon):
    """Muon, with the same arguments, for parameters that may be DTensors; their state is DTensors too."""

    def _lane(self, name: str, p: Tensor, group: dict) -> tuple[type[Bucket], object, tuple]:
        if not isinstance(p, DTensor):
            return super()._lane(name, p, group)
        if self.replicate_state:
            raise refusal("plain tensors for replicate_state", "a DTensor",
                          "leave it out: its state is a DTensor", name)
        mesh = p.device_mesh
        everyone = tuple(mesh.get_all_groups())  # replicas compute alike as well
        kind = kind_of(p, group["flatten"])
        if kind is Gathered:
            if group["split_mantissa"]:
                expected = "a parameter sharded along one mesh dimension for split_mantissa"
                raise refusal(expected, p.placements, "turn that off for this group")
            return Gathered, mesh.get_group(0), everyone
        dim, = sharded_dims(p)
        ranks = mesh.get_group(dim)
        if mesh.get_coordinate()[dim] != dist.get_rank(ranks):
            raise refusal("a mesh with its ranks in order", mesh, "sort its ranks")
        return kind, ranks, everyone

    def _fill_buckets(self, kind: type[Bucket], process_group, everyone: tuple,
                      members: dict[Tensor, dict]) -> tuple[Placement, list[Bucket]]:
        if kind is Gathered:
            first = next(iter(members))
            warnings.warn(f"Muon: {len(members)} parameters, the first placed as {first.placements}, are "
                          "gathered whole on every rank, which is slow; shard them along one mesh dimension")
        return super()._fill_buckets(kind, process_group, everyone, members)

    def _adopt(self, name: str, value: Tensor, dtype: torch.dtype, p: Tensor, group: dict) -> Tensor:
        if not isinstance(p, DTensor):
            return super()._adopt(name, whole(value), dtype, p, group)
        mine = new_state(name, dtype, p, group)
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


def local(x: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor; anything else as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, a collective; anything else as it is. No backend sends int16."""
    if not isinstance(x, DTensor):
        return x
    return x.int().full_tensor().short() if x.dtype == torch.int16 else x.full_tensor()


def sharded_dims(p: DTensor) -> list[int]:
    """Return the mesh dimensions over which a parameter is not simply repeated."""
    dims = enumerate(p.placements)
    return [dim for dim, placement in dims if not isinstance(placement, Replicate)]


def shard_axis(p: DTensor, flatten: bool | None) -> int:
    """Return what shards cut of a parameter: -1 its bank, 0 rows, 1 columns, 2 and 3 within columns."""
    dim = next(placement.dim for placement in p.placements if isinstance(placement, Shard))
    return dim - 1 if p.ndim == 3 and not flatten else dim


def kind_of(p: DTensor, flatten: bool | None) -> type[Bucket]:
    dims = sharded_dims(p)
    if len(dims) != 1 or type(p.placements[dims[0]]) is not Shard or shard_axis(p, flatten) > 1:
        return Gathered
    return Whole if shard_axis(p, flatten) < 0 else Exchanged


def new_state(name: str, dtype: torch.dtype, p: DTensor, group: dict) -> DTensor:
    """Return zeros for a parameter, placed as it is; second_moment (matrices, numbers) is sharded with a
    bank's matrices, and otherwise the same on all ranks."""
    if name != "second_moment":
        return torch.zeros_like(p, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)
    by_matrices = kind_of(p, group["flatten"]) is Whole
    rows, numbers = stacks_of(p, p.shape, group)[0].whole_shape(name)
    placements = p.placements if by_matrices else [Replicate()] * p.device_mesh.ndim
    mine = torch.zeros(p.to_local().size(0) if by_matrices else rows, numbers, device=p.device)
    shape = torch.Size((rows, numbers))
    stride = numbers, 1
    return DTensor.from_local(mine, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def state_of(optimizer: Muon, p: DTensor, group: dict) -> dict[str, DTensor]:
    """Return the state of a parameter, in optimizer.state, made of zeros at first use."""
    state = optimizer.state[p]
    for name, dtype in state_kinds(group).items():
        if name not in state:
            state[name] = new_state(name, dtype, p, group)
    return {name: state[name] for name in state_kinds(group)}


def local_gradient(p: DTensor) -> Tensor | None:
    """Return the local part of p.grad, which must be placed as p is."""
    if p.grad is None:
        return None
    if p.grad.placements != p.placements:
        raise refusal(f"gradients placed as their parameters, {p.placements}", p.grad.placements,
                      "redistribute them before the step")
    return p.grad.to_local()


def look_ahead(M: Tensor, G: Tensor | None, group: dict) -> Tensor:
    """Return U of muon.momentum_update, with M left as it is: whether it may move, the owner will say."""
    if G is None:
        return torch.zeros_like(M)
    M = M.lerp(G, 1 - group["momentum"])
    return G.lerp(M, group["momentum"]) if group["nesterov"] else M


def signs_of_life(G: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Return (B,): 1 where a piece of a gradient has an entry that is not 0, else 0; NaN for a missing
    gradient, even of an empty piece."""
    if G is None:
        return torch.full((count,), math.nan, device=device)
    return (G.flatten(1) != 0).any(1).float()


def finite(U: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Return U, with zeros for each of the B matrices that does not move, and which of them are finite. alive
    (B,): the sum of all signs of life."""
    alive = alive.view(-1, 1, 1)
    ok = torch.isfinite(largest(U) + alive)
    return torch.where(ok & (alive > 0), U, 0), ok.view(-1)


def chunk(size: int, parts: int, i: int) -> tuple[int, int]:
    """Return the bounds of the i-th part, as torch.chunk cuts it and FSDP2 shards it."""
    step = -(-size // parts)
    return min(i * step, size), min((i + 1) * step, size)


class Whole(Bucket):
    """A bucket of matrices that lie whole on one rank each: to that rank they are units in a world of one."""
    alone = True
    local = staticmethod(local)

    def state(self, stack: Stack) -> dict[str, Tensor]:
        found = state_of(self.optimizer, stack.param, stack.group)
        return {name: stack.of_state(name, x.to_local()) for name, x in found.items()}

    def gradient(self, stack: Stack) -> Tensor | None:
        local_gradient(stack.param)  # refuses one that is placed otherwise
        return super().gradient(stack)


class Exchanged(Bucket):
    """A bucket of units whose pieces lie on all ranks; `cut` says which rank has which rows or columns."""

    def __init__(self, *args):
        super().__init__(*args)
        self.divided = False  # of its state each rank has the part that its weights need
        self.numels = {(stack, rank): self.numel(stack, rank)
                       for stacks in self.stacks for stack in stacks for rank in range(self.world_size)}

    @staticmethod
    def stackable(stack: Stack) -> bool:
        return len(stack.blocks) == 1  # shards cut blocks unlike

    def axis(self, stack: Stack) -> int:
        return shard_axis(stack.param, stack.flatten)

    def cut(self, stack: Stack, rank: int) -> tuple[int, int]:
        """Return the rows or columns of a unit that lie on a rank: from, to."""
        _, rows, columns, *inner = stack.bank
        if self.axis(stack) == 1:
            begin, end = chunk(columns, self.world_size, rank)
            width = math.prod(inner)
            return begin * width, end * width
        first = self.first_row(stack)
        begin, end = chunk(rows, self.world_size, rank)
        return min(max(begin - first, 0), stack.m), min(max(end - first, 0), stack.m)

    def first_row(self, stack: Stack) -> int:
        """Return the first row of a block; `cut` may have numbered those of a single matrix through."""
        return sum(stack.blocks[:stack.number + (stack.start if stack.bank[0] == 1 else 0)])

    def numel(self, stack: Stack, rank: int) -> int:
        begin, end = self.cut(stack, rank)
        other_side = stack.m if self.axis(stack) else stack.n
        return len(stack) * (end - begin) * other_side

    def piece(self, stack: Stack, x: Tensor) -> Tensor:
        """Return my piece (B, rows, ...) of each matrix in x, my part of a tensor like the parameter."""
        if self.axis(stack) == 1:
            return stack.of(x)
        matrices, rows, *_ = stack.bank
        begin, end = self.cut(stack, self.rank)
        first, _ = chunk(rows, self.world_size, self.rank)
        row = max(self.first_row(stack) + begin - first, 0)
        where = slice(stack.start, stack.stop) if matrices > 1 else slice(1)
        return as_bank(x, stack.flatten)[where, row:row + end - begin]

    def state(self, stack: Stack) -> dict[str, Tensor]:
        views = {}
        for name, x in state_of(self.optimizer, stack.param, stack.group).items():
            mine = x.to_local()
            views[name] = stack.of_state(name, mine) if name == "second_moment" else self.piece(stack, mine)
        return views

    def packet(self, owner: int, rank: int, back: bool) -> list[int]:
        """Return the sizes of what travels between the owner of some stacks and a rank: its pieces of their
        matrices, their flags and, on the way back, the bits of their V."""
        stacks = self.stacks[owner]
        sizes = [self.numels[stack, rank] for stack in stacks]
        sizes += [len(stack) for stack in stacks]
        for stack in stacks if back else ():
            bits = len(stack) * max(stack.shape[1:]) * 4 // self.wire.itemsize
            sizes.append(bits if stack.group["normuon_beta2"] is not None else 0)
        return sizes

    def exchange(self, parts: list[Tensor], back: bool) -> Flight:
        """Launch the transfer of pieces to their owners, or back from them. parts: in the order of ranks."""
        ranks = range(self.world_size)
        given = [sum(self.packet(self.rank, rank, back)) for rank in ranks]
        taken = [sum(self.packet(owner, self.rank, back)) for owner in ranks]
        if not back:
            given, taken = taken, given
        nothing = torch.empty(0, dtype=self.wire, device=self.device)  # a rank may own no unit of a bucket
        send = torch.cat([nothing, *(part.reshape(-1).to(nothing.dtype) for part in parts)])
        received = send.new_empty(sum(taken))
        handle = _all_to_all(received, send, taken, given, group=self.group, async_op=True)
        return Flight(handle, received, send)

    def unpacked(self, received: Tensor, back: bool) -> list[list[tuple]]:
        """Return (stack, piece (B, rows, columns), flags, bits of V or None) of all that each rank sent."""
        found = []
        for rank in range(self.world_size):
            sizes = self.packet(rank, self.rank, back) if back else self.packet(self.rank, rank, back)
            stacks = self.stacks[rank if back else self.rank]
            parts = received[:sum(sizes)].split(sizes)
            received = received[sum(sizes):]
            k = len(stacks)
            pieces = [self.as_piece(stack, x) for stack, x in zip(stacks, parts)]
            found.append(list(zip_longest(stacks, pieces, parts[k:2 * k], parts[2 * k:])))
        return found

    def as_piece(self, stack: Stack, x: Tensor) -> Tensor:
        if self.axis(stack):
            return x.view(len(stack), stack.m, -1)
        return x.view(len(stack), -1, stack.n)

    def start(self) -> None:
        if self.pending is not None:
            return
        parts = []
        for stacks in self.stacks:
            alive = []
            for stack in stacks:
                M = self.state(stack)["momentum_buffer"]
                G = local_gradient(stack.param)
                if G is not None:
                    G = self.piece(stack, G).float()
                parts.append(look_ahead(M, G, stack.group))
                alive.append(signs_of_life(G, len(stack), self.device))
            parts += alive
        self.pending = self.exchange(parts, back=False)

    def receive(self) -> Tensor:
        received = self.pending.wait()
        self.pending = None
        return received

    def update(self, received: Tensor) -> dict[Stack, tuple[Tensor, Tensor]]:
        ahead = {}
        for from_ranks in zip(*self.unpacked(received, back=False)):
            stacks, pieces, flags, _ = zip(*from_ranks)
            U = torch.cat(pieces, 1 + self.axis(stacks[0]))
            alive = sum(flag.float() for flag in flags)
            ahead[stacks[0]] = finite(U, alive)
        results = self.orthogonalize(ahead)
        return {stack: (self.normalized(stack, O, ok), ok) for stack, (O, ok) in results.items()}

    def send(self, results: dict[Stack, tuple[Tensor, Tensor]]) -> None:
        stacks = self.stacks[self.rank]
        tail = [results[stack][1] for stack in stacks]
        for stack in stacks:
            if stack.group["normuon_beta2"] is not None:
                tail.append(self.state(stack)["second_moment"].reshape(-1).view(self.wire))
        parts = []
        for rank in range(self.world_size):
            for stack in stacks:
                O, _ = results[stack]
                begin, end = self.cut(stack, rank)
                parts.append(O.narrow(1 + self.axis(stack), begin, end - begin))
            parts += tail
        self.sent = self.exchange(parts, back=True)

    def apply(self) -> Tensor:
        arrived = self.unpacked(self.sent.wait(), back=True)
        self.sent = None
        done = torch.zeros((), dtype=torch.int64, device=self.device)
        for results in arrived:
            for stack, O, ok, V in results:
                self.apply_piece(stack, O, ok, V)
                done += ok.sum().long()
        return self.num_matrices - done

    def apply_piece(self, stack: Stack, O: Tensor, ok: Tensor, V: Tensor) -> None:
        """Move my piece of the momentum and of the weights."""
        p = stack.param
        state = self.state(stack)
        rates = self.optimizer.rates(stack)
        W = self.piece(stack, local(p))
        M = state["momentum_buffer"]
        G = local_gradient(p)
        if G is not None:
            moves = ok.bool().view(-1, *[1] * (M.ndim - 1))
            G = torch.where(moves, self.piece(stack, G).float(), M)
            M.lerp_(G, 1 - stack.group["momentum"])
        if "second_moment" in state:
            state["second_moment"].copy_(V.clone().view(torch.float32).view(len(stack), -1))
        O = O.reshape(W.shape)
        if "mantissa" in state:
            W.copy_(step_master(W, state["mantissa"], O, ok, *rates))
        else:
            decay_and_step(W, O, ok, *rates)


class Gathered(Bucket):
    """A bucket for all other placements: every rank gathers gradient, state and weights of each parameter,
    computes everything, and keeps its part."""
    alone = True

    def receive(self) -> dict[Stack, Tensor]:
        self.whole = {}
        for stack in self.stacks[0]:
            p = stack.param
            if p not in self.whole:
                G = local_gradient(p)
                if G is None:  # here: the matrix is skipped everywhere
                    G = torch.full_like(local(p), math.nan)
                state = state_of(self.optimizer, p, stack.group)
                kept = {"weights": p.full_tensor(), "gradient": like(p, G).full_tensor()}
                for name, x in state.items():
                    kept[name] = x.full_tensor().contiguous()  # torch 2.11 returns gathered columns strided
                self.whole[p] = kept
        return super().receive()

    def gradient(self, stack: Stack) -> Tensor:
        return stack.of(self.whole[stack.param]["gradient"]).reshape(stack.shape)

    def weights(self, stack: Stack) -> Tensor:
        return stack.of(self.whole[stack.param]["weights"])

    def state(self, stack: Stack) -> dict[str, Tensor]:
        kept = self.whole[stack.param]
        return {name: stack.of_state(name, kept[name]) for name in state_kinds(stack.group)}

    def apply(self) -> Tensor:
        skipped = super().apply()
        for p, kept in self.whole.items():
            for name, x in [("weights", p), *self.optimizer.state[p].items()]:
                if name in kept:
                    local(x).copy_(local_part(kept[name], x))
        self.whole = {}
        return skipped


def like(p: DTensor, x: Tensor) -> DTensor:
    """Return the DTensor of which x is the local part, placed as p is."""
    shape = dict(shape=p.shape, stride=p.stride())
    return DTensor.from_local(x, p.device_mesh, p.placements, run_check=False, **shape)


def local_part(whole: Tensor, x: DTensor) -> Tensor:
    """Return the local part of what every rank holds whole, placed as x is."""
    everywhere = [Replicate()] * x.device_mesh.ndim
    placed = DTensor.from_local(whole, x.device_mesh, everywhere, run_check=False)
    return placed.redistribute(x.device_mesh, x.placements).to_local()
