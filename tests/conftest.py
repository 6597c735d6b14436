"""Fixtures that several rooms use."""
import pytest
import torch


@pytest.fixture
def one_thread():
    """One thread of torch for a test, and afterwards as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
