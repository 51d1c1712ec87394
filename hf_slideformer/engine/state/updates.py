"""Updates: what one step does to parameters, each where its state lives.

With deferred updates `step` makes them: those of resident parameters at once, on the device, those of units by the
worker, in forward order. With overlapped updates a unit's is made when its gradients land, a resident parameter's when
autograd has its gradient, and `step` is left with the parameters outside of units.

Whoever reads or writes state waits for updates (`synchronize`), and updates wait for a checkpoint that is being written
beside training (`hold`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from ...errors import StateError, UnsupportedModelError
from ...memory.buffers import BufferView, HostBuffer
from ...memory.runtime import Failure
from ...memory.worker import UpdateWorker
from ...metrics import Metrics
from ...optim.adamw import SlideAdamW
from ...optim.state import (
    Hyperparams,
    ParamState,
    UnitUpdate,
    UpdateRun,
    apply_update,
    plan_runs,
    update_unit,
)
from .beside_device import OutsideUpdates
from .clipping import Clipping
from .order import Tape
from .placement import PlacedState
from .snapshot import HeldState
from .unit import Unit


class Updates:
    """Makes the updates of one model's parameters.

    Args:
        placed: where their state is.
        outside: makes those of parameters outside of units whose state is in RAM; None if there are none.
        worker: runs updates in RAM.
        tape: the order of units in forward.
        clipping: coefficients that gradients are multiplied by.
        failure: is told of an update that failed.
        metrics: receives `updated_params`.
        device: where resident parameters are updated.
        overlapped: units are updated in backward.
        threads: of the CPU's update kernels.

    Attributes:
        optimizer: whose hyperparameters are used; None until there is one.
        held: state that is being saved.
    """

    def __init__(
        self,
        placed: PlacedState,
        *,
        outside: OutsideUpdates | None,
        worker: UpdateWorker,
        tape: Tape,
        clipping: Clipping,
        failure: Failure,
        metrics: Metrics,
        device: torch.device,
        overlapped: bool,
        threads: int,
    ) -> None:
        self._placed = placed
        self._outside = outside
        self._worker = worker
        self._tape = tape
        self._clipping = clipping
        self._failure = failure
        self._metrics = metrics
        self._device = device
        self._overlapped = overlapped
        self._threads = threads
        self.optimizer: SlideAdamW | None = None
        self.held: HeldState | None = None
        self._group_of: dict[int, int] = {}
        # Resident gradients that the last step used, to notice a missing zero_grad.
        self._used: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        # What updates in this backward have used.
        self._used_hyperparams: dict[int, Hyperparams] = {}

    # -- hyperparameters -------------------------------------------------------------------------------------

    def find_groups(self, optimizer: SlideAdamW) -> dict[int, int]:
        """The parameter group of every parameter that `optimizer` has, by its order.

        Raises:
            UnsupportedModelError: a parameter that is not this model's.
        """
        groups = {}
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                state = self._placed.state_of(param)
                if state is None:
                    raise UnsupportedModelError(
                        f"parameter group {index} holds a parameter of shape {tuple(param.shape)} that is not in the "
                        "prepared model; make the optimizer from the same model object"
                    )
                groups[state.order] = index
        return groups

    def use(self, optimizer: SlideAdamW) -> None:
        """Take hyperparameters from `optimizer` from now on; again when it has got another group."""
        self._group_of = self.find_groups(optimizer)
        self.optimizer = optimizer

    def _hyperparams(self, state: ParamState) -> Hyperparams:
        assert self.optimizer is not None
        return Hyperparams.of_group(self.optimizer.param_groups[self._group_of[state.order]])

    # -- deferred updates, and what is left for a step -------------------------------------------------------

    def step(self) -> None:
        """Update every parameter that has a gradient: residents now, units by the worker, in forward order.

        Raises:
            StateError: the learning rate changed after overlapped updates had used it.
        """
        if self._overlapped:
            for state in self._placed.states:
                used = self._used_hyperparams.get(state.order)
                if used is not None and used != self._hyperparams(state):
                    raise StateError(
                        "the learning rate or another hyperparameter changed between backward and step, but "
                        "overlapped updates had used the old value; use SlideConfig(update='deferred')"
                    )
        else:
            for unit in sorted(self._placed.streamed, key=lambda unit: self._tape.place(unit.index)):
                self._enqueue(unit)
        self._step_residents()
        self._used_hyperparams.clear()  # last: an interrupted step leaves some parameters a step ahead

    def _enqueue(self, unit: Unit) -> None:
        if unit.pending_update is not None:
            unit.pending_update.wait_host()  # a second step without a forward: that update still reads its gradients
        # Detached here: a zero_grad(set_to_none=False) after step must not reach gradients still to be used.
        grads = {s.order: s.param.grad for s in unit.states if s.param.grad is not None}
        states = [state for state in unit.states if state.order in grads and state.order in self._group_of]
        runs = self._runs(states)
        for state in unit.states:
            state.param.grad = None
        if not states:
            return
        buffer = unit.memory.grads
        assert buffer is not None
        with torch.no_grad():
            for state in states:
                place = unit.memory.gradient(state.segment)
                if (
                    grads[state.order].data_ptr() != place.data_ptr()
                ):  # someone set p.grad to a tensor of their own
                    place.copy_(grads[state.order])

        update = self._unit_update(unit, runs, fp32=unit.memory.grads_fp32)
        try:
            unit.pending_update = self._worker.submit(
                f"update of {unit.name}",
                lambda: update.run(buffer),
                priority=self._tape.place(unit.index),
                after=update.after,
                dropped=update.drop,
            )
        except BaseException:
            update.drop()
            raise

    def _step_residents(self) -> None:
        """Update what autograd fills the gradients of: on the device, or in RAM for weights on the device."""
        in_ram = []
        self.wait_outside()
        for state in self._placed.states:
            grad = state.param.grad
            if state.unit is None and grad is not None and state.order in self._group_of:
                self.check_used_once(state)
                if state.updated_in_ram:
                    self._until_read(state)
                    in_ram.append(state)
                else:
                    self._update_resident(state, grad)
                    self._used[state.order] = (weakref.ref(grad), grad._version)
        if in_ram:
            outside = self._outside
            assert outside is not None
            memory, runs = outside.memory, self._runs(in_ram)
            if any(s.param.grad is not None and s.param.grad.dtype != s.spec.dtype for s in in_ram):
                memory.allocate_gradients(fp32=True)  # sums, which may not be rounded on their way
            buffer, fp32 = memory.grads, memory.grads_fp32
            assert buffer is not None
            outside.step(
                in_ram, self._guarded(lambda: update_unit(memory, buffer, fp32, runs, self._threads))
            )
            for state in in_ram:
                self._note_update(state)
                # Detached like streamed gradients: zero_grad(set_to_none=False) must not reach one on its way to RAM.
                state.param.grad = None

    def _update_resident(self, state: ParamState, grad: torch.Tensor) -> None:
        self._until_read(state)
        state.check_outside_write()
        state.step += 1
        apply_update(
            state.weight,
            state.residual,
            grad.contiguous(),
            state.moments,
            self._hyperparams(state).scalars(state.step),
            self._clipping.scale_of(state),
            self._threads if self._device.type == "cpu" else None,
        )
        self._note_update(state)

    @staticmethod
    def _note_update(state: ParamState) -> None:
        """Let autograd's own check find a graph that was built on the old weights."""
        torch.autograd.graph.increment_version(state.param)
        state.version = state.param._version

    def check_used_once(self, state: ParamState) -> None:
        """Raise `StateError` if a resident gradient that the last step used is still there, to be used once more."""
        used = self._used.pop(state.order, None)
        grad = state.param.grad
        if used is not None and grad is not None and grad is used[0]() and grad._version == used[1]:
            raise StateError(
                f"the gradient of {state.name} that the last step used is still there, and the next backward would "
                "add to it, or the next step use it again; call optimizer.zero_grad() after step(): streamed gradients "
                "are not kept over a step"
            )

    # -- overlapped updates ----------------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether overlapped updates of the step that comes have been made, or begun."""
        return bool(self._used_hyperparams)

    def defer(self) -> None:
        """Make updates in `step` from now on."""
        assert not self.has_begun
        self.wait_held()  # what is being saved is read in the order of overlapped updates
        self.synchronize()
        self._overlapped = False

    def overlapped_update(self, unit: Unit, states: Sequence[ParamState]) -> UnitUpdate:
        """The update of a unit's parameters that have just got gradients, for the worker."""
        states = [state for state in states if state.order in self._group_of]
        for state in states:
            self._used_hyperparams[state.order] = self._hyperparams(state)
        return self._unit_update(unit, self._runs(states), fp32=False)

    def update_in_backward(self, state: ParamState, grad: torch.Tensor) -> bool:
        """Update a resident parameter that has just got its gradient; False if the optimizer does not have it.

        Raises:
            StateError: it is the second one since the last step.
        """
        if state.order not in self._group_of:
            return False
        if state.order in self._used_hyperparams:
            raise StateError(
                f"{state.name} got a second gradient since the last step, but overlapped updates had used the first; "
                "use SlideConfig(update='deferred')"
            )
        self._used_hyperparams[state.order] = self._hyperparams(state)
        self._update_resident(state, grad)
        return True

    # -- a unit's update -------------------------------------------------------------------------------------

    def _runs(self, states: Sequence[ParamState]) -> list[UpdateRun]:
        for state in states:
            state.check_outside_write()
            state.step += 1
        return plan_runs(states, self._hyperparams, self._clipping.scale_of)

    def _unit_update(self, unit: Unit, runs: Sequence[UpdateRun], *, fp32: bool) -> UnitUpdate:
        """The worker's part of a unit's update; state that lives on disk is on its way from now on."""
        self._metrics.add("updated_params", sum(state.spec.numel for run in runs for state in run.members))

        def run(buffer: HostBuffer | BufferView) -> None:
            self._guarded(lambda: update_unit(unit.memory, buffer, fp32, runs, self._threads))()

        read = () if self.held is None else (self.held.released(unit.index),)
        disk = self._placed.disk
        if disk is None or unit.index not in disk:
            return UnitUpdate(run, after=read)
        places, waited = disk.layouts[unit.index], unit.memory.grads_on_disk
        # Gradients that wait on disk come with the rest.
        loan = disk.updates.borrow(unit.index, places.masters_and_gradients if waited else places.masters)

        def run_on_disk(buffer: HostBuffer | BufferView) -> None:
            try:
                with self._placed.attached(unit, loan):
                    run(BufferView(loan.buffer, places.gradients[0]) if waited else buffer)
            finally:
                loan.give_back(write=True, nbytes=places.masters[1])

        return UnitUpdate(run_on_disk, after=(loan.ready, *read), drop=loan.give_back)

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failure.note(error)  # the unit's state may be half updated
                raise

        return run

    # -- order -----------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Block until every update is done and weights can be read.

        Raises:
            TransferError: an update failed, or the write of its weights to disk; the cause is chained.
        """
        for unit in self._placed.streamed:
            if unit.pending_update is not None:
                unit.pending_update.wait_host()
                unit.pending_update = None
            if unit.borrow_weights is not None:  # the update's buffer may still be on its way to the file
                assert self._placed.disk is not None
                self._placed.disk.state.written[unit.index].wait_host()
        if self._outside is not None:
            self._outside.wait_host()

    def wait_outside(self, *_: object) -> None:
        """Make the current stream wait for updates of parameters outside of units; called before the model runs."""
        if self._outside is not None:
            self._outside.wait_stream()

    def abandon(self) -> None:
        """Forget a backward that did not finish; what overlapped updates have done cannot be undone."""
        for unit in self._placed.streamed:
            if unit.pending_update is not None:
                unit.pending_update.settle()
                error = unit.pending_update.error
                if error is None:
                    unit.pending_update = None
                elif self._overlapped:
                    # Its gradients never arrived, while other units were updated.
                    self._failure.note(StateError(f"{unit.name} missed an overlapped update"))
                else:
                    self._failure.note(error)
        if self._outside is not None and (error := self._outside.abandon()) is not None:
            self._failure.note(error)
        self._used.clear()
        if self._used_hyperparams:
            self._used_hyperparams.clear()
            self._failure.note(StateError("backward was interrupted after overlapped updates of some units"))

    # -- saving beside training ------------------------------------------------------------------------------

    def hold(self) -> HeldState:
        """Keep updates away from the state as it is now until it has been read, unit by unit.

        Raises:
            TransferError: an update failed; the cause is chained.
        """
        self.wait_held()
        self.synchronize()
        for state in self._placed.states:
            state.check_outside_write()
        groups = self._placed.by_unit()
        outside = len(groups) - 1
        units = sorted(self._placed.units, key=lambda unit: self._tape.place(unit.index))
        if self._overlapped:  # as backward goes, then `step`
            order = [*(unit.index for unit in reversed(units)), outside]
        else:  # as `step` goes
            order = [outside, *(unit.index for unit in sorted(units, key=lambda unit: unit.streamed))]
        self.held = HeldState(
            groups, order, device=self._device, borrow=self._placed.borrow, attach=self._placed.on_loan
        )
        return self.held

    def wait_held(self) -> None:
        """Wait until what is being saved has been read, before state is changed by others than updates."""
        if self.held is not None:
            self.held.wait_host()
            self.held = None

    def _until_read(self, state: ParamState) -> None:
        """Wait before an update that is made here and now."""
        if self.held is not None:
            self.held.released(self.held.group_of[state.order]).wait_host()
