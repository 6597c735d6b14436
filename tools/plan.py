"""What a run takes, before anything is downloaded: memory by part, the settings that fit, minutes, data and disk.

    python train_gpt.py --track=small --plan [--gpu="RTX 4090"] [--gpu_gib=24] [--field=value ...]

Nothing runs on the GPU, and there need not be one: model and optimizers are built on torch's meta device, whose tensors have
a shape and no memory, and their bytes are counted. So the figures follow every change of the model. With torch.compile, what
is kept for the backward pass is what the compiler's partitioner keeps; what its kernels need besides is a formula.
"""
import dataclasses
import functools
import os
import weakref
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.loader import shards_needed
from data.loader import Docs
from engine.attention import BACKENDS
from engine.head_loss import HEAD_PIECE
from engine.kernels import choose_compile, choose_dtype, choose_ns_dtype
from muon import place_units, state_kinds, symmetric_product, units_of
from data.errors import UsageError
from train_gpt import GPT, MATRICES, TABLES, Config, Run, make_context, mtp_weights

GPUS = {  # part of the name -> (memory as torch reports it, about, in GiB; dense bf16 TFLOP/s with fp32 sums, by the vendor)
    "B200": (178.0, 2250.0), "H200": (139.8, 989.4), "GH200": (94.5, 989.4), "H100 NVL": (93.1, 835.0), "H100": (79.1, 989.4),
    "A100": (79.1, 312.0), "L40S": (44.4, 362.0), "RTX 6000 Ada": (47.4, 364.0), "A6000": (47.4, 154.8), "A40": (44.4, 149.7),
    "5090": (31.4, 209.5), "4090": (23.6, 165.2), "3090": (23.6, 71.0), "L4": (22.0, 121.0), "A10": (22.0, 125.0),
}
UTILIZATION = 0.4  # of that peak; assumed. Upstream's records reach 0.44 on an H100
DOCS_PER_SLICE = 4  # a shorter packed sequence would cut too many of its documents

GIB = 2**30


class Peak(TorchDispatchMode):
    """Bytes of the tensors that were made inside and still live, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)):
            if (key := storage._cdata) not in self.sizes and key not in given:
                self.sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, key)
        self.peak = max(self.peak, self.live)
        return result

    def free(self, key):
        self.live -= self.sizes.pop(key)


def size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def build(cfg: Config, dtype: torch.dtype, world: int = 1) -> SimpleNamespace:
    """The model and rank 0's optimizers of a run, on the meta device. Whatever the backend, attention keeps its inputs, its
    result and a number for each query and head, as varlen does."""
    with torch.device("meta"):
        model = GPT(cfg, BACKENDS["varlen"][1])
    for name, p in model.named_parameters():
        p.data = p.data.to(dtype if name in MATRICES + TABLES else torch.float32)
    run = SimpleNamespace(cfg=cfg, model=model, dtype=dtype, rt=SimpleNamespace(rank=0, world=world, device=torch.device("meta")), compiled=False,
                          symmetric=symmetric_product)
    Run.make_optimizers(run)
    return run


def static_bytes(cfg: Config, dtype: torch.dtype, world: int, device: torch.device) -> dict[str, int]:
    """What stays in memory between the steps, and what travels in one, on the fullest rank."""
    run = build(cfg, dtype, world)
    muon = travelling = 0
    if run.muon is not None:
        groups = run.muon.param_groups
        units = [unit for i, group in enumerate(groups) for p in group["params"] for unit in units_of(p, p, i, group)]
        costs = [run.muon.cost(unit, choose_ns_dtype(device)) for unit in units]
        buckets = place_units(costs, [u.m * u.n for u in units], world, int(run.muon.bucket_mb * 1e6 / 4)).buckets
        state = [sum(kind.itemsize * (max(u.m, u.n) if key == "second_moment" else u.m * u.n)
                     for key, kind in state_kinds(groups[u.group]).items()) for u in units]
        muon = max(sum(state[u] for bucket in buckets for u in bucket[rank]) for rank in range(world))
        fullest = max(sum(units[u].m * units[u].n for u in ids) for bucket in buckets for ids in bucket)
        travelling = 2 * (world + 1) * fullest * 2 * dtype.itemsize  # two buckets on their way there, two on their way back
    moments = [x for state in run.adam.state.values() for x in state.values() if isinstance(x, Tensor)]
    shared = size(p for group in run.adam.param_groups for p in group["params"] if run.adam.sharded(p)) // world
    weights = size(run.model.parameters())
    return {"weights": weights, "gradients": weights, "Adam: moments, low halves": size(moments),
            "Muon: momentum, low halves": muon, "signs of the bigrams": size(run.model.buffers()),
            **({"average of the weights": 4 * sum(p.numel() for p in run.model.parameters())} if cfg.ema_frac else {}),
            "gathers and reductions": 0 if world == 1 else travelling + 2 * shared}


def batch(cfg: Config, model: GPT, tokens: int, stage: int, final: bool = False) -> tuple:
    """Arguments of a forward pass."""
    empty = lambda n, dtype: torch.empty(n, dtype=dtype, device="meta")
    start, max_len = cfg.stage_starts[stage], min(cfg.at("max_doc_len", cfg.stage_starts[stage]), tokens)
    docs = Docs(empty(max(16, tokens // 256), torch.int32), empty(tokens, torch.int32), max_len)
    context = make_context(model, BACKENDS["varlen"][0], {}, docs, stage, cfg.tied(start),
                           empty(len(mtp_weights(cfg, start)), torch.float32), final)
    return empty(tokens, torch.int64), empty(tokens, torch.int64), context


def kept_for_backward(model: GPT, forward, args: tuple) -> int:
    """Bytes of all that a compiled forward pass keeps, weights aside."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward(*args)
        return sum(storage.nbytes() for storage in kept.values())


