"""Train a GPT-2-class model to a target validation loss as fast as possible: the NanoGPT speedrun.

    python train_gpt.py                                        one process: track small on a GPU, shakespeare on a CPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py      eight GPUs, FineWeb, target 3.28
    python train_gpt.py --help                                 every setting, with its unit and meaning

A run counts by its `train_time`: training only, after an untimed warm-up, with the clock stopped during validation.
Every world size that divides `slices` trains the same model: a step is always so many packed sequences, shared out over
the ranks.

Shapes: T tokens of one packed sequence, D model width, H heads, d head width, V vocabulary (padded), L layers.
Reading order: Config, model, loss, schedules, optimizer table, the run (train, evaluate, save), main.
Beside it: muon.py and adam.py (optimizers), kernels.py (attention, loss), data/loader.py (batches), runtime.py (ranks, log).
"""
import argparse
import dataclasses
import functools
import math
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# Growing segments instead of fixed blocks: stages change the sequence length, which would fragment the GPU's memory.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.errors import RunError, UsageError
from data.loader import Batch, Docs, Loader, Validation, make_batch, to_device
from data.shards import document_starts
from engine.adam import Adam
from engine.attention import BACKENDS, choose_backend, masked_attention, paired_docs
from engine.checkpoint import read_checkpoint, write_checkpoint
from engine.endings import Stopped, StopSignal, leave, report
from engine.head_loss import HEAD_PIECE, HeadLoss, choose_fp8, softcap
from engine.kernels import choose_compile, choose_dtype, choose_ns_dtype, keep_compiled
from engine.log import Log, Startup, log_header, say_fallbacks
from engine.products import OneDnnLinear, choose_onednn, choose_symmetric
from engine.ranks import Runtime
from engine.settings import parse_settings
from muon import Muon

# ---------------------------------------------------------------------------------------------------------------------
# Config


