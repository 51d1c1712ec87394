"""Placement: moves a model into the homes that the plan names.

One parameter after the other, so that there are never two copies of the model. What `p.data` is from then on is the
engine's; who may read or write it when is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ...memory.allocator import return_freed_memory
from ...memory.layout import Segment, lay_out
from ...memory.runtime import Runtime
from ...memory.unit_memory import UnitMemory
from ...optim.state import ParamState
from ...planner.workload import Decisions
from ..model.blueprint import Blueprint
from ..model.units import UnitModule
from .beside_device import BesideDevice
from .group import StateGroup
from .home import Home
from .in_ram import InRam
from .on_device import OnDevice
from .on_disk import Disk, OnDisk
from .unit import Unit

OUTSIDE = "outside of units"


class PlacedModel:
    """One model's parameters and what training keeps of them, in the tiers that the plan names.

    Args:
        model: with its data; is moved.
        blueprint: its parts.
        decisions: where state lives and what happens to activations.
        input_bytes: of a unit's input that the plan counts on.
        directories: where files are made.
        runtime: moves it.

    Attributes:
        states: of all parameters, in registration order.
        units: all units, in registration order.
        groups: of each unit, streamed or not, and last what is outside of units.
        leased: states of parameters that leases stand in for: their gradients come from units' backward.
        computing: states of parameters that compute where they are: autograd fills their gradients.
        returning: those among them whose weights come back from RAM after an update.

    Raises:
        PlanError: the decisions contradict each other.
        DiskError: a file cannot be made.
    """

    def __init__(
        self,
        model: nn.Module,
        blueprint: Blueprint,
        decisions: Decisions,
        input_bytes: Callable[[int], int | None],
        directories: Sequence[str | Path],
        runtime: Runtime,
    ) -> None:
        self._blueprint = blueprint
        self._runtime = runtime
        self._device = runtime.device
        # Where each of the model's buffers that is on the device was before.
        self._moved_buffers: list[tuple[nn.Module, str]] = []
        self.states: list[ParamState] = []
        self._state_of: dict[int, ParamState] = {}
        self._order = {id(param): index for index, param in enumerate(model.parameters())}
        self._disk: Disk | None = None
        if decisions.on_disk:
            self._disk = Disk(blueprint, decisions, input_bytes, directories, runtime)
            runtime.when_closed(last=self._disk.state.close)
        with torch.no_grad():
            self.units = [
                self._move_unit(found, index, decisions, input_bytes(index))
                for index, found in enumerate(blueprint.units)
            ]
            self.outside = self._move_outside(model, decisions)
            self._move_buffers(model)
        self.groups = [*(unit.group for unit in self.units), self.outside]
        self.states.sort(key=lambda state: state.order)
        self.leased = [state for state in self.states if state.streams]
        self.computing = [state for state in self.states if not state.streams]
        self.returning = [state for state in self.computing if state.updated_in_ram]

    # -- moving the model ------------------------------------------------------------------------------------

    def _move_unit(
        self, found: UnitModule, index: int, decisions: Decisions, input_bytes: int | None
    ) -> Unit:
        policy = decisions.activations[index]
        if index in decisions.resident:
            home: Home = OnDevice(self._runtime)
            layout = lay_out([])
            own = [self._move_to_device(param, index) for param in found.parameters.values()]
            states: list[ParamState] = []
            home.states = own
        else:
            layout = self._blueprint.layouts[index]
            home = self._streamed_home(index, input_bytes or 0 if policy == "offload" else 0)
            own = states = self._move_to_host(found, index, home)
        return_freed_memory()
        by_name = {self._blueprint.specs[id(p)].name: name for name, p in found.parameters.items()}
        streamed = {id(state.param) for state in states}
        return Unit(
            index=index,
            found=found,
            group=StateGroup(index, found.name, own, home),
            layout=layout,
            states=states,
            owners=[found.owners[by_name[state.name]] for state in states],
            original_forward=found.module.forward,
            shared=[p for p in found.module.parameters() if p.requires_grad and id(p) not in streamed],
            keeps=policy == "keep",
            offloads=policy == "offload",
            planned_bytes=input_bytes,
            argument_names=tuple(inspect.signature(found.module.forward).parameters),
            version=sum(state.param._version for state in states),
        )

    def _streamed_home(self, index: int, input_bytes: int) -> InRam | OnDisk:
        if self._disk is not None and index in self._disk:
            return OnDisk(index, self._blueprint, self._disk, input_bytes, self._runtime)
        name = self._blueprint.units[index].name
        return InRam(name, self._blueprint.layouts[index], input_bytes, self._runtime)

    def _move_to_host(self, found: UnitModule, index: int, home: InRam | OnDisk) -> list[ParamState]:
        by_name = {self._blueprint.specs[id(p)].name: p for p in found.parameters.values()}
        memory = home.memory
        with home.open(write=True):
            home.states = states = [
                self._rehome(
                    by_name[segment.spec.name],
                    index,
                    segment,
                    memory.weight(segment),
                    memory.residual(segment),
                    streams=True,
                )
                for segment in memory.layout.segments
            ]
        return states

    def _move_outside(self, model: nn.Module, decisions: Decisions) -> StateGroup:
        """Parameters that no unit owns: on the device, those that are trained perhaps with a master in RAM."""
        index = len(self._blueprint.units)
        layout = self._blueprint.outside_layout(decisions)
        home: OnDevice | BesideDevice = OnDevice(self._runtime)
        states = []
        if layout.segments:
            home = BesideDevice(layout, self._runtime)
            by_name = {self._blueprint.specs[id(p)].name: p for p in model.parameters()}
            for segment in layout.segments:
                states.append(self._move_beside(by_name[segment.spec.name], index, segment, home.memory))
        states += [
            self._move_to_device(param, index)
            for param in model.parameters()
            if id(param) not in self._state_of
        ]
        home.states = sorted(states, key=lambda state: state.order)
        return StateGroup(index, OUTSIDE, states, home)

    def _move_beside(
        self, param: nn.Parameter, group: int, segment: Segment, memory: UnitMemory
    ) -> ParamState:
        live = torch.empty(segment.spec.shape, dtype=segment.spec.dtype, device=self._device)
        return self._rehome(
            param, group, segment, memory.weight(segment), memory.residual(segment), live=live
        )

    def _move_to_device(self, param: nn.Parameter, group: int) -> ParamState:
        spec = self._blueprint.specs[id(param)]
        weight = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        residual = torch.zeros(spec.shape, dtype=torch.int16, device=self._device) if spec.split else None
        return self._rehome(param, group, Segment.alone(spec), weight, residual)

    def _move_buffers(self, model: nn.Module) -> None:
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    if buffer.device != self._device:
                        self._moved_buffers.append((module, key))
                    module._buffers[key] = buffer.to(self._device)

    def _rehome(
        self,
        param: nn.Parameter,
        group: int,
        segment: Segment,
        weight: torch.Tensor,
        residual: torch.Tensor | None,
        *,
        live: torch.Tensor | None = None,
        streams: bool = False,
    ) -> ParamState:
        """Copy a parameter to its new place and let go of the old one: never two copies of the model."""
        state = ParamState(self._order[id(param)], param, group, streams, segment, weight, residual)
        if live is not None:
            state.live = live
        state.write_master(param.data)
        param.data = state.live
        state.version = param._version
        if self._blueprint.fp32_sums and state.spec.trainable and state.spec.dtype != torch.float32:
            # Autograd sums resident gradients in place, so an fp32 sum needs fp32 from the first micro-batch on.
            param.grad_dtype = torch.float32
        self.states.append(state)
        self._state_of[id(param)] = state
        return state

    # -- training --------------------------------------------------------------------------------------------

    def allocate_for_training(self) -> None:
        """Make room for what an optimizer needs, once: moments of zero, and gradients that wait for their update."""
        blueprint = self._blueprint
        for group in self.groups:
            group.home.allocate(
                blueprint.rule, overlapped=blueprint.overlapped, fp32_sums=blueprint.fp32_sums
            )

    def defer_updates(self) -> None:
        """Make room for gradients that wait for their update from now on."""
        self._blueprint = dataclasses.replace(self._blueprint, overlapped=False)
        self.allocate_for_training()

    # -- finding it ------------------------------------------------------------------------------------------

    def state_of(self, param: torch.Tensor) -> ParamState | None:
        """The state of a parameter; None if it is not this model's."""
        return self._state_of.get(id(param))

    def group_of(self, state: ParamState) -> StateGroup:
        """The group that a parameter moves with."""
        return self.groups[state.group]

    @property
    def host_bytes(self) -> int:
        """Bytes of host buffers allocated now."""
        shared = self._disk.host_bytes if self._disk is not None else 0
        return shared + sum(group.home.host_bytes for group in self.groups)

    @property
    def disk_bytes(self) -> int:
        """Bytes of state on disk."""
        return sum(group.home.disk_bytes for group in self.groups)

    # -- giving it up ----------------------------------------------------------------------------------------

    def free(self, group: StateGroup) -> None:
        """Let go of the memory of a group, whose parameters do not use it any more."""
        group.home.free()
        if group is self.outside:
            for module, key in self._moved_buffers:
                if (buffer := module._buffers.get(key)) is not None:
                    module._buffers[key] = buffer.to("cpu")
        return_freed_memory()

    def forget_disk(self) -> None:
        """Let go of desks and files, which are closed."""
        self._disk = None


def make_ordinary(states: Sequence[ParamState]) -> None:
    """Make parameters tensors of their own in RAM, in the dtypes that they came in. Their state must be in memory.

    One that was given other memory by hand keeps that.
    """
    with torch.inference_mode(False), torch.no_grad():
        for state in states:
            value = state.read_master()
            if state.param.data_ptr() == state.live.data_ptr():
                state.param.data = value.to("cpu", copy=value is state.live)
            if state.spec.trainable and hasattr(state.param, "grad_dtype"):
                state.param.grad_dtype = None  # as autograd makes them, also after another cast
            state.weight = state.live = state.param.data
            state.residual, state.version = None, state.param._version
