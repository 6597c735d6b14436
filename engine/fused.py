"""Chains of operations in one autograd function each, for a CPU without torch.compile: there every pass over
an activation and every call of an operator costs as much as a small product.

Each has a plain form, its definition. Shapes: T tokens, D model width, M hidden width, H heads, d head width.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.products import onednn_batches
from muon import ONEDNN, product

# ------------------------------------------------------------------------------------------------------------
# MLP


def squared_relu_mlp(x: Tensor, w_in: Tensor, w_out: Tensor, linear=F.linear) -> Tensor:
    """Return relu(x w_in^T)^2 w_out^T. x: (T, D), w_in: (M, D), w_out: (D, M)."""
    hidden = F.relu(linear(x, w_in))
    return linear(hidden * hidden, w_out)


class SquaredReluMlp(torch.autograd.Function):
    """squared_relu_mlp in 2 passes over (T, M) beside its products instead of 8.

    oneDNN applies the relu where it writes the product, and a hidden unit at 0 has the gradient 0 because of
    the square. dtype: of the factors of all products and of what is between them.
    """

    @staticmethod
    def forward(ctx, x, w_in, w_out, onednn, dtype):
        ctx.multiply = product if onednn else F.linear
        ctx.given = x.dtype
        x, w_in, w_out = (factor.to(dtype) for factor in (x, w_in, w_out))
        if onednn:
            hidden = ONEDNN(x, w_in, None, "relu", [], "")
        else:
            hidden = F.linear(x, w_in).relu_()
        squared = hidden * hidden
        ctx.save_for_backward(x, w_in, w_out, hidden, squared)
        return ctx.multiply(squared, w_out).to(ctx.given)

    @staticmethod
    def backward(ctx, g):
        x, w_in, w_out, hidden, squared = ctx.saved_tensors
        multiply = ctx.multiply
        g = g.to(x.dtype)
        dhidden = multiply(g, (2 * w_out).t().contiguous()).mul_(hidden)
        # The narrower factor comes first, for that one is copied.
        dw_in = multiply(x.t(), dhidden.t()).t()
        dw_out = multiply(g.t(), squared.t())
        dx = multiply(dhidden, w_in.t().contiguous())
        return dx.to(ctx.given), dw_in.to(ctx.given), dw_out.to(ctx.given), None, None


# ------------------------------------------------------------------------------------------------------------
# Norm and rotary embedding


def norm(x: Tensor) -> Tensor:
    """RMS norm without learned gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel j of x (..., d) with channel r + j, for j < r = cos.size(-1); the others stay."""
    r = cos.size(-1)
    a, b, still = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, still], -1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary to x in place."""
    r = cos.size(-1)
    a, b = x[..., :r], x[..., r : 2 * r]
    into_b = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(into_b)
    return x


def normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return norm(x) and the factor (..., 1) that makes it of x."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    factor = size.square_().div_(x.size(-1)).add_(torch.finfo(x.dtype).eps).rsqrt_()
    return x * factor, factor


def through_norm(g: Tensor, y: Tensor, factor: Tensor) -> Tensor:
    """Return the gradient of x from that of y = factor x: what is along y is lost, as y keeps its length."""
    along = (g * y).sum(-1, keepdim=True).div_(y.size(-1))
    return torch.addcmul(g, y, along, value=-1).mul_(factor)


class RmsNorm(torch.autograd.Function):
    """The same as norm, in a third of the time."""

    @staticmethod
    def forward(ctx, x):
        y, factor = normalized(x)
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx, g):
        return through_norm(g, *ctx.saved_tensors)


class NormAndScaled(torch.autograd.Function):
    """norm(x) and factor * x of x (T, D), of which only the norm and a number a token are kept: the norm
    divided by that number is x, for which the factor's gradient asks. factor: a scalar, or (T, 1) in the type
    of x."""

    @staticmethod
    def forward(ctx, x, factor):
        square = x.float().square().mean(-1, keepdim=True)
        size = torch.rsqrt(square + torch.finfo(torch.float32).eps)
        y = (x * size).type_as(x)
        ctx.save_for_backward(y, size, factor)
        return y, factor * x

    @staticmethod
    def backward(ctx, g_norm, g_scaled):
        y, size, factor = ctx.saved_tensors
        along = (g_norm.float() * y).mean(-1, keepdim=True)
        across = (g_norm - along * y) * size
        x = (y / size).type_as(y)
        of_factor = (g_scaled * x).sum_to_size(factor.shape).type_as(factor)
        return across.type_as(x) + factor * g_scaled, of_factor


