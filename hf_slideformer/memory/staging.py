"""Staging buffers: a few host buffers that data passes through on its way from the device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..errors import StateError
from .buffers import HostBuffer, Pin
from .transfer import Handle


class StagingBuffers:
    """At most `count` equal host buffers, mapped when first needed; whoever needs one more waits until one is free.

    Args:
        nbytes: size of each.
        count: how many at most.
        pin: pin them.
    """

    def __init__(self, nbytes: int, count: int, *, pin: Pin) -> None:
        self._nbytes, self._pin = nbytes, pin
        self._free: list[HostBuffer] = []
        self._available = threading.Semaphore(count)
        self.host_bytes = 0

    def take(self) -> HostBuffer:
        """A free buffer, which the caller owns until it gives it back; blocks until there is one."""
        self._available.acquire()
        try:
            if self._free:
                return self._free.pop()
            buffer = HostBuffer(self._nbytes, pin=self._pin)
        except BaseException:
            self._available.release()
            raise
        self.host_bytes += buffer.nbytes
        return buffer

    def give_back(self, buffer: HostBuffer) -> None:
        """Let others have a buffer that was taken."""
        self._free.append(buffer)
        self._available.release()

    def lease(self) -> StagingLease:
        """One use of a buffer, which is not taken yet."""
        return StagingLease(self)


class StagingLease:
    """One use of a staging buffer: one thread fills it, another reads it, and it is free again, whatever fails.

    A buffer that is lost makes the thread that waits for it wait for ever, and all who wait for that thread. So whoever
    arranges for both releases it where the reader will not come.

    Attributes:
        ready: done when it is full; set by whoever has it filled.
    """

    __slots__ = ("_buffer", "_buffers", "_lock", "_released", "ready")

    def __init__(self, buffers: StagingBuffers) -> None:
        self._buffers = buffers
        self._buffer: HostBuffer | None = None  # while it is full
        self._released = False
        self._lock = threading.Lock()
        self.ready = Handle.done()

    @contextlib.contextmanager
    def filled(self) -> Iterator[HostBuffer]:
        """Take a buffer and fill it in the block; blocks until one is free.

        What fills buffers may go on beside the thread, on one stream for all of them: the next use then queues behind.

        Raises:
            StateError: it was released before.
        """
        if self._released:
            raise StateError("nobody will read what is moved here any more")
        buffer = self._buffers.take()
        try:
            yield buffer
        except BaseException:
            self._buffers.give_back(buffer)
            raise
        with self._lock:
            if not self._released:
                self._buffer = buffer
                return
        self._buffers.give_back(buffer)

    @property
    def buffer(self) -> HostBuffer:
        """The full buffer.

        Raises:
            StateError: it was released before, or is being read.
        """
        if self._buffer is None:
            raise StateError("what was moved here has been dropped")
        return self._buffer

    @contextlib.contextmanager
    def read(self) -> Iterator[HostBuffer]:
        """The full buffer; free after the block, and not before, whoever releases it meanwhile.

        Raises:
            StateError: it was released before.
        """
        with self._lock:
            buffer, self._buffer = self.buffer, None
        try:
            yield buffer
        finally:
            self._buffers.give_back(buffer)

    def release(self, *, after: Handle | None = None) -> None:
        """Nobody will read it: the buffer is free now, or when it has been filled.

        Args:
            after: None; what reads a staging buffer does so within `read`.
        """
        assert after is None
        with self._lock:
            self._released = True
            buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._buffers.give_back(buffer)
