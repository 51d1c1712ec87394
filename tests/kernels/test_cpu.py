"""Every instruction set of the C kernels against the reference, bit for bit."""

import functools
import math
import struct
import threading
import time

import pytest
import torch
from slideformer_kernels import adamw_scalars, build, cpu, reference
from update_cases import BY_NAME, CASES, CASES_8BIT, CODES, SIZES, STEPS, Case, State, clone

GRAD_DTYPES = [torch.bfloat16, torch.float32]
SPLIT_CASES = [case for case in CASES if case.is_split]

pytestmark = pytest.mark.skipif(not build.is_available(), reason="no C compiler")


@pytest.fixture(scope="module")
def expected_states(start_of):
    """Compute the start and the reference's state after each step, once for all instruction sets."""

    @functools.cache
    def compute(case: Case, numel: int, grad_dtype: torch.dtype) -> tuple[State, list[State]]:
        start = start_of(case, numel, grad_dtype)
        state, after = clone(start), []
        for step, grad_scale, weight_decay in STEPS:
            case.apply(reference, state, case.scalars(step, weight_decay), grad_scale)
            after.append(clone(state))
        return start, after

    return compute


@pytest.mark.parametrize(
    ("case", "numel"), [(case, numel) for case in CASES for numel in case.sizes], ids=str
)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_updates_have_the_reference_bits(isa, numel, grad_dtype, case, expected_states, assert_same_bits):
    start, after = expected_states(case, numel, grad_dtype)
    state = clone(start)
    for (step, grad_scale, weight_decay), expected in zip(STEPS, after, strict=True):
        case.apply(cpu, state, case.scalars(step, weight_decay), grad_scale, threads=2)
        for name in state:
            assert_same_bits(state[name], expected[name], f"step {step} {name}")


def test_edges_of_8bit_moments_have_the_reference_bits(isa, make_8bit_edges, assert_same_bits):
    case = BY_NAME["adamw_8bit-fp32"]
    for ours, scalars in make_8bit_edges():
        theirs = clone(ours)
        case.apply(cpu, ours, scalars)
        case.apply(reference, theirs, scalars)
        for name in ours:
            assert_same_bits(ours[name], theirs[name], name)


