"""What the self-tests of kernels share: a kernel that imports is not yet one that works."""
import time
from collections.abc import Iterable

import torch
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference in units of the expected norm; NaN if anything is."""
    found, expected = found.float(), expected.float()
    return ((found - expected).norm() / expected.norm()).item()


def largest_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Return the largest relative error of several results; NaN if one of them is."""
    return torch.tensor(list(map(relative_error, found, expected))).max().item()


def in_one_line(e: Exception) -> str:
    """Return the kind of an exception and the first line of what it says."""
    text = str(e).splitlines() or [""]
    return f"{type(e).__name__}: {text[0]}"


def timed_ms(call, device: torch.device, times: int = 20) -> float:
    """Return the time of a call, the least of three means over some calls after the first ones."""
    for _ in range(3):
        call()
    found = []
    for _ in range(3):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(device)
        found.append(1000 * (time.perf_counter() - begin) / times)
    return min(found)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
