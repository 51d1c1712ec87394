"""Offload: device tensors whose data is in pinned RAM or on disk between forward and backward."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import StateError
from .buffers import Buffer, HostBuffer
from .lease import Kept, Lease, used_by
from .limits import COPIES_IN_FLIGHT
from .runtime import Runtime
from .streams import Event
from .transfer import Handle, Lane, compute_event


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on its way to a place.

    Attributes:
        left: done when the device's memory has been read.
        again: asks for what holds the data, from its start on, once it is there.
    """

    left: Handle
    again: Callable[[], Lease[Buffer]]


class Place(Protocol):
    """Where one tensor may wait: at most `nbytes` of it. Nobody else reads or writes there until it is back."""

    @property
    def nbytes(self) -> int:
        """Bytes that there is room for."""
        ...

    def store(self, lane: Lane, label: str, source: torch.Tensor, event: Event) -> Stored:
        """Move `source` there.

        Args:
            lane: device-to-host lane.
            label: for messages.
            source: contiguous, at most `nbytes`, on the device.
            event: fires when `source` has been computed.
        """
        ...


class HostPlace:
    """Memory in RAM.

    Args:
        lease: of the memory; ready when nobody reads any more what was there before.
    """

    def __init__(self, lease: Kept | _OwnBuffer) -> None:
        self._lease = lease

    @property
    def nbytes(self) -> int:
        """See `Place`."""
        return self._lease.buffer.nbytes

    def store(self, lane: Lane, label: str, source: torch.Tensor, event: Event) -> Stored:
        """See `Place.store`."""
        lease = self._lease
        host = lease.buffer.tensor(source.dtype, 0, source.numel()).view(source.shape)
        with used_by(lane, lease):
            left = lane.submit(
                label,
                lambda: host.copy_(source, non_blocking=True),
                after=(lease.ready,),
                after_events=(event,),
            )
        lease.ready = left
        return Stored(left, lambda: lease)


class _OwnBuffer:
    """The lease of one of `TensorOffload`'s own buffers.

    Args:
        buffer: the memory.
        ready: done when nobody reads any more what was there before.
        give_back: called once, with the buffer and what reads it last.
    """

    __slots__ = ("_give_back", "buffer", "ready")

    def __init__(
        self, buffer: HostBuffer, ready: Handle, give_back: Callable[[HostBuffer, Handle], None]
    ) -> None:
        self.buffer = buffer
        self.ready = ready
        self._give_back: Callable[[HostBuffer, Handle], None] | None = give_back

    def release(self, *, after: Handle | None = None) -> None:
        """See `Lease.release`."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self.buffer, after or Handle.done())

    def __del__(self) -> None:
        # A forward that is never followed by its backward must give its buffers back too.
        self.release(after=self.ready)


class OffloadedTensor:
    """One tensor's data in RAM or on disk; made by `TensorOffload.store`, used up by `TensorOffload.take`."""

    __slots__ = ("__weakref__", "dtype", "name", "shape", "stored")

    def __init__(self, name: str, tensor: torch.Tensor, stored: Stored) -> None:
        self.name = name
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.stored = stored


