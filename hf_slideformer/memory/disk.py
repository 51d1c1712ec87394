"""State on disk: files that whole host buffers are read from and written to beside everything else.

A file has no name in its directory once it is made, so a killed process leaves nothing behind. With several
directories it is striped over them in chunks. Transfers are whole pages past the page cache (O_DIRECT): the cache
would compete for the RAM that the state on disk was moved out of. Reads and writes each have a queue whose requests
start in order of submission, so a read that waits for an update never holds up a write, and every wait ends as long
as each request waits only for work that was submitted before it.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import mmap
import os
import queue
import secrets
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, DiskError, StateError
from ..metrics import Metrics
from .layout import Span
from .pinned import HostBuffer
from .transfer import Handle

_PAGE_BYTES = 4096
_CHUNK_BYTES = 4 * 2**20
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_O_TMPFILE = getattr(os, "O_TMPFILE", 0)
# What file systems and kernels without nameless files answer.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    errno.ENOENT: "create the directory, or name another one in nvme_dir",
    errno.ENOTDIR: "name a directory in nvme_dir",
    errno.EROFS: "mount it writable, or name a directory on another disk in nvme_dir",
    errno.EACCES: "allow this user to write there, or name another directory in nvme_dir",
    errno.EPERM: "allow this user to write there, or name another directory in nvme_dir",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENOSPC: "free some space, name a directory on a larger disk in nvme_dir, or lower nvme_memory",
    errno.EDQUOT: "raise the quota, name a directory on another disk in nvme_dir, or lower nvme_memory",
}
_CHECK_DISK = "check the disk (the kernel's log may say more), then resume from the last checkpoint"


class FileOps:
    """The system calls of a store, one method each; tests put failing ones in their place."""

    def open(self, path: str, flags: int) -> int:
        """Open or create a file that only its owner may use."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def set_direct(self, fd: int) -> None:
        """Let an open file's transfers pass the page cache."""
        if not _O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | _O_DIRECT)

    def close(self, fd: int) -> None:
        """Close a file; one without a name ends here."""
        os.close(fd)

    def unlink(self, path: str) -> None:
        """Take a file's name away."""
        os.unlink(path)

    def preadv(self, fd: int, view: memoryview, offset: int) -> int:
        """Read into `view`; returns bytes read."""
        return os.preadv(fd, [view], offset)

    def pwritev(self, fd: int, view: memoryview, offset: int) -> int:
        """Write `view`; returns bytes written."""
        return os.pwritev(fd, [view], offset)

    def fallocate(self, fd: int, nbytes: int) -> None:
        """Reserve the space of a file of `nbytes`."""
        os.posix_fallocate(fd, 0, nbytes)

    def truncate(self, fd: int, nbytes: int) -> None:
        """Set a file's length."""
        os.ftruncate(fd, nbytes)

    def map(self, fd: int, nbytes: int) -> mmap.mmap:
        """Make a file memory, shared with whoever reads and writes it."""
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)

    def fdatasync(self, fd: int) -> None:
        """Wait until what was written has left the page cache."""
        os.fdatasync(fd)

    def drop_cache(self, fd: int, offset: int, nbytes: int) -> None:
        """Take these bytes of a file out of the page cache."""
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def free_bytes(self, path: str) -> int:
        """Bytes that this user may still write on the file system of `path`."""
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize


