"""What a training step must compute and move, part by part, counted from shapes, and the least time a device takes.

    python -m bench.floors [--gpu=H100] [--ranks=1] [--track=small] [--fp8=on]

A floor is the larger of operations over peak and bytes over bandwidth: nothing is faster, and overlap of parts aside
nothing can be expected to reach it. Operations are those of matrix products, 2 for a multiply-add. Attention counts the
keys that queries see in these documents, once. Each factor of a product is read once and each result written once,
forward and for both gradients, for every packed sequence. The elementwise part is an estimate of how many times fused
kernels pass over the stream.
"""
import argparse
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils import benchmark

from engine.kernels import choose_ns_dtype
from tools.gpus import GPUS, Gpu, find_gpu
from tools.plan import muon_flops, muon_matrices, shapes_of
from train_gpt import MATRICES, TABLES, Config, optimizer_table

HOST_GB_S = 25.0  # from the host's memory, over PCIe 4; assumed
PARTS = ("attention", "projections", "MLP", "head and loss", "tables", "elementwise", "gradient sums", "Muon", "Adam",
         "masks", "data", "communication", "other")


# ------------------------------------------------------------------------------------------------------------
# The device


def measure_device(device: torch.device, dtype: torch.dtype, linear) -> Gpu:
    """Measure what a product of 1024 or 8192 cubed by `linear` and a copy of 256 MB reach here."""
    def best(call) -> float:
        timer = benchmark.Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
        return min(timer.timeit(1).mean for _ in range(20))  # others may use the machine too

    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    x = torch.ones(2**26, device=device)
    y = torch.empty_like(x)
    tflops = 2 * n**3 / best(lambda: linear(a, a)) / 1e12
    tb_s = 2 * x.nbytes / best(lambda: y.copy_(x)) / 1e12
    return Gpu(0.0, tflops, tflops, tb_s, 1000 * tb_s / 2)


def find_device(device: torch.device, dtype: torch.dtype, linear=F.linear) -> tuple[Gpu, str]:
    """Return the rates of this device and where they come from."""
    known = find_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return (known, "data sheet") if known else (measure_device(device, dtype, linear), "measured here")


class Work(NamedTuple):
    """What one rank does in a step: operations, those in FP8, and bytes of device memory, between ranks, from the host."""
    flops: float = 0.0
    fp8: float = 0.0
    bytes: float = 0.0
    link: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(sum, zip(self, other)))

    def floor_ms(self, device: Gpu) -> float:
        seconds = (
            self.flops / device.tflops / 1e12 + self.fp8 / device.fp8_tflops / 1e12,
            self.bytes / device.tb_s / 1e12,
            self.link / device.gb_s / 1e9,
            self.host / HOST_GB_S / 1e9,
        )
        return 1000 * max(seconds)


# ------------------------------------------------------------------------------------------------------------
# Documents


