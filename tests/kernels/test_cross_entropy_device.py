"""The linear layer with cross-entropy on a GPU, by the rule of ``cross_entropy_truth.py``. Skipped without one."""

import cross_entropy_truth as truths
import pytest
import torch
from cross_entropy_truth import OPTIONS, evaluate, ignore_some, make_operands, measure, plain, truth
from slideformer_kernels.cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16]
VOCABULARIES = [49_152, 128_255, 128_256, 128_257]
MIB = 2**20
# Plain PyTorch holds 4,097 rows of logits several times in fp32.
PLAIN_BYTES = 40 * 2**30


@pytest.fixture(autouse=True)
def exact_products():
    assert not torch.backends.cuda.matmul.allow_tf32, "fp32 products would be rounded to TF32"


def cuda_operands(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    hidden, weight, labels, bias = make_operands(rows, vocabulary, width, dtype, device="cuda")
    return [hidden, weight, ignore_some(labels), bias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "name"),
    [(vocabulary, "mean") for vocabulary in VOCABULARIES]
    + [(vocabulary, "all") for vocabulary in VOCABULARIES]
    + [(128_257, name) for name in OPTIONS if name not in ("mean", "all")],
)
@pytest.mark.parametrize(("rows", "seeds"), [(1, 200), (17, 48), (4097, 2)])
def test_errors_are_those_of_plain_pytorch(rows, seeds, vocabulary, name, dtype):
    if rows > 1000 and torch.cuda.get_device_properties(0).total_memory < PLAIN_BYTES:
        pytest.skip("too little GPU memory for the plain implementation")
    # Four chunks of 4,097 rows.
    budget = 1100 * (vocabulary + 64) * dtype.itemsize
    # With a narrow weight the matrix library splits one long fp32 sum over 4,097 rows into many short ones, and the
    # plain implementation gets better than either is at the width of a model.
    width = 512 if rows > 1000 else 32
    errors = measure(
        linear_cross_entropy,
        rows,
        vocabulary,
        width,
        dtype,
        OPTIONS[name],
        seeds=seeds,
        device="cuda",
        memory_budget=budget,
    )
    errors.check(f"{rows} rows, {vocabulary}, {dtype}, {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mean", "smoothing", "z_loss"])
