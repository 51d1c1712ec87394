"""Every instruction set of the C kernels against the reference, bit for bit."""

import functools
import math
import threading
import time

import pytest
import torch
from slideformer_kernels import AdamWScalars, adamw_scalars, build, cpu, reference

SIZES = [0, 1, 31, 1023, 1024, 1025, 100003]
SIZES_8BIT = [0, 1, 127, 128, 129, 1025, 100003]
GRAD_DTYPES = [torch.bfloat16, torch.float32]

pytestmark = pytest.mark.skipif(not build.is_available(), reason="no C compiler")


CODES = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


def clone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def split_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    hi, lo = reference.split_master(state["param"])
    return {"hi": hi, "lo": lo, **{name: tensor for name, tensor in state.items() if name != "param"}}


STEPS = ((1, 1.0, 0.0), (2, 0.3712345, 0.1), (1000, 1.0, 0.01))
"""Step number, grad_scale, weight_decay."""


def scalars_of(step: int, weight_decay: float) -> AdamWScalars:
    return adamw_scalars(lr=3e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay, step=step)


UPDATES = [
    *((update, numel) for update in ("adamw_fp32_", "adamw_split_") for numel in SIZES),
    *((update, numel) for update in ("adamw_fp32_8bit_", "adamw_split_8bit_") for numel in SIZES_8BIT),
]


@pytest.fixture(scope="module")
def start_of(make_state, make_8bit_state):
    """Make the operands of the named update."""

    def make(
        update: str, numel: int, grad_dtype: torch.dtype = torch.bfloat16, **options: object
    ) -> dict[str, torch.Tensor]:
        start = (make_8bit_state if "8bit" in update else make_state)(numel, grad_dtype, **options)
        return split_state(start) if "split" in update else start

    return make


