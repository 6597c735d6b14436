"""How fast a training step is, by stage and by part, beside what bench.cross says that it could take.

    python -m bench.step [--track=small] [--field=value ...]          one process
    torchrun --standalone --nproc_per_node=8 -m bench.step            as many as the run would have

Where the track's shards are not there, data is synthetic: documents of FineWeb's lengths. Prints Markdown
tables; with OUT=<folder> in the environment it also writes bench_step.json there.

Parts are told apart by torch.profiler: ranges around their functions, and for a backward pass the ranges of
the operations that it belongs to. A compiled model has no such ranges inside: its kernels go by their names,
and on a CPU all of it counts as elementwise; --compile=off tells the parts apart. What each part could take
is known where bench.cross has traced the same settings with as many ranks; for a GPU other than the traced
one it is the time of the same kernels at the rates of its data sheet.
"""
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, record_function

import train_gpt
from bench.cross.costs import by_part
from bench.cross.figures import launches
from bench.packing import document_lengths
from bench.page import grid
from data.errors import run_program
from data.loader import find_shards
from data.shards import ShardError, write_shard
from engine.kernels import Kernels
from engine.ranks import Runtime
from tools.gpus import Gpu, find_gpu
from tools.traced import traced_run
from train_gpt import Config, Run, muon_shares, parse_config

STEPS = 10  # timed per stage, after two that are not
PARTS = ("attention", "projections", "MLP", "head and loss", "tables", "elementwise", "gradient sums", "Muon",
         "Adam", "masks", "data", "communication", "other", "idle")
MARK = "part: "
WALL = "all, wall clock"
PRODUCTS = "all products"  # of a compiled model: projections, MLP and head, whose kernels look alike
KERNELS = {  # word in the name of a kernel -> part
    "nccl": "communication",
    "flash": "attention", "fmha": "attention", "attention": "attention", "flex": "attention",
    "gemm": PRODUCTS, "nvjet": PRODUCTS, "cutlass": PRODUCTS, "splitk": PRODUCTS, "triton_tem": PRODUCTS,
}


# ------------------------------------------------------------------------------------------------------------
# Data, and steps that stay in one stage


def synthetic_shards(cfg: Config, folder: Path, tokens: int, ids_used: int = 2**16) -> None:
    """Write random tokens among the first ids_used of the vocabulary, in documents of FineWeb's lengths."""
    rng = np.random.default_rng(0)
    for pattern, count in ((cfg.train_files, tokens), (cfg.val_files, cfg.val_tokens + 1)):
        ids = rng.integers(0, min(ids_used, cfg.vocab_size), count)
        ids[ids == cfg.bos_id] = 0
        lengths = document_lengths(rng, count // 100)
        starts = np.cumsum(lengths) - lengths
        ids[starts[starts < count]] = cfg.bos_id
        path = folder / pattern.replace("*", "000000")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, ids.astype(np.uint16))


def ensure_shards(cfg: Config, folder: Path, tokens: int) -> str:
    """Write synthetic shards into a folder if the track's are missing, and say which ones a run reads."""
    try:
        find_shards(cfg.train_files)
        return "the track's shards"
    except ShardError:
        synthetic_shards(cfg, folder, tokens)
        os.environ["DATA_PATH"] = str(folder)
        return "synthetic documents"


def steps_of(run: Run, stage_start: int):
    """Take one training step of a stage at every next()."""
    first = stage_start + run.cfg.adam_every  # the very first step of a stage may part embedding and head
    run.loader.load_state_dict({**run.loader.state_dict(), "step": first})
    n = 0
    while True:
        # Stay in the stage, whatever its length; Adam moves as often as in a run.
        run.step = first + n % run.cfg.adam_every
        yield run.train_step()
        n += 1


def time_stage(run: Run, step: int) -> list[float]:
    """Return seconds of each of STEPS training steps of the stage that begins at a step."""
    seconds, steps = [], steps_of(run, step)
    for _ in range(STEPS + 2):
        run.rt.synchronize()
        start = time.perf_counter()
        next(steps)
        run.rt.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


