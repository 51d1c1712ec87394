"""The reference against exact arithmetic (fractions), against torch.optim.AdamW, and its split master."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from slideformer_kernels import adamw_scalars, reference

SCALARS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def round_to_fp32(exact: Fraction) -> np.float32:
    """Round to nearest even fp32 in integer arithmetic, denormals and overflow included."""
    if exact == 0:
        return np.float32(0.0)
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / ulp) * ulp  # Fraction rounds half to even
    value = math.inf if rounded >= Fraction(2) ** 128 else float(rounded)
    return np.float32(-value if exact < 0 else value)


def assert_fma_exact(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    got = reference.fma(a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.numpy(), strict=True):
        expected = round_to_fp32(Fraction(x) * Fraction(y) + Fraction(z))
        assert result == expected, (x, y, z, result, expected)


def test_fma_random_operands():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (3, 3000), dtype=torch.int64, generator=generator)
    values = bits.int().view(torch.float32)
    values = values[:, values.isfinite().all(dim=0)]
    assert_fma_exact(*values)
    # Nearby exponents, where product and addend overlap or cancel.
    near = torch.randn(3, 3000, generator=generator)
    near[2] = -(near[0] * near[1]) * (1 + 2.0 ** torch.randint(-26, 1, (3000,), generator=generator))
    assert_fma_exact(*near)


def test_fma_ties_and_double_rounding():
    """a*b lies on a midpoint of fp32 (or of a denormal) and c only decides on which side the sum falls."""
    one = 1.0 + 2.0**-12  # one * one = 1 + 2**-11 + 2**-24: exactly halfway between two fp32
    rows = []
    for scale in (1.0, 2.0**-100, 2.0**60, 2.0**-126, 2.0**-140):
        for sign in (1.0, -1.0):
            for tiny in (0.0, 1e-45, -1e-45, 2.0**-60 * scale, -(2.0**-60) * scale, 2.0**-30 * scale):
                rows.append((sign * one, one * scale, tiny))
                rows.append((sign * 3.0, scale * (1 + 2.0**-23), tiny))
                rows.append((sign * 2.0**-24, scale, scale + tiny))
                rows.append((sign * 3 * 2.0**-25, scale, scale * (1 + 2.0**-23)))
    a, b, c = torch.tensor(rows, dtype=torch.float32).unbind(1)
    assert_fma_exact(a, b, c)
    # The test means something: computing in float64 and rounding twice fails on these.
    twice = (a.double() * b.double() + c.double()).float()
    assert not torch.equal(twice, reference.fma(a, b, c))


def test_fma_overflow_infinity_and_nan():
    inf, nan, largest = math.inf, math.nan, torch.finfo(torch.float32).max
    cases = [
        (largest, 2.0, -largest, largest),
        (largest, 2.0, 0.0, inf),
        (inf, 1.0, 5.0, inf),
        (1.0, 5.0, -inf, -inf),
        (inf, 1.0, -inf, nan),
        (inf, 0.0, 1.0, nan),
        (nan, 1.0, 1.0, nan),
        (largest, largest, inf, inf),
        (2.0**-149, 0.5, 0.0, 0.0),
        (3 * 2.0**-149, 0.5, 0.0, 2.0**-148),
    ]
    for a, b, c, expected in cases:
        result = reference.fma(torch.tensor([a]), torch.tensor([b]), torch.tensor([c])).item()
        assert result == expected or (math.isnan(result) and math.isnan(expected)), (a, b, c, result)
    negative_zero = reference.fma(torch.tensor([-0.0]), torch.tensor([1.0]), torch.tensor([-0.0]))
    assert math.copysign(1.0, negative_zero.item()) == -1.0


def test_update_is_the_documented_sequence_of_roundings(make_state):
    """Element by element in exact arithmetic with one rounding for each documented operation."""
    state = make_state(400, torch.bfloat16, seed=3, gentle=True)
    scalars = adamw_scalars(**SCALARS, step=3)
    scale = np.float32(0.37)

    def exact_sqrt(v: np.float32) -> np.float32:
        # isqrt of v * 4**100 keeps over 100 bits; the lowest bit says "not exact", so that no tie is made up.
        shifted = Fraction(float(v)) * 4**150
        root = math.isqrt(int(shifted))
        sticky = Fraction(root) + (Fraction(1, 2) if root * root != shifted else 0)
        return round_to_fp32(sticky / 2**150)

    expected = {"param": [], "exp_avg": [], "exp_avg_sq": []}
    columns = [state[k].float().tolist() for k in ("param", "grad", "exp_avg", "exp_avg_sq")]
    for p, g, m, v in (map(Fraction, row) for row in zip(*columns, strict=True)):

        def fp32(exact: Fraction) -> Fraction:
            return Fraction(float(round_to_fp32(exact)))

        g = fp32(g * Fraction(float(scale)))
        m = fp32(Fraction(scalars.one_minus_beta1) * fp32(g - m) + m)
        v = fp32(fp32(Fraction(scalars.one_minus_beta2) * g) * g + fp32(Fraction(scalars.beta2) * v))
        root = Fraction(float(exact_sqrt(np.float32(float(v)))))
        d = fp32(root * Fraction(scalars.inv_bias_correction2_sqrt) + Fraction(scalars.eps))
        p = fp32(-Fraction(scalars.step_size) * fp32(m / d) + fp32(p * Fraction(scalars.decay)))
        for name, value in (("param", p), ("exp_avg", m), ("exp_avg_sq", v)):
            expected[name].append(float(value))
    reference.adamw_fp32_(*state.values(), scalars, float(scale))
    for name, values in expected.items():
        assert state[name].tolist() == values, name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_update_agrees_with_torch_adamw(weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5000, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, foreach=False
    )
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros(5000), torch.zeros(5000)
    hi, lo = reference.split_master(start)
    split_exp_avg, split_exp_avg_sq = torch.zeros(5000), torch.zeros(5000)
    for step in range(1, 11):
        grad = torch.randn(5000, generator=generator)
        theirs.grad = grad.clone()
        optimizer.step()
        scalars = adamw_scalars(
            lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=weight_decay, step=step
        )
        reference.adamw_fp32_(ours, grad, exp_avg, exp_avg_sq, scalars)
        reference.adamw_split_(hi, lo, grad, split_exp_avg, split_exp_avg_sq, scalars)
    state = optimizer.state[theirs]
    # A few roundings of values near 1 in each of ten steps; a wrong bias correction is off by 1e-3 or more.
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=2e-6, atol=1e-9)
    assert torch.equal(reference.join_master(hi, lo), ours)


def test_split_master_round_trips_every_hi_pattern(assert_same_bits):
    """All 65,536 upper halves with low halves around the rounding boundary; NaN becomes the one NaN."""
    upper = torch.arange(65536, dtype=torch.int64)
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD):
        bits = (upper << 16) | lower
        values = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
        hi, lo = reference.split_master(values)
        joined = reference.join_master(hi, lo)
        nan = values.isnan()
        assert_same_bits(joined[~nan], values[~nan], f"lower half {lower:#x}")
        assert (hi.view(torch.int16)[nan] == 0x7FC0).all() and (lo[nan] == 0).all()
        assert (joined.view(torch.int32)[nan] == 0x7FC00000).all()


def test_split_master_rounds_half_up_in_magnitude():
    values = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF], dtype=torch.int32)
    hi, lo = reference.split_master(values.view(torch.float32))
    assert hi.view(torch.int16).tolist() == [0x3F81, 0x3F82, 0x3F80, 0x7F80]
    assert lo.tolist() == [-0x8000, -0x8000, 0x7FFF, -1]
    negative = torch.tensor([-(1 + 2.0**-8)])  # halfway: away from zero, where torch's cast goes to even
    assert reference.split_master(negative)[0].item() == -(1 + 2.0**-7)
    assert negative.bfloat16().item() == -1.0


def test_update_nan_becomes_the_one_nan():
    hi, lo = reference.split_master(torch.ones(4))
    grad = torch.tensor([math.nan, math.inf, 1.0, -math.inf])
    exp_avg, exp_avg_sq = torch.zeros(4), torch.zeros(4)
    reference.adamw_split_(hi, lo, grad, exp_avg, exp_avg_sq, adamw_scalars(**SCALARS, step=1))
    assert hi.isnan().tolist() == [True, True, False, True]
    assert [hi.view(torch.int16)[i].item() for i in (0, 1, 3)] == [0x7FC0] * 3
    assert [lo[i].item() for i in (0, 1, 3)] == [0] * 3
    assert exp_avg.view(torch.int32)[0].item() == 0x7FC00000
    assert exp_avg_sq.tolist()[1] == math.inf


@pytest.mark.parametrize("numel", [0, 1, 31, 1023, 1024, 1025, 100003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sum_of_squares_is_the_documented_tree(numel, dtype):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)

    def halved(row: np.ndarray) -> float:
        while len(row) > 1:
            row = row[: len(row) // 2] + row[len(row) // 2 :]
        return row[0]

    def row_sums(values: np.ndarray) -> np.ndarray:
        padded = np.concatenate([values, np.zeros(-len(values) % 1024)])
        return np.array([halved(row) for row in padded.reshape(-1, 1024)])

    level = row_sums(x.double().numpy() ** 2)
    while len(level) > 1:
        level = row_sums(level)
    expected = float(level[0]) if numel else 0.0
    assert reference.sum_of_squares(x) == expected
    assert expected == pytest.approx(math.fsum((x.double() ** 2).tolist()), rel=1e-14)


def test_sum_of_squares_survives_what_overflows_fp32():
    assert reference.sum_of_squares(torch.full((5,), 1e30)) == pytest.approx(5e60, rel=1e-6)
    assert reference.sum_of_squares(torch.tensor([1.0, math.inf])) == math.inf
    assert math.isnan(reference.sum_of_squares(torch.tensor([1.0, math.nan, math.inf])))


def test_accumulate_adds_in_fp32():
    acc = torch.tensor([1.0, 1.0, math.inf])
    reference.accumulate_(acc, torch.tensor([2.0**-8, 2.0**-20, -math.inf], dtype=torch.bfloat16))
    assert acc[:2].tolist() == [1 + 2.0**-8, 1 + 2.0**-20]
    assert acc.view(torch.int32)[2].item() == 0x7FC00000


def test_chunks_do_not_change_the_result(make_state, assert_same_bits, monkeypatch):
    scalars = adamw_scalars(**SCALARS, step=2)
    whole, cut = make_state(5003, torch.float32), make_state(5003, torch.float32)
    reference.adamw_fp32_(*whole.values(), scalars)
    total = reference.sum_of_squares(whole["param"][256:1024])
    monkeypatch.setattr(reference, "CHUNK_NUMEL", 1024)
    reference.adamw_fp32_(*cut.values(), scalars)
    for name in whole:
        assert_same_bits(cut[name], whole[name], name)
    assert reference.sum_of_squares(whole["param"][256:1024]) == pytest.approx(total, nan_ok=True)


def test_a_parameter_that_requires_grad_is_updated():
    param = torch.nn.Parameter(torch.ones(3))
    state = torch.zeros(3), torch.zeros(3)
    reference.adamw_fp32_(param, torch.ones(3), *state, adamw_scalars(**SCALARS, step=1))
    assert (param < 1).all() and param.grad_fn is None