def document_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw log-normal lengths with median 403 and mean 690 tokens, as in FineWeb."""
    return np.maximum(rng.lognormal(np.log(403), np.sqrt(2 * np.log(690 / 403)), count), 2).astype(int)


def packed(lengths: np.ndarray, max_len: int, T: int, count: int) -> list[np.ndarray]:
    """Pack documents into `count` sequences of T tokens as data/loader.py does; the last one of each is cut to fit."""
    ends = np.cumsum(np.minimum(lengths, max_len))
    result, first = [], 0
    for _ in range(count):
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + T))
        result.append(np.diff(np.minimum(ends[first:last + 1], before + T), prepend=before))
        first = last + 1
    return result


def synthetic(cfg: Config, step: int, sequences: int) -> list[np.ndarray]:
    """Return document lengths of each packed sequence of a step."""
    tokens = cfg.at("batch_tokens", step)
    lengths = document_lengths(np.random.default_rng(0), tokens // 20)
    if cfg.split_docs:
        lengths = np.full_like(lengths, cfg.split_docs)
    return packed(lengths, cfg.at("max_doc_len", step), tokens // sequences, sequences)


def visible(lengths: np.ndarray, window: int) -> int:
    """Count pairs of a query and a key that it sees, over documents of these lengths."""
    full = np.minimum(lengths, window + 1)
    return int((full * (full + 1) // 2 + (lengths - full) * (window + 1)).sum())


def keys_seen(cfg: Config, docs: list[np.ndarray], stage: int) -> int:
    """Count keys over all layers, as if each had all heads at every token: a pair of heads has half of them at twice
    the places."""
    keys = 0
    for i in set(range(cfg.num_layers)) - set(cfg.no_attn_layers):
        windows = cfg.window_long if i in cfg.long_layers else cfg.window_short
        double = 2 if i in cfg.paired_layers else 1
        keys += sum(visible(double * d, windows[min(stage, len(windows) - 1)]) for d in docs) // double
    return keys


# ------------------------------------------------------------------------------------------------------------
# The work


def count(cfg: Config, dtype: torch.dtype, docs: list[np.ndarray], step: int, world: int = 1, fp8: bool = False,
          device: torch.device = torch.device("cuda")) -> dict[str, Work]:
    """Return the work of one rank in a step by part. docs: document lengths of each packed sequence that it takes."""
    model = model_work(cfg, dtype, docs, step, fp8)
    return model | optimizer_work(cfg, dtype, step, len(docs), world, device)


def model_work(cfg: Config, dtype: torch.dtype, docs: list[np.ndarray], step: int, fp8: bool) -> dict[str, Work]:
    """Return the work of forward and backward passes over M sequences of T tokens together."""
    T, M = int(sum(map(np.sum, docs))), len(docs)
    D, V, L, b = cfg.model_dim, cfg.padded_vocab, cfg.num_layers, dtype.itemsize
    A = L - len(set(cfg.no_attn_layers))
    values, tied = len(cfg.value_embed_layers), cfg.tied(step)
    size = {name: p.numel() for name, p in shapes_of(cfg).named_parameters()}

    def product(n_in: int, n_out: int, copies: int = 1) -> Work:
        moved = T * (n_in + n_out) + M * n_in * n_out
        return Work(flops=6 * T * n_in * n_out * copies, bytes=3 * b * copies * moved)

    head = product(D, V)
    logits = T * V * (3 - b if fp8 else 2 * b)  # read once to become their gradients, which in FP8 have one byte
    gates = T * sum(size.get(name, 0) for name in ("value_gates", "attn_gates", "skip_gate"))
    gates += (T - M) * size.get("smear_gate", 0)
    # Passes over the stream (T, D), forward: norm 2, queries and keys 4, residual and what is added to it 5; MLP:
    # norm 2, residual 3, ReLU^2 2 per unit of width; the special layers; both ends. Backward: twice that. Then the
    # banks' gradients.
    special = 3 * values + 3 * len(cfg.xsa_layers) + 2 * len(cfg.attn_gate_layers)
    passes = 11 * A + (5 + 2 * cfg.mlp_ratio) * L + special + 12
    gathered = T * D * (5 * b * (1 + values + bool(cfg.bigram_rows)) + 2 * bool(cfg.bigram_rows))
    scattered = M * b * sum(size.get(name, 0) for name in ("head" if tied else "embed", "value_embeds", "bigram_embed"))
    return {
        "attention": Work(flops=12 * D * keys_seen(cfg, docs, cfg.stage(step)), bytes=12 * b * T * D * A),
        "projections": product(D, 2 * D, A) + product(D, D, 2 * A),
        "MLP": product(D, cfg.mlp_ratio * D, 2 * L),
        "head and loss": Work(0 if fp8 else head.flops, head.flops if fp8 else 0, head.bytes + logits),
        "tables": Work(bytes=gathered + scattered),
        "elementwise": Work(6 * gates, bytes=3 * b * T * D * passes + 2 * b * M * sum(size[n] for n in MATRICES)),
        "data": Work(host=20 * T),  # inputs and targets as int64, document numbers as int32
    }


def optimizer_work(cfg: Config, dtype: torch.dtype, step: int, M: int, world: int,
                   device: torch.device) -> dict[str, Work]:
    """Return what follows the backward passes of M sequences; Adam's as a mean over the steps, in some of which it
    rests."""
    table, tied, ring = optimizer_table(cfg), cfg.tied(step), (world - 1) / world
    sums = 3 * dtype.itemsize * M * cfg.padded_vocab * cfg.model_dim * tied  # the head's two gradients are added up
    sent = adam = 0.0
    for name, p in shapes_of(cfg).named_parameters():
        if name == "embed" and tied:
            continue
        low = name in MATRICES + TABLES and dtype == torch.bfloat16
        size = p.numel() * (2 if low else 4)
        every = 1 if table[name].optimizer == "muon" else cfg.adam_every
        sums += 3 * size * (M - 1 / every)
        sent += ring * 2 * size / every
        if table[name].optimizer == "adam":
            share = world if p.numel() % world == 0 and p.numel() >= 2**16 else 1
            adam += (p.numel() * (20 if low else 16) + 3 * size) / share / every
    # An iteration reads X, writes X X^T, reads it twice and the polynomial once, and writes the next X. Then momentum
    # and lower halves are read and written.
    matrices, kind = muon_matrices(cfg), choose_ns_dtype(device)
    moved = sum(5 * kind.itemsize * (3 * m * n + 4 * min(m, n) ** 2) for m, n in matrices)
    moved += sum(m * n for m, n in matrices) * (3 * dtype.itemsize + (12 if dtype == torch.bfloat16 else 8))
    return {
        "gradient sums": Work(bytes=sums),
        "Muon": Work(muon_flops(cfg, device) / world, bytes=moved / world),
        "Adam": Work(bytes=adam),
        "communication": Work(link=sent),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.floors", description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", default="H100", choices=GPUS)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--track", default="small")
    parser.add_argument("--fp8", default="on", choices=("on", "off"))
    args = parser.parse_args(argv)
    cfg, device = Config.for_track(args.track), GPUS[args.gpu]
    fp8 = args.fp8 == "on" and device.fp8_tflops > device.tflops
    stages = []
    for step in cfg.stage_starts:
        docs = synthetic(cfg, step, max(cfg.slices, args.ranks))
        stages.append(count(cfg, torch.bfloat16, docs[:len(docs) // args.ranks], step, args.ranks, fp8))
    print(f"Track {cfg.track} on {args.ranks} x {args.gpu}, head in {'FP8' if fp8 else 'bf16'}: GFLOP, MB and floor in ms "
          "of a step of one rank, by stage\n")
    print("| part |" + "".join(f" {stage} |" for stage in range(len(stages))))
    print("|---" * (1 + len(stages)) + "|")
    for part in (part for part in PARTS if part in stages[0]):
        cells = [f"{(w.flops + w.fp8) / 1e9:,.0f}, {sum(w[2:]) / 1e6:,.0f}, {w.floor_ms(device):.2f}"
                 for w in (work[part] for work in stages)]
        print(f"| {part} | {' | '.join(cells)} |")
    print("| all |" + "".join(f" {sum(w.floor_ms(device) for w in work.values()):.2f} |" for work in stages))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
