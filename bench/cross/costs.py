"""The least time of a kernel: what it moves and computes, at a part of what the data sheet of a GPU promises.

The one cost model of bench.cross, bench.predict and bench.step; imports neither torch nor Triton.
"""
from collections import Counter, defaultdict
from typing import NamedTuple

from tools.gpus import Gpu


class Launch(NamedTuple):
    """Kernels alike, in the mean step of a stage on one rank."""
    part: str  # as bench.step names them
    graph: str
    operations: str
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


SHEET = Rates(memory=1.0, bf16=1.0, fp8=1.0, attention=1.0, link=1.0, gap_us=0.0)
# What public runs on H100s reach, assumed of other GPUs too; bench/predict.py names the sources.
ACHIEVED = Rates(memory=0.9, bf16=0.8, fp8=0.66, attention=0.3, link=0.8, gap_us=2.0)


def milliseconds(launch: Launch, gpu: Gpu, rates: Rates) -> float:
    """Return the least time of all `times` of a launch."""
    if launch.kind == "link":
        return launch.times * launch.bytes / (1e6 * gpu.gb_s * rates.link)
    peak = gpu.fp8_tflops if launch.kind == "fp8" else gpu.tflops
    moving = launch.bytes / (1e9 * gpu.tb_s * rates.memory)
    computing = launch.flops / (1e9 * peak * getattr(rates, launch.kind))
    return launch.times * (max(moving, computing) + rates.gap_us / 1000)


def step_ms(launches: list[Launch], gpu: Gpu, rates: Rates) -> float:
    return sum(milliseconds(launch, gpu, rates) for launch in launches)


def by_part(launches: list[Launch], gpu: Gpu) -> dict[str, Counter]:
    """Return {part: floor_ms at the data sheet's rates, ms at achieved ones, gb, gflop, launches}."""
    parts = defaultdict(Counter)
    for launch in launches:
        row = parts[launch.part]
        row["floor_ms"] += milliseconds(launch, gpu, SHEET)
        row["ms"] += milliseconds(launch, gpu, ACHIEVED)
        row["gb"] += launch.times * launch.bytes / 1e9
        row["gflop"] += launch.times * launch.flops / 1e9
        row["launches"] += launch.times * (launch.kind != "link")
    return dict(sorted(parts.items()))


def costliest(launches: list[Launch], gpu: Gpu) -> Counter:
    """Return {(part, graph, operations): ms at achieved rates}; most_common() has the costliest first."""
    found = Counter()
    for launch in launches:
        found[launch[:3]] += milliseconds(launch, gpu, ACHIEVED)
    return found
