"""Home: where a group's training state lives between steps, and all that can be asked of it.

There are four: on the device, beside it (weights there, masters in RAM), in RAM, and on disk. Whoever runs, updates,
saves or changes state asks a home, and nobody asks which one it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...memory.buffers import Buffer
from ...memory.lease import Lease
from ...memory.offload import Place
from ...memory.runtime import Runtime
from ...memory.transfer import Handle
from ...optim.rule import UpdateRule
from ...optim.state import ParamState, UpdateRun


@dataclass(frozen=True, slots=True)
class Step:
    """What a home needs to know of the step that updates its parameters.

    Attributes:
        plan: counts a step of parameters that are updated now, and makes runs of them.
        trains: whether the optimizer has a parameter.
        after: done when the state may be changed.
        priority: the update's among those that could run; the lowest first.
    """

    plan: Callable[[Sequence[ParamState]], list[UpdateRun]]
    trains: Callable[[ParamState], bool]
    after: tuple[Handle, ...] = ()
    priority: int = 0


class Reader(Protocol):
    """State that was asked for, to be read beside training; a lease of it."""

    @property
    def ready(self) -> Handle:
        """Done when it can be read."""
        ...

    def parts(self, state: ParamState) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """A parameter's residual and moments, as they are where the state lives; once it is ready."""
        ...

    def release(self, *, after: Handle | None = None) -> None:
        """Let go of it; the second time does nothing."""


class InMemory:
    """`Reader` of state that is in memory anyway."""

    ready = Handle.done()

    def parts(self, state: ParamState) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """See `Reader`."""
        return state.residual, state.moments

    def release(self, *, after: Handle | None = None) -> None:
        """Nothing to do."""


class Home:
    """Where one group's training state lives between steps; its answers are those of state that is in memory.

    Args:
        runtime: of the model.

    Attributes:
        states: of the group's parameters; set once they have been moved here.
        updates_at_once: whether an update is done when `step` returns.
        gradients_can_wait: whether there may be room for gradients that wait for their update.
        disk_bytes: of its files.
    """

    updates_at_once = False
    gradients_can_wait = True
    disk_bytes = 0

    def __init__(self, runtime: Runtime) -> None:
        self.states: Sequence[ParamState] = ()
        self._runtime = runtime

    @property
    def host_bytes(self) -> int:
        """Bytes of RAM that it takes for itself now."""
        return 0

    # -- training ----------------------------------------------------------------------------------------------

    def allocate(self, rule: UpdateRule, *, overlapped: bool, fp32_sums: bool) -> None:
        """Make room for what an optimizer needs, once: moments of zero, and gradients that wait for their update.

        Args:
            rule: of the optimizer.
            overlapped: gradients do not wait.
            fp32_sums: gradients are fp32 from the first micro-batch on.
        """
        raise NotImplementedError

    def source(self, after: Handle | None) -> Lease[Buffer] | None:
        """Ask for the weights that fill a slot, once `after` is done; None where there is nothing to fetch."""
        return None

    def place_for(self, tensor: torch.Tensor) -> Place | None:
        """Where a unit's input may wait for backward; None if there is no such place, or it is in use."""
        return None

    def before_sum(self, state: ParamState) -> None:
        """Called when autograd is about to fill a parameter's gradient, or to add to it.

        Raises:
            StateError: the gradient that the last step used is still there.
        """

    def step(self, step: Step) -> Handle | None:
        """Update the parameters that have gradients, which are used up.

        Returns:
            Done when the weights are new; None if they are, or if there was nothing to update.
        """
        raise NotImplementedError

    def use_up(self, state: ParamState, grad: torch.Tensor, step: Step) -> bool:
        """Update one parameter from a gradient that autograd has just filled; False where that has to wait."""
        return False

    def settle(self) -> None:
        """Block until what an update has left under way is where it belongs.

        Raises:
            TransferError: it failed; the cause is chained.
        """

    def abandon(self) -> None:
        """Forget what belongs to a backward or a step that was interrupted."""

    # -- reading and writing it --------------------------------------------------------------------------------

    def reader(self) -> Reader:
        """Ask for residuals and moments, to be read by a thread beside training."""
        return InMemory()

    def open(self, *, write: bool) -> contextlib.AbstractContextManager[None]:
        """Make residuals and moments of all parameters tensors while the block runs.

        Args:
            write: put changes back where the state lives.

        Raises:
            StateError: inside of another such block.
            TransferError: reading failed; the cause is chained.
        """
        return contextlib.nullcontext()

    def open_residual(
        self, state: ParamState, after: Handle | None
    ) -> contextlib.AbstractContextManager[None]:
        """Make one parameter's residual a tensor that can be read, as it is once `after` is done."""
        return contextlib.nullcontext()

    # -- giving it up ------------------------------------------------------------------------------------------

    def free_for_training(self) -> None:
        """Let go of what only training needs: moments, and gradient buffers."""
        for state in self.states:
            state.moments, state.rule = {}, None

    def free(self) -> None:
        """Let go of everything: the parameters are ordinary ones by now."""
