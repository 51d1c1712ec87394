"""The same operations on GPU tensors, in Triton (NVIDIA and AMD), with the bits of ``reference.py``.

Import this module only where it is needed: it imports Triton. Arguments, results and errors are described in
``ops.py``; tensors must be on a CUDA device. All functions enqueue on the current stream of their tensors' device and
never wait for it. Under TRITON_INTERPRET=1 they run on CPU tensors.

What keeps the bits the same:

* ``enable_fp_fusion=False``: nothing is contracted but the explicit fma.
* Division and square root are Triton's correctly rounded ones; small square roots are scaled (``_sqrt``).
* NaN are found and stored as integers, because compilers are free to change a NaN's bits.
* 16-bit values are converted by shifting bits, codes of 8-bit moments by adding a large number, never by an
  instruction whose result for NaN or out of range depends on the hardware.
"""

import functools
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from . import arguments, rules
from .arguments import MOMENT_BLOCK_NUMEL
from .reference import DITHER_BITS, EXP_AVG_LEVELS, EXP_AVG_SQ_LEVELS, SMALLEST_SCALE
from .scalars import Scalars, kernel_arguments, round_to_fp32

ROW_NUMEL = 1024
# Elements and rows per program; with 4 warps a thread moves 16 bytes at a time.
BLOCK_NUMEL = 1024
BLOCK_ROWS = 8
NUM_WARPS = 4
# A row is read as 8 segments, so that its first three halvings are additions of whole segments.
LOG2_SEGMENT_NUMEL = 7

# Blocks of 8-bit moments per program.
BLOCK_MOMENT_BLOCKS = BLOCK_NUMEL // MOMENT_BLOCK_NUMEL

_EXP_AVG_NUMERATOR = tl.constexpr(EXP_AVG_LEVELS * 4.0**DITHER_BITS)
_EXP_AVG_SQ_NUMERATOR = tl.constexpr(EXP_AVG_SQ_LEVELS * 4.0**DITHER_BITS)
_INV_EXP_AVG_LEVELS = tl.constexpr(round_to_fp32(1.0 / EXP_AVG_LEVELS))
_INV_EXP_AVG_SQ_LEVELS = tl.constexpr(round_to_fp32(1.0 / EXP_AVG_SQ_LEVELS))
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_DITHER_BITS = tl.constexpr(DITHER_BITS)
_LOW_BITS = tl.constexpr((1 << DITHER_BITS) - 1)

_BITS_DTYPES = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def accumulate_(acc: torch.Tensor, grad: torch.Tensor) -> None:
    """Add ``grad`` to ``acc`` in fp32, in place."""
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
    """Return the sum of the squares in float64 by the fixed tree, 0-dim on the device, without waiting for it."""
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


def _update(
    rule: rules.Rule,
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: Scalars,
    grad_scale: float | torch.Tensor = 1.0,
) -> None:
    """Update in one pass over memory."""
    update = arguments.check_update(rule, masters, grad, moments, scalars)
    _check_device(grad)
    grad_scale = _checked_scale(grad_scale, grad)
    if update.numel == 0:
        return
    kernel, tile = _UPDATES[update.kernel]
    with torch.cuda.device_of(grad):
        kernel[(triton.cdiv(update.numel, BLOCK_NUMEL),)](
            _bits(masters[0]),
            _bits(masters[-1]),  # not read if there is but one
            _bits(grad),
            *(_bits(x) for x in update.moments),
            grad_scale,
            *kernel_arguments(scalars),
            update.numel,
            IS_SPLIT=len(masters) == 2,
            SCALE_IS_POINTER=isinstance(grad_scale, torch.Tensor),
            INTERPRETED=triton.knobs.runtime.interpret,
            **tile,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    arguments.mark_written(*masters, *update.moments)


adamw_ = functools.partial(_update, rules.ADAMW)
lion_ = functools.partial(_update, rules.LION)
sgd_ = functools.partial(_update, rules.SGD)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """View floating values as integers of their width, which is how the kernels tell bf16, fp32 and float64 apart."""
    return x.view(_BITS_DTYPES[x.dtype]) if x.is_floating_point() else x


def _check_device(x: torch.Tensor) -> None:
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"the GPU kernels were given tensors on {x.device}, wanted cuda")


