"""Run a function on several ranks: forked processes of one thread each that share a gloo process group.

Nothing here has a time limit: pytest's own ends a test that hangs, and the ranks with it.
"""
import multiprocessing
import os
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.files import ROOT

PRELOADED = ["torch._dynamo", "torch.distributed.tensor", "tests.helpers.runs"]  # imported once for all ranks


def _rank(rank: int, world: int, folder: Path, function, args) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)  # unlike a port, nobody else can take it meanwhile
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        dist.barrier()  # or one could end, and close connections that another has yet to make
        result = function(rank, world, *args)
        torch.save(result, folder / f"{rank}.partial")
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    (folder / f"{rank}.partial").rename(folder / f"{rank}.pt")
    os._exit(0)  # gloo's threads now and then outlive the interpreter and abort it: "terminate called ..."


class Ranks:
    """function(rank, world, *args) at work on every rank, each in a process of its own."""

    def __init__(self, world: int, function, *args):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the fork server inherits it
        context = multiprocessing.get_context("forkserver")
        if sys.platform != "darwin":  # whose libraries, once loaded, may abort a forked process
            context.set_forkserver_preload(PRELOADED)
        with pytest.MonkeyPatch.context() as patch:  # before Python 3.14 the server's imports ignore sys.path
            patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
            forkserver.ensure_running()
        self.files = tempfile.TemporaryDirectory()
        self.folder = Path(self.files.name)
        self.processes = []
        for rank in range(world):
            arguments = rank, world, self.folder, function, args
            self.processes.append(context.Process(target=_rank, args=arguments, daemon=True))
        for process in self.processes:
            process.start()

    def join(self) -> list:
        """Wait for all ranks and return what the function returned on each; None for one that was killed.

        Raises AssertionError with the traceback of the first rank that failed.
        """
        try:
            for process in self.processes:
                process.join()
        finally:
            for process in self.processes:
                process.kill()
        errors = sorted(self.folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        assert not errors, errors[0].read_text()
        paths = [self.folder / f"{rank}.pt" for rank in range(len(self.processes))]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def run_ranks(world: int, function, *args) -> list:
    """Return [function(rank, world, *args) for each rank], each from a process of its own."""
    ranks = Ranks(world, function, *args)
    results = ranks.join()
    codes = [process.exitcode for process in ranks.processes]
    assert codes == [0] * world, f"expected every rank to end by itself, found exit codes {codes}"
    return results
