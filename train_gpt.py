"""Train a GPT-2-class model to a target validation loss as fast as possible: the NanoGPT speedrun.

    torchrun --standalone --nproc_per_node=8 train_gpt.py   eight GPUs, FineWeb, target 3.28
    python train_gpt.py                                     one GPU; without any, track shakespeare
    python train_gpt.py --help                              every setting, with its unit and meaning

A run counts by its `train_time`: training only, after an untimed warm-up, with the clock stopped during
validation. Every world size that divides `slices` trains the same model: a step is always so many packed
sequences, shared out over the ranks.

Shapes: T tokens of one packed sequence, D model width, H heads, d head width, V vocabulary (padded), L
layers. Reading order: settings, model, schedules, optimizer table, the run (train, evaluate, save), main.
docs/techniques.md has formula, reason, source and measured worth of every technique.
"""
import argparse
import bisect
import dataclasses
import functools
import gc
import math
import os
import signal
import sys
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

if __name__ == "__main__":
    gc.disable()  # until the run is set up: of what imports make hardly anything is garbage

# Growing segments instead of fixed blocks: the lengths of stages would fragment a GPU's memory.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Rounds that an idle OpenMP thread waits in a loop before it sleeps. Without a limit, several threads become
# many times slower as soon as another program uses one of their cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.encoding import encoding_for, longest_prefixes
from data.errors import RunError, UsageError
from data.loader import Batch, Docs, Loader, Validation, join, make_batch, to_device
from data.shards import document_starts
from engine.adam import Adam
from engine.attention import BACKENDS, PAIRINGS, pair, paired_docs, unpair
from engine.checkpoint import read_checkpoint, write_checkpoint
from engine.clock import Clock, Startup
from engine.endings import Stopped, StopSignal, leave, report
from engine.head_loss import HEAD_PIECE, head_loss, softcap, summed_cross_entropy
from engine.head_mixing import mix_heads, mixing_mask
from engine.host_table import HostTable, row_bytes
from engine.kernels import Kernels
from engine.log import Log
from engine.ranks import Runtime
from engine.sampled_softmax import Sample, draw_sample
from engine.sampling import next_log_probs, sample_text
from engine.settings import (
    ALL_POSITIVE, POSITIVE, SEED, ZERO_OR_MORE, Rule, between, check_rules, one_of, parse_settings, require,
    setting, show_value)
from engine.token_factors import (
    CONNECTIONS, HIDDEN, SCALE, connection_starts, gate_outputs, gate_slots, gate_starts, small_network,
    weighted_sum)
from muon import Muon, gram_pays, newton_schulz_flops

# ------------------------------------------------------------------------------------------------------------
# Settings

FRACTION = between(0, 1)
BELOW_ONE = Rule("0 or more and below 1", lambda x: 0 <= x < 1)
SWITCH = one_of("auto", "on", "off")
MOMENTUM = Rule("two numbers in [0, 1)", lambda xs: len(xs) == 2 and all(0 <= x < 1 for x in xs))
SOFTCAP = Rule("A,B,C with C above 0, or nothing", lambda xs: xs == () or (len(xs) == 3 and xs[2] > 0))
FACTOR_ADAM = Rule("a factor and two betas in [0, 1)",
                   lambda xs: len(xs) == 3 and xs[0] >= 0 and all(0 <= x < 1 for x in xs[1:]))
RISING = Rule("0 and then rising layers, or nothing",
              lambda xs: xs == () or (xs[0] == 0 and all(a < b for a, b in zip(xs, xs[1:]))))
ORDERS = Rule("rising numbers from 2 to 8",
              lambda xs: len(xs) > 0 and 1 < xs[0] and xs[-1] < 9 and list(xs) == sorted(set(xs)))
PART_OF_VOCABULARY = Rule("multiples of 128, 0 among them",
                          lambda xs: len(xs) > 0 and all(x >= 0 and x % 128 == 0 for x in xs))
SKIP = Rule("two rising layers, or nothing", lambda xs: xs == () or (len(xs) == 2 and xs[0] < xs[1]))
LAYER_SETTINGS = ("long_layers", "no_attn_layers", "paired_layers", "late_attn_layers", "value_embed_layers",
                  "attn_gate_layers", "xsa_layers", "skip", "gate_networks")


