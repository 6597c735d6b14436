"""Tiny configurations with all roles of track small, tiny shards, and runs on them."""
from pathlib import Path

import numpy as np
import torch

from data.shards import write_shard
from data.loader import Docs
from engine.ranks import Runtime
from engine.kernels import Kernels
from train_gpt import GPT, MATRICES, TABLES, Config, Context, Run

SMALL = dict(  # eleven layers as in track small, each with its role
    vocab_size=61, bos_id=60, model_dim=32, head_dim=8, mlp_ratio=2, bigram_rows=97, slices=2,
    batch_tokens=(64, 96, 128), max_doc_len=(12, 24), window_short=(3, 4, 5, 6), window_long=(6, 9, 12, 13),
    window_final=20, val_tokens=64, val_slice=32, train_steps=14, extension_steps=2, momentum_warmup=4,
    momentum_cooldown=4, dtype="float32", compile="off", attention="blocked")
BARE = dict(  # every technique off
    SMALL, num_layers=4, long_layers=(1, 3), no_attn_layers=(), paired_layers=(), late_attn_layers=(), cache_layer=1,
    backout=False, skip=(), key_offset=False, yarn=False, softcap=(), value_embed_layers=(), bigram_rows=0, smear=False,
    attn_gate_layers=(), xsa_layers=(), inject_x0=False, resid_init=1.0, mtp_weights=(1.0,), untie_stage=0)


def config(base: dict = SMALL, **changes) -> Config:
    return Config.for_track("small", **{**base, **changes})


def docs_of(lengths, capacity: int = 0) -> Docs:
    """Documents of these lengths, as the loader describes them."""
    starts = np.cumsum([0, *lengths[:-1]])
    T = sum(lengths)
    padded = torch.full((max(len(lengths) + 1, capacity),), T, dtype=torch.int32)
    padded[: len(lengths)] = torch.from_numpy(starts)
    ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    return Docs(padded, ids, max(lengths))


def tokens_of(cfg, n: int, seed: int = 4) -> torch.Tensor:
    return torch.randint(0, cfg.vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def build(cfg: Config, dtype=torch.float32, perturb: bool = True, backend: str = "masked", kernels=None) -> GPT:
    """A model; perturbed, so that no part is hidden by a zero. kernels: plain ones if None."""
    model = GPT(cfg, kernels or Kernels.plain(attention=backend))
    model.init_weights(torch.float32)
    if perturb:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_((0.5 if p.ndim < 3 else 0.1) * torch.randn(p.shape, generator=generator))
    for name, p in model.named_parameters():
        if name in MATRICES + TABLES:
            p.data = p.data.to(dtype)
    return model


def context(model, docs, stage=0, tied=False, final=False) -> Context:
    """The context of a stage, tied or not whatever the schedule says."""
    return model.context(docs, model.cfg.stage_starts[stage], final)._replace(tied=tied)


def make_run(folder: Path, base: dict = SMALL, **changes) -> Run:
    """A run on shards of random documents in folder, on this process alone."""
    cfg = config(base, train_files=str(folder / "train_*.bin"), val_files=str(folder / "val_*.bin"), **changes)
    if not (folder / "val_000.bin").exists():
        rng = np.random.default_rng(0)
        for name, documents in (("train_000.bin", 800), ("val_000.bin", 20)):
            parts = [np.r_[60, rng.integers(0, 60, rng.integers(1, 30))] for _ in range(documents)]
            write_shard(folder / name, np.concatenate(parts).astype(np.uint16))
    return Run(cfg, Runtime())
