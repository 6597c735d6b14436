"""What this device can do."""
import os

import torch

from engine.log import ROOT


def choose_dtype(wish: str, device: torch.device) -> torch.dtype:
    """Of weights and activations."""
    return getattr(torch, wish) if wish != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32


def choose_ns_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of Muon's iteration: fp32 on every CPU, so that losses do not depend on its kind."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def choose_compile(wish: str, device: torch.device) -> bool:
    return wish == "on" or (wish == "auto" and device.type == "cuda")


def keep_compiled():
    """Compiled graphs outlive the run and the machine's next start: torch keeps them in one folder, apart by its version, the
    GPU and the source of each graph, so that only what changed is compiled again."""
    import torch._dynamo.config
    import torch._functorch.config

    if os.access(ROOT, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache/compile"))
    torch._dynamo.config.recompile_limit = 64  # stages differ in shapes and windows: a graph for each
    if hasattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions"):  # HeadLoss is one
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
