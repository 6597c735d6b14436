"""How fast a training step is, by stage and by part, beside the least it could take; and how much faster the loader is.

    python -m bench.step [--track=small] [--field=value ...]          one process
    torchrun --standalone --nproc_per_node=8 -m bench.step            as many as the run would have

Training data is synthetic (documents of FineWeb's lengths, or of the track's shards if they are there), so nothing has to
be downloaded. Prints Markdown tables; with OUT=<folder> in the environment it also writes bench_step.json there.

Parts are told apart by torch.profiler: ranges around their functions, and for a backward pass the ranges of the operations
that it belongs to. A compiled model has no such ranges inside, so it is profiled twice: eagerly, and as it is, where its kernels
go by their names (on a CPU all of it counts as elementwise). Floors are counted by bench/floors.py.
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
from bench import floors
from data.loader import Loader, find_shards
from data.shards import ShardError, write_shard
from data.errors import UsageError
from engine.ranks import Runtime
from train_gpt import Config, Run, parse_config

STEPS = 10  # timed per stage, after two that are not
MARK = "part: "
WALL = "all, wall clock"
PRODUCTS = "all products"  # of a compiled model: projections, MLP and head, whose kernels look alike
KERNELS = (("nccl", "communication"), ("flash", "attention"), ("fmha", "attention"), ("attention", "attention"),
           ("flex", "attention"), *((word, PRODUCTS) for word in ("gemm", "nvjet", "cutlass", "splitk", "triton_tem")))


def synthetic_shards(cfg: Config, folder: Path, tokens: int, ids_used: int = 2**16) -> None:
    """Random tokens among the first ids_used of the vocabulary, in documents of FineWeb's lengths."""
    rng = np.random.default_rng(0)
    for pattern, count in ((cfg.train_files, tokens), (cfg.val_files, cfg.val_tokens + 1)):
        ids = rng.integers(0, min(ids_used, cfg.vocab_size), count)
        ids[ids == cfg.bos_id] = 0
        lengths = floors.document_lengths(rng, count // 100)
        starts = np.cumsum(lengths) - lengths
        ids[starts[starts < count]] = cfg.bos_id
        path = folder / pattern.replace("*", "000000")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, ids.astype(np.uint16))


def time_loader(cfg: Config, step: int, rt: Runtime) -> float:
    """Tokens per second of the batches that this rank's loader prepares, all of them for one rank."""
    loader = Loader(cfg, rt.rank, rt.world, rt.device.type == "cuda")
    loader.load_state_dict({**loader.state_dict(), "step": step})
    loader.next()
    start = time.perf_counter()
    for _ in range(STEPS):
        loader.load_state_dict({**loader.state_dict(), "step": step})
        loader.next()  # waits for this step and for the one that the last call began and nobody took
    return (2 * STEPS - 1) * cfg.at("batch_tokens", step) / (time.perf_counter() - start)


def steps_of(run: Run, stage_start: int):
    """Take one training step of a stage at every next()."""
    run.average_weights = lambda: None  # a step that is taken over and over again is at no place in the schedule
    first = stage_start + run.cfg.adam_every  # the very first step of a stage may part embedding and head
    run.loader.load_state_dict({**run.loader.state_dict(), "step": first})
    n = 0
    while True:
        run.step = first + n % run.cfg.adam_every  # stay in the stage, whatever its length; Adam moves as often as in a run
        yield run.train_step()
        n += 1


def time_stage(run: Run, step: int) -> list[float]:
    """Seconds of each of STEPS training steps of the stage that begins at a step."""
    seconds, steps = [], steps_of(run, step)
    for _ in range(STEPS + 2):
        run.rt.synchronize()
        start = time.perf_counter()
        next(steps)
        run.rt.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


# ---------------------------------------------------------------------------------------------------------------------
# Where the time goes


