"""Fixtures of the engine's tests."""

import os

import pytest
import torch


@pytest.fixture
def deterministic():
    """Deterministic algorithms, as `full_determinism=True` sets them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