# ------------------------------------------------------------------------------------------------------------
# Where the time goes


class Gathers(TorchFunctionMode):
    """Puts a range around each gather from a table."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        with record_function(MARK + "tables") if function is F.embedding else contextlib.nullcontext():
            return function(*args, **(kwargs or {}))


def part_of_product(model):
    """Return a function that names the part of a matrix product by the weights that it takes."""
    banks = {"attn_qk": "projections", "mlp_in": "MLP", "mlp_out": "MLP", "head": "head and loss"}
    parts = {getattr(model, name).untyped_storage().data_ptr(): part for name, part in banks.items()}
    square = (model.cfg.model_dim, model.cfg.model_dim)  # values and outputs: scaled by learned factors

    def part_of(x, w):
        found = parts.get(w.untyped_storage().data_ptr())
        return found or ("projections" if w.shape == square else "elementwise")

    return part_of


def places_of(run: Run):
    """Return (owner, name of a function, its part or a function of its arguments that names it); in an eager
    model also those inside of it."""
    places = [
        (run, "accumulate", "elementwise"),
        (run.model, "context", "masks"),
        (run.loader, "next", "data"),
        (train_gpt, "to_device", "data"),
        (run.rt, "sum", "communication"),
    ]
    for optimizer, part in ((run.muon, "Muon"), (run.adam, "Adam")):
        names = ("start", "step", "finish", "zero_grad") if optimizer else ()
        places += [(optimizer, name, part) for name in names if hasattr(optimizer, name)]
    if not run.kernels.compiled:
        model = run.model
        places += [
            (run, "forward", "head and loss"),
            (model, "trunk", "elementwise"),
            (model, "bigram", "tables"),
            (model, "linear", part_of_product(model)),
            (Kernels, "attend", "attention"),
            (Kernels, "mlp", "MLP"),
        ]
    return places


@contextlib.contextmanager
def ranges(run: Run):
    """Put ranges around the parts of a step."""
    def ranged(function, name, part):
        def call(*args, **kwargs):
            gathers = Gathers() if name == "forward" else contextlib.nullcontext()
            with record_function(MARK + (part(*args) if callable(part) else part)), gathers:
                return function(*args, **kwargs)
        return call

    with contextlib.ExitStack() as stack:
        for owner, name, part in places_of(run):
            stack.enter_context(mock.patch.object(owner, name, ranged(getattr(owner, name), name, part)))
        yield


def owners(events):
    """Yield (event, part) of what ran on the host. A backward operation belongs to the part of the forward
    operation whose number it carries; of several with one number the last made the node."""
    made, known = {}, {}

    def part(event):
        key = id(event)  # its own id may be another one's too: those of CUDA's calls are numbered apart
        if event is None or key in known:
            return known.get(key)
        if event.name.startswith(MARK):
            known[key] = event.name[len(MARK):]
        elif event.name.startswith("autograd::engine::evaluate_function"):
            sums = "AccumulateGrad" in event.name
            known[key] = "gradient sums" if sums else made.get(event.sequence_nr, "elementwise")
        else:
            known[key] = part(event.cpu_parent)
            if event.sequence_nr >= 0 and event.scope == 0 and known[key]:
                made[event.sequence_nr] = known[key]
        return known[key]

    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        yield event, part(event)


def part_of_kernel(name: str, part: str | None, compiled: bool) -> str:
    """Return the part of a kernel: that of what launched it, but inside a compiled model by its own name."""
    words = KERNELS if part == "elementwise" and compiled else {"nccl": "communication"}
    return next((to for word, to in words.items() if word in name.lower()), part or "other")


def attribute(host, cuda: bool, compiled: bool) -> Counter:
    """Return microseconds of the host by part, or of the kernels that it launched."""
    us = Counter()
    for event, part in owners(host):
        if not cuda and part:
            us[part] += event.self_cpu_time_total
        for kernel in event.kernels if cuda else ():
            if kernel.name != event.name:  # the device's copy of a range is no kernel
                us[part_of_kernel(kernel.name, part, compiled)] += kernel.duration
    return us


def busy_us(intervals) -> float:
    """Return the length of the union of (start, end)."""
    total, until = 0.0, 0.0
    for start, end in sorted(intervals):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


def profile(run: Run, step: int) -> dict[str, float]:
    """Return ms of a step by part, Adam's divided by adam_every; on a GPU those of its kernels, and idle."""
    cuda, n = run.rt.device.type == "cuda", run.cfg.adam_every
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with ranges(run):
        steps = steps_of(run, step)
        for _ in range(2 * n - 1):
            next(steps)
        run.rt.synchronize()
        with torch.profiler.profile(activities=activities) as p:
            start = time.perf_counter()
            with record_function(MARK + "other"):
                next(steps)
            run.rt.synchronize()
            wall = time.perf_counter() - start
    events = p.events()
    host = [e for e in events if e.device_type == DeviceType.CPU and not e.is_async]
    us = attribute(host, cuda, run.kernels.compiled)
    if cuda:
        kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.name.startswith(MARK)
                   and not getattr(e, "is_user_annotation", False)]
        busy = busy_us((e.time_range.start, e.time_range.end) for e in kernels)
        us["idle"] = max(1e6 * wall - busy, 0.0)
    us[WALL] = 1e6 * wall - us["Adam"] * (1 - 1 / n)
    us["Adam"] /= n
    return {part: t / 1000 for part, t in us.items()}


