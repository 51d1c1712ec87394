"""What of a model's units the plan puts on disk: a file for each such unit, and buffers that its parts pass through.

Residuals and moments of these units are there, of some also weights, gradients that wait for their update, and an input
that waits for backward. How files and buffers are shared is the text of `memory/disk/desks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...errors import PlanError
from ...memory.buffers import MappedFile, PinBudget
from ...memory.disk.desks import DiskState, Loan
from ...memory.disk.inputs import DiskInputs, DiskPlace
from ...memory.disk.store import DiskStore
from ...memory.layout import (
    DISK_ALIGN_BYTES,
    DiskLayout,
    Segment,
    lay_out_on_disk,
)
from ...memory.unit_memory import UnitMemory
from ...metrics import Metrics
from ...planner.workload import Decisions
from ..model.blueprint import Blueprint
from .unit import Unit


class UnitsOnDisk:
    """The state of units that have a file.

    Args:
        blueprint: of the model.
        decisions: which units, and what of them.
        input_bytes: of a unit's input that the plan counts on.
        directories: where files are made.
        pins: asked before buffers that the device copies from or to are pinned.
        metrics: receives what is read and written.
        delay_s: seconds to sleep before a read or write, by label; for tests.
        on_failure: called with the error, in some thread, when what is on disk can no longer be trusted.

    Attributes:
        state: files and the order of their reads and writes.
        layouts: what is where in a unit's file, by unit.
        updates: buffers that updates read state into.

    Raises:
        PlanError: the decisions contradict each other.
        DiskError: a file cannot be made.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        decisions: Decisions,
        *,
        input_bytes: Callable[[int], int | None],
        directories: Sequence[str | Path],
        pins: PinBudget,
        metrics: Metrics,
        delay_s: Callable[[str], float] | None,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        _check(blueprint, decisions)
        self._moments = blueprint.moments
        store = DiskStore(directories, metrics=metrics, delay_s=delay_s)
        self.layouts: dict[int, DiskLayout] = {
            unit: lay_out_on_disk(
                blueprint.layouts[unit],
                blueprint.moments,
                weights=unit in decisions.weights_on_disk,
                **_waiting(blueprint, decisions, unit, input_bytes(unit)),
            )
            for unit in decisions.on_disk
        }
        self._mapped = frozenset(decisions.weights_on_disk)
        sizes = {unit: places.file_bytes for unit, places in self.layouts.items()}
        self.state = DiskState(store, sizes, self._mapped, on_failure)
        try:
            largest = max(places.masters_and_gradients[1] for places in self.layouts.values())
            self.updates = self.state.open_desk("updates", decisions.disk_buffers, largest)
            if self._mapped:
                nbytes = max(places.weight_bytes for places in self.layouts.values())
                count = decisions.slots
                pin = pins.take(count * nbytes)
                self._fetches = self.state.open_desk("fetches", count, nbytes, pin=pin)
            spans = {unit: places.input for unit, places in self.layouts.items() if places.input_bytes}
            self._inputs = DiskInputs(self.state, spans, pins.take) if spans else None
        except BaseException:
            self.state.close()
            raise

    def __contains__(self, unit: int) -> bool:
        """Whether the unit has a file; one that has no state on disk, being frozen, has none."""
        return unit in self.state

    def borrow_state(self, unit: int) -> Loan | None:
        """Ask for residuals and moments; None if the unit has no file."""
        return self.updates.borrow(unit, self.layouts[unit].state) if unit in self else None

    def borrow_residual(self, unit: Unit, segment: Segment) -> tuple[Loan, int]:
        """Ask for one parameter's residual, as the unit's pending update leaves it.

        Returns:
            The loan, and at which byte of its buffer the residual starts.
        """
        first = self.layouts[unit.index].lo_offset + segment.lo_offset * torch.int16.itemsize
        start = first // DISK_ALIGN_BYTES * DISK_ALIGN_BYTES
        end = first + segment.spec.numel * torch.int16.itemsize
        nbytes = -(-(end - start) // DISK_ALIGN_BYTES) * DISK_ALIGN_BYTES
        return self.updates.borrow(unit.index, (start, nbytes), after=unit.pending_update), first - start

    def attach(self, memory: UnitMemory, loan: Loan) -> None:
        """Make what was borrowed the residuals and moments of `memory`, of the same unit."""
        memory.attach(loan.buffer, self.layouts[loan.unit], self._moments)

    def mapped(self, unit: int) -> tuple[MappedFile, DiskLayout] | None:
        """The file as memory, of a unit whose weights are there."""
        return (self.state.mapped(unit), self.layouts[unit]) if unit in self._mapped else None

    def weights_of(self, unit: Unit) -> Callable[[], Loan]:
        """Asks for the weights of such a unit, as its pending update leaves them."""
        weights, desk = self.layouts[unit.index].weights, self._fetches
        return lambda: desk.borrow(unit.index, weights, after=unit.pending_update)

    def place_of_input(self, unit: int) -> DiskPlace | None:
        """Where the unit's input waits for backward; None if that is not on disk."""
        return self._inputs.place(unit) if self._inputs is not None else None

    @property
    def host_bytes(self) -> int:
        """Bytes of the host buffers."""
        return self.state.host_bytes + (self._inputs.host_bytes if self._inputs is not None else 0)


def _check(blueprint: Blueprint, decisions: Decisions) -> None:
    streamed = set(range(len(blueprint.layouts))) - set(decisions.resident)
    if decisions.disk_buffers < 1 or not streamed.issuperset(decisions.on_disk):
        raise PlanError(
            f"state of units {decisions.on_disk} on disk with {decisions.disk_buffers} buffers: there must be a "
            f"buffer, and only units that stream ({sorted(streamed)}) may be there"
        )
    if not set(decisions.on_disk).issuperset(decisions.weights_on_disk):
        raise PlanError(
            f"weights of units {decisions.weights_on_disk} on disk, but state only of {decisions.on_disk}; "
            "state goes there first"
        )


def _waiting(
    blueprint: Blueprint, decisions: Decisions, unit: int, input_bytes: int | None
) -> dict[str, int]:
    """Bytes of gradients and of the input that are on disk while they wait, of a unit whose weights are there."""
    if unit not in decisions.weights_on_disk:
        return {}
    layout, waiting = blueprint.layouts[unit], {}
    if not blueprint.overlapped:
        waiting["grad_bytes"] = 4 * layout.state_numel if blueprint.micro_batches > 1 else layout.grad_bytes
    if decisions.activations[unit] == "offload":
        waiting["input_bytes"] = input_bytes or 0
    return waiting
