"""torch's CUDA allocator, told how it will be used, and the C library's, told to let go."""

from __future__ import annotations

import ctypes
import logging
import os

import torch

logger = logging.getLogger(__name__)

_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# The same function under the names that torch has given it; the newest first.
_SETTERS = ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings")


def use_expandable_segments(device: torch.device) -> bool:
    """Let torch's allocator grow its segments instead of taking new ones.

    A plan fills the GPU with activations and gradients of many sizes that come and go; with segments of fixed size the
    gaps between them would cost several per cent of it. Settings that the user made by environment variables stay.

    Args:
        device: nothing is done unless it is a CUDA device.

    Returns:
        Whether it was set.
    """
    if device.type != "cuda" or any(os.environ.get(name) for name in _VARIABLES):
        return False
    for name in _SETTERS:
        setter = getattr(torch._C, name, None)
        if setter is not None:
            try:
                setter("expandable_segments:True")
            except (
                RuntimeError,
                ValueError,
            ) as error:  # a driver or platform without virtual memory management
                logger.info("torch's allocator keeps segments of fixed size: %s", error)
                return False
            return True
    return False


def return_freed_memory() -> None:
    """Give freed blocks of the C library's heap back to the system.

    glibc keeps what is freed between blocks that are in use: while a model moves to its place, the old weights would
    stay beside the new ones. Other C libraries have no such call, and nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
