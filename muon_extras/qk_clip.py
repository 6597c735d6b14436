"""QK-Clip, which makes Muon MuonClip: after a step, heads whose attention logits have grown beyond tau are
scaled back. Source: Kimi K2, arXiv 2507.20534.

    meter = LogitMeter(layers, heads)
    for batch in micro_batches:                       # the meter keeps the largest of all batches and ranks
        ...
        meter.add_lse(layer, lse)                     # as the attention kernel returns it
    optimizer.step()
    for layer, s_max in enumerate(meter.take()):
        qk_clip_(wq[layer], wk[layer], s_max)         # or mla_qk_clip_

tau is no hard bound: it holds for the batches that the meter has seen, before the weights' next step. Where a
step moves logits by much, let it see the batch that comes next, as examples/kimi.py does. In bf16 weights a
factor within 0.4 % of 1 may round away, so that logits stay up to as much above tau. Attention that
normalizes q and k needs no clip, and would undo it.

Weights may be DTensors: each rank scales what it holds, without traffic. s_max must be equal on all ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

# ----------------------------------------------------------------------------------------------------------
# The largest logits


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor, scale: float, block: int = 1024) -> Tensor:
    """Return (heads,) fp32, the largest causal attention logit scale q_i . k_j, j <= i, of the batch. q:
    (..., heads, T, d); k: (..., kv_heads, T, d), each shared by heads / kv_heads consecutive heads. Memory:
    block x T logits per head. It costs a second product of queries and keys, and knows no mask but the causal
    one: with packed documents or windows take the log-sum-exp, see `LogitMeter.add_lse`."""
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


class LogitMeter:
    """The largest attention logit of every layer and head since the last `take`: over micro-batches, and over
    the ranks of `process_group` (default: all ranks; one process needs no torch.distributed).

    A logit that is NaN counts as infinite, so that all ranks see what one has seen; such a head is not
    clipped. Nothing waits for the device before `take`."""

    def __init__(self, layers: int, heads: int, device=None, process_group=None):
        self.seen = torch.full((layers, heads), -torch.inf, dtype=torch.float32, device=device)
        self.process_group = process_group

    @torch.no_grad()
    def add(self, layer: int, s_max: Tensor) -> None:
        """Take note of the largest logits of a batch, (heads,), as of `max_logits`."""
        heads = self.seen.size(1)
        expect("LogitMeter", ("one number per head", s_max.shape == (heads,), tuple(s_max.shape)))
        s_max = s_max.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self.seen[layer] = torch.maximum(self.seen[layer], s_max)

    @torch.no_grad()
    def add_lse(self, layer: int, lse: Tensor) -> None:
        """Take note of the log-sum-exp of every query's logits, (..., heads, T), that attention kernels
        return beside their output: from the largest logit up to ln(keys) above it. So it misses none, clips a
        little early, respects every mask and costs nothing."""
        heads = self.seen.size(1)
        fits = lse.ndim >= 2 and lse.size(-2) == heads
        expect("LogitMeter", (f"lse of shape (..., {heads}, T)", fits, tuple(lse.shape)))
        self.add(layer, lse.amax(-1).reshape(-1, heads).amax(0))

    def take(self) -> Tensor:
        """Return (layers, heads) fp32, equal on all ranks, and start anew; a collective. -inf: none seen."""
        found = self.seen
        self.seen = torch.full_like(found, -torch.inf)
        if dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MAX, self.process_group)
        return found


# ----------------------------------------------------------------------------------------------------------
# The clip


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
    parallelism the largest of all ranks (see `LogitMeter`); a head whose s_max is not finite is left alone.
    heads, kv_heads: default len(s_max). One key head per head: queries by gamma^alpha, keys by
    gamma^(1 - alpha). Shared keys (kv_heads < heads): queries by gamma, keys untouched, which is exact per
    head; or per_group: the smallest gamma of a group for all of it, split as above, which also clips heads
    that did not ask for it. Momentum is not scaled, nor is the lower half that Muon's split_mantissa keeps of
    bf16 weights: it is less than one step of bf16."""
    heads = heads or len(s_max)
    kv_heads = kv_heads or heads
    wq = as_list(wq)
    wk = as_list(wk)
    expect(
        "qk_clip_",
        ("s_max with one number per head", s_max.shape == (heads,), tuple(s_max.shape)),
        ("heads to be a multiple of kv_heads", heads % kv_heads == 0, f"{heads} and {kv_heads}"),
        ("tau above 0 and alpha in 0 .. 1", tau > 0 and 0 <= alpha <= 1, f"{tau} and {alpha}"),
        (f"rows of wq in {heads} heads", all(w.size(0) % heads == 0 for w in wq), shapes(wq)),
        (f"rows of wk in {kv_heads} heads", all(w.size(0) % kv_heads == 0 for w in wk), shapes(wk)),
    )
    gamma = clip_factors(s_max, tau)
    by_query = gamma
    by_key = torch.ones_like(gamma[:kv_heads])
    if per_group or kv_heads == heads:
        shared = gamma.view(kv_heads, -1).amin(1)
        by_query = shared.repeat_interleave(heads // kv_heads) ** alpha
        by_key = shared ** (1 - alpha)
    for weights, factor in ((wq, by_query), (wk, by_key)):
        for w in weights:
            scale_rows_(w, factor.repeat_interleave(w.size(0) // len(factor)))
    return gamma


@torch.no_grad()
def mla_qk_clip_(
    wq: Tensor | Sequence[Tensor],
    wkv: Tensor | Sequence[Tensor],
    s_max: Tensor,
    nope: int,
    rope: int,
    tau: float = 100.0,
    alpha: float = 0.5,
) -> Tensor:
    """Do what `qk_clip_` does for multi-head latent attention, whose logits are q^C . k^C + q^R . k^R per
    head with one rotary key k^R for all heads. Per head q^C is scaled by gamma^alpha, k^C by gamma^(1 -
    alpha) and q^R by gamma; k^R and the values stay as they are.

    wq: (heads (nope + rope), ...), of each head the rows of q^C, then those of q^R. wkv: (heads (nope +
    values), ...), of each head the rows of k^C, then those of its values, if they are in the same matrix.
    DeepSeek-V3's q_b_proj and kv_b_proj are laid out so. nope, rope: rows of q^C and q^R."""
    heads = len(s_max)
    wq = as_list(wq)
    wkv = as_list(wkv)
    rows = heads * (nope + rope)
    expect(
        "mla_qk_clip_",
        ("s_max with one number per head", s_max.shape == (heads,), tuple(s_max.shape)),
        ("tau above 0 and alpha in 0 .. 1", tau > 0 and 0 <= alpha <= 1, f"{tau} and {alpha}"),
        ("nope above 0 and rope 0 or more", nope > 0 and rope >= 0, f"{nope} and {rope}"),
        (f"{heads} x ({nope} + {rope}) rows of wq", all(w.size(0) == rows for w in wq), shapes(wq)),
        (
            f"rows of wkv in {heads} heads of {nope} or more",
            all(w.size(0) % heads == 0 and w.size(0) >= heads * nope for w in wkv),
            shapes(wkv),
        ),
    )
    gamma = clip_factors(s_max, tau)
    content = (gamma**alpha)[:, None].expand(heads, nope)
    rotary = gamma[:, None].expand(heads, rope)
    for w in wq:
        scale_rows_(w, torch.cat([content, rotary], 1).flatten())
    keys = (gamma ** (1 - alpha))[:, None].expand(heads, nope)
    for w in wkv:
        values = torch.ones_like(gamma)[:, None].expand(heads, w.size(0) // heads - nope)
        scale_rows_(w, torch.cat([keys, values], 1).flatten())
    return gamma


def clip_factors(s_max: Tensor, tau: float) -> Tensor:
    """Return gamma (heads,): 1 for heads below tau, and for those whose logit is not finite."""
    s = s_max.float()
    return torch.where((s > tau) & s.isfinite(), tau / s, 1.0)


def scale_rows_(w: Tensor, factors: Tensor) -> None:
    """Multiply each row of w (rows, ...) by its factor (rows,) in place, rounding once."""
    factors = factors.to(w.device).view(-1, *[1] * (w.ndim - 1))
    if isinstance(w, DTensor):
        mesh = w.device_mesh
        whole = DTensor.from_local(factors, mesh, [Replicate()] * mesh.ndim, run_check=False)
        by_rows = [placement if placement.is_shard(0) else Replicate() for placement in w.placements]
        factors = whole.redistribute(mesh, by_rows).to_local()
        w = w.to_local()
    w.copy_(w.to(torch.promote_types(w.dtype, torch.float32)) * factors)


def as_list(weights: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [weights] if isinstance(weights, Tensor) else list(weights)


def shapes(weights: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(w.shape) for w in weights]


def expect(function: str, *facts: tuple[str, bool, object]) -> None:
    """Raise ValueError for the first of some facts (expected, whether it holds, found) that does not hold."""
    for what, holds, found in facts:
        if not holds:
            raise ValueError(f"{function}: expected {what}, found {found}; change the call")
