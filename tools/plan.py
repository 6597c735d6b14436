"""What a run takes, before anything is downloaded: memory, the settings that fit, minutes, data and disk.

    python -m tools.plan [--track=small] [--gpu="RTX 4090"] [--gpu_gib=24] [--field=value ...]

Nothing runs on a GPU, and there need not be one. What stays in memory is counted from the shapes of the
parameters. What a compiled step needs besides was found by bench.cross in the graphs of track small, and is
scaled to other settings by a formula. No GPU has confirmed either yet.
"""
import functools
import inspect
import sys
from dataclasses import replace

import torch

from data.errors import UsageError, run_program
from data.loader import shards_needed
from data.machine import memory_bytes
from engine.adam import is_sharded
from engine.head_loss import HEAD_PIECE
from engine.host_table import row_bytes
from engine.kernels import Kernels, choose_dtype, choose_ns_dtype, name_of, will_compile
from muon import Muon
from tools.gpus import GPUS, find_gpu
from tools.traced import traced_runs
from train_gpt import GPT, MATRICES, TABLES, Config
from train_gpt import is_averaged, muon_shares, optimizer_table, parse_config

GIB = 2**30
UTILIZATION = 0.4  # of the peak in bf16; assumed. Upstream's records reach 0.44 on an H100
# Weights of each rank that Muon sends or receives at a time, as its bucket_mb says for fp32.
BUCKET = int(inspect.signature(Muon).parameters["bucket_mb"].default * 1e6 / 4)
DOCS_PER_SLICE = 4  # a shorter packed sequence would cut too many of its documents


# ------------------------------------------------------------------------------------------------------------
# What stays between the steps


@functools.cache
def shapes_of(cfg: Config) -> GPT:
    """Return the model on torch's meta device: shapes without memory."""
    with torch.device("meta"):
        return GPT(cfg, Kernels.plain())


def muon_matrices(cfg: Config) -> list[tuple[int, int]]:
    """Return (rows, columns) of every matrix that Muon moves."""
    if cfg.optimizer != "muon":
        return []
    banks = [getattr(shapes_of(cfg), name).shape for name in MATRICES]
    return [(m, n) for count, m, n in banks for _ in range(count)]


def static_bytes(cfg: Config, dtype: torch.dtype, world: int) -> dict[str, int]:
    """Return the bytes that stay in memory on the fullest of `world` ranks, by kind."""
    table = optimizer_table(cfg)
    split = dtype == torch.bfloat16  # a bf16 weight has a lower half beside it: together they are fp32
    weights = adam = travelling = averaged = 0
    for name, p in shapes_of(cfg).named_parameters():
        low = split and name in MATRICES + TABLES
        averaged += p.numel() * is_averaged(cfg, name)
        weights += p.numel() * (2 if low else 4)
        if table[name].optimizer == "adam":
            sharded = is_sharded(p, world)
            share = p.numel() // world if sharded else p.numel()
            adam += share * (10 if low else 8)
            travelling += 2 * share * p.element_size() * sharded
    variances = bool(cfg.normuon_beta2)
    states = [m * n * (6 if split else 4) + 4 * max(m, n) * variances for m, n in muon_matrices(cfg)]
    muon = sum(states) // world
    if states and world > 1:  # one rank may own a matrix more than others, and four buckets are on their way
        muon += max(states)
        travelling += 4 * (world + 1) * BUCKET * dtype.itemsize
    return {
        "weights": weights,
        "gradients": weights,
        "Adam: moments, low halves": adam,
        "Muon: momentum, low halves": muon,
        "average of the weights": 4 * averaged if cfg.ema_frac else 0,
        "signs of the bigrams, prefix tokens": sum(buffer.nbytes for buffer in shapes_of(cfg).buffers()),
        "gathers and reductions": travelling,
    }


def host_bytes(cfg: Config) -> int:
    """Return the bytes of the n-gram table, in the memory of the hosts of all ranks together."""
    return cfg.ngram_rows * row_bytes(cfg)


