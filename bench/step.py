"""How fast a training step is, stage by stage, and how much faster the loader is than the trainer.

    python -m bench.step [--track=small] [--field=value ...]          one process
    torchrun --standalone --nproc_per_node=8 -m bench.step            as many as the run would have

Training data is synthetic (documents of FineWeb's lengths, or of the track's shards if they are there), so nothing has to
be downloaded. Prints a Markdown table; with OUT=<folder> in the environment it also writes bench_step.json there.
"""
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data.loader import Loader, find_shards
from data.shards import ShardError, write_shard
from runtime import Runtime, UsageError
from train_gpt import Config, Run, parse_config

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "B200": 2250.0, "4090": 165.2}  # dense bf16, by the vendor
STEPS = 10  # timed per stage, after two that are not


def synthetic_shards(cfg: Config, folder: Path, tokens: int, ids_used: int = 2**16) -> None:
    """Random tokens among the first ids_used of the vocabulary, in documents of log-normal length with
    median 403 and mean 690 tokens, as in FineWeb."""
    rng = np.random.default_rng(0)
    for pattern, count in ((cfg.train_files, tokens), (cfg.val_files, cfg.val_tokens + 1)):
        ids = rng.integers(0, min(ids_used, cfg.vocab_size), count)
        ids[ids == cfg.bos_id] = 0
        lengths = np.maximum(rng.lognormal(np.log(403), np.sqrt(2 * np.log(690 / 403)), count // 100), 2).astype(int)
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


def time_stage(run: Run, step: int) -> list[float]:
    """Seconds of each of STEPS training steps of the stage that begins at a step."""
    step += run.cfg.adam_every  # the very first step of a stage may part embedding and head
    run.step = step
    run.loader.load_state_dict({**run.loader.state_dict(), "step": step})
    seconds = []
    for n in range(STEPS + 2):
        run.rt.synchronize()
        start = time.perf_counter()
        run.train_step()
        run.rt.synchronize()
        seconds.append(time.perf_counter() - start)
        run.step = step + n % 2  # stay in the stage, whatever its length; Adam moves on every second step
    return seconds[2:]


def main(argv: list[str]) -> int:
    try:
        _, changes = parse_config(argv)
        cfg = Config.for_track(changes.pop("track", "small" if torch.cuda.is_available() else "shakespeare"), **changes)
        rt = Runtime()
        with tempfile.TemporaryDirectory() as folder:
            try:
                find_shards(cfg.train_files, cfg)
                data = "the track's shards"
            except ShardError:
                os.environ["DATA_PATH"], data = folder, "synthetic documents"
                needed = 6 * max(cfg.batch_tokens) * (STEPS + 2) + 1000
                synthetic_shards(cfg, Path(folder), max(needed, 100_000_000 if rt.device.type == "cuda" else 0))
                cfg = Config.for_track(cfg.track, **{**changes, "max_epochs": 1000})
            return report(cfg, rt, data)
    except (UsageError, ShardError) as e:
        print(f"bench.step: {e}", file=sys.stderr)
        return 2


def report(cfg: Config, rt: Runtime, data: str) -> int:
    begin = time.perf_counter()
    run = Run(cfg, rt)
    run.warm_up()
    ready = time.perf_counter() - begin
    name = torch.cuda.get_device_name() if rt.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads a rank"
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    rows = []
    for stage, step in enumerate(cfg.stage_starts):
        seconds = time_stage(run, step)
        tokens, flops = cfg.at("batch_tokens", step), run.model.flops_per_token(stage)
        median = statistics.median(seconds)
        rows.append(dict(stage=stage, tokens=tokens, ms=1000 * median, ms_min=1000 * min(seconds), ms_max=1000 * max(seconds),
                         tokens_per_s=tokens / median, tflops=tokens * flops / median / 1e12,
                         loader_ratio=time_loader(cfg, step, rt) * median / tokens))
    result = dict(device=name, world=rt.world, torch=torch.__version__, date=time.strftime("%Y-%m-%d"), track=cfg.track,
                  attention=run.backend, fp8=run.fp8, dtype=str(run.dtype), data=data, warm_up_s=ready, steps=STEPS, rows=rows)
    if rt.device.type == "cuda":
        result["peak_mib"] = torch.cuda.max_memory_allocated() // 2**20
    if rt.rank == 0:
        print(f"{name}, {rt.world} rank(s), torch {torch.__version__}, track {cfg.track}, attention {run.backend}, {data}; "
              f"warm-up {ready:.0f} s" + (f", peak memory {result['peak_mib']:,} MiB" if "peak_mib" in result else ""))
        print("\nFLOPs count every attention window as full; documents are shorter, so the true share is a little less.")
        print(f"\n| stage | tokens/step | ms/step, median of {STEPS} (min-max) | tokens/s | TFLOP/s | of bf16 peak "
              "| loader/trainer |")
        print("|---|---|---|---|---|---|---|")
        for r in rows:
            share = f"{r['tflops'] / peak / rt.world:.0%}" if peak else "-"
            print(f"| {r['stage']} | {r['tokens']:,} | {r['ms']:.1f} ({r['ms_min']:.1f}-{r['ms_max']:.1f}) | "
                  f"{r['tokens_per_s']:,.0f} | {r['tflops']:.3g} | {share} | {r['loader_ratio']:.0f}x |")
        if os.environ.get("OUT"):
            Path(os.environ["OUT"], "bench_step.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
