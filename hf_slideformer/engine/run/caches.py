"""Key-value caches among a layer's arguments, recognised by what they are: names of arguments change between versions.

While gradients flow there must be none. A recompute would append to it a second time, which leaves the loss right and
makes the gradients silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ...errors import UnsupportedModelError

# What most arguments are; asked first, since every argument of every layer is.
_PLAIN = frozenset(
    (torch.Tensor, tuple, list, dict, str, int, float, bool, type(None), torch.Size, torch.dtype)
)
# How far below an argument caches and their tensors are looked for: a cache, its layers, their states by number.
_DEPTH = 4


def is_cache(value: Any) -> bool:
    """Whether `value` keeps what later positions read: keys and values, or the states of recurrent layers.

    transformers' `Cache`, one layer of it, and what other versions and model files bring: objects that answer to
    `update` and `get_seq_length`, or whose class is called a cache. Tuples of keys and values are not, named ones
    neither: nobody adds to them, so they are arguments like any other.
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, (torch.Tensor, tuple)):
        return False
    if isinstance(value, (Cache, CacheLayerMixin)):
        return True
    return kind.__name__.endswith("Cache") or all(
        callable(getattr(kind, method, None)) for method in ("update", "get_seq_length")
    )


def check_empty(cache: Any) -> None:
    """Raise `UnsupportedModelError` if `cache` holds something that a layer would read."""
    positions = _positions(cache)
    if positions is None:  # it does not count; what it has reserved is zero until it is filled
        if not any(tensor.is_floating_point() and bool(tensor.any()) for tensor in tensors_in(cache)):
            return
        held = "states"
    elif positions > 0:
        held = f"{positions} positions"
    else:
        return
    raise UnsupportedModelError(
        f"a {type(cache).__name__} that already holds {held} is handed to a layer while gradients are on; streamed "
        "layers cannot train on top of a filled key-value cache (prefix tuning); use plain Trainer"
    )


def check_read_only(cache: Any) -> None:
    """Raise `UnsupportedModelError` if gradients would have to leave a layer through a `cache` that it reads."""
    if any(tensor.requires_grad for tensor in tensors_in(cache)):
        raise UnsupportedModelError(
            f"a {type(cache).__name__} whose tensors have gradients is read by a layer; streaming would cut them off "
            "there. Fill it under torch.no_grad(), freeze what fills it, or use plain Trainer"
        )


def check_opened(leaf: Any) -> None:
    """Raise `UnsupportedModelError` if an argument that nobody can take apart has a cache in it."""
    if type(leaf) in _PLAIN or isinstance(leaf, (torch.Tensor, torch.nn.Module)) or is_cache(leaf):
        return
    if any(is_cache(value) for value in _inside(leaf)):
        raise UnsupportedModelError(
            f"a {type(leaf).__name__} with a key-value cache in it is handed to a layer while gradients are on, and "
            "streaming cannot take it out; pass use_cache=False, hand the cache over by itself or in a dict or tuple, "
            "or use plain Trainer"
        )


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    """The tensors in the attributes and containers of `value`, those of modules left out."""
    for inner in _inside(value):
        if isinstance(inner, torch.Tensor):
            yield inner
        elif depth > 1:
            yield from tensors_in(inner, depth - 1)


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, (str, bytes, torch.nn.Module, type)):
        return ()
    if isinstance(value, Mapping):
        return [*value.values(), *vars(value).values()] if hasattr(value, "__dict__") else value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    return vars(value).values() if hasattr(value, "__dict__") else ()


def _positions(cache: Any) -> int | None:
    """How many positions `cache` says that it holds; None if it does not count (states of recurrent layers)."""
    count = getattr(cache, "get_seq_length", None)
    if count is None:
        return None
    try:
        positions = count()
    except (TypeError, ValueError, NotImplementedError):
        return None
    return int(positions.max()) if isinstance(positions, torch.Tensor) else positions
