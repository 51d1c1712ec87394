"""The per-step scalars: float64 arithmetic, rounded once."""

import math
import struct
from fractions import Fraction

import pytest
from slideformer_kernels import AdamWScalars, adamw_scalars

ARGUMENTS = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 7}


def is_fp32(value: float) -> bool:
    return struct.unpack("f", struct.pack("f", value))[0] == value


def test_every_scalar_is_an_fp32_value():
    scalars = adamw_scalars(**ARGUMENTS)
    for name in AdamWScalars.__slots__:
        value = getattr(scalars, name)
        assert isinstance(value, float) and is_fp32(value), name


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


def test_no_decay_is_exactly_one():
    assert adamw_scalars(**{**ARGUMENTS, "weight_decay": 0.0}).decay == 1.0


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
def test_bad_arguments_are_refused_with_their_value(name, value):
    with pytest.raises(ValueError, match=name):
        adamw_scalars(**{**ARGUMENTS, name: value})