class Gathers(TorchFunctionMode):
    """Puts a range around each gather from a table."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        with record_function(MARK + "tables") if function is F.embedding else contextlib.nullcontext():
            return function(*args, **(kwargs or {}))


def part_of_product(model):
    """The part that a matrix product belongs to, by the weights that it takes."""
    square = (model.cfg.model_dim, model.cfg.model_dim)  # values and outputs are multiplied by learned factors before
    parts = {getattr(model, name).untyped_storage().data_ptr(): part for name, part in
             (("attn_qk", "projections"), ("mlp_in", "MLP"), ("mlp_out", "MLP"), ("head", "head and loss"))}
    return lambda x, w: parts.get(w.untyped_storage().data_ptr(), "projections" if w.shape == square else "elementwise")


@contextlib.contextmanager
def ranges(run: Run, eager: bool):
    """Ranges around the parts of a step; in an eager model inside of it too."""
    places = [(run, "accumulate", "elementwise"), (run, "context", "masks"), (run.loader, "next", "data"),
              (train_gpt, "to_device", "data"), (run.rt, "sum", "communication")]
    places += [(optimizer, name, part) for optimizer, part in ((run.muon, "Muon"), (run.adam, "Adam")) if optimizer
               for name in ("start", "step", "finish", "zero_grad") if hasattr(optimizer, name)]
    if eager:
        places += [(run, "forward", "head and loss"), (run.model, "trunk", "elementwise"), (run.model, "attend", "attention"),
                   (run.model, "bigram", "tables"), (run.model, "linear", part_of_product(run.model))]
    with contextlib.ExitStack() as stack:
        if eager:
            stack.enter_context(mock.patch.object(run, "forward", run.model))
        for owner, name, part in places:
            inside = Gathers() if name == "forward" else contextlib.nullcontext()

            def within(*args, function=getattr(owner, name), part=part, inside=inside):
                with record_function(MARK + (part(*args) if callable(part) else part)), inside:
                    return function(*args)
            stack.enter_context(mock.patch.object(owner, name, within))
        yield


def owners(events):
    """(event, part) of what ran on the host. A backward operation belongs to the part of the forward operation whose number
    it carries; of several with one number the last made the node."""
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


def attribute(host, cuda: bool, eager: bool) -> Counter:
    """Part -> microseconds of the host, or of the kernels that it launched. Those of a compiled model go by their names."""
    us = Counter()
    for event, part in owners(host):
        if not cuda and part:
            us[part] += event.self_cpu_time_total
        for kernel in event.kernels if cuda else ():
            inside = not eager and part == "elementwise"
            found = (to for word, to in KERNELS if (inside or to == "communication") and word in kernel.name.lower())
            if kernel.name != event.name:  # the device's copy of a range is no kernel
                us[next(found, part or "other")] += kernel.duration
    return us


def busy_us(intervals) -> float:
    """Length of the union of (start, end)."""
    total, until = 0.0, 0.0
    for start, end in sorted(intervals):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


def profile(run: Run, step: int, eager: bool) -> dict[str, float]:
    """Part -> ms of a step; on a GPU of its kernels, and idle. Adam's is divided by the steps of which it moves in one."""
    cuda, n = run.rt.device.type == "cuda", run.cfg.adam_every
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with ranges(run, eager):
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
    us = attribute([e for e in events if e.device_type == DeviceType.CPU and not e.is_async], cuda, eager)
    if cuda:
        spans = [(e.time_range.start, e.time_range.end) for e in events if e.device_type != DeviceType.CPU
                 and not getattr(e, "is_user_annotation", False) and not e.name.startswith(MARK)]
        us["idle"] = max(1e6 * wall - busy_us(spans), 0.0)
    us[WALL] = 1e6 * wall - us["Adam"] * (1 - 1 / n)
    us["Adam"] /= n
    return {part: t / 1000 for part, t in us.items()}


def parts_of(run: Run, step: int, device: floors.Device) -> list[dict]:
    """A row for each part: what it takes at least, and what it took in an eager and in a compiled profile."""
    docs = [np.diff(starts[starts < len(b.inputs)], append=len(b.inputs)) for b in run.loader.next()
            for starts in [b.docs.starts.numpy()]]
    work = floors.count(run.cfg, run.dtype, docs, step, run.rt.world, run.fp8, run.rt.device)
    measured, rows = {}, []
    for mode in ("eager", "compiled") if run.compiled else ("eager",):
        try:
            measured[mode] = profile(run, step, mode == "eager")
        except torch.OutOfMemoryError:  # it may fit compiled
            torch.cuda.empty_cache()
    floor = {part: w.floor_ms(device) for part, w in work.items() if any(w)}
    floor |= {WALL: sum(floor.values()), PRODUCTS: sum(floor[part] for part in ("projections", "MLP", "head and loss"))}
    for part in (*floors.PARTS, "idle", *([PRODUCTS] if run.compiled else []), WALL):
        w, ms = work.get(part, floors.Work()), {mode: found.get(part, 0.0) for mode, found in measured.items()}
        if part in floor or any(x > 0.005 for x in ms.values()):
            rows.append(dict(part=part, gflop=(w.flops + w.fp8) / 1e9, mb=(w.bytes + w.link + w.host) / 1e6,
                             floor_ms=floor.get(part), **ms))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def main(argv: list[str]) -> int:
    try:
        _, changes = parse_config(argv)
        cfg = Config.for_track(changes.pop("track", "small" if torch.cuda.is_available() else "shakespeare"), **changes)
        rt = Runtime()
        changes["val_tokens"] = cfg.val_slice * rt.world  # no validation is timed
        with tempfile.TemporaryDirectory() as folder:
            try:
                find_shards(cfg.train_files)
                data = "the track's shards"
            except ShardError:
                os.environ["DATA_PATH"], data = folder, "synthetic documents"
                needed = 6 * max(cfg.batch_tokens) * (STEPS + 2) + 1000
                changes["max_epochs"] = 1000
                cfg = Config.for_track(cfg.track, **changes)
                synthetic_shards(cfg, Path(folder), max(needed, 100_000_000 if rt.device.type == "cuda" else 0))
            return report(Config.for_track(cfg.track, **changes), rt, data)
    except (UsageError, ShardError) as e:
        print(f"bench.step: {e}", file=sys.stderr)
        return 2