def checkpoint_bytes(cfg: Config, dtype: torch.dtype) -> int:
    parts = static_bytes(cfg, dtype, 1)
    return sum(parts.values()) - parts["gradients"] + host_bytes(cfg)


# ------------------------------------------------------------------------------------------------------------
# What a step needs besides


def mixing_streams(cfg: Config) -> int:
    """Return activations of width D of the mixing of heads: blocks of queries, keys and values; four times
    softmaxes of twice the window, by head."""
    return 8 + 8 * cfg.mix_window // cfg.head_dim if cfg.mix_window else 0


def eager_step_bytes(cfg: Config, dtype: torch.dtype, tokens: int, rows: int = 0) -> tuple[int, int]:
    """Return (bytes kept for the backward pass, bytes more at the worst moment) of one packed sequence of a
    model that is not compiled. rows: of the head, over which its loss sums; 0: all.

    Kept are activations of width D: so many of each attention, of each MLP and of the model's ends, two of
    each technique. The worst moment is the head's, whose logits exist in several formats at once.
    """
    layers = cfg.num_layers - len(set(cfg.no_attn_layers))
    extras = cfg.value_embed_layers + cfg.xsa_layers + cfg.attn_gate_layers + cfg.paired_layers
    streams = 12 * layers + (4 + 2 * cfg.mlp_ratio) * cfg.num_layers + 2 * len(extras) + 12
    streams += 13 * cfg.mudd + bool(cfg.ngram_rows) + mixing_streams(cfg)
    rows = rows or cfg.padded_vocab
    worst = 24 * min(tokens, HEAD_PIECE * (cfg.padded_vocab // rows)) * rows
    stream = tokens * cfg.model_dim * dtype.itemsize
    if cfg.recompute:  # the input of each layer stays, and of one layer at a time everything
        worst = max(worst, 2 * streams // cfg.num_layers * stream)
        streams = cfg.num_layers + len(cfg.value_embed_layers) + 12
    # and, whatever the tokens, the matrices that are scaled by learned factors (values and outputs of
    # attention, outputs of the MLP), and the gradient of the head, which is made together with its loss
    scaled = (2 * layers + cfg.mlp_ratio * cfg.num_layers) * cfg.model_dim**2
    matrices = (scaled + rows * cfg.model_dim) * dtype.itemsize
    return streams * stream + matrices, worst


def step_bytes(cfg: Config, dtype: torch.dtype, compiled: bool, tokens: int,
               rows: int = 0) -> tuple[int, int]:
    """Return (bytes kept for the backward pass, bytes more at the worst moment) of one packed sequence. Of a
    compiled model it is what bench.cross found in the most similar graph, scaled as eager models are."""
    mine = eager_step_bytes(cfg, dtype, tokens, rows)
    if not compiled:
        return mine
    like, run = min(traced_runs().values(), key=lambda traced: unlike(traced[0], cfg))
    _, length, *found = min(run["passes"], key=lambda row: (abs(row[1] - tokens), -row[2]))
    theirs = eager_step_bytes(like, torch.bfloat16, length)
    kept, more = (size * n // m for size, n, m in zip(found, mine, theirs))
    return kept, more


def unlike(settings: Config, cfg: Config) -> tuple[bool, bool]:
    """Return what weighs most in how alike two models are in memory; the smallest is the most alike."""
    return settings.recompute != cfg.recompute, settings.mudd != cfg.mudd


def ngram_bytes(cfg: Config, dtype: torch.dtype, world: int) -> int:
    """Return the most bytes of a step's rows of n-grams, and of their gradients, on the device of a rank."""
    tokens = max(cfg.batch_tokens) // world
    rows = min(cfg.ngram_rows, len(cfg.ngram_orders) * tokens)
    return 2 * rows * cfg.head_dim * dtype.itemsize


def validation_bytes(cfg: Config, dtype: torch.dtype) -> int:
    """Return the bytes of a validation sequence at its worst moment: it is run eagerly, and keeps nothing."""
    stream = cfg.val_slice * cfg.model_dim * dtype.itemsize
    logits = 12 * min(cfg.val_slice, HEAD_PIECE) * cfg.padded_vocab
    widest = (len(cfg.value_embed_layers) + 2 * cfg.mlp_ratio) * stream
    return (10 + mixing_streams(cfg)) * stream + max(widest, logits)


def needs(cfg: Config, dtype: torch.dtype, compiled: bool, world: int) -> dict[str, int]:
    """Return the bytes of a run on the fullest rank by kind, and those of its two fullest moments: a pass of
    the fullest stage in the warm-up, and a validation."""
    found = static_bytes(cfg, dtype, world)
    if cfg.ngram_rows:
        found["rows and gradients of n-grams"] = ngram_bytes(cfg, dtype, world)
    travelling = found["gathers and reductions"]  # there between two passes only
    still = sum(found.values()) - travelling
    copied = found["copy of the weights in warm-up"] = found["weights"]
    sequences = max(cfg.slices, world)
    sizes = {(cfg.at("batch_tokens", step) // sequences, cfg.at("head_rows", step))
             for step in cfg.stage_starts}
    kept, more = max((step_bytes(cfg, dtype, compiled, *size) for size in sizes), key=sum)
    found["kept for backward"] = kept
    found["more at the worst moment"] = more
    found["needed: training"] = still + copied + max(kept + more, travelling)
    found["needed: validation"] = still + validation_bytes(cfg, dtype)
    return found


# ------------------------------------------------------------------------------------------------------------
# What fits, and how long it takes


def choices(cfg: Config, world: int) -> list[Config]:
    """Return settings that train on the same tokens, from those asked for to the least hungry.

    First each layer is computed twice, which changes no number. Then validation sequences are halved, which
    cuts more contexts, and packed sequences, which cuts more documents.
    """
    found = [cfg, replace(cfg, recompute=True)]
    for double in (2, 4, 8):
        val_slice, parts = cfg.val_slice // double, max(cfg.slices * double, world)
        tokens = [cfg.at("batch_tokens", step) for step in cfg.stage_starts]
        shortest = [DOCS_PER_SLICE * cfg.at("max_doc_len", step) for step in cfg.stage_starts]
        if cfg.val_tokens % val_slice == 0:
            found.append(replace(found[-1], val_slice=val_slice))
        if all(n % parts == 0 and n // parts >= least for n, least in zip(tokens, shortest)):
            found.append(replace(found[-1], slices=cfg.slices * double))
    return found


def training_flops(cfg: Config) -> int:
    """Return the FLOPs of the model over the schedule; recomputed layers count twice forward."""
    model = shapes_of(cfg)
    flops = sum(count * cfg.at("batch_tokens", step) * model.flops_per_token(cfg.stage(step))
                for step, count in cfg.steps_by_stage)
    again = 2 * sum(getattr(model, name).numel() for name in MATRICES)
    return flops + cfg.recompute * cfg.train_tokens * again


def column(cfg: Config, dtype: torch.dtype, compiled: bool, world: int, gib: float,
           tflops: float | None) -> dict:
    """Return the cells of `world` ranks with so much memory each: the first choice that fits, or the last."""
    allowance = 1 + 0.05 * gib + 0.5 * (world > 1)  # context, libraries, fragmentation; assumed
    for choice in choices(cfg, world):
        found = needs(choice, dtype, compiled, world)
        fits = max(found.values()) <= (gib - allowance) * GIB
        if fits:
            break
    minutes = training_flops(choice) / (world * tflops * 1e12 * UTILIZATION) / 60 if tflops else None
    return {
        "GiB per rank, with ranks": world,
        **{name: f"{size / GIB:.2f}" for name, size in found.items()},
        "allowance": f"{allowance:.2f}",
        "memory": f"{gib:.2f}",
        "fits": "yes" if fits else "no",
        "--recompute": "on" if choice.recompute else "off",
        "--slices": choice.slices,
        "--val_slice": choice.val_slice,
        "minutes of training, estimate": f"{minutes:.1f}" if minutes else "-",
    }


def data_size(cfg: Config) -> str:
    if cfg.track == "shakespeare":
        return "a few MB"
    count = shards_needed(cfg)
    return f"{count} shards of 200 MB and one for validation: {0.2 * (count + 1):.1f} GB"


def show(cfg: Config, name: str, gib: float, tflops: float | None) -> None:
    """Print the plan for a GPU, or for the CPU, whose ranks share its memory."""
    device = torch.device("cpu" if name == "CPU" else "cuda")
    dtype = choose_dtype(cfg.dtype, device)
    compiled = will_compile(cfg, device)
    if name == "CPU":  # its memory is the hosts'
        gib -= host_bytes(cfg) / GIB
    worlds = [w for w in (1, 2, 4, 8) if max(cfg.slices, w) % min(cfg.slices, w) == 0]
    columns = [column(cfg, dtype, compiled, w, gib / w if name == "CPU" else gib, tflops) for w in worlds]
    print(f"plan: track {cfg.track} on {name}, {gib:.1f} GiB, {name_of(dtype)}, "
          f"{'torch.compile' if compiled else 'eager'}; not yet checked against a GPU\n")
    for key in columns[0]:
        print(f"{key:36}" + "".join(f"{cells.get(key, ''):>10}" for cells in columns))
    source = "is counted by a formula"
    if compiled:
        source = "was traced for track small (bench/CROSS.md) and is scaled to other settings"
    shares = muon_shares(shapes_of(cfg), choose_ns_dtype(cfg, device), device)
    print(f"""
What a step needs besides {source}.
tokens: {cfg.train_tokens:,} in training, {cfg.val_tokens:,} in each validation; data: {data_size(cfg)}
a checkpoint: {checkpoint_bytes(cfg, dtype) / 1e9:.2f} GB
Muon's share of the FLOPs of a step: {shares}
The allowance is assumed. Minutes assume {UTILIZATION:.0%} of the peak, without compiling and validation.
--recompute=on is the same training with each layer computed twice. More --slices are shorter sequences: more
documents are cut, so it is not the same run. A smaller --val_slice cuts contexts: the loss is higher and does
not compare.""")
    if cfg.ngram_rows:
        print(f"The n-grams take {host_bytes(cfg) / GIB:.2f} GiB of host memory besides, over all ranks "
              "together.")
    if any(cells["fits"] == "no" for cells in columns):
        print("Where it does not fit, take a GPU with more memory, more GPUs, or a smaller model.")


ACTIONS = {
    "gpu": dict(metavar="NAME", help="plan for this GPU, such as 'RTX 4090', instead of the one found"),
    "gpu_gib": dict(metavar="GIB", type=float, help="plan for a GPU with so much memory"),
}


def planned_machine(name: str | None = None, gib: float | None = None) -> tuple[str, float, float | None]:
    """Return name, GiB and TFLOP/s in bf16 of a GPU of this name or with so much memory; without either of
    the GPU that is here, or of the CPU, whose speed is not known."""
    tflops = None
    if name is None and gib is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        gib = torch.cuda.get_device_properties(0).total_memory / GIB
    gpu = find_gpu(name) if name else None
    if gpu:
        gib, tflops = gib or gpu.gib, gpu.tflops
    elif name and gib is None:
        raise UsageError(f"--gpu: expected a name with one of {', '.join(GPUS)}, found {name!r}; add "
                         "--gpu_gib=NUMBER")
    elif gib is None:
        name, gib = "CPU", memory_bytes() / GIB
    return name or "some GPU", gib, tflops


def main(argv: list[str]) -> None:
    options, changes = parse_config(argv, __doc__, ACTIONS)
    name, gib, tflops = planned_machine(options.gpu, options.gpu_gib)
    track = changes.pop("track", "shakespeare" if name == "CPU" else "small")
    show(Config.for_track(track, **changes), name, gib, tflops)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "tools.plan"))
