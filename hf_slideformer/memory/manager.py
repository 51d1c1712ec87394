"""Unit memory: the host buffers of one unit, and the move of a model's parameters into them."""

from __future__ import annotations

import torch

from .layout import Segment, UnitLayout
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
        self.exp_avg: HostBuffer | None = None
        self.exp_avg_sq: HostBuffer | None = None
        self.grads: HostBuffer | None = None
        self.grads_fp32 = False

    def allocate_moments(self) -> None:
        """Map zeroed fp32 moments for the trainable parameters (once)."""
        if self.exp_avg is None and self.layout.state_numel:
            self.exp_avg = HostBuffer(self.layout.state_numel * 4)
            self.exp_avg_sq = HostBuffer(self.layout.state_numel * 4)

    def allocate_gradients(self, *, fp32: bool) -> None:
        """Map the unit's own gradient buffer (once per kind): in the weights' dtypes, or fp32 for sums."""
        if self.layout.state_numel and (self.grads is None or fp32 != self.grads_fp32):
            # fp32 sums are made by the CPU from a pinned staging buffer, so they need no pinning themselves.
            nbytes = self.layout.state_numel * 4 if fp32 else self.layout.grad_bytes
            self.grads = HostBuffer(nbytes, pin=self._pin and not fp32)
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

    def moments(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """`exp_avg` and `exp_avg_sq`, fp32, in the parameter's shape."""
        assert self.exp_avg is not None and self.exp_avg_sq is not None
        offset, spec = segment.state_offset * 4, segment.spec
        return (
            self.exp_avg.tensor(torch.float32, offset, spec.numel).view(spec.shape),
            self.exp_avg_sq.tensor(torch.float32, offset, spec.numel).view(spec.shape),
        )

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
