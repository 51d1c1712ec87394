"""Run the Triton cross-entropy on CPU tensors in Triton's interpreter, by the rule of ``cross_entropy_truth.py``."""

import warnings

import conftest
import cross_entropy_truth as truths
import torch
from cross_entropy_truth import OPTIONS, evaluate, ignore_some, make_operands, measure, plain, truth
from slideformer_kernels import cross_entropy as module
from slideformer_kernels import cross_entropy_gpu as gpu
from slideformer_kernels import cross_entropy_reference as reference
from slideformer_kernels.cross_entropy import LossOptions, linear_cross_entropy

same_bits = conftest.assert_same_bits.__wrapped__()

# Small blocks, so that a row takes one block, one less one element, several, and a rest.
ROW_BLOCK, SCALE_BLOCK = 64, 128
# The interpreter takes 20 ms for a row.
ROWS = 7
VOCABULARIES = (1, 31, 63, 64, 65, 200)
UNTOUCHED = 12345.0


def run_kernel(logits, labels, options: LossOptions, write_grad: bool = True):
    """Return (losses, gradient in units of ``options.unit``, or logits); what pads the rows is left alone."""
    rows, vocabulary = logits.shape
    padded = torch.full((rows, vocabulary + 7), UNTOUCHED, dtype=logits.dtype)
    padded[:, :vocabulary] = logits
    losses = torch.full((rows,), torch.nan)
    gpu.cross_entropy_(padded[:, :vocabulary], labels, losses, options, write_grad)
    assert (padded[:, vocabulary:] == UNTOUCHED).all(), "wrote beyond the row"
    return losses, padded[:, :vocabulary]


def check_rows(vocabulary: int, dtype: torch.dtype, name: str, gain: float = 1.0) -> None:
    options = {key: x for key, x in OPTIONS[name].items() if key != "reduction"}
    errors = truths.Errors(dtype)
    for seed in range(6 if dtype == torch.bfloat16 else 2):
        generator = torch.Generator().manual_seed(seed)
        scale = truths.within_octave(1.0, seed)
        logits = (gain * torch.randn(ROWS, vocabulary, generator=generator)).to(dtype)
        labels = torch.randint(0, vocabulary, (ROWS,), generator=generator)
        labels[0], labels[1] = vocabulary - 1, 0
        labels = ignore_some(labels, options.get("ignore_index", -100))
        results = []
        for rows_of, wide in ((truths.plain_rows, dtype), (truths.truth_rows, torch.float64)):
            leaf = logits.to(wide, copy=True).requires_grad_()
            losses = rows_of(leaf, labels, **options)
            (losses.sum() * scale).backward()
            results.append({"loss": losses.detach().double(), "logits": leaf.grad.double() / scale})
        losses, grad = run_kernel(logits, labels, LossOptions(**options))
        unit = LossOptions(**options).unit(vocabulary)
        errors.add({"loss": losses.double(), "logits": grad.double() * unit}, *results)
        ignored = labels == options.get("ignore_index", -100)
        assert (losses[ignored] == 0).all() and (grad[ignored] == 0).all()
    # Without the gradient the losses are the same, and the logits are left alone.
    losses_alone, kept = run_kernel(logits, labels, LossOptions(**options), write_grad=False)
    same_bits(losses_alone, losses, f"losses of {vocabulary} {name}")
    same_bits(kept.contiguous(), logits, f"logits of {vocabulary} {name}")
    errors.check(f"rows of {vocabulary}, {dtype}, {name}, gain {gain}")


def check_special_rows(vocabulary: int, dtype: torch.dtype) -> None:
    """Labels out of range, a masked vocabulary, and a row of which nothing is left."""
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[5] = -torch.inf
    if vocabulary > 1:
        logits[:5, 1::2] = -torch.inf
    labels = torch.tensor([0, vocabulary, -1, -101, 0, 0])
    losses, grad = run_kernel(logits, labels, LossOptions(z_loss=1e-2))
    for row, is_nan in enumerate((False, True, True, True, False, True)):
        assert losses[row].isnan() == is_nan and grad[row].isnan().all() == is_nan, (vocabulary, row)
    for row in (0, 4):
        assert torch.isfinite(grad[row]).all() and (grad[row, 1::2] == 0).all()
    if vocabulary > ROW_BLOCK:
        return
    strided = torch.stack((labels, labels + 1), dim=1)[:, 0]
    other_losses, other_grad = run_kernel(logits, strided, LossOptions(z_loss=1e-2))
    same_bits(other_losses, losses, "losses with strided labels")
    same_bits(other_grad.contiguous(), grad.contiguous(), "gradients with strided labels")


def check_scaled(shape: tuple[int, ...]) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e3
    grad.flatten()[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])[: grad.numel()]
    for scale in (torch.tensor(0.3712345), torch.tensor(1.0), torch.tensor(0.0)):
        for dtype in (torch.bfloat16, torch.float32):
            ours, theirs = (x.scaled(grad, scale, dtype) for x in (gpu, reference))
            # The payload of a NaN may differ.
            assert torch.equal(ours.isnan(), theirs.isnan()) and ours.dtype == dtype
            same_bits(ours.nan_to_num(7.0), theirs.nan_to_num(7.0), f"scaled {shape}")


def check_whole(dtype: torch.dtype) -> None:
    """All of ``linear_cross_entropy`` with these kernels, several chunks, and a transposed weight."""
    module._kernels = lambda x: gpu
    errors = measure(
        linear_cross_entropy,
        11,
        200,
        16,
        dtype,
        OPTIONS["all"],
        seeds=16,
        memory_budget=5 * 256 * dtype.itemsize,
    )
    errors.check(f"whole, {dtype}")
    errors = truths.Errors(dtype)
    for seed in range(4):
        hidden, weight, labels, bias = make_operands(11, 33, 16, dtype, seed=seed)
        operands = [hidden.t().contiguous().t(), weight.t().contiguous().t(), labels, bias]
        functions = ((linear_cross_entropy, None), (plain, None), (truth, torch.float64))
        errors.add(*(evaluate(function, operands, 0.37, wide) for function, wide in functions))
    errors.check(f"whole, {dtype}, column-major operands")


if __name__ == "__main__":
    conftest.patch_language_once()
    # Rows of nothing but -inf.
    warnings.filterwarnings("ignore", "(divide by zero|invalid value) encountered", RuntimeWarning)
    torch.set_num_threads(1)
    gpu.ROW_BLOCK, gpu.SCALE_BLOCK = ROW_BLOCK, SCALE_BLOCK
    for dtype in (torch.float32, torch.bfloat16):
        for vocabulary in VOCABULARIES:
            # One vocabulary entry shows nothing but soft-capping's last bits, where plain PyTorch's are better.
            some = ("mean", "z_loss") if vocabulary == 1 else ("mean", "all")
            for name in OPTIONS if vocabulary == VOCABULARIES[-1] else some:
                check_rows(vocabulary, dtype, name)
            check_special_rows(vocabulary, dtype)
        check_whole(dtype)
    for name in ("mean", "smoothing", "z_loss"):
        for gain in (30.0, 5000.0):
            check_rows(100, torch.float32, name, gain)
    for shape in ((0,), (1,), (), (127,), (129,), (3, 100)):
        check_scaled(shape)
    print("all within the rule")
