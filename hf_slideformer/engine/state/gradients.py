"""Gradients on their way from a unit's backward to its update.

Four paths, chosen per unit:

* *own*: one micro-batch, deferred update. To where the unit's update reads them, in the weights' dtype; that is its
  home's business (`land` of `streamed.py` and `on_disk.py`).
* *sum*: an earlier backward's gradient is there (accumulation, a second backward). Copied into a staging buffer and
  added to the unit's fp32 sum by the update worker.
* *part*: the layer ran more than once in what is differentiated now (looped transformers). As autograd does it for
  parameters that it fills, what one backward gives is summed by itself first, in the gradient's dtype, and is then what
  the other paths take: the same bits wherever the unit lives.
* *overlapped*: copied into a staging buffer, from which the update starts as soon as it has landed.

In all but the last, `p.grad` is the host gradient, set when `backward` returns, so clipping by torch's own functions
and edits by hand work; `p.grad is None` is the truth about whether a gradient is pending, as in torch.

A backward may run inside of another (reentrant checkpointing around layers): each has its own landing gradients, and
the outer one goes on where it was.
"""

from __future__ import annotations

import collections
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from slideformer_kernels import accumulate_, accumulate_squared_, sum_of_squares

from ...errors import StateError
from ...memory.buffers import Buffer
from ...memory.lease import released_on_error
from ...memory.limits import COPIES_IN_FLIGHT
from ...memory.offload import TensorOffload
from ...memory.pool import SlotPool
from ...memory.runtime import Runtime
from ...memory.staging import StagingBuffers
from ...memory.transfer import Handle
from ...memory.unit_memory import grad_view
from ...optim.state import ParamState, set_gradient
from .streamed import StreamedUnit
from .unit import Unit
from .updates import Updates

# Sums run before updates: a buffer that the copy lane waits for is freed soonest.
_SUM_PRIORITY = -1

# Parameters and what a backward gives them.
_Grads = list[tuple[ParamState, torch.Tensor]]


@dataclass(slots=True, eq=False)
class _Landing:
    """What one backward has given a unit so far.

    `states` by order; `part` holds it where the unit's own buffer has what earlier backwards gave.
    """

    unit: Unit
    states: dict[int, ParamState]
    handles: list[Handle]
    part: Buffer | None = None

    @classmethod
    def of(cls, unit: Unit, grads: _Grads, *handles: Handle) -> _Landing:
        return cls(unit, {state.order: state for state, _ in grads}, list(handles))


@dataclass(slots=True, eq=False)
class _Backward:
    """One run of autograd, with what it has given units; `end` is alive as long as it is."""

    task: int
    end: weakref.ref[_End]
    landing: dict[int, _Landing] = field(default_factory=dict)

    def settle(self) -> None:
        """Wait until nothing writes what it gave."""
        for landing in self.landing.values():
            for handle in landing.handles:
                handle.settle()
        self.landing.clear()


class _End:
    """What autograd calls at the end of a backward, and drops where it raised."""

    __slots__ = ("__weakref__", "_gradients", "_task")

    def __init__(self, gradients: Gradients, task: int) -> None:
        self._gradients, self._task = gradients, task

    def __call__(self) -> None:
        self._gradients.finish(self._task)


