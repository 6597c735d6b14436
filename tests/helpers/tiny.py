"""Tiny models and runs with all roles of track small, for tests that look inside."""
from pathlib import Path

import numpy as np
import torch

from data.loader import Docs
from engine.kernels import Kernels
from engine.ranks import Runtime
from tests.helpers.runs import SETTINGS, make_shards
from train_gpt import GPT, MATRICES, TABLES, Config, Context, Run

SMALL = {**SETTINGS, **dict(  # the roles that the layers of track small have, in six
    track="small", recipe="base", num_layers=6, head_dim=8, mlp_ratio=2, long_layers=(1, 5),
    no_attn_layers=(2,), paired_layers=(0, 4), late_attn_layers=(4, 5), cache_layer=3, skip=(1, 2),
    value_embed_layers=(0, 4, 5), attn_gate_layers=(1, 5), xsa_layers=(1, 3), bigram_rows=97,
    bos_id=256, vocab_size=257, train_files="data/shakespeare/shakespeare_train_*.bin",
    val_files="data/shakespeare/shakespeare_val_*.bin", slices=2, batch_tokens=(64, 96, 128),
    max_doc_len=(12, 24), window_short=(3, 4, 5, 6), window_long=(6, 9, 12, 13), window_final=20,
    val_tokens=64, val_slice=32, train_steps=14, adam_every=2, momentum_warmup=4, momentum_cooldown=4,
    dtype="float32", products="float32", compile="off", attention="blocked")}
THREE_LAYERS = {**SMALL, **dict(  # the same roles in half as many layers, which take half the time
    num_layers=3, long_layers=(1,), paired_layers=(0,), no_attn_layers=(), late_attn_layers=(2,),
    cache_layer=1, skip=(0, 2), value_embed_layers=(1,), attn_gate_layers=(1,), xsa_layers=(1,))}
BARE = {**SMALL, **dict(  # every technique off
    num_layers=4, long_layers=(1, 3), no_attn_layers=(), paired_layers=(), late_attn_layers=(),
    cache_layer=1, backout=False, skip=(), key_offset=False, yarn=False, softcap=(), value_embed_layers=(),
    bigram_rows=0, smear=False, attn_gate_layers=(), xsa_layers=(), inject_x0=False, resid_init=1.0,
    mtp_weights=(1.0,), untie_stage=0)}


def config(base: dict = SMALL, **changes) -> Config:
    """Return these settings with some changed; {} is track small itself."""
    settings = {**base, **changes}
    return Config.for_track(settings.pop("track", "small"), **settings)


def docs_of(lengths, capacity: int = 0) -> Docs:
    """Return documents of these lengths, as the loader describes them."""
    T = sum(lengths)
    padded = torch.full((max(len(lengths) + 1, capacity),), T, dtype=torch.int32)
    padded[: len(lengths)] = torch.from_numpy(np.cumsum([0, *lengths[:-1]]))
    ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    return Docs(padded, ids, max(lengths))


def build(cfg: Config, dtype=torch.float32, perturb: bool = True, backend: str = "masked",
          kernels: Kernels | None = None) -> GPT:
    """Return a model; perturbed, so that no part is hidden by a zero. kernels: plain ones if None."""
    model = GPT(cfg, kernels or Kernels.plain(attention=backend))
    model.init_weights(torch.float32)
    if perturb:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_((0.5 if p.ndim < 3 else 0.1) * torch.randn(p.shape, generator=generator))
    for name, p in model.named_parameters():
        if name in MATRICES + TABLES:
            p.data = p.data.to(dtype)
    return model


def context(model, docs, stage=0, tied=False, final=False) -> Context:
    """Return the context of a stage, tied or not whatever the schedule says, with n-grams at random."""
    ngrams = None
    if model.cfg.ngram_rows:
        shape = len(docs.ids), model.cfg.head_dim
        ngrams = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found = model.context(docs, model.cfg.stage_starts[stage], final, ngrams)
    return found._replace(table=model.table(tied))


def make_run(folder: Path, base: dict = SMALL, **changes) -> Run:
    """Return a run on shards in folder, on this process alone."""
    if not (folder / "data").exists():
        make_shards(folder)
    settings = {**base, **changes}
    for name in ("train_files", "val_files"):
        settings[name] = str(folder / settings[name])
    return Run(config(settings), Runtime())
