"""Matrix products that are faster than torch's choice: in bf16 or by oneDNN on a CPU whose weights are fp32,
and the symmetric ones of Muon."""
import contextlib
import functools
from pathlib import Path

import torch

from engine.self_test import in_one_line, largest_error, relative_error
from data.errors import UsageError
from muon import (
    ONEDNN, has_bf16_units, iteration_dtype, orthogonalize, product, symmetric_product)

# ------------------------------------------------------------------------------------------------------------
# In fp32 on a CPU: MKL, which torch calls, reaches half the rate of oneDNN on an AMD processor. A processor
# with units for bf16 multiplies it two to eight times as fast as fp32.


class CpuLinear(torch.autograd.Function):
    """F.linear of x (T, D) and w (N, D), both fp32 on a CPU, by oneDNN. dtype: what the factors of the three
    products are rounded to; in bf16 their results are, too, though sums are fp32."""

    @staticmethod
    def forward(ctx, x, w, dtype=torch.float32):
        x = x.to(dtype)
        w = w.to(dtype)
        ctx.save_for_backward(x, w)
        return product(x, w).float()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(x.dtype)
        return product(g, w.t().contiguous()).float(), product(g.t(), x.t()).float(), None


def choose_bf16(wish: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[bool, str]:
    """Return whether the factors of the layers' products, of attention and of Muon's are rounded to bf16, and
    the reason. Raises UsageError where that is asked for in vain."""
    possible = device.type == "cpu" and dtype == torch.float32 and not compiled
    if wish == "bfloat16" and not possible:
        raise UsageError("--products: expected bfloat16 with fp32 weights on a CPU, eager, found another "
                         "device, dtype or --compile=on; leave it out")
    if not possible:
        return False, "only with fp32 weights on a CPU, eager"
    if wish != "auto":
        return wish == "bfloat16", "as asked for"
    if has_bf16_units():
        return True, "multiplied in hardware here"
    return False, "no units for it here"


def choose_onednn(device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[bool, str]:
    """Return whether CpuLinear takes the place of F.linear, and the reason. The kind of machine decides, not
    a race: a run must compute the same when it is resumed."""
    if device.type != "cpu" or dtype != torch.float32 or compiled:
        return False, "only in fp32 on a CPU, eager"
    if not amd_with_onednn():
        return False, "only on AMD processors with AVX-512, where it is twice as fast as MKL"
    return True, "twice as fast as MKL on AMD processors"


def amd_with_onednn() -> bool:
    cpu = Path("/proc/cpuinfo")
    return ONEDNN is not None and cpu.exists() and "AuthenticAMD" in cpu.read_text()


@contextlib.contextmanager
def onednn_batches():
    """Let torch.bmm, baddbmm and mm be oneDNN's in here, where that is twice as fast and as exact. Not for a
    whole run: torch's flash attention has so small products that it becomes four times slower."""
    with offered_to_onednn() if exact_onednn_batches() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def offered_to_onednn():
    """Let torch hand fp32 products to oneDNN, which it does where their factors may be rounded to bf16."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


@functools.cache
def exact_onednn_batches() -> bool:
    """Return whether this is an AMD processor on which oneDNN computes them in fp32. oneDNN makes use of its
    leave to round on processors with AMX; on others it does not, which is tested."""
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if not amd_with_onednn() or not hasattr(backend, "fp32_precision"):
        return False
    A, B = torch.randn(2, 4, 128, 128, generator=torch.Generator().manual_seed(0)).unbind()
    with offered_to_onednn():
        found = [torch.bmm(A, B), torch.mm(A[0], B[0])]
    exact = A.double() @ B.double()
    return largest_error(found, [exact, exact[0]]) < 1e-6


# ------------------------------------------------------------------------------------------------------------
# Symmetric products: a kernel that computes one triangle and mirrors it saves up to half


def plainly(function):
    """Return the function as it is, in place of torch.compile."""
    return function


def choose_symmetric(device: torch.device, compile=plainly) -> tuple[object, str]:
    """Return a symmetric product for Muon, and the reason: quack-kernels' on Hopper and Blackwell, if it is
    there. compile: what Muon's iteration goes through before it runs."""
    if device.type != "cuda":
        return symmetric_product, "torch, as always on a CPU"
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return symmetric_product, "torch, as quack-kernels needs Hopper or Blackwell"
    try:
        from quack.gemm_interface import gemm_symmetric
    except Exception as e:  # not only ImportError: it compiles on import
        return symmetric_product, f"torch, as quack-kernels fails: {in_one_line(e)}"
    return correct_symmetric(gemm_symmetric, device, compile)


def correct_symmetric(kernel, device: torch.device, compile=plainly) -> tuple[object, str]:
    """Return the kernel for matrices where it pays, if a whole iteration with it, compiled as the run's will
    be, agrees with torch's here."""
    def product(A, B, C=None, alpha=1.0, beta=1.0):
        if A.size(-2) <= 256:  # its tiles would be mostly empty
            return symmetric_product(A, B, C, alpha, beta)
        return kernel(A, B, C=C, alpha=alpha, beta=beta)

    dtype = iteration_dtype(device)
    X = torch.randn(2, 320, 640, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        ours = compile(orthogonalize)(X, dtype=dtype, gram=False, symmetric=product)
        exact = orthogonalize(X, dtype=dtype, gram=False, symmetric=symmetric_product)
        error = relative_error(ours, exact)
    except Exception as e:  # a kernel that imports is not yet one that works
        return symmetric_product, f"torch, as quack-kernels fails: {in_one_line(e)}"
    if error < 0.05:  # two bf16 iterations: 1.6 to 4.7 % from the exact one each
        return product, f"quack-kernels: self-test error {error:.1e}"
    return symmetric_product, f"torch, as quack-kernels has a self-test error of {error:.1e}"
