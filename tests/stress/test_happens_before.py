"""Nothing in the engine is ordered by speed alone, and the detector that says so sees what is missing."""

import threading

import pytest
import torch

from hf_slideformer.memory import streams
from hf_slideformer.memory.buffers import HostBuffer
from hf_slideformer.memory.transfer import Handle, Lane
from hf_slideformer.memory.worker import UpdateWorker
from hf_slideformer.metrics import Metrics

from . import mutate
from .happens_before import watching
from .scenarios import SCENARIOS

CPU = torch.device("cpu")

pytestmark = pytest.mark.timeout(60)  # a missing hand-over hangs


@pytest.mark.parametrize("name", SCENARIOS)
def test_everything_is_ordered(name, tmp_path):
    with watching() as watch:
        SCENARIOS[name](watch, tmp_path)
    assert watch.accesses > 500, "the detector looks at nothing"
    assert watch.races == []


# -- waits and records that are left out: a sample; all of them by `python -m tests.stress.mutate` --------------

_SAMPLE = {
    "pool.py SlotPool.acquire: slot.handle.wait_stream()": "train, kept",
    "pool.py SlotPool._release: compute_event(self._device)": "train, streamed",
    "pool.py SlotPool._fetch: after=slot.handle": "train, overlapped on disk",
    "pool.py SlotPool._fetch: after=slot.released": "train, overlapped",
    "link.py LocalLink.fill: after=(source.ready,)": "train, streamed",
    "link.py LocalLink.fill: after_events=(after,)": "train, overlapped",
    "link.py LocalLink.collect: compute_event(self._device)": "train, streamed",
    "offload.py TensorOffload.fetch: after_events=": "train, offload",
    "offload.py TensorOffload.take: handle.wait_stream()": "train, offload",
    "desks.py Desk.borrow.fetch: state.written[unit].wait_host()": "train, weights on disk",
    "gradients.py Gradients.push: self._in_flight.append": "train, streamed",
    "streamed.py StreamedUnit.land: after=clear()": "two backwards, last first, offload",
    "offload.py TensorOffload.fetch: after=handle": "train, weights on disk",
    "snapshot.py HeldState._beside: self._stream.wait(self._ready)": "save, streamed",
    "streamed.py StreamedUnit._submit_update: after=*step.after": "save, streamed",
    "on_device.py OnDevice.use_up: handle.wait_host()": "save, mixed",
    "beside_device.py BesideDevice._send: after=(updated,)": "train, mixed",
    "beside_device.py BesideDevice._send: done.keep(grads)": "train, mixed",
    "group.py StateGroup.wait_stream: self.pending.wait_stream()": "train, mixed",
}


@pytest.mark.parametrize("wanted", _SAMPLE)
def test_what_is_left_out_is_seen(wanted, tmp_path):
    file, text = wanted.split(" ", 1)
    (site, *_) = [
        s
        for s in mutate.sites()
        if s.file.endswith(f"/{file}") and f"{s.function}: {s.text}".startswith(text)
    ]
    with mutate.left_out(site), watching() as watch:
        try:
            SCENARIOS[_SAMPLE[wanted]](watch, tmp_path)
        except Exception:  # an error is seen as well
            return
    assert watch.races


# -- the detector ----------------------------------------------------------------------------------------------


@pytest.fixture
def watch():
    with watching() as watch:
        yield watch


@pytest.fixture
def lane(watch):
    lane = Lane("h2d", CPU)
    yield lane
    lane.close()


def _device_memory():
    return torch.zeros(64, device=CPU)


def _races(watch):
    return [race.split(" | ")[:2] for race in watch.races]


def test_submitting_after_computing_is_no_order(watch, lane):
    tensor = _device_memory()
    lane.submit("copy", lambda: tensor.add_(1)).wait_host()
    (race,) = watch.races
    assert race.startswith("write by compute") and "write by h2d: aten::add_.Tensor (copy)" in race


def test_an_event_of_the_compute_stream_is(watch, lane):
    tensor = _device_memory()
    lane.submit("copy", lambda: tensor.add_(1), after_events=(streams.compute_event(CPU),)).wait_host()
    assert watch.races == []


def test_an_event_that_was_recorded_too_early_is_not(watch, lane):
    tensor = _device_memory()
    event = streams.compute_event(CPU)
    tensor.add_(1)
    lane.submit("copy", lambda: tensor.add_(1), after_events=(event,)).wait_host()
    assert len(watch.races) == 1