def setting(default, meaning: str):
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Config:
    """All settings of a run. Tuples indexed by stage repeat their last entry for later stages."""

    track: str = setting("small", "preset that the other settings start from: small or shakespeare")
    target_loss: float = setting(3.28, "validation loss in nats per token that the run tries to reach")
    seed: int = setting(0, "seed of the initial weights; the order of the data does not depend on it")
    # Data
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "training shards, below the folder DATA_PATH")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "validation shards, below the folder DATA_PATH")
    max_epochs: int = setting(1, "passes over the training shards allowed before the data counts as used up")
    bos_id: int = setting(50256, "token that starts every document")
    vocab_size: int = setting(50257, "number of token ids in the data")
    val_tokens: int = setting(10_485_760, "tokens of the validation shards that are evaluated, from the first on")
    val_slice: int = setting(262_144, "tokens of one validation sequence; context is cut where one starts")
    val_every: int = setting(250, "steps between validations; there is always one at step 0 and one at the end")
    # Schedule
    train_steps: int = setting(1480, "optimizer steps, extension included")
    extension_steps: int = setting(16, "last steps, at the final learning rate and with one more window stage")
    stages: int = setting(3, "equal parts of the schedule before the extension")
    batch_tokens: tuple[int, ...] = setting((131_072, 262_144, 393_216), "tokens per step over all ranks, by stage")
    slices: int = setting(8, "packed sequences per step, shared out over the ranks; must be a multiple of their number")
    max_doc_len: tuple[int, ...] = setting((896, 2048), "tokens kept of a document, by stage")
    split_docs: int = setting(0, "for few long documents: cut them into pieces of this many tokens, shuffled; 0: never")
    window_short: tuple[int, ...] = setting((128, 384, 640, 768), "previous tokens seen by short layers, by stage")
    window_long: tuple[int, ...] = setting((384, 896, 1408, 1664), "previous tokens seen by long layers, by stage")
    window_final: int = setting(2560, "previous tokens seen by long layers in the final validation")
    lr_mul: tuple[float, ...] = setting((1.0, 1.52, 1.73), "factor of all learning rates, by stage")
    warmup_steps: int = setting(0, "steps over which the learning rates rise from 0")
    cooldown_frac: float = setting(0.6, "part of the schedule over which the learning rates fall")
    lr_floor: float = setting(0.15, "factor of all learning rates at the end of the schedule")
    mtp_weights: tuple[float, ...] = setting((1.0, 0.5, 0.25), "loss weights of the next, second next, ... token; "
                                             "every stage fades out the last one; (1,) predicts the next only")
    untie_stage: int = setting(2, "stage at which embedding and head part; 0 never tied, -1 always tied")
    # Model
    num_layers: int = setting(11, "layers L")
    model_dim: int = setting(768, "width D of the residual stream")
    head_dim: int = setting(128, "width d of one head; D/d heads")
    mlp_ratio: int = setting(4, "hidden width of the MLP in units of D")
    long_layers: tuple[int, ...] = setting((3, 10), "layers with the long window")
    no_attn_layers: tuple[int, ...] = setting((6,), "layers without attention")
    paired_layers: tuple[int, ...] = setting((0, 2, 5, 9), "layers whose heads attend in adjacent pairs")
    late_attn_layers: tuple[int, ...] = setting((8, 9, 10), "layers whose attention reads the cached stream")
    cache_layer: int = setting(7, "layer whose output is cached for late attention and backout")
    backout: bool = setting(True, "subtract a learned part of the cached stream before the head")
    skip: tuple[int, ...] = setting((3, 6), "from and to: the output of one layer is added, gated, in a later one")
    key_offset: bool = setting(True, "long layers: second half of each key comes from the previous token")
    rope_base: float = setting(1024.0, "slowest rotary wavelength is 2 pi times this many tokens")
    rope_fraction: float = setting(0.5, "part of each head that rotates")
    yarn: bool = setting(True, "rescale rotary frequencies and attention when the long window grows")
    attn_scale: float = setting(0.1, "softmax scale of the normalized queries and keys at stage 0")
    softcap: tuple[float, ...] = setting((23.0, 5.0, 7.5), "logits A sigmoid((x + B) / C) as A,B,C; empty: none")
    value_embed_layers: tuple[int, ...] = setting((1, 2, 8, 9, 10), "layers whose values get a gated token embedding")
    bigram_rows: int = setting(377_280, "rows of the hashed bigram embedding; 0: none")
    bigram_signs: bool = setting(True, "decorrelate colliding bigrams by random signs")
    smear: bool = setting(True, "mix the previous token's embedding into each embedding")
    attn_gate_layers: tuple[int, ...] = setting((3, 10), "layers with a sigmoid gate on each head's output")
    xsa_layers: tuple[int, ...] = setting((1, 3, 4, 7), "layers that remove each token's own value from its output")
    inject_x0: bool = setting(True, "add the first embedding back in every layer")
    resid_init: float = setting(1.1, "initial factor of the residual stream per layer")
    head_std: float = setting(0.005, "standard deviation of the initial head and embedding")
    # Optimizer
    optimizer: str = setting("muon", "optimizer of the hidden matrices: muon, or adamw for everything")
    muon_lr: float = setting(0.023, "Muon learning rate: spectral norm of an update of a square matrix")
    muon_wd: float = setting(1.2, "Muon weight decay, multiplied by lr squared")
    mlp_out_lr_mul: float = setting(4.0, "factor of the Muon learning rate for the zero-initialized MLP outputs")
    momentum: tuple[float, ...] = setting((0.85, 0.95), "Muon momentum: at both ends, in between")
    momentum_warmup: int = setting(300, "steps over which the momentum rises")
    momentum_cooldown: int = setting(50, "last steps over which the momentum falls")
    normuon_beta2: float = setting(0.9, "NorMuon: memory of the variance per neuron; 0: plain Muon")
    coefficients: str = setting("polar", "Newton-Schulz coefficients: polar, quintic or jordan")
    adam_lr: float = setting(0.008, "Adam learning rate, before the factor of each label")
    adam_wd: float = setting(0.005, "Adam weight decay, multiplied by lr squared and the factor of each label")
    adam_eps: float = setting(5e-15, "Adam epsilon; tiny, because the loss is a mean over a sequence of 16384 tokens and "
                                     "more, and a token's own row of a table sees its share only")
    adam_every: int = setting(2, "steps over which Adam's gradients are summed up before it moves")
    table_lr_mul: float = setting(75.0, "Adam learning rate factor of the value and bigram embeddings")
    cautious: bool = setting(True, "decay a weight only where the update shrinks it too")
    adamw_lr: float = setting(0.001, "--optimizer=adamw: learning rate of the hidden matrices")
    adamw_wd: float = setting(0.1, "--optimizer=adamw: decoupled weight decay of the hidden matrices")
    ema_frac: float = setting(0.0, "part of the schedule that the average of the weights remembers; 0: no average")
    ema_blend: float = setting(0.7, "part of that average in the final weights")
    # Hardware
    attention: str = setting("auto", "attention backend: auto, varlen, flex, blocked or masked")
    dtype: str = setting("auto", "type of weights and activations: auto (bfloat16 on a GPU), bfloat16 or float32")
    fp8_head: str = setting("auto", "head in FP8: auto (where a self-test passes), on or off; DISABLE_FP8=1 means off")
    compile: str = setting("auto", "torch.compile the model: auto (on a GPU), on or off")
    recompute: bool = setting(False, "compute each layer again in the backward pass: a quarter more time, far less memory")
    # Run
    log_dir: str = setting("logs", "folder of the logs")
    stop_at_target: bool = setting(False, "end at the first validation at or below the target")
    save_every: int = setting(0, "steps between checkpoints in log_dir; 0: none")
    save_final: bool = setting(False, "write a checkpoint at the end")
    wandb: str = setting("", "Weights & Biases project to mirror the run to; empty: none")

    @staticmethod
    def for_track(name: str, **changes) -> "Config":
        """The preset of a track with some settings changed."""
        if name not in TRACKS:
            raise UsageError(f"--track: expected one of {', '.join(TRACKS)}, found {name!r}; choose one")
        return Config(**{**TRACKS[name], "track": name, **changes})

    def __post_init__(self):
        def check(ok: bool, name: str, expected: str):
            if not ok:
                raise UsageError(f"--{name}: expected {expected}, found {getattr(self, name)!r}; see --help")

        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            finite = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, float)]
            check(all(map(math.isfinite, finite)), f.name, "finite numbers")
        for name in ("train_steps", "stages", "slices", "num_layers", "model_dim", "head_dim", "mlp_ratio", "val_every",
                     "val_tokens", "val_slice", "adam_every", "max_epochs", "vocab_size", "window_final",
                     "rope_base", "attn_scale"):
            check(getattr(self, name) > 0, name, "a positive number")
        for name in ("batch_tokens", "max_doc_len", "window_short", "window_long", "lr_mul", "mtp_weights"):
            check(len(getattr(self, name)) > 0 and min(getattr(self, name)) > 0, name, "one or more positive numbers")
        for name in ("extension_steps", "warmup_steps", "momentum_warmup", "momentum_cooldown", "save_every",
                     "bigram_rows", "split_docs", "adam_wd", "muon_wd", "adamw_wd", "lr_floor", "seed",
                     "adam_lr", "muon_lr", "adamw_lr", "mlp_out_lr_mul", "table_lr_mul", "adam_eps", "head_std",
                     "resid_init"):
            check(getattr(self, name) >= 0, name, "zero or more")
        for name in ("long_layers", "no_attn_layers", "paired_layers", "late_attn_layers", "value_embed_layers",
                     "attn_gate_layers", "xsa_layers", "skip"):
            check(all(0 <= i < self.num_layers for i in getattr(self, name)), name,
                  f"layer indices from 0 to {self.num_layers - 1}")
        check(all(b % self.slices == 0 for b in self.batch_tokens), "batch_tokens", f"multiples of {self.slices} slices")
        check(self.val_tokens % self.val_slice == 0, "val_tokens", f"a multiple of val_slice, {self.val_slice}")
        check(self.seed < 2**63, "seed", "less than 2^63")
        check(self.extension_steps < self.train_steps, "extension_steps", f"fewer than train_steps, {self.train_steps}")
        check(self.model_dim % self.head_dim == 0, "model_dim", f"a multiple of head_dim, {self.head_dim}")
        check(self.head_dim % 4 == 0, "head_dim", "a multiple of 4")
        check(not self.paired_layers or self.num_heads % 2 == 0, "paired_layers",
              f"none, because the number of heads, {self.num_heads}, is odd")
        check(0 <= self.bos_id < self.vocab_size, "bos_id", f"an id below vocab_size, {self.vocab_size}")
        check(self.vocab_size <= 65_536, "vocab_size", "at most 65536, the range of a shard's uint16")
        check(0 <= self.cache_layer < self.num_layers, "cache_layer", f"0 to {self.num_layers - 1}")
        check(not self.late_attn_layers or min(self.late_attn_layers) > self.cache_layer, "late_attn_layers",
              f"layers after cache_layer, {self.cache_layer}")
        check(self.skip == () or (len(self.skip) == 2 and self.skip[0] < self.skip[1]), "skip", "two rising layers")
        check(len(set(self.no_attn_layers)) < self.num_layers, "no_attn_layers", "to leave a layer with attention")
        check(self.softcap == () or (len(self.softcap) == 3 and self.softcap[2] > 0), "softcap",
              "A,B,C with C above 0, or nothing")
        check(len(self.momentum) == 2 and all(0 <= m < 1 for m in self.momentum), "momentum", "two numbers in [0, 1)")
        check(0 <= self.cooldown_frac <= 1, "cooldown_frac", "0 to 1")
        check(0 <= self.rope_fraction <= 1, "rope_fraction", "0 to 1")
        check(0 <= self.ema_frac <= 1, "ema_frac", "0 to 1")
        check(0 <= self.ema_blend <= 1, "ema_blend", "0 to 1")
        check(-1 <= self.untie_stage < self.stages, "untie_stage", f"-1 to {self.stages - 1}")
        check(0 <= self.normuon_beta2 < 1, "normuon_beta2", "0 to 1")
        for name, choices in (("optimizer", ("muon", "adamw")), ("attention", ("auto", *BACKENDS)),
                              ("dtype", ("auto", "bfloat16", "float32")), ("compile", ("auto", "on", "off")),
                              ("fp8_head", ("auto", "on", "off")), ("coefficients", ("polar", "quintic", "jordan"))):
            check(getattr(self, name) in choices, name, "one of " + ", ".join(choices))

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def padded_vocab(self) -> int:
        """Rows of embedding and head: the next multiple of 128, which makes faster matrix products (50304 for GPT-2)."""
        return -(-self.vocab_size // 128) * 128

    @functools.cached_property
    def stage_starts(self) -> tuple[int, ...]:
        """First step of each stage, then of the extension. Stages begin where Adam does, so that no gradient straddles."""
        scheduled = self.train_steps - self.extension_steps
        even = [round(scheduled * k / self.stages / self.adam_every) * self.adam_every for k in range(self.stages)]
        return (*(min(start, scheduled) for start in even), scheduled)

    def stage(self, step: int) -> int:
        return sum(step >= start for start in self.stage_starts) - 1

    def at(self, name: str, step: int):
        """Value of a setting that is given by stage."""
        values = getattr(self, name)
        return values[min(self.stage(step), len(values) - 1)]

    def tied(self, step: int) -> bool:
        return self.untie_stage < 0 or self.stage(step) < self.untie_stage

    @property
    def train_tokens(self) -> int:
        return sum(self.at("batch_tokens", step) for step in range(self.train_steps))


TRACKS: dict[str, dict] = {
    "small": {},
    "shakespeare": dict(  # bytes, two CPU cores, a minute; roles as in small, on four narrow layers
        target_loss=1.6, train_files="data/shakespeare/shakespeare_train_*.bin",
        val_files="data/shakespeare/shakespeare_val_*.bin", max_epochs=4, bos_id=256, vocab_size=257,
        val_tokens=262_144, val_slice=8192, val_every=110, train_steps=440, extension_steps=10,
        batch_tokens=(2048,), slices=4, max_doc_len=(1024,), split_docs=513, lr_mul=(1.0,),
        window_short=(32, 64), window_long=(64, 128), window_final=128, num_layers=4, model_dim=128, head_dim=32,
        long_layers=(1, 3), no_attn_layers=(), paired_layers=(0,), late_attn_layers=(), cache_layer=2, skip=(0, 2),
        value_embed_layers=(0, 3), bigram_rows=4096, attn_gate_layers=(1, 3), xsa_layers=(1,), attn_scale=0.4,
        muon_lr=0.04, table_lr_mul=25.0, momentum_warmup=50, momentum_cooldown=20, lr_floor=0.5, ema_frac=0.15,
        adam_every=1, adam_eps=1e-10, adamw_lr=0.0015),
}


def parse_config(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """Command line to (actions, changed settings)."""
    return parse_settings(Config, argv, __doc__)


# ---------------------------------------------------------------------------------------------------------------------
# Model


def norm(x: Tensor) -> Tensor:
    """RMS norm without learned gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel j with channel r + j, for j < r = cos.size(-1); channels from 2 r on stay. x: (T, H, d)."""
    r = cos.size(-1)
    a, b, still = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, still], -1)


