"""What a training step must compute and move, part by part, counted from shapes, and the least time a device takes for that.

    python -m bench.floors [--gpu=H100] [--ranks=1] [--track=small] [--fp8=on]

A floor is the larger of operations over peak and bytes over bandwidth, so nothing can be faster; overlap of parts aside, nothing
can be expected to reach it. Operations are those of matrix products (2 for a multiply-add). Attention counts the keys that
queries see in these documents, without what flash attention computes again in its backward pass. Bytes: each factor of a
product is read once and each result written once, forward and for both gradients, for every packed sequence. The elementwise
part is an estimate of how many times fused kernels pass over the stream.
"""
import argparse
import functools
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils import benchmark

from tools import plan
from engine.kernels import choose_ns_dtype
from muon import ONEDNN, place_units, product, units_of
from train_gpt import MATRICES, Config

BANDWIDTH = {  # as plan.GPUS -> TB/s of its memory; GB/s to other GPUs, one direction, over NVLink or PCIe; data sheets
    "B200": (8.0, 900), "H200": (4.8, 450), "GH200": (4.0, 450), "H100 NVL": (3.9, 300), "H100": (3.35, 450),
    "A100": (2.04, 300), "L40S": (0.864, 32), "RTX 6000 Ada": (0.96, 32), "A6000": (0.768, 56), "A40": (0.696, 56),
    "5090": (1.79, 64), "4090": (1.01, 32), "3090": (0.936, 32), "L4": (0.3, 32), "A10": (0.6, 32),
}
WITHOUT_FP8 = "A100", "A6000", "A40", "3090", "A10"  # the others have it at twice the rate of bf16
HOST = 25.0  # GB/s from the host's memory, over PCIe 4; assumed
PARTS = ("attention", "projections", "MLP", "head and loss", "tables", "elementwise", "gradient sums", "Muon", "Adam", "masks",
         "data", "communication", "other")


class Device(NamedTuple):
    name: str
    tflops: float  # of matrix products in the dtype of the run
    fp8_tflops: float
    tb_s: float
    gb_s: float  # to other ranks
    source: str


class Work(NamedTuple):
    """Of one rank and step: operations, those in FP8, bytes of device memory, bytes over the link to ranks, or to the host."""
    flops: float = 0.0
    fp8: float = 0.0
    bytes: float = 0.0
    link: float = 0.0
    host: float = 0.0

    def floor_ms(self, device: Device) -> float:
        compute = self.flops / device.tflops + self.fp8 / device.fp8_tflops
        return 1000 * max(compute / 1e12, self.bytes / device.tb_s / 1e12, self.link / device.gb_s / 1e9, self.host / HOST / 1e9)


def find_device(device: torch.device, dtype: torch.dtype = torch.float32, name: str = "") -> Device:
    """The data sheet of a GPU that is found or named, else what a large product and a large copy reach here."""
    name = name or (torch.cuda.get_device_name() if device.type == "cuda" else "")
    for key in sorted(BANDWIDTH, key=len, reverse=True):
        if key.lower() in name.lower():
            tflops = plan.GPUS[key][1]
            return Device(name, tflops, tflops * (1 if key in WITHOUT_FP8 else 2), *BANDWIDTH[key], "data sheet")

    def best(statement: str, **tensors) -> float:
        timer = benchmark.Timer(statement, globals=tensors, num_threads=torch.get_num_threads())
        return min(timer.timeit(1).mean for _ in range(20))  # others may use the machine too

    n = 1024 if device.type == "cpu" else 8192
    a, x = torch.randn(n, n, device=device).to(dtype), torch.ones(2**26, device=device)
    y = torch.empty_like(x)
    products = ["a @ a", *(["product(a, a)"] if ONEDNN is not None and device.type == "cpu" and dtype == torch.float32 else [])]
    tflops = max(2 * n**3 / best(s, a=a, product=product) / 1e12 for s in products)
    tb_s = 2 * x.nbytes / best("y.copy_(x)", x=x, y=y) / 1e12
    source = f"measured here: a product of {2e-9 * n**3:.0f} GFLOP and a copy of {x.nbytes / 1e6:.0f} MB"
    return Device(name or "CPU", tflops, tflops, tb_s, 1000 * tb_s / 2, source)


