"""Kimi K2 in small: latent attention, a mixture of experts and MuonClip, on the bytes of Shakespeare.

    python examples/kimi.py                               25 seconds on one CPU core
    python examples/kimi.py --lr=0.04 --clip=off          attention logits explode
    python examples/kimi.py --optimizer=adamw --lr=0.004
    torchrun --nproc_per_node=2 examples/kimi.py          FSDP2; each expert lies whole on one rank

The model has the parts of arXiv 2507.20534: multi-head latent attention without QK-norm, one dense layer and
two sparse ones, each with 8 experts, of which a token takes 2, and one more for all tokens. A bias of the
choice keeps experts busy (arXiv 2408.15664), not a loss. Muon moves the hidden matrices, with decay and with
updates of AdamW's size (arXiv 2502.16982), so that one learning rate serves it and AdamW, which moves the
rest. After each step, heads whose logits went above --clip are scaled back.

A line tells, of the steps since the last one: mean loss, largest logit, heads that were clipped, busiest and
idlest expert (1: a fair share of the tokens), and how often the loss has jumped so far. The logit is the
log-sum-exp that attention computes anyway, at most ln T above the largest logit. bench/MUONCLIP.md has
figures.

Legend: B sequences, T tokens of each, C width, H heads, E experts, L layers.
"""
import argparse
import math
import os
import statistics
import sys
import time
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

if __name__ == "__main__":  # as a script, Python looks for modules in examples/ only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data import shakespeare
from data.errors import RunError, UsageError, run_program
from data.shards import open_shard
from muon_extras.fsdp import FsdpMuon
from muon_extras.qk_clip import LogitMeter, mla_qk_clip_
from muon_extras.split_params import split_params

VOCABULARY = 257                # bytes, and a mark before each document
T, C, H, L = 64, 96, 4, 3
Q_RANK, KV_RANK = 48, 32        # widths of the latents
NOPE, ROPE, VALUE = 16, 8, 16   # channels of a head: content, position, value
E, TOP = 8, 2
DENSE_HIDDEN, EXPERT_HIDDEN = 256, 64
BALANCE_RATE = 0.03             # a step of an expert's bias towards its fair share
VAL_SEQUENCES = 1024
PRINT_EVERY = 10


# ----------------------------------------------------------------------------------------------------------
# The model


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary(x: Tensor) -> Tensor:
    """Turn pairs of channels of x (..., T, d) by angles that grow with the position."""
    half = x.size(-1) // 2
    angles = torch.arange(x.size(-2))[:, None] * 100 ** -(torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Attention(nn.Module):
    """Multi-head latent attention: queries come from one narrow latent, keys and values from another.
    Position has channels of its own, whose key all heads share."""

    def __init__(self):
        super().__init__()
        self.q_down = nn.Linear(C, Q_RANK, bias=False)
        self.q_up = nn.Linear(Q_RANK, H * (NOPE + ROPE), bias=False)
        self.kv_down = nn.Linear(C, KV_RANK + ROPE, bias=False)
        self.kv_up = nn.Linear(KV_RANK, H * (NOPE + VALUE), bias=False)
        self.out = nn.Linear(H * VALUE, C, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, T, C), and the log-sum-exp of each query's logits (B, H, T)."""
        q = self.q_up(norm(self.q_down(x))).unflatten(-1, (H, -1)).transpose(1, 2)
        q_content, q_position = q.split([NOPE, ROPE], -1)

        latent, k_position = self.kv_down(x).split([KV_RANK, ROPE], -1)
        kv = self.kv_up(norm(latent)).unflatten(-1, (H, -1)).transpose(1, 2)
        k_content, v = kv.split([NOPE, VALUE], -1)

        logits = q_content @ k_content.mT + rotary(q_position) @ rotary(k_position)[:, None].mT
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
        logits = (logits * (NOPE + ROPE)**-0.5).masked_fill(future, -math.inf)
        lse = logits.logsumexp(-1)  # attention kernels return it as well
        y = (logits - lse[..., None]).exp() @ v
        return self.out(y.transpose(1, 2).flatten(2)), lse


class Experts(nn.Module):
    """Banks of SwiGLU networks."""

    def __init__(self, number: int, hidden: int):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(number, hidden, C) * C**-0.5)
        self.up = nn.Parameter(torch.randn(number, hidden, C) * C**-0.5)
        self.down = nn.Parameter(torch.zeros(number, C, hidden))

    def forward(self, x: Tensor, e: int = 0) -> Tensor:
        return (F.silu(x @ self.gate[e].T) * (x @ self.up[e].T)) @ self.down[e].T