@pytest.mark.parametrize("case", CASES_8BIT, ids=str)
def test_many_steps_on_8bit_moments_have_the_reference_bits(isa, case, start_of, assert_same_bits):
    """What one step stores the next one reads, and gradients change by decades between steps."""
    ours = start_of(case, 5000, torch.bfloat16, seed=3, gentle=True)
    for name in case.rule.formats[case.kernel]:
        ours[name].zero_()
    theirs = clone(ours)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 61):
        grad = torch.randn(5000, generator=generator) * torch.randn(5000, generator=generator).exp()
        grad[(torch.arange(5000) // 500) == step % 10] = 0.0
        ours["grad"] = theirs["grad"] = grad.bfloat16()
        case.apply(cpu, ours, case.scalars(step, 0.1), threads=2)
        case.apply(reference, theirs, case.scalars(step, 0.1))
    for name in ours:
        assert_same_bits(ours[name], theirs[name], name)
    assert min(len(ours[name].unique()) for name in ("exp_avg", "exp_avg_sq")) > 150


@pytest.mark.parametrize("numel", SIZES)
def test_other_kernels_have_the_reference_bits(isa, numel, make_state, assert_same_bits):
    state = make_state(numel, torch.float32, seed=5)
    hi, lo = cpu.split_master(state["weight"], threads=2)
    expected_hi, expected_lo = reference.split_master(state["weight"])
    assert_same_bits(hi, expected_hi, "hi")
    assert_same_bits(lo, expected_lo, "lo")
    assert_same_bits(cpu.join_master(hi, lo, threads=2), reference.join_master(hi, lo), "joined")
    for dtype in GRAD_DTYPES:
        ours, theirs = state["exp_avg"].clone(), state["exp_avg"].clone()
        cpu.accumulate_(ours, state["grad"].to(dtype), threads=2)
        reference.accumulate_(theirs, state["grad"].to(dtype))
        assert_same_bits(ours, theirs, f"accumulated {dtype}")
        for is_first in (True, False):
            grad, both = state["grad"].to(dtype), state["exp_avg"].clone()
            squares = cpu.accumulate_squared_(both, grad, is_first=is_first, threads=2)
            expected = grad.float() if is_first else theirs
            assert_same_bits(both, expected, f"{is_first=} {dtype}")
            assert bits_of(squares) == bits_of(reference.sum_of_squares(expected))
        for gentle in (True, False):
            x = make_state(numel, dtype, seed=6, gentle=gentle)["grad"]
            ours, theirs = cpu.sum_of_squares(x, threads=2), reference.sum_of_squares(x)
            assert ours == theirs or (math.isnan(ours) and math.isnan(theirs)), (ours, theirs)


def bits_of(value: float) -> bytes:
    """All NaN are one."""
    return struct.pack("d", math.nan if math.isnan(value) else value)


def test_split_and_join_all_hi_patterns(isa, assert_same_bits):
    upper = torch.arange(65536, dtype=torch.int64)
    for lower in (0x0000, 0x7FFF, 0x8000, 0xFFFF):
        bits = (upper << 16) | lower
        values = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
        hi, lo = cpu.split_master(values)
        expected_hi, expected_lo = reference.split_master(values)
        assert_same_bits(hi, expected_hi, f"hi of {lower:#x}")
        assert_same_bits(lo, expected_lo, f"lo of {lower:#x}")
        assert_same_bits(cpu.join_master(hi, lo), reference.join_master(hi, lo), f"{lower:#x}")


def test_sum_of_squares_of_several_levels(isa):
    x = torch.randn(1024 * 1024 + 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert cpu.sum_of_squares(x) == reference.sum_of_squares(x)


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_unaligned_buffers(isa, case, start_of, assert_same_bits):
    # 2049 elements have 17 scales, 2048 have 16: cutting off one of each leaves operands that fit.
    state = start_of(case, 2049)
    ours = {name: tensor[1:].view(-1) for name, tensor in clone(state).items()}
    theirs = {name: tensor[1:].clone() for name, tensor in state.items()}
    case.apply(cpu, ours, case.scalars(1, 0.0))
    case.apply(reference, theirs, case.scalars(1, 0.0))
    for name in ours:
        assert_same_bits(ours[name], theirs[name], name)


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
@pytest.mark.parametrize("numel", [1037, 1152])
def test_nothing_beyond_the_end_is_written(isa, case, numel, start_of):
    state = start_of(case, 1500, gentle=True)
    before = clone(state)
    ends = {name: -(-numel // 128) if name.endswith("_scale") else numel for name in state}
    case.apply(cpu, {name: tensor[: ends[name]] for name, tensor in state.items()}, case.scalars(1, 0.0))
    for name, end in ends.items():
        assert torch.equal(state[name][end:], before[name][end:]), name
        if name not in ("grad", "lo"):
            assert not torch.equal(state[name][:end], before[name][:end]), name


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_number_of_threads_does_not_change_bits(case, start_of, assert_same_bits):
    start = start_of(case, 300_007)
    results = []
    for threads in (1, 2, 3, 7, 16):
        state = clone(start)
        case.apply(cpu, state, case.scalars(4, 0.1), 0.5, threads=threads)
        results.append((state, cpu.sum_of_squares(state["grad"][6000:], threads=threads)))
    for state, norm in results[1:]:
        assert norm == results[0][1]
        for name in state:
            assert_same_bits(state[name], results[0][0][name], name)


def small_state(case: Case) -> State:
    """Make operands whose update has denormal numbers before, in between and after."""
    weight = torch.full((300,), 1e-40)
    grad = weight.clone()
    moments = torch.full((2, 300), 1e-40)
    codes = (moments[0], torch.zeros(3), moments[1], torch.zeros(3))
    if case.is_8bit:  # denormal second moments by way of a small scale
        grad = torch.full((300,), 2.0**-66).bfloat16()
        codes = reference.quantize_moments(*torch.full((2, 300), 2.0**-66))
    return case.select({"weight": weight, "grad": grad, **dict(zip(CODES, codes, strict=True))})


def test_flush_to_zero_of_the_caller_does_not_matter(isa, assert_same_bits):
    """torch.set_flush_denormal sets the mode of the calling thread; it must be as before afterwards."""
    cases = [case for case in CASES if not case.is_split]
    states = [small_state(case) for case in cases]
    expected = [clone(state) for state in states]
    for case, state in zip(cases, expected, strict=True):
        case.apply(reference, state, case.scalars(1, 0.0))
        if not case.is_8bit:
            written = [tensor for name, tensor in state.items() if name != "grad"]
            assert any(((tensor > 0) & (tensor < 1e-39)).all() for tensor in written), case
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        for case, state in zip(cases, states, strict=True):
            case.apply(cpu, state, case.scalars(1, 0.0))
        still_flushed = (torch.tensor([1e-40]) * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert still_flushed
    for case, state, wanted in zip(cases, states, expected, strict=True):
        for name in state:
            assert_same_bits(state[name], wanted[name], f"{case} {name}")


def test_the_gil_is_released(make_state):
    """Another Python thread makes progress during one long call."""
    x = torch.ones(30_000_000, dtype=torch.bfloat16)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(100):
            begin = time.perf_counter()
            assert cpu.sum_of_squares(x, threads=1) == 30_000_000
            end = time.perf_counter()
            if any(begin + 0.002 < t < end - 0.002 for t in list(ticks)):
                return
    finally:
        stop.set()
        thread.join()
    raise AssertionError("no tick inside any call")


def test_in_place_writes_are_seen_by_autograd():
    weight = torch.nn.Parameter(torch.ones(4))
    loss = (weight * weight).sum()
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    moments = {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    cpu.adamw_((weight,), torch.ones(4), moments, scalars)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_that_an_update_writes_is_marked_as_written(case, start_of):
    state = start_of(case, 200, gentle=True)
    versions = {name: tensor._version for name, tensor in state.items()}
    case.apply(cpu, state, case.scalars(1, 0.0))
    written = {name for name, tensor in state.items() if tensor._version > versions[name]}
    assert written == set(state) - {"grad"}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("module", [cpu, reference])
def test_bad_operands_of_updates_are_refused_with_numbers(module, case, start_of):
    good = start_of(case, 300, gentle=True)
    scalars = case.scalars(1, 0.0)
    first = next(iter(good))
    mistakes = [
        ("grad", good["grad"].half(), "grad has dtype torch.float16, wanted torch.bfloat16 or torch.float32"),
        ("grad", torch.zeros(600)[::2], "grad is not contiguous"),
        ("grad", good["grad"][:299], f"grad has 299 elements, {first} has 300"),
        ("grad", good["grad"].to("meta"), f"grad is on meta, {first} is on cpu"),
        (first, good[first].double(), f"{first} has dtype torch.float64"),
    ]
    for name in case.rule.formats[case.kernel]:
        if not name.endswith("_scale"):
            mistakes += [
                (name, good[name][:299], f"{name} has 299 elements, {first} has 300"),
                (name, good[name].short(), f"{name} has dtype torch.int16, wanted {good[name].dtype}"),
            ]
    for name, bad, message in mistakes:
        with pytest.raises(ValueError, match=f"{case.rule.name}: {message}"):
            case.apply(module, {**good, name: bad}, scalars)
    update = getattr(module, case.rule.name)
    with pytest.raises(
        ValueError, match=f"{case.rule.name}: masters are 3 tensors, wanted .weight,. or .hi, lo"
    ):
        update([torch.zeros(300)] * 3, good["grad"], {}, scalars)
    with pytest.raises(ValueError, match=f"{case.rule.name}: moments are velocity, wanted "):
        update([torch.zeros(300)], good["grad"], {"velocity": torch.zeros(300)}, scalars)
    with pytest.raises(
        TypeError, match=f"{case.rule.name}: scalars are tuple, wanted {type(scalars).__name__}"
    ):
        case.apply(module, good, ())


@pytest.mark.parametrize("module", [cpu, reference])
def test_a_buffer_is_wanted_with_momentum_and_refused_without(module, start_of):
    for name, other, message in (
        ("sgd-fp32", "sgd_momentum-fp32", "with momentum=0.8999.* moments are none, wanted momentum_buffer"),
        ("sgd_momentum-fp32", "sgd-fp32", "with momentum=0.0 moments are momentum_buffer, wanted none"),
    ):
        state = start_of(BY_NAME[name], 300, gentle=True)
        with pytest.raises(ValueError, match=f"sgd_: {message}"):
            BY_NAME[name].apply(module, state, BY_NAME[other].scalars(1, 0.0))


@pytest.mark.parametrize("case", CASES_8BIT, ids=str)
@pytest.mark.parametrize("module", [cpu, reference])
def test_bad_scales_are_refused_with_numbers(module, case, start_of):
    good = start_of(case, 300, gentle=True)
    zeros = {"exp_avg_scale": torch.zeros(3), "exp_avg_sq_scale": torch.zeros(3)}
    for bad, message in (
        ({"exp_avg_scale": torch.zeros(300)}, "exp_avg_sq_scale has 3 elements, exp_avg_scale has 300"),
        ({"exp_avg_sq_scale": torch.zeros(2)}, "exp_avg_sq_scale has 2 elements, exp_avg_scale has 3"),
        ({"exp_avg_scale": torch.zeros(3).bfloat16()}, "exp_avg_scale has dtype torch.bfloat16"),
        ({"exp_avg_sq_scale": torch.zeros(6)[::2]}, "exp_avg_sq_scale is not contiguous"),
        ({name: torch.zeros(4) for name in zeros}, "exp_avg_scale has 4 elements, 300 codes want 3"),
        ({name: x.to("meta") for name, x in zeros.items()}, "exp_avg_scale is on meta, exp_avg is on cpu"),
    ):
        with pytest.raises(ValueError, match=f"adamw_: {message}"):
            case.apply(module, {**good, **bad}, case.scalars(1, 0.0))


def test_bad_arguments_are_refused_with_numbers():
    values, grad = torch.zeros(6), torch.zeros(6)
    for module in (cpu, reference):
        with pytest.raises(ValueError, match="out hi has 5 elements, fp32 has 6"):
            module.split_master(values, out=(torch.zeros(5).bfloat16(), torch.zeros(6).short()))
        with pytest.raises(ValueError, match="lo has 5 elements, hi has 6"):
            module.join_master(torch.zeros(6).bfloat16(), torch.zeros(5).short())
        with pytest.raises(ValueError, match="x has dtype torch.float64"):
            module.sum_of_squares(values.double())
        with pytest.raises(ValueError, match="acc has dtype torch.bfloat16"):
            module.accumulate_(values.bfloat16(), grad)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        cpu.accumulate_(values, grad, threads=0)
    with pytest.raises(ValueError, match="wanted cpu"):
        cpu.sum_of_squares(values.to("meta"))


def test_unknown_isa_is_refused(monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, "avx1024")
    with pytest.raises(ValueError, match="avx1024"):
        cpu.sum_of_squares(torch.ones(3))


def test_out_is_written_and_returned():
    values = torch.randn(2, 3)
    out = torch.empty(2, 3, dtype=torch.bfloat16), torch.empty(2, 3, dtype=torch.int16)
    hi, lo = cpu.split_master(values, out=out)
    assert hi is out[0] and lo is out[1]
    joined = torch.empty(2, 3)
    assert cpu.join_master(hi, lo, out=joined) is joined
    assert torch.equal(joined, values)
