"""Gradient checkpointing that a script turns on itself (`model.gradient_checkpointing_enable()`), at any time.

The engine recomputes streamed layers, so they must not do it a second time; with `use_reentrant=True` theirs would run
a backward inside of the engine's. transformers asks a flag of the layer whenever the layer is called: in `__call__`, or
in `forward`, depending on the version. So it is switched off before any module that has streamed layers in it runs.
What is outside of streamed layers keeps its flag.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

logger = logging.getLogger(__name__)

_FLAG = "gradient_checkpointing"


class LayerCheckpointing:
    """The flags of layers, and of what is inside them.

    Args:
        layers: those that the engine recomputes.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        inside = [module for layer in layers for module in layer.modules()]
        self._flagged = [module for module in inside if hasattr(module, _FLAG)]
        self._told = False

    def switch_off(self) -> None:
        """Make the layers run as they are; says so once if it was on."""
        for module in self._flagged:
            if getattr(module, _FLAG):
                setattr(module, _FLAG, False)
                if not self._told:
                    self._told = True
                    logger.info(
                        "gradient checkpointing is switched off in streamed layers: they are recomputed anyway, and "
                        "not twice"
                    )


def callers_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The modules that layers of these names are in, but for lists, which are not called."""
    paths = {""}
    for name in names:
        parts = name.split(".")
        paths |= {".".join(parts[:end]) for end in range(1, len(parts))}
    modules = [model.get_submodule(path) for path in sorted(paths)]
    return [module for module in modules if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]
