"""System calls that fail on request, for whatever keeps state on disk."""

import fcntl
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from hf_slideformer.memory.disk.calls import DiskCalls

PAGE = 4096
TRANSFERS = ("preadv", "pwritev")


@dataclass(eq=False)
class _Fault:
    operation: str
    act: Callable
    skip: int
    times: int | None


class FaultyOps(DiskCalls):
    """`DiskCalls` with faults that can be put in at any time, from any thread.

    A fault concerns one operation, lets `skip` calls of it pass, and then strikes `times` times (None: from then on
    always). Of several that could strike, the first one put in does.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._faults = []
        self.struck = 0
        self.open_files = set()
        # Called with operation and offset before each transfer, in its thread; may block or raise.
        self.before = None

    def fail(self, operation, number, *, skip=0, times=None):
        """Let `operation` raise OSError with this error number."""

        def act(_call, *_args):
            raise OSError(number, os.strerror(number))

        self._put(operation, act, skip, times)

    def shorten(self, operation, nbytes, *, skip=0, times=None):
        """Let a transfer say that it moved `nbytes` at most; none at all with 0.

        Of a file with O_DIRECT only the whole pages among them are moved.
        """

        def act(call, fd, view, offset):
            direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
            part = view[: nbytes // PAGE * PAGE if direct else nbytes]
            count = call(fd, part, offset) if len(part) else 0
            return min(nbytes, len(view)) if count == len(part) else count

        self._put(operation, act, skip, times)

    def free(self, nbytes, *, skip=0, times=None):
        """Let the file system have `nbytes` free."""
        self._put("free_bytes", lambda _call, _path: nbytes, skip, times)

    def heal(self):
        """Take all faults away."""
        with self._lock:
            self._faults.clear()

    def _put(self, operation, act, skip, times):
        assert hasattr(DiskCalls, operation), operation
        with self._lock:
            self._faults.append(_Fault(operation, act, skip, times))

    def _run(self, operation, *args):
        call = getattr(super(), operation)
        if self.before is not None and operation in TRANSFERS:
            self.before(operation, args[2])
        act = self._due(operation)
        return call(*args) if act is None else act(call, *args)

    def _due(self, operation):
        with self._lock:
            due = None
            for fault in self._faults:
                if fault.operation != operation or fault.times == 0:
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif due is None:
                    due = fault
            if due is None:
                return None
            due.times = None if due.times is None else due.times - 1
            self.struck += 1
            return due.act

    def open(self, path, flags):
        fd = self._run("open", path, flags)
        with self._lock:
            self.open_files.add(fd)
        return fd

    def close(self, fd):
        with self._lock:
            self.open_files.discard(fd)
        self._run("close", fd)

    def set_direct(self, fd):
        self._run("set_direct", fd)

    def unlink(self, path):
        self._run("unlink", path)

    def preadv(self, fd, view, offset):
        return self._run("preadv", fd, view, offset)

    def pwritev(self, fd, view, offset):
        return self._run("pwritev", fd, view, offset)

    def fallocate(self, fd, nbytes):
        self._run("fallocate", fd, nbytes)

    def truncate(self, fd, nbytes):
        self._run("truncate", fd, nbytes)

    def map(self, fd, nbytes):
        return self._run("map", fd, nbytes)

    def fdatasync(self, fd):
        self._run("fdatasync", fd)

    def drop_cache(self, fd, offset, nbytes):
        self._run("drop_cache", fd, offset, nbytes)

    def free_bytes(self, path):
        return self._run("free_bytes", path)
