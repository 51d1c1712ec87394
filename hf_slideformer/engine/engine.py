"""`SlideEngine`: one model's streamed training state, from preparation to the last step.

It joins the parts: units found in the model, host memory, slots and lanes, executor, gradients, the update
worker and the optimizer. Order of one step, with deferred updates:

    forward     each unit waits for its own pending update, then for its copy to the device
    backward    units in reverse; gradients leave for RAM, or are summed there
    clip        the global norm is known; the coefficient is kept, gradients are not touched
    step        resident parameters are updated at once, units' updates are enqueued in forward order

With overlapped updates the third line only reports the norm, and the update of a unit starts as soon as its
gradients have landed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import logging
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..config import SlideConfig
from ..errors import PlanError, StateError, UnsupportedModelError
from ..hardware import default_update_threads
from ..memory.allocator import return_freed_memory, use_expandable_segments
from ..memory.disk import DiskStore
from ..memory.disk_state import DiskInputs, DiskPlace, DiskState, Loan
from ..memory.layout import Segment, lay_out, lay_out_on_disk
from ..memory.manager import UnitMemory
from ..memory.offload import TensorOffload
from ..memory.pinned import BufferView, HostBuffer
from ..memory.pool import SlotPool
from ..memory.staging import StagingBuffers
from ..memory.transfer import Lane
from ..metrics import Metrics
from ..optim.adamw import SlideAdamW
from ..optim.state import (
    Hyperparams,
    ParamState,
    UnitUpdate,
    UpdateRun,
    apply_update,
    plan_runs,
    update_unit,
    zero_moments,
)
from ..optim.worker import UpdateWorker
from ..planner.workload import Decisions
from .adapters import watch_adapters
from .batch_shape import BatchShape
from .blueprint import Blueprint
from .executor import Executor, Unit, UnitForward, check_unchanged
from .gradients import Gradients, settle
from .held import HeldState
from .loss import defer_logits
from .outside import OutsideUpdates
from .planning import find_budgets, plan_for
from .replaced import raise_not_picklable
from .units import check_has_data

logger = logging.getLogger(__name__)


class SlideEngine:
    """Streams one model's units; see the module's text.

    Making an engine moves the model: units' parameters into host buffers, everything else to `device`.

    Args:
        model: a transformers model (or a wrapper around one) with its weights loaded.
        device: where units compute.
        bf16: mixed precision; fp32 weights become split masters that stream in bf16.
        config: the user's settings.
        micro_batches: backwards that make a step; with more than one gradients are summed in fp32.
        overlap_is_exact: no clipping and one backward a step, so that `update="auto"` may overlap.
        for_training: refuse now what would not fit with optimizer state; False for a model that is only evaluated.
        read_only: this model will never be trained (DPO's reference). Its parameters are frozen, every unit streams,
            and there is room for nothing but weights.
        shape: what is known of micro-batches; without it the planner keeps away from what depends on them.
        decisions: where state lives and what happens to activations; None lets the planner decide.
        taken: bytes by tier that other models have of what the settings allow.
        delays: for tests: seconds to sleep before a piece of work of the lanes "h2d" and "d2h" (on the CPU), of
            "update" and of "disk", by label.

    Raises:
        UnsupportedModelError: nothing to stream, or weights that cannot be.
        PlanError: it does not fit.
        ConfigError: settings that contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        bf16: bool,
        config: SlideConfig,
        micro_batches: int = 1,
        overlap_is_exact: bool = False,
        for_training: bool = True,
        read_only: bool = False,
        shape: BatchShape | None = None,
        decisions: Decisions | None = None,
        taken: Mapping[str, int] | None = None,
        delays: Mapping[str, Callable[[str], float]] | None = None,
    ) -> None:
        self._delays = delays = delays or {}
        check_has_data(model)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.config = config
        self.read_only = read_only
        self._bf16 = bf16
        self.metrics = Metrics()
        self.metrics.tracing = config.trace_steps > 0
        self._broken: BaseException | None = None
        self._accumulates = micro_batches > 1
        self._threads = config.cpu_threads or default_update_threads(device)
        self._optimizer: SlideAdamW | None = None
        # Gradients that were clipped and not used yet: the gradient, its version then, and the coefficient.
        self._clipped: dict[int, tuple[weakref.ref[torch.Tensor], int, float]] = {}
        # Resident gradients that the last step used, to notice a missing zero_grad.
        self._used: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._steps = 0
        self._overlapped_hyperparams: dict[int, Hyperparams] = {}
        self._group_of: dict[int, int] = {}
        self._state_is_open = False
        self._weights_are_in_hand = False
        self._held: HeldState | None = None
        self._loading: dict[int, torch.Tensor] = {}
        self._load_root: nn.Module | None = None

        if read_only:
            model.requires_grad_(False)
            # What it kept on the GPU would be missing where training needs it more.
            config, shape, for_training = dataclasses.replace(config, placement="stream"), None, False
        self._blueprint = blueprint = Blueprint.of(
            model,
            bf16=bf16,
            config=config,
            micro_batches=micro_batches,
            overlap_is_exact=overlap_is_exact,
            on_gpu=device.type == "cuda",
        )
        self.overlapped = blueprint.overlapped
        gc.collect()  # an engine that was dropped lies in a reference cycle, its memory still mapped
        self._refusal: PlanError | None = None
        how: dict[str, Any] = {
            "device": device,
            "bf16": bf16,
            "config": config,
            "shape": shape,
            "taken": taken,
        }
        try:  # also where only evaluation is asked for now: training may follow
            self._planned = plan_for(model, blueprint, **how, training=not read_only, decisions=decisions)
        except PlanError as error:
            if for_training:
                raise
            self._refusal = error
            self._planned = plan_for(model, blueprint, **how, training=False)
        self.plan = self._planned.evaluating()
        decisions = self.plan.decisions
        self._budgets = find_budgets(config, device, taken=taken)

        self._pinned_bytes = 0
        self._warned_of_pageable = False
        self.states: list[ParamState] = []
        self._state_of: dict[int, ParamState] = {}
        use_expandable_segments(device)
        self._disk_inputs: DiskInputs | None = None
        self._disk = self._open_disk(blueprint, decisions)
        try:
            units = self._move(model, blueprint, decisions)
        except BaseException:
            if self._disk is not None:
                self._disk.close()
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()  # weights that were there before left gaps of other sizes
        self._lanes = [Lane(name, device, delays.get(name)) for name in ("h2d", "d2h")]
        self._worker = UpdateWorker(self.metrics, delays.get("update"))
        self._gradient_hooks: list[RemovableHandle] = []
        # From here on: what fails below must leave no thread and no file either.
        self._finalizer = weakref.finalize(
            self, _close, self._lanes, self._worker, self._disk, self._gradient_hooks
        )
        slot_bytes = max((layout.weight_bytes for layout in blueprint.streamed_layouts(decisions)), default=0)
        self.pool = SlotPool(device, slot_bytes, decisions.slots, self._lanes[0], self.metrics)
        self.gradients: Gradients | None = None
        self._outside = self._outside_updates()
        offload = TensorOffload(
            device, self._lanes[1], self._lanes[0], self.metrics, self._pin, self._unpinned
        )
        self.executor = Executor(device, units, self.pool, offload, self, self.check)
        self._streamed = [unit for unit in units if unit.streamed]
        for unit in units:
            unit.found.module.forward = UnitForward(self.executor, unit)
        self._logits_readers: set[str] = set()
        self._said: list[str] = []
        if blueprint.head.module is not None:
            defer_logits(blueprint.head.module, self._fused_loss_ran, self._logits_read)
        watch_adapters(model, self.weights_in_hand)
        _install_hooks(model, self)
        # Until there is an optimizer: nothing else would notice that gradients of resident parameters have no place.
        self._gradient_hooks += [
            state.param.register_hook(_ModelHook(self, SlideEngine._refuse_backward))
            for state in self.states
            if state.unit is None and state.param.requires_grad
        ]

    # -- construction ----------------------------------------------------------------------------------------

    def _pin(self, nbytes: int) -> bool:
        """Whether `nbytes` more may be pinned."""
        if self.device.type != "cuda":
            return False
        if self._budgets.pinned is not None and self._pinned_bytes + nbytes > self._budgets.pinned:
            if not self._warned_of_pageable:
                self._warned_of_pageable = True
                warnings.warn(
                    f"pinned_memory={self._budgets.pinned / 2**30:.2f} GiB is less than the engine wants to pin; the "
                    "rest stays pageable, which makes its transfers synchronous and about half as fast",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return False
        self._pinned_bytes += nbytes
        return True

    def _unpinned(self, nbytes: int) -> None:
        """Note that pinned memory was let go of."""
        self._pinned_bytes -= nbytes

    def _move(self, model: nn.Module, blueprint: Blueprint, decisions: Decisions) -> list[Unit]:
        specs = blueprint.specs
        order = {id(param): index for index, (_, param) in enumerate(model.named_parameters())}
        units = []
        with torch.no_grad(), contextlib.ExitStack() as lent:
            for index, (unit, layout) in enumerate(zip(blueprint.units, blueprint.layouts, strict=True)):
                streamed = index not in decisions.resident
                layout = layout if streamed else lay_out([])
                loan = self._borrow_state(index)
                mapped = None
                if self._disk is not None and index in decisions.weights_on_disk:
                    mapped = self._disk.mapped(index), self._disk_layouts[index]
                memory = UnitMemory(
                    layout,
                    pin=streamed and mapped is None and self._pin(layout.weight_bytes + layout.grad_bytes),
                    on_disk=loan is not None,
                    mapped=mapped,
                )
                if loan is not None:
                    loan.ready.wait_host()
                    memory.attach(loan.buffer, self._disk_layouts[index], blueprint.moments)
                    lent.callback(loan.give_back, write=True, nbytes=self._disk_layouts[index].nbytes)
                own = {id(p) for p in unit.parameters.values()} if streamed else set()
                by_name = {specs[id(p)].name: (name, p) for name, p in unit.parameters.items()}
                states, owners = [], []
                for segment in layout.segments:
                    name, param = by_name[segment.spec.name]
                    state = ParamState(
                        order=order[id(param)],
                        param=param,
                        unit=index,
                        segment=segment,
                        weight=memory.weight(segment),
                        residual=memory.residual(segment),
                    )
                    self._rehome(state)
                    states.append(state)
                    owners.append(unit.owners[name])
                if loan is not None:
                    for state in states:
                        state.detach()
                    memory.detach()
                lent.close()
                return_freed_memory()
                policy = decisions.activations[index]
                units.append(
                    Unit(
                        index=index,
                        found=unit,
                        streamed=streamed,
                        layout=layout,
                        memory=memory,
                        states=states,
                        owners=owners,
                        host_weights=memory.weights.tensor(torch.uint8, 0, layout.weight_bytes),
                        original_forward=unit.module.forward,
                        shared=[p for p in unit.module.parameters() if p.requires_grad and id(p) not in own],
                        keeps=policy == "keep",
                        offloads=policy == "offload",
                        planned_bytes=self._planned.input_bytes(index),
                        argument_names=tuple(inspect.signature(unit.module.forward).parameters),
                        version=sum(state.param._version for state in states),
                        place_on_disk=self._place_of_input(index),
                    )
                )
                if mapped is not None:
                    units[-1].borrow_weights = self._weights_of(units[-1])
            self._move_outside(model, blueprint, decisions, order)
            for _, param in model.named_parameters():
                if id(param) not in self._state_of:
                    spec = specs[id(param)]
                    residual = (
                        torch.zeros(spec.shape, dtype=torch.int16, device=self.device) if spec.split else None
                    )
                    weight = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
                    self._rehome(
                        ParamState(order[id(param)], param, None, Segment.alone(spec), weight, residual)
                    )
            for module in model.modules():
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[key] = buffer.to(self.device)
        self.states.sort(key=lambda state: state.order)
        return units

    def _move_outside(
        self, model: nn.Module, blueprint: Blueprint, decisions: Decisions, order: dict[int, int]
    ) -> None:
        """Parameters outside of units whose master is in RAM and whose weights are on the device."""
        layout = blueprint.outside_layout(decisions)
        pinned = layout.weight_bytes + layout.grad_bytes
        self._outside_memory = UnitMemory(layout, pin=pinned > 0 and self._pin(pinned))
        segments = {segment.spec.name: segment for segment in layout.segments}
        for _, param in model.named_parameters():
            spec = blueprint.specs[id(param)]
            if (segment := segments.get(spec.name)) is not None:
                self._rehome(
                    ParamState(
                        order[id(param)],
                        param,
                        None,
                        segment,
                        self._outside_memory.weight(segment),
                        self._outside_memory.residual(segment),
                        live=torch.empty(spec.shape, dtype=spec.dtype, device=self.device),
                    )
                )

    def _open_disk(self, blueprint: Blueprint, decisions: Decisions) -> DiskState | None:
        """Files for the optimizer state of units that the plan puts on disk."""
        if not decisions.on_disk:
            return None
        streamed = set(range(len(blueprint.layouts))) - set(decisions.resident)
        if decisions.disk_buffers < 1 or not streamed.issuperset(decisions.on_disk):
            raise PlanError(
                f"state of units {decisions.on_disk} on disk with {decisions.disk_buffers} buffers: there must be a "
                f"buffer, and only units that stream ({sorted(streamed)}) may be there"
            )
        if not set(decisions.on_disk).issuperset(decisions.weights_on_disk):
            raise PlanError(
                f"weights of units {decisions.weights_on_disk} on disk, but state only of {decisions.on_disk}; "
                "state goes there first"
            )
        store = DiskStore(self.config.nvme_dirs, metrics=self.metrics, delay_s=self._delays.get("disk"))
        self._disk_layouts = layouts = {
            unit: lay_out_on_disk(
                blueprint.layouts[unit],
                blueprint.moments,
                weights=unit in decisions.weights_on_disk,
                **self._waiting_on_disk(blueprint, decisions, unit),
            )
            for unit in decisions.on_disk
        }
        engine = weakref.ref(self)

        def failed(error: BaseException) -> None:
            if (alive := engine()) is not None and alive._broken is None:
                alive._broken = error

        mapped = frozenset(decisions.weights_on_disk)
        disk = DiskState(store, {unit: places.file_bytes for unit, places in layouts.items()}, mapped, failed)
        try:
            largest = max(places.masters_and_gradients[1] for places in layouts.values())
            self._updates_desk = disk.open_desk("updates", decisions.disk_buffers, largest)
            if mapped:
                nbytes = max(places.weight_bytes for places in layouts.values())
                count = decisions.slots
                self._weights_desk = disk.open_desk("fetches", count, nbytes, pin=self._pin(count * nbytes))
            spans = {unit: places.input for unit, places in layouts.items() if places.input_bytes}
            self._disk_inputs = DiskInputs(disk, spans, self._pin) if spans else None
        except BaseException:
            disk.close()
            raise
        return disk

    def _waiting_on_disk(self, blueprint: Blueprint, decisions: Decisions, unit: int) -> dict[str, int]:
        """Bytes of gradients and of the input that are on disk while they wait, of a unit whose weights are there."""
        if unit not in decisions.weights_on_disk:
            return {}
        layout, waiting = blueprint.layouts[unit], {}
        if not self.overlapped:
            waiting["grad_bytes"] = 4 * layout.state_numel if self._accumulates else layout.grad_bytes
        if decisions.activations[unit] == "offload":
            waiting["input_bytes"] = self._planned.input_bytes(unit) or 0
        return waiting

    def _borrow_state(self, unit: int) -> Loan | None:
        """A unit's residuals and moments, if they live on disk."""
        if self._disk is None or unit not in self._disk:
            return None
        return self._updates_desk.borrow(unit, self._disk_layouts[unit].state)

    def _place_of_input(self, unit: int) -> DiskPlace | None:
        return self._disk_inputs.place(unit) if self._disk_inputs is not None else None

    def _weights_of(self, unit: Unit) -> Callable[[], Loan]:
        weights, desk = self._disk_layouts[unit.index].weights, self._weights_desk
        return lambda: desk.borrow(unit.index, weights, after=unit.pending_update)

    def _outside_updates(self) -> OutsideUpdates | None:
        states = [state for state in self.states if state.updated_in_ram]
        if not states:
            return None
        return OutsideUpdates(
            self.device,
            self._outside_memory,
            states,
            self._lanes[1],
            self._lanes[0],
            self._worker,
            self.metrics,
        )

    def _rehome(self, state: ParamState) -> None:
        """Copy a parameter to its new place and let go of the old one: never two copies of the model."""
        state.write_master(state.param.data)
        state.param.data = state.live
        state.version = state.param._version
        if self._accumulates and state.spec.trainable and state.spec.dtype != torch.float32:
            # Autograd sums resident gradients in place, so an fp32 sum needs fp32 from the first micro-batch on.
            state.param.grad_dtype = torch.float32
        self.states.append(state)
        self._state_of[id(state.param)] = state

    def _fused_loss_ran(self, tokens: int) -> None:
        self.metrics.add("fused_loss_tokens", tokens)

    def _logits_read(self, reader: str) -> None:
        """Say once that all logits were needed in training, and by what."""
        if reader in self._logits_readers:
            return
        self._logits_readers.add(reader)
        note = f"all logits were computed in training, because `{reader}` reads them"
        logger.warning("%s; the loss is fused where it is torch.nn.functional.cross_entropy", note)
        self._said.append(note)
        self.plan = dataclasses.replace(self.plan, notes=(*self.plan.notes, note))

    def attach_optimizer(self, optimizer: SlideAdamW) -> None:
        """Give the engine the optimizer of its parameters; allocates moments and gradient buffers.

        A second optimizer (another trainer on the same model) starts with moments of zero, as it would in torch.

        Raises:
            UnsupportedModelError: a parameter that is not this model's.
            PlanError: the model was prepared without an optimizer, and its training does not fit.
            StateError: the model is read-only.
        """
        if self._optimizer is optimizer:
            return
        if self._refusal is not None:
            raise self._refusal
        if self.read_only:
            raise StateError(
                "this model was prepared for evaluation only (evaluation_mode=True), which froze it; to train it, load "
                "it anew and prepare it together with its optimizer"
            )
        if self._optimizer is not None:
            self.synchronize()
            self._forget_moments()
        self._group_of = self._find_groups(optimizer)
        for unit in self._streamed:
            unit.memory.allocate_moments(self._blueprint.moments)
            if not self.overlapped:
                unit.memory.allocate_gradients(
                    fp32=self._accumulates,
                    from_device=not self._accumulates,
                    least_bytes=(unit.planned_bytes or 0) if unit.offloads and not self._accumulates else 0,
                )
            for state in unit.states:
                if state.spec.trainable:
                    state.moment_format = self._blueprint.moments
                    state.moments = unit.memory.moments(state.segment)
        if self._outside is not None:
            memory = self._outside.memory
            memory.allocate_moments(self._blueprint.moments)
            memory.allocate_gradients(fp32=self._accumulates)
            for state in self._outside.states:
                state.moment_format = self._blueprint.moments
                state.moments = memory.moments(state.segment)
        for state in self.states:
            if state.unit is None and state.spec.trainable and not state.moments:
                state.moment_format = self._blueprint.moments
                state.moments = zero_moments(self._blueprint.moments, state.spec, self.device)
        if self._optimizer is None:
            while self._gradient_hooks:
                self._gradient_hooks.pop().remove()
            if self.overlapped:
                self._update_residents_in_backward()
        self._optimizer = optimizer
        optimizer.bind(self)
        self.plan = dataclasses.replace(self._planned.plan, notes=(*self._planned.plan.notes, *self._said))
        self.gradients = self._make_gradients()

    def _forget_moments(self) -> None:
        self._wait_held()
        for states in self.states_by_unit():
            with self.state_in_memory(states, write=True):
                for state in states:
                    state.step = 0
                    for tensor in state.moments.values():
                        tensor.zero_()

    def states_by_unit(self) -> list[list[ParamState]]:
        """The states of each unit, streamed or resident, and last those outside of units; in the model's order."""
        groups = []
        outside = {state.order: state for state in self.states}
        for unit in self.executor.units:
            own = [self._state_of[id(param)] for param in unit.found.parameters.values()]
            groups.append(sorted(own, key=lambda state: state.order))
            for state in own:
                outside.pop(state.order, None)
        return [*groups, list(outside.values())]

    def hold(self) -> HeldState:
        """Keep updates away from the state as it is now until it has been read, unit by unit.

        Raises:
            TransferError: an update failed; the cause is chained.
        """
        self._wait_held()
        self.synchronize()
        groups = self.states_by_unit()
        for state in self.states:
            state.check_outside_write()
        outside = len(groups) - 1
        units = sorted(self.executor.units, key=self._place_in_forward)
        if self.overlapped:  # as backward goes, then `step`
            order = [*(unit.index for unit in reversed(units)), outside]
        else:  # as `step` goes
            order = [outside, *(unit.index for unit in sorted(units, key=lambda unit: unit.streamed))]
        self._held = HeldState(
            groups, order, device=self.device, borrow=self._borrow_state, attach=self._memory_on_loan
        )
        return self._held

    def _memory_on_loan(self, unit: int, loan: Loan) -> UnitMemory:
        memory = copy.copy(self.executor.units[unit].memory)
        memory.attach(loan.buffer, self._disk_layouts[unit], self._blueprint.moments)
        return memory

    def _wait_held(self) -> None:
        """Wait until what is being saved has been read, before state is changed by others than updates."""
        if self._held is not None:
            self._held.wait_host()
            self._held = None

    def _until_read(self, state: ParamState) -> None:
        """Wait before an update that is made here and now."""
        if self._held is not None:
            self._held.released(self._held.group_of[state.order]).wait_host()

    def _find_groups(self, optimizer: SlideAdamW) -> dict[int, int]:
        groups = {}
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                state = self._state_of.get(id(param))
                if state is None:
                    raise UnsupportedModelError(
                        f"parameter group {index} holds a parameter of shape {tuple(param.shape)} that is not in the "
                        "prepared model; make the optimizer from the same model object"
                    )
                groups[state.order] = index
        return groups

    def groups_changed(self) -> None:
        """See `OptimizerBackend`."""
        assert self._optimizer is not None
        self._group_of = self._find_groups(self._optimizer)

    def _make_gradients(self) -> Gradients:
        layouts = self._blueprint.streamed_layouts(self.plan.decisions)
        largest = max((layout.grad_bytes for layout in layouts), default=0)
        # Without accumulation sums are rare (a layer used twice, a second backward): then one buffer serves,
        # and is made only when the first sum needs it.
        count = self.plan.decisions.staging_buffers
        if self.gradients is None:
            self._pins_staging = self._pin(count * largest)
        staging = StagingBuffers(largest, max(1, count), pin=self._pins_staging)
        return Gradients(
            device=self.device,
            lane=self._lanes[1],
            worker=self._worker,
            pool=self.pool,
            offload=self.executor.offload,
            metrics=self.metrics,
            fp32_sums=self._accumulates,
            overlapped=self.overlapped,
            staging=staging,
            overlapped_update=self._overlapped_update,
            take_scale=self._take_scale,
            disk=self._disk,
            place=self._place_in_forward,
            on_finish=self.executor.tape.restart,
        )

    # -- sink of the executor ----------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """See `GradientSink`."""
        for state in self.states:
            if state.unit is None:
                check_unchanged(state)
                self._check_used_once(state)
                if state.param.grad is not None and (scale := self._take_scale(state)) != 1.0:
                    # Autograd is about to add to this gradient, so its clip coefficient is due now.
                    with torch.no_grad():
                        state.param.grad.mul_(scale)
        self._used.clear()

    def _check_used_once(self, state: ParamState) -> None:
        used = self._used.get(state.order)
        grad = state.param.grad
        if used is not None and grad is not None and grad is used[0]() and grad._version == used[1]:
            raise StateError(
                f"the gradient of {state.name} that the last step used is still there, and the next backward would "
                "add to it, or the next step use it again; call optimizer.zero_grad() after step(): streamed gradients "
                "are not kept over a step"
            )

    def begin_unit(self, unit: Unit) -> None:
        """See `GradientSink`."""
        if self.gradients is None:
            self._refuse_backward()
        assert self.gradients is not None
        self.gradients.begin_unit(unit)

    def _refuse_backward(self, *_: object) -> None:
        raise StateError(
            "backward on a model that was prepared without an optimizer; prepare both, together or one after the "
            "other (model, optimizer = accelerator.prepare(model, optimizer)), or call trainer.train()"
        )

    def push(self, unit: Unit, grads: list[torch.Tensor | None]) -> None:
        """See `GradientSink`."""
        assert self.gradients is not None
        self.gradients.push(unit, grads)

    # -- clipping ----------------------------------------------------------------------------------------------

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor:
        """Clip the global gradient norm, as `torch.nn.utils.clip_grad_norm_` does, without touching gradients.

        The coefficient is applied inside the update. Per parameter the sum of squares has one fixed summation
        tree; parameters are added in registration order in float64.

        Args:
            parameters: normally all of the model's; a subset is clipped in place by torch's own function.
            max_norm: the largest norm; inf only measures.
            norm_type: 2.0, or any other norm by torch's own function.

        Returns:
            The norm before clipping, 0-dim fp32. With overlapped updates it lives on the device and is not
            waited for.

        Raises:
            StateError: a finite `max_norm` after overlapped updates have started.
        """
        params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if self.gradients is None:
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
        if self.overlapped and math.isfinite(max_norm):
            raise StateError(
                f"clip_grad_norm_(max_norm={max_norm}) after overlapped updates have started; use "
                "SlideConfig(update='deferred')"
            )
        given = {id(param) for param in params}
        pending = [state for state in self.states if self.gradients.landed(state)]
        if norm_type != 2.0 or any(id(state.param) not in given for state in pending):
            self._apply_clipping()
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
        squares = [self.gradients.squared_norm(state) for state in pending]
        if self.overlapped:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for square in squares:
                total = total + square
            return total.sqrt().to(torch.float32)
        scales = [self._scale_of(state) for state in pending]
        norm = math.sqrt(sum(sq * scale * scale for sq, scale in zip(_to_host(squares), scales, strict=True)))
        # The same arithmetic as torch's, infinities and NaN included.
        coefficient = float("nan") if math.isinf(norm) and math.isinf(max_norm) else max_norm / (norm + 1e-6)
        if not coefficient >= 1.0:
            for state, scale in zip(pending, scales, strict=True):
                grad = state.param.grad
                assert grad is not None
                self._clipped[state.order] = (
                    weakref.ref(grad),
                    grad._version,
                    _round_to_fp32(scale * coefficient),
                )
        return torch.tensor(norm, dtype=torch.float32)

    def _scale_of(self, state: ParamState) -> float:
        """The clip coefficient that a parameter's pending gradient still has to be multiplied by.

        Raises:
            StateError: the gradient was edited after it was clipped.
        """
        entry, grad = self._clipped.get(state.order), state.param.grad
        if entry is None or grad is None or entry[0]() is not grad:
            return 1.0
        _, version, scale = entry
        if grad._version != version:
            if not grad.any():  # zero_grad(set_to_none=False): discarded, not edited
                return 1.0
            raise StateError(
                f"the gradient of {state.name} was edited after clip_grad_norm_, which multiplies gradients by its "
                "coefficient only inside the update; edit gradients before clipping"
            )
        return scale

    def _take_scale(self, state: ParamState) -> float:
        scale = self._scale_of(state)
        self._clipped.pop(state.order, None)
        return scale

    def _apply_clipping(self) -> None:
        """Multiply pending gradients by their clip coefficients now."""
        with torch.no_grad():
            for state in self.states:
                if state.param.grad is not None and (scale := self._take_scale(state)) != 1.0:
                    state.param.grad.mul_(scale)

    # -- optimizer backend -------------------------------------------------------------------------------------

    def param_state(self, param: torch.nn.Parameter) -> ParamState:
        """See `OptimizerBackend`."""
        return self._state_of[id(param)]

    def _hyperparams(self, state: ParamState) -> Hyperparams:
        assert self._optimizer is not None
        return Hyperparams.of_group(self._optimizer.param_groups[self._group_of[state.order]])

    def step(self) -> None:
        """Update every parameter that has a gradient: residents now, units by the worker, in forward order.

        Raises:
            StateError: the learning rate changed after overlapped updates had used it, or the engine is broken.
        """
        self.check()
        assert self.gradients is not None and self._optimizer is not None
        if self.overlapped:
            for order, used in self._overlapped_hyperparams.items():
                if used != Hyperparams.of_group(self._optimizer.param_groups[self._group_of[order]]):
                    raise StateError(
                        "the learning rate or another hyperparameter changed between backward and step, but "
                        "overlapped updates had used the old value; use SlideConfig(update='deferred')"
                    )
            self._overlapped_hyperparams.clear()
        else:
            for unit in sorted(self._streamed, key=self._place_in_forward):
                self._enqueue_update(unit)
        self._step_residents()
        self._clipped.clear()
        self.gradients.forget_norms()
        self.executor.tape.restart()
        for unit in self.executor.units:
            unit.forwards_since_step = 0
        self.pool.invalidate()
        self.executor.prefetch_first()
        self._steps += 1
        if self._steps >= self.config.trace_steps:
            self.metrics.tracing = False

    def _place_in_forward(self, unit: Unit) -> int:
        tape = self.executor.tape
        order = tape.recorded or tape.expected
        return order.index(unit.index) if unit.index in order else len(order)

    def _step_residents(self) -> None:
        """Update what autograd fills the gradients of: on the device, or in RAM for weights on the device."""
        in_ram = []
        self.wait_outside()
        for state in self.states:
            grad = state.param.grad
            if state.unit is None and grad is not None and state.order in self._group_of:
                self._check_used_once(state)
                if state.updated_in_ram:
                    self._until_read(state)
                    in_ram.append(state)
                else:
                    self._update_resident(state, grad)
                    self._used[state.order] = (weakref.ref(grad), grad._version)
        if in_ram:
            outside = self._outside
            assert outside is not None and outside.memory.grads is not None
            memory, buffer, runs = outside.memory, outside.memory.grads, self._runs(in_ram)
            outside.step(
                in_ram,
                self._guarded(lambda: update_unit(memory, buffer, memory.grads_fp32, runs, self._threads)),
            )
            for state in in_ram:
                self._note_update(state)
                # Detached like streamed gradients: zero_grad(set_to_none=False) must not reach one on its way to RAM.
                state.param.grad = None

    def _update_resident(self, state: ParamState, grad: torch.Tensor) -> None:
        self._until_read(state)
        state.check_outside_write()
        state.step += 1
        apply_update(
            state.weight,
            state.residual,
            grad.contiguous(),
            state.moments,
            self._hyperparams(state).scalars(state.step),
            self._scale_of(state),
            self._threads if self.device.type == "cpu" else None,
        )
        self._note_update(state)

    def _update_residents_in_backward(self) -> None:
        """From now on gradients of resident units are used up, and their memory is free, as soon as they are there."""
        for unit in self.executor.units:
            for param in unit.found.parameters.values() if not unit.streamed else ():
                if param.requires_grad:
                    hook = _ModelHook(self, SlideEngine._use_up_gradient)
                    self._gradient_hooks.append(param.register_post_accumulate_grad_hook(hook))

    def _use_up_gradient(self, param: nn.Parameter) -> None:
        state, grad = self._state_of[id(param)], param.grad
        if grad is None or state.order not in self._group_of:
            return
        if state.order in self._overlapped_hyperparams:
            raise StateError(
                f"{state.name} got a second gradient since the last step, but overlapped updates had used the first; "
                "use SlideConfig(update='deferred')"
            )
        assert self.gradients is not None
        self.gradients.note_norm(state, grad)
        self._overlapped_hyperparams[state.order] = self._hyperparams(state)
        self._update_resident(state, grad)
        param.grad = None

    @staticmethod
    def _note_update(state: ParamState) -> None:
        """Let autograd's own check find a graph that was built on the old weights."""
        torch.autograd.graph.increment_version(state.param)
        state.version = state.param._version

    def _enqueue_update(self, unit: Unit) -> None:
        if unit.pending_update is not None:
            unit.pending_update.wait_host()  # a second step without a forward: that update still reads its gradients
        # Detached here: a zero_grad(set_to_none=False) after step must not reach gradients still to be used.
        grads = {s.order: s.param.grad for s in unit.states if s.param.grad is not None}
        states = [state for state in unit.states if state.order in grads and state.order in self._group_of]
        runs = self._runs(states)
        for state in unit.states:
            state.param.grad = None
        if not states:
            return
        buffer = unit.memory.grads
        assert buffer is not None
        with torch.no_grad():
            for state in states:
                place = unit.memory.gradient(state.segment)
                if (
                    grads[state.order].data_ptr() != place.data_ptr()
                ):  # someone set p.grad to a tensor of their own
                    place.copy_(grads[state.order])

        self.metrics.add("updated_params", sum(state.spec.numel for state in states))
        priority = self._place_in_forward(unit)
        update = self._unit_update(unit, runs, fp32=unit.memory.grads_fp32)
        try:
            unit.pending_update = self._worker.submit(
                f"update of {unit.name}",
                lambda: update.run(buffer),
                priority=priority,
                after=update.after,
                dropped=update.drop,
            )
        except BaseException:
            update.drop()
            raise

    def _unit_update(self, unit: Unit, runs: Sequence[UpdateRun], *, fp32: bool) -> UnitUpdate:
        """The worker's part of a unit's update; state that lives on disk is on its way from now on."""

        def run(buffer: HostBuffer | BufferView) -> None:
            self._guarded(lambda: update_unit(unit.memory, buffer, fp32, runs, self._threads))()

        read = () if self._held is None else (self._held.released(unit.index),)
        if self._disk is None or unit.index not in self._disk:
            return UnitUpdate(run, after=read)
        places, waited = self._disk_layouts[unit.index], unit.memory.grads_on_disk
        # Gradients that wait on disk come with the rest.
        loan = self._updates_desk.borrow(
            unit.index, places.masters_and_gradients if waited else places.masters
        )

        def run_on_disk(buffer: HostBuffer | BufferView) -> None:
            try:
                with self._attached(unit, loan):
                    run(BufferView(loan.buffer, places.gradients[0]) if waited else buffer)
            finally:
                loan.give_back(write=True, nbytes=places.masters[1])

        return UnitUpdate(run_on_disk, after=(loan.ready, *read), drop=loan.give_back)

    @contextlib.contextmanager
    def _attached(self, unit: Unit, loan: Loan, *, changes: bool = True) -> Iterator[None]:
        """A unit's state is the tensors in a borrowed buffer while the block runs."""
        unit.memory.attach(loan.buffer, self._disk_layouts[unit.index], self._blueprint.moments)
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

    def _overlapped_update(self, unit: Unit, states: list[ParamState]) -> UnitUpdate:
        states = [state for state in states if state.order in self._group_of]
        for state in states:
            self._overlapped_hyperparams[state.order] = self._hyperparams(state)
        runs = self._runs(states)

        self.metrics.add("updated_params", sum(state.spec.numel for state in states))
        return self._unit_update(unit, runs, fp32=False)

    def _runs(self, states: list[ParamState]):
        for state in states:
            state.check_outside_write()
            state.step += 1
        return plan_runs(states, self._hyperparams, self._scale_of)

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._broken = error  # the unit's state may be half updated
                raise

        return run

    @contextlib.contextmanager
    def state_in_memory(self, states: Sequence[ParamState], *, write: bool = False) -> Iterator[None]:
        """Make `residual` and `moments` of parameters of one unit tensors that can be read, wherever they live.

        Residuals of weights that were written from outside are cleared first.

        Args:
            states: all of one unit, or none of any unit.
            write: put changes back where the state lives.

        Raises:
            TransferError: reading from disk failed; the cause is chained.
        """
        if write:
            self._wait_held()
        self.synchronize()
        for state in states:
            state.check_outside_write()  # of what is on disk: what this clears stays cleared there
        unit = states[0].unit if states else None
        if unit is None or self._disk is None or unit not in self._disk:
            yield
            return
        if self._state_is_open:
            raise StateError(
                "state_in_memory inside of state_in_memory; end the first block before the second"
            )
        loan = self._borrow_state(unit)
        assert loan is not None
        self._state_is_open = True
        try:
            loan.ready.wait_host()
            with self._attached(self.executor.units[unit], loan, changes=write):
                yield
        finally:
            self._state_is_open = False
            loan.give_back(write=write, nbytes=self._disk_layouts[unit].nbytes)

    @contextlib.contextmanager
    def weights_in_hand(self, module: nn.Module) -> Iterator[None]:
        """Make the parameters of `module`, of one unit or none, what they came in as; take over what is written there.

        For code that reads and writes `p.data`. Split masters of fp32 weights are joined meanwhile.
        """
        if self._weights_are_in_hand:
            yield
            return
        self._wait_held()
        self.synchronize()
        states = [state for p in module.parameters() if (state := self._state_of.get(id(p))) is not None]
        units = {state.unit for state in states if state.unit is not None}
        before: list[torch.Tensor | None] = []
        self._weights_are_in_hand = True
        try:
            with contextlib.ExitStack() as stack:
                for unit in units:
                    stack.enter_context(self.state_in_memory(self.executor.units[unit].states, write=True))
                for state in states:
                    joined = state.read_master()
                    before.append(None if joined is not state.live else state.live.clone())
                    state.param.data = joined
                try:
                    yield
                finally:
                    for state, was in zip(states, before, strict=True):
                        written = state.param.data
                        state.param.data = state.live
                        if written.data_ptr() != state.live.data_ptr():
                            state.write_master(written)
                        elif was is not None and not torch.equal(was, written):
                            state.follow_live()
                        state.version = state.param._version
        finally:
            self._weights_are_in_hand = False
            self.pool.invalidate()

    def state_loaded(self) -> None:
        """See `OptimizerBackend`."""
        self.pool.invalidate()

    # -- order and failure -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise if an update failed: its unit's weights can no longer be trusted.

        Raises:
            StateError: with the cause.
        """
        if self._broken is not None:
            raise StateError(
                f"an update failed ({self._broken}), so the weights in memory are not those of any step; resume "
                "from the last checkpoint in a new process"
            ) from self._broken

    def synchronize(self) -> None:
        """Block until every update is done and weights can be read.

        Raises:
            TransferError: an update failed, or the write of its weights to disk; the cause is chained.
        """
        for unit in self._streamed:
            if unit.pending_update is not None:
                unit.pending_update.wait_host()
                unit.pending_update = None
            if unit.borrow_weights is not None:  # the update's buffer may still be on its way to the file
                assert self._disk is not None
                self._disk.written[unit.index].wait_host()
        if self._outside is not None:
            self._outside.wait_host()

    def wait_outside(self) -> None:
        """Make the current stream wait for updates of parameters outside of units; called before the model runs."""
        if self._outside is not None:
            self._outside.wait_stream()

    def weights_changed(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """Tell the engine that weights were written in a way it cannot see (through `p.data`).

        Copies on the device are dropped and the parameters' master residuals cleared. Writes through `p.copy_()`
        or `load_state_dict` are noticed anyway.

        Args:
            parameters: those that were written; None stands for all, which rounds every master to its weight.
        """
        if self._held is not None:
            self._held.spoil("weights_changed() was called")
        self._wait_held()
        self.synchronize()
        self.pool.invalidate()
        for state in self.states if parameters is None else [self._state_of[id(p)] for p in parameters]:
            state.follow_live()

    def reset(self) -> None:
        """Make the engine usable after an exception between forward and backward, or inside either.

        Pending gradients of the interrupted backward are dropped.

        Raises:
            StateError: some units were already updated by an interrupted overlapped backward.
        """
        if self.gradients is not None:
            self.gradients.abandon()
        self.executor.offload.abandon()
        self.executor.drop_inputs()
        for unit in self._streamed:
            if unit.pending_update is not None:
                settle(unit.pending_update)
                if not unit.pending_update.failed:
                    unit.pending_update = None
                elif self.overlapped:
                    # Its gradients never arrived, while other units were updated.
                    self._broken = self._broken or StateError(f"{unit.name} missed an overlapped update")
        for state in self.states:
            state.param.grad = None
        self._clipped.clear()
        self._used.clear()
        self.executor.tape.recorded.clear()
        for unit in self.executor.units:
            unit.forwards_since_step = 0
        if self._overlapped_hyperparams:
            self._overlapped_hyperparams.clear()
            self._broken = StateError("backward was interrupted after overlapped updates of some units")
        self.check()

    def load_begins(self, module: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Called before `load_state_dict` of the model or a part of it, and again for each part inside."""
        if prefix and self._load_root is not None:
            return
        self._wait_held()
        self.synchronize()
        self._load_root = module
        for key, param in module.named_parameters():
            state, value = self._state_of.get(id(param)), state_dict.get(prefix + key)
            if state is None or not state.spec.split or value is None:
                continue
            if value.dtype == torch.float32:
                self._loading[state.order] = value

    def load_ends(self, module: nn.Module) -> None:
        """Called after `load_state_dict`: residuals follow the weights, fp32 ones exactly."""
        if module is not self._load_root:
            return  # a part of a load that is still going on
        for states in self.states_by_unit():
            loaded = any(state.order in self._loading for state in states)
            with self.state_in_memory(states, write=True) if loaded else contextlib.nullcontext():
                for state in states:
                    if state.order in self._loading:
                        state.write_master(self._loading[state.order])
                    state.check_outside_write()
        self._loading = {}
        self._load_root = None
        self.pool.invalidate()

    def state_dict_as_loaded(
        self, model: nn.Module, wanted: Callable[[ParamState], bool] | None = None
    ) -> dict[str, torch.Tensor] | None:
        """The model's state dict in the dtypes it came in, or None where the live one already is that.

        fp32 weights that train as split masters are joined again, bit for bit; all else is the live tensors. With
        `wanted` only the parameters for which it is true are joined.
        """
        if not any(state.spec.joined_on_save for state in self.states):
            return None
        self.synchronize()
        result = model.state_dict()
        joined: dict[int, torch.Tensor] = {}  # by address of the live tensor
        for states in self.states_by_unit():
            halves = [
                state for state in states if state.spec.joined_on_save and (wanted is None or wanted(state))
            ]
            with self.state_in_memory(halves):
                for state in halves:
                    joined[state.live.data_ptr()] = state.read_master()
        return {name: joined.get(value.data_ptr(), value) for name, value in result.items()}

    @property
    def fuses_loss(self) -> bool:
        """Whether the head hands out deferred logits, so that the loss may run fused."""
        return self._blueprint.head.module is not None

    def owns(self, param: torch.Tensor) -> bool:
        """Whether `param` is a parameter of this engine's model."""
        return id(param) in self._state_of

    def check_settings(
        self, *, bf16: bool, config: SlideConfig, micro_batches: int, overlap_is_exact: bool
    ) -> None:
        """Raise `StateError` if the model was prepared with settings that are not these."""
        overlapped = config.update == "overlapped" or (config.update == "auto" and overlap_is_exact)
        wanted = {
            "bf16": bf16,
            "accumulates": micro_batches > 1,
            "overlapped": overlapped,
            "optimizer_states": config.optimizer_states,
            "config": config,
        }
        have = {
            "bf16": self._bf16,
            "accumulates": self._accumulates,
            "overlapped": self.overlapped,
            "optimizer_states": self.config.optimizer_states,
            "config": self.config,
        }
        for name, value in wanted.items():
            if have[name] != value:
                raise StateError(
                    f"this model was prepared with {name}={have[name]} and is now wanted with {value}; load the model "
                    "anew for other settings (precision, clipping, accumulation, slide_config)"
                )

    @property
    def host_state_bytes(self) -> int:
        """Bytes of host buffers for state and offloaded activations allocated now."""
        memories = [unit.memory for unit in self._streamed]
        if self._outside is not None:
            memories.append(self._outside.memory)
        held = sum(buffer.nbytes for memory in memories for buffer in memory.buffers())
        held += self._disk.host_bytes if self._disk is not None else 0
        held += self._disk_inputs.host_bytes if self._disk_inputs is not None else 0
        return held + self.executor.offload.host_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of state on disk."""
        return self._disk.disk_bytes if self._disk is not None else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of all host buffers allocated now."""
        return self.host_state_bytes + (self.gradients.staging_bytes if self.gradients is not None else 0)

    def close(self) -> None:
        """Finish pending work and end the threads. The model keeps its (host) weights."""
        self._wait_held()
        self._finalizer()


def _close(
    lanes: list[Lane], worker: UpdateWorker, disk: DiskState | None, gradient_hooks: list[RemovableHandle]
) -> None:
    if threading.current_thread().name.startswith("slideformer-"):
        # A garbage collection found the engine in one of its own threads, which this would wait for.
        threading.Thread(
            target=_close, args=(lanes, worker, disk, gradient_hooks), name="closing-slideformer"
        ).start()
        return
    for hook in gradient_hooks:
        hook.remove()
    for lane in lanes:
        lane.close()
    worker.close()
    if disk is not None:
        disk.close()


def _to_host(values: list[torch.Tensor | float]) -> list[float]:
    """Bring device scalars to the host in one copy, order kept."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    fetched = iter(torch.stack([t.to(torch.float64) for t in tensors]).tolist() if tensors else ())
    return [next(fetched) if isinstance(value, torch.Tensor) else value for value in values]


def _round_to_fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


class _ModelHook:
    """A hook on a module that does not keep the engine alive and does nothing in a copy of the model."""

    __slots__ = ("_engine", "_run")

    def __init__(self, engine: SlideEngine | None, run: Callable[..., None]) -> None:
        self._engine = weakref.ref(engine) if engine is not None else None
        self._run = run

    def __call__(self, *args) -> None:
        engine = self._engine() if self._engine is not None else None
        if engine is not None:
            self._run(engine, *args)

    def __deepcopy__(self, memo: dict) -> _ModelHook:
        # A module's hooks are copied before its submodules, so their weights are up to date when they are copied.
        engine = self._engine() if self._engine is not None else None
        if engine is not None:
            engine.synchronize()
        return _ModelHook(None, self._run)

    def __reduce__(self):
        if self._engine is not None:
            raise_not_picklable()
        return _ModelHook, (None, self._run)


def _before_read(engine: SlideEngine, *_: object) -> None:
    engine.synchronize()


def _before_forward(engine: SlideEngine, *_: object) -> None:
    engine.wait_outside()


def _before_load(
    engine: SlideEngine, module: nn.Module, state_dict: Mapping, prefix: str, *_: object
) -> None:
    engine.load_begins(module, state_dict, prefix)


def _after_load(engine: SlideEngine, module: nn.Module, *_: object) -> None:
    engine.load_ends(module)


def _install_hooks(model: nn.Module, engine: SlideEngine) -> None:
    if engine._outside is not None:
        outside = {id(state.param) for state in engine._outside.states}
        for module in model.modules():
            owns = any(id(param) in outside for param in module.parameters(recurse=False))
            if owns or module is model or isinstance(module, PreTrainedModel):
                module.register_forward_pre_hook(_ModelHook(engine, _before_forward))
    for module in model.modules():
        module.register_state_dict_pre_hook(_ModelHook(engine, _before_read))
        module.register_load_state_dict_pre_hook(_ModelHook(engine, _before_load))
        module.register_load_state_dict_post_hook(_ModelHook(engine, _after_load))


def engine_of(model: nn.Module) -> SlideEngine | None:
    """The engine that streams `model`, if one does."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, UnitForward):
            sink = forward.executor.sink
            return sink if isinstance(sink, SlideEngine) else None
    return None


__all__ = ["SlideEngine", "engine_of"]