@pytest.mark.parametrize("gain", [30.0, 5000.0])
def test_errors_with_extreme_logits(gain, name, dtype):
    errors = measure(
        linear_cross_entropy, 300, 1001, 32, dtype, OPTIONS[name], seeds=8, gain=gain, device="cuda"
    )
    errors.check(f"gain {gain}, {dtype}, {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_with_column_major_operands(dtype):
    errors = truths.Errors(dtype)
    for seed in range(8):
        hidden, weight, labels, bias = make_operands(90, 1001, 32, dtype, seed=seed, device="cuda")
        operands = [hidden.t().contiguous().t(), weight.t().contiguous().t(), labels, bias]
        functions = ((linear_cross_entropy, None), (plain, None), (truth, torch.float64))
        errors.add(*(evaluate(function, operands, 0.37, wide) for function, wide in functions))
    errors.check("column-major")


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch is older than 2.10")
def test_weight_that_wants_fp32_gets_it_unrounded():
    hidden, weight, labels, _ = cuda_operands(300, 1001, 32, torch.bfloat16)
    rounded = evaluate(linear_cross_entropy, [hidden, weight, labels, None])["weight"]
    weight.requires_grad_()
    weight.grad_dtype = torch.float32
    linear_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad != weight.grad.bfloat16()).float().mean() > 0.9
    assert torch.equal(weight.grad.bfloat16().double(), rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", [1001, -1, 2**40])
def test_labels_out_of_range_give_nan(label, dtype):
    hidden, weight, labels, bias = cuda_operands(5, 1001, 32, dtype)
    labels[3] = label
    ours = evaluate(linear_cross_entropy, [hidden, weight, labels, bias], reduction="sum")
    for name in ("loss", "weight", "bias"):
        assert ours[name].isnan().all(), name
    assert ours["hidden"][3].isnan().all() and torch.isfinite(ours["hidden"][[0, 1, 2, 4]]).all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_that_count(rows, reduction):
    hidden, weight, labels, bias = cuda_operands(rows, 1001, 32, torch.bfloat16)
    operands = [hidden, weight, torch.full_like(labels, -100), bias]
    ours = evaluate(linear_cross_entropy, operands, reduction=reduction)
    assert ours["loss"].isnan() if reduction == "mean" else ours["loss"] == 0
    assert all((ours[name] == 0).all() for name in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_for_the_device_or_compiles(dtype, no_device_sync):
    """After the first step neither another scale nor other options' values may synchronise or compile."""
    from slideformer_kernels import cross_entropy_gpu

    hidden, weight, labels, bias = cuda_operands(300, 1001, 32, dtype)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    upstream = torch.tensor(0.37, device="cuda")

    def one_step(step: int) -> None:
        loss = linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias,
            logit_scale=1.0 / step,
            softcap=10.0 * step,
            label_smoothing=0.1 / step,
            z_loss=1e-3 * step,
            memory_budget=128 * 1024 * dtype.itemsize,
        )
        (loss * upstream).backward()

    one_step(1)
    torch.cuda.synchronize()
    cache = cross_entropy_gpu._cross_entropy_kernel.device_caches[torch.cuda.current_device()][0]
    kernels_before = len(cache)
    with no_device_sync():
        for step in range(2, 6):
            one_step(step)
    assert len(cache) == kernels_before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_have_the_same_bits(dtype, assert_same_bits):
    operands = cuda_operands(1000, 49_152, 256, dtype)
    budget = 128 * 49_152 * dtype.itemsize
    first, second = (
        evaluate(linear_cross_entropy, operands, 0.37, memory_budget=budget, **OPTIONS["all"])
        for _ in range(2)
    )
    for name in first:
        assert_same_bits(second[name], first[name], name)


def test_memory_stays_within_the_budget():
    """Peak: the chunk's logits and fp32 gradients in forward; these and their bf16 copies in backward."""
    rows, vocabulary, width, budget = 4097, 128_257, 1024, 64 * MIB
    hidden, weight, labels, _ = cuda_operands(rows, vocabulary, width, torch.bfloat16)
    for x in (hidden, weight):
        x.requires_grad_()
    numel = hidden.numel() + weight.numel()
    # What products keep for themselves was allocated in the first round, or fits into the slack.
    slack = 64 * MIB
    for _ in range(2):
        hidden.grad = weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = linear_cross_entropy(hidden, weight, labels, memory_budget=budget)
        in_forward = torch.cuda.max_memory_allocated() - before
        loss.backward()
        in_all = torch.cuda.max_memory_allocated() - before
    assert in_forward <= budget + 4 * numel + slack, f"{in_forward / MIB:.0f} MiB in forward"
    assert in_all <= max(budget, 2 * numel) + 4 * numel + slack, f"{in_all / MIB:.0f} MiB"


def test_more_logits_than_32_bits_can_count():
    """One chunk of more than 2**31 logits: its last rows are the same as on their own."""
    rows, vocabulary = 16_800, 128_257
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("too little GPU memory")
    hidden, weight, labels, _ = cuda_operands(rows, vocabulary, 32, torch.bfloat16)
    last = [hidden[-128:].clone(), weight, labels[-128:], None]
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", memory_budget=2**33)
    loss.backward()
    expected = evaluate(linear_cross_entropy, last, reduction="sum")["hidden"]
    torch.testing.assert_close(hidden.grad[-128:].double(), expected, rtol=2**-7, atol=5e-3)


def test_mixed_devices_are_refused():
    hidden, weight, labels, _ = cuda_operands(5, 31, 16, torch.float32)
    with pytest.raises(ValueError, match="weight is on cpu, hidden is on cuda"):
        linear_cross_entropy(hidden, weight.cpu(), labels)
    with pytest.raises(ValueError, match="labels is on cpu"):
        linear_cross_entropy(hidden, weight, labels.cpu())
