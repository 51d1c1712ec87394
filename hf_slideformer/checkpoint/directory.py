"""Checkpoint directories that are whole or not there.

A checkpoint is written to `.tmp-NAME/NAME` beside its place, synced to the disk and renamed into place; it is renamed
to `.delete-NAME` before it is removed. A kill at any instant leaves whole checkpoints under their names, and hidden
leftovers that the next start removes. The manifest `slideformer_checkpoint.json` has every file's size and checksum.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError, DiskError
from .files import (
    CheckpointCalls,
    FileRecord,
    FileVersion,
    Reader,
    Writer,
    check_size,
    file_version,
    gib,
)
from .lock import LOCK_FILE
from .tensors import TensorFiles

logger = logging.getLogger(__name__)

MANIFEST_FILE = "slideformer_checkpoint.json"
FORMAT_VERSION = 1

# What reading a damaged manifest raises.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)
# As Trainer names them, and Accelerate.
_CHECKPOINT = re.compile(r"checkpoint[-_](\d+)")
_WRITTEN, _REPLACED, _REMOVED = ".tmp-", ".replaced-", ".delete-"
# What a checkpoint's own state is in, by whomever it was written; it would be stale in a newer one.
_STATE_FILE = re.compile(
    r"(pytorch_|adapter_)?model(-\d+-of-\d+)?\.(bin|safetensors)(\.index\.json)?"
    r"|(optimizer|scheduler|scaler)(_\d+)?\.(pt|bin)|optimizer(_\d+)?/.*|rng_state.*\.pth|trainer_state\.json"
)
# The manifest's own bytes, directories, and the small files whose size is not known before they are written.
_SLACK_BYTES = 64 * 2**20


def clean_up(directory: Path, files: CheckpointCalls, names: re.Pattern[str] = _CHECKPOINT) -> None:
    """Remove what saves and removals of a killed run left in `directory`, and undo a replacement that was cut off.

    Args:
        directory: where checkpoints are.
        files: the file layer.
        names: of checkpoints.
    """
    if not directory.is_dir() or not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return
    for path in sorted(directory.iterdir()):
        prefix = next((p for p in (_WRITTEN, _REPLACED, _REMOVED) if path.name.startswith(p)), None)
        if prefix is None or not (path.is_symlink() or path.is_dir()):
            continue
        target = path.with_name(path.name.removeprefix(prefix))
        if not names.fullmatch(target.name):
            continue
        if prefix != _REPLACED:
            files.remove_tree(path)
        elif not os.path.lexists(target):
            Writer(files).rename(path, target)
        elif _is_confirmed(directory, files):
            files.remove_tree(path)


def _is_confirmed(directory: Path, files: CheckpointCalls) -> bool:
    """Whether renames in a directory are on the disk: until then what was replaced may be all that there is."""
    try:
        Writer(files).sync(directory)
    except DiskError:
        return False
    return True


def names_of(target: Path) -> re.Pattern[str]:
    """The name of one checkpoint, for `clean_up` and `NewCheckpoint`."""
    return re.compile(re.escape(target.name))


def must_be_written_in_place(directory: Path) -> bool:
    """Whether a directory cannot be replaced by a new one: it holds other files too, or is in use as a directory."""
    if not directory.exists():
        return False
    if (
        os.path.ismount(directory)
        or Path.cwd().is_relative_to(directory)
        or not os.access(directory.parent, os.W_OK | os.X_OK)
    ):
        return True
    found = {path.relative_to(directory).as_posix() for path in _files_under(directory)}
    if not found:
        return False
    try:
        _, records = _parse_manifest(directory)
    except (OSError, *_MALFORMED):
        return True
    return not found <= records.keys()


def remove_checkpoint(path: Path, files: CheckpointCalls) -> None:
    """Remove a checkpoint; it is out of sight before the first file goes. Of a link only the link is removed.

    Raises:
        DiskError: the disk did not confirm renames in its directory, the newest checkpoint's among them; it is there.
    """
    hidden = path.with_name(_REMOVED + path.name)
    files.remove_tree(hidden)
    writer = Writer(files)
    writer.rename(path, hidden)
    try:
        writer.sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            files.rename(hidden, path)
        raise
    files.remove_tree(hidden)


def check_free_space(directory: Path, needed_bytes: int, files: CheckpointCalls) -> None:
    """Raise `CheckpointError` unless a checkpoint of `needed_bytes` fits the file system of `directory`."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = files.free_bytes(existing)
    needed = needed_bytes + _SLACK_BYTES
    if free < needed:
        raise CheckpointError(
            f"a checkpoint needs {gib(needed)} in {directory}, where {gib(free)} are free; free {gib(needed - free)}, "
            "lower save_total_limit (one more checkpoint than it says lies there while saving), set "
            "save_only_model=True or another output_dir"
        )


