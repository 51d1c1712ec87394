"""Which tensors are pages of a file: what `safetensors` hands out takes no RAM that the system could not take back."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")
# Files that are RAM.
_IN_RAM = ("/dev/shm/", "/memfd:", "/dev/zero", "/SYSV")


def mapped_from_files(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """For each tensor whether its memory is a mapped file; False for all where the system does not say (not Linux)."""
    tensors = list(tensors)
    if not _MAPS.exists():
        return [False] * len(tensors)
    begins, ends = list[int](), list[int]()
    for line in _MAPS.read_text().splitlines():
        # begin-end permissions offset device inode [path]
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and not fields[5].startswith(_IN_RAM):
            begin, end = fields[0].split("-")
            begins.append(int(begin, 16))
            ends.append(int(end, 16))

    def is_mapped(tensor: torch.Tensor) -> bool:
        if tensor.device.type != "cpu" or tensor.nbytes == 0:
            return False
        address = tensor.data_ptr()
        place = bisect.bisect_right(begins, address) - 1
        return place >= 0 and address < ends[place]

    return [is_mapped(tensor) for tensor in tensors]