def step_bytes(cfg: Config, dtype: torch.dtype, compiled: bool) -> tuple[int, int]:
    """(bytes kept for backward, more at the worst moment) of one slice of the longest stage."""
    def length(stage):
        return cfg.at("batch_tokens", cfg.stage_starts[stage]) // cfg.slices
    stage, model = max(range(len(cfg.stage_starts)), key=lambda s: (length(s), -s)), build(cfg, dtype).model.train()
    args = batch(cfg, model, length(stage), stage)
    with Peak() as memory:
        loss = model(*args)
        kept = memory.live
        loss.backward()
    if not compiled:
        return kept, memory.peak - kept
    piece = min(length(stage), HEAD_PIECE) * model.head.size(0) * model.head.itemsize
    with Peak() as memory:
        x = model.trunk(args[0], args[2])
        before = memory.live
        x.sum().backward()
    more = max(3 * piece, memory.peak - before if cfg.recompute else 0)  # logits, their gradient, that in FP8; or a layer
    forward = torch.compile(model, backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True)
    return kept_for_backward(model, forward, args), more


def optimizer_bytes(cfg: Config, dtype: torch.dtype, compiled: bool) -> int:
    """At the worst moment of an update, besides what stays; compiled, Adam needs nothing."""
    run = build(cfg, dtype)
    for p in run.model.parameters():
        p.grad = torch.empty_like(p)
    if run.muon is not None:
        run.muon.step()  # makes its state
    with Peak() as memory:
        for optimizer in filter(None, (run.muon, None if compiled else run.adam)):
            optimizer.step()
    return memory.peak


@torch.no_grad()
def validation_bytes(cfg: Config, model: GPT, tokens: int) -> int:
    """At the worst moment of a validation sequence, which is run eagerly."""
    model.eval()
    with Peak() as memory:
        model(*batch(cfg, model, tokens, len(cfg.stage_starts) - 1, final=True))
    return memory.peak


def first_fit(choices: list[int], need, room: int) -> tuple[int, bool]:
    """The first choice whose need fits into the room, else the last one; and whether it does."""
    return next(((n, True) for n in choices if need(n) <= room), (choices[-1], False))


