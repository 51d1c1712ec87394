"""Counts what a piece of code allocates and computes, on real tensors or on fake ones that have no data.

PyTorch hands every operator below autograd to a dispatch mode. Each storage that an operator returns is counted when it
first appears and until it is freed, in blocks of 512 bytes as CUDA's allocator hands them out. Fake tensors
(`torch._subclasses.FakeTensorMode`) go through the same operators, so their peaks are those of a real run; only what a
kernel allocates inside is not seen, unless it is known (`workspace_bytes`).
"""

from __future__ import annotations

import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ...memory.limits import BLOCK_BYTES

# Operators that touch no memory of their tensors.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh")


def block_bytes(nbytes: int) -> int:
    """Bytes that an allocation of `nbytes` takes."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


class AllocationTracker(TorchDispatchMode):
    """Counts live bytes, their peak, and work, while it is the active dispatch mode.

    Storages that existed before, or that were not made by an operator (parameters), are not counted.

    Args:
        workspace_bytes: bytes that an operator's kernel allocates inside and frees again, by operator and arguments.
        seconds: how long it may take; None has no limit.

    Raises:
        TimeoutError: by any operator, after that time.

    Attributes:
        live: bytes now.
        peak: most bytes since `restart_peak`.
        flops: floating-point operations of matrix products, convolutions and attention. Causal attention counts
            half: its kernels skip what is masked.
        attention_flops: those among them that are attention's.
        traffic: bytes that all other operators read and write.
    """

    def __init__(
        self, workspace_bytes: Callable[[Any, tuple], int] | None = None, seconds: float | None = None
    ) -> None:
        super().__init__()
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.live = 0
        self.peak = 0
        self.flops = self.attention_flops = 0.0
        self.traffic = 0.0
        self._workspace_bytes = workspace_bytes
        # By address of the storage: its number, its bytes, and a reference that tells when it is freed.
        self._storages: dict[int, tuple[int, int, weakref.ref]] = {}
        self._numbers = itertools.count()

    def restart_peak(self) -> None:
        """Let `peak` begin anew from what is live."""
        self.peak = self.live

    def count_work(self, *, flops: float = 0.0, traffic: float = 0.0) -> None:
        """Add work of a kernel that is no operator."""
        self.flops += flops
        self.traffic += traffic

    def counted(self, tensors: Iterable[Any]) -> dict[int, int]:
        """Bytes of the counted storages of `tensors`, each once, by a number that is never given twice."""
        found = {}
        for tensor in tensors:
            storage = _storage(tensor) if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata in self._storages:
                number, nbytes, _ = self._storages[storage._cdata]
                found[number] = nbytes
        return {number: nbytes for number, nbytes in found.items() if nbytes}

    def nbytes(self, tensors: Iterable[Any]) -> int:
        """Bytes of the counted storages of `tensors`, each once."""
        return sum(self.counted(tensors).values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise TimeoutError(f"its code takes more than {self._seconds:g} s to trace")
        inputs = _tensors((args, kwargs))
        for tensor in inputs:
            self._note(tensor, counts=False)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        for tensor in outputs:
            self._note(tensor, counts=True)
        if self._workspace_bytes is not None:
            self.peak = max(self.peak, self.live + self._workspace_bytes(func, args))
        self._count_work_of(func, args, kwargs, result, inputs, outputs)
        return result

    def _note(self, tensor: torch.Tensor, *, counts: bool) -> None:
        storage = _storage(tensor)
        if storage is None or storage._cdata in self._storages:
            return
        address = storage._cdata
        nbytes = block_bytes(storage.nbytes()) if counts else 0
        forget = weakref.ref(storage, lambda _: self._free(address))
        self._storages[address] = (next(self._numbers), nbytes, forget)
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def _free(self, address: int) -> None:
        _, nbytes, _ = self._storages.pop(address)
        self.live -= nbytes

    def _count_work_of(self, func, args, kwargs, result, inputs, outputs) -> None:
        packet = getattr(func, "_overloadpacket", None)
        formula = _FLOPS.get(str(packet)) or flop_registry.get(packet)
        if formula is not None:
            share = 0.5 if _is_causal(func, args, kwargs) else 1.0
            flops = share * formula(*args, **kwargs, out_val=result)
            self.flops += flops
            if "scaled_dot_product" in str(packet):
                self.attention_flops += flops
            return
        if packet is None or packet.__name__ in _FREE or func.is_view or not outputs:
            return
        self.traffic += sum(_touched_bytes(tensor) for tensor in (*inputs, *outputs))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory behind a tensor; None where it has none."""
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.device.type == "meta":
            return None
        try:
            return tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors, wrappers without data
            return None


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes that reading or writing the whole tensor moves; an expanded one is small."""
    return (
        math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        * tensor.element_size()
    )


def _is_causal(func, args: tuple, kwargs: dict) -> bool:
    if "is_causal" in kwargs:
        return bool(kwargs["is_causal"])
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "is_causal":
            return bool(args[position]) if position < len(args) else False
    return False


# -- operators for which torch has no formula, or none that knows grouped queries --------------------------------------


def _attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    """Two products of each query head; keys and values may have fewer heads than queries."""
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _attention_backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    """Five products: the scores are computed again."""
    return 5 * _attention(query, key, value) // 2


def _grouped_product(a, b, *args, out_val=None, **kwargs) -> int:
    """Rows (rows, K), each by one of (groups, K, N); or, for their gradient, (M, rows) by (rows, N) in groups."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _grouped_product_backward(a, b, *args, out_val=None, **kwargs) -> int:
    return 2 * _grouped_product(a, b)


_FLOPS: dict[str, Callable[..., int]] = {
    "aten.addmm_": flop_registry[torch.ops.aten.addmm],
    "aten.baddbmm_": flop_registry[torch.ops.aten.baddbmm],
    **{
        f"aten._scaled_dot_product_{kind}": _attention
        for kind in ("flash_attention", "efficient_attention", "flash_attention_for_cpu")
    },
    **{
        f"aten._scaled_dot_product_{kind}_backward": _attention_backward
        for kind in ("flash_attention", "efficient_attention", "flash_attention_for_cpu")
    },
    "aten._grouped_mm": _grouped_product,
    "transformers.grouped_mm_fallback": _grouped_product,
    "transformers.grouped_mm_fallback_backward": _grouped_product_backward,
}
