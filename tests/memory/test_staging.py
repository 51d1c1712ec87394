"""Staging buffers: whoever fails, the buffer is free again, so that the next one who waits for it gets it."""

import threading

import pytest
import torch

from hf_slideformer.errors import PlanError, StateError
from hf_slideformer.memory import staging
from hf_slideformer.memory.lease import released_on_error
from hf_slideformer.memory.staging import StagingBuffers

pytestmark = pytest.mark.timeout(30)  # a buffer that is lost hangs


@pytest.fixture
def one():
    return StagingBuffers(4096, 1, pin=False)


def _works(buffers):
    """A use of the only buffer from end to end."""
    staged = buffers.lease()
    with staged.filled() as buffer:
        buffer.tensor(torch.uint8, 0, 3).fill_(7)
    with staged.read() as buffer:
        assert buffer.tensor(torch.uint8, 0, 3).tolist() == [7, 7, 7]


def test_what_one_thread_fills_another_reads(one):
    for _ in range(3):
        _works(one)
    assert one.host_bytes == 4096


def test_filling_waits_for_the_reader(one):
    first, second, filled = one.lease(), one.lease(), threading.Event()
    with first.filled():
        pass

    def fill():
        with second.filled():
            filled.set()

    thread = threading.Thread(target=fill)
    thread.start()
    assert not filled.is_set()
    with first.read():
        assert not filled.is_set()
    thread.join()
    assert filled.is_set()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_buffer_is_free_after_filling_or_reading_fails(one, error):
    staged = one.lease()
    with pytest.raises(type(error)), staged.filled():
        raise error
    _works(one)
    staged = one.lease()
    with staged.filled():
        pass
    with pytest.raises(type(error)), staged.read():
        raise error
    _works(one)


def test_a_buffer_that_nobody_will_read_is_free_when_it_is_dropped(one):
    staged = one.lease()
    with staged.filled():
        pass
    staged.release()
    staged.release()
    _works(one)
    with pytest.raises(StateError, match="dropped"), staged.read():
        pass
    _works(one)


def test_one_that_is_dropped_while_it_is_filled_is_free_afterwards(one):
    staged = one.lease()
    with staged.filled():
        staged.release()
    _works(one)


def test_one_that_is_dropped_before_takes_no_buffer(one):
    staged = one.lease()
    with pytest.raises(KeyboardInterrupt), released_on_error(staged):
        raise KeyboardInterrupt
    with pytest.raises(StateError, match="nobody will read"), staged.filled():
        pass
    _works(one)


def test_dropping_what_is_being_read_does_not_free_it_twice(one):
    staged = one.lease()
    with staged.filled():
        pass
    with staged.read():
        staged.release()
    _works(one)
    assert len(one._free) == 1


def test_memory_that_is_refused_leaves_the_place_free(one, monkeypatch):
    def refuse(nbytes, *, pin):
        raise PlanError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "HostBuffer", refuse)
        with pytest.raises(PlanError, match="no memory"), one.lease().filled():
            pass
    _works(one)
