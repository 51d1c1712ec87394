"""Slots: leases protect, released slots are poisoned when they get a new owner, fetches wait for updates."""

from dataclasses import dataclass

import pytest
import torch

from hf_slideformer.errors import TransferError
from hf_slideformer.memory.buffers import HostBuffer
from hf_slideformer.memory.layout import ParamSpec, UnitLayout, lay_out
from hf_slideformer.memory.lease import Kept
from hf_slideformer.memory.pool import SlotPool
from hf_slideformer.memory.runtime import Runtime
from hf_slideformer.memory.transfer import Handle

CPU = torch.device("cpu")
NUMEL = 200


@dataclass
class Unit:
    """A unit with one fp32 parameter whose elements all equal `index + 1`."""

    index: int
    layout: UnitLayout
    buffer: HostBuffer
    pending_update: Handle | None = None

    @property
    def name(self):
        return f"unit {self.index}"

    @property
    def weights(self):
        return self.buffer.tensor(torch.float32, 0, self.layout.numel)

    def source(self):
        return Kept(self.buffer, self.pending_update)


def _unit(index, numel=NUMEL):
    layout = lay_out([ParamSpec("w", (numel,), torch.float32, torch.float32, False, True)])
    unit = Unit(index, layout, HostBuffer(layout.weight_bytes))
    unit.weights.fill_(index + 1.0)
    return unit


@pytest.fixture
def runtime():
    runtime = Runtime(CPU, delays={"h2d": lambda label: 0.002})
    yield runtime
    runtime.close()


@pytest.fixture
def metrics(runtime):
    return runtime.metrics


@pytest.fixture
def pool(runtime):
    return SlotPool(runtime, _unit(0).layout.weight_bytes, 2)


def _fetched(metrics):
    return metrics.totals().get("h2d_bytes", 0) / _unit(0).layout.weight_bytes


def test_a_lease_gives_the_units_weights(pool):
    lease = pool.acquire(_unit(4))
    (leaf,) = lease.leaves
    assert isinstance(leaf, torch.nn.Parameter) and leaf.requires_grad
    assert leaf.shape == (NUMEL,) and leaf.eq(5.0).all()


def test_weights_that_are_there_are_not_fetched_again(pool, metrics):
    unit = _unit(0)
    pool.prefetch(unit, keep=(0,))
    pool.prefetch(unit, keep=(0,))
    first = pool.acquire(unit)
    second = pool.acquire(unit)
    assert _fetched(metrics) == 1
    assert first.leaves[0] is second.leaves[0]


