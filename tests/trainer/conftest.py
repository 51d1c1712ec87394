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


# Bugs that are known: part of a test's id, and what is wrong. An entry whose test passes is an error (strict).
_KNOWN_BUGS = {
    "test_save_pretrained_on_the_live_model[('bf16_from_fp32'": "save_pretrained writes bf16 halves only",
}


def pytest_collection_modifyitems(items):
    for item in items:
        for part, reason in _KNOWN_BUGS.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
