import signal

import pytest
import torch

from helpers.processes import NUM_THREADS
from radix_ops.data import finished

torch.set_num_threads(NUM_THREADS)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts jobs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _proofs_elsewhere(tmp_path_factory, monkeypatch):
    """Keep proofs of finished jobs out of the user's cache folder."""
    monkeypatch.setattr(finished, "_cache_folder", lambda: str(tmp_path_factory.getbasetemp() / "finished"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Return each device that the ops have kernels for."""
    return request.param


@pytest.fixture
def default_device(device):
    """Put new tensors on each device."""
    with torch.device(device):
        yield device


@pytest.fixture
def many_threads():
    """Run a test with more threads than one, for the parallel paths."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(NUM_THREADS)