@dataclass(frozen=True)
class Config:
    """All settings of a run. Tuples indexed by stage repeat their last entry for later stages."""

    track: str = setting(
        "small", "preset that the others start from: small, medium or, without a GPU, shakespeare")
    recipe: str = setting(
        "base", "base; of small record89: as public records since 80; of shakespeare miniature: four layers")
    target_loss: float = setting(3.28, "validation loss in nats per token that the run tries to reach")
    seed: int = setting(0, "seed of the initial weights; the order of the data does not depend on it", SEED)

    # Data
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "training shards below DATA_PATH")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "validation shards below DATA_PATH")
    max_epochs: int = setting(1, "passes over the training shards until the data is used up", POSITIVE)
    bos_id: int = setting(50256, "token that starts every document")
    vocab_size: int = setting(50257, "number of token ids in the data", between(1, 65_536))
    val_tokens: int = setting(10_485_760, "tokens evaluated, the first of the validation shards", POSITIVE)
    val_slice: int = setting(262_144, "tokens of a validation sequence, which sees none before it", POSITIVE)
    val_every: int = setting(250, "steps between validations; there is one at either end, too", POSITIVE)

    # Schedule
    train_steps: int = setting(1480, "optimizer steps, extension included", POSITIVE)
    extension_steps: int = setting(40, "last steps, at the lowest rate and the widest windows", ZERO_OR_MORE)
    stages: int = setting(3, "equal parts of the schedule before the extension", POSITIVE)
    batch_tokens: tuple[int, ...] = setting(
        (131_072, 262_144, 393_216), "tokens per step over all ranks, by stage", ALL_POSITIVE)
    slices: int = setting(8, "packed sequences per step, a multiple of the ranks that share them", POSITIVE)
    max_doc_len: tuple[int, ...] = setting((896, 2048), "tokens kept of a document, by stage", ALL_POSITIVE)
    split_docs: int = setting(0, "cut long documents to so many tokens, and shuffle; 0: never", ZERO_OR_MORE)
    window_short: tuple[int, ...] = setting(
        (128, 384, 640, 768), "previous tokens seen by short layers, by stage", ALL_POSITIVE)
    window_long: tuple[int, ...] = setting(
        (384, 896, 1408, 1664), "previous tokens seen by long layers, by stage", ALL_POSITIVE)
    window_final: int = setting(2560, "previous tokens seen by long layers in the final validation", POSITIVE)
    lr_mul: tuple[float, ...] = setting(
        (1.0, 1.52, 1.73), "factor of all learning rates, by stage", ALL_POSITIVE)
    warmup_steps: int = setting(0, "steps over which the learning rates rise from 0", ZERO_OR_MORE)
    cooldown_frac: float = setting(0.6, "part of the schedule over which the learning rates fall", FRACTION)
    lr_floor: float = setting(0.15, "factor of all learning rates at the end of the schedule", ZERO_OR_MORE)
    mtp_weights: tuple[float, ...] = setting(
        (1.0, 0.5, 0.25), "loss weights of the next, second next, ... token; each stage fades out the last",
        ALL_POSITIVE)
    prefix_weight: float = setting(
        0.0, "loss weight of the longest token that the next one begins with; fades out in the second stage",
        ZERO_OR_MORE)
    head_rows: tuple[int, ...] = setting(
        (0,), "tokens over which the training loss sums its softmax, by stage, half of them drawn; 0: all",
        PART_OF_VOCABULARY)
    untie_stage: int = setting(2, "stage at which embedding and head part; 0 never tied, -1 always tied")
    untie_delay: int = setting(1, "moves of Adam in that stage before they do", ZERO_OR_MORE)

    # Model
    num_layers: int = setting(11, "layers L", between(1, 1000))
    model_dim: int = setting(768, "width D of the residual stream", POSITIVE)
    head_dim: int = setting(128, "width d of one head; D/d heads", POSITIVE)
    mlp_ratio: int = setting(4, "hidden width of the MLP in units of D", POSITIVE)
    long_layers: tuple[int, ...] = setting((3, 10), "layers with the long window")
    no_attn_layers: tuple[int, ...] = setting((6,), "layers without attention")
    paired_layers: tuple[int, ...] = setting((0, 2, 5, 9), "layers whose heads attend in pairs")
    pairing: str = setting(
        "halves", "heads of a pair: halves (h and h + H/2) or neighbours (2h and 2h + 1)", one_of(*PAIRINGS))
    late_attn_layers: tuple[int, ...] = setting((8, 9, 10), "layers whose attention reads the cached stream")
    cache_layer: int = setting(7, "layer whose output is cached for late attention and backout")
    backout: bool = setting(True, "subtract a learned part of the cached stream before the head")
    skip: tuple[int, ...] = setting(
        (3, 6), "from and to: the output of one layer is added, gated, in a later one", SKIP)
    key_offset: bool = setting(True, "long layers: second half of each key comes from the previous token")
    rope_base: float = setting(1024.0, "slowest rotary wavelength is 2 pi times this many tokens", POSITIVE)
    rope_fraction: float = setting(0.5, "part of each head that rotates", FRACTION)
    yarn: bool = setting(True, "rescale rotary frequencies and attention when the long window grows")
    attn_scale: float = setting(0.1, "softmax scale of the normalized queries and keys at stage 0", POSITIVE)
    softcap: tuple[float, ...] = setting(
        (23.0, 5.0, 7.5), "logits A sigmoid((x + B) / C) as A,B,C; empty: none", SOFTCAP)
    value_embed_layers: tuple[int, ...] = setting(
        (1, 2, 8, 9, 10), "layers whose values get a gated token embedding")
    bigram_rows: int = setting(377_280, "rows of the hashed bigram embedding; 0: none", ZERO_OR_MORE)
    bigram_signs: bool = setting(True, "decorrelate colliding bigrams by random signs")
    ngram_rows: int = setting(
        0, "rows of the hashed n-gram embedding, which lie in host memory; 0: none", ZERO_OR_MORE)
    ngram_orders: tuple[int, ...] = setting((2, 3), "each n of its n-grams", ORDERS)
    smear: bool = setting(True, "mix the previous token's embedding into each embedding")
    attn_gate_layers: tuple[int, ...] = setting(
        (0, 1, 2, 3, 4, 5, 7, 8, 9, 10), "layers with a sigmoid gate on each head's output")
    xsa_layers: tuple[int, ...] = setting(
        (1, 3, 4, 7, 8, 10), "layers that remove each token's own value from its output")
    inject_x0: bool = setting(True, "add the first embedding back in every layer")
    mudd: bool = setting(
        False, "mix early streams into the last layer and the head, by each token's weights; no backout")
    gate_networks: tuple[int, ...] = setting(
        (), "layers, 0 first, from which small networks set gates, XSA, x0, bigram and skip for each token",
        RISING)
    mix_window: int = setting(
        0, "tokens over which the last layer's heads share attention, by gate_networks; 0: off", ZERO_OR_MORE)
    mlp_fp8: str = setting("off", "forward products of the MLP in FP8: as fp8_head", SWITCH)
    resid_init: float = setting(1.1, "initial factor of the residual stream per layer", ZERO_OR_MORE)
    head_std: float = setting(0.005, "standard deviation of the initial head and embedding", ZERO_OR_MORE)
    mlp_out_std: float = setting(
        0.0, "initial MLP outputs: standard deviation times sqrt(D), 0.5 in other matrices", ZERO_OR_MORE)

    # Optimizer
    optimizer: str = setting(
        "muon", "optimizer of the hidden matrices: muon, or adamw for everything", one_of("muon", "adamw"))
    muon_lr: float = setting(
        0.023, "Muon learning rate: spectral norm of an update of a square matrix", ZERO_OR_MORE)
    muon_wd: float = setting(1.2, "Muon weight decay, multiplied by lr squared", ZERO_OR_MORE)
    mlp_out_lr_mul: float = setting(4.0, "factor of the Muon learning rate of MLP outputs", ZERO_OR_MORE)
    momentum: tuple[float, ...] = setting((0.85, 0.95), "Muon momentum: at both ends, in between", MOMENTUM)
    momentum_warmup: int = setting(300, "steps over which the momentum rises", ZERO_OR_MORE)
    momentum_cooldown: int = setting(50, "last steps over which the momentum falls", ZERO_OR_MORE)
    normuon_beta2: float = setting(0.9, "NorMuon: memory of a neuron's variance; 0: plain Muon", BELOW_ONE)
    coefficients: str = setting(
        "polar", "Newton-Schulz coefficients: polar, quintic or jordan", one_of("polar", "quintic", "jordan"))
    adam_lr: float = setting(0.008, "Adam learning rate, before the factor of each label", ZERO_OR_MORE)
    adam_wd: float = setting(
        0.005, "Adam weight decay, multiplied by lr squared and the factor of each label", ZERO_OR_MORE)
    adam_eps: float = setting(1e-10, "Adam epsilon, of a loss summed over a sequence", ZERO_OR_MORE)
    adam_every: int = setting(2, "steps over which Adam's gradients are summed up before it moves", POSITIVE)
    table_lr_mul: float = setting(75.0, "Adam rate factor of value and bigram embeddings", ZERO_OR_MORE)
    factor_adam: tuple[float, ...] = setting(
        (1.0, 0.9, 0.95), "Adam of the x0, bigram and XSA factors: factor of the learning rate, betas",
        FACTOR_ADAM)
    cautious: bool = setting(True, "decay a weight only where the update shrinks it too")
    adamw_lr: float = setting(0.001, "--optimizer=adamw: learning rate of the hidden matrices", ZERO_OR_MORE)
    adamw_wd: float = setting(0.1, "--optimizer=adamw: decoupled decay of the hidden matrices", ZERO_OR_MORE)
    adamw_out_lr_mul: float = setting(
        1.0, "--optimizer=adamw: factor of the learning rate of MLP outputs", ZERO_OR_MORE)
    adamw_betas: tuple[float, ...] = setting(
        (0.9, 0.95), "--optimizer=adamw: memories of gradient and square of the hidden matrices", MOMENTUM)
    ema_frac: float = setting(
        0.0, "part of the schedule that the average of the weights remembers; 0: no average", FRACTION)
    ema_blend: float = setting(0.7, "part of that average in the final weights", FRACTION)
    ema_of: str = setting(
        "all", "weights that are averaged: all, or head (head and embedding)", one_of("all", "head"))

    # Hardware
    attention: str = setting(
        "auto", "attention backend: auto, varlen, flex, blocked or masked", one_of("auto", *BACKENDS))
    dtype: str = setting(
        "auto", "type of weights and activations: auto (bfloat16 on a GPU), bfloat16 or float32",
        one_of("auto", "bfloat16", "float32"))
    products: str = setting(
        "auto", "products of fp32 weights on a CPU: auto (bfloat16 in hardware), bfloat16 or float32",
        one_of("auto", "bfloat16", "float32"))
    fp8_head: str = setting(
        "auto", "head in FP8: auto (where a self-test passes), on or off; DISABLE_FP8=1 means off", SWITCH)
    compile: str = setting("auto", "torch.compile the model: auto (on a GPU), on or off", SWITCH)
    recompute: bool = setting(False, "compute layers again in the backward pass: 25 % slower, less memory")
    pack_tokens: int = setting(
        0, "slices of a rank go through the model together up to so many tokens; 0: singly", ZERO_OR_MORE)

    # Run
    log_dir: str = setting("logs", "folder of the logs")
    time_budget: float = setting(
        0.0, "seconds of training for which a warm-up chooses train_steps; 0: as given", ZERO_OR_MORE)
    sample_tokens: int = setting(150, "tokens of generated text at the end; 0: none", ZERO_OR_MORE)
    stop_at_target: bool = setting(False, "end at the first validation at or below the target")
    save_every: int = setting(0, "steps between checkpoints in log_dir; 0: none", ZERO_OR_MORE)
    save_final: bool = setting(False, "write a checkpoint at the end")
    keep: int = setting(0, "checkpoints of this run to keep, the newest ones; 0: all", ZERO_OR_MORE)
    wandb: str = setting("", "Weights & Biases project to mirror the run to; empty: none")

    @staticmethod
    def for_track(track: str | None = None, **changes) -> "Config":
        """Return the preset of a track (None: for this machine) and its recipe with some settings changed."""
        if track is None:
            track = "small" if torch.cuda.is_available() else "shakespeare"
        if track not in TRACKS:
            raise UsageError(f"--track: expected one of {', '.join(TRACKS)}, found {track!r}; choose one")
        recipe = changes.get("recipe", "base")
        known = {"base": {}, **RECIPES.get(track, {})}
        if recipe not in known:
            raise UsageError(f"--recipe: expected one of {', '.join(known)} on track {track}, "
                             f"found {recipe!r}; choose one")
        return Config(**{**TRACKS[track], **known[recipe], "track": track, **changes})

    def __post_init__(self):
        """Check each setting by its own rule, then what two settings ask of each other."""
        check_rules(self)

        def check(name: str, expected: str, holds: bool):
            require(self, name, expected, holds)

        # Data and schedule
        check("bos_id", f"an id below vocab_size, {self.vocab_size}", 0 <= self.bos_id < self.vocab_size)
        check("val_tokens", "a multiple of val_slice, "
                            f"{self.val_slice}", self.val_tokens % self.val_slice == 0)
        even = all(tokens % self.slices == 0 for tokens in self.batch_tokens)
        check("batch_tokens", f"multiples of {self.slices} slices", even)
        fewer = self.extension_steps < self.train_steps
        check("extension_steps", f"fewer than train_steps, {self.train_steps}", fewer)
        part = all(rows < self.vocab_size for rows in self.head_rows)
        check("head_rows", f"fewer than vocab_size, {self.vocab_size}, or 0 for all", part)
        own = not any(self.head_rows) or not self.pack_tokens
        check("head_rows", "0 with pack_tokens, as each slice draws tokens of its own", own)
        check("untie_stage", f"-1 to {self.stages - 1}", -1 <= self.untie_stage < self.stages)

        # Shapes
        check("model_dim", f"a multiple of head_dim, {self.head_dim}", self.model_dim % self.head_dim == 0)
        check("head_dim", "a multiple of 4", self.head_dim % 4 == 0)  # half of it rotates, in planes of two
        odd = f"none, because the number of heads, {self.num_heads}, is odd"
        check("paired_layers", odd, not self.paired_layers or self.num_heads % 2 == 0)

        joined = bool(self.bigram_rows) or not self.ngram_rows
        check("ngram_rows", "0 without bigram_rows, whose factors n-grams share", joined)

        # Roles of layers
        layers = range(self.num_layers)
        for name in LAYER_SETTINGS:
            within = all(i in layers for i in getattr(self, name))
            check(name, f"layer indices from 0 to {self.num_layers - 1}", within)
        check("cache_layer", f"0 to {self.num_layers - 1}", self.cache_layer in layers)
        late = not self.late_attn_layers or min(self.late_attn_layers) > self.cache_layer
        check("late_attn_layers", f"layers after cache_layer, {self.cache_layer}", late)
        some = len(set(self.no_attn_layers)) < self.num_layers
        check("no_attn_layers", "to leave a layer with attention", some)
        last = self.num_layers - 1
        attends = last not in self.no_attn_layers
        whole = attends and self.cache_layer < last
        check("mudd", "off without attention in the last layer, after cache_layer", whole or not self.mudd)
        check("backout", "off with mudd, which begins as it does", not (self.mudd and self.backout))
        alone = self.gate_networks and attends and last not in self.paired_layers
        check("mix_window", "0 without gate_networks or unpaired attention in the last layer",
              bool(alone) or not self.mix_window)

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def padded_vocab(self) -> int:
        """Rows of embedding and head: the next multiple of 128 (50304 for GPT-2), for faster products."""
        return -(-self.vocab_size // 128) * 128

    @functools.cached_property
    def stage_starts(self) -> tuple[int, ...]:
        """First step of each stage, then of the extension. Stages begin where Adam does, so that no summed
        gradient straddles two of them."""
        scheduled = self.train_steps - self.extension_steps
        pairs = scheduled / self.stages / self.adam_every
        even = [round(pairs * k) * self.adam_every for k in range(self.stages)]
        return (*(min(start, scheduled) for start in even), scheduled)

    def stage(self, step: int) -> int:
        return sum(step >= start for start in self.stage_starts) - 1

    def by_stage(self, name: str, stage: int):
        """Return the value of a setting that is given by stage."""
        values = getattr(self, name)
        return values[min(stage, len(values) - 1)]

    def at(self, name: str, step: int):
        """Return the value at a step of a setting that is given by stage."""
        return self.by_stage(name, self.stage(step))

    def tied(self, step: int) -> bool:
        """Return whether embedding and head are one matrix at this step."""
        return step < self.untie_step

    def has_parted(self, step: int) -> bool:
        """Return whether embedding and head have parted in a step before this one."""
        return step > self.untie_step

    @property
    def untie_step(self) -> float:
        """First step with an embedding apart from the head."""
        if self.untie_stage <= 0:
            return math.inf if self.untie_stage < 0 else 0
        return self.stage_starts[self.untie_stage] + self.untie_delay * self.adam_every

    @property
    def graph_starts(self) -> list[int]:
        """First steps of all that torch.compile may see as another graph: stages, and the head by itself."""
        return sorted({step for step in (*self.stage_starts, self.untie_step) if step < self.train_steps})

    @property
    def train_tokens(self) -> int:
        return sum(count * self.at("batch_tokens", step) for step, count in self.steps_by_stage)

    @property
    def steps_by_stage(self) -> list[tuple[int, int]]:
        """First step of each stage and the number of its steps."""
        ends = (*self.stage_starts[1:], self.train_steps)
        return [(start, end - start) for start, end in zip(self.stage_starts, ends)]


TRACKS: dict[str, dict] = {
    "small": {},
    # The size and schedule of public record 18 of track 2, in the model of track small. Nobody has run it.
    "medium": dict(
        target_loss=2.92,
        # Schedule
        train_steps=4740, stages=12, untie_stage=2, cooldown_frac=0.7, lr_floor=0.1,
        batch_tokens=(131_072, 262_144, 393_216, 524_288), lr_mul=(1.0, 1.52, 1.73, 2.0), max_doc_len=(4096,),
        window_short=(128, 384, 640, 768, 896, 1024, 1152, 1280, 1408),
        window_long=(384, 896, 1408, 1664, 1920, 2176, 2432, 2688, 2944), window_final=3456,
        # Model
        num_layers=16, model_dim=1024, long_layers=(0, 4, 11, 15), no_attn_layers=(), paired_layers=(),
        late_attn_layers=(), cache_layer=11, skip=(4, 10), value_embed_layers=(1, 2, 13, 14, 15),
        attn_gate_layers=tuple(range(16)), xsa_layers=(), resid_init=1.05,
        # Optimizer
        muon_lr=0.015, normuon_beta2=0.95, adam_lr=0.004),
    # Bytes, two CPU cores, a few seconds: one plain layer, as more of them gain no time beside the n-grams.
    "shakespeare": dict(
        target_loss=1.6,
        # Data
        train_files="data/shakespeare/shakespeare_train_*.bin",
        val_files="data/shakespeare/shakespeare_val_*.bin",
        max_epochs=4, bos_id=256, vocab_size=257, val_tokens=262_144, val_slice=8192, val_every=14,
        # Schedule
        train_steps=56, extension_steps=4, lr_mul=(1.0,), lr_floor=0.5,
        batch_tokens=(8192,), slices=4, pack_tokens=2048, max_doc_len=(1024,), split_docs=513,
        untie_stage=0, mtp_weights=(1.0,),
        window_short=(32,), window_long=(32,), window_final=32,
        # Model
        num_layers=1, model_dim=96, head_dim=32, long_layers=(0,), no_attn_layers=(), paired_layers=(),
        late_attn_layers=(), cache_layer=0, backout=False, skip=(), key_offset=False, attn_scale=0.4,
        value_embed_layers=(), bigram_rows=4096, ngram_rows=2**20, ngram_orders=(3, 4, 5, 6, 7, 8),
        smear=False, attn_gate_layers=(), xsa_layers=(), inject_x0=False, resid_init=1.0,
        # Optimizer
        muon_lr=0.04, momentum_warmup=15, momentum_cooldown=6, ema_frac=0.2, adam_lr=0.024, adam_every=1,
        adam_eps=512e-10, table_lr_mul=20.0, factor_adam=(5.0, 0.9, 0.99), adamw_lr=0.0015),
}

RECIPES: dict[str, dict[str, dict]] = {  # track -> recipe -> what it changes
    "small": {
        # Public record 89. No GPU has run it here.
        "record89": dict(
            train_steps=1285, extension_steps=15, prefix_weight=0.25, mudd=True, backout=False,
            gate_networks=(0, 4), mix_window=112, attn_gate_layers=(3, 10), xsa_layers=(1, 3, 4, 7),
            mlp_fp8="auto"),
    },
    "shakespeare": {
        # Every role of track small on four narrow layers: where ideas about a model can be tried.
        "miniature": dict(
            # Schedule
            train_steps=192, extension_steps=10, val_every=48, batch_tokens=(2048,),
            window_short=(32, 64), window_long=(64, 128), window_final=128,
            # Model
            num_layers=4, model_dim=128, long_layers=(1, 3), paired_layers=(0,), pairing="neighbours",
            cache_layer=2, backout=True, skip=(0, 2), key_offset=True, value_embed_layers=(0, 3),
            ngram_orders=(3, 4, 5, 6), smear=True, attn_gate_layers=(1, 3), xsa_layers=(1,), inject_x0=True,
            resid_init=1.1,
            # Optimizer
            momentum_warmup=50, momentum_cooldown=20, ema_frac=0.15, adam_lr=0.008, table_lr_mul=25.0),
    },
}

ACTIONS = {  # flags that are no settings, and what argparse wants to know of them
    "resume": dict(metavar="PATH", help="continue from a checkpoint, with its settings; latest: the newest "
                                        "in log_dir"),
    "force_data": dict(action="store_true", help="resume although the training data are other ones"),
    "dry_run": dict(action="store_true", help="say what would run, from settings to data, then end"),
    "check": dict(action="store_true", help="test causality and probabilities of the model, then end"),
}


def parse_config(argv: list[str], about: str = __doc__, actions=ACTIONS) -> tuple[argparse.Namespace, dict]:
    """Parse a command line to (actions, changed settings)."""
    return parse_settings(Config, argv, about, actions)


def configure(argv: list[str]) -> tuple[argparse.Namespace, Config, dict | None]:
    """Return the actions of a command line, its settings, and the checkpoint that it resumes from, if any. A
    checkpoint brings its settings along, and the command line changes them. Raises UsageError."""
    options, changes = parse_config(argv)
    state = None
    if options.resume:
        options.resume = os.path.expanduser(options.resume)  # as parse_value does with settings
        if options.resume == "latest":
            options.resume = latest_checkpoint(changes.get("log_dir", Config.log_dir))
        state = read_checkpoint(options.resume, Config)
        for name in ("track", "recipe"):  # only names by now: their settings come from the checkpoint
            expected, found = state["config"][name], changes.get(name)
            if found not in (None, expected):
                raise UsageError(f"--{name}: expected the checkpoint's {name}, {expected}, found {found}; "
                                 "leave it out")
        changes = {**state["config"], **changes}
    return options, Config.for_track(**changes), state


def show_settings(cfg: Config) -> list[str]:
    """Return every setting as its flag."""
    return [f"--{name}={show_value(value)}" for name, value in dataclasses.asdict(cfg).items()]


def latest_checkpoint(log_dir: str) -> str:
    """Return the newest checkpoint of all runs whose logs lie in this folder."""
    def written(path: Path) -> tuple[int, str]:
        try:
            return path.stat().st_mtime_ns, path.name
        except OSError:  # another run has just removed it
            return 0, path.name

    paths = sorted(Path(log_dir).glob("*/state_step*.pt"), key=written)
    if not paths:
        raise UsageError(f"--resume: expected a checkpoint in {log_dir}/*/, found none; give its path, or "
                         "another --log_dir")
    return str(paths[-1])


# ------------------------------------------------------------------------------------------------------------
# Model

MATRICES = ("attn_qk", "attn_vo", "mlp_in", "mlp_out")  # banks of hidden matrices
TABLES = ("head", "embed", "value_embeds", "bigram_embed")
NETWORKS = ("gate_in", "gate_out", "mudd_in", "mudd_out")  # small ones, whose outputs are factors
GATE_WIDTH = 12  # channels of the stream that a gate looks at
NUM_SIGNS = 8192  # rows of random signs for the bigram embedding


def rotary_settings(cfg: Config, stage: int) -> tuple[Tensor, float]:
    """Return the (r,) angular frequencies per token, and the softmax scale.

    With YaRN (arXiv 2309.00071), each growth of the long window stretches those wavelengths that do not fit
    it often, and sharpens the softmax: what was learned at short range is kept while the range grows.
    """
    r = int(cfg.head_dim * cfg.rope_fraction) // 2
    omega = cfg.rope_base ** -torch.linspace(0, 1, r, dtype=torch.float64)
    scale = cfg.attn_scale
    windows = cfg.window_long[: stage + 1]
    for old, new in zip(windows, windows[1:]):
        if cfg.yarn and old != new:
            turns = old * omega / (2 * math.pi)
            keep = ((turns - 1) / (32 - 1)).clamp(0, 1)
            omega = omega * (old / new + keep * (1 - old / new))
            scale *= 1 + 0.2 * math.log(new / old)
    return omega, scale


class Context(NamedTuple):
    """What a forward pass needs besides tokens and weights. masks[long][paired], rope[paired]: (cos, sin)."""
    masks: list
    rope: list
    scale: float | Tensor  # of the softmax; a tensor is multiplied into the queries instead
    table: Tensor  # (V, D) embedding, or the head while they are one
    mixing: Tensor | None  # mask of the heads' mixing
    prefixes: bool  # whether the loss has a part for prefixes of the targets
    slices: int = 1  # equal parts of the sequence; the first token of each has none before it
    ngrams: Tensor | None = None  # (T, d) embedding of the n-grams, from host memory
    sample: Sample | None = None  # tokens that the training loss sums over; None: all


class LayerWeights(NamedTuple):
    """The weights of one layer, as views of the banks. Layers without attention have none of its weights.

    Learned factors of what attention and the MLP add are in vo and mlp_out. Small networks replace factors by
    those of each token, (T, 1), and set the fields after bigram, (T, H) where not said.
    """
    qk: Tensor | None  # (2D, D)
    vo: Tensor | None  # (2, D, D)
    mlp_in: Tensor  # (4D, D)
    mlp_out: Tensor  # (D, 4D)
    resid: Tensor  # (2,) factors of the stream, before attention and before the MLP
    x0: Tensor | None  # factor of the first embedding
    bigram: Tensor | None  # factor of the bigram embedding
    post: tuple[Tensor, Tensor] | None = None  # (T, 1) factors of what attention and the MLP add
    xsa: Tensor | None = None
    attn_gate: Tensor | None = None
    skip: Tensor | None = None  # (T, 1)
    mix_in: Tensor | None = None  # heads whose attention is read by others
    mix_out: Tensor | None = None  # heads that read by it
    value_gate: Tensor | None = None
    value: Tensor | None = None  # (T, D) added to the values


class Inputs(NamedTuple):
    """What the layers read besides the stream, each (T, D)."""
    x0: Tensor
    bigram: Tensor | None
    values: dict[int, Tensor]  # layer -> value embedding


class GPT(nn.Module):
    """A decoder whose hidden matrices live in banks (matrix index first), so that optimizer and communication
    handle them in one piece.

    A layer: x <- a x + p Attention(norm(x)) + c x0 + e bigram;  x <- a' x + p' MLP(norm(x)), all of a, p, c,
    e learned. QK norm, squared ReLU, no biases, no learned norm gains.
    """

    def __init__(self, cfg: Config, kernels: Kernels):
        super().__init__()
        self.cfg, self.kernels = cfg, kernels
        self.linear = kernels.linear
        compiled_head = kernels.compile(summed_cross_entropy)
        self.cross_entropy = compiled_head if kernels.own_kernels else summed_cross_entropy
        self.rope_tables = {}  # (stage, T) -> (scale, rope): a cache
        self.ngrams: HostTable | None = None  # set by whoever runs the model
        L, D, H, V = cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.padded_vocab
        self.attn_layers = [i for i in range(L) if i not in cfg.no_attn_layers]
        A, G = len(self.attn_layers), min(GATE_WIDTH, D)
        static = not cfg.gate_networks

        def param(*shape):
            return nn.Parameter(torch.empty(shape))

        # Queries and keys are orthogonalized by pairs of adjacent heads (two heads of a layer, one matrix).
        group = 2 if H % 2 == 0 else 1
        self.attn_qk = param(A * 2 * H // group, group * cfg.head_dim, D)
        self.attn_vo = param(A * 2, D, D)
        self.mlp_in = param(L, cfg.mlp_ratio * D, D)
        self.mlp_out = param(L, D, cfg.mlp_ratio * D)
        self.head = param(V, D)
        self.embed = param(V, D)

        self.resid_lambdas = param(L, 2)
        self.post_lambdas = param(L, 2)
        self.attn_lambdas = param(A, 2)  # factors of the value and the output matrix
        if cfg.inject_x0 and static:
            self.x0_lambdas = param(L)
        if cfg.value_embed_layers:
            num_tables = len(cfg.value_embed_layers)
            self.value_embeds = param(num_tables * V, D)
            self.value_gates = param(num_tables, H, 2 * (G // 2))
        if cfg.bigram_rows:
            self.bigram_embed = param(cfg.bigram_rows, D)
            if static:
                self.bigram_lambdas = param(L)
            self.register_buffer("signs", torch.empty(NUM_SIGNS, D, dtype=torch.int8))
        if cfg.smear:
            self.smear_gate = param(1, G)
            self.smear_lambda = param(1)
        if cfg.attn_gate_layers and static:
            self.attn_gates = param(len(cfg.attn_gate_layers), H, G)
        if cfg.xsa_layers and static:
            self.xsa_alphas = param(len(cfg.xsa_layers), H)
        if cfg.skip:
            if static:
                self.skip_gate = param(1, G)
            self.skip_lambda = param(1)
        if cfg.backout:
            self.backout_lambda = param(1)
        if cfg.prefix_weight:
            self.register_buffer("prefixes", torch.empty(V, dtype=torch.int64), persistent=False)
        self.make_networks(param)

    def make_networks(self, param):
        """Make the parameters of the small networks: gates, then connections."""
        cfg, D = self.cfg, self.cfg.model_dim
        if cfg.gate_networks:
            num_networks, outputs = len(cfg.gate_networks), gate_outputs(cfg)
            self.gate_in = param(num_networks, HIDDEN, D)
            self.gate_out = param(num_networks, outputs, HIDDEN)
            self.gate_bias = param(num_networks, outputs)
            self.gate_scale = param(1)
        if cfg.mudd:
            self.mudd_in = param(2, HIDDEN, D)
            self.mudd_out = param(2, CONNECTIONS, HIDDEN)
            self.mudd_bias = param(2, CONNECTIONS)

    @torch.no_grad()
    def init_weights(self, dtype: torch.dtype):
        """Fill every parameter in place, alike everywhere; matrices and tables take the dtype."""
        cfg = self.cfg
        generator = torch.Generator().manual_seed(cfg.seed)
        bound = 0.5 * math.sqrt(3 / cfg.model_dim)
        constants = {"resid_lambdas": math.sqrt(cfg.resid_init), "post_lambdas": 1.0, "bigram_lambdas": 0.05,
                     "skip_lambda": -1.5, "backout_lambda": 0.5, "gate_scale": SCALE}
        for name, p in self.named_parameters():
            w = torch.zeros(p.shape)
            if name in ("attn_qk", "attn_vo", "mlp_in"):
                w.uniform_(-bound, bound, generator=generator)
            elif name == "mlp_out" and cfg.mlp_out_std:
                w.uniform_(-1, 1, generator=generator).mul_(cfg.mlp_out_std * math.sqrt(3 / cfg.model_dim))
            elif name == "head":
                w.normal_(0, cfg.head_std, generator=generator)
            elif name == "value_embeds":
                w.normal_(0, 0.01, generator=generator)
            elif name == "attn_lambdas":
                w[:, 0] = 0.5
                w[:, 1] = 1.0
            elif name in ("gate_in", "mudd_in"):
                w.uniform_(-cfg.model_dim**-0.5, cfg.model_dim**-0.5, generator=generator)
            elif name == "gate_bias":
                w = gate_starts(cfg) / SCALE
            elif name == "mudd_bias":
                w = connection_starts(cfg) / SCALE
            else:  # MLP outputs, bigram table and all gates start at zero
                w.fill_(constants.get(name, 0.0))
            p.data = w.to(p.device, dtype if name in MATRICES + TABLES else torch.float32)
        self.embed.copy_(self.head)
        if cfg.bigram_rows:
            self.signs.copy_(torch.randint(0, 2, self.signs.shape, generator=generator) * 2 - 1)
        if cfg.prefix_weight:
            self.prefixes.fill_(-1)  # until the clock runs: the public record pays for the table as well

    def layer_weights(self) -> list[LayerWeights]:
        """Return the weights by layer. Taking each bank apart once gives its gradient in one piece."""
        cfg, L, D = self.cfg, self.cfg.num_layers, self.cfg.model_dim
        nothing = [None] * L
        qk, vo = list(nothing), list(nothing)
        # Factors scale matrices, not activations (T, D), which the factors' gradients would then read again.
        post_attn, post_mlp = self.post_factors()
        factors = torch.stack([self.attn_lambdas[:, 0], self.attn_lambdas[:, 1] * post_attn], 1)
        scaled = (self.attn_vo.view(-1, 2, D, D) * factors[..., None, None]).type_as(self.attn_vo)
        mlp_out = (self.mlp_out * post_mlp[:, None, None]).type_as(self.mlp_out)
        attention = zip(self.attn_layers, self.attn_qk.view(-1, 2 * D, D).unbind(), scaled.unbind())
        for i, layer_qk, layer_vo in attention:
            qk[i] = layer_qk
            vo[i] = layer_vo
        static = not cfg.gate_networks
        x0 = self.x0_lambdas.unbind() if cfg.inject_x0 and static else nothing
        bigram = self.bigram_lambdas.unbind() if cfg.bigram_rows and static else nothing
        columns = (qk, vo, self.mlp_in.unbind(), mlp_out.unbind(), self.resid_lambdas.unbind(), x0, bigram)
        return [LayerWeights(*weights) for weights in zip(*columns)]

    def post_factors(self) -> tuple[Tensor, Tensor]:
        """Return the learned factors of what attention, (A,), and MLP, (L,), of each layer add: 1 in the last
        one where connections set them for each token."""
        post = self.post_lambdas
        if self.cfg.mudd:
            post = torch.cat([post[:-1], torch.ones_like(post[-1:])])
        attn, mlp = post.unbind(1)
        by_layer = attn.unbind()
        return torch.stack([by_layer[i] for i in self.attn_layers]), mlp

    def forward(self, tokens: Tensor, targets: Tensor, ctx: Context, loss_weights: Tensor) -> Tensor:
        """Return the training loss: summed cross entropies of the next tokens, weighted by loss_weights (K,).

        Multi-token prediction (record 53): the same logits also predict later tokens, which teaches the trunk
        more per token while the weights of later tokens fade out over the run. Prefix tokens (record 88): so
        does the longest token that the next one begins with, for the last weight.
        """
        x = self.trunk(tokens, ctx)
        fp8, onednn = self.kernels.fp8_head, self.kernels.onednn
        prefixes = self.prefixes[targets] if ctx.prefixes else None
        return head_loss(x, self.head, targets, loss_weights, self.cfg.softcap, HEAD_PIECE, fp8, onednn,
                         prefixes, ctx.slices, ctx.sample, self.kernels.lookup)

    def evaluate(self, tokens: Tensor, targets: Tensor, ctx: Context) -> Tensor:
        """Return the sum of the T cross entropies of the next token, in fp32."""
        x = self.trunk(tokens, ctx)
        pieces = zip(x.split(HEAD_PIECE), targets.split(HEAD_PIECE))
        return sum(self.cross_entropy(a, self.head, b, self.cfg.softcap, self.linear) for a, b in pieces)

    def log_probs(self, tokens: Tensor, ctx: Context) -> Tensor:
        """Return the (T, V) log probabilities of the next token, in fp32."""
        logits = self.linear(self.trunk(tokens, ctx), self.head).float()
        return torch.log_softmax(softcap(logits, self.cfg.softcap), -1)

    def trunk(self, tokens: Tensor, ctx: Context) -> Tensor:
        """Map (T,) tokens to the (T, D) normalized final stream."""
        cfg = self.cfg
        layers = self.layer_weights()
        x0 = self.first_embedding(tokens, ctx)
        bigram = self.bigram(tokens, ctx.slices) if cfg.bigram_rows else None
        if cfg.ngram_rows:  # narrow rows, into the first channels
            bigram = bigram + F.pad(ctx.ngrams, (0, cfg.model_dim - cfg.head_dim))
        inputs = Inputs(x0, bigram, self.value_embeddings(tokens))

        x = x0
        if cfg.gate_networks:
            self.set_gates(0, x, layers)
        if cfg.bigram_rows:
            x = x + layers[0].bigram * bigram
        first = x

        cached = early = None  # the streams that later layers read
        recompute = cfg.recompute and torch.is_grad_enabled()
        for i in range(cfg.num_layers):
            if i in cfg.gate_networks[1:]:
                self.set_gates(i, x, layers)
            if cfg.mudd and i == cfg.num_layers - 1:
                before_last = x
                x = self.connect(x, first, cached, layers)
                inputs = inputs._replace(x0=first)

            args = i, x, cached, early, layers[i], inputs, ctx
            x = checkpoint(self.layer, *args, use_reentrant=False) if recompute else self.layer(*args)
            if i == cfg.cache_layer:
                cached = x
            if cfg.skip and i == cfg.skip[0]:
                early = x

        # Backout (record 40): early layers may write what only attention needs; the head does not see it.
        if cfg.backout:
            x = x - self.backout_lambda.type_as(x) * cached
        if cfg.mudd:
            value = inputs.values[cfg.value_embed_layers[0]] if cfg.value_embed_layers else None
            x = x + weighted_sum(self.connections(1, x), [first, cached, before_last, value, early])
        return self.kernels.norm(x)

    def set_gates(self, i: int, x: Tensor, layers: list[LayerWeights]):
        """Set the gates of the layers from i to the next network's for each token (record 85). x: (T, D)."""
        n = self.cfg.gate_networks.index(i)
        slots = gate_slots(self.cfg)[n]
        scale = self.gate_scale.type_as(x)
        values = small_network(x, self.gate_in[n], self.gate_out[n], self.gate_bias[n], scale)
        start = 0
        for slot in slots:
            gate = values[:, start : start + slot.width]
            layers[slot.layer] = layers[slot.layer]._replace(**{slot.kind: gate})
            start += slot.width

    def connections(self, n: int, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of a network of connections, each (T, 1); see connection_starts."""
        mu = small_network(x, self.mudd_in[n], self.mudd_out[n], self.mudd_bias[n], SCALE)
        return mu.split(1, dim=1)

    def connect(self, x: Tensor, first: Tensor, cached: Tensor, layers: list[LayerWeights]) -> Tensor:
        """Return the stream into the last layer, mixed with earlier ones, and set its factors (record 81)."""
        mu = self.connections(0, x)
        to_values, to_input = mu[:3], mu[3:6]
        low_gate, high_gate, resid_attn, post_attn, x0, bigram, resid_mlp, post_mlp = mu[6:]
        streams = [first, cached, x]
        H = self.cfg.num_heads
        halves = low_gate.expand(-1, H // 2), high_gate.expand(-1, H - H // 2)
        layers[-1] = layers[-1]._replace(
            value=weighted_sum(to_values, streams), value_gate=torch.cat(halves, 1),
            resid=(resid_attn, resid_mlp), post=(post_attn, post_mlp), x0=x0, bigram=bigram)
        return x + weighted_sum(to_input, streams)

    def first_embedding(self, tokens: Tensor, ctx: Context) -> Tensor:
        """Map (T,) tokens to (T, D). Embedding and head are one matrix until they part (record 53)."""
        x = self.kernels.lookup(tokens, ctx.table)

        # Smear (record 34): a little of the previous token's embedding, which layer 0 need not look up.
        if self.cfg.smear:
            x = x.unflatten(0, (ctx.slices, -1))
            before, now = x[:, :-1], x[:, 1:]
            seen = now[..., : self.smear_gate.size(1)]
            gate = torch.sigmoid(F.linear(seen, self.smear_gate.type_as(x)))
            mixed = now + self.smear_lambda.type_as(x) * gate * before
            x = torch.cat([x[:, :1], mixed], 1).flatten(0, 1)
        return self.kernels.stored_gradient(self.kernels.norm(x))

    def bigram(self, tokens: Tensor, slices: int = 1) -> Tensor:
        """Return the (T, D) embedding of each token and the one before it, hashed to a row of one table.

        Records 62 and 83: memory instead of products, -165 steps. Bigrams that share a row differ in their
        random signs, so that what they teach it cancels on average.
        """
        rows = self.cfg.bigram_rows
        now = tokens.int()
        T = len(now)
        first = torch.arange(T, device=now.device) % (T // slices) == 0
        before = torch.where(first, 0, now.roll(1))
        mixed = (36313 * now) ^ (27191 * before)  # int32 products wrap around
        index = torch.remainder(mixed, max(rows - 1, 1))
        index = torch.where(first, rows - 1, index)
        e = self.kernels.lookup(index, self.bigram_embed)
        if not self.cfg.bigram_signs:
            return e
        return e * F.embedding((now ^ before) % NUM_SIGNS, self.signs).type_as(e)

    def value_embeddings(self, tokens: Tensor) -> dict[int, Tensor]:
        """Return {layer: (T, D)}, which its values read: each layer has a table (records 14 to 65)."""
        layers = self.cfg.value_embed_layers
        if not layers:
            return {}
        offsets = torch.arange(len(layers), device=tokens.device)[:, None] * self.cfg.padded_vocab
        return dict(zip(layers, self.kernels.lookup(tokens + offsets, self.value_embeds)))

    def layer(self, i: int, x: Tensor, cached: Tensor | None, early: Tensor | None, weights: LayerWeights,
              inputs: Inputs, ctx: Context) -> Tensor:
        """Return the stream after layer i. cached, early: that after cfg.cache_layer and cfg.skip[0]."""
        cfg = self.cfg
        if i in self.attn_layers:
            # Late attention (record 77) reads the cached stream: what later MLPs write cannot blur its keys.
            if i in cfg.late_attn_layers:
                h, factor, stream = self.kernels.norm(cached), weights.resid[0], x
            else:
                h, factor, stream = self.kernels.norm_and_term(x, weights.resid[0])
            added = self.attention(h, i, weights, inputs.values.get(i), ctx)
            if weights.post is not None:
                added = weights.post[0] * added
            factors, streams = [factor], [stream]
            # The first embeddings again (record 9): no layer has to carry them along.
            if weights.x0 is not None:
                factors.append(weights.x0)
                streams.append(inputs.x0)
            if cfg.bigram_rows and i > 0:
                factors.append(weights.bigram)
                streams.append(inputs.bigram)
            x = self.kernels.residual(added, factors, streams)

        # One skip from an early to a middle layer (records 11 and 45), gated by the token.
        if cfg.skip and i == cfg.skip[1]:
            gate = weights.skip
            if gate is None:
                seen = inputs.x0[:, : self.skip_gate.size(1)]
                gate = 2 * torch.sigmoid(F.linear(seen, self.skip_gate.type_as(x)))
            x = x + torch.sigmoid(self.skip_lambda.type_as(x)) * gate * early

        h, factor, stream = self.kernels.norm_and_term(x, weights.resid[1])
        added = self.kernels.mlp(h, weights.mlp_in, weights.mlp_out)
        if weights.post is not None:
            added = weights.post[1] * added
        return self.kernels.residual(added, [factor], [stream])

    def attention(self, h: Tensor, i: int, weights: LayerWeights, value_embed: Tensor | None,
                  ctx: Context) -> Tensor:
        """Return what attention of layer i adds, (T, D). h, value_embed: (T, D), h normalized."""
        cfg = self.cfg
        T, D = h.shape
        H, d = cfg.num_heads, cfg.head_dim
        # Numbers, as they are indices: torch.compile of torch 2.11 takes no bool for one.
        long, paired = int(i in cfg.long_layers), int(i in cfg.paired_layers)

        # Normalized queries and keys (record 5): logits stay bounded, and one fixed softmax scale fits all
        # layers. Half of each head rotates (record 17); the other half can match content at any distance.
        qk = self.linear(h, weights.qk).view(T, 2, H, d)
        q, k = self.kernels.queries_and_keys(qk, *ctx.rope[paired], ctx.scale)
        scale = 1.0 if isinstance(ctx.scale, Tensor) else ctx.scale
        v = self.kernels.stored_gradient(self.values(h, i, weights, value_embed))

        # Partial key offset (record 49): half of each key comes from the token before, so that one layer can
        # find what followed the last time.
        if cfg.key_offset and long:
            k = self.kernels.stored_gradient(k)
            second = k[..., d // 2 :].unflatten(0, (ctx.slices, -1))
            shifted = torch.cat([second[:, :1], second[:, :-1]], 1).flatten(0, 1)
            k = torch.cat([k[..., : d // 2], shifted], -1)

        mask = ctx.masks[long][paired]
        if paired:  # two heads share a softmax over the keys of both (record 58): -65 steps at the same FLOPs
            by_pairs = (pair(x, cfg.pairing) for x in (q, k, v))
            y = unpair(self.kernels.attend(*by_pairs, mask, scale), cfg.pairing)
        else:
            y = self.kernels.attend(q, k, v, mask, scale)

        # Mixing of heads (record 85): a token may read by one head what another head found.
        if weights.mix_in is not None:
            heads_in = F.rms_norm(weights.mix_in.float(), (H,), eps=1e-6).type_as(y)
            y = y + mix_heads(q, k, v, heads_in, weights.mix_out, ctx.mixing, scale)

        # A gate on each head's output (record 28) lets a head attend to nothing.
        if i in cfg.attn_gate_layers:
            gate = weights.attn_gate
            if gate is None:
                gates = self.attn_gates[cfg.attn_gate_layers.index(i)]
                gate = torch.sigmoid(F.linear(h[:, : gates.size(1)], gates.type_as(h)))
            y = y * gate[..., None]

        # Exclusive self attention (record 82, arXiv 2603.09078): remove what a token only tells itself. It
        # commutes with the gate; in this order only y and v have to be kept.
        if i in cfg.xsa_layers:
            strength = self.xsa_alphas[cfg.xsa_layers.index(i)] if weights.xsa is None else weights.xsa
            alpha = torch.tanh(strength).type_as(y)[..., None]
            v = self.kernels.stored_gradient(v)
            along = (y * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True).clamp(min=1e-8)
            y = y - alpha * along * v
        return self.linear(y.reshape(T, D), weights.vo[1])

    def values(self, h: Tensor, i: int, weights: LayerWeights, value_embed: Tensor | None) -> Tensor:
        """Return the values of layer i, (T, H, d)."""
        heads = len(h), self.cfg.num_heads, self.cfg.head_dim
        v = self.linear(h, weights.vo[0]).view(heads)

        # Value embeddings: what a token offers, looked up instead of computed; the gate starts at 1.
        if value_embed is not None:
            gate = weights.value_gate
            if gate is None:
                gates = self.value_gates[self.cfg.value_embed_layers.index(i)]
                half = gates.size(1) // 2
                seen = torch.cat([h[:, :half], value_embed[:, :half]], 1)
                gate = 2 * torch.sigmoid(F.linear(seen, gates.type_as(h)))
            v = v + gate[..., None] * value_embed.view(heads)

        if weights.value is not None:
            v = v + weights.value.view(heads)
        return v

    def context(self, docs: Docs, step: int, final: bool = False, ngrams: Tensor | None = None,
                sample: Sample | None = None) -> Context:
        """Return masks, rotary tables and scale of the stage of a step.

        final: with the longer window of the final validation, which costs training nothing (record 33).
        ngrams: (T, d) embedding of the n-grams, with cfg.ngram_rows. sample: of Run.draw, in training.
        """
        cfg, stage = self.cfg, self.cfg.stage(step)
        scale, rope = self.rotary_tables(stage, docs)
        window_long = cfg.window_final if final else cfg.by_stage("window_long", stage)
        windows = cfg.by_stage("window_short", stage), window_long
        used = {(i in cfg.long_layers, i in cfg.paired_layers) for i in self.attn_layers}

        def mask(long: bool, paired: bool):
            if (long, paired) in used:
                return self.kernels.make_mask(paired_docs(docs) if paired else docs, windows[long])

        masks = [[mask(long, paired) for paired in (False, True)] for long in (False, True)]
        mixing = mixing_mask(docs, cfg.mix_window) if cfg.mix_window else None
        prefixes = prefix_weight(cfg, step) > 0
        table = self.table(cfg.tied(step))
        return Context(masks, rope, scale, table, mixing, prefixes, docs.slices, ngrams, sample)

    def table(self, tied: bool) -> Tensor:
        """Return the embedding as a view, so that torch.compile sees no difference to the head."""
        table = self.head if tied else self.embed
        return table.view_as(table)

    def rotary_tables(self, stage: int, docs: Docs) -> tuple[float | Tensor, list]:
        """Return the softmax scale and the (cos, sin) of plain and paired heads, each (T, 1, 1 or H, r). A
        token of paired heads stands at two positions: even heads at 2t, odd ones at 2t + 1."""
        T, device, dtype = len(docs.ids), docs.ids.device, self.embed.dtype
        if (stage, T) not in self.rope_tables:
            with device:  # made there: a copy would make the host wait
                omega, scale = rotary_settings(self.cfg, stage)
                if self.kernels.own_kernels:  # a number would be compiled in, anew for each stage
                    scale = torch.full((), scale)
            angle = torch.arange(T, dtype=torch.float64, device=device)[:, None, None] * omega  # (T, 1, r)
            heads = torch.arange(self.cfg.num_heads, dtype=torch.float64, device=device)
            paired = 2 * angle + heads[None, :, None] % 2 * omega
            rope = [[f(a).to(dtype)[:, None] for f in (torch.cos, torch.sin)] for a in (angle, paired)]
            for other in [key for key in self.rope_tables if key[0] != stage]:
                del self.rope_tables[other]
            self.rope_tables[stage, T] = scale, rope
        return self.rope_tables[stage, T]

    def matmul_params(self) -> int:
        """Return the number of weights that multiply every token."""
        others = [p for name, p in self.named_parameters() if name in ("head", *NETWORKS)]
        return sum(getattr(self, name).numel() for name in MATRICES) + sum(p.numel() for p in others)

    def flops_per_token(self, stage: int) -> int:
        """Return training FLOPs: 6 per weight, 12 D per visible key and attention layer, in full windows.
        Paired heads, half as many at twice the places, cost the same. Mixing heads is one more attention."""
        weights = self.matmul_params()
        if rows := self.cfg.by_stage("head_rows", stage):
            weights -= (self.cfg.padded_vocab - rows) * self.cfg.model_dim
        keys = self.cfg.mix_window
        for i in self.attn_layers:
            window = "window_long" if i in self.cfg.long_layers else "window_short"
            keys += self.cfg.by_stage(window, stage) + 1  # and the token itself
        return 6 * weights + 12 * self.cfg.model_dim * keys


# ------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the step


def learning_rate(cfg: Config, step: int) -> float:
    """Return the factor of all learning rates: the stage's, then falling to lr_floor."""
    scheduled = cfg.train_steps - cfg.extension_steps
    start = int(scheduled * (1 - cfg.cooldown_frac))
    t = 0.0
    if start < scheduled:
        t = min(max(step - start, 0) / (scheduled - start), 1.0)
    warmup = min((step + 1) / cfg.warmup_steps, 1.0) if cfg.warmup_steps else 1.0
    return warmup * (cfg.at("lr_mul", step) * (1 - t) + cfg.lr_floor * t)


def muon_momentum(cfg: Config, step: int) -> float:
    """Return the momentum: linear from its first value to its second, and back at the very end."""
    low, high = cfg.momentum
    rise = step / cfg.momentum_warmup if cfg.momentum_warmup else 1.0
    fall = (cfg.train_steps - step) / cfg.momentum_cooldown if cfg.momentum_cooldown else 1.0
    return low + (high - low) * min(rise, fall, 1.0)


def mtp_weights(cfg: Config, step: int) -> tuple[float, ...]:
    """Return the loss weights of the next, the second next, ... token. Stage s keeps all but s of
    cfg.mtp_weights and fades the last of those, never the first, linearly to zero."""
    stage = cfg.stage(step)
    kept = cfg.mtp_weights[: max(len(cfg.mtp_weights) - stage, 1)]
    if len(kept) == 1:
        return kept
    start, end = (*cfg.stage_starts, cfg.train_steps)[stage : stage + 2]
    return (*kept[:-1], kept[-1] * (1 - (step - start) / (end - start)))


def prefix_weight(cfg: Config, step: int) -> float:
    """Return the loss weight of prefix tokens: whole in the first stage, falling to zero in the second."""
    stage = cfg.stage(step)
    if stage == 0:
        return cfg.prefix_weight
    if stage > 1:
        return 0.0
    start, end = (*cfg.stage_starts, cfg.train_steps)[1:3]
    return cfg.prefix_weight * (1 - (step - start) / (end - start))


def loss_weights(cfg: Config, step: int) -> tuple[float, ...]:
    """Return the weights of the loss's parts: of the next tokens, then of prefixes unless that is zero."""
    prefix = prefix_weight(cfg, step)
    return (*mtp_weights(cfg, step), prefix) if prefix else mtp_weights(cfg, step)


# ------------------------------------------------------------------------------------------------------------
# Optimizers: one table says what moves each parameter

NS_STEPS = 5  # of Muon's Newton-Schulz iteration


class Row(NamedTuple):
    optimizer: str  # "muon": shared out over the ranks by matrix; "adam": large ones in equal parts
    lr: float
    wd: float  # weight decay at the full learning rate; a step decays by lr wd
    wd_follows_lr: bool = True  # then decay is quadratic in the schedule
    betas: tuple[float, float] = (0.0, 0.0)


def optimizer_table(cfg: Config) -> dict[str, Row]:
    """Return what moves each parameter. Adam forgets fast for tables, slowly for scalars and gates."""
    def adam(lr_mul, wd_mul, betas):
        lr = cfg.adam_lr * lr_mul
        return Row("adam", lr, cfg.adam_wd * wd_mul * lr, betas=betas)

    def muon(lr_mul, wd_mul):
        return Row("muon", cfg.muon_lr * lr_mul, cfg.muon_wd * cfg.muon_lr * wd_mul)

    embedding = adam(1, 150, (0.5, 0.95))
    sparse_table = adam(cfg.table_lr_mul, 5, (0.75, 0.95))
    scalar = adam(5, 0, (0.9, 0.99))
    factor = adam(cfg.factor_adam[0], 0, cfg.factor_adam[1:])
    gate = adam(1, 1, (0.9, 0.99))
    table = {
        "attn_qk": muon(1, 1),
        "attn_vo": muon(1, 1),
        "mlp_in": muon(1, 2),
        "mlp_out": muon(cfg.mlp_out_lr_mul, 1),
        "head": embedding,
        "embed": embedding,
        "value_embeds": sparse_table,
        "bigram_embed": sparse_table,
        "ngram_table": adam(cfg.table_lr_mul, 0, (0.0, 0.95)),  # by row, in engine/host_table.py
        "resid_lambdas": adam(5, 0, (0.9, 0.95)),
        "post_lambdas": adam(1, 0, (0.9, 0.95)),
        "attn_lambdas": scalar,
        "x0_lambdas": factor,
        "bigram_lambdas": factor,
        "smear_lambda": scalar,
        "skip_lambda": scalar,
        "backout_lambda": scalar,
        "xsa_alphas": factor,
        "smear_gate": adam(0.01, 0, (0.9, 0.99)),
        "value_gates": gate,
        "attn_gates": gate,
        "skip_gate": adam(0.05, 0, (0.9, 0.99)),
        "gate_in": adam(0.1, 1, (0.9, 0.99)),
        "gate_out": adam(0.1, 1, (0.9, 0.99)),
        "gate_bias": adam(0.1, 0, (0.9, 0.99)),
        "gate_scale": adam(0.1, 0, (0.9, 0.99)),
        "mudd_in": adam(0.25, 1, (0.9, 0.99)),
        "mudd_out": adam(0.25, 1, (0.9, 0.99)),
        "mudd_bias": adam(0.25, 0, (0.9, 0.99)),
    }
    if cfg.optimizer == "adamw":
        adamw = Row("adam", cfg.adamw_lr, cfg.adamw_wd, False, cfg.adamw_betas)
        table.update({name: adamw for name in MATRICES})
        table["mlp_out"] = adamw._replace(lr=cfg.adamw_lr * cfg.adamw_out_lr_mul)
    return table


def muon_shares(model: GPT, dtype: torch.dtype, device: torch.device) -> str:
    """Say how large a part of a step's FLOPs is Muon's iteration in this dtype, for each size of a batch, and
    the bound 5 D / tokens of it."""
    cfg = model.cfg
    muon = 0
    if cfg.optimizer == "muon":
        for count, m, n in (getattr(model, name).shape for name in MATRICES):
            muon += count * newton_schulz_flops(m, n, NS_STEPS, gram_pays(m, n, dtype, device), dtype)

    shares = []
    for stage, step in enumerate(cfg.stage_starts):
        tokens = cfg.at("batch_tokens", step)
        part = muon / (muon + tokens * model.flops_per_token(stage))
        shares.append(f"{part:.1%} at {tokens:,} tokens (bound {5 * cfg.model_dim / tokens:.1%})")
    return ", ".join(dict.fromkeys(shares))


# ------------------------------------------------------------------------------------------------------------
# The run

EMA_EVERY = 4  # steps between two looks at the weights for their average: each is a pass over all of them
MODEL_SETTINGS = (  # what a checkpoint's weights depend on
    "vocab_size", "num_layers", "model_dim", "head_dim", "mlp_ratio", "no_attn_layers", "value_embed_layers",
    "bigram_rows", "ngram_rows", "ngram_orders", "smear", "pairing", "attn_gate_layers", "xsa_layers", "skip",
    "backout", "inject_x0", "mudd", "gate_networks", "mix_window")


def is_averaged(cfg: Config, name: str) -> bool:
    """Return whether a parameter has an average over the end of the schedule."""
    return cfg.ema_of == "all" or name in ("head", "embed")


class Run:
    """All state of a training run: weights, optimizers, loader position, step, clock, random state. What else
    the schedules need (windows, rotary tables, scales, tying) follows from the step."""

    def __init__(self, cfg: Config, rt: Runtime, stop: StopSignal | None = None):
        self.cfg, self.rt = cfg, rt
        self.stop = stop or StopSignal()
        self.startup = Startup()
        self.startup.mark("imports and ranks")
        check_world_size(cfg, rt.world)
        cuda = rt.device.type == "cuda"
        self.loader = rt.together(Loader, cfg, rt.rank, rt.world, cuda)
        self.validation = rt.together(Validation, cfg, rt.rank, rt.world, cuda)
        self.encoding = rt.together(encoding_for, cfg.bos_id) if cfg.prefix_weight else None
        self.startup.mark("data")

        self.kernels = Kernels.choose(cfg, rt.device).agreed(rt.everywhere)
        self.startup.mark("choice of kernels")

        with torch.device(rt.device):
            self.model = GPT(cfg, self.kernels)
        self.model.init_weights(self.kernels.dtype)
        self.forward = self.kernels.compile(self.model)
        self.make_optimizers()
        self.ngrams = rt.together(self.make_host_table) if cfg.ngram_rows else None
        self.model.ngrams = self.ngrams
        self.startup.mark("weights and optimizers")

        self.step = 0
        self.clock = Clock(rt.synchronize)
        self.reached = None  # (step, milliseconds) of the first validation at or below the target
        self.val_loss = None  # of the newest validation
        self.ema = None  # name -> average of that parameter, in fp32
        self.resumed_at = None
        self.losses = deque()  # (step, loss and signals, event) on their way from the device
        self.stop_agreed = False

    def make_optimizers(self):
        cfg, rt, kernels = self.cfg, self.rt, self.kernels
        table = optimizer_table(cfg)
        groups = {"muon": [], "adam": []}
        for name, p in self.model.named_parameters():
            row = table[name]
            group = dict(params=[p], row=row, lr=row.lr, weight_decay=row.wd)
            if row.optimizer == "adam":
                group["betas"] = row.betas
            groups[row.optimizer].append(group)

        self.adam = self.muon = None  # after the warm-up: the old state goes before the new one comes
        self.adam = Adam(groups["adam"], cfg.adam_eps, cfg.cautious, rt.rank, rt.world, kernels.own_kernels)
        if groups["muon"]:
            self.muon = Muon(
                groups["muon"], ns_coefficients=cfg.coefficients, ns_steps=NS_STEPS,
                ns_dtype=kernels.ns_dtype, cautious=cfg.cautious, flatten=False,
                normuon_beta2=cfg.normuon_beta2 or None,
                split_mantissa=kernels.dtype == torch.bfloat16,
                sync_grads=True, compile=kernels.own_kernels, symmetric=kernels.symmetric)

    def make_host_table(self) -> HostTable:
        beta = optimizer_table(self.cfg)["ngram_table"].betas[1]
        return HostTable(self.cfg, self.rt.device, self.kernels.dtype, self.rt.rank, self.rt.world, beta)

    def facts(self) -> list[str]:
        """Return what the log says of this run besides settings and machine."""
        cfg, model = self.cfg, self.model
        flops = [f"{model.flops_per_token(stage) / 1e6:.1f}" for stage in range(len(cfg.stage_starts))]
        parameters = sum(p.numel() for p in model.parameters())
        budget = []
        if cfg.time_budget:
            steps = f"{cfg.train_steps} steps fit by the step times of a warm-up"
            budget = [f"time budget: {cfg.time_budget:g} s, in which {steps}"]
        return [
            *budget,
            *self.rt.facts(),
            *self.kernels.facts(),
            *self.muon_facts(),
            *self.host_table_facts(),
            *self.sample_facts(),
            f"parameters: {parameters:,}, {model.matmul_params():,} in matrix products, "
            f"MFLOP per token by stage: {', '.join(flops)}",
            f"training data: {cfg.train_tokens:,} tokens from {len(self.loader.paths)} shards, "
            f"fingerprint {self.loader.fingerprint}",
            f"validation data: first {cfg.val_tokens} tokens, sha256 {self.validation.sha256}",
        ]

    def muon_facts(self) -> list[str]:
        if self.muon is None:
            return []
        placement, = self.muon.placements
        matrices = sum(bucket.num_matrices for bucket in self.muon.buckets)
        shares = muon_shares(self.model, self.kernels.ns_dtype, self.rt.device)
        return [f"Muon: {matrices} matrices in {len(placement.buckets)} buckets over {self.rt.world} ranks, "
                f"planned balance {placement.efficiency:.3f}",
                f"Muon's share of the FLOPs of a step, as planned: {shares}"]

    def host_table_facts(self) -> list[str]:
        if self.ngrams is None:
            return []
        rows, gib = self.cfg.ngram_rows, self.cfg.ngram_rows * row_bytes(self.cfg) / 2**30
        return [f"n-grams: {rows:,} rows of {self.cfg.head_dim} numbers, {gib:.2f} GiB of host memory over "
                f"{self.rt.world} ranks"]

    def sample_facts(self) -> list[str]:
        cfg = self.cfg
        if not any(cfg.head_rows):
            return []
        rows = ", ".join(str(cfg.at("head_rows", step) or "all") for step in cfg.stage_starts)
        return [f"training loss: summed over {rows} of {cfg.vocab_size} tokens by stage; over a part of them "
                "it is an estimate, on average too low"]

    # A step

    def train_step(self) -> float | None:
        """Take one optimizer step. Return the newest training loss that has arrived from the device."""
        step = self.step
        if step == self.cfg.untie_step:
            self.untie()
        stats = torch.zeros(2, device=self.rt.device)  # mean loss, any signal to stop
        batches = self.loader.next()
        stats[0] = self.accumulate(batches, step, self.loader.upcoming) / self.cfg.at("batch_tokens", step)
        stats[1].fill_(self.stop.number)  # an assignment would copy from the host, and wait for the device
        self.update(step)
        self.rt.sum(stats)
        self.step += 1
        self.average_weights()
        return self.read_stats(stats)

    def fill_prefixes(self):
        """Build the table of prefix tokens. The clock runs, as it does in the public record."""
        if self.encoding is not None:
            longest = longest_prefixes(self.encoding.pieces())
            self.model.prefixes[: len(longest)] = torch.from_numpy(longest)

    def accumulate(self, batches: list[Batch], step: int, upcoming: Future | None = None) -> Tensor:
        """Add the gradient of the loss of some slices to .grad; return the sum of their losses.

        A step's loss is the mean over its slices, each a sum over its tokens, as in the public records: Adam
        then meets a change of batch as theirs does. upcoming: the loader's future of the next step's batches.
        """
        device = self.rt.device
        pin = device.type == "cuda"  # an unpinned copy would make the host wait for the step before
        weights = torch.tensor(loss_weights(self.cfg, step), pin_memory=pin).to(device, non_blocking=True)
        share = self.rt.world / self.cfg.slices  # Adam and Muon average over the ranks
        total = 0.0
        ngrams = None
        if self.ngrams is not None:
            self.ngrams.take(batches, upcoming)
        for i, batch in enumerate(batches):
            inputs, targets, docs = to_device(batch, device)
            if self.ngrams is not None:
                ngrams = self.ngrams.embed(i)
            ctx = self.model.context(docs, step, ngrams=ngrams, sample=self.draw(step, i))
            loss = self.forward(inputs, targets, ctx, weights)
            (loss * share).backward()
            total = total + loss.detach()
        return total

    def draw(self, step: int, i: int) -> Sample | None:
        """Return the tokens that the loss of this rank's i-th slice sums over, each slice others; None: all.

        They follow from step and slice, so that neither the number of ranks nor a resumed run changes them.
        """
        rows = self.cfg.at("head_rows", step)
        if not rows:
            return None
        key = self.cfg.seed, step, self.loader.slices_of_rank.start + i
        return draw_sample(self.cfg.padded_vocab, rows, key, self.rt.device)

    def update(self, step: int):
        """Move the weights and clear the gradients; Adam moves every cfg.adam_every steps only."""
        self.set_rates(step)
        with_adam = (step + 1) % self.cfg.adam_every == 0
        if self.ngrams is not None:  # first: hosts move their rows while the device moves the other weights
            lr = optimizer_table(self.cfg)["ngram_table"].lr * learning_rate(self.cfg, step)
            self.ngrams.step(lr if with_adam else None)
        if self.muon is not None:
            self.muon.start()
        if with_adam:
            self.adam.start()
            self.adam.step()
        if self.muon is not None:
            with self.kernels.batches():
                self.muon.step()  # while Adam's new tables are on their way
            self.muon.zero_grad()
        if with_adam:
            self.adam.finish()
            self.adam.zero_grad()

    def set_rates(self, step: int):
        factor = learning_rate(self.cfg, step)
        for optimizer in filter(None, (self.muon, self.adam)):
            for group in optimizer.param_groups:
                row = group["row"]
                group["lr"] = row.lr * factor
                group["weight_decay"] = row.wd * (factor if row.wd_follows_lr else 1)
                if row.optimizer == "muon":
                    group["momentum"] = muon_momentum(self.cfg, step)

    def untie(self):
        """Part embedding and head: the embedding takes over the shared table and its Adam state."""
        with torch.no_grad():
            self.model.embed.copy_(self.model.head)
            if self.ema:  # what stood in the embedding until now was never used
                self.ema["embed"].copy_(self.ema["head"])
        for key, value in self.adam.state[self.model.head].items():
            self.adam.state[self.model.embed][key] = value.clone() if isinstance(value, Tensor) else value

    @torch.no_grad()
    def average_weights(self):
        """Follow the weights by an exponential average in fp32 over the end of the schedule.

        After the last step they become a blend of both: the average lies lower than the last of the noisy
        steps, though it lags behind (the public track 3).
        """
        cfg = self.cfg
        left = cfg.train_steps - self.step
        remembered = cfg.ema_frac * cfg.train_steps
        if left > 3 * remembered or not cfg.ema_frac:
            self.ema = None  # a run that is resumed with more steps averages their end
            return
        if left % EMA_EVERY:
            return
        weights = {name: p for name, p in self.model.named_parameters() if is_averaged(cfg, name)}
        if self.ema is None:
            self.ema = {name: p.float().clone() for name, p in weights.items()}
        for name, p in weights.items():
            self.ema[name].lerp_(p.float(), min(EMA_EVERY / remembered, 1))
            if left == 0:
                p.copy_(p.float().lerp(self.ema[name], cfg.ema_blend))

    def read_stats(self, stats: Tensor) -> float | None:
        """Look at losses, on a GPU two steps late, so that it never waits for them; alike on every rank."""
        cuda = self.rt.device.type == "cuda"
        values = torch.empty(2, pin_memory=cuda).copy_(stats, non_blocking=True)
        event = torch.cuda.Event() if cuda else None
        if cuda:
            event.record()
        self.losses.append((self.step, values, event))

        loss = None
        while len(self.losses) > (2 if cuda else 0):
            step, values, event = self.losses.popleft()
            if cuda:
                event.synchronize()
            loss, stop = values.tolist()
            if not math.isfinite(loss):
                raise RunError(f"step {step}: expected a finite training loss, found {loss}; lower --muon_lr "
                               "and --adam_lr, or look at the data; earlier checkpoints are intact")
            self.stop_agreed = self.stop_agreed or stop > 0
        return loss

    @property
    def stopping(self) -> bool:
        """Return whether all ranks know of a signal to stop, and no gradient is half summed up."""
        whole = self.step % self.cfg.adam_every == 0 or self.step == self.cfg.train_steps
        return self.stop_agreed and whole

    # Around the steps

    def warm_up(self):
        """Compile all that the clock would see, and touch all memory, with made-up tokens, once for each
        graph; then put the weights back and make fresh optimizers. Untimed, and the loader does not move."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        labels = {start: f"stage {stage}" for stage, start in enumerate(self.cfg.stage_starts)}
        for step in self.cfg.graph_starts:
            self.accumulate([self.made_up_batch(step)], step)
            self.update(step + self.cfg.adam_every - 1)
            self.adam.zero_grad()
            self.rt.synchronize()
            self.startup.mark(labels.get(step, "head apart"))
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(before[name])
        self.make_optimizers()
        if self.ngrams is not None:
            self.ngrams.reset()
        self.rt.synchronize()
        self.startup.mark("reset")

    def time_step(self, step: int) -> float:
        """Return the milliseconds of a step like this one, the mean over the steps between two of Adam's."""
        count = len(self.loader.slices_of_rank) // self.loader.joined(step)
        batches = [self.made_up_batch(step)] * count
        self.rt.synchronize()
        began = time.perf_counter()
        for i in range(self.cfg.adam_every):
            self.accumulate(batches, step)
            self.update(step + i)
        self.rt.synchronize()
        return 1000 * (time.perf_counter() - began) / self.cfg.adam_every

    def made_up_batch(self, step: int) -> Batch:
        """Return a batch of random tokens with the shapes of this step's."""
        cfg = self.cfg
        T = cfg.at("batch_tokens", step) // self.loader.slices
        max_doc_len = cfg.at("max_doc_len", step)
        tokens = np.random.default_rng(self.rt.rank).integers(0, cfg.vocab_size, T + 1)
        tokens[:: min(max_doc_len, T)] = cfg.bos_id
        starts = document_starts(tokens[:-1], cfg.bos_id)
        pin = self.rt.device.type == "cuda"
        batch = make_batch(tokens, starts, max_doc_len, pin, self.loader.entries(step))
        return join([batch] * self.loader.joined(step))

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Return the mean cross entropy of the validation in nats per token; None if a signal ended it.

        Windows are those of the stage just trained. The trunk is eager: each window would be another graph.
        """
        cfg, rt = self.cfg, self.rt
        trained = max(self.step - 1, 0)
        final = self.step == cfg.train_steps
        total = torch.zeros((), device=rt.device, dtype=torch.float64)
        for batch in self.validation.rounds():
            signals = rt.sum(torch.tensor(float(self.stop.number), device=rt.device))
            if signals.item():
                self.stop_agreed = True
                return None
            ngrams = self.ngrams.read(batch) if self.ngrams is not None else None
            if batch is not None:
                inputs, targets, docs = to_device(batch, rt.device)
                ctx = self.model.context(docs, trained, final, ngrams)
                total += self.model.evaluate(inputs, targets, ctx)
        self.val_loss = rt.sum(total).item() / cfg.val_tokens
        if self.reached is None and self.val_loss <= cfg.target_loss:
            self.reached = self.step, self.clock.ms
        return self.val_loss

    def save(self, path: Path):
        """Write a checkpoint that resumes at any world size; a collective. It appears whole or not at all."""
        if self.muon is not None:
            self.muon.consolidate_state_dict()
        state = dict(
            config=dataclasses.asdict(self.cfg),
            step=self.step,
            train_ms=self.clock.ms,
            reached=self.reached,
            model=self.model.state_dict(),
            muon=self.muon.state_dict()["state"] if self.muon else None,
            adam=self.adam.full_state(),
            ngrams=self.ngrams.full_state() if self.ngrams is not None else None,
            ema=self.ema,
            data=self.loader.fingerprint,
            loader=self.loader.state_dict(),
            rng=torch.get_rng_state())
        self.rt.together(write_checkpoint, path, state if self.rt.rank == 0 else None)

    def check_checkpoint(self, path: str, state: dict, force_data: bool = False):
        """Raise UsageError where a checkpoint is one of another model, schedule or data set."""
        cfg = self.cfg
        for name in MODEL_SETTINGS:
            found, expected = state["config"][name], getattr(cfg, name)
            if found != expected:
                raise UsageError(f"{path}: expected a checkpoint of this model, found one with {name} "
                                 f"{found} instead of {expected}; leave out --{name}")
        if state["step"] > cfg.train_steps:
            raise UsageError(f"--train_steps: expected at least the {state['step']} steps of {path}, found "
                             f"{cfg.train_steps}; raise it")
        saved = Config(**state["config"])
        if saved.has_parted(state["step"]) and not cfg.has_parted(state["step"]):
            raise UsageError(f"--untie_stage: expected embedding and head apart, as they are in {path} since "
                             f"step {saved.untie_step}, found a schedule in which they are one until step "
                             f"{cfg.untie_step}; give --untie_stage=0")
        if state["data"] != self.loader.fingerprint and not force_data:
            raise UsageError(f"{path}: expected the training data of its run, fingerprint {state['data']}, "
                             f"found {self.loader.fingerprint}; set --train_files, or go on with other data: "
                             "--force_data")

    def load(self, path: str, state: dict):
        """Go on from a checkpoint. Raises UsageError where its weights and states are others."""
        try:
            self.load_state(state)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            found = " ".join(str(e).split())[:200]
            raise UsageError(f"{path}: expected weights and optimizer states for these settings, found "
                             f"others ({found}); leave out settings that were not changed before, such as "
                             "--optimizer or --dtype") from None
        self.step = self.resumed_at = state["step"]
        if self.cfg.has_parted(self.step) and not Config(**state["config"]).has_parted(self.step):
            self.untie()  # another schedule has done so by now
        self.clock.ms = state["train_ms"]
        self.reached = state["reached"]

    def load_state(self, state: dict):
        self.model.load_state_dict(state["model"])
        if self.muon is not None:
            self.muon.consolidate_state_dict()  # at several ranks nothing else may ask for its groups
            groups = self.muon.state_dict()["param_groups"]
            self.muon.load_state_dict({"state": state["muon"], "param_groups": groups})
        self.adam.load_full_state(state["adam"])
        if self.ngrams is not None:
            self.ngrams.load_full_state(state["ngrams"])
        self.loader.load_state_dict(state["loader"])
        self.ema = None
        if state["ema"]:
            averaged = [(name, p) for name, p in self.model.named_parameters() if name in state["ema"]]
            self.ema = {name: state["ema"][name].to(p.device).view_as(p) for name, p in averaged}
        torch.set_rng_state(state["rng"])


def check_world_size(cfg: Config, world: int) -> None:
    """Raise UsageError unless this many ranks can share a step's tokens evenly."""
    def fits(ranks: int) -> bool:
        if cfg.slices % ranks == 0:
            return True
        parts = all(tokens % ranks == 0 and tokens // ranks >= 16 for tokens in cfg.batch_tokens)
        return ranks % cfg.slices == 0 and parts  # then each sequence is cut

    if not fits(world):
        valid = ", ".join(str(ranks) for ranks in range(1, 257) if fits(ranks))
        raise UsageError(f"world size: expected one of {valid} for {cfg.slices} slices of "
                         f"{min(cfg.batch_tokens):,} tokens per step, found {world}; change --nproc_per_node")


# ------------------------------------------------------------------------------------------------------------
# Main


def train(run: Run, log: Log):
    """Train to the last step. The clock stands still during validation and saving."""
    cfg, clock = run.cfg, run.clock
    folder = Path(cfg.log_dir) / log.run_id
    tokens = sum(cfg.at("batch_tokens", step) for step in range(run.step))
    tried_at = run.step
    path = None  # of the newest checkpoint; None: it could not be written

    gc.collect()
    gc.freeze()  # a collection in mid run need not look at what the warm-up has left, 300,000 objects
    clock.start()
    run.fill_prefixes()
    while True:
        done = run.step == cfg.train_steps
        whole = run.step % cfg.adam_every == 0  # no gradient is half summed up
        due = cfg.save_every and whole and run.step - tried_at >= cfg.save_every
        if due or run.stopping or (done and cfg.save_final):
            with clock.paused():
                path = save(run, log, folder, must=run.stopping)
            tried_at = run.step
        if run.stopping:
            raise Stopped(run.stop.number or signal.SIGINT, f"; go on with --resume={path}")

        if done or (run.step % cfg.val_every == 0 and run.step != run.resumed_at):
            with clock.paused():
                validate(run, log)
            if run.stopping:
                continue  # a signal came meanwhile: save first
            done = done or (cfg.stop_at_target and run.reached is not None)
        if done:
            break

        loss = run.train_step()
        ms = clock.now()
        tokens += cfg.at("batch_tokens", run.step - 1)
        log.train(run.step, cfg.train_steps, ms, loss, 1000 * tokens / ms)

    if cfg.save_final and (path is None or tried_at != run.step):  # it failed, or the target came first
        save(run, log, folder, must=True)
    if run.rt.device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(run.rt.device) // 2**20
        reserved = torch.cuda.max_memory_reserved(run.rt.device) // 2**20
        log.write(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")


def validate(run: Run, log: Log):
    """Evaluate and write the loss down."""
    step, ms = run.step, run.clock.ms
    loss = run.evaluate()
    if loss is None:
        return
    if line := run.startup.end("validation"):
        log.write(line, show=False)
    log.validation(step, run.cfg.train_steps, ms, loss)
    if not math.isfinite(loss):
        raise RunError(f"step {step}: expected a finite validation loss, found {loss}; lower the learning "
                       "rates")


def save(run: Run, log: Log, folder: Path, must: bool) -> Path | None:
    """Write a checkpoint and remove those that are too many. Return its path, or None, with a warning, if it
    cannot be written; RunError where it must be."""
    if run.stopping:
        run.stop.agreed()
    path = folder / f"state_step{run.step:06d}.pt"
    try:
        run.save(path)
    except RunError as e:
        if must:
            raise
        log.write(f"warning: {e}")
        return None
    log.write(f"checkpoint: {path}")
    if run.cfg.keep and run.rt.rank == 0:
        for old in sorted(folder.glob("state_step*.pt"))[: -run.cfg.keep]:
            old.unlink(missing_ok=True)
    return path


def fit_time_budget(run: Run) -> Config:
    """Return the settings of a run with as many steps as its time budget has room for. The run is used up: it
    has taken steps on made-up tokens. All ranks return the same."""
    cfg, rt = run.cfg, run.rt
    run.warm_up()
    stage_ms = torch.tensor([run.time_step(start) for start in cfg.stage_starts], device=rt.device)
    stage_ms = (rt.sum(stage_ms) / rt.world).tolist()

    def plan(steps: int) -> Config:
        return dataclasses.replace(cfg, train_steps=steps)

    def seconds(steps: int) -> float:
        counts = [count for _, count in plan(steps).steps_by_stage]
        return sum(ms * count for ms, count in zip(stage_ms, counts)) / 1000

    shortest = cfg.extension_steps + 1
    if seconds(shortest) > cfg.time_budget:
        raise UsageError(f"--time_budget: expected room for {shortest} steps, which take "
                         f"{seconds(shortest):.1f} s, found {cfg.time_budget:g} s; raise it, or lower "
                         "--extension_steps")
    fitting = bisect.bisect_right(range(10**9), cfg.time_budget, lo=shortest, key=seconds) - 1
    return plan(fitting)


def show_results(run: Run, log: Log):
    """Write the results on rank 0, which may read rows of n-grams that other ranks hold."""
    if run.rt.rank == 0:
        write_results(run, log)
    if run.ngrams is not None:
        finish = run.ngrams.dismiss if run.rt.rank == 0 else run.ngrams.serve
        finish()


def write_results(run: Run, log: Log):
    """Write the loss in bits per byte and some text of the model, where its vocabulary is at hand."""
    try:
        encoding = encoding_for(run.cfg.bos_id, network=False)
    except (ImportError, UsageError):
        return
    bits = run.val_loss / math.log(2) * run.cfg.val_tokens
    log.write(f"bits per byte: {bits / run.validation.num_bytes(encoding):.4f}")
    if not run.cfg.sample_tokens:
        return
    text = "".join(sample_text(next_log_probs(run.model, run.step), encoding, "", run.cfg.sample_tokens))
    log.write("\n".join(f"> {line}" for line in text.splitlines()))


@torch.no_grad()
def check_model(run: Run) -> int:
    """Check causality: other tokens from position t on must not change any loss before t - 1; and that
    probabilities sum to 1. Returns the exit code."""
    cfg, rt, model = run.cfg, run.rt, run.model
    for p in model.parameters():  # parts that start at zero would hide what they see
        p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p))
    if run.ngrams is not None:
        run.ngrams.rows.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    batch = run.loader.next()[0]
    inputs, _, docs = to_device(batch, rt.device)
    t = len(inputs) // docs.slices // 2  # inside a slice
    changed = inputs.clone()
    changed[t:] = (changed[t:] + 1) % cfg.bos_id
    found = []
    for tokens in (inputs, changed):
        ngrams = run.ngrams.read(batch._replace(inputs=tokens)) if run.ngrams is not None else None
        ctx = model.context(docs, cfg.train_steps, ngrams=ngrams)  # the widest windows of training
        found.append(model.log_probs(tokens, ctx))
    a, b = found

    moved = (a[:t] - b[:t]).abs().max().item()
    sees = (a[t:] - b[t:]).abs().max().item()
    total = (a.double().exp().sum(-1) - 1).abs().max().item()
    passed = torch.tensor(float(moved == 0 and total < 1e-4 and sees > 0), device=rt.device)
    ok = rt.sum(passed).item() == rt.world
    rt.print0(f"causality: largest change of a log probability before token {t}: {moved:.1e} (expected 0), "
              f"after it: {sees:.1e}")
    rt.print0(f"probabilities: largest deviation of a sum from 1: {total:.1e} (expected below 1e-4)")
    rt.print0("check: passed" if ok else "check: failed")
    return 0 if ok else 1


def main(argv: list[str], stop: StopSignal) -> int | None:
    options, cfg, state = configure(argv)
    rt = Runtime()
    if rt.world > cfg.slices:
        rt.print0(f"note: {rt.world} ranks share {cfg.slices} sequences per step, so each one is cut to a "
                  "part: other training than at fewer ranks", file=sys.stderr)
    run = Run(cfg, rt, stop)
    gc.enable()
    if options.check:
        return check_model(run)
    if cfg.time_budget and not state:
        cfg = fit_time_budget(run)
        del run  # its memory is needed
        run = Run(cfg, rt, stop)
    if options.dry_run:
        return rt.print0("\n".join([*show_settings(cfg), *run.facts()]))
    if state:  # before a warm-up that may take minutes
        run.check_checkpoint(options.resume, state, options.force_data)
    with rt.together(Log, cfg, rt) as log:
        facts = run.facts()
        if state:
            facts.append(f"resumed: from {options.resume} at step {state['step']}; such a run is no record")
        log.header(cfg, rt, facts)
        run.startup.mark("log")
        for note in run.kernels.fallbacks(cfg):
            rt.print0(f"note: {note}", file=sys.stderr)
        run.warm_up()
        if state:
            run.load(options.resume, state)
            if cfg.seed != state["config"]["seed"]:
                rt.print0("note: --seed has no effect on the weights of a resumed run, which come from the "
                          "checkpoint", file=sys.stderr)
        stop.can_save = cfg.save_every > 0 or cfg.save_final
        train(run, log)
        show_results(run, log)
    rt.print0(f"target: validation loss {cfg.target_loss} (track {cfg.track})")
    if run.reached is None:
        rt.print0("reached: no")
    else:
        step, ms = run.reached
        rt.print0(f"reached: yes, at step {step} after {ms / 1000:.1f} s of training")
    rt.print0(f"log: {log.path}")


if __name__ == "__main__":
    leave(report(main, sys.argv[1:]))
