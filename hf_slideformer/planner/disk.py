"""What a disk would have to hold where optimizer state there is not enough, because weights and gradients exceed RAM.

Weights and gradients on disk are not available yet; `solve` plans with optimizer state there.

Whole units go to disk, the last ones of those that stream. Each byte of a unit's state is read at least once in a
step and written at least once: weights, master residual and moments by the update, gradients by backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..memory.layout import UnitLayout
from .memory import MemoryModel, missing_bytes
from .solve import FEWEST_DISK_BUFFERS, frugal_decisions
from .workload import Budgets, Decisions, Workload

# Units' state in RAM while it moves: one arrives, one is in use, one leaves (an assumption).
_MOVING_UNITS = 3


@dataclass(frozen=True, slots=True)
class DiskShare:
    """A split over GPU, RAM and disk.

    Attributes:
        gpu_bytes: of the GPU, at the peak of training.
        ram_bytes: of RAM, at the peak of training.
        disk_bytes: of state on disk.
        resident: number of units that stay on the GPU.
        in_ram: number of units whose state is in RAM.
        on_disk: number of units whose state is on disk.
    """

    gpu_bytes: int
    ram_bytes: int
    disk_bytes: int
    resident: int
    in_ram: int
    on_disk: int

    def seconds(self, read: float, write: float) -> tuple[float, float]:
        """Seconds that a step would at least read and write, at these bytes a second."""
        return self.disk_bytes / read, self.disk_bytes / write


def share_with_disk(
    workload: Workload, budgets: Budgets, *, placement: str = "auto", activations: str = "auto"
) -> DiskShare | None:
    """The split that leaves the least to the disk.

    Args:
        workload: what is planned for.
        budgets: bytes of GPU and RAM that may be used.
        placement: "auto", or "stream": no unit stays on the GPU.
        activations: "auto", or one of "keep", "recompute" and "offload" for all units.

    Returns:
        The split; None where the GPU is too small, or RAM for what has to be in it, so that no disk would help.
    """
    memory = MemoryModel(workload)
    shares = (
        _share(workload, budgets, memory, decisions)
        for decisions in frugal_decisions(workload, placement=placement, activations=activations)
        if not missing_bytes(workload, budgets, memory.gpu_peak(decisions), 0)["GPU"]
    )
    return min(
        (share for share in shares if share is not None),
        key=lambda share: (share.disk_bytes, share.ram_bytes),
        default=None,
    )


def optimizer_state_is_enough(
    workload: Workload, budgets: Budgets, *, placement: str = "auto", activations: str = "auto"
) -> bool:
    """Whether GPU and RAM suffice with the optimizer state of all streamed units on a disk that is large enough.

    Args:
        workload: what is planned for.
        budgets: bytes of GPU and RAM that may be used.
        placement: as for `share_with_disk`.
        activations: as for `share_with_disk`.
    """
    memory = MemoryModel(workload)
    for decisions in frugal_decisions(workload, placement=placement, activations=activations):
        streamed = tuple(range(len(decisions.resident), len(workload.layouts)))
        decisions = replace(decisions, on_disk=streamed, disk_buffers=min(FEWEST_DISK_BUFFERS, len(streamed)))
        train = memory.gpu_peak(decisions), memory.ram_train(decisions)
        load = memory.gpu_load(decisions), memory.ram_load(decisions)
        if not any(any(missing_bytes(workload, budgets, *peaks).values()) for peaks in (train, load)):
            return True
    return False


def _share(
    workload: Workload, budgets: Budgets, memory: MemoryModel, decisions: Decisions
) -> DiskShare | None:
    gpu, ram = memory.gpu_peak(decisions), memory.ram_train(decisions)
    stand_in = 0 if workload.on_gpu else gpu
    streamed = range(len(decisions.resident), len(workload.layouts))
    sizes = [state_bytes(workload, workload.layouts[unit]) for unit in streamed]
    inputs = [_input_among_gradients(workload, decisions, unit) for unit in streamed]
    on_disk = disk = 0
    if ram + stand_in > budgets.ram:
        ram += _MOVING_UNITS * max(sizes, default=0)
        while ram + stand_in > budgets.ram and on_disk < len(sizes):
            on_disk += 1
            disk += sizes[-on_disk]
            ram -= sizes[-on_disk] - inputs[-on_disk]
        if ram + stand_in > budgets.ram:
            return None
    return DiskShare(gpu, ram, disk, len(decisions.resident), len(sizes) - on_disk, on_disk)


def _input_among_gradients(workload: Workload, decisions: Decisions, unit: int) -> int:
    """Bytes of a unit's offloaded input that wait where its gradient will be; they stay in RAM without that place."""
    waits = decisions.activations[unit] == "offload" and not workload.overlapped and not workload.fp32_sums
    if not waits or workload.profile is None:
        return 0
    return min(workload.profile.units[unit].boundary_bytes, workload.layouts[unit].grad_bytes)


def state_bytes(workload: Workload, layout: UnitLayout) -> int:
    """Bytes of a streamed unit's state: weights, master residual, moments and, where they wait, gradients."""
    nbytes = layout.weight_bytes + 2 * layout.lo_numel
    if workload.training:
        nbytes += workload.moments.nbytes(layout.state_numel)
        if not workload.overlapped:
            nbytes += 4 * layout.state_numel if workload.fp32_sums else layout.grad_bytes
    return nbytes
