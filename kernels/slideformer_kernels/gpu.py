"""The same operations on GPU tensors, in Triton (NVIDIA and AMD), with the bits of ``reference.py``.

Import this module only where it is needed: it imports Triton. All functions enqueue on the current stream of
their tensors' device and never wait for it. Under TRITON_INTERPRET=1 they run on CPU tensors.

What keeps the bits the same:

* ``enable_fp_fusion=False``: nothing is contracted but the explicit fma.
* Division and square root are Triton's correctly rounded ones; small square roots are scaled (``_sqrt``).
* NaN are found and stored as integers, because compilers are free to change a NaN's bits.
* 16-bit values are converted by shifting bits.
"""

import torch
import triton
import triton.language as tl

from . import arguments
from .scalars import AdamWScalars, round_to_fp32

ROW_NUMEL = 1024
# Elements and rows per program; with 4 warps a thread moves 16 bytes at a time.
BLOCK_NUMEL = 1024
BLOCK_ROWS = 8
NUM_WARPS = 4
# A row is read as 8 segments, so that its first three halvings are additions of whole segments.
LOG2_SEGMENT_NUMEL = 7

_BITS_DTYPES = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def adamw_split_(
    hi: torch.Tensor,
    lo: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: AdamWScalars,
    grad_scale: float | torch.Tensor = 1.0,
) -> None:
    """Update a split master in place with AdamW (Loshchilov & Hutter 2019, Alg. 2; formula: reference.py).

    One pass over memory: 26 bytes per element with a bf16 gradient.

    Args:
        hi: (numel,) bf16, CUDA, any shape, contiguous; updated in place.
        lo: (numel,) int16; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        exp_avg: (numel,) fp32; updated in place.
        exp_avg_sq: (numel,) fp32; updated in place.
        scalars: of this step.
        grad_scale: clip coefficient; a float, or a 1-element fp32 tensor on the same device, read when the
            kernel runs.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit.
    """
    numel = arguments.check_adamw_split(hi, lo, grad, exp_avg, exp_avg_sq)
    _launch_adamw(hi.view(torch.int16), lo, grad, exp_avg, exp_avg_sq, scalars, grad_scale, numel, True)
    arguments.mark_written(hi, lo, exp_avg, exp_avg_sq)


def adamw_fp32_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: AdamWScalars,
    grad_scale: float | torch.Tensor = 1.0,
) -> None:
    """Update fp32 parameters in place with AdamW (Loshchilov & Hutter 2019, Alg. 2; formula: reference.py).

    Args:
        param: (numel,) fp32, CUDA, any shape, contiguous; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        exp_avg: (numel,) fp32; updated in place.
        exp_avg_sq: (numel,) fp32; updated in place.
        scalars: of this step.
        grad_scale: clip coefficient; a float, or a 1-element fp32 tensor on the same device, read when the
            kernel runs.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit.
    """
    numel = arguments.check_adamw_fp32(param, grad, exp_avg, exp_avg_sq)
    # The second pointer of the split master is not read.
    param_bits = param.view(torch.int32)
    _launch_adamw(param_bits, param_bits, grad, exp_avg, exp_avg_sq, scalars, grad_scale, numel, False)
    arguments.mark_written(param, exp_avg, exp_avg_sq)


