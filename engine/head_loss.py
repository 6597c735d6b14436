"""Head and loss in one: a third of the model's matrix work, its largest activation; in FP8 where that works,
and over a sample of the vocabulary where that is asked for.

Shapes: T tokens of one packed sequence, D model width, V vocabulary (padded), K targets of a position.
"""
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.fp8 import fp8_product, fp8_where_it_works, to_fp8
from engine.sampled_softmax import Sample, capped, sampled_loss_and_gradient
from engine.self_test import largest_error
from engine.transpose import transposed
from muon import product

# ----------------------------------------------------------------------------------------------------------
# The definition


def softcap(logits: Tensor, cap: tuple[float, ...]) -> Tensor:
    """Return A sigmoid((x + B) / C): bounded logits with more room for unlikely tokens than for likely ones.
    cap: (A, B, C), or () for none."""
    if not cap:
        return logits
    A, B, C = cap
    return A * torch.sigmoid((logits + B) / C)


def multi_token_loss(logits: Tensor, targets: Tensor, weights: Tensor,
                     prefixes: Tensor | None = None) -> Tensor:
    """Return the sum over T of sum_k weights[k] * cross entropy of logits[t] and targets[t + k].

    logits: (T, V), targets: (T,), weights: (K,). Targets past the end are left out. The same logits serve all
    K, so no head is added. prefixes: (T,) one more target of each position, or -1, with the last weight.
    """
    log_z = torch.logsumexp(logits.float(), -1)
    loss = logits.new_zeros((), dtype=torch.float32)
    for weight, known, wanted in parts_of_loss(targets, weights, prefixes):
        chosen = logits[known].gather(1, wanted[:, None])
        cross_entropy = log_z[known] - chosen[:, 0].float()
        loss = loss + weight * cross_entropy.sum()
    return loss


def parts_of_loss(targets: Tensor, weights: Tensor, prefixes: Tensor | None) -> Iterator[tuple]:
    """Yield (weight, positions, their targets) of prefixes, of the next token, of the second next, ..."""
    if prefixes is not None:
        known = prefixes >= 0
        yield weights[-1], known, prefixes[known]
        weights = weights[:-1]
    for k, weight in enumerate(weights.unbind()):
        yield weight, slice(len(targets) - k), targets[k:]  # whose k-th next token is in the sequence


def sampled_loss(logits: Tensor, targets: Tensor, weights: Tensor, sample: Sample,
                 prefixes: Tensor | None = None) -> Tensor:
    """Return multi_token_loss with exp(z_y) + sum of w_j exp(z_j) over the j != y of a sample in place of the
    sum over all tokens, whose mean over samples it is. y: the target.

    Source: importance sampling as in arXiv 1412.2007. Its logarithm is too low by about half the relative
    variance of the sum.
    """
    absent = torch.full_like(logits[0], -math.inf)
    log_counts = absent.index_copy(0, sample.ids, sample.log_weights.type_as(logits))
    loss = logits.new_zeros(())
    for weight, known, wanted in parts_of_loss(targets, weights, prefixes):
        target = wanted[:, None]
        counts = log_counts.expand(len(target), -1).scatter(1, target, 0.0)  # once, drawn or not
        log_z = torch.logsumexp(logits[known] + counts, -1)
        cross_entropy = log_z - logits[known].gather(1, target)[:, 0]
        loss = loss + weight * cross_entropy.sum()
    return loss


def summed_cross_entropy(x: Tensor, head: Tensor, targets: Tensor, cap: tuple[float, ...], linear) -> Tensor:
    """Return the summed cross entropy of the next token, fp32. x: (T, D), head: (V, D), targets: (T,)."""
    logits = softcap(linear(x, head).float(), cap)
    return F.cross_entropy(logits, targets, reduction="sum")


# ----------------------------------------------------------------------------------------------------------
# The same in one pass

HEAD_PIECE = 8192  # tokens whose logits lie in memory at a time; all 49152 of a slice of track small: 5 GB