class NewCheckpoint:
    """A checkpoint that is being written: whole or not there; what is there already stays until then.

    Small files are written to `path` at once, tensors by `finish`, perhaps in another thread. Whoever makes one calls
    `finish` or `abandon`.

    Args:
        target: its final path, named `checkpoint-STEP` or as `names` say.
        files: the file layer.
        needed_bytes: how large it will be, about.
        names: of the checkpoints beside it.
        in_place: write into the directory itself, which is refused by whoever reads it until it is whole again.

    Attributes:
        path: where its files are to be written now.
        outer: the hidden directory around it.
        writer: writes and remembers files.
        tensors: what is written by `finish`, for each model.
        manifest: of all its files, once it is in its place.
        is_in_place: whether it is there under its name, whole; also where `finish` failed after that.

    Raises:
        CheckpointError: too little space; nothing was written.
        OSError: the directory cannot be made.
    """

    def __init__(
        self,
        target: Path,
        files: CheckpointCalls,
        needed_bytes: int,
        names: re.Pattern[str] = _CHECKPOINT,
        *,
        in_place: bool = False,
    ) -> None:
        self.target = target.absolute()
        self.outer = self.target.with_name(_WRITTEN + target.name)
        self.path = self.outer / target.name
        self.writer = Writer(files)
        self.tensors: list[TensorFiles] = []
        self.manifest: Manifest | None = None
        self.is_in_place = False
        self._names = names
        clean_up(self.target.parent, files, names)
        self._in_place = in_place
        if in_place:
            self.outer = self.path = self.target
        check_free_space(self.target.parent, needed_bytes, files)
        try:
            files.make_directory(self.path)
            if in_place:
                _remove_manifest(self.path, self.writer)
        except BaseException:
            self.abandon()
            raise

    def request(self) -> None:
        """Before training goes on: ask for the state that is on disk."""
        for tensors in self.tensors:
            tensors.request()

    def finish(self) -> None:
        """Write the tensors and put the checkpoint into its place.

        Raises:
            DiskError: a write failed; what had been written is removed, unless `is_in_place`: then only the disk's
                confirmation is missing.
            CheckpointError: see `TensorFiles.write`; what had been written is removed.
        """
        try:
            for tensors in self.tensors:
                tensors.write(self.writer)
            self._commit()
        except BaseException as error:
            try:
                self.abandon()
            except DiskError as undoing:
                hidden = self.target.with_name(_REPLACED + self.target.name)
                error.add_note(
                    f"{hidden} is the earlier {self.target.name}; the next start puts it back ({undoing})"
                )
            raise

    def finish_then(self, finished: Callable[[], None]) -> None:
        """`finish`, and call `finished` once the checkpoint is in its place, confirmed by the disk or not.

        Raises:
            DiskError, CheckpointError: as for `finish`; what `finished` raised too is in a note.
        """
        try:
            self.finish()
        except DiskError as error:
            if self.is_in_place:
                try:
                    finished()
                except (OSError, CheckpointError) as too:
                    error.add_note(str(too))
            raise
        finished()

    def abandon(self) -> None:
        """Remove what was written, and let training go on; a checkpoint that is in its place stays."""
        for tensors in self.tensors:
            tensors.held.release_all()
        if self._in_place:
            return
        self.writer.files.remove_tree(self.outer)
        if not self.is_in_place:
            clean_up(self.target.parent, self.writer.files, self._names)

    def _commit(self) -> None:
        if self._in_place:
            self._complete()
        else:
            self._keep_files_of_others()
            self._put_in_place()
        self.manifest = Manifest(self.target, self.path, self.writer)

    def _complete(self) -> None:
        """Make a directory that is written in place whole."""
        sync_tree(self.path, self.writer)
        try:
            write_manifest(self.path, self.writer)
        except BaseException:
            with contextlib.suppress(OSError):  # it may have all its bytes, and would be believed
                (self.path / MANIFEST_FILE).unlink()
            raise
        self.is_in_place = True
        with self._unconfirmed():
            sync_directories(self.path, self.writer)

    def _keep_files_of_others(self) -> None:
        """Take over what lies in the checkpoint's place and is not an earlier checkpoint's.

        A Trainer writes into the directory that is there, so subclasses may put their files there beforehand.
        """
        for path in _files_of_others(self.target):
            kept = self.path / path.relative_to(self.target)
            if not os.path.lexists(kept):
                self.writer.call("keeping", path, _link_or_copy, path, kept)

    def _put_in_place(self) -> None:
        writer, parent = self.writer, self.target.parent
        sync_tree(self.path, writer)
        write_manifest(self.path, writer)
        sync_directories(self.path, writer)
        replaced = self.target.with_name(_REPLACED + self.target.name)
        if os.path.lexists(self.target):
            writer.files.remove_tree(replaced)
            writer.rename(self.target, replaced)
        try:
            writer.rename(self.path, self.target)
        finally:
            # Where it went is asked of the disk: over a network a rename may be done and fail all the same.
            self.is_in_place = not self.path.exists() and SavedCheckpoint.exists(self.target)
        with self._unconfirmed():
            writer.sync(parent)
        for leftover in (self.outer, replaced):
            try:
                writer.files.remove_tree(leftover)
            except OSError as error:  # no reason to give up what has been saved
                logger.warning("%s could not be removed (%s); the next save does it", leftover, error)

    @contextlib.contextmanager
    def _unconfirmed(self) -> Iterator[None]:
        """Adds to an error that the checkpoint is there, and how much that is worth."""
        try:
            yield
        except DiskError as error:
            replaced = self.target.with_name(_REPLACED + self.target.name)
            rest = f"; what it replaced is kept in {replaced}" if os.path.lexists(replaced) else ""
            raised = DiskError(
                f"{self.target} is in its place and whole, but the disk did not confirm that: should the machine go "
                f"down now, it may be lost ({error}){rest}; resume from it, or from an earlier one"
            )
            raised.errno, raised.filename = error.errno, str(self.target)
            raise raised from error


