"""Recompute that stops early: a unit's graph is kept, its activations are not.

The unit runs forward with autograd on, but each tensor that autograd wants to save is replaced by its number.
In backward the unit runs again, the tensors are collected as they come by, and the run stops when the last one
is there: the layer's final matrix product is not computed twice (about 5 % of a step). The kept graph then runs
backward on the collected tensors. Since forward runs with autograd on both times, kernels that choose their
algorithm by grad mode choose the same one.

A weight that autograd saves is collected anew like any other tensor, so a graph never reads a slot that has
been given to another unit meanwhile (an ordinary saved view of a slot would, silently). Where activations are kept
instead, a weight is noted by its place in the slot, and found again at that place in the slot of the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...errors import StateError


class _AllCollected(Exception):
    """Ends a recompute once every saved tensor is there."""


@dataclass(frozen=True, slots=True)
class _WeightPlace:
    """A view of a slot, without the slot."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: torch.Tensor) -> _WeightPlace:
        """Where `view` lies."""
        return cls(view.dtype, view.size(), view.stride(), int(view.storage_offset()))

    def within(self, weights: torch.Tensor) -> torch.Tensor:
        """The view at this place of another slot, given its (bytes,) uint8 buffer."""
        return weights.view(self.dtype).as_strided(self.size, self.stride, self.offset)


class SavedActivations:
    """The tensors that one forward run of a unit saved, or stand-ins for them.

    Args:
        name: the unit, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []
        self._kept: list[tuple[torch.Tensor, int] | _WeightPlace] = []
        self._values: list[torch.Tensor] | None = None
        self._spent = False

    def recording(self):
        """Context: tensors that autograd would save inside are noted and dropped."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, self._give)

    def keeping(self, weights: torch.Tensor | None):
        """Context: tensors that autograd would save inside are kept, views of `weights` by their place only."""
        storage = None if weights is None else weights.untyped_storage().data_ptr()

        def keep(tensor: torch.Tensor) -> int:
            if tensor.untyped_storage().data_ptr() == storage:
                self._kept.append(_WeightPlace.of(tensor))
            else:  # detached: a node that keeps its own output would never be freed
                self._kept.append((tensor.detach(), tensor._version))
            return len(self._kept) - 1

        return torch.autograd.graph.saved_tensors_hooks(keep, self._give)

    def restore(self, weights: torch.Tensor | None) -> None:
        """Make kept tensors available to backward, those of weights from the slot that holds them now.

        Raises:
            StateError: a kept tensor was changed in place, or this graph was already used.
        """
        self.check_unspent()
        self._spent = True
        self._values = []
        for entry in self._kept:
            if isinstance(entry, _WeightPlace):
                assert weights is not None, "weights were in a slot when they were saved"
                self._values.append(entry.within(weights))
                continue
            tensor, version = entry
            if tensor._version != version:
                raise StateError(
                    f"an activation of {self._name} was changed in place after autograd had saved it "
                    f"(shape {tuple(tensor.shape)}); set SlideConfig(activations='recompute') or use plain Trainer"
                )
            self._values.append(tensor)
        self._kept = []

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of `tensor` is that of a kept one."""
        memory = tensor.untyped_storage().data_ptr()
        return any(
            entry[0].untyped_storage().data_ptr() == memory
            for entry in self._kept
            if not isinstance(entry, _WeightPlace)
        )

    def check_unspent(self) -> None:
        """Raise `StateError` if backward has been here."""
        if self._spent:
            raise StateError(
                f"backward ran twice through {self._name}; a streamed model frees its activations after one "
                "backward (retain_graph=True and double backward are not supported)"
            )

    def recompute(self, run: Callable[[], object]) -> None:
        """Collect the tensors by running `run`, the same computation as under `recording`.

        Raises:
            StateError: the run saved other tensors than the first one, or this graph was already used.
        """
        self.check_unspent()
        self._spent = True
        if not self._kinds:
            self._values = []
            return
        values: list[torch.Tensor] = []

        def collect(tensor: torch.Tensor) -> None:
            values.append(tensor.detach())
            if len(values) == len(self._kinds):
                raise _AllCollected

        def never(_: object) -> torch.Tensor:
            raise AssertionError("the recomputed graph is discarded, never differentiated")

        try:
            with torch.autograd.graph.saved_tensors_hooks(collect, never):
                run()
        except _AllCollected:
            pass
        kinds = [(value.shape, value.dtype) for value in values]
        if kinds != self._kinds:
            raise StateError(
                f"recomputing {self._name} saved {len(kinds)} tensors where forward saved {len(self._kinds)}, or "
                "other shapes; the layer must do the same in both (no state that changes between them)"
            )
        self._values = values

    def clear(self) -> None:
        """Drop the tensors."""
        self._values = None
        self._kept = []

    def _note(self, tensor: torch.Tensor) -> int:
        self._kinds.append((tensor.shape, tensor.dtype))
        return len(self._kinds) - 1

    def _give(self, number: int) -> torch.Tensor:
        if self._values is None:
            raise StateError(
                f"the graph of {self._name} was used outside the backward of its unit; losses must reach a "
                "layer's weights through the layer's outputs"
            )
        return self._values[number]
