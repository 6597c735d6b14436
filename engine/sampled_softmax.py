"""A softmax whose sum goes over the target and a sample of the vocabulary.

Shapes: R rows of the head in a sample, K targets of a position.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Sample(NamedTuple):
    """Rows of the head that stand for all of them in the sums of a loss."""
    ids: Tensor  # (R,) distinct tokens
    log_weights: Tensor  # (R,) fp32: of how many tokens each one stands for


def draw_sample(padded_vocab: int, rows: int, key: tuple[int, ...], device: torch.device) -> Sample:
    """Return a sample that the key, numbers of zero or more, decides: the same on every device.

    Half of it are the first tokens, which in a vocabulary of byte pairs are about the most frequent ones and
    stand for themselves. The others are drawn from the rest, alike and without replacement. Rows of padding
    are drawn as well: validation sums over them, and only what is drawn learns to be unlikely.
    """
    first = rows // 2
    drawn = rows - first
    rest = padded_vocab - first
    generator = np.random.default_rng(key)
    chosen = generator.choice(rest, drawn, replace=False)
    ids = torch.from_numpy(np.append(np.arange(first), first + chosen))
    if device.type == "cuda":
        ids = ids.pin_memory()  # else the copy would make the host wait
    ids = ids.to(device, non_blocking=True)

    log_weight = math.log(rest / drawn)
    itself = torch.zeros(first, device=device)
    several = torch.full((drawn,), log_weight, device=device)
    return Sample(ids, torch.cat([itself, several]))


def sampled_loss_and_gradient(logits: Tensor, own: Tensor, sample: Sample, ahead: Tensor, weights: Tensor,
                              cap) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss of some tokens and its gradients of logits and own, all fp32.

    logits: (tokens, R) of the sample, own: (tokens, K) of the targets, both before the cap; ahead, weights:
    (tokens, K) targets and their weights. A target counts by its own logit, and a row of the sample that is
    the target not at all, instead of being taken off the sum again. No w exp(z) is larger than the sum that
    it is in, so that gradients are bounded as those of the whole softmax are.
    """
    z, slope = capped(logits, cap)
    z_own, slope_own = capped(own, cap)
    z = z + sample.log_weights

    loss = 0.0
    g = 0.0
    g_own = []
    for k, weight in enumerate(weights.unbind(1)):
        is_target = sample.ids == ahead[:, k, None]
        others = torch.where(is_target, -math.inf, z)
        log_rest = torch.logsumexp(others, -1)
        log_total = torch.logaddexp(log_rest, z_own[:, k])
        loss = loss + (weight * (log_total - z_own[:, k])).sum()
        # Not by the exponentials that the sum has seen: torch.compile would store them.
        g = g + weight[:, None] * torch.exp(others - log_total[:, None])
        g_own.append(-weight * torch.exp(log_rest - log_total))
    g_own = torch.stack(g_own, 1)
    return loss, g * slope, g_own * slope_own


def capped(logits: Tensor, cap: tuple[float, ...]) -> tuple[Tensor, Tensor | float]:
    """Return the softcap of logits, fp32, and its slope A / C s (1 - s)."""
    if not cap:
        return logits.float(), 1.0
    A, B, C = cap
    s = torch.sigmoid((logits.float() + B) / C)
    return A * s, (1 - s).mul_(s).mul_(A / C)
