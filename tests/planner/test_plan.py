"""Plans by hand: bytes per tier, what schedules change, what is shown, and what is said when it does not fit."""

import dataclasses
import json
import re

import pytest
import torch

from hf_slideformer.errors import PlanError
from hf_slideformer.memory.layout import EIGHT_BIT_MOMENTS, lay_out
from hf_slideformer.planner.memory import gpu_reserve_bytes
from hf_slideformer.planner.plan import check_budgets, describe
from hf_slideformer.planner.profile import ModelProfile, UnitProfile
from hf_slideformer.planner.timeline import Prediction
from hf_slideformer.planner.workload import Budgets, Decisions, Workload

from .machines import GIB, MIB, NO_MOMENTS, ONE_MOMENT, spec

# Two units, of 1 Mi and 2 Mi parameters, each with half of them frozen in fp32; a head and a frozen embedding.
LAYOUTS = tuple(
    lay_out([spec("w", size * MIB // 2), spec("f", size * MIB // 2, dtype=torch.float32, trainable=False)])
    for size in (1, 2)
)
OUTSIDE = (spec("head", MIB), spec("embedding", MIB // 2, dtype=torch.float32, trainable=False))

# Inputs of 1 MiB, 6 MiB saved in a unit, 3 MiB in forward, 5 MiB in backward; 2 MiB held, 4 MiB for the loss.
PROFILE = ModelProfile(
    batch_size=2,
    seq_len=16,
    units=(UnitProfile(MIB, 6 * MIB, 3 * MIB, 5 * MIB, 1e9, 1e6, 0.75),) * 2,
    held_bytes=2 * MIB,
    loss_bytes=4 * MIB,
    loss_flops=1e9,
    loss_traffic=1e6,
)


def _workload(**overrides):
    return Workload(**({"layouts": LAYOUTS, "outside": OUTSIDE} | overrides))


def _plan(decisions=None, budgets=None, notes=(), prediction=None, **overrides):
    workload = _workload(**overrides)
    decisions = decisions or Decisions.streamed(workload)
    return describe(workload, decisions, budgets=budgets, notes=notes, prediction=prediction)


def _mib(plan):
    """Items by name in MiB."""
    return {item.what: item.nbytes / MIB for item in plan.items if item.nbytes}


DEFERRED = {
    "slots": 3 * (2 + 4) - (2 + 4),  # two units take turns in two slots
    "resident weights": 2 + 2,
    "resident master residuals": 2,
    "resident moments": 8,
    "resident gradients": 2,
    "gradients on their way": 1 + 2,
    "weights": (1 + 2) + (2 + 4),
    "master residuals": 1 + 2,
    "moments": 4 + 8,
    "gradients": 1 + 2,
}
GPU = (12 + 4 + 2 + 8 + 2 + 3) * MIB
RAM = (9 + 3 + 12 + 3) * MIB


def test_deferred():
    plan = _plan()
    assert _mib(plan) == DEFERRED
    assert plan.update == "deferred" and plan.peak_at == "backward of unit 0"
    assert (plan.tier_bytes("GPU"), plan.tier_bytes("RAM")) == (GPU, RAM)
    assert plan.pinned_bytes == (9 + 3) * MIB  # what the GPU reads and writes, nothing else
    assert (plan.units, plan.slots) == (2, 2)
    assert (plan.host_params, plan.resident_params) == (3 * MIB, 3 * MIB // 2)


def test_overlapped_keeps_no_gradients():
    plan = _plan(overlapped=True)
    expected = {key: value for key, value in DEFERRED.items() if key != "gradients"}
    # At the first backward the last step's two are still on their way.
    assert _mib(plan) == expected | {"gradient staging": 2 * 2, "gradients on their way": 1 + 2 + 2}
    assert plan.update == "overlapped" and plan.peak_at == "backward of unit 1"
    assert plan.pinned_bytes == (9 + 4) * MIB


def test_accumulation_sums_in_fp32():
    plan = _plan(micro_batches=4)
    # The head's sum of 4 MiB, and the next micro-batch's gradient in bf16 before it is added.
    at_loss = {"resident gradients": 4 + 2, "gradients on their way": 0}
    in_backward = {"resident gradients": 4, "gradients on their way": 3}
    assert sum(in_backward.values()) > sum(at_loss.values())
    assert _mib(plan) == DEFERRED | in_backward | {"gradients": 2 + 4, "gradient staging": 3 * 2}
    assert plan.pinned_bytes == (9 + 6) * MIB  # sums are made by the CPU


def test_8bit_moments():
    plan = _plan(moments=EIGHT_BIT_MOMENTS)
    # A byte for each of the two, and two fp32 scales for every 128 elements.
    assert _mib(plan) == DEFERRED | {"resident moments": 2.0625, "moments": 1.5 * 2.0625}
    assert plan.moments == "8bit"
    assert "updates: deferred; 8-bit moments" in str(plan)
    assert "8-bit" not in str(_plan())


def test_moments_of_other_rules():
    one, none = _plan(moments=ONE_MOMENT), _plan(moments=NO_MOMENTS)
    assert _mib(one) == DEFERRED | {"resident moments": 4, "moments": 2 + 4}
    assert "updates: deferred (lion)" in str(one) and one.moments == "lion"
    assert _mib(none) == {what: size for what, size in DEFERRED.items() if "moments" not in what}
    assert "updates: deferred (sgd)" in str(none) and "moments" not in str(none)
    on_disk = _plan(_on_disk(moments=NO_MOMENTS), moments=NO_MOMENTS)
    assert _mib(on_disk)["residuals"] == 2 and _mib(on_disk)["disk buffers"] == 2 * 2
    assert re.search(r"\n    residuals +2\.00 MiB", str(on_disk)) and "moments" not in str(on_disk)


def test_the_last_block_of_a_resident_parameter_has_scales_too():
    outside = (spec("a", 129), spec("b", 1))
    for on_gpu, expected in (
        (False, 2 * 130 + 8 * 3),
        (True, 8 * 512),
    ):  # a CUDA allocation is 512 bytes at least
        plan = _plan(outside=outside, moments=EIGHT_BIT_MOMENTS, on_gpu=on_gpu)
        assert {item.what: item.nbytes for item in plan.items}["resident moments"] == expected


def test_a_resident_unit_has_all_its_state_on_the_gpu():
    workload = _workload()
    plan = _plan(Decisions.of(workload, resident=1))
    assert _mib(plan) == {
        "slots": 2 * (2 + 4),
        "resident weights": 4 + (1 + 2),
        "resident master residuals": 2 + 1,
        "resident moments": 8 + 4,
        "resident gradients": 2 + 1,
        "gradients on their way": 2,
        "weights": 2 + 4,
        "master residuals": 2,
        "moments": 8,
        "gradients": 2,
    }
    assert (plan.units, plan.host_params) == (1, 2 * MIB)
    everything = _plan(Decisions.of(workload, resident=2))
    assert everything.tier_bytes("RAM") == 0 and "slots" not in _mib(everything)
    assert str(everything).startswith("nothing streams; 2 units stay on the GPU;")


def test_state_outside_of_units_in_ram():
    plan = _plan(Decisions.of(_workload(), outside_state="RAM"))
    moved = {"resident master residuals", "resident moments"}
    assert _mib(plan) == {key: value for key, value in DEFERRED.items() if key not in moved} | {
        "weights and gradients outside of units": 2 + 2,  # of the head; the embedding is frozen
        "optimizer state outside of units": 2 + 8,
    }
    assert plan.pinned_bytes == (9 + 3 + 4) * MIB


ON_DISK = {"on_disk": (1,), "disk_buffers": 2}


def _on_disk(**changes):
    workload = _workload(**changes)
    return dataclasses.replace(Decisions.streamed(workload), **ON_DISK)


def test_state_on_disk():
    """The state of the second unit: 1 Mi trained parameters."""
    budgets = Budgets(gpu=GIB, ram=GIB, disk=16 * MIB)
    plan = _plan(_on_disk(), budgets=budgets)
    assert _mib(plan) == DEFERRED | {
        "master residuals": 1,
        "moments": 4,
        "disk buffers": 2 * (2 + 8),
        "residuals and moments": 2 + 8,
    }
    assert plan.tier_bytes("disk") == 10 * MIB and plan.left["disk"] == 6 * MIB
    assert plan.pinned_bytes == (9 + 3) * MIB  # the GPU never touches such a buffer
    assert plan.budgets == {"GPU": GIB, "RAM": GIB, "disk": 16 * MIB}
    text = str(plan)
    assert "; optimizer state of 1 unit on disk; updates: deferred" in text
    whole = dataclasses.replace(_on_disk(), weights_on_disk=_on_disk().on_disk)
    assert "; optimizer state of 1 unit on disk, weights and gradients of 1 unit too; updates" in str(
        _plan(whole, budgets=budgets)
    )
    assert re.search(r"\n  disk +10\.00 MiB, 6\.00 MiB left\n    residuals and moments +10\.00 MiB", text)
    restored = json.loads(json.dumps(plan.as_dict()))
    assert restored["decisions"]["on_disk"] == [1] and restored["decisions"]["disk_buffers"] == 2
    assert restored["peaks"]["resume"]["disk"] == 10 * MIB and restored["left"]["disk"] == 6 * MIB
    assert any(
        item == {"tier": "disk", "what": "residuals and moments", "nbytes": 10 * MIB, "pinned": False}
        for item in restored["items"]
    )
    check_budgets(plan, budgets)


def test_a_plan_without_a_disk_does_not_speak_of_one():
    plan = _plan(budgets=Budgets(gpu=GIB, ram=GIB))
    assert "disk" not in str(plan) and set(plan.left) == {"GPU", "RAM"} and plan.tier_bytes("disk") == 0
    unused = _plan(budgets=Budgets(gpu=GIB, ram=GIB, disk=GIB))
    assert "disk" not in str(unused) and unused.left["disk"] == GIB


@pytest.mark.parametrize(
    ("disk", "remedy"),
    [
        (
            10 * MIB - 1,
            r"10\.00 MiB may be used\. Raise nvme_memory, free some, .*, or raise cpu_memory\. Pray\.",
        ),
        (None, r"0\.00 MiB may be used\. Set nvme_dir .*\. Pray\."),
    ],
)
def test_too_little_disk_names_numbers_and_remedies(disk, remedy):
    need = r"The plan needs 10\.00 MiB of disk \(residuals and moments 10\.00 MiB\); "
    with pytest.raises(PlanError, match="^" + need + remedy + "$"):
        check_budgets(_plan(_on_disk()), Budgets(gpu=GIB, ram=GIB, disk=disk), ["Pray."])


def test_activations_are_part_of_the_plan_where_they_are_known():
    plan = _plan(profile=PROFILE)
    assert plan.peak_at == "backward of unit 1"
    assert _mib(plan) == DEFERRED | {
        "gradients on their way": 2,
        "held outside of units": 2,
        "cuBLAS workspaces": 66,
        "inputs of units": 2,
        "activations of one unit": 6,
        "temporary memory of kernels": 5,
        "squared norms": 3 * 512 / MIB,
    }
    assert "come on top" not in str(plan) and "come on top" in str(_plan())


def _offloaded(**changes):
    workload = _workload(**changes)
    plan = _plan(Decisions.streamed(workload, activations="offload"), **changes)
    return {item.what: item for item in plan.items if item.tier == "RAM"}


def test_offloaded_inputs_are_in_pinned_ram():
    inputs = _offloaded(profile=PROFILE, overlapped=True)["inputs of units"]
    assert inputs.nbytes == 2 * MIB and inputs.pinned
    assert _offloaded(profile=PROFILE, micro_batches=2)["inputs of units"].nbytes == 2 * MIB


def test_an_input_waits_where_the_gradient_will_come():
    """Two units with 1 and 2 MiB of gradients, and inputs of 1.5 MiB each."""
    units = tuple(dataclasses.replace(unit, boundary_bytes=3 * MIB // 2) for unit in PROFILE.units)
    in_ram = _offloaded(profile=dataclasses.replace(PROFILE, units=units))
    assert in_ram["inputs of units"].nbytes == MIB // 2
    assert in_ram["gradients"].nbytes == 3 * MIB


def test_evaluation_needs_weights_only():
    plan = _plan(training=False, profile=PROFILE)
    assert plan.moments == "none" and plan.update == "none"
    names = ("slots", "resident weights", "resident master residuals", "weights", "master residuals")
    assert _mib(plan) == {name: DEFERRED[name] for name in names}


def test_nothing_is_pinned_without_a_gpu():
    assert _plan(on_gpu=False).pinned_bytes == 0


def test_what_fits_exactly_fits():
    check_budgets(_plan(), Budgets(gpu=GPU, ram=RAM))


def test_too_little_ram_names_numbers_and_remedies():
    with pytest.raises(PlanError) as caught:
        check_budgets(_plan(), Budgets(gpu=GPU, ram=RAM - 1), ["Pray."])
    assert str(caught.value) == (
        "The plan needs 27.00 MiB of RAM (weights 9.00 MiB, master residuals 3.00 MiB, moments 12.00 MiB, "
        "gradients 3.00 MiB); 27.00 MiB may be used. Raise cpu_memory or free some, freeze some layers, or use a "
        "smaller model. Pray."
    )


def test_too_little_gpu_memory():
    with pytest.raises(
        PlanError, match=r"needs 31\.00 MiB of GPU \(slots 12\.00 MiB, .* gpu_memory"
    ) as caught:
        check_budgets(_plan(), Budgets(gpu=30 * MIB, ram=10**12))
    assert "30.00 MiB may be used. Raise" in str(caught.value)


def test_the_reserve_is_kept_free():
    workload = _workload(profile=PROFILE)
    needed = _plan(profile=PROFILE).tier_bytes("GPU")
    budgets = Budgets(gpu=int(needed / 0.95), ram=GIB)
    assert gpu_reserve_bytes(workload, budgets.gpu) == int(0.1 * budgets.gpu)
    with pytest.raises(PlanError, match=r"and 11\.68 MiB more stay free for fragmentation"):
        check_budgets(_plan(profile=PROFILE, budgets=budgets), budgets)
    assert gpu_reserve_bytes(workload, 80 * GIB) == int(0.03 * 80 * GIB + GIB / 2)
    assert gpu_reserve_bytes(_workload(), 80 * GIB) == 0  # nothing is known of activations
    assert gpu_reserve_bytes(_workload(profile=PROFILE, on_gpu=False), 80 * GIB) == 0


def test_ram_stands_in_for_a_missing_gpu():
    plan = _plan(on_gpu=False)
    check_budgets(plan, Budgets(gpu=GPU, ram=RAM + GPU))
    with pytest.raises(PlanError, match=r"needs 58\.00 MiB of RAM .*stand-in for the GPU 31\.00 MiB"):
        check_budgets(plan, Budgets(gpu=GPU, ram=RAM + GPU - 1))


def test_what_is_left():
    budgets = Budgets(gpu=40 * MIB, ram=60 * MIB)
    plan = _plan(budgets=budgets)
    assert plan.left == {"GPU": 9 * MIB, "RAM": 33 * MIB}
    assert "31.00 MiB, 9.00 MiB left" in str(plan)
    assert _plan(budgets=budgets, on_gpu=False).left == {"GPU": 9 * MIB, "RAM": 2 * MIB}
    assert _plan().left == {}


def test_peaks_of_all_phases():
    source = (spec("w", MIB, source=torch.float32),)
    plan = _plan(layouts=(lay_out(source), lay_out(source)), outside=source, budgets=Budgets(GIB, 25 * MIB))
    train = plan.tier_bytes("RAM")
    assert train == 2 * (2 + 2 + 8 + 2) * MIB
    assert {phase: peak["RAM"] for phase, peak in plan.peaks.items()} == {
        "load": (3 * 4 + 4) * MIB,  # all as it came, and one unit's new weights and residual
        "train": train,
        "save": train + (2 * 16 + 4) * MIB,  # pieces of what is on the GPU, and one parameter joined in fp32
        "resume": train + 128 * MIB,  # weights that have been read, before they are where they belong
    }
    assert plan.peaks["load"]["GPU"] == (2 * 2 + 2 + 2) * MIB
    assert plan.peaks["train"]["GPU"] == plan.tier_bytes("GPU")
    assert any("to resume needs 0.15 GiB of RAM" in note and "0.13 GiB more" in note for note in plan.notes)


def test_bf16_weights_are_saved_as_they_are():
    peaks = _plan().peaks
    assert peaks["save"]["RAM"] - peaks["train"]["RAM"] == 2 * 16 * MIB


def test_large_masters_are_joined_in_pieces():
    peaks = _plan(outside=(spec("embedding", 80 * MIB, source=torch.float32),)).peaks
    assert peaks["save"]["RAM"] - peaks["train"]["RAM"] == 3 * 16 * MIB


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("resident", [(), (0,)])
def test_what_is_saved_as_other_tensors_is_made_a_unit_at_a_time(source, resident):
    fused, single = spec("fused", 40 * MIB, source=source), spec("single", 20 * MIB, source=source)
    kept = spec("kept", MIB, source=source)
    layouts = (lay_out([fused, single, kept]), lay_out([kept]))
    activations = ("keep", "keep")
    decisions = Decisions(resident=resident, activations=activations, slots=2, staging_buffers=0)

    def saving(remade):
        plan = _plan(layouts=layouts, outside=(), remade=frozenset(remade), decisions=decisions)
        return plan.peaks["save"]["RAM"] - plan.peaks["train"]["RAM"]

    made = 60 * MIB * source.itemsize
    from_elsewhere = made if source == torch.float32 or resident else 0
    assert saving(["fused", "single"]) - saving([]) == from_elsewhere + made + 40 * MIB * source.itemsize


def test_what_a_checkpoint_needs_beside_training():
    plan = _plan(outside=(spec("embedding", 80 * MIB),))
    assert plan.peaks["resume"]["RAM"] - plan.peaks["train"]["RAM"] == 2 * 80 * MIB  # more than a batch
    # Gradients are not on their way when a run is resumed.
    plan = _plan(overlapped=True)
    assert plan.peaks["resume"]["RAM"] - plan.peaks["train"]["RAM"] == (128 - 4) * MIB


def test_text_shows_every_item():
    plan = _plan(notes=["something to know"])
    text = str(plan)
    for item in plan.items:
        assert (f"    {item.what} " in text) == bool(item.nbytes)
    assert "weights (pinned)" in text and "updates: deferred" in text
    assert "note: something to know" in text
    assert "stands in" not in text
    assert "stands in" in str(dataclasses.replace(plan, device="CPU"))


def test_headline():
    workload = _workload(profile=PROFILE)
    plan = describe(workload, Decisions.of(workload, resident=1, kept=1, rest="offload"))
    assert str(plan).splitlines()[0] == (
        "1 unit (2.1 M parameters) streams through 2 slots; 1 unit stays on the GPU; 2.6 M parameters are resident; "
        "activations kept in 1 unit, recomputed in 1 unit, inputs of 1 unit in RAM; updates: deferred"
    )


def test_as_dict_is_plain_data():
    prediction = Prediction(0.5, 64.0, "PCIe", {"PCIe": 0.4}, {"PCIe": 0.1})
    plan = _plan(profile=PROFILE, budgets=Budgets(gpu=GIB, ram=GIB), prediction=prediction, notes=["a note"])
    restored = json.loads(json.dumps(plan.as_dict()))
    assert (restored["update"], restored["moments"]) == ("deferred", "fp32")
    assert sum(item["nbytes"] for item in restored["items"] if item["tier"] == "RAM") == RAM
    assert restored["decisions"]["activations"] == ["recompute", "recompute"]
    assert restored["prediction"]["bound_by"] == "PCIe"
    assert restored["left"]["RAM"] == GIB - RAM
    assert (restored["batch_size"], restored["seq_len"]) == (2, 16)
    assert "predicted: 64 tokens/s, 0.50 s a step, bound by PCIe" in str(plan)
