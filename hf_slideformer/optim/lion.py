"""Lion: the sign of a momentum, with decoupled weight decay (Chen et al. 2023, arXiv 2302.06675, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from slideformer_kernels import lion_
from slideformer_kernels.scalars import LionScalars, lion_scalars

from ..errors import ConfigError
from ..memory.layout import MomentFormat, MomentPart
from .optimizer import SlideOptimizer, parsed_arguments
from .rule import UpdateRule

LION_MOMENTS = MomentFormat("lion", (MomentPart("exp_avg", torch.float32),))


@dataclass(frozen=True, slots=True)
class LionHyperparams:
    """A snapshot of one parameter group at one step."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class LionRule:
    """See `UpdateRule`."""

    format: MomentFormat = LION_MOMENTS
    name: str = "Lion"
    readable: tuple[MomentFormat, ...] = (LION_MOMENTS,)
    counts_steps: bool = False

    def hyperparams(self, group: Mapping[str, Any]) -> LionHyperparams:
        """See `UpdateRule`; tensors become Python floats."""
        beta1, beta2 = group["betas"]
        return LionHyperparams(float(group["lr"]), float(beta1), float(beta2), float(group["weight_decay"]))

    def scalars(self, hyperparams: LionHyperparams, step: int) -> LionScalars:
        """See `UpdateRule`."""
        return lion_scalars(
            lr=hyperparams.lr,
            beta1=hyperparams.beta1,
            beta2=hyperparams.beta2,
            weight_decay=hyperparams.weight_decay,
            step=step,
        )

    def apply(
        self,
        masters: tuple[torch.Tensor, ...],
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        scalars: LionScalars,
        grad_scale: float,
        threads: int | None,
    ) -> None:
        """See `UpdateRule`."""
        lion_(masters, grad, moments, scalars, grad_scale, threads=threads)

    def convert(self, moments: Mapping[str, torch.Tensor], have: MomentFormat) -> dict[str, torch.Tensor]:
        """See `UpdateRule`: there is one format."""
        return dict(moments)


class SlideLion(SlideOptimizer):
    """Lion whose weights, masters and momentum may live anywhere.

    It wants a learning rate 3 to 10 times smaller than AdamW's, and a weight decay as much larger (section 5 of the
    paper).

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: weight of the momentum against the gradient in the direction, and decay rate of the momentum.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: a hyperparameter outside its range.
    """

    rule_name = "Lion"
    trainer_names = ("lion_32bit",)

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if float(lr) < 0.0:
            raise ValueError(f"lr must be >= 0, got {lr}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @classmethod
    def rule_for(cls, groups: Sequence[Mapping[str, Any]], optimizer_states: str) -> UpdateRule:
        """See `SlideOptimizer`."""
        if optimizer_states != "fp32":
            raise ConfigError(
                f"optimizer_states={optimizer_states!r} is for AdamW; Lion keeps its momentum in fp32, 4 bytes per "
                "parameter"
            )
        return LionRule()

    @classmethod
    def arguments_of(cls, args: Any) -> dict[str, Any]:
        """See `SlideOptimizer`; `adam_beta1` and `adam_beta2`, as Trainer does for bitsandbytes' Lion."""
        given = parsed_arguments(args.optim_args, beta1=float, beta2=float)
        return {
            "lr": args.learning_rate,
            "betas": (given.get("beta1", args.adam_beta1), given.get("beta2", args.adam_beta2)),
        }