def accumulate_(acc: torch.Tensor, grad: torch.Tensor) -> None:
    """Add ``grad`` to ``acc`` in fp32, in place; a NaN is stored as 0x7FC00000.

    Args:
        acc: (numel,) fp32, CUDA, any shape, contiguous; updated in place.
        grad: (numel,) bf16 or fp32; only read.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit.
    """
    numel = arguments.check_accumulate(acc, grad)
    _check_device(acc)
    if numel == 0:
        return
    with torch.cuda.device_of(acc):
        _accumulate_kernel[(triton.cdiv(numel, BLOCK_NUMEL),)](
            acc.view(torch.int32), _bits(grad), numel, BLOCK=BLOCK_NUMEL, num_warps=NUM_WARPS
        )
    arguments.mark_written(acc)


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squares in float64 by the fixed tree (reference.py), without waiting for it.

    Args:
        x: (numel,) bf16 or fp32, CUDA, any shape, contiguous; numel may be 0.

    Returns:
        A new 0-dim float64 tensor on the device of ``x``, ready on its current stream.

    Raises:
        ValueError: if dtype, device or contiguity does not fit.
    """
    numel = arguments.check_sum_of_squares(x)
    _check_device(x)
    if numel == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    level = x
    with torch.cuda.device_of(x):
        while True:
            rows = triton.cdiv(level.numel(), ROW_NUMEL)
            sums = torch.empty(rows, dtype=torch.float64, device=x.device)
            _row_sums_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
                _bits(level),
                _bits(sums),
                level.numel(),
                rows,
                LOG2_SEGMENT=LOG2_SEGMENT_NUMEL,
                ROWS=BLOCK_ROWS,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
            if rows == 1:
                return sums[0]
            level = sums


def _launch_adamw(
    master: torch.Tensor,
    lo: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: AdamWScalars,
    grad_scale: float | torch.Tensor,
    numel: int,
    is_split: bool,
) -> None:
    _check_device(exp_avg)
    if isinstance(grad_scale, torch.Tensor):
        _check_scale(grad_scale, exp_avg)
    else:
        # Floats are passed by value without specialising on it, so no step compiles anything.
        grad_scale = round_to_fp32(grad_scale)
    if numel == 0:
        return
    with torch.cuda.device_of(exp_avg):
        _adamw_kernel[(triton.cdiv(numel, BLOCK_NUMEL),)](
            master,
            lo,
            _bits(grad),
            exp_avg.view(torch.int32),
            exp_avg_sq.view(torch.int32),
            grad_scale,
            scalars.decay,
            scalars.one_minus_beta1,
            scalars.beta2,
            scalars.one_minus_beta2,
            scalars.inv_bias_correction2_sqrt,
            scalars.eps,
            -scalars.step_size,
            numel,
            IS_SPLIT=is_split,
            SCALE_IS_POINTER=isinstance(grad_scale, torch.Tensor),
            INTERPRETED=triton.knobs.runtime.interpret,
            BLOCK=BLOCK_NUMEL,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def _bits(x: torch.Tensor) -> torch.Tensor:
    """View values as integers of their width, which is how the kernels tell bf16, fp32 and float64 apart."""
    return x.view(_BITS_DTYPES[x.dtype])


def _check_device(x: torch.Tensor) -> None:
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"the GPU kernels were given tensors on {x.device}, wanted cuda")


def _check_scale(grad_scale: torch.Tensor, operand: torch.Tensor) -> None:
    if grad_scale.numel() != 1 or grad_scale.dtype != torch.float32 or grad_scale.device != operand.device:
        raise ValueError(
            f"grad_scale must be a float or a 1-element torch.float32 tensor on {operand.device}, got "
            f"{grad_scale.numel()} elements of {grad_scale.dtype} on {grad_scale.device}"
        )


@triton.jit
def _adamw_kernel(
    master_ptr,  # IS_SPLIT: int16, the bits of hi; else int32, the bits of the fp32 parameters
    lo_ptr,  # IS_SPLIT: int16; else unused
    grad_ptr,  # int16: bits of bf16; int32: bits of fp32
    exp_avg_ptr,  # int32: bits of fp32, as is exp_avg_sq_ptr
    exp_avg_sq_ptr,
    grad_scale,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    inv_bias_correction2_sqrt,
    eps,
    minus_step_size,
    numel,
    IS_SPLIT: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    if SCALE_IS_POINTER:
        grad_scale = tl.load(grad_scale)
    g = _load_fp32(grad_ptr, offsets, mask) * grad_scale
    m = _load_fp32(exp_avg_ptr, offsets, mask)
    v = _load_fp32(exp_avg_sq_ptr, offsets, mask)
    if IS_SPLIT:
        hi_bits = tl.load(master_ptr + offsets, mask=mask, other=0).to(tl.int32) << 16
        lo_bits = tl.load(lo_ptr + offsets, mask=mask, other=0).to(tl.int32)
        p = (hi_bits + lo_bits).to(tl.float32, bitcast=True)
    else:
        p = _load_fp32(master_ptr, offsets, mask)

    # The interpreter hands floats over as Python floats: tl.full makes them fp32 everywhere.
    m = _fma(tl.full((BLOCK,), one_minus_beta1, tl.float32), g - m, m, INTERPRETED)
    v = _fma(one_minus_beta2 * g, g, beta2 * v, INTERPRETED)
    inv_bias_correction2_sqrt = tl.full((BLOCK,), inv_bias_correction2_sqrt, tl.float32)
    d = _fma(_sqrt(v), inv_bias_correction2_sqrt, tl.full((BLOCK,), eps, tl.float32), INTERPRETED)
    p = _fma(tl.full((BLOCK,), minus_step_size, tl.float32), tl.div_rn(m, d), p * decay, INTERPRETED)

    tl.store(exp_avg_ptr + offsets, _canonical_bits(m), mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, _canonical_bits(v), mask=mask)
    bits = _canonical_bits(p)
    if IS_SPLIT:
        # A canonical NaN, 0x7FC00000, splits into 0x7FC0 and 0 by itself.
        hi_bits = (bits + 0x8000) >> 16
        tl.store(master_ptr + offsets, hi_bits.to(tl.int16), mask=mask)
        tl.store(lo_ptr + offsets, (bits - (hi_bits << 16)).to(tl.int16), mask=mask)
    else:
        tl.store(master_ptr + offsets, bits, mask=mask)


@triton.jit
def _accumulate_kernel(acc_ptr, grad_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    total = _load_fp32(acc_ptr, offsets, mask) + _load_fp32(grad_ptr, offsets, mask)
    tl.store(acc_ptr + offsets, _canonical_bits(total), mask=mask)


@triton.jit
def _row_sums_kernel(
    values_ptr,  # int16 or int32: bits of bf16 or fp32, to be squared; int64: bits of row sums
    sums_ptr,  # int64
    numel,
    rows,
    LOG2_SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Reduce ROWS rows of 8 segments by halving; the first halvings add whole segments as they are loaded."""
    SEGMENT: tl.constexpr = 1 << LOG2_SEGMENT
    ROW: tl.constexpr = 8 * SEGMENT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = row[:, None] * ROW + tl.arange(0, SEGMENT)[None, :]
    even = _segment_pair(values_ptr, offsets, numel, SEGMENT) + _segment_pair(
        values_ptr, offsets + 2 * SEGMENT, numel, SEGMENT
    )
    odd = _segment_pair(values_ptr, offsets + SEGMENT, numel, SEGMENT) + _segment_pair(
        values_ptr, offsets + 3 * SEGMENT, numel, SEGMENT
    )
    sums = even + odd
    # A sum over two elements has one order only. tl.sum over the whole row would have Triton's own.
    for level in tl.static_range(1, LOG2_SEGMENT + 1):
        sums = tl.sum(tl.reshape(sums, (ROWS, 2, SEGMENT >> level)), axis=1)
    bits = tl.reshape(sums, (ROWS,)).to(tl.int64, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFFFFFFFFFF) > 0x7FF0000000000000, 0x7FF8000000000000, bits)
    tl.store(sums_ptr + row, bits, mask=row < rows)


