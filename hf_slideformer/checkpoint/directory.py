"""Checkpoint directories that are whole or not there.

A checkpoint is written to `.tmp-NAME/NAME` beside its place, synced to the disk and renamed into place; it is renamed
to `.delete-NAME` before it is removed. A kill at any instant leaves whole checkpoints under their names, and hidden
leftovers that the next start removes. The manifest `slideformer_checkpoint.json` has every file's size and checksum.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CheckpointError
from .files import FileOps, FileRecord, Reader, Writer, check_size, gib

MANIFEST_FILE = "slideformer_checkpoint.json"
FORMAT_VERSION = 1

# What reading a damaged manifest raises.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WRITTEN, _REPLACED, _REMOVED = ".tmp-", ".replaced-", ".delete-"
# The manifest's own bytes, directories, and the small files whose size is not known before they are written.
_SLACK_BYTES = 64 * 2**20


def clean_up(directory: Path, files: FileOps) -> None:
    """Remove what saves and removals of a killed run left in `directory`, and undo a replacement that was cut off."""
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        prefix, _, name = path.name.partition("checkpoint-")
        if not name.isdecimal() or not path.is_dir():
            continue
        if prefix == _REPLACED and not (directory / f"checkpoint-{name}").exists():
            Writer(files).rename(path, directory / f"checkpoint-{name}")
        elif prefix in (_WRITTEN, _REPLACED, _REMOVED):
            files.remove_tree(path)


def remove_checkpoint(path: Path, files: FileOps) -> None:
    """Remove a checkpoint; it is out of sight before the first file goes."""
    hidden = path.with_name(_REMOVED + path.name)
    files.remove_tree(hidden)
    writer = Writer(files)
    writer.rename(path, hidden)
    writer.sync(path.parent)
    files.remove_tree(hidden)


def check_free_space(directory: Path, needed_bytes: int, files: FileOps) -> None:
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
    """A checkpoint that is being written.

    Attributes:
        path: where its files are to be written now.
        target: where they will be.
        writer: writes and remembers files.
    """

    def __init__(self, target: Path, files: FileOps) -> None:
        self.target = target.absolute()
        self.outer = self.target.with_name(_WRITTEN + target.name)
        self.path = self.outer / target.name
        self.writer = Writer(files)

    def commit(self) -> None:
        """Put the checkpoint into its place."""
        writer, parent = self.writer, self.target.parent
        sync_tree(self.path, writer)
        write_manifest(self.path, writer)
        sync_directories(self.path, writer)
        replaced = self.target.with_name(_REPLACED + self.target.name)
        if self.target.exists():
            writer.files.remove_tree(replaced)
            writer.rename(self.target, replaced)
        writer.rename(self.path, self.target)
        writer.sync(parent)
        writer.files.remove_tree(self.outer)
        writer.files.remove_tree(replaced)


@contextlib.contextmanager
def new_checkpoint(target: Path, files: FileOps, needed_bytes: int) -> Iterator[NewCheckpoint]:
    """Write a checkpoint directory so that it is whole or not there; what is there already stays until then.

    Args:
        target: its final path, named `checkpoint-STEP`.
        files: the file layer.
        needed_bytes: how large it will be, about.

    Raises:
        CheckpointError: too little space; nothing was written.
        DiskError: a write failed; what had been written is removed.
    """
    clean_up(target.parent, files)
    check_free_space(target.parent, needed_bytes, files)
    checkpoint = NewCheckpoint(target, files)
    try:
        files.make_directory(checkpoint.path)
        yield checkpoint
        checkpoint.commit()
    except BaseException:
        files.remove_tree(checkpoint.outer)
        clean_up(target.parent, files)
        raise


def sync_tree(directory: Path, writer: Writer) -> None:
    """Bring to the disk what others wrote under `directory`; the writer's own files are there already."""
    for path in _files_under(directory):
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
        if name != MANIFEST_FILE
    )


def write_manifest(directory: Path, writer: Writer) -> None:
    """Write sizes and checksums of all files under `directory` beside them."""
    records = {
        path.relative_to(directory.absolute()).as_posix(): writer.record(path).as_dict()
        for path in _files_under(directory)
    }
    manifest = {"format_version": FORMAT_VERSION, "files": records}
    text = json.dumps(manifest, indent=1).encode() + b"\n"
    writer.write(directory / MANIFEST_FILE, [memoryview(text)])


def remove_manifest(directory: Path, writer: Writer) -> None:
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

    def __init__(self, path: Path, files: FileOps) -> None:
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
