"""Tensors that wait in RAM: they come back with their bits, buffers are used again, hazards are seen."""

import gc
import threading
import weakref

import pytest
import torch

from hf_slideformer.errors import StateError, TransferError
from hf_slideformer.memory import streams
from hf_slideformer.memory.buffers import HostBuffer
from hf_slideformer.memory.offload import TensorOffload
from hf_slideformer.memory.runtime import Runtime
from hf_slideformer.memory.transfer import Handle

CPU = torch.device("cpu")


@pytest.fixture
def offload():
    made = []

    def make(delays=None):
        made.append(Runtime(CPU, delays=delays))
        return TensorOffload(made[-1]), made[-1].metrics

    yield make
    for runtime in made:
        runtime.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_come_back(offload, dtype):
    store, metrics = offload()
    tensors = [torch.randn(3, 5, 7).to(dtype) for _ in range(4)]
    parked = [store.store("unit", tensor) for tensor in tensors]
    for one, tensor in reversed(list(zip(parked, tensors, strict=True))):
        assert torch.equal(store.take(one), tensor)
    assert metrics.totals() == dict.fromkeys(("d2h_bytes", "h2d_bytes"), 4 * tensors[0].nbytes)


def test_slow_lanes_do_not_change_bits(offload):
    store, _ = offload({"d2h": lambda _: 0.01, "h2d": lambda _: 0.01})
    tensors = [torch.randn(1000) for _ in range(5)]
    expected = [tensor.clone() for tensor in tensors]
    parked = [store.store("unit", tensor) for tensor in tensors]
    store.settle()
    for tensor in tensors:
        tensor.fill_(torch.nan)  # its memory may be used for anything from here on
    store.fetch(parked[-2])
    for one, tensor in zip(parked[::-1], expected[::-1], strict=True):
        assert torch.equal(store.take(one), tensor)


def test_buffers_are_used_again(offload):
    store, _ = offload()
    for _ in range(3):
        for one in [store.store("unit", torch.randn(1024)) for _ in range(3)]:
            store.take(one)
    assert store.host_bytes == 3 * 4096


def test_a_longer_batch_replaces_buffers_instead_of_adding_to_them(offload):
    store, _ = offload()
    for numel in (1024, 2048, 1024):
        tensors = [torch.randn(numel) for _ in range(2)]
        for one, tensor in zip([store.store("unit", t) for t in tensors], tensors, strict=True):
            assert torch.equal(store.take(one), tensor)
    assert store.host_bytes == 2 * 8192


def test_a_forward_without_a_backward_gives_its_buffers_back(offload):
    store, _ = offload()
    parked = [store.store("unit", torch.randn(1024)) for _ in range(2)]
    store.fetch(parked[0])
    del parked
    gc.collect()
    store.abandon()
    tensor = torch.randn(1024)
    assert torch.equal(store.take(store.store("unit", tensor)), tensor)
    assert store.host_bytes == 2 * 4096


def test_a_buffer_is_not_written_before_it_was_read(offload):
    """A new tensor takes the buffer of one that is still on its way back."""
    gate = threading.Event()
    store, _ = offload({"h2d": lambda _: 0.0 if gate.wait(60) else 1.0})
    first = torch.randn(1000)
    parked = store.store("first", first)
    store.settle()
    store.fetch(parked)
    threading.Timer(0.05, gate.set).start()
    taken = store.take(parked)
    second = store.store("second", torch.full((1000,), 7.0))
    assert torch.equal(taken, first)
    assert torch.equal(store.take(second), torch.full((1000,), 7.0))


def test_a_change_in_place_on_the_way_is_refused(offload):
    store, _ = offload({"d2h": lambda _: 0.05})
    tensor = torch.randn(10)
    store.store("layer 3", tensor)
    tensor.add_(1)
    with pytest.raises(StateError, match="input of layer 3 was changed in place"):
        store.settle()


def test_a_buffer_that_is_outgrown_is_read_before_it_is_let_go_of(offload):
    store, _ = offload()
    read = Handle("copy to the device")
    store._free.append((HostBuffer(4096), read))
    thread = threading.Thread(target=store.store, args=("unit", torch.randn(4096)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    read.complete()
    thread.join(30)
    assert not thread.is_alive()


def test_a_buffer_that_is_outgrown_is_written_before_it_is_let_go_of(offload):
    """Of a forward without a backward: nobody waits for what is still on its way there."""
    gate = threading.Event()
    store, _ = offload({"d2h": lambda _: 0.0 if gate.wait(20) else 1.0})
    parked = store.store("unit", torch.randn(1024))
    left = parked.stored.left
    del parked
    gc.collect()
    thread = threading.Thread(target=store.store, args=("unit", torch.randn(4096)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not left.is_complete
    gate.set()
    thread.join(20)
    assert not thread.is_alive()
    store.settle()
    assert store.host_bytes == 4 * 4096


def test_a_buffer_lives_until_the_copy_from_it_is_done(offload, monkeypatch):
    """Also where the tensor that it was for is gone by then, and its place outgrown."""
    store, _ = offload()
    parked = store.store("unit", torch.randn(1024))
    buffer = weakref.ref(parked.stored.again().buffer)
    with monkeypatch.context() as patch:
        patch.setattr(streams.CpuEvent, "query", lambda self: False)  # late
        store.fetch(parked).wait_host()
        store._to_device.submit("the lane has let go of it", lambda: None).wait_host()
        del parked
        gc.collect()
        other = store.store("unit", torch.randn(4096))
        store.fetch(other)
        assert buffer() is not None
    store.fetch(store.store("unit", torch.randn(4096)))
    assert buffer() is None


def test_a_failed_copy_is_raised_where_the_tensor_is_needed(offload):
    def fail(_):
        raise OSError("no such link")

    store, _ = offload({"h2d": fail})
    parked = store.store("layer 3", torch.randn(10))
    with pytest.raises(TransferError, match=r"activations of layer 3 failed: no such link"):
        store.take(parked)
    store.abandon()


def test_garbage_that_is_collected_while_buffers_are_counted_gives_its_own_back(offload):
    """A graph may be part of a reference cycle, and a collection can start anywhere."""
    store, _ = offload()

    class Cycle:
        pass

    cycle = Cycle()
    cycle.itself, cycle.parked = cycle, store.store("unit", torch.randn(1024))
    store.settle()
    del cycle

    def collect():
        with store._lock:
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "deadlock"
    store.store("unit", torch.randn(1024))
    assert store.host_bytes == 4096
