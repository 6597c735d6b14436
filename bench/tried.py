"""Ideas of upstream's optimization track that the trainer does not have: each a small change of Run, for bench.ablate.

They were tried on track shakespeare and did not pay there (bench/ABLATION.md); elsewhere they may. fp32 weights only.
Source of all: the README and logs of records/track_3_optimization of KellerJordan/modded-nanogpt; EMA-Nesterov is
arXiv 2605.25395, the hyperball constraint is by Kaiyue Wen and others.
"""
from unittest.mock import patch

import torch
from torch import Tensor

import train_gpt
from train_gpt import Config, Run


class LookAhead(Run):
    """EMA-Nesterov: the gradient is taken where the average of past steps leads, weights W + beta lr E, with
    E <- gamma E + (1 - gamma) (last change of W). Between 15 and 80 % of the schedule."""
    beta, gamma = 0.6, 0.97

    def train_step(self):
        weights = list(self.model.parameters())
        with torch.no_grad():
            before = [p.clone() for p in weights]
            if not hasattr(self, "drift"):
                self.drift = [torch.zeros_like(p) for p in weights]
            ahead = 0.15 <= self.step / self.cfg.train_steps < 0.8
            size = self.beta * train_gpt.learning_rate(self.cfg, self.step) * ahead
            for p, e in zip(weights, self.drift):
                p.add_(e, alpha=size)
        super().train_step()  # the step starts there, too, and stays in the next look ahead
        with torch.no_grad():
            for p, e, old in zip(weights, self.drift, before):
                e.lerp_(p - old, 1 - self.gamma)


class PowerCooldown(Run):
    """lr falls like (remaining part of the schedule)^power to the floor of the settings, from a part `flat` of it on."""
    power, flat = 1.2, 0.2

    def factor(self, cfg: Config, step: int) -> float:
        remaining = max(1 - step / (cfg.train_steps - cfg.extension_steps), 0.0)
        return cfg.lr_floor + (1 - cfg.lr_floor) * min(1.0, remaining / (1 - self.flat)) ** self.power

    def update(self, step: int):
        with patch.object(train_gpt, "learning_rate", self.factor):
            super().update(step)


class OtherStep(Run):
    """Another way to apply Muon's direction O to the weights W."""

    def make_optimizers(self):
        super().make_optimizers()
        plain = self.muon._decay_and_step
        self.muon._decay_and_step = lambda W, O, ok, lr, decay, cautious: self.apply(plain, W, O, ok, lr, decay, cautious)


class RowFloor(OtherStep):
    """Each row of O is at least `least` times as long as that of W."""
    least, decays = 0.2, True

    def apply(self, plain, W, O, ok, lr, decay, cautious):
        floor = self.least * W.norm(dim=-1, keepdim=True) / O.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        plain(W, O * floor.clamp(min=1), ok, lr, decay if self.decays else 0.0, cautious)


class Hyperball(OtherStep):
    """W keeps its Frobenius norm and turns by `turn` of it per step, falling linearly to zero; MLP outputs start at a standard
    deviation of 0.03, as zero would stay zero."""
    turn = 0.02

    def __init__(self, cfg, rt):
        super().__init__(cfg, rt)
        with torch.no_grad():
            self.model.mlp_out.normal_(0, 0.03, generator=torch.Generator().manual_seed(cfg.seed))

    def apply(self, plain, W: Tensor, O: Tensor, ok, lr, decay, cautious):
        norm, now = W.norm(dim=(-2, -1), keepdim=True), self.turn * max(1 - self.step / self.cfg.train_steps, 0.02)
        turned = W - now * norm * O / O.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
        W.copy_(turned * norm / turned.norm(dim=(-2, -1), keepdim=True))


def with_(kind: type[Run], **changes) -> type[Run]:
    return type(kind.__name__, (kind,), changes)


TRIED = {  # name -> (kind of run, changed settings)
    "EMA-Nesterov, 0.6, 0.9": (with_(LookAhead, gamma=0.9), ""),
    "EMA-Nesterov, 0.6, 0.97": (LookAhead, ""),
    "power-law cooldown, 1.2 from 20 %": (PowerCooldown, "--lr_floor=0.1"),
    "power-law cooldown, 1.2 from 40 %": (with_(PowerCooldown, flat=0.4), ""),
    "power-law cooldown, 2 from 20 %": (with_(PowerCooldown, power=2.0), "--lr_floor=0.1"),
    "row update floor 0.2": (RowFloor, ""),
    "row update floor 0.38": (with_(RowFloor, least=0.38), ""),
    "row update floor 0.38, no decay": (with_(RowFloor, least=0.38, decays=False), ""),
    "hyperball, 0.02": (Hyperball, ""),
    "hyperball, 0.04": (with_(Hyperball, turn=0.04), ""),
}
