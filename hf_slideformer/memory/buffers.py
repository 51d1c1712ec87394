"""Host buffers: page-aligned anonymous memory, pinned on request, never copied by a fork.

torch's caching host allocator rounds each block up to a power of two, so state buffers are mapped here and
registered with the driver instead. Every tensor handed out is its own storage over the mapping
(`torch.frombuffer`): views of one tensor share a storage, and the usual saving code then takes all
parameters of a unit for one tied weight.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
import weakref
from typing import Protocol

import torch

from ..errors import PlanError

# Whether memory is to be pinned; a device says for which one, True for the current one. Registering it for another than
# the model's would work too, but would make a context there, some hundred MiB on a GPU that may be somebody else's.
Pin = bool | torch.device


class Buffer(Protocol):
    """Host memory that tensors are made over.

    Attributes:
        nbytes: of RAM that it takes for itself.
    """

    nbytes: int

    def tensor(self, dtype: torch.dtype, offset_bytes: int, numel: int) -> torch.Tensor:
        """A 1-D tensor, its own storage, over `numel` elements from `offset_bytes` on."""
        ...


class HostBuffer:
    """`nbytes` of zeroed RAM.

    Pages are touched lazily, except where pinning makes the driver touch them. Tensors made from the buffer
    keep the memory alive after the buffer object is gone; only the pinning ends with the object.

    Args:
        nbytes: size in bytes; rounded up to whole pages.
        pin: register the memory with the CUDA driver, so that copies to and from a GPU are asynchronous.

    Raises:
        PlanError: the operating system refuses the memory.
    """

    def __init__(self, nbytes: int, *, pin: Pin = False) -> None:
        self.nbytes = max(mmap.PAGESIZE, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        try:
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise PlanError(
                f"the operating system refused {self.nbytes / 2**30:.2f} GiB of RAM ({error}); "
                "free memory, lower cpu_memory or use a smaller model"
            ) from error
        for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
            # DONTFORK: forked dataloader workers must not double the state when either side writes to it.
            if hasattr(mmap, advice):
                try:
                    self._map.madvise(getattr(mmap, advice))
                except OSError:  # a kernel built without transparent huge pages
                    continue
        self.pinned = bool(pin) and self._register(pin)

    def _register(self, pin: Pin) -> bool:
        address = self.tensor(torch.uint8, 0, 1).data_ptr()
        with _current(pin):
            status = torch.cuda.cudart().cudaHostRegister(address, self.nbytes, 0)
        if int(status) != 0:
            warnings.warn(
                f"pinning {self.nbytes / 2**30:.2f} GiB of RAM was refused (CUDA error {int(status)}); the buffer "
                "stays pageable, which makes its transfers synchronous and about half as fast. Raise `ulimit -l`, or "
                "set pinned_memory to what the system allows.",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        # The mapping is an argument so that it outlives the registration. Runs at exit too, while the CUDA
        # context still exists.
        weakref.finalize(self, _unregister, self._map, address, pin)
        return True

    def tensor(self, dtype: torch.dtype, offset_bytes: int, numel: int) -> torch.Tensor:
        """A 1-D tensor, its own storage, over `numel` elements from `offset_bytes` on."""
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=offset_bytes)

    def view(self, nbytes: int) -> memoryview:
        """The first `nbytes`, for system calls.

        No tensor is behind it: the last reference to one must not be dropped in a daemon thread, which the interpreter
        may end in the middle of torch's own code.
        """
        return memoryview(self._map)[:nbytes]


class PinBudget:
    """How much RAM may be pinned, and how much is.

    Args:
        device: that copies to and from it; only for a GPU is anything pinned.
        limit_bytes: at most so much; None sets no limit.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None) -> None:
        self._device, self._limit_bytes = device, limit_bytes
        self._taken_bytes = 0
        self._warned = False

    def take(self, nbytes: int) -> Pin:
        """The device if `nbytes` more may be pinned for it, else False; from then on they count.

        Warns once where the limit is in the way.
        """
        if self._device.type != "cuda":
            return False
        if self._limit_bytes is not None and self._taken_bytes + nbytes > self._limit_bytes:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"pinned_memory={self._limit_bytes / 2**30:.2f} GiB is less than the engine wants to pin; the "
                    "rest stays pageable, which makes its transfers synchronous and about half as fast",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return False
        self._taken_bytes += nbytes
        return self._device

    def give_back(self, nbytes: int) -> None:
        """Note that pinned memory was let go of."""
        self._taken_bytes -= nbytes


class MappedFile:
    """A file on disk that is used like a host buffer, by way of the page cache.

    What is read and written here and by direct I/O is the same as long as it is not done at once: the kernel writes
    changed pages before a direct read, and drops pages before a direct write.
    """

    pinned = False
    nbytes = 0  # of RAM that anyone has to provide

    def __init__(self, mapping: mmap.mmap) -> None:
        self._map = mapping

    def tensor(self, dtype: torch.dtype, offset_bytes: int, numel: int) -> torch.Tensor:
        """See `HostBuffer.tensor`."""
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=offset_bytes)


class BufferView:
    """A part of a host buffer that is used like one: offsets count from `base_bytes`."""

    __slots__ = ("_base_bytes", "_buffer")
    nbytes = 0  # it is the whole buffer that takes RAM

    def __init__(self, buffer: Buffer, base_bytes: int) -> None:
        self._buffer = buffer
        self._base_bytes = base_bytes

    def tensor(self, dtype: torch.dtype, offset_bytes: int, numel: int) -> torch.Tensor:
        """See `HostBuffer.tensor`."""
        return self._buffer.tensor(dtype, self._base_bytes + offset_bytes, numel)


def _unregister(mapping: mmap.mmap, address: int, pin: Pin) -> None:
    del mapping
    with _current(pin):
        torch.cuda.cudart().cudaHostUnregister(address)


def _current(pin: Pin) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(pin) if isinstance(pin, torch.device) else contextlib.nullcontext()
