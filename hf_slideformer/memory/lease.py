"""Leases: one way to lend a buffer, whoever owns it.

Slots on the device, staging buffers, buffers that disks are read into and those that activations wait in each have an
owner with rules of its own on when one is free and who comes first. Whoever borrows sees the same three things.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, TypeVar

from .buffers import Buffer
from .transfer import Handle, Lane

Lent = TypeVar("Lent", covariant=True)


class Lease(Protocol[Lent]):
    """The right to use a buffer until `release`."""

    @property
    def ready(self) -> Handle:
        """Done when the buffer holds what was asked for; it fails where that did."""
        ...

    @property
    def buffer(self) -> Lent:
        """What was lent; only once `ready` is issued."""
        ...

    def release(self, *, after: Handle | None = None) -> None:
        """Give it back, whatever happens: with too few buffers nothing moves any more. The second time does nothing.

        Args:
            after: what still reads or writes the buffer.
        """


class Landing(Lease[Buffer], Protocol):
    """A lease of host memory that one thread fills and another reads."""

    def filled(self) -> contextlib.AbstractContextManager[Buffer]:
        """The buffer, to be filled in the block."""
        ...

    def read(self) -> contextlib.AbstractContextManager[Buffer]:
        """The full buffer; given back after the block."""
        ...


class Kept:
    """The lease of a buffer that its borrower owns anyway: nobody waits for it.

    Args:
        buffer: host memory.
        ready: done when it holds what is to be read.
    """

    __slots__ = ("buffer", "ready")

    def __init__(self, buffer: Buffer, ready: Handle | None = None) -> None:
        self.buffer = buffer
        self.ready = ready or Handle.done()

    def filled(self) -> contextlib.AbstractContextManager[Buffer]:
        """See `Landing`."""
        return contextlib.nullcontext(self.buffer)

    def read(self) -> contextlib.AbstractContextManager[Buffer]:
        """See `Landing`."""
        return contextlib.nullcontext(self.buffer)

    def release(self, *, after: Handle | None = None) -> None:
        """Nothing to do."""


@contextlib.contextmanager
def used_by(lane: Lane, lease: Lease) -> Iterator[None]:
    """For a block that arranges for work of `lane` on what was lent, and says itself when that gives it back.

    Where the block raises, it is given back once everything on the lane is over.
    """
    try:
        yield
    except BaseException:
        lease.release(after=lane.submit("what came before", lambda: None))
        raise


@contextlib.contextmanager
def released_on_error(lease: Lease) -> Iterator[None]:
    """Give it back if the block raises."""
    try:
        yield
    except BaseException:
        lease.release()
        raise
