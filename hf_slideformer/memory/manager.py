"""Unit memory: the host buffers of one unit, and the move of a model's parameters into them."""

from __future__ import annotations

import torch

from .layout import MomentFormat, MomentPart, Segment, UnitLayout
from .pinned import HostBuffer


class UnitMemory:
    """All host state of one unit.

    Weights are there from the start; optimizer state and gradient buffers are added when training needs them.
    What the GPU never touches (residuals, moments) is not pinned.

    Args:
        layout: places of the unit's parameters.
        pin: pin weights and gradients.
    """

    def __init__(self, layout: UnitLayout, *, pin: bool) -> None:
        self.layout = layout
        self._pin = pin
        self.weights = HostBuffer(layout.weight_bytes, pin=pin)
        self.lo = HostBuffer(layout.lo_numel * 2) if layout.lo_numel else None
        self._moments: dict[MomentPart, HostBuffer] = {}
        self.grads: HostBuffer | None = None
        self.grads_fp32 = False

    def allocate_moments(self, moments: MomentFormat) -> None:
        """Map zeroed moments for the trainable parameters (once)."""
        if not self._moments and self.layout.state_numel:
            self._moments = {
                part: HostBuffer(part.entries(self.layout.state_numel) * part.dtype.itemsize)
                for part in moments.parts
            }

    def allocate_gradients(self, *, fp32: bool, from_device: bool = True, least_bytes: int = 0) -> None:
        """Map the gradient buffer (once per kind): in the weights' dtypes, or in fp32.

        Args:
            fp32: what it holds.
            from_device: the device writes it, so that it is pinned where weights are; sums made by the CPU from a
                staging buffer need no pinning.
            least_bytes: make it at least so large, since the unit's input waits there until gradients come.
        """
        if self.layout.state_numel and (self.grads is None or fp32 != self.grads_fp32):
            nbytes = self.layout.state_numel * 4 if fp32 else self.layout.grad_bytes
            self.grads = HostBuffer(max(nbytes, least_bytes), pin=self._pin and from_device)
            self.grads_fp32 = fp32

    def weight(self, segment: Segment) -> torch.Tensor:
        """The parameter's weights in its own shape and storage."""
        spec = segment.spec
        return self.weights.tensor(spec.dtype, segment.weight_offset, spec.numel).view(spec.shape)

    def residual(self, segment: Segment) -> torch.Tensor | None:
        """The int16 half of the master, or None for parameters that are not split."""
        if segment.lo_offset < 0:
            return None
        assert self.lo is not None
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

    def buffers(self) -> list[HostBuffer]:
        """The buffers mapped now."""
        every = (self.weights, self.lo, self.grads, *self._moments.values())
        return [buffer for buffer in every if buffer is not None]

    def gradient(self, segment: Segment) -> torch.Tensor:
        """The parameter's place in the unit's own gradient buffer."""
        assert self.grads is not None
        return grad_view(self.grads, segment, fp32=self.grads_fp32)


def grad_view(buffer: HostBuffer, segment: Segment, *, fp32: bool) -> torch.Tensor:
    """A parameter's gradient inside a gradient buffer laid out in fp32 or in the weights' dtypes."""
    spec = segment.spec
    if fp32:
        return buffer.tensor(torch.float32, segment.state_offset * 4, spec.numel).view(spec.shape)
    return buffer.tensor(spec.dtype, segment.grad_offset, spec.numel).view(spec.shape)
