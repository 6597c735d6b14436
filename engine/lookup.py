"""Rows of large tables whose gradient is summed in the table's own format.

torch.compile sums a table's gradient in an fp32 buffer as large as the table, which it fills with zeros, adds
to, and rounds: over 5 GB of memory traffic for the tables of track small in bfloat16. torch's own kernel
sorts the ids, sums the rows of each id in fp32, and writes each sum once.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("speedrun::table_gradient", mutates_args=())
def table_gradient(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """Return the gradient of a table (rows, D) from that of its rows (..., D) at index (...)."""
    return torch.ops.aten.embedding_dense_backward(grad, index, rows, -1, False)


@table_gradient.register_fake
def _(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.size(-1))


class Lookup(torch.autograd.Function):
    """F.embedding(index, table), whose backward pass torch.compile leaves to torch's own kernel."""

    @staticmethod
    def forward(ctx, index, table):
        ctx.save_for_backward(index)
        ctx.rows = len(table)
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx, grad):
        index, = ctx.saved_tensors
        return None, table_gradient(grad.contiguous(), index, ctx.rows)
