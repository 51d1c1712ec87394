"""On disk: the home of a streamed unit that has a file, and the buffers that all such units pass through.

Residuals and moments are in the file, of some units also weights, gradients that wait for their update, and an input
that waits for backward. How files and buffers are shared is the text of `memory/disk/desks.py`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ...errors import PlanError, StateError
from ...memory.buffers import Buffer, BufferView, HostBuffer, MappedFile, Pin
from ...memory.disk.desks import Desk, DiskState, Loan
from ...memory.disk.inputs import DiskInputs
from ...memory.disk.store import DiskStore
from ...memory.layout import DISK_ALIGN_BYTES, DiskLayout, MomentFormat, lay_out_on_disk
from ...memory.lease import Kept, Landing, Lease, released_on_error
from ...memory.offload import Place
from ...memory.runtime import Runtime
from ...memory.staging import StagingBuffers
from ...memory.transfer import Handle
from ...memory.unit_memory import UnitMemory
from ...optim.rule import UpdateRule
from ...optim.state import ParamState, UpdateRun
from ...planner.workload import Decisions
from ..model.blueprint import Blueprint
from .home import Reader, Step
from .streamed import Landed, StreamedUnit


class Disk:
    """Files of units, and desks and buffers that they share.

    Args:
        blueprint: of the model.
        decisions: which units, and what of them.
        input_bytes: of a unit's input that the plan counts on.
        directories: where files are made.
        runtime: its pins are asked before buffers that the device copies from or to are pinned, its metrics receive
            what is read and written, and its failure when what is on disk can no longer be trusted.

    Attributes:
        state: files and the order of their reads and writes.
        layouts: what is where in a unit's file, by unit.
        rule: whose state the files have room for.
        updates: buffers that updates read state into.
        fetches: buffers that weights are read into; None if all weights are in RAM.
        inputs: those that wait in files; None if there are none.

    Raises:
        PlanError: the decisions contradict each other.
        DiskError: a file cannot be made.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        decisions: Decisions,
        input_bytes: Callable[[int], int | None],
        directories: Sequence[str | Path],
        runtime: Runtime,
    ) -> None:
        _check(blueprint, decisions)
        self._is_lent = False
        self.rule = blueprint.rule
        store = DiskStore(directories, metrics=runtime.metrics, delay_s=runtime.delays.get("disk"))
        self.layouts: dict[int, DiskLayout] = {
            unit: lay_out_on_disk(
                blueprint.layouts[unit],
                self.rule.format,
                weights=unit in decisions.weights_on_disk,
                **_waiting(blueprint, decisions, unit, input_bytes(unit)),
            )
            for unit in decisions.on_disk
        }
        mapped = frozenset(decisions.weights_on_disk)
        sizes = {unit: places.file_bytes for unit, places in self.layouts.items()}
        self.state = DiskState(store, sizes, mapped, runtime.failure.note)
        try:
            largest = max(places.masters_and_gradients[1] for places in self.layouts.values())
            self.updates = self.state.open_desk("updates", decisions.disk_buffers, largest)
            self.fetches: Desk | None = None
            if mapped:
                nbytes = max(places.weight_bytes for places in self.layouts.values())
                pin = runtime.pins.take(decisions.slots * nbytes)
                self.fetches = self.state.open_desk("fetches", decisions.slots, nbytes, pin=pin)
            spans = {unit: places.input for unit, places in self.layouts.items() if places.input_bytes}
            self.inputs = DiskInputs(self.state, spans, runtime.pins.take) if spans else None
        except BaseException:
            self.state.close()
            raise

    def __contains__(self, unit: int) -> bool:
        """Whether the unit has a file; one that has no state on disk, being frozen, has none."""
        return unit in self.state

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """For a block that borrows one of the update's buffers and does other things before it gives that back.

        Raises:
            StateError: inside of another such block: with one buffer the second would wait for the first.
        """
        if self._is_lent:
            raise StateError(
                "state_in_memory inside of state_in_memory; end the first block before the second"
            )
        self._is_lent = True
        try:
            yield
        finally:
            self._is_lent = False

    @property
    def host_bytes(self) -> int:
        """Bytes of the host buffers."""
        return self.state.host_bytes + (self.inputs.host_bytes if self.inputs is not None else 0)


