import pytest
import torch

# Small tensors gain nothing from threads, and tests that run beside each other would wait for each other's.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def many_threads():
    """Runs a test with more threads than one, for the parallel paths."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)