def _checked_scale(grad_scale: float | torch.Tensor, operand: torch.Tensor) -> float | torch.Tensor:
    """Return the scale as a kernel takes it: a tensor as it is, a number rounded to fp32."""
    if not isinstance(grad_scale, torch.Tensor):
        # Floats are passed by value without specialising on it, so no step compiles anything.
        return round_to_fp32(grad_scale)
    if grad_scale.numel() != 1 or grad_scale.dtype != torch.float32 or grad_scale.device != operand.device:
        raise ValueError(
            f"grad_scale must be a float or a 1-element torch.float32 tensor on {operand.device}, got "
            f"{grad_scale.numel()} elements of {grad_scale.dtype} on {grad_scale.device}"
        )
    return grad_scale


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
    g = _load_grad(grad_ptr, offsets, mask, grad_scale, SCALE_IS_POINTER)
    m = _load_fp32(exp_avg_ptr, offsets, mask)
    v = _load_fp32(exp_avg_sq_ptr, offsets, mask)
    p = _load_master(master_ptr, lo_ptr, offsets, mask, IS_SPLIT)
    p, m, v, _ = _updated(
        p,
        g,
        m,
        v,
        decay,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        inv_bias_correction2_sqrt,
        eps,
        minus_step_size,
        INTERPRETED,
    )
    tl.store(exp_avg_ptr + offsets, _canonical_bits(m), mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, _canonical_bits(v), mask=mask)
    _store_master(master_ptr, lo_ptr, offsets, mask, p, IS_SPLIT)