def visible(lengths: np.ndarray, window: int) -> int:
    """Pairs of a query and a key that it sees, over documents of these lengths."""
    full = np.minimum(lengths, window + 1)
    return int((full * (full + 1) // 2 + (lengths - full) * (window + 1)).sum())


def document_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Log-normal with median 403 and mean 690 tokens, as in FineWeb."""
    return np.maximum(rng.lognormal(np.log(403), np.sqrt(2 * np.log(690 / 403)), count), 2).astype(int)


def packed(lengths: np.ndarray, max_len: int, T: int, count: int) -> list[np.ndarray]:
    """Documents of `count` sequences of T tokens, packed as data/loader.py does; the last one of each is cut to fit."""
    ends, result, first = np.cumsum(np.minimum(lengths, max_len)), [], 0
    for _ in range(count):
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + T))
        result.append(np.diff(np.minimum(ends[first:last + 1], before + T), prepend=before))
        first = last + 1
    return result


def synthetic(cfg: Config, step: int, sequences: int) -> list[np.ndarray]:
    """Document lengths of the packed sequences of a step."""
    tokens = cfg.at("batch_tokens", step)
    lengths = document_lengths(np.random.default_rng(0), tokens // 20)
    lengths = np.full_like(lengths, cfg.split_docs) if cfg.split_docs else lengths
    return packed(lengths, cfg.at("max_doc_len", step), tokens // sequences, sequences)


@functools.cache
def built(cfg: Config, dtype: torch.dtype, world: int) -> SimpleNamespace:
    return plan.build(cfg, dtype, world)


def keys_seen(model, docs: list[np.ndarray], stage: int) -> int:
    """Over all layers, as if each had all heads at every token: a pair of heads has half of them at twice the places."""
    cfg, keys = model.cfg, 0
    for i in model.attn_layers:
        windows = cfg.window_long if i in cfg.long_layers else cfg.window_short
        double = 2 if i in cfg.paired_layers else 1
        keys += sum(visible(double * d, windows[min(stage, len(windows) - 1)]) for d in docs) // double
    return keys


def count(cfg: Config, dtype: torch.dtype, docs: list[np.ndarray], step: int, world: int = 1, fp8: bool = False,
          device: torch.device = torch.device("cuda")) -> dict[str, Work]:
    """Part -> work of one rank in a step. docs: document lengths of each packed sequence that the rank takes in turn."""
    run = built(cfg, dtype, world)
    model, b, tied = run.model, dtype.itemsize, cfg.tied(step)
    T, M, D, V = int(sum(map(np.sum, docs))), len(docs), cfg.model_dim, cfg.padded_vocab
    L, A = cfg.num_layers, len(model.attn_layers)
    values = len(cfg.value_embed_layers)

    def product(n_in: int, n_out: int, copies: int) -> Work:
        return Work(6 * T * n_in * n_out * copies, 0, 3 * b * copies * (T * (n_in + n_out) + M * n_in * n_out))

    def add(*parts: Work) -> Work:
        return Work(*map(sum, zip(*parts)))

    size = {name: p.numel() for name, p in model.named_parameters()}
    gates = 6 * T * sum(size.get(name, 0) for name in ("value_gates", "attn_gates", "skip_gate"))
    gates += 6 * (T - M) * size.get("smear_gate", 0)
    # Passes over the stream (T, D), forward: norm 2, queries and keys 4, residual and what is added to it 5; MLP: norm 2,
    # residual 3, ReLU^2 2 per unit of width; the special layers; both ends. Backward: twice that. Then the banks' gradients.
    passes = 11 * A + (5 + 2 * cfg.mlp_ratio) * L + 3 * values + 3 * len(cfg.xsa_layers) + 2 * len(cfg.attn_gate_layers) + 12
    head = product(D, V, 1)
    gathered = 1 + values + bool(cfg.bigram_rows)
    scattered = sum(size.get(name, 0) for name in ("head" if tied else "embed", "value_embeds", "bigram_embed"))
    moving = {p for name, p in model.named_parameters() if not (tied and name == "embed")}
    matrices = {p for group in run.muon.param_groups for p in group["params"]} if run.muon else set()
    sums = sum(3 * p.numel() * p.element_size() * (M - (1 if p in matrices else 1 / cfg.adam_every)) for p in moving)
    work = {
        "attention": Work(12 * D * keys_seen(model, docs, cfg.stage(step)), 0, 12 * b * T * D * A),
        "projections": add(product(D, 2 * D, A), product(D, D, 2 * A)),
        "MLP": add(product(D, cfg.mlp_ratio * D, L), product(cfg.mlp_ratio * D, D, L)),
        # The logits are read once to become their gradients, which in FP8 have one byte.
        "head and loss": Work(0 if fp8 else head.flops, head.flops if fp8 else 0, head.bytes + T * V * (3 - b if fp8 else 2 * b)),
        "tables": Work(0, 0, 5 * b * T * D * gathered + 2 * T * D * bool(cfg.bigram_rows) + b * M * scattered),
        "elementwise": Work(gates, 0, 3 * b * T * D * passes + 2 * b * M * sum(size[name] for name in MATRICES)),
        "gradient sums": Work(0, 0, sums + 3 * b * M * V * D * tied),  # tied: the head's two gradients are added up
        "data": Work(host=20 * T),  # inputs and targets as int64, document numbers as int32
    }
    return work | optimizers(cfg, run, moving, world, device)


def optimizers(cfg: Config, run, moving: set, world: int, device: torch.device) -> dict[str, Work]:
    """On the rank with the most Newton-Schulz work; Adam's as a mean over the steps, in some of which it rests."""
    sent, muon, adam = 0.0, Work(), 0.0
    ring = (world - 1) / world
    if run.muon is not None:
        groups, kind = run.muon.param_groups, choose_ns_dtype(device)
        units = [u for i, group in enumerate(groups) for p in group["params"] for u in units_of(p, p, i, group)]
        costs, sizes = [run.muon.cost(u, kind) for u in units], [u.m * u.n for u in units]
        loads = place_units(costs, sizes, world, int(run.muon.bucket_mb * 1e6 / 4)).loads
        # An iteration reads X, writes X X^T, reads it twice and the polynomial once, and writes the next X.
        moved = sum(groups[u.group]["ns_steps"] * kind.itemsize * (3 * u.m * u.n + 4 * min(u.m, u.n) ** 2) for u in units)
        state = 12 if groups[0]["split_mantissa"] else 8  # momentum, lower halves: read and written
        moved += sum(sizes) * (state + 3 * run.dtype.itemsize)
        muon = Work(max(loads), 0, moved * max(loads) / sum(loads))
        sent += ring * 2 * run.dtype.itemsize * sum(sizes)
    for p in (p for group in run.adam.param_groups for p in group["params"] if p in moving):
        share, size = world if run.adam.sharded(p) else 1, p.element_size()
        adam += p.numel() / share * (16 + 3 * size + 4 * (p.dtype == torch.bfloat16)) / cfg.adam_every
        sent += ring * 2 * p.numel() * size / cfg.adam_every
    return {"Muon": muon, "Adam": Work(bytes=adam), "communication": Work(link=sent)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.floors", description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", default="H100", choices=BANDWIDTH)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--track", default="small")
    parser.add_argument("--fp8", default="on", choices=("on", "off"))
    args = parser.parse_args(argv)
    cfg, device = Config.for_track(args.track), find_device(torch.device("cuda"), name=args.gpu)
    fp8 = args.fp8 == "on" and device.fp8_tflops > device.tflops
    docs = [synthetic(cfg, step, max(cfg.slices, args.ranks)) for step in cfg.stage_starts]
    stages = [count(cfg, torch.bfloat16, d[:len(d) // args.ranks], step, args.ranks, fp8)
              for d, step in zip(docs, cfg.stage_starts)]
    print(f"Track {cfg.track} on {args.ranks} x {args.gpu}, head in {'FP8' if fp8 else 'bf16'}: GFLOP, MB and floor in ms of a "
          "step of one rank, by stage\n\n| part |" + "".join(f" {stage} |" for stage in range(len(stages))))
    print("|---" * (1 + len(stages)) + "|")
    for part in (part for part in PARTS if part in stages[0]):
        print(f"| {part} |" + "".join(f" {(w[part].flops + w[part].fp8) / 1e9:,.0f}, {sum(w[part][2:]) / 1e6:,.0f}, "
                                      f"{w[part].floor_ms(device):.2f} |" for w in stages))
    print("| all |" + "".join(f" {sum(work.floor_ms(device) for work in w.values()):.2f} |" for w in stages))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
