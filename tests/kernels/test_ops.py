"""The dispatch: CPU tensors go to C, or to the reference without a compiler; scales may be tensors."""

import pytest
import slideformer_kernels as kernels
import torch
from slideformer_kernels import build, cpu, ops, reference
from update_cases import BY_NAME, CASES, CODES, moments_of

NAMES = dict.fromkeys(case.name for case in CASES)
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
        if hasattr(cpu, name) and hasattr(reference, name) and name.islower():
            monkeypatch.setattr(forbidden, name, fail)
    return request.param


def test_all_operations_run_on_cpu_tensors(backend):
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    hi, lo = kernels.split_master(values, threads=1)
    assert torch.equal(kernels.join_master(hi, lo, threads=1), values)
    kernels.accumulate_(values, torch.ones(100), threads=1)
    assert isinstance(kernels.sum_of_squares(values, threads=1), float)
    added = values + torch.ones(100)
    assert kernels.accumulate_squared_(values, torch.ones(100), threads=1) == kernels.sum_of_squares(added)
    assert torch.equal(values, added)
    assert kernels.accumulate_squared_(values, torch.full((100,), 2.0), is_first=True) == 400.0
    assert torch.equal(values, torch.full((100,), 2.0))


@pytest.fixture(params=NAMES)
def pair(request, start_of):
    """Make equal operands for one update of a split master and of an fp32 one."""
    cases = BY_NAME[f"{request.param}-split"], BY_NAME[f"{request.param}-fp32"]
    return [(case, start_of(case, 300, gentle=True)) for case in cases]


# The operands come first: making them takes what the other fixture forbids.
def test_updates_run_on_cpu_tensors(pair, backend):
    (split, ours), (fp32, theirs) = pair
    before = theirs["weight"].clone()
    split.apply(kernels, ours, split.scalars(1, 0.1), torch.tensor([0.5]), threads=1)
    fp32.apply(kernels, theirs, fp32.scalars(1, 0.1), 0.5, threads=1)
    assert torch.equal(kernels.join_master(ours["hi"], ours["lo"]), theirs["weight"])
    assert not torch.equal(theirs["weight"], before)
    for name in fp32.rule.formats[fp32.kernel]:
        assert torch.equal(ours[name], theirs[name]), name


def test_new_8bit_moments_take_in_the_gradient(backend):
    values = torch.randn(10, 30, generator=torch.Generator().manual_seed(0))
    codes = dict(zip(CODES, kernels.quantize_moments(torch.zeros(10, 30), torch.zeros(10, 30)), strict=True))
    assert not any(tensor.any() for tensor in codes.values())
    kernels.adamw_((values.clone(),), values.bfloat16(), codes, SCALARS, 0.5)
    exp_avg, exp_avg_sq = kernels.dequantize_moments(*codes.values())
    torch.testing.assert_close(exp_avg, 0.05 * values.bfloat16().float(), rtol=0.1, atol=1e-3)
    torch.testing.assert_close(exp_avg_sq, 10 * exp_avg**2 / 100, rtol=0.2, atol=1e-6)


def test_a_scale_on_another_device_is_refused():
    operands = (torch.ones(4),), torch.ones(4), moments_of(4), SCALARS
    with pytest.raises(ValueError, match="meta"):
        kernels.adamw_(*operands, torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match="2 elements"):
        kernels.adamw_(*operands, torch.ones(2))


def test_every_public_function_is_exported():
    for name in kernels.__all__:
        if name.endswith(("_", "_master", "_moments", "_squares")):
            assert getattr(kernels, name) is getattr(ops, name)
    assert {case.rule.name for case in CASES} <= set(kernels.__all__)
    assert kernels.MOMENT_BLOCK_NUMEL == 128
