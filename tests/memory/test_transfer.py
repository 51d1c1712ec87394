"""Lanes: first in first out, errors carried with their cause, delays before the work."""

import threading
import time

import pytest
import torch

from hf_slideformer.errors import TransferError
from hf_slideformer.memory import streams
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


def test_an_event_on_the_cpu_is_a_point_that_has_been_passed():
    event = compute_event(CPU)
    assert event.query()
    event.synchronize()
    event.wait()


def test_work_on_the_cpu_is_done_by_an_event_too(lane):
    handle = lane.submit("copy", lambda: None)
    handle.wait_issued()
    assert handle.event is not None and handle.event.query()


class _Event:
    """An event as a device might hand it out: it comes when it is told to, or every question about it fails."""

    def __init__(self, error=None):
        self.passed, self.error, self.waits = threading.Event(), error, 0

    def query(self):
        self._check()
        return self.passed.is_set()

    def synchronize(self):
        self.waits += 1
        self._check()
        assert self.passed.wait(60)

    wait = synchronize

    def _check(self):
        if self.error is not None:
            raise self.error


def test_a_handle_is_complete_when_its_event_has_passed(lane):
    handle, event = Handle("copy"), _Event()
    handle.complete(event)
    handle.wait_issued()
    assert not handle.is_complete
    seen = []
    behind = lane.submit("next", lambda: seen.append(event.passed.is_set()), after=[handle])
    event.passed.set()
    behind.wait_host()
    assert seen == [True] and handle.is_complete
    for wait in (handle.wait_host, handle.wait_stream, handle.settle):
        wait()
    assert event.waits == 4


def test_work_waits_for_late_events(lane):
    events, seen = [_Event(), _Event()], []
    handle = lane.submit("copy", lambda: seen.append(1), after_events=[events[0], None, events[1]])
    events[1].passed.set()
    assert not handle.is_complete and seen == []
    events[0].passed.set()
    handle.wait_host()
    assert seen == [1]


@pytest.mark.parametrize("how", ["after", "after_events"])
def test_an_event_that_fails_is_told_to_everyone_who_waits(lane, how):
    """After a device-side assertion every question about an event raises."""
    cause, dropped = RuntimeError("device-side assert triggered"), []
    handle = Handle("gradients of layer 3")
    handle.complete(_Event(cause))
    assert handle.is_complete and not handle.failed
    handle.settle()
    for wait in (handle.wait_host, handle.wait_stream):
        with pytest.raises(TransferError, match="gradients of layer 3 failed: device-side assert") as caught:
            wait()
        assert caught.value.__cause__ is cause
    ran = []
    behind = lane.submit(
        "next",
        lambda: ran.append(1),
        **{how: [handle if how == "after" else handle.event]},
        dropped=lambda: dropped.append(1),
    )
    with pytest.raises(TransferError, match="next failed: .*device-side assert"):
        behind.wait_host()
    assert dropped == [1] and ran == []
    lane.submit("after that", lambda: ran.append(2)).wait_host()  # the lane goes on
    assert ran == [2]


def test_what_cannot_be_recorded_fails_and_the_lane_goes_on(lane, monkeypatch):
    def record(self):
        raise RuntimeError("device-side assert triggered")

    with monkeypatch.context() as patch:
        patch.setattr(streams.CpuStream, "record", record)
        with pytest.raises(TransferError, match="copy failed: device-side assert"):
            lane.submit("copy", lambda: None).wait_host()
    lane.submit("next", lambda: None).wait_host()


def test_a_lane_whose_stream_cannot_be_waited_for_is_closed_all_the_same(monkeypatch, caplog):
    def synchronize(self):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(streams.CpuStream, "synchronize", synchronize)
    lane = Lane("test", CPU)
    lane.close()
    assert not lane._thread.is_alive()
    assert "lane test ended with an error: device-side assert" in caplog.text


def test_a_closed_lane_drops_what_it_is_given():
    lane, dropped = Lane("test", CPU), []
    lane.close()
    handle = lane.submit("copy", lambda: None, dropped=lambda: dropped.append(1))
    assert handle.failed and dropped == [1]
    lane.drain()


def test_draining_waits_for_what_came_before_also_if_it_fails():
    gate, seen = threading.Event(), []
    lane = Lane("test", CPU, lambda label: 0.0 if gate.wait(60) else 1.0)
    lane.submit("bad", lambda: 1 / 0)
    lane.submit("good", lambda: seen.append(1))
    gate.set()
    lane.drain()
    assert seen == [1]
    lane.close()


CUDA_0, CUDA_1 = torch.device("cuda", 0), torch.device("cuda", 1)


def test_waiting_means_the_current_stream_of_the_events_device(monkeypatch):
    """Not that of the current device: a model may be on another."""

    class Torch:
        def __init__(self, device):
            self.device, self.waited = device, []

        def wait_event(self, event):
            self.waited.append(event)

    recorded = {}

    class OfTorch:
        def __init__(self, blocking):
            self.blocking = blocking

        def record(self, stream):
            recorded[self] = stream

    compute = {device: Torch(device) for device in (CUDA_0, CUDA_1)}
    monkeypatch.setattr(torch.cuda, "Event", OfTorch)
    monkeypatch.setattr(torch.cuda, "Stream", Torch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=CUDA_0: compute[device])
    event = compute_event(CUDA_1)
    assert recorded == {event.of_torch: compute[CUDA_1]}
    stream = streams.new_stream(CUDA_1)
    stream.wait(event)
    assert stream._stream.device == CUDA_1 and stream._stream.waited == [event.of_torch]
    moved = Handle("copy")
    moved.complete(stream.record())
    moved.wait_stream()
    assert compute[CUDA_1].waited == [moved.event.of_torch]
    assert compute[CUDA_0].waited == []
    assert recorded[moved.event.of_torch] is stream._stream and moved.event.of_torch.blocking
