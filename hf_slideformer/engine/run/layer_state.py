"""What a layer's forward writes on itself, so that a recompute starts from what forward started from.

Spectral norm, moving-average observers, batch norm and counters of routed tokens write a buffer or an attribute in
forward, and some read it in the same forward. A recompute that started from what forward left there would compute
something else, and would write a second time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Tensors up to this size are kept whether or not a write to them was seen: `buffer.data` and kernels of other packages
# write without raising a version. Larger ones are compared by value in a layer's first forward.
_SMALL_BYTES = 2**16

_NORMS = nn.modules.batchnorm._NormBase  # whose kernels write statistics without raising their versions

_ABSENT = object()  # stands for an entry that was not there


@dataclass(slots=True, eq=False)
class _Place:
    """One entry of a module's buffers or attributes, and what it was before forward.

    `copy` is of a tensor's values, `version` the tensor's then.
    """

    entries: dict[str, Any]
    key: str
    value: Any
    copy: torch.Tensor | None = None
    version: int = 0

    def put(self, value: Any) -> None:
        if value is _ABSENT:
            self.entries.pop(self.key, None)
        else:
            self.entries[self.key] = value


class LayerState:
    """Buffers and attributes of one layer.

    Args:
        layer: a unit's module.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._entries: list[tuple[dict[str, Any], bool]] = []
        for module in layer.modules():
            self._entries.append((module._buffers, isinstance(module, _NORMS)))
            # torch's own layers keep what they write in buffers.
            if not type(module).__module__.startswith("torch.nn.modules."):
                self._entries.append((vars(module), False))
        # Large tensors that the first forward wrote to.
        self._written: set[tuple[int, str]] | None = None

    def before(self) -> LayerSnapshot:
        """Remember everything before forward."""
        tensors = [
            (_Place(entries, key, value, value.detach().clone(), value._version), norm)
            for entries, norm in self._entries
            for key, value in entries.items()
            if isinstance(value, torch.Tensor) and not value.requires_grad
        ]
        return LayerSnapshot(self, tensors, [(entries, entries.copy()) for entries, _ in self._entries])

    def changed(self, tensors: list[tuple[_Place, bool]], entries: list[tuple[dict, dict]]) -> list[_Place]:
        """Those places that forward has changed, or may have."""
        if self._written is None:
            self._written = {
                (id(place.entries), place.key)
                for place, _ in tensors
                if place.copy is not None
                and place.value.nbytes > _SMALL_BYTES
                and not torch.equal(place.copy, place.value)
            }
        found = [
            place
            for place, norm in tensors
            if norm
            or place.value.nbytes <= _SMALL_BYTES
            or place.value._version != place.version
            or (id(place.entries), place.key) in self._written
        ]
        for now, before in entries:
            found += [_Place(now, key, _ABSENT) for key in now.keys() - before.keys()]
            found += [
                _Place(now, key, value)
                for key, value in before.items()
                if now.get(key, _ABSENT) is not value and _is_state(value)
            ]
        return found


class LayerSnapshot:
    """What a layer was before one forward; `keep_changes`, after it, lets go of all that is as it was."""

    def __init__(
        self, state: LayerState, tensors: list[tuple[_Place, bool]], entries: list[tuple[dict, dict]]
    ) -> None:
        self._state, self._tensors, self._entries = state, tensors, entries
        self._changed: list[_Place] = []

    def keep_changes(self) -> None:
        """Called after forward."""
        self._changed = self._state.changed(self._tensors, self._entries)
        self._tensors, self._entries = [], []

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The layer is as it was before forward while the block runs, and afterwards as it is now."""
        now = [place.entries.get(place.key, _ABSENT) for place in self._changed]
        copies = [place.value.clone() if place.copy is not None else None for place in self._changed]
        try:
            with torch.no_grad():
                for place in self._changed:
                    place.put(place.value)
                    if place.copy is not None:
                        place.value.copy_(place.copy)
            yield
        finally:
            with torch.no_grad():
                for place, value, copy in zip(self._changed, now, copies, strict=True):
                    if copy is not None:
                        place.value.copy_(copy)
                    place.put(value)


def _is_state(value: Any) -> bool:
    """Whether an attribute that forward has set anew can be what it read: not an activation of another run."""
    return not isinstance(value, torch.Tensor) or not value.requires_grad


__all__ = ["LayerSnapshot", "LayerState"]
