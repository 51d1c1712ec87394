"""Host buffers of one unit."""

import pytest
import torch

from hf_slideformer.memory.buffers import MappedFile
from hf_slideformer.memory.disk.store import DiskStore
from hf_slideformer.memory.layout import (
    FP32_MOMENTS,
    ParamSpec,
    lay_out,
    lay_out_on_disk,
)
from hf_slideformer.memory.unit_memory import UnitMemory
from hf_slideformer.metrics import Metrics


@pytest.mark.filterwarnings("ignore:.*O_DIRECT")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_that_turn_into_a_sum_are_not_written_over(tmp_path, dtype):
    """Also where there is room for the sum in the page that they lie in."""
    split = dtype == torch.bfloat16
    layout = lay_out([ParamSpec(name, (128,), dtype, dtype, split, True) for name in ("a", "b", "c")])
    places = lay_out_on_disk(layout, FP32_MOMENTS, weights=True, grad_bytes=layout.grad_bytes)
    store = DiskStore([tmp_path], metrics=Metrics())
    try:
        file = store.create("unit", places.file_bytes, striped=False)
        memory = UnitMemory(layout, pin=False, on_disk=True, mapped=(MappedFile(file.map()), places))
        memory.allocate_gradients(fp32=False)
        for number, segment in enumerate(layout.segments):
            memory.gradient(segment).fill_(number + 1)
        grads = [memory.gradient(segment) for segment in layout.segments]
        memory.allocate_gradients(fp32=True)
        for segment, grad in zip(layout.segments, grads, strict=True):
            memory.gradient(segment).copy_(grad)
        for number, segment in enumerate(layout.segments):
            assert (memory.gradient(segment) == number + 1).all()
    finally:
        store.close()