def head_loss(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: tuple[float, ...],
              size: int = HEAD_PIECE, fp8: bool = False, onednn: bool = False, prefixes: Tensor | None = None,
              slices: int = 1, sample: Sample | None = None, lookup: Callable = F.embedding) -> Tensor:
    """Return multi_token_loss(softcap(x @ head.T)), or with a sample sampled_loss of these logits.

    x: (T, D), head: (V, D). size: tokens whose logits over all rows are made at a time. fp8: products in FP8,
    see to_fp8; onednn: products in fp32 by oneDNN. prefixes: as in multi_token_loss. slices: equal parts of
    the sequence, whose losses are added up. Only rows of a sample meet every token: one lookup(index, head)
    brings them and the row of each target, so that all their gradients are summed in one table.
    """
    ahead, token_weights = targets_ahead(targets, weights, prefixes, slices)
    most = weights.sum()  # of a token
    if sample is None:
        return HeadLoss.apply(x, head, ahead, token_weights, most, cap, size, fp8, onednn)

    R = len(sample.ids)
    size *= len(head) // R  # no more logits at a time than without a sample
    index = torch.cat([sample.ids, ahead.clamp(min=0).flatten()])
    rows, wanted = lookup(index, head).split([R, ahead.numel()])
    wanted = wanted.view(*ahead.shape, -1)
    products = x[:, None].float() * wanted.float()
    own = products.sum(-1)  # (T, K) logits of the targets
    return HeadLoss.apply(x, rows, ahead, token_weights, most, cap, size, fp8, onednn, own, *sample)


class HeadLoss(torch.autograd.Function):
    """head_loss with its gradients in the same pass, `size` tokens at a time.

    The logits of a piece are read twice and forgotten (in fp32 they need not be stored once compiled), and
    what is kept for the backward pass is as large as x and head. ahead, weights: of targets_ahead; most: the
    largest sum of a token's weights. With a sample head has its rows alone, and own the targets' logits.
    """

    @staticmethod
    def forward(ctx, x, head, ahead, weights, most, cap, size, fp8, onednn,
                own=None, ids=None, log_weights=None):
        if fp8:
            slope = cap[0] / cap[2] / 4 if cap else 1.0  # the steepest of the softcap
            products = Fp8Products(head, slope * most)
        else:
            products = PlainProducts(head, onednn)

        loss = 0.0
        dx = []
        dhead = 0.0
        down = []
        before = ()  # gradients of the last piece
        for first in range(0, len(x), size):
            rows = slice(first, min(first + size, len(x)))
            logits = products.logits(x[rows])
            piece_weights = computed_after(before, weights[rows])
            if own is None:
                piece, g = loss_and_gradient(logits, ahead[rows], piece_weights, cap)
            else:
                sample = Sample(ids, log_weights)
                piece, g, down_piece = sampled_loss_and_gradient(
                    logits, own[rows], sample, ahead[rows], piece_weights, cap)
                down.append(down_piece)
            loss = loss + piece
            before = dx_piece, dhead_piece = products.gradients(g.to(x.dtype), x[rows])
            dx.append(dx_piece)
            dhead = dhead + dhead_piece
        dx = torch.cat(dx).to(x.dtype)
        gradients = [dx, dhead.to(head.dtype)]
        if down:
            gradients.append(torch.cat(down))
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dhead, *down = ctx.saved_tensors
        dx = dx * grad.to(dx.dtype)
        dhead = dhead * grad.to(dhead.dtype)
        down = down[0] * grad if down else None
        of_options = [None] * 7
        return dx, dhead, *of_options, down, None, None


def targets_ahead(targets: Tensor, weights: Tensor, prefixes: Tensor | None,
                  slices: int) -> tuple[Tensor, Tensor]:
    """Return the targets of each position and their weights, both (T, K); weight 0, and perhaps id -1, where
    there is none. prefixes, slices: as in head_loss."""
    T = len(targets)
    K = len(weights) - (prefixes is not None)
    padded = F.pad(targets, (0, K - 1), value=-1)
    ahead = padded.unfold(0, K, 1)  # (T, K): the next token, the second next, ...
    length = T // slices
    t = torch.arange(T, device=targets.device)[:, None] % length
    exists = t + torch.arange(K, device=targets.device) < length
    token_weights = weights[:K] * exists
    if prefixes is not None:
        column = prefixes[:, None]
        column_weights = weights[K:] * (column >= 0)
        ahead = torch.cat([ahead, column], 1)
        token_weights = torch.cat([token_weights, column_weights], 1)
    return ahead, token_weights


