"""Recompute that stops early: a unit's graph is kept, its activations are not.

The unit runs forward with autograd on, but each tensor that autograd wants to save is replaced by its number.
In backward the unit runs again, the tensors are collected as they come by, and the run stops when the last one
is there: the layer's final matrix product is not computed twice (about 5 % of a step). The kept graph then runs
backward on the collected tensors. Since forward runs with autograd on both times, kernels that choose their
algorithm by grad mode choose the same one.

A weight that autograd saves is collected anew like any other tensor, so a graph never reads a slot that has
been given to another unit meanwhile (an ordinary saved view of a slot would, silently).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import StateError


class _AllCollected(Exception):
    """Ends a recompute once every saved tensor is there."""


class SavedActivations:
    """Stand-ins for the tensors that one forward run of a unit saved.

    Args:
        name: the unit, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []
        self._values: list[torch.Tensor] | None = None
        self._spent = False

    def recording(self):
        """Context: tensors that autograd would save inside are noted and dropped."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, self._give)

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
        """Drop the collected tensors."""
        self._values = None

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
