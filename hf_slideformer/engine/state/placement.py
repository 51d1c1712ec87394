"""A model's training state in its place: units' state in RAM or on disk, everything else on the device.

Making a `PlacedState` moves the model, one parameter after the other, so that there are never two copies of it. What
`p.data` is from then on is the engine's; who may read or write it when is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ...errors import StateError
from ...memory.allocator import return_freed_memory
from ...memory.buffers import PinBudget
from ...memory.disk.desks import Loan
from ...memory.layout import Segment, lay_out
from ...memory.unit_memory import UnitMemory
from ...optim.state import ParamState, zero_moments
from ...planner.workload import Decisions
from ..model.blueprint import Blueprint
from .on_disk import UnitsOnDisk
from .unit import Unit


class PlacedState:
    """One model's parameters and what training keeps of them, in the tiers that the plan names.

    Args:
        model: with its data; is moved.
        blueprint: its parts.
        decisions: where state lives and what happens to activations.
        input_bytes: of a unit's input that the plan counts on.
        device: where units compute.
        pins: asked before a unit's buffers are pinned.
        disk: files of the units that the decisions put on disk; None if there are none.

    Attributes:
        states: of all parameters, in registration order.
        units: all units, in registration order.
        streamed: those of them that stream.
        outside: parameters outside of units that are updated in RAM.
        outside_memory: where.
        disk: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        blueprint: Blueprint,
        decisions: Decisions,
        *,
        input_bytes: Callable[[int], int | None],
        device: torch.device,
        pins: PinBudget,
        disk: UnitsOnDisk | None,
    ) -> None:
        self.disk = disk
        self._device = device
        self._blueprint = blueprint
        self._accumulates = blueprint.micro_batches > 1
        self._lent = False
        # Where each of the model's buffers that is on the device was before.
        self._moved_buffers: list[tuple[nn.Module, str]] = []
        self.states: list[ParamState] = []
        self._state_of: dict[int, ParamState] = {}
        self._order = {id(param): index for index, param in enumerate(model.parameters())}
        with torch.no_grad():
            self.units = [
                self._move_unit(index, decisions, input_bytes(index), pins)
                for index in range(len(blueprint.units))
            ]
            self.outside_memory = self._move_outside(model, decisions, pins)
            self._move_rest(model)
        self.states.sort(key=lambda state: state.order)
        self.streamed = [unit for unit in self.units if unit.streamed]
        self.outside = [state for state in self.states if state.updated_in_ram]

    # -- moving the model ------------------------------------------------------------------------------------

    def _move_unit(self, index: int, decisions: Decisions, input_bytes: int | None, pins: PinBudget) -> Unit:
        found, specs = self._blueprint.units[index], self._blueprint.specs
        streamed = index not in decisions.resident
        layout = self._blueprint.layouts[index] if streamed else lay_out([])
        loan = self.borrow(index)
        mapped = self.disk.mapped(index) if self.disk is not None else None
        memory = UnitMemory(
            layout,
            pin=streamed and mapped is None and pins.take(layout.weight_bytes + layout.grad_bytes),
            on_disk=loan is not None,
            mapped=mapped,
        )
        by_name = {specs[id(p)].name: (name, p) for name, p in found.parameters.items()}
        states, owners = [], []
        with contextlib.ExitStack() as lent:
            if loan is not None and self.disk is not None:
                loan.ready.wait_host()
                lent.callback(loan.give_back, write=True, nbytes=self.disk.layouts[index].nbytes)
                self.disk.attach(memory, loan)
                lent.callback(memory.detach)
            for segment in layout.segments:
                name, param = by_name[segment.spec.name]
                weight, residual = memory.weight(segment), memory.residual(segment)
                states.append(self._rehome(param, index, segment, weight, residual))
                owners.append(found.owners[name])
            if loan is not None:
                for state in states:
                    state.detach()
        return_freed_memory()
        own = {id(p) for p in found.parameters.values()} if streamed else set()
        policy = decisions.activations[index]
        unit = Unit(
            index=index,
            found=found,
            streamed=streamed,
            layout=layout,
            memory=memory,
            states=states,
            owners=owners,
            host_weights=memory.weights.tensor(torch.uint8, 0, layout.weight_bytes),
            original_forward=found.module.forward,
            shared=[p for p in found.module.parameters() if p.requires_grad and id(p) not in own],
            keeps=policy == "keep",
            offloads=policy == "offload",
            planned_bytes=input_bytes,
            argument_names=tuple(inspect.signature(found.module.forward).parameters),
            version=sum(state.param._version for state in states),
            place_on_disk=self.disk.place_of_input(index) if self.disk is not None else None,
        )
        if mapped is not None and self.disk is not None:
            unit.borrow_weights = self.disk.weights_of(unit)
        return unit

    def _move_outside(self, model: nn.Module, decisions: Decisions, pins: PinBudget) -> UnitMemory:
        """Parameters outside of units whose master is in RAM and whose weights are on the device."""
        layout = self._blueprint.outside_layout(decisions)
        pinned = layout.weight_bytes + layout.grad_bytes
        memory = UnitMemory(layout, pin=pinned > 0 and pins.take(pinned))
        segments = {segment.spec.name: segment for segment in layout.segments}
        for param in model.parameters():
            spec = self._blueprint.specs[id(param)]
            if (segment := segments.get(spec.name)) is not None:
                live = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
                self._rehome(param, None, segment, memory.weight(segment), memory.residual(segment), live)
        return memory

    def _move_rest(self, model: nn.Module) -> None:
        """What lives on the device altogether."""
        for param in model.parameters():
            if id(param) not in self._state_of:
                spec = self._blueprint.specs[id(param)]
                residual = (
                    torch.zeros(spec.shape, dtype=torch.int16, device=self._device) if spec.split else None
                )
                weight = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
                self._rehome(param, None, Segment.alone(spec), weight, residual)
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    if buffer.device != self._device:
                        self._moved_buffers.append((module, key))
                    module._buffers[key] = buffer.to(self._device)

    def _rehome(
        self,
        param: nn.Parameter,
        unit: int | None,
        segment: Segment,
        weight: torch.Tensor,
        residual: torch.Tensor | None,
        live: torch.Tensor | None = None,
    ) -> ParamState:
        """Copy a parameter to its new place and let go of the old one: never two copies of the model."""
        state = ParamState(self._order[id(param)], param, unit, segment, weight, residual)
        if live is not None:
            state.live = live
        state.write_master(param.data)
        param.data = state.live
        state.version = param._version
        if self._accumulates and state.spec.trainable and state.spec.dtype != torch.float32:
            # Autograd sums resident gradients in place, so an fp32 sum needs fp32 from the first micro-batch on.
            param.grad_dtype = torch.float32
        self.states.append(state)
        self._state_of[id(param)] = state
        return state

    def defer_updates(self) -> None:
        """Make room for gradients that wait for their update from now on."""
        self._blueprint = dataclasses.replace(self._blueprint, overlapped=False)
        self.allocate_for_training()

    def allocate_for_training(self) -> None:
        """Make room for what an optimizer needs, once: moments of zero, and gradients that wait for their update."""
        moments, overlapped = self._blueprint.moments, self._blueprint.overlapped
        for unit in self.streamed:
            unit.memory.allocate_moments(moments)
            if not overlapped:
                unit.memory.allocate_gradients(
                    fp32=self._accumulates,
                    from_device=not self._accumulates,
                    least_bytes=(unit.planned_bytes or 0) if unit.offloads and not self._accumulates else 0,
                )
        if self.outside:
            self.outside_memory.allocate_moments(moments)
            self.outside_memory.allocate_gradients(fp32=self._accumulates)
        for state in self.states:
            if not state.spec.trainable:
                continue
            state.moment_format = moments
            if state.unit is not None:
                state.moments = self.units[state.unit].memory.moments(state.segment)
            elif state.updated_in_ram:
                state.moments = self.outside_memory.moments(state.segment)
            elif not state.moments:
                state.moments = zero_moments(moments, state.spec, self._device)

    # -- giving it up ------------------------------------------------------------------------------------------

    def free_for_training(self) -> None:
        """Let go of what only training needs: moments, and gradient buffers."""
        for memory in (*(unit.memory for unit in self.streamed), self.outside_memory):
            memory.free_for_training()
        for state in self.states:
            state.moments, state.moment_format = {}, None

    def make_ordinary(self, states: Sequence[ParamState]) -> None:
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

    def free(self, group: int) -> None:
        """Let go of the memory of one of the groups of `by_unit`, whose parameters do not use it any more."""
        if group < len(self.units):
            unit = self.units[group]
            unit.memory.free()
            unit.host_weights = torch.empty(0, dtype=torch.uint8)
        else:
            self.outside_memory.free()
            for module, key in self._moved_buffers:
                if (buffer := module._buffers.get(key)) is not None:
                    module._buffers[key] = buffer.to("cpu")
        return_freed_memory()

    # -- finding it ------------------------------------------------------------------------------------------

    def state_of(self, param: torch.Tensor) -> ParamState | None:
        """The state of a parameter; None if it is not this model's."""
        return self._state_of.get(id(param))

    def by_unit(self) -> list[list[ParamState]]:
        """The states of each unit, streamed or resident, and last those outside of units; in the model's order."""
        groups = []
        outside = {state.order: state for state in self.states}
        for unit in self.units:
            own = [self._state_of[id(param)] for param in unit.found.parameters.values()]
            groups.append(sorted(own, key=lambda state: state.order))
            for state in own:
                outside.pop(state.order, None)
        return [*groups, list(outside.values())]

    @property
    def host_bytes(self) -> int:
        """Bytes of host buffers allocated now."""
        memories = [unit.memory for unit in self.streamed]
        if self.outside:
            memories.append(self.outside_memory)
        held = sum(buffer.nbytes for memory in memories for buffer in memory.buffers())
        return held + (self.disk.host_bytes if self.disk is not None else 0)

    # -- state that lives on disk ----------------------------------------------------------------------------

    def borrow(self, unit: int) -> Loan | None:
        """Ask for a unit's residuals and moments; None if they do not live on disk."""
        return self.disk.borrow_state(unit) if self.disk is not None else None

    @contextlib.contextmanager
    def attached(self, unit: Unit, loan: Loan, *, changes: bool = True) -> Iterator[None]:
        """A unit's state is the tensors in what was borrowed while the block runs.

        With `changes` it will be written back.
        """
        assert self.disk is not None
        self.disk.attach(unit.memory, loan)
        try:
            for state in unit.states:
                state.attach(unit.memory)
                if changes:
                    state.residual_is_stale = False
            yield
        finally:
            for state in unit.states:
                state.detach()
            unit.memory.detach()

    def on_loan(self, unit: int, loan: Loan) -> UnitMemory:
        """A unit's memory with what was borrowed attached, for a reader beside training."""
        assert self.disk is not None
        memory = copy.copy(self.units[unit].memory)
        self.disk.attach(memory, loan)
        return memory

    @contextlib.contextmanager
    def residual_in_memory(self, state: ParamState) -> Iterator[None]:
        """Make the `residual` of one parameter a tensor that can be read while the block runs, wherever it lives.

        Raises:
            TransferError: reading from disk failed; the cause is chained.
        """
        unit = state.unit
        if state.residual is not None or unit is None or self.disk is None or unit not in self.disk:
            yield
            return
        loan, start = self.disk.borrow_residual(self.units[unit], state.segment)
        try:
            loan.ready.wait_host()
            residual = loan.buffer.tensor(torch.int16, start, state.spec.numel).view(state.spec.shape)
            state.residual = residual.zero_() if state.residual_is_stale else residual
            yield
        finally:
            state.residual = None
            loan.give_back()

    @contextlib.contextmanager
    def in_memory(self, states: Sequence[ParamState], *, write: bool) -> Iterator[None]:
        """Make `residual` and `moments` of one unit's parameters tensors while the block runs, wherever they live.

        Args:
            states: all of one unit, or none of any unit.
            write: put changes back where the state lives.

        Raises:
            StateError: inside of another such block.
            TransferError: reading from disk failed; the cause is chained.
        """
        unit = states[0].unit if states else None
        if unit is None or self.disk is None or unit not in self.disk:
            yield
            return
        if self._lent:  # with one buffer the second block would wait for the first
            raise StateError(
                "state_in_memory inside of state_in_memory; end the first block before the second"
            )
        loan = self.borrow(unit)
        assert loan is not None
        self._lent = True
        try:
            loan.ready.wait_host()
            with self.attached(self.units[unit], loan, changes=write):
                yield
        finally:
            self._lent = False
            loan.give_back(write=write, nbytes=self.disk.layouts[unit].nbytes)
