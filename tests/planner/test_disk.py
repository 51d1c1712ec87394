"""What would lie on disk: within budgets, whole units, no more than needed."""

import dataclasses

import pytest

from hf_slideformer.errors import PlanError
from hf_slideformer.memory.layout import EIGHT_BIT_MOMENTS
from hf_slideformer.planner.disk import optimizer_state_is_enough, share_with_disk, state_bytes
from hf_slideformer.planner.memory import MemoryModel, gpu_reserve_bytes
from hf_slideformer.planner.solve import solve
from hf_slideformer.planner.workload import Budgets, Decisions

from .machines import GIB, H100, llama

UNITS = 32


def _budgets(gpu=24.0, ram=64.0):
    return Budgets(gpu=int(gpu * GIB), ram=int(ram * GIB))


def test_what_fits_needs_no_disk():
    share = share_with_disk(llama(1), _budgets(ram=120))
    assert (share.disk_bytes, share.on_disk) == (0, 0)


@pytest.mark.parametrize(
    "settings", [{}, {"overlapped": True}, {"micro_batches": 4}, {"moments": EIGHT_BIT_MOMENTS}]
)
def test_state_of_a_unit_is_what_ram_would_hold_of_it(settings):
    workload = llama(1, **settings)
    memory = MemoryModel(workload)
    bytes_of = [memory.ram_train(Decisions.of(workload, resident=count, kept=UNITS)) for count in (3, 4)]
    # Padding to pages is not counted.
    assert state_bytes(workload, workload.layouts[3]) == pytest.approx(
        bytes_of[0] - bytes_of[1], abs=5 * 4096
    )


@pytest.mark.parametrize("settings", [{}, {"overlapped": True}, {"micro_batches": 4}])
def test_budgets_are_kept_and_filled(settings):
    workload = llama(1, **settings)
    before = None
    for ram in (30, 40, 50, 60):
        budgets = _budgets(ram=ram)
        share = share_with_disk(workload, budgets)
        assert share.gpu_bytes + gpu_reserve_bytes(workload, budgets.gpu) <= budgets.gpu
        assert share.ram_bytes <= budgets.ram
        assert share.resident + share.in_ram + share.on_disk == UNITS and share.on_disk > 0
        unit = state_bytes(workload, workload.layouts[0])
        assert share.disk_bytes == share.on_disk * unit
        assert share.ram_bytes + unit > budgets.ram  # one more would not fit
        assert before is None or share.disk_bytes < before
        before = share.disk_bytes


def test_inputs_that_waited_among_gradients_stay_in_ram():
    workload, budgets = llama(1, seq_len=8192), _budgets(ram=40)
    with_inputs = share_with_disk(workload, budgets, placement="stream", activations="offload")
    without = share_with_disk(workload, budgets, placement="stream", activations="recompute")
    inputs = 2 * 8192 * 4096
    more = with_inputs.ram_bytes + with_inputs.disk_bytes - without.ram_bytes - without.disk_bytes
    assert more == with_inputs.on_disk * inputs > 0


@pytest.mark.parametrize("wishes", [{}, {"placement": "stream"}, {"activations": "keep"}])
def test_optimizer_state_on_disk_is_enough_where_the_planner_says_so(wishes):
    answers = set()
    for gpu, ram in ((24, 20), (24, 30), (24, 34), (24, 60), (8, 60), (2, 60)):
        enough = optimizer_state_is_enough(llama(1), _budgets(gpu, ram), **wishes)
        budgets = dataclasses.replace(_budgets(gpu, ram), disk=10**15)
        try:
            solve(llama(1), H100, budgets, **wishes)
        except PlanError:
            assert not enough
        else:
            assert enough
        answers.add(enough)
    assert answers == {True, False}


def test_wishes_are_followed():
    budgets = _budgets(gpu=60, ram=40)
    assert share_with_disk(llama(1), budgets).resident > 0
    assert share_with_disk(llama(1), budgets, placement="stream").resident == 0
    kept = share_with_disk(llama(8), budgets, activations="keep")
    offloaded = share_with_disk(llama(8), budgets, activations="offload")
    assert kept.resident < offloaded.resident


def test_no_disk_helps_a_gpu_or_ram_that_is_too_small():
    assert share_with_disk(llama(1), _budgets(gpu=2)) is None
    assert share_with_disk(llama(1), _budgets(ram=2)) is None


def test_where_ram_stands_in_both_come_out_of_it():
    workload = dataclasses.replace(llama(1), on_gpu=False)
    share = share_with_disk(workload, _budgets(gpu=24, ram=64))
    assert (
        share.gpu_bytes + share.ram_bytes <= 64 * GIB < share.gpu_bytes + share.ram_bytes + share.disk_bytes
    )


def test_seconds():
    share = share_with_disk(llama(1), _budgets())
    read, write = share.seconds(2e9, 1e9)
    assert (read, write) == (share.disk_bytes / 2e9, share.disk_bytes / 1e9)
