"""What a training step must compute and move, part by part, counted from shapes, and the least time a
device takes.

    python -m bench.floors [--gpu=H100] [--ranks=1] [--track=small] [--fp8=on]

A floor is the larger of operations over peak and bytes over bandwidth: nothing is faster, and overlap of
parts aside nothing can be expected to reach it. Operations are those of matrix products, 2 for a
multiply-add. Attention counts the keys that queries see in these documents, once. Each factor of a product
is read once and each result written once, forward and for both gradients, for every packed sequence. The
elementwise part is an estimate of how many times fused kernels pass over the stream.
"""
import argparse
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils import benchmark

from bench.page import grid
from data.errors import run_program
from engine.kernels import choose_ns_dtype
from tools.gpus import GPUS, Gpu, find_gpu
from tools.plan import muon_flops, muon_matrices, shapes_of
from train_gpt import MATRICES, NETWORKS, TABLES, Config, optimizer_table

HOST_GB_S = 25.0  # from the host's memory, over PCIe 4; assumed
PARTS = ("attention", "projections", "MLP", "head and loss", "tables", "elementwise", "gradient sums", "Muon",
         "Adam", "masks", "data", "communication", "other")


# ------------------------------------------------------------------------------------------------------------
# The device


def measure_device(device: torch.device, dtype: torch.dtype, linear) -> Gpu:
    """Measure what a product of 1024 or 8192 cubed by `linear` and a copy of 256 MB reach here."""
    def best(call) -> float:
        timer = benchmark.Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
        return min(timer.timeit(1).mean for _ in range(20))  # others may use the machine too

    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    product_s = best(lambda: linear(a, a))
    x = torch.ones(2**26, device=device)
    y = torch.empty_like(x)
    copy_s = best(lambda: y.copy_(x))
    tflops = 2e-12 * n**3 / product_s
    tb_s = 2e-12 * x.nbytes / copy_s
    return Gpu(0.0, tflops, tflops, tb_s, 1000 * tb_s / 2)


def find_device(device: torch.device, dtype: torch.dtype, linear=F.linear) -> tuple[Gpu, str]:
    """Return the rates of this device and where they come from."""
    known = find_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return (known, "data sheet") if known else (measure_device(device, dtype, linear), "measured here")


# ------------------------------------------------------------------------------------------------------------
# Documents


