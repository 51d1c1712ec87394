"""Safetensors files, written from and read into tensors where they live, a piece at a time.

The layout is the format's own (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON
header, the tensors' bytes. Files of one checkpoint are written side by side, one group of tensors (a unit) after the
other in all of them, so that what has been written may change while the rest still waits. Each tensor is aligned for
readers that map the file: those of an odd size go last, the widest of them first.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.state.snapshot import HeldState
from ..errors import CheckpointError
from .files import (
    PIECE_BYTES,
    NewFile,
    Reader,
    Writer,
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


# Tensors of such sizes leave the next one aligned, whatever its dtype.
_ALIGN_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file.

    Attributes:
        name: in the file.
        dtype: in the file.
        shape: of the tensor.
        read: of a file that is to be written: elements from the first up to the second number of the flattened tensor,
            in RAM; called while its group is read.
        group: what it changes together with, a position in `SlideEngine.states_by_unit()`.
        from_state: whether `read` needs residuals or moments, which may be on disk.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor] | None = None
    group: int = 0
    from_state: bool = False

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def is_storable(dtype: torch.dtype) -> bool:
    """Whether files can hold tensors of `dtype`."""
    return dtype in _NAMES


def pieces_of(tensor: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    """`TensorEntry.read` of a tensor that is there, wherever it lives."""
    flat = tensor.detach().reshape(-1)
    return lambda start, end: flat[start:end].cpu()


class TensorFiles:
    """Safetensors files that are to be written together.

    Args:
        held: the state that their tensors are of.
    """

    def __init__(self, held: HeldState) -> None:
        self.held = held
        self._files: list[tuple[Path, list[TensorEntry], dict[str, str]]] = []

    def add(
        self, path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Have a file written."""
        self._files.append((path, list(entries), dict(metadata or {})))

    def request(self) -> None:
        """Ask for state that is on disk; to be called before the next update."""
        self.held.request({e.group for _, entries, _ in self._files for e in entries if e.from_state})

    def write(self, writer: Writer) -> None:
        """Write all files and wait until they are on the disk; groups are let go of as soon as they have been written.

        Where RAM is free a group goes to the page cache and the disk is only waited for at the end.

        Raises:
            DiskError: see `Writer.write`.
            CheckpointError: weights were changed by others than updates before they had been written.
            TransferError: state on disk cannot be read.
        """
        held = self.held
        with contextlib.ExitStack() as stack:
            stack.callback(held.release_all)
            self.request()
            files = [_TensorFile(writer, *file, held.order, stack) for file in self._files]
            for group in held.order:
                with held.reading(group):
                    for file in files:
                        file.write_group(group)
                held.release(group)
            for file in files:
                file.finish()


class _TensorFile:
    """One file on its way: its tensors by group, and those of odd sizes at the end."""

    def __init__(
        self,
        writer: Writer,
        path: Path,
        entries: list[TensorEntry],
        metadata: dict[str, str],
        order: Sequence[int],
        stack: contextlib.ExitStack,
    ) -> None:
        self._writer = writer
        self._path = path
        self._stack = stack
        self._file: NewFile | None = None
        rank = {group: index for index, group in enumerate(order)}
        self._even = sorted((e for e in entries if not _is_odd(e)), key=lambda e: rank[e.group])
        self._odd = sorted((e for e in entries if _is_odd(e)), key=lambda e: -e.dtype.itemsize)
        self._kept: dict[str, torch.Tensor] = {}
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for entry in (*self._even, *self._odd):
            offsets = [offset, offset + entry.nbytes]
            header[entry.name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": offsets,
            }
            offset = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGN_BYTES)
        self._header = len(text).to_bytes(8, "little") + text

    def write_group(self, group: int) -> None:
        for entry in self._odd:
            if entry.group == group and entry.read is not None:
                self._kept[entry.name] = entry.read(0, entry.numel).clone()
        for entry in self._even:
            if entry.group == group:
                self._write(entry)

    def _write(self, entry: TensorEntry) -> None:
        step = PIECE_BYTES // entry.dtype.itemsize
        for start in range(0, entry.numel, step):
            self._append_piece(entry, start, min(start + step, entry.numel))

    def _append_piece(self, entry: TensorEntry, start: int, end: int) -> None:
        """Append a piece, of which nothing is left when the next is read."""
        assert entry.read is not None
        piece = entry.read(start, end)
        assert piece.dtype == entry.dtype, entry.name
        self._append(_view_of(_bytes_of(piece)))

    def _append(self, data: memoryview) -> None:
        if self._file is None:
            self._file = self._stack.enter_context(self._writer.create(self._path))
            self._file.append(memoryview(self._header))
        self._file.append(data)

    def finish(self) -> None:
        for entry in self._odd:
            self._append(_view_of(_bytes_of(self._kept.pop(entry.name))))
        self._append(memoryview(b""))  # a file without tensors has its header
        assert self._file is not None
        self._file.finish()


def _is_odd(entry: TensorEntry) -> bool:
    return entry.nbytes % _ALIGN_BYTES != 0


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, sharing its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _view_of(flat: torch.Tensor) -> memoryview:
    array: Any = flat.numpy()
    return memoryview(array)


class TensorReader:
    """Reads a safetensors file in the order in which its tensors lie.

    Use as a context manager; leaving it without an error checks the whole file's checksum.

    Raises:
        CheckpointError: not a safetensors file, or not the one that was written.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.path = reader.path
        try:
            self.entries = self._read_header()
        except BaseException:
            reader.close()
            raise

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._reader.__exit__(kind)

    def _read_header(self) -> list[TensorEntry]:
        nbytes = int.from_bytes(self._reader.read(8), "little")
        if nbytes > min(_MAX_HEADER_BYTES, self._reader.nbytes - 8):
            raise CheckpointError(
                f"{self.path} is damaged: its header would have {nbytes:,} bytes, the file has {self._reader.nbytes:,}"
            )
        try:
            header = json.loads(self._reader.read(nbytes))
            header.pop("__metadata__", None)
            placed = sorted(
                (*values["data_offsets"], name, _DTYPES[values["dtype"]], tuple(values["shape"]))
                for name, values in header.items()
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} is damaged: its header cannot be read ({error})") from error
        entries, position = [], 0
        for start, end, name, dtype, shape in placed:
            entry = TensorEntry(name, dtype, shape)
            if start != position or end - start != entry.nbytes:
                raise CheckpointError(f"{self.path} is damaged: {name} lies at {start:,} to {end:,}")
            entries.append(entry)
            position = end
        if 8 + nbytes + position != self._reader.nbytes:
            raise CheckpointError(
                f"{self.path} is not whole: its tensors end at {8 + nbytes + position:,}, the file has "
                f"{self._reader.nbytes:,} bytes"
            )
        return entries

    def read_into(self, entry: TensorEntry, target: torch.Tensor) -> None:
        """Copy the next tensor, which `entry` must be, into a contiguous tensor of its dtype and shape."""
        assert target.dtype == entry.dtype and tuple(target.shape) == entry.shape and target.is_contiguous()
        flat = _bytes_of(target)
        if flat.device.type == "cpu":
            self._reader.read_into(_view_of(flat))
            return
        staging = torch.empty(min(PIECE_BYTES, flat.numel()), dtype=torch.uint8)
        for start in range(0, flat.numel(), PIECE_BYTES):
            piece = staging[: flat.numel() - start]
            self._reader.read_into(_view_of(piece))
            flat[start : start + piece.numel()].copy_(piece)

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """The next tensor, which `entry` must be, in RAM of its own."""
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(entry, tensor)
        return tensor
