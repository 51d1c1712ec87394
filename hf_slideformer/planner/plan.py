"""The plan: what lives where, in bytes, checked against budgets before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from ..errors import PlanError
from ..memory.layout import EIGHT_BIT_MOMENTS, FP32_MOMENTS
from .memory import Item, MemoryModel, gpu_reserve_bytes
from .timeline import Prediction
from .workload import Budgets, Decisions, Workload

__all__ = [
    "Budgets",
    "Decisions",
    "Item",
    "Plan",
    "Workload",
    "check_budgets",
    "describe",
    "format_bytes",
]

GIB = 2**30

# What a plan's headline says of moments, by the name of their format; of others it says the name.
_SHOWN_MOMENTS = {"none": "", FP32_MOMENTS.name: "", EIGHT_BIT_MOMENTS.name: "; 8-bit moments"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the training state lives.

    Attributes:
        items: what each tier holds when it holds most in training; their sum is the predicted peak. Without a profile
            activations and temporary memory of kernels come on top on the GPU.
        update: "deferred", "overlapped", or "none" (no optimizer).
        moments: name of their format ("fp32", "8bit"), or "none" (no optimizer).
        units: number of streamed units.
        slots: number of GPU slots they take turns in.
        host_params: parameters in streamed units.
        resident_params: parameters that stay on the GPU.
        notes: differences from plain training that a user should know.
        device: "GPU", or "CPU" where RAM stands in for the GPU.
        decisions: what the engine is told.
        batch_size, seq_len: of the micro-batch that was planned for; None if nothing was known of it.
        peaks: peak bytes by phase ("load", "train", "save", "resume") and tier ("GPU", "RAM", "disk").
        peak_at: where in a step the GPU's peak is.
        budgets: bytes that may be used by tier, where they were given; "disk" only where there is one.
        reserve_bytes: how much of the GPU's budget is kept free for fragmentation.
        prediction: time of a step, where the machine was given.
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
    decisions: Decisions
    batch_size: int | None = None
    seq_len: int | None = None
    peaks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    peak_at: str = ""
    budgets: Mapping[str, int] = field(default_factory=dict)
    reserve_bytes: int = 0
    prediction: Prediction | None = None

    def tier_bytes(self, tier: str) -> int:
        """Bytes in one tier ("GPU", "RAM" or "disk")."""
        return sum(item.nbytes for item in self.items if item.tier == tier)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of RAM that are pinned."""
        return sum(item.nbytes for item in self.items if item.pinned)

    @property
    def left(self) -> dict[str, int]:
        """Bytes of each budget that the peak of training leaves; the GPU's reserve is part of them."""
        needs = _needs(self)
        return {tier: budget - needs[tier] for tier, budget in self.budgets.items()}

    def as_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self) | {"left": self.left}

    def __str__(self) -> str:
        lines = [self._headline()]
        for tier in ("GPU", "RAM", "disk") if self.decisions.on_disk else ("GPU", "RAM"):
            label = (
                f"{tier} (this machine's RAM stands in)" if tier == "GPU" and self.device == "CPU" else tier
            )
            left = f", {format_bytes(self.left[tier])} left" if tier in self.left else ""
            where = f" ({self.peak_at})" if tier == "GPU" and self.peak_at and self.batch_size else ""
            lines.append(f"  {label:<42} {format_bytes(self.tier_bytes(tier)):>12}{left}{where}")
            lines += [
                f"    {item.what + (' (pinned)' if item.pinned else ''):<40} {format_bytes(item.nbytes):>12}"
                for item in self.items
                if item.tier == tier and item.nbytes
            ]
        if self.batch_size is None:
            lines.append("  activations and temporary memory of kernels come on top of the GPU figure")
        if self.prediction is not None:
            lines.append(
                f"  predicted: {self.prediction.tokens_per_s:,.0f} tokens/s, {self.prediction.step_s:.2f} s a step, "
                f"bound by {self.prediction.bound_by}"
            )
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _headline(self) -> str:
        streamed = (
            f"{_units(self.units)} ({self.host_params / 1e6:,.1f} M parameters) "
            f"{'streams' if self.units == 1 else 'stream'} through {self.slots} slots"
            if self.units
            else "nothing streams"
        )
        stay = len(self.decisions.resident)
        staying = f"{_units(stay)} {'stays' if stay == 1 else 'stay'} on the GPU; " if stay else ""
        moments = _SHOWN_MOMENTS.get(self.moments, f" ({self.moments})")
        return (
            f"{streamed}; {staying}{self.resident_params / 1e6:,.1f} M parameters are resident; "
            f"{self._on_disk()}{self._activations()}updates: {self.update}{moments}"
        )

    def _on_disk(self) -> str:
        count = len(self.decisions.on_disk)
        whole = len(self.decisions.weights_on_disk)
        what = "weights and gradients" if self.update == "deferred" else "weights"
        weights = f", {what} of {_units(whole)} too" if whole else ""
        if count and not any(item.tier == "disk" and "residuals" in item.what for item in self.items):
            return f"{what} of {_units(whole)} on disk; "
        return f"optimizer state of {_units(count)} on disk{weights}; " if count else ""

    def _activations(self) -> str:
        if self.batch_size is None:
            return ""
        kept, offloaded = self.decisions.kept, self.decisions.offloaded
        on_disk = sum(
            self.decisions.activations[unit] == "offload" for unit in self.decisions.weights_on_disk
        )
        again = len(self.decisions.activations) - kept
        parts = [f"kept in {_units(kept)}"] if kept else []
        parts += [f"recomputed in {_units(again)}"] if again else []
        parts += [f"inputs of {_units(offloaded - on_disk)} in RAM"] if offloaded > on_disk else []
        parts += [f"inputs of {_units(on_disk)} on disk"] if on_disk else []
        return f"activations {', '.join(parts)}; " if parts else ""


