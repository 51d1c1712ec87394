"""Offload: device tensors whose data is in pinned RAM or on disk between forward and backward."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable

import torch

from ..errors import StateError
from ..metrics import Metrics
from .buffers import HostBuffer, Pin
from .disk.desks import lent
from .disk.inputs import DiskCopy, DiskPlace
from .limits import COPIES_IN_FLIGHT
from .transfer import Handle, Lane, compute_event


class OffloadedTensor:
    """One tensor's data in RAM or on disk; made by `TensorOffload.store`, used up by `TensorOffload.take`."""

    __slots__ = ("__weakref__", "buffer", "dtype", "name", "on_disk", "release", "shape", "stored")

    def __init__(self, name: str, tensor: torch.Tensor, buffer: HostBuffer | None) -> None:
        self.name = name
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.buffer = buffer  # None of one on disk
        self.on_disk: DiskCopy | None = None
        self.stored: Handle
        self.release: weakref.finalize | None = None

    def data_in(self, buffer: HostBuffer | None) -> torch.Tensor:
        """The data in the buffer that holds it, in the tensor's shape."""
        assert buffer is not None, "what is on disk is read first"
        return buffer.tensor(self.dtype, 0, self.shape.numel()).view(self.shape)


class TensorOffload:
    """Moves tensors to RAM or disk and back, both beside the compute stream.

    Hazards: a tensor's memory must not be reused before the copy from it is done, so references are held until the
    compute stream has been told to wait for it; memory for the way back is ordered by an event of the stream that
    allocated it; a host buffer is not written again before the copy from it is done.

    Args:
        device: where the tensors live.
        to_host: device-to-host lane.
        to_device: host-to-device lane.
        metrics: receives `d2h_bytes` and `h2d_bytes`.
        pin: asked for a number of bytes, whether a new buffer of that size may be pinned.
        unpinned: told how many pinned bytes were let go of.
    """

    def __init__(
        self,
        device: torch.device,
        to_host: Lane,
        to_device: Lane,
        metrics: Metrics,
        pin: Callable[[int], Pin],
        unpinned: Callable[[int], None],
    ) -> None:
        self._device = device
        self._to_host, self._to_device = to_host, to_device
        self._metrics = metrics
        self._pin, self._unpinned = pin, unpinned
        # Forward runs on the user's thread, backward on autograd's. Reentrant: a garbage collection inside may end the
        # life of a tensor whose buffer then comes back.
        self._lock = threading.RLock()
        # Free buffers, with the handle of the copy that read them last.
        self._free: list[tuple[HostBuffer, Handle]] = []
        self._leaving: collections.deque[tuple[Handle, torch.Tensor, int, str]] = collections.deque()
        # What is on its way back. The buffer is held too: whoever it was to be for may be gone before the copy is done.
        self._coming: dict[weakref.ref[OffloadedTensor], tuple[torch.Tensor, Handle, HostBuffer | None]] = {}
        self.host_bytes = 0

    def store(
        self, name: str, tensor: torch.Tensor, into: HostBuffer | DiskPlace | None = None
    ) -> OffloadedTensor:
        """Start moving `tensor` (contiguous) away; its memory is free again once all references are gone.

        Args:
            name: for messages.
            tensor: on the device.
            into: memory, or a place on disk, that nobody else reads or writes until the tensor is back; None takes a
                buffer of its own.
        """
        source = tensor.detach()
        label, event = f"activations of {name}", compute_event(self._device)
        if isinstance(into, DiskPlace):
            parked = OffloadedTensor(name, source, None)
            parked.on_disk = into.store(self._to_host, label, source, event)
            parked.stored = parked.on_disk.left
        else:
            buffer, read = (into, Handle.done()) if into is not None else self._take_buffer(source.nbytes)
            parked = OffloadedTensor(name, source, buffer)
            host = parked.data_in(buffer)
            try:
                parked.stored = self._to_host.submit(
                    label,
                    lambda: host.copy_(source, non_blocking=True),
                    after=(read,),
                    after_events=(event,),
                )
                # A forward that is never followed by its backward must give its buffers back too.
                if into is None:
                    parked.release = weakref.finalize(parked, self._give_back, buffer, parked.stored)
            except BaseException:
                if into is None:
                    self._give_back(buffer, self._to_host.submit("what came before", lambda: None))
                raise
        self._leaving.append((parked.stored, source, source._version, name))
        self._metrics.add("d2h_bytes", source.nbytes)
        while len(self._leaving) > COPIES_IN_FLIGHT:
            self._land()
        return parked

    def fetch(self, parked: OffloadedTensor) -> Handle:
        """Start bringing a tensor back (once); afterwards its place is free."""
        key = weakref.ref(parked)
        if key in self._coming:
            return self._coming[key][1]
        for other, (_, handle, _) in list(self._coming.items()):
            if other() is None and handle.is_complete:  # of a backward that never came to it
                del self._coming[other]
        target = torch.empty(parked.shape, dtype=parked.dtype, device=self._device)
        with lent(parked.on_disk.borrow if parked.on_disk is not None else None, self._to_device) as loan:
            handle = self._to_device.submit(
                f"activations of {parked.name}",
                lambda: target.copy_(
                    parked.data_in(loan.buffer if loan is not None else parked.buffer), non_blocking=True
                ),
                after=(parked.stored if loan is None else loan.ready,),
                after_events=(compute_event(self._device),),  # what used the target's memory before
            )
            if loan is not None:
                loan.give_back(after=handle)
        self._coming[key] = (target, handle, parked.buffer)
        self._metrics.add("h2d_bytes", target.nbytes)
        return handle

    def take(self, parked: OffloadedTensor) -> torch.Tensor:
        """The tensor on the device again; the current stream waits for it, and its place is free."""
        self.fetch(parked)
        key = weakref.ref(parked)
        target, handle, _ = self._coming[key]
        try:
            handle.wait_stream()
        except Exception:
            del self._coming[key]  # nothing comes any more
            raise
        del self._coming[
            key
        ]  # not before: after Ctrl-C in the wait, `abandon` has to wait for what still comes
        if parked.release is not None and parked.release.detach() is not None and parked.buffer is not None:
            self._give_back(parked.buffer, handle)
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
                self._unpinned(outgrown[0].nbytes)
        buffer = HostBuffer(nbytes, pin=self._pin(nbytes))
        with self._lock:
            self.host_bytes += buffer.nbytes
        return buffer, Handle.done()

    def _give_back(self, buffer: HostBuffer, read: Handle) -> None:
        with self._lock:
            self._free.append((buffer, read))
