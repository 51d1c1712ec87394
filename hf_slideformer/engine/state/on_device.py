"""On the device: the home of parameters that live there altogether, updated by a kernel where they are."""

from __future__ import annotations

import weakref

import torch

from ...errors import StateError
from ...memory.runtime import Runtime
from ...memory.transfer import Handle
from ...optim.rule import UpdateRule, zero_moments
from ...optim.state import ParamState
from .home import Home, Step


class OnDevice(Home):
    """Parameters with tensors of their own on the device, whose gradients autograd fills.

    Args:
        runtime: of the model.
    """

    updates_at_once = True

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        # Gradients that the last step used, to notice a missing zero_grad.
        self._used: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def allocate(self, rule: UpdateRule, *, overlapped: bool, fp32_sums: bool) -> None:
        """See `Home`; gradients are where autograd puts them."""
        for state in self.states:
            if state.spec.trainable:
                state.rule = rule
                state.moments = state.moments or zero_moments(rule.format, state.spec, self._runtime.device)

    def before_sum(self, state: ParamState) -> None:
        """See `Home`."""
        used = self._used.pop(state.order, None)
        grad = state.param.grad
        if used is not None and grad is not None and grad is used[0]() and grad._version == used[1]:
            raise StateError(
                f"the gradient of {state.name} that the last step used is still there, and the next backward would "
                "add to it, or the next step use it again; call optimizer.zero_grad() after step(): streamed gradients "
                "are not kept over a step"
            )

    def step(self, step: Step) -> Handle | None:
        """See `Home`."""
        for state in self.states:
            grad = state.param.grad
            if grad is not None and step.trains(state):
                self.before_sum(state)
                self.use_up(state, grad, step)
                self._used[state.order] = (weakref.ref(grad), grad._version)
        return None

    def use_up(self, state: ParamState, grad: torch.Tensor, step: Step) -> bool:
        """See `Home`."""
        for handle in step.after:
            handle.wait_host()
        for run in step.plan([state]):
            run.apply(state.weight, state.residual, grad.contiguous(), state.moments, self._runtime.threads)
        state.note_update()
        return True

    def abandon(self) -> None:
        """See `Home`."""
        self._used.clear()
