"""Unit: one layer of the model as the engine runs it, and what is under way for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import StateError
from ...memory.buffers import HostBuffer
from ...memory.disk.desks import Loan
from ...memory.disk.inputs import DiskPlace
from ...memory.layout import UnitLayout
from ...memory.offload import OffloadedTensor
from ...memory.pool import SlotPool
from ...memory.transfer import Handle
from ...memory.unit_memory import UnitMemory
from ...optim.state import ParamState
from ..model.units import Owner, UnitModule


@dataclass(slots=True, eq=False)
class Unit:
    """One layer of the model.

    A streamed unit has its parameters' states in layout order and their host memory. A resident one has no states and
    an empty layout: its parameters are on the device and autograd fills their gradients.

    `shared` are trainable parameters whose gradients are autograd's: those that the layer uses but does not own
    (tied to another layer, so resident), and all of a resident unit's.

    `keeps` and `offloads` are what the plan says of its activations. They are kept only where the input (hidden
    states, by convention the first tensor that has a gradient) takes at most `planned_bytes`, as the plan counts on.
    """

    index: int
    found: UnitModule
    streamed: bool
    layout: UnitLayout
    memory: UnitMemory
    states: list[ParamState]
    owners: list[list[Owner]]
    host_weights: torch.Tensor
    original_forward: Callable[..., Any]
    argument_names: tuple[str, ...]
    shared: list[nn.Parameter]
    keeps: bool = False
    offloads: bool = False
    planned_bytes: int | None = None
    pending_update: Handle | None = None
    borrow_weights: Callable[[], Loan] | None = None
    place_on_disk: DiskPlace | None = None
    waiting: weakref.ref[OffloadedTensor] | None = None  # an input in its place
    forwards_since_step: int = 0
    version: int = 0
    # Calls whose backward is still to come, or never will.
    open_calls: weakref.WeakSet[object] = field(default_factory=weakref.WeakSet)

    @property
    def name(self) -> str:
        """Qualified name of the layer in the model."""
        return self.found.name

    def written(self) -> tuple[int, int]:
        """Changes when a parameter is written from outside or updated."""
        return sum(state.param._version for state in self.states), sum(state.step for state in self.states)

    def drop_stale_copy(self, pool: SlotPool) -> None:
        """Make the next use fetch anew if someone wrote to a parameter (`load_state_dict`, `p.copy_()`)."""
        version, _ = self.written()
        if version != self.version:
            self.version = version
            pool.invalidate_unit(self.index)

    @property
    def trainable(self) -> bool:
        """Whether any streamed parameter of the unit is trained."""
        return self.layout.state_numel > 0

    def place_for(self, tensor: torch.Tensor) -> HostBuffer | DiskPlace | None:
        """Where an input can wait: on disk, or in the gradients' buffer, which is empty until the unit's backward.

        None if there is no such place, or it is in use: gradients are pending, or another run's input is there.
        """
        if self.waiting is not None and self.waiting():
            return None
        if self.place_on_disk is not None:
            return self.place_on_disk if self.place_on_disk.nbytes >= tensor.nbytes else None
        buffer = None if self.memory.grads_fp32 else self.memory.grads
        if not isinstance(buffer, HostBuffer) or buffer.nbytes < tensor.nbytes:
            return None
        return None if any(state.param.grad is not None for state in self.states) else buffer

    def keeps_for(self, tensors: list[torch.Tensor]) -> bool:
        """Whether activations are kept in a run on these inputs."""
        if not self.keeps or self.planned_bytes is None:
            return self.keeps
        return next((tensor.nbytes for tensor in tensors if tensor.requires_grad), 0) <= self.planned_bytes


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
