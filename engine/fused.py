"""Chains of elementwise operations in one autograd function each, for a CPU without torch.compile: there every
pass over an activation and every call of an operator costs as much as a small product.

Each has its plain form beside it, which is the definition. Shapes: T tokens, D model width, M hidden width.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from muon import ONEDNN, product

# ------------------------------------------------------------------------------------------------------------
# MLP


def squared_relu_mlp(x: Tensor, w_in: Tensor, w_out: Tensor, linear=F.linear) -> Tensor:
    """Return relu(x w_in^T)^2 w_out^T. x: (T, D), w_in: (M, D), w_out: (D, M)."""
    hidden = F.relu(linear(x, w_in))
    return linear(hidden * hidden, w_out)


class SquaredReluMlp(torch.autograd.Function):
    """squared_relu_mlp in 2 passes over (T, M) beside its products instead of 8: oneDNN applies the relu where
    it writes the product, and a hidden unit at 0 has the gradient 0 because of the square."""

    @staticmethod
    def forward(ctx, x, w_in, w_out, onednn):
        if onednn:
            hidden = ONEDNN(x, w_in, None, "relu", [], "")
        else:
            hidden = F.linear(x, w_in).relu_()
        squared = hidden * hidden
        ctx.save_for_backward(x, w_in, w_out, hidden, squared)
        ctx.multiply = product if onednn else F.linear
        return ctx.multiply(squared, w_out)

    @staticmethod
    def backward(ctx, g):
        x, w_in, w_out, hidden, squared = ctx.saved_tensors
        multiply = ctx.multiply
        dhidden = multiply(g, (2 * w_out).t().contiguous()).mul_(hidden)
        # The narrower factor comes first, for that one is copied.
        dw_in = multiply(x.t(), dhidden.t()).t()
        dw_out = multiply(g.t(), squared.t())
        return multiply(dhidden, w_in.t().contiguous()), dw_in, dw_out, None


# ------------------------------------------------------------------------------------------------------------
# Residual stream


def residual_sum(factors, streams) -> Tensor:
    """Return the sum of factor times stream. factors: scalars; streams: (T, D) each."""
    total = factors[0] * streams[0]
    for factor, stream in zip(factors[1:], streams[1:]):
        total = total + factor * stream
    return total


def residual(factors, streams) -> Tensor:
    return ResidualSum.apply(*factors, *streams)


class ResidualSum(torch.autograd.Function):
    """residual_sum with one pass a term, and each factor's gradient as one dot product."""

    @staticmethod
    def forward(ctx, *factors_and_streams):
        ctx.save_for_backward(*factors_and_streams)
        n = len(factors_and_streams) // 2
        factors, streams = factors_and_streams[:n], factors_and_streams[n:]
        total = factors[0] * streams[0]
        for factor, stream in zip(factors[1:], streams[1:]):
            total.add_(stream, alpha=factor.item())
        return total

    @staticmethod
    def backward(ctx, g):
        n = len(ctx.saved_tensors) // 2
        factors, streams = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        flat = g.reshape(-1)
        of_factors = [torch.dot(flat, stream.reshape(-1)) for stream in streams]
        return *of_factors, *(factor * g for factor in factors)
