"""The update worker answers everyone who waits for its jobs, whatever an event or a job does."""

import threading

import pytest

from hf_slideformer.errors import TransferError
from hf_slideformer.memory.transfer import Handle
from hf_slideformer.memory.worker import UpdateWorker
from hf_slideformer.metrics import Metrics

pytestmark = pytest.mark.timeout(30)  # a thread that has ended hangs


class _Broken:
    """An event after a device-side assertion."""

    error = RuntimeError("device-side assert triggered")

    def query(self):
        raise self.error

    synchronize = wait = query


def _broken(label="gradients of layer 3"):
    handle = Handle(label)
    handle.complete(_Broken())
    return handle


@pytest.fixture
def worker():
    worker = UpdateWorker(Metrics())
    yield worker
    worker.close()
    assert not worker._thread.is_alive()


def test_a_job_whose_event_cannot_be_asked_fails_with_the_cause(worker):
    ran, dropped = [], []
    job = worker.submit(
        "update of layer 3",
        lambda: ran.append(1),
        priority=0,
        after=(Handle.done(), _broken()),
        dropped=lambda: dropped.append(1),
    )
    later = worker.submit("update of layer 2", lambda: ran.append(2), priority=0)
    with pytest.raises(TransferError, match="update of layer 3 failed: gradients of layer 3 failed: device"):
        job.wait_host()
    later.wait_host()
    assert ran == [2] and dropped == [1]


def test_one_broken_event_among_many_does_not_hold_the_others_up(worker):
    gate, order = Handle("gate"), []
    worker.submit("first", lambda: order.append("first"), priority=0, after=(gate,))
    broken = [
        worker.submit(str(number), lambda: order.append("never"), priority=number, after=(_broken(),))
        for number in range(3)
    ]
    good = worker.submit("good", lambda: order.append("good"), priority=9)
    gate.complete()
    good.wait_host()
    worker.drain()
    assert all(job.failed for job in broken)
    assert order == ["first", "good"]


@pytest.mark.parametrize("what", ["job", "dropped", "delay"])
def test_whatever_raises_is_told_and_the_thread_goes_on(what):
    def boom(*_):
        raise ValueError("boom")

    armed = {"delay": what == "delay"}
    worker = UpdateWorker(Metrics(), lambda label: boom() if armed["delay"] and label == "bad" else 0.0)
    dropped = []
    job = worker.submit(
        "bad",
        boom if what == "job" else lambda: None,
        priority=0,
        after=(_broken(),) if what == "dropped" else (),
        dropped=boom if what == "dropped" else lambda: dropped.append(1),
    )
    with pytest.raises(TransferError, match="bad failed: boom"):
        job.wait_host()
    # What a job that has begun was to use is its own to give back.
    assert dropped == ([1] if what == "delay" else [])
    worker.submit("next", lambda: None, priority=0).wait_host()
    worker.close()


def test_a_closed_worker_drops_what_it_is_given(worker):
    worker.close()
    dropped = []
    job = worker.submit("update", lambda: None, priority=0, dropped=lambda: dropped.append(1))
    with pytest.raises(TransferError, match="closed"):
        job.wait_host()
    assert dropped == [1]
    worker.drain()


def test_draining_waits_for_all_that_can_run(worker):
    gate, seen = threading.Event(), []
    worker.submit("slow", lambda: gate.wait(20), priority=5)
    for number in range(3):
        worker.submit(str(number), lambda n=number: seen.append(n), priority=1000)
    never = worker.submit(
        "waits for something", lambda: seen.append("never"), priority=0, after=(held := Handle("x"),)
    )
    gate.set()
    worker.drain()
    assert seen == [0, 1, 2] and not never.is_complete
    held.complete()
