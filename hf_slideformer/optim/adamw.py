"""AdamW: decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, Algorithm 2), on fp32 master weights.

Moments are fp32, or 8-bit codes with one scale for each block of elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from slideformer_kernels import adamw_, dequantize_moments, quantize_moments
from slideformer_kernels.scalars import AdamWScalars, adamw_scalars

from ..errors import UnsupportedModelError
from ..memory.layout import EIGHT_BIT_MOMENTS, FP32_MOMENTS, MOMENT_FORMATS, MomentFormat
from .optimizer import SlideOptimizer
from .rule import UpdateRule


@dataclass(frozen=True, slots=True)
class AdamWHyperparams:
    """A snapshot of one parameter group at one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class AdamWRule:
    """See `UpdateRule`; `format` is one of `memory.layout.MOMENT_FORMATS`."""

    format: MomentFormat = FP32_MOMENTS
    name: str = "AdamW"
    readable: tuple[MomentFormat, ...] = (FP32_MOMENTS, EIGHT_BIT_MOMENTS)
    counts_steps: bool = True

    def hyperparams(self, group: Mapping[str, Any]) -> AdamWHyperparams:
        """See `UpdateRule`; tensors become Python floats."""
        beta1, beta2 = group["betas"]
        return AdamWHyperparams(
            float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"])
        )

    def scalars(self, hyperparams: AdamWHyperparams, step: int) -> AdamWScalars:
        """See `UpdateRule`."""
        return adamw_scalars(
            lr=hyperparams.lr,
            beta1=hyperparams.beta1,
            beta2=hyperparams.beta2,
            eps=hyperparams.eps,
            weight_decay=hyperparams.weight_decay,
            step=step,
        )

    def apply(
        self,
        masters: tuple[torch.Tensor, ...],
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        scalars: AdamWScalars,
        grad_scale: float,
        threads: int | None,
    ) -> None:
        """See `UpdateRule`."""
        adamw_(masters, grad, moments, scalars, grad_scale, threads=threads)

    def convert(self, moments: Mapping[str, torch.Tensor], have: MomentFormat) -> dict[str, torch.Tensor]:
        """See `UpdateRule`.

        To 8 bits moments are rounded as an update would round them; to fp32 they become what the next update would
        read.
        """
        given = {name: tensor.contiguous() for name, tensor in moments.items()}
        converted: tuple[torch.Tensor, ...] = (
            quantize_moments(**given) if self.format == EIGHT_BIT_MOMENTS else dequantize_moments(**given)
        )
        return dict(zip([part.name for part in self.format.parts], converted, strict=True))


class SlideAdamW(SlideOptimizer):
    """AdamW whose weights, masters and moments may live anywhere; otherwise like `torch.optim.AdamW`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: a hyperparameter outside its range.
    """

    rule_name = "AdamW"
    same_as = torch.optim.AdamW
    trainer_names = ("adamw_torch", "adamw_torch_fused")

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if float(lr) < 0.0:
            raise ValueError(f"lr must be >= 0, got {lr}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if eps < 0.0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @classmethod
    def rule_for(cls, groups: Sequence[Mapping[str, Any]], optimizer_states: str) -> UpdateRule:
        """See `SlideOptimizer`."""
        return AdamWRule(MOMENT_FORMATS[optimizer_states])

    @classmethod
    def arguments_of(cls, args: Any) -> dict[str, Any]:
        """See `SlideOptimizer`."""
        return {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """See `SlideOptimizer`."""
        for option in ("amsgrad", "maximize", "differentiable"):
            if options.get(option):
                raise UnsupportedModelError(f"AdamW's option {option}=True is not supported; leave it off")
