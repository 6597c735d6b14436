"""What the tests of measurements share."""
import multiprocessing.dummy
from types import SimpleNamespace

import pytest

from bench import trials


@pytest.fixture
def in_this_process(monkeypatch):
    """A sweep's processes are threads here, which start at once."""
    monkeypatch.setattr(trials, "multiprocessing", SimpleNamespace(
        get_context=lambda kind: multiprocessing.dummy))
    monkeypatch.setattr(trials.torch, "set_num_threads", lambda n: None)