def document_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw log-normal lengths with median 403 and mean 690 tokens, as in FineWeb."""
    median, mean = 403, 690
    sigma = np.sqrt(2 * np.log(mean / median))
    return np.maximum(rng.lognormal(np.log(median), sigma, count), 2).astype(int)


def packed(lengths: np.ndarray, max_len: int, T: int, count: int) -> list[np.ndarray]:
    """Pack documents into `count` sequences of T tokens as data/loader.py does; the last one of each is cut
    to fit."""
    ends = np.cumsum(np.minimum(lengths, max_len))
    result, first = [], 0
    for _ in range(count):
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + T))
        inside = np.minimum(ends[first : last + 1], before + T)
        result.append(np.diff(inside, prepend=before))
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
    rising = full * (full + 1) // 2  # the first queries of a document see all before them
    level = (lengths - full) * (window + 1)
    return int((rising + level).sum())


def keys_seen(cfg: Config, docs: list[np.ndarray], stage: int) -> int:
    """Count keys over all layers, as if each had all heads at every token: a pair of heads has half of them
    at twice the places."""
    keys = 0
    for i in set(range(cfg.num_layers)) - set(cfg.no_attn_layers):
        windows = cfg.window_long if i in cfg.long_layers else cfg.window_short
        window = windows[min(stage, len(windows) - 1)]
        double = 2 if i in cfg.paired_layers else 1
        keys += sum(visible(double * d, window) for d in docs) // double
    if cfg.mix_window:  # the mixing of heads is one more attention
        keys += sum(visible(d, cfg.mix_window - 1) for d in docs)
    return keys


# ------------------------------------------------------------------------------------------------------------
# The work


class Work(NamedTuple):
    """What one rank does in a step."""
    flops: float = 0.0  # of matrix products in the dtype of the run
    fp8: float = 0.0  # of those in FP8
    bytes: float = 0.0  # of device memory
    link: float = 0.0  # bytes between ranks
    host: float = 0.0  # bytes from the host

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(sum, zip(self, other)))

    def floor_ms(self, device: Gpu) -> float:
        compute = self.flops / device.tflops + self.fp8 / device.fp8_tflops
        memory = self.bytes / device.tb_s
        link = 1000 * self.link / device.gb_s
        host = 1000 * self.host / HOST_GB_S
        return max(compute, memory, link, host) / 1e9


def count(cfg: Config, dtype: torch.dtype, docs: list[np.ndarray], step: int, world: int = 1,
          fp8: bool = False, device: torch.device = torch.device("cuda")) -> dict[str, Work]:
    """Return the work of one rank in a step by part. docs: document lengths of each of its sequences."""
    model = model_work(cfg, dtype, docs, step, fp8)
    return model | optimizer_work(cfg, dtype, step, len(docs), world, device)


def model_work(cfg: Config, dtype: torch.dtype, docs: list[np.ndarray], step: int,
               fp8: bool) -> dict[str, Work]:
    """Return the work of forward and backward passes over M sequences of T tokens together."""
    T = int(sum(map(np.sum, docs)))
    M = len(docs)
    D, V = cfg.model_dim, cfg.padded_vocab
    L = cfg.num_layers
    A = L - len(set(cfg.no_attn_layers))
    b = dtype.itemsize
    stream = b * T * D
    size = Counter({name: p.numel() for name, p in shapes_of(cfg).named_parameters()})

    def product(n_in: int, n_out: int, copies: int = 1) -> Work:
        flops = 6 * T * n_in * n_out
        moved = 3 * b * (T * (n_in + n_out) + M * n_in * n_out)
        return Work(flops=copies * flops, bytes=copies * moved)

    head = product(D, V)
    if fp8:  # the logits are read once to become their gradients, which in FP8 have one byte
        head = Work(fp8=head.flops, bytes=head.bytes + T * V * (3 - b))
    else:
        head += Work(bytes=T * V * 2 * b)

    # Passes over the stream, forward: norm 2, queries and keys 4, residual and what is added to it 5; MLP:
    # norm 2, residual 3, ReLU^2 2 per unit of width; the special layers; both ends. Backward: twice that.
    # Connections read three streams for the values, three for the last layer and five for the head.
    values = len(cfg.value_embed_layers)
    special = 3 * values + 3 * len(cfg.xsa_layers) + 2 * len(cfg.attn_gate_layers)
    special += 14 * cfg.mudd + 6 * bool(cfg.mix_window)
    passes = 11 * A + (5 + 2 * cfg.mlp_ratio) * L + special + 12
    gates = T * (size["value_gates"] + size["attn_gates"] + size["skip_gate"])
    gates += (T - M) * size["smear_gate"]
    gates += T * sum(size[name] for name in NETWORKS)
    if cfg.mudd and L - 1 in cfg.value_embed_layers:  # the last one is the connections'
        gates -= T * size["value_gates"] // values
    banks = sum(size[name] for name in MATRICES)  # their gradients are put together from those of layers

    bigrams = bool(cfg.bigram_rows)
    gathered = 5 * stream * (1 + values + bigrams)
    signs = 2 * T * D * bigrams  # of a byte
    embed = size["head" if cfg.tied(step) else "embed"]
    scattered = b * M * (embed + size["value_embeds"] + size["bigram_embed"])
    keys = keys_seen(cfg, docs, cfg.stage(step))
    return {
        "attention": Work(
            flops=12 * D * keys,
            bytes=12 * stream * A),
        "projections": product(D, 2 * D, A) + product(D, D, 2 * A),
        "MLP": product(D, cfg.mlp_ratio * D, 2 * L),
        "head and loss": head,
        "tables": Work(bytes=gathered + signs + scattered),
        "elementwise": Work(
            flops=6 * gates,
            bytes=3 * stream * passes + 2 * b * M * banks),
        "data": Work(host=20 * T),  # inputs and targets as int64, document numbers as int32
    }


def optimizer_work(cfg: Config, dtype: torch.dtype, step: int, M: int, world: int,
                   device: torch.device) -> dict[str, Work]:
    """Return what follows the backward passes of M sequences; Adam's as a mean over the steps, in some of
    which it rests."""
    table = optimizer_table(cfg)
    tied = cfg.tied(step)
    ring = (world - 1) / world
    sums = 3 * dtype.itemsize * M * cfg.padded_vocab * cfg.model_dim * tied  # the head has two gradients
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
            sharded = p.numel() % world == 0 and p.numel() >= 2**16
            touched = p.numel() * (20 if low else 16) + 3 * size
            adam += touched / (world if sharded else 1) / every

    # An iteration reads X, writes X X^T, reads it twice and the polynomial once, and writes the next X.
    # Momentum and lower halves are read and written, gradient and weight read, the weight written.
    kind = choose_ns_dtype(cfg, device)
    state = 3 * dtype.itemsize + (12 if dtype == torch.bfloat16 else 8)
    moved = 0
    for m, n in muon_matrices(cfg):
        iteration = kind.itemsize * (3 * m * n + 4 * min(m, n) ** 2)
        moved += 5 * iteration + state * m * n
    return {
        "gradient sums": Work(bytes=sums),
        "Muon": Work(
            flops=muon_flops(cfg, device) / world,
            bytes=moved / world),
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
    cfg = Config.for_track(args.track)
    device = GPUS[args.gpu]
    fp8 = args.fp8 == "on" and device.fp8_tflops > device.tflops
    stages = []
    for step in cfg.stage_starts:
        docs = synthetic(cfg, step, max(cfg.slices, args.ranks))
        mine = docs[: len(docs) // args.ranks]
        stages.append(count(cfg, torch.bfloat16, mine, step, args.ranks, fp8))

    def cell(work: Work) -> str:
        gflop = (work.flops + work.fp8) / 1e9
        mb = (work.bytes + work.link + work.host) / 1e6
        return f"{gflop:,.0f}, {mb:,.0f}, {work.floor_ms(device):.2f}"

    rows = [[part, *(cell(works[part]) for works in stages)] for part in PARTS if part in stages[0]]
    sums = [sum(work.floor_ms(device) for work in works.values()) for works in stages]
    rows.append(["all", *(f"{ms:.2f}" for ms in sums)])
    print(f"Track {cfg.track} on {args.ranks} x {args.gpu}, head in {'FP8' if fp8 else 'bf16'}: GFLOP, MB "
          "and floor in ms of a step of one rank, by stage\n")
    print(grid(["part", *range(len(stages))], rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.floors"))
