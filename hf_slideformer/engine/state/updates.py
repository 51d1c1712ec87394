"""Updates: what one step does to parameters, each where its state lives.

With deferred updates `step` asks the home of each group for its update: units' are enqueued in forward order, those of
parameters on the device are made there and then. With overlapped updates a unit's is made when its gradients land, a
resident parameter's when autograd has its gradient, and `step` is left with the parameters outside of units.

Whoever reads or writes state waits for updates (`synchronize`), and updates wait for a checkpoint that is being written
beside training (`hold`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from ...errors import StateError, UnsupportedModelError
from ...memory.runtime import Runtime
from ...memory.transfer import Handle
from ...optim.optimizer import SlideOptimizer
from ...optim.rule import UpdateRule
from ...optim.state import ParamState, UpdateRun, plan_runs
from .clipping import Clipping
from .group import StateGroup
from .home import Step
from .order import Tape
from .placement import PlacedModel
from .snapshot import HeldState
from .unit import Unit


class Updates:
    """Makes the updates of one model's parameters.

    Args:
        placed: where their state is.
        rule: they are updated by.
        runtime: is told of an update that failed.
        tape: the order of units in forward.
        clipping: coefficients that gradients are multiplied by.

    Attributes:
        optimizer: whose hyperparameters are used; None until there is one.
        overlapped: units are updated in backward.
        held: state that is being saved.
    """

    def __init__(
        self, placed: PlacedModel, rule: UpdateRule, runtime: Runtime, tape: Tape, clipping: Clipping
    ) -> None:
        self._placed = placed
        self._rule = rule
        self._runtime = runtime
        self.tape = tape
        self.clipping = clipping
        self.optimizer: SlideOptimizer | None = None
        self.overlapped = clipping.overlapped
        self.held: HeldState | None = None
        self._group_of: dict[int, int] = {}
        self.leased = placed.leased
        # What updates in this backward have used.
        self._used_hyperparams: dict[int, Hashable] = {}

    # -- hyperparameters -------------------------------------------------------------------------------------

    def find_groups(self, optimizer: SlideOptimizer) -> dict[int, int]:
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

    def use(self, optimizer: SlideOptimizer) -> None:
        """Take hyperparameters from `optimizer` from now on; again when it has got another group.

        Raises:
            UnsupportedModelError: a parameter that is not this model's.
            StateError: a group that wants other state than there is.
        """
        groups = self.find_groups(optimizer)
        self._check_groups(optimizer)
        self._group_of = groups
        self.optimizer = optimizer

    def _hyperparams(self, state: ParamState) -> Hashable:
        assert self.optimizer is not None
        return self._rule.hyperparams(self.optimizer.param_groups[self._group_of[state.order]])

    def _check_groups(self, optimizer: SlideOptimizer) -> None:
        for group in optimizer.param_groups:
            self._rule.hyperparams(group)

    def _trains(self, state: ParamState) -> bool:
        return state.order in self._group_of

    # -- deferred updates, and what is left for a step -------------------------------------------------------

    def step(self) -> None:
        """Update every parameter that has a gradient: residents now, units by the worker, in forward order.

        Raises:
            StateError: a hyperparameter changed after overlapped updates had used it, or to what the rule has no state
                for; nothing was updated.
        """
        if self.optimizer is not None:
            self._check_groups(self.optimizer)
        for state in self._placed.states if self.overlapped else ():
            used = self._used_hyperparams.get(state.order)
            if used is not None and used != self._hyperparams(state):
                raise StateError(
                    "the learning rate or another hyperparameter changed between backward and step, but "
                    "overlapped updates had used the old value; use SlideConfig(update='deferred')"
                )
        # Those that take time beside the device begin first.
        for group in sorted(self._placed.groups, key=lambda g: (g.home.updates_at_once, self._place(g))):
            if group.pending is not None and any(state.param.grad is not None for state in group.states):
                # A second step without a forward: that update still reads its gradients.
                group.pending.wait_host()
            group.pending = group.home.step(self._step(group)) or group.pending
        self._used_hyperparams.clear()  # last: an interrupted step leaves some parameters a step ahead

    def _place(self, group: StateGroup) -> int:
        return self.tape.place(group.index)

    def _step(self, group: StateGroup) -> Step:
        return Step(self._plan, self._trains, self._released(group), self._place(group))

    def _released(self, group: StateGroup) -> tuple[Handle, ...]:
        return () if self.held is None else (self.held.released(group.index),)

    def _plan(self, states: Sequence[ParamState]) -> list[UpdateRun]:
        for state in states:
            state.check_outside_write()
            state.step += 1
        return plan_runs(states, self._hyperparams, self.clipping.scale_of)

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
        self.overlapped = False

    def overlapped_update(self, unit: Unit, states: Sequence[ParamState]) -> tuple[list[UpdateRun], Step]:
        """The update of a unit's parameters that have just got gradients."""
        trained = [state for state in states if self._trains(state)]
        for state in trained:
            self._used_hyperparams[state.order] = self._hyperparams(state)
        return self._plan(trained), self._step(unit.group)

    def use_up(self, state: ParamState, grad: torch.Tensor) -> bool:
        """Update a resident parameter that has just got its gradient; False if that has to wait for `step`.

        Raises:
            StateError: it is the second one since the last step.
        """
        if not self._trains(state):
            return False
        if state.order in self._used_hyperparams:
            raise StateError(
                f"{state.name} got a second gradient since the last step, but overlapped updates had used the first; "
                "use SlideConfig(update='deferred')"
            )
        group = self._placed.group_of(state)
        self._used_hyperparams[state.order] = self._hyperparams(state)
        if group.home.use_up(state, grad, self._step(group)):
            return True
        del self._used_hyperparams[state.order]
        return False

    # -- order -----------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Block until every update is done and weights can be read.

        Raises:
            TransferError: an update failed, or the write of its weights to disk; the cause is chained.
        """
        for group in self._placed.groups:
            group.wait_host()
            group.pending = None

    def wait_outside(self, *_: object) -> None:
        """Make the current stream wait for updates of parameters outside of units; called before the model runs.

        Raises:
            StateError: an update failed.
        """
        self._runtime.failure.check()  # first: what is pending may have failed of that
        self._placed.outside.wait_stream()

    def abandon(self) -> None:
        """Forget a backward that did not finish; what overlapped updates have done cannot be undone."""
        for group in self._placed.groups:
            error = group.abandon()
            if error is None:
                continue
            if self.overlapped and group is not self._placed.outside:
                # Its gradients never arrived, while other units were updated.
                error = StateError(f"{group.name} missed an overlapped update")
            self._runtime.failure.note(error)
        if self._used_hyperparams:
            self._used_hyperparams.clear()
            self._runtime.failure.note(
                StateError("backward was interrupted after overlapped updates of some units")
            )

    # -- saving beside training ------------------------------------------------------------------------------

    def hold(self) -> HeldState:
        """Keep updates away from the state as it is now until it has been read, group by group.

        Raises:
            TransferError: an update failed; the cause is chained.
        """
        self.wait_held()
        self.synchronize()
        for state in self._placed.states:
            state.check_outside_write()
        *units, outside = self._placed.groups
        units.sort(key=self._place)
        if self.overlapped:  # as backward goes, then `step`
            order = [*reversed(units), outside]
        else:  # what a step waits for there and then comes first
            order = [outside, *sorted(units, key=lambda group: not group.home.updates_at_once)]
        self.held = HeldState(self._placed.groups, order, self._runtime.device)
        return self.held

    def wait_held(self) -> None:
        """Wait until what is being saved has been read, before state is changed by others than updates."""
        if self.held is not None:
            self.held.wait_host()
            self.held = None
