"""What every test runs under: no hub, two threads in all, and GPU tests only where there is a GPU."""

import gc
import os

# Before transformers or datasets is imported, since both read these once.
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A thread that spins while it waits for others takes the core that they need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Under pytest-xdist several processes share the cores; scripts that tests start count as well.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
threads = max(1, min(2, os.cpu_count() or 1) // workers)
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import pytest
import torch

torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish():
    """Leave out of every later garbage collection what importing made: with torch and transformers that takes 0.3 s.

    Trainer and engines collect garbage at least once a run. What tests make is collected as before.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Let extension modules find nothing left of theirs when the process ends, and so say nothing of leaks."""
    gc.unfreeze()


@pytest.fixture
def fresh_accelerate_state():
    """Accelerate keeps precision and plugins for the whole process: another test's do not count in this one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def deterministic():
    """Deterministic algorithms, as `full_determinism=True` sets them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
