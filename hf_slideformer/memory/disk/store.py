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
import os
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence

from ...errors import ConfigError, StateError
from ...metrics import Metrics
from ..buffers import HostBuffer
from ..layout import Span
from ..limits import PAGE_BYTES
from ..transfer import Handle
from .calls import DiskCalls
from .files import Chunk, DiskFile, check_directory

_CHUNK_BYTES = 4 * 2**20


class DiskStore:
    """Files for state, and the threads that read and write them.

    Args:
        directories: existing ones; files are striped over them.
        metrics: receives `disk_read_bytes` and `disk_write_bytes`, and the seconds that requests took from their first
            chunk to their last, `disk_read_s` and `disk_write_s` (requests may overlap).
        threads: that read, and as many that write, for each directory.
        calls: the system calls; for tests.
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
        calls: DiskCalls | None = None,
        delay_s: Callable[[str], float] | None = None,
        chunk_bytes: int = _CHUNK_BYTES,
    ) -> None:
        if not directories:
            raise ConfigError("state on disk needs a directory; name one or more in nvme_dir")
        self._calls = calls or DiskCalls()
        self._directories = [
            (path, check_directory(path, self._calls)) for path in map(os.path.abspath, directories)
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
        self._chunk_bytes = -(-chunk_bytes // PAGE_BYTES) * PAGE_BYTES
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
        file = DiskFile(name, nbytes, directories, self._created, self._chunk_bytes, self._calls)
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
        if start % PAGE_BYTES or nbytes % PAGE_BYTES or start + nbytes > file.nbytes:
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

    def begin(self) -> Iterable[Chunk]:
        """Wait for what comes before; the chunks to move, none where that failed."""
        chunks: Sequence[Chunk] = ()
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

    def move(self, chunk: Chunk) -> None:
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
        self._chunks: collections.deque[tuple[_Request, Chunk]] = collections.deque()
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

    def _take(self) -> tuple[_Request, Chunk] | None:
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
