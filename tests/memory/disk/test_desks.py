"""Loans: a buffer comes back whatever happens to who borrowed it, and no request waits for itself."""

import gc
import threading

import pytest
import torch

from hf_slideformer.errors import TransferError
from hf_slideformer.memory.disk.desks import DiskState
from hf_slideformer.memory.disk.store import DiskStore
from hf_slideformer.memory.lease import used_by
from hf_slideformer.memory.transfer import Handle, Lane
from hf_slideformer.metrics import Metrics

NBYTES = 4096
CPU = torch.device("cpu")

pytestmark = pytest.mark.timeout(30)  # a buffer that is lost hangs


@pytest.fixture
def failures():
    return []


@pytest.fixture
def state(tmp_path, failures):
    store = DiskStore([str(tmp_path)], metrics=Metrics(), threads=1)
    state = DiskState(store, dict.fromkeys(range(4), NBYTES), frozenset(), failures.append)
    yield state
    state.close()


@pytest.fixture
def lane():
    lane = Lane("h2d", CPU)
    yield lane
    lane.close()


def _use(desk, unit):
    """Borrow, add one to every byte, give back; returns what was there."""
    loan = desk.borrow(unit)
    loan.ready.wait_host()
    data = loan.buffer.tensor(torch.uint8, 0, NBYTES)
    was = int(data[0])
    data.add_(1)
    loan.write_back()
    return was


def test_what_is_given_back_is_what_is_borrowed_next(state):
    desk = state.open_desk("test", 1, NBYTES)
    assert [_use(desk, unit) for unit in (0, 1, 0, 1)] == [0, 0, 1, 1]


def test_giving_back_again_does_nothing(state):
    desk = state.open_desk("test", 2, NBYTES)
    loan = desk.borrow(0)
    for _ in range(3):
        loan.release()
    loan.write_back()
    first, second, third = (desk.borrow(unit) for unit in range(3))
    first.ready.wait_host()
    second.ready.wait_host()
    assert first.buffer is not second.buffer
    assert not third.ready.is_complete, "there were two buffers"
    for one in (first, second, third):
        one.release()


@pytest.mark.parametrize("buffers", [1, 2])
def test_a_loan_given_back_before_it_is_read_does_not_wait_for_itself(state, buffers):
    """As where an update is dropped while others hold all buffers."""
    desk = state.open_desk("test", buffers, NBYTES)
    held = [desk.borrow(0) for _ in range(buffers)]
    for one in held:
        one.ready.wait_host()
    waiting, behind = desk.borrow(1), desk.borrow(2)
    behind.release()
    waiting.release()
    for one in held:
        one.release()
    assert [_use(desk, unit) for unit in (1, 2, 3)] == [0, 0, 0]


def test_a_buffer_is_not_filled_again_before_its_last_reader_is_done(state):
    desk = state.open_desk("test", 1, NBYTES)
    reading = Handle("copy")
    loan = desk.borrow(0)
    loan.release(after=reading)  # before it is there
    loan.ready.wait_host()
    following = desk.borrow(1)
    assert not following.ready._issued.wait(0.2)
    reading.fail(RuntimeError("boom"))  # over, well or not; and not the next one's failure
    following.ready.wait_host()
    following.release()


def test_a_loan_that_nobody_got_comes_back_by_itself(state):
    """Ctrl-C between the request and the assignment of what it returns."""
    desk = state.open_desk("test", 1, NBYTES)
    desk.borrow(0).ready.wait_host()
    gc.collect()
    assert _use(desk, 1) == 0


def test_a_loan_comes_back_when_the_copy_cannot_be_arranged(state, lane):
    desk, gate = state.open_desk("test", 1, NBYTES), threading.Event()
    lane.submit("a copy from it that was arranged", lambda: gate.wait(20))

    def interrupted():
        loan = desk.borrow(0)
        with used_by(lane, loan):
            loan.ready.wait_host()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    following = desk.borrow(1)
    assert not following.ready._issued.wait(0.2), "the lane may still read the buffer"
    gate.set()
    following.ready.wait_host()
    following.release()


def test_what_is_given_back_to_be_written_is_read_first(tmp_path, failures):
    gate = threading.Event()
    store = DiskStore(
        [str(tmp_path)], metrics=Metrics(), threads=1, delay_s=lambda _: 0.0 if gate.wait(20) else 1.0
    )
    state = DiskState(store, {0: NBYTES}, frozenset(), failures.append)
    desk = state.open_desk("test", 1, NBYTES)
    loan = desk.borrow(0)
    threading.Timer(0.1, gate.set).start()
    loan.write_back()
    assert gate.is_set()
    assert _use(desk, 0) == 0
    state.close()


def test_a_failed_write_is_told_and_its_buffer_comes_back(state, failures, monkeypatch):
    desk = state.open_desk("test", 1, NBYTES)

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(state.store, "write", fail)
        _use(desk, 0)
        with pytest.raises(TransferError, match="the disk is gone"):
            state.written[0].wait_host()
    assert [str(error) for error in failures] == ["the disk is gone"]
    assert _use(desk, 1) == 0