def describe(
    workload: Workload,
    decisions: Decisions,
    *,
    budgets: Budgets | None = None,
    prediction: Prediction | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan that these decisions make.

    Args:
        workload: what is planned for.
        decisions: what lives where.
        budgets: bytes that may be used; what they leave is then part of the plan.
        prediction: what a step takes.
        notes: sentences to show.

    Returns:
        The plan. It may exceed the budgets: see `check_budgets`.
    """
    memory = MemoryModel(workload)
    where, gpu_items = memory.gpu_items(decisions)
    streamed = [layout for unit, layout in enumerate(workload.layouts) if unit not in set(decisions.resident)]
    in_ram = sum(layout.numel for layout in streamed)
    every = sum(layout.numel for layout in workload.layouts) + sum(spec.numel for spec in workload.outside)
    profile = workload.profile if workload.training else None
    plan = Plan(
        items=(*gpu_items, *memory.ram_items(decisions), *memory.disk_items(decisions)),
        update=workload.update,
        moments=workload.moments.name if workload.training else "none",
        units=len(streamed),
        slots=decisions.slots,
        host_params=in_ram,
        resident_params=every - in_ram,
        notes=(*notes, *(profile.notes if profile is not None else ())),
        device="GPU" if workload.on_gpu else "CPU",
        decisions=decisions,
        batch_size=profile.batch_size if profile is not None else None,
        seq_len=profile.seq_len if profile is not None else None,
        peaks=memory.peaks(decisions),
        peak_at=where,
        prediction=prediction,
    )
    if budgets is not None:
        reserve = gpu_reserve_bytes(workload, budgets.gpu)
        disk = {} if budgets.disk is None else {"disk": budgets.disk}
        plan = replace(plan, budgets={"GPU": budgets.gpu, "RAM": budgets.ram} | disk, reserve_bytes=reserve)
        plan = replace(plan, notes=(*plan.notes, *_phase_notes(plan)))
    return plan


def _phase_notes(plan: Plan) -> list[str]:
    """What will not fit outside of training, where the run does not come to a stop at its start."""
    notes = []
    for phase, reason in (
        (
            "save",
            "beside the training state it holds pieces of tensors, and a unit's weights where they are saved as other "
            "tensors",
        ),
        (
            "resume",
            "weights are read in batches before they are copied",
        ),
    ):
        peak = plan.peaks.get(phase)
        if peak is not None:
            needed = peak["RAM"] + (peak["GPU"] if plan.device == "CPU" else 0)
            if needed > plan.budgets["RAM"]:
                notes.append(
                    f"to {phase} needs {format_bytes(needed)} of RAM for a while, "
                    f"{format_bytes(needed - plan.budgets['RAM'])} more than may be used: {reason}"
                )
    return notes


def _needs(plan: Plan) -> dict[str, int]:
    """Bytes by tier; where RAM stands in for the GPU both tiers come out of the RAM there is."""
    needs = {tier: plan.tier_bytes(tier) for tier in ("GPU", "RAM", "disk")}
    if plan.device == "CPU":
        needs["RAM"] += needs["GPU"]
    return needs


def check_budgets(plan: Plan, budgets: Budgets, hints: Sequence[str] = ()) -> None:
    """Refuse a plan that does not fit.

    Args:
        plan: to be checked.
        budgets: bytes that may be used.
        hints: sentences with further remedies.

    Raises:
        PlanError: with the numbers of the tier and the remedies.
    """
    needs = _needs(plan)
    for tier, budget, remedy in (
        (
            "GPU",
            budgets.gpu - plan.reserve_bytes,
            "Raise gpu_memory or free some, or use a model with smaller layers or a smaller vocabulary.",
        ),
        ("RAM", budgets.ram, "Raise cpu_memory or free some, freeze some layers, or use a smaller model."),
        (
            "disk",
            budgets.disk or 0,
            "Set nvme_dir to a directory on a disk with as much free."
            if budgets.disk is None
            else "Raise nvme_memory, free some, add a directory on another disk to nvme_dir, or raise cpu_memory.",
        ),
    ):
        if needs[tier] > budget:
            parts = ", ".join(
                f"{item.what} {format_bytes(item.nbytes)}"
                for item in plan.items
                if item.tier == tier and item.nbytes
            )
            if tier == "RAM" and plan.device == "CPU":
                parts += f", stand-in for the GPU {format_bytes(plan.tier_bytes('GPU'))}"
            free = ""
            if tier == "GPU" and plan.reserve_bytes:
                free = f", and {format_bytes(plan.reserve_bytes)} more stay free for fragmentation"
            need = f"The plan needs {format_bytes(needs[tier])} of {tier} ({parts})"
            raise PlanError(" ".join((f"{need}; {format_bytes(budget)} may be used{free}.", remedy, *hints)))


def _units(count: int) -> str:
    return f"{count} unit" if count == 1 else f"{count} units"


def format_bytes(nbytes: int) -> str:
    """A size as it is shown: in GiB, or in MiB where that says more."""
    return f"{nbytes / GIB:.2f} GiB" if abs(nbytes) >= GIB // 10 else f"{nbytes / 2**20:.2f} MiB"
