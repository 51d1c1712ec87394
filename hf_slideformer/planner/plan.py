"""The plan: what lives where, in bytes, checked against budgets before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ..errors import PlanError
from ..memory.layout import EIGHT_BIT_MOMENTS, FP32_MOMENTS, MomentFormat, ParamSpec, UnitLayout

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Decisions:
    """What a plan decides; the engine does what this says.

    Attributes:
        resident: indices of the units whose weights and optimizer state stay on the GPU.
        activations: for each unit "keep", "recompute" or "offload" (recompute, with its inputs in RAM meanwhile).
        slots: GPU buffers that the other units take turns in.
        staging_buffers: host buffers that gradients pass through.
        outside_state: "GPU" or "RAM": where the optimizer state of parameters outside of units is.
    """

    resident: tuple[int, ...]
    activations: tuple[str, ...]
    slots: int
    staging_buffers: int
    outside_state: str = "GPU"


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the plan: a kind of state, its tier ("GPU" or "RAM"), its size, and whether it is pinned."""

    tier: str
    what: str
    nbytes: int
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Alternative:
    """What a plan would need with one other setting, as it is written in `SlideConfig`."""

    setting: str
    gpu_bytes: int
    ram_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the training state lives.

    Attributes:
        items: all state that is allocated for the whole run; activations and temporary memory of kernels come
            on top on the GPU.
        update: "deferred", "overlapped", or "none" (no optimizer).
        moments: "fp32", "8bit", or "none" (no optimizer).
        units: number of streamed units.
        slots: number of GPU slots they take turns in.
        host_params: parameters in streamed units.
        resident_params: parameters that stay on the GPU.
        notes: differences from plain training that a user should know.
        device: "GPU", or "CPU" where RAM stands in for the GPU.
        alternatives: what could be set to need less.
    """

    items: tuple[Item, ...]
    update: str
    moments: str
    units: int
    slots: int
    host_params: int
    resident_params: int
    notes: tuple[str, ...]
    device: str
    alternatives: tuple[Alternative, ...] = ()

    def tier_bytes(self, tier: str) -> int:
        """Bytes in one tier ("GPU" or "RAM")."""
        return sum(item.nbytes for item in self.items if item.tier == tier)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of RAM that are pinned."""
        return sum(item.nbytes for item in self.items if item.pinned)

    def as_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        streamed = f"{self.units} units ({self.host_params / 1e6:,.1f} M parameters) stream through {self.slots} slots"
        resident = f"{self.resident_params / 1e6:,.1f} M parameters are resident"
        moments = "; 8-bit moments" if self.moments == EIGHT_BIT_MOMENTS.name else ""
        lines = [f"{streamed}; {resident}; updates: {self.update}{moments}"]
        for tier in ("GPU", "RAM"):
            label = (
                f"{tier} (this machine's RAM stands in)" if tier == "GPU" and self.device == "CPU" else tier
            )
            lines.append(f"  {label:<42} {_size(self.tier_bytes(tier)):>12}")
            lines += [
                f"    {item.what + (' (pinned)' if item.pinned else ''):<40} {_size(item.nbytes):>12}"
                for item in self.items
                if item.tier == tier and item.nbytes
            ]
        lines.append("  activations and temporary memory of kernels come on top of the GPU figure")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that may be used per tier; what the user allowed, or what is there."""

    gpu: int
    ram: int
    pinned: int | None = None


def make_plan(
    *,
    layouts: Sequence[UnitLayout],
    resident: Sequence[ParamSpec],
    slots: int,
    training: bool,
    overlapped: bool,
    fp32_sums: bool,
    staging_buffers: int,
    on_gpu: bool,
    moments: MomentFormat = FP32_MOMENTS,
    notes: Sequence[str] = (),
) -> Plan:
    """Bytes of every kind of state.

    Args:
        layouts: one per unit.
        resident: parameters that stay on the device.
        slots: number of slots.
        training: whether optimizer state and gradients are needed.
        overlapped: updates overlap backward, so gradients only pass through staging buffers.
        fp32_sums: gradients are summed over micro-batches in fp32.
        staging_buffers: number of staging buffers for gradients.
        on_gpu: whether the device is a GPU (and host buffers that it reads are pinned).
        moments: how the optimizer's moments are stored.
        notes: sentences to show.

    Returns:
        The plan. Sizes are of payload and alignment; page rounding adds at most 4 KiB per buffer.
    """
    split_resident = sum(spec.numel for spec in resident if spec.split)
    trained_resident = sum(spec.numel for spec in resident if spec.trainable)
    largest = max((layout.weight_bytes for layout in layouts), default=0)
    largest_grad = max((layout.grad_bytes for layout in layouts), default=0)
    resident_weights = sum(spec.numel * spec.dtype.itemsize for spec in resident)
    items = [
        Item("GPU", "slots", slots * largest),
        Item("GPU", "resident weights", resident_weights),
        Item("GPU", "resident master residuals", 2 * split_resident),
    ]
    moment_bytes = _moment_bytes(layouts, resident, moments)
    if training:
        grad_size = 4 * trained_resident if fp32_sums else None
        if grad_size is None:
            grad_size = sum(spec.numel * spec.dtype.itemsize for spec in resident if spec.trainable)
        items += [
            Item("GPU", "resident moments", moment_bytes["GPU"]),
            Item("GPU", "resident gradients", grad_size),
            Item("GPU", "gradients on their way", 3 * largest_grad),
        ]
    items += [
        Item("RAM", "weights", sum(layout.weight_bytes for layout in layouts), pinned=on_gpu),
        Item("RAM", "master residuals", sum(2 * layout.lo_numel for layout in layouts)),
    ]
    if training:
        state = sum(layout.state_numel for layout in layouts)
        items.append(Item("RAM", "moments", moment_bytes["RAM"]))
        if not overlapped:
            nbytes = 4 * state if fp32_sums else sum(layout.grad_bytes for layout in layouts)
            items.append(Item("RAM", "gradients", nbytes, pinned=on_gpu and not fp32_sums))
        items.append(Item("RAM", "gradient staging", staging_buffers * largest_grad, pinned=on_gpu))
    plan = Plan(
        items=tuple(items),
        update="none" if not training else "overlapped" if overlapped else "deferred",
        moments=moments.name if training else "none",
        units=len(layouts),
        slots=slots,
        host_params=sum(layout.numel for layout in layouts),
        resident_params=sum(spec.numel for spec in resident),
        notes=tuple(notes),
        device="GPU" if on_gpu else "CPU",
    )
    if not training or moments is EIGHT_BIT_MOMENTS:
        return plan
    smaller = _moment_bytes(layouts, resident, EIGHT_BIT_MOMENTS)
    gpu, ram = (plan.tier_bytes(tier) - moment_bytes[tier] + smaller[tier] for tier in ("GPU", "RAM"))
    return replace(plan, alternatives=(Alternative("optimizer_states='8bit'", gpu, ram),))


def _moment_bytes(
    layouts: Sequence[UnitLayout], resident: Sequence[ParamSpec], moments: MomentFormat
) -> dict[str, int]:
    """Bytes of moments by tier."""
    return {
        "GPU": sum(moments.nbytes(spec.numel) for spec in resident if spec.trainable),
        "RAM": sum(moments.nbytes(layout.state_numel) for layout in layouts),
    }


def check_budgets(plan: Plan, budgets: Budgets) -> None:
    """Refuse a plan that does not fit.

    Raises:
        PlanError: with the numbers of each tier and the cheapest remedy.
    """
    on_gpu = plan.device == "GPU"
    needs = {"GPU": plan.tier_bytes("GPU"), "RAM": plan.tier_bytes("RAM")}
    if not on_gpu:  # RAM stands in for the GPU, so both tiers come out of the RAM there is
        needs["RAM"] += needs["GPU"]
    for tier, budget, remedy in (
        (
            "GPU",
            budgets.gpu,
            "Raise gpu_memory or free some, or use a model with smaller layers or a smaller vocabulary.",
        ),
        ("RAM", budgets.ram, "Raise cpu_memory or free some, freeze some layers, or use a smaller model."),
    ):
        if needs[tier] > budget:
            parts = ", ".join(
                f"{item.what} {_size(item.nbytes)}"
                for item in plan.items
                if item.tier == tier and item.nbytes
            )
            if tier == "RAM" and not on_gpu:
                parts += f", stand-in for the GPU {_size(plan.tier_bytes('GPU'))}"
            raise PlanError(
                f"The plan needs {_size(needs[tier])} of {tier} ({parts}); {_size(budget)} may be used. {remedy}"
                + _alternatives_hint(plan, tier, needs[tier], budget)
                + _deferred_hint(plan, tier)
            )


def _alternatives_hint(plan: Plan, tier: str, needed: int, budget: int) -> str:
    hint = ""
    for other in plan.alternatives:
        needs = other.gpu_bytes if tier == "GPU" else other.ram_bytes
        if tier == "RAM" and plan.device == "CPU":
            needs += other.gpu_bytes
        if needs <= budget:
            hint += f" With {other.setting} it needs {_size(needs)} of {tier}, which fits."
        elif needs < needed:
            hint += f" With {other.setting} it needs {_size(needs)} of {tier}."
    return hint


def _deferred_hint(plan: Plan, tier: str) -> str:
    grads = next((item.nbytes for item in plan.items if item.what == "gradients"), 0)
    if tier == "RAM" and plan.update == "deferred" and grads:
        return f" Training with max_grad_norm=0 and no accumulation lets updates overlap, which saves {_size(grads)}."
    return ""


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.2f} MiB"
