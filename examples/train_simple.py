"""The optimization track: the fewest steps to a validation loss of 3.28, whatever a step costs.

    torchrun --standalone --nproc_per_node=8 examples/train_simple.py    FineWeb, on 1, 2, 4 or 8 GPUs
    python examples/train_simple.py                                      no GPU: a miniature on Shakespeare
    python -m records check --track=optimization logs                    are (3.28 - mean) sqrt(n) >= 0.004?

Fixed by the track: 524,288 tokens a step in the order of the files, in blocks of 1024 (data/blocks.py); the
model; one forward and backward pass a step; the validation. Free, and what you edit: the first weights, the
optimizer, its settings and schedules. A run must not decide anything by its own validation loss. There are no
checkpoints: a run that goes on from one does not count, and no optimizer that you try has to be saved.

The track is public: https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization.
The numbers are those of its tuned baseline, result 36, which took 3,250 steps (n = 10) there. This file has
not run on FineWeb or on a GPU yet. The miniature ended at 1.767 with seed 0, after 1 minute 55 seconds on one
core of an AMD EPYC.

Legend: B sequences, T tokens of each, C width, H heads, D channels of a head, V vocabulary.
"""
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as a script, Python looks for modules in examples/ only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Idle OpenMP threads soon sleep: with two of them a step takes many times as long once another program works.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import shakespeare
from data.blocks import Blocks
from data.errors import RunError
from data.loader import fingerprint
from engine.clock import Clock
from engine.endings import StopSignal, leave, report
from engine.log import Log
from engine.ranks import Runtime
from engine.settings import POSITIVE, SEED, check_rules, one_of, parse_settings, require, setting
from muon import Muon

SOURCES = ("examples/train_simple.py", "muon.py", "data/blocks.py", "data/shards.py")  # what the log embeds


@dataclass(frozen=True)
class SimpleSettings:
    """The defaults are the track's; MINIATURE changes what a CPU needs smaller."""
    track: str = setting("optimization", "optimization, or a miniature of it for CPUs",
                         one_of("optimization", "miniature"))
    optimizer: str = setting("muon", "optimizer of the matrices inside the blocks", one_of("muon", "adamw"))
    train_steps: int = setting(3250, "optimizer steps", POSITIVE)
    seed: int = setting(0, "seed of the first weights", SEED)
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "shards below DATA_PATH, read in order")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "validation shards, likewise")
    batch_tokens: int = setting(524_288, "tokens of a step, over all ranks", POSITIVE)
    seq_len: int = setting(1024, "tokens of a block", POSITIVE)
    micro_blocks: int = setting(64, "most blocks of a forward pass", POSITIVE)
    val_tokens: int = setting(10_485_760, "tokens of a validation", POSITIVE)
    val_every: int = setting(125, "steps between validations", POSITIVE)
    vocab_size: int = setting(50_304, "rows of embedding and head", POSITIVE)
    num_layers: int = setting(12, "blocks", POSITIVE)
    model_dim: int = setting(768, "channels", POSITIVE)
    head_dim: int = setting(128, "channels of a head", POSITIVE)
    target_loss: float = setting(3.28, "validation loss to reach, nats per token", POSITIVE)
    log_dir: str = setting("logs", "folder of the logs")
    wandb: str = setting("", "project at Weights & Biases, where the run is followed as well")

    def __post_init__(self):
        check_rules(self)
        require(self, "head_dim", "a multiple of 4", self.head_dim % 4 == 0)
        for name, unit in (("model_dim", "head_dim"), ("batch_tokens", "seq_len"), ("val_tokens", "seq_len")):
            part = getattr(self, unit)
            require(self, name, f"a multiple of {unit}, {part}", getattr(self, name) % part == 0)


MINIATURE = dict(
    track="miniature", train_steps=300, train_files="data/shakespeare/shakespeare_train_*.bin",
    val_files="data/shakespeare/shakespeare_val_*.bin", batch_tokens=4096, seq_len=128, val_tokens=65_536,
    val_every=50, vocab_size=257, num_layers=4, model_dim=128, head_dim=32, target_loss=1.8)