def free_bytes(directories: Sequence[str | os.PathLike], ops: FileOps | None = None) -> int:
    """Bytes of state that fit in files striped over `directories`, by what is free now.

    Every directory takes the same share, so the file system with the least room for each of its directories decides.

    Raises:
        DiskError: a directory is missing.
    """
    ops = ops or FileOps()
    shares: collections.Counter[int] = collections.Counter()
    free: dict[int, int] = {}
    for directory in directories:
        path = os.fspath(directory)
        try:
            device = os.stat(path).st_dev
            shares[device] += 1
            free[device] = ops.free_bytes(path)
        except OSError as error:
            raise _refused(path, "asking for its free space", error) from error
    return min((free[device] * len(directories) // count for device, count in shares.items()), default=0)


def check_directory(path: str | os.PathLike, ops: FileOps | None = None) -> bool:
    """Write and read one page in a file under `path`, of which nothing stays.

    Returns:
        Whether transfers can pass the page cache.

    Raises:
        DiskError: no file can be made, written or read there.
    """
    path, ops = os.fspath(path), ops or FileOps()
    page = HostBuffer(_PAGE_BYTES).view(_PAGE_BYTES)
    for direct in (True, False):
        try:
            piece = _Piece(path, "slideformer-check", direct, ops)
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


class DiskStore:
    """Files for state, and the threads that read and write them.

    Args:
        directories: existing ones; files are striped over them.
        metrics: receives `disk_read_bytes` and `disk_write_bytes`, and the seconds that requests took from their first
            chunk to their last, `disk_read_s` and `disk_write_s` (requests may overlap).
        threads: that read, and as many that write, for each directory.
        ops: the system calls; for tests.
        delay_s: called with a request's label before each of its chunks, returns seconds to sleep; for tests.
        chunk_bytes: bytes of one transfer, and of a stripe; whole pages.

    Raises:
        ConfigError: there is no directory.
        DiskError: a directory is missing or cannot be written to.
    """

    def __init__(
        self,
        directories: Sequence[str | os.PathLike],
        *,
        metrics: Metrics,
        threads: int = 4,
        ops: FileOps | None = None,
        delay_s: Callable[[str], float] | None = None,
        chunk_bytes: int = _CHUNK_BYTES,
    ) -> None:
        if not directories:
            raise ConfigError("state on disk needs a directory; name one or more in nvme_dir")
        self._ops = ops or FileOps()
        self._directories = [
            (path, check_directory(path, self._ops)) for path in map(os.path.abspath, directories)
        ]
        cached = [path for path, direct in self._directories if not direct]
        if cached:
            warnings.warn(
                f"{', '.join(cached)}: the file system refuses O_DIRECT, so state on disk passes through the page "
                "cache, which is slower and takes RAM for a while. Name a directory on a local disk in nvme_dir.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._metrics = metrics
        self._delay_s = delay_s
        self._chunk_bytes = -(-chunk_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._created = 0  # striped files; each begins in the next directory
        self._whole_bytes = [0] * len(directories)  # in each directory, of files that are not striped
        self._files: weakref.WeakSet[DiskFile] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        workers = threads * len(directories)
        self._reads = _RequestQueue("slideformer-disk-read", workers)
        self._writes = _RequestQueue("slideformer-disk-write", workers)
        # Of a store that nobody closed: its threads end after what is queued. Not at exit, where they are daemons.
        weakref.finalize(self, _end_queues, self._reads, self._writes).atexit = False

    def create(self, name: str, nbytes: int, *, striped: bool = True) -> DiskFile:
        """A file of zeros, `nbytes` rounded up to whole pages, whose space is reserved.

        Args:
            name: for messages.
            nbytes: size in bytes.
            striped: over all directories; a file that is not can be mapped, and lies in the directory that has the
                fewest bytes of such files so far.

        Raises:
            StateError: the store is closed.
            DiskError: there is too little space, or no file can be made. Nothing of it stays.
        """
        if self._closed:
            raise StateError("the engine was closed; prepare the model again")
        directories = self._directories
        if not striped:
            emptiest = self._whole_bytes.index(min(self._whole_bytes))
            directories = [directories[emptiest]]
        file = DiskFile(name, nbytes, directories, self._created, self._chunk_bytes, self._ops)
        if striped:
            self._created += 1
        else:
            self._whole_bytes[emptiest] += file.nbytes
        self._files.add(file)
        return file

    def read(
        self, file: DiskFile, buffer: HostBuffer, *, after: Handle | None = None, span: Span | None = None
    ) -> Handle:
        """Read the whole file, or a span of it, into the start of `buffer` once `after` is done.

        Args:
            file: of this store.
            buffer: at least as large as what is read; nobody else uses it until the handle is done.
            after: the write that the read is to see, or what used the buffer before.
            span: first byte and number of bytes, whole pages; None is the whole file.

        Returns:
            Done when all bytes have arrived; it fails, after everything that had begun has ended, with the first
            `DiskError`, or with that of `after`.

        Raises:
            StateError: the buffer is too small.
        """
        return self._submit(f"disk read of {file.name}", file, buffer, after, span, writing=False)

    def write(
        self, file: DiskFile, buffer: HostBuffer, *, after: Handle | None = None, span: Span | None = None
    ) -> Handle:
        """Write the start of `buffer` over the whole file, or a span of it, once `after` is done.

        Args:
            file: of this store.
            buffer: at least as large as what is written; nobody changes it until the handle is done.
            after: what fills the buffer, or the last read of the file.
            span: as for `read`.

        Returns:
            Done when the bytes are on their way out of RAM; it fails as for `read`, and then the file's content
            may be old and new in parts.

        Raises:
            StateError: the buffer is too small.
        """
        return self._submit(f"disk write of {file.name}", file, buffer, after, span, writing=True)

    def close(self) -> None:
        """Finish what is queued, end the threads and close the files."""
        with self._lock:
            self._closed = True
        _end_queues(self._reads, self._writes)
        self._reads.join()
        self._writes.join()
        for file in list(self._files):
            file.close()

    def _submit(
        self,
        label: str,
        file: DiskFile,
        buffer: HostBuffer,
        after: Handle | None,
        span: Span | None,
        *,
        writing: bool,
    ) -> Handle:
        start, nbytes = span or (0, file.nbytes)
        if start % _PAGE_BYTES or nbytes % _PAGE_BYTES or start + nbytes > file.nbytes:
            raise StateError(
                f"{label}: bytes {start} to {start + nbytes} of {file.nbytes} are not whole pages of it"
            )
        if buffer.nbytes < nbytes:
            raise StateError(
                f"{label}: the buffer has {buffer.nbytes} bytes, and {nbytes} are to be moved; take a larger buffer"
            )
        handle = Handle(label)
        with self._lock:
            if self._closed or not file.acquire():
                handle.fail(StateError("the engine was closed; prepare the model again"))
                return handle
            request = _Request(
                handle, file, buffer, after, (start, nbytes), writing, self._metrics, self._delay_s
            )
            (self._writes if writing else self._reads).put(request)
        return handle


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
        ops: FileOps,
    ) -> None:
        self.name = name
        self.nbytes = max(1, -(-nbytes // _PAGE_BYTES)) * _PAGE_BYTES
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
                self._pieces.append(_Piece(directory, name, direct, ops))
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

    def chunks(self, span: Span) -> list[_Chunk]:
        """The transfers that move these bytes of the file; their slices count from the first of them."""
        start, nbytes = span
        found = []
        for number in range(start // self._chunk_bytes, -(-(start + nbytes) // self._chunk_bytes)):
            chunk = number * self._chunk_bytes
            begin, end = max(start, chunk), min(start + nbytes, chunk + self._chunk_bytes)
            offset = number // self._stride * self._chunk_bytes + begin - chunk
            found.append(
                _Chunk(self._pieces[number % self._stride], offset, slice(begin - start, end - start))
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

    def __init__(self, directory: str, name: str, direct: bool, ops: FileOps) -> None:
        self.directory, self.path = directory, os.path.join(directory, name)
        self._direct, self._ops = direct, ops
        self.nbytes = 0
        try:
            self.fd = self._open_nameless()
        except OSError as error:
            raise _refused(directory, f"making a file for {name}", error) from error
        if direct:
            try:
                ops.set_direct(self.fd)
            except OSError as error:
                self.close()
                raise _refused(directory, f"opening a file for {name} with O_DIRECT", error) from error

    def reserve(self, nbytes: int) -> None:
        """Make the file `nbytes` long and reserve its space.

        Raises:
            DiskError: the space is not there.
        """
        try:
            if nbytes > self._ops.free_bytes(
                self.directory
            ):  # a file system that cannot reserve would say so only in the middle of a step
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                self._ops.fallocate(self.fd, nbytes)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise
                self._ops.truncate(self.fd, nbytes)
        except OSError as error:
            raise self._failure(f"reserving {nbytes} bytes", error, wanted=nbytes) from error
        self.nbytes = nbytes

    def move(self, view: memoryview, offset: int, *, writing: bool) -> None:
        """Read or write all of `view` at `offset`.

        Raises:
            DiskError: the system refuses, or makes no progress.
        """
        operation = self._ops.pwritev if writing else self._ops.preadv
        verb, wanted, done = "writing" if writing else "reading", len(view), 0
        while done < wanted:
            what = f"{verb} {wanted} bytes at offset {offset}"
            try:
                count = operation(self.fd, view[done:], offset + done)
            except OSError as error:
                raise self._failure(what, error, offset=offset, wanted=wanted, got=done) from error
            got = done + count
            # Past the page cache a transfer can only go on from a page's start.
            reached = got // _PAGE_BYTES * _PAGE_BYTES if self._direct and got < wanted else got
            if reached == done:
                noun = "write" if writing else "read"
                raise DiskError(
                    f"{self.path}: {what} ended after {got} (short {noun}); {_CHECK_DISK}",
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
            return self._ops.map(self.fd, self.nbytes)
        except OSError as error:
            raise DiskError(
                f"{self.path}: mapping {self.nbytes} bytes failed: {_reason(error)}; name a directory on a local "
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
                self._ops.fdatasync(self.fd)
            except OSError as error:
                raise self._failure(
                    f"writing {self.nbytes} bytes at offset 0", error, offset=0, wanted=self.nbytes
                ) from error
        with contextlib.suppress(OSError):  # no more than a hint
            self._ops.drop_cache(self.fd, 0, self.nbytes)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # nothing is lost with a file that ends here
            self._ops.close(self.fd)

    def _open_nameless(self) -> int:
        if _O_TMPFILE:
            try:
                return self._ops.open(self.directory, os.O_RDWR | _O_TMPFILE)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
        path = os.path.join(self.directory, f".slideformer-{secrets.token_hex(8)}")
        fd = self._ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._ops.unlink(path)
        except BaseException:
            self._ops.close(fd)
            raise
        return fd

    def _failure(
        self, what: str, error: OSError, *, wanted: int, offset: int | None = None, got: int | None = None
    ) -> DiskError:
        progress = "" if got is None else f" after {got}"
        if error.errno in _FULL:
            with contextlib.suppress(OSError):
                free = self._ops.free_bytes(self.directory)
                progress += f" with {free} bytes free in {self.directory}"
                got = free if got is None else got
        return DiskError(
            f"{self.path}: {what} failed{progress}: {_reason(error)}; "
            f"{_REMEDIES.get(error.errno or 0, _CHECK_DISK)}",
            filename=self.path,
            offset=offset,
            wanted=wanted,
            got=got,
            errno=error.errno,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """One transfer: these bytes of the file are at `offset` of `piece`."""

    piece: _Piece
    offset: int
    span: slice


class _Request:
    """A read or write of a whole file; holds the file open and the buffer alive until it is done."""

    def __init__(
        self,
        handle: Handle,
        file: DiskFile,
        buffer: HostBuffer,
        after: Handle | None,
        span: Span,
        writing: bool,
        metrics: Metrics,
        delay_s: Callable[[str], float] | None,
    ) -> None:
        self._handle, self._file, self._buffer, self._after = handle, file, buffer, after
        self._span = span
        self._writing, self._metrics, self._delay_s = writing, metrics, delay_s
        self._key = "disk_write" if writing else "disk_read"
        self._view = buffer.view(span[1])
        self._timing = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._left = 0
        self._error: BaseException | None = None

    def begin(self) -> Iterable[_Chunk]:
        """Wait for what comes before; the chunks to move, none where that failed."""
        chunks: Sequence[_Chunk] = ()
        try:
            if self._after is not None:
                self._after.wait_host()
            chunks = self._file.chunks(self._span)
            self._left = len(chunks)
        except BaseException as error:  # noqa: BLE001 - carried to the waiting thread
            self._error = error
        if not chunks:
            self._end()
            return ()
        self._timing.enter_context(self._metrics.timed(f"{self._key}_s", self._handle.label, lane="disk"))
        return chunks

    def move(self, chunk: _Chunk) -> None:
        """Move one chunk, unless one has failed already; the last one ends the request."""
        try:
            if self._error is None:
                if self._delay_s is not None:
                    time.sleep(self._delay_s(self._handle.label))
                chunk.piece.move(self._view[chunk.span], chunk.offset, writing=self._writing)
        except BaseException as error:  # noqa: BLE001 - carried to the waiting thread
            self._keep(error)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._end()

    def _end(self) -> None:
        try:
            if self._error is None:
                self._file.settle(written=self._writing)
        except BaseException as error:  # noqa: BLE001 - carried to the waiting thread
            self._keep(error)
        try:
            self._timing.close()
            self._file.release()
        except BaseException as error:  # noqa: BLE001 - carried to the waiting thread
            self._keep(error)
        if self._error is not None:
            self._handle.fail(self._error)
            return
        self._metrics.add(f"{self._key}_bytes", self._span[1])
        self._handle.complete()

    def _keep(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error


class _RequestQueue:
    """Requests in order of submission, served by several threads.

    Whichever thread finds no chunk left takes the next request and waits for what that comes after; the others queue
    behind it, once they have finished the chunks that they are moving.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._taking = threading.Lock()
        self._chunks: collections.deque[tuple[_Request, _Chunk]] = collections.deque()
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, request: _Request | None) -> None:
        """Add a request; None ends the threads, after what was added before."""
        self._queue.put(request)

    def join(self) -> None:
        """Wait until the threads have ended."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _serve(self) -> None:
        while (item := self._take()) is not None:
            request, chunk = item
            request.move(chunk)
            # Nothing of a finished request may stay referenced while the thread waits.
            del item, request, chunk

    def _take(self) -> tuple[_Request, _Chunk] | None:
        with self._taking:
            while not self._chunks:
                request = self._queue.get()
                if request is None:
                    self._queue.put(None)  # for the next thread
                    return None
                self._chunks.extend((request, chunk) for chunk in request.begin())
                del request
            return self._chunks.popleft()


def _end_queues(*queues: _RequestQueue) -> None:
    for requests in queues:
        requests.put(None)


def _close_pieces(pieces: Iterable[_Piece]) -> None:
    for piece in pieces:
        piece.close()


def _reason(error: OSError) -> str:
    return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'unknown')})"


def _refused(directory: str, what: str, error: OSError) -> DiskError:
    return DiskError(
        f"{directory}: {what} failed: {_reason(error)}; {_REMEDIES.get(error.errno or 0, _CHECK_DISK)}",
        filename=directory,
        errno=error.errno,
    )
