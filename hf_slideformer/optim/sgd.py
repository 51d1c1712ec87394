"""SGD with momentum, as `torch.optim.SGD` has it: coupled weight decay, dampening, Nesterov's look ahead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from slideformer_kernels import sgd_
from slideformer_kernels.scalars import SGDScalars, sgd_scalars

from ..errors import ConfigError, StateError, UnsupportedModelError
from ..memory.layout import MomentFormat, MomentPart
from .optimizer import SlideOptimizer, parsed_arguments
from .rule import UpdateRule

NO_MOMENTS = MomentFormat("sgd", ())
SGD_MOMENTS = MomentFormat("sgd-momentum", (MomentPart("momentum_buffer", torch.float32),))


@dataclass(frozen=True, slots=True)
class SGDHyperparams:
    """A snapshot of one parameter group at one step."""

    lr: float
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float


@dataclass(frozen=True, slots=True)
class SGDRule:
    """See `UpdateRule`; `format` is one of the two here."""

    format: MomentFormat = NO_MOMENTS
    name: str = "SGD"
    counts_steps: bool = False

    @property
    def readable(self) -> tuple[MomentFormat, ...]:
        """See `UpdateRule`: momentum goes on only from momentum."""
        return (self.format,)

    def hyperparams(self, group: Mapping[str, Any]) -> SGDHyperparams:
        """See `UpdateRule`; tensors become Python floats. Without momentum there is nothing to look ahead with."""
        momentum = float(group["momentum"])
        if momentum and not self.format.parts:
            raise StateError(
                f"a parameter group has momentum={momentum:g}, but the model was prepared for SGD without momentum, "
                "which keeps no buffers; prepare it with an optimizer that has momentum from the start"
            )
        return SGDHyperparams(
            float(group["lr"]),
            momentum,
            float(group["dampening"]),
            bool(group["nesterov"]) and momentum != 0.0,
            float(group["weight_decay"]),
        )

    def scalars(self, hyperparams: SGDHyperparams, step: int) -> SGDScalars:
        """See `UpdateRule`."""
        return sgd_scalars(
            lr=hyperparams.lr,
            momentum=hyperparams.momentum,
            dampening=hyperparams.dampening,
            nesterov=hyperparams.nesterov,
            weight_decay=hyperparams.weight_decay,
            step=step,
        )

    def apply(
        self,
        masters: tuple[torch.Tensor, ...],
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        scalars: SGDScalars,
        grad_scale: float,
        threads: int | None,
    ) -> None:
        """See `UpdateRule`; groups without momentum leave the buffers that others need alone."""
        sgd_(masters, grad, moments if scalars.momentum else {}, scalars, grad_scale, threads=threads)

    def convert(self, moments: Mapping[str, torch.Tensor], have: MomentFormat) -> dict[str, torch.Tensor]:
        """See `UpdateRule`: nothing is converted."""
        return dict(moments)


class SlideSGD(SlideOptimizer):
    """SGD whose weights, masters and momentum may live anywhere; otherwise like `torch.optim.SGD`.

    Without momentum in any group there is no state besides the masters.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: decay rate of the momentum; 0 for none.
        dampening: how much less than 1 the gradient counts in the momentum.
        weight_decay: coupled weight decay (an L2 penalty).
        nesterov: look ahead; wants momentum and no dampening.

    Raises:
        ValueError: a hyperparameter outside its range.
    """

    rule_name = "SGD"
    same_as = torch.optim.SGD
    trainer_names = ("sgd",)

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if float(lr) < 0.0:
            raise ValueError(f"lr must be >= 0, got {lr}")
        if not (momentum >= 0.0 and math.isfinite(momentum)):
            raise ValueError(f"momentum must be finite and >= 0, got {momentum}")
        if not math.isfinite(dampening):
            raise ValueError(f"dampening must be finite, got {dampening}")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
        if nesterov and (momentum <= 0.0 or dampening != 0.0):
            raise ValueError(
                f"nesterov wants momentum above 0 and dampening=0, got momentum={momentum} and dampening={dampening}"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
            },
        )

    @classmethod
    def rule_for(cls, groups: Sequence[Mapping[str, Any]], optimizer_states: str) -> UpdateRule:
        """See `SlideOptimizer`."""
        if optimizer_states != "fp32":
            raise ConfigError(
                f"optimizer_states={optimizer_states!r} is for AdamW; SGD keeps a momentum in fp32, 4 bytes per "
                "parameter, or nothing"
            )
        has_momentum = any(group.get("momentum", 0.0) for group in groups)
        return SGDRule(SGD_MOMENTS if has_momentum else NO_MOMENTS)

    @classmethod
    def arguments_of(cls, args: Any) -> dict[str, Any]:
        """See `SlideOptimizer`; `optim_args="momentum=0.9, nesterov=True"`, for one."""
        given = parsed_arguments(
            args.optim_args, momentum=float, dampening=float, weight_decay=float, nesterov=_truth
        )
        return {"lr": args.learning_rate, **given}

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """See `SlideOptimizer`."""
        for option in ("maximize", "differentiable"):
            if options.get(option):
                raise UnsupportedModelError(f"SGD's option {option}=True is not supported; leave it off")
        if options.get("nesterov") and options.get("momentum") and options.get("dampening"):
            raise UnsupportedModelError(
                f"SGD with nesterov=True wants dampening=0, got dampening={options['dampening']}"
            )


def _truth(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise ValueError(text)
