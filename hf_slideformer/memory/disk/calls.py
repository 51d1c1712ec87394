"""The system calls of files for state, and what to do where one is refused."""

from __future__ import annotations

import collections
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

from ...errors import DiskError

_O_DIRECT = getattr(os, "O_DIRECT", 0)
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
CHECK_DISK = "check the disk (the kernel's log may say more), then resume from the last checkpoint"


class DiskCalls:
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


def free_bytes(directories: Sequence[str | os.PathLike], calls: DiskCalls | None = None) -> int:
    """Bytes of state that fit in files striped over `directories`, by what is free now.

    Every directory takes the same share, so the file system with the least room for each of its directories decides.

    Raises:
        DiskError: a directory is missing.
    """
    calls = calls or DiskCalls()
    shares: collections.Counter[int] = collections.Counter()
    free: dict[int, int] = {}
    for directory in directories:
        path = os.fspath(directory)
        try:
            device = os.stat(path).st_dev
            shares[device] += 1
            free[device] = calls.free_bytes(path)
        except OSError as error:
            raise refused(path, "asking for its free space", error) from error
    return min((free[device] * len(directories) // count for device, count in shares.items()), default=0)


def reason(error: OSError) -> str:
    return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'unknown')})"


def refused(directory: str, what: str, error: OSError) -> DiskError:
    return DiskError(
        f"{directory}: {what} failed: {reason(error)}; {remedy(error)}",
        filename=directory,
        errno=error.errno,
    )


def remedy(error: OSError) -> str:
    """What to do about it, as a clause."""
    return _REMEDIES.get(error.errno or 0, CHECK_DISK)
