"""Optimizers, the rules that they update by, and the state that these need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedModelError
from .adamw import SlideAdamW
from .lion import SlideLion
from .optimizer import SlideOptimizer
from .sgd import SlideSGD

# All that there are; the first is what training is planned for where nothing is known of the optimizer.
OPTIMIZERS: tuple[type[SlideOptimizer], ...] = (SlideAdamW, SlideLion, SlideSGD)


def optimizer_class(kind: Any) -> type[SlideOptimizer] | None:
    """The optimizer that does what a class of optimizers does: one of ours, or a user's own of these, is it itself.

    None if there is none.
    """
    if isinstance(kind, type) and issubclass(kind, SlideOptimizer):
        return kind
    return next((one for one in OPTIMIZERS if one.same_as is not None and kind is one.same_as), None)


def check_name(name: str) -> type[SlideOptimizer]:
    """The optimizer that a value of `TrainingArguments.optim` stands for.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = next((one for one in OPTIMIZERS if name in one.trainer_names), None)
    if found is None:
        names = [repr(name) for one in OPTIMIZERS for name in one.trainer_names]
        raise UnsupportedModelError(f"optim={name!r} cannot update streamed parameters; use {_listed(names)}")
    return found


def check_adoptable(optimizer: torch.optim.Optimizer) -> type[SlideOptimizer]:
    """The class that `adopt` makes of `optimizer`.

    Raises:
        UnsupportedModelError: another optimizer, an option that changes its mathematics, or steps that were made.
        StateError: it has lost its state.
    """
    kind = optimizer_class(type(optimizer))
    if kind is None:
        raise UnsupportedModelError(_refusal(type(optimizer)))
    kind.check_adoptable(optimizer)
    return kind


def check_class(kind: type, options: Mapping[str, Any]) -> type[SlideOptimizer]:
    """The same for a class that is yet to be called with these options."""
    found = optimizer_class(kind)
    if found is None:
        raise UnsupportedModelError(_refusal(kind))
    found.check_options(options)
    return found


def adopt(optimizer: torch.optim.Optimizer) -> SlideOptimizer:
    """An optimizer of ours over the parameter groups of a fresh one of torch; one of ours is returned as it is.

    Raises:
        UnsupportedModelError, StateError: as `check_adoptable`.
    """
    return check_adoptable(optimizer).adopt(optimizer)


def _refusal(kind: type) -> str:
    theirs = [f"torch.optim.{one.same_as.__name__}" for one in OPTIMIZERS if one.same_as is not None]
    names = [repr(name) for one in OPTIMIZERS for name in one.trainer_names]
    return (
        f"{getattr(kind, '__name__', kind)} cannot update streamed parameters; use {_listed(theirs)} or "
        f"{_listed([f'hf_slideformer.{one.__name__}' for one in OPTIMIZERS])} (TrainingArguments: optim="
        f"{_listed(names)})"
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


__all__ = [
    "OPTIMIZERS",
    "SlideAdamW",
    "SlideLion",
    "SlideSGD",
    "SlideOptimizer",
    "adopt",
    "check_adoptable",
    "check_class",
    "check_name",
    "optimizer_class",
]
