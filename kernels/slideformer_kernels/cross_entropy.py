"""Linear layer and cross-entropy in one: the loss of a language model without ever holding all its logits.

Rows (tokens) are worked on in chunks. For each chunk: one product gives its logits, one kernel turns them in
place into the gradient of the loss (``cross_entropy_gpu.py``, or ``cross_entropy_reference.py`` on the CPU), two
products give that chunk's part of the gradients. The gradient of the weight is summed over chunks in fp32 by the
products themselves. Forward does all of this, because the logits are there then; backward only scales the
gradients and rounds them, once, to their dtype.

The idea of computing gradients in forward is that of Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch.autograd.function import once_differentiable

from . import cross_entropy_reference as reference
from .cross_entropy_options import LossOptions

DEFAULT_MEMORY_BUDGET = 2**30
# Chunks are whole multiples of a matrix kernel's tile where the budget allows, and rows of logits start aligned.
_ROW_MULTIPLE = 128
_STRIDE_MULTIPLE = 64
# Vocabulary entries per block where the CPU widens bf16 operands to fp32.
_CPU_BLOCK = 8192


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> torch.Tensor:
    """Return the cross-entropy of ``hidden @ weight.T + bias`` with ``labels``, differentiable once.

    With ``x`` the logits after scaling and soft-capping (``x = logit_scale * z``, then
    ``x = softcap * tanh(x / softcap)``) a row costs
    ``(1 - label_smoothing) * (lse - x[label]) + label_smoothing * (lse - mean(x)) + z_loss * lse**2``,
    where ``lse = log(sum(exp(x)))``. Rows whose label is ``ignore_index`` cost nothing. Products run in the
    dtype of ``hidden``, as a linear layer would; everything after them in fp32. Nothing waits for the GPU.

    Args:
        hidden: (..., H) fp32 or bf16, CPU or CUDA.
        weight: (V, H), dtype and device of ``hidden``.
        labels: (...) int64, as many as ``hidden`` has rows, on the same device. A label that is neither
            ``ignore_index`` nor in [0, V) makes the loss and the gradients NaN.
        bias: (V,), dtype of ``hidden``, or None.
        reduction: "mean" over the rows that are not ignored (NaN if there are none), or "sum".
        ignore_index: the label of rows that do not count.
        logit_scale: multiplies the logits.
        softcap: bounds the scaled logits; None or 0 does not.
        label_smoothing: in [0, 1]; as in ``torch.nn.functional.cross_entropy``.
        z_loss: weight of the squared log-sum-exp (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
        memory_budget: bytes of temporary memory for a chunk's logits. On top come, until backward has run, the
            gradients in fp32: H for each row and each vocabulary entry.

    Returns:
        A 0-dim fp32 tensor.

    Raises:
        ValueError: if shapes, dtypes, devices or options do not fit, or the budget does not hold one row.
        RuntimeError: in a second backward through the same loss.
    """
    rows = _check(hidden, weight, labels, bias, label_smoothing, reduction, memory_budget)
    options = LossOptions(ignore_index, logit_scale, softcap or 0.0, label_smoothing, z_loss)
    flat_labels = labels.reshape(rows)
    # Inside of an autograd.Function gradients are always off, and what needs_input_grad says disregards no_grad.
    wants_grads = torch.is_grad_enabled()
    total = _LinearCrossEntropy.apply(
        hidden.reshape(rows, hidden.shape[-1]), weight, flat_labels, bias, options, memory_budget, wants_grads
    )
    if reduction == "sum":
        return total
    count = (flat_labels != ignore_index).sum()
    # Without rows the loss is NaN but the gradients are zero, as PyTorch's are.
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def logits_chunk_shape(
    rows: int, vocabulary: int, itemsize: int, memory_budget: int = DEFAULT_MEMORY_BUDGET
) -> tuple[int, int]:
    """Return the shape of the buffer for a chunk's logits: rows, and entries from one row to the next.

    Args:
        rows: tokens of the whole loss, at least 1.
        vocabulary: entries of a row.
        itemsize: bytes of an entry.
        memory_budget: bytes of the buffer, at most; see :func:`linear_cross_entropy`.
    """
    stride = _up(vocabulary, _STRIDE_MULTIPLE)
    return _chunk_rows(rows, stride * itemsize, memory_budget), stride


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, options, memory_budget, wants_grads):
        # The first chunk writes the weight's gradient and each chunk its rows' of hidden: nothing to clear.
        make = torch.zeros_like if hidden.shape[0] == 0 else torch.empty_like
        needed = ctx.needs_input_grad[:2] + ctx.needs_input_grad[3:4]
        # Contiguous, whatever the strides of a parameter are: the kernels count on it.
        grads = _Gradients(
            *(
                make(x, dtype=torch.float32, memory_format=torch.contiguous_format)
                if x is not None and y and wants_grads
                else None
                for x, y in zip((hidden, weight, bias), needed, strict=True)
            )
        )
        losses = _run_chunks(hidden, weight, labels, bias, options, memory_budget, grads)
        ctx.grads, ctx.unit = grads, options.unit(weight.shape[0])
        ctx.dtypes = tuple(None if x is None else _grad_dtype(x) for x in (hidden, weight, bias))
        return losses.sum(dtype=torch.float64).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        if ctx.grads is None:
            raise RuntimeError(
                "backward through linear_cross_entropy a second time: its gradients are handed out, not kept; "
                "call linear_cross_entropy again"
            )
        grads, ctx.grads = ctx.grads, None
        scale = grad_total * ctx.unit
        scaled = []
        for name, dtype in zip(("hidden", "weight", "bias"), ctx.dtypes, strict=True):
            grad = getattr(grads, name)
            setattr(grads, name, None)  # at most one of them is held twice
            scaled.append(None if grad is None else _scaled(grad, scale, dtype))
        d_hidden, d_weight, d_bias = scaled
        return d_hidden, d_weight, None, d_bias, None, None, None


@dataclass(slots=True)
class _Gradients:
    """Gradients of the sum of all rows' losses, divided by `LossOptions.unit`, fp32; None where nobody asks."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def _run_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    options: LossOptions,
    memory_budget: int,
    grads: _Gradients,
) -> torch.Tensor:
    """Return the rows' losses (rows,) fp32; add their gradients to ``grads``."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return losses
    kernels = _kernels(hidden)
    wants_grads = any(x is not None for x in (grads.hidden, grads.weight, grads.bias))
    step, stride = logits_chunk_shape(rows, vocabulary, hidden.element_size(), memory_budget)
    buffer = torch.empty(step, stride, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        logits = buffer[: part.stop - start, :vocabulary]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        kernels.cross_entropy_(logits, labels[part], losses[part], options, wants_grads)
        if grads.hidden is not None:
            _add_product(grads.hidden[part], logits, weight, accumulate=False)
        if grads.weight is not None:
            _add_product(grads.weight, logits.t(), hidden[part], accumulate=start > 0)
        if grads.bias is not None:
            part_sum = logits.sum(0, dtype=torch.float32)
            grads.bias.copy_(part_sum if start == 0 else grads.bias + part_sum)
    return losses


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, accumulate: bool) -> None:
    """Set fp32 ``out`` to ``a @ b``, or add to it; the product of bf16 operands is never rounded to bf16."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=float(accumulate), out=out)
    elif a.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # the CPU has no such product: widen a block of the longer side at a time
        if not accumulate:
            out.zero_()
        if a.shape[0] >= a.shape[1]:
            wide = b.float()
            for i in range(0, a.shape[0], _CPU_BLOCK):
                out[i : i + _CPU_BLOCK].addmm_(a[i : i + _CPU_BLOCK].float(), wide)
        else:
            for i in range(0, a.shape[1], _CPU_BLOCK):
                out.addmm_(a[:, i : i + _CPU_BLOCK].float(), b[i : i + _CPU_BLOCK].float())


