"""Updates of split and plain fp32 masters, and the gradient norm, in plain PyTorch: the truth for every kernel.

**AdamW** has decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, Alg. 2, with
the schedule multiplier folded into the learning rate). For each element, with ``g`` the gradient converted to
fp32 and the scalars of :class:`~slideformer_kernels.scalars.AdamWScalars`::

    g = g * grad_scale
    m = fma(one_minus_beta1, g - m, m)
    v = fma(one_minus_beta2 * g, g, beta2 * v)
    d = fma(sqrt(v), inv_bias_correction2_sqrt, eps)
    p = fma(p, decay, -step_size * (m / d))

**Lion** (Chen et al. 2023, arXiv 2302.06675, Alg. 2, decoupled weight decay multiplied with the learning rate as
in the authors' code) has one moment, and moves each weight by the learning rate::

    g = g * grad_scale
    c = fma(beta1, m, one_minus_beta1 * g)
    p = fma(p, decay, -step_size * sign(c))
    m = fma(beta2, m, one_minus_beta2 * g)

``sign`` is 1, -1 or, for either zero, +0. It is NaN for NaN: a gradient that is none must reach the weight.

**SGD** is that of ``torch.optim.SGD``: weight decay is coupled, and momentum keeps a buffer ``b``, which the first
step sets to the gradient::

    g = g * grad_scale
    d = fma(weight_decay, p, g)
    b = fma(momentum, b, one_minus_dampening * d)     (first step: b = d)
    u = b;  with nesterov: u = fma(momentum, b, d);  without momentum: u = d
    p = fma(-step_size, u, p)

In all rules every operation is one IEEE 754 fp32 operation: round to nearest even, denormals kept, division and
square root correctly rounded, nothing contracted beyond the explicit fma. A NaN that is stored (moments, ``p``) is
stored as 0x7FC00000, because hardware disagrees about sign and payload of the NaN that an operation makes. So CPU
and GPU kernels store the same bits. A weight is rounded once, with weight decay and without: the product that is
rounded by itself is the change, which is small beside it.

**The split master** holds an fp32 value in 4 bytes as ``hi`` (bf16) and ``lo`` (int16)::

    join:   bits = (hi << 16) + sign_extend(lo)                     (uint32, wrapping)
    split:  hi = (bits + 0x8000) >> 16;  lo = bits - (hi << 16);    NaN -> hi = 0x7FC0, lo = 0

``hi`` is the value rounded to bf16 with ties away from zero (torch's cast takes ties to even). Values that
round up to infinity keep their exact value: their ``lo`` is negative.

**8-bit moments** keep ``m`` and ``v`` between steps in one byte each, with one fp32 scale each for every block
of MOMENT_BLOCK_NUMEL consecutive elements of the flat parameter (the last block may be short). Both are
companded by a square root, which spends the codes on a range of 1 : 16129 and 1 : 65025; ``v`` is stored as
``r = sqrt(v)``, which the update needs anyway. Again each operation is one IEEE fp32 operation::

    read:   m = ((q * abs(q)) * (1 / 16129)) * scale                (int8 q)
            r = ((q * q) * (1 / 65025)) * scale;  v = r * r         (uint8 q)
    store:  scale = max(abs(m)) of the block;  q = code(abs(m), 16129 / scale), with the sign of m
            scale = max(r) of the block;  q = code(r, 65025 / scale), at least 1 where r > 0
            code(x, inverse) = (rne(sqrt(x * (inverse * 2**20))) + (bits of x) mod 1024) >> 10

``1 / 16129`` and ``1 / 65025`` are rounded to fp32 beforehand; times 16129 and 65025 they give exactly 1, so
that the largest element is read back as it was. ``rne`` rounds to the nearest integer, ties to even; the root
is that of ``x * inverse`` in units of 1/1024, because ``inverse * 2**20`` is one division, of a numerator that
was scaled before. The largest element of a block has code 127 or 255 and no code is beyond. The floor of 1
keeps a denominator from being lost, which would blow up the next update wherever ``m`` is not 0. Only what is
stored is rounded to codes: the parameter of this step follows the new ``m`` and ``v`` themselves.

*Dithering*: a root is rounded up as often as its fraction says, so that changes of less than a code are kept on
average. Rounded to nearest they would be lost: with ``beta2 = 0.999`` a step moves ``r`` by 0.05 % and codes
are 0.8 % apart at best, so the ratios within a block would freeze, and its scale, which follows the largest,
would drag all of it up. What decides are the low 10 bits of the value itself. They change with each step as if
at random and have next to nothing to do with the code, which the high bits make; they need no generator, state
or index; and a value that was read from a code has that code again.

Edges, the same on every path:

* ``max`` compares the bits of absolute values as integers, NaN as 0x7FC00000, so NaN > inf > finite.
* A scale that is not finite is stored as it is (NaN as 0x7FC00000) with all codes 0, so that the next step
  reads NaN in the whole block: one gradient that is not finite poisons its block, where fp32 moments poison
  their element.
* A scale below 2**-90 is stored as 0 with all codes 0, so that no quotient overflows or is denormal. For
  ``r`` this does not happen: the square root of the smallest denormal is 2**-74.5.
* Codes of 0 with scales of 0 are the moments of a new parameter.

**The sum of squares** has one summation tree, independent of threads and hardware: squares in float64
(exact), rows of 1024 (the last one padded with zeros), each row halved (``x[:512] + x[512:]``, ...) to one
value; the row sums form the next vector, until one value is left.

Where the machine has no C compiler these functions are also what runs on the CPU. They work in chunks, so
that their temporaries stay below 20 MB whatever the size of the tensors. Arguments, results and errors are
described in ``ops.py``.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from . import arguments, rules
from .arguments import MOMENT_BLOCK_NUMEL
from .scalars import AdamWScalars, LionScalars, SGDScalars, round_to_fp32

# Temporaries of this size stay in the cache, which makes it twice as fast as chunks of a million.
CHUNK_NUMEL = 1 << 17
ROW_NUMEL = 1024
_NAN_BITS = 0x7FC00000
_NAN_HI_BITS = 0x7FC0

EXP_AVG_LEVELS = 127.0**2
EXP_AVG_SQ_LEVELS = 255.0**2
SMALLEST_SCALE = 2.0**-90
DITHER_BITS = 10


@torch.no_grad()
def adamw_(
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: AdamWScalars,
    grad_scale: float = 1.0,
) -> None:
    """Update weights in place with AdamW (formula: module docstring)."""
    update = arguments.check_update(rules.ADAMW, masters, grad, moments, scalars)
    is_8bit = update.kernel == "adamw_8bit"
    for part in _chunks(update.numel):
        state = _codes_of(part, *update.moments) if is_8bit else _cut(update.moments, part)
        p, g = _read(masters, grad, part, grad_scale)
        m, v = _read_codes(*state) if is_8bit else state
        m = fma(scalars.one_minus_beta1, g - m, m)
        v = fma(g * scalars.one_minus_beta2, g, v * scalars.beta2)
        r = _sqrt(v)
        d = fma(scalars.inv_bias_correction2_sqrt, r, scalars.eps)
        p = fma(scalars.decay, p, m / d * -scalars.step_size)
        if is_8bit:
            _store_codes(m, r, *state)
        else:
            _store_moments((m, v), state)
        _store_master(p, _cut(masters, part))


@torch.no_grad()
def lion_(
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: LionScalars,
    grad_scale: float = 1.0,
) -> None:
    """Update weights in place with Lion (formula: module docstring)."""
    update = arguments.check_update(rules.LION, masters, grad, moments, scalars)
    for part in _chunks(update.numel):
        state = _cut(update.moments, part)
        (m,) = state
        p, g = _read(masters, grad, part, grad_scale)
        c = fma(scalars.beta1, m, g * scalars.one_minus_beta1)
        p = fma(scalars.decay, p, _sign(c) * -scalars.step_size)
        m = fma(scalars.beta2, m, g * scalars.one_minus_beta2)
        _store_moments((m,), state)
        _store_master(p, _cut(masters, part))


@torch.no_grad()
def sgd_(
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: SGDScalars,
    grad_scale: float = 1.0,
) -> None:
    """Update weights in place with SGD (formula: module docstring)."""
    update = arguments.check_update(rules.SGD, masters, grad, moments, scalars)
    for part in _chunks(update.numel):
        p, g = _read(masters, grad, part, grad_scale)
        u = d = fma(scalars.weight_decay, p, g)
        for b in _cut(update.moments, part):
            new = d if scalars.is_first else fma(scalars.momentum, b, d * scalars.one_minus_dampening)
            u = fma(scalars.momentum, new, d) if scalars.nesterov else new
            _store_moments((new,), (b,))
        _store_master(fma(-scalars.step_size, u, p), _cut(masters, part))


@torch.no_grad()
def quantize_moments(
    exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convert fp32 moments to 8-bit ones, as a step would store them (module docstring)."""
    numel = arguments.check_moments("quantize_moments", "adamw", exp_avg, exp_avg_sq)
    blocks, device = -(-numel // MOMENT_BLOCK_NUMEL), exp_avg.device
    codes = (
        torch.empty(exp_avg.shape, dtype=torch.int8, device=device),
        torch.empty(blocks, dtype=torch.float32, device=device),
        torch.empty(exp_avg.shape, dtype=torch.uint8, device=device),
        torch.empty(blocks, dtype=torch.float32, device=device),
    )
    for part in _chunks(numel):
        m, r = exp_avg.view(-1)[part], _sqrt(exp_avg_sq.view(-1)[part])
        _store_codes(m, r, *_codes_of(part, *codes))
    return codes


@torch.no_grad()
def dequantize_moments(
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert 8-bit moments to fp32, to what the next step reads (module docstring)."""
    codes = exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale
    numel = arguments.check_moments("dequantize_moments", "adamw_8bit", *codes)
    m = torch.empty(exp_avg.shape, dtype=torch.float32, device=exp_avg.device)
    v = torch.empty(exp_avg.shape, dtype=torch.float32, device=exp_avg.device)
    for part in _chunks(numel):
        _store_moments(_read_codes(*_codes_of(part, *codes)), _cut((m, v), part))
    return m, v


@torch.no_grad()
def split_master(
    fp32: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 values into their bf16 part and the residual (module docstring)."""
    hi, lo = arguments.split_outputs(fp32, out)
    for part in _chunks(fp32.numel()):
        _split_into(fp32.view(-1)[part], hi.view(-1)[part], lo.view(-1)[part])
    return hi, lo


@torch.no_grad()
def join_master(hi: torch.Tensor, lo: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Join a split master to fp32, bit for bit (module docstring)."""
    out = arguments.join_output(hi, lo, out)
    for part in _chunks(hi.numel()):
        out.view(-1)[part].view(torch.int32).copy_(_join_bits(hi.view(-1)[part], lo.view(-1)[part]))
    return out


@torch.no_grad()
def accumulate_(acc: torch.Tensor, grad: torch.Tensor) -> None:
    """Add ``grad`` to ``acc`` in fp32, in place; a NaN is stored as 0x7FC00000."""
    numel = arguments.check_accumulate(acc, grad)
    for part in _chunks(numel):
        acc_part = acc.view(-1)[part]
        acc_part.copy_(_canonical_nan(acc_part + grad.view(-1)[part].float()))


@torch.no_grad()
def sum_of_squares(x: torch.Tensor) -> float:
    """Return the sum of the squares in float64 by the fixed tree (module docstring); waits for a CUDA device."""
    numel = arguments.check_sum_of_squares(x)
    if numel == 0:
        return 0.0
    level = torch.cat([_row_sums(x.view(-1)[part].double().square()) for part in _chunks(numel)])
    while level.numel() > 1:
        level = _row_sums(level)
    total = level.item()
    return math.nan if math.isnan(total) else total


def fma(a: torch.Tensor | float, b: torch.Tensor, c: torch.Tensor | float) -> torch.Tensor:
    """Return the correctly rounded fp32 value of ``a * b + c`` for fp32 operands.

    The product of two fp32 values is exact in float64. The float64 sum is corrected to round-to-odd with the
    error that TwoSum (Knuth) gives; rounding that to fp32 then is free of double rounding, because float64
    has more than two bits to spare, for denormal results too (Boldo & Melquiond 2008, "Emulation of FMA and
    correctly rounded sums: proved algorithms using rounding to odd").

    Args:
        a: (n,) fp32 or a Python float that fp32 holds exactly.
        b: (n,) fp32.
        c: (n,) fp32 or a Python float that fp32 holds exactly.
    """
    product = b.double() * (a.double() if isinstance(a, torch.Tensor) else a)
    addend = c.double() if isinstance(c, torch.Tensor) else torch.full_like(product, c)
    total = product + addend
    addend_part = total - product
    error = (product - (total - addend_part)) + (addend - addend_part)
    # Comparisons with NaN are false: an infinite or NaN total, whose error is NaN, stays as it is.
    inexact = (error > 0) | (error < 0)
    bits = total.view(torch.int64)
    magnitude_grows = (error > 0) == (total > 0)
    step = magnitude_grows.long().mul_(2).sub_(1)
    step *= inexact & ((bits & 1) == 0)
    return (bits + step).view(torch.float64).float()


def _cut(tensors: Sequence[torch.Tensor], part: slice) -> tuple[torch.Tensor, ...]:
    """Cut the chunk ``part`` out of tensors of any shape."""
    return tuple(tensor.view(-1)[part] for tensor in tensors)


def _read(
    masters: Sequence[torch.Tensor], grad: torch.Tensor, part: slice, grad_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and scaled gradient of one chunk in fp32."""
    master = _cut(masters, part)
    p = master[0] if len(master) == 1 else _join_bits(*master).view(torch.float32)
    return p, grad.view(-1)[part].float() * round_to_fp32(grad_scale)


def _sign(x: torch.Tensor) -> torch.Tensor:
    """Return 1 with the sign of ``x``, +0 for either zero, NaN for NaN."""
    return torch.where(x.isnan(), x, (x > 0).float() - (x < 0).float())


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    """Return the correctly rounded fp32 square root.

    It goes through float64: the vector maths library behind torch's fp32 sqrt need not round correctly, and
    with 53 >= 2 * 24 + 2 bits the second rounding does no harm.
    """
    return x.double().sqrt().float()


def _store_moments(values: Sequence[torch.Tensor], moments: Sequence[torch.Tensor]) -> None:
    """Write the temporaries ``values``; changes their NaN."""
    for value, moment in zip(values, moments, strict=True):
        moment.copy_(_canonical_nan(value))


def _store_master(p: torch.Tensor, master: Sequence[torch.Tensor]) -> None:
    """Write the temporary ``p`` to one chunk of the masters; may change its NaN."""
    if len(master) == 1:
        master[0].copy_(_canonical_nan(p))
    else:
        _split_into(p, *master)


def _codes_of(
    part: slice,
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut the chunk ``part``, which begins with a block, out of 8-bit moments."""
    blocks = slice(part.start // MOMENT_BLOCK_NUMEL, -(-part.stop // MOMENT_BLOCK_NUMEL))
    return (
        exp_avg.view(-1)[part],
        exp_avg_scale.view(-1)[blocks],
        exp_avg_sq.view(-1)[part],
        exp_avg_sq_scale.view(-1)[blocks],
    )


def _read_codes(
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return m and v of one chunk in fp32."""
    q = exp_avg.float()
    m = q * q.abs() * round_to_fp32(1.0 / EXP_AVG_LEVELS) * _per_element(exp_avg_scale, q)
    q = exp_avg_sq.float()
    r = q * q * round_to_fp32(1.0 / EXP_AVG_SQ_LEVELS) * _per_element(exp_avg_sq_scale, q)
    return m, r * r


def _store_codes(
    m: torch.Tensor,
    r: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
) -> None:
    """Write m and r = sqrt(v) of one chunk as codes and scales."""
    q = _magnitude_codes(m, EXP_AVG_LEVELS, exp_avg_scale)
    exp_avg.copy_(torch.where(m < 0, -q, q))
    q = _magnitude_codes(r, EXP_AVG_SQ_LEVELS, exp_avg_sq_scale)
    # The floor of 1 is for blocks that have codes.
    floor = (r > 0) & _per_element(exp_avg_sq_scale.isfinite(), r)
    exp_avg_sq.copy_(torch.maximum(q, floor.int()))


def _magnitude_codes(x: torch.Tensor, levels: float, scale: torch.Tensor) -> torch.Tensor:
    """Write the scales of the blocks of ``x``; return the codes of its magnitudes as int32."""
    magnitude_bits = (x.view(torch.int32) & 0x7FFFFFFF).masked_fill_(x.isnan(), _NAN_BITS)
    padding = -x.numel() % MOMENT_BLOCK_NUMEL
    blocks = torch.nn.functional.pad(magnitude_bits, (0, padding)).view(-1, MOMENT_BLOCK_NUMEL)
    scale.copy_(blocks.amax(dim=1).view(torch.float32))
    scale.masked_fill_(scale < SMALLEST_SCALE, 0.0)
    has_codes = scale.isfinite() & (scale > 0)
    # Both operands are tensors: torch may multiply a number with the reciprocal, which rounds twice.
    numerator = torch.full_like(scale, levels * 4.0**DITHER_BITS)
    inverse = (numerator / scale).masked_fill_(~has_codes, 0.0)
    # What has no code may be NaN, whose conversion to an integer is not defined.
    root = _sqrt(x.abs() * _per_element(inverse, x)).masked_fill_(~_per_element(has_codes, x), 0.0)
    low_bits = x.view(torch.int32) & ((1 << DITHER_BITS) - 1)
    return (root.round_().int() + low_bits) >> DITHER_BITS


def _per_element(per_block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Repeat the value of each block for its elements."""
    return per_block.repeat_interleave(MOMENT_BLOCK_NUMEL)[: like.numel()]


def _canonical_nan(x: torch.Tensor) -> torch.Tensor:
    """Replace every NaN of the temporary ``x`` by 0x7FC00000, in place."""
    return x.masked_fill_(x.isnan(), math.nan)


def _join_bits(hi: torch.Tensor, lo: torch.Tensor) -> torch.Tensor:
    """Return the joined values' bits as int32, whose wrap-around is that of uint32."""
    return (hi.view(torch.int16).int() << 16) + lo.int()


def _split_into(fp32: torch.Tensor, hi: torch.Tensor, lo: torch.Tensor) -> None:
    bits = fp32.view(torch.int32)
    is_nan = fp32.isnan()
    # Narrowing to int16 keeps the low 16 bits, so the arithmetic shift equals the logical one.
    hi_bits = ((bits + 0x8000) >> 16).masked_fill_(is_nan, _NAN_HI_BITS)
    lo.copy_((bits - (hi_bits << 16)).masked_fill_(is_nan, 0))
    hi.view(torch.int16).copy_(hi_bits)


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """Reduce float64 ``values`` (n,) to (ceil(n / 1024),) by halving each row."""
    padding = -values.numel() % ROW_NUMEL
    rows = torch.nn.functional.pad(values, (0, padding)).view(-1, ROW_NUMEL)
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows.view(-1)


def _chunks(numel: int) -> list[slice]:
    """Cut ``numel`` elements into slices of CHUNK_NUMEL, a multiple of ROW_NUMEL."""
    return [slice(start, min(start + CHUNK_NUMEL, numel)) for start in range(0, numel, CHUNK_NUMEL)]