def sync_tree(directory: Path, writer: Writer) -> None:
    """Bring to the disk what others wrote under `directory`; the writer's own files are there already."""
    for path in _regular_files_under(directory):
        if path not in writer.records:
            writer.sync(path)


def sync_directories(directory: Path, writer: Writer) -> None:
    """Bring the entries of all directories under `directory` to the disk."""
    for parent, _, _ in os.walk(directory, topdown=False):
        writer.sync(Path(parent))


def _files_under(directory: Path) -> list[Path]:
    return sorted(
        Path(parent).absolute() / name
        for parent, _, names in os.walk(directory)
        for name in names
        if name not in (MANIFEST_FILE, LOCK_FILE)
    )


def _regular_files_under(directory: Path) -> list[Path]:
    """Files that have a content: no links to nowhere, no sockets."""
    return [path for path in _files_under(directory) if path.is_file()]


def _files_of_others(directory: Path) -> list[Path]:
    """Files in a checkpoint's directory that did not come with it, or were changed later."""
    try:
        _, records = _parse_manifest(directory)
        written_ns = (directory / MANIFEST_FILE).stat().st_mtime_ns
    except (OSError, *_MALFORMED):
        records, written_ns = {}, 0

    def is_of_others(path: Path) -> bool:
        name = path.relative_to(directory).as_posix()
        if name in records:
            return path.stat().st_mtime_ns > written_ns
        return _STATE_FILE.fullmatch(name) is None

    return [path for path in _regular_files_under(directory) if is_of_others(path)]


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_symlink():
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)


def write_manifest(directory: Path, writer: Writer) -> None:
    """Write sizes and checksums of all files under `directory` beside them."""
    names = (path.relative_to(directory.absolute()).as_posix() for path in _regular_files_under(directory))
    records = {name: writer.record(directory / name) for name in names}
    _write_records(directory / MANIFEST_FILE, records, writer)


def _write_records(path: Path, records: Mapping[str, FileRecord], writer: Writer) -> None:
    files = {name: record.as_dict() for name, record in records.items()}
    text = json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1).encode() + b"\n"
    writer.write(path, [memoryview(text)])


