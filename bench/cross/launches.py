"""What a step launches: the kernels that inductor made of its graphs, the operations outside of graphs, and
what ranks send each other."""
from collections import defaultdict

from bench import packing
from bench.cross.costs import Launch
from bench.cross.trace import Trace
from train_gpt import Config

LISTED = 3e8  # bytes of a step; kernels that only move memory, and less, are put together


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
        if called != phase:
            continue
        n = row["n"]
        if name.startswith("c10d"):
            yield Launch("communication", "between ranks", name, n, row["sent"] / n, 0, "link")
        else:
            yield Launch(part, "eager", name, n, row["bytes"] / n, row["flops"] / n, "bf16")


def together(launches, key_of) -> list[Launch]:
    """Return the launches, those with one key as one: the times are added up, sizes are the mean."""
    alike = defaultdict(list)
    for launch in launches:
        alike[key_of(launch)].append(launch)
    return list(map(as_one, alike.values()))


def as_one(launches: list[Launch]) -> Launch:
    times = sum(launch.times for launch in launches)
    moved = sum(launch.times * launch.bytes for launch in launches)
    flops = sum(launch.times * launch.flops for launch in launches)
    return launches[0]._replace(
        times=round(times, 6),
        bytes=round(moved / times),
        flops=round(flops / times),
    )


def as_listed(launch: Launch) -> Launch:
    """Return a launch without its name if it is small. The time of one that only moves memory is the sum of
    its parts at any rate, so that nothing is lost."""
    small = launch.times * launch.bytes < LISTED and not launch.flops
    return launch._replace(operations="others") if small else launch


def alike(launch: Launch) -> tuple:
    """Return what kernels have in common that are listed as one. One rate bounds those of one size."""
    names = launch[:3]
    if launch.flops:
        return names, launch.bytes, launch.flops, launch.kind
    return names, launch.kind


def mean_step(trace: Trace, cfg: Config, first: int) -> list[Launch]:
    """Return what the mean step from one of Adam's moves to the next launches."""
    found = []
    for step in range(first, first + cfg.adam_every):
        for launch in launches_of(trace, step):
            found.append(launch._replace(times=launch.times / cfg.adam_every))
    named = together(found, alike)
    return together(map(as_listed, named), alike)


def stage_launches(trace: Trace, cfg: Config, stage: int, ranks: int) -> list[Launch]:
    """Return what the mean step of a stage launches, after its first steps, which make tables."""
    end = (*cfg.stage_starts[1:], cfg.train_steps)[stage]
    first = min(cfg.stage_starts[stage] + cfg.adam_every, end - cfg.adam_every)

    # inductor knows no documents.
    sequences = max(cfg.slices, ranks)
    docs = packing.synthetic(cfg, first, sequences)[: sequences // ranks]
    keys = packing.keys_seen(cfg, docs, stage)
    return with_attention(mean_step(trace, cfg, first), 12 * cfg.model_dim * keys)


def with_attention(launches: list[Launch], flops: float) -> list[Launch]:
    """Return the launches, those of attention with their parts of the FLOPs of a step: a backward pass has
    twice as many as a forward one."""
    def weight(launch: Launch) -> int:
        return 2 if "backward" in launch.graph else 1

    kernels = [launch for launch in launches if launch.kind == "attention"]
    total = sum(launch.times * weight(launch) for launch in kernels)
    others = [launch for launch in launches if launch.kind != "attention"]
    return others + [launch._replace(flops=round(flops * weight(launch) / total)) for launch in kernels]
