"""The linear layer with cross-entropy on the CPU, and its Triton kernels interpreted and compiled.

On a GPU it is tested by ``test_cross_entropy_device.py``; what errors are compared with is in
``cross_entropy_truth.py``.
"""

import json
from pathlib import Path

import cross_entropy_truth as truths
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_truth import OPTIONS, evaluate, ignore_some, make_operands, measure, plain, truth
from slideformer_kernels import cross_entropy as module
from slideformer_kernels.cross_entropy import linear_cross_entropy, logits_chunk_shape
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
DTYPES = [torch.float32, torch.bfloat16]
# NVIDIA H100, A100 and RTX 50; AMD MI300 and RX 7900. Everything is compiled for the first.
TARGETS = ("cuda:90:32", "cuda:80:32", "cuda:120:32", "hip:gfx942:64", "hip:gfx1100:32")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These matrices are so small that a second thread costs time, if anything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned():
    """Fill what torch.empty and its relatives allocate with NaN, so that reading it is noticed."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


def row_bytes(vocabulary: int, dtype: torch.dtype) -> int:
    """Return what one row of logits takes of the memory budget: it is padded to 64 elements."""
    return -(-vocabulary // 64) * 64 * dtype.itemsize


def pointer(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Allocations(TorchDispatchMode):
    """Record the shape and the dtype of every result of an operation that has memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        operands = {pointer(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and pointer(out) not in operands:
            self.seen.append((out.shape, out.dtype))
        return out

    def largest_numel(self) -> int:
        return max(shape.numel() for shape, _ in self.seen)


# --- the rule --------------------------------------------------------------------------------------


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(5).isnan().all() and torch.empty_like(torch.ones(3, 2)).isnan().all()


@pytest.mark.parametrize("name", OPTIONS)
def test_truth_is_what_pytorch_computes(name):
    """Both formulas, written separately, agree in float64."""
    operands = make_operands(29, 31, 8, torch.float64)
    operands[2] = ignore_some(operands[2], OPTIONS[name].get("ignore_index", -100))
    exact, other = (evaluate(function, operands, 0.37, **OPTIONS[name]) for function in (truth, plain))
    for key in exact:
        # plain_rows computes in fp32.
        torch.testing.assert_close(other[key], exact[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "seeds"),
    [(17, 1, 8), (17, 31, 24), (100, 1001, 4), (4097, 31, 3)],
)
def test_errors_are_those_of_plain_pytorch(rows, vocabulary, seeds, name, dtype):
    measure(linear_cross_entropy, rows, vocabulary, 16, dtype, OPTIONS[name], seeds=seeds).check(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mean", "all"])
@pytest.mark.parametrize("vocabulary", [1, 31])
def test_errors_of_a_single_row(vocabulary, name, dtype):
    """How one number is rounded, the label's gradient, makes up most of the error, so many seeds are needed."""
    measure(linear_cross_entropy, 1, vocabulary, 16, dtype, OPTIONS[name], seeds=200).check(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mean", "z_loss"])
@pytest.mark.parametrize("vocabulary", [49_151, 49_152, 49_153])
def test_errors_with_a_large_vocabulary(vocabulary, name, dtype):
    measure(linear_cross_entropy, 17, vocabulary, 16, dtype, OPTIONS[name], seeds=2).check(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [128_255, 128_256, 128_257])
def test_errors_with_the_largest_vocabulary(vocabulary, dtype):
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    measure(linear_cross_entropy, 17, vocabulary, 16, dtype, options, seeds=2).check("smoothing and z_loss")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mean", "all"])
def test_errors_without_bias(name, dtype):
    measure(linear_cross_entropy, 100, 203, 16, dtype, OPTIONS[name], seeds=8, has_bias=False).check(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "gain"),
    # The slope of soft-capping vanishes for nearly all logits of 10,000.
    [
        (name, gain)
        for name in OPTIONS
        for gain in (30.0, 5000.0)
        if gain == 30.0 or "softcap" not in OPTIONS[name]
    ],
)
def test_errors_with_extreme_logits(name, gain, dtype):
    """Logits of 60 and of 10,000: nothing overflows, nothing is lost to rounding at the size of the logits."""
    measure(linear_cross_entropy, 50, 31, 16, dtype, OPTIONS[name], seeds=8, gain=gain).check(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mean", "sum", "smoothing"])
def test_errors_with_a_common_offset(name, dtype):
    """Logits of 3,000 plus or minus 2, which a model without z-loss may drift to."""

    def shifted(function):
        return lambda hidden, weight, labels, bias, **options: function(
            hidden, weight, labels, bias + 3000, **options
        )

    errors = truths.Errors(dtype)
    for seed in range(8):
        operands = make_operands(50, 31, 16, dtype, seed=seed)
        functions = ((linear_cross_entropy, None), (plain, None), (truth, torch.float64))
        errors.add(*(evaluate(shifted(f), operands, 0.37, dtype, **OPTIONS[name]) for f, dtype in functions))
    errors.check(name)


# --- chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mean", "all"])
@pytest.mark.parametrize("budget_rows", [1, 7, 128, 299, 300])
def test_errors_with_every_memory_budget(budget_rows, name, dtype):
    budget = budget_rows * row_bytes(203, dtype)
    errors = measure(linear_cross_entropy, 300, 203, 16, dtype, OPTIONS[name], seeds=3, memory_budget=budget)
    errors.check(f"{budget_rows} rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_budgets_agree(dtype):
    operands = make_operands(300, 203, 16, dtype)
    operands[2] = ignore_some(operands[2])
    exact = evaluate(truth, operands, 0.37, torch.float64)
    errors = {name: (x - exact[name]).abs().max() for name, x in evaluate(plain, operands, 0.37).items()}
    whole = evaluate(linear_cross_entropy, operands, 0.37)
    for budget_rows in (1, 7, 100, 128, 299):
        budget = budget_rows * row_bytes(203, dtype)
        chunked = evaluate(linear_cross_entropy, operands, 0.37, memory_budget=budget)
        for name, x in chunked.items():
            allowed = max(2 * errors[name], truths.FLOOR * exact[name].abs().max())
            assert (x - whole[name]).abs().max() <= allowed, f"{name}, {budget_rows} rows"


def test_chunks_fill_the_budget_evenly():
    for rows in (1, 2, 127, 128, 129, 1000, 4097, 32768):
        for most in (1, 3, 127, 128, 129, 500, 4096, 10**6):
            step = module._chunk_rows(rows, 640, most * 640 + 639)
            usable = most - most % 128 if most >= 128 else most
            assert 1 <= step <= min(rows, usable)
            assert -(-rows // step) == -(-rows // usable), "more chunks than needed"
            assert step % 128 == 0 or step in (rows, most), "no multiple of a tile"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_stays_within_the_budget(dtype):
    rows, vocabulary, width, budget_rows = 640, 4097, 8, 70
    hidden, weight, labels, bias = make_operands(rows, vocabulary, width, dtype)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    with Allocations() as allocations:
        loss = linear_cross_entropy(
            hidden, weight, labels, bias, memory_budget=budget_rows * row_bytes(vocabulary, dtype)
        )
        loss.backward()
    stride = row_bytes(vocabulary, dtype) // dtype.itemsize
    expected = logits_chunk_shape(
        rows, vocabulary, dtype.itemsize, budget_rows * row_bytes(vocabulary, dtype)
    )
    assert expected == (budget_rows, stride)
    assert allocations.seen.count((expected, dtype)) == 1, "one buffer serves all chunks"
    assert allocations.largest_numel() == budget_rows * stride


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_kept_or_computed_for_it(context):
    hidden, weight, labels, bias = make_operands(17, 203, 16, torch.float32)
    expected = linear_cross_entropy(hidden, weight, labels, bias)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    with context(), Allocations() as allocations:
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert loss.item() == expected.item() and not loss.requires_grad
    shapes = {tuple(shape) for shape, _ in allocations.seen}
    assert not shapes & {tuple(x.shape) for x in (hidden, weight, bias)}


# --- which gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()], ids=str)
def test_frozen_operands_cost_nothing(trained):
    operands = make_operands(37, 203, 16, torch.float32)
    everything = evaluate(linear_cross_entropy, operands)
    hidden, weight, labels, bias = operands
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name in trained:
        leaves[name].requires_grad_()
    with Allocations() as allocations:
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert loss.requires_grad == bool(trained) and loss.item() == everything["loss"]
    for name, x in leaves.items():
        assert ((x.shape, torch.float32) in allocations.seen) == (name in trained), name
    if trained:
        loss.backward()
    for name, x in leaves.items():
        if name in trained:
            assert torch.equal(x.grad.double(), everything[name]), name
        else:
            assert x.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tied_weights(dtype):
    """The same leaf as the embedding and as the head gets the sum of both gradients."""
    tokens = torch.randint(0, 61, (90,), generator=torch.Generator().manual_seed(7))

    def tied(function):
        return lambda hidden, weight, labels, bias, **options: function(
            hidden + F.embedding(tokens, weight), weight, labels, bias, **options
        )

    errors = truths.Errors(dtype)
    for seed in range(8):
        operands = make_operands(90, 61, 16, dtype, seed=seed)
        functions = ((linear_cross_entropy, None), (plain, None), (truth, torch.float64))
        errors.add(*(evaluate(tied(f), operands, 0.37, dtype) for f, dtype in functions))
    errors.check("tied")


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch is older than 2.10")
@pytest.mark.parametrize("budget_rows", [16, 128])
def test_weight_that_wants_fp32_gets_it_unrounded(budget_rows):
    hidden, weight, labels, _ = make_operands(128, 203, 16, torch.bfloat16)
    weight.requires_grad_()
    weight.grad_dtype = torch.float32
    budget = budget_rows * row_bytes(203, torch.bfloat16)
    total = linear_cross_entropy(hidden, weight, labels, reduction="sum", memory_budget=budget)
    (total * 0.37).backward()
    # The gradient of the logits is rounded to bf16 by design; given that one, the rest is exact to fp32.
    logits = hidden @ weight.detach().t()
    module.reference.cross_entropy_(logits, labels, torch.empty(128), module.LossOptions(), True)
    exact = 0.37 * logits.double().t() @ hidden.double()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - exact).abs().max() <= 4 * 2.0**-23 * exact.abs().max()
    assert (weight.grad != weight.grad.bfloat16()).float().mean() > 0.9


def test_gradient_of_the_upstream_scale():
    hidden, weight, labels, _ = make_operands(17, 31, 16, torch.float32)
    hidden.requires_grad_()
    scale = torch.tensor(0.37, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, labels)
    (loss * scale).backward()
    assert scale.grad.item() == loss.item()
    expected = evaluate(linear_cross_entropy, [hidden, weight, labels, None], 0.37)
    assert torch.equal(hidden.grad.double(), expected["hidden"])


def test_gradients_accumulate_over_losses():
    """Two micro-batches in one graph, and a third in another, add up."""
    parts = [make_operands(17, 31, 16, torch.float32, seed=seed) for seed in range(3)]
    weight = parts[0][1]
    parts = [[hidden, weight, labels, bias] for hidden, _, labels, bias in parts]
    expected = sum(evaluate(linear_cross_entropy, part, 0.37)["weight"] for part in parts)
    leaf = weight.clone().requires_grad_()
    first, second, third = (
        linear_cross_entropy(hidden, leaf, labels, bias) * 0.37 for hidden, _, labels, bias in parts
    )
    (first + second).backward()
    third.backward()
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_second_backward_is_refused():
    hidden, weight, labels, _ = make_operands(5, 31, 16, torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(retain_graph=True)
    assert torch.equal(hidden.grad, first)


def test_second_derivatives_are_refused():
    hidden, weight, labels, _ = make_operands(5, 31, 16, torch.float32)
    scale = torch.tensor(0.37, requires_grad=True)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels) * scale
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- layouts ---------------------------------------------------------------------------------------


def column_major(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """Return the values in every other column (or element) of a wider tensor."""
    return torch.stack((x, torch.full_like(x, 7)), dim=-1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [column_major, with_gaps])
def test_layouts(layout, dtype):
    errors = truths.Errors(dtype)
    for seed in range(8):
        hidden, weight, labels, bias = make_operands(90, 61, 16, dtype, seed=seed)
        operands = [layout(hidden), layout(weight), with_gaps(labels), with_gaps(bias)]
        assert not any(x.is_contiguous() for x in operands)
        budget = 32 * row_bytes(61, dtype)
        errors.add(
            evaluate(linear_cross_entropy, operands, 0.37, memory_budget=budget),
            evaluate(plain, operands, 0.37),
            evaluate(truth, operands, 0.37, torch.float64),
        )
    errors.check(layout.__name__)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 3, 5), (15, 1)])
def test_leading_dimensions(shape):
    hidden, weight, labels, bias = make_operands(15, 31, 16, torch.float32)
    flat = evaluate(linear_cross_entropy, [hidden, weight, labels, bias])
    for label_shape in (shape, (15,)):
        operands = [hidden.reshape(*shape, 16), weight, labels.reshape(label_shape), bias]
        shaped = evaluate(linear_cross_entropy, operands)
        for name in flat:
            assert torch.equal(shaped[name].reshape(flat[name].shape), flat[name]), name


def test_transposed_leading_dimensions_and_one_row_without_any():
    hidden, weight, labels, _ = make_operands(15, 31, 16, torch.float32)
    expected = evaluate(linear_cross_entropy, [hidden, weight, labels, None])
    operands = [column_rows(hidden), weight, column_rows(labels), None]
    assert not operands[0].is_contiguous() and not operands[2].is_contiguous()
    actual = evaluate(linear_cross_entropy, operands)
    assert torch.equal(actual["hidden"].reshape(15, 16), expected["hidden"])
    assert torch.equal(actual["weight"], expected["weight"])
    single = linear_cross_entropy(hidden[0], weight, labels[0])
    torch.testing.assert_close(single, linear_cross_entropy(hidden[:1], weight, labels[:1]))


def column_rows(x: torch.Tensor) -> torch.Tensor:
    """Return 15 rows as (3, 5) rows in the same order, stored as (5, 3)."""
    return x.reshape(3, 5, *x.shape[1:]).transpose(0, 1).contiguous().transpose(0, 1)


# --- special rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_that_count(rows, reduction, dtype):
    """The loss is 0, or NaN as a mean of nothing; the gradients are zero, as PyTorch's are."""
    hidden, weight, labels, bias = make_operands(rows, 31, 16, dtype)
    labels = torch.full_like(labels, -100)
    options = {"reduction": reduction, "z_loss": 1e-2, "label_smoothing": 0.1}
    ours = evaluate(linear_cross_entropy, [hidden, weight, labels, bias], 0.37, **options)
    assert ours["loss"].isnan() if reduction == "mean" else ours["loss"] == 0
    for name in ("hidden", "weight", "bias"):
        assert (ours[name] == 0).all(), name
    theirs = F.cross_entropy(hidden.float() @ weight.float().t(), labels, reduction=reduction)
    assert torch.equal(ours["loss"].isnan(), theirs.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", [31, -1, -101, 2**40])
def test_labels_out_of_range_give_nan(label, dtype):
    """Loss and gradients are NaN, except those of the other rows' hidden states."""
    hidden, weight, labels, bias = make_operands(5, 31, 16, dtype)
    labels[3] = label
    ours = evaluate(
        linear_cross_entropy, [hidden, weight, labels, bias], reduction="sum", label_smoothing=0.1
    )
    for name in ("loss", "weight", "bias"):
        assert ours[name].isnan().all(), name
    assert ours["hidden"][3].isnan().all()
    assert torch.isfinite(ours["hidden"][[0, 1, 2, 4]]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_vocabulary(softcap, dtype):
    """A bias of -inf removes entries: the rest is as if they were not there."""
    options = {"softcap": softcap, "z_loss": 1e-2}
    masked = [0, 7, 8, 30]
    errors = truths.Errors(dtype)
    for seed in range(16):
        hidden, weight, labels, bias = make_operands(50, 31, 16, dtype, seed=seed)
        labels = torch.where(torch.isin(labels, torch.tensor(masked)), 5, labels)
        bias[masked] = float("-inf")
        operands = [hidden, weight, labels, bias]
        ours = evaluate(linear_cross_entropy, operands, 0.37, **options)
        assert (ours["bias"][masked] == 0).all() and (ours["weight"][masked] == 0).all()
        errors.add(
            ours,
            evaluate(plain, operands, 0.37, **options),
            evaluate(truth, operands, 0.37, torch.float64, **options),
        )
    errors.check("masked")


# --- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(5, 16, dtype=torch.float16)}, "hidden has dtype torch.float16"),
        ({"hidden": torch.zeros(5, 16, dtype=torch.float64)}, "hidden has dtype torch.float64"),
        ({"hidden": torch.zeros(5, 15)}, r"hidden \(5, 15\) and weight \(31, 16\) do not fit"),
        ({"hidden": torch.zeros(4, 16)}, "hidden has 4 rows, labels has 5 elements"),
        ({"hidden": torch.tensor(1.0)}, "do not fit"),
        ({"hidden": torch.zeros(5, 0), "weight": torch.zeros(31, 0)}, "do not fit"),
        ({"weight": torch.zeros(0, 16)}, "do not fit"),
        ({"weight": torch.zeros(16)}, "do not fit"),
        ({"weight": torch.zeros(31, 16, dtype=torch.bfloat16)}, "weight has dtype torch.bfloat16"),
        ({"weight": torch.zeros(31, 16, device="meta")}, "weight is on meta, hidden is on cpu"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "hidden has 5 rows, labels has 6 elements"),
        ({"labels": torch.zeros(5, dtype=torch.int32)}, "labels has dtype torch.int32"),
        ({"labels": torch.zeros(5, dtype=torch.int64, device="meta")}, "labels is on meta"),
        ({"bias": torch.zeros(30)}, r"bias has shape \(30,\), wanted \(31,\)"),
        ({"bias": torch.zeros(31, dtype=torch.bfloat16)}, "bias has dtype torch.bfloat16"),
        ({"bias": torch.zeros(31, device="meta")}, "bias is on meta"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be"),
        ({"memory_budget": 255}, "memory_budget=255 bytes holds no row of logits; one takes 256"),
        ({"memory_budget": 0}, "memory_budget=0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {
        "hidden": torch.zeros(5, 16),
        "weight": torch.zeros(31, 16),
        "labels": torch.zeros(5, dtype=torch.int64),
        "bias": torch.zeros(31),
    }
    linear_cross_entropy(**arguments)
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**(arguments | changes))


def test_the_smallest_budget_is_enough():
    hidden, weight, labels, _ = make_operands(5, 31, 16, torch.float32)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, labels, memory_budget=256),
        linear_cross_entropy(hidden, weight, labels),
    )


def test_softcap_of_zero_is_none():
    hidden, weight, labels, _ = make_operands(5, 31, 16, torch.float32)
    losses = [linear_cross_entropy(hidden, weight, labels, softcap=softcap) for softcap in (None, 0.0, 0)]
    assert losses[0] == losses[1] == losses[2]


# --- the Triton kernels without a GPU --------------------------------------------------------------


@pytest.fixture(scope="module")
def assembly_dir(run_python, tmp_path_factory):
    out = tmp_path_factory.mktemp("assembly")
    run_python(str(HERE / "cross_entropy_compiled.py"), str(out), *TARGETS, TRITON_INTERPRET="0")
    return out


def test_interpreted_kernels_keep_the_rule(run_python):
    output = run_python(str(HERE / "cross_entropy_interpreted.py"), TRITON_INTERPRET="1")
    assert output.strip().endswith("all within the rule")


def test_all_kernels_compile_for_all_targets(assembly_dir):
    names = [path.name.removesuffix(".s") for path in assembly_dir.glob("*.s")]
    assert sum(name.endswith(".90") for name in names) == 10
    assert len(names) == 10 + 3 * (len(TARGETS) - 1)


def test_nvidia_code_loads_wide_and_has_no_float64(assembly_dir):
    for path in assembly_dir.glob("*.s"):
        name, arch, _ = path.name.split(".")
        if not arch.isdigit():
            continue
        ptx = path.read_text()
        assert "f64" not in ptx, f"{path.name} computes in double precision"
        assert ".local" not in ptx, f"{path.name} has arrays in local memory"
        if not name.endswith("_odd"):
            assert "ld.global.v4" in ptx, f"{path.name} does not load 16 bytes at once"
        if name.endswith("_grad"):
            assert "st.global.v4" in ptx, f"{path.name} does not store 16 bytes at once"
    # Each lane has 16 bf16 elements, so two loads in either pass; nothing but a label and its logit is narrower.
    ptx = (assembly_dir / "cross_entropy_bf16_plain_grad.90.s").read_text()
    assert ptx.count("ld.global.v4") == 4 and ptx.count("ld.global") == 6
    assert ptx.count("st.global.v4") == 4


def test_registers_suffice(assembly_dir):
    """Nothing spills in the kernel of common training; elsewhere some bytes may, which stay in the L1 cache.

    1,024 threads have 64 registers each, and a lane has 16 elements in flight.
    """
    spilled = json.loads((assembly_dir / "spilled_bytes.json").read_text())
    for arch in ("80", "90", "gfx942", "gfx1100"):
        assert spilled[f"cross_entropy_bf16_plain_grad.{arch}"] == 0
    assert spilled["cross_entropy_bf16_plain_loss.90"] == 0
    assert all(spilled[f"scaled_bf16.{target.split(':')[1]}"] == 0 for target in TARGETS)
    assert max(spilled.values()) <= 256, spilled
