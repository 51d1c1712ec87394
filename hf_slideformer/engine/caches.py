"""Key-value caches among a layer's arguments, recognised by what they are: names of arguments change between versions.

While gradients flow there must be none. A recompute would append to it a second time, which leaves the loss right and
makes the gradients silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import UnsupportedModelError

# What most arguments are; asked first, since every argument of every layer is.
_NO_CACHES = (torch.Tensor, tuple, list, dict, str, int, float, bool, type(None), torch.nn.Module)


def is_cache(value: Any) -> bool:
    """Whether `value` keeps what later positions read: keys and values, or the states of recurrent layers.

    transformers' `Cache`, one layer of it, and what other versions and model files bring: objects that answer to
    `update` and `get_seq_length`, or whose class is called a cache. Tuples of keys and values are not: nobody adds to
    them, so they are arguments like any other.
    """
    if isinstance(value, _NO_CACHES):
        return False
    if isinstance(value, (Cache, CacheLayerMixin)):
        return True
    kind = type(value)
    return kind.__name__.endswith("Cache") or all(
        callable(getattr(kind, method, None)) for method in ("update", "get_seq_length")
    )


def check_empty(cache: Any) -> None:
    """Raise `UnsupportedModelError` if `cache` holds positions that a layer would attend to."""
    positions = getattr(cache, "get_seq_length", int)()
    if isinstance(positions, torch.Tensor):
        positions = int(positions.max())
    if positions > 0:
        raise UnsupportedModelError(
            f"a {type(cache).__name__} that already holds {positions} positions is handed to a layer while gradients "
            "are on; streamed layers cannot train on top of a filled key-value cache (prefix tuning); use plain Trainer"
        )
