"""What this device can do: one object that is chosen once and used by the trainer, its log and the doctor."""
import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from data.files import ROOT
from engine.attention import BACKENDS, choose_backend
from engine.fused import (
    NormAndRotary, NormAndScaled, RmsNorm, RotaryOfNorm, SquaredReluMlp, StoredGradient, norm, residual,
    residual_sum, rotary, squared_relu_mlp)
from engine.head_loss import choose_fp8
from engine.mlp import GpuMlp, choose_fused_mlp, choose_mlp_fp8
from engine.products import (
    CpuLinear, choose_bf16, choose_onednn, choose_symmetric, onednn_batches, plainly)
from engine.lookup import Lookup
from muon import symmetric_product


@dataclass(frozen=True)
class Kernels:
    """The kernels of a run, and why each of them. A kernel that is not plain PyTorch has passed a self-test
    on this device, or was asked for by name."""
    device: torch.device
    dtype: torch.dtype  # of weights and activations
    compiled: bool  # whether torch.compile is used
    attention: str = "masked"  # backend, a key of BACKENDS
    fp8_head: bool = False
    onednn: bool = False  # whether fp32 products on a CPU are oneDNN's
    bf16: bool = False  # whether the factors of products are rounded, though weights and activations are fp32
    ns_dtype: torch.dtype = torch.float32  # of Muon's Newton-Schulz iteration
    symmetric: Callable = symmetric_product  # symmetric matrix product for Muon
    fused: bool = False  # whether engine.fused takes the place of plain formulas
    mlp_fp8: bool = False  # whether the MLP's forward products are in FP8 while training
    fused_mlp: bool = False  # whether squared ReLU is computed within the products around it
    reasons: dict[str, str] = field(default_factory=dict, compare=False)  # of choices, by their names above

    @staticmethod
    def choose(cfg, device: torch.device) -> "Kernels":
        """Choose by the settings attention, dtype, products, compile, fp8_head and mlp_fp8. Raises UsageError
        where a setting asks for what does not work here."""
        dtype = choose_dtype(cfg.dtype, device)
        compiled = will_compile(cfg, device)
        if compiled:
            keep_compiled()
        width, hidden = cfg.model_dim, cfg.mlp_ratio * cfg.model_dim
        choices = {
            "attention": choose_backend(cfg.attention, cfg.head_dim, cfg.attn_scale, device, dtype),
            "fp8_head": choose_fp8(cfg.fp8_head, device),
            "onednn": choose_onednn(device, dtype, compiled),
            "bf16": choose_bf16(cfg.products, device, dtype, compiled),
            "symmetric": choose_symmetric(device, whole_graph if compiled else plainly),
            "mlp_fp8": choose_mlp_fp8(cfg.mlp_fp8, device, width, hidden),
        }
        mlp_fp8, _ = choices["mlp_fp8"]
        choices["fused_mlp"] = choose_fused_mlp(mlp_fp8, device, dtype, width, hidden)
        return Kernels(
            device, dtype, compiled,
            ns_dtype=choose_ns_dtype(cfg, device),
            fused=device.type == "cpu" and dtype == torch.float32 and not compiled,
            reasons={name: reason for name, (_, reason) in choices.items()},
            **{name: chosen for name, (chosen, _) in choices.items()})

    def agreed(self, everywhere: Callable[[bool], bool]) -> "Kernels":
        """Return these kernels as all ranks will use them. What a race decides, which near a tie may end
        otherwise on each of them, is used where it was faster everywhere."""
        fused_mlp = everywhere(self.fused_mlp)
        reasons = self.reasons
        if fused_mlp != self.fused_mlp:
            reasons = reasons | {"fused_mlp": f"not on another rank; here {reasons['fused_mlp']}"}
        return dataclasses.replace(self, fused_mlp=fused_mlp, reasons=reasons)

    @staticmethod
    def plain(dtype: torch.dtype = torch.float32, attention: str = "masked") -> "Kernels":
        """Return kernels of plain PyTorch on a CPU: the reference."""
        return Kernels(torch.device("cpu"), dtype, False, attention)

    @property
    def own_kernels(self) -> bool:
        """Return whether a compiled model has kernels of ours, and optimizers are compiled as well.

        On a CPU the model in training is the only graph: twenty more, of the optimizers and of validation,
        made every start longer and no step faster.
        """
        return self.compiled and self.device.type == "cuda"

    def make_mask(self, docs, window: int):
        return BACKENDS[self.attention][0](docs, window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask, scale: float) -> Tensor:
        return BACKENDS[self.attention][1](q, k, v, mask, scale)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply (..., n) by the transpose of (m, n) to (..., m)."""
        if self.bf16:
            return CpuLinear.apply(x, weight, torch.bfloat16)
        return CpuLinear.apply(x, weight) if self.onednn else F.linear(x, weight)

    def norm(self, x: Tensor) -> Tensor:
        return RmsNorm.apply(x) if self.fused else norm(x)

    def norm_and_term(self, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
        """Return norm(x), and a factor and a stream whose product is that of the given ones."""
        if self.own_kernels:
            y, scaled = NormAndScaled.apply(x, factor)
            return y, 1.0, scaled
        return self.norm(x), factor, x

    def queries_and_keys(self, x: Tensor, cos: Tensor, sin: Tensor, scale) -> tuple[Tensor, Tensor]:
        """Return rotary(norm(x)) of queries and of keys, each (T, H, d), the queries times the scale where it
        is a tensor. x: (T, 2, H, d)."""
        if self.own_kernels:  # apart, so that one kernel a pass makes each of them
            q, k = x.unbind(1)
            one = torch.ones_like(scale)
            return (RotaryOfNorm.apply(q, cos[:, 0], sin[:, 0], scale),
                    RotaryOfNorm.apply(k, cos[:, 0], sin[:, 0], one))
        y = NormAndRotary.apply(x, cos, sin) if self.fused else rotary(norm(x), cos, sin)
        return y.unbind(1)

    def mlp(self, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        """Return relu(x w_in^T)^2 w_out^T, (T, D). x: normalized."""
        fp8 = self.mlp_fp8 and torch.is_grad_enabled()  # validation is not
        if fp8 or self.fused_mlp or self.own_kernels:
            return GpuMlp.apply(x, w_in, w_out, fp8, self.fused_mlp)
        if self.fused:
            dtype = torch.bfloat16 if self.bf16 else self.dtype
            return SquaredReluMlp.apply(x, w_in, w_out, self.onednn, dtype)
        return squared_relu_mlp(x, w_in, w_out, self.linear)

    def residual(self, added, factors, streams) -> Tensor:
        """Return added, (T, D), and the sum of factor times stream. factors: scalars, or (T, 1)."""
        if self.fused and all(factor.ndim == 0 for factor in factors):
            return residual(added, factors, streams)
        return residual_sum(added, factors, streams)

    def batches(self):
        """Return the context in which many small products are fastest."""
        return onednn_batches() if self.onednn else contextlib.nullcontext()

    def lookup(self, index: Tensor, table: Tensor) -> Tensor:
        """Take rows of a table (rows, D) by their numbers (...) to (..., D)."""
        return Lookup.apply(index, table) if self.own_kernels else F.embedding(index, table)

    def stored_gradient(self, x: Tensor) -> Tensor:
        """Return x, whose gradient a compiled model stores where it is computed: see StoredGradient."""
        return StoredGradient.apply(x) if self.own_kernels else x

    def compile(self, function: Callable) -> Callable:
        return whole_graph(function) if self.compiled else function

    def facts(self) -> list[str]:
        """Return one line for each choice, as the log and the doctor show them."""
        why = self.reasons
        how = "compiled" if self.compiled else "eager"
        if self.fused:
            how += ", with fused operations on a CPU"
        return [
            f"head in FP8: {yes_no(self.fp8_head)} ({why['fp8_head']})",
            f"MLP in FP8: {yes_no(self.mlp_fp8)} ({why['mlp_fp8']})",
            f"squared ReLU within products: {yes_no(self.fused_mlp)} ({why['fused_mlp']})",
            f"attention: {self.attention} ({why['attention']})",
            f"products by oneDNN: {yes_no(self.onednn)} ({why['onednn']})",
            f"products in bfloat16: {yes_no(self.bf16)} ({why['bf16']})",
            f"Newton-Schulz of Muon: {name_of(self.ns_dtype)}, symmetric products by {why['symmetric']}",
            f"weights: {name_of(self.dtype)}, {how}",
        ]

    def fallbacks(self, cfg) -> list[str]:
        """Return what a run on a GPU does without although nobody asked for that."""
        if self.device.type != "cuda":
            return []
        why = self.reasons
        notes = []
        if cfg.attention == "auto" and self.attention != "varlen":
            notes.append(f"attention by {self.attention}, not by FlashAttention: {why['attention']}")
        elif why["attention"].startswith("varlen:") and torch.cuda.get_device_capability()[0] in (9, 10):
            notes.append("attention by FlashAttention 2; what requirements-gpu.txt brings is tried first")
        if cfg.fp8_head == "auto" and not self.fp8_head:
            notes.append(f"head in {name_of(self.dtype)}, not in FP8: {why['fp8_head']}")
        if cfg.mlp_fp8 == "auto" and not self.mlp_fp8:
            notes.append(f"MLP in {name_of(self.dtype)}, not in FP8: {why['mlp_fp8']}")
        return notes


def whole_graph(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def will_compile(cfg, device: torch.device) -> bool:
    return cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")


def choose_ns_dtype(cfg, device: torch.device) -> torch.dtype:
    """Return the dtype of Muon's iteration, which is that of the layers' products."""
    weights = choose_dtype(cfg.dtype, device)
    bf16, _ = choose_bf16(cfg.products, device, weights, will_compile(cfg, device))
    return torch.bfloat16 if bf16 else weights


def choose_dtype(wish: str, device: torch.device) -> torch.dtype:
    """Return the type of weights and activations: by default bfloat16 on a GPU, float32 elsewhere."""
    if wish != "auto":
        return getattr(torch, wish)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def keep_compiled() -> None:
    """Let compiled graphs outlive the run and the machine's next start. torch keeps them in one folder, apart
    by its version, the GPU and the source of each graph, so that only what changed is compiled again."""
    if os.access(ROOT, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache/compile"))

    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.compile_fx  # noqa: F401 (after the folder, which it would choose itself)

    torch._dynamo.config.recompile_limit = 64  # stages differ in shapes and windows: a graph for each
    keep_ours = "autograd_cache_allow_custom_autograd_functions"  # the head's loss is one
    if hasattr(torch._functorch.config, keep_ours):
        setattr(torch._functorch.config, keep_ours, True)


def yes_no(fact: bool) -> str:
    return "yes" if fact else "no"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
