"""The GPU path without a GPU: the trainer's whole schedule at full size, traced, compiled and costed for a GPU
that is not there.

    python -m bench.cross [--gpu=H100] [--ranks=8] [--parts trace costs code] [--out=FOLDER] [--field=value ...]

trace  a short run through every stage on tensors without memory: the graphs that it makes, and when; the lines at
       which the host would wait for the device; memory in use, by stage
costs  what inductor makes of the graphs; the least time of a step by part from the bytes and operations of its
       kernels; memory with what the graphs need inside
code   the machine code of those kernels: registers, shared memory, spills

One rank of several is traced; the others are pretended too. Needs Triton (bench/cross/requirements.txt) and g++, and
touches no driver. bench/CROSS.md says what was found, what is assumed, and what cannot be known this way.
"""
import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from bench.cross import device
from data.errors import UsageError, run_program

PARTS = "trace", "costs", "code"
SHORT = dict(train_steps=22, extension_steps=4, val_every=11, max_epochs=1000)  # every stage, several steps of each
ALLOWED = "Event.synchronize", "read_stats"  # it waits for a step that ended two steps ago


def parse(argv: list[str]):
    parser = argparse.ArgumentParser(prog="python -m bench.cross", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(device.CHIPS)}")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["trace"])
    parser.add_argument("--stage", type=int, help="only this stage, on one rank")
    parser.add_argument("--backend", default="varlen", help="attention that a self-test is assumed to choose")
    parser.add_argument("--fp8", default="auto", choices=("auto", "on", "off"), help="head; auto: where the GPU has it")
    parser.add_argument("--out", type=Path, help="folder for cross.json and cross.md")
    return parser.parse_known_args(argv)


def waits_of(trace, of_steps: bool) -> dict[str, int]:
    """Return what the host waited for in steps, or elsewhere after the start: text -> times."""
    found = Counter()
    for (phase, what, place), times in trace.waits.items():
        if phase.startswith("step") == of_steps and phase != "start" and (what, place.function) != ALLOWED:
            found[f"{what} at {place}"] += times
    return dict(found)


def seen(trace, cfg) -> dict:
    """Return graphs, waits and memory of a trace."""
    after = Counter(str(graph) for graph in trace.graphs if graph.phase.startswith(("step", "between")))
    paused = Counter(str(graph) for graph in trace.graphs if graph.phase == "validation")
    peaks = {}
    for phase, (size, where) in trace.peaks.items():
        name = f"stage {cfg.stage(int(phase.split()[1]))}" if phase.startswith("step") else phase
        peaks[name] = max(peaks.get(name, (0, "")), (size / 2**30, where))
    return dict(
        graphs_in_warm_up=Counter(str(graph) for graph in trace.graphs if graph.phase == "warm-up"),
        graphs_inside_the_clock=after, graphs_in_validation=paused,
        waits_in_steps=waits_of(trace, True), waits_elsewhere=waits_of(trace, False),
        peak_gib=peaks)


def costed(trace, cfg, stages, ranks: int, gpu) -> dict:
    """Return milliseconds, GB and launches of a step by part, of each stage; and the costliest kernels."""
    from bench.cross import costs

    result = {}
    for stage in stages:
        parts = costs.stage_costs(trace, cfg, stage, ranks, gpu)
        rows = {part: dict(ms=1000 * found["seconds"], gb=found["bytes"] / 1e9, launches=found["launches"])
                for part, found in sorted(parts.items())}
        step = cfg.stage_starts[stage] + cfg.adam_every
        top = [dict(zip(("ms", "launches", "graph", "kind", "part", "bytes", "operations"), row))
               for row in costs.costliest(trace, step, gpu)]
        result[f"stage {stage}"] = dict(parts=rows, costliest=[row | dict(ms=1000 * row["ms"]) for row in top])
    return result


def code_summary(rows: list[dict], failed: list[dict], kernels: int) -> dict:
    spilling = [row for row in rows if row["stack"]]
    return dict(
        kernels=kernels, choices=len(rows), failed=failed, spilling=spilling,
        most_registers=max((row["registers"] for row in rows), default=0),
        most_shared_bytes=max((row["shared"] for row in rows), default=0))