def rotary_settings(cfg: Config, stage: int) -> tuple[Tensor, float]:
    """(r,) angular frequencies per token, and the softmax scale. With YaRN (arXiv 2309.00071), each growth of the long
    window stretches those wavelengths that do not fit it often, and sharpens the softmax."""
    r = int(cfg.head_dim * cfg.rope_fraction) // 2
    omega = cfg.rope_base ** -torch.linspace(0, 1, r, dtype=torch.float64)
    scale, windows = cfg.attn_scale, cfg.window_long
    for old, new in zip(windows[:stage], windows[1 : stage + 1] if cfg.yarn else ()):
        if old != new:
            turns = old * omega / (2 * math.pi)
            keep = ((turns - 1) / (32 - 1)).clamp(0, 1)
            omega = omega * (old / new + keep * (1 - old / new))
            scale *= 1 + 0.2 * math.log(new / old)
    return omega, scale


def pair(x: Tensor) -> Tensor:
    """(T, H, d) to (2 T, H/2, d): heads 2h and 2h+1 of a token become two consecutive positions of one head."""
    T, H, d = x.shape
    return x.view(T, H // 2, 2, d).transpose(1, 2).reshape(2 * T, H // 2, d)


def unpair(y: Tensor) -> Tensor:
    T2, H2, d = y.shape
    return y.view(T2 // 2, 2, H2, d).transpose(1, 2).reshape(T2 // 2, 2 * H2, d)


class Context(NamedTuple):
    """What a forward pass needs besides tokens and weights. masks[long][paired], rope[paired]."""
    masks: list
    rope: list
    scale: float
    mtp_weights: Tensor
    tied: bool


class GPT(nn.Module):
    """Hidden matrices live in banks (matrix index first), so that optimizer and communication handle them in one piece.

    A layer: x <- a x + p Attention(norm(x)) + c x0 + e bigram;  x <- a' x + p' MLP(norm(x)), all of a, p, c, e learned.
    """

    def __init__(self, cfg: Config, attend=masked_attention, fp8_head: bool = False, onednn: bool = False):
        super().__init__()
        self.cfg, self.attend, self.fp8_head, self.onednn = cfg, attend, fp8_head, onednn
        self.linear = OneDnnLinear.apply if onednn else F.linear
        L, D, H, V = cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.padded_vocab
        self.attn_layers = [i for i in range(L) if i not in cfg.no_attn_layers]
        A, G = len(self.attn_layers), min(12, D)

        def param(*shape):
            return nn.Parameter(torch.empty(shape))

        # Queries and keys are orthogonalized by pairs of adjacent heads (two heads of a layer are one matrix).
        group = 2 if H % 2 == 0 else 1
        self.attn_qk = param(A * 2 * H // group, group * cfg.head_dim, D)
        self.attn_vo = param(A * 2, D, D)
        self.mlp_in = param(L, cfg.mlp_ratio * D, D)
        self.mlp_out = param(L, D, cfg.mlp_ratio * D)
        self.head, self.embed = param(V, D), param(V, D)
        self.resid_lambdas, self.post_lambdas = param(L, 2), param(L, 2)
        self.attn_lambdas = param(A, 2)  # factors of the value and the output matrix
        if cfg.inject_x0:
            self.x0_lambdas = param(L)
        if cfg.value_embed_layers:
            self.value_embeds = param(len(cfg.value_embed_layers) * V, D)
            self.value_gates = param(len(cfg.value_embed_layers), H, 2 * (G // 2))
        if cfg.bigram_rows:
            self.bigram_embed, self.bigram_lambdas = param(cfg.bigram_rows, D), param(L)
            self.register_buffer("signs", torch.empty(8192, D, dtype=torch.int8))
        if cfg.smear:
            self.smear_gate, self.smear_lambda = param(1, G), param(1)
        if cfg.attn_gate_layers:
            self.attn_gates = param(len(cfg.attn_gate_layers), H, G)
        if cfg.xsa_layers:
            self.xsa_alphas = param(len(cfg.xsa_layers), H)
        if cfg.skip:
            self.skip_gate, self.skip_lambda = param(1, G), param(1)
        if cfg.backout:
            self.backout_lambda = param(1)

    @torch.no_grad()
    def init_weights(self, dtype: torch.dtype):
        """Fill every parameter in place, the same for all ranks and devices; matrices and tables take the given dtype."""
        cfg = self.cfg
        generator = torch.Generator().manual_seed(cfg.seed)
        bound = 0.5 * math.sqrt(3 / cfg.model_dim)
        constants = {"resid_lambdas": math.sqrt(cfg.resid_init), "post_lambdas": 1.0, "bigram_lambdas": 0.05,
                     "skip_lambda": -1.5, "backout_lambda": 0.5}
        for name, p in self.named_parameters():
            w = torch.zeros(p.shape)
            if name in ("attn_qk", "attn_vo", "mlp_in"):
                w.uniform_(-bound, bound, generator=generator)
            elif name == "head":
                w.normal_(0, cfg.head_std, generator=generator)
            elif name == "value_embeds":
                w.normal_(0, 0.01, generator=generator)
            elif name == "attn_lambdas":
                w[:, 0], w[:, 1] = 0.5, 1.0
            else:  # MLP outputs, bigram table and all gates start at zero
                w.fill_(constants.get(name, 0.0))
            p.data = w.to(p.device, dtype if name in MATRICES + TABLES else torch.float32)
        self.embed.copy_(self.head)
        if cfg.bigram_rows:
            self.signs.copy_(torch.randint(0, 2, self.signs.shape, generator=generator) * 2 - 1)

    def trunk(self, tokens: Tensor, ctx: Context) -> Tensor:
        """(T,) tokens to (T, D) normalized final stream."""
        cfg = self.cfg
        x = F.embedding(tokens, self.head if ctx.tied else self.embed)
        if cfg.smear:
            gate = torch.sigmoid(F.linear(x[1:, : self.smear_gate.size(1)], self.smear_gate.type_as(x)))
            x = torch.cat([x[:1], x[1:] + self.smear_lambda.type_as(x) * gate * x[:-1]])
        x = x0 = norm(x)
        resid, post = self.resid_lambdas.unbind(), self.post_lambdas.unbind()
        inject = self.x0_lambdas.unbind() if cfg.inject_x0 else None
        bigram, bigram_lambdas = (self.bigram(tokens), self.bigram_lambdas.unbind()) if cfg.bigram_rows else (None, None)
        if cfg.bigram_rows:
            x = x + bigram_lambdas[0] * bigram
        values = {}
        if cfg.value_embed_layers:
            offsets = torch.arange(len(cfg.value_embed_layers), device=tokens.device)[:, None] * cfg.padded_vocab
            values = dict(zip(cfg.value_embed_layers, F.embedding(tokens + offsets, self.value_embeds)))
        D = cfg.model_dim
        qk = self.attn_qk.view(-1, 2 * D, D).unbind()
        vo = (self.attn_vo.view(-1, 2, D, D) * self.attn_lambdas[..., None, None].type_as(x)).unbind()
        mlp_in, mlp_out = self.mlp_in.unbind(), self.mlp_out.unbind()

        def layer(i: int, x: Tensor, cached: Tensor | None, early: Tensor | None) -> Tensor:
            if i in self.attn_layers:
                j = self.attn_layers.index(i)
                source = cached if i in cfg.late_attn_layers else x
                x = resid[i][0] * x + post[i][0] * self.attention(norm(source), i, qk[j], vo[j], values.get(i), ctx)
                if cfg.inject_x0:
                    x = x + inject[i] * x0
                if cfg.bigram_rows and i > 0:
                    x = x + bigram_lambdas[i] * bigram
            if cfg.skip and i == cfg.skip[1]:
                gate = F.linear(x0[:, : self.skip_gate.size(1)], self.skip_gate.type_as(x), self.skip_lambda.type_as(x))
                x = x + torch.sigmoid(gate) * early
            hidden = F.relu(self.linear(norm(x), mlp_in[i]))
            return resid[i][1] * x + post[i][1] * self.linear(hidden * hidden, mlp_out[i])

        cached, early, recompute = None, None, cfg.recompute and self.training
        for i in range(cfg.num_layers):
            args = i, x, cached, early
            x = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
            cached = x if i == cfg.cache_layer else cached
            early = x if i in cfg.skip[:1] else early
        if cfg.backout:
            x = x - self.backout_lambda.type_as(x) * cached
        return norm(x)

    def bigram(self, tokens: Tensor) -> Tensor:
        """(T, D) embedding of each token and the one before it, hashed; colliding bigrams differ in their signs."""
        rows = self.cfg.bigram_rows
        now = tokens.int()
        before = F.pad(now[:-1], (1, 0))
        index = torch.remainder((36313 * now) ^ (27191 * before), max(rows - 1, 1))  # int32 products wrap around
        index = torch.where(torch.arange(len(now), device=now.device) == 0, rows - 1, index)
        e = F.embedding(index, self.bigram_embed)
        return e * F.embedding((now ^ before) % 8192, self.signs).type_as(e) if self.cfg.bigram_signs else e

    def attention(self, h: Tensor, i: int, qk: Tensor, vo: Tensor, value_embed: Tensor | None, ctx: Context) -> Tensor:
        """Attention of layer i. h: (T, D) normalized, qk: (2D, D), vo: (2, D, D), value_embed: (T, D)."""
        cfg, (T, D), H, d = self.cfg, h.shape, self.cfg.num_heads, self.cfg.head_dim
        long, paired = i in cfg.long_layers, i in cfg.paired_layers
        q, k = norm(self.linear(h, qk).view(T, 2, H, d)).unbind(1)
        v = self.linear(h, vo[0]).view(T, H, d)
        if value_embed is not None:
            gates = self.value_gates[cfg.value_embed_layers.index(i)]
            half = gates.size(1) // 2
            gate = 2 * torch.sigmoid(F.linear(torch.cat([h[:, :half], value_embed[:, :half]], 1), gates.type_as(h)))
            v = v + gate[..., None] * value_embed.view(T, H, d)
        q, k = rotary(q, *ctx.rope[paired]), rotary(k, *ctx.rope[paired])
        if cfg.key_offset and long:
            k = torch.cat([k[..., : d // 2], torch.cat([k[:1, :, d // 2 :], k[:-1, :, d // 2 :]])], -1)
        mask = ctx.masks[long][paired]
        if paired:
            y = unpair(self.attend(pair(q), pair(k), pair(v), mask, ctx.scale))
        else:
            y = self.attend(q, k, v, mask, ctx.scale)
        if i in cfg.xsa_layers:
            alpha = torch.tanh(self.xsa_alphas[cfg.xsa_layers.index(i)]).type_as(y)[:, None]
            y = y - alpha * v * ((y * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True).clamp(min=1e-8))
        if i in cfg.attn_gate_layers:
            gates = self.attn_gates[cfg.attn_gate_layers.index(i)]
            y = y * torch.sigmoid(F.linear(h[:, : gates.size(1)], gates.type_as(h)))[..., None]
        return self.linear(y.reshape(T, D), vo[1])

    def logits(self, x: Tensor) -> Tensor:
        return softcap(self.linear(x, self.head).float(), self.cfg.softcap)

    def forward(self, tokens: Tensor, targets: Tensor, ctx: Context) -> Tensor:
        """Training: the weighted multi-token loss. Evaluation: the sum of the T cross entropies, in fp32."""
        x = self.trunk(tokens, ctx)
        if self.training:
            return HeadLoss.apply(x, self.head, targets, ctx.mtp_weights, self.cfg.softcap, HEAD_PIECE, self.fp8_head,
                                  self.onednn)
        return sum(self.cross_entropy(a, b) for a, b in zip(x.split(HEAD_PIECE), targets.split(HEAD_PIECE)))

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Sum over tokens of the next token's."""
        return F.cross_entropy(self.logits(x), targets, reduction="sum")

    def matmul_params(self) -> int:
        """Weights that multiply every token."""
        return sum(getattr(self, n).numel() for n in MATRICES) + self.head.numel()

    def flops_per_token(self, stage: int) -> int:
        """Training FLOPs: 6 per weight, 12 D per visible key and attention layer, windows taken as full. Paired heads
        have half the heads at twice the places, which is the same."""
        cfg, keys = self.cfg, 0
        for i in self.attn_layers:
            windows = cfg.window_long if i in cfg.long_layers else cfg.window_short
            keys += windows[min(stage, len(windows) - 1)] + 1  # and the token itself
        return 6 * self.matmul_params() + 12 * cfg.model_dim * keys


def make_context(model: GPT, make_mask, ropes: dict, docs: Docs, stage: int, tied: bool, weights: Tensor,
                 final: bool = False) -> Context:
    """Masks and rotary tables of a stage; final: with the window of the final validation. ropes keeps tables for the next
    call."""
    cfg, T, device, dtype = model.cfg, len(docs.ids), docs.ids.device, model.embed.dtype
    if (stage, T) not in ropes:
        omega, scale = rotary_settings(cfg, stage)
        omega = omega.to(device)
        t = torch.arange(T, dtype=torch.float64, device=device)[:, None, None] * omega  # (T, 1, r)
        parity = torch.arange(cfg.num_heads, dtype=torch.float64, device=device)[None, :, None] % 2 * omega
        for other in [key for key in ropes if key[0] != stage]:
            del ropes[other]
        ropes[stage, T] = scale, [[f(a).to(dtype) for f in (torch.cos, torch.sin)] for a in (t, 2 * t + parity)]
    scale, rope = ropes[stage, T]
    windows = [w[min(stage, len(w) - 1)] for w in (cfg.window_short, cfg.window_long)]
    windows[1] = cfg.window_final if final else windows[1]
    used = {(i in cfg.long_layers, i in cfg.paired_layers) for i in model.attn_layers}
    masks = [[make_mask(paired_docs(docs) if paired else docs, windows[long]) if (long, paired) in used else None
              for paired in (False, True)] for long in (False, True)]
    return Context(masks, rope, scale, weights, tied)


def softmax_logits(model: GPT, tokens: Tensor, ctx: Context) -> Tensor:
    """(T, V) log probabilities in fp32."""
    return torch.log_softmax(model.logits(model.trunk(tokens, ctx)), -1)


EMA_EVERY = 4  # steps between two looks at the weights: each is a pass over all of them
MATRICES = ("attn_qk", "attn_vo", "mlp_in", "mlp_out")
TABLES = ("head", "embed", "value_embeds", "bigram_embed")


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the step


def learning_rate(cfg: Config, step: int) -> float:
    """Factor of every learning rate: the stage's, then falling to lr_floor over the last cooldown_frac of the schedule."""
    scheduled = cfg.train_steps - cfg.extension_steps
    start = int(scheduled * (1 - cfg.cooldown_frac))
    t = min(max(step - start, 0) / (scheduled - start), 1.0) if start < scheduled else 0.0
    warmup = min((step + 1) / cfg.warmup_steps, 1.0) if cfg.warmup_steps else 1.0
    return warmup * (cfg.at("lr_mul", step) * (1 - t) + cfg.lr_floor * t)


def muon_momentum(cfg: Config, step: int) -> float:
    """Linear from the first value to the second, and back at the very end."""
    low, high = cfg.momentum
    rise = step / cfg.momentum_warmup if cfg.momentum_warmup else 1.0
    fall = (cfg.train_steps - step) / cfg.momentum_cooldown if cfg.momentum_cooldown else 1.0
    return low + (high - low) * min(rise, fall, 1.0)


def mtp_weights(cfg: Config, step: int) -> tuple[float, ...]:
    """Stage s keeps all but s of cfg.mtp_weights and fades the last of those, never the first, linearly to zero."""
    stage = cfg.stage(step)
    kept = cfg.mtp_weights[: max(len(cfg.mtp_weights) - stage, 1)]
    if len(kept) == 1:
        return kept
    start, end = (*cfg.stage_starts, cfg.train_steps)[stage : stage + 2]
    return (*kept[:-1], kept[-1] * (1 - (step - start) / (end - start)))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers: one table, and Adam (Muon is in muon.py)


class Row(NamedTuple):
    optimizer: str  # "muon": Newton-Schulz work and state shared out over the ranks; "adam": large ones in equal parts
    lr: float
    wd: float  # weight decay at the full learning rate; a step decays by lr wd
    wd_follows_lr: bool = True  # then decay is quadratic in the schedule
    betas: tuple[float, float] = (0.0, 0.0)


def optimizer_table(cfg: Config) -> dict[str, Row]:
    """What moves each parameter, by name. Fast-forgetting Adam for tables, slow for scalars and gates."""
    def adam(lr_mul, wd_mul, betas):
        lr = cfg.adam_lr * lr_mul
        return Row("adam", lr, cfg.adam_wd * wd_mul * lr, betas=betas)

    def muon(lr_mul, wd_mul):
        return Row("muon", cfg.muon_lr * lr_mul, cfg.muon_wd * cfg.muon_lr * wd_mul)

    scalar, gate = adam(5, 0, (0.9, 0.99)), adam(1, 1, (0.9, 0.99))
    table = {
        "attn_qk": muon(1, 1), "attn_vo": muon(1, 1),
        "mlp_in": muon(1, 2), "mlp_out": muon(cfg.mlp_out_lr_mul, 1),
        "head": adam(1, 150, (0.5, 0.95)), "embed": adam(1, 150, (0.5, 0.95)),
        "value_embeds": adam(cfg.table_lr_mul, 5, (0.75, 0.95)), "bigram_embed": adam(cfg.table_lr_mul, 5, (0.75, 0.95)),
        "resid_lambdas": adam(5, 0, (0.9, 0.95)), "post_lambdas": adam(1, 0, (0.9, 0.95)),
        "attn_lambdas": scalar, "x0_lambdas": scalar, "bigram_lambdas": scalar, "smear_lambda": scalar,
        "skip_lambda": scalar, "backout_lambda": scalar, "xsa_alphas": scalar,
        "smear_gate": adam(0.01, 0, (0.9, 0.99)), "value_gates": gate, "attn_gates": gate, "skip_gate": gate,
    }
    if cfg.optimizer == "adamw":
        table.update({name: Row("adam", cfg.adamw_lr, cfg.adamw_wd, False, (0.9, 0.95)) for name in MATRICES})
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The run


MODEL_SETTINGS = ("vocab_size", "num_layers", "model_dim", "head_dim", "mlp_ratio", "no_attn_layers", "value_embed_layers",
                  "bigram_rows", "smear", "attn_gate_layers", "xsa_layers", "skip", "backout", "inject_x0")


class Run:
    """All state of a training run: weights, optimizers, loader position, step, clock, random state. What else the
    schedules need (windows, rotary tables, scales, tying) follows from the step."""

    def __init__(self, cfg: Config, rt: Runtime):
        self.cfg, self.rt, self.startup = cfg, rt, Startup()
        self.startup.mark("imports and ranks")
        self.check_world_size()
        cuda = rt.device.type == "cuda"
        self.dtype, self.compiled = choose_dtype(cfg.dtype, rt.device), choose_compile(cfg.compile, rt.device)
        if self.compiled:
            keep_compiled()
        self.loader = rt.together(Loader, cfg, rt.rank, rt.world, cuda)
        self.validation = rt.together(Validation, cfg, rt.rank, rt.world, cuda)
        self.startup.mark("data")
        self.backend, self.backend_reason = choose_backend(cfg.attention, cfg.head_dim, cfg.attn_scale, rt.device, self.dtype)
        self.make_mask, attend = BACKENDS[self.backend]
        self.fp8, self.fp8_reason = choose_fp8(cfg.fp8_head, rt.device)
        self.onednn, self.onednn_reason = choose_onednn(rt.device, self.dtype, self.compiled)
        self.symmetric, self.symmetric_reason = choose_symmetric(rt.device)
        self.startup.mark("choice of kernels")
        with torch.device(rt.device):
            self.model = GPT(cfg, attend, self.fp8, self.onednn)
        self.model.init_weights(self.dtype)
        self.forward = torch.compile(self.model, dynamic=False, fullgraph=True) if self.compiled else self.model
        if self.compiled:
            self.model.cross_entropy = torch.compile(self.model.cross_entropy, dynamic=False, fullgraph=True)
        self.make_optimizers()
        self.startup.mark("weights and optimizers")
        self.step, self.train_ms, self.reached, self.ema = 0, 0.0, None, None
        self.ropes, self.losses, self.stop, self.resumed_at = {}, deque(), StopSignal(), None

    def check_world_size(self):
        cfg, world = self.cfg, self.rt.world

        def fits(w):
            return cfg.slices % w == 0 or (w % cfg.slices == 0 and all(b % w == 0 and b // w >= 16 for b in cfg.batch_tokens))

        if not fits(world):
            valid = [str(w) for w in range(1, 257) if fits(w)]
            raise UsageError(f"world size: expected one of {', '.join(valid)} for {cfg.slices} slices of "
                             f"{min(cfg.batch_tokens):,} tokens per step, found {world}; change --nproc_per_node")

    def make_optimizers(self):
        cfg, rt = self.cfg, self.rt
        groups = {"muon": [], "adam": []}
        table = optimizer_table(cfg)
        for name, p in self.model.named_parameters():
            row = table[name]
            groups[row.optimizer].append(dict(params=[p], row=row, lr=row.lr, weight_decay=row.wd))
            if row.optimizer == "adam":
                groups["adam"][-1]["betas"] = row.betas
        self.adam = self.muon = None  # after the warm-up: the old state goes before the new one comes
        self.adam = Adam(groups["adam"], cfg.adam_eps, cfg.cautious, rt.rank, rt.world, self.compiled)
        if groups["muon"]:
            self.muon = Muon(groups["muon"], ns_coefficients=cfg.coefficients, cautious=cfg.cautious, flatten=False,
                             normuon_beta2=cfg.normuon_beta2 or None, split_mantissa=self.dtype == torch.bfloat16,
                             ns_dtype=choose_ns_dtype(rt.device), sync_grads=True, compile=self.compiled,
                             symmetric=self.symmetric)

    def context(self, docs: Docs, stage: int, tied: bool, weights: Tensor, final: bool = False) -> Context:
        return make_context(self.model, self.make_mask, self.ropes, docs, stage, tied, weights, final)

    def train_step(self):
        cfg, rt, step = self.cfg, self.rt, self.step
        if step == cfg.stage_starts[max(cfg.untie_stage, 0)] and cfg.untie_stage >= 0:
            self.untie()
        stats = torch.zeros(2, device=rt.device)  # mean loss, any signal to stop
        stats[0] = self.accumulate(self.loader.next(), step) / rt.world
        stats[1] = self.stop.number
        self.update(step)
        rt.sum(stats)
        self.step += 1
        self.average_weights()
        self.read_stats(stats)

    def accumulate(self, batches: list[Batch], step: int) -> Tensor:
        """Add the gradient of the mean loss over batches to .grad; return that loss."""
        cfg, device, total = self.cfg, self.rt.device, 0.0
        pin = device.type == "cuda"  # an unpinned copy would make the host wait for the step before
        weights = torch.tensor(mtp_weights(cfg, step), pin_memory=pin).to(device, non_blocking=True)
        self.model.train()
        for batch in batches:
            inputs, targets, docs = to_device(batch, device)
            loss = self.forward(inputs, targets, self.context(docs, cfg.stage(step), cfg.tied(step), weights)) / len(batches)
            loss.backward()
            total = total + loss.detach()
        return total

    def warm_up(self):
        """Compile all that the clock would see and touch all memory with made-up tokens, once for each stage; then put
        the weights back and start with fresh optimizers. Untimed, and the loader does not move."""
        cfg, rt = self.cfg, self.rt
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for stage, start in enumerate(cfg.stage_starts):
            T = cfg.at("batch_tokens", start) // self.loader.slices
            tokens = np.random.default_rng(rt.rank).integers(0, cfg.vocab_size, T + 1)
            tokens[:: min(cfg.at("max_doc_len", start), T)] = cfg.bos_id
            starts = document_starts(tokens[:-1], cfg.bos_id)
            batch = make_batch(tokens, starts, cfg.at("max_doc_len", start), rt.device.type == "cuda")
            self.accumulate([batch], start)
            self.update(start + cfg.adam_every - 1)
            self.adam.zero_grad()
            rt.synchronize()
            self.startup.mark(f"stage {stage}")
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(before[name])
        self.make_optimizers()
        rt.synchronize()
        self.startup.mark("reset")

    def update(self, step: int):
        cfg, factor = self.cfg, learning_rate(self.cfg, step)
        with_adam = (step + 1) % cfg.adam_every == 0
        for optimizer in filter(None, (self.muon, self.adam)):
            for group in optimizer.param_groups:
                row = group["row"]
                group["lr"], group["weight_decay"] = row.lr * factor, row.wd * (factor if row.wd_follows_lr else 1)
                if row.optimizer == "muon":
                    group["momentum"] = muon_momentum(cfg, step)
        if self.muon is not None:
            self.muon.start()
        if with_adam:
            self.adam.start()
            self.adam.step()
        if self.muon is not None:
            self.muon.step()  # while Adam's new tables are on their way
            self.muon.zero_grad()
        if with_adam:
            self.adam.finish()
            self.adam.zero_grad()

    def untie(self):
        """Embedding and head part: the embedding takes over the shared table and its Adam state."""
        with torch.no_grad():
            self.model.embed.copy_(self.model.head)
            if self.ema:  # what stood in the embedding until now was never used
                self.ema["embed"].copy_(self.ema["head"])
        for key, value in self.adam.state[self.model.head].items():
            self.adam.state[self.model.embed][key] = value.clone() if isinstance(value, Tensor) else value

    @torch.no_grad()
    def average_weights(self):
        """Follow the weights by an exponential average in fp32 over the end of the schedule; after the last step they become a
        blend of both: the average lies lower than the last of the noisy steps, though it lags behind (upstream's track 3)."""
        cfg, left, remembered = self.cfg, self.cfg.train_steps - self.step, self.cfg.ema_frac * self.cfg.train_steps
        if left > 3 * remembered or not cfg.ema_frac:
            self.ema = None  # a run that is resumed with more steps averages their end
            return
        if left % EMA_EVERY:
            return
        weights = dict(self.model.named_parameters())
        if self.ema is None:
            self.ema = {name: p.float().clone() for name, p in weights.items()}
        for name, p in weights.items():
            self.ema[name].lerp_(p.float(), min(EMA_EVERY / remembered, 1))
            if left == 0:
                p.copy_(p.float().lerp(self.ema[name], cfg.ema_blend))

    def read_stats(self, stats: Tensor):
        """Look at losses two steps late on a GPU, so that reading them never makes it wait, and on every rank alike."""
        cuda = self.rt.device.type == "cuda"
        self.losses.append((self.step, torch.empty(2, pin_memory=cuda).copy_(stats, non_blocking=True)))
        if cuda:
            event = torch.cuda.Event()
            event.record()
            self.losses[-1] += (event,)
        self.loss = None
        while len(self.losses) > (2 if cuda else 0):
            step, values, *event = self.losses.popleft()
            for e in event:
                e.synchronize()
            self.loss, stop = values.tolist()
            if not math.isfinite(self.loss):
                raise RunError(f"step {step}: expected a finite training loss, found {self.loss}; lower --muon_lr and "
                               "--adam_lr, or look at the data; earlier checkpoints are intact")
            self.stop_agreed = stop > 0

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross entropy in nats per token over the validation tokens, with the windows of the stage just trained."""
        cfg, rt, before = self.cfg, self.rt, max(self.step - 1, 0)
        self.model.eval()
        total = torch.zeros((), device=rt.device, dtype=torch.float64)
        for batch in self.validation.batches:
            batch = to_device(batch, rt.device)
            ctx = self.context(batch.docs, cfg.stage(before), cfg.tied(before), total, final=self.step == cfg.train_steps)
            total += self.model(batch.inputs, batch.targets, ctx)  # eager but for the head: each window would be a graph
        return rt.sum(total).item() / cfg.val_tokens

    def save(self, path: Path):
        """Write a checkpoint that resumes at any world size; a collective. The final name appears only when all is written."""
        if self.muon is not None:
            self.muon.consolidate_state_dict()
        state = dict(
            config=dataclasses.asdict(self.cfg), step=self.step, train_ms=self.train_ms,
            reached=self.reached, model=self.model.state_dict(), muon=self.muon.state_dict()["state"] if self.muon else None,
            adam=self.adam.full_state(), ema=self.ema, loader=self.loader.state_dict(), rng=torch.get_rng_state())
        self.rt.together(write_checkpoint, path, state if self.rt.rank == 0 else None)

    def load(self, path: str, state: dict):
        differing = [name for name in MODEL_SETTINGS if state["config"][name] != dataclasses.asdict(self.cfg)[name]]
        if differing:
            name = differing[0]
            raise UsageError(f"{path}: expected a checkpoint of this model, found one with {name} {state['config'][name]} "
                             f"instead of {getattr(self.cfg, name)}; leave out --{name}")
        if state["step"] > self.cfg.train_steps:
            raise UsageError(f"--train_steps: expected at least the {state['step']} steps of {path}, found "
                             f"{self.cfg.train_steps}; raise it")
        try:
            self.model.load_state_dict(state["model"])
            if self.muon is not None:
                self.muon.consolidate_state_dict()  # at several ranks nothing else may ask for its groups
                self.muon.load_state_dict({"state": state["muon"], "param_groups": self.muon.state_dict()["param_groups"]})
            self.adam.load_full_state(state["adam"])
            self.loader.load_state_dict(state["loader"])
            weights = self.model.named_parameters() if state["ema"] else ()
            self.ema = {name: state["ema"][name].to(p.device).view_as(p) for name, p in weights} or None
            torch.set_rng_state(state["rng"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise UsageError(f"{path}: expected weights and optimizer states for these settings, found others "
                             f"({' '.join(str(e).split())[:200]}); leave out settings that were not "
                             "changed before, such as --optimizer or --dtype") from None
        self.step, self.train_ms, self.reached = state["step"], state["train_ms"], state["reached"]


# ---------------------------------------------------------------------------------------------------------------------
# Main


def train(run: Run, log: Log):
    """The clock runs from the first step to the last, and stands still during validation and saving."""
    cfg, rt, total = run.cfg, run.rt, run.cfg.train_steps
    folder = Path(cfg.log_dir) / log.run_id
    run.loss, run.stop_agreed, saved = None, False, run.step
    tokens = sum(cfg.at("batch_tokens", step) for step in range(run.step))

    def pause():
        rt.synchronize()
        run.train_ms += 1000 * (time.perf_counter() - started)

    started = time.perf_counter()
    while True:
        last = run.step == total
        boundary = run.step % cfg.adam_every == 0  # no gradient is half summed up
        if (last or run.step % cfg.val_every == 0) and not (run.resumed_at == run.step and not last):
            pause()
            loss = run.evaluate()
            run.startup.end("validation", log)
            log.validation(run.step, total, run.train_ms, loss)
            if not math.isfinite(loss):
                raise RunError(f"step {run.step}: expected a finite validation loss, found {loss}; lower the learning rates")
            if run.reached is None and loss <= cfg.target_loss:
                run.reached = (run.step, run.train_ms)
            last = last or (cfg.stop_at_target and run.reached is not None)
            started = time.perf_counter()
        stopping = run.stop_agreed and boundary
        due = (cfg.save_every and run.step - saved >= cfg.save_every and boundary) or (last and cfg.save_final)
        if due or stopping:
            pause()
            if stopping:
                run.stop.agreed()
            saved = run.step
            run.save(folder / f"state_step{run.step:06d}.pt")
            log.write(f"checkpoint: {folder / f'state_step{run.step:06d}.pt'}")
            started = time.perf_counter()
        if last or stopping:
            break
        run.train_step()
        ms = run.train_ms + 1000 * (time.perf_counter() - started)
        tokens += cfg.at("batch_tokens", run.step - 1)
        log.train(run.step, total, ms, run.loss, tokens * 1000 / ms)
    if not last:
        raise Stopped(run.stop.number or signal.SIGINT, f"; go on with --resume={folder / f'state_step{run.step:06d}.pt'}")
    if rt.device.type == "cuda":
        mib = [f(rt.device) // 2**20 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)]
        log.write(f"peak memory allocated: {mib[0]} MiB reserved: {mib[1]} MiB")


def main(argv: list[str], stop: StopSignal) -> int | None:
    options, changes = parse_config(argv)
    state = None
    if options.resume:
        state = read_checkpoint(options.resume, Config)
        if changes.get("track", state["config"]["track"]) != state["config"]["track"]:
            raise UsageError(f"--track: expected the checkpoint's track, {state['config']['track']}, found {changes['track']}; "
                             "leave it out")
        changes = {**state["config"], **changes}
    track = changes.pop("track", "small" if torch.cuda.is_available() or options.gpu or options.gpu_gib else "shakespeare")
    cfg = Config.for_track(track, **changes)
    if options.doctor or options.plan:
        from tools import doctor, plan  # noqa: E401  they import this file
        return plan.show(cfg, options.gpu, options.gpu_gib) if options.plan else doctor.examine(cfg)
    rt = Runtime()
    if rt.world > cfg.slices:
        rt.print0(f"note: {rt.world} ranks share {cfg.slices} sequences per step, so each one is cut to a part: other training "
                  "than at fewer ranks", file=sys.stderr)
    run = Run(cfg, rt)
    run.stop = stop
    if options.check:
        from tools import doctor
        return doctor.check_model(run)
    log = rt.together(Log, cfg, rt)
    with log:
        log_header(run, log, f"{options.resume} at step {state['step']}" if state else "")
        run.startup.mark("log")
        say_fallbacks(run)
        run.warm_up()
        if state:
            run.load(options.resume, state)
            run.resumed_at = run.step
        stop.can_save = cfg.save_every > 0 or cfg.save_final
        train(run, log)
    rt.print0(f"target: validation loss {cfg.target_loss} (track {cfg.track})")
    rt.print0("reached: no" if run.reached is None else
              f"reached: yes, at step {run.reached[0]} after {run.reached[1] / 1000:.1f} s of training")
    rt.print0(f"log: {log.path}")


if __name__ == "__main__":
    leave(report(main, sys.argv[1:]))
