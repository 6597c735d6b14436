"""Attention that every GPU and CPU can run: one definition, four backends with the same values and gradients. Behind it,
matrix products on a CPU, head and loss in one, in FP8 where that works, and the choice of a kernel for Muon.

Causal, within a document, over the `window` previous tokens and the token itself. q, k, v: (T, H, d); result (T, H, d).
Each backend is a pair: a mask, made once per batch and window, and the attention that uses it. Shapes: T tokens of one
packed sequence, H heads, d head width.
"""
import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from muon import orthogonalize, symmetric_product
from newton_schulz import ONEDNN, product
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


compiled = functools.cache(torch.compile)


def flex_mask(docs: Docs, window: int):
    from torch.nn.attention.flex_attention import create_block_mask
    ids, T = docs.ids, len(docs.ids)
    make = compiled(create_block_mask) if ids.is_cuda else create_block_mask  # eager, it builds the whole (T, T) mask
    return make(lambda b, h, i, j: (i >= j) & (i - j <= window) & (ids[i] == ids[j]), None, None, T, T, device=ids.device)


def flex(q, k, v, mask, scale):
    from torch.nn.attention.flex_attention import flex_attention
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attend = compiled(flex_attention) if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return attend(q, k, v, block_mask=mask, scale=scale)[0].transpose(0, 1)


def varlen_mask(docs: Docs, window: int):
    return docs.starts, docs.max_len, window


def varlen(q, k, v, mask, scale):
    from torch.nn.attention.varlen import varlen_attn
    starts, max_len, window = mask
    return varlen_attn(q, k, v, starts, starts, max_len, max_len, scale=scale, window_size=(window, 0))


BACKENDS = {"varlen": (varlen_mask, varlen), "flex": (flex_mask, flex), "blocked": (blocked_mask, blocked_attention),
            "masked": (masked_mask, masked_attention)}
# Tried on a GPU, in this order. FA3 and FA4 are packages of their own, which varlen_attn can use instead of the
# FlashAttention 2 that torch contains.
CANDIDATES = ("varlen FA4", "varlen FA3", "varlen", "flex")


def paired_docs(docs: Docs) -> Docs:
    """Documents of a sequence in which every token stands twice."""
    return Docs(docs.starts * 2, docs.ids.repeat_interleave(2), docs.max_len * 2)


def choose_dtype(wish: str, device: torch.device) -> torch.dtype:
    """Of weights and activations."""
    return getattr(torch, wish) if wish != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32


def choose_compile(wish: str, device: torch.device) -> bool:
    return wish == "on" or (wish == "auto" and device.type == "cuda")


