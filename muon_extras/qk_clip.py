"""QK-Clip (MuonClip of Kimi K2) and the largest attention logits that it needs."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor, scale: float, block: int = 1024) -> Tensor:
    """(heads,) fp32: the largest causal attention logit scale q_i . k_j, j <= i, per head, over the batch. q:
    (..., heads, T, d); k: (..., kv_heads, T, d), each shared by heads / kv_heads consecutive heads. Memory:
    block x T logits per head."""
    heads, T = q.shape[-3:-1]
    q = q.flatten(0, -4) if q.ndim > 3 else q[None]
    k = k.flatten(0, -4) if k.ndim > 3 else k[None]
    k = k.repeat_interleave(heads // k.size(1), 1)
    best = torch.full((heads,), -torch.inf, device=q.device)
    for begin in range(0, T, block):
        end = min(begin + block, T)
        S = (q[:, :, begin:end] @ k[:, :, :end].mT).float() * scale
        future = torch.ones(end - begin, end, dtype=torch.bool, device=q.device).triu(begin + 1)
        S.masked_fill_(future, -torch.inf)
        best = torch.maximum(best, S.amax((0, 2, 3)))
    return best


@torch.no_grad()
def qk_clip_(
    wq: Tensor | Sequence[Tensor],
    wk: Tensor | Sequence[Tensor],
    s_max: Tensor,
    tau: float = 100.0,
    alpha: float = 0.5,
    heads: int | None = None,
    kv_heads: int | None = None,
    per_group: bool = False,
) -> Tensor:
    """Scale query and key projections in place after an optimizer step, so that a head whose largest logit
    was s > tau would have had tau: logits are bilinear. Returns gamma (heads,) = min(1, tau / s).

    wq: (heads d, C) and wk: (kv_heads d, C), or each a sequence of tensors with these rows, such as weight
    and bias, or fp32 master and bf16 copy. s_max: (heads,), after the scale, before softmax; under data
    parallelism reduce it with MAX over ranks first (see `max_logits`); a head whose s_max is not finite is
    left alone. heads, kv_heads: default len(s_max). One key head per head: queries by gamma^alpha, keys by
    gamma^(1 - alpha). Shared keys (kv_heads < heads): queries by gamma, keys untouched, which is exact per
    head; or per_group: the smallest gamma of a group for all of it, split as above, which also clips heads
    that did not ask for it. Not for attention that normalizes q and k: it would undo this. Source: Kimi K2,
    arXiv 2507.20534; momentum is not scaled."""
    heads = heads or len(s_max)
    kv_heads = kv_heads or heads
    wq, wk = ([w] if isinstance(w, Tensor) else list(w) for w in (wq, wk))
    for what, holds, found in (
        ("s_max with one number per head", s_max.shape == (heads,), tuple(s_max.shape)),
        ("heads to be a multiple of kv_heads", heads % kv_heads == 0, f"{heads} and {kv_heads}"),
        ("tau above 0 and alpha in 0 .. 1", tau > 0 and 0 <= alpha <= 1, f"{tau} and {alpha}"),
        (
            f"rows of wq in {heads} heads",
            all(w.size(0) % heads == 0 for w in wq),
            [tuple(w.shape) for w in wq],
        ),
        (
            f"rows of wk in {kv_heads} heads",
            all(w.size(0) % kv_heads == 0 for w in wk),
            [tuple(w.shape) for w in wk],
        ),
    ):
        if not holds:
            raise ValueError(f"qk_clip_: expected {what}, found {found}; change the call")
    s = s_max.float()
    gamma = torch.where((s > tau) & s.isfinite(), tau / s, 1.0)
    by_query = gamma
    by_key = torch.ones(kv_heads, device=s.device)
    if per_group or kv_heads == heads:
        shared = gamma.view(kv_heads, -1).amin(1)
        by_query = shared.repeat_interleave(heads // kv_heads) ** alpha
        by_key = shared ** (1 - alpha)
    for weights, factor in ((wq, by_query), (wk, by_key)):
        for w in weights:
            rows = factor.repeat_interleave(w.size(0) // len(factor)).to(w.device)
            rows = rows.view(-1, *[1] * (w.ndim - 1))
            w.copy_(w.to(torch.promote_types(w.dtype, torch.float32)) * rows)
    return gamma
