"""Expandable segments are asked for once a GPU is used, and never against the user's own settings."""

import pytest
import torch

from hf_slideformer.memory import allocator

CUDA = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch):
    """What torch was told, by functions that stand in for its own."""
    told = []
    for name in allocator._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in allocator._SETTERS:
        monkeypatch.setattr(torch._C, name, lambda text, name=name: told.append((name, text)), raising=False)
    return told


def test_a_gpu_gets_expandable_segments(asked):
    assert allocator.use_expandable_segments(CUDA)
    assert asked == [(allocator._SETTERS[0], "expandable_segments:True")]


def test_older_versions_of_torch_have_another_name(asked, monkeypatch):
    monkeypatch.delattr(torch._C, allocator._SETTERS[0])
    assert allocator.use_expandable_segments(CUDA)
    assert asked == [(allocator._SETTERS[1], "expandable_segments:True")]


@pytest.mark.parametrize("name", allocator._VARIABLES)
def test_the_users_settings_stay(asked, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert not allocator.use_expandable_segments(CUDA)
    assert asked == []


def test_nothing_is_asked_for_the_cpu(asked):
    assert not allocator.use_expandable_segments(torch.device("cpu"))
    assert asked == []


def test_a_platform_that_cannot_is_left_as_it_is(asked, monkeypatch):
    def refuse(text):
        raise RuntimeError("expandable segments are not supported")

    monkeypatch.setattr(torch._C, allocator._SETTERS[0], refuse, raising=False)
    assert not allocator.use_expandable_segments(CUDA)


@pytest.mark.gpu
def test_segments_grow_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    if not allocator.use_expandable_segments(device):
        pytest.skip("another setting is in force, or the platform cannot")
    kept = [torch.empty(3 * 2**20, dtype=torch.uint8, device=device) for _ in range(64)]
    segments = [entry for entry in torch.cuda.memory_snapshot() if entry.get("is_expandable")]
    assert segments and sum(entry["total_size"] for entry in segments) >= sum(t.nbytes for t in kept[1:])
