"""The least time of a step by part, from the bytes and operations of the kernels that inductor made, at rates
that are assumed."""
from collections import Counter, defaultdict

import torch

from bench import floors
from bench.cross.trace import Trace
from tools.gpus import Gpu
from train_gpt import Config

LAUNCH_S = 2e-6  # between two kernels; assumed
# Parts of the data sheet that kernels reach: public figures of H100s, assumed of others too.
BYTES, FLOPS, FP8, ATTENTION = 0.9, 0.8, 0.66, 0.3


def launches(trace: Trace, step: int, gpu: Gpu):
    """Yield (part, graph or operation, kernel's name, times, bytes of one, seconds of one) of a step's
    kernels."""
    phase = f"step {step}"

    def seconds(size: float, flops: float, rate: float) -> float:
        return max(size / (BYTES * 1e12 * gpu.tb_s), flops / (1e12 * rate)) + LAUNCH_S

    rate = FLOPS * gpu.tflops
    for (called, number), calls in trace.calls.items():
        graph = trace.graphs[number]
        for kernel in graph.kernels if called == phase else ():
            fastest = FP8 * gpu.fp8_tflops if kernel.fp8 else rate
            one = seconds(kernel.bytes, kernel.flops, fastest)
            yield kernel.part, str(graph), kernel.name, calls, kernel.bytes, one
    for (called, part, name), row in trace.eager.items():
        if called == phase and not name.startswith("c10d"):  # collectives are counted apart
            size = row["bytes"] / row["n"]
            flops = row["flops"] / row["n"]
            yield part, "eager", name, row["n"], size, seconds(size, flops, rate)


def stage_costs(trace: Trace, cfg: Config, stage: int, ranks: int, gpu: Gpu) -> tuple[dict, list]:
    """Return {part: launches, GB and ms of the mean step of a stage} after its first ones, and the ten
    costliest rows (ms, times, part, graph, kernel) of it; kernels alike in part, graph and bytes are one
    row."""
    end = (*cfg.stage_starts[1:], cfg.train_steps)[stage]
    first = min(cfg.stage_starts[stage] + cfg.adam_every, end - cfg.adam_every)  # the first steps make tables
    parts = defaultdict(Counter)
    alike = Counter()
    names = {}
    for step in range(first, first + cfg.adam_every):
        for part, graph, name, times, size, one in launches(trace, step, gpu):
            times = times / cfg.adam_every
            ms = 1000 * one
            row = parts[part]
            row["launches"] += times
            row["gb"] += times * size / 1e9
            row["ms"] += times * ms
            key = part, graph, size
            alike[key] += times
            names[key] = ms, name


    sequences = max(cfg.slices, ranks)
    docs = floors.synthetic(cfg, first, sequences)[: sequences // ranks]
    flops = 12 * cfg.model_dim * floors.keys_seen(cfg, docs, stage)  # inductor knows no documents
    least = flops / (1e9 * ATTENTION * gpu.tflops)
    parts["attention"]["ms"] = max(parts["attention"]["ms"], least)
    if ranks > 1:
        work = floors.optimizer_work(cfg, torch.bfloat16, first, len(docs), ranks, torch.device("cuda"))
        sent = work["communication"].link
        row = parts["communication"]
        row["gb"] = sent / 1e9
        row["ms"] = sent / 1e6 / gpu.gb_s

    rows = []
    for (part, graph, size), times in alike.items():
        ms, name = names[part, graph, size]
        rows.append((times * ms, times, part, graph, name))
    nothing = dict(launches=0, gb=0.0, ms=0.0)
    whole = {part: nothing | row for part, row in sorted(parts.items())}
    return whole, sorted(rows, reverse=True)[:10]
