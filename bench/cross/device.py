"""A GPU that is not there: torch takes tensors without memory for CUDA's, traces them and compiles for them.

device.cpp registers a CUDA backend whose streams and events do nothing, at the places that libtorch has for a
backend; it must be loaded before torch is imported. What torch.cuda asks of a driver is answered here.
"""
import contextlib
import ctypes
import hashlib
import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from data.errors import UsageError
from data.files import ROOT, written_whole


class Chip(NamedTuple):
    """What compilers ask of a GPU, by the vendor's tables."""
    gpu: str  # its name in tools.gpus
    major: int
    minor: int
    processors: int
    shared_bytes: int  # of shared memory for one block of threads
    cache_mib: int  # of the second level


CHIPS = {chip.gpu: chip for chip in (
    Chip("H100", 9, 0, 132, 232_448, 50),
    Chip("A100", 8, 0, 108, 166_912, 40),
    Chip("4090", 8, 9, 128, 101_376, 72),
    Chip("B200", 10, 0, 148, 232_448, 126),
)}


def library() -> Path:
    """Return the compiled device.cpp, built where it is missing: a few seconds."""
    source = Path(__file__).with_name("device.cpp")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    if [*(torch_folder / "lib").glob("libtorch_cuda.*")]:
        raise UsageError("expected a libtorch for CPUs, whose place for CUDA is free, found libtorch_cuda "
                         "beside it; install torch's build for CPUs into an environment of its own")
    made_of = source.read_bytes() + (torch_folder / "version.py").read_bytes() + bytes(torch_folder)
    key = hashlib.sha256(made_of).hexdigest()[:16]
    built = ROOT / f".cache/cross/device-{key}.so"
    if built.exists():
        return built
    folders = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib"]
    command = ["g++", "-shared", "-fPIC", "-std=c++20", source, *folders, "-lc10", "-ltorch_cpu", "-o"]
    try:
        with written_whole(built) as file:
            subprocess.run([*command, file.name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).splitlines()[0]
        raise UsageError(f"expected to build {source.name} by g++ against this torch, found {said}; install "
                         "g++ and the torch of requirements.txt") from None
    return built


class Idle:
    """A stream or an event: whatever was asked of it has happened."""
    device_index = stream_id = cuda_stream = 0
    device_type = 1

    def __init__(self, *args, **kwargs):
        pass

    def query(self) -> bool:
        return True

    def record(self, *args) -> None:
        pass

    wait = wait_event = wait_stream = record


def pretend(chip: Chip, gib: float, waited) -> None:
    """Let torch believe in one such GPU with so much memory. waited(name): called where the host would wait.

    Raises UsageError where torch was imported before, or does not offer what this needs.
    """
    built = library()
    try:
        ctypes.CDLL(str(built))
    except OSError as error:
        raise UsageError(f"expected a libtorch with the symbols of device.cpp, found {error}; install the "
                         "torch of requirements.txt for CPUs") from None
    import torch

    if torch._C._get_accelerator().type != "cuda":
        raise UsageError("expected torch not to be imported yet, found it; start by python -m bench.cross")
    memory = int(gib * 2**30)
    properties = SimpleNamespace(
        name=f"NVIDIA {chip.gpu}", major=chip.major, minor=chip.minor, multi_processor_count=chip.processors,
        total_memory=memory, L2_cache_size=chip.cache_mib * 2**20, warp_size=32,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048 if chip.minor == 0 else 1536, max_threads_per_block=1024,
        shared_memory_per_block=49_152, shared_memory_per_block_optin=chip.shared_bytes,
        shared_memory_per_multiprocessor=chip.shared_bytes + 1024, is_integrated=False, gcnArchName="")
    answers = dict(
        is_available=True, is_initialized=True, init=None, _lazy_init=None, device_count=1, current_device=0,
        set_device=None, get_device_properties=properties, get_device_capability=(chip.major, chip.minor),
        get_device_name=properties.name, get_rng_state_all=[], is_bf16_supported=True, memory_allocated=0,
        max_memory_allocated=0, max_memory_reserved=0, reset_peak_memory_stats=None, empty_cache=None,
        is_current_stream_capturing=False, _exchange_device=0, _maybe_exchange_device=0, _get_device_index=0,
        mem_get_info=(memory, memory), current_stream=Idle(), default_stream=Idle(), set_stream=None,
        get_rng_state=torch.zeros(16, dtype=torch.uint8), set_rng_state=None)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    for name in ("device", "device_of", "stream", "_DeviceGuard"):
        setattr(torch.cuda, name, contextlib.nullcontext)
    torch.cuda.synchronize = Idle.synchronize = lambda *args: waited("synchronize")
    torch.cuda.Event = torch.cuda.Stream = Idle
    for name in ("getCurrentRawStream", "getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", lambda *args: 0)
    answer_for_compilers(torch)


def answer_for_compilers(torch) -> None:
    """Give torch.compile, which took references to torch.cuda's functions at its import, the same answers."""
    import torch._dynamo.device_interface as interfaces
    import torch._subclasses.fake_tensor as fake_tensor

    cuda = interfaces.CudaInterface
    for name in ("current_device", "set_device", "device_count", "stream", "current_stream", "set_stream",
                 "synchronize", "get_device_properties", "memory_allocated", "is_bf16_supported"):
        setattr(cuda, name, staticmethod(getattr(torch.cuda, name)))
    cuda.exchange_device = staticmethod(torch.cuda._exchange_device)
    cuda.maybe_exchange_device = staticmethod(torch.cuda._maybe_exchange_device)
    cuda.get_raw_stream = staticmethod(lambda device: 0)
    cuda.device, cuda.Event, cuda.Stream = torch.cuda.device, Idle, Idle
    interfaces.get_cuda_stream = cuda.get_raw_stream
    fake_tensor.init_gpu_context = lambda device: None
    torch.autograd.set_multithreading_enabled(False)  # this thread knows what is fake
