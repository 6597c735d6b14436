"""Attention that every GPU and CPU can run: one definition, four backends with the same values and gradients.

Causal, within a document, over the `window` previous tokens and the token itself.
Each backend is a pair: a mask, made once per batch and window, and the attention that uses it.
Shapes: T tokens of one packed sequence, H heads, d head width. q, k, v: (T, H, d); result (T, H, d).
"""
import functools

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from data.errors import UsageError
from data.loader import Docs
from engine.fused import BlockProducts
from engine.self_test import in_one_line, largest_error

# ------------------------------------------------------------------------------------------------------------
# The definition


def masked_mask(docs: Docs, window: int) -> Tensor:
    """Return (T, T) bool: query i sees key j if both are in one document and 0 <= i - j <= window."""
    t = torch.arange(len(docs.ids), device=docs.ids.device)
    distance = t[:, None] - t[None, :]
    same_document = docs.ids[:, None] == docs.ids[None, :]
    return same_document & (distance >= 0) & (distance <= window)


def masked_attention(q, k, v, mask, scale):
    q, k, v = map(heads_first, (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y[0].transpose(0, 1)


def heads_first(x: Tensor) -> Tensor:
    """Map (T, H, d) to (1, H, T, d)."""
    return x.transpose(0, 1)[None]


# ------------------------------------------------------------------------------------------------------------
# Blocks of queries, each with its own and the previous block of keys: fastest on a CPU, the fallback anywhere


def blocked_mask(docs: Docs, window: int, block: int = 0) -> Tensor:
    """Return (N, 1, W, 2 W) bool: N blocks of W queries, with the keys of their own and the previous block.
    block: W, window or more; 0: window."""
    T, W = len(docs.ids), block or window
    N = -(-T // W)
    ids = F.pad(docs.ids, (W, N * W - T), value=-1)
    key_ids = ids.unfold(0, 2 * W, W)
    query_ids = key_ids[:, W:]

    i = torch.arange(W, 2 * W, device=ids.device)[:, None]
    j = torch.arange(2 * W, device=ids.device)[None, :]
    near = (i >= j) & (i - j <= window)
    same_document = query_ids[:, :, None] == key_ids[:, None, :]
    return (near & same_document)[:, None]


def in_blocks(x: Tensor, mask: Tensor, before: int) -> Tensor:
    """Map (T, H, width) to (N, H, before + W, width), a mask's blocks, each after `before` earlier tokens."""
    N, _, W, _ = mask.shape
    padded = F.pad(x, (0, 0, 0, 0, before, N * W - len(x)))
    return padded.unfold(0, before + W, W).permute(0, 1, 3, 2)


def blocked_attention(q, k, v, mask, scale):
    """Attend in blocks: work and memory grow with T W instead of T T."""
    T, H, d = q.shape
    N, W = mask.size(0), mask.size(2)
    q = in_blocks(q, mask, 0)
    k = in_blocks(k, mask, W)
    v = in_blocks(v, mask, W)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).reshape(N * W, H, d)[:T]


FEW_SCORES = 2**21  # 8 MiB in fp32: to keep more of them takes longer than to compute them again


def blocked(q, k, v, mask, scale):
    """Attend in blocks; in training on a CPU, eager and with few scores, by the faster BlockProducts."""
    few = q.size(1) * mask.numel() <= FEW_SCORES
    eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if q.is_cpu and q.dtype != torch.bfloat16 and few and eager:
        return BlockProducts.apply(q, k, v, mask, scale)
    return blocked_attention(q, k, v, mask, scale)


# ------------------------------------------------------------------------------------------------------------
# GPUs: FlexAttention, and FlashAttention through varlen_attn

compiled = functools.cache(torch.compile)


def flex_mask(docs: Docs, window: int):
    from torch.nn.attention.flex_attention import create_block_mask

    ids = docs.ids
    T = len(ids)

    def visible(batch, head, i, j):
        near = (i >= j) & (i - j <= window)
        return near & (ids[i] == ids[j])

    make = create_block_mask
    if ids.is_cuda:
        make = compiled(make)  # eager it builds all of (T, T)
    return make(visible, None, None, T, T, device=ids.device)


def flex(q, k, v, mask, scale):
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = map(heads_first, (q, k, v))
    attend = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        attend = compiled(flex_attention)
    y = attend(q, k, v, block_mask=mask, scale=scale)
    return y[0].transpose(0, 1)


def varlen_mask(docs: Docs, window: int):
    from torch.fx.experimental.sym_node import DynamicInt

    return docs.starts, docs.max_len, DynamicInt(window)  # else torch.compile would take it for a constant


def varlen(q, k, v, mask, scale):
    from torch.nn.attention.varlen import varlen_attn

    starts, max_len, window = mask
    window_size = window, 0
    return varlen_attn(q, k, v, starts, starts, max_len, max_len, scale=scale, window_size=window_size)


BACKENDS = {  # name -> (mask, attention)
    "varlen": (varlen_mask, varlen),
    "flex": (flex_mask, flex),
    "blocked": (blocked_mask, blocked),
    "masked": (masked_mask, masked_attention),
}
# Tried on a GPU, in this order. FA3 and FA4 are packages of their own, which varlen_attn can use instead of
# the FlashAttention 2 that torch contains.
CANDIDATES = ("varlen FA4", "varlen FA3", "varlen", "flex")


# ------------------------------------------------------------------------------------------------------------
# Pairs of heads that share a softmax


PAIRINGS = "halves", "neighbours"


def pair(x: Tensor, kind: str) -> Tensor:
    """Map (T, H, d) to (2 T, H/2, d): two heads of a token become two positions of one head. kind: which two,
    h and h + H/2 (halves) or 2h and 2h + 1 (neighbours)."""
    T, H, d = x.shape
    if kind == "neighbours":
        x = x.view(T, H // 2, 2, d).transpose(1, 2)
    return x.reshape(2 * T, H // 2, d)


def unpair(y: Tensor, kind: str) -> Tensor:
    """Map (2 T, H/2, d) back to (T, H, d)."""
    T2, H2, d = y.shape
    if kind == "neighbours":
        y = y.view(T2 // 2, 2, H2, d).transpose(1, 2)
    return y.reshape(T2 // 2, 2 * H2, d)


def paired_docs(docs: Docs) -> Docs:
    """Return the documents of a sequence in which every token stands twice."""
    return Docs(docs.starts * 2, docs.ids.repeat_interleave(2), docs.max_len * 2, docs.slices)


# ------------------------------------------------------------------------------------------------------------
# The choice


def choose_backend(wish: str, head_dim: int, scale: float, device, dtype: torch.dtype) -> tuple[str, str]:
    """Return the name of the attention backend, and the reason."""
    if device.type == "cpu" and wish in ("varlen", "flex"):
        raise UsageError(f"--attention: expected auto, blocked or masked on a CPU, found {wish}, which has "
                         "no gradients there; leave it out")
    if wish != "auto":
        return wish, "asked for"
    if device.type == "cpu":
        return "blocked", "fastest on a CPU"
    return first_correct(CANDIDATES, head_dim, scale, device, dtype)


def first_correct(candidates, head_dim: int, scale: float, device, dtype) -> tuple[str, str]:
    """Return the first candidate that passes its self-test here, else blocked, and why."""
    refused = []
    for candidate in candidates:
        works, said = self_test(candidate, head_dim, scale, device, dtype)
        if works:
            return candidate.partition(" ")[0], "; ".join([said, *refused])
        refused.append(said)
    return "blocked", "; ".join(refused)


def self_test(candidate: str, head_dim: int, scale: float, device, dtype) -> tuple[bool, str]:
    """Return whether a candidate runs forward and backward here and agrees with the definition, and why. A
    kernel that imports is not yet one that works. What passes stays activated."""
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 256, 2, head_dim, device=device, dtype=dtype).unbind()
    ids = torch.arange(256, device=device, dtype=torch.int32) // 100
    starts = torch.tensor([0, 100, 200, 256, 256], device=device, dtype=torch.int32)
    docs = Docs(starts, ids, 100)

    def outputs(name):
        make_mask, attend = BACKENDS[name]
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves, make_mask(docs, 64), scale)
        return [y, *torch.autograd.grad(y, leaves, g)]

    expected = outputs("masked")
    name, _, flash = candidate.partition(" ")
    try:
        if flash:
            torch.nn.attention.activate_flash_attention_impl(flash)
        error = largest_error(outputs(name), expected)
        works = error < 0.02  # two bfloat16 roundings of sums in another order
        said = f"self-test error {error:.1e}"
    except Exception as e:  # whatever a missing or broken kernel raises
        works = False
        said = in_one_line(e)
    if flash and not works and hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    return works, f"{candidate}: {said}"
