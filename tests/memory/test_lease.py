"""Leases: what slots, staging buffers, desks and buffers of offloaded tensors have in common."""

import errno
import threading

import pytest
import torch

from hf_slideformer.errors import TransferError
from hf_slideformer.memory.buffers import HostBuffer
from hf_slideformer.memory.disk.desks import DiskState
from hf_slideformer.memory.disk.store import DiskStore
from hf_slideformer.memory.layout import ParamSpec, lay_out
from hf_slideformer.memory.lease import Kept, released_on_error, used_by
from hf_slideformer.memory.offload import TensorOffload
from hf_slideformer.memory.pool import SlotPool
from hf_slideformer.memory.runtime import Runtime
from hf_slideformer.memory.staging import StagingBuffers
from hf_slideformer.memory.transfer import Handle, compute_event

from .disk.faulty import FaultyOps

NBYTES = 4096
CPU = torch.device("cpu")
REQUESTS = range(4)

pytestmark = pytest.mark.timeout(30)  # a buffer that is lost hangs


class Lender:
    """Lends `count` buffers; request `number` is filled with `number + 1`, unless that is to fail."""

    def __init__(self, runtime, directory, count, failing):
        self.runtime, self.failing = runtime, failing
        self.open(directory, count)

    def first_byte(self, lease):
        """Where the buffer is, and what is there."""
        tensor = lease.buffer.tensor(torch.uint8, 0, 1)
        return tensor.data_ptr(), tensor.item()

    def work(self, number):
        """Name of the request; what it is for fails if it is to."""
        return f"{'bad ' if number == self.failing else ''}request {number}"


