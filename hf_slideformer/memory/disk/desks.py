"""Training state that lives on disk, and the host buffers that it passes through.

Each unit there has one file. Whoever needs a part of it borrows a buffer from a desk: a thread fills it, in the order
of the requests and as soon as a buffer is free, so that reads run ahead of what uses them. Given back, it is written by
another thread if it was changed, and is free when that is done. Updates and fetches have desks of their own, so that
neither waits for buffers that the other holds.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

import torch

from ...errors import StateError
from ..buffers import HostBuffer, MappedFile, Pin
from ..layout import Span
from ..transfer import Handle, Lane
from .files import DiskFile
from .store import DiskStore

_CPU = torch.device("cpu")


class Loan:
    """The lease of a part of a unit's file, on its way into a buffer.

    `ready` completes when the buffer holds it; it fails where reading did.
    """

    __slots__ = ("_after", "_buffer", "_desk", "_is_back", "ready", "unit")

    def __init__(self, desk: Desk, unit: int) -> None:
        self._desk = desk
        self._is_back = False
        self._after = Handle.done()  # what still reads the buffer when it has been given back
        self.unit = unit
        self._buffer: HostBuffer | None = None
        self.ready = Handle.done()  # replaced by the desk

    @property
    def buffer(self) -> HostBuffer:
        """What was borrowed, from its start on; only once `ready` is complete."""
        assert self._buffer is not None, "read before it was ready"
        return self._buffer

    def release(self, *, after: Handle | None = None) -> None:
        """Let go of the buffer.

        Args:
            after: what still reads it.
        """
        if not self._is_back:
            self._desk.take_back(self, after)

    def write_back(self, nbytes: int | None = None) -> None:
        """Let go of the buffer by way of the file: its start goes to the start of that. Waits for a read that runs.

        Args:
            nbytes: how much of it; None is all of the file.
        """
        if not self._is_back:
            self._desk.write_back(self, nbytes)

    def __del__(self) -> None:
        # Of one that nobody got: Ctrl-C came while it was being handed over.
        self.release()


class DiskState:
    """The state of several units in files of their own.

    Args:
        store: where files are made.
        sizes: bytes of each unit's file, by unit; units of no bytes have none.
        mapped: units whose files are also read and written as memory.
        on_failure: called with the error, in a thread of this object, when a read or write failed: what is on disk can
            no longer be trusted.

    Raises:
        DiskError: a file cannot be made.
    """

    def __init__(
        self,
        store: DiskStore,
        sizes: Mapping[int, int],
        mapped: frozenset[int],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.store = store
        self.on_failure = on_failure
        self._desks: list[Desk] = []
        try:
            self.files: dict[int, DiskFile] = {
                unit: store.create(f"unit-{unit:05d}", nbytes, striped=unit not in mapped)
                for unit, nbytes in sizes.items()
                if nbytes
            }
        except BaseException:
            store.close()
            raise
        # The last write of each unit's file.
        self.written: dict[int, Handle] = {unit: Handle.done() for unit in self.files}
        # On the CPU a lane does its work itself, one piece after the other. What comes from the device waits there for
        # its copy, which may wait for an update's staging buffer; updates are written by a lane of their own, or that
        # update could wait for a buffer whose write is behind.
        self.writes = Lane("staged-to-disk", _CPU)
        self.write_backs = Lane("state-to-disk", _CPU)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host buffers."""
        return sum(desk.nbytes for desk in self._desks)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files.values())

    def __contains__(self, unit: int) -> bool:
        return unit in self.files

    def write(self, unit: int, buffer: HostBuffer, span: Span) -> None:
        """Write the start of `buffer` over a span of a unit's file, and wait until that is done.

        Raises:
            TransferError: it failed; the cause is chained.
        """
        try:
            self.store.write(self.files[unit], buffer, span=span).wait_host()
        except BaseException as error:
            self.on_failure(error)
            raise

    def mapped(self, unit: int) -> MappedFile:
        """A unit's file as memory."""
        return MappedFile(self.files[unit].map())

    def open_desk(self, name: str, buffers: int, nbytes: int, *, pin: Pin = False) -> Desk:
        """A set of buffers of `nbytes` each, and the thread that fills them."""
        self._desks.append(Desk(self, name, buffers if self.files else 0, nbytes, pin=pin))
        return self._desks[-1]

    def close(self) -> None:
        """Finish what was asked for and let go of the files; requests that still wait for a buffer fail."""
        for desk in self._desks:
            desk.close()
        self.writes.close()
        self.write_backs.close()
        self.store.close()


class Desk:
    """Buffers that units' files are read into; made by `DiskState.open_desk`."""

    def __init__(self, state: DiskState, name: str, buffers: int, nbytes: int, *, pin: Pin) -> None:
        self._state = state
        self._buffers = [HostBuffer(nbytes, pin=pin) for _ in range(buffers)]
        # Buffers that nobody borrows, with what has to end before they are filled again; None at the end.
        self._free: queue.SimpleQueue[tuple[HostBuffer, Handle] | None] = queue.SimpleQueue()
        # A loan may be given back while its buffer is being filled. Reentrant: a garbage collection inside may end the
        # life of another loan.
        self._lock = threading.RLock()
        for buffer in self._buffers:
            self._free.put((buffer, Handle.done()))
        self._reads = Lane(f"state-for-{name}", _CPU)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def borrow(self, unit: int, span: Span | None = None, *, after: Handle | None = None) -> Loan:
        """Ask for a part of a unit's file.

        Args:
            unit: whose.
            span: first byte and number of bytes; None is all of it.
            after: the update that it is to see; its write is waited for too.
        """
        loan, state = Loan(self, unit), self._state

        def fetch() -> None:
            if after is not None:
                after.wait_host()
            buffer = self._take()
            try:
                state.written[unit].wait_host()
                state.store.read(state.files[unit], buffer, span=span).wait_host()
            except BaseException as error:
                self._free.put((buffer, Handle.done()))
                state.on_failure(error)
                raise
            with self._lock:
                loan._buffer = buffer
                is_back = loan._is_back
            if is_back:
                self._free.put((buffer, loan._after))

        loan.ready = self._reads.submit(f"state of unit {unit} from disk", fetch)
        return loan

    def _take(self) -> HostBuffer:
        item = self._free.get()
        if item is None:
            self._free.put(None)  # for the next one
            raise StateError("the engine was closed; prepare the model again")
        buffer, done = item
        done.settle()  # a write that failed has been told to `on_failure`, a copy to who waits for it
        return buffer

    def take_back(self, loan: Loan, after: Handle | None) -> None:
        """See `Loan.release`."""
        with self._lock:
            loan._is_back, loan._after = True, after or Handle.done()
            buffer = loan._buffer
        # One that has no buffer yet must not be in the queue: the next to be filled could be its own.
        if buffer is not None:
            self._free.put((buffer, loan._after))

    def write_back(self, loan: Loan, nbytes: int | None) -> None:
        """See `Loan.write_back`."""
        loan.ready.settle()
        loan._is_back = True
        if loan._buffer is None:
            return  # reading failed, and whoever waits for it has been told
        buffer, state, unit = loan.buffer, self._state, loan.unit
        span = 0, state.files[unit].nbytes if nbytes is None else nbytes
        written = state.write_backs.submit(
            f"state of unit {unit} to disk", lambda: state.write(unit, buffer, span)
        )
        state.written[unit] = written
        self._free.put((buffer, written))

    def close(self) -> None:
        """End the thread."""
        self._free.put(None)
        self._reads.close()
