"""The process group that a run makes."""
import os
import socket
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from data.errors import UsageError
from engine.ranks import PATIENCE, Runtime
from tests.helpers.dist import run_ranks


def made_by_a_run(rank: int, world: int, folder: str, on_this_machine: int) -> tuple:
    """Return what gloo was told of time-outs, what the log says of it, that the ranks have found each
    other, and the interface that gloo was told to take."""
    dist.barrier()
    dist.destroy_process_group()  # that of the test
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="here", MASTER_PORT="0")
    os.environ["LOCAL_WORLD_SIZE"] = str(on_this_machine)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    store = dist.FileStore(f"{folder}/store", world)  # in place of a port, which another program might take
    init = partial(dist.init_process_group, store=store, rank=rank, world_size=world)
    with mock.patch.object(dist, "init_process_group", init):
        rt = Runtime()
    told = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    facts = rt.everywhere(True), rt.everywhere(rank == 0)
    return told, rt.facts(), rt.sum(torch.ones(())).item(), os.environ.get("GLOO_SOCKET_IFNAME"), facts


@pytest.mark.parametrize("on_this_machine, backend", [(1, "gloo"), (2, "shared_memory")])
def test_ranks_wait_for_one_that_compiles_longer_than_the_libraries_would(tmp_path, on_this_machine, backend):
    said = [f"collectives: {backend}; a rank waits 40 minutes for the others"]
    found = run_ranks(2, made_by_a_run, str(tmp_path), on_this_machine)
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    interface = loopback.pop() if on_this_machine == 2 else None
    assert found == 2 * [(PATIENCE, said, 2.0, interface, (True, False))]
    assert PATIENCE.total_seconds() == 2400


def test_more_ranks_on_a_machine_than_it_has_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="expected at most 2 ranks .*, found 3; lower --nproc_per_node"):
        Runtime()


def test_one_rank_waits_for_nobody():
    rt = Runtime()
    assert rt.facts() == [] and rt.everywhere(True) and not rt.everywhere(False)


def test_a_program_for_cpus_leaves_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Runtime(cpu=True).device == torch.device("cpu")