class _Unit:
    def __init__(self, index, failed):
        self.index, self.name = index, f"request {index}"
        self.layout = lay_out([ParamSpec("w", (NBYTES // 4,), torch.float32, torch.float32, False, True)])
        self.weights = HostBuffer(NBYTES)
        self.weights.tensor(torch.uint8, 0, NBYTES).fill_(index + 1)
        self.update = Handle("update")
        if failed:
            self.update.fail(OSError("boom"))
        else:
            self.update.complete()

    def source(self):
        return Kept(self.weights, self.update)


class Slots(Lender):
    def open(self, directory, count):
        self.pool = SlotPool(self.runtime, NBYTES, count)

    def lend(self, number):
        return self.pool.acquire(_Unit(number, number == self.failing))

    def free(self):
        return sum(slot.leases == 0 for slot in self.pool._slots)

    def first_byte(self, lease):
        return lease.buffer.data_ptr(), lease.buffer[0].item()


class Staging(Lender):
    def open(self, directory, count):
        self.staging = StagingBuffers(NBYTES, count, pin=False)

    def lend(self, number):
        lease = self.staging.lease()

        def fill():
            with lease.filled() as buffer:
                if number == self.failing:
                    raise OSError("boom")
                buffer.tensor(torch.uint8, 0, NBYTES).fill_(number + 1)

        lease.ready = self.runtime.to_host.submit(self.work(number), fill)
        return lease

    def free(self):
        return self.staging._available._value


class Desks(Lender):
    def open(self, directory, count):
        calls = FaultyOps()
        store = DiskStore([directory], metrics=self.runtime.metrics, threads=1, calls=calls)
        sizes = dict.fromkeys(REQUESTS, NBYTES)
        self.state = DiskState(store, sizes, frozenset(), self.runtime.failure.note)
        self.runtime.when_closed(last=self.state.close)
        for number in REQUESTS:
            buffer = HostBuffer(NBYTES)
            buffer.tensor(torch.uint8, 0, NBYTES).fill_(number + 1)
            self.state.write(number, buffer, (0, NBYTES))
        if self.failing is not None:
            calls.fail("preadv", errno.EIO, times=1)
        self.desk, self.count = self.state.open_desk("test", count, NBYTES), count

    def lend(self, number):
        return self.desk.borrow(number)

    def free(self):
        self.desk._reads.drain()
        return self.desk._free.qsize()


class Offloaded(Lender):
    def open(self, directory, count):
        self.offload = TensorOffload(self.runtime)
        self.offload._free = [(HostBuffer(NBYTES), Handle.done()) for _ in range(count)]

    def lend(self, number):
        tensor = torch.full((NBYTES,), number + 1, dtype=torch.uint8)
        place = self.offload._own_place(NBYTES)
        return place.store(self.runtime.to_host, self.work(number), tensor, compute_event(CPU)).again()

    def free(self):
        return len(self.offload._free)


ALL = [Slots, Staging, Desks, Offloaded]


@pytest.fixture
def made(tmp_path):
    runtimes = []

    def delay(label):
        if label.startswith("bad"):
            raise OSError("boom")
        return 0.002

    def make(kind, *, count=1, failing=None):
        runtimes.append(Runtime(CPU, delays={"h2d": delay, "d2h": delay}))
        return kind(runtimes[-1], tmp_path, count, failing)

    yield make
    for runtime in runtimes:
        runtime.close()


@pytest.mark.parametrize("kind", ALL)
def test_a_buffer_holds_what_was_asked_for_and_is_lent_again(made, kind):
    lender, places = made(kind), set()
    for number in (2, 0, 1):
        lease = lender.lend(number)
        lease.ready.wait_host()
        assert lender.free() == 0
        place, value = lender.first_byte(lease)
        assert value == number + 1
        places.add(place)
        lease.release()
        assert lender.free() == 1
    assert len(places) == 1


@pytest.mark.parametrize("kind", ALL)
def test_releasing_again_does_nothing_more(made, kind):
    lender = made(kind, count=2)
    first, second = lender.lend(0), lender.lend(1)
    for lease in (first, second):
        lease.ready.wait_host()
    for _ in range(3):
        first.release()
        assert lender.free() == 1
    third = lender.lend(2)
    third.ready.wait_host()
    first.release()  # whoever has the buffer now keeps it
    assert lender.free() == 0
    assert lender.first_byte(second)[1] == 2 and lender.first_byte(third)[1] == 3
    for lease in (second, third):
        lease.release()
    assert lender.free() == 2


@pytest.mark.parametrize("kind", ALL)
def test_ready_fails_where_filling_failed_and_the_next_one_is_served(made, kind):
    lender = made(kind, failing=3)

    def ask():
        lease = lender.lend(3)
        try:
            lease.ready.wait_host()
        finally:
            lease.release()

    with pytest.raises(TransferError, match="boom|Input/output error"):
        ask()
    assert lender.free() == 1
    lease = lender.lend(1)
    lease.ready.wait_host()
    assert lender.first_byte(lease)[1] == 2
    lease.release()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ALL)
def test_a_block_that_fails_gives_it_back(made, kind, error):
    lender = made(kind)
    lease = lender.lend(0)
    lease.ready.wait_host()
    with released_on_error(lease):
        pass
    assert lender.free() == 0
    with pytest.raises(type(error)), released_on_error(lease):
        raise error
    assert lender.free() == 1
    again = lender.lend(1)
    again.ready.wait_host()
    assert lender.first_byte(again)[1] == 2
    again.release()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", [Desks, Offloaded])  # the others say themselves what is over
def test_a_block_that_fails_gives_it_back_once_the_lane_is_past_what_uses_it(made, kind, error):
    lender, gate = made(kind), threading.Event()
    lease = lender.lend(0)
    lease.ready.wait_host()
    lane = lender.runtime.to_device
    with used_by(lane, lease):
        lane.submit("copy", lambda: None).wait_host()

    def interrupted():
        with used_by(lane, lease):
            lane.submit("a copy that was arranged", lambda: gate.wait(20))
            raise error

    with pytest.raises(type(error)):
        interrupted()
    following = lender.lend(1)
    assert not following.ready._issued.wait(0.1), "the lane may still read the buffer"
    gate.set()
    following.ready.wait_host()
    assert lender.first_byte(following)[1] == 2
    following.release()
    assert lender.free() == 1


@pytest.mark.parametrize("kind", [Staging, Desks])  # where one waits for a buffer
def test_who_waits_for_a_buffer_is_served_in_order(made, kind):
    lender = made(kind)
    leases = [lender.lend(number) for number in REQUESTS]
    for number, lease in enumerate(leases):
        lease.ready.wait_host()
        assert not any(later.ready._issued.wait(0.02) for later in leases[number + 1 :])
        assert lender.first_byte(lease)[1] == number + 1
        lease.release()


@pytest.mark.parametrize("kind", ALL)
def test_buffers_that_are_free_are_filled_in_order(made, kind):
    order = []
    lender = made(kind, count=len(REQUESTS))
    lanes = {
        Slots: lender.runtime.to_device,
        Staging: lender.runtime.to_host,
        Offloaded: lender.runtime.to_host,
    }
    lane = lender.desk._reads if kind is Desks else lanes[kind]
    lane._delay_s = lambda label: order.append(label) or 0.0
    leases = [lender.lend(number) for number in REQUESTS]
    for number, lease in enumerate(leases):
        lease.ready.wait_host()
        assert lender.first_byte(lease)[1] == number + 1
    assert [int("".join(filter(str.isdigit, label))) for label in order] == list(REQUESTS)
    for lease in leases:
        lease.release()


def test_the_lease_of_what_one_has_anyway():
    buffer, ready = HostBuffer(NBYTES), Handle("update")
    lease = Kept(buffer, ready)
    for _ in range(2):
        lease.release(after=ready)
    assert lease.ready is ready and lease.buffer is buffer
    with lease.filled() as one, lease.read() as other:
        assert one is other is buffer
    assert Kept(buffer).ready.is_complete
