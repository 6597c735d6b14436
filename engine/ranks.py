"""This process among the ranks: its device and the few collectives that the trainer itself needs."""
import ctypes
import os
import platform
import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import RunError, UsageError
from data.machine import output
from engine import shared_memory

# How long a rank waits for the others in a collective. NCCL's own 10 minutes would end a run of several
# machines, some of which find graphs of an earlier run compiled while others compile them in the warm-up.
PATIENCE = timedelta(minutes=40)


class Runtime:
    """Rank, world size and device of this process, as torchrun's variables say; without them it is alone.
    cpu: whether to leave GPUs alone."""

    def __init__(self, cpu: bool = False):
        check_environment()
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if torch.cuda.is_available() and not cpu:
            check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        else:
            if not cpu:
                check_driver()
            self.device = torch.device("cpu")
            keep_freed_memory()

        if self.world > 1 and not dist.is_initialized():
            if shared_memory.on_one_machine():
                keep_gloo_at_home()
            if self.device.type == "cuda":
                dist.init_process_group("nccl", timeout=PATIENCE, device_id=self.device)
            else:
                backend = shared_memory.BACKEND if shared_memory.available() else "gloo"
                dist.init_process_group(backend, timeout=PATIENCE)

    def facts(self) -> list[str]:
        """Return what the log says of several ranks."""
        if self.world == 1:
            return []
        minutes = PATIENCE.total_seconds() / 60
        return [f"collectives: {dist.get_backend()}; a rank waits {minutes:g} minutes for the others"]

    def print0(self, *args, **kwargs):
        if self.rank == 0:
            say(*args, **kwargs)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def everywhere(self, fact: bool) -> bool:
        """Return whether something holds on every rank."""
        facts = [fact] * self.world
        if self.world > 1:
            dist.all_gather_object(facts, fact)
        return all(facts)

    def together(self, function, *args):
        """Call the function on every rank; a UsageError or RunError of one is raised on all of them."""
        result, error = None, None
        try:
            result = function(*args)
        except (UsageError, RunError) as e:
            error = e
        errors = [error]
        if self.world > 1:
            errors = [None] * self.world
            dist.all_gather_object(errors, error)
        for error in errors:
            if error is not None:
                raise error
        return result


class Hosts:
    """What ranks tell each other from host memory to host memory, over a group of its own, so that a thread
    beside the training can use it. All ranks do the same in the same order."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.group = None
        if world > 1:
            shared = dist.get_backend() == shared_memory.BACKEND
            self.group = dist.new_group(backend=shared_memory.BACKEND if shared else "gloo")

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the first sent[0] rows of x (n, width) to rank 0, the next ones to rank 1, and so on. Returns
        what comes, in the order of ranks: received[0] rows from rank 0 first."""
        if self.world == 1:
            return x
        found = x.new_empty(sum(received), x.size(1))
        into, out = found.view(torch.uint8), x.contiguous().view(torch.uint8)  # for any type of numbers
        dist.all_to_all_single(into, out, received, sent, group=self.group)
        return found

    def gather(self, shard: Tensor) -> Tensor | None:
        """Return the equal shards of all ranks, one after the other, on rank 0; None elsewhere."""
        if self.world == 1:
            return shard
        parts = [torch.empty_like(shard) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(shard, parts, group=self.group)
        return torch.cat(parts) if parts else None

    def agree(self, fact: bool) -> bool:
        """Return the fact of rank 0."""
        flag = torch.tensor([fact])
        if self.world > 1:
            dist.broadcast(flag, 0, group=self.group)
        return bool(flag)


def say(*args, file=None) -> None:
    """Print, unless nobody listens any more, as behind `| head`, on a terminal that was closed or a full
    disk: a run goes on without its screen."""
    try:
        print(*args, file=file, flush=True)
    except OSError:
        if file is None:
            sys.stdout = open(os.devnull, "w")


def check_environment() -> None:
    """Raise UsageError where torchrun's variables are incomplete, as in WORLD_SIZE=8 python train_gpt.py."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing and not alone:
        raise UsageError(f"expected torchrun's variables {', '.join(needed)}, found no {missing[0]}; start "
                         "by torchrun --standalone --nproc_per_node=8 train_gpt.py, or unset WORLD_SIZE")


def keep_gloo_at_home() -> None:
    """Let gloo listen on the loopback interface alone.

    By itself it looks up the machine's own name, which may take long or fail, and takes an interface that
    other machines can reach, for which macOS asks the user.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]  # Linux, macOS
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def unseen_gpu() -> str | None:
    """Return the first GPU that the driver lists although torch finds none, unless that was asked for."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    listed = output("nvidia-smi", "-L")
    return listed.splitlines()[0] if listed.startswith("GPU") else None


def check_driver() -> None:
    """Raise UsageError where a run would take the CPU beside a GPU that its torch cannot use."""
    gpu = unseen_gpu()
    if gpu is None:
        return
    build = "built without CUDA"
    if torch.version.cuda is not None:
        build = f"built for CUDA {torch.version.cuda}, for which the driver may be too old"
    raise UsageError(f"expected torch to find the GPU that nvidia-smi lists ({gpu}), found none: torch "
                     f"{torch.__version__} is {build}; update the driver or install a torch for it, or train "
                     "on the CPU: CUDA_VISIBLE_DEVICES= ./run.sh")


def check_gpus(ranks: int) -> None:
    gpus = torch.cuda.device_count()
    if ranks > gpus:
        raise UsageError(f"expected at most {gpus} ranks on this machine, one per GPU, found {ranks}; "
                         "lower --nproc_per_node")


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel.

    Activations of a few MB are allocated thousands of times, and the page faults cost more than the
    arithmetic (rms_norm of 2048 x 192: 4.1 against 0.8 ms).
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
