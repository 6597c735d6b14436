"""Beside muon.py: which parameters of a model belong to Muon, and QK-Clip (MuonClip of Kimi K2)."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def split_params(model: nn.Module, verbose: bool = True) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Propose ([(name, parameter)] for Muon, the same for AdamW) and print the routing with its reasons.

    Muon gets matrices, banks and convolutions inside the network. AdamW gets the rest: scalars and vectors (also as a matrix
    with one row or column), embeddings, what shares its tensor with one, and the output head: a Linear called head, lm_head
    or classifier, or the last one of the model if it is shaped as an embedding. Frozen parameters are left out. Look at the
    print-out: a network of another kind may call for another choice."""
    tables = {m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    linears = [(name, m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    heads = {w for name, w in linears if name.rpartition(".")[2].lower() in ("head", "lm_head", "classifier")
             or (w is linears[-1][1] and w.shape in {t.shape for t in tables})}
    routes = {"Muon": [], "AdamW": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.numel() == 0 or not p.is_floating_point():
            why = "empty" if p.numel() == 0 else "not real"
        elif p in tables or "embed" in name.lower():
            why = "embedding"
        elif p.ndim < 2 or max(p.shape) == p.numel():
            why = "vector" if p.numel() > 1 else "scalar"
        elif p in heads:
            why = "head"
        else:
            why = ""
        routes["AdamW" if why else "Muon"].append((name, p))
        if verbose:
            print(f"{'AdamW' if why else 'Muon':5}  {name}  {tuple(p.shape)}{f'  {why}' if why else ''}")
    return routes["Muon"], routes["AdamW"]


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor, scale: float, block: int = 1024) -> Tensor:
    """(heads,) fp32: the largest causal attention logit scale q_i . k_j, j <= i, per head, over the batch. q: (..., heads, T,
    d); k: (..., kv_heads, T, d), each shared by heads / kv_heads consecutive heads. Memory: block x T logits per head."""
    heads, T = q.shape[-3:-1]
    q, k = q.flatten(0, -4) if q.ndim > 3 else q[None], k.flatten(0, -4) if k.ndim > 3 else k[None]
    k, best = k.repeat_interleave(heads // k.size(1), 1), torch.full((heads,), -torch.inf, device=q.device)
    for begin in range(0, T, block):
        end = min(begin + block, T)
        S = (q[:, :, begin:end] @ k[:, :, :end].mT).float() * scale
        S.masked_fill_(torch.ones(end - begin, end, dtype=torch.bool, device=q.device).triu(begin + 1), -torch.inf)
        best = torch.maximum(best, S.amax((0, 2, 3)))
    return best


@torch.no_grad()
def qk_clip_(wq: Tensor | Sequence[Tensor], wk: Tensor | Sequence[Tensor], s_max: Tensor, tau: float = 100.0,
             alpha: float = 0.5, heads: int | None = None, kv_heads: int | None = None, per_group: bool = False) -> Tensor:
    """Scale query and key projections in place after an optimizer step, so that a head whose largest logit was s > tau
    would have had tau: logits are bilinear. Returns gamma (heads,) = min(1, tau / s).

    wq: (heads d, C) and wk: (kv_heads d, C), or each a sequence of tensors with these rows, such as weight and bias, or fp32
    master and bf16 copy. s_max: (heads,), after the scale, before softmax; under data parallelism reduce it with MAX over
    ranks first (see `max_logits`); a head whose s_max is not finite is left alone. heads, kv_heads: default len(s_max).
    One key head per head: queries by gamma^alpha, keys by gamma^(1 - alpha). Shared keys (kv_heads < heads): queries by
    gamma, keys untouched, which is exact per head; or per_group: the smallest gamma of a group for all of it, split as
    above, which also clips heads that did not ask for it. Not for attention that normalizes q and k: it would undo this.
    Source: Kimi K2, arXiv 2507.20534; momentum is not scaled."""
    heads = heads or len(s_max)
    kv_heads = kv_heads or heads
    wq, wk = ([w] if isinstance(w, Tensor) else list(w) for w in (wq, wk))
    for what, holds, found in (
            ("s_max with one number per head", s_max.shape == (heads,), tuple(s_max.shape)),
            ("heads to be a multiple of kv_heads", heads % kv_heads == 0, f"{heads} and {kv_heads}"),
            ("tau above 0 and alpha in 0 .. 1", tau > 0 and 0 <= alpha <= 1, f"{tau} and {alpha}"),
            (f"rows of wq in {heads} heads", all(w.size(0) % heads == 0 for w in wq), [tuple(w.shape) for w in wq]),
            (f"rows of wk in {kv_heads} heads", all(w.size(0) % kv_heads == 0 for w in wk), [tuple(w.shape) for w in wk])):
        if not holds:
            raise ValueError(f"qk_clip_: expected {what}, found {found}; change the call")
    s = s_max.float()
    gamma = torch.where((s > tau) & s.isfinite(), tau / s, 1.0)
    by_query, by_key = gamma, torch.ones(kv_heads, device=s.device)
    if per_group or kv_heads == heads:
        shared = gamma.view(kv_heads, -1).amin(1)
        by_query, by_key = shared.repeat_interleave(heads // kv_heads) ** alpha, shared ** (1 - alpha)
    for weights, factor in ((wq, by_query), (wk, by_key)):
        for w in weights:
            rows = factor.repeat_interleave(w.size(0) // len(factor)).to(w.device).view(-1, *[1] * (w.ndim - 1))
            w.copy_(w.to(torch.promote_types(w.dtype, torch.float32)) * rows)
    return gamma
