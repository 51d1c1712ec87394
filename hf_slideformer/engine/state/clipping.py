"""Clipping by the global norm, without touching gradients: the coefficient is applied inside the update."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from slideformer_kernels import sum_of_squares
from torch import nn

from ...errors import StateError
from ...optim.state import ParamState
from .parameters import unguarded


class GradientNorms(Protocol):
    """What is known of gradients that wait for their update."""

    def landed(self, state: ParamState) -> bool:
        """Whether the parameter has a gradient in this step."""
        ...

    def squared_norm(self, state: ParamState) -> torch.Tensor | float:
        """Its sum of squares: a float, or a 0-dim float64 device tensor."""
        ...


class Clipping:
    """Clip coefficients that are known and not used yet.

    Args:
        states: of all parameters, in registration order.
        device: where units compute.
        overlapped: updates start before the norm is known, so that it is only reported.

    Attributes:
        gradients: of these parameters; None until there is an optimizer.
    """

    def __init__(self, states: Sequence[ParamState], device: torch.device, *, overlapped: bool) -> None:
        self._states = states
        self.device = device
        self.overlapped = overlapped
        self.gradients: GradientNorms | None = None
        # By parameter: the gradient that was clipped, its version then, and the coefficient.
        self._clipped: dict[int, tuple[weakref.ref[torch.Tensor], int, float]] = {}

    def pending(self) -> list[ParamState]:
        """Parameters that have a gradient in this step."""
        return [] if self.gradients is None else [s for s in self._states if self.gradients.landed(s)]

    def squares(self, states: Sequence[ParamState]) -> list[torch.Tensor | float]:
        """Sum of squares of each gradient, its unused coefficient left out."""
        assert self.gradients is not None
        return [self.gradients.squared_norm(state) for state in states]

    def multiply(self, states: Sequence[ParamState], scales: Sequence[float]) -> None:
        """Note the coefficients that updates are to multiply gradients by."""
        for state, scale in zip(states, scales, strict=True):
            grad = state.param.grad
            assert grad is not None
            self._clipped[state.order] = (weakref.ref(grad), grad._version, _round_to_fp32(scale))

    def apply_all(self) -> None:
        """Multiply all pending gradients by their coefficients now."""
        self.apply(self._states)

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


def clip_grad_norm_(
    models: Sequence[Clipping], params: Sequence[torch.Tensor], max_norm: float, norm_type: float
) -> torch.Tensor:
    """Clip the joint norm of gradients, those of streamed models and any others, as torch's function of that name does.

    Streamed models' gradients are not touched: their coefficient is applied inside the update. Per parameter the sum of
    squares has one fixed summation tree; they are added in float64, models' parameters in registration order.

    Args:
        models: those that some of `params` belong to.
        params: normally all of each model's; a part of one is clipped in place by torch's own function.
        max_norm: the largest norm; inf only measures.
        norm_type: 2.0, or any other norm by torch's own function.

    Returns:
        The norm before clipping, 0-dim fp32. Of one model with overlapped updates it lives on the device and is not
        waited for.

    Raises:
        StateError: a finite `max_norm` after overlapped updates have started.
    """
    if math.isfinite(max_norm) and any(model.overlapped for model in models):
        raise StateError(
            f"clip_grad_norm_(max_norm={max_norm}) after overlapped updates have started; use "
            "SlideConfig(update='deferred')"
        )
    with unguarded(param for param in params if isinstance(param, nn.Parameter)):
        return _clip(models, params, max_norm, norm_type)


def _clip(
    models: Sequence[Clipping], params: Sequence[torch.Tensor], max_norm: float, norm_type: float
) -> torch.Tensor:
    given = {id(param) for param in params}
    pending = [model.pending() for model in models]
    if norm_type != 2.0 or any(id(state.param) not in given for states in pending for state in states):
        for model in models:
            model.apply_all()
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    owned = {id(state.param) for states in pending for state in states}
    others = [param.grad for param in params if id(param) not in owned and param.grad is not None]
    squares = [
        square for model, states in zip(models, pending, strict=True) for square in model.squares(states)
    ]
    if len(models) == 1 and models[0].overlapped and not others:
        total = torch.zeros((), dtype=torch.float64, device=models[0].device)
        for square in squares:
            total = total + square
        return total.sqrt().to(torch.float32)
    scales = [
        model.scale_of(state) for model, states in zip(models, pending, strict=True) for state in states
    ]
    values = _to_host([*squares, *map(_squared_norm, others)])
    known = [*scales, *(1.0 for _ in others)]
    norm = math.sqrt(sum(square * scale * scale for square, scale in zip(values, known, strict=True)))
    # The same arithmetic as torch's, infinities and NaN included.
    coefficient = float("nan") if math.isinf(norm) and math.isinf(max_norm) else max_norm / (norm + 1e-6)
    if not coefficient >= 1.0:
        remaining = iter(scales)
        for model, states in zip(models, pending, strict=True):
            model.multiply(states, [next(remaining) * coefficient for _ in states])
        with torch.no_grad():
            for grad in others:
                grad.mul_(coefficient)
    return torch.tensor(norm, dtype=torch.float32)


def _squared_norm(grad: torch.Tensor) -> torch.Tensor | float:
    grad = grad.detach()
    if grad.layout is torch.strided and grad.dtype in (torch.float32, torch.bfloat16):
        return sum_of_squares(grad.contiguous())
    return torch.linalg.vector_norm(grad.to_dense() if grad.is_sparse else grad, dtype=torch.float64) ** 2


def _to_host(values: Sequence[torch.Tensor | float]) -> list[float]:
    """Bring device scalars to the host in one copy for each device, order kept."""
    fetched: list[float] = [0.0] * len(values)
    places: dict[torch.device, list[int]] = {}
    for position, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            places.setdefault(value.device, []).append(position)
        else:
            fetched[position] = value
    for positions in places.values():
        stacked = torch.stack([values[position].to(torch.float64) for position in positions])  # type: ignore[union-attr]
        for position, value in zip(positions, stacked.tolist(), strict=True):
            fetched[position] = value
    return fetched


def _round_to_fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
