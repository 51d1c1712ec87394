"""Workload: what is planned for, what may be used, and what a plan decides. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..memory.layout import (
    FP32_MOMENTS,
    MomentFormat,
    ParamSpec,
    UnitLayout,
)
from .profile import ModelProfile

# One slot in use, the rest arriving: bursts of late copies are absorbed by the one beyond the minimum.
DEFAULT_SLOTS = 3
MIN_SLOTS = 2
_MAX_OVERLAP_STAGING = 5
_SUM_STAGING = 3
_DISK_STAGING = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One model's training.

    Attributes:
        layouts: one per unit in forward order, each as if it streamed.
        outside: parameters that no unit owns: embedding, final norm, head.
        profile: activations and operations of one micro-batch; None where nothing is known of batches.
        training: whether optimizer state and gradients are needed.
        overlapped: updates overlap backward, so streamed gradients only pass through staging buffers.
        micro_batches: backwards that make a step; with more than one gradients are summed in fp32.
        moments: how the optimizer's moments are stored.
        on_gpu: whether the device is a GPU (and host buffers that it reads are pinned); otherwise RAM stands in.
        last_gradients: names of outside parameters whose gradient comes after the last unit's backward: an input
            embedding that is not tied to the head. The gradients of all others come before the units' backward.
        mapped: names of parameters whose weights are pages of a file until they are moved, and so take no RAM.
        remade: names of parameters that are saved as other tensors, which are made of them (fused experts, one by one).
    """

    layouts: tuple[UnitLayout, ...]
    outside: tuple[ParamSpec, ...]
    profile: ModelProfile | None = None
    training: bool = True
    overlapped: bool = False
    micro_batches: int = 1
    moments: MomentFormat = FP32_MOMENTS
    on_gpu: bool = True
    last_gradients: frozenset[str] = frozenset()
    mapped: frozenset[str] = frozenset()
    remade: frozenset[str] = frozenset()

    @property
    def fp32_sums(self) -> bool:
        """Whether gradients are summed over micro-batches in fp32."""
        return self.micro_batches > 1

    @property
    def update(self) -> str:
        """When units are updated: "deferred", "overlapped", or "none" (no optimizer)."""
        return "none" if not self.training else "overlapped" if self.overlapped else "deferred"

    def staging_buffers(self, streamed: int, *, to_disk: bool = False) -> int:
        """Host buffers that the gradients of this many streamed units pass through.

        Args:
            streamed: number of units.
            to_disk: whether gradients of some of them wait on disk.
        """
        if not self.training or not streamed:
            return 0
        if self.overlapped:  # enough for the worker to stay busy while the next gradients land
            return min(_MAX_OVERLAP_STAGING, max(2, streamed // 4))
        if self.fp32_sums:
            return _SUM_STAGING
        return _DISK_STAGING if to_disk else 0


@dataclass(frozen=True, slots=True)
class Decisions:
    """What a plan decides; the engine does what this says.

    Attributes:
        resident: indices of the units whose weights and optimizer state stay on the GPU.
        activations: for each unit "keep", "recompute" or "offload" (recompute, with its inputs in RAM or on disk
            meanwhile).
        slots: GPU buffers that the other units take turns in; at least 2, of no size where no unit streams.
        staging_buffers: host buffers that gradients pass through.
        outside_state: "GPU" or "RAM": where the optimizer state of parameters outside of units is.
        on_disk: indices of the streamed units whose master residuals and moments are on disk between updates; their
            weights and gradients stay in RAM, but for those of `weights_on_disk`.
        weights_on_disk: those among them of which all that waits is on disk as well: weights, gradients for clipping,
            inputs that are offloaded.
        disk_buffers: host buffers, each as large as the largest such state, that it passes through.
    """

    resident: tuple[int, ...]
    activations: tuple[str, ...]
    slots: int
    staging_buffers: int
    outside_state: str = "GPU"
    on_disk: tuple[int, ...] = ()
    disk_buffers: int = 0
    weights_on_disk: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        workload: Workload,
        *,
        resident: int = 0,
        kept: int = 0,
        rest: str = "recompute",
        slots: int = DEFAULT_SLOTS,
        outside_state: str = "GPU",
    ) -> Decisions:
        """The first `resident` units stay on the GPU, the last `kept` ones keep their activations.

        Resident units come first so that the streamed ones have the time of their forward for the update; kept
        activations come last because backward frees them first, before gradients of resident units need room.
        """
        units = len(workload.layouts)
        return cls(
            resident=tuple(range(resident)),
            activations=(rest,) * (units - kept) + ("keep",) * kept,
            slots=min(slots, max(MIN_SLOTS, units - resident)),
            staging_buffers=workload.staging_buffers(units - resident),
            outside_state=outside_state,
        )

    @classmethod
    def streamed(cls, workload: Workload, *, activations: str = "recompute") -> Decisions:
        """Every unit streams and has its activations treated alike."""
        return cls.of(workload, rest=activations)

    def with_weights_on_disk(self, workload: Workload, units: tuple[int, ...]) -> Decisions:
        """The same with weights, and gradients that wait, of these units on disk."""
        streamed = len(workload.layouts) - len(self.resident)
        staging = workload.staging_buffers(streamed, to_disk=bool(units))
        return replace(self, weights_on_disk=units, staging_buffers=staging)

    @property
    def kept(self) -> int:
        """Number of units whose activations are kept."""
        return self.activations.count("keep")

    @property
    def offloaded(self) -> int:
        """Number of units whose inputs go to RAM."""
        return self.activations.count("offload")


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that may be used per tier; what the user allowed, or what is there. `disk` is None if none was named."""

    gpu: int
    ram: int
    pinned: int | None = None
    disk: int | None = None
