"""What homes of units that stream have in common: tensors over host buffers, and the update worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...memory.buffers import Buffer, HostBuffer
from ...memory.lease import Kept, Landing, Lease
from ...memory.offload import HostPlace, Place
from ...memory.runtime import Runtime
from ...memory.staging import StagingBuffers, StagingLease
from ...memory.transfer import Handle
from ...memory.unit_memory import UnitMemory
from ...optim.rule import UpdateRule
from ...optim.state import ParamState, UpdateRun, set_gradient, update_unit
from .home import Home, Step


@dataclass(frozen=True, slots=True)
class Landed:
    """Gradients on their way home: `left` when the device's memory has been read, `there` when they are in place."""

    left: Handle
    there: Handle


class StreamedUnit(Home):
    """Base of the homes of units that stream: their gradients come from the unit's backward, not from autograd's sums.

    Args:
        name: of the unit.
        memory: its tensors.
        runtime: moves and updates them.
    """

    def __init__(self, name: str, memory: UnitMemory, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.name = name
        self.memory = memory

    @property
    def host_bytes(self) -> int:
        """See `Home`."""
        return self.memory.nbytes

    # -- what homes differ in ----------------------------------------------------------------------------------

    def _allocate_moments(self, rule: UpdateRule) -> None:
        """Make room for moments of zero."""
        raise NotImplementedError

    def _gradient_buffer(self, nbytes: int, *, fp32: bool) -> Buffer:
        """Memory for the unit's own gradients: what the device sends, or fp32 sums that the CPU makes."""
        raise NotImplementedError

    def source(self, after: Handle | None) -> Lease[Buffer] | None:
        """See `Home`."""
        return Kept(self.memory.weights, after)

    def place_for(self, tensor: torch.Tensor) -> Place | None:
        """See `Home`: in the memory of gradients, until the unit's backward, unless some are pending."""
        buffer = None if self.sums_are_fp32 else self.memory.grads
        if buffer is None or buffer.nbytes < tensor.nbytes:
            return None
        return None if any(state.param.grad is not None for state in self.states) else HostPlace(Kept(buffer))

    def written_with(self, states: Sequence[ParamState]) -> Sequence[ParamState]:
        """Whose gradients `land` writes over, where it brings those of `states`."""
        return states

    def _update(self, landing: Landing, runs: Sequence[UpdateRun], step: Step, *, fp32: bool) -> Handle:
        """Have the worker update from `landing`, once that is full and `step.after` is done."""
        return self._submit_update(
            self._updating(landing, runs, fp32), step, (landing.ready,), landing.release
        )

    # -- gradients ---------------------------------------------------------------------------------------------

    def allocate(self, rule: UpdateRule, *, overlapped: bool, fp32_sums: bool) -> None:
        """See `Home`."""
        self._allocate_moments(rule)
        if not overlapped:
            self._make_gradients(fp32=fp32_sums)
        for state in self.states:
            if state.spec.trainable:
                state.rule = rule
                state.moments = self.memory.moments(state.segment)

    def _make_gradients(self, *, fp32: bool) -> None:
        """Have the unit's own gradients of this kind (once): in the weights' dtypes, or fp32 sums."""
        layout, memory = self.memory.layout, self.memory
        if layout.state_numel and (memory.grads is None or fp32 != memory.grads_fp32):
            nbytes = 4 * layout.state_numel if fp32 else layout.grad_bytes
            memory.use_gradients(self._gradient_buffer(nbytes, fp32=fp32), fp32=fp32)

    def land(
        self,
        grads: Sequence[tuple[ParamState, torch.Tensor]],
        staging: StagingBuffers,
        *,
        clear: Callable[[], Sequence[Handle]],
    ) -> Landed:
        """Bring a unit's gradients to where the update reads them, where none are waiting there.

        Args:
            grads: contiguous, on the device, of the unit's parameters.
            staging: buffers that they may pass through.
            clear: starts to move away what may wait in the unit's memory for gradients; returns what to wait for.
        """
        self._make_gradients(fp32=False)
        assert self.memory.grads is not None
        handle = self._collect(grads, Kept(self.memory.grads), after=clear())
        return Landed(handle, handle)

    def land_in(self, staged: StagingLease, grads: Sequence[tuple[ParamState, torch.Tensor]]) -> None:
        """Bring a unit's gradients to a staging buffer, for somebody who reads them there and holds the lease."""
        self._collect(grads, staged)

    def _collect(
        self,
        grads: Sequence[tuple[ParamState, torch.Tensor]],
        into: Kept | StagingLease,
        after: Sequence[Handle] = (),
    ) -> Handle:
        pairs = [(state.segment, grad) for state, grad in grads]
        into.ready = self._runtime.link.collect(f"gradients of {self.name}", pairs, into, after=after)
        return into.ready

    def prepare_sum(self, scales: Callable[[ParamState], float]) -> None:
        """Make what waits an fp32 sum, to which more can be added.

        Args:
            scales: gives up the coefficient that a waiting gradient must be multiplied by.
        """
        if self.memory.grads_fp32:
            return
        pending = [
            (state, state.param.grad)
            for state in self.states
            if state.spec.trainable and state.param.grad is not None
        ]
        known = [scales(state) for state, _ in pending]  # by the gradient that is replaced here
        self._make_gradients(fp32=True)
        for (state, grad), scale in zip(pending, known, strict=True):
            target = self.gradient(state)
            target.copy_(grad).mul_(scale)
            set_gradient(state, target)

    def gradient(self, state: ParamState) -> torch.Tensor:
        """A parameter's place in the unit's own gradients."""
        return self.memory.gradient(state.segment)

    @property
    def sums_are_fp32(self) -> bool:
        """Whether the unit's own gradients are fp32 sums."""
        return self.memory.grads_fp32

    def part_buffer(self) -> Buffer:
        """New memory like that of the unit's own gradients."""
        layout = self.memory.layout
        return HostBuffer(layout.state_numel * 4 if self.sums_are_fp32 else layout.grad_bytes)

    # -- updates -----------------------------------------------------------------------------------------------

    def step(self, step: Step) -> Handle | None:
        """See `Home`."""
        # Detached here: a zero_grad(set_to_none=False) after step must not reach gradients still to be used.
        grads = {s.order: s.param.grad for s in self.states if s.param.grad is not None}
        states = [state for state in self.states if state.order in grads and step.trains(state)]
        runs = step.plan(states)
        for state in self.states:
            state.param.grad = None
        if not states:
            return None
        assert self.memory.grads is not None
        with torch.no_grad():
            for state in states:
                place, grad = self.gradient(state), grads[state.order]
                if grad.data_ptr() != place.data_ptr():  # someone set p.grad to a tensor of their own
                    place.copy_(grad)
        return self._update(Kept(self.memory.grads), runs, step, fp32=self.memory.grads_fp32)

    def update_from(self, landing: Landing, runs: Sequence[UpdateRun], step: Step) -> Handle:
        """Update from gradients that have just landed; the landing is given back then, whatever happens."""
        return self._update(landing, runs, step, fp32=False)

    def _updating(self, landing: Landing, runs: Sequence[UpdateRun], fp32: bool) -> Callable[[], None]:
        threads = self._runtime.threads
        self._runtime.metrics.add("updated_params", sum(s.spec.numel for run in runs for s in run.members))

        def update() -> None:
            with landing.read() as grads:
                self._runtime.guarded(lambda: update_unit(self.memory, grads, fp32, runs, threads))()

        return update

    def _submit_update(
        self, update: Callable[[], None], step: Step, ready: Sequence[Handle], drop: Callable[[], None]
    ) -> Handle:
        """Have the worker run `update`; where it will not run, `drop` is called."""
        try:
            return self._runtime.worker.submit(
                f"update of {self.name}",
                update,
                priority=step.priority,
                after=(*ready, *step.after),
                dropped=drop,
            )
        except BaseException:
            drop()
            raise

    # -- giving it up ------------------------------------------------------------------------------------------

    def free_for_training(self) -> None:
        """See `Home`."""
        super().free_for_training()
        self.memory.use_gradients(None, fp32=False)

    def free(self) -> None:
        """See `Home`."""
        self.memory = UnitMemory(self.memory.layout, HostBuffer(0))