@triton.jit
def _adamw_8bit_kernel(
    master_ptr,  # IS_SPLIT: int16, the bits of hi; else int32, the bits of the fp32 parameters
    lo_ptr,  # IS_SPLIT: int16; else unused
    grad_ptr,  # int16: bits of bf16; int32: bits of fp32
    exp_avg_ptr,  # int8
    exp_avg_scale_ptr,  # int32: bits of fp32, as is exp_avg_sq_scale_ptr
    exp_avg_sq_ptr,  # uint8
    exp_avg_sq_scale_ptr,
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
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a tile of BLOCKS blocks of 8-bit moments, one in each row."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    block_mask = block * BLOCK < numel
    offsets = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = offsets < numel
    g = _load_grad(grad_ptr, offsets, mask, grad_scale, SCALE_IS_POINTER)
    q = tl.load(exp_avg_ptr + offsets, mask=mask, other=0).to(tl.int32)
    scale = _load_fp32(exp_avg_scale_ptr, block, block_mask)
    m = (q * tl.abs(q)).to(tl.float32) * _INV_EXP_AVG_LEVELS * scale[:, None]
    q = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0).to(tl.int32)
    scale = _load_fp32(exp_avg_sq_scale_ptr, block, block_mask)
    r = (q * q).to(tl.float32) * _INV_EXP_AVG_SQ_LEVELS * scale[:, None]
    p = _load_master(master_ptr, lo_ptr, offsets, mask, IS_SPLIT)
    p, m, _, r = _updated(
        p,
        g,
        m,
        r * r,
        decay,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        inv_bias_correction2_sqrt,
        eps,
        minus_step_size,
        INTERPRETED,
    )
    _store_master(master_ptr, lo_ptr, offsets, mask, p, IS_SPLIT)

    # Beyond the end everything is 0 and so not the highest value of a block (0 * inf is NaN, hence the mask).
    m_bits = tl.where(mask, m.to(tl.int32, bitcast=True), 0)
    q, scale_bits = _magnitude_codes(m_bits & 0x7FFFFFFF, _EXP_AVG_NUMERATOR)
    tl.store(exp_avg_scale_ptr + block, scale_bits, mask=block_mask)
    tl.store(exp_avg_ptr + offsets, tl.where(m_bits < 0, -q, q).to(tl.int8), mask=mask)
    r_bits = tl.where(mask, r.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    q, scale_bits = _magnitude_codes(r_bits, _EXP_AVG_SQ_NUMERATOR)
    tl.store(exp_avg_sq_scale_ptr + block, scale_bits, mask=block_mask)
    # A denominator must not be lost. Where a block has no codes, 0 stays 0.
    is_finite = scale_bits[:, None] < 0x7F800000
    q = tl.where((q == 0) & (r_bits > 0) & is_finite, 1, q)
    tl.store(exp_avg_sq_ptr + offsets, q.to(tl.uint8), mask=mask)


@triton.jit
def _magnitude_codes(magnitude_bits, NUMERATOR: tl.constexpr):
    """Return the codes of each row's magnitudes (int32) and the bits of its scale."""
    scale_bits = tl.max(magnitude_bits, axis=1)
    scale = scale_bits.to(tl.float32, bitcast=True)
    # As integers, which NaN do not escape.
    is_finite = scale_bits < 0x7F800000
    scale_bits = tl.where(scale_bits > 0x7F800000, 0x7FC00000, scale_bits)
    scale_bits = tl.where(is_finite & (scale < _SMALLEST_SCALE), 0, scale_bits)
    has_codes = is_finite & (scale_bits > 0)
    numerator = tl.full(scale.shape, NUMERATOR, tl.float32)
    inverse = tl.div_rn(numerator, tl.where(has_codes, scale, numerator))
    magnitude_bits = tl.where(has_codes[:, None], magnitude_bits, 0)
    # The sum is rounded to an integer, which stands in its lowest bits.
    rounded = _sqrt(magnitude_bits.to(tl.float32, bitcast=True) * inverse[:, None]) + 8388608.0
    root = rounded.to(tl.int32, bitcast=True) - 0x4B000000
    return (root + (magnitude_bits & _LOW_BITS)) >> _DITHER_BITS, scale_bits


@triton.jit
def _updated(
    p,
    g,
    m,
    v,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    inv_bias_correction2_sqrt,
    eps,
    minus_step_size,
    INTERPRETED: tl.constexpr,
):
    """Return parameter, m, v and sqrt(v) after the update with the scaled gradient ``g``."""
    # The interpreter hands floats over as Python floats: tl.full makes them fp32 everywhere.
    m = _fma(tl.full(g.shape, one_minus_beta1, tl.float32), g - m, m, INTERPRETED)
    v = _fma(one_minus_beta2 * g, g, beta2 * v, INTERPRETED)
    r = _sqrt(v)
    inv_bias_correction2_sqrt = tl.full(g.shape, inv_bias_correction2_sqrt, tl.float32)
    d = _fma(r, inv_bias_correction2_sqrt, tl.full(g.shape, eps, tl.float32), INTERPRETED)
    p = _fma(p, tl.full(g.shape, decay, tl.float32), minus_step_size * tl.div_rn(m, d), INTERPRETED)
    return p, m, v, r


@triton.jit
def _lion_kernel(
    master_ptr,  # as those of _adamw_kernel
    lo_ptr,
    grad_ptr,
    exp_avg_ptr,
    grad_scale,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    minus_step_size,
    numel,
    IS_SPLIT: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    g = _load_grad(grad_ptr, offsets, mask, grad_scale, SCALE_IS_POINTER)
    m = _load_fp32(exp_avg_ptr, offsets, mask)
    p = _load_master(master_ptr, lo_ptr, offsets, mask, IS_SPLIT)
    c = _fma(tl.full(g.shape, beta1, tl.float32), m, one_minus_beta1 * g, INTERPRETED)
    p = _fma(p, tl.full(g.shape, decay, tl.float32), minus_step_size * _sign(c), INTERPRETED)
    m = _fma(tl.full(g.shape, beta2, tl.float32), m, one_minus_beta2 * g, INTERPRETED)
    tl.store(exp_avg_ptr + offsets, _canonical_bits(m), mask=mask)
    _store_master(master_ptr, lo_ptr, offsets, mask, p, IS_SPLIT)


@triton.jit
def _sgd_kernel(
    master_ptr,  # as those of _adamw_kernel
    lo_ptr,
    grad_ptr,
    grad_scale,
    weight_decay,
    momentum,  # this and the next three say what to do with a buffer
    one_minus_dampening,
    nesterov,
    is_first,
    minus_step_size,
    numel,
    IS_SPLIT: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    g = _load_grad(grad_ptr, offsets, mask, grad_scale, SCALE_IS_POINTER)
    p = _load_master(master_ptr, lo_ptr, offsets, mask, IS_SPLIT)
    d = _fma(tl.full(g.shape, weight_decay, tl.float32), p, g, INTERPRETED)
    p = _fma(tl.full(g.shape, minus_step_size, tl.float32), d, p, INTERPRETED)
    _store_master(master_ptr, lo_ptr, offsets, mask, p, IS_SPLIT)


@triton.jit
def _sgd_momentum_kernel(
    master_ptr,  # as those of _adamw_kernel
    lo_ptr,
    grad_ptr,
    momentum_buffer_ptr,
    grad_scale,
    weight_decay,
    momentum,
    one_minus_dampening,
    nesterov,  # 0 or 1, as is is_first; not constexpr, so that the second step compiles nothing
    is_first,
    minus_step_size,
    numel,
    IS_SPLIT: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    g = _load_grad(grad_ptr, offsets, mask, grad_scale, SCALE_IS_POINTER)
    b = _load_fp32(momentum_buffer_ptr, offsets, mask)
    p = _load_master(master_ptr, lo_ptr, offsets, mask, IS_SPLIT)
    momentum = tl.full(g.shape, momentum, tl.float32)
    d = _fma(tl.full(g.shape, weight_decay, tl.float32), p, g, INTERPRETED)
    later = _fma(momentum, b, one_minus_dampening * d, INTERPRETED)
    b = tl.where(tl.full(g.shape, is_first, tl.float32) != 0.0, d, later)
    ahead = _fma(momentum, b, d, INTERPRETED)
    d = tl.where(tl.full(g.shape, nesterov, tl.float32) != 0.0, ahead, b)
    p = _fma(tl.full(g.shape, minus_step_size, tl.float32), d, p, INTERPRETED)
    tl.store(momentum_buffer_ptr + offsets, _canonical_bits(b), mask=mask)
    _store_master(master_ptr, lo_ptr, offsets, mask, p, IS_SPLIT)


@triton.jit
def _sign(x):
    """Return 1 with the sign of ``x``, 0 for either zero, NaN for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    one = tl.where(bits < 0, -1082130432, 0x3F800000)  # the bits of -1 and 1
    one = tl.where(magnitude > 0x7F800000, 0x7FC00000, one)
    return tl.where(magnitude == 0, 0, one).to(tl.float32, bitcast=True)


@triton.jit
def _load_grad(grad_ptr, offsets, mask, grad_scale, SCALE_IS_POINTER: tl.constexpr):
    """Load the scaled gradient."""
    if SCALE_IS_POINTER:
        grad_scale = tl.load(grad_scale)
    return _load_fp32(grad_ptr, offsets, mask) * grad_scale


@triton.jit
def _load_master(master_ptr, lo_ptr, offsets, mask, IS_SPLIT: tl.constexpr):
    if IS_SPLIT:
        hi_bits = tl.load(master_ptr + offsets, mask=mask, other=0).to(tl.int32) << 16
        lo_bits = tl.load(lo_ptr + offsets, mask=mask, other=0).to(tl.int32)
        p = (hi_bits + lo_bits).to(tl.float32, bitcast=True)
    else:
        p = _load_fp32(master_ptr, offsets, mask)
    return p


@triton.jit
def _store_master(master_ptr, lo_ptr, offsets, mask, p, IS_SPLIT: tl.constexpr):
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


_TILE = {"BLOCK": BLOCK_NUMEL}
_TILE_8BIT = {"BLOCKS": BLOCK_MOMENT_BLOCKS, "BLOCK": MOMENT_BLOCK_NUMEL}

# By the names of rules.py; a program works on BLOCK_NUMEL elements.
_UPDATES = {
    "adamw": (_adamw_kernel, _TILE),
    "adamw_8bit": (_adamw_8bit_kernel, _TILE_8BIT),
    "lion": (_lion_kernel, _TILE),
    "sgd": (_sgd_kernel, _TILE),
    "sgd_momentum": (_sgd_momentum_kernel, _TILE),
}
