"""Collectives among the ranks of one machine through memory that they share: a backend of torch.distributed.

gloo sends everything through TCP sockets, by threads of its own. Where each core has a rank at work, these
take its time, and every message waits until one of them gets a core. Here a rank copies what it sends into
memory that the others have mapped, and tells them where by a few bytes through a Unix socket. Each then reads
and adds for itself, in the thread that waits: asleep in a read of that socket, which ends with an error once
the other rank is gone.

The memory has no name in any folder, and its descriptor goes through the socket; so nothing is left behind,
however a rank ends. Sums are taken in the order of ranks. Those of two ranks are gloo's, to the last bit.

Only what a training step does is here; gloo does the rest.
"""
import functools
import mmap
import os
import socket
import struct
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "shared_memory"
NOTICE = struct.Struct("qqq")  # number of a buffer, first byte in it, what Neighbour.done says
SMALLEST = 2**16  # bytes of a buffer


def on_one_machine() -> bool:
    """Return whether all ranks are processes of one machine, as torchrun says."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def available() -> bool:
    """Return whether all ranks are on one machine, and its system can do this."""
    return on_one_machine() and hasattr(os, "memfd_create")


class Neighbour:
    """Another rank: the socket to it, and its buffers as they are mapped here."""

    def __init__(self, channel: socket.socket):
        self.channel = channel
        self.buffers = []
        self.heard = 0
        self.places = {}  # number of a collective -> (buffer, first byte) of what it sends to this rank
        self.done = 0  # it has read all of the collectives before this one

    def tell(self, notice: tuple[int, int, int], new: list[int]):
        """Send a notice, with the descriptor of its buffer if that is a new one."""
        try:
            socket.send_fds(self.channel, [NOTICE.pack(*notice)], new)
        except OSError as error:
            raise lost(error) from None

    def hear(self):
        """Wait for the next notice."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self.channel, NOTICE.size, 1)
        except OSError as error:
            raise lost(error) from None
        if not message:
            raise lost("closed by peer")
        for descriptor in descriptors:
            self.buffers.append(mapped(descriptor))
            os.close(descriptor)
        number, first, self.done = NOTICE.unpack(message)
        self.places[self.heard] = self.buffers[number], first
        self.heard += 1

    def part(self, collective: int, like: Tensor) -> Tensor:
        """Wait for what this rank sends in a collective: a tensor like this one."""
        while collective not in self.places:
            self.hear()
        buffer, first = self.places.pop(collective)
        return buffer[first : first + like.nbytes].view(like.dtype).view(like.shape)


def lost(reason) -> RuntimeError:
    return RuntimeError(f"Connection to another rank of this machine: {reason}")


def mapped(descriptor: int) -> Tensor:
    """Return the bytes of shared memory."""
    return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)


def meet(store, rank: int, world: int, timeout: timedelta) -> dict[int, Neighbour]:
    """Return the other ranks. Their sockets' addresses lie in no folder either."""
    channels = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(timeout.total_seconds())
        listener.bind("")  # the system chooses an address
        listener.listen(world)
        store.set(f"address {rank}", listener.getsockname().hex())
        for other in range(rank):
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            channel.connect(bytes.fromhex(store.get(f"address {other}").decode()))
            channel.send(struct.pack("q", rank))
            channels[other] = channel
        for _ in range(rank + 1, world):
            channel, _ = listener.accept()
            other, = struct.unpack("q", channel.recv(8))
            channels[other] = channel
    for channel in channels.values():
        channel.settimeout(timeout.total_seconds())
    return {other: Neighbour(channels[other]) for other in sorted(channels)}


