"""The iteration is fp32 in these tests, whatever the processor, as their tolerances expect; who tests bf16
asks for it."""
import pytest
import torch

import muon


@pytest.fixture(autouse=True, scope="module")  # before references that a module computes once
def one_thread():
    """The bits of a product depend on the number of threads, and ranks that these tests start have one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fp32_on_every_processor(monkeypatch):
    monkeypatch.setattr(muon, "has_bf16_units", lambda: False)
