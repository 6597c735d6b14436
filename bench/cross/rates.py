"""The least time of a kernel: what it moves and computes, at a part of what the data sheet of a GPU promises.

One cost model for bench.cross and bench.predict; imports neither torch nor Triton.
"""

from typing import NamedTuple

from tools.gpus import Gpu


class Launch(NamedTuple):
    """Kernels alike, in the mean step of a stage on one rank."""

    part: str  # as bench.step names them
    graph: str
    kernel: str  # operations that it computes, or "between ranks"
    times: float  # a step
    bytes: float  # of one, in memory or between ranks
    flops: float  # of one
    kind: str  # which rate bounds its operations: bf16, fp8 or attention; link: bytes go between ranks


class Rates(NamedTuple):
    """Parts of the data sheet that kernels reach, and what passes between two of them."""

    memory: float
    bf16: float
    fp8: float
    attention: float  # of the rate in bf16
    link: float
    gap_us: float


SHEET = Rates(1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
# What public runs on H100s reach, assumed of other GPUs too; bench/predict.py names the sources.
ACHIEVED = Rates(memory=0.9, bf16=0.8, fp8=0.66, attention=0.3, link=0.8, gap_us=2.0)


def milliseconds(launch: Launch, gpu: Gpu, rates: Rates):
    """Return the least time of all `times` of a launch. rates may hold arrays of one shape: so does the
    result."""
    if launch.kind == "link":
        return launch.times * launch.bytes / (1e6 * gpu.gb_s * rates.link)
    peak = gpu.fp8_tflops if launch.kind == "fp8" else gpu.tflops
    moving = launch.bytes / (1e9 * gpu.tb_s * rates.memory)
    computing = launch.flops / (1e9 * peak * getattr(rates, launch.kind))
    return launch.times * ((moving + computing + abs(moving - computing)) / 2 + rates.gap_us / 1000)
