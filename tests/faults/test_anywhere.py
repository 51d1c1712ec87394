"""An exception or Ctrl-C at any point: training goes on with the same bits, or says that it cannot; nothing waits.

Every place where one piece hands something to another is made to raise, at its first call in a step, at one in the
middle and at its last, before it has done its work and after it.
"""

import os
import sys
import threading
import time

import pytest
import torch

from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.run import executor
from hf_slideformer.engine.state import (
    beside_device,
    clipping,
    gradients,
    group,
    on_device,
    on_disk,
    streamed,
    updates,
)
from hf_slideformer.errors import StateError
from hf_slideformer.memory import (
    link,
    offload,
    pool,
    staging,
    streams,
    transfer,
    worker,
)
from hf_slideformer.memory.disk import desks, inputs, store
from hf_slideformer.optim import optimizer, state
from tests.engine import small
from tests.engine.loop import Run, all_tensors, assert_same_state

LIMIT_S = 10

pytestmark = pytest.mark.timeout(25)

# What the thread that trains calls: there Ctrl-C may come too.
CALLED = [
    (transfer.Lane, "submit"),
    (transfer.Handle, "wait_stream"),
    (transfer.Handle, "wait_host"),
    (worker.UpdateWorker, "submit"),
    (pool, "compute_event"),
    (pool.SlotPool, "prefetch"),
    (pool.SlotPool, "acquire"),
    (pool.SlotPool, "_fetch"),
    (pool.SlotPool, "invalidate"),
    (pool.SlotLease, "release"),
    (link, "compute_event"),
    (link.LocalLink, "fill"),
    (link.LocalLink, "collect"),
    (offload, "compute_event"),
    (offload.TensorOffload, "store"),
    (offload.TensorOffload, "fetch"),
    (offload.TensorOffload, "take"),
    (offload.TensorOffload, "_take_buffer"),
    (offload.TensorOffload, "settle"),
    (desks.Desk, "borrow"),
    (desks.Loan, "release"),
    (inputs.DiskInputs, "store"),
    (executor.Executor, "lease"),
    (executor.Executor, "run_forward"),
    (executor.Executor, "run_backward"),
    (executor.Executor, "prefetch_first"),
    (executor.Executor, "_park"),
    (executor.Executor, "_unpark"),
    (executor.Executor, "_fetch_inputs"),
    (executor.Executor, "_differentiate"),
    (executor.UnitCall, "keep_outputs"),
    (executor.UnitCall, "free"),
    (gradients, "sum_of_squares"),
    (gradients, "set_gradient"),
    (gradients.Gradients, "begin_unit"),
    (gradients.Gradients, "push"),
    (gradients.Gradients, "finish"),
    (gradients.Gradients, "_land"),
    (gradients.Gradients, "_assign"),
    (streamed.StreamedUnit, "land"),
    (on_disk.OnDisk, "land"),
    (streamed.StreamedUnit, "land_in"),
    (streamed.StreamedUnit, "prepare_sum"),
    (streamed.StreamedUnit, "step"),
    (streamed.StreamedUnit, "_submit_update"),
    (on_disk.OnDisk, "_update"),
    (on_disk.OnDisk, "open"),
    (on_device.OnDevice, "step"),
    (on_device.OnDevice, "use_up"),
    (beside_device, "compute_event"),
    (beside_device.BesideDevice, "step"),
    (beside_device.BesideDevice, "_send"),
    (group.StateGroup, "wait_stream"),
    (clipping, "_clip"),
    (clipping.Clipping, "multiply"),
    (clipping.Clipping, "clear"),
    (updates.Updates, "step"),
    (updates.Updates, "_plan"),
    (updates.Updates, "overlapped_update"),
    (updates.Updates, "use_up"),
    (state.UpdateRun, "apply"),
    (optimizer.SlideOptimizer, "zero_grad"),
    (SlideEngine, "begin_forward"),
    (SlideEngine, "clip_grad_norm_"),
    (SlideEngine, "step"),
]