class Mixture(nn.Module):
    """One expert for all tokens, and for each token the TOP of E others with the highest scores."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(C, E, bias=False)
        self.shared = Experts(1, EXPERT_HIDDEN)
        self.routed = Experts(E, EXPERT_HIDDEN)
        self.register_buffer("bias", torch.zeros(E))  # moves the choice, not the weights of the mixture
        self.register_buffer("load", torch.zeros(E))  # tokens since the last step

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        scores = self.router(x).sigmoid()
        chosen = (scores + self.bias).topk(TOP).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True)

        y = self.shared(x)
        for e in range(E):
            token, place = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, weights[token, place, None] * self.routed(x[token], e))
        self.load += chosen.flatten().bincount(minlength=E)
        return y


class Block(nn.Module):
    def __init__(self, dense: bool):
        super().__init__()
        self.attention = Attention()
        self.mlp = Experts(1, DENSE_HIDDEN) if dense else Mixture()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, lse = self.attention(norm(x))
        x = x + y
        return x + self.mlp(norm(x)).view_as(x), lse


class Kimi(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, C)
        self.blocks = nn.ModuleList([Block(dense=layer == 0) for layer in range(L)])
        self.head = nn.Linear(C, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """tokens: (B, T + 1). Return the mean loss, and the log-sum-exps of each layer (B, H, T)."""
        x = norm(self.embedding(tokens[:, :-1]))
        lses = []
        for block in self.blocks:
            x, lse = block(x)
            lses.append(lse.detach())
        logits = self.head(norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), lses


# ----------------------------------------------------------------------------------------------------------
# The optimizer, and what follows each of its steps


def optimizers_of(model: Kimi, s: argparse.Namespace) -> list[torch.optim.Optimizer]:
    adamw = dict(lr=s.lr, betas=(0.9, 0.95), weight_decay=0.1)
    if s.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    hidden, rest = split_params(model, verbose=False)
    muon = FsdpMuon(hidden, lr=s.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw",
                    ns_dtype=torch.float32, deterministic=s.exact)
    return [muon, torch.optim.AdamW(rest, **adamw)]


def rate_at(step: int, steps: int) -> float:
    """Return the factor on the learning rate: up over 10 steps, down to 0 over the last 30 %."""
    return min(1, step / 10, (steps - step + 1) / (0.3 * steps))


def clip(model: Kimi, s_max: Tensor, tau: float | None) -> Tensor:
    """Scale heads with logits above tau. s_max: (L, H). Return which heads were scaled (L, H)."""
    if tau is None:
        return torch.zeros_like(s_max, dtype=torch.bool)
    gammas = []
    for block, s in zip(model.blocks, s_max):
        attention = block.attention
        gammas.append(mla_qk_clip_(attention.q_up.weight, attention.kv_up.weight, s, NOPE, ROPE, tau))
    return torch.stack(gammas) < 1


def balance(model: Kimi) -> Tensor:
    """Make experts with less than a fair share of the tokens easier to choose. Return loads (L - 1, E)."""
    mixtures = [block.mlp for block in model.blocks if isinstance(block.mlp, Mixture)]
    load = torch.stack([mixture.load for mixture in mixtures])
    if dist.is_initialized():
        dist.all_reduce(load)
    for mixture, tokens in zip(mixtures, load):
        mixture.bias += BALANCE_RATE * (tokens.mean() - tokens).sign()
        mixture.load.zero_()
    return load


class Watch:
    """What has happened since the last line, and how often the loss has jumped so far: to 6 deviations above
    the mean of the 32 steps before."""

    def __init__(self):
        self.recent = deque(maxlen=32)
        self.spikes = 0
        self.steps = []

    def note(self, loss: float, s_max: Tensor, clipped: Tensor, load: Tensor) -> None:
        if len(self.recent) == self.recent.maxlen:
            limit = statistics.mean(self.recent) + 6 * statistics.stdev(self.recent)
            self.spikes += loss > limit
        self.recent.append(loss)
        self.steps.append((loss, s_max.max().item(), clipped, load))

    def line(self) -> str:
        losses, logits, clipped, loads = zip(*self.steps)
        self.steps = []
        heads = torch.stack(clipped).any(0)
        load = torch.stack(loads).sum(0)
        share = load / load.mean(1, keepdim=True)
        return (f"loss:{statistics.mean(losses):.4f} logit:{max(logits):.1f} "
                f"clipped:{heads.sum()}/{heads.numel()} "
                f"busiest:{share.max():.2f} idlest:{share.min():.2f} spikes:{self.spikes}")


# ----------------------------------------------------------------------------------------------------------
# Training


def windows(tokens: Tensor, starts: Tensor) -> Tensor:
    """Return this rank's share of the windows of T + 1 tokens that begin at some positions."""
    if dist.is_initialized():
        starts = starts.view(dist.get_world_size(), -1)[dist.get_rank()]
    return tokens[starts[:, None] + torch.arange(T + 1)].long()


