"""Cross-entropy of rows of logits, and its gradient in their place, in Triton (NVIDIA and AMD).

Import this module only where it is needed: it imports Triton. All functions enqueue on the current stream and
never wait for it. Under TRITON_INTERPRET=1 they run on CPU tensors.
"""

import torch
import triton
import triton.language as tl

from .cross_entropy_options import LossOptions

# One program works on a row, and reads it twice. With few, wide programs much of the second reading comes from the
# L2 cache: on an H100 the widest was the fastest.
ROW_BLOCK = 16384
ROW_THREADS = 1024
SCALE_BLOCK = 4096
SCALE_WARPS = 8


def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    options: LossOptions,
    write_grad: bool,
) -> None:
    """Compute each row's loss; turn the logits into its gradient (formula: ``linear_cross_entropy``).

    Args:
        logits: (rows, V) fp32 or bf16, CUDA, last dimension contiguous; afterwards holds the gradient of the
            sum of the losses, divided by ``options.unit`` and zero in ignored rows, if ``write_grad``.
        labels: (rows,) int64; one outside [0, V) that is not ``ignore_index`` makes its row NaN.
        losses: (rows,) fp32, written; 0 in ignored rows.
        options: ignore index, scaling, soft-capping, label smoothing, z-loss.
        write_grad: whether the gradient is wanted.
    """
    rows, vocabulary = logits.shape
    block = min(ROW_BLOCK, triton.next_power_of_2(vocabulary))
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(rows,)](
            logits,
            labels,
            losses,
            logits.stride(0),
            labels.stride(0),
            vocabulary,
            options.ignore_index,
            float(options.logit_scale),
            float(options.softcap),
            float(options.label_smoothing),
            float(options.z_loss),
            options.logit_scale / options.unit(vocabulary),
            HAS_SOFTCAP=options.softcap != 0.0,
            HAS_SMOOTHING=options.label_smoothing != 0.0,
            WRITE_GRAD=write_grad,
            INTERPRETED=triton.knobs.runtime.interpret,
            BLOCK=block,
            enable_fp_fusion=True,
            num_warps=row_warps(block, 64 if torch.version.hip else 32),
        )


def row_warps(block: int, warp_size: int) -> int:
    """Return the warps of a program whose lanes should have 8 elements or more each."""
    return max(1, min(ROW_THREADS, block // 8) // warp_size)


def scaled(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``grad * scale``, computed in fp32, in ``dtype``.

    Args:
        grad: any shape, fp32, CUDA, contiguous.
        scale: 0-dim fp32 on the same device, read when the kernel runs.
        dtype: of the result.
    """
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    numel = grad.numel()
    if numel:
        with torch.cuda.device_of(grad):
            _scaled_kernel[(triton.cdiv(numel, SCALE_BLOCK),)](
                grad,
                scale,
                out,
                numel,
                INTERPRETED=triton.knobs.runtime.interpret,
                BLOCK=SCALE_BLOCK,
                enable_fp_fusion=True,
                num_warps=SCALE_WARPS,
            )
    return out


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # bf16 or fp32
    labels_ptr,  # int64
    losses_ptr,  # fp32
    row_stride,
    label_stride,
    vocabulary,
    ignore_index,
    logit_scale,
    softcap,
    label_smoothing,
    z_loss,
    scale_per_unit,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    columns = tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row * label_stride)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if WRITE_GRAD:
            for start in range(0, vocabulary, BLOCK):
                offsets = start + columns
                zeros = tl.zeros((BLOCK,), dtype=logits_ptr.dtype.element_ty)
                tl.store(row_ptr + offsets, zeros, mask=offsets < vocabulary)
    else:
        # Every lane keeps a maximum and a sum of its own, so that the loop has no reduction across lanes.
        maxima = tl.full((BLOCK,), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        totals = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            offsets = start + columns
            mask = offsets < vocabulary
            z = tl.load(row_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
            x = _transformed(z, logit_scale, softcap, HAS_SOFTCAP)
            x = tl.where(mask, x, float("-inf"))
            larger = tl.maximum(maxima, x)
            # Where a lane has seen nothing but -inf, -inf - -inf must not become NaN.
            base = tl.where(larger == float("-inf"), 0.0, larger)
            sums = sums * tl.exp(maxima - base) + tl.exp(x - base)
            maxima = larger
            if HAS_SMOOTHING:
                totals += tl.where(mask, x, 0.0)
        highest = tl.max(maxima, axis=0)
        base = tl.where(maxima == float("-inf"), 0.0, highest)
        log_sum = tl.log(tl.sum(sums * tl.exp(maxima - base), axis=0))
        lse = highest + log_sum

        is_inside = (label >= 0) & (label < vocabulary)
        z_label = tl.load(row_ptr + label, mask=is_inside, other=float("nan")).to(tl.float32)
        x_label = _transformed(z_label, logit_scale, softcap, HAS_SOFTCAP)
        loss = (1.0 - label_smoothing) * ((highest - x_label) + log_sum)
        if HAS_SMOOTHING:
            loss += label_smoothing * (lse - tl.sum(totals, axis=0) / vocabulary)
        loss += z_loss * lse * lse
        loss = tl.where(is_inside, loss, float("nan"))
        tl.store(losses_ptr + row, loss)

        if WRITE_GRAD:
            # The probabilities that the labels ask for.
            wanted = label_smoothing / vocabulary
            wanted_at_label = (1.0 - label_smoothing) + wanted
            lse_slope = tl.where(is_inside, 2.0 * z_loss * lse, float("nan"))
            for start in range(0, vocabulary, BLOCK):
                offsets = start + columns
                mask = offsets < vocabulary
                z = tl.load(row_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
                x = _transformed(z, logit_scale, softcap, HAS_SOFTCAP)
                # Large logits lose nothing if the maximum is subtracted first: x - lse would round at the size of lse.
                p = tl.exp((x - highest) - log_sum)
                grad = p - tl.where(offsets == label, wanted_at_label, wanted)
                grad += p * lse_slope
                if HAS_SOFTCAP:
                    grad *= _cap_slope(z * logit_scale, softcap)
                grad *= scale_per_unit
                tl.store(
                    row_ptr + offsets, _rounded(grad, logits_ptr.dtype.element_ty, INTERPRETED), mask=mask
                )


@triton.jit
def _transformed(z, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scale and soft-cap logits."""
    x = z * logit_scale
    if HAS_SOFTCAP:
        u = x / softcap
        # tanh: its series near zero, where the quotient cancels; else by exp of a negative number.
        s = u * u
        series = 62.0 / 2835.0 - s * (1382.0 / 155925.0)
        series = 1.0 - s * (1.0 / 3.0 - s * (2.0 / 15.0 - s * (17.0 / 315.0 - s * series)))
        e = tl.exp(-2.0 * tl.abs(u))
        quotient = (1.0 - e) / (1.0 + e)
        squashed = tl.where(s < 0.09, u * series, tl.where(u < 0.0, -quotient, quotient))
        x = squashed * softcap
    return x


@triton.jit
def _cap_slope(x, softcap):
    """Return the derivative of soft-capping, 1 - tanh(x / softcap)**2, without the cancellation."""
    e = tl.exp(-2.0 * tl.abs(x / softcap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _scaled_kernel(grad_ptr, scale_ptr, out_ptr, numel, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=mask) * tl.load(scale_ptr)
    tl.store(out_ptr + offsets, _rounded(grad, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Convert fp32 to ``dtype``, to nearest even; the interpreter's own conversion to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = tl.where(is_nan, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
