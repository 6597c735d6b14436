"""The GPU path without a GPU: a whole schedule of the trainer at full size, traced, compiled and costed for a
GPU that is not there.

    python -m bench.cross [--gpu=H100] [--ranks=8] [--parts trace costs code] [--out=DIR] [--field=value ...]

trace  a short run through every stage on tensors without memory: the graphs that it makes, and when; the
lines at
       which the host would wait for the device; memory in use, by stage
costs  what inductor makes of the graphs: the least time of a step by part, from the bytes and operations of
its
       kernels; memory with what the graphs need inside
code   the machine code of those kernels: registers, shared memory, spills

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
from bench.page import grid
from data.errors import UsageError, run_program
from tools.gpus import find_gpu

# Several steps of every stage; checkpoints before and after embedding and head part.
SHORT = dict(train_steps=22, extension_steps=4, val_every=11, save_every=10, max_epochs=1000)
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
    parser.add_argument("--out", type=Path, help="folder for cross.json and cross.md")
    return parser.parse_known_args(argv)


def seen(trace, cfg) -> dict:
    """Return graphs, waits and memory of a trace, and the steps in which Adam moved and rested, by stage."""
    graphs = {"inside the clock": Counter()}
    for graph in trace.graphs:
        timed = graph.phase.removeprefix("resumed: ") not in AROUND
        graphs.setdefault("inside the clock" if timed else graph.phase, Counter())[str(graph)] += 1
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
    """Return CPU seconds of this machine in the warm-up: of inductor by kind of graph, and of all before
    it."""
    found = Counter()
    for graph in trace.graphs:
        if graph.phase == "warm-up":
            found[f"inductor: {graph}"] += graph.seconds
    found["tracing and autograd"] = trace.seconds["warm-up"] - found.total()
    return dict(found.most_common())


def memory_of_passes(trace) -> list[tuple[int, int]]:
    """Return (bytes kept for the backward pass, bytes more at the worst moment of both passes) of each graph
    of the model, in the order of Config.graph_starts."""
    graphs = [graph for graph in trace.graphs if graph.name == "GPT" and graph.phase == "warm-up"]
    found = []
    for forward, backward in zip(graphs[::2], graphs[1::2]):
        kept = forward.kept_bytes
        found.append((kept, max(forward.extra_bytes - kept, backward.extra_bytes, 0)))
    return found


def page(result: dict) -> str:
    """Return the result in Markdown."""
    seen = result["seen"]
    keys = "ranks", "attention", "fp8", "torch", "triton", "flags"
    about = ", ".join(f"{key} {result[key]}" for key in keys)
    out = [f"# A run on {result['gpu']}, as far as it can be known without one\n\n{about}"]
    graphs = seen["graphs"].items()
    rows = [
        [phase, sum(found.values()), ", ".join(f"{n} {name}" for name, n in found.items())]
        for phase, found in graphs
    ]
    out.append(grid(["graphs made", "number", "of"], rows))
    kinds = [run + moves for run in ("", "resumed: ") for moves in ("with Adam", "without Adam")]
    rows = [[stage, *(found[kind] for kind in kinds)] for stage, found in seen["steps"].items()]
    out.append(grid(["steps of stage", *kinds], rows))
    resumed = ", ".join(map(str, seen["saved"])) or "none"
    out.append(f"Resumed from steps {resumed}. {seen['crowded']} sequences had more documents than entries "
               "for them.")
    rows = [[when, where, n] for when, found in seen["waits"].items() for where, n in found.items()]
    out.append(grid(["the host waits", "for", "times"], rows))
    rows = [[phase, f"{size:.2f}", where] for phase, (size, where) in seen["peak_gib"].items()]
    out.append(grid(["fullest moment", "GiB", "at"], rows))
    rows = [[start, *(f"{size / 2**30:.2f}" for size in sizes)] for start, sizes in result.get("passes", ())]
    if rows:
        seconds = [[what, f"{s:.1f}"] for what, s in result["warm_up_s"].items()]
        out.append(grid(["warm-up, on one core of this machine", "CPU seconds"], seconds))
        out.append(grid(["model from step", "GiB kept for backward", "GiB more at the worst moment"], rows))
    for stage, (parts, top) in enumerate(result.get("costs", ())):
        keys = "floor_ms", "ms", "gb", "launches"
        sums = {key: sum(row[key] for row in parts.values()) for key in keys}
        rows = [[part, *(f"{row[key]:.2f}" for key in keys)] for part, row in [*parts.items(), ("all", sums)]]
        header = ["part", "floor ms, data sheet", "ms, achieved rates", "GB", "launches"]
        out.append(f"## Stage {stage}: the least time of a step\n\n" + grid(header, rows))
        rows = [[f"{ms:.2f}", f"{times:g}", *names] for ms, times, *names in top]
        out.append(grid(["ms", "times", "part", "graph", "kernel of"], rows))
    if code := result.get("code"):
        rows, failed = code["rows"], code["failed"]
        spilling = [row for row in rows if row["stack"]]
        most = {key: max(row[key] for row in rows) for key in ("registers", "shared")}
        out.append(
            f"## Machine code\n\n{code['kernels']} kernels in {len(rows)} forms, of which inductor "
            f"takes the fastest; {len(failed)} kernels fail, {len(spilling)} forms spill; at most "
            f"{most['registers']} registers a thread and {most['shared']} bytes of shared memory a "
            "block"
        )
        bad = Counter((row["name"].rstrip("0123456789_"), row["why"]) for row in failed)
        for row in spilling:
            bad[row["name"].rstrip("0123456789_"), f"{row['stack']} bytes of stack: {row['choice']}"] += 1
        rows = [[name[:60], what, times] for (name, what), times in bad.items()]
        out.append(grid(["kernel", "what", "times"], rows))
    return "\n\n".join(out) + "\n"


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

    from bench.cross import costs, kernels
    from bench.cross.trace import Trace, whole_schedule
    from train_gpt import Config, parse_config

    trace = Trace()
    waits.append(trace.wait)
    compiler = kernels.Compiler(chip, gpu)
    if args.parts != ["trace"]:
        trace.compiled = compiler
    changes = SHORT | dict(track="small") | parse_config(flags)[1]
    val_slice = Config.for_track(changes["track"]).val_slice
    cfg = Config.for_track(changes.pop("track"), **dict(val_tokens=2 * val_slice) | changes)
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
        seen=seen(trace, cfg),
    )
    if "costs" in args.parts:
        stages = range(len(cfg.stage_starts))
        launches = [costs.stage_launches(trace, cfg, stage, args.ranks) for stage in stages]
        result["launches"] = launches
        result["warm_up_s"] = warm_up_seconds(trace)
        result["passes"] = list(zip(cfg.graph_starts, memory_of_passes(trace)))
        result["costs"] = [(costs.by_part(rows, gpu), costs.costliest(rows, gpu)) for rows in launches]
    if "code" in args.parts:
        rows, failed = kernels.all_machine_code(compiler)
        result["code"] = dict(kernels=len(compiler.sources), rows=rows, failed=failed)
    return result


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
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "cross.json").write_text(json.dumps(result) + "\n")
        (args.out / "cross.md").write_text(page(result), encoding="utf-8")
    return 1 if result["seen"]["graphs"]["inside the clock"] or result["seen"]["waits"]["in steps"] else 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.cross"))
