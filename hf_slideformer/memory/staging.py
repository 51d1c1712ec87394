"""Staging buffers: a few host buffers that data passes through on its way from the device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .pinned import HostBuffer


class StagingBuffers:
    """At most `count` equal host buffers, mapped when first needed; `take` blocks until one is free.

    Args:
        nbytes: size of each.
        count: how many at most.
        pin: pin them.
    """

    def __init__(self, nbytes: int, count: int, *, pin: bool) -> None:
        self._nbytes, self._pin = nbytes, pin
        self._free: list[HostBuffer] = []
        self._available = threading.Semaphore(count)
        self.host_bytes = 0

    def take(self) -> HostBuffer:
        """A free buffer, which the caller owns until it leaves `returned`."""
        self._available.acquire()
        if self._free:
            return self._free.pop()
        buffer = HostBuffer(self._nbytes, pin=self._pin)
        self.host_bytes += buffer.nbytes
        return buffer

    @contextlib.contextmanager
    def returned(self, staged: list[HostBuffer]) -> Iterator[HostBuffer]:
        """Use the one buffer in `staged`; it is free again afterwards, also when the work failed."""
        buffer = staged.pop()
        try:
            yield buffer
        finally:
            self._free.append(buffer)
            self._available.release()
