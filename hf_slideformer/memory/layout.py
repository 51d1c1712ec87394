"""Unit layouts: which bytes of a unit's flat buffers belong to which parameter. Pure data.

Every parameter starts at a multiple of 128 elements in each of its buffers, so at 256 bytes or more: matrix
libraries choose kernels by alignment, and placement must not change numbers. Blocks of 8-bit moments are as long,
so a parameter begins with a block of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from slideformer_kernels import MOMENT_BLOCK_NUMEL

ALIGN_ELEMENTS = 128
ALIGN_BYTES = 256
# Of offset, length and address in direct I/O: a page, and a multiple of any drive's sector.
DISK_ALIGN_BYTES = 4096


def _aligned(value: int, to: int) -> int:
    return -(-value // to) * to


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What is known of a parameter before any memory is laid out.

    `dtype` is the dtype in which it streams and computes; `split` says that its fp32 master is stored as that
    bf16 value and an int16 residual; `source_dtype` is the dtype it came in and is saved in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source_dtype: torch.dtype
    split: bool
    trainable: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    @property
    def joined_on_save(self) -> bool:
        """Whether the weight came in as fp32 and is live as the bf16 half of a split master."""
        return self.split and self.source_dtype == torch.float32


@dataclass(frozen=True, slots=True)
class MomentPart:
    """One tensor among a parameter's moments: `block_numel` consecutive elements share an entry of it.

    Its name is that of the kernels' argument and of the entry in an optimizer's state dict.
    """

    name: str
    dtype: torch.dtype
    block_numel: int = 1

    def entries(self, numel: int) -> int:
        """Number of entries for `numel` elements."""
        return -(-numel // self.block_numel)

    def shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """The parameter's own shape, or (blocks,)."""
        return spec.shape if self.block_numel == 1 else (self.entries(spec.numel),)


@dataclass(frozen=True, slots=True)
class MomentFormat:
    """What an optimizer keeps for each parameter besides its master; plans, rates and checkpoints know it by `name`.

    The names of AdamW's are the values of `SlideConfig.optimizer_states`.
    """

    name: str
    parts: tuple[MomentPart, ...]

    @property
    def elementwise(self) -> bool:
        """Whether no element's entries depend on its neighbours."""
        return all(part.block_numel == 1 for part in self.parts)

    def nbytes(self, numel: int) -> int:
        """Bytes of the moments of `numel` elements."""
        return sum(part.entries(numel) * part.dtype.itemsize for part in self.parts)


FP32_MOMENTS = MomentFormat(
    "fp32", (MomentPart("exp_avg", torch.float32), MomentPart("exp_avg_sq", torch.float32))
)
EIGHT_BIT_MOMENTS = MomentFormat(
    "8bit",
    (
        MomentPart("exp_avg", torch.int8),
        MomentPart("exp_avg_scale", torch.float32, MOMENT_BLOCK_NUMEL),
        MomentPart("exp_avg_sq", torch.uint8),
        MomentPart("exp_avg_sq_scale", torch.float32, MOMENT_BLOCK_NUMEL),
    ),
)
MOMENT_FORMATS = {moments.name: moments for moments in (FP32_MOMENTS, EIGHT_BIT_MOMENTS)}


@dataclass(frozen=True, slots=True)
class Segment:
    """One parameter's place in its unit's buffers.

    `weight_offset` and `grad_offset` are in bytes; `state_offset` (moments, fp32 gradients) and `lo_offset`
    (residual) in elements, -1 where the parameter has no such state.
    """

    spec: ParamSpec
    weight_offset: int
    grad_offset: int
    state_offset: int
    lo_offset: int

    @classmethod
    def alone(cls, spec: ParamSpec) -> Segment:
        """The segment of a resident parameter, which has tensors of its own and no place in a unit."""
        return cls(spec, -1, -1, -1, -1)

    @property
    def is_alone(self) -> bool:
        """Whether the parameter has no place in a unit."""
        return self.weight_offset < 0


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """The segments of one unit, trainable ones first, and the sizes of its buffers."""

    segments: tuple[Segment, ...]
    weight_bytes: int
    grad_bytes: int
    state_numel: int
    lo_numel: int

    @property
    def numel(self) -> int:
        """Number of parameters, padding not counted."""
        return sum(segment.spec.numel for segment in self.segments)

    @property
    def trainable_numel(self) -> int:
        """Number of trainable parameters, padding not counted."""
        return sum(segment.spec.numel for segment in self.segments if segment.spec.trainable)


