"""The GPU path without a GPU: a whole schedule of the trainer at full size, traced, compiled and costed for a
GPU that is not there.

    python -m bench.cross [--gpu=H100] [--ranks=8] [--parts trace costs code] [--out=PATH] [--field=value ...]

trace  a short run through every stage on tensors without memory: the graphs that it makes, and when, and
       those that torch's cache would not keep for a second start; the lines at which the host would wait
       for the device; memory in use, by stage
costs  what inductor makes of the graphs: the least time of a step by part, from the bytes and operations of
       its kernels; memory with what the graphs need inside
code   the machine code of the last stage's kernels and the optimizers': registers, shared memory, spills

One rank is traced; others are pretended too. Needs Triton (bench/cross/requirements.txt) and g++, and touches
no driver. Exit code 1 if something is compiled while the clock runs, or a step waits for the device where it
need not. bench/CROSS.md says what was found, what is assumed, and what cannot be known this way.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

from bench.cross import device
from bench.cross.figures import page, write
from data.errors import UsageError, run_program
from tools.gpus import find_gpu

SHORT_DOCUMENT = 100  # tokens
AROUND = "warm-up", "validation", "saving", "loading"  # the clock stands still
ALLOWED = "synchronize", "read_stats"  # waits for a step that ended two steps ago


def parse(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="python -m bench.cross",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(device.CHIPS)}")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--parts", nargs="+", choices=("trace", "costs", "code"), default=["trace"])
    parser.add_argument("--backend", default="varlen", help="attention that a self-test is assumed to choose")
    parser.add_argument("--fp8", choices=("on", "off"), help="head in FP8; on where the GPU has it")
    parser.add_argument("--out", type=Path, help="writes PATH.json, the figures, and PATH.md, their page")
    return parser.parse_known_args(argv)


def seen(trace, cfg) -> dict:
    """Return graphs, waits and memory of a trace, and the steps in which Adam moved and rested, by stage."""
    graphs = {"inside the clock": Counter()}
    for graph in trace.graphs:
        timed = graph.phase.removeprefix("resumed: ") not in AROUND
        graphs.setdefault("inside the clock" if timed else graph.phase, Counter())[str(graph)] += 1
    if trace.refused:
        graphs["not kept for a second start"] = trace.refused
    waits = {"in steps": Counter(), "elsewhere": Counter()}
    for (phase, what, place), times in trace.waits.items():
        if phase != "start" and (what, place.split()[-1]) != ALLOWED:
            waits["in steps" if "step " in phase else "elsewhere"][f"{what} at {place}"] += times
    peaks = {}
    for phase, (size, where) in trace.peaks.items():
        name = re.sub(r"step (\d+)", lambda found: f"stage {cfg.stage(int(found[1]))}", phase)
        peaks[name] = max(peaks.get(name, (0, "")), (size / 2**30, where))
    with_adam = {phase for phase, number in trace.calls if trace.graphs[number].name == "adam_update_"}
    steps = defaultdict(Counter)
    for phase in {phase for phase, _ in trace.calls if "step " in phase}:
        run, _, step = phase.rpartition("step ")
        moves = "with Adam" if phase in with_adam else "without Adam"
        steps[cfg.stage(int(step))][run + moves] += 1
    return dict(graphs=graphs, waits=waits, peak_gib=peaks, steps=dict(sorted(steps.items())),
                saved=trace.saved, crowded=trace.crowded)


def warm_up_seconds(trace) -> dict[str, float]:
    """Return CPU seconds of this machine in the warm-up: of inductor by kind of graph, and of all before."""
    found = Counter()
    for graph in trace.graphs:
        if graph.phase == "warm-up":
            found[f"inductor: {graph}"] += graph.seconds
    found["tracing and autograd"] = trace.seconds["warm-up"] - found.total()
    return dict(found.most_common())


def memory_of_passes(trace, cfg) -> list[tuple[int, ...]]:
    """Return (first step, tokens of a sequence, bytes kept for the backward pass, bytes more at the worst
    moment of both passes) of each graph of the model."""
    found = []
    for step in cfg.graph_starts:
        called = [trace.graphs[number] for phase, number in trace.calls if phase == f"step {step}"]
        forward, backward = (graph for graph in called if graph.name == "GPT")
        kept = forward.kept_bytes
        more = max(forward.extra_bytes - kept, backward.extra_bytes, 0)
        found.append((step, cfg.at("batch_tokens", step) // cfg.slices, kept, more))
    return found


def summary(rows: list[dict], failed: list[dict], kernels: int) -> dict:
    """Return what the page says of the machine code. rows: a form each."""
    spilling = [row for row in rows if row["stack"]]
    bad = Counter((row["name"].rstrip("0123456789_")[:60], row["why"]) for row in failed)
    for row in spilling:
        bad[row["name"].rstrip("0123456789_")[:60], f"{row['stack']} bytes of stack: {row['choice']}"] += 1
    most = {key: max(row[key] for row in rows) for key in ("registers", "shared", "stack")}
    return dict(kernels=kernels, forms=len(rows), failed=len(failed), spilling=len(spilling), **most,
                bad=[[*names, times] for names, times in bad.items()])


def write_shards(cfg, folder: Path) -> None:
    """Write shards. All but the first, which alone the loader looks at before it begins, have so short
    documents that a sequence has not entries for all of them."""
    from bench.step import synthetic_shards  # imports torch
    from data.shards import open_shard, write_shard

    synthetic_shards(cfg, folder, 12 * max(cfg.batch_tokens))
    first = folder / cfg.train_files.replace("*", "000000")
    tokens = open_shard(first).copy()
    tokens[::SHORT_DOCUMENT] = cfg.bos_id
    for number in range(1, 4):
        write_shard(folder / cfg.train_files.replace("*", f"{number:06}"), tokens)


def measure(args, flags: list[str], chip: device.Chip) -> dict:
    """Trace a run and return all that was asked for."""
    gpu = find_gpu(chip.gpu)
    waits = []
    device.pretend(chip, gpu.gib, lambda what: waits[-1](what))
    # Only now may torch be imported, and what imports it.
    import torch
    import triton

    from bench.cross import inductor, launches
    from bench.cross.short import short_run
    from bench.cross.trace import Trace, whole_schedule

    trace = Trace()
    waits.append(trace.wait)
    compiler = inductor.Compiler(chip, gpu)
    if args.parts != ["trace"]:
        trace.compiled = compiler
    cfg = short_run(flags)
    fp8 = args.fp8 == "on" if args.fp8 else gpu.fp8_tflops > gpu.tflops
    with tempfile.TemporaryDirectory() as folder:
        write_shards(cfg, Path(folder))
        os.environ["DATA_PATH"] = folder
        whole_schedule(trace, cfg, args.backend, fp8, args.ranks)
    result = dict(
        gpu=chip.gpu,
        ranks=args.ranks,
        attention=args.backend,
        fp8=fp8,
        torch=torch.__version__,
        triton=triton.__version__,
        flags=" ".join(flags),
        config=dataclasses.asdict(cfg),
        **seen(trace, cfg),
    )
    if "costs" in args.parts:
        stages = range(len(cfg.stage_starts))
        result["warm_up_s"] = warm_up_seconds(trace)
        result["passes"] = memory_of_passes(trace, cfg)
        result["launches"] = [launches.stage_launches(trace, cfg, stage, args.ranks) for stage in stages]
    if "code" in args.parts:
        last = [graph for graph in trace.graphs if graph.name == "GPT" and graph.phase == "warm-up"][-2:]
        sources = compiler.sources_of(lambda graph: graph.name != "GPT" or graph in last)
        rows, failed = inductor.all_machine_code(compiler, sources)
        result["code"] = summary(rows, failed, len(sources))
    return json.loads(json.dumps(result))  # as it will be read: plain lists and names


def main(argv: list[str]) -> int:
    args, flags = parse(argv)
    chip = next((chip for name, chip in device.CHIPS.items() if name.lower() in args.gpu.lower()), None)
    if chip is None:
        raise UsageError(f"--gpu: expected one of {', '.join(device.CHIPS)}, found {args.gpu!r}; choose one")
    warnings.simplefilter("ignore")  # of caches that are off
    began = time.monotonic()
    result = measure(args, flags, chip)
    print(page(result))
    print(f"after {time.monotonic() - began:.0f} s")
    if args.out:
        write(result, args.out)
    return 1 if result["graphs"]["inside the clock"] or result["waits"]["in steps"] else 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.cross"))
