"""Gradients on their way from a unit's backward to its update.

Four paths, chosen per unit:

* *own*: one micro-batch, deferred update. Copied in the weights' dtype into the unit's own host buffer.
* *sum*: a gradient is already there (accumulation, a second backward, a layer used twice). Copied into a staging
  buffer and added to the unit's fp32 sum by the update worker.
* *to disk*: as *own*, for a unit whose gradients wait on disk: by way of a staging buffer into the unit's file.
* *overlapped*: copied into a staging buffer, from which the update starts as soon as it has landed.

In all but the last, `p.grad` is the host gradient, set when `backward` returns, so clipping by torch's own functions
and edits by hand work; `p.grad is None` is the truth about whether a gradient is pending, as in torch.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch
from slideformer_kernels import accumulate_, sum_of_squares

from ..errors import StateError
from ..memory.disk_state import DiskState
from ..memory.layout import Span
from ..memory.manager import grad_view
from ..memory.offload import TensorOffload
from ..memory.pool import SlotPool
from ..memory.staging import Staged, StagingBuffers
from ..memory.transfer import Handle, Lane, compute_event
from ..metrics import Metrics
from ..optim.state import ParamState, UnitUpdate
from ..optim.worker import UpdateWorker
from .executor import Unit
from .schedule import Tape

# How many units' gradients may wait on the device for their copy before the compute stream waits for the oldest.
_MAX_IN_FLIGHT = 2

# Sums run before updates: a buffer that the copy lane waits for is freed soonest.
_SUM_PRIORITY = -1


class Gradients:
    """Receives units' gradients (see the module's text).

    Args:
        device: where gradients are produced.
        lane: device-to-host lane.
        worker: runs sums and overlapped updates.
        pool: the slots; a unit's copy there goes stale when its update is enqueued.
        offload: brings back an input that waits where a gradient is to land.
        metrics: receives `d2h_bytes` and `wait_gradients_s`.
        fp32_sums: host gradients are fp32 from the first micro-batch on.
        overlapped: start the update as soon as gradients land.
        staging: staging buffers, sized for the largest unit.
        overlapped_update: called under `overlapped` with a unit and the parameters that have gradients; returns
            their update, to be run by the worker.
        take_scale: gives up a parameter's unused clip coefficient, which its gradient must be multiplied by before
            more is added to it.
        disk: where units' files are; None if no state is on disk.
        tape: the order of units in forward; starts anew when a backward is complete.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        lane: Lane,
        worker: UpdateWorker,
        pool: SlotPool,
        offload: TensorOffload,
        metrics: Metrics,
        fp32_sums: bool,
        overlapped: bool,
        staging: StagingBuffers,
        overlapped_update: Callable[[Unit, list[ParamState]], UnitUpdate],
        take_scale: Callable[[ParamState], float],
        disk: DiskState | None,
        tape: Tape,
    ) -> None:
        self._device = device
        self._lane = lane
        self._worker = worker
        self._pool = pool
        self._offload = offload
        self._metrics = metrics
        self._fp32_sums = fp32_sums
        self._overlapped = overlapped
        self._staging = staging
        self._overlapped_update = overlapped_update
        self._take_scale = take_scale
        self._disk = disk
        self._tape = tape
        self._task: int | None = None
        self._landing: dict[int, tuple[Unit, list[ParamState], list[Handle]]] = {}
        self._in_flight: collections.deque[tuple[Handle, list[torch.Tensor]]] = collections.deque()
        # Sum of squares of a gradient as it landed, with the memory and version of `p.grad` that it belongs to.
        self._squares: dict[int, tuple[torch.Tensor | float, tuple[int, int] | None]] = {}

    @property
    def staging_bytes(self) -> int:
        """Bytes of staging buffers allocated now."""
        return self._staging.host_bytes

    # -- during backward -------------------------------------------------------------------------------------

    def begin_unit(self, unit: Unit) -> None:
        """Note that backward reached `unit`; the first one of a backward arranges for its end."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            if self._task is not None:  # an earlier backward raised and never finished
                self.abandon()
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if self._overlapped and unit.forwards_since_step != 1:
            raise StateError(
                f"{unit.name} ran forward {unit.forwards_since_step} times since the last step, but overlapped "
                "updates need exactly one forward and one backward a step; use SlideConfig(update='deferred')"
            )

    def push(self, unit: Unit, grads: list[torch.Tensor | None]) -> None:
        """Send a unit's gradients on their way. See `GradientSink`."""
        trainable = [state for state in unit.states if state.spec.trainable]
        present = [
            (state, grad.contiguous())
            for state, grad in zip(trainable, grads, strict=True)
            if grad is not None
        ]
        states, tensors = [state for state, _ in present], [grad for _, grad in present]
        if not tensors:
            return
        # What goes to disk is written over all of the unit's gradients, so that none of them may be there.
        span = unit.memory.grads_span
        written = states if span is None else trainable
        if self._overlapped:
            handle = self._push_overlapped(unit, states, tensors)
        elif (
            self._fp32_sums
            or unit.index in self._landing
            or any(state.param.grad is not None for state in written)
        ):
            handle = self._push_sum(unit, states, tensors)
        elif span is not None:
            handle = self._push_to_disk(unit, states, tensors, span)
        else:
            handle = self._push_own(unit, states, tensors)
        self._metrics.add("d2h_bytes", sum(grad.nbytes for grad in tensors))
        # References are held until the copy is done: the stream that frees the memory waits for the copy first,
        # two units later, when it is long over.
        self._in_flight.append((handle, tensors))
        while len(self._in_flight) > _MAX_IN_FLIGHT:
            self._in_flight.popleft()[0].wait_stream()

    def _push_own(self, unit: Unit, states: list[ParamState], tensors: list[torch.Tensor]) -> Handle:
        unit.memory.allocate_gradients(fp32=False)
        for state, grad in zip(states, tensors, strict=True):
            self._squares[state.order] = (sum_of_squares(grad), None)
        targets = [unit.memory.gradient(state.segment) for state in states]
        # The input of another run of this unit may still wait there (a layer used twice, two forwards in a row).
        waiting = unit.waiting() if unit.waiting is not None else None
        handle = self._copy(unit, targets, tensors, after=[self._offload.fetch(waiting)] if waiting else [])
        self._landing[unit.index] = (unit, states, [handle])
        return handle

    def _push_to_disk(
        self, unit: Unit, states: list[ParamState], tensors: list[torch.Tensor], span: Span
    ) -> Handle:
        assert self._disk is not None
        disk = self._disk
        unit.memory.allocate_gradients(fp32=False)
        for state, grad in zip(states, tensors, strict=True):
            self._squares[state.order] = (sum_of_squares(grad), None)
        staged = self._staging.staged()

        def write() -> None:
            with staged.read() as buffer:
                disk.write(unit.index, buffer, span)

        with staged.dropped_on_error():
            handle = self._copy_staged(unit, staged, states, tensors)
            done = disk.writes.submit(
                f"gradients of {unit.name} to disk", write, after=(handle,), dropped=staged.drop
            )
        self._landing[unit.index] = (unit, states, [handle, done])
        return handle

    def _push_sum(self, unit: Unit, states: list[ParamState], tensors: list[torch.Tensor]) -> Handle:
        earlier = self._landing.pop(unit.index, None)
        if earlier is not None:
            self._assign(*earlier)
        if not unit.memory.grads_fp32:
            self._promote(unit)
        earlier_grads = {state.order: state.param.grad for state in states if state.param.grad is not None}
        scales = {state.order: self._take_scale(state) for state in states}
        # Last of what may raise: from here on the sum owns a staging buffer.
        staged = self._staging.staged()

        def add() -> None:
            with staged.read() as buffer:
                for state in states:
                    source = grad_view(buffer, state.segment, fp32=False)
                    target = unit.memory.gradient(state.segment)
                    grad = earlier_grads.get(state.order)
                    if grad is None:
                        target.copy_(source)
                    else:
                        if (
                            grad.data_ptr() != target.data_ptr()
                        ):  # someone set p.grad to a tensor of their own
                            target.copy_(grad)
                        if scales[state.order] != 1.0:
                            target.mul_(scales[state.order])
                        accumulate_(target, source)
                    self._squares[state.order] = (sum_of_squares(target), None)

        with staged.dropped_on_error():
            handle = self._copy_staged(unit, staged, states, tensors)
            done = self._worker.submit(
                f"gradient sum of {unit.name}",
                add,
                priority=_SUM_PRIORITY,
                after=(handle,),
                dropped=staged.drop,
            )
        for state in states:
            state.param.grad = None  # part of the sum now; comes back with it
        self._landing[unit.index] = (unit, states, [handle, done])
        return handle

    def _push_overlapped(self, unit: Unit, states: list[ParamState], tensors: list[torch.Tensor]) -> Handle:
        for state, grad in zip(states, tensors, strict=True):
            self._squares[state.order] = (sum_of_squares(grad), None)
        unit_update = self._overlapped_update(unit, states)  # may raise, so before there is a staging buffer
        staged = self._staging.staged()

        def update() -> None:
            with staged.read() as buffer:
                unit_update.run(buffer)

        def drop() -> None:
            unit_update.drop()
            staged.drop()  # or a backward that waits for the buffer would wait for ever

        try:
            handle = self._copy_staged(unit, staged, states, tensors)
            self._pool.invalidate_unit(unit.index)
            unit.pending_update = self._worker.submit(
                f"update of {unit.name}",
                update,
                priority=self._tape.place(unit.index),
                after=(handle, *unit_update.after),
                dropped=drop,
            )
        except BaseException:
            drop()
            raise
        return handle

    def _copy(
        self, unit: Unit, targets: list[torch.Tensor], tensors: list[torch.Tensor], after: list[Handle]
    ) -> Handle:
        def copy() -> None:
            for target, grad in zip(targets, tensors, strict=True):
                target.copy_(grad, non_blocking=True)

        return self._lane.submit(
            f"gradients of {unit.name}", copy, after=after, after_events=(compute_event(self._device),)
        )

    def _copy_staged(
        self, unit: Unit, staged: Staged, states: list[ParamState], tensors: list[torch.Tensor]
    ) -> Handle:
        def copy() -> None:
            with staged.filled() as buffer:
                for state, grad in zip(states, tensors, strict=True):
                    grad_view(buffer, state.segment, fp32=False).copy_(grad, non_blocking=True)

        return self._lane.submit(
            f"gradients of {unit.name}", copy, after_events=(compute_event(self._device),)
        )

    def _promote(self, unit: Unit) -> None:
        """Turn a unit's own gradients into an fp32 sum; a further micro-batch is coming."""
        pending = [
            (state, state.param.grad)
            for state in unit.states
            if state.spec.trainable and state.param.grad is not None
        ]
        scales = [
            self._take_scale(state) for state, _ in pending
        ]  # known by the gradient that is replaced here
        unit.memory.allocate_gradients(fp32=True, from_device=False)
        for (state, grad), scale in zip(pending, scales, strict=True):
            target = unit.memory.gradient(state.segment)
            target.copy_(grad).mul_(scale)
            set_gradient(state, target)

    # -- end of backward -------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Runs when autograd is through: every host gradient is in place when `backward` returns."""
        self._task = None
        with self._metrics.timed("wait_gradients_s"):
            for unit, states, handles in self._landing.values():
                self._assign(unit, states, handles)
        self._landing.clear()
        if not self._overlapped:
            while self._in_flight:  # all landed: nothing on the device waits for a copy any more
                self._in_flight.popleft()
        self._tape.restart()

    def _assign(self, unit: Unit, states: list[ParamState], handles: list[Handle]) -> None:
        for handle in handles:
            handle.wait_host()
        with torch.no_grad():
            for state in states:
                place, other = unit.memory.gradient(state.segment), state.param.grad
                if other is not None:  # reached the parameter past the unit in the same backward
                    place.add_(other)
                    self._squares.pop(state.order, None)
                set_gradient(state, place)
                if other is None:
                    self._squares[state.order] = (self._squares[state.order][0], _identity(place))

    def abandon(self) -> None:
        """Forget gradients of a backward that did not finish, once nothing is writing them."""
        for _, _, handles in self._landing.values():
            for handle in handles:
                handle.settle()
        for handle, _ in self._in_flight:
            handle.settle()
        self._landing.clear()
        self._in_flight.clear()
        self._squares.clear()
        self._task = None

    # -- norms -----------------------------------------------------------------------------------------------

    def squared_norm(self, state: ParamState) -> torch.Tensor | float:
        """Sum of squares of a parameter's pending gradient: a float, or a 0-dim float64 device tensor.

        Taken from when the gradient landed if nobody has changed it since.
        """
        grad = state.param.grad
        known = self._squares.get(state.order)
        if known is not None and (grad is None or known[1] == _identity(grad)):
            return known[0]
        assert grad is not None
        return sum_of_squares(grad.detach().contiguous())

    def note_norm(self, state: ParamState, grad: torch.Tensor) -> None:
        """Take the sum of squares of a gradient that is about to be used up."""
        self._squares[state.order] = (sum_of_squares(grad.contiguous()), None)

    def landed(self, state: ParamState) -> bool:
        """Whether the parameter has a gradient in this step (pending or already used by an overlapped update)."""
        return state.param.grad is not None or (self._overlapped and state.order in self._squares)

    def forget_norms(self) -> None:
        """Called after the step that used them."""
        self._squares.clear()


def set_gradient(state: ParamState, grad: torch.Tensor) -> None:
    """Set `p.grad`, of another dtype than the parameter where it is an fp32 sum."""
    allowed = getattr(state.param, "grad_dtype", state.param.dtype)
    if grad.dtype != allowed:
        if not hasattr(state.param, "grad_dtype"):
            raise StateError(
                f"a second gradient for {state.name} needs an fp32 sum, for which bf16 weights need torch >= 2.10; "
                "upgrade torch, or make one backward per step"
            )
        state.param.grad = None
        state.param.grad_dtype = grad.dtype
    state.param.grad = grad


def _identity(grad: torch.Tensor) -> tuple[int, int]:
    return grad.data_ptr(), grad._version