class TensorOffload:
    """Moves tensors to RAM or disk and back, both beside the compute stream.

    Hazards: a tensor's memory must not be reused before the copy from it is done, so references are held until the
    compute stream has been told to wait for it; memory for the way back is ordered by an event of the stream that
    allocated it; a host buffer is not written again before the copy from it is done.

    Args:
        runtime: device, lanes and pins; its metrics receive `d2h_bytes` and `h2d_bytes`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._device = runtime.device
        self._to_host, self._to_device = runtime.to_host, runtime.to_device
        self._metrics, self._pins = runtime.metrics, runtime.pins
        # Forward runs on the user's thread, backward on autograd's. Reentrant: a garbage collection inside may end the
        # life of a tensor whose buffer then comes back.
        self._lock = threading.RLock()
        # Free buffers, with the handle of the copy that read them last.
        self._free: list[tuple[HostBuffer, Handle]] = []
        self._leaving: collections.deque[tuple[Handle, torch.Tensor, int, str]] = collections.deque()
        # What is on its way back. The lease is held too: whoever it was to be for may be gone before the copy is done.
        self._coming: dict[weakref.ref[OffloadedTensor], tuple[torch.Tensor, Handle, Lease[Buffer]]] = {}
        self.host_bytes = 0

    def store(self, name: str, tensor: torch.Tensor, into: Place | None = None) -> OffloadedTensor:
        """Start moving `tensor` (contiguous) away; its memory is free again once all references are gone.

        Args:
            name: for messages.
            tensor: on the device.
            into: where to; None takes a buffer of its own.
        """
        source = tensor.detach()
        event = compute_event(self._device)
        place = into or self._own_place(source.nbytes)
        parked = OffloadedTensor(
            name, source, place.store(self._to_host, f"activations of {name}", source, event)
        )
        left = parked.stored.left
        self._leaving.append((left, source, source._version, name))
        self._metrics.add("d2h_bytes", source.nbytes)
        while len(self._leaving) > COPIES_IN_FLIGHT:
            self._land()
        return parked

    def fetch(self, parked: OffloadedTensor) -> Handle:
        """Start bringing a tensor back (once); its place is free when that is done."""
        key = weakref.ref(parked)
        if key in self._coming:
            return self._coming[key][1]
        for other, (_, handle, _) in list(self._coming.items()):
            if other() is None and handle.is_complete:  # of a backward that never came to it
                del self._coming[other]
        target = torch.empty(parked.shape, dtype=parked.dtype, device=self._device)
        lease = parked.stored.again()

        def copy() -> None:
            data = lease.buffer.tensor(target.dtype, 0, target.numel())
            target.copy_(data.view(target.shape), non_blocking=True)

        with used_by(self._to_device, lease):
            handle = self._to_device.submit(
                f"activations of {parked.name}",
                copy,
                after=(lease.ready,),
                after_events=(compute_event(self._device),),  # what used the target's memory before
            )
            lease.release(after=handle)
        self._coming[key] = (target, handle, lease)
        self._metrics.add("h2d_bytes", target.nbytes)
        return handle

    def take(self, parked: OffloadedTensor) -> torch.Tensor:
        """The tensor on the device again; the current stream waits for it."""
        self.fetch(parked)
        key = weakref.ref(parked)
        target, handle, _ = self._coming[key]
        try:
            handle.wait_stream()
        except Exception:
            del self._coming[key]  # nothing comes any more
            raise
        # Not before: after Ctrl-C in the wait, `abandon` has to wait for what still comes.
        del self._coming[key]
        return target

    def settle(self) -> None:
        """Let the compute stream wait for what is still on its way to RAM, and let go of it."""
        while self._leaving:
            self._land()

    def abandon(self) -> None:
        """Forget what is on its way, once nothing reads or writes it."""
        for handle in [
            *(entry[0] for entry in self._leaving),
            *(handle for _, handle, _ in self._coming.values()),
        ]:
            handle.settle()
        self._leaving.clear()
        self._coming.clear()

    def _land(self) -> None:
        handle, source, version, name = self._leaving.popleft()
        handle.wait_stream()
        if source._version != version:
            raise StateError(
                f"the input of {name} was changed in place while it was moved to RAM; set "
                "SlideConfig(activations='recompute'), or use plain Trainer for this model"
            )

    def _own_place(self, nbytes: int) -> HostPlace:
        return HostPlace(_OwnBuffer(*self._take_buffer(nbytes), self._give_back))

    def _take_buffer(self, nbytes: int) -> tuple[HostBuffer, Handle]:
        with self._lock:
            fitting = [entry for entry in self._free if entry[0].nbytes >= nbytes]
            if fitting:
                entry = buffer, read = min(fitting, key=lambda one: one[0].nbytes)
                self._free.remove(entry)
                # A copy that failed reads nothing any more, and its failure is not the next user's.
                return (buffer, Handle.done()) if read.failed else entry
            outgrown = min(self._free, key=lambda one: one[0].nbytes, default=None)
            if outgrown is not None:  # batches got longer: replace one rather than pile up
                self._free.remove(outgrown)
                self.host_bytes -= outgrown[0].nbytes
        if outgrown is not None:
            outgrown[1].settle()
            if outgrown[0].pinned:
                self._pins.give_back(outgrown[0].nbytes)
        buffer = HostBuffer(nbytes, pin=self._pins.take(nbytes))
        with self._lock:
            self.host_bytes += buffer.nbytes
        return buffer, Handle.done()

    def _give_back(self, buffer: HostBuffer, read: Handle) -> None:
        with self._lock:
            self._free.append((buffer, read))
