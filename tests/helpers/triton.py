"""Triton's interpreter, which computes kernels on a CPU."""
import importlib.util
from importlib import metadata

import pytest

from tests.helpers.commands import python


def interpret(code: str, loops: bool = False) -> None:
    """Execute code that calls kernels, in a process of its own. loops: whether the kernels have some."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: bench/cross/requirements.txt")
    if loops and metadata.version("triton").startswith("3.6."):
        pytest.skip("Triton 3.6, of torch 2.11, cannot interpret loops with numpy 2.4")
    child = python("-c", code, TRITON_INTERPRET=1)
    assert child.returncode == 0, child.stderr