class NormAndRotary(torch.autograd.Function):
    """rotary(norm(x)) in a third of the time. A rotation keeps lengths and angles, so that the gradient goes
    through the norm as if the norm came last, and is rotated back then."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        y, factor = normalized(x)
        rotate_(y, cos, sin)
        ctx.save_for_backward(y, factor, cos, sin)
        return y

    @staticmethod
    def backward(ctx, g):
        y, factor, cos, sin = ctx.saved_tensors
        return rotate_(through_norm(g, y, factor), cos, -sin), None, None


class RotaryOfNorm(torch.autograd.Function):
    """size * rotary(norm(x)) of x (T, H, d) in one kernel a pass by torch.compile. size: (), positive."""

    @staticmethod
    def forward(ctx, x, cos, sin, size):
        square = x.float().square().mean(-1, keepdim=True)
        factor = size * torch.rsqrt(square + torch.finfo(torch.float32).eps)
        y = rotary((x * factor).type_as(x), cos, sin)
        ctx.save_for_backward(y, factor, cos, sin, size)
        return y

    @staticmethod
    def backward(ctx, g):
        y, factor, cos, sin, size = ctx.saved_tensors
        # Divided within the mean: with one more tensor to read after it, torch.compile would store `across`.
        along = (g.float() * y / size.square()).mean(-1, keepdim=True)
        across = (g - along * y) * factor
        return rotary(across.type_as(g), cos, -sin), None, None, None


class StoredGradient(torch.autograd.Function):
    """x, whose gradient is stored where it is computed. torch.compile would compute it anew, of several
    tensors, in each kernel that reads it: one that adds another gradient of x, or a norm's backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g.as_strided(g.shape, g.stride())


# ------------------------------------------------------------------------------------------------------------
# Residual stream


def residual_sum(added, factors, streams) -> Tensor:
    """Return added and the sum of factor times stream. factors: scalars; added, streams: (T, D) each."""
    total = factors[0] * streams[0] + added
    for factor, stream in zip(factors[1:], streams[1:]):
        total = total + factor * stream
    return total


def residual(added, factors, streams) -> Tensor:
    return ResidualSum.apply(added, *factors, *streams)


class ResidualSum(torch.autograd.Function):
    """residual_sum with one pass a term, and each factor's gradient as one dot product."""

    @staticmethod
    def forward(ctx, added, *factors_and_streams):
        ctx.save_for_backward(*factors_and_streams)
        n = len(factors_and_streams) // 2
        factors, streams = factors_and_streams[:n], factors_and_streams[n:]
        total = torch.add(added, streams[0], alpha=factors[0].item())
        for factor, stream in zip(factors[1:], streams[1:]):
            total.add_(stream, alpha=factor.item())
        return total

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # looked at once only: a recomputed layer gives each of them once
        n = len(saved) // 2
        factors, streams = saved[:n], saved[n:]
        flat = g.reshape(-1)
        of_factors = [torch.dot(flat, stream.reshape(-1)) for stream in streams]
        return g, *of_factors, *(factor * g for factor in factors)


# ------------------------------------------------------------------------------------------------------------
# Attention in blocks of W queries


class BlockProducts(torch.autograd.Function):
    """blocked_attention of engine.attention with its probabilities kept, which is 1.3 to 2 times as fast.

    Block n of head h is row h N + n of a batch (B, W, d). Its keys are the 2 W rows up to its last one, which
    overlap with those of the block before; where that is the last one of another head, the mask hides it.
    """

    @staticmethod
    @onednn_batches()
    def forward(ctx, q, k, v, mask, scale):
        T, H, d = q.shape
        N, _, W, _ = mask.shape
        q = rows_by_head(q, N * W, 0).view(H * N, W, d)
        k = rows_by_head(k, N * W, W)
        v = rows_by_head(v, N * W, W)

        hidden = torch.zeros(N, W, 2 * W, dtype=q.dtype)
        hidden.masked_fill_(~mask[:, 0], -torch.inf)
        scores = torch.bmm(q.mul_(scale), windows(k, W).mT)
        scores.view(H, N, W, 2 * W).add_(hidden)
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        y = torch.bmm(p, windows(v, W))
        return by_token(y, H, T)

    @staticmethod
    @onednn_batches()
    def backward(ctx, g):
        q, k, v, p = ctx.saved_tensors
        T, H, d = g.shape
        W = p.size(1)
        length = len(p) // H * W
        g = rows_by_head(g, length, 0).view(-1, W, d)

        dv = torch.bmm(p.mT, g)
        dp = torch.bmm(g, windows(v, W).mT)
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq = torch.bmm(dscores, windows(k, W)).mul_(ctx.scale)
        dk = torch.bmm(dscores.mT, q)

        dk = fold(dk)
        dv = fold(dv)
        return by_token(dq, H, T), by_token(dk, H, T), by_token(dv, H, T), None, None


def rows_by_head(x: Tensor, length: int, before: int) -> Tensor:
    """Map (T, H, d) to (before + H length, d): each head in one piece, zeros before all and after T."""
    T, H, d = x.shape
    rows = x.new_empty(before + H * length, d)
    rows[:before] = 0
    heads = rows[before:].view(H, length, d)
    heads[:, :T] = x.transpose(0, 1)
    heads[:, T:] = 0
    return rows


def windows(rows: Tensor, W: int) -> Tensor:
    """Map (W + B W, d) to B overlapping windows (B, 2 W, d)."""
    d = rows.size(1)
    return rows.as_strided((len(rows) // W - 1, 2 * W, d), (W * d, d, 1))


def fold(x: Tensor) -> Tensor:
    """Map (B, 2 W, d) gradients of windows to (B, W, d) of the rows that overlap in them."""
    W = x.size(1) // 2
    total = x[:, W:]
    total[:-1] += x[1:, :W]
    return total


def by_token(x: Tensor, H: int, T: int) -> Tensor:
    """Map (H N, W, d) blocks to (T, H, d)."""
    by_head = x.reshape(H, -1, x.size(-1))
    return by_head[:, :T].transpose(0, 1)