def lay_out(specs: Sequence[ParamSpec]) -> UnitLayout:
    """The layout of one unit's parameters.

    Order: trainable split, trainable plain, frozen split, frozen plain; registration order within each, so
    that neighbours of one optimizer group can be updated by one kernel call.
    """
    order = sorted(specs, key=lambda spec: (not spec.trainable, not spec.split))
    segments = []
    weight_bytes = grad_bytes = state_numel = lo_numel = 0
    for spec in order:
        padded = _aligned(spec.numel, ALIGN_ELEMENTS)
        nbytes = _aligned(padded * spec.dtype.itemsize, ALIGN_BYTES)
        segments.append(
            Segment(
                spec,
                weight_bytes,
                grad_bytes if spec.trainable else -1,
                state_numel if spec.trainable else -1,
                lo_numel if spec.split else -1,
            )
        )
        weight_bytes += nbytes
        if spec.trainable:
            grad_bytes += nbytes
            state_numel += padded
        if spec.split:
            lo_numel += padded
    return UnitLayout(tuple(segments), weight_bytes, grad_bytes, state_numel, lo_numel)


Span = tuple[int, int]  # first byte and number of bytes of a file, both multiples of 4096


@dataclass(frozen=True, slots=True)
class DiskLayout:
    """The parts of one unit's state in its file on disk, and in a host buffer that was read from its start.

    Moments' parts in order, residuals, weights, gradients that wait for their update, an input that waits for backward.
    Every part starts at a multiple of 4096 bytes.

    Attributes:
        moment_offsets: bytes, in the order of the moments' parts.
        lo_offset: bytes; -1 where the unit has no residuals.
        nbytes: of moments and residuals; 0 where the unit has neither.
        weight_bytes: 0 where weights stay in RAM.
        grad_bytes: 0 where gradients do.
        input_bytes: 0 where the input does.
    """

    moment_offsets: tuple[int, ...]
    lo_offset: int
    nbytes: int
    weight_bytes: int = 0
    grad_bytes: int = 0
    input_bytes: int = 0

    @property
    def state(self) -> Span:
        """Moments and residuals."""
        return 0, self.nbytes

    @property
    def weights(self) -> Span:
        """Weights."""
        return self.nbytes, self.weight_bytes

    @property
    def gradients(self) -> Span:
        """Gradients."""
        return self.nbytes + self.weight_bytes, self.grad_bytes

    @property
    def input(self) -> Span:
        """The input, which ends the file."""
        return self.nbytes + self.weight_bytes + self.grad_bytes, self.input_bytes

    @property
    def masters(self) -> Span:
        """What an update changes: state and weights."""
        return 0, self.nbytes + self.weight_bytes

    @property
    def masters_and_gradients(self) -> Span:
        """What an update needs where gradients wait."""
        return 0, self.nbytes + self.weight_bytes + self.grad_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of everything."""
        return sum(self.input)


def lay_out_on_disk(
    layout: UnitLayout,
    moments: MomentFormat,
    *,
    weights: bool = False,
    grad_bytes: int = 0,
    input_bytes: int = 0,
) -> DiskLayout:
    """The layout of a unit's state on disk.

    Args:
        layout: of the unit.
        moments: how they are stored.
        weights: whether weights are there too.
        grad_bytes: of gradients that wait there for their update.
        input_bytes: of the input that waits there for backward.
    """
    offsets = []
    nbytes = 0
    for part in moments.parts:
        offsets.append(nbytes)
        nbytes += _aligned(part.entries(layout.state_numel) * part.dtype.itemsize, DISK_ALIGN_BYTES)
    lo_offset = nbytes if layout.lo_numel else -1
    nbytes += _aligned(layout.lo_numel * torch.int16.itemsize, DISK_ALIGN_BYTES)
    return DiskLayout(
        tuple(offsets),
        lo_offset,
        nbytes,
        _aligned(layout.weight_bytes if weights else 0, DISK_ALIGN_BYTES),
        _aligned(grad_bytes, DISK_ALIGN_BYTES),
        _aligned(input_bytes, DISK_ALIGN_BYTES),
    )
