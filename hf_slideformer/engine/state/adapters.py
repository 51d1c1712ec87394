"""Layers with adapters (PEFT): they merge into a base weight, and take back, through `p.data`.

Nobody can see such a write, and the weight that they find may be half of a split master. Their `merge` and `unmerge`
are given the whole weights instead, and what they leave there becomes the master.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ..model.stand_ins import ReplacedMethod

_METHODS = ("merge", "unmerge")


class AdapterMethod(ReplacedMethod):
    """Stands in for an adapter layer's `merge` or `unmerge`.

    Args:
        module: the layer.
        name: of the method.
        weights_in_hand: `StateAccess.weights_in_hand`; held weakly.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        weights_in_hand: Callable[[nn.Module], contextlib.AbstractContextManager],
    ) -> None:
        super().__init__(module, getattr(module, name))
        self._weights_in_hand = weakref.WeakMethod(weights_in_hand)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        weights_in_hand = self._weights_in_hand()
        if weights_in_hand is None or self.removed:
            return self.original(*args, **kwargs)
        with weights_in_hand(self.module):
            return self.original(*args, **kwargs)


def watch_adapters(
    model: nn.Module, weights_in_hand: Callable[[nn.Module], contextlib.AbstractContextManager]
) -> list[AdapterMethod]:
    """Make the adapter layers of `model` merge into masters; returns what was put there."""
    methods = []
    for module in model.modules():
        if hasattr(module, "base_layer") and all(callable(getattr(module, name, None)) for name in _METHODS):
            for name in _METHODS:
                method = AdapterMethod(module, name, weights_in_hand)
                method.put(name)
                methods.append(method)
    return methods
