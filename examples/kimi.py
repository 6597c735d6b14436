"""Kimi K2 in small: latent attention, a mixture of experts and MuonClip, on the bytes of Shakespeare.

    python examples/kimi.py                               half a minute on one CPU core
    python examples/kimi.py --lr=0.04 --clip=0            without the clip attention logits explode
    python examples/kimi.py --optimizer=adamw --lr=0.004 --clip=0
    torchrun --nproc_per_node=2 examples/kimi.py          FSDP2; each expert lies whole on one rank

The model has the parts of arXiv 2507.20534: multi-head latent attention without QK-norm, one dense layer and
two sparse ones, each with 8 experts, of which a token takes 2, and one more for all tokens. A bias of the
choice keeps experts busy (arXiv 2408.15664), not a loss. Muon moves the hidden matrices, with decay and with
updates of AdamW's size (arXiv 2502.16982), so that one learning rate serves it and AdamW, which moves the
rest. Heads whose logits are above --clip are scaled back. One rank and two train to the same bits.

A line tells the mean loss and the largest logit since the last line, the heads clipped, busiest and idlest
expert (1: a fair share of the tokens), and how often the loss has jumped. A logit is the log-sum-exp that
attention computes anyway, at most ln T above the largest. bench/MUONCLIP.md has figures.

Legend: B sequences, T tokens of each, C width, H heads, E experts, L layers.
"""
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # as a script, Python looks for modules in examples/ only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Idle OpenMP threads soon sleep: with two of them a step takes many times as long once another program works.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from data import shakespeare
from data.errors import RunError
from data.shards import open_shard
from engine.endings import StopSignal, leave, report
from engine.ranks import Runtime
from engine.settings import POSITIVE, SEED, ZERO_OR_MORE, one_of, setting
from engine.settings import check_rules, parse_settings, require
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
SEQUENCES = 16                  # of a micro-batch
VAL_SEQUENCES = 1024
PRINT_EVERY = 10


@dataclass(frozen=True)
class KimiSettings:
    optimizer: str = setting("muon", "optimizer of the hidden matrices", one_of("muon", "adamw"))
    lr: float = setting(0.01, "highest learning rate of both optimizers", POSITIVE)
    clip: float = setting(15.0, "tau, the largest logit; 0: no clip", ZERO_OR_MORE)
    steps: int = setting(200, "optimizer steps", POSITIVE)
    micro_batches: int = setting(2, f"batches of {SEQUENCES} x {T} tokens in a step of all ranks", POSITIVE)
    seed: int = setting(0, "seed of the first weights and of the batches", SEED)

    def __post_init__(self):
        check_rules(self)


# ------------------------------------------------------------------------------------------------------------
# The model


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary(x: Tensor) -> Tensor:
    """Turn pairs of channels of x (..., T, d) by angles that grow with the position."""
    half = x.size(-1) // 2
    angles = torch.arange(x.size(-2))[:, None] * 100 ** -(torch.arange(half) / half)
    cos = angles.cos()
    sin = angles.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


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
        gate = F.silu(x @ self.gate[e].T)
        return (gate * (x @ self.up[e].T)) @ self.down[e].T


class Mixture(nn.Module):
    """One expert for all tokens, and for each token the TOP of E others with the highest scores."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(C, E, bias=False)
        self.shared = Experts(1, EXPERT_HIDDEN)
        self.routed = Experts(E, EXPERT_HIDDEN)
        self.register_buffer("bias", torch.zeros(E))  # moves the choice, not the weights of the mixture
        self.register_buffer("load", torch.zeros(E))  # tokens of the step

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
        if torch.is_grad_enabled():
            self.load += chosen.flatten().bincount(minlength=E)
        return y

    def balance(self, rt: Runtime) -> Tensor:
        """Make experts with less than a fair share of the tokens easier to choose. Return the shares (E,)."""
        share = rt.sum(self.load) / self.load.mean()
        self.bias += BALANCE_RATE * (1 - share).sign()
        self.load.zero_()
        return share


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

    def forward(self, tokens: Tensor, meter: LogitMeter) -> Tensor:
        """Return the mean loss of tokens (B, T + 1), and let the meter see the logits."""
        x = norm(self.embedding(tokens[:, :-1]))
        for layer, block in enumerate(self.blocks):
            x, lse = block(x)
            meter.add_lse(layer, lse)
        logits = self.head(norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# ------------------------------------------------------------------------------------------------------------
# Training


def make_optimizers(model: Kimi, s: KimiSettings) -> list[torch.optim.Optimizer]:
    adamw = dict(lr=s.lr, betas=(0.9, 0.95), weight_decay=0.1)
    if s.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    hidden, rest = split_params(model, verbose=False)
    muon = FsdpMuon(hidden, lr=s.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw",
                    ns_dtype=torch.float32, deterministic=True)
    return [muon, torch.optim.AdamW(rest, **adamw)]


def clip(model: Kimi, s_max: Tensor, tau: float) -> int:
    """Scale heads with logits above tau, s_max (L, H), back. Return how many there were."""
    clipped = 0
    for block, s in zip(model.blocks, s_max):
        attention = block.attention
        gamma = mla_qk_clip_(attention.q_up.weight, attention.kv_up.weight, s, NOPE, ROPE, tau)
        clipped += (gamma < 1).sum().item()
    return clipped


def micro_batches(tokens: Tensor, starts: Tensor, rt: Runtime) -> list[Tensor]:
    """Cut windows of T + 1 tokens at some positions. Return this rank's share, in micro-batches."""
    windows = tokens[starts[:, None] + torch.arange(T + 1)].long()
    return windows.split(SEQUENCES)[rt.rank::rt.world]