def choices(cfg: Config, world: int) -> tuple[list[tuple[bool, int]], list[int]]:
    """(--recompute, --slices), from what is fast and the same training to what is neither, and --val_slice, from long to short;
    all leave the batch as it is."""
    def allowed(slices):
        parts = max(slices, world)
        return all(cfg.at("batch_tokens", s) % parts == 0 and
                   cfg.at("batch_tokens", s) // parts >= DOCS_PER_SLICE * cfg.at("max_doc_len", s) for s in cfg.stage_starts)
    steps = [(cfg.recompute, cfg.slices), (True, cfg.slices),
             *((True, cfg.slices * 2**i) for i in range(1, 8) if allowed(cfg.slices * 2**i))]
    return steps, [cfg.val_slice >> i for i in range(6) if cfg.val_slice >> i and cfg.val_tokens % (cfg.val_slice >> i) == 0]


def find_gpu(name: str | None, gib: float | None) -> tuple[str, float, float | None]:
    """(name, GiB, TFLOP/s if known) of the GPU that is named, or found, or of this machine without one."""
    if name is None and gib is None and torch.cuda.is_available():
        name, gib = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
    if name is None and gib is None:
        return "CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, None
    known = [key for key in sorted(GPUS, key=len, reverse=True) if name and key.lower() in name.lower()]
    if not known and gib is None:
        raise UsageError(f"--gpu: expected a name with one of {', '.join(GPUS)}, found {name!r}; add --gpu_gib=NUMBER")
    memory, tflops = GPUS[known[0]] if known else (None, None)
    return name or "some GPU", gib or memory, tflops


def checkpoint_bytes(cfg: Config, dtype: torch.dtype) -> int:
    parts = static_bytes(cfg, dtype, 1, torch.device("cpu"))
    return sum(parts.values()) - parts["gradients"]


def data_size(cfg: Config) -> str:
    if cfg.track != "small":
        return "a few MB"
    count = shards_needed(cfg)
    return f"{count} shards of 200 MB and one for validation: {0.2 * (count + 1):.1f} GB"


def column(cfg: Config, world: int, memory: float, device, dtype, step, work: int, validation) -> dict:
    """One column of the table: the settings that fit and what they need. step: (recompute, slices) -> step_bytes."""
    parts = static_bytes(cfg, dtype, world, device)
    parts["copy of the weights in warm-up"] = parts["weights"]
    travelling = parts.pop("gathers and reductions") + work // world
    allowance, still = 1 + 0.05 * memory + 0.5 * (world > 1), sum(parts.values())
    between = still - (parts["gradients"] if cfg.val_every % cfg.adam_every == 0 else 0)  # half summed up otherwise
    room, (steps, lengths) = (memory - allowance) * GIB, choices(cfg, world)
    (recompute, slices), trains = first_fit(steps, lambda s: still + sum(step(s[0], max(s[1], world))), room)
    length, validates = first_fit(lengths, lambda n: between + validation(n), room)
    kept, more = step(recompute, max(slices, world))
    parts |= {"kept for backward": kept, "more at the worst moment": more,
              "optimizer's work, gathers": travelling, "needed: training": still + kept + more,
              "needed: optimizer": still + travelling, "needed: validation": between + validation(length)}
    return {**{key: f"{value / GIB:.2f}" for key, value in parts.items()}, "allowance": f"{allowance:.2f}",
            "memory": f"{memory:.2f}", "fits": "yes" if trains and validates and still + travelling <= room else "no",
            "--recompute": "on" if recompute else "off", "--slices": slices, "--val_slice": length,
            "slices of a rank, in turn": max(slices, world) // world,
            "tokens of the longest slice": max(cfg.batch_tokens) // max(slices, world)}


def show(cfg: Config, name: str | None, gib: float | None) -> int:
    if os.environ.get("RANK", "0") != "0":
        return 0
    name, gib, tflops = find_gpu(name, gib)
    device = torch.device("cpu" if name == "CPU" else "cuda")
    dtype, compiled = choose_dtype(cfg.dtype, device), choose_compile(cfg.compile, device)
    model = build(cfg, dtype).model
    step = functools.cache(lambda recompute, slices: step_bytes(
        dataclasses.replace(cfg, recompute=recompute, slices=slices), dtype, compiled))
    work = optimizer_bytes(cfg, dtype, compiled)
    validation = functools.cache(lambda n: validation_bytes(cfg, model, n))
    flops = sum(cfg.at("batch_tokens", s) * model.flops_per_token(cfg.stage(s)) for s in range(cfg.train_steps))
    layers = sum(cfg.train_tokens * 2 * getattr(model, name).numel() for name in MATRICES)  # once more, to recompute them
    worlds = [w for w in (1, 2, 4, 8) if max(cfg.slices, w) % min(cfg.slices, w) == 0]
    columns = []
    for world in worlds:
        memory = gib / (world if name == "CPU" else 1)  # ranks on a CPU share it
        found = column(cfg, world, memory, device, dtype, step, work, validation)
        all_flops = flops + (layers if found["--recompute"] == "on" else 0)
        columns.append({"GiB per rank, with ranks": world, **found,
                        "minutes of training, estimate":
                        f"{all_flops / world / tflops / UTILIZATION / 6e13:.1f}" if tflops else "-"})
    print(f"plan: track {cfg.track} on {name}, {gib:.1f} GiB, " + (f"{tflops:g} TFLOP/s in bf16, " if tflops else "") +
          f"{str(dtype)[6:]}, {'torch.compile' if compiled else 'eager'}; not yet checked against a GPU\n")
    for key in columns[0]:
        print(f"{key:36}" + "".join(f"{c[key]:>10}" for c in columns))
    print(f"\ntokens: {cfg.train_tokens:,} in training, {cfg.val_tokens:,} in each validation; data: {data_size(cfg)}; "
          f"a checkpoint: {checkpoint_bytes(cfg, dtype) / 1e9:.2f} GB")
    print(f"Memory is counted from shapes; the allowance for context, libraries and fragmentation is assumed. Minutes assume "
          f"{UTILIZATION:.0%} of the peak{'' if tflops else ' of a GPU that is named'}, without compiling and validation.")
    if any(c["--recompute"] == "on" for c in columns) and not cfg.recompute:
        print("--recompute=on: the same training with each layer computed twice.")
    if any(c["--slices"] != cfg.slices for c in columns):
        print(f"More than {cfg.slices} slices: as many tokens per step in shorter sequences, so more documents are cut at an "
              "end: not the same run, number for number.")
    if any(c["--val_slice"] != cfg.val_slice for c in columns):
        print(f"Less than {cfg.val_slice} tokens in a validation sequence: more contexts are cut, so the loss is a little higher "
              "and does not compare.")
    if any(c["fits"] == "no" for c in columns):
        print(f"Where it does not fit: slices shorter than shown would cut documents of {max(cfg.max_doc_len)} tokens too often; "
              "take a GPU with more memory, more GPUs, or a smaller model.")
    return 0
