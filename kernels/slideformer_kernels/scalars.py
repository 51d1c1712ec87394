"""The numbers of one step of each update rule that are the same for every element.

They are computed once on the host in float64 and rounded once to fp32, so that every kernel (reference, C,
Triton) starts from the same bits whatever it runs on.
"""

import ctypes
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdamWScalars:
    """Per-step scalars of AdamW; every value is a Python float that fp32 holds exactly.

    Attributes:
        decay: ``1 - lr * weight_decay``, multiplies the parameter.
        one_minus_beta1: weight of the new gradient in ``exp_avg``.
        beta2: weight of the old ``exp_avg_sq``.
        one_minus_beta2: weight of the new squared gradient.
        inv_bias_correction2_sqrt: ``1 / sqrt(1 - beta2 ** step)``.
        eps: added to the denominator after the bias correction.
        step_size: ``lr / (1 - beta1 ** step)``.
    """

    decay: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    inv_bias_correction2_sqrt: float
    eps: float
    step_size: float


@dataclass(frozen=True, slots=True)
class LionScalars:
    """Per-step scalars of Lion; every value is a Python float that fp32 holds exactly.

    Attributes:
        decay: ``1 - lr * weight_decay``, multiplies the parameter.
        beta1: weight of ``exp_avg`` in what decides about the direction.
        one_minus_beta1: weight of the new gradient in that.
        beta2: weight of the old ``exp_avg`` in the new one.
        one_minus_beta2: weight of the new gradient in it.
        step_size: the learning rate.
    """

    decay: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float


@dataclass(frozen=True, slots=True)
class SGDScalars:
    """Per-step scalars of SGD; every number is a Python float that fp32 holds exactly.

    Attributes:
        weight_decay: how much of the parameter is added to the gradient.
        momentum: weight of the old ``momentum_buffer`` in the new one; 0 where there is none.
        one_minus_dampening: weight of the gradient in it.
        nesterov: whether the step goes along the gradient plus ``momentum`` times the buffer.
        is_first: whether the buffer becomes the gradient, whatever it was.
        step_size: the learning rate.
    """

    weight_decay: float
    momentum: float
    one_minus_dampening: float
    nesterov: bool
    is_first: bool
    step_size: float


Scalars = AdamWScalars | LionScalars | SGDScalars
"""Those of any rule."""


def round_to_fp32(value: float) -> float:
    """Return ``value`` rounded to the nearest fp32 (ties to even), as a Python float."""
    return ctypes.c_float(value).value


def kernel_arguments(scalars: Scalars) -> tuple[float, ...]:
    """Return the scalars in the order of their fields: flags as 0 or 1, the step size, which is last, negated."""
    *others, step_size = (float(getattr(scalars, name)) for name in scalars.__slots__)
    return (*others, -step_size)


def adamw_scalars(
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> AdamWScalars:
    """Compute the scalars of one AdamW step (Loshchilov & Hutter 2019, arXiv 1711.05101, Alg. 2).

    Args:
        lr: learning rate of this step, finite and not negative.
        beta1: decay rate of ``exp_avg``, in [0, 1).
        beta2: decay rate of ``exp_avg_sq``, in [0, 1).
        eps: finite and not negative.
        weight_decay: decoupled weight decay, finite and not negative.
        step: this parameter's step count, the first step being 1.

    Returns:
        The scalars, each rounded once from float64 to fp32.

    Raises:
        ValueError: if an argument is outside its range.
    """
    _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
    _check_rates(beta1=beta1, beta2=beta2)
    _check_step(step)
    return AdamWScalars(
        decay=round_to_fp32(1.0 - lr * weight_decay),
        one_minus_beta1=round_to_fp32(1.0 - beta1),
        beta2=round_to_fp32(beta2),
        one_minus_beta2=round_to_fp32(1.0 - beta2),
        inv_bias_correction2_sqrt=round_to_fp32(1.0 / math.sqrt(1.0 - beta2**step)),
        eps=round_to_fp32(eps),
        step_size=round_to_fp32(lr / (1.0 - beta1**step)),
    )


def lion_scalars(*, lr: float, beta1: float, beta2: float, weight_decay: float, step: int) -> LionScalars:
    """Compute the scalars of one Lion step (Chen et al. 2023, arXiv 2302.06675, Alg. 2).

    Args:
        lr: learning rate of this step, finite and not negative.
        beta1: weight of ``exp_avg`` against the gradient in the direction, in [0, 1).
        beta2: decay rate of ``exp_avg``, in [0, 1).
        weight_decay: decoupled weight decay, finite and not negative.
        step: this parameter's step count, the first step being 1; all steps are alike.

    Returns:
        The scalars, each rounded once from float64 to fp32.

    Raises:
        ValueError: if an argument is outside its range.
    """
    _check_not_negative(lr=lr, weight_decay=weight_decay)
    _check_rates(beta1=beta1, beta2=beta2)
    _check_step(step)
    return LionScalars(
        decay=round_to_fp32(1.0 - lr * weight_decay),
        beta1=round_to_fp32(beta1),
        one_minus_beta1=round_to_fp32(1.0 - beta1),
        beta2=round_to_fp32(beta2),
        one_minus_beta2=round_to_fp32(1.0 - beta2),
        step_size=round_to_fp32(lr),
    )


def sgd_scalars(
    *, lr: float, momentum: float, dampening: float, nesterov: bool, weight_decay: float, step: int
) -> SGDScalars:
    """Compute the scalars of one SGD step, as ``torch.optim.SGD`` has it.

    Args:
        lr: learning rate of this step, finite and not negative.
        momentum: decay rate of ``momentum_buffer``, finite and not negative; with 0 there is no buffer.
        dampening: how much less than 1 the gradient counts in the buffer, finite.
        nesterov: whether to look ahead (Sutskever et al. 2013); wants momentum and no dampening.
        weight_decay: coupled: added to the gradient as that of an L2 penalty; finite and not negative.
        step: this parameter's step count, the first step being 1: it sets the buffer to the gradient.

    Returns:
        The scalars, numbers rounded once from float64 to fp32.

    Raises:
        ValueError: if an argument is outside its range.
    """
    _check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
    _check_step(step)
    if not math.isfinite(dampening):
        raise ValueError(f"dampening must be finite, got {dampening}")
    if nesterov and (momentum == 0.0 or dampening != 0.0):
        raise ValueError(
            f"nesterov wants momentum above 0 and dampening=0, got momentum={momentum} and dampening={dampening}"
        )
    return SGDScalars(
        weight_decay=round_to_fp32(weight_decay),
        momentum=round_to_fp32(momentum),
        one_minus_dampening=round_to_fp32(1.0 - dampening),
        nesterov=bool(nesterov),
        is_first=step == 1,
        step_size=round_to_fp32(lr),
    )


def _check_not_negative(**arguments: float) -> None:
    for name, value in arguments.items():
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def _check_rates(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


def _check_step(step: int) -> None:
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
