"""A transposed copy in tiles: what torch.compile makes of x.t().contiguous() beside other work may write one
byte here and one a whole row further on."""
import contextlib

import torch
from torch import Tensor

triton = None
if torch.cuda.is_available():  # elsewhere its import would only make each start longer
    with contextlib.suppress(ImportError):
        import triton
        import triton.language as tl

TILE = 128  # rows and columns of one byte each: whole lines of cache on both sides

if triton:
    @triton.jit
    def transpose_tile(x, y, rows, columns, TILE: tl.constexpr):
        """Copy one tile of x (rows, columns) to its place in y (columns, rows)."""
        r = tl.program_id(0) * TILE + tl.arange(0, TILE)
        c = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = (r[:, None] < rows) & (c[None, :] < columns)
        tile = tl.load(x + r[:, None] * columns + c[None, :], mask=inside)
        tl.store(y + c[:, None] * rows + r[None, :], tl.trans(tile), mask=tl.trans(inside))


def transposed(x: Tensor) -> Tensor:
    """Return x.t().contiguous() of an (m, n) tensor whose entries have one byte, m n below 2^31."""
    if not (triton and x.is_cuda):
        return x.t().contiguous()
    rows, columns = x.shape
    x = x.as_strided(x.shape, x.stride())  # else torch.compile would compute x anew for each of its readers
    y = torch.empty(columns, rows, dtype=x.dtype, device=x.device)
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    transpose_tile[grid](x, y, rows, columns, TILE, num_warps=8)
    return y
