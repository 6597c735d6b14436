"""Products of the MLP in Triton that apply squared ReLU, or its gradient, where they write their result.
Their definitions in plain PyTorch stand beside them in engine.mlp.

Shapes: T tokens, D model width, M hidden width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

TILE = 128  # rows and columns of the result that a block of threads computes
DEPTH_BYTES = 128  # of each row that it loads at a time
# Three stages take 96 KiB of shared memory, so that one block computes while another one stores.
OPTIONS = dict(num_warps=8, num_stages=3)


@triton.jit
def corner(columns, TILE: tl.constexpr):
    """Return the first row and column of this block's tile. Blocks that run together share their rows, and
    the weights stay in the second cache."""
    across = tl.cdiv(columns, TILE)
    return tl.program_id(0) // across * TILE, tl.program_id(0) % across * TILE


@triton.jit
def squared_relu_tile(
    x, w, squared, squared8, factors, M, D, FP8: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """Compute a tile of relu(x w^T)^2, all given as descriptors of (T, D), (M, D) and (T, M). FP8: x w^T is
    multiplied by the first of two factors, and the result by the second one is stored in e4m3, too."""
    row, column = corner(M, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, D, DEPTH):
        total = tl.dot(x.load([row, k]), w.load([column, k]).T, total)
    if FP8:
        total *= tl.load(factors)
    total = tl.maximum(total, 0.0)
    total *= total
    squared.store([row, column], total.to(squared.dtype))
    if FP8:
        squared8.store([row, column], (total * tl.load(factors + 1)).to(squared8.dtype))


@triton.jit
def squared_relu_backward_tile(
    g, w, squared, result, M, D, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """Compute a tile of (g w) 2 sqrt(squared), all given as descriptors of (T, D), (D, M) and (T, M)."""
    row, column = corner(M, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, D, DEPTH):
        total = tl.dot(g.load([row, k]), w.load([k, column]), total)
    gate = 2 * tl.sqrt(squared.load([row, column]).to(tl.float32))
    result.store([row, column], (total * gate).to(result.dtype))


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, columns])


def blocks(T: int, M: int) -> tuple[int]:
    return (triton.cdiv(T, TILE) * triton.cdiv(M, TILE),)


def launch_squared_relu(
    x: Tensor, w: Tensor, factors: Tensor, squared: Tensor, squared8: Tensor
) -> None:
    (T, D), M = x.shape, len(w)
    depth = DEPTH_BYTES // x.itemsize
    squared_relu_tile[blocks(T, M)](
        described(x, TILE, depth),
        described(w, TILE, depth),
        described(squared, TILE, TILE),
        described(squared8, TILE, TILE),
        factors,
        M,
        D,
        FP8=x.itemsize == 1,
        TILE=TILE,
        DEPTH=depth,
        **OPTIONS,
    )


# ------------------------------------------------------------------------------------------------------------
# As operations that torch.compile takes as they are


@torch.library.custom_op("engine::squared_relu_mm", mutates_args=())
def squared_relu_mm(x: Tensor, w: Tensor) -> Tensor:
    """Return relu(x w^T)^2. x: (T, D), w: (M, D), in bf16."""
    squared = x.new_empty(len(x), len(w))
    launch_squared_relu(x, w, x, squared, squared)
    return squared


@torch.library.custom_op("engine::squared_relu_scaled_mm", mutates_args=())
def squared_relu_scaled_mm(x: Tensor, w: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return y = relu(factors[0] x w^T)^2 in bf16 and factors[1] y in e4m3. x: (T, D), w: (M, D), in e4m3."""
    squared = x.new_empty(len(x), len(w), dtype=torch.bfloat16)
    squared8 = torch.empty_like(squared, dtype=x.dtype)
    launch_squared_relu(x, w, factors, squared, squared8)
    return squared, squared8


@torch.library.custom_op("engine::squared_relu_backward_mm", mutates_args=())
def squared_relu_backward_mm(g: Tensor, w: Tensor, squared: Tensor) -> Tensor:
    """Return (g w) 2 sqrt(squared). g: (T, D), w: (D, M), squared: (T, M), in bf16."""
    (T, D), M = g.shape, w.size(1)
    depth = DEPTH_BYTES // g.itemsize
    result = torch.empty_like(squared)
    squared_relu_backward_tile[blocks(T, M)](
        described(g, TILE, depth),
        described(w, depth, TILE),
        described(squared, TILE, TILE),
        described(result, TILE, TILE),
        M,
        D,
        TILE=TILE,
        DEPTH=depth,
        **OPTIONS,
    )
    return result


@squared_relu_mm.register_fake
def _(x, w):
    return x.new_empty(len(x), len(w))


@squared_relu_scaled_mm.register_fake
def _(x, w, factors):
    squared = x.new_empty(len(x), len(w), dtype=torch.bfloat16)
    return squared, torch.empty_like(squared, dtype=x.dtype)


@squared_relu_backward_mm.register_fake
def _(g, w, squared):
    return torch.empty_like(squared)


@register_flop_formula([torch.ops.engine.squared_relu_mm, torch.ops.engine.squared_relu_scaled_mm])
def flops_of_squared_relu(x, w, *others, **kwargs) -> int:
    return 2 * x[0] * x[1] * w[0]


@register_flop_formula(torch.ops.engine.squared_relu_backward_mm)
def flops_of_squared_relu_backward(g, w, *others, **kwargs) -> int:
    return 2 * g[0] * g[1] * w[1]
