"""Inputs of units that wait on disk between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..buffers import Pin
from ..layout import DISK_ALIGN_BYTES, Span
from ..lease import released_on_error
from ..limits import INPUT_BUFFERS
from ..offload import Stored
from ..staging import StagingBuffers
from ..streams import Event
from ..transfer import Lane
from .desks import DiskState


class DiskInputs:
    """Inputs of units that are in the units' files between forward and backward.

    Args:
        state: of the units.
        spans: where in each unit's file.
        pin: asked for a number of bytes, whether so many may be pinned.
    """

    def __init__(self, state: DiskState, spans: Mapping[int, Span], pin: Callable[[int], Pin]) -> None:
        self._state, self._spans = state, spans
        nbytes = max(size for _, size in spans.values())
        pinned = pin(2 * INPUT_BUFFERS * nbytes)
        # Those that leave and those that come have buffers of their own, or one could wait for the other.
        self._leaving = StagingBuffers(nbytes, INPUT_BUFFERS, pin=pinned)
        self._coming = state.open_desk("inputs", INPUT_BUFFERS, nbytes, pin=pinned)

    @property
    def host_bytes(self) -> int:
        """Bytes of the buffers that are not a desk's."""
        return self._leaving.host_bytes

    def place(self, unit: int) -> DiskPlace | None:
        """Where the unit's input waits; None if that is not on disk."""
        return DiskPlace(self, unit, self._spans[unit][1]) if unit in self._spans else None

    def store(
        self,
        unit: int,
        lane: Lane,
        label: str,
        source: torch.Tensor,
        event: Event,
    ) -> Stored:
        """See `DiskPlace.store`."""
        staged = self._leaving.lease()

        def leave() -> None:
            with staged.filled() as buffer:
                buffer.tensor(source.dtype, 0, source.numel()).copy_(source.view(-1), non_blocking=True)

        def write() -> None:
            with staged.read() as buffer:
                self._state.write(unit, buffer, span)

        span = self._spans[unit][0], -(-source.nbytes // DISK_ALIGN_BYTES) * DISK_ALIGN_BYTES
        with released_on_error(staged):
            left = lane.submit(label, leave, after_events=(event,))
            written = self._state.writes.submit(
                f"{label} to disk", write, after=(left,), dropped=staged.release
            )
        return Stored(left, lambda: self._coming.borrow(unit, span, after=written))


class DiskPlace:
    """Where on disk one tensor waits between forward and backward; made by `DiskInputs.place`."""

    __slots__ = ("_inputs", "_unit", "nbytes")

    def __init__(self, inputs: DiskInputs, unit: int, nbytes: int) -> None:
        self._inputs, self._unit = inputs, unit
        self.nbytes = nbytes

    def store(self, lane: Lane, label: str, source: torch.Tensor, event: Event) -> Stored:
        """See `Place.store`."""
        return self._inputs.store(self._unit, lane, label, source, event)