# ------------------------------------------------------------------------------------------------------------
# The tables


def expected(cfg: Config, kernels: Kernels, world: int, gpu: Gpu | None) -> list[dict[str, Counter]]:
    """Return for each stage the costs by part that bench.cross found of such a run, if there is one."""
    run = traced_run(cfg, world, kernels.fp8_head) if gpu and kernels.compiled else None
    stages = [by_part(rows, gpu) for rows in launches(run)] if run else [{} for _ in cfg.stage_starts]
    for parts in filter(None, stages):
        products = [parts[name] for name in ("projections", "MLP", "head and loss")]
        parts |= {PRODUCTS: sum(products, Counter()), WALL: sum(parts.values(), Counter())}
    return stages


def parts_of(run: Run, step: int, costs: dict[str, Counter]) -> list[dict]:
    """Return a row for each part: what it could take, and what it took."""
    measured = profile(run, step)
    rows = []
    for part in (*PARTS, PRODUCTS, WALL):
        ms = measured.get(part, 0.0)
        if part in costs or ms > 0.005:
            rows.append(dict(part=part, costs=costs.get(part), ms=ms))
    return rows


def measure(cfg: Config, rt: Runtime, data: str) -> dict:
    """Time and profile every stage."""
    begin = time.perf_counter()
    run = Run(cfg, rt)
    run.warm_up()
    ready = time.perf_counter() - begin
    cuda = rt.device.type == "cuda"
    seconds = [time_stage(run, step) for step in cfg.stage_starts]
    gpu = find_gpu(torch.cuda.get_device_name()) if cuda else None
    costs = expected(cfg, run.kernels, rt.world, gpu)
    rows = []
    for stage, step in enumerate(cfg.stage_starts):
        tokens, median = cfg.at("batch_tokens", step), statistics.median(seconds[stage])
        flops = tokens * run.model.flops_per_token(stage)
        rows.append(dict(
            stage=stage, tokens=tokens, ms=1000 * median, ms_min=1000 * min(seconds[stage]),
            ms_max=1000 * max(seconds[stage]), tokens_per_s=tokens / median, tflops=flops / median / 1e12))
    peak_mib = torch.cuda.max_memory_allocated() // 2**20 if cuda else None
    for row, step, parts in zip(rows, cfg.stage_starts, costs):
        row["parts"] = parts_of(run, step, parts)
    return dict(
        device=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads a rank",
        world=rt.world, torch=torch.__version__, date=time.strftime("%Y-%m-%d"), track=cfg.track,
        attention=run.kernels.attention, fp8=run.kernels.fp8_head, compiled=run.kernels.compiled, data=data,
        warm_up_s=ready, steps=STEPS, tflops=gpu and gpu.tflops, rows=rows, peak_mib=peak_mib,
        muon_flops=muon_shares(run.model, run.kernels.ns_dtype, rt.device))


