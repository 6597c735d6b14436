"""Head and loss in one: a third of the model's matrix work, and by far its largest activation; in FP8 where that works."""
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import UsageError
from muon import product


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