def mean_loss(model: Kimi, parts: list[Tensor], meter: LogitMeter, rt: Runtime) -> float:
    """Return the mean loss of all ranks' micro-batches, and add to the gradients unless they are off."""
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        loss = model(part, meter) / len(parts)
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.detach()
    return rt.sum(total).item() / rt.world


def jumped(losses: list[float]) -> bool:
    """Tell whether the last loss is 6 deviations above the mean of the 32 before it."""
    *before, last = losses[-33:]
    return len(before) == 32 and last > statistics.mean(before) + 6 * statistics.stdev(before)


def train(s: KimiSettings, rt: Runtime, text: Tensor, val: Tensor) -> None:
    torch.manual_seed(s.seed)
    draws = torch.Generator().manual_seed(s.seed)
    model = Kimi()
    if rt.world > 1:
        mesh = init_device_mesh("cpu", (rt.world,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    optimizers = make_optimizers(model, s)
    meter = LogitMeter(L, H)
    losses = []
    logits = []
    spikes = 0

    for step in range(1, s.steps + 1):
        # The rate rises over 10 steps and falls to 0 over the last 30 %.
        lr = s.lr * min(1, step / 10, (s.steps - step + 1) / (0.3 * s.steps))
        starts = torch.randint(len(text) - T, (s.micro_batches * SEQUENCES,), generator=draws)
        parts = micro_batches(text, starts, rt)
        clipped = 0
        if s.clip:
            # Kimi K2 clips after a step, by the logits before it. At our high rate a step moves them by as
            # much as a half, so we look at the batch that comes next: one more forward pass.
            with torch.no_grad():
                mean_loss(model, parts, meter, rt)
            clipped = clip(model, meter.take(), s.clip)

        losses.append(mean_loss(model, parts, meter, rt))
        logits.append(meter.take().max().item())
        if not math.isfinite(losses[-1]):
            raise RunError(f"step {step}: expected a finite loss, found {losses[-1]}; lower --lr")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        share = torch.stack([block.mlp.balance(rt) for block in model.blocks[1:]])

        spikes += jumped(losses)
        if step % PRINT_EVERY == 0 or step == s.steps:
            rt.print0(f"step:{step}/{s.steps} loss:{statistics.mean(losses[-PRINT_EVERY:]):.4f} "
                      f"logit:{max(logits[-PRINT_EVERY:]):.1f} clipped:{clipped}/{L * H} "
                      f"busiest:{share.max():.2f} idlest:{share.min():.2f} spikes:{spikes}")

    parts = micro_batches(val, torch.arange(VAL_SEQUENCES) * T, rt)
    with torch.no_grad():
        val_loss = mean_loss(model, parts, meter, rt)
    rt.print0(f"val_loss:{val_loss:.5f} spikes:{spikes} cpu_seconds:{time.process_time():.0f}")


def main(argv: list[str], stop: StopSignal | None = None) -> None:
    _, changes = parse_settings(KimiSettings, argv, __doc__, {})
    s = KimiSettings(**changes)
    rt = Runtime(cpu=True)
    require(s, "micro_batches", f"a multiple of the {rt.world} ranks", s.micro_batches % rt.world == 0)
    folder = rt.together(shakespeare.ensure)
    text, val = (torch.from_numpy(open_shard(folder / name).astype("int16"))
                 for name in (shakespeare.TRAIN, shakespeare.VAL))
    rt.print0(*(f"{name}={value}" for name, value in asdict(s).items()), f"ranks={rt.world}")
    train(s, rt, text, val)


if __name__ == "__main__":
    leave(report(main, sys.argv[1:], "kimi.py"))