def choose_backend(wish: str, head_dim: int, scale: float, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(name, reason) of the attention backend."""
    if device.type == "cpu" and wish in ("varlen", "flex"):
        raise UsageError(f"--attention: expected auto, blocked or masked on a CPU, found {wish}, which has no "
                         "gradients there; leave it out")
    if wish != "auto":
        return wish, "asked for"
    if device.type == "cpu":
        return "blocked", "fastest on a CPU"
    return first_correct(CANDIDATES, head_dim, scale, device, dtype)


def first_correct(candidates, head_dim: int, scale: float, device, dtype) -> tuple[str, str]:
    """The first candidate that passes its self-test here, else blocked, and why."""
    refused = []
    for candidate in candidates:
        works, said = self_test(candidate, head_dim, scale, device, dtype)
        if works:
            return candidate.partition(" ")[0], "; ".join([said, *refused])
        refused.append(said)
    return "blocked", "; ".join(refused)


def self_test(candidate: str, head_dim: int, scale: float, device, dtype) -> tuple[bool, str]:
    """Whether a candidate runs forward and backward here and agrees with the definition, and what it said: a kernel that
    imports is not yet one that works. What passes stays activated."""
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 256, 2, head_dim, device=device, dtype=dtype).unbind()
    ids = torch.arange(256, device=device, dtype=torch.int32) // 100
    docs = Docs(torch.tensor([0, 100, 200, 256, 256], device=device, dtype=torch.int32), ids, 100)

    def run(name):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        make, attend = BACKENDS[name]
        y = attend(*leaves, make(docs, 64), scale)
        return [y, *torch.autograd.grad(y, leaves, g)]

    expected, (name, _, flash) = run("masked"), candidate.partition(" ")
    try:
        if flash:
            torch.nn.attention.activate_flash_attention_impl(flash)
        errors = torch.stack([(a - b).float().norm() / b.float().norm() for a, b in zip(run(name), expected)])
        error = errors.max().item()  # NaN if one of them is
        works, said = error < 0.02, f"self-test error {error:.1e}"  # two bfloat16 roundings of sums in another order
    except Exception as e:  # whatever a missing or broken kernel raises
        works, said = False, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    if flash and not works and hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    return works, f"{candidate}: {said}"


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products in fp32 on a CPU: MKL, which torch calls, reaches half the rate of oneDNN on an AMD processor


class OneDnnLinear(torch.autograd.Function):
    """F.linear of x (T, D) and w (N, D), both fp32 on a CPU, by oneDNN."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return product(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return product(g, w.t().contiguous()), product(g.t(), x.t())


def choose_onednn(device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[bool, str]:
    """(whether OneDnnLinear takes the place of F.linear, reason). By the kind of machine, not by a race: a run must compute
    the same when it is resumed."""
    if device.type != "cpu" or dtype != torch.float32 or compiled:
        return False, "only in fp32 on a CPU, eager"
    cpu = Path("/proc/cpuinfo")
    if ONEDNN is None or not cpu.exists() or "AuthenticAMD" not in cpu.read_text():
        return False, "only on AMD processors with AVX-512, where it is twice as fast as MKL"
    return True, "twice as fast as MKL on AMD processors"


# ---------------------------------------------------------------------------------------------------------------------
# Head and loss in one: a third of the model's matrix work, and by far its largest activation


def softcap(logits: Tensor, abc: tuple[float, ...]) -> Tensor:
    """A sigmoid((x + B) / C): bounded logits with more room for unlikely tokens than for likely ones."""
    if not abc:
        return logits
    A, B, C = abc
    return A * torch.sigmoid((logits + B) / C)


def multi_token_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over T of sum_k weights[k] * cross entropy of logits[t] and targets[t + k]; targets past the end are left out.
    logits: (T, V), targets: (T,), weights: (K,). The same logits serve all K, so no head is added."""
    T = len(targets)
    log_z = torch.logsumexp(logits.float(), -1)
    loss = logits.new_zeros((), dtype=torch.float32)
    for k, weight in enumerate(weights.unbind()):
        chosen = logits[: T - k].gather(1, targets[k:, None])[:, 0].float()
        loss = loss + weight * (log_z[: T - k] - chosen).sum() / T
    return loss


HEAD_PIECE = 8192  # tokens whose logits lie in memory at a time; all 49152 of a slice of track small would be 5 GB


class HeadLoss(torch.autograd.Function):
    """multi_token_loss(softcap(x @ head.T)), the definition, with its gradients computed in the same pass, for `size` tokens
    at a time: the logits of a piece are read twice and forgotten (in fp32 they need not be stored once compiled), and what is
    kept for the backward pass is as large as x and head. x: (T, D), head: (V, D). fp8: products in FP8, see to_fp8; onednn: in
    fp32 by oneDNN."""

    @staticmethod
    def forward(ctx, x, head, targets, weights, abc, size, fp8=False, onednn=False):
        T, K = len(x), len(weights)
        t, ids = torch.arange(T, device=x.device), torch.arange(len(head), device=x.device)
        ahead = F.pad(targets, (0, K - 1), value=-1).unfold(0, K, 1)  # (T, K): the next token, the second next, ...
        w = weights * (t[:, None] + torch.arange(K, device=x.device) < T) / T  # those past the end are left out
        A, B, C = abc or (1.0, 0.0, 1.0)
        bound = (A / C / 4 if abc else 1.0) / T * weights.sum()  # of a logit's gradient: no pass over them to find it
        hq, hs = to_fp8(head, torch.float8_e4m3fn) if fp8 else (None, None)
        multiply = product if onednn else F.linear
        across = hq.t().contiguous() if fp8 else head.t().contiguous() if onednn else head.t()
        loss, dx, dhead = 0.0, [], 0.0
        for first in range(0, T, size):
            rows = slice(first, min(first + size, T))
            xs, ys, ws = x[rows], ahead[rows], w[rows]
            if fp8:
                xq, xscale = to_fp8(xs, torch.float8_e4m3fn)
            logits = fp8_product(xq, xscale, hq, hs) if fp8 else multiply(xs, head)
            s = torch.sigmoid((logits.float() + B) / C) if abc else logits.float()
            z = A * s
            log_z = torch.logsumexp(z, -1, keepdim=True)
            loss = loss + (ws * (log_z - z.gather(1, ys.clamp(min=0)))).sum()
            g = (z - log_z).exp_().mul_(ws.sum(-1, keepdim=True))
            if torch.compiler.is_compiling():  # comparisons melt into the kernel around them; a scatter would end it
                for k in range(K):
                    g = g - torch.where(ids == ys[:, k, None], ws[:, k, None], 0.0)
            else:
                g.scatter_add_(1, ys.clamp(min=0), -ws)
            g = (g.mul_((1 - s).mul_(s).mul_(A / C)) if abc else g).to(x.dtype)
            if fp8:
                gq, gscale = to_fp8(g, torch.float8_e5m2, bound)
                dx.append(fp8_product(gq, gscale, across, hs))
                dhead = dhead + fp8_product(gq.t().contiguous(), gscale, xq.t().contiguous(), xscale)
            else:
                dx.append(multiply(g, across))
                dhead = dhead + multiply(g.t(), xs.t())
        ctx.save_for_backward(torch.cat(dx).to(x.dtype), dhead.to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dhead = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dhead * grad.to(dhead.dtype), None, None, None, None, None, None


def to_fp8(x: Tensor, dtype: torch.dtype, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x in a float8 dtype and the fp32 scale that brings it back, so that the largest entry (or the given bound of it) is the
    largest number."""
    scale = (x.abs().amax() if largest is None else largest).float().clamp(min=1e-30) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def fp8_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """(m, k) and (n, k) in float8 to a @ b.T (m, n) in bfloat16, summed in fp32 (but for products of two e4m3: as fast as
    the hardware can). The second factor of a scaled product must lie in memory by columns, which b.T does."""
    fast = a.dtype == b.dtype == torch.float8_e4m3fn
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)


def choose_fp8(wish: str, device: torch.device) -> tuple[bool, str]:
    """(whether HeadLoss uses FP8, reason). It must run here and come near the exact gradients."""
    if os.environ.get("DISABLE_FP8", "0") not in ("", "0", "false", "False"):
        return False, "DISABLE_FP8 is set"
    if wish == "off" or (wish == "auto" and device.type != "cuda"):
        return False, "asked for" if wish == "off" else "only on a GPU"
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(rows, 32, generator=generator).to(device, torch.bfloat16).requires_grad_() for rows in (64, 128))
    targets, weights = torch.arange(64, device=device), torch.ones(2, device=device)

    def gradients(fp8):
        return torch.autograd.grad(HeadLoss.apply(x, head, targets, weights, (23.0, 5.0, 7.5), 32, fp8), (x, head))

    try:
        error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(gradients(True), gradients(False)))
    except Exception as e:  # whatever a GPU without FP8 raises
        error, reason = math.inf, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    else:
        reason = f"self-test error {error:.1e}"
    if not error < 0.15 and wish == "on":  # e5m2 keeps two bits: 2^-3 at most per entry
        raise UsageError(f"--fp8_head: expected a device whose FP8 passes the self-test, found {reason}; leave it out")
    return error < 0.15, reason