def _scaled(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``grad * scale``, computed in fp32, in ``dtype``; fp32 in place."""
    if dtype == torch.float32:
        return grad.mul_(scale)
    return _kernels(grad).scaled(grad, scale, dtype)


def _grad_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autograd wants the gradient of ``x``: some leaves sum bf16 weights' in fp32."""
    return (getattr(x, "grad_dtype", None) if x.is_leaf else None) or x.dtype


def _chunk_rows(rows: int, row_bytes: int, memory_budget: int) -> int:
    """Rows per chunk: as few chunks as the budget allows, evenly filled."""
    most = memory_budget // row_bytes
    if most >= _ROW_MULTIPLE:
        most -= most % _ROW_MULTIPLE
    chunks = -(-rows // most)
    return min(most, _up(-(-rows // chunks), _ROW_MULTIPLE), rows)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _kernels(x: torch.Tensor) -> ModuleType:
    if x.is_cuda:
        from . import cross_entropy_gpu

        return cross_entropy_gpu
    return reference


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    label_smoothing: float,
    reduction: str,
    memory_budget: int,
) -> int:
    """Check the arguments of ``linear_cross_entropy``; returns the number of rows."""
    operation = "linear_cross_entropy"
    if hidden.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"{operation}: hidden has dtype {hidden.dtype}, wanted torch.float32 or torch.bfloat16"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{operation}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit, wanted (..., H) "
            "and (V, H)"
        )
    rows = hidden.shape[:-1].numel()
    if labels.shape.numel() != rows:
        raise ValueError(f"{operation}: hidden has {rows} rows, labels has {labels.numel()} elements")
    if labels.dtype != torch.int64:
        raise ValueError(f"{operation}: labels has dtype {labels.dtype}, wanted torch.int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{operation}: bias has shape {tuple(bias.shape)}, wanted ({weight.shape[0]},)")
    for name, x in (("weight", weight), ("labels", labels), ("bias", bias)):
        if x is None:
            continue
        if x.device != hidden.device:
            raise ValueError(f"{operation}: {name} is on {x.device}, hidden is on {hidden.device}")
        if name != "labels" and x.dtype != hidden.dtype:
            raise ValueError(f"{operation}: {name} has dtype {x.dtype}, hidden has {hidden.dtype}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{operation}: reduction must be 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{operation}: label_smoothing must be in [0, 1], got {label_smoothing}")
    row_bytes = _up(weight.shape[0], _STRIDE_MULTIPLE) * hidden.element_size()
    if memory_budget < row_bytes:
        raise ValueError(
            f"{operation}: memory_budget={memory_budget} bytes holds no row of logits; one takes {row_bytes} "
            f"({weight.shape[0]} of {hidden.dtype})"
        )
    return rows
