"""engine/shared_memory.py against gloo: the same collectives, and the same training to the last bit."""
import os
import random
import signal
import sys

import pytest
import torch
import torch.distributed as dist

from engine import shared_memory
from engine.endings import ALONE, explain
from muon import all_gather_flat, reduce_scatter_flat
from tests.helpers.dist import Ranks, run_ranks
from tests.helpers.runs import make_shards, on_rank

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="anonymous shared memory is Linux's")


def share_memory(rank: int) -> dist.ProcessGroup:
    """Put the group of shared memory in the place of the test's."""
    store = dist.PrefixStore("shared", dist.distributed_c10d._get_default_store())
    world = dist.get_world_size()
    dist.barrier()  # or one would close connections that another has yet to make
    dist.destroy_process_group()
    dist.init_process_group(shared_memory.BACKEND, store=store, rank=rank, world_size=world)
    return dist.group.WORLD


def whole_numbers(size: int, dtype: torch.dtype, seed) -> torch.Tensor:
    """Numbers of which all formats hold the sums over some ranks exactly, in whatever order."""
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    return torch.randint(0, 20, (size,), generator=generator).to(dtype)


def start_one(rank: int, world: int, i: int, chance: random.Random):
    """Start the i-th collective, chosen alike on all ranks. Returns (handle, where the result comes)."""
    kind = chance.choice(["sum", "largest", "scatter", "gather", "exchange", "objects"])
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.int64])
    size = chance.choice([1, 7, 1000, 70_000])
    if kind == "sum" or kind == "largest":
        x = whole_numbers(size, dtype, (i, rank))
        op = dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX
        return dist.all_reduce(x, op=op, async_op=True), x
    if kind == "scatter":
        found = torch.empty(size, dtype=dtype)
        given = whole_numbers(size * world, dtype, (i, rank))
        return reduce_scatter_flat(found, given, async_op=True), found
    if kind == "gather":
        found = torch.empty(size * world, dtype=dtype)
        return all_gather_flat(found, whole_numbers(size, dtype, (i, rank)), async_op=True), found
    if kind == "exchange":
        sizes = [[chance.choice([0, 1, 5, size]) for _ in range(world)] for _ in range(world)]
        received = [sizes[other][rank] for other in range(world)]
        found = torch.empty(sum(received), 3, dtype=dtype)
        given = whole_numbers(3 * sum(sizes[rank]), dtype, (i, rank)).view(-1, 3)
        return dist.all_to_all_single(found, given, received, sizes[rank], async_op=True), found
    said = [None] * world
    dist.all_gather_object(said, (rank, i))
    return None, torch.tensor(said)


def many(rank: int, world: int, shared: bool) -> list:
    """Results of 80 collectives, up to six of them under way at once and waited for in any order."""
    if shared:
        share_memory(rank)
    chance = random.Random(0)
    under_way, results = [], []
    for i in range(80):
        under_way.append(start_one(rank, world, i, chance))
        while len(under_way) > chance.choice([0, 2, 5]):
            handle, found = under_way.pop(chance.randrange(len(under_way)))
            if handle is not None:
                handle.wait()
            results.append(found)
    for handle, found in under_way:
        if handle is not None:
            handle.wait()
        results.append(found)
    return results


@pytest.mark.parametrize("world", [2, 5])
def test_collectives_are_those_of_gloo(world):
    gloo, shared = (run_ranks(world, many, backend) for backend in (False, True))
    for theirs, ours in zip(gloo, shared):
        assert len(ours) == len(theirs) and all(map(torch.equal, theirs, ours))


def memory_of_steps(rank: int, world: int) -> list[int]:
    """Bytes of this rank's buffers after each of some equal steps."""
    group = share_memory(rank)
    bytes_after = []
    for _ in range(30):
        x = torch.ones(50_000)
        handles = [dist.all_reduce(x, async_op=True) for x in (x, x.clone())]
        for handle in handles:
            handle.wait()
        dist.all_reduce(torch.ones(()))
        bytes_after.append(sum(map(len, group.buffers)))
        assert all("memfd" in line for line in open("/proc/self/maps") if "ranks" in line)  # no file's
    return bytes_after


def test_memory_is_used_again():
    for sizes in run_ranks(3, memory_of_steps):
        assert 0 < sizes[3] == sizes[-1] < 2_000_000


def one_is_killed(rank: int, world: int, under_way: bool) -> str | None:
    """Return what the others are told, once it is gone or while they wait for it."""
    share_memory(rank)
    dist.all_reduce(torch.ones(3))
    if under_way:
        handle = dist.all_reduce(torch.ones(3), async_op=True)
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if under_way:
            handle.wait()
        for _ in range(2):
            dist.all_reduce(torch.ones(3))
    except RuntimeError as error:
        assert explain(error) == ALONE
        return str(error)


@pytest.mark.parametrize("under_way", [False, True])
def test_a_rank_that_is_killed_ends_the_others(under_way):
    *others, killed = Ranks(3, one_is_killed, under_way).join()
    assert killed is None
    assert all(said.startswith("Connection to another rank of this machine: ") for said in others)


def test_training_on_two_ranks_is_that_over_gloo_to_the_last_bit(tmp_path):
    folder = make_shards(tmp_path)
    settings = ["--ngram_rows=50", "--slices=6", "--batch_tokens=384", "--save_final=on"]
    gloo, shared = (run_ranks(2, on_rank, folder, settings, hook) for hook in (None, share_memory))
    for theirs, ours in zip(gloo, shared):
        assert (ours.code, ours.err) == (0, "")
        assert ours.train == theirs.train and ours.val == theirs.val


@pytest.mark.parametrize("here, expected", [("4", True), ("2", False), (None, False)])
def test_ranks_of_several_machines_take_gloo(monkeypatch, here, expected):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert shared_memory.available() == expected