# ------------------------------------------------------------------------------------------------------------
# Model: fixed. Weights are fp32; activations have the dtype of the embedding


class GainNorm(nn.Module):
    """RMSNorm with a gain for each channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), weight=self.gains.type_as(x))


class BiasedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x), self.bias.type_as(x))


def rotate(x_BTHD: Tensor) -> Tensor:
    """Turn channel i of the first quarter with its partner half a head further by an angle that grows with
    the position; the others stay."""
    T, D = x_BTHD.size(1), x_BTHD.size(3)
    frequencies = (1 / 1024) ** torch.linspace(0, 1, D // 4, device=x_BTHD.device)
    angles = torch.outer(torch.arange(T, device=x_BTHD.device).float(), F.pad(frequencies, (0, D // 4)))
    cos = angles.cos()[:, None]
    sin = angles.sin()[:, None]
    x1, x2 = x_BTHD.float().chunk(2, dim=3)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=3).type_as(x_BTHD)


class PlainAttention(nn.Module):
    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (BiasedLinear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        q, k = (rotate(F.rms_norm(each, (self.head_dim,))) for each in (q, k))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                           is_causal=True, scale=0.12)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class PlainBlock(nn.Module):
    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.norm1 = GainNorm(dim)
        self.attention = PlainAttention(dim, head_dim)
        self.norm2 = GainNorm(dim)
        self.fc = BiasedLinear(dim, 4 * dim)
        self.proj = BiasedLinear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.proj(self.fc(self.norm2(x)).relu().square())


class PlainGPT(nn.Module):
    def __init__(self, cfg: SimpleSettings):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.norm1 = GainNorm(cfg.model_dim)
        self.blocks = nn.ModuleList(PlainBlock(cfg.model_dim, cfg.head_dim) for _ in range(cfg.num_layers))
        self.norm2 = GainNorm(cfg.model_dim)
        self.proj = BiasedLinear(cfg.model_dim, cfg.vocab_size)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the cross entropies of all tokens, in nats. inputs, targets: (B, T)."""
        x = self.norm1(self.embed(inputs))
        for block in self.blocks:
            x = block(x)
        logits = self.proj(self.norm2(x)).float()
        logits = 15 * logits * (logits.square() + 15**2).rsqrt()  # between -15 and 15
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


# ------------------------------------------------------------------------------------------------------------
# First weights, optimizers, schedule: yours. The numbers are those of public result 36


@torch.no_grad()
def init_weights(model: PlainGPT) -> None:
    for name, p in model.named_parameters():
        if name.endswith("gains"):
            p.fill_(1)
        elif name.endswith("bias") or "proj" in name:
            p.zero_()
        elif "embed" in name:
            p.normal_()
        else:
            p.normal_(std=math.sqrt(0.33 / p.size(1)))


