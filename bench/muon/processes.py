"""Forked processes to ask a question in: one that may hang or die, and gloo ranks with counted traffic."""
import multiprocessing
import multiprocessing.connection
import os
import random
import tempfile
import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.children import kill_group

COLLECTIVES = "gather", "reduce", "alltoall", "all_to_all", "broadcast", "scatter"
FORK = multiprocessing.get_context("fork")  # a subject is imported once, and a question may be any function


class NotPosed(Exception):
    """Says why a question cannot be put through the public interface."""


class Refused(Exception):
    """Says why the optimizer turned the parameters or settings away when it was built."""


class ChildFailed(Exception):
    """Tells the first line of an error in another process, or that it gave no answer."""


ANSWERS = {kind.__name__: kind for kind in (NotPosed, Refused, ChildFailed)}


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])[:160]


def isolated(limit_s: float, function, *args):
    """Return function(*args) of a forked process; after limit_s seconds it ends with all that it started."""
    with tempfile.TemporaryDirectory() as folder:
        child = FORK.Process(target=_child, args=(0, folder, _leader, (function, *args)))
        child.start()
        try:
            child.join(limit_s)
            if child.exitcode is None:
                raise ChildFailed(f"no answer within {limit_s:g} s")
            return _answer(folder, 0)
        finally:
            kill_group(child.pid)
            child.join()


def ranks(world_size: int, function, *args) -> list:
    """Return [function(rank, *args) of each rank], in gloo processes; an error of one ends them all."""
    with tempfile.TemporaryDirectory() as folder:
        job = _join_world, (world_size, folder, function, *args)
        children = [FORK.Process(target=_child, args=(rank, folder, *job)) for rank in range(world_size)]
        for child in children:
            child.start()
        waiting = {child.sentinel: rank for rank, child in enumerate(children)}
        answers = {}
        try:
            while waiting:
                for sentinel in multiprocessing.connection.wait(waiting):
                    rank = waiting.pop(sentinel)
                    answers[rank] = _answer(folder, rank)
            return [answers[rank] for rank in range(world_size)]
        finally:
            for child in children:
                child.kill()
                child.join()


def _leader(_, function, *args):
    os.setsid()
    return function(*args)


def _join_world(rank: int, world_size: int, folder: str, function, *args):
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    answer = function(rank, *args)
    dist.barrier()
    return answer


def _child(rank: int, folder: str, function, args) -> None:
    torch.set_num_threads(1)
    kind = None
    try:
        answer = function(rank, *args)
    except Exception as error:
        kind = type(error).__name__
        answer = str(error)
        if kind not in ANSWERS:
            kind, answer = "ChildFailed", first_line(error)
    torch.save((kind, answer), f"{folder}/{rank}.pt")
    os._exit(0)  # a backend's own clean-up may hang


def _answer(folder: str, rank: int):
    try:
        kind, answer = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    except FileNotFoundError:
        raise ChildFailed("the process died") from None
    if kind:
        raise ANSWERS[kind](answer)
    return answer


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends in collectives, as a ring sends them, and may delay each."""

    def __init__(self, longest_delay_s: float = 0.0, seed: int = 0):
        super().__init__()
        self.sent = 0.0
        self.calls = 0
        self.longest_delay_s = longest_delay_s
        self.dice = random.Random(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as what it sends
        name = function.overloadpacket.__name__
        if function.namespace in ("c10d", "_c10d_functional") and any(part in name for part in COLLECTIVES):
            W = dist.get_world_size()
            sizes = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args]
            passes = 2 if name.startswith(("allreduce", "all_reduce")) else 1
            self.sent += passes * max(sizes) * (W - 1) / W
            self.calls += 1
            time.sleep(self.longest_delay_s * self.dice.random())
        return function(*args, **(kwargs or {}))