# What lanes, the update worker and the disk's threads call.
IN_THREADS = [
    (streams.CpuStream, "record"),
    (streams.CpuStream, "wait"),
    (streams.CpuEvent, "query"),
    (streams.CpuEvent, "synchronize"),
    (staging.StagingBuffers, "take"),
    (streamed, "update_unit"),
    (beside_device, "update_unit"),
    (state.UpdateRun, "apply"),
    (gradients, "accumulate_squared_"),
    (on_disk.OnDisk, "_attached"),
    (desks.Loan, "write_back"),
    (store.DiskStore, "read"),
    (store.DiskStore, "write"),
    (desks.Desk, "_take"),
]

# What hands out a buffer: raised after that, nobody would have it.
_ONLY_BEFORE = {"take", "_take"}


class _Bomb:
    """While it is armed, counts the calls of one function in the training thread or in others; raises at one."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: object, name: str, *, in_threads: bool) -> None:
        self._original = getattr(owner, name)
        self._in_threads = in_threads
        self._me = threading.current_thread()
        self._lock = threading.Lock()
        self.armed = False
        self.calls = 0
        self.at, self.error, self.before = 0, None, True

        def wrapped(*args, **kwargs):
            # What is raised at the end of an object's life is printed, and goes nowhere.
            ends = sys._getframe(1).f_code.co_name == "__del__"
            fires = not ends and self._counts() and self.error is not None
            if fires and self.before:
                raise self.error
            result = self._original(*args, **kwargs)
            if fires:
                raise self.error
            return result

        patch.setattr(owner, name, wrapped)

    def _counts(self) -> bool:
        if not self.armed or (threading.current_thread() is not self._me) != self._in_threads:
            return False
        with self._lock:
            self.calls += 1
            return self.calls == self.at


def _slideformer_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "slideformer" in thread.name}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses, and the state after three steps, by mode."""
    found = {}

    def run(mode: str):
        if mode not in found:
            one = small.start(mode, tmp_path_factory.mktemp("state"))
            losses = [small.step(one, mode, number).item() for number in range(3)]
            one.engine.synchronize()
            state = {
                name: {k: x.clone() for k, x in t.items()} for name, t in all_tensors(one.engine).items()
            }
            one.engine.close()
            found[mode] = losses, state
        return found[mode]

    return run


def _step(run: Run, mode: str, number: int) -> torch.Tensor:
    """Train one step, and look at all state; returns the loss."""
    loss = small.step(run, mode, number)
    run.engine.synchronize()
    all_tensors(run.engine)
    return loss


def _steps_done(run: Run) -> set[int]:
    return {state.step for state in run.engine.states}


def _disturbed(run: Run, mode: str, bomb: _Bomb, expected) -> str:
    """Train on through the bomb and compare; returns what became of it."""
    losses, state = expected
    small.step(run, mode, 0)
    run.engine.synchronize()
    bomb.armed, failures = True, 0
    while (done := _steps_done(run)) != {3}:
        assert len(done) == 1, f"some parameters are a step ahead, and nothing says so: {done}"
        number = done.pop()
        try:
            loss = _step(run, mode, number).item()
            assert loss == losses[number]
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, AssertionError):
                raise
            failures += 1
            assert failures < 4, "it never gets over it"
            if isinstance(error, StateError) and "last checkpoint" in str(error):
                return _refused(run, mode, error)
            bomb.armed = bomb.armed and bomb.calls < bomb.at
            try:
                run.engine.reset()
            except StateError as broken:
                return _refused(run, mode, broken)
            assert all(slot.leases == 0 for slot in run.engine.pool._slots)
        else:
            bomb.armed = bomb.armed and bomb.calls < bomb.at
    ours = all_tensors(run.engine)
    assert ours.keys() == state.keys()
    for name, tensors in ours.items():
        assert_same_state(tensors, state[name], name)
    return "went on" if failures else "not noticed"