def test_a_slot_is_poisoned_when_it_gets_a_new_owner(pool):
    first = pool.acquire(_unit(0))
    leaf = first.leaves[0]
    first.release()
    assert leaf.eq(1.0).all()  # still whole: nobody has taken the slot
    gate = Handle("update")
    others = [_unit(1), _unit(2)]
    for other in others:
        other.pending_update = gate
        pool.prefetch(other, keep=(1, 2))
    assert torch.isnan(leaf).all()
    gate.complete()
    assert pool.acquire(others[1]).leaves[0].eq(3.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_poison_is_nan_in_every_dtype(dtype):
    assert torch.isnan(torch.full((16,), 0xFF, dtype=torch.uint8).view(dtype)).all()


def test_leases_protect(pool):
    held = pool.acquire(_unit(0))
    for index in range(1, 6):
        other = pool.acquire(_unit(index))
        assert other.leaves[0].eq(index + 1.0).all()
        other.release()
    assert held.leaves[0].eq(1.0).all()


def test_a_slot_leased_twice_is_free_after_the_second_release(pool):
    unit = _unit(0)
    first, second = pool.acquire(unit), pool.acquire(unit)
    other = pool.acquire(_unit(1))
    first.release()
    pool.prefetch(_unit(2), keep=())
    assert second.leaves[0].eq(1.0).all()
    second.release()
    assert pool.acquire(_unit(2)).leaves[0].eq(3.0).all()
    assert other.leaves[0].eq(2.0).all()


def test_prefetch_never_takes_what_is_kept_or_leased(pool, metrics):
    pool.acquire(_unit(0)).release()
    leased = pool.acquire(_unit(1))
    pool.prefetch(_unit(2), keep=(0,))
    assert _fetched(metrics) == 2
    pool.acquire(_unit(0)).release()
    assert _fetched(metrics) == 2
    pool.prefetch(_unit(2), keep=())
    assert _fetched(metrics) == 3
    assert leased.leaves[0].eq(2.0).all()


def test_the_slot_used_longest_ago_is_taken(runtime, metrics):
    pool = SlotPool(runtime, _unit(0).layout.weight_bytes, 3)
    for index in (0, 1, 2, 0):
        pool.acquire(_unit(index)).release()
    pool.acquire(_unit(3)).release()  # in the place of 1
    before = _fetched(metrics)
    pool.acquire(_unit(0)).release()
    pool.acquire(_unit(2)).release()
    assert _fetched(metrics) == before
    pool.acquire(_unit(1)).release()
    assert _fetched(metrics) == before + 1


def test_an_empty_slot_is_taken_first(pool, metrics):
    pool.acquire(_unit(0)).release()
    pool.acquire(_unit(1)).release()
    pool.acquire(_unit(0)).release()
    pool.invalidate_unit(0)
    pool.acquire(_unit(2)).release()
    pool.acquire(_unit(1)).release()
    assert _fetched(metrics) == 3


def test_a_fetch_waits_for_the_pending_update(pool):
    unit, update = _unit(0), Handle("update of unit 0")
    unit.pending_update = update
    pool.prefetch(unit, keep=(0,))
    unit.weights.fill_(9.0)
    update.complete()
    assert pool.acquire(unit).leaves[0].eq(9.0).all()


def test_the_source_is_given_back_once_the_copy_from_it_is_done(pool):
    class Loan(Kept):
        after = None

        def release(self, *, after=None):
            assert self.after is None
            self.after = after

    gate, unit = Handle("update"), _unit(0)
    loan = Loan(unit.buffer, gate)
    unit.source = lambda: loan
    try:
        pool.prefetch(unit, keep=(0,))
        assert not loan.after.is_complete
    finally:
        gate.complete()
    lease = pool.acquire(unit)
    assert loan.after is lease.ready and loan.after.is_complete
    lease.release()


def test_changed_weights_are_fetched_anew(pool):
    unit, other = _unit(0), _unit(1)
    for one in (unit, other):
        pool.acquire(one).release()
        one.weights.mul_(10.0)
    pool.invalidate_unit(0)
    assert pool.acquire(unit).leaves[0].eq(10.0).all()
    stale = pool.acquire(other)
    assert stale.leaves[0].eq(2.0).all()
    stale.release()
    pool.invalidate()
    assert pool.acquire(other).leaves[0].eq(20.0).all()


def test_units_of_different_sizes_share_a_slot(pool):
    small, large = _unit(0, numel=10), _unit(1)
    for _ in range(3):
        for unit in (small, large, _unit(2)):
            lease = pool.acquire(unit)
            assert lease.leaves[0].shape == (unit.layout.numel,)
            assert lease.leaves[0].eq(unit.index + 1.0).all()
            lease.release()


def test_a_failed_fetch_is_raised_and_tried_again(pool):
    unit, update = _unit(0), Handle("update of unit 0")
    unit.pending_update = update
    update.fail(RuntimeError("boom"))
    pool.prefetch(unit, keep=(0,))
    with pytest.raises(TransferError, match="fetch of unit 0 failed: update of unit 0 failed: boom"):
        pool.acquire(unit)
    pool.wait()  # the failure stays with its handle
    unit.pending_update = None
    lease = pool.acquire(unit)
    assert lease.leaves[0].eq(1.0).all()
    lease.release()
    for index in (1, 2):  # no slot was lost
        assert pool.acquire(_unit(index)).leaves[0].eq(index + 1.0).all()


def test_a_failed_prefetch_of_one_unit_does_not_stop_another(pool):
    # The next use of the slot may come before the failure does; whose failure it is must not be mixed up.
    bad, update = _unit(0), Handle("update of unit 0")
    bad.pending_update = update
    pool.prefetch(bad, keep=(0,))
    update.fail(RuntimeError("boom"))
    for index in (1, 2, 3):
        lease = pool.acquire(_unit(index))
        assert lease.leaves[0].eq(index + 1.0).all()
        lease.release()


def test_slots_outlive_inference_mode(runtime):
    with torch.inference_mode():
        pool = SlotPool(runtime, _unit(0).layout.weight_bytes, 2)
        lease = pool.acquire(_unit(0))
    (leaf,) = lease.leaves
    (leaf * 2).sum().backward()
    assert leaf.grad.eq(2.0).all()


def test_depth_is_what_can_be_on_its_way(pool):
    assert pool.depth == 1