@triton.jit
def _segment_pair(values_ptr, offsets, numel, SEGMENT: tl.constexpr):
    """Add the squares at ``offsets`` and half a row later."""
    later = offsets + 4 * SEGMENT
    return _squares(values_ptr, offsets, numel) + _squares(values_ptr, later, numel)


@triton.jit
def _squares(values_ptr, offsets, numel):
    # One return: Triton 3.6 compiles both ends of a function and wants them to agree.
    mask = offsets < numel
    if values_ptr.dtype.element_ty == tl.int64:
        squares = tl.load(values_ptr + offsets, mask=mask, other=0).to(tl.float64, bitcast=True)
    else:
        x = _load_fp32(values_ptr, offsets, mask).to(tl.float64)
        squares = x * x
    return squares


@triton.jit
def _load_fp32(bits_ptr, offsets, mask):
    """Load the bits of bf16 (int16) or fp32 (int32) values as fp32."""
    bits = tl.load(bits_ptr + offsets, mask=mask, other=0)
    if bits.dtype == tl.int16:
        bits = bits.to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _canonical_bits(x):
    """Return the bits of ``x``, every NaN as 0x7FC00000."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)


@triton.jit
def _fma(a, b, c, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        # Not every version's interpreter rounds tl.fma once: emulated as in reference.fma.
        product = a.to(tl.float64) * b.to(tl.float64)
        addend = c.to(tl.float64)
        total = product + addend
        addend_part = total - product
        error = (product - (total - addend_part)) + (addend - addend_part)
        bits = total.to(tl.int64, bitcast=True)
        inexact = (error > 0) | (error < 0)
        step = tl.where((error > 0) == (total > 0), 1, -1).to(tl.int64)
        bits += tl.where(inexact & ((bits & 1) == 0), step, 0)
        result = bits.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        result = tl.fma(a, b, c)
    return result


@triton.jit
def _sqrt(x):
    # For AMD, Triton 3.6 links a square root that is only right for normal numbers. Scaled by powers of two,
    # which is exact, no argument is denormal.
    is_small = x < 2.0**-96
    root = tl.sqrt_rn(tl.where(is_small, x * 2.0**64, x))
    return tl.where(is_small, root * 2.0**-32, root)
