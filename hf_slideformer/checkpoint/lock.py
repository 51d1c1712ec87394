"""The right to save into a directory: one process has it at a time.

Two runs in one output directory would take each other's unfinished checkpoints for leftovers, and rotate each other's.
The right is a file with the owner's name in it, locked with `flock`: the kernel takes the lock from a process that is
killed, also on another machine where the file system knows of it. Where there are no locks the name alone counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .files import CheckpointCalls, disk_error

logger = logging.getLogger(__name__)

# Trainer uploads the output directory to the Hub without names that begin with an underscore.
LOCK_FILE = "_slideformer.lock"
# Its owner has the lock before its name is in the file.
_NAMELESS_S = 1.0


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that has a directory.

    Attributes:
        pid: its number there.
        host: for people.
        machine: where that number means something: this start of this kernel, and the container.
        started: in the kernel's ticks since it started; numbers are given again.
        since: when it took the directory.
    """

    pid: int
    host: str
    machine: str
    started: int
    since: str

    @classmethod
    def of_this_process(cls) -> Owner:
        """This process, now."""
        found = _process(os.getpid())
        started = found[1] if found is not None else 0
        since = time.strftime("%Y-%m-%d %H:%M:%S%z")
        return cls(os.getpid(), socket.gethostname(), _machine(), started, since)

    @classmethod
    def in_file(cls, descriptor: int) -> Owner | None:
        """The owner that an open file names; None if it names none."""
        try:
            values = json.loads(os.pread(descriptor, 4096, 0))
            return cls(
                int(values["pid"]), str(values["host"]), str(values["machine"]), int(values["started"]),
                str(values["since"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError):
            return None

    def is_alive(self) -> bool | None:
        """Whether it still runs; None where that cannot be seen from here."""
        if self.machine != _machine() or _process(os.getpid()) is None:
            return None
        found = _process(self.pid)
        if found is None:
            return _is_hidden(self.pid)
        return found[0] not in "ZX" and found[1] == self.started

    def __str__(self) -> str:
        here = " (this process)" if self.pid == os.getpid() and self.machine == _machine() else ""
        return f"process {self.pid}{here} on {self.host} saves there since {self.since}"


def _process(pid: int) -> tuple[str, int] | None:
    """State and start of a process, or None if there is none, or none that we may see."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it can have anything in it
    return fields[0], int(fields[19])


def _is_hidden(pid: int) -> bool:
    """Whether there is a process of another user, where those are not shown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class DirectoryLock:
    """Keeps other processes, and other threads of this one, from saving to the same place; `release` ends it.

    Within a thread it can be taken again while it is held (a run inside of another's callback).

    Args:
        file: says that the place is taken; made, with its directory, and removed in the end.
        settle: called before the same thread takes it again: ends what is going on in the directory beside it.

    Raises:
        CheckpointError: another process has it.
        DiskError: the file cannot be made.
    """

    def __init__(self, file: Path, settle: Callable[[], None] = lambda: None) -> None:
        self.file = file.absolute()
        self._settle = settle
        self._thread = threading.get_ident()
        self._pid = os.getpid()
        self._descriptor: int | None = None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            outer = next((lock for lock in _held() if lock._shares(self)), None)
            if outer is not None:
                outer._settle()
                return
            self._descriptor = self._acquire()
        except OSError as error:
            raise disk_error("locking", self.file, error, files=CheckpointCalls()) from error
        _held().add(self)

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others have it; again, or in a forked child, this does nothing."""
        if self._descriptor is None or self._pid != os.getpid():
            return
        _held().discard(self)
        descriptor, self._descriptor = self._descriptor, None
        with contextlib.suppress(OSError):  # a directory that has gone
            os.ftruncate(descriptor, 0)
            if _is_at(self.file, descriptor):
                self.file.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def forget(self) -> None:
        """In a forked child: the lock is its parent's, and must not outlive it."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _shares(self, other: DirectoryLock) -> bool:
        return (
            self._descriptor is not None
            and self._thread == other._thread
            and _is_at(other.file, self._descriptor)
        )

    def _acquire(self) -> int:
        """The open file, locked, with this process's name in it."""
        end = time.monotonic() + _NAMELESS_S
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            is_taken = False
            try:
                is_taken = self._try(descriptor, end)
            finally:
                if not is_taken:
                    os.close(descriptor)
            if is_taken:
                return descriptor

    def _try(self, descriptor: int, end: float) -> bool:
        """Take the lock of an open file; False if that is to be tried again."""
        is_free = _flock(descriptor)
        if not _is_at(self.file, descriptor):  # its owner has removed it meanwhile
            return False
        owner = Owner.in_file(descriptor)
        is_alive = None if owner is None else owner.is_alive()
        if is_free is False and owner is None and time.monotonic() < end:
            time.sleep(0.01)
            return False
        if is_free is False and is_alive is False:
            # What it left behind (children that are no Python) holds the lock, and not the directory.
            self.file.unlink(missing_ok=True)
            return False
        is_unseen = is_free is None and owner is not None and is_alive is None
        if is_free is False or is_alive or is_unseen:
            raise self._refusal(owner, is_unseen)
        if owner is not None:
            logger.info("%s is taken over from process %d on %s", self.file, owner.pid, owner.host)
        _write(descriptor)
        return True

    def _refusal(self, owner: Owner | None, is_unseen: bool) -> CheckpointError:
        who = "another process saves there" if owner is None else str(owner)
        rest = f". Whether it still runs cannot be seen from here: if it does not, remove {self.file}"
        return CheckpointError(
            f"{self.file.parent} is in use: {who}. Two processes would remove each other's checkpoints; give this one "
            f"another directory, or end that one first{rest if is_unseen else ''}"
        )


def _flock(descriptor: int) -> bool | None:
    """Whether the lock was free and is ours now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write(descriptor: int) -> None:
    text = json.dumps(dataclasses.asdict(Owner.of_this_process())).encode() + b"\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)


@functools.cache
def _held() -> weakref.WeakSet[DirectoryLock]:
    """Locks of this process.

    A forked child (a dataloader's worker) shares the open file, and with it the lock: it would hold it a while longer
    than a parent that is killed. So it closes it at once.
    """
    held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()

    def forget() -> None:
        for lock in list(held):
            lock.forget()
        held.clear()

    os.register_at_fork(after_in_child=forget)
    return held
