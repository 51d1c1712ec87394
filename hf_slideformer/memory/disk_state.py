"""Optimizer state that lives on disk between updates, and the host buffers that it passes through.

A unit's residuals and moments are one file. Whoever needs them borrows a buffer: a thread fills it, in the order of the
requests and as soon as a buffer is free, so that reads run ahead of the updates. Given back, it is written by another
thread, and is free when that is done.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping

import torch

from ..errors import StateError
from .disk import DiskFile, DiskStore
from .layout import DiskLayout
from .pinned import HostBuffer
from .transfer import Handle, Lane

_CPU = torch.device("cpu")


class Loan:
    """A unit's state on its way into a buffer.

    `ready` completes when the buffer holds it; it fails where reading did. Every loan must be given back once.
    """

    __slots__ = ("_buffer", "_owner", "ready", "unit")

    def __init__(self, owner: DiskState, unit: int) -> None:
        self._owner = owner
        self.unit = unit
        self._buffer: HostBuffer | None = None
        self.ready = Handle.done()  # replaced by the owner

    @property
    def buffer(self) -> HostBuffer:
        """The unit's state, laid out as its `DiskLayout` says; only once `ready` is complete."""
        assert self._buffer is not None, "read before it was ready"
        return self._buffer

    def give_back(self, *, write: bool) -> None:
        """Let go of the buffer, whose content goes to disk if `write` says so. Waits for a read that still runs."""
        self._owner.take_back(self, write=write)


class DiskState:
    """The state of several units in files of their own.

    Args:
        store: where files are made.
        layouts: of each unit's state, by unit; units of no bytes have no file.
        buffers: number of host buffers.
        on_failure: called with the error, in a thread of this object, when a read or write failed: what is on disk can
            no longer be trusted.

    Raises:
        DiskError: a file cannot be made.
    """

    def __init__(
        self,
        store: DiskStore,
        layouts: Mapping[int, DiskLayout],
        buffers: int,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._store = store
        self._on_failure = on_failure
        try:
            self._files: dict[int, DiskFile] = {
                unit: store.create(f"unit-{unit:05d}", layout.nbytes)
                for unit, layout in layouts.items()
                if layout.nbytes
            }
        except BaseException:
            store.close()
            raise
        # The last write of each unit's file.
        self._written: dict[int, Handle] = {unit: Handle.done() for unit in self._files}
        size = max((layout.nbytes for layout in layouts.values()), default=0)
        self._buffers = [HostBuffer(size) for _ in range(buffers if self._files else 0)]
        # Buffers that nobody uses, with the write that has to end before they are filled again; None at the end.
        self._free: queue.SimpleQueue[tuple[HostBuffer, Handle] | None] = queue.SimpleQueue()
        for buffer in self._buffers:
            self._free.put((buffer, Handle.done()))
        # On the CPU a lane does its work itself, one piece after the other.
        self._reads, self._writes = Lane("state-from-disk", _CPU), Lane("state-to-disk", _CPU)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self._files.values())

    def __contains__(self, unit: int) -> bool:
        return unit in self._files

    def borrow(self, unit: int) -> Loan:
        """Ask for a unit's state; requests are served in order, each as soon as a buffer is free."""
        loan = Loan(self, unit)

        def fetch() -> None:
            taken = self._free.get()
            if taken is None:
                self._free.put(None)  # for the next one
                raise StateError("the engine was closed; prepare the model again")
            buffer, write = taken
            try:
                write.wait_host()
                self._written[unit].wait_host()
                self._store.read(self._files[unit], buffer).wait_host()
            except BaseException as error:
                self._free.put((buffer, Handle.done()))
                self._on_failure(error)
                raise
            loan._buffer = buffer

        loan.ready = self._reads.submit(f"state of unit {unit} from disk", fetch)
        return loan

    def take_back(self, loan: Loan, *, write: bool) -> None:
        """See `Loan.give_back`."""
        try:
            loan.ready.wait_host()
        except Exception:
            return  # it never got a buffer, and whoever waits for it has been told
        buffer, loan._buffer = loan.buffer, None
        if not write:
            self._free.put((buffer, Handle.done()))
            return

        def store() -> None:
            try:
                self._store.write(self._files[loan.unit], buffer).wait_host()
            except BaseException as error:
                self._on_failure(error)
                raise

        written = self._writes.submit(f"state of unit {loan.unit} to disk", store)
        self._written[loan.unit] = written
        self._free.put((buffer, written))

    def close(self) -> None:
        """Finish what was asked for and let go of the files; requests that still wait for a buffer fail."""
        self._free.put(None)
        self._reads.close()
        self._writes.close()
        self._store.close()
