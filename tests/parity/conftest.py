"""What all parity tests run under."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_compute_thread():
    """Run torch's operators on one thread: at these sizes a second one only waits, which takes several times longer.

    The number of threads is the same for both runs that are compared, so it cannot make them differ.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
