"""Numbers and products in FP8: what the head and the MLP share."""
import os
from collections.abc import Callable

import torch
from torch import Tensor

from data.errors import UsageError
from engine.self_test import in_one_line


def fp8_where_it_works(setting: str, wish: str, device: torch.device,
                       test: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
    """Return whether products are in FP8, and the reason: a test of theirs must pass here.

    The kind of GPU decides, not a race: all ranks must compute the same, and so must a run that is resumed.
    Those with FP8 multiply in it twice as fast as in bf16. Raises UsageError where it is asked for in vain.
    """
    if os.environ.get("DISABLE_FP8", "0") not in ("", "0", "false", "False"):
        return False, "DISABLE_FP8 is set"
    if wish == "off":
        return False, f"--{setting}=off"
    if wish == "auto" and device.type != "cuda":
        return False, "only on a GPU"
    try:
        good, reason = test()
    except Exception as e:  # whatever a GPU without FP8 raises
        good, reason = False, in_one_line(e)
    if wish == "on" and not good:
        raise UsageError(f"--{setting}: expected a device whose FP8 passes the self-test, found {reason}; "
                         "leave it out")
    return good, reason


def to_fp8(x: Tensor, dtype: torch.dtype, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x in a float8 dtype and the fp32 scale that brings it back. The largest entry, or the given
    bound of it, becomes the largest number of the dtype."""
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
