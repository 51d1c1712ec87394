"""The per-step scalars: float64 arithmetic, rounded once."""

import math
import struct
from fractions import Fraction

import pytest
from slideformer_kernels import adamw_scalars, lion_scalars, sgd_scalars
from slideformer_kernels.scalars import kernel_arguments

ARGUMENTS = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 7}
LION_ARGUMENTS = {name: value for name, value in ARGUMENTS.items() if name != "eps"}
SGD_ARGUMENTS = {
    **{name: ARGUMENTS[name] for name in ("lr", "weight_decay", "step")},
    "momentum": 0.9,
    "dampening": 0.0,
    "nesterov": True,
}
RULES = [(adamw_scalars, ARGUMENTS), (lion_scalars, LION_ARGUMENTS), (sgd_scalars, SGD_ARGUMENTS)]


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


def test_values_of_sgd_are_the_exact_ones_rounded_once():
    scalars = sgd_scalars(**{**SGD_ARGUMENTS, "nesterov": False, "dampening": 0.3})
    exact = {"weight_decay": 0.1, "momentum": 0.9, "one_minus_dampening": 1 - 0.3, "step_size": 3e-4}
    for name, value in exact.items():
        assert abs(Fraction(getattr(scalars, name)) - Fraction(value)) <= abs(value) * Fraction(1, 2**24), (
            name
        )
    assert not scalars.nesterov and not scalars.is_first
    first = sgd_scalars(**{**SGD_ARGUMENTS, "step": 1})
    assert first.nesterov and first.is_first and kernel_arguments(first)[3:5] == (1.0, 1.0)


def test_nesterov_wants_momentum_and_no_dampening():
    for name, value in (("momentum", 0.0), ("dampening", 0.1)):
        with pytest.raises(ValueError, match=f"nesterov wants .*{name}={value}"):
            sgd_scalars(**{**SGD_ARGUMENTS, name: value})


@pytest.mark.parametrize(("make", "arguments"), RULES[:2])
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
        ("momentum", -0.1),
        ("dampening", math.nan),
    ],
)
@pytest.mark.parametrize(("make", "arguments"), RULES)
def test_bad_arguments_are_refused_with_their_value(make, arguments, name, value):
    if name not in arguments:
        pytest.skip(f"no {name} in this rule")
    with pytest.raises(ValueError, match=name):
        make(**{**arguments, name: value})
