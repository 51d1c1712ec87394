"""`SlideEngine`: one model's streamed training state, from preparation to the last step.

It makes the parts and says what comes after what: state in its place (`placement.py`), lanes and slots, the executor,
gradients, clipping (`clipping.py`), updates (`updates.py`), and the way to state for everyone else (`access.py`).

Order of one step, with deferred updates:

    forward     each unit waits for its own pending update, then for its copy to the device
    backward    units in reverse; gradients leave for RAM, or are summed there
    clip        the global norm is known; the coefficient is kept, gradients are not touched
    step        resident parameters are updated at once, units' updates are enqueued in forward order

With overlapped updates the third line only reports the norm, and the update of a unit starts as soon as its
gradients have landed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import compatibility
from ..config import SlideConfig
from ..errors import (
    PlanError,
    SlideFormerError,
    StateError,
    UnsupportedModelError,
)
from ..machine.hardware import available_ram_bytes, default_update_threads
from ..memory.allocator import use_expandable_segments
from ..memory.buffers import PinBudget
from ..memory.disk.desks import DiskState
from ..memory.offload import TensorOffload
from ..memory.pool import SlotPool
from ..memory.runtime import Failure
from ..memory.staging import StagingBuffers
from ..memory.transfer import Lane
from ..memory.worker import UpdateWorker
from ..metrics import Metrics
from ..optim.adamw import SlideAdamW
from ..optim.state import ParamState, set_gradient
from ..planner.workload import Decisions
from .model.batch_shape import BatchShape
from .model.blueprint import Blueprint
from .model.stand_ins import Hook, ReplacedMethod
from .model.units import check_has_data, check_no_hooks, find_units
from .planning import find_budgets, plan_for
from .run.checkpointing import LayerCheckpointing, callers_of
from .run.deferred_logits import defer_logits
from .run.executor import Executor, UnitForward
from .state.access import StateAccess
from .state.beside_device import OutsideUpdates
from .state.clipping import Clipping, clip_grad_norm_
from .state.gradients import Gradients
from .state.leaving import watch_leaving
from .state.on_disk import UnitsOnDisk
from .state.parameters import unguarded
from .state.placement import PlacedState
from .state.snapshot import HeldState
from .state.unit import Unit, check_unchanged
from .state.updates import Updates

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
        delays = delays or {}
        compatibility.check(compatibility.ENGINE)
        compatibility.check_adapters()
        check_has_data(model)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.config = config
        self.read_only = read_only
        self._bf16 = bf16
        self.metrics = Metrics()
        self.metrics.tracing = config.trace_steps > 0
        self._accumulates = micro_batches > 1
        self._steps = 0

        self._left = ""
        self._optimizers: weakref.WeakSet[SlideAdamW] = weakref.WeakSet()  # all that were ever attached
        self._on_release: list[Callable[[], None]] = []
        # Whether a trainer is in the middle of training, when the model must not leave; whoever prepares it says so.
        self.in_training: Callable[[], bool] = lambda: False

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
        self.overlapped = self._overlap_was_exact = blueprint.overlapped
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

        self._pins = PinBudget(device, find_budgets(config, device, taken=taken).pinned)
        self._failure = Failure()
        use_expandable_segments(device)
        self._disk = self._open_disk(decisions, delays.get("disk"))
        try:
            self._placed = PlacedState(
                model,
                blueprint,
                decisions,
                input_bytes=self._planned.input_bytes,
                device=device,
                pins=self._pins,
                disk=self._disk,
            )
        except BaseException:
            if self._disk is not None:
                self._disk.state.close()
            raise
        self.states = self._placed.states
        if device.type == "cuda":
            torch.cuda.empty_cache()  # weights that were there before left gaps of other sizes
        self._lanes = [Lane(name, device, delays.get(name)) for name in ("h2d", "d2h")]
        self._worker = UpdateWorker(self.metrics, delays.get("update"))
        self._gradient_hooks: list[RemovableHandle] = []
        # From here on: what fails below must leave no thread and no file either.
        disk = self._disk.state if self._disk is not None else None
        self._finalizer = weakref.finalize(
            self, _close, self._lanes, self._worker, disk, self._gradient_hooks
        )
        slot_bytes = max((layout.weight_bytes for layout in blueprint.streamed_layouts(decisions)), default=0)
        self.pool = SlotPool(device, slot_bytes, decisions.slots, self._lanes[0], self.metrics)
        self.gradients: Gradients | None = None
        offload = TensorOffload(
            device, self._lanes[1], self._lanes[0], self.metrics, self._pins.take, self._pins.give_back
        )
        units = self._placed.units
        self.executor = Executor(device, units, self.pool, offload, self, self.check)
        self._methods: list[ReplacedMethod] = []
        for unit in units:
            forward = UnitForward(self.executor, unit)
            forward.put("forward")
            self._methods.append(forward)
        self.clipping = Clipping(self.states, device, overlapped=self.overlapped)
        self._updates = Updates(
            self._placed,
            outside=self._outside_updates(),
            worker=self._worker,
            tape=self.executor.tape,
            clipping=self.clipping,
            failure=self._failure,
            metrics=self.metrics,
            device=device,
            overlapped=self.overlapped,
            threads=config.cpu_threads or default_update_threads(device),
        )
        self._access = StateAccess(self._placed, self._updates, self.pool)
        # Resident parameters whose gradient became an fp32 sum, for a second backward that nobody had announced.
        self._promoted: list[ParamState] = []
        self._in_units = {id(param) for unit in units for param in unit.found.parameters.values()}
        self._logits_readers: set[str] = set()
        self._said: list[str] = []
        if blueprint.head.module is not None:
            head = defer_logits(blueprint.head.module, self._fused_loss_ran, self._logits_read)
            self._methods.append(head)
        self._access.watch(model)
        self._methods += watch_leaving(model, self)
        self._checkpointing = LayerCheckpointing(unit.found.module for unit in units)
        self._hooks = [
            module.register_forward_pre_hook(Hook(self, SlideEngine._recompute_once))
            for module in callers_of(model, [unit.name for unit in units])
        ]
        self._names = _names(model)
        # Until there is an optimizer: nothing else would notice that gradients of resident parameters have no place.
        self._gradient_hooks += [
            state.param.register_hook(Hook(self, SlideEngine._refuse_backward))
            for state in self.states
            if state.unit is None and state.param.requires_grad
        ]

    # -- construction ----------------------------------------------------------------------------------------

    def _recompute_once(self, *_: object) -> None:
        self._checkpointing.switch_off()

    def _open_disk(self, decisions: Decisions, delay_s: Callable[[str], float] | None) -> UnitsOnDisk | None:
        if not decisions.on_disk:
            return None
        return UnitsOnDisk(
            self._blueprint,
            decisions,
            input_bytes=self._planned.input_bytes,
            directories=self.config.nvme_dirs,
            pins=self._pins,
            metrics=self.metrics,
            delay_s=delay_s,
            on_failure=self._failure.note,
        )

    def _outside_updates(self) -> OutsideUpdates | None:
        placed, (to_device, to_host) = self._placed, self._lanes
        if not placed.outside:
            return None
        return OutsideUpdates(
            self.device,
            placed.outside_memory,
            placed.outside,
            to_host,
            to_device,
            self._worker,
            self.metrics,
        )

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
        if self._updates.optimizer is optimizer:
            return
        if self._refusal is not None:
            raise self._refusal
        if self.read_only:
            raise StateError(
                "this model was prepared for evaluation only (evaluation_mode=True), which froze it; to train it, load "
                "it anew and prepare it together with its optimizer"
            )
        self._updates.find_groups(optimizer)  # raises before anything is changed
        first = self._updates.optimizer is None
        if not first:
            self._access.forget_moments()
        self._placed.allocate_for_training()
        if first:
            while self._gradient_hooks:
                self._gradient_hooks.pop().remove()
            self._gradient_hooks += [
                state.param.register_hook(Hook(self, functools.partial(SlideEngine._before_sum, state=state)))
                for state in self.states
                if state.unit is None and state.param.requires_grad
            ]
            self._update_residents_in_backward()
        self._updates.use(optimizer)
        optimizer.bind(self)
        self._optimizers.add(optimizer)
        self.plan = dataclasses.replace(self._planned.plan, notes=(*self._planned.plan.notes, *self._said))
        self.gradients = self.clipping.gradients = self._make_gradients()

    def _make_gradients(self) -> Gradients:
        layouts = self._blueprint.streamed_layouts(self.plan.decisions)
        largest = max((layout.grad_bytes for layout in layouts), default=0)
        # Without accumulation sums are rare (a layer used twice, a second backward): then one buffer serves,
        # and is made only when the first sum needs it.
        count = self.plan.decisions.staging_buffers
        if self.gradients is None:
            self._pins_staging = self._pins.take(count * largest)
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
            overlapped_update=self._updates.overlapped_update,
            take_scale=self.clipping.take_scale,
            units=self._placed.streamed,
            disk=self._disk.state if self._disk is not None else None,
            tape=self.executor.tape,
        )

    # -- sink of the executor ----------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """See `GradientSink`."""
        resident = [state for state in self.states if state.unit is None]
        with unguarded(state.param for state in resident):
            for state in resident:
                check_unchanged(state)
        for state in self._promoted:
            if state.param.grad is None:  # a step is over
                state.param.grad_dtype = state.spec.dtype
        self._promoted = [state for state in self._promoted if state.param.grad is not None]

    def runs_again(self, unit: Unit) -> None:
        """See `GradientSink`. An overlapped update would be made before its gradient is complete.

        Where the settings leave it open, and no update of this step has begun, updates are deferred from now on.

        Raises:
            PlanError: gradients that wait for their update do not fit.
        """
        can_wait = self.config.update == "auto" and not self.plan.decisions.weights_on_disk
        if self.overlapped and self.gradients is not None and can_wait and not self._updates.has_begun:
            self._defer_updates(
                f"updates are deferred, because {unit.name} runs forward more than once a step"
            )

    def _defer_updates(self, note: str) -> None:
        assert self.gradients is not None
        self._planned = self._planned.deferring(note)
        self._updates.defer()
        self.gradients.abandon()  # waits for the last ones of the step before
        self.overlapped = self.clipping.overlapped = False
        self._blueprint = dataclasses.replace(self._blueprint, overlapped=False)
        self._placed.defer_updates()
        self.plan = dataclasses.replace(self._planned.plan, notes=(*self._planned.plan.notes, *self._said))
        self.gradients = self.clipping.gradients = self._make_gradients()
        logger.warning("%s; gradients wait for step() in memory of their own", note)

    def begin_unit(self, unit: Unit) -> None:
        """See `GradientSink`."""
        if self.gradients is None:
            self.check()
            self._refuse_backward()
        assert self.gradients is not None
        self.gradients.begin_unit(unit)

    def _before_sum(self, _grad: torch.Tensor, *, state: ParamState) -> None:
        """Called when autograd is about to fill the gradient of a resident parameter, or to add to it."""
        if self.executor.in_unit:
            return
        if id(state.param) in self._in_units:
            check_no_hooks(state.name, state.param)
        self._updates.check_used_once(state)
        grad = state.param.grad
        if grad is None:
            return
        self.clipping.apply([state])  # what is added is not to be multiplied by it
        if grad.dtype != torch.float32:  # as sums in RAM are
            set_gradient(state, grad.float())
            self._promoted.append(state)

    def _refuse_backward(self, *_: object) -> None:
        raise StateError(
            "backward on a model that was prepared without an optimizer; prepare both, together or one after the "
            "other (model, optimizer = accelerator.prepare(model, optimizer)), or call trainer.train()"
        )

    def push(self, unit: Unit, grads: list[torch.Tensor | None]) -> None:
        """See `GradientSink`."""
        assert self.gradients is not None
        self.gradients.push(unit, grads)

    def _update_residents_in_backward(self) -> None:
        """With overlapped updates, use up gradients of resident units when they are there: their memory is free."""
        for unit in self.executor.units if self.overlapped else ():
            for param in unit.found.parameters.values() if not unit.streamed else ():
                if param.requires_grad:
                    hook = Hook(self, SlideEngine._use_up_gradient)
                    self._gradient_hooks.append(param.register_post_accumulate_grad_hook(hook))

    def _use_up_gradient(self, param: nn.Parameter) -> None:
        state, grad = self.param_state(param), param.grad
        if not self.overlapped:  # any more
            return
        if grad is not None and self._updates.update_in_backward(state, grad):
            assert self.gradients is not None
            self.gradients.note_norm(state, grad)
            param.grad = None

    # -- optimizer backend -------------------------------------------------------------------------------------

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor:
        """Clip the global gradient norm without touching gradients; see `clipping.clip_grad_norm_`.

        Args:
            parameters: of this model, and any others.
            max_norm: the largest norm; inf only measures.
            norm_type: 2.0, or any other norm by torch's own function.
        """
        params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        return clip_grad_norm_([self.clipping], params, max_norm, norm_type)

    def param_state(self, param: torch.Tensor) -> ParamState:
        """See `OptimizerBackend`."""
        state = self._placed.state_of(param)
        assert state is not None, "not this model's"
        return state

    def groups_changed(self) -> None:
        """See `OptimizerBackend`."""
        assert self._updates.optimizer is not None
        self._updates.use(self._updates.optimizer)

    def step(self) -> None:
        """Update every parameter that has a gradient: residents now, units by the worker, in forward order.

        Raises:
            StateError: the learning rate changed after overlapped updates had used it, or the engine is broken.
        """
        self.check()
        assert self.gradients is not None
        self.gradients.check_used_up()
        steps = [state.step for state in self.states]
        try:
            with unguarded(state.param for state in self.states):
                self._updates.step()
        except BaseException as error:
            if steps != [state.step for state in self.states]:
                self._failure.note(error)  # some parameters are a step ahead of the others
            raise
        self.clipping.clear()
        self.gradients.forget_norms()
        self.executor.tape.restart()
        for unit in self.executor.units:
            unit.forwards_since_step = 0
        self.pool.invalidate()
        self.executor.prefetch_first()
        self._steps += 1
        if self._steps >= self.config.trace_steps:
            self.metrics.tracing = False

    def state_in_memory(
        self, states: Sequence[ParamState], *, write: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """See `StateAccess.state_in_memory`."""
        return self._access.state_in_memory(states, write=write)

    def state_loaded(self) -> None:
        """See `OptimizerBackend`."""
        self.pool.invalidate()

    # -- order and failure -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise if an update failed: its unit's weights can no longer be trusted.

        Raises:
            StateError: with the cause.
        """
        if self._left:
            raise StateError(
                f"the model left its engine, because {self._left}, between a forward and what belongs to it; run "
                "forward again, with a new optimizer once the model is prepared again"
            )
        self._failure.check()

    def synchronize(self) -> None:
        """Block until every update is done and weights can be read.

        Raises:
            TransferError: an update failed, or the write of its weights to disk; the cause is chained.
        """
        self._updates.synchronize()

    def weights_changed(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """Tell the engine that weights were written in a way it cannot see (past torch's functions).

        Copies on the device are dropped and the parameters' master residuals cleared. Writes through `p.copy_()`,
        `p.data` or `load_state_dict` are noticed anyway, and whole.

        Args:
            parameters: those that were written; None stands for all, which rounds every master to its weight.
        """
        self._access.weights_changed(parameters)

    def reset(self) -> None:
        """Make the engine usable after an exception between forward and backward, or inside either.

        Pending gradients of the interrupted backward are dropped, and so is every lease.

        Raises:
            StateError: some units were already updated by an interrupted overlapped backward, or some parameters by an
                interrupted step.
        """
        self._abandon()
        self._updates.abandon()
        # What was cut short between submitting work and keeping its handle.
        for lane in self._lanes:
            lane.drain()
        self._worker.drain()
        self.pool.reset()
        self._access.forget_runs()
        for state in self.states:
            state.param.grad = None
        self.clipping.clear()
        self.executor.tape.recorded.clear()
        for unit in self.executor.units:
            unit.forwards_since_step = 0
        self.check()

    def _abandon(self) -> None:
        """Forget what is on its way between device and RAM."""
        if self.gradients is not None:
            self.gradients.abandon()
        self.executor.offload.abandon()
        self.executor.drop_inputs()

    def states_by_unit(self) -> list[list[ParamState]]:
        """See `PlacedState.by_unit`."""
        return self._placed.by_unit()

    def hold(self) -> HeldState:
        """See `Updates.hold`."""
        return self._updates.hold()

    def state_dict_as_loaded(
        self, model: nn.Module, wanted: Callable[[ParamState], bool] | None = None
    ) -> dict[str, torch.Tensor] | None:
        """The model's state dict in the dtypes it came in, or None where the live one already is that.

        fp32 weights that train as split masters are joined again, bit for bit; all else is the live tensors. With
        `wanted` only the parameters for which it is true are joined.
        """
        return self._access.state_dict_as_loaded(model, wanted)

    @property
    def fuses_loss(self) -> bool:
        """Whether the head hands out deferred logits, so that the loss may run fused."""
        return self._blueprint.head.module is not None

    def owns(self, param: torch.Tensor) -> bool:
        """Whether `param` is a parameter of this engine's model."""
        return self._placed.state_of(param) is not None

    def other_setting(
        self, *, bf16: bool, config: SlideConfig, micro_batches: int, overlap_is_exact: bool
    ) -> str:
        """The first setting that is not the one that the model was prepared with, in words; empty if there is none."""
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
            "overlapped": self._overlap_was_exact,
            "optimizer_states": self.config.optimizer_states,
            "config": self.config,
        }
        for name, value in wanted.items():
            if have[name] != value:
                return f"this model was prepared with {name}={have[name]} and is now wanted with {value}"
        return ""

    def check_settings(
        self, *, bf16: bool, config: SlideConfig, micro_batches: int, overlap_is_exact: bool
    ) -> None:
        """Raise `StateError` if the model was prepared with settings that are not these."""
        other = self.other_setting(
            bf16=bf16, config=config, micro_batches=micro_batches, overlap_is_exact=overlap_is_exact
        )
        if other:
            raise StateError(
                f"{other}; release() the model, and prepare it again, for other settings (precision, clipping, "
                "accumulation, slide_config)"
            )

    @property
    def host_state_bytes(self) -> int:
        """Bytes of host buffers for state and offloaded activations allocated now."""
        return self._placed.host_bytes + self.executor.offload.host_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of state on disk."""
        return self._disk.state.disk_bytes if self._disk is not None else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of all host buffers allocated now."""
        return self.host_state_bytes + (self.gradients.staging_bytes if self.gradients is not None else 0)

    def close(self) -> None:
        """Finish pending work and end the threads. The model keeps its (host) weights."""
        self._updates.wait_held()
        self._finalizer()

    # -- the end -----------------------------------------------------------------------------------------------

    def fits(self, model: nn.Module, *, training: bool) -> bool:
        """Whether `model` is what this engine was made for, as it was then.

        Args:
            model: has units of this engine.
            training: it will be trained, so every parameter must be as it was; for evaluation the model may be a part
                of the engine's, and what is trainable does not matter.
        """
        states = {id(state.param): state for state in self.states}
        for param in model.parameters():
            state = states.get(id(param))
            if state is None or param.data_ptr() != state.live.data_ptr():
                return False
            if training and param.requires_grad != state.spec.trainable:
                return False
        if not training:
            return True
        try:
            units = [unit.module for unit in find_units(model)]
        except UnsupportedModelError:
            return False
        same_units = units == [unit.found.module for unit in self.executor.units]
        return same_units and not self.read_only and _names(model) == self._names

    def owned(self, module: nn.Module) -> list[ParamState]:
        """States of the parameters in `module` and below."""
        found = (self._placed.state_of(param) for param in module.parameters())
        return [state for state in found if state is not None]

    def on_release(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the model has left."""
        self._on_release.append(callback)

    def release(self, reason: str = "release() was called") -> None:
        """Make the model an ordinary one, with its weights in RAM in the dtypes that they came in, and close.

        Pending updates and a save that is going on are finished first; masters are joined exactly. Memory is let go of
        unit by unit. Gradients are dropped, what is frozen stays so. The optimizer cannot be used any more.

        Args:
            reason: a clause for later errors that says what happened.

        Raises:
            StateError: a trainer is training it, its weights are those of no step, state on disk cannot be read, or
                there is too little RAM.
        """
        if self._left:
            return
        if self.in_training():
            raise StateError(
                f"the model cannot leave its engine while it is trained ({reason}); do it when train() has returned"
            )
        try:
            self.check()
            self._updates.wait_held()
            self.synchronize()
            self._check_room()
        except SlideFormerError as error:
            raise StateError(
                f"{reason}, for which the model would have to leave its engine, but it cannot ({error}); load the "
                "model anew"
            ) from error
        self._abandon()
        self.pool.free()
        self.gradients = None
        while self._gradient_hooks:
            self._gradient_hooks.pop().remove()
        try:
            self._access.give_up()
        except BaseException as error:
            self._failure.note(error)
            raise StateError(
                f"{reason}, for which the model has to leave its engine, but that failed ({error}); load the model anew"
            ) from error
        self._left = reason
        while self._methods:
            self._methods.pop().remove()
        while self._hooks:
            self._hooks.pop().remove()
        for optimizer in self._optimizers:
            optimizer.unbind(f"its model left the engine: {reason}")
        self._finalizer()
        self._disk = self._placed.disk = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        while self._on_release:
            self._on_release.pop()()

    def _check_room(self) -> None:
        """Raise `StateError` if the weights, which are joined and come from disk and the device, do not fit the RAM."""
        needed = sum(state.spec.numel * state.spec.source_dtype.itemsize for state in self.states)
        there = available_ram_bytes() + self.host_bytes
        if needed > there:
            raise StateError(
                f"its weights take {needed / 2**30:.2f} GiB of RAM, and {there / 2**30:.2f} GiB are free or come free"
            )


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


def engine_of(model: nn.Module) -> SlideEngine | None:
    """The engine that streams `model`, if one does."""
    return next(_engines(model), None)


def engines_of(model: nn.Module) -> list[SlideEngine]:
    """All engines that stream units of `model`: several where parts of it were prepared as models of their own."""
    return list(dict.fromkeys(_engines(model)))


def _engines(model: nn.Module) -> Iterator[SlideEngine]:
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, UnitForward) and forward.executor is not None:
            sink = forward.executor.sink
            if isinstance(sink, SlideEngine):
                yield sink


def _names(model: nn.Module) -> list[tuple[str, int]]:
    """Every name of every parameter, and which parameter that is."""
    return [(name, id(param)) for name, param in model.named_parameters(remove_duplicate=False)]


__all__ = ["SlideEngine", "engine_of", "engines_of"]