def computed_after(before: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """Return x (tokens, K). torch.compile can only make it after the matrices in `before`, and keeps it.

    Otherwise it goes through all pieces in one kernel, as they have the weights of the loss in common, and
    the logits of all of them lie in memory.
    """
    if not torch.compiler.is_compiling():
        return x
    for matrix in before:
        x = x + 0.0 * matrix[0, 0]
    return x.as_strided(x.shape, (x.size(1), 1))


def loss_and_gradient(logits: Tensor, ahead: Tensor, weights: Tensor, cap) -> tuple[Tensor, Tensor]:
    """Return the summed loss of some tokens and its gradient of their logits (tokens, V), both fp32.

    logits: (tokens, V) before the cap; ahead, weights: (tokens, K) targets and their weights, 0 for none. The
    gradient of the capped z is sum(w) softmax(z) - w at each target.
    """
    z, slope = capped(logits, cap)
    log_z = torch.logsumexp(z, -1, keepdim=True)
    total = weights.sum(-1, keepdim=True)
    g = (z - log_z).exp_().mul_(total)
    if torch.compiler.is_compiling():  # comparisons melt into the kernel around them; a scatter would end it
        ids = torch.arange(logits.size(1), device=logits.device)
        of_tokens = (total * log_z)[:, 0]
        for k in range(ahead.size(1)):
            hit = ids == ahead[:, k, None]
            chosen = torch.where(hit, z, 0.0).sum(-1)
            of_tokens = of_tokens - weights[:, k] * chosen
            g = g - torch.where(hit, weights[:, k, None], 0.0)
        loss = of_tokens.sum()
    else:
        chosen = z.gather(1, ahead.clamp(min=0))
        loss = (weights * (log_z - chosen)).sum()
        g.scatter_add_(1, ahead.clamp(min=0), -weights)
    if cap:
        g = g.mul_(slope)
    return loss, g


class PlainProducts:
    """The three products of the head in the dtype of its weights. head: (V, D)."""

    def __init__(self, head: Tensor, onednn: bool):
        self.head = head
        self.multiply = product if onednn else F.linear
        self.across = head.t().contiguous() if onednn else head.t()

    def logits(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.head)

    def gradients(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of x (tokens, D) and of the head (V, D) from that of the logits."""
        dx = self.multiply(g, self.across)
        dhead = self.multiply(g.t(), x.t())
        return dx, dhead


class Fp8Products:
    """The three products of the head in FP8. bound: of the largest entry of a logit's gradient, so that no
    pass over the gradient has to find it."""

    def __init__(self, head: Tensor, bound: Tensor):
        self.head, self.scale = to_fp8(head, torch.float8_e4m3fn)
        self.across = transposed(self.head)
        self.bound = bound

    def logits(self, x: Tensor) -> Tensor:
        self.x, self.x_scale = to_fp8(x, torch.float8_e4m3fn)
        return fp8_product(self.x, self.x_scale, self.head, self.scale)

    def gradients(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the x that logits() saw last and of the head."""
        g, g_scale = to_fp8(g, torch.float8_e5m2, self.bound)
        dx = fp8_product(g, g_scale, self.across, self.scale)
        return dx, fp8_product(transposed(g), g_scale, transposed(self.x), self.x_scale)


# ----------------------------------------------------------------------------------------------------------
# The choice


def choose_fp8(wish: str, device: torch.device) -> tuple[bool, str]:
    """Return whether head_loss uses FP8, and the reason. It must come near the exact gradients."""
    return fp8_where_it_works("fp8_head", wish, device, lambda: tested(device))


def tested(device: torch.device) -> tuple[bool, str]:
    """Return whether the two gradients in FP8 are near those in bf16, and their larger relative error."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    head = torch.randn(128, 32, generator=generator)
    x, head = (leaf.to(device, torch.bfloat16).requires_grad_() for leaf in (x, head))
    targets = torch.arange(64, device=device)
    weights = torch.ones(2, device=device)

    def gradients(fp8: bool):
        loss = head_loss(x, head, targets, weights, (23.0, 5.0, 7.5), 32, fp8)
        return torch.autograd.grad(loss, (x, head))

    error = largest_error(gradients(True), gradients(False))
    return error < 0.15, f"self-test error {error:.1e}"  # e5m2 keeps two bits: 2^-3 at most per entry
