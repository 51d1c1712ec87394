"""Tensors over the host buffers of one unit."""

import pytest
import torch

from hf_slideformer.memory.buffers import HostBuffer
from hf_slideformer.memory.layout import (
    EIGHT_BIT_MOMENTS,
    FP32_MOMENTS,
    ParamSpec,
    UnitLayout,
    lay_out,
    lay_out_on_disk,
)
from hf_slideformer.memory.unit_memory import UnitMemory, grad_view


def _layout(dtype: torch.dtype = torch.bfloat16) -> UnitLayout:
    split = dtype == torch.bfloat16
    return lay_out([ParamSpec(name, (2, 70), dtype, dtype, split, True) for name in ("a", "b", "c")])


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_have_their_shapes_and_places_of_their_own(dtype, fp32):
    layout = _layout(dtype)
    memory = UnitMemory(layout, HostBuffer(layout.weight_bytes))
    assert memory.grads is None
    buffer = HostBuffer(4 * layout.state_numel if fp32 else layout.grad_bytes)
    memory.use_gradients(buffer, fp32=fp32)
    for number, segment in enumerate(layout.segments):
        memory.gradient(segment).fill_(number + 1)
    for number, segment in enumerate(layout.segments):
        grad = grad_view(buffer, segment, fp32=fp32)
        assert grad.shape == segment.spec.shape and grad.dtype == (torch.float32 if fp32 else dtype)
        assert (grad == number + 1).all()


@pytest.mark.parametrize("moments", [FP32_MOMENTS, EIGHT_BIT_MOMENTS], ids=lambda one: one.name)
@pytest.mark.parametrize("weights", [False, True])
def test_what_comes_from_disk_is_there_until_it_is_detached(weights, moments):
    layout = _layout()
    places = lay_out_on_disk(layout, moments, weights=weights)
    memory = UnitMemory(layout, HostBuffer(layout.weight_bytes))
    segment = layout.segments[1]
    assert memory.residual(segment) is None and memory.moments(segment) == {}
    buffer = HostBuffer(places.nbytes)
    memory.attach(buffer, places, moments)
    memory.residual(segment).fill_(3)
    for tensor in memory.moments(segment).values():
        tensor.fill_(5)
    found = memory.moments(segment)
    assert [(name, x.dtype) for name, x in found.items()] == [(p.name, p.dtype) for p in moments.parts]
    assert all(x.shape == p.shape(segment.spec) for x, p in zip(found.values(), moments.parts, strict=True))
    # The update writes weights where they came from; what the device copies stays where it was.
    assert (memory.master_weights is memory.weights) != weights
    memory.detach()
    assert memory.residual(segment) is None and memory.moments(segment) == {}
    assert memory.master_weights is memory.weights
    assert memory.nbytes == HostBuffer(layout.weight_bytes).nbytes, "a buffer that is another's counts"
    memory.attach(buffer, places, moments)
    assert (memory.residual(segment) == 3).all()
    assert all((tensor == 5).all() for tensor in memory.moments(segment).values())
    others = [memory.residual(layout.segments[0]), *memory.moments(layout.segments[2]).values()]
    assert not any(tensor.any() for tensor in others)