def _refused(run: Run, mode: str, error: StateError) -> str:
    """It names its cause, and goes on refusing."""
    assert error.__cause__ is not None
    assert str(error.__cause__) in str(error)
    with pytest.raises(StateError, match="last checkpoint"):
        small.step(run, mode, 1)
    return "refused"


def _scenario(mode, directory, owner, name, expected, error, at, before, in_threads):
    threads = _slideformer_threads()
    with pytest.MonkeyPatch.context() as patch:
        run = small.start(mode, directory)
        bomb = _Bomb(patch, owner, name, in_threads=in_threads)
        bomb.error, bomb.at, bomb.before = error, at, before
        begin = time.monotonic()
        result = _disturbed(run, mode, bomb, expected)
        bomb.armed = False
        run.engine.close()
        seconds = time.monotonic() - begin
    assert seconds < LIMIT_S
    assert _slideformer_threads() <= threads, "threads are left"
    return result


@pytest.fixture(scope="module")
def called(tmp_path_factory, undisturbed):
    """How often a step calls each point, by mode: in the training thread, and in others."""
    found = {}
    for mode in small.MODES:
        with pytest.MonkeyPatch.context() as patch:
            run = small.start(mode, tmp_path_factory.mktemp("state"))
            bombs = {
                (point, in_threads): _Bomb(patch, *point, in_threads=in_threads)
                for points, in_threads in ((CALLED, False), (IN_THREADS, True))
                for point in points
            }
            small.step(run, mode, 0)
            run.engine.synchronize()
            for bomb in bombs.values():
                bomb.armed = True
            _step(run, mode, 1)
            found[mode] = {key: bomb.calls for key, bomb in bombs.items()}
            run.engine.close()
    return found


def _cases(point, calls: int):
    """Where to raise what: at the first call, one in the middle and the last; before and after its work."""
    for at in sorted({1, (calls + 1) // 2, calls}) if calls else ():
        for before in (True,) if point[1] in _ONLY_BEFORE else (True, False):
            # Both kinds, in turn: what is caught by `except Exception` must not be all that is cleaned up after.
            yield at, before, KeyboardInterrupt("boom") if (at + before) % 2 else RuntimeError("boom")


def _run(mode, directory, point, undisturbed, case, *, in_threads):
    at, before, error = case
    if in_threads:
        error = RuntimeError("boom")
    _scenario(mode, directory, *point, undisturbed(mode), error, at, before, in_threads)


POINTS = [*((point, False) for point in CALLED), *((point, True) for point in IN_THREADS)]
NAMES = [
    f"{owner.__name__.rsplit('.', 1)[-1]}.{name}{' in a thread' if in_threads else ''}"
    for (owner, name), in_threads in POINTS
]


@pytest.mark.parametrize(("point", "in_threads"), POINTS, ids=NAMES)
def test_at_any_point(undisturbed, called, tmp_path, point, in_threads):
    """In three of the modes that come to the point, each at another call."""
    number = POINTS.index((point, in_threads))
    modes = [mode for mode in small.MODES if called[mode][point, in_threads]]
    assert modes, "no mode comes here"
    for turn in range(3):
        mode = modes[(number + turn * 5) % len(modes)]
        cases = list(_cases(point, called[mode][point, in_threads]))
        _run(mode, tmp_path, point, undisturbed, cases[(number + turn) % len(cases)], in_threads=in_threads)


@pytest.mark.skipif("SLIDEFORMER_SWEEP" not in os.environ, reason="12 minutes; set SLIDEFORMER_SWEEP=1")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", small.MODES)
def test_at_every_point(undisturbed, called, tmp_path, mode):
    for point, in_threads in POINTS:
        for case in _cases(point, called[mode][point, in_threads]):
            _run(mode, tmp_path, point, undisturbed, case, in_threads=in_threads)
