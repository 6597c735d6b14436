"""Attention that every GPU and CPU can run: one definition, four backends with the same values and gradients.

Causal, within a document, over the `window` previous tokens and the token itself. q, k, v: (T, H, d); result (T, H, d).
Each backend is a pair: a mask, made once per batch and window, and the attention that uses it. Shapes: T tokens of one
packed sequence, H heads, d head width.
"""
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import UsageError


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
    """(name, reason) of the attention backend."""
    if device.type == "cpu" and wish in ("varlen", "flex"):
        raise UsageError(f"--attention: expected auto, blocked or masked on a CPU, found {wish}, which has no "
                         "gradients there; leave it out")
    if wish != "auto":
        return wish, "asked for"
    if device.type == "cpu":
        return "blocked", "fastest on a CPU"
    return first_correct(["varlen", "flex"], head_dim, scale, device, dtype)


def first_correct(candidates: list[str], head_dim: int, scale: float, device, dtype) -> tuple[str, str]:
    """The first candidate that runs forward and backward here and agrees with the definition, else blocked, and why: a
    kernel that imports is not yet one that works."""
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
    for name in candidates:
        try:
            errors = torch.stack([(a - b).float().norm() / b.float().norm() for a, b in zip(run(name), expected)])
            error = errors.max().item()  # NaN if one of them is
            if error < 0.02:  # two bfloat16 roundings of sums in another order
                return name, "; ".join([f"self-test error {error:.1e}", *refused])
            refused.append(f"{name}: self-test error {error:.1e}")
        except Exception as e:  # whatever a missing or broken kernel raises
            refused.append(f"{name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    return "blocked", "; ".join(refused)


# ---------------------------------------------------------------------------------------------------------------------
# The head in FP8: a third of the model's matrix work at twice the rate, with less precision


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in a float8 dtype and the fp32 scale that brings it back, so that the largest entry is the largest number."""
    scale = x.abs().amax().float().clamp(min=1e-30) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


class Fp8Linear(torch.autograd.Function):
    """x (T, D) and w (V, D) to x @ w.T (T, V): products in e4m3, gradients in e5m2, sums in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        (xq, xs), (wq, ws) = to_fp8(x, torch.float8_e4m3fn), to_fp8(w, torch.float8_e4m3fn)
        ctx.save_for_backward(xq, xs, wq, ws)
        ctx.dtypes = x.dtype, w.dtype
        return torch._scaled_mm(xq, wq.t(), scale_a=xs, scale_b=ws, out_dtype=torch.bfloat16, use_fast_accum=True)

    @staticmethod
    def backward(ctx, g: Tensor):
        xq, xs, wq, ws = ctx.saved_tensors
        gq, gs = to_fp8(g, torch.float8_e5m2)
        # The second factor of a scaled product must lie in memory by columns.
        dx = torch._scaled_mm(gq, wq.t().contiguous().t(), scale_a=gs, scale_b=ws, out_dtype=torch.bfloat16)
        dw = torch._scaled_mm(gq.t().contiguous(), xq.t().contiguous().t(), scale_a=gs, scale_b=xs, out_dtype=torch.bfloat16)
        return dx.to(ctx.dtypes[0]), dw.to(ctx.dtypes[1])


def choose_fp8(wish: str, device: torch.device) -> tuple[bool, str]:
    """(whether to use Fp8Linear, reason). It must run forward and backward here and come near the exact product."""
    if os.environ.get("DISABLE_FP8", "0") not in ("", "0", "false", "False"):
        return False, "DISABLE_FP8 is set"
    if wish == "off" or (wish == "auto" and device.type != "cuda"):
        return False, "asked for" if wish == "off" else "only on a GPU"
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in ((64, 32), (128, 32), (64, 128)))
    x, w = x.requires_grad_(), w.requires_grad_()
    try:
        y, exact = Fp8Linear.apply(x, w), x @ w.t()
        pairs = zip((y, *torch.autograd.grad(y, (x, w), g)), (exact, *torch.autograd.grad(exact, (x, w), g)))
        error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)
    except Exception as e:  # whatever a GPU without FP8 raises
        return False, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    return error < 0.15, f"self-test error {error:.1e}"  # e5m2 keeps two bits: 2^-3 at most per entry
