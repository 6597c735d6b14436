"""Matrix products that are faster than torch's choice:
in fp32 on AMD processors, and the symmetric ones of Muon."""
from pathlib import Path

import torch

from engine.self_test import in_one_line, relative_error
from muon import ONEDNN, orthogonalize, product, symmetric_product

# ------------------------------------------------------------------------------------------------------------
# In fp32 on a CPU: MKL, which torch calls, reaches half the rate of oneDNN on an AMD processor


class OneDnnLinear(torch.autograd.Function):
    """F.linear of x (T, D) and w (N, D), both fp32 on a CPU, by oneDNN."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return product(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return product(g, w.t().contiguous()), product(g.t(), x.t())


def choose_onednn(device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[bool, str]:
    """Return whether OneDnnLinear takes the place of F.linear, and the reason.

    The kind of machine decides, not a race: a run must compute the same when it is resumed.
    """
    if device.type != "cpu" or dtype != torch.float32 or compiled:
        return False, "only in fp32 on a CPU, eager"
    cpu = Path("/proc/cpuinfo")
    if ONEDNN is None or not cpu.exists() or "AuthenticAMD" not in cpu.read_text():
        return False, "only on AMD processors with AVX-512, where it is twice as fast as MKL"
    return True, "twice as fast as MKL on AMD processors"


# ------------------------------------------------------------------------------------------------------------
# Symmetric products: a kernel that computes one triangle and mirrors it saves up to half


def choose_symmetric(device: torch.device) -> tuple[object, str]:
    """Return a symmetric product for Muon, and the reason:
    quack-kernels' on Hopper and Blackwell, if it is there."""
    if device.type != "cuda":
        return symmetric_product, "torch, as always on a CPU"
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return symmetric_product, "torch, as quack-kernels needs Hopper or Blackwell"
    try:
        from quack.gemm_interface import gemm_symmetric
    except Exception as e:  # not only ImportError: it compiles on import
        return symmetric_product, f"torch, as quack-kernels fails: {in_one_line(e)}"
    return correct_symmetric(gemm_symmetric, device)


def correct_symmetric(kernel, device: torch.device) -> tuple[object, str]:
    """Return the kernel for matrices where it pays, if a whole iteration with it agrees with torch's here."""
    def product(A, B, C=None, alpha=1.0, beta=1.0):
        if A.size(-2) <= 256:  # its tiles would be mostly empty
            return symmetric_product(A, B, C, alpha, beta)
        return kernel(A, B, C=C, alpha=alpha, beta=beta)

    X = torch.randn(2, 320, 640, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        ours = orthogonalize(X, form="standard", symmetric=product)
        exact = orthogonalize(X, form="standard", symmetric=symmetric_product)
        error = relative_error(ours, exact)
    except Exception as e:  # a kernel that imports is not yet one that works
        return symmetric_product, f"torch, as quack-kernels fails: {in_one_line(e)}"
    if error < 0.05:  # two bf16 iterations: 1.6 to 4.7 % from the exact one each
        return product, f"quack-kernels: self-test error {error:.1e}"
    return symmetric_product, f"torch, as quack-kernels has a self-test error of {error:.1e}"
