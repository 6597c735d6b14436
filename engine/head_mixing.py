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
import torch.nn.functional as F
from torch import Tensor

from data.loader import Docs


def mixing_mask(docs: Docs, window: int) -> Tensor:
    """(N, 1, W, 2 W) bool: which of the last `window` tokens, itself included, a token reads."""
    T = len(docs.ids)
    N = -(-T // window)
    padded = F.pad(docs.ids, (window, N * window - T), value=-1)
    key_ids = padded.unfold(0, 2 * window, window)  # (N, 2 W)
    query_ids = key_ids[:, window:]

    query = torch.arange(window, 2 * window, device=padded.device)
    key = torch.arange(2 * window, device=padded.device)
    distance = query[:, None] - key
    not_later = distance >= 0
    near = distance < window
    same_document = query_ids[:, :, None] == key_ids[:, None, :]
    return (not_later & near & same_document)[:, None]


def mix_heads(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor,
              mask: Tensor, scale: float) -> Tensor:
    """Return what every head's output gains, (T, H, d).

    q, k, v: (T, H, d); w1: (T, H) weights of the heads whose attention is mixed; w2: (T, H) of those that
    read by the mixture; mask: see mixing_mask; scale: of the softmax.
    """
    T, H, d = q.shape
    N, _, W, _ = mask.shape
    behind = N * W - T  # what the last block lacks

    def blocks(x: Tensor, before: int) -> Tensor:
        """(T, H, width) to (N, H, before + W, width): each block with `before` tokens of the one before
        it."""
        padded = F.pad(x, (0, 0, 0, 0, before, behind))
        overlapping = padded.unfold(0, before + W, W)
        return overlapping.permute(0, 1, 3, 2)

    # The softmax of every head. Padding behind the last token reads nothing at all, so what is hidden has the
    # lowest number and not infinity.
    queries = blocks(q, 0)
    keys = blocks(k, W)
    scaled = scale * queries
    scores = scaled @ keys.transpose(2, 3)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest)
    p = torch.softmax(scores, -1, dtype=torch.float32).type_as(q)

    # One mixture of them, by which all heads read.
    weights = blocks(w1[..., None], 0)
    weighted = weights * p
    mixture = weighted.sum(1, keepdim=True)  # (N, 1, W, 2 W)
    values = blocks(v, W)
    read = mixture @ values

    gain = blocks(w2[..., None], 0) * read
    by_token = gain.transpose(1, 2).reshape(N * W, H, d)
    return by_token[:T]
