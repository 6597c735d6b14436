"""Run a function on several gloo processes and collect what they return."""
import multiprocessing
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, world_size: int, folder: str, function, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world_size), rank=rank,
                            world_size=world_size)
    try:
        torch.save(function(rank, world_size, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then outlive the interpreter and abort it: "terminate called without ..."


def run_ranks(world_size: int, function, *args) -> list:
    """[function(rank, world_size, *args) for each rank], each in a process of its own with one thread."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed.tensor"])  # one import for all ranks
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world_size, folder, function, args), nprocs=world_size, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]
