"""The per-step scalars: float64 arithmetic, rounded once."""

import math
import struct
from fractions import Fraction

import pytest
from slideformer_kernels import adamw_scalars, lion_scalars
from slideformer_kernels.scalars import kernel_arguments

ARGUMENTS = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 7}
LION_ARGUMENTS = {name: value for name, value in ARGUMENTS.items() if name != "eps"}
RULES = [(adamw_scalars, ARGUMENTS), (lion_scalars, LION_ARGUMENTS)]


def is_fp32(value: float) -> bool:
    return struct.unpack("f", struct.pack("f", value))[0] == value


@pytest.mark.parametrize(("make", "arguments"), RULES)
def test_every_scalar_is_an_fp32_value(make, arguments):
    scalars = make(**arguments)
    for name in type(scalars).__slots__:
        assert is_fp32(getattr(scalars, name)), name


@pytest.mark.parametrize(("make", "arguments"), RULES)
def test_kernels_get_the_fields_in_order_and_add_the_last(make, arguments):
    scalars = make(**arguments)
    *fields, step_size = (getattr(scalars, name) for name in type(scalars).__slots__)
    assert kernel_arguments(scalars) == (*fields, -step_size)
    assert step_size == scalars.step_size > 0


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6])
def test_values_are_the_exact_ones_rounded_once(step):
    scalars = adamw_scalars(**{**ARGUMENTS, "step": step})
    lr, beta1, beta2, decay = (Fraction(ARGUMENTS[k]) for k in ("lr", "beta1", "beta2", "weight_decay"))
    exact = {
        "decay": 1 - lr * decay,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
    }
    for name, value in exact.items():
        assert abs(Fraction(getattr(scalars, name)) - value) <= abs(value) * Fraction(1, 2**24), name
    # A small excess over half an ulp is float64's own rounding.
    correction2 = 1.0 / math.sqrt(1.0 - 0.999**step)
    assert scalars.inv_bias_correction2_sqrt == pytest.approx(correction2, rel=2**-24 * 1.001)
    assert scalars.step_size == pytest.approx(3e-4 / (1.0 - 0.9**step), rel=2**-24 * 1.001)


def test_values_of_lion_are_the_exact_ones_rounded_once():
    scalars = lion_scalars(**LION_ARGUMENTS)
    lr, beta1, beta2, decay = (Fraction(ARGUMENTS[k]) for k in ("lr", "beta1", "beta2", "weight_decay"))
    exact = {
        "decay": 1 - lr * decay,
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "step_size": lr,
    }
    for name, value in exact.items():
        assert abs(Fraction(getattr(scalars, name)) - value) <= abs(value) * Fraction(1, 2**24), name
    assert scalars == lion_scalars(**{**LION_ARGUMENTS, "step": 1})


@pytest.mark.parametrize(("make", "arguments"), RULES)
def test_no_decay_is_exactly_one(make, arguments):
    assert make(**{**arguments, "weight_decay": 0.0}).decay == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("eps", -1e-8),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("weight_decay", math.inf),
    ],
)
@pytest.mark.parametrize(("make", "arguments"), RULES)
def test_bad_arguments_are_refused_with_their_value(make, arguments, name, value):
    if name not in arguments:
        pytest.skip(f"no {name} in this rule")
    with pytest.raises(ValueError, match=name):
        make(**{**arguments, name: value})
