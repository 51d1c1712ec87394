"""Runtime: made once, closed once, and nothing is left of it, whoever closes it and whatever failed before."""

import gc
import threading
import time

import pytest
import torch

from hf_slideformer import SlideConfig
from hf_slideformer.engine import engine
from hf_slideformer.errors import StateError, TransferError
from hf_slideformer.memory import runtime as module
from hf_slideformer.memory.runtime import Failure, Runtime
from tests.engine.loop import decide, prepare, tiny_llama

CPU = torch.device("cpu")
OWN = ("to_device", "to_host", "worker")

pytestmark = pytest.mark.timeout(60)  # a thread that waits for itself hangs


def _threads():
    return {thread for thread in threading.enumerate() if "slideformer" in thread.name}


@pytest.fixture
def threads():
    gc.collect()
    before = _threads()

    def left():
        return _threads() - before

    yield left
    assert not left()


def _submit(runtime, part, work):
    extra = {"priority": 0} if part == "worker" else {}
    return getattr(runtime, part).submit("work", work, **extra)


def _wait_for_end(left):
    for _ in range(500):
        if not left():
            return
        time.sleep(0.01)


def test_closing_ends_what_it_began_in_order(threads):
    runtime, seen = Runtime(CPU), []
    assert len(threads()) == 3

    def note(name):
        return lambda: seen.append((name, len(threads())))

    runtime.when_closed(first=note("first"), last=note("last"))
    runtime.when_closed(last=note("last again"))
    runtime.when_closed(first=note("first again"))
    for part in OWN:  # is finished before
        _submit(runtime, part, lambda part=part: (time.sleep(0.05), seen.append((part, 0))))
    for _ in range(3):
        runtime.close()
    assert seen[:2] == [("first", 3), ("first again", 3)]
    assert sorted(seen[2:5]) == sorted((part, 0) for part in OWN)
    assert seen[5:] == [("last", 0), ("last again", 0)]
    assert not threads()


@pytest.mark.parametrize("part", OWN)
def test_one_of_its_own_threads_may_close_it(threads, part):
    """As where a garbage collection finds the engine there."""
    runtime, seen = Runtime(CPU), []
    runtime.when_closed(first=lambda: seen.append("first"), last=lambda: seen.append("last"))
    job = _submit(runtime, part, lambda: (runtime.close(), runtime.close()))
    job.wait_host()
    _wait_for_end(threads)
    assert not threads()
    assert seen == ["first", "last"]
    runtime.close()
    assert seen == ["first", "last"]


@pytest.mark.parametrize("part", OWN)
def test_what_is_given_to_one_that_is_closed_fails(threads, part):
    runtime = Runtime(CPU)
    runtime.close()
    with pytest.raises(TransferError, match="the engine was closed"):
        _submit(runtime, part, lambda: None).wait_host()
    runtime.drain()


def test_draining_waits_for_all_threads(threads):
    runtime, seen = Runtime(CPU), []
    for part in OWN:
        _submit(runtime, part, lambda part=part: (time.sleep(0.05), seen.append(part)))
    runtime.drain()
    assert sorted(seen) == sorted(OWN)
    runtime.close()


def test_the_first_failure_is_the_one_that_is_told():
    failure, cause = Failure(), OSError("first")
    failure.check()
    failure.note(cause)
    failure.note(OSError("second"))
    with pytest.raises(StateError, match=r"an update failed \(first\).*last checkpoint") as caught:
        failure.check()
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt("boom")])
def test_work_after_whose_failure_state_is_half_new_is_told(threads, error):
    runtime = Runtime(CPU)

    def fail():
        raise error

    runtime.guarded(lambda: None)()
    runtime.failure.check()
    with pytest.raises(type(error)):
        runtime.guarded(fail)()
    with pytest.raises(StateError, match="boom"):
        runtime.failure.check()
    runtime.close()


@pytest.mark.parametrize("part", ["PinBudget", "Lane", "LocalLink", "UpdateWorker"])
def test_a_runtime_that_cannot_be_made_leaves_no_thread(threads, monkeypatch, part):
    original, calls = getattr(module, part), []

    def fail(*args, **kwargs):
        calls.append(args)
        if part != "Lane" or len(calls) == 2:
            raise RuntimeError("can't start new thread")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, part, fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Runtime(CPU)
    assert not threads()


@pytest.mark.parametrize(
    "part", ["PlacedModel", "SlotPool", "TensorOffload", "Executor", "Clipping", "Updates", "StateAccess"]
)
@pytest.mark.parametrize("on_disk", [(), (1, 4)], ids=["in RAM", "on disk"])
def test_an_engine_that_cannot_be_made_leaves_nothing_running(threads, monkeypatch, tmp_path, part, on_disk):
    def fail(*args, **kwargs):
        assert threads()  # it had begun
        raise MemoryError("no memory")

    config = SlideConfig(nvme_dir=str(tmp_path) if on_disk else None)
    monkeypatch.setattr(engine, part, fail)
    with pytest.raises(MemoryError, match="no memory"):
        prepare(tiny_llama(), config=config, decisions=decide(on_disk=on_disk))
    assert not threads()
    assert not list(tmp_path.iterdir())
