"""The Triton kernels on a GPU against the reference, bit for bit. Skipped without one."""

import pytest
import slideformer_kernels as kernels
import torch
from slideformer_kernels import (
    accumulate_,
    adamw_,
    adamw_scalars,
    dequantize_moments,
    join_master,
    quantize_moments,
    reference,
    split_master,
    sum_of_squares,
)
from update_cases import BY_NAME, CASES, CODES, SIZES_8BIT, STEPS
from update_cases import SIZES as SMALL_SIZES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LARGE = 1 << 21
SIZES = [*SMALL_SIZES, LARGE]
GRAD_DTYPES = [torch.bfloat16, torch.float32]


def to_gpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in state.items()}


@pytest.mark.parametrize("scale_on_device", [False, True])
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "numel"), [(case, numel) for case in CASES for numel in [*case.sizes, LARGE]], ids=str
)
def test_updates_have_the_reference_bits(
    case, numel, grad_dtype, scale_on_device, start_of, assert_same_bits
):
    for gentle in (False, True):
        theirs = start_of(case, numel, grad_dtype, gentle=gentle)
        ours = to_gpu(theirs)
        for step, scale, weight_decay in STEPS:
            scalars = case.scalars(step, weight_decay)
            case.apply(
                kernels, ours, scalars, torch.tensor([scale], device="cuda") if scale_on_device else scale
            )
            case.apply(reference, theirs, scalars, scale)
            for name in ours:
                assert_same_bits(ours[name], theirs[name], f"{case} step {step} {name}")


def test_edges_of_8bit_moments_have_the_reference_bits(make_8bit_edges, assert_same_bits):
    case = BY_NAME["adamw_8bit-fp32"]
    for state, scalars in make_8bit_edges():
        ours = to_gpu(state)
        case.apply(kernels, ours, scalars)
        case.apply(reference, state, scalars)
        for name in state:
            assert_same_bits(ours[name], state[name], name)


@pytest.mark.parametrize("numel", [*SIZES_8BIT, LARGE])
def test_conversion_of_moments_has_the_reference_bits(numel, make_state, make_8bit_state, assert_same_bits):
    for gentle in (True, False):
        state = make_state(numel, torch.float32, gentle=gentle)
        moments = [state[name] for name in ("exp_avg", "exp_avg_sq")]
        state = make_8bit_state(numel, torch.float32, gentle=gentle)
        codes = [state[name] for name in CODES]
        for convert, name, operands in (
            (quantize_moments, "quantize_moments", moments),
            (dequantize_moments, "dequantize_moments", codes),
        ):
            expected = getattr(reference, name)(*operands)
            for ours, theirs in zip(convert(*(x.cuda() for x in operands)), expected, strict=True):
                assert ours.is_cuda
                assert_same_bits(ours, theirs, name)


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_sum_of_squares_has_the_reference_bits(numel, dtype, make_state, assert_same_bits):
    for gentle in (True, False):
        x = make_state(numel, dtype, gentle=gentle)["grad"]
        total = sum_of_squares(x.cuda())
        assert total.is_cuda and total.shape == ()
        assert_same_bits(total, torch.tensor(reference.sum_of_squares(x), dtype=torch.float64))


@pytest.mark.parametrize("numel", SIZES)
def test_other_operations_have_the_reference_bits(numel, make_state, assert_same_bits):
    state = make_state(numel, torch.bfloat16)
    hi, lo = split_master(state["weight"].cuda())
    expected = reference.split_master(state["weight"])
    assert_same_bits(hi, expected[0], "hi")
    assert_same_bits(lo, expected[1], "lo")
    assert_same_bits(join_master(hi, lo), reference.join_master(*expected), "joined")
    for dtype in GRAD_DTYPES:
        ours, theirs = state["weight"].cuda(), state["weight"].clone()
        accumulate_(ours, state["grad"].to(dtype).cuda())
        reference.accumulate_(theirs, state["grad"].to(dtype))
        assert_same_bits(ours, theirs, f"accumulated {dtype}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_step_waits_for_the_device_or_compiles(case, start_of, no_device_sync):
    """After the first step neither new scalars nor new scales may compile a kernel or synchronise."""
    from slideformer_kernels import gpu

    state = to_gpu(start_of(case, 4096, torch.bfloat16, gentle=True))
    scale = torch.ones(1, device="cuda")

    def one_step(step: int) -> torch.Tensor:
        scalars = case.scalars(step, 0.1 * (step - 1))
        case.apply(kernels, state, scalars, scale)
        case.apply(kernels, state, scalars, 1.0 / step)
        return sum_of_squares(state["grad"])

    def compiled_kernels() -> int:
        device = torch.cuda.current_device()
        return sum(len(kernel.device_caches[device][0]) for kernel, _ in gpu._UPDATES.values())

    one_step(1)
    kernels_before = compiled_kernels()
    with no_device_sync():
        for step in range(1, 6):
            one_step(step)
    assert compiled_kernels() == kernels_before


def test_mixed_devices_are_refused():
    on_gpu = torch.ones(4, device="cuda")
    moments = {"exp_avg": on_gpu.clone(), "exp_avg_sq": on_gpu.clone()}
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    with pytest.raises(ValueError, match="grad is on cpu"):
        adamw_((on_gpu,), torch.ones(4), moments, scalars)
    with pytest.raises(ValueError, match="grad_scale"):
        adamw_((on_gpu,), on_gpu.clone(), moments, scalars, torch.ones(1))
