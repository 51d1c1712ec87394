"""Safetensors files, written from and read into tensors where they live, a piece at a time.

The layout is the format's own (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON
header, the tensors' bytes. Tensors go by item size, the widest first, so that each is aligned for readers that map
the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .files import PIECE_BYTES, Reader, Writer

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


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file: its name, dtype and shape, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize


def is_storable(dtype: torch.dtype) -> bool:
    """Whether files can hold tensors of `dtype`."""
    return dtype in _NAMES


def file_bytes(entries: Sequence[TensorEntry]) -> int:
    """Size of the data of a file with these tensors; its header is about 120 bytes a tensor."""
    return sum(entry.nbytes for entry in entries)


def write_tensors(
    writer: Writer, path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; each entry's `read` is called once, and its tensor let go of before the next.

    Raises:
        DiskError: see `Writer.write`.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[memoryview]:
        yield memoryview(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            assert entry.read is not None
            tensor = entry.read()
            assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry.name
            yield from _pieces_of(tensor)
            del tensor

    writer.write(path, pieces())


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, sharing its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _view_of(flat: torch.Tensor) -> memoryview:
    array: Any = flat.numpy()
    return memoryview(array)


def _pieces_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    flat = _bytes_of(tensor.contiguous())
    for start in range(0, flat.numel(), PIECE_BYTES):
        yield _view_of(flat[start : start + PIECE_BYTES].cpu())


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
