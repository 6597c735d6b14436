"""Pieces of bench.gpu that need a process of their own: attention of a backend, the head in FP8, a run without a compiler.

    python -m bench.gpu_pieces OUT.json PIECE[:ARGUMENT] [--field=value ...]
"""
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from bench import floors
from data.loader import make_batch, to_device
from engine.attention import BACKENDS, paired_docs, self_test
from engine.kernels import choose_dtype
from engine.ranks import Runtime
from train_gpt import GPT, Config, Run, mtp_weights, norm, parse_config


def milliseconds(call, device: torch.device, reps: int) -> float:
    """Median of a call, by CUDA events on a GPU, after three that do not count."""
    times = []
    for _ in range(reps + 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def attention(cfg: Config, device, candidate: str) -> dict:
    """Forward and backward at the shapes of the last stage, and the error against the definition in fp32."""
    dtype, stage, name = choose_dtype(cfg.dtype, device), len(cfg.stage_starts) - 1, candidate.partition(" ")[0]
    works, said = self_test(candidate, cfg.head_dim, cfg.attn_scale, device, dtype)
    if not works:
        raise SystemExit(said)
    step, rng, result = cfg.stage_starts[-1], np.random.default_rng(0), dict(said=said, ms={}, tflops={})

    def problem(T: int, window: int, paired: bool, backend: str, dtype):
        lengths, = floors.packed(floors.document_lengths(rng, T), cfg.at("max_doc_len", step), T, 1)
        batch = make_batch(np.zeros(T + 1, np.int64), np.cumsum(lengths) - lengths, cfg.at("max_doc_len", step), False)
        docs = to_device(batch, device).docs
        docs = paired_docs(docs) if paired else docs
        torch.manual_seed(0)
        shape = (T * (1 + paired), cfg.num_heads // (1 + paired), cfg.head_dim)
        q, k, v, g = (torch.randn(shape, device=device).bfloat16().to(dtype) for _ in range(4))
        q, k, v = (x.requires_grad_() for x in (norm(q), norm(k), v))
        make, attend = BACKENDS[backend]
        mask = make(docs, window)

        def call():
            y = attend(q, k, v, mask, cfg.attn_scale)
            return [y, *torch.autograd.grad(y, (q, k, v), g)]
        return call, 12 * cfg.model_dim * floors.visible((1 + paired) * lengths, window) / (1 + paired)

    short, long = (w[min(stage, len(w) - 1)] for w in (cfg.window_short, cfg.window_long))
    T = cfg.at("batch_tokens", step) // cfg.slices
    for label, window, paired in (("short", short, False), ("long", long, False), ("paired", short, True)):
        call, flops = problem(T, window, paired, name, dtype)
        result["ms"][label] = milliseconds(call, device, 10)
        result["tflops"][label] = flops / result["ms"][label] / 1e9
    rng = np.random.default_rng(1)
    ours = problem(min(T, 2048), long, False, name, dtype)[0]()
    rng = np.random.default_rng(1)
    exact = problem(min(T, 2048), long, False, "masked", torch.float32)[0]()
    return result | dict(error=max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(ours, exact)), tokens=T)


def head(cfg: Config, device) -> dict:
    """Head and loss, forward and backward, in bf16 and in FP8: time as the run computes them, error against fp32."""
    T = cfg.batch_tokens[0] // cfg.slices
    tokens = torch.randint(0, cfg.vocab_size, (T,), device=device)
    ctx = SimpleNamespace(mtp_weights=torch.tensor(mtp_weights(cfg, 0), device=device))
    torch.manual_seed(0)
    x = norm(torch.randn(T, cfg.model_dim, device=device))
    weights = cfg.head_std * torch.randn(cfg.padded_vocab, cfg.model_dim, device=device)

    def call(dtype, fp8, compiled):
        with torch.device("meta"):
            model = GPT(cfg, fp8_head=fp8).train()
        leaf, model.head = x.to(dtype).requires_grad_(), torch.nn.Parameter(weights.to(dtype))
        model.trunk = lambda tokens, ctx: leaf
        forward = torch.compile(model, dynamic=False) if compiled else model

        def run():
            loss = forward(tokens, tokens, ctx)
            return [loss.detach(), *torch.autograd.grad(loss, (leaf, model.head))]
        return run

    exact, result = call(torch.float32, False, False)(), dict(tokens=T)
    for label, fp8 in (("bf16", False), ("fp8", True)):
        run = call(torch.bfloat16, fp8, device.type == "cuda")
        errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(run(), exact)]
        result[label] = dict(zip(("loss", "dx", "dw"), errors), ms=milliseconds(run, device, 10))
    return result


def eager(cfg: Config, device) -> dict:
    """Whether training and validation run without a compiler in this memory, and the most that they took."""
    try:
        run = Run(dataclasses.replace(cfg, compile="off", val_tokens=cfg.val_slice), Runtime())
        run.warm_up()
        run.evaluate()
    except torch.OutOfMemoryError as e:
        return dict(fits=False, said=str(e).splitlines()[0])
    return dict(fits=True, peak_mib=torch.cuda.max_memory_allocated() // 2**20 if device.type == "cuda" else None)


def main(argv: list[str]) -> int:
    path, piece, *flags = argv
    name, _, argument = piece.partition(":")
    _, changes = parse_config(flags)
    cfg, device = Config.for_track(changes.pop("track"), **changes), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answer = {"attention": attention, "head": head, "eager": eager}[name](cfg, device, *([argument] if argument else []))
    Path(path).write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
