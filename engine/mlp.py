"""The MLP on a GPU: forward products in FP8 where that works, squared ReLU inside of products where it pays.

Shapes: T tokens, D model width, M hidden width.
"""
import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.fp8 import fp8_product, fp8_where_it_works, to_fp8
from engine.fused import squared_relu_mlp
from engine.self_test import in_one_line, largest_error, timed_ms

mlp_kernels = None
if torch.cuda.is_available():  # elsewhere Triton's import would only make each start longer
    with contextlib.suppress(ImportError):
        from engine import mlp_kernels

E4M3 = torch.float8_e4m3fn
# Rounded to e4m3 an entry grows by 2^-4 of itself at most, and a sum of products of two by this factor.
ROUNDING = (1 + 2**-4) ** 2


class GpuMlp(torch.autograd.Function):
    """squared_relu_mlp that keeps relu(x w_in^T)^2 as the only hidden tensor: the gate of the backward pass,
    2 relu, is twice its square root.

    x: (T, D) in bf16 whose rows have length sqrt(D) at most, as norm gives them. fp8: the two forward
    products are of factors in e4m3, those of gradients in bf16 (public records 84 and 89). fused: by the
    kernels of engine.mlp_kernels, which apply squared ReLU and its gradient where they write a product.
    """

    @staticmethod
    def forward(ctx, x, w_in, w_out, fp8, fused):
        if fp8:
            squared, *factors = squared_relu_in_fp8(x, w_in, fused)
            w, w_scale, _ = in_fp8(w_out)
            y = fp8_product(*factors, w, w_scale).to(x.dtype)
        else:
            if fused:
                squared = mlp_kernels.squared_relu_mm(x, w_in)
            else:
                squared = F.relu(F.linear(x, w_in)).square()
            y = F.linear(squared, w_out)
        ctx.save_for_backward(x, w_in, w_out, squared)
        ctx.fused = fused
        return y

    @staticmethod
    def backward(ctx, g):
        x, w_in, w_out, squared = ctx.saved_tensors
        # Before the kernel below: for a product torch.compile stores g once, and the kernel reads it there;
        # for the kernel alone it would store a copy.
        dw_out = g.t() @ squared
        if ctx.fused:
            dhidden = mlp_kernels.squared_relu_backward_mm(g.contiguous(), w_out, squared)
        else:
            dhidden = F.linear(g, w_out.t()) * (2 * squared.sqrt())
        return F.linear(dhidden, w_in.t()), dhidden.t() @ x, dw_out, None, None


def in_fp8(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a matrix in e4m3, its scale, and the length of its longest row, which bounds its entries: of
    floating point numbers, a scale that is so much larger takes range away, which is there, and no bits."""
    longest = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32).amax()
    return *to_fp8(w, E4M3, longest), longest


def squared_relu_in_fp8(x: Tensor, w: Tensor, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return relu(x w^T)^2 by a product in FP8, in the dtype of x; the same in e4m3; and the latter's scale.

    Its entries are bounded by the lengths of rows of x and w (Cauchy and Schwarz), so that no pass over it
    has to find the largest one, nor must that of the step before do for it.
    """
    w, w_scale, longest = in_fp8(w)
    longest_x = torch.full_like(longest, math.sqrt(x.size(1)))
    x8, x_scale = to_fp8(x, E4M3, longest_x)
    bound = (ROUNDING * longest_x * longest).square()
    scale = bound.clamp(min=1e-30) / torch.finfo(E4M3).max
    if fused:
        factors = torch.stack([x_scale * w_scale, 1 / scale])
        return *mlp_kernels.squared_relu_scaled_mm(x8, w, factors), scale
    hidden = F.relu(fp8_product(x8, x_scale, w, w_scale).float())
    squared = hidden.square()
    return squared.to(x.dtype), (squared / scale).to(E4M3), scale


# ------------------------------------------------------------------------------------------------------------
# The choice


def choose_mlp_fp8(wish: str, device: torch.device, D: int, M: int) -> tuple[bool, str]:
    """Return whether the MLP's forward products are in FP8, and the reason."""
    return fp8_where_it_works("mlp_fp8", wish, device, lambda: tested(True, False, device, D, M))


def choose_fused_mlp(fp8: bool, device: torch.device, dtype: torch.dtype, D: int, M: int) -> tuple[bool, str]:
    """Return whether the kernels of engine.mlp_kernels are used, and the reason. They must run here, come
    near the exact products, and take less time than those that they replace."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False, "only in bf16 on a GPU"
    if mlp_kernels is None:
        return False, "needs Triton"
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False, "only on Hopper and Blackwell, as elsewhere their machine code spills"
    try:
        good, words = tested(False, True, device, D, M)  # in bf16, as validation always is
        if good and fp8:
            good, words = tested(True, True, device, D, M)
        if not good:
            return False, words
        ours, plain = race(fp8, device, D, M)
    except Exception as e:  # a kernel that compiles is not yet one that works
        return False, in_one_line(e)
    return ours < plain, f"{words}, {ours:.2f} ms instead of {plain:.2f}"


def tested(fp8: bool, fused: bool, device: torch.device, D: int, M: int) -> tuple[bool, str]:
    """Return whether GpuMlp comes near the definition in values and gradients, and its error."""
    error = self_test_error(fp8, fused, device, D, M)
    good = error < (0.1 if fp8 else 0.02)  # three and eight bits, in two products one after the other
    return good, f"self-test error {error:.1e}"


def self_test_error(fp8: bool, fused: bool, device: torch.device, D: int, M: int) -> float:
    """Return the largest relative error of GpuMlp's value and gradients."""
    *leaves, g = example(256, D, M, device)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def results(y):
        return y, *torch.autograd.grad(y, leaves, g)

    exact = squared_relu_mlp(*(leaf.float() for leaf in leaves)).type_as(g)
    found = GpuMlp.apply(*leaves, fp8, fused)
    return largest_error(results(found), results(exact))


def example(T: int, D: int, M: int, device: torch.device) -> list[Tensor]:
    """Return x, w_in, w_out and a gradient, of sizes as in training."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (T, D), (M, D), (D, M), (T, D)
    x, w_in, w_out, g = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    x = F.rms_norm(x, (D,))
    leaves = x, w_in * 0.5 * D**-0.5, w_out * 0.5 * M**-0.5, g
    return [leaf.bfloat16() for leaf in leaves]


# Tokens of a slice in the last stage of track small, whose products take longer than the host to launch them.
RACE_TOKENS = 49_152


def race(fp8: bool, device: torch.device, D: int, M: int) -> tuple[float, float]:
    """Return milliseconds of the products in engine.mlp_kernels and of those that they replace. A copy stands
    for the pass over (T, M) that torch.compile makes of squared ReLU, and of its gradient."""
    x, w_in, w_out, g = example(RACE_TOKENS, D, M, device)
    hidden = F.linear(x, w_in)
    w, w_scale, _ = in_fp8(w_in)
    x8, x_scale = to_fp8(x, E4M3)
    factors = torch.stack([x_scale * w_scale, 1 / x_scale])

    def fused_products():
        if fp8:
            mlp_kernels.squared_relu_scaled_mm(x8, w, factors)
        else:
            mlp_kernels.squared_relu_mm(x, w_in)
        mlp_kernels.squared_relu_backward_mm(g, w_out, hidden)

    def plain_products():
        hidden.copy_(fp8_product(x8, x_scale, w, w_scale) if fp8 else F.linear(x, w_in))
        torch.mul(F.linear(g, w_out.t()), hidden, out=hidden)

    return timed_ms(fused_products, device), timed_ms(plain_products, device)
