"""Unit memory: the host buffers of one unit, and the move of a model's parameters into them."""

from __future__ import annotations

import torch

from .buffers import (
    BufferView,
    HostBuffer,
    MappedFile,
    Pin,
)
from .layout import (
    DiskLayout,
    MomentFormat,
    MomentPart,
    Segment,
    Span,
    UnitLayout,
)


class UnitMemory:
    """All host state of one unit.

    Weights are there from the start; optimizer state and gradient buffers are added when training needs them.
    What the GPU never touches (residuals, moments) is not pinned. It may live on disk instead; then there is none but
    while a buffer that was read from there is attached.

    Args:
        layout: places of the unit's parameters.
        pin: pin weights and gradients.
        on_disk: residuals and moments live on disk.
        mapped: the file, where weights and gradients do so too, and its layout.
    """

    def __init__(
        self,
        layout: UnitLayout,
        *,
        pin: Pin,
        on_disk: bool = False,
        mapped: tuple[MappedFile, DiskLayout] | None = None,
    ) -> None:
        self.layout = layout
        self._pin = pin
        self._mapped = mapped
        self.weights: HostBuffer | BufferView = (
            HostBuffer(layout.weight_bytes, pin=pin)
            if mapped is None
            else BufferView(mapped[0], mapped[1].weights[0])
        )
        # Where an update reads and writes weights.
        self.master_weights: HostBuffer | BufferView = self.weights
        self.on_disk = on_disk
        self.lo: HostBuffer | BufferView | None = None
        if layout.lo_numel and not on_disk:
            self.lo = HostBuffer(layout.lo_numel * 2)
        self._moments: dict[MomentPart, HostBuffer] | dict[MomentPart, BufferView] = {}
        self.grads: HostBuffer | BufferView | None = None
        self.grads_fp32 = False

    def allocate_moments(self, moments: MomentFormat) -> None:
        """Map zeroed moments for the trainable parameters (once), unless they live on disk."""
        if not self._moments and self.layout.state_numel and not self.on_disk:
            self._moments = {
                part: HostBuffer(part.entries(self.layout.state_numel) * part.dtype.itemsize)
                for part in moments.parts
            }

    def attach(self, buffer: HostBuffer, places: DiskLayout, moments: MomentFormat) -> None:
        """Use residuals and moments in a buffer that was read from disk, until `detach`."""
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
            # Gradients that are there are about to be copied: to the same bytes, or to bytes that are not theirs.
            moves = self.grads_on_disk and nbytes != self.layout.grad_bytes
            self.grads_fp32 = fp32
            if self._mapped is not None and self._mapped[1].grad_bytes >= nbytes and not moves:
                self.grads = BufferView(self._mapped[0], self._mapped[1].gradients[0])
            else:  # a sum that nobody expected is in RAM, whatever the file has room for
                self.grads = HostBuffer(max(nbytes, least_bytes), pin=from_device and self._pin)

    def free_for_training(self) -> None:
        """Let go of gradient buffers and moments; those that live on disk stay there."""
        self.grads, self.grads_fp32 = None, False
        if not self.on_disk:
            self._moments = {}

    def free(self) -> None:
        """Let go of everything; what tensors still use stays until they are gone."""
        self.free_for_training()
        self.weights = self.master_weights = HostBuffer(0)
        self.lo, self._moments = None, {}

    @property
    def grads_span(self) -> Span | None:
        """Where in the file gradients wait; None if they wait in RAM, or not at all."""
        return self._mapped[1].gradients if self._mapped is not None and self._mapped[1].grad_bytes else None

    @property
    def grads_on_disk(self) -> bool:
        """Whether the gradient buffer that is there now is a part of the file."""
        return isinstance(self.grads, BufferView)

    def weight(self, segment: Segment) -> torch.Tensor:
        """The parameter's weights in its own shape and storage."""
        spec = segment.spec
        return self.weights.tensor(spec.dtype, segment.weight_offset, spec.numel).view(spec.shape)

    def residual(self, segment: Segment) -> torch.Tensor | None:
        """The int16 half of the master; None for parameters that are not split, and while it is on disk."""
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

    def buffers(self) -> list[HostBuffer]:
        """The unit's own buffers mapped now."""
        every = (self.weights, self.lo, self.grads, *self._moments.values())
        return [buffer for buffer in every if isinstance(buffer, HostBuffer)]

    def gradient(self, segment: Segment) -> torch.Tensor:
        """The parameter's place in the unit's own gradient buffer."""
        assert self.grads is not None
        return grad_view(self.grads, segment, fp32=self.grads_fp32)


def grad_view(buffer: HostBuffer | BufferView, segment: Segment, *, fp32: bool) -> torch.Tensor:
    """A parameter's gradient inside a gradient buffer laid out in fp32 or in the weights' dtypes."""
    spec = segment.spec
    if fp32:
        return buffer.tensor(torch.float32, segment.state_offset * 4, spec.numel).view(spec.shape)
    return buffer.tensor(spec.dtype, segment.grad_offset, spec.numel).view(spec.shape)
