"""Every instruction set of the C kernels against the reference, bit for bit."""

import functools
import math
import threading
import time

import pytest
import torch
from slideformer_kernels import AdamWScalars, adamw_scalars, build, cpu, reference

SIZES = [0, 1, 31, 1023, 1024, 1025, 100003]
GRAD_DTYPES = [torch.bfloat16, torch.float32]

pytestmark = pytest.mark.skipif(not build.is_available(), reason="no C compiler")


def clone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def split_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    hi, lo = reference.split_master(state["param"])
    return {"hi": hi, "lo": lo, **{name: state[name] for name in ("grad", "exp_avg", "exp_avg_sq")}}


STEPS = ((1, 1.0, 0.0), (2, 0.3712345, 0.1), (1000, 1.0, 0.01))
"""Step number, grad_scale, weight_decay."""


def scalars_of(step: int, weight_decay: float) -> AdamWScalars:
    return adamw_scalars(lr=3e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay, step=step)


@pytest.fixture(scope="module")
def expected_states(make_state):
    """Compute the start and the reference's state after each step, once for all instruction sets."""

    @functools.cache
    def compute(
        update: str, numel: int, grad_dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        start = make_state(numel, grad_dtype)
        if update == "adamw_split_":
            start = split_state(start)
        state, after = clone(start), []
        for step, grad_scale, weight_decay in STEPS:
            getattr(reference, update)(*state.values(), scalars_of(step, weight_decay), grad_scale)
            after.append(clone(state))
        return start, after

    return compute


@pytest.mark.parametrize("update", ["adamw_fp32_", "adamw_split_"])
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_updates_have_the_reference_bits(isa, numel, grad_dtype, update, expected_states, assert_same_bits):
    start, after = expected_states(update, numel, grad_dtype)
    state = clone(start)
    for (step, grad_scale, weight_decay), expected in zip(STEPS, after, strict=True):
        getattr(cpu, update)(*state.values(), scalars_of(step, weight_decay), grad_scale, threads=2)
        for name in state:
            assert_same_bits(state[name], expected[name], f"step {step} {name}")


@pytest.mark.parametrize("numel", SIZES)
def test_other_kernels_have_the_reference_bits(isa, numel, make_state, assert_same_bits):
    state = make_state(numel, torch.float32, seed=5)
    hi, lo = cpu.split_master(state["param"], threads=2)
    expected_hi, expected_lo = reference.split_master(state["param"])
    assert_same_bits(hi, expected_hi, "hi")
    assert_same_bits(lo, expected_lo, "lo")
    assert_same_bits(cpu.join_master(hi, lo, threads=2), reference.join_master(hi, lo), "joined")
    for dtype in GRAD_DTYPES:
        ours, theirs = state["exp_avg"].clone(), state["exp_avg"].clone()
        cpu.accumulate_(ours, state["grad"].to(dtype), threads=2)
        reference.accumulate_(theirs, state["grad"].to(dtype))
        assert_same_bits(ours, theirs, f"accumulated {dtype}")
        for gentle in (True, False):
            x = make_state(numel, dtype, seed=6, gentle=gentle)["grad"]
            ours, theirs = cpu.sum_of_squares(x, threads=2), reference.sum_of_squares(x)
            assert ours == theirs or (math.isnan(ours) and math.isnan(theirs)), (ours, theirs)


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


def test_unaligned_buffers(isa, make_state, assert_same_bits):
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    state = split_state(make_state(2001, torch.bfloat16))
    ours = {name: tensor[1:].view(-1) for name, tensor in clone(state).items()}
    theirs = {name: tensor[1:].clone() for name, tensor in state.items()}
    cpu.adamw_split_(*ours.values(), scalars)
    reference.adamw_split_(*theirs.values(), scalars)
    for name in ours:
        assert_same_bits(ours[name], theirs[name], name)


def test_nothing_beyond_the_end_is_written(isa, make_state):
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    state = split_state(make_state(1100, torch.bfloat16, gentle=True))
    before = clone(state)
    cpu.adamw_split_(*(tensor[:1037] for tensor in state.values()), scalars)
    for name in state:
        assert torch.equal(state[name][1037:], before[name][1037:]), name
    assert not torch.equal(state["hi"][:1037], before["hi"][:1037])


def test_number_of_threads_does_not_change_bits(make_state, assert_same_bits):
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=4)
    start = split_state(make_state(300_007, torch.bfloat16))
    results = []
    for threads in (1, 2, 3, 7, 16):
        state = clone(start)
        cpu.adamw_split_(*state.values(), scalars, 0.5, threads=threads)
        results.append((state, cpu.sum_of_squares(state["exp_avg"][6000:], threads=threads)))
    for state, norm in results[1:]:
        assert norm == results[0][1]
        for name in state:
            assert_same_bits(state[name], results[0][0][name], name)


def test_flush_to_zero_of_the_caller_does_not_matter(isa, assert_same_bits):
    """torch.set_flush_denormal sets the mode of the calling thread; it must be as before afterwards."""
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    state = [torch.full((40,), 1e-40) for _ in range(4)]
    expected = [tensor.clone() for tensor in state]
    reference.adamw_fp32_(*expected, scalars)
    assert (expected[2] > 0).all() and (expected[2] < 1e-39).all()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        cpu.adamw_fp32_(*state, scalars)
        still_flushed = (torch.tensor([1e-40]) * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert still_flushed
    for actual, wanted in zip(state, expected, strict=True):
        assert_same_bits(actual, wanted)


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
    state = torch.zeros(4), torch.zeros(4)
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    cpu.adamw_fp32_(weight, torch.ones(4), *state, scalars)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_arguments_are_refused_with_numbers():
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    param, grad, exp_avg, exp_avg_sq = (torch.zeros(6) for _ in range(4))
    for module in (cpu, reference):
        with pytest.raises(ValueError, match="exp_avg has 5 elements, param has 6"):
            module.adamw_fp32_(param, grad, exp_avg[:5], exp_avg_sq, scalars)
        with pytest.raises(ValueError, match="grad has dtype torch.float16"):
            module.adamw_fp32_(param, grad.half(), exp_avg, exp_avg_sq, scalars)
        with pytest.raises(ValueError, match="not contiguous"):
            module.adamw_fp32_(param, torch.zeros(12)[::2], exp_avg, exp_avg_sq, scalars)
        with pytest.raises(ValueError, match="grad is on meta, param is on cpu"):
            module.adamw_fp32_(param, grad.to("meta"), exp_avg, exp_avg_sq, scalars)
        with pytest.raises(ValueError, match="out hi has 5 elements, fp32 has 6"):
            module.split_master(param, out=(torch.zeros(5).bfloat16(), torch.zeros(6).short()))
        with pytest.raises(ValueError, match="lo has 5 elements, hi has 6"):
            module.join_master(torch.zeros(6).bfloat16(), torch.zeros(5).short())
        with pytest.raises(ValueError, match="x has dtype torch.float64"):
            module.sum_of_squares(param.double())
        with pytest.raises(ValueError, match="acc has dtype torch.bfloat16"):
            module.accumulate_(param.bfloat16(), grad)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        cpu.accumulate_(param, grad, threads=0)
    with pytest.raises(ValueError, match="wanted cpu"):
        cpu.sum_of_squares(param.to("meta"))


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