@pytest.mark.parametrize(("wait", "races"), [("wait_stream", 0), ("wait_host", 0), ("wait_issued", 1)])
def test_that_a_copy_has_been_issued_does_not_mean_that_it_is_done(watch, lane, wait, races):
    tensor = _device_memory()
    handle = lane.submit("copy", lambda: tensor.add_(1), after_events=(streams.compute_event(CPU),))
    getattr(handle, wait)()
    tensor.add_(1)
    assert len(watch.races) == races


def test_waiting_on_the_stream_tells_the_host_nothing(watch, lane):
    buffer = HostBuffer(4096).tensor(torch.float32, 0, 64)
    handle = lane.submit("copy", lambda: buffer.fill_(1))
    handle.wait_stream()
    buffer.clone()
    assert len(watch.races) == 1
    handle.wait_host()
    buffer.clone()
    assert len(watch.races) == 1


def test_two_readers_need_no_order_and_a_writer_needs_both(watch, lane):
    other = Lane("d2h", CPU)
    tensor, after = _device_memory(), {"after_events": (streams.compute_event(CPU),)}
    first = lane.submit("one", lambda: tensor.clone(), **after)
    second = other.submit("two", lambda: tensor.clone(), **after)
    second.wait_host()
    first.wait_issued()
    assert watch.races == []
    tensor.zero_()
    (race,) = watch.races
    assert "read by h2d" in race
    other.close()


def test_bytes_that_others_do_not_touch_need_no_order(watch, lane):
    tensor, event = _device_memory(), streams.compute_event(CPU)
    lane.submit("first half", lambda: tensor[:32].add_(1), after_events=(event,)).wait_issued()
    tensor[32:].add_(1)
    assert watch.races == []
    tensor[31:].add_(1)
    assert len(watch.races) == 1


def test_memory_that_is_freed_before_its_copy_is_done_is_seen(watch, lane):
    tensor = _device_memory()
    handle = lane.submit("copy", lambda t=tensor: t.clone(), after_events=(streams.compute_event(CPU),))
    handle.wait_issued()
    lane.submit("the lane has let go of it", lambda: None).wait_issued()
    del tensor
    _device_memory()
    (race,) = watch.races
    assert "its memory is freed" in race


def test_memory_that_is_allocated_may_have_been_in_use(watch, lane):
    tensor = torch.empty(64, device=CPU)
    lane.submit("copy", lambda: tensor.fill_(1)).wait_host()
    assert len(watch.races) == 1


def test_item_waits_for_the_device(watch, lane):
    tensor = _device_memory()
    tensor.sum().item()
    lane.submit("copy", lambda: tensor.add_(1)).wait_host()
    assert watch.races == []


def test_a_workers_jobs_come_after_what_was_known_when_they_were_submitted(watch):
    worker, buffer = UpdateWorker(Metrics()), HostBuffer(4096).tensor(torch.float32, 0, 64)
    buffer.fill_(1)
    job = worker.submit("update", lambda: buffer.add_(1), priority=0)
    assert watch.races == []
    job.wait_host()
    buffer.add_(1)
    assert watch.races == []
    worker.submit("update", lambda: buffer.add_(1), priority=0)
    while not job.is_complete:
        pass
    worker.drain()  # which waits for other jobs than this one in the detector's eyes too: it is the same thread
    buffer.add_(1)
    worker.close()
    assert watch.races == []


def test_a_job_that_nobody_waited_for_is_seen(watch):
    worker, buffer = UpdateWorker(Metrics()), HostBuffer(4096).tensor(torch.float32, 0, 64)
    done = threading.Event()
    worker.submit("update", lambda: (buffer.add_(1), done.set()), priority=0)
    done.wait(60)  # it is over, and nothing of the engine says so
    buffer.clone()
    worker.close()
    assert len(watch.races) == 1


def test_a_torn_copy_of_weights_is_a_race_when_it_is_read(watch, lane):
    weights, slot = HostBuffer(4096).tensor(torch.float32, 0, 64), _device_memory()
    for used in (False, True):
        fetch = lane.submit(
            "fetch of layer 3",
            lambda: slot.copy_(weights, non_blocking=True),
            after_events=(streams.compute_event(CPU),),
        )
        fetch.wait_issued()
        weights.fill_(2)
        fetch.wait_stream()
        if used:
            slot.clone()
        assert bool(watch.races) == used


def test_a_handle_without_an_event_tells_what_its_thread_knew(watch):
    handle, buffer = Handle("by hand"), HostBuffer(4096).tensor(torch.float32, 0, 64)
    lane = Lane("host", CPU)
    lane.submit("write", lambda: (buffer.add_(1), handle.complete()))
    handle.wait_issued()
    buffer.clone()
    lane.close()
    assert watch.races == []