def mean_over_ranks(x: Tensor) -> float:
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x.item()


def build(s: argparse.Namespace) -> Kimi:
    torch.manual_seed(s.seed)
    model = Kimi().to(torch.float64 if s.exact else torch.float32)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    return model


def train(s: argparse.Namespace) -> None:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    speaks = not dist.is_initialized() or dist.get_rank() == 0
    folder = shakespeare.ensure()
    text, val = (torch.from_numpy(open_shard(folder / name).astype("int16"))
                 for name in (shakespeare.TRAIN, shakespeare.VAL))
    draws = torch.Generator().manual_seed(s.seed)
    model = build(s)
    optimizers = optimizers_of(model, s)
    meter = LogitMeter(L, H)
    watch = Watch()
    if speaks:
        named = {**vars(s), "clip": s.clip or "off", "ranks": ranks}
        print(*(f"{name}={value}" for name, value in named.items()))

    for step in range(1, s.steps + 1):
        starts = torch.randint(len(text) - T, (s.sequences,), generator=draws)
        loss, lses = model(windows(text, starts))
        loss.backward()
        for layer, lse in enumerate(lses):
            meter.add_lse(layer, lse)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = s.lr * rate_at(step, s.steps)
            optimizer.step()
            optimizer.zero_grad()
        s_max = meter.take()
        clipped = clip(model, s_max, s.clip)

        mean_loss = mean_over_ranks(loss)
        if not math.isfinite(mean_loss):
            raise RunError(f"step {step}: expected a finite loss, found {mean_loss}; lower --lr")
        watch.note(mean_loss, s_max, clipped, balance(model))
        if speaks and (step % PRINT_EVERY == 0 or step == s.steps):
            print(f"step:{step}/{s.steps} {watch.line()}", flush=True)

    with torch.no_grad():
        starts = torch.arange(VAL_SEQUENCES // ranks * ranks) * T
        val_loss = mean_over_ranks(model(windows(val, starts))[0])
    if speaks:
        print(f"val_loss:{val_loss:.5f} spikes:{watch.spikes} cpu_seconds:{time.process_time():.0f}")


def threshold(text: str) -> float | None:
    try:
        return None if text == "off" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or off, found {text}") from None


def parse(argv: list[str], ranks: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kimi.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=0.01, help="the highest rate, of both optimizers")
    parser.add_argument("--clip", type=threshold, default=15.0, metavar="TAU",
                        help="the largest logit, or off")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=32, help=f"of {T} tokens, in a step of all ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the batches")
    parser.add_argument("--exact", action="store_true", help="so many digits that any number of ranks agrees")
    s = parser.parse_args(argv)
    for what, holds, found in (
            ("--lr above 0", 0 < s.lr < math.inf, s.lr),
            ("--clip above 0, or off", s.clip is None or 0 < s.clip < math.inf, s.clip),
            ("--steps of 1 or more", s.steps >= 1, s.steps),
            (f"--sequences to be shared by {ranks} ranks", s.sequences >= 1 and s.sequences % ranks == 0,
             s.sequences)):
        if not holds:
            raise UsageError(f"expected {what}, found {found}; change the command")
    return s


def main(argv: list[str]) -> None:
    settings = parse(argv, int(os.environ.get("WORLD_SIZE", 1)))
    if not dist.is_torchelastic_launched():
        return train(settings)
    dist.init_process_group("gloo")
    try:
        train(settings)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "kimi.py"))
