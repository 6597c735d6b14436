"""Head and loss in bf16 and in FP8, forward and backward as a run has them: time, and errors against fp32.

    python -m bench.head [--track=small] [--field=value ...]          prints JSON
"""
import json
import sys

import torch

from data.errors import run_program
from engine.fused import norm
from engine.head_loss import HEAD_PIECE, head_loss
from engine.lookup import Lookup
from engine.sampled_softmax import draw_sample
from engine.self_test import relative_error, timed_ms
from train_gpt import Config, configure, mtp_weights


def measure_head(cfg: Config, device: torch.device) -> dict[str, dict[str, float]]:
    """Return {"bf16", "fp8"} -> {"loss", "dx", "dw": relative errors, "ms"} in the first stage."""
    T = cfg.batch_tokens[0] // cfg.slices
    torch.manual_seed(0)
    targets = torch.randint(0, cfg.vocab_size, (T,), device=device)
    x = norm(torch.randn(T, cfg.model_dim, device=device))
    head = cfg.head_std * torch.randn(cfg.padded_vocab, cfg.model_dim, device=device)
    weights = torch.tensor(mtp_weights(cfg, 0), device=device)
    rows = cfg.at("head_rows", 0)
    sample = draw_sample(cfg.padded_vocab, rows, (0,), device) if rows else None

    def make(dtype: torch.dtype, fp8: bool, compiled: bool):
        leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in (x, head)]

        def loss():
            return head_loss(*leaves, targets, weights, cfg.softcap, HEAD_PIECE, fp8,
                             sample=sample, lookup=Lookup.apply)

        forward = loss
        if compiled:
            forward = torch.compile(loss, dynamic=False)

        def call():
            y = forward()
            gradients = torch.autograd.grad(y, leaves)
            return [y.detach(), *gradients]

        return call

    exact = make(torch.float32, fp8=False, compiled=False)()
    result = {}
    for name, fp8 in (("bf16", False), ("fp8", True)):
        call = make(torch.bfloat16, fp8, compiled=device.type == "cuda")
        loss, dx, dw = map(relative_error, call(), exact)
        result[name] = dict(loss=loss, dx=dx, dw=dw, ms=timed_ms(call, device, times=4))
    return result


def main(argv: list[str]) -> int:
    _, cfg, _ = configure(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(measure_head(cfg, device)))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.head"))