# ---------------------------------------------------------------------------------------------------------------------
# Muon's symmetric matrix products: a kernel that computes one triangle and mirrors it saves up to half


def choose_symmetric(device: torch.device) -> tuple[object, str]:
    """(symmetric product for Muon, reason): that of the package quack-kernels on Hopper and Blackwell, if it is there."""
    if device.type != "cuda":
        return symmetric_product, "torch, as always on a CPU"
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return symmetric_product, "torch, as quack-kernels needs Hopper or Blackwell"
    try:
        from quack.gemm_interface import gemm_symmetric
    except Exception as e:  # not only ImportError: it compiles on import
        return symmetric_product, f"torch, as quack-kernels fails: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    return correct_symmetric(gemm_symmetric, device)


def correct_symmetric(kernel, device: torch.device) -> tuple[object, str]:
    """The kernel for matrices where it pays, if a whole iteration with it agrees with torch's here."""
    def product(A, B, C=None, alpha=1.0, beta=1.0):
        few = A.size(-2) <= 256  # its tiles would be mostly empty
        return symmetric_product(A, B, C, alpha, beta) if few else kernel(A, B, C=C, alpha=alpha, beta=beta)

    X = torch.randn(2, 320, 640, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        ours, exact = (orthogonalize(X, form="standard", symmetric=f).float() for f in (product, symmetric_product))
        error = ((ours - exact).norm() / exact.norm()).item()
    except Exception as e:  # a kernel that imports is not yet one that works
        return symmetric_product, f"torch, as quack-kernels fails: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    if error < 0.05:  # two bf16 iterations: 1.6 to 4.7 % from the exact one each
        return product, f"quack-kernels: self-test error {error:.1e}"
    return symmetric_product, f"torch, as quack-kernels has a self-test error of {error:.1e}"