def page(result: dict) -> str:
    """Return what is printed: the stages, the parts, and Muon's share of both kinds of cost."""
    rows, mib = result["rows"], result["peak_mib"]
    memory = f", peak memory {mib:,} MiB" if mib else ""
    stages = []
    for r in rows:
        share = f"{r['tflops'] / result['tflops'] / result['world']:.0%}" if result["tflops"] else "-"
        ms = f"{r['ms']:.1f} ({r['ms_min']:.1f}-{r['ms_max']:.1f})"
        rate = f"{r['tokens_per_s']:,.0f}"
        stages.append([r["stage"], f"{r['tokens']:,}", ms, rate, f"{r['tflops']:.3g}", share])
    times = f"ms/step, median of {result['steps']} (min-max)"
    header = ["stage", "tokens/step", times, "tokens/s", "TFLOP/s", "of peak"]
    return "\n\n".join([
        f"{result['device']}, {result['world']} rank(s), torch {result['torch']}, track {result['track']}, "
        f"attention {result['attention']}, {result['data']}; warm-up {result['warm_up_s']:.0f} s{memory}",
        "FLOPs count every attention window as full; documents are shorter, so the true share is lower.",
        grid(header, stages),
        f"Muon's share of the FLOPs of a step: {result['muon_flops']}; of its time, by stage: "
        f"{muon_time(rows)}.",
        "Parts: time of rank 0's GPU, or of its CPU where there is none, under the profiler, which slows a "
        "step down; Adam's is divided by adam_every. Floor and achieved rates: bench/CROSS.md.",
        parts_table(result)]) + "\n"


def muon_time(rows: list[dict]) -> str:
    """Say how large a part of a step's time is Muon's, by stage."""
    shares = []
    for row in rows:
        ms = {part["part"]: part["ms"] for part in row["parts"]}
        if "Muon" in ms:
            shares.append(f"{ms['Muon'] / ms[WALL]:.1%}")
    return ", ".join(shares) or "not measured"


def parts_table(result: dict) -> str:
    def show(x, digits=2):
        return f"{x:,.{digits}f}" if x else "-"

    rows = []
    for r in result["rows"]:
        wall = r["parts"][-1]
        for p in r["parts"]:
            costs = p["costs"] or {}
            cells = [r["stage"], p["part"], show(costs.get("gflop"), 0), show(costs.get("gb"), 1)]
            cells += [show(costs.get("floor_ms")), show(costs.get("ms"))]
            rows.append([*cells, show(p["ms"]), f"{p['ms'] / wall['ms']:.0%}"])
    header = ["stage", "part", "GFLOP", "GB", "floor ms", "at achieved rates", "ms", "share"]
    return grid(header, rows)


def main(argv: list[str]) -> int:
    rt = Runtime()
    _, changes = parse_config(argv)
    cfg = Config.for_track(**changes)
    tokens = max(6 * max(cfg.batch_tokens) * (STEPS + 2), 10**8 if rt.device.type == "cuda" else 0)
    # No validation is timed, and an average of the weights belongs to places of the schedule.
    changes |= dict(val_tokens=cfg.val_slice * rt.world, ema_frac=0.0, max_epochs=1000)
    cfg = Config.for_track(**changes)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(cfg, rt, ensure_shards(cfg, Path(folder), tokens))
    if rt.rank == 0:
        print(page(result), end="")
        if os.environ.get("OUT"):
            Path(os.environ["OUT"], "bench_step.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    code = run_program(main, sys.argv[1:], "bench.step")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
