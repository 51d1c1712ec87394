"""A layer's arguments: taken apart into leaves and put together again, without caches while gradients flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .caches import (
    check_empty,
    check_opened,
    check_read_only,
    is_cache,
)


def flatten(args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call's arguments and what puts them together again (`pytree.tree_unflatten`)."""
    return pytree.tree_flatten((args, kwargs), is_leaf=_is_whole)


def _is_whole(value: Any) -> bool:
    return type(value) is torch.Size  # pytree would make an ordinary tuple of it


def containers_changed(
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    args: tuple,
    kwargs: dict[str, Any],
    again: Callable[[], tuple[tuple, dict[str, Any]]],
) -> bool:
    """Whether a layer put something into a dictionary or list among its arguments, or took something out.

    Args:
        leaves: what the arguments were put together from.
        spec: how.
        args: the positional arguments after the layer has run.
        kwargs: the named ones.
        again: puts them together anew. Not everything that pytree takes apart comes back as the same type.
    """
    after, spec_after = flatten(args, kwargs)
    if spec_after != spec and spec_after != flatten(*again())[1]:
        return True
    return any(one is not other for one, other in zip(leaves, after, strict=True))


def without_caches(
    module: nn.Module, names: Sequence[str], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """A layer's arguments as they may be while gradients flow: no key-value cache, and none asked for.

    Args:
        module: the layer.
        names: of its forward's arguments, in their order.
        args: what it is called with; not changed.
        kwargs: likewise, by name.

    Raises:
        UnsupportedModelError: a cache that is in use, or that cannot be taken out.
    """
    if "use_cache" in names[: len(args)]:
        position = names.index("use_cache")
        args = (*args[:position], False, *args[position + 1 :])
    if "use_cache" in kwargs:
        kwargs = {**kwargs, "use_cache": False}
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
    caches = []
    for leaf in leaves:
        if is_cache(leaf):
            caches.append(leaf)
        else:
            check_opened(leaf)
    if not caches:
        return args, kwargs
    # Layers that say so only read what others have filled, which a recompute finds as it was.
    if getattr(module, "_can_checkpoint_with_cache", False):
        for cache in caches:
            check_read_only(cache)
        return args, kwargs
    for cache in caches:
        check_empty(cache)
    return pytree.tree_unflatten([None if is_cache(leaf) else leaf for leaf in leaves], spec)
