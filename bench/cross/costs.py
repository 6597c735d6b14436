"""The least time of a step by part, from the bytes and operations of the kernels that inductor made, by rates that
are assumed."""
from collections import Counter, defaultdict
from typing import NamedTuple

import torch

from bench import floors
from bench.cross.trace import Trace
from tools.gpus import Gpu
from train_gpt import Config

LAUNCH_S = 2e-6  # between two kernels; assumed


class Rates(NamedTuple):
    """What kernels are assumed to reach, per second. The parts of the data sheet are public figures of H100s."""
    bytes: float
    flops: float
    fp8: float
    attention: float

    @staticmethod
    def of(gpu: Gpu) -> "Rates":
        return Rates(0.9e12 * gpu.tb_s, 0.8e12 * gpu.tflops, 0.66e12 * gpu.fp8_tflops, 0.3e12 * gpu.tflops)


def step_costs(trace: Trace, step: int, rates: Rates) -> dict[str, Counter]:
    """Return launches, bytes and seconds of each part of a step."""
    phase = f"step {step}"
    parts = defaultdict(Counter)

    def add(part: str, times: int, size: float, flops: float, rate: float) -> None:
        seconds = max(size / rates.bytes, flops / rate) + LAUNCH_S
        parts[part].update(launches=times, bytes=times * size, seconds=times * seconds)

    for (called, number), calls in trace.calls.items():
        if called == phase:
            for kernel in trace.graphs[number].kernels:
                add(kernel.part, calls, kernel.bytes, kernel.flops, rates.fp8 if kernel.fp8 else rates.flops)
    for (called, part, name), row in trace.eager.items():
        if called == phase and not name.startswith("c10d"):  # collectives are counted apart
            add(part, row["n"], row["bytes"] / row["n"], row["flops"] / row["n"], rates.flops)
    return parts


def stage_costs(trace: Trace, cfg: Config, stage: int, ranks: int, gpu: Gpu) -> dict[str, Counter]:
    """Return the same for the mean step of a stage after its first ones."""
    rates = Rates.of(gpu)
    first = cfg.stage_starts[stage] + cfg.adam_every  # the first steps of a stage make masks' tables
    steps = range(first, first + cfg.adam_every)
    parts = defaultdict(Counter)
    for step in steps:
        for part, found in step_costs(trace, step, rates).items():
            parts[part].update({key: value / len(steps) for key, value in found.items()})
    sequences = max(cfg.slices, ranks)
    docs = floors.synthetic(cfg, first, sequences)[: sequences // ranks]
    keys = floors.keys_seen(cfg, docs, stage)
    flops = 12 * cfg.model_dim * keys  # inductor knows no documents
    parts["attention"]["seconds"] = max(parts["attention"]["seconds"], flops / rates.attention)
    if ranks > 1:
        work = floors.optimizer_work(cfg, torch.bfloat16, first, len(docs), ranks, torch.device("cuda"))
        sent = work["communication"].link
        parts["communication"].update(bytes=sent, seconds=sent / gpu.gb_s / 1e9)
    return parts


def costliest(trace: Trace, step: int, gpu: Gpu, count: int = 10) -> list[tuple]:
    """Return (seconds in a step, launches, part, operations) of the kernels that take longest together: those that
    are alike in part, bytes and operations count as one."""
    rates = Rates.of(gpu)
    alike = defaultdict(Counter)
    names = {}
    for (called, number), calls in trace.calls.items():
        if called != f"step {step}":
            continue
        for kernel in trace.graphs[number].kernels:
            rate = rates.fp8 if kernel.fp8 else rates.flops
            seconds = max(kernel.bytes / rates.bytes, kernel.flops / rate) + LAUNCH_S
            key = str(trace.graphs[number]), kernel.kind, kernel.part, kernel.bytes
            alike[key].update(seconds=calls * seconds, launches=calls)
            names[key] = kernel.name
    top = sorted(alike, key=lambda key: -alike[key]["seconds"])[:count]
    return [(alike[key]["seconds"], alike[key]["launches"], *key, names[key]) for key in top]