def page(result: dict) -> str:
    """Return the result in Markdown."""
    from bench.page import grid

    about = ", ".join(f"{key} {result[key]}" for key in ("gpu", "ranks", "attention", "fp8", "torch", "triton"))
    out = [f"# What a run on {result['gpu']} would do\n\n{about}"]
    graphs = [[when, sum(names.values()), ", ".join(f"{n} {name}" for name, n in names.items())]
              for when, names in result["seen"].items() if when.startswith("graphs")]
    out.append(grid(["graphs", "number", "of"], [[row[0].replace("_", " "), *row[1:]] for row in graphs]))
    waits = [[kind.replace("_", " "), where, times] for kind in ("waits_in_steps", "waits_elsewhere")
             for where, times in result["seen"][kind].items()]
    out.append(grid(["the host waits", "where", "times"], waits or [["never", "", 0]]))
    peaks = [[phase, f"{size:.2f}", where] for phase, (size, where) in result["seen"]["peak_gib"].items()]
    out.append(grid(["fullest moment", "GiB", "at"], peaks))
    for stage, found in result.get("costs", {}).items():
        rows = [[part, f"{row['ms']:.2f}", f"{row['gb']:.2f}", f"{row['launches']:.0f}"]
                for part, row in found["parts"].items()]
        total = [sum(row[key] for row in found["parts"].values()) for key in ("ms", "gb", "launches")]
        rows.append(["all", f"{total[0]:.2f}", f"{total[1]:.2f}", f"{total[2]:.0f}"])
        out.append(f"## {stage}\n\n" + grid(["part", "ms", "GB", "launches"], rows))
        rows = [[f"{row['ms']:.2f}", row["launches"], row["graph"], row["part"], row["kind"], row["operations"]]
                for row in found["costliest"]]
        out.append(grid(["ms", "launches", "graph", "part", "kind", "operations"], rows))
    if code := result.get("code"):
        out.append(f"## Machine code\n\n{code['kernels']} kernels, {code['choices']} choices of tiles; "
                   f"{len(code['failed'])} kernels fail, {len(code['spilling'])} choices spill; at most "
                   f"{code['most_registers']} registers and {code['most_shared_bytes']} bytes of shared memory")
        bad = [[row["name"], row["why"]] for row in code["failed"]]
        bad += [[row["name"], f"{row['stack']} bytes of stack, {row['registers']} registers"] for row in code["spilling"]]
        out += [grid(["kernel", "what"], bad)] if bad else []
    return "\n\n".join(out) + "\n"


def measure(args, flags: list[str], chip, gpu) -> dict:
    """Trace a run and return all that was asked for. torch is imported here, after the device was pretended."""
    import torch
    import triton

    from bench.cross import kernels
    from bench.cross.trace import Trace, one_stage, whole_schedule
    from bench.step import synthetic_shards
    from train_gpt import Config, parse_config

    trace = args.trace.append(Trace()) or args.trace[-1]
    compiler = kernels.Compiler(chip, gpu)
    if set(args.parts) & {"costs", "code"}:
        trace.compiled = compiler
    _, changes = parse_config(flags)
    track = changes.pop("track", "small")
    cfg = Config.for_track(track, **SHORT | changes)
    cfg = Config.for_track(track, **{**SHORT, "val_tokens": 2 * cfg.val_slice, **changes})
    fp8 = args.fp8 == "on" or (args.fp8 == "auto" and gpu.fp8_tflops > gpu.tflops)
    with tempfile.TemporaryDirectory() as folder:
        synthetic_shards(cfg, Path(folder), max(2_000_000, 60 * max(cfg.batch_tokens)))
        os.environ["DATA_PATH"] = folder
        if args.stage is None:
            whole_schedule(trace, cfg, args.backend, fp8, args.ranks)
            stages, ranks = range(len(cfg.stage_starts)), args.ranks
        else:
            one_stage(trace, cfg, args.stage, args.backend, fp8)
            stages, ranks = [args.stage], 1

    result = dict(gpu=chip.gpu, ranks=ranks, attention=args.backend, fp8=fp8, torch=torch.__version__,
                  triton=triton.__version__, flags=flags, seen=seen(trace, cfg))
    if "costs" in args.parts and args.stage is None:
        result["costs"] = costed(trace, cfg, stages, ranks, gpu)
    if "code" in args.parts:
        rows, failed = kernels.all_machine_code(compiler.sources, chip)
        result["code"] = code_summary(rows, failed, len(compiler.sources))
    return result


def main(argv: list[str]) -> int:
    args, flags = parse(argv)
    from tools.gpus import find_gpu  # it knows nothing of torch

    gpu = find_gpu(args.gpu)
    chip = next((chip for name, chip in device.CHIPS.items() if name.lower() in args.gpu.lower()), None)
    if chip is None or gpu is None:
        raise UsageError(f"--gpu: expected one of {', '.join(device.CHIPS)}, found {args.gpu!r}; choose one")
    warnings.simplefilter("ignore")
    args.trace = []
    began = time.monotonic()
    device.pretend(chip, gpu.gib, lambda what: args.trace[-1].wait(what))
    result = measure(args, flags, chip, gpu)
    print(page(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "cross.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "cross.md").write_text(page(result), encoding="utf-8")
    print(f"after {time.monotonic() - began:.0f} s")
    bad = result["seen"]["graphs_inside_the_clock"] or result["seen"]["waits_in_steps"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.cross"))
