"""Heads that share their attention, token by token: lightweight DC-MHA (arXiv 2405.08553), blocked and local.

With p_h(t, s) the softmax of head h at token t over the last `window` tokens of its document (its own one
included), the output of every head gains

    w2_h(t) sum_s A(t, s) v_h(s)    where    A(t, s) = sum_g w1_g(t) p_g(t, s)

so a token may read with one head what another head found. Public record 85 computes it in a kernel of 1,300
lines; in blocks of `window` queries, each with the keys of its own block and the one before, it is products
that exist already.

Shapes: T tokens of one packed sequence, H heads, d head width, N blocks of W = window queries.
"""
import torch
from torch import Tensor

from data.loader import Docs
from engine.attention import blocked_mask, in_blocks


def mixing_mask(docs: Docs, window: int) -> Tensor:
    """Return (N, 1, W, 2 W) bool: which of the last `window` tokens, itself included, a token reads."""
    return blocked_mask(docs, window - 1, block=window)


def mix_heads(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor,
              mask: Tensor, scale: float) -> Tensor:
    """Return what every head's output gains, (T, H, d).

    q, k, v: (T, H, d); w1: (T, H) weights of the heads whose attention is mixed; w2: (T, H) of those that
    read by the mixture; mask: see mixing_mask; scale: of the softmax.
    """
    T, H, d = q.shape
    N, _, W, _ = mask.shape

    # The softmax of every head. Padding behind the last token reads nothing at all, so what is hidden has the
    # lowest number and not infinity.
    queries = in_blocks(q, mask, 0)
    keys = in_blocks(k, mask, W)
    scaled = scale * queries
    scores = scaled @ keys.transpose(2, 3)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest)
    p = torch.softmax(scores, -1, dtype=torch.float32).type_as(q)

    # One mixture of them, by which all heads read.
    weights = in_blocks(w1[..., None], mask, 0)
    weighted = weights * p
    mixture = weighted.sum(1, keepdim=True)  # (N, 1, W, 2 W)
    values = in_blocks(v, mask, W)
    read = mixture @ values

    gain = in_blocks(w2[..., None], mask, 0) * read
    by_token = gain.transpose(1, 2).reshape(N * W, H, d)
    return by_token[:T]