def make_optimizers(model: PlainGPT, cfg: SimpleSettings) -> list[torch.optim.Optimizer]:
    """Return optimizers that own every parameter once. Gradients are sums over the tokens of a step."""
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    groups = [dict(params=[model.embed.weight], lr=0.7),
              dict(params=[model.proj.weight], lr=0.004),
              dict(params=[p for p in model.parameters() if p.ndim < 2], lr=0.015)]
    if cfg.optimizer == "adamw":
        groups.append(dict(params=hidden, lr=0.0015, betas=(0.9, 0.95)))  # result 2, but for its warm-up
    optimizers = [torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001)]
    if cfg.optimizer == "muon":
        # Twelve steps of a polynomial that converges: a step's cost does not count here.
        optimizers.append(Muon(hidden, lr=0.025, weight_decay=0.05, momentum=0.95,
                               ns_coefficients=(2, -1.5, 0.5), ns_steps=12, adjust_lr_fn="original"))

    owned = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) and set(owned) == set(model.parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["first_lr"] = group["lr"]
    return optimizers


def rate_at(step: int, steps: int) -> float:
    """Return the factor on all learning rates: 1 for three tenths of the steps, then straight to 0."""
    return min(1.0, (1 - step / steps) / 0.7)


# ------------------------------------------------------------------------------------------------------------
# Run


class SimpleRun:
    """Model and optimizers on this rank; every rank ends each step with the same weights."""

    def __init__(self, cfg: SimpleSettings, rt: Runtime):
        self.cfg = cfg
        self.rt = rt
        torch.manual_seed(cfg.seed)
        self.model = PlainGPT(cfg)
        init_weights(self.model)
        self.model.to(rt.device)
        if rt.device.type == "cuda":
            self.model.embed.bfloat16()
            self.model.compile(dynamic=False)
        self.optimizers = make_optimizers(self.model, cfg)

    def mean_loss(self, batch: tuple[Tensor, Tensor]) -> float:
        """Return the loss in nats per token of all ranks. Unless gradients are off, add its sum's to them."""
        total = torch.zeros((), device=self.rt.device, dtype=torch.float64)
        for inputs, targets in zip(*(part.split(self.cfg.micro_blocks) for part in batch)):
            loss = self.model(inputs, targets)
            if torch.is_grad_enabled():
                loss.backward()
            total += loss.detach()
        return self.rt.sum(total).item() / (self.rt.world * batch[0].numel())

    def train_step(self, batch: tuple[Tensor, Tensor], step: int) -> float:
        """Take one step. Return its training loss."""
        loss = self.mean_loss(batch)
        for p in self.model.parameters():
            self.rt.sum(p.grad)  # the loss is a sum over tokens, so ranks add, too
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["first_lr"] * rate_at(step, self.cfg.train_steps)
            optimizer.step()
            optimizer.zero_grad()
        return loss


def train(run: SimpleRun, log: Log, blocks: Blocks, validation: tuple[Tensor, Tensor]) -> None:
    """Take all steps. The clock, which the track does not ask for, stands still during validation."""
    steps = run.cfg.train_steps
    batches = iter(blocks)
    clock = Clock(run.rt.synchronize)
    clock.start()
    for step in range(steps + 1):
        if step % run.cfg.val_every == 0 or step == steps:
            with clock.paused(), torch.no_grad():
                val_loss = run.mean_loss(validation)
                log.validation(step, steps, clock.ms, val_loss)
        if step == steps:
            break
        loss = run.train_step(next(batches), step)
        ms = clock.now()
        log.train(step + 1, steps, ms, loss, 1000 * (step + 1) * run.cfg.batch_tokens / ms)
        if not math.isfinite(loss):
            raise RunError(f"step {step + 1}: expected a finite training loss, found {loss}; lower the rates")
    reached = "reached" if val_loss <= run.cfg.target_loss else "not reached"
    run.rt.print0(f"validation loss {run.cfg.target_loss:g}: {reached}\nlog: {log.path}")


def main(argv: list[str], stop: StopSignal) -> None:
    _, changes = parse_settings(SimpleSettings, argv, __doc__, {})
    track = changes.get("track", "optimization" if torch.cuda.is_available() else "miniature")
    cfg = SimpleSettings(**(MINIATURE if track == "miniature" else {}) | changes)
    rt = Runtime()
    if cfg.train_files == MINIATURE["train_files"]:
        rt.together(lambda: shakespeare.ensure() if rt.rank == 0 else None)
    blocks = Blocks(cfg.train_files, cfg.batch_tokens, cfg, rt)
    blocks.expect(cfg.train_steps, "train_steps")
    judge = Blocks(cfg.val_files, cfg.val_tokens, cfg, rt)
    judge.expect(1, "val_tokens")
    facts = [
        f"training data: {cfg.train_steps * cfg.batch_tokens:,} tokens from {len(blocks.paths)} shards, "
        f"fingerprint {fingerprint(blocks.paths)}",
        f"validation data: first {cfg.val_tokens} tokens, sha256 {judge.sha256()}",
    ]
    with rt.together(Log, cfg, rt) as log:
        log.header(cfg, rt, facts, SOURCES)
        train(SimpleRun(cfg, rt), log, blocks, next(iter(judge)))


if __name__ == "__main__":
    leave(report(main, sys.argv[1:], "train_simple.py"))