class OnDisk(StreamedUnit):
    """State of one unit that has a file.

    Args:
        unit: its number.
        blueprint: of the model.
        disk: its file, and what it passes through.
        input_bytes: of an input that waits for backward in the memory of gradients, if that is RAM.
        runtime: moves and updates the state.
    """

    def __init__(
        self, unit: int, blueprint: Blueprint, disk: Disk, input_bytes: int, runtime: Runtime
    ) -> None:
        layout = blueprint.layouts[unit]
        self._unit, self._disk, self._places = unit, disk, disk.layouts[unit]
        self._least_bytes = input_bytes
        self._input = disk.inputs.place(unit) if disk.inputs is not None else None
        # The file as memory, where weights are there too.
        self._file: MappedFile | None = disk.state.mapped(unit) if self._places.weight_bytes else None
        self._gradients_are_in_file = False
        self._pin: Pin = False
        weights: Buffer
        if self._file is None:
            self._pin = runtime.pins.take(layout.weight_bytes + layout.grad_bytes)
            weights = HostBuffer(layout.weight_bytes, pin=self._pin)
        else:
            weights = BufferView(self._file, self._places.weights[0])
        super().__init__(blueprint.units[unit].name, UnitMemory(layout, weights), runtime)
        self.disk_bytes = disk.state.files[unit].nbytes
        # Whoever has weights there has gradients there too, for which the file has been made large enough, or not.
        self.gradients_can_wait = self._file is None or self._places.grad_bytes > 0

    def source(self, after: Handle | None) -> Lease[Buffer] | None:
        """See `Home`."""
        if self._file is None:
            return super().source(after)
        assert self._disk.fetches is not None
        return self._disk.fetches.borrow(self._unit, self._places.weights, after=after)

    def place_for(self, tensor: torch.Tensor) -> Place | None:
        """See `Home`."""
        if self._input is None:
            return super().place_for(tensor)
        return self._input if self._input.nbytes >= tensor.nbytes else None

    def settle(self) -> None:
        """See `Home`: an update's buffer may still be on its way to the file that weights are read from."""
        if self._file is not None:
            self._disk.state.written[self._unit].wait_host()

    # -- gradients ---------------------------------------------------------------------------------------------

    def _allocate_moments(self, rule: UpdateRule) -> None:
        assert rule == self._disk.rule, "the file has room for another rule's state; zeros are there already"

    def _gradient_buffer(self, nbytes: int, *, fp32: bool) -> Buffer:
        # Gradients that are there are about to be copied: to the same bytes, or to bytes that are not theirs.
        grows = self._gradients_are_in_file and nbytes != self.memory.layout.grad_bytes
        self._gradients_are_in_file = (
            self._file is not None and self._places.grad_bytes >= nbytes and not grows
        )
        if self._gradients_are_in_file and self._file is not None:
            return BufferView(self._file, self._places.gradients[0])
        # A sum that nobody expected is in RAM, whatever the file has room for.
        return HostBuffer(nbytes if fp32 else max(nbytes, self._least_bytes), pin=not fp32 and self._pin)

    @property
    def _wait_in_file(self) -> bool:
        """Whether gradients of one backward wait for their update in the file."""
        return self._file is not None and self._places.grad_bytes > 0

    def written_with(self, states: Sequence[ParamState]) -> Sequence[ParamState]:
        """See `StreamedUnit`: what goes to the file is written over all of the unit's gradients."""
        return self.states if self._wait_in_file else states

    def land(
        self,
        grads: Sequence[tuple[ParamState, torch.Tensor]],
        staging: StagingBuffers,
        *,
        clear: Callable[[], Sequence[Handle]],
    ) -> Landed:
        """See `StreamedUnit`: to the file by way of a staging buffer, if they wait there."""
        if not self._wait_in_file:
            return super().land(grads, staging, clear=clear)
        self._make_gradients(fp32=False)
        staged, state = staging.lease(), self._disk.state

        def write() -> None:
            with staged.read() as buffer:
                state.write(self._unit, buffer, self._places.gradients)

        with released_on_error(staged):
            left = self._collect(grads, staged)
            there = state.writes.submit(
                f"gradients of {self.name} to disk", write, after=(left,), dropped=staged.release
            )
        return Landed(left, there)

    # -- updates, and other uses of what is in the file --------------------------------------------------------

    def _update(self, landing: Landing, runs: Sequence[UpdateRun], step: Step, *, fp32: bool) -> Handle:
        places, waited = self._places, self._gradients_are_in_file
        # Gradients that wait in the file come with the rest.
        loan = self._disk.updates.borrow(
            self._unit, places.masters_and_gradients if waited else places.masters
        )

        def run() -> None:
            try:
                grads = Kept(BufferView(loan.buffer, places.gradients[0])) if waited else landing
                with self._attached(loan, changes=True):
                    self._updating(grads, runs, fp32)()
            finally:
                loan.write_back(places.masters[1])
                landing.release()

        def drop() -> None:
            loan.release()
            landing.release()

        return self._submit_update(run, step, (loan.ready, landing.ready), drop)

    @contextlib.contextmanager
    def _attached(self, loan: Loan, *, changes: bool) -> Iterator[None]:
        """The state is the tensors in what was borrowed while the block runs; `changes` will be written back."""
        self.memory.attach(loan.buffer, self._places, self._disk.rule.format)
        try:
            for state in self.states:
                state.attach(self.memory)
                if changes:
                    state.residual_is_stale = False
            yield
        finally:
            for state in self.states:
                state.detach()
            self.memory.detach()

    @contextlib.contextmanager
    def open(self, *, write: bool) -> Iterator[None]:
        """See `Home`."""
        with self._disk.opened():
            loan = self._borrow_state()
            with released_on_error(loan):  # also where Ctrl-C comes as it is given back
                try:
                    loan.ready.wait_host()
                    with self._attached(loan, changes=write):
                        yield
                finally:
                    if write:
                        loan.write_back(self._places.nbytes)
                    else:
                        loan.release()

    def _borrow_state(self) -> Loan:
        return self._disk.updates.borrow(self._unit, self._places.state)

    @contextlib.contextmanager
    def open_residual(self, state: ParamState, after: Handle | None) -> Iterator[None]:
        """See `Home`."""
        if state.residual is not None or not state.spec.split:
            yield
            return
        segment = state.segment
        first = self._places.lo_offset + segment.lo_offset * torch.int16.itemsize
        start = first // DISK_ALIGN_BYTES * DISK_ALIGN_BYTES
        end = first + segment.spec.numel * torch.int16.itemsize
        nbytes = -(-(end - start) // DISK_ALIGN_BYTES) * DISK_ALIGN_BYTES
        loan = self._disk.updates.borrow(self._unit, (start, nbytes), after=after)
        try:
            loan.ready.wait_host()
            residual = loan.buffer.tensor(torch.int16, first - start, segment.spec.numel)
            residual = residual.view(segment.spec.shape)
            state.residual = residual.zero_() if state.residual_is_stale else residual
            yield
        finally:
            state.residual = None
            loan.release()

    def reader(self) -> Reader:
        """See `Home`."""
        memory = copy.copy(self.memory)
        return _OnLoan(self._borrow_state(), memory, self._places, self._disk.rule.format, self.states)

    # -- giving it up ------------------------------------------------------------------------------------------

    def free_for_training(self) -> None:
        """See `Home`; what is in the file stays there."""
        super().free_for_training()
        self._gradients_are_in_file = False

    def free(self) -> None:
        """See `Home`."""
        super().free()
        self._file, self.disk_bytes = None, 0


class _OnLoan:
    """`Reader` of state that comes from the file, in tensors that nobody else has."""

    def __init__(
        self,
        loan: Loan,
        memory: UnitMemory,
        places: DiskLayout,
        moments: MomentFormat,
        states: Sequence[ParamState],
    ) -> None:
        self._loan = loan
        self._memory, self._places, self._moments = memory, places, moments
        # They belong to other weights, and count as zero.
        self._stale = {state.order for state in states if state.residual_is_stale}
        self._is_attached = False

    @property
    def ready(self) -> Handle:
        """See `Reader`."""
        return self._loan.ready

    def parts(self, state: ParamState) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """See `Reader`."""
        if not self._is_attached:
            self._is_attached = True
            self._memory.attach(self._loan.buffer, self._places, self._moments)
        residual = self._memory.residual(state.segment)
        if residual is not None and state.order in self._stale:
            residual.zero_()  # of a copy
        return residual, self._memory.moments(state.segment) if state.rule is not None else {}

    def release(self, *, after: Handle | None = None) -> None:
        """See `Reader`."""
        self._loan.release(after=after)


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
) -> Mapping[str, int]:
    """Bytes of gradients and of the input that are on disk while they wait, of a unit whose weights are there."""
    if unit not in decisions.weights_on_disk:
        return {}
    layout, waiting = blueprint.layouts[unit], {}
    if not blueprint.overlapped:
        waiting["grad_bytes"] = 4 * layout.state_numel if blueprint.micro_batches > 1 else layout.grad_bytes
    if decisions.activations[unit] == "offload":
        waiting["input_bytes"] = input_bytes or 0
    return waiting
