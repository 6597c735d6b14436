"""Factors that small networks set for each token anew, instead of one learned number for all of them.

    f(x) = s (W2 gelu(W1 x) + b)

W1 is (64, D); W2 starts at zero, so that every factor begins as the constant s b, whatever the token. Two
kinds of such networks exist: gates (public record 85) look at the stream in a few places and set factors of
the layers from there on; connections (MUDD, public record 81, arXiv 2502.12170) mix early streams into the
last layer and into what the head reads.

Shapes: T tokens, D model width, H heads.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = 64
SCALE = 0.1  # s of the connections, and of the gates at the start
GATE_START = 0.25  # of a head's output
SKIP_START = 0.5


class Slot(NamedTuple):
    """One output of a network of gates: `width` factors of one kind, a field of LayerWeights."""
    layer: int
    kind: str
    width: int
    start: float


def small_network(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, scale: Tensor | float) -> Tensor:
    """Return scale * (w_out gelu(w_in x) + bias), (T, outputs). x: (T, D)."""
    w_in, w_out, bias = (w.type_as(x) for w in (w_in, w_out, bias))
    hidden = F.gelu(F.linear(x, w_in))
    return scale * (F.linear(hidden, w_out) + bias)


def gate_slots(cfg) -> list[list[Slot]]:
    """Return the outputs of each network of gates, in their order.

    Network n looks at the input of layer cfg.gate_networks[n], the first one at the first embedding. It sets
    the factors of the layers from there to the next network, the last one those of the heads' mixing too. The
    last layer's x0 and bigram factors are those of its connections, where it has some.
    """
    H, last = cfg.num_heads, cfg.num_layers - 1
    starts = (*cfg.gate_networks, cfg.num_layers)
    networks = []
    for first, end in zip(starts, starts[1:]):
        slots = []
        for i in range(first, end):
            if i in cfg.xsa_layers:
                slots.append(Slot(i, "xsa", H, 0.0))
            if i in cfg.attn_gate_layers:
                slots.append(Slot(i, "attn_gate", H, GATE_START))
            injects = i not in cfg.no_attn_layers and not (cfg.mudd and i == last)
            if injects and cfg.inject_x0:
                slots.append(Slot(i, "x0", 1, 0.0))
            if injects and cfg.bigram_rows:
                slots.append(Slot(i, "bigram", 1, 0.05))
            if cfg.skip and i == cfg.skip[1]:
                slots.append(Slot(i, "skip", 1, SKIP_START))
            if cfg.mix_window and i == last:
                slots.append(Slot(i, "mix_in", H, 1.0))
                slots.append(Slot(i, "mix_out", H, 0.0))
        networks.append(slots)
    return networks


def gate_outputs(cfg) -> int:
    """Return the outputs of the widest network of gates; all of them have so many rows."""
    return max(sum(slot.width for slot in slots) for slots in gate_slots(cfg))


def gate_starts(cfg) -> Tensor:
    """Return what the gates are at the start, (networks, outputs)."""
    starts = torch.zeros(len(cfg.gate_networks), gate_outputs(cfg))
    for row, slots in zip(starts, gate_slots(cfg)):
        values = [slot.start for slot in slots for _ in range(slot.width)]
        row[: len(values)] = torch.tensor(values)
    return starts


CONNECTIONS = 14


def connection_starts(cfg) -> Tensor:
    """Return what the connections are at the start, (2, 14): those of a layer that has none.

    Into the last layer: weights of three streams in its values, and in its input; the gates of its value
    embedding, one for each half of the heads; then, as in LayerWeights, the first factors of stream and
    attention, those of x0 and bigram, and the second ones. Into the head: weights of five streams, of which
    the cached one begins with the backout of record 40.
    """
    resid = math.sqrt(cfg.resid_init)
    starts = torch.zeros(2, CONNECTIONS)
    starts[0, 6:] = torch.tensor([2.0, 2.0, resid, 1.0, 0.0, 0.05, resid, 1.0])
    starts[1, 1] = -0.5
    return starts


def weighted_sum(weights: list[Tensor], streams: list[Tensor | None]) -> Tensor:
    """Return the sum of the streams that there are, (T, D), each times its weights (T, 1)."""
    return sum(w * stream for w, stream in zip(weights, streams) if stream is not None)
