"""The dispatch: CPU tensors go to C, or to the reference without a compiler; scales may be tensors."""

import pytest
import slideformer_kernels as kernels
import torch
from slideformer_kernels import build, cpu, ops, reference

SCALARS = kernels.adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1)


@pytest.fixture(params=["c", "reference"])
def backend(request, monkeypatch):
    """Forbid the other implementation, so that a wrong dispatch fails."""
    if request.param == "c":
        if not build.is_available():
            pytest.skip("no C compiler")
        forbidden = reference
    else:
        monkeypatch.setattr(build, "load", lambda: None)
        forbidden = cpu

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("wrong implementation")

    for name in kernels.__all__:
        # What only the reference has runs there on every device.
        if hasattr(cpu, name) and hasattr(reference, name) and name != "AdamWScalars":
            monkeypatch.setattr(forbidden, name, fail)
    return request.param


def test_all_operations_run_on_cpu_tensors(backend):
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    hi, lo = kernels.split_master(values, threads=1)
    assert torch.equal(kernels.join_master(hi, lo, threads=1), values)
    moments = [torch.zeros(100) for _ in range(4)]
    kernels.adamw_split_(hi, lo, values.bfloat16(), *moments[:2], SCALARS, torch.tensor([0.5]), threads=1)
    param = values.clone()
    kernels.adamw_fp32_(param, values.bfloat16(), *moments[2:], SCALARS, 0.5, threads=1)
    assert torch.equal(kernels.join_master(hi, lo), param)
    assert not torch.equal(param, values)
    kernels.accumulate_(param, values, threads=1)
    assert isinstance(kernels.sum_of_squares(param, threads=1), float)


def test_8bit_updates_run_on_cpu_tensors(backend):
    values = torch.randn(10, 30, generator=torch.Generator().manual_seed(0))
    param, (hi, lo) = values.clone(), kernels.split_master(values)
    codes = kernels.quantize_moments(torch.zeros(10, 30), torch.zeros(10, 30))
    assert not any(tensor.any() for tensor in codes)
    others = [tensor.clone() for tensor in codes]
    kernels.adamw_fp32_8bit_(param, values.bfloat16(), *codes, SCALARS, torch.tensor([0.5]), threads=1)
    kernels.adamw_split_8bit_(hi, lo, values.bfloat16(), *others, SCALARS, 0.5, threads=1)
    assert torch.equal(kernels.join_master(hi, lo), param)
    assert not torch.equal(param, values)
    assert all(tensor.any() for tensor in codes)
    for ours, theirs in zip(codes, others, strict=True):
        assert torch.equal(ours, theirs)
    exp_avg, exp_avg_sq = kernels.dequantize_moments(*codes)
    torch.testing.assert_close(exp_avg, 0.05 * values.bfloat16().float(), rtol=0.1, atol=1e-3)
    torch.testing.assert_close(exp_avg_sq, 10 * exp_avg**2 / 100, rtol=0.2, atol=1e-6)


def test_a_scale_on_another_device_is_refused():
    param, *moments = (torch.ones(4) for _ in range(3))
    with pytest.raises(ValueError, match="meta"):
        kernels.adamw_fp32_(param, torch.ones(4), *moments, SCALARS, torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match="2 elements"):
        kernels.adamw_fp32_(param, torch.ones(4), *moments, SCALARS, torch.ones(2))


def test_every_public_function_is_exported():
    for name in ("adamw_split_", "adamw_fp32_", "split_master", "join_master", "accumulate_"):
        assert getattr(kernels, name) is getattr(ops, name)
    for name in ("adamw_split_8bit_", "adamw_fp32_8bit_", "quantize_moments", "dequantize_moments"):
        assert getattr(kernels, name) is getattr(ops, name)
    assert kernels.MOMENT_BLOCK_NUMEL == 128
