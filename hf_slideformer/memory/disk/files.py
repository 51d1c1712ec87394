"""Files for state: nameless, striped over directories, moved in whole pages."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...errors import DiskError, StateError
from ..buffers import HostBuffer
from ..layout import Span
from ..limits import PAGE_BYTES
from .calls import CHECK_DISK, DiskCalls, reason, refused, remedy

_O_TMPFILE = getattr(os, "O_TMPFILE", 0)
# What file systems and kernels without nameless files answer.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_directory(path: str | os.PathLike, calls: DiskCalls | None = None) -> bool:
    """Write and read one page in a file under `path`, of which nothing stays.

    Returns:
        Whether transfers can pass the page cache.

    Raises:
        DiskError: no file can be made, written or read there.
    """
    path, calls = os.fspath(path), calls or DiskCalls()
    page = HostBuffer(PAGE_BYTES).view(PAGE_BYTES)
    for direct in (True, False):
        try:
            piece = _Piece(path, "slideformer-check", direct, calls)
            try:
                piece.move(page, 0, writing=True)
                piece.move(page, 0, writing=False)
            finally:
                piece.close()
        except DiskError as error:
            if direct and error.errno == errno.EINVAL:  # some file systems refuse only the transfer itself
                continue
            raise
        return direct
    raise AssertionError("the last round returns or raises")


class DiskFile:
    """One file of a store, in one piece for each directory; made by `DiskStore.create`.

    Attributes:
        name: for messages.
        nbytes: size, in whole pages.
    """

    def __init__(
        self,
        name: str,
        nbytes: int,
        directories: Sequence[tuple[str, bool]],
        first: int,
        chunk_bytes: int,
        calls: DiskCalls,
    ) -> None:
        self.name = name
        self.nbytes = max(1, -(-nbytes // PAGE_BYTES)) * PAGE_BYTES
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        # Files begin in turns, so that small ones are not all in the first directory.
        order = [directories[(first + i) % len(directories)] for i in range(len(directories))]
        chunks, rest = divmod(self.nbytes, chunk_bytes)
        rounds, more = divmod(chunks, len(order))
        sizes = [chunk_bytes * (rounds + (i < more)) + rest * (i == more) for i in range(len(order))]
        self._pieces: list[_Piece] = []
        try:
            for (directory, direct), size in zip(order, sizes, strict=True):
                if size == 0:
                    break
                self._pieces.append(_Piece(directory, name, direct, calls))
                self._pieces[-1].reserve(size)
        except BaseException:
            _close_pieces(self._pieces)
            raise
        self._stride = len(order)
        self._release_space = weakref.finalize(self, _close_pieces, self._pieces)
        self._release_space.atexit = False  # the system closes files, and a thread may still be using one

    def close(self) -> None:
        """Free the space, at once or as soon as the requests that were submitted are done."""
        with self._lock:
            self._closed = True
            idle = self._users == 0
        if idle:
            self._release_space()

    def acquire(self) -> bool:
        """Keep the file open until `release`; False if it is closed already."""
        # A descriptor's number is given to the next file that anyone opens, so it must not be closed under a transfer.
        with self._lock:
            self._users += not self._closed
            return not self._closed

    def release(self) -> None:
        """End one use."""
        with self._lock:
            self._users -= 1
            idle = self._closed and self._users == 0
        if idle:
            self._release_space()

    def chunks(self, span: Span) -> list[Chunk]:
        """The transfers that move these bytes of the file; their slices count from the first of them."""
        start, nbytes = span
        found = []
        for number in range(start // self._chunk_bytes, -(-(start + nbytes) // self._chunk_bytes)):
            chunk = number * self._chunk_bytes
            begin, end = max(start, chunk), min(start + nbytes, chunk + self._chunk_bytes)
            offset = number // self._stride * self._chunk_bytes + begin - chunk
            found.append(
                Chunk(self._pieces[number % self._stride], offset, slice(begin - start, end - start))
            )
        return found

    def map(self) -> mmap.mmap:
        """The file as memory, by way of the page cache. Where the disk fails, reading it ends the process.

        Raises:
            StateError: the file is in several pieces.
            DiskError: the file system refuses.
        """
        if len(self._pieces) != 1:
            raise StateError(f"{self.name} is striped, and cannot be mapped")
        return self._pieces[0].map()

    def settle(self, *, written: bool) -> None:
        """After a transfer through the page cache: have the bytes on the disk, and out of RAM."""
        for piece in self._pieces:
            piece.settle(written=written)


class _Piece:
    """The part of a file that is in one directory: a nameless file there.

    Raises:
        DiskError: the file cannot be made; no name is left behind.
    """

    def __init__(self, directory: str, name: str, direct: bool, calls: DiskCalls) -> None:
        self.directory, self.path = directory, os.path.join(directory, name)
        self._direct, self._calls = direct, calls
        self.nbytes = 0
        try:
            self.fd = self._open_nameless()
        except OSError as error:
            raise refused(directory, f"making a file for {name}", error) from error
        if direct:
            try:
                calls.set_direct(self.fd)
            except OSError as error:
                self.close()
                raise refused(directory, f"opening a file for {name} with O_DIRECT", error) from error

    def reserve(self, nbytes: int) -> None:
        """Make the file `nbytes` long and reserve its space.

        Raises:
            DiskError: the space is not there.
        """
        try:
            if nbytes > self._calls.free_bytes(
                self.directory
            ):  # a file system that cannot reserve would say so only in the middle of a step
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                self._calls.fallocate(self.fd, nbytes)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise
                self._calls.truncate(self.fd, nbytes)
        except OSError as error:
            raise self._failure(f"reserving {nbytes} bytes", error, wanted=nbytes) from error
        self.nbytes = nbytes

    def move(self, view: memoryview, offset: int, *, writing: bool) -> None:
        """Read or write all of `view` at `offset`.

        Raises:
            DiskError: the system refuses, or makes no progress.
        """
        operation = self._calls.pwritev if writing else self._calls.preadv
        verb, wanted, done = "writing" if writing else "reading", len(view), 0
        while done < wanted:
            what = f"{verb} {wanted} bytes at offset {offset}"
            try:
                count = operation(self.fd, view[done:], offset + done)
            except OSError as error:
                raise self._failure(what, error, offset=offset, wanted=wanted, got=done) from error
            got = done + count
            # Past the page cache a transfer can only go on from a page's start.
            reached = got // PAGE_BYTES * PAGE_BYTES if self._direct and got < wanted else got
            if reached == done:
                noun = "write" if writing else "read"
                raise DiskError(
                    f"{self.path}: {what} ended after {got} (short {noun}); {CHECK_DISK}",
                    filename=self.path,
                    offset=offset,
                    wanted=wanted,
                    got=got,
                )
            done = reached

    def map(self) -> mmap.mmap:
        """See `DiskFile.map`.

        Raises:
            DiskError: the file system refuses; some network file systems do.
        """
        try:
            return self._calls.map(self.fd, self.nbytes)
        except OSError as error:
            raise DiskError(
                f"{self.path}: mapping {self.nbytes} bytes failed: {reason(error)}; name a directory on a local "
                "disk in nvme_dir",
                filename=self.path,
                wanted=self.nbytes,
                errno=error.errno,
            ) from error

    def settle(self, *, written: bool) -> None:
        """See `DiskFile.settle`.

        Raises:
            DiskError: what was written did not get to the disk.
        """
        if self._direct:
            return
        if written:
            # Only here does the system say that the disk or the network failed; later reads would find old bytes.
            try:
                self._calls.fdatasync(self.fd)
            except OSError as error:
                raise self._failure(
                    f"writing {self.nbytes} bytes at offset 0", error, offset=0, wanted=self.nbytes
                ) from error
        with contextlib.suppress(OSError):  # no more than a hint
            self._calls.drop_cache(self.fd, 0, self.nbytes)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # nothing is lost with a file that ends here
            self._calls.close(self.fd)

    def _open_nameless(self) -> int:
        if _O_TMPFILE:
            try:
                return self._calls.open(self.directory, os.O_RDWR | _O_TMPFILE)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
        path = os.path.join(self.directory, f".slideformer-{secrets.token_hex(8)}")
        fd = self._calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._calls.unlink(path)
        except BaseException:
            self._calls.close(fd)
            raise
        return fd

    def _failure(
        self, what: str, error: OSError, *, wanted: int, offset: int | None = None, got: int | None = None
    ) -> DiskError:
        progress = "" if got is None else f" after {got}"
        if error.errno in _FULL:
            with contextlib.suppress(OSError):
                free = self._calls.free_bytes(self.directory)
                progress += f" with {free} bytes free in {self.directory}"
                got = free if got is None else got
        return DiskError(
            f"{self.path}: {what} failed{progress}: {reason(error)}; {remedy(error)}",
            filename=self.path,
            offset=offset,
            wanted=wanted,
            got=got,
            errno=error.errno,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """One transfer: these bytes of the file are at `offset` of `piece`."""

    piece: _Piece
    offset: int
    span: slice


def _close_pieces(pieces: Iterable[_Piece]) -> None:
    for piece in pieces:
        piece.close()