class Manifest:
    """The files of a checkpoint in its place, so that what others do to them later is no damage.

    Code of the user's runs after a save: it adds files, rewrites a configuration, removes what it does not need.

    Args:
        path: the checkpoint.
        written_as: where it was written.
        writer: that wrote it.
    """

    def __init__(self, path: Path, written_as: Path, writer: Writer) -> None:
        self._path = path
        self._files = writer.files
        self._records = {
            file.relative_to(written_as).as_posix(): record
            for file, record in writer.records.items()
            if file.is_relative_to(written_as) and file.name != MANIFEST_FILE
        }
        self._versions = self._found()

    def _found(self) -> dict[str, FileVersion]:
        found = {path: file_version(path) for path in _regular_files_under(self._path)}
        return {
            path.relative_to(self._path).as_posix(): version
            for path, version in found.items()
            if version is not None
        }

    def enter_changes(self) -> None:
        """Bring files that others added or rewrote to the disk and enter them, and leave out those that are gone.

        Raises:
            DiskError: a file cannot be read, or the manifest not be written; the one that was there stays.
        """
        if not SavedCheckpoint.exists(self._path):
            return
        found = self._found()
        if found == self._versions:
            return
        writer, records = Writer(self._files), {}
        for name, version in found.items():
            if name in self._records and self._versions.get(name) == version:
                records[name] = self._records[name]
                continue
            writer.sync(self._path / name)
            records[name] = writer.record(self._path / name)
        self._replace(records, writer)
        self._records, self._versions = records, found

    def _replace(self, records: Mapping[str, FileRecord], writer: Writer) -> None:
        hidden = self._path.with_name(_WRITTEN + self._path.name)  # what a kill leaves there is cleaned up
        try:
            self._files.make_directory(hidden)
            _write_records(hidden / MANIFEST_FILE, records, writer)
            writer.rename(hidden / MANIFEST_FILE, self._path / MANIFEST_FILE)
        finally:
            self._files.remove_tree(hidden)
        sync_directories(self._path, writer)


def _remove_manifest(directory: Path, writer: Writer) -> None:
    """Mark a directory that is about to be written again as not whole."""
    if SavedCheckpoint.exists(directory):
        (directory / MANIFEST_FILE).unlink()
        writer.sync(directory)


class SavedCheckpoint:
    """A checkpoint to read from.

    Args:
        path: its directory.
        files: the file layer.

    Raises:
        CheckpointError: it is not whole, or its format is newer than this version reads.
    """

    def __init__(self, path: Path, files: CheckpointCalls) -> None:
        self.path = path
        self.files = files
        self.records = _read_manifest(path)
        for name, record in self.records.items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing{_remedy(path)}")
            with _with_remedy(path):
                check_size(file, file.stat().st_size, record)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is a checkpoint with a manifest; plain Trainer writes none."""
        return (path / MANIFEST_FILE).is_file()

    def has(self, name: str) -> bool:
        """Whether the checkpoint has such a file."""
        return (self.path / name).is_file()

    def reader(self, name: str) -> Reader:
        """Read a file of the checkpoint, with its checksum if the manifest has one; used as a context manager."""
        if not self.has(name):
            raise CheckpointError(f"{self.path / name} is missing")
        return Reader(self.path / name, self.files, self.records.get(name))

    def check_files(self, names: Iterable[str]) -> None:
        """Check the checksums of those of the named files that the checkpoint has."""
        for name in names:
            if name in self.records:
                with self.explained(), self.reader(name):
                    pass

    def explained(self) -> contextlib.AbstractContextManager[None]:
        """Adds to errors of reading what to do about them."""
        return _with_remedy(self.path)


def _read_manifest(path: Path) -> dict[str, FileRecord]:
    try:
        version, records = _parse_manifest(path)
    except (OSError, *_MALFORMED) as error:
        raise CheckpointError(f"{path / MANIFEST_FILE} cannot be read ({error!r}){_remedy(path)}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is in format {version}, this version of hf_slideformer reads up to {FORMAT_VERSION}; update "
            "hf_slideformer, or resume from a checkpoint that this version wrote"
        )
    return records


def _parse_manifest(path: Path) -> tuple[int, dict[str, FileRecord]]:
    manifest = json.loads((path / MANIFEST_FILE).read_bytes())
    records = {name: FileRecord.of_dict(values) for name, values in manifest["files"].items()}
    return int(manifest["format_version"]), records


def whole_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in `directory` whose files are all there in full length, oldest step first; contents are not read."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and SavedCheckpoint.exists(path):
            try:
                _, records = _parse_manifest(path)
                if all((path / name).stat().st_size == record.nbytes for name, record in records.items()):
                    found.append((int(match[1]), path))
            except (OSError, *_MALFORMED):
                continue
    return [path for _, path in sorted(found)]


def _remedy(path: Path) -> str:
    others = [str(other) for other in whole_checkpoints(path.parent) if other.name != path.name]
    advice = (
        f"resume from another: {', '.join(others)}"
        if others
        else "there is no other whole checkpoint beside it"
    )
    return f"; {advice}. If the file was changed on purpose, take its entry out of {MANIFEST_FILE}"


@contextlib.contextmanager
def _with_remedy(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_remedy(path)}") from error
