"""Weights, gradients and inputs on disk: only where optimizer state there is not enough, and no more than needed."""

import dataclasses
import re

import pytest

from hf_slideformer.errors import PlanError
from hf_slideformer.memory.layout import EIGHT_BIT_MOMENTS
from hf_slideformer.planner.memory import MemoryModel
from hf_slideformer.planner.solve import FEWEST_DISK_BUFFERS, solve
from hf_slideformer.planner.timeline import (
    Durations,
    predict,
    shortest_step_s,
    step_seconds,
)
from hf_slideformer.planner.workload import Budgets, Decisions

from .machines import GIB, H100, llama

UNITS = 32
ALL = tuple(range(UNITS))
PAGE = 4096


def _budgets(gpu=24.0, ram=20.0, disk=1000.0):
    return Budgets(gpu=int(gpu * GIB), ram=int(ram * GIB), disk=int(disk * GIB))


def _on_disk(workload, whole=ALL, **settings):
    decisions = Decisions.of(workload, **settings)
    decisions = dataclasses.replace(decisions, on_disk=ALL, disk_buffers=FEWEST_DISK_BUFFERS)
    return decisions.with_weights_on_disk(workload, tuple(whole))


def _mapped(workload):
    names = {segment.spec.name for layout in workload.layouts for segment in layout.segments}
    return dataclasses.replace(workload, mapped=frozenset(names | {spec.name for spec in workload.outside}))


SETTINGS = [{}, {"overlapped": True}, {"micro_batches": 4}, {"moments": EIGHT_BIT_MOMENTS}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_budgets_are_kept_and_filled(settings):
    workload, before = _mapped(llama(1, **settings)), UNITS + 1
    counts = []
    for ram in (14, 17, 20, 23):
        budgets = _budgets(ram=ram)
        plan = solve(workload, H100, budgets)
        decisions = plan.decisions
        assert plan.tier_bytes("RAM") <= budgets.ram and plan.peaks["load"]["RAM"] <= budgets.ram
        whole = decisions.weights_on_disk
        assert set(whole) <= set(decisions.on_disk) and len(whole) <= before
        if whole:
            assert set(decisions.on_disk) == set(ALL) - set(decisions.resident), "all state goes first"
            fewer = decisions.with_weights_on_disk(workload, whole[:-1])
            assert MemoryModel(workload).ram_train(fewer) > budgets.ram
        before = len(whole)
        counts.append(len(whole))
    assert counts[0] > counts[-1]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("rest", ["recompute", "offload"])
def test_what_leaves_ram_is_on_disk(settings, rest):
    """Moving one more unit's weights takes from RAM what it brings to the disk; buffers stay as large."""
    workload = llama(1, seq_len=8192, **settings)
    memory = MemoryModel(workload)
    less, more = (_on_disk(workload, ALL[-count:], rest=rest) for count in (8, 9))
    layout = workload.layouts[0]
    moved = layout.weight_bytes
    if not workload.overlapped:
        moved += 4 * layout.state_numel if workload.fp32_sums else layout.grad_bytes
    inputs = 2 * 8192 * 4096 if rest == "offload" else 0
    # An input in RAM waits where the gradient will be, if it has the room.
    shared = 0 if workload.overlapped or workload.fp32_sums else min(inputs, layout.grad_bytes)
    assert memory.ram_train(less) - memory.ram_train(more) == pytest.approx(
        moved + inputs - shared, abs=2 * PAGE
    )
    assert memory.disk_bytes(more) - memory.disk_bytes(less) == pytest.approx(moved + inputs, abs=3 * PAGE)


def test_items_say_what_lies_where():
    workload = llama(1, seq_len=8192)
    decisions = _on_disk(workload, rest="offload")
    memory, layout = MemoryModel(workload), workload.layouts[0]
    on_disk = {item.what: item.nbytes for item in memory.disk_items(decisions)}
    assert on_disk == {
        "residuals and moments": UNITS * 10 * layout.state_numel,
        "weights": UNITS * layout.weight_bytes,
        "gradients": UNITS * layout.grad_bytes,
        "inputs of units": UNITS * 2 * 8192 * 4096,
    }
    in_ram = {item.what: item.nbytes for item in memory.ram_items(decisions)}
    assert in_ram["weights"] == in_ram["moments"] == in_ram["gradients"] == 0
    assert in_ram["disk buffers"] == 2 * 14 * layout.state_numel
    assert in_ram["weight buffers"] == 3 * layout.weight_bytes
    assert in_ram["gradient staging"] == 3 * layout.grad_bytes
    assert in_ram["inputs of units"] == 4 * 2 * 8192 * 4096


def test_weights_that_are_mapped_take_no_ram_while_they_load():
    workload = llama(1)
    mapped = _mapped(workload)
    decisions = _on_disk(workload)
    weights = sum(layout.weight_bytes for layout in workload.layouts) + sum(
        2 * spec.numel for spec in workload.outside
    )
    anonymous, files = (MemoryModel(one).ram_load(decisions) for one in (workload, mapped))
    assert anonymous - files == weights
    assert files == MemoryModel(mapped)._disk_buffers(decisions) + MemoryModel(mapped)._weight_buffers(
        decisions
    )
    # A model that is larger than RAM can be loaded only from files.
    budgets = _budgets(ram=12)
    assert solve(mapped, H100, budgets).decisions.weights_on_disk
    with pytest.raises(PlanError, match="Loading the model needs"):
        solve(workload, H100, budgets)


def test_ram_that_is_too_small_for_the_buffers_is_refused_with_numbers():
    with pytest.raises(PlanError) as caught:
        solve(llama(1), H100, _budgets(ram=2))
    assert re.search(
        r"needs [\d.]+ GiB of RAM \(.*disk buffers.*\); 2\.00 GiB may be used", str(caught.value)
    )


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("rest", ["recompute", "offload"])
def test_a_step_takes_at_least_what_the_disk_moves(settings, rest):
    workload = llama(1, seq_len=8192, **settings)
    times = Durations.of(workload, H100)
    one, some = (_on_disk(workload, whole, rest=rest) for whole in ((31,), ALL[::2]))
    before = 0.0
    for decisions in (_on_disk(workload, (), rest=rest), one, some, _on_disk(workload, rest=rest)):
        seconds = step_seconds(times, decisions)
        assert shortest_step_s(times, decisions) <= seconds * (1 + 1e-9)
        assert seconds > before
        before = seconds
    told = predict(workload, H100, _on_disk(workload, rest=rest))
    assert told.bound_by == "disk"
    layout, m = workload.layouts[0], workload.micro_batches
    weights, grads = layout.weight_bytes, 0 if workload.overlapped else layout.grad_bytes
    state = workload.moments.nbytes(layout.state_numel) + 2 * layout.lo_numel
    inputs = 2 * 8192 * 4096 if rest == "offload" else 0
    summed = 2 if m > 1 else 1  # fp32
    read = state + weights + summed * grads + m * (2 * weights + inputs)
    read += m * summed * grads if m > 1 else 0
    written = state + weights + m * (summed * grads + inputs)
    # The last units are still in their slots when backward begins.
    least = UNITS * (read / H100.disk_read + written / H100.disk_write)
    still_there = m * 3 * weights / H100.disk_read
    assert told.busy_s["disk"] == pytest.approx(least - still_there, rel=1e-3)
    assert told.busy_s["disk"] <= told.step_s <= 1.25 * told.busy_s["disk"]
