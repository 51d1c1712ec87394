"""Unit: one layer of the model as the engine runs it, and what is under way for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import StateError
from ...memory.buffers import Buffer
from ...memory.layout import UnitLayout
from ...memory.lease import Lease
from ...memory.offload import OffloadedTensor, Place
from ...memory.pool import SlotPool
from ...memory.transfer import Handle
from ...optim.state import ParamState
from ..model.units import Owner, UnitModule
from .group import StateGroup


@dataclass(slots=True, eq=False)
class Unit:
    """One layer of the model.

    A streamed unit has its parameters' states in layout order. A resident one has no states here and an empty layout:
    its parameters are on the device and autograd fills their gradients. Both have a group.

    `shared` are trainable parameters whose gradients are autograd's: those that the layer uses but does not own
    (tied to another layer, so resident), and all of a resident unit's.

    `keeps` and `offloads` are what the plan says of its activations. They are kept only where the input (hidden
    states, by convention the first tensor that has a gradient) takes at most `planned_bytes`, as the plan counts on.
    """

    index: int
    found: UnitModule
    group: StateGroup
    layout: UnitLayout
    states: list[ParamState]
    owners: list[list[Owner]]
    original_forward: Callable[..., Any]
    argument_names: tuple[str, ...]
    shared: list[nn.Parameter]
    keeps: bool = False
    offloads: bool = False
    planned_bytes: int | None = None
    waiting: weakref.ref[OffloadedTensor] | None = None  # an input in its place
    forwards_since_step: int = 0
    version: int = 0
    # Calls whose backward is still to come, or never will.
    open_calls: weakref.WeakSet[object] = field(default_factory=weakref.WeakSet)

    @property
    def name(self) -> str:
        """Qualified name of the layer in the model."""
        return self.found.name

    @property
    def streams(self) -> bool:
        """Whether it needs a slot to run."""
        return self.layout.weight_bytes > 0

    @property
    def trainable(self) -> bool:
        """Whether any streamed parameter of the unit is trained."""
        return self.layout.state_numel > 0

    # -- weights -----------------------------------------------------------------------------------------------

    def source(self) -> Lease[Buffer] | None:
        """See `WeightSource`."""
        return self.group.home.source(self.group.pending)

    def written(self) -> tuple[int, int]:
        """Changes when a parameter is written from outside or updated."""
        return sum(state.param._version for state in self.states), sum(state.step for state in self.states)

    def drop_stale_copy(self, pool: SlotPool) -> None:
        """Make the next use fetch anew if someone wrote to a parameter (`load_state_dict`, `p.copy_()`)."""
        version, _ = self.written()
        if version != self.version:
            self.version = version
            pool.invalidate_unit(self.index)

    # -- activations -------------------------------------------------------------------------------------------

    def place_for(self, tensor: torch.Tensor) -> Place | None:
        """Where an input can wait; None if there is no such place, or it is in use by another run's."""
        return None if self._input_in_place() is not None else self.group.home.place_for(tensor)

    def wait_in_place(self, parked: OffloadedTensor) -> None:
        """Note that an input waits in the unit's place."""
        self.waiting = weakref.ref(parked)

    def _input_in_place(self) -> OffloadedTensor | None:
        return self.waiting() if self.waiting is not None else None

    def bring_back_input(self, fetch: Callable[[OffloadedTensor], Handle]) -> list[Handle]:
        """Have an input that still waits in the unit's place fetched, since gradients are to land there."""
        parked = self._input_in_place()
        return [] if parked is None else [fetch(parked)]

    def keeps_for(self, tensors: list[torch.Tensor]) -> bool:
        """Whether activations are kept in a run on these inputs."""
        if not self.keeps or self.planned_bytes is None:
            return self.keeps
        return next((tensor.nbytes for tensor in tensors if tensor.requires_grad), 0) <= self.planned_bytes

    # -- what happens to it ------------------------------------------------------------------------------------

    def ran_forward(self) -> int:
        """Note a forward with autograd on; returns how many there have been since the last step."""
        self.forwards_since_step += 1
        return self.forwards_since_step

    def begin_step(self) -> None:
        """Note that a step is over, or a new one begins."""
        self.forwards_since_step = 0


def check_unchanged(state: ParamState, *, check_trainable: bool = True) -> None:
    """Raise `StateError` if a parameter was unfrozen, frozen or given other memory after preparation."""
    if check_trainable and state.param.requires_grad != state.spec.trainable:
        raise StateError(
            f"requires_grad of {state.name} changed to {state.param.requires_grad} after the model was prepared; "
            "freeze or unfreeze parameters before, and make a new trainer for another choice (run a model whose "
            "adapters are disabled under torch.no_grad())"
        )
    if state.param.data_ptr() != state.live.data_ptr():
        raise StateError(
            f"the memory of {state.name} was replaced (model.to(...) or `p.data = ...`) after the model was "
            "prepared; copy into it instead: `with torch.no_grad(): p.copy_(values)`"
        )
