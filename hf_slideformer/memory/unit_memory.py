"""Unit memory: tensors over the host buffers of one unit. Its home says which buffers these are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .buffers import Buffer, BufferView, HostBuffer
from .layout import DiskLayout, MomentFormat, MomentPart, Segment, UnitLayout


class UnitMemory:
    """All host state of one unit, as tensors over buffers.

    Args:
        layout: places of the unit's parameters.
        weights: what the device copies.
        lo: residuals; None where there are none, or while they are not in memory.

    Attributes:
        master_weights: where an update reads and writes weights.
        grads: the unit's own gradients; None until there is an optimizer.
        grads_fp32: whether these are fp32 sums, or in the weights' dtypes.
    """

    def __init__(self, layout: UnitLayout, weights: Buffer, lo: Buffer | None = None) -> None:
        self.layout = layout
        self.weights = self.master_weights = weights
        self.lo = lo
        self._moments: Mapping[MomentPart, Buffer] = {}
        self.grads: Buffer | None = None
        self.grads_fp32 = False

    def use_moments(self, buffers: Mapping[MomentPart, Buffer]) -> None:
        """Have moments in these buffers from now on."""
        self._moments = buffers

    def allocate_moments(self, moments: MomentFormat) -> None:
        """Have zeroed moments in RAM (once)."""
        numel = self.layout.state_numel
        if numel and not self._moments:
            self.use_moments(
                {part: HostBuffer(part.entries(numel) * part.dtype.itemsize) for part in moments.parts}
            )

    def use_gradients(self, buffer: Buffer | None, *, fp32: bool) -> None:
        """Have the unit's own gradients in this buffer from now on."""
        self.grads, self.grads_fp32 = buffer, fp32

    def attach(self, buffer: Buffer, places: DiskLayout, moments: MomentFormat) -> None:
        """Use residuals and moments (and weights) in a buffer that was read from disk, until `detach`."""
        if places.weight_bytes:
            self.master_weights = BufferView(buffer, places.weights[0])
        if places.lo_offset >= 0:
            self.lo = BufferView(buffer, places.lo_offset)
        if self.layout.state_numel:
            self._moments = {
                part: BufferView(buffer, offset)
                for part, offset in zip(moments.parts, places.moment_offsets, strict=True)
            }

    def detach(self) -> None:
        """Forget the attached buffer."""
        self.lo, self._moments = None, {}
        self.master_weights = self.weights

    def buffers(self) -> list[Buffer]:
        """All that are there now."""
        every = (self.weights, self.lo, self.grads, *self._moments.values())
        return [buffer for buffer in every if buffer is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of RAM that its buffers take now."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def weight(self, segment: Segment) -> torch.Tensor:
        """The parameter's weights in its own shape and storage."""
        spec = segment.spec
        return self.weights.tensor(spec.dtype, segment.weight_offset, spec.numel).view(spec.shape)

    def residual(self, segment: Segment) -> torch.Tensor | None:
        """The int16 half of the master; None for parameters that are not split, and while it is not in memory."""
        if segment.lo_offset < 0 or self.lo is None:
            return None
        return self.lo.tensor(torch.int16, segment.lo_offset * 2, segment.spec.numel).view(segment.spec.shape)

    def moments(self, segment: Segment) -> dict[str, torch.Tensor]:
        """The parameter's moments by name, in its shape; scales are (blocks,)."""
        flat = self.flat_moments(segment.state_offset, segment.spec.numel)
        return {part.name: flat[part.name].view(part.shape(segment.spec)) for part in self._moments}

    def flat_moments(self, offset: int, numel: int) -> dict[str, torch.Tensor]:
        """The moments by name of `numel` elements from element `offset` on, where a parameter begins."""
        return {
            part.name: buffer.tensor(
                part.dtype, part.entries(offset) * part.dtype.itemsize, part.entries(numel)
            )
            for part, buffer in self._moments.items()
        }

    def gradient(self, segment: Segment) -> torch.Tensor:
        """The parameter's place in the unit's own gradients."""
        assert self.grads is not None
        return grad_view(self.grads, segment, fp32=self.grads_fp32)


def grad_view(buffer: Buffer, segment: Segment, *, fp32: bool) -> torch.Tensor:
    """A parameter's gradient inside a gradient buffer laid out in fp32 or in the weights' dtypes."""
    spec = segment.spec
    if fp32:
        return buffer.tensor(torch.float32, segment.state_offset * 4, spec.numel).view(spec.shape)
    return buffer.tensor(spec.dtype, segment.grad_offset, spec.numel).view(spec.shape)