class Gradients:
    """Receives units' gradients (see the module's text).

    Args:
        runtime: brings them home; its metrics receive `d2h_bytes` and `wait_gradients_s`.
        updates: of units whose gradients are used up as they land; knows the order of units.
        pool: the slots; a unit's copy there goes stale when its update is enqueued.
        offload: brings back an input that waits where a gradient is to land.
        staging: staging buffers, sized for the largest unit.
        fp32_sums: host gradients are fp32 from the first micro-batch on.
    """

    def __init__(
        self,
        runtime: Runtime,
        updates: Updates,
        pool: SlotPool,
        offload: TensorOffload,
        staging: StagingBuffers,
        *,
        fp32_sums: bool,
    ) -> None:
        self._runtime = runtime
        self._updates = updates
        self._overlapped = updates.overlapped
        self._tape = updates.tape
        self._take_scale = updates.clipping.take_scale
        self._pool = pool
        self._offload = offload
        self._staging = staging
        self._fp32_sums = fp32_sums
        # Those that run now, outermost first.
        self._backwards: list[_Backward] = []
        self._in_flight: collections.deque[tuple[Handle, _Grads]] = collections.deque()
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
        if not any(backward.task == task for backward in self._backwards):
            self._forget_dead()
            end = _End(self, task)
            self._backwards.append(_Backward(task, weakref.ref(end)))
            torch.autograd.Variable._execution_engine.queue_callback(end)
        if self._overlapped and unit.forwards_since_step != 1:
            raise StateError(
                f"{unit.name} ran forward {unit.forwards_since_step} times since the last step, but overlapped "
                "updates need exactly one forward and one backward a step; use SlideConfig(update='deferred')"
            )

    def _forget_dead(self) -> None:
        """Let go of backwards that raised and never finished: autograd has dropped what it was to call at their end."""
        alive = [backward for backward in self._backwards if backward.end() is not None]
        if not alive and self._backwards:
            self.abandon()
        for backward in self._backwards:
            if backward not in alive:
                backward.settle()
        self._backwards = alive

    def push(self, unit: Unit, grads: list[torch.Tensor | None]) -> None:
        """Send a unit's gradients on their way. See `GradientSink`."""
        trainable = [state for state in unit.states if state.spec.trainable]
        present = [
            (state, grad.contiguous())
            for state, grad in zip(trainable, grads, strict=True)
            if grad is not None
        ]
        if not present:
            return
        left = (
            self._push_overlapped(unit, present) if self._overlapped else self._push_deferred(unit, present)
        )
        self._runtime.metrics.add("d2h_bytes", sum(grad.nbytes for _, grad in present))
        # References are held until the copy is done: the stream that frees the memory waits for the copy first,
        # two units later, when it is long over.
        self._in_flight.append((left, present))
        while len(self._in_flight) > COPIES_IN_FLIGHT:
            self._in_flight.popleft()[0].wait_stream()

    def _push_deferred(self, unit: Unit, grads: _Grads) -> Handle:
        landing = self._landing.get(unit.index)
        if landing is not None:
            return self._push_part(landing, grads)
        for outer in self._backwards[:-1]:
            # What it gave this unit before it was interrupted by this backward.
            if (earlier := outer.landing.pop(unit.index, None)) is not None:
                self._land([earlier])
        home = _home(unit)
        written = home.written_with([state for state, _ in grads])
        pending = any(state.param.grad is not None for state in written)
        if pending and unit.open_calls:
            landing = _Landing(unit, {}, [], home.part_buffer())
            self._landing[unit.index] = landing
            return self._push_part(landing, grads)
        if self._fp32_sums or pending:
            return self._push_sum(unit, grads)
        return self._push_own(unit, grads)

    @property
    def _landing(self) -> dict[int, _Landing]:
        return self._backwards[-1].landing

    def _push_own(self, unit: Unit, grads: _Grads) -> Handle:
        self._measure(grads)
        # The input of another run of this unit may still wait there (a layer used twice, two forwards in a row).
        clear = functools.partial(unit.bring_back_input, self._offload.fetch)
        landed = _home(unit).land(grads, self._staging, clear=clear)
        self._landing[unit.index] = _Landing.of(unit, grads, landed.left, landed.there)
        return landed.left

    def _measure(self, grads: _Grads) -> None:
        for state, grad in grads:
            self._squares[state.order] = (sum_of_squares(grad), None)

    def _push_sum(self, unit: Unit, grads: _Grads) -> Handle:
        add = self._begin_sum(unit, [state for state, _ in grads])
        staged = self._staging.lease()

        def add_staged() -> None:
            with staged.read() as buffer:
                add(buffer, fp32=False)

        with released_on_error(staged):
            _home(unit).land_in(staged, grads)
            done = self._submit_sum(
                unit, [state for state, _ in grads], add_staged, (staged.ready,), staged.release
            )
        self._landing[unit.index] = _Landing.of(unit, grads, staged.ready, done)
        return staged.ready

    def _begin_sum(self, unit: Unit, states: list[ParamState]) -> Callable[..., None]:
        """Make the unit's gradients an fp32 sum; returns what adds to it, from a buffer of gradients, in the worker."""
        home = _home(unit)
        home.prepare_sum(self._take_scale)
        earlier_grads = {state.order: state.param.grad for state in states if state.param.grad is not None}
        scales = {state.order: self._take_scale(state) for state in states}

        def add(buffer: Buffer, *, fp32: bool) -> None:
            for state in states:
                source = grad_view(buffer, state.segment, fp32=fp32)
                target = home.gradient(state)
                grad = earlier_grads.get(state.order)
                if grad is not None:
                    if grad.data_ptr() != target.data_ptr():  # someone set p.grad to a tensor of their own
                        target.copy_(grad)
                    if scales[state.order] != 1.0:
                        target.mul_(scales[state.order])
                self._squares[state.order] = (
                    accumulate_squared_(target, source, is_first=grad is None),
                    None,
                )

        return add

    def _submit_sum(
        self,
        unit: Unit,
        states: list[ParamState],
        work: Callable[[], None],
        after: Sequence[Handle],
        dropped: Callable[[], None] | None = None,
    ) -> Handle:
        done = self._runtime.worker.submit(
            f"gradient sum of {unit.name}", work, priority=_SUM_PRIORITY, after=after, dropped=dropped
        )
        for state in states:
            state.param.grad = None  # part of the sum now; comes back with it
        return done

    def _push_part(self, landing: _Landing, grads: _Grads) -> Handle:
        """One of several gradients that this backward gives a unit."""
        unit, part, home = landing.unit, landing.part, _home(landing.unit)
        there = dict(landing.states)
        fp32 = home.sums_are_fp32
        staged = self._staging.lease()

        def add() -> None:
            with staged.read() as buffer:
                for state, _ in grads:
                    source = grad_view(buffer, state.segment, fp32=False)
                    target = grad_view(part, state.segment, fp32=fp32) if part else home.gradient(state)
                    if state.order not in there:
                        target.copy_(source)
                    elif target.dtype == torch.float32:
                        accumulate_(target, source)
                    else:
                        target.add_(source)
                    if part is None:
                        self._squares[state.order] = (sum_of_squares(target), None)

        with released_on_error(staged):
            home.land_in(staged, grads)
            done = self._runtime.worker.submit(
                f"gradient part of {unit.name}",
                add,
                priority=_SUM_PRIORITY,
                after=(staged.ready, *landing.handles),
                dropped=staged.release,
            )
        landing.states.update({state.order: state for state, _ in grads})
        landing.handles += [staged.ready, done]
        return staged.ready

    def _push_overlapped(self, unit: Unit, grads: _Grads) -> Handle:
        self._measure(grads)
        # May raise, so before there is a staging buffer.
        runs, step = self._updates.overlapped_update(unit, [state for state, _ in grads])
        staged = self._staging.lease()
        with released_on_error(staged):
            _home(unit).land_in(staged, grads)
            self._pool.invalidate_unit(unit.index)
            unit.group.pending = _home(unit).update_from(staged, runs, step)
        return staged.ready

    # -- end of backward -------------------------------------------------------------------------------------

    def finish(self, task: int) -> None:
        """Runs when autograd is through: every host gradient is in place when `backward` returns.

        Raises:
            StateError: a gradient reached a weight past its layer, whose overlapped update has been made without it.
        """
        ended = [backward for backward in self._backwards if backward.task == task]
        with self._runtime.metrics.timed("wait_gradients_s"):
            for backward in ended:
                self._land(list(backward.landing.values()))
        self._backwards = [backward for backward in self._backwards if backward not in ended]
        if self._backwards:
            return
        if not self._overlapped:
            while self._in_flight:  # all landed: nothing on the device waits for a copy any more
                self._in_flight.popleft()
        self._tape.restart()
        self.check_used_up()

    def check_used_up(self) -> None:
        """Under overlapped updates, raise `StateError` if a streamed weight has a gradient that no update used."""
        if not self._overlapped:
            return
        left = [state.name for state in self._updates.leased if state.param.grad is not None]
        if left:
            raise StateError(
                f"{left[0]} (one of {len(left)}) got a gradient past its layer, by a penalty on weights or a use of "
                "them elsewhere, but overlapped updates take what the layer gives as soon as it is there, so it would "
                "be dropped; load the model anew and use SlideConfig(update='deferred')"
            )

    def _land(self, landings: list[_Landing]) -> None:
        """Bring what a backward gave into `p.grad`."""
        for landing in landings:
            if landing.part is not None:
                self._add_part(landing, landing.part)
        for landing in landings:
            self._assign(landing)

    def _add_part(self, landing: _Landing, part: Buffer) -> None:
        """Add what this backward gave to what earlier ones did."""
        unit, states = landing.unit, list(landing.states.values())
        fp32 = _home(unit).sums_are_fp32
        add = self._begin_sum(unit, states)
        landing.handles.append(
            self._submit_sum(unit, states, lambda: add(part, fp32=fp32), after=tuple(landing.handles))
        )

    def _assign(self, landing: _Landing) -> None:
        for handle in landing.handles:
            handle.wait_host()
        with torch.no_grad():
            for state in landing.states.values():
                place, other = _home(landing.unit).gradient(state), state.param.grad
                if other is not None:  # reached the parameter past the unit in the same backward
                    place.add_(other)
                    self._squares.pop(state.order, None)
                set_gradient(state, place)
                if other is None:
                    self._squares[state.order] = (self._squares[state.order][0], _identity(place))

    def abandon(self) -> None:
        """Forget gradients of a backward that did not finish, once nothing is writing them."""
        for backward in self._backwards:
            backward.settle()
        for handle, _ in self._in_flight:
            handle.settle()
        self._in_flight.clear()
        self._squares.clear()
        self._backwards = []

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


def _home(unit: Unit) -> StreamedUnit:
    """The home of a unit whose gradients come from its own backward: it streams."""
    return cast(StreamedUnit, unit.group.home)


def _identity(grad: torch.Tensor) -> tuple[int, int]:
    return grad.data_ptr(), grad._version