def report(cfg: Config, rt: Runtime, data: str) -> int:
    begin = time.perf_counter()
    run = Run(cfg, rt)
    run.warm_up()
    ready = time.perf_counter() - begin
    name = torch.cuda.get_device_name() if rt.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads a rank"
    before, rows = floors.find_device(rt.device, run.dtype), []
    for stage, step in enumerate(cfg.stage_starts):
        seconds = time_stage(run, step)
        tokens, flops = cfg.at("batch_tokens", step), run.model.flops_per_token(stage)
        median = statistics.median(seconds)
        rows.append(dict(stage=stage, tokens=tokens, ms=1000 * median, ms_min=1000 * min(seconds), ms_max=1000 * max(seconds),
                         tokens_per_s=tokens / median, tflops=tokens * flops / median / 1e12,
                         loader_ratio=time_loader(cfg, step, rt) * median / tokens))
    device = max(before, floors.find_device(rt.device, run.dtype), key=lambda d: d.tflops)  # if measured, then undisturbed
    result = dict(device=name, world=rt.world, torch=torch.__version__, date=time.strftime("%Y-%m-%d"), track=cfg.track,
                  attention=run.backend, fp8=run.fp8, dtype=str(run.dtype), data=data, warm_up_s=ready, steps=STEPS,
                  compiled=run.compiled, peak=device._asdict(), rows=rows)
    if rt.device.type == "cuda":
        result["peak_mib"] = torch.cuda.max_memory_allocated() // 2**20
    for row, step in zip(rows, cfg.stage_starts):
        row["parts"] = parts_of(run, step, device)
    if rt.rank == 0:
        print(f"{name}, {rt.world} rank(s), torch {torch.__version__}, track {cfg.track}, attention {run.backend}, {data}; "
              f"warm-up {ready:.0f} s" + (f", peak memory {result['peak_mib']:,} MiB" if "peak_mib" in result else ""))
        print("\nFLOPs count every attention window as full; documents are shorter, so the true share is a little less.")
        print(f"\n| stage | tokens/step | ms/step, median of {STEPS} (min-max) | tokens/s | TFLOP/s | of peak | loader/trainer |")
        print("|---|---|---|---|---|---|---|")
        for r in rows:
            print(f"| {r['stage']} | {r['tokens']:,} | {r['ms']:.1f} ({r['ms_min']:.1f}-{r['ms_max']:.1f}) | "
                  f"{r['tokens_per_s']:,.0f} | {r['tflops']:.3g} | {r['tflops'] / device.tflops / rt.world:.0%} | "
                  f"{r['loader_ratio']:.0f}x |")
        print("\n" + parts_table(run, rows, device))
        if os.environ.get("OUT"):
            Path(os.environ["OUT"], "bench_step.json").write_text(json.dumps(result, indent=1))
    return 0


def parts_table(run: Run, rows: list[dict], device: floors.Device) -> str:
    def show(x, digits=2):
        return f"{x:,.{digits}f}" if x else "-"

    modes, time_of = ["eager", "compiled"] if run.compiled else ["eager"], "time of the CPU"
    if run.rt.device.type == "cuda":
        time_of = "busy time of the GPU"
    lines = [f"Peak {device.tflops:.3g} TFLOP/s, memory {device.tb_s:.3g} TB/s ({device.source}). Step times above are of the "
             f"{modes[-1]} model without the profiler, which slows a step down. Parts: {time_of} of rank 0; Adam's is divided by "
             "adam_every. The floor of elementwise is an estimate, see bench/floors.py.", "",
             "| stage | part | GFLOP | MB | floor ms |" + "".join(f" {mode}, ms | share |" for mode in modes),
             "|---" * (5 + 2 * len(modes)) + "|"]
    for r in rows:
        wall = r["parts"][-1]
        for p in r["parts"]:
            cells = [f"{show(p.get(mode))} | " + (f"{p[mode] / wall[mode]:.0%}" if p.get(mode) else "-") for mode in modes]
            lines.append(f"| {r['stage']} | {p['part']} | {show(p.get('gflop'))} | {show(p.get('mb'), 1)} | "
                         f"{show(p.get('floor_ms'))} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
