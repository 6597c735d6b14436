"""Pieces of bench.gpu that need a process of their own: attention by one backend, and the head in bf16 and FP8.

    python -m bench.gpu_pieces attention:BACKEND|head [--field=value ...]          prints its results as JSON
"""
import json
import statistics
import sys
import time

import numpy as np
import torch

from bench import floors
from data.loader import make_batch, to_device
from engine.attention import BACKENDS, paired_docs, self_test
from engine.head_loss import HEAD_PIECE, HeadLoss
from engine.kernels import choose_dtype
from train_gpt import Config, mtp_weights, norm, parse_config


def milliseconds(call, device: torch.device, reps: int = 10) -> float:
    """Return the median time of a call after three that do not count."""
    times = []
    for _ in range(reps + 3):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def relative_errors(found, exact) -> list[float]:
    return [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, exact)]


def attention_call(cfg: Config, device, backend: str, dtype, T: int, window: int, paired: bool):
    """Return a function that attends forward and backward over T tokens of documents, and its FLOPs."""
    rng, max_len = np.random.default_rng(0), cfg.at("max_doc_len", cfg.stage_starts[-1])
    lengths, = floors.packed(floors.document_lengths(rng, T), max_len, T, 1)
    batch = make_batch(np.zeros(T + 1, np.int64), np.cumsum(lengths) - lengths, max_len, False)
    docs = to_device(batch, device).docs
    docs = paired_docs(docs) if paired else docs
    torch.manual_seed(0)
    shape = (T * (1 + paired), cfg.num_heads // (1 + paired), cfg.head_dim)
    q, k, v, g = (torch.randn(shape, device=device).bfloat16().to(dtype) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (norm(q), norm(k), v))
    make_mask, attend = BACKENDS[backend]
    mask = make_mask(docs, window)

    def call():
        y = attend(q, k, v, mask, cfg.attn_scale)
        return [y, *torch.autograd.grad(y, (q, k, v), g)]

    return call, 12 * cfg.model_dim * floors.visible((1 + paired) * lengths, window) / (1 + paired)


def attention(cfg: Config, device, candidate: str) -> dict:
    """Time forward and backward passes at the shapes of the last stage; the error is against the definition in fp32."""
    dtype, name = choose_dtype(cfg.dtype, device), candidate.partition(" ")[0]
    works, said = self_test(candidate, cfg.head_dim, cfg.attn_scale, device, dtype)
    if not works:
        raise SystemExit(said)
    result, T = {}, cfg.at("batch_tokens", cfg.stage_starts[-1]) // cfg.slices
    short, long = cfg.window_short[-1], cfg.window_long[-1]
    for label, window, paired in (("short", short, False), ("long", long, False), ("paired", short, True)):
        call, flops = attention_call(cfg, device, name, dtype, T, window, paired)
        result[f"ms {label}"] = milliseconds(call, device)
        result[f"TFLOP/s {label}"] = flops / result[f"ms {label}"] / 1e9
    case = min(T, 2048), long, False
    found = attention_call(cfg, device, name, dtype, *case)[0]()
    exact = attention_call(cfg, device, "masked", torch.float32, *case)[0]()
    return result | dict(error=max(relative_errors(found, exact)))


def head(cfg: Config, device) -> dict[str, dict]:
    """Time head and loss, forward and backward, as a run computes them; errors are against fp32."""
    T = cfg.batch_tokens[0] // cfg.slices
    torch.manual_seed(0)
    targets = torch.randint(0, cfg.vocab_size, (T,), device=device)
    x = norm(torch.randn(T, cfg.model_dim, device=device))
    weights = cfg.head_std * torch.randn(cfg.padded_vocab, cfg.model_dim, device=device)
    mtp = torch.tensor(mtp_weights(cfg, 0), device=device)

    def make(dtype, fp8, compiled):
        leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in (x, weights)]

        def loss():
            return HeadLoss.apply(*leaves, targets, mtp, cfg.softcap, HEAD_PIECE, fp8)

        forward = torch.compile(loss, dynamic=False) if compiled else loss

        def call():
            y = forward()
            return [y.detach(), *torch.autograd.grad(y, leaves)]

        return call

    exact, result = make(torch.float32, False, False)(), {}
    for label, fp8 in (("bf16", False), ("fp8", True)):
        call = make(torch.bfloat16, fp8, device.type == "cuda")
        errors = relative_errors(call(), exact)
        result[label] = dict(zip(("loss", "dx", "dw"), errors), ms=milliseconds(call, device))
    return result


def main(argv: list[str]) -> int:
    name, _, backend = argv[0].partition(":")
    _, changes = parse_config(argv[1:])
    cfg = Config.for_track(changes.pop("track"), **changes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(attention(cfg, device, backend) if name == "attention" else head(cfg, device)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
