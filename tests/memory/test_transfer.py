"""Lanes: first in first out, errors carried with their cause, delays before the work."""

import threading
import time

import pytest
import torch

from hf_slideformer.errors import TransferError
from hf_slideformer.memory.transfer import Handle, Lane, compute_event

CPU = torch.device("cpu")


@pytest.fixture
def lane():
    lane = Lane("test", CPU)
    yield lane
    lane.close()


def test_work_runs_in_order_and_off_the_calling_thread(lane):
    seen = []
    handles = [
        lane.submit(str(number), lambda n=number: seen.append((n, threading.current_thread().name)))
        for number in range(20)
    ]
    handles[-1].wait_host()
    assert [number for number, _ in seen] == list(range(20))
    assert {name for _, name in seen} == {"slideformer-test"}
    assert all(handle.is_complete for handle in handles)


def test_work_waits_for_what_it_comes_after(lane):
    gate, seen = Handle("gate"), []
    handle = lane.submit("copy", lambda: seen.append("copy"), after=[Handle.done(), gate])
    behind = lane.submit("behind", lambda: seen.append("behind"))
    time.sleep(0.02)
    assert not handle.is_complete and not behind.is_complete and seen == []
    gate.complete()
    behind.wait_host()
    assert seen == ["copy", "behind"]


def test_lanes_do_not_hold_each_other_up(lane):
    gate, other = Handle("gate"), Lane("other", CPU)
    held = lane.submit("held", lambda: None, after=[gate])
    other.submit("free", lambda: None).wait_host()
    assert not held.is_complete
    gate.complete()
    held.wait_host()
    other.close()


@pytest.mark.parametrize("wait", ["wait_issued", "wait_host", "wait_stream"])
def test_errors_reach_everyone_who_waits(lane, wait):
    cause = OSError("the disk is gone")

    def fail():
        raise cause

    handle = lane.submit("fetch of layer 3", fail)
    for _ in range(2):
        with pytest.raises(TransferError, match="fetch of layer 3 failed: the disk is gone") as caught:
            getattr(handle, wait)()
        assert caught.value.__cause__ is cause
    assert handle.failed and handle.is_complete
    lane.submit("next", lambda: None).wait_host()  # the lane goes on


def test_a_failure_passes_through_what_comes_after_it(lane):
    failed, ran = Handle("update of layer 3"), []
    failed.fail(ValueError("boom"))
    handle = lane.submit("fetch of layer 3", lambda: ran.append(1), after=[failed])
    with pytest.raises(TransferError, match=r"fetch of layer 3 failed: update of layer 3 failed: boom"):
        handle.wait_host()
    assert not ran


def test_delays_come_before_the_work():
    labels, seen = [], []

    def delay(label):
        labels.append((label, list(seen)))
        return 0.03

    lane = Lane("test", CPU, delay)
    start = time.perf_counter()
    lane.submit("slow", lambda: seen.append("done")).wait_host()
    assert time.perf_counter() - start >= 0.03
    assert labels == [("slow", [])]
    lane.close()


def test_closing_finishes_what_is_queued():
    lane, seen = Lane("test", CPU, lambda label: 0.005), []
    for number in range(5):
        lane.submit(str(number), lambda n=number: seen.append(n))
    lane.close()
    assert seen == list(range(5))
    lane.close()  # again, as at exit


def test_a_finished_piece_of_work_is_let_go():
    class Payload:
        freed = threading.Event()

        def __del__(self):
            self.freed.set()

    lane, payload = Lane("test", CPU), Payload()
    lane.submit("copy", lambda p=payload: None).wait_host()
    del payload
    assert Payload.freed.wait(60), "an idle lane must not keep gradients alive"
    lane.close()


def test_no_events_on_the_cpu():
    assert compute_event(CPU) is None
