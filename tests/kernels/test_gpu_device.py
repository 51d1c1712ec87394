"""The Triton kernels on a GPU against the reference, bit for bit. Skipped without one."""

import pytest
import torch
from slideformer_kernels import (
    accumulate_,
    adamw_fp32_,
    adamw_fp32_8bit_,
    adamw_scalars,
    adamw_split_,
    adamw_split_8bit_,
    dequantize_moments,
    join_master,
    quantize_moments,
    reference,
    split_master,
    sum_of_squares,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES_8BIT = [0, 1, 127, 128, 129, 1025, 100003, 1 << 21]
SIZES = [0, 1, 31, 1023, 1024, 1025, 100003, 1 << 21]
GRAD_DTYPES = [torch.bfloat16, torch.float32]


def to_gpu(tensors) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("scale_on_device", [False, True])
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_updates_have_the_reference_bits(numel, grad_dtype, scale_on_device, make_state, assert_same_bits):
    state = make_state(numel, grad_dtype)
    param, grad, exp_avg, exp_avg_sq = state.values()
    split = [*reference.split_master(param), grad, exp_avg, exp_avg_sq]
    for update, name, operands in (
        (adamw_fp32_, "adamw_fp32_", list(state.values())),
        (adamw_split_, "adamw_split_", split),
    ):
        theirs = [x.clone() for x in operands]
        ours = to_gpu(operands)
        for step, scale, weight_decay in ((1, 1.0, 0.0), (2, 0.3712345, 0.1), (1000, 1.0, 0.01)):
            scalars = adamw_scalars(
                lr=3e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay, step=step
            )
            scale_argument = torch.tensor([scale], device="cuda") if scale_on_device else scale
            update(*ours, scalars, scale_argument)
            getattr(reference, name)(*theirs, scalars, scale)
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                assert_same_bits(a, b, f"{name} step {step} operand {i}")


@pytest.mark.parametrize("scale_on_device", [False, True])
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES_8BIT)
def test_8bit_updates_have_the_reference_bits(
    numel, grad_dtype, scale_on_device, make_8bit_state, assert_same_bits
):
    for gentle in (False, True):
        state = make_8bit_state(numel, grad_dtype, gentle=gentle)
        param, *others = state.values()
        for update, name, operands in (
            (adamw_fp32_8bit_, "adamw_fp32_8bit_", list(state.values())),
            (adamw_split_8bit_, "adamw_split_8bit_", [*reference.split_master(param), *others]),
        ):
            theirs = [x.clone() for x in operands]
            ours = to_gpu(operands)
            for step, scale, weight_decay in ((1, 1.0, 0.0), (2, 0.3712345, 0.1), (1000, 1.0, 0.01)):
                scalars = adamw_scalars(
                    lr=3e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay, step=step
                )
                scale_argument = torch.tensor([scale], device="cuda") if scale_on_device else scale
                update(*ours, scalars, scale_argument)
                getattr(reference, name)(*theirs, scalars, scale)
                for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                    assert_same_bits(a, b, f"{name} step {step} operand {i}")


def test_edges_of_8bit_moments_have_the_reference_bits(make_8bit_edges, assert_same_bits):
    for state, scalars in make_8bit_edges():
        ours = to_gpu(state.values())
        adamw_fp32_8bit_(*ours, scalars)
        reference.adamw_fp32_8bit_(*state.values(), scalars)
        for name, tensor in zip(state, ours, strict=True):
            assert_same_bits(tensor, state[name], name)


@pytest.mark.parametrize("numel", SIZES_8BIT)
def test_conversion_of_moments_has_the_reference_bits(numel, make_state, make_8bit_state, assert_same_bits):
    for gentle in (True, False):
        state = make_state(numel, torch.float32, gentle=gentle)
        moments = state["exp_avg"], state["exp_avg_sq"]
        for ours, theirs in zip(
            quantize_moments(*to_gpu(moments)), reference.quantize_moments(*moments), strict=True
        ):
            assert ours.is_cuda
            assert_same_bits(ours, theirs)
        codes = list(make_8bit_state(numel, torch.float32, gentle=gentle).values())[2:]
        for ours, theirs in zip(
            dequantize_moments(*to_gpu(codes)), reference.dequantize_moments(*codes), strict=True
        ):
            assert ours.is_cuda
            assert_same_bits(ours, theirs)


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
    hi, lo = split_master(state["param"].cuda())
    expected = reference.split_master(state["param"])
    assert_same_bits(hi, expected[0], "hi")
    assert_same_bits(lo, expected[1], "lo")
    assert_same_bits(join_master(hi, lo), reference.join_master(*expected), "joined")
    for dtype in GRAD_DTYPES:
        ours, theirs = state["param"].cuda(), state["param"].clone()
        accumulate_(ours, state["grad"].to(dtype).cuda())
        reference.accumulate_(theirs, state["grad"].to(dtype))
        assert_same_bits(ours, theirs, f"accumulated {dtype}")


def test_no_step_waits_for_the_device_or_compiles(make_state, no_device_sync):
    """After the first step neither new scalars nor new scales may compile a kernel or synchronise."""
    from slideformer_kernels import gpu

    state = to_gpu(make_state(4096, torch.bfloat16, gentle=True).values())
    codes = quantize_moments(*(torch.zeros(4096, device="cuda") for _ in range(2)))
    scale = torch.ones(1, device="cuda")

    def one_step(step: int) -> torch.Tensor:
        scalars = adamw_scalars(
            lr=1e-3 * step, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1 * (step - 1), step=step
        )
        adamw_fp32_(*state, scalars, scale)
        adamw_fp32_(*state, scalars, 1.0 / step)
        adamw_fp32_8bit_(*state[:2], *codes, scalars, scale)
        adamw_fp32_8bit_(*state[:2], *codes, scalars, 1.0 / step)
        return sum_of_squares(state[1])

    def compiled_kernels() -> int:
        device = torch.cuda.current_device()
        kernels = (gpu._adamw_kernel, gpu._adamw_8bit_kernel)
        return sum(len(kernel.device_caches[device][0]) for kernel in kernels)

    one_step(1)
    kernels_before = compiled_kernels()
    with no_device_sync():
        for step in range(1, 6):
            one_step(step)
    assert compiled_kernels() == kernels_before


def test_mixed_devices_are_refused():
    cpu_tensor, gpu_tensor = torch.ones(4), torch.ones(4, device="cuda")
    scalars = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    with pytest.raises(ValueError, match="grad is on cpu"):
        adamw_fp32_(gpu_tensor, cpu_tensor, gpu_tensor.clone(), gpu_tensor.clone(), scalars)
    with pytest.raises(ValueError, match="grad_scale"):
        adamw_fp32_(*(gpu_tensor.clone() for _ in range(4)), scalars, torch.ones(1))
