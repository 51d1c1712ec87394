"""Where a unit's gradients wait, when they turn into sums."""

from types import SimpleNamespace

import pytest
import torch

from hf_slideformer.engine.state.on_disk import OnDisk
from hf_slideformer.memory.disk.desks import DiskState
from hf_slideformer.memory.disk.store import DiskStore
from hf_slideformer.memory.layout import (
    FP32_MOMENTS,
    ParamSpec,
    lay_out,
    lay_out_on_disk,
)
from hf_slideformer.memory.runtime import Runtime


@pytest.fixture
def runtime():
    runtime = Runtime(torch.device("cpu"))
    yield runtime
    runtime.close()


@pytest.mark.filterwarnings("ignore:.*O_DIRECT")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_that_turn_into_a_sum_are_not_written_over(tmp_path, runtime, dtype):
    """Also where there is room for the sum in the page of the file that they lie in."""
    split = dtype == torch.bfloat16
    layout = lay_out([ParamSpec(name, (128,), dtype, dtype, split, True) for name in ("a", "b", "c")])
    places = lay_out_on_disk(layout, FP32_MOMENTS, weights=True, grad_bytes=layout.grad_bytes)
    assert places.grad_bytes >= 4 * layout.state_numel
    store = DiskStore([tmp_path], metrics=runtime.metrics)
    state = DiskState(store, {0: places.file_bytes}, frozenset({0}), runtime.failure.note)
    runtime.when_closed(last=state.close)
    blueprint = SimpleNamespace(layouts=[layout], units=[SimpleNamespace(name="unit")])
    home = OnDisk(0, blueprint, SimpleNamespace(layouts={0: places}, inputs=None, state=state), 0, runtime)
    memory = home.memory
    home._make_gradients(fp32=False)
    for number, segment in enumerate(layout.segments):
        memory.gradient(segment).fill_(number + 1)
    grads = [memory.gradient(segment) for segment in layout.segments]
    home._make_gradients(fp32=True)
    assert memory.grads_fp32
    for segment, grad in zip(layout.segments, grads, strict=True):
        memory.gradient(segment).copy_(grad)
    for number, segment in enumerate(layout.segments):
        assert (memory.gradient(segment) == number + 1).all()
