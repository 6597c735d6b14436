"""Triton's interpreter, which computes kernels on a CPU."""
import importlib.util
import subprocess
import sys

import pytest

from data.files import ROOT


def interpret(code: str) -> None:
    """Execute code that calls kernels, in a process of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: bench/cross/requirements.txt")
    command = [sys.executable, "-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n" + code]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
