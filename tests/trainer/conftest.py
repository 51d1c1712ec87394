"""What all trainer tests run under."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_compute_thread():
    """Run torch's operators on one thread: at these sizes a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
