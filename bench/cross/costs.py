"""What a step launches, from the kernels that inductor made and the operations outside of graphs."""

from collections import Counter, defaultdict

import torch

from bench import floors
from bench.cross.rates import ACHIEVED, SHEET, Launch, milliseconds
from bench.cross.trace import Trace
from tools.gpus import Gpu
from train_gpt import Config


def launches_of(trace: Trace, step: int):
    """Yield a Launch for each kernel and operation of a step; those of attention without their FLOPs."""
    phase = f"step {step}"
    for (called, number), calls in trace.calls.items():
        if called != phase:
            continue
        graph = trace.graphs[number]
        for kernel in graph.kernels:
            kind = "fp8" if kernel.fp8 else "bf16"
            if kernel.part == "attention":
                kind = "attention"
            yield Launch(kernel.part, str(graph), kernel.name, calls, kernel.bytes, kernel.flops, kind)

    for (called, part, name), row in trace.eager.items():
        if called == phase and not name.startswith("c10d"):  # collectives are counted apart
            n = row["n"]
            yield Launch(part, "eager", name, n, row["bytes"] / n, row["flops"] / n, "bf16")


def mean_step(trace: Trace, cfg: Config, first: int) -> list[Launch]:
    """Return what the mean step from one of Adam's moves to the next launches; kernels alike in part, graph
    and size are one."""
    alike = {}
    for step in range(first, first + cfg.adam_every):
        for launch in launches_of(trace, step):
            key = launch.part, launch.graph, launch.bytes, launch.flops
            before = alike[key].times if key in alike else 0.0
            alike[key] = launch._replace(times=before + launch.times / cfg.adam_every)
    return list(alike.values())


def stage_launches(trace: Trace, cfg: Config, stage: int, ranks: int) -> list[Launch]:
    """Return what the mean step of a stage launches, after its first steps, which make tables."""
    end = (*cfg.stage_starts[1:], cfg.train_steps)[stage]
    first = min(cfg.stage_starts[stage] + cfg.adam_every, end - cfg.adam_every)

    # inductor knows no documents.
    sequences = max(cfg.slices, ranks)
    docs = floors.synthetic(cfg, first, sequences)[: sequences // ranks]
    keys = floors.keys_seen(cfg, docs, stage)
    found = with_attention(mean_step(trace, cfg, first), 12 * cfg.model_dim * keys)
    if ranks == 1:
        return found

    device = torch.device("cuda")
    work = floors.optimizer_work(cfg, torch.bfloat16, first, len(docs), ranks, device)
    sent = work["communication"].link
    return [*found, Launch("communication", "-", "between ranks", 1, sent, 0, "link")]


def with_attention(launches: list[Launch], flops: float) -> list[Launch]:
    """Return the launches, those of attention with their parts of the FLOPs of a step: a backward pass has
    twice as many as a forward one."""
    def weight(launch: Launch) -> int:
        return 2 if "backward" in launch.graph else 1

    kernels = [launch for launch in launches if launch.kind == "attention"]
    total = sum(launch.times * weight(launch) for launch in kernels)
    others = [launch for launch in launches if launch.kind != "attention"]
    return others + [launch._replace(flops=flops * weight(launch) / total) for launch in kernels]


def by_part(launches: list[Launch], gpu: Gpu) -> dict[str, dict]:
    """Return {part: floor_ms at the data sheet's rates, ms at achieved ones, GB, launches}."""
    parts = defaultdict(Counter)
    for launch in launches:
        row = parts[launch.part]
        row["floor_ms"] += milliseconds(launch, gpu, SHEET)
        row["ms"] += milliseconds(launch, gpu, ACHIEVED)
        row["gb"] += launch.times * launch.bytes / 1e9
        row["launches"] += launch.times * (launch.kind != "link")
    return dict(sorted(parts.items()))


def costliest(launches: list[Launch], gpu: Gpu) -> list[tuple]:
    """Return (ms, times, part, graph, kernel) of the ten costliest launches at achieved rates."""
    rows = [(milliseconds(launch, gpu, ACHIEVED), launch.times, *launch[:3]) for launch in launches]
    return sorted(rows, reverse=True)[:10]
