"""Host buffers: whole pages, one storage per tensor, memory that outlives the buffer, nothing for forked children."""

import contextlib
import gc
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_slideformer.engine.state.in_ram import InRam
from hf_slideformer.errors import PlanError
from hf_slideformer.memory.buffers import HostBuffer, PinBudget
from hf_slideformer.memory.layout import ParamSpec, lay_out
from hf_slideformer.memory.staging import StagingBuffers

PAGE = mmap.PAGESIZE


@pytest.mark.parametrize(
    ("asked", "got"), [(0, PAGE), (1, PAGE), (PAGE - 1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)]
)
def test_whole_zeroed_pages(asked, got):
    buffer = HostBuffer(asked)
    assert buffer.nbytes == got
    everything = buffer.tensor(torch.uint8, 0, got)
    assert everything.data_ptr() % PAGE == 0
    assert not everything.any()


def test_tensors_share_memory_but_no_storage():
    buffer = HostBuffer(PAGE)
    first, second = buffer.tensor(torch.float32, 0, 8), buffer.tensor(torch.float32, 32, 8)
    again = buffer.tensor(torch.int32, 0, 16)
    assert first.untyped_storage().nbytes() == 32
    assert second.data_ptr() == first.data_ptr() + 32
    assert second.untyped_storage().data_ptr() == second.data_ptr()
    first.fill_(1.0)
    second.fill_(2.0)
    assert again.view(torch.float32).tolist() == [1.0] * 8 + [2.0] * 8


def test_empty_tensors():
    assert HostBuffer(PAGE).tensor(torch.bfloat16, 0, 0).shape == (0,)


def test_a_tensor_past_the_end_is_refused():
    with pytest.raises(ValueError, match="buffer"):
        HostBuffer(PAGE).tensor(torch.float32, PAGE - 4, 2)


def test_memory_outlives_the_buffer():
    buffer = HostBuffer(64 * PAGE)
    tensor = buffer.tensor(torch.int64, 0, 64 * PAGE // 8).copy_(torch.arange(64 * PAGE // 8))
    del buffer
    gc.collect()
    others = [HostBuffer(64 * PAGE).tensor(torch.uint8, 0, 64 * PAGE).fill_(7) for _ in range(4)]
    assert len(others) == 4
    assert torch.equal(tensor, torch.arange(64 * PAGE // 8))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's memory map")
def test_memory_ends_with_its_last_tensor():
    buffer = HostBuffer(2**30)  # lazily touched, so it costs nothing
    tensor = buffer.tensor(torch.uint8, 0, 1)
    size = _mapped_bytes()
    del buffer, tensor
    gc.collect()
    assert size - _mapped_bytes() > 2**29


def _mapped_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="needs Linux")
def test_a_forked_child_does_not_get_the_memory():
    buffer = HostBuffer(64 * PAGE)
    tensor = buffer.tensor(torch.uint8, 0, 64 * PAGE).fill_(3)
    address = tensor.data_ptr()
    child = os.fork()
    if child == 0:  # only the kernel's own view is read here; touching the memory would kill the child
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert tensor.eq(3).all()


def test_refused_memory_is_a_plan_error():
    with pytest.raises(PlanError, match=r"refused 4194304\.00 GiB of RAM .* lower cpu_memory"):
        HostBuffer(2**52)


def test_not_pinned_unless_asked():
    assert not HostBuffer(PAGE).pinned


class _Cuda:
    """Notes on which device memory is registered and unregistered."""

    def __init__(self, patch):
        self.current, self.calls = torch.device("cuda", 0), []
        patch.setattr(torch.cuda, "cudart", lambda: self)
        patch.setattr(torch.cuda, "device", self._device)

    @contextlib.contextmanager
    def _device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls.append(("register", self.current, nbytes))
        return 0

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", self.current))


def test_memory_is_pinned_for_the_device_of_the_model(monkeypatch):
    """Not for the current one, where it would make a context."""
    cuda, device = _Cuda(monkeypatch), torch.device("cuda", 1)
    pins = PinBudget(device, 10 * PAGE)
    frozen = lay_out([ParamSpec("weight", (PAGE // 4,), torch.float32, torch.float32, False, False)])
    for make in (
        lambda: HostBuffer(PAGE, pin=pins.take(PAGE)),
        lambda: StagingBuffers(PAGE, 1, pin=pins.take(PAGE)).take(),
        lambda: InRam("layer", frozen, 0, SimpleNamespace(pins=pins)).memory.weights,
    ):
        assert make().pinned
        gc.collect()
        assert cuda.calls == [("register", device, PAGE), ("unregister", device)]
        cuda.calls.clear()
    with pytest.warns(RuntimeWarning, match="pinned_memory="):
        refused = pins.take(8 * PAGE)
    assert not HostBuffer(8 * PAGE, pin=refused).pinned and not cuda.calls
    assert not PinBudget(torch.device("cpu"), None).take(PAGE)


def test_memory_may_be_pinned_for_the_current_device(monkeypatch):
    cuda = _Cuda(monkeypatch)
    assert HostBuffer(PAGE, pin=True).pinned
    assert cuda.calls == [
        ("register", torch.device("cuda", 0), PAGE),
        ("unregister", torch.device("cuda", 0)),
    ]


@pytest.mark.gpu
def test_pinning():
    buffer = HostBuffer(16 * PAGE, pin=True)
    tensor = buffer.tensor(torch.uint8, 0, 16 * PAGE)
    assert buffer.pinned and tensor.is_pinned()
    del buffer
    gc.collect()
    assert not tensor.is_pinned()
    assert not tensor.any()
