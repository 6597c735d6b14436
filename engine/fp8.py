"""Numbers and products in FP8: what the head and the MLP share."""
import os

import torch
from torch import Tensor


def fp8_disabled() -> bool:
    return os.environ.get("DISABLE_FP8", "0") not in ("", "0", "false", "False")


def to_fp8(x: Tensor, dtype: torch.dtype, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x in a float8 dtype and the fp32 scale that brings it back.

    The largest entry, or the given bound of it, becomes the largest number of the dtype.
    """
    largest = x.abs().amax() if largest is None else largest
    scale = largest.float().clamp(min=1e-30) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def fp8_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Multiply (m, k) and (n, k) in float8 to a @ b.T (m, n) in bfloat16.

    Sums are fp32, but for products of two e4m3, which are as fast as the hardware can. The second factor of a
    scaled product must lie in memory by columns, which b.T does.
    """
    fast = a.dtype == b.dtype == torch.float8_e4m3fn
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)
