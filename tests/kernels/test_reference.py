"""The reference against exact arithmetic (fractions), against torch.optim.AdamW, and its split master."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from slideformer_kernels import (
    AdamWScalars,
    LionScalars,
    SGDScalars,
    adamw_,
    adamw_scalars,
    dequantize_moments,
    lion_scalars,
    quantize_moments,
    reference,
    sgd_scalars,
)
from update_cases import BY_NAME, CASES, CODES, clone, codes_of, moments_of

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


def exact_sqrt(value: float) -> np.float32:
    """Return the correctly rounded square root of an fp32 value, in integer arithmetic."""
    # isqrt of value * 4**150 keeps over 100 bits; the lowest bit says "not exact", so that no tie is made up.
    shifted = Fraction(value) * 4**150
    root = math.isqrt(int(shifted))
    sticky = Fraction(root) + (Fraction(1, 2) if root * root != shifted else 0)
    return round_to_fp32(sticky / 2**150)


def fp32(exact: Fraction) -> Fraction:
    """Return the fp32 value that one operation with this exact result gives."""
    return Fraction(float(round_to_fp32(exact)))


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


def exact_adamw(s: AdamWScalars, p: Fraction, g: Fraction, m: Fraction, v: Fraction) -> tuple[Fraction, ...]:
    m = fp32(Fraction(s.one_minus_beta1) * fp32(g - m) + m)
    v = fp32(fp32(Fraction(s.one_minus_beta2) * g) * g + fp32(Fraction(s.beta2) * v))
    root = Fraction(float(exact_sqrt(float(v))))
    d = fp32(root * Fraction(s.inv_bias_correction2_sqrt) + Fraction(s.eps))
    return fp32(p * Fraction(s.decay) + fp32(-Fraction(s.step_size) * fp32(m / d))), m, v


def exact_lion(s: LionScalars, p: Fraction, g: Fraction, m: Fraction) -> tuple[Fraction, ...]:
    c = fp32(Fraction(s.beta1) * m + fp32(Fraction(s.one_minus_beta1) * g))
    sign = (c > 0) - (c < 0)
    p = fp32(p * Fraction(s.decay) - Fraction(s.step_size) * sign)
    return p, fp32(Fraction(s.beta2) * m + fp32(Fraction(s.one_minus_beta2) * g))


def exact_sgd(s: SGDScalars, p: Fraction, g: Fraction, *b: Fraction) -> tuple[Fraction, ...]:
    u = d = fp32(Fraction(s.weight_decay) * p + g)
    if b:
        u = new = fp32(Fraction(s.momentum) * b[0] + fp32(Fraction(s.one_minus_dampening) * d))
        if s.nesterov:
            u = fp32(Fraction(s.momentum) * new + d)
        b = (new,)
    return (fp32(-Fraction(s.step_size) * u + p), *b)


EXACT = {
    "adamw": exact_adamw,
    "lion": exact_lion,
    "sgd": exact_sgd,
    "sgd_momentum": exact_sgd,
    "sgd_nesterov": exact_sgd,
}


@pytest.mark.parametrize("name", EXACT)
def test_update_is_the_documented_sequence_of_roundings(name, start_of):
    """Element by element in exact arithmetic with one rounding for each documented operation."""
    case = BY_NAME[f"{name}-fp32"]
    state = start_of(case, 400, torch.bfloat16, seed=3, gentle=True)
    scalars = case.scalars(3, 0.1)
    scale = np.float32(0.37)

    expected = []
    columns = [state[name].float().tolist() for name in state]
    for p, g, *moments in (map(Fraction, row) for row in zip(*columns, strict=True)):
        g = fp32(g * Fraction(float(scale)))
        expected.append([float(value) for value in EXACT[name](scalars, p, g, *moments)])
    case.apply(reference, state, scalars, float(scale))
    for name, values in zip(
        [name for name in state if name != "grad"], zip(*expected, strict=True), strict=True
    ):
        assert state[name].tolist() == list(values), name


def test_a_decayed_weight_is_rounded_once():
    # The change is small beside the weight, and its own roundings smaller still.
    generator = torch.Generator().manual_seed(4)
    start, grad = 1 + torch.rand(400, generator=generator), torch.randn(400, generator=generator)
    scalars = adamw_scalars(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=1)
    param, moments = start.clone(), moments_of(400)
    reference.adamw_((param,), grad, moments, scalars)
    exp_avg, exp_avg_sq = (moment.double() for moment in moments.values())
    root = exp_avg_sq.sqrt() * scalars.inv_bias_correction2_sqrt + scalars.eps
    exact = start.double() * scalars.decay - scalars.step_size * exp_avg / root
    half_a_unit = 2.0**-24  # of weights between 1 and 2
    assert (param.double() - exact).abs().max() <= 1.001 * half_a_unit


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_update_agrees_with_torch_adamw(weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5000, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, foreach=False
    )
    ours, moments = start.clone(), moments_of(5000)
    (hi, lo), split_moments = reference.split_master(start), moments_of(5000)
    for step in range(1, 11):
        grad = torch.randn(5000, generator=generator)
        theirs.grad = grad.clone()
        optimizer.step()
        scalars = adamw_scalars(
            lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=weight_decay, step=step
        )
        reference.adamw_((ours,), grad, moments, scalars)
        reference.adamw_((hi, lo), grad, split_moments, scalars)
    state = optimizer.state[theirs]
    # A few roundings of values near 1 in each of ten steps; a wrong bias correction is off by 1e-3 or more.
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(moments["exp_avg"], state["exp_avg"], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(moments["exp_avg_sq"], state["exp_avg_sq"], rtol=2e-6, atol=1e-9)
    assert torch.equal(reference.join_master(hi, lo), ours)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_agrees_with_its_formula(weight_decay):
    generator = torch.Generator().manual_seed(0)
    ours, moments = torch.randn(5000, generator=generator), {"exp_avg": torch.zeros(5000)}
    (hi, lo), split_moments = reference.split_master(ours), clone(moments)
    p, m = ours.double(), torch.zeros(5000, dtype=torch.float64)
    for step in range(1, 11):
        grad = torch.randn(5000, generator=generator)
        p = p * (1 - 1e-2 * weight_decay) - 1e-2 * (0.9 * m + (1 - 0.9) * grad).sign()
        m = 0.95 * m + (1 - 0.95) * grad
        scalars = lion_scalars(lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=weight_decay, step=step)
        reference.lion_((ours,), grad, moments, scalars)
        reference.lion_((hi, lo), grad, split_moments, scalars)
    torch.testing.assert_close(ours.double(), p, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments["exp_avg"].double(), m, rtol=1e-6, atol=1e-7)
    assert torch.equal(reference.join_master(hi, lo), ours)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)],
)
def test_sgd_agrees_with_torch(momentum, dampening, nesterov, weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5000, generator=generator)
    options = {
        "lr": 1e-2,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
    }
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theirs], foreach=False, **options)
    # The first step does not read the buffer.
    moments = {"momentum_buffer": torch.full((5000,), math.nan)} if momentum else {}
    ours, (hi, lo), split_moments = start.clone(), reference.split_master(start), clone(moments)
    for step in range(1, 11):
        grad = torch.randn(5000, generator=generator)
        theirs.grad = grad.clone()
        optimizer.step()
        scalars = sgd_scalars(step=step, **options)
        reference.sgd_((ours,), grad, moments, scalars)
        reference.sgd_((hi, lo), grad, split_moments, scalars)
        if step == 1 and momentum and not weight_decay:
            assert torch.equal(moments["momentum_buffer"], grad)
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-6, atol=1e-6)
    if momentum:
        buffer = optimizer.state[theirs]["momentum_buffer"]
        torch.testing.assert_close(moments["momentum_buffer"], buffer, rtol=2e-6, atol=2e-6)
    assert torch.equal(reference.join_master(hi, lo), ours)


@pytest.mark.parametrize("name", ["sgd-split", "sgd_momentum-split", "sgd_nesterov-split"])
def test_sgd_nan_becomes_the_one_nan(name, start_of):
    case = BY_NAME[name]
    state = start_of(case, 4, torch.float32, gentle=True)
    state["grad"][1] = math.nan
    case.apply(reference, state, case.scalars(2, 0.1))
    assert state["hi"].isnan().tolist() == [False, True, False, False]
    assert state["hi"].view(torch.int16)[1] == 0x7FC0 and state["lo"][1] == 0
    if "momentum_buffer" in state:
        assert state["momentum_buffer"].view(torch.int32)[1] == 0x7FC00000


def test_lion_moves_by_the_learning_rate_or_not_at_all():
    param, exp_avg = torch.ones(7), torch.tensor([0.0, -0.0, 0.0, 1.0, math.nan, 0.0, 0.0])
    grad = torch.tensor([0.0, -0.0, 1e-45, -9.5, 1.0, math.nan, math.inf])
    scalars = lion_scalars(lr=0.25, beta1=0.9, beta2=0.5, weight_decay=0.5, step=1)
    reference.lion_((param,), grad, {"exp_avg": exp_avg}, scalars)
    # 1e-45 is too small for one tenth of it to be a number. A NaN has no sign and must not be taken for zero.
    assert param[:4].tolist() == [0.875, 0.875, 0.875, 1.125]
    assert param.view(torch.int32)[4:6].tolist() == [0x7FC00000] * 2
    assert param[6] == 0.625 and exp_avg[6] == math.inf
    assert exp_avg.view(torch.int32)[4:6].tolist() == [0x7FC00000] * 2


def test_8bit_moments_are_the_documented_sequence_of_roundings(make_state):
    """Codes, scales and what is read from them, in exact arithmetic with one rounding for each operation."""
    state = make_state(300, torch.float32, seed=8, gentle=True)
    m, v = state["exp_avg"], state["exp_avg_sq"]
    v[3], m[5], v[200] = 0.0, -0.0, 1e-45
    codes = quantize_moments(m, v)
    read = dequantize_moments(*codes)

    def expected(values: list[float], levels: int, floor: int) -> tuple[list[int], list[float], list[float]]:
        codes, scales, read = [], [], []
        for start in range(0, len(values), 128):
            block = [Fraction(value) for value in values[start : start + 128]]
            scale = max(abs(value) for value in block)
            inverse = fp32(levels * 2**20 / scale)
            for value in block:
                root = Fraction(float(exact_sqrt(float(fp32(abs(value) * inverse)))))
                low_bits = int(np.float32(float(value)).view(np.int32)) % 1024
                # Fraction rounds half to even.
                q = max((round(root) + low_bits) // 1024, floor if value else 0)
                codes.append(-q if value < 0 else q)
                unit = fp32(q * q * fp32(Fraction(1, levels)))
                read.append(math.copysign(float(fp32(unit * scale)), value if codes[-1] else 0.0))
            scales.append(float(scale))
        return codes, scales, read

    codes_m, scales_m, read_m = expected(m.tolist(), 127**2, 0)
    assert codes[0].tolist() == codes_m and codes[1].tolist() == scales_m
    assert read[0].tolist() == read_m and not read[0].view(torch.int32)[5]
    roots = [float(exact_sqrt(value)) for value in v.tolist()]
    codes_v, scales_v, read_r = expected(roots, 255**2, 1)
    assert codes[2].tolist() == codes_v and codes[3].tolist() == scales_v
    assert read[1].tolist() == [float(fp32(Fraction(r) ** 2)) for r in read_r]


def test_the_edges_of_8bit_moments_are_met(make_8bit_edges):
    """Ties go to the even root where that decides about the code; the smallest scale is kept, the one below not."""
    (state, scalars), (short, short_scalars) = make_8bit_edges()
    case = BY_NAME["adamw_8bit-fp32"]
    case.apply(reference, state, scalars)
    for block, name in enumerate(("exp_avg", "exp_avg_sq", "exp_avg_sq")):
        x = state["grad"][128 * block : 128 * block + 127].abs()
        root, low_bits = 1024 * x.double().sqrt().float(), x.view(torch.int32) & 1023
        lower, even, upper = (
            (f(root).int() + low_bits) >> 10 for f in (torch.floor, torch.round, torch.ceil)
        )
        assert (root % 1 == 0.5).all() and torch.equal(lower + 1, upper)
        assert torch.equal(state[name][128 * block : 128 * block + 127].int().abs(), even)
    assert state["exp_avg_scale"].tolist() == [127.0**2, 255.0**2, 255.0**2, 2.0**-90, 0.0]
    assert state["exp_avg_sq_scale"].tolist()[:3] == [127.0**2, 255.0**2, 255.0**2]
    case.apply(reference, short, short_scalars)
    assert short["exp_avg_sq_scale"][1] == math.inf and short["exp_avg_sq_scale"][0].isfinite()


def test_an_8bit_step_is_an_fp32_step_between_reading_and_storing(make_8bit_state, assert_same_bits):
    fp32, split = BY_NAME["adamw_8bit-fp32"], BY_NAME["adamw_8bit-split"]
    for gentle in (True, False):
        state = make_8bit_state(3000, torch.bfloat16, seed=2, gentle=gentle)
        scalars = adamw_scalars(**SCALARS, step=7)
        weight, grad = state["weight"].clone(), state["grad"]
        moments = dequantize_moments(*(state[name] for name in CODES))
        reference.adamw_((weight,), grad, moments_of(*moments), scalars, 0.7)
        split_state = clone(split.select(state))
        split.apply(reference, split_state, scalars, 0.7)
        fp32.apply(reference, state, scalars, 0.7)
        assert_same_bits(state["weight"], weight, "weight")
        assert_same_bits(reference.join_master(split_state["hi"], split_state["lo"]), weight, "split master")
        for name, stored in zip(CODES, quantize_moments(*moments), strict=True):
            assert_same_bits(state[name], stored, name)
            assert_same_bits(split_state[name], stored, f"{name} with a split master")


def blocks_of(numel: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return moments over 6 decades within each block and 30 decades between blocks."""
    generator = torch.Generator().manual_seed(seed)
    decades = torch.randint(-15, 15, (-(-numel // 128),), generator=generator)
    scale = (10.0 ** decades.float()).repeat_interleave(128)[:numel]
    m = torch.randn(numel, generator=generator) * 10 ** (-6 * torch.rand(numel, generator=generator))
    r = torch.randn(numel, generator=generator).abs() * 10 ** (-6 * torch.rand(numel, generator=generator))
    return m * scale, (r * scale).square()


def test_quantisation_error_is_bounded():
    """With |y - q| <= 1 for y = sqrt(|x| * L / scale): |y**2 - q**2| <= 2 * q + 1.

    So a value is off by (2 * |q| + 1) / 16129 or (2 * q + 1) / 65025 of its block's largest: 1.6 and 0.8 % at
    the top, one code. That holds for the floor of 1, too: it is off by less than 1.
    """
    numel = 20_001
    m, v = blocks_of(numel, seed=0)
    codes_m, scale_m, codes_v, scale_v = quantize_moments(m, v)
    assert codes_m.dtype == torch.int8 and codes_v.dtype == torch.uint8
    read_m, read_v = dequantize_moments(codes_m, scale_m, codes_v, scale_v)
    roundings = 1 + 2.0**-20
    for values, codes, scale, read, levels in (
        (m.double(), codes_m, scale_m, read_m.double(), 127**2),
        (v.double().sqrt(), codes_v, scale_v, read_v.double().sqrt(), 255**2),
    ):
        assert scale.shape == (157,)
        scale = scale.double().repeat_interleave(128)[:numel]
        bound = (2 * codes.double().abs() + 1) * scale / levels * roundings
        assert ((read - values).abs() <= bound).all()
        # And the bound is not generous: somewhere nearly all of it is needed.
        assert ((read - values).abs() / bound).max() > 0.95
        assert (codes.double().abs() <= math.isqrt(levels)).all()
    assert (codes_m.sign() * m.sign() >= 0).all()
    # The largest of each block is kept exactly.
    largest = torch.nn.functional.pad(m, (0, -numel % 128)).view(-1, 128).abs().amax(1)
    assert torch.equal(scale_m, largest)
    assert torch.equal(
        torch.nn.functional.pad(read_m, (0, -numel % 128)).view(-1, 128).abs().amax(1), largest
    )


def test_no_denominator_is_lost():
    m, v = blocks_of(20_000, seed=1)
    v[::7] = 0.0
    v[1::7] *= 1e-20
    codes = quantize_moments(m, v)
    assert torch.equal(codes[2] > 0, v > 0)
    tiny = codes[2][1::7][v[1::7] > 0]
    assert len(tiny) > 2000 and (tiny == 1).all()
    # A gradient that vanishes beside large ones: the next steps stay within Adam's own bound.
    param, grad = torch.zeros(128), torch.ones(128)
    grad[0] = 1e-9
    codes = codes_of(128)
    for step in range(1, 4):
        before = param.clone()
        scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-20, weight_decay=0.0, step=step)
        reference.adamw_((param,), grad, codes, scalars)
        assert ((param - before).abs() <= 1.1e-3).all()


def test_rounding_is_fair():
    """Values that differ in their low bits only are read as their mean, whatever the fraction of their code."""
    generator = torch.Generator().manual_seed(0)
    low_bits = torch.randint(0, 1024, (1000, 127), dtype=torch.int32, generator=generator)
    for fraction in (0.1, 0.37, 0.5, 0.9):
        for code in (0, 3, 60, 125):
            m = torch.ones(1000, 128)
            value = torch.tensor((code + fraction) ** 2 / 127**2).view(torch.int32)
            m[:, 1:] = ((value & ~1023) | low_bits).view(torch.float32)
            codes = quantize_moments(m, m.square())[0][:, 1:].double()
            assert codes.unique().tolist() == [code, code + 1]
            # 127,000 codes: a standard deviation of their mean is below 0.0015. The low bits are worth 0.008.
            assert (codes - code).mean().item() == pytest.approx(fraction, abs=0.015)


@pytest.fixture
def take_step(assert_same_bits):
    """Take one step with fp32 and one with 8-bit moments in the C kernels, which take a hundredth of the time.

    Each fiftieth step is taken by the reference too and must have its bits; `test_cpu` compares them in general.
    """

    def step(theirs, moments, ours, codes, their_grad, our_grad, number, scalars):
        for param, grad, state in ((theirs, their_grad, moments), (ours, our_grad, codes)):
            expected, expected_state = param.clone(), clone(state)
            adamw_((param,), grad, state, scalars, threads=1)
            if number % 50 == 1:
                reference.adamw_((expected,), grad, expected_state, scalars)
                assert_same_bits(param, expected, f"step {number}")
                for name in state:
                    assert_same_bits(state[name], expected_state[name], f"step {number} {name}")

    return step


def test_second_moments_fall_and_rise_beside_their_neighbours(take_step):
    """Rounded to nearest, the ratios of a block's second moments freeze: a step moves them by less than a code.

    Half of the elements see gradients 10 times smaller from step 300 on. With beta2 = 0.99 their second
    moments fall to 2 % by step 700, and those of the other half stay.
    """
    generator = torch.Generator().manual_seed(0)
    param, theirs = torch.zeros(2048), torch.zeros(2048)
    moments, codes = moments_of(2048), codes_of(2048)
    for step in range(1, 701):
        grad = torch.randn(2048, generator=generator)
        if step > 300:
            grad.view(-1, 128)[:, :64] *= 0.1
        scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=step)
        take_step(theirs, moments, param, codes, grad, grad, step, scalars)
    ratio = (dequantize_moments(*codes.values())[1] / moments["exp_avg_sq"]).sqrt().view(-1, 128)
    assert ratio[:, :64].mean().item() == pytest.approx(1.0, abs=0.05)
    assert ratio[:, 64:].mean().item() == pytest.approx(1.0, abs=0.02)


def test_quantising_again_changes_nothing(assert_same_bits):
    """Codes and scales survive being read and stored, for scales of every exponent at which v is normal."""
    generator = torch.Generator().manual_seed(0)
    blocks = 5000
    codes_m = torch.randint(-127, 128, (blocks, 128), dtype=torch.int8, generator=generator)
    codes_v = torch.randint(1, 256, (blocks, 128), dtype=torch.uint8, generator=generator)
    codes_v[:, 5] = 0
    codes_m[:, 0], codes_v[:, 1] = 127, 255
    mantissas = 1 + torch.rand(2, blocks, generator=generator)
    scale_m = mantissas[0] * 2.0 ** torch.randint(-90, 127, (blocks,), generator=generator)
    # r = scale / 65025 at code 1 and its square are normal numbers from 2**-47 on.
    scale_v = mantissas[1] * 2.0 ** torch.randint(-47, 63, (blocks,), generator=generator)
    stored = (codes_m, scale_m, codes_v, scale_v)
    for actual, expected in zip(quantize_moments(*dequantize_moments(*stored)), stored, strict=True):
        assert_same_bits(actual, expected)


def test_zero_moments_and_tiny_scales():
    zeros = quantize_moments(torch.zeros(3, 100), torch.zeros(3, 100))
    assert [tuple(x.shape) for x in zeros] == [(3, 100), (3,), (3, 100), (3,)]
    assert not any(x.any() for x in zeros)
    assert not any(x.any() for x in dequantize_moments(*zeros))
    assert [x.numel() for x in quantize_moments(torch.zeros(0), torch.zeros(0))] == [0] * 4
    # The smallest scale, and the value below it.
    m = torch.zeros(256)
    m[7], m[130] = -(2.0**-90), 2.0**-90 * (1 - 2.0**-24)
    v = torch.zeros(256)
    v[7] = 2.0**-149
    codes_m, scale_m, codes_v, scale_v = quantize_moments(m, v)
    assert scale_m.tolist() == [2.0**-90, 0.0]
    assert codes_m[7] == -127 and codes_m.count_nonzero() == 1
    # The square root of the smallest denormal is no small scale.
    assert codes_v[7] == 255 and scale_v.tolist() == [np.float32(math.sqrt(2.0**-149)), 0.0]
    assert dequantize_moments(codes_m, scale_m, codes_v, scale_v)[1][7] == 2.0**-149


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_gradient_that_is_not_finite_poisons_its_block_only(bad):
    grad, param = torch.ones(400), torch.zeros(400)
    grad[130] = bad
    codes = codes_of(400)
    reference.adamw_((param,), grad, codes, adamw_scalars(**SCALARS, step=1))
    # This step's parameters follow the exact moments: one of them is lost.
    assert param.isnan().nonzero().flatten().tolist() == [130]
    codes_m, scale_m, codes_v, scale_v = codes.values()
    nan_bits, inf_bits = 0x7FC00000, 0x7F800000
    expected = (nan_bits, nan_bits) if math.isnan(bad) else (inf_bits, inf_bits)
    assert (scale_m.view(torch.int32)[1].item(), scale_v.view(torch.int32)[1].item()) == expected
    assert not codes_m[128:256].any() and not codes_v[128:256].any()
    is_bad = torch.zeros(400, dtype=torch.bool)
    is_bad[128:256] = True
    for read in dequantize_moments(*codes.values()):
        assert torch.equal(read.isnan(), is_bad)
        assert (read.view(torch.int32)[is_bad] == nan_bits).all()
    reference.adamw_((param,), torch.ones(400), codes, adamw_scalars(**SCALARS, step=2))
    assert torch.equal(param.isnan(), is_bad)
    assert scale_m.isnan().tolist() == scale_v.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_8bit_moments_follow_the_trajectory_of_fp32_moments(beta2, take_step):
    """200 steps down a noisy quadratic whose curvatures and noise differ by decades within each block.

    Both see the same noise. The distance between them stays below 6 % of the way gone (up to 4.2 % over 4
    seeds when this was written), and so does the difference of their losses relative to the loss gained.
    """
    generator = torch.Generator().manual_seed(0)
    curvature, noise = torch.randn(2, 1000, generator=generator).exp()
    target = torch.randn(1000, generator=generator)
    ours, theirs = torch.zeros(1000), torch.zeros(1000)
    moments, codes = moments_of(1000), codes_of(1000)

    def loss(x: torch.Tensor) -> float:
        return (curvature * (x - target).square()).sum().item() / 2

    start = loss(theirs)
    for step in range(1, 201):
        scalars = adamw_scalars(lr=1e-2, beta1=0.9, beta2=beta2, eps=1e-8, weight_decay=0.0, step=step)
        z = noise * torch.randn(1000, generator=generator) / 2
        their_grad, our_grad = (curvature * (x - target) + z for x in (theirs, ours))
        take_step(theirs, moments, ours, codes, their_grad, our_grad, step, scalars)
        assert (ours - theirs).norm() <= 0.06 * theirs.norm(), step
        assert abs(loss(ours) - loss(theirs)) <= 0.06 * (start - loss(theirs)) + 1e-4 * start, step
    assert loss(ours) < 0.15 * start


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
    moments = moments_of(4)
    reference.adamw_((hi, lo), grad, moments, adamw_scalars(**SCALARS, step=1))
    assert hi.isnan().tolist() == [True, True, False, True]
    assert [hi.view(torch.int16)[i].item() for i in (0, 1, 3)] == [0x7FC0] * 3
    assert [lo[i].item() for i in (0, 1, 3)] == [0] * 3
    assert moments["exp_avg"].view(torch.int32)[0].item() == 0x7FC00000
    assert moments["exp_avg_sq"].tolist()[1] == math.inf


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_do_not_change_an_update(case, start_of, assert_same_bits, monkeypatch):
    whole, cut = start_of(case, 5003, torch.float32), start_of(case, 5003, torch.float32)
    case.apply(reference, whole, case.scalars(2, 0.1))
    monkeypatch.setattr(reference, "CHUNK_NUMEL", 1024)
    case.apply(reference, cut, case.scalars(2, 0.1))
    for name in whole:
        assert_same_bits(cut[name], whole[name], name)


def test_chunks_do_not_change_conversions_and_sums(make_state, assert_same_bits, monkeypatch):
    state = make_state(5003, torch.float32)

    def results() -> list[torch.Tensor]:
        codes = quantize_moments(state["exp_avg"], state["exp_avg_sq"])
        total = reference.sum_of_squares(state["weight"][256:1024])
        return [*codes, *dequantize_moments(*codes), torch.tensor(total)]

    whole = results()
    monkeypatch.setattr(reference, "CHUNK_NUMEL", 1024)
    for actual, expected in zip(results(), whole, strict=True):
        assert_same_bits(actual, expected)


def test_bad_moments_are_refused_with_numbers():
    codes = quantize_moments(torch.zeros(300), torch.zeros(300))
    with pytest.raises(ValueError, match="quantize_moments: exp_avg_sq has 299 elements, exp_avg has 300"):
        quantize_moments(torch.zeros(300), torch.zeros(299))
    with pytest.raises(ValueError, match="quantize_moments: exp_avg has dtype torch.bfloat16"):
        quantize_moments(torch.zeros(300).bfloat16(), torch.zeros(300))
    with pytest.raises(
        ValueError, match="dequantize_moments: exp_avg has dtype torch.uint8, wanted torch.int8"
    ):
        dequantize_moments(codes[2], *codes[1:])
    with pytest.raises(
        ValueError, match="dequantize_moments: exp_avg_scale has 3 elements, 100 codes want 1"
    ):
        dequantize_moments(codes[0][:100], codes[1], codes[2][:100], codes[3])


def test_a_parameter_that_requires_grad_is_updated():
    param = torch.nn.Parameter(torch.ones(3))
    reference.adamw_((param,), torch.ones(3), moments_of(3), adamw_scalars(**SCALARS, step=1))
    assert (param < 1).all() and param.grad_fn is None
