"""Triton's interpreter, which computes kernels on a CPU."""
import importlib.util

import pytest

from tests.helpers.commands import python


def interpret(code: str) -> None:
    """Execute code that calls kernels, in a process of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: bench/cross/requirements.txt")
    child = python("-c", code, TRITON_INTERPRET=1)
    assert child.returncode == 0, child.stderr