@pytest.fixture(scope="module")
def expected_states(start_of):
    """Compute the start and the reference's state after each step, once for all instruction sets."""

    @functools.cache
    def compute(
        update: str, numel: int, grad_dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        start = start_of(update, numel, grad_dtype)
        state, after = clone(start), []
        for step, grad_scale, weight_decay in STEPS:
            getattr(reference, update)(*state.values(), scalars_of(step, weight_decay), grad_scale)
            after.append(clone(state))
        return start, after

    return compute


@pytest.mark.parametrize(("update", "numel"), UPDATES)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_updates_have_the_reference_bits(isa, numel, grad_dtype, update, expected_states, assert_same_bits):
    start, after = expected_states(update, numel, grad_dtype)
    state = clone(start)
    for (step, grad_scale, weight_decay), expected in zip(STEPS, after, strict=True):
        getattr(cpu, update)(*state.values(), scalars_of(step, weight_decay), grad_scale, threads=2)
        for name in state:
            assert_same_bits(state[name], expected[name], f"step {step} {name}")


def test_edges_of_8bit_moments_have_the_reference_bits(isa, make_8bit_edges, assert_same_bits):
    for ours, scalars in make_8bit_edges():
        theirs = clone(ours)
        cpu.adamw_fp32_8bit_(*ours.values(), scalars)
        reference.adamw_fp32_8bit_(*theirs.values(), scalars)
        for name in ours:
            assert_same_bits(ours[name], theirs[name], name)


@pytest.mark.parametrize("update", ["adamw_fp32_8bit_", "adamw_split_8bit_"])
def test_many_steps_on_8bit_moments_have_the_reference_bits(isa, update, start_of, assert_same_bits):
    """What one step stores the next one reads, and gradients change by decades between steps."""
    ours = start_of(update, 5000, torch.bfloat16, seed=3, gentle=True)
    for name in CODES:
        ours[name].zero_()
    theirs = clone(ours)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 61):
        grad = torch.randn(5000, generator=generator) * torch.randn(5000, generator=generator).exp()
        grad[(torch.arange(5000) // 500) == step % 10] = 0.0
        ours["grad"] = theirs["grad"] = grad.bfloat16()
        getattr(cpu, update)(*ours.values(), scalars_of(step, 0.1), threads=2)
        getattr(reference, update)(*theirs.values(), scalars_of(step, 0.1))
    for name in ours:
        assert_same_bits(ours[name], theirs[name], name)
    assert min(len(ours[name].unique()) for name in ("exp_avg", "exp_avg_sq")) > 150


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


@pytest.mark.parametrize("update", ["adamw_split_", "adamw_split_8bit_"])
def test_unaligned_buffers(isa, update, start_of, assert_same_bits):
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    # 2049 elements have 17 scales, 2048 have 16: cutting off one of each leaves operands that fit.
    state = start_of(update, 2049)
    ours = {name: tensor[1:].view(-1) for name, tensor in clone(state).items()}
    theirs = {name: tensor[1:].clone() for name, tensor in state.items()}
    getattr(cpu, update)(*ours.values(), scalars)
    getattr(reference, update)(*theirs.values(), scalars)
    for name in ours:
        assert_same_bits(ours[name], theirs[name], name)


@pytest.mark.parametrize("update", ["adamw_split_", "adamw_split_8bit_"])
@pytest.mark.parametrize("numel", [1037, 1152])
def test_nothing_beyond_the_end_is_written(isa, update, numel, start_of):
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    state = start_of(update, 1500, gentle=True)
    before = clone(state)
    ends = {name: -(-numel // 128) if name.endswith("_scale") else numel for name in state}
    getattr(cpu, update)(*(tensor[: ends[name]] for name, tensor in state.items()), scalars)
    for name, end in ends.items():
        assert torch.equal(state[name][end:], before[name][end:]), name
        if name not in ("grad", "lo"):
            assert not torch.equal(state[name][:end], before[name][:end]), name


@pytest.mark.parametrize("update", ["adamw_split_", "adamw_split_8bit_"])
def test_number_of_threads_does_not_change_bits(update, start_of, assert_same_bits):
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=4)
    start = start_of(update, 300_007)
    results = []
    for threads in (1, 2, 3, 7, 16):
        state = clone(start)
        getattr(cpu, update)(*state.values(), scalars, 0.5, threads=threads)
        results.append((state, cpu.sum_of_squares(state["grad"][6000:], threads=threads)))
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
    # Denormal parameters and, through a small scale, denormal second moments.
    small = {
        "param": torch.full((300,), 1e-40),
        "grad": torch.full((300,), 2.0**-66).bfloat16(),
        **dict(zip(CODES, reference.quantize_moments(*torch.full((2, 300), 2.0**-66)), strict=True)),
    }
    expected_small = clone(small)
    reference.adamw_fp32_8bit_(*expected_small.values(), scalars)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        cpu.adamw_fp32_(*state, scalars)
        cpu.adamw_fp32_8bit_(*small.values(), scalars)
        still_flushed = (torch.tensor([1e-40]) * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert still_flushed
    for actual, wanted in zip([*state, *small.values()], [*expected, *expected_small.values()], strict=True):
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


@pytest.mark.parametrize("update", ["adamw_fp32_8bit_", "adamw_split_8bit_"])
def test_all_that_an_8bit_update_writes_is_marked_as_written(update, start_of):
    state = start_of(update, 200, gentle=True)
    versions = {name: tensor._version for name, tensor in state.items()}
    getattr(cpu, update)(*state.values(), scalars_of(1, 0.0))
    written = {name for name, tensor in state.items() if tensor._version > versions[name]}
    assert written == set(state) - {"grad"}


@pytest.mark.parametrize("update", ["adamw_fp32_8bit_", "adamw_split_8bit_"])
@pytest.mark.parametrize("module", [cpu, reference])
def test_bad_8bit_arguments_are_refused_with_numbers(module, update, start_of):
    good = start_of(update, 300, gentle=True)
    for name, bad, message in (
        ("exp_avg", torch.zeros(300), "exp_avg has dtype torch.float32, wanted torch.int8"),
        ("exp_avg", good["exp_avg_sq"], "exp_avg has dtype torch.uint8, wanted torch.int8"),
        ("exp_avg_sq", good["exp_avg"], "exp_avg_sq has dtype torch.int8, wanted torch.uint8"),
        ("exp_avg_sq", good["exp_avg_sq"][:299], "exp_avg_sq has 299 elements, .* has 300"),
        ("exp_avg_scale", torch.zeros(300), "exp_avg_sq_scale has 3 elements, exp_avg_scale has 300"),
        ("exp_avg_sq_scale", torch.zeros(2), "exp_avg_sq_scale has 2 elements, exp_avg_scale has 3"),
        ("exp_avg_scale", torch.zeros(3).bfloat16(), "exp_avg_scale has dtype torch.bfloat16"),
        ("exp_avg_sq_scale", torch.zeros(6)[::2], "exp_avg_sq_scale is not contiguous"),
        ("grad", good["grad"].half(), "grad has dtype torch.float16"),
    ):
        with pytest.raises(ValueError, match=f"{update}: {message}"):
            getattr(module, update)(*{**good, name: bad}.values(), scalars_of(1, 0.0))
    scales = {"exp_avg_scale": torch.zeros(4), "exp_avg_sq_scale": torch.zeros(4)}
    with pytest.raises(ValueError, match="exp_avg_scale has 4 elements, 300 codes want 3"):
        getattr(module, update)(*{**good, **scales}.values(), scalars_of(1, 0.0))
    scales = {name: torch.zeros(3, device="meta") for name in scales}
    with pytest.raises(ValueError, match="exp_avg_scale is on meta, exp_avg is on cpu"):
        getattr(module, update)(*{**good, **scales}.values(), scalars_of(1, 0.0))


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
