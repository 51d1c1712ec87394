"""Clipping by the global norm, without touching gradients: the coefficient is applied inside the update."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch

from ..errors import StateError
from ..optim.state import ParamState
from .gradients import Gradients


class Clipping:
    """Clip coefficients that are known and not used yet.

    Args:
        states: of all parameters, in registration order.
        device: where units compute.
        overlapped: updates start before the norm is known, so that it is only reported.
    """

    def __init__(self, states: Sequence[ParamState], device: torch.device, *, overlapped: bool) -> None:
        self._states = states
        self._device = device
        self._overlapped = overlapped
        # By parameter: the gradient that was clipped, its version then, and the coefficient.
        self._clipped: dict[int, tuple[weakref.ref[torch.Tensor], int, float]] = {}

    def clip(
        self, gradients: Gradients, params: Sequence[torch.Tensor], max_norm: float, norm_type: float
    ) -> torch.Tensor:
        """See `SlideEngine.clip_grad_norm_`."""
        if self._overlapped and math.isfinite(max_norm):
            raise StateError(
                f"clip_grad_norm_(max_norm={max_norm}) after overlapped updates have started; use "
                "SlideConfig(update='deferred')"
            )
        given = {id(param) for param in params}
        pending = [state for state in self._states if gradients.landed(state)]
        if norm_type != 2.0 or any(id(state.param) not in given for state in pending):
            self.apply(self._states)
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
        squares = [gradients.squared_norm(state) for state in pending]
        if self._overlapped:
            total = torch.zeros((), dtype=torch.float64, device=self._device)
            for square in squares:
                total = total + square
            return total.sqrt().to(torch.float32)
        scales = [self.scale_of(state) for state in pending]
        norm = math.sqrt(sum(sq * scale * scale for sq, scale in zip(_to_host(squares), scales, strict=True)))
        # The same arithmetic as torch's, infinities and NaN included.
        coefficient = float("nan") if math.isinf(norm) and math.isinf(max_norm) else max_norm / (norm + 1e-6)
        if not coefficient >= 1.0:
            for state, scale in zip(pending, scales, strict=True):
                grad = state.param.grad
                assert grad is not None
                self._clipped[state.order] = (
                    weakref.ref(grad),
                    grad._version,
                    _round_to_fp32(scale * coefficient),
                )
        return torch.tensor(norm, dtype=torch.float32)

    def scale_of(self, state: ParamState) -> float:
        """The coefficient that a parameter's pending gradient still has to be multiplied by.

        Raises:
            StateError: the gradient was edited after it was clipped.
        """
        entry, grad = self._clipped.get(state.order), state.param.grad
        if entry is None or grad is None or entry[0]() is not grad:
            return 1.0
        _, version, scale = entry
        if grad._version != version:
            if not grad.any():  # zero_grad(set_to_none=False): discarded, not edited
                return 1.0
            raise StateError(
                f"the gradient of {state.name} was edited after clip_grad_norm_, which multiplies gradients by its "
                "coefficient only inside the update; edit gradients before clipping"
            )
        return scale

    def take_scale(self, state: ParamState) -> float:
        """The same, for who multiplies by it now."""
        scale = self.scale_of(state)
        self._clipped.pop(state.order, None)
        return scale

    def apply(self, states: Sequence[ParamState]) -> None:
        """Multiply pending gradients by their coefficients now."""
        with torch.no_grad():
            for state in states:
                if state.param.grad is not None and (scale := self.take_scale(state)) != 1.0:
                    state.param.grad.mul_(scale)

    def clear(self) -> None:
        """Forget what was not used."""
        self._clipped.clear()


def _to_host(values: list[torch.Tensor | float]) -> list[float]:
    """Bring device scalars to the host in one copy, order kept."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    fetched = iter(torch.stack([t.to(torch.float64) for t in tensors]).tolist() if tensors else ())
    return [next(fetched) if isinstance(value, torch.Tensor) else value for value in values]


def _round_to_fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
