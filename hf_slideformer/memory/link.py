"""Link: how weights get from a home into a slot, and gradients from the device to a home."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from .buffers import Buffer
from .layout import Segment
from .lease import Landing, Lease
from .streams import Event
from .transfer import Handle, Lane, compute_event
from .unit_memory import grad_view


class Link(Protocol):
    """Moves one unit's weights and gradients, whole on the device, wherever and in whatever parts they live."""

    def fill(
        self, label: str, slot: torch.Tensor, source: Lease[Buffer], *, after: Event | None = None
    ) -> Handle:
        """Start to fill a slot.

        Args:
            label: for messages and traces.
            slot: (bytes,) uint8 on the device.
            source: weights in the layout of the slot; read once it is ready.
            after: what used the slot before.

        Returns:
            Done when the weights are there.
        """
        ...

    def collect(
        self,
        label: str,
        grads: Sequence[tuple[Segment, torch.Tensor]],
        into: Landing,
        *,
        after: Sequence[Handle] = (),
    ) -> Handle:
        """Start to bring gradients to where `into` is.

        Args:
            label: for messages and traces.
            grads: by their places, contiguous, on the device, ready on its current stream. The caller holds them until
                the copy is done.
            into: host memory, laid out in the weights' dtypes.
            after: what used that memory before.

        Returns:
            Done when the gradients are there.
        """
        ...


class LocalLink:
    """Copies between this process's own host memory and its device.

    Args:
        device: where slots and gradients are.
        to_device: host-to-device lane.
        to_host: device-to-host lane.
    """

    def __init__(self, device: torch.device, to_device: Lane, to_host: Lane) -> None:
        self._device = device
        self._to_device, self._to_host = to_device, to_host

    def fill(
        self, label: str, slot: torch.Tensor, source: Lease[Buffer], *, after: Event | None = None
    ) -> Handle:
        """See `Link.fill`."""

        def copy() -> None:
            slot.copy_(source.buffer.tensor(torch.uint8, 0, slot.numel()), non_blocking=True)

        return self._to_device.submit(label, copy, after=(source.ready,), after_events=(after,))

    def collect(
        self,
        label: str,
        grads: Sequence[tuple[Segment, torch.Tensor]],
        into: Landing,
        *,
        after: Sequence[Handle] = (),
    ) -> Handle:
        """See `Link.collect`."""

        def copy() -> None:
            with into.filled() as buffer:
                for segment, grad in grads:
                    grad_view(buffer, segment, fp32=False).copy_(grad, non_blocking=True)

        event = compute_event(self._device)
        return self._to_host.submit(label, copy, after=after, after_events=(event,))
