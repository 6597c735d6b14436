"""Attention that every GPU and CPU can run: one definition, four backends with the same values and gradients.

Causal, within a document, over the `window` previous tokens and the token itself. q, k, v: (T, H, d); result (T, H, d).
Each backend is a pair: a mask, made once per batch and window, and the attention that uses it. Shapes: T tokens of one
packed sequence, H heads, d head width.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Docs(NamedTuple):
    """Documents of one packed sequence. starts: (capacity,) int32, first token of each document, padded with T, so that
    it is what varlen attention wants; ids: (T,) number of each token's document; max_len: longest document possible."""
    starts: Tensor
    ids: Tensor
    max_len: int


def masked_mask(docs: Docs, window: int) -> Tensor:
    """(T, T) bool, the definition: query i sees key j if both are in one document and 0 <= i - j <= window."""
    t = torch.arange(len(docs.ids), device=docs.ids.device)
    distance = t[:, None] - t[None, :]
    return (docs.ids[:, None] == docs.ids[None, :]) & (distance >= 0) & (distance <= window)


def masked_attention(q, k, v, mask, scale):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)


def blocked_mask(docs: Docs, window: int) -> Tensor:
    """(N, 1, W, 2 W) bool: N blocks of W = window queries, each with the keys of its own and the previous block."""
    T, W, N = len(docs.ids), window, -(-len(docs.ids) // window)
    ids = F.pad(docs.ids, (W, N * W - T), value=-1)
    ids_k = ids.unfold(0, 2 * W, W)
    i, j = torch.arange(W, 2 * W, device=ids.device)[:, None], torch.arange(2 * W, device=ids.device)[None, :]
    near = (i >= j) & (i - j <= W)
    return (near & (ids_k[:, W:, None] == ids_k[:, None, :]))[:, None]


def blocked_attention(q, k, v, mask, scale):
    """Work and memory grow with T W instead of T T; the fastest on a CPU, and the fallback anywhere."""
    T, H, d = q.shape
    N, W = mask.size(0), mask.size(2)

    def blocks(x, before):  # (before + T + padding, H, d) to (N, H, (1 + before / W) W, d)
        return F.pad(x, (0, 0, 0, 0, before, N * W - T)).unfold(0, before + W, W).permute(0, 1, 3, 2)

    y = F.scaled_dot_product_attention(blocks(q, 0), blocks(k, W), blocks(v, W), attn_mask=mask, scale=scale)
    return y.transpose(1, 2).reshape(N * W, H, d)[:T]


def flex_mask(docs: Docs, window: int):
    from torch.nn.attention.flex_attention import create_block_mask
    ids, T = docs.ids, len(docs.ids)
    return create_block_mask(lambda b, h, i, j: (i >= j) & (i - j <= window) & (ids[i] == ids[j]), None, None, T, T,
                             device=ids.device)


def flex(q, k, v, mask, scale):
    from torch.nn.attention.flex_attention import flex_attention
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, scale=scale)[0].transpose(0, 1)


def varlen_mask(docs: Docs, window: int):
    return docs.starts, docs.max_len, window


def varlen(q, k, v, mask, scale):
    from torch.nn.attention.varlen import varlen_attn
    starts, max_len, window = mask
    return varlen_attn(q, k, v, starts, starts, max_len, max_len, scale=scale, window_size=(window, 0))


BACKENDS = {"varlen": (varlen_mask, varlen), "flex": (flex_mask, flex), "blocked": (blocked_mask, blocked_attention),
            "masked": (masked_mask, masked_attention)}


def paired_docs(docs: Docs) -> Docs:
    """Documents of a sequence in which every token stands twice."""
    return Docs(docs.starts * 2, docs.ids.repeat_interleave(2), docs.max_len * 2)


def choose_backend(wish: str, head_dim: int, scale: float, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(name, reason) of the attention backend. On a GPU a candidate must run forward and backward here and agree with
    the definition; a kernel that imports is not yet one that works."""
    if wish != "auto":
        return wish, "asked for"
    if device.type == "cpu":
        return "blocked", "fastest on a CPU"
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 256, 2, head_dim, device=device, dtype=dtype).unbind()
    ids = torch.arange(256, device=device, dtype=torch.int32) // 100
    docs = Docs(torch.tensor([0, 100, 200, 256, 256], device=device, dtype=torch.int32), ids, 100)

    def run(name):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        make, attend = BACKENDS[name]
        y = attend(*leaves, make(docs, 64), scale)
        return [y, *torch.autograd.grad(y, leaves, g)]

    expected, refused = run("masked"), []
    for name in ("varlen", "flex"):
        try:
            error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(run(name), expected))
            if error < 0.02:  # two bfloat16 roundings of sums in another order
                return name, "; ".join([f"self-test error {error:.1e}", *refused])
            refused.append(f"{name}: self-test error {error:.1e}")
        except Exception as e:  # whatever a missing or broken kernel raises
            refused.append(f"{name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    return "blocked", "; ".join(refused)