class Exchange:
    """A collective under way."""

    def __init__(self, group: "SharedMemoryGroup", number: int, own: Tensor, expected: list[Tensor],
                 use: Callable[[list[Tensor]], None]):
        self.group, self.number, self.own, self.expected, self.use = group, number, own, expected, use

    @torch.no_grad()
    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for the parts of all ranks, and use them: add them up, or put them in their places."""
        if self.number in self.group.under_way:
            parts = [neighbour.part(self.number, self.expected[rank])
                     for rank, neighbour in self.group.neighbours.items()]
            parts.insert(self.group.rank(), self.own)
            self.use(parts)
            self.group.under_way.remove(self.number)
        return True


def by_gloo(name: str) -> Callable:
    """Return a method that calls gloo's. (An inherited one would keep Python's lock while it waits for a lock
    of gloo, whose threads want both.)"""
    def call(self, *args, **options):
        return getattr(self.gloo, name)(*args, **options)

    return call


class SharedMemoryGroup(dist.ProcessGroup):
    """A process group of one machine. All ranks call the same collectives in the same order."""

    def __init__(self, store, rank: int, world: int, timeout: timedelta):
        super().__init__(rank, world)
        self.gloo = dist.ProcessGroupGloo(store, rank, world, timeout)
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self.gloo)
        self.neighbours = meet(store, rank, world, timeout)
        self.buffers = []  # of this rank
        self.used = []  # the last collective that each of them served
        self.started = 0
        self.under_way = set()

    allgather = by_gloo("allgather")
    barrier = by_gloo("barrier")
    broadcast = by_gloo("broadcast")
    gather = by_gloo("gather")

    def allreduce(self, tensors, opts):
        if opts.reduceOp != dist.ReduceOp.SUM:
            return self.gloo.allreduce(tensors, opts)
        x, = tensors
        alike = [x] * self.size()
        return self.launch(alike, alike, functools.partial(add_up, x))

    def reduce_scatter_single(self, output, input, opts):
        assert opts.reduceOp == dist.ReduceOp.SUM, opts.reduceOp
        parts = input.view(self.size(), *output.shape).unbind()
        return self.launch(parts, parts, functools.partial(add_up, output))

    def all_gather_single(self, output, input, opts):
        places = output.view(self.size(), *input.shape).unbind()
        return self.launch([input] * self.size(), places, functools.partial(lay_down, places))

    def all_to_all_single(self, output, input, output_sizes, input_sizes, opts):
        places = output.split(output_sizes or len(output) // self.size())
        parts = input.split(input_sizes or len(input) // self.size())
        return self.launch(parts, places, functools.partial(lay_down, places))

    # As torch calls them before 2.13.
    _reduce_scatter_base = reduce_scatter_single
    _allgather_base = all_gather_single
    alltoall_base = all_to_all_single

    @torch.no_grad()
    def launch(self, parts, expected, use: Callable[[list[Tensor]], None]) -> Exchange:
        """Send parts[r] to each rank r; what comes from it is like expected[r]."""
        number = self.started
        self.started += 1
        self.under_way.add(number)
        done = min(self.under_way)

        # One tensor for several ranks is copied once.
        distinct = {id(parts[other]): parts[other] for other in self.neighbours}
        chosen, new = self.buffer_for(sum(part.nbytes for part in distinct.values()))
        self.used[chosen] = number
        firsts = {}
        end = 0
        for key, part in distinct.items():
            firsts[key] = end
            end += part.nbytes
            self.buffers[chosen][firsts[key] : end].view(part.dtype).view(part.shape).copy_(part)

        for other, neighbour in self.neighbours.items():
            neighbour.tell((chosen, firsts[id(parts[other])], done), new)
        for descriptor in new:
            os.close(descriptor)
        return Exchange(self, number, parts[self.rank()], expected, use)

    def buffer_for(self, size: int) -> tuple[int, list[int]]:
        """Return the number of a buffer that nobody reads any more, and its descriptor if it is a new one."""
        done = min(neighbour.done for neighbour in self.neighbours.values())
        free = [n for n, buffer in enumerate(self.buffers) if self.used[n] < done and len(buffer) >= size]
        if free:
            return min(free, key=lambda n: len(self.buffers[n])), []
        descriptor = os.memfd_create("ranks")
        os.ftruncate(descriptor, max(SMALLEST, 1 << (size - 1).bit_length()))
        self.buffers.append(mapped(descriptor))
        self.used.append(-1)
        return len(self.buffers) - 1, [descriptor]


def add_up(result: Tensor, parts: list[Tensor]):
    """Write the sum of the parts, which may hold the result itself."""
    torch.add(functools.reduce(torch.add, parts[:-1]), parts[-1], out=result)


def lay_down(places: list[Tensor], parts: list[Tensor]):
    """Copy each part to its place."""
    for place, part in zip(places, parts):
        place.copy_(part)


dist.Backend.register_backend(BACKEND, SharedMemoryGroup, devices=["cpu"])
