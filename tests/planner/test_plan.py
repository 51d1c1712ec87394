"""Plans by hand: bytes per tier, what schedules change, and what is said when it does not fit."""

import dataclasses
import json

import pytest
import torch

from hf_slideformer.errors import PlanError
from hf_slideformer.memory.layout import EIGHT_BIT_MOMENTS, ParamSpec, lay_out
from hf_slideformer.planner.plan import Budgets, check_budgets, make_plan

MIB = 2**20


def _spec(name, numel, dtype=torch.bfloat16, *, trainable=True):
    return ParamSpec(name, (numel,), dtype, dtype, dtype == torch.bfloat16, trainable)


# Two units, of 1 Mi and 2 Mi parameters, each with half of them frozen in fp32; a head and a frozen embedding.
LAYOUTS = [
    lay_out([_spec("w", size * MIB // 2), _spec("f", size * MIB // 2, torch.float32, trainable=False)])
    for size in (1, 2)
]
RESIDENT = [_spec("head", MIB), _spec("embedding", MIB // 2, torch.float32, trainable=False)]


def _plan(**overrides):
    settings = {
        "layouts": LAYOUTS,
        "resident": RESIDENT,
        "slots": 3,
        "training": True,
        "overlapped": False,
        "fp32_sums": False,
        "staging_buffers": 0,
        "on_gpu": True,
    }
    return make_plan(**(settings | overrides))


def _mib(plan):
    """Items by name in MiB."""
    return {item.what: item.nbytes / MIB for item in plan.items if item.nbytes}


DEFERRED = {
    "slots": 3 * (2 + 4),
    "resident weights": 2 + 2,
    "resident master residuals": 2,
    "resident moments": 8,
    "resident gradients": 2,
    "gradients on their way": 3 * 2,
    "weights": (1 + 2) + (2 + 4),
    "master residuals": 1 + 2,
    "moments": 4 + 8,
    "gradients": 1 + 2,
}


def test_deferred():
    plan = _plan()
    assert _mib(plan) == DEFERRED
    assert plan.update == "deferred"
    assert plan.tier_bytes("GPU") == (18 + 4 + 2 + 8 + 2 + 6) * MIB
    assert plan.tier_bytes("RAM") == (9 + 3 + 12 + 3) * MIB
    assert plan.pinned_bytes == (9 + 3) * MIB  # what the GPU reads and writes, nothing else
    assert (plan.units, plan.slots) == (2, 3)
    assert (plan.host_params, plan.resident_params) == (3 * MIB, 3 * MIB // 2)


def test_overlapped_keeps_no_gradients():
    plan = _plan(overlapped=True, staging_buffers=2)
    expected = {key: value for key, value in DEFERRED.items() if key != "gradients"}
    assert _mib(plan) == expected | {"gradient staging": 2 * 2}
    assert plan.update == "overlapped"
    assert plan.pinned_bytes == (9 + 4) * MIB


def test_accumulation_sums_in_fp32():
    plan = _plan(fp32_sums=True, staging_buffers=3)
    assert _mib(plan) == DEFERRED | {"resident gradients": 4, "gradients": 2 + 4, "gradient staging": 3 * 2}
    assert plan.pinned_bytes == (9 + 6) * MIB  # sums are made by the CPU


def test_8bit_moments():
    plan = _plan(moments=EIGHT_BIT_MOMENTS)
    # A byte for each of the two, and two fp32 scales for every 128 elements.
    assert _mib(plan) == DEFERRED | {"resident moments": 2.0625, "moments": 1.5 * 2.0625}
    assert plan.moments == "8bit" and plan.alternatives == ()
    assert "updates: deferred; 8-bit moments" in str(plan)
    assert "8-bit" not in str(_plan())


def test_the_last_block_of_a_resident_parameter_has_scales_too():
    plan = _plan(resident=[_spec("a", 129), _spec("b", 1)], moments=EIGHT_BIT_MOMENTS)
    assert {item.what: item.nbytes for item in plan.items}["resident moments"] == 2 * 130 + 8 * 3


def test_what_8bit_moments_would_need_is_what_they_need():
    plan, smaller = _plan(), _plan(moments=EIGHT_BIT_MOMENTS)
    (other,) = plan.alternatives
    assert other.setting == "optimizer_states='8bit'"
    assert (other.gpu_bytes, other.ram_bytes) == (smaller.tier_bytes("GPU"), smaller.tier_bytes("RAM"))


def test_evaluation_needs_weights_only():
    plan = _plan(training=False)
    assert plan.moments == "none" and plan.alternatives == ()
    names = ("slots", "resident weights", "resident master residuals", "weights", "master residuals")
    assert _mib(plan) == {name: DEFERRED[name] for name in names}
    assert plan.update == "none"


def test_nothing_is_pinned_without_a_gpu():
    assert _plan(on_gpu=False).pinned_bytes == 0


def test_what_fits_exactly_fits():
    plan = _plan()
    check_budgets(plan, Budgets(gpu=40 * MIB, ram=27 * MIB))


def test_too_little_ram_names_numbers_and_remedies():
    with pytest.raises(PlanError) as caught:
        check_budgets(_plan(), Budgets(gpu=40 * MIB, ram=27 * MIB - 1))
    message = str(caught.value)
    assert message.startswith(
        "The plan needs 27.00 MiB of RAM (weights 9.00 MiB, master residuals 3.00 MiB, moments 12.00 MiB, "
        "gradients 3.00 MiB); 27.00 MiB may be used."
    )
    assert "raise cpu_memory" in message.lower()
    assert "max_grad_norm=0" in message and "saves 3.00 MiB" in message
    assert "With optimizer_states='8bit' it needs 18.09 MiB of RAM, which fits." in message


def test_8bit_moments_are_not_said_to_fit_where_they_do_not():
    with pytest.raises(
        PlanError, match=r"With optimizer_states='8bit' it needs 18\.09 MiB of RAM\."
    ) as caught:
        check_budgets(_plan(), Budgets(gpu=40 * MIB, ram=MIB))
    assert "which fits" not in str(caught.value)


def test_8bit_moments_are_not_advised_where_they_are_used_or_save_nothing():
    frozen = [lay_out([_spec("f", MIB, trainable=False)])]
    for plan in (_plan(moments=EIGHT_BIT_MOMENTS), _plan(layouts=frozen), _plan(training=False)):
        with pytest.raises(PlanError, match="of RAM") as caught:
            check_budgets(plan, Budgets(gpu=10**12, ram=1))
        assert "8bit" not in str(caught.value)


def test_overlapping_is_not_advised_where_it_is_used_already():
    with pytest.raises(PlanError, match="cpu_memory") as caught:
        check_budgets(_plan(overlapped=True, staging_buffers=2), Budgets(gpu=40 * MIB, ram=MIB))
    assert "max_grad_norm" not in str(caught.value)


def test_too_little_gpu_memory():
    with pytest.raises(
        PlanError, match=r"needs 40\.00 MiB of GPU \(slots 18\.00 MiB, .* gpu_memory"
    ) as caught:
        check_budgets(_plan(), Budgets(gpu=39 * MIB, ram=10**12))
    assert "39.00 MiB may be used" in str(caught.value)
    assert "With optimizer_states='8bit' it needs 34.06 MiB of GPU, which fits." in str(caught.value)


def test_ram_stands_in_for_a_missing_gpu():
    plan = _plan(on_gpu=False)
    check_budgets(plan, Budgets(gpu=40 * MIB, ram=67 * MIB))
    with pytest.raises(
        PlanError, match=r"needs 67\.00 MiB of RAM .*stand-in for the GPU 40\.00 MiB"
    ) as caught:
        check_budgets(plan, Budgets(gpu=40 * MIB, ram=67 * MIB - 1))
    assert "With optimizer_states='8bit' it needs 52.16 MiB of RAM, which fits." in str(caught.value)


def test_text_shows_every_item():
    plan = _plan(notes=["something to know"])
    text = str(plan)
    for item in plan.items:
        assert (item.what in text) == bool(item.nbytes)
    assert "weights (pinned)" in text and "updates: deferred" in text
    assert "note: something to know" in text
    assert "stands in" not in text
    assert "stands in" in str(dataclasses.replace(plan, device="CPU"))


def test_as_dict_is_plain_data():
    restored = json.loads(json.dumps(_plan().as_dict()))
    assert (restored["update"], restored["moments"]) == ("deferred", "fp32")
    assert [other["setting"] for other in restored["alternatives"]] == ["optimizer_states='8bit'"]
    assert sum(item["nbytes"] for item in restored["items"] if item["tier"] == "RAM") == 27 * MIB
