"""Streams and events, each of one device: CUDA's, and what stands for them on the CPU.

What torch does without being told a device it does on the *current* one, which need not be the one that a model is on.
So an event here knows its device, and whoever waits on "the current stream" waits on the current stream of that device.

On the CPU work is done when the call that does it returns, so an event there is a point that has been passed. It is an
object nevertheless: who records, keeps and waits does so on every device, and a test can put events there that come
late, that fail, or that know what they order (`tests/stress/happens_before.py`).
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch


class Event(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether the work before it is done; never blocks."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until it is."""
        ...

    def wait(self) -> None:
        """Let the current stream of the event's device wait for it (on the CPU: block)."""
        ...


class Stream(Protocol):
    """Work that one device does in the order in which it was given."""

    def active(self) -> contextlib.AbstractContextManager[object]:
        """What the calling thread asks of the device inside goes to this stream."""
        ...

    def wait(self, event: Event) -> None:
        """Let what comes later on this stream wait for `event`, which may be of another device."""
        ...

    def record(self) -> Event:
        """An event at the end of what the stream has been given so far."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until the stream has nothing left to do."""
        ...


class CudaEvent:
    """An event of CUDA at the end of what `stream` has been given so far.

    Args:
        stream: of any CUDA device.
        blocking: a thread that waits for it sleeps rather than spins on a core.
    """

    __slots__ = ("_device", "of_torch")

    def __init__(self, stream: torch.cuda.Stream, *, blocking: bool = False) -> None:
        self._device = stream.device
        self.of_torch = torch.cuda.Event(blocking=blocking)
        self.of_torch.record(stream)

    def query(self) -> bool:
        """See `Event.query`."""
        return self.of_torch.query()

    def synchronize(self) -> None:
        """See `Event.synchronize`."""
        self.of_torch.synchronize()

    def wait(self) -> None:
        """See `Event.wait`."""
        torch.cuda.current_stream(self._device).wait_event(self.of_torch)


class CudaStream:
    """A stream of its own on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def active(self) -> contextlib.AbstractContextManager[object]:
        """See `Stream.active`; the stream's device is the current one inside, too."""
        return torch.cuda.stream(self._stream)

    def wait(self, event: Event) -> None:
        """See `Stream.wait`."""
        if isinstance(event, CudaEvent):
            self._stream.wait_event(event.of_torch)
        else:
            event.synchronize()

    def record(self) -> Event:
        """See `Stream.record`; threads wait for what lanes move, so the event is a blocking one."""
        return CudaEvent(self._stream, blocking=True)

    def synchronize(self) -> None:
        """See `Stream.synchronize`."""
        self._stream.synchronize()


class CpuEvent:
    """A point that the CPU has passed: whoever records it has done what came before."""

    __slots__ = ("__weakref__",)

    def query(self) -> bool:
        """See `Event.query`."""
        return True

    def synchronize(self) -> None:
        """See `Event.synchronize`."""

    def wait(self) -> None:
        """See `Event.wait`."""
        self.synchronize()


class CpuStream:
    """The thread that calls it."""

    def active(self) -> contextlib.AbstractContextManager[object]:
        """See `Stream.active`."""
        return contextlib.nullcontext()

    def wait(self, event: Event) -> None:
        """See `Stream.wait`."""
        event.synchronize()

    def record(self) -> Event:
        """See `Stream.record`."""
        return CpuEvent()

    def synchronize(self) -> None:
        """See `Stream.synchronize`."""


def new_stream(device: torch.device) -> Stream:
    """A stream beside the one that computes."""
    return CudaStream(device) if device.type == "cuda" else CpuStream()


def compute_event(device: torch.device) -> Event:
    """An event at the end of what the device's current stream has been given so far."""
    if device.type == "cuda":
        return CudaEvent(torch.cuda.current_stream(device))
    return CpuEvent()
