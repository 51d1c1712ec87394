"""Files of a checkpoint: written and read in pieces, with a checksum on the way and failures that say where.

Checksums are CRC-32 (`zlib.crc32`): they find every flipped bit and every burst of up to 32 bits, and take a fraction
of a cryptographic hash's time. They guard against decay, not against forgery.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DiskError
from ..memory.limits import CHECKPOINT_PIECE_BYTES

PIECE_BYTES = CHECKPOINT_PIECE_BYTES


class CheckpointCalls:
    """The operating system's calls that checkpoints are made with; tests put faults and delays in their place."""

    def open(self, path: Path, flags: int) -> int:
        """A file descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Bytes written, perhaps fewer than given."""
        return os.write(descriptor, data)

    def read_into(self, descriptor: int, view: memoryview) -> int:
        """Bytes read, perhaps fewer than wanted; 0 at the end of the file."""
        return os.readv(descriptor, [view])

    def fsync(self, descriptor: int) -> None:
        """Wait until the file's or directory's content is on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Give the descriptor back."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file or directory within its file system."""
        os.rename(source, target)

    def make_directory(self, path: Path) -> None:
        """Make a directory and those above it."""
        path.mkdir(parents=True, exist_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and all in it; of a link only the link; nothing if it is not there."""
        if path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)

    def free_bytes(self, directory: Path) -> int:
        """Bytes that an ordinary user may still write to the file system of `directory`."""
        return shutil.disk_usage(directory).free


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a whole file: its size and the CRC-32 of its content."""

    nbytes: int
    crc32: int

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a checkpoint's manifest."""
        return {"bytes": self.nbytes, "crc32": f"{self.crc32:08x}"}

    @classmethod
    def of_dict(cls, values: dict[str, Any]) -> FileRecord:
        """From a checkpoint's manifest."""
        return cls(int(values["bytes"]), int(values["crc32"], 16))


# Size, time of the last change and inode: it is another one when somebody has written to a file, or replaced it.
FileVersion = tuple[int, int, int]


def file_version(path: Path) -> FileVersion | None:
    """The version of a file that is there; None where it is not."""
    try:
        return _version_of(path.stat())
    except FileNotFoundError:
        return None


def _version_of(found: os.stat_result) -> FileVersion:
    return found.st_size, found.st_mtime_ns, found.st_ino


def gib(nbytes: int) -> str:
    """A size for a message."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**24 else f"{nbytes:,} bytes"


def disk_error(
    action: str, path: Path, error: OSError, *, files: CheckpointCalls, where: str = ""
) -> DiskError:
    """The typed error of a call that failed, with what is free on the file system and what to do."""
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    directory = path.parent
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        free = f"{gib(files.free_bytes(directory))} free there"
    except OSError:
        free = "free space unknown"
    remedy = {
        "ENOSPC": "free space, lower save_total_limit or set save_only_model=True",
        "EDQUOT": "the disk quota is used up; free space or lower save_total_limit",
        "EIO": "the disk or its connection fails; check the system log and save to another disk",
        "ENOENT": "the directory has gone; is the disk still mounted?",
        "EROFS": "the file system is read-only; save to another one",
    }.get(name, "check the directory and its file system")
    result = DiskError(f"{action} {path} failed{where}: {name} ({error.strerror or error}); {free}; {remedy}")
    result.errno = error.errno
    return result


class Reader:
    """Reads one file from its beginning to its end, counting its checksum.

    Args:
        path: the file.
        files: the file layer.
        expected: size and checksum that it must have; None takes it as it is.

    Raises:
        DiskError: the file cannot be opened or read.
        CheckpointError: it has another size or checksum than expected, or ends early.
    """

    def __init__(self, path: Path, files: CheckpointCalls, expected: FileRecord | None) -> None:
        self.path = path
        self._files = files
        self._expected = expected
        self._offset = 0
        self._crc = 0
        try:
            self._descriptor = files.open(path, os.O_RDONLY)
        except OSError as error:
            raise disk_error("opening", path, error, files=files) from error
        try:
            self.nbytes = os.fstat(self._descriptor).st_size
            check_size(path, self.nbytes, expected)
        except BaseException:
            files.close(self._descriptor)
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file without checking what was not read."""
        self._files.close(self._descriptor)

    def _finish(self) -> None:
        rest = memoryview(bytearray(min(PIECE_BYTES, self.nbytes - self._offset)))
        while self._offset < self.nbytes:
            self.read_into(rest[: self.nbytes - self._offset])
        if self._expected is not None and self._crc != self._expected.crc32:
            raise CheckpointError(
                f"{self.path} is damaged: its {self.nbytes:,} bytes have checksum {self._crc:08x}, the checkpoint's "
                f"manifest says {self._expected.crc32:08x}"
            )

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes."""
        done = 0
        while done < len(view):
            piece = view[done : done + PIECE_BYTES]
            try:
                got = self._files.read_into(self._descriptor, piece)
            except OSError as error:
                where = f" at offset {self._offset:,} (wanted {len(piece):,} bytes)"
                raise disk_error("reading", self.path, error, files=self._files, where=where) from error
            if got == 0:
                raise CheckpointError(
                    f"{self.path} ends at offset {self._offset:,}: wanted {len(view) - done:,} bytes more, got 0"
                )
            self._crc = zlib.crc32(piece[:got], self._crc)
            self._offset += got
            done += got

    def read(self, nbytes: int) -> bytes:
        """The next bytes."""
        if nbytes > self.nbytes - self._offset:
            raise CheckpointError(
                f"{self.path} is damaged: {nbytes:,} bytes wanted at offset {self._offset:,}, the file has "
                f"{self.nbytes:,}"
            )
        data = bytearray(nbytes)
        self.read_into(memoryview(data))
        return bytes(data)


def check_size(path: Path, nbytes: int, expected: FileRecord | None) -> None:
    """Raise `CheckpointError` if a file of `nbytes` is not as long as expected."""
    if expected is not None and nbytes != expected.nbytes:
        raise CheckpointError(
            f"{path} is not whole: it has {nbytes:,} bytes, the checkpoint's manifest says {expected.nbytes:,}"
        )


class Writer:
    """Writes files and remembers their sizes and checksums.

    Args:
        files: the file layer.
    """

    def __init__(self, files: CheckpointCalls | None = None) -> None:
        self.files = files or CheckpointCalls()
        self.records: dict[Path, FileRecord] = {}
        self._versions: dict[Path, FileVersion] = {}

    def write(self, path: Path, pieces: Iterable[memoryview]) -> None:
        """Write `pieces` one after another to a new file and wait until they are on the disk.

        Raises:
            DiskError: names the file, the offset, bytes wanted and written.
        """
        with self.create(path) as file:
            for piece in pieces:
                file.append(piece)
            file.finish()

    def create(self, path: Path) -> NewFile:
        """A new file to append to; several may be open at once."""
        return NewFile(self, path.absolute())

    def sync(self, path: Path) -> None:
        """Wait until a file or directory that someone else wrote is on the disk."""
        descriptor = self.call("opening", path, self.files.open, path, os.O_RDONLY)
        try:
            self.call("syncing", path, self.files.fsync, descriptor)
        finally:
            self.files.close(descriptor)

    def record(self, path: Path) -> FileRecord:
        """Size and checksum of a file: as it was written, or, of a file that someone else wrote, read back."""
        path = path.absolute()
        if path not in self.records:
            reader = Reader(path, self.files, None)
            with reader:
                pass
            self.records[path] = FileRecord(reader.nbytes, reader._crc)
        return self.records[path]

    def forget_changed(self) -> None:
        """Forget files that are not as they were written, so that they count as somebody else's."""
        self.records = {
            path: record
            for path, record in self.records.items()
            if file_version(path) == self._versions.get(path)
        }

    def remember(self, path: Path, record: FileRecord, descriptor: int) -> None:
        """Take down what an open file of this writer came to."""
        self.records[path] = record
        self._versions[path] = _version_of(os.fstat(descriptor))

    def rename(self, source: Path, target: Path) -> None:
        """Move a file or directory."""
        self.call("renaming", source, self.files.rename, source, target)

    def call(self, action: str, path: Path, call: Callable[..., Any], *args: Any) -> Any:
        """Make a call of the file layer; a failure becomes a `DiskError`."""
        try:
            return call(*args)
        except OSError as error:
            raise disk_error(action, path, error, files=self.files) from error


class NewFile:
    """A file that is being written; made by `Writer.create`. Closing it unfinished leaves no record of it."""

    def __init__(self, writer: Writer, path: Path) -> None:
        self._writer = writer
        self._path = path
        self._offset = self._crc = 0
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        self._descriptor: int | None = writer.call("creating", path, writer.files.open, path, flags)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, piece: memoryview) -> None:
        """Write the next bytes; they may still be on their way to the disk.

        Raises:
            DiskError: see `Writer.write`.
        """
        assert self._descriptor is not None, "closed"
        files = self._writer.files
        self._crc = zlib.crc32(piece, self._crc)
        while len(piece):
            try:
                written = files.write(self._descriptor, piece)
                if written == 0:
                    raise OSError(errno.EIO, "nothing was written")
            except OSError as error:
                where = f" at offset {self._offset:,} (wanted {len(piece):,} bytes, wrote 0)"
                raise disk_error("writing", self._path, error, files=files, where=where) from error
            self._offset += written
            piece = piece[written:]

    def finish(self) -> None:
        """Wait until all is on the disk, close the file, and remember its size and checksum.

        Raises:
            DiskError: it did not get there.
        """
        assert self._descriptor is not None, "closed"
        try:
            self._writer.call("syncing", self._path, self._writer.files.fsync, self._descriptor)
            self._writer.remember(self._path, FileRecord(self._offset, self._crc), self._descriptor)
        finally:
            self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            self._writer.files.close(descriptor)
