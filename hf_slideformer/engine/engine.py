"""`SlideEngine`: one model's streamed training state, from preparation to the last step.

It makes the parts and says what comes after what: the runtime that moves bytes (`memory/runtime.py`), state in its
homes (`state/placement.py`), slots and the executor (`run/`), gradients, clipping and updates (`state/`), and the way
to state for everyone else (`state/access.py`).

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
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import compatibility
from ..errors import PlanError, SlideFormerError, StateError, UnsupportedModelError
from ..machine.hardware import available_ram_bytes, default_update_threads
from ..memory.allocator import use_expandable_segments
from ..memory.offload import TensorOffload
from ..memory.pool import SlotPool
from ..memory.runtime import Runtime
from ..memory.staging import StagingBuffers
from ..metrics import Metrics
from ..optim.optimizer import SlideOptimizer
from ..optim.rule import UpdateRule
from ..optim.state import ParamState, set_gradient
from ..planner.plan import Plan
from ..planner.workload import Decisions
from .model.blueprint import Blueprint
from .model.setup import Setup
from .model.stand_ins import Hook, ReplacedMethod
from .model.units import check_has_data, check_no_hooks, find_units
from .planning import Planned, find_budgets, plan_for
from .run.checkpointing import LayerCheckpointing, callers_of
from .run.deferred_logits import defer_logits
from .run.executor import Executor, UnitForward
from .state.access import StateAccess
from .state.clipping import Clipping, clip_grad_norm_
from .state.gradients import Gradients
from .state.leaving import watch_leaving
from .state.parameters import unguarded
from .state.placement import PlacedModel
from .state.snapshot import HeldState
from .state.unit import Unit, check_unchanged
from .state.updates import Updates

logger = logging.getLogger(__name__)


class SlideEngine:
    """Streams one model's units; see the module's text.

    Making an engine moves the model: units' parameters into host buffers, everything else to the device.

    Args:
        model: a transformers model (or a wrapper around one) with its weights loaded.
        setup: how it is to be trained. A model that is read only has its parameters frozen, every unit streams, and
            there is room for nothing but weights.
        for_training: refuse now what would not fit with optimizer state; False for a model that is only evaluated.
        decisions: where state lives and what happens to activations; None lets the planner decide.
        delays: for tests: seconds to sleep before a piece of work of the lanes "h2d" and "d2h" (on the CPU), of
            "update" and of "disk", by label.

    Attributes:
        plan: where everything lives.
        overlapped: whether units are updated in backward.
        states: of all parameters, in registration order.

    Raises:
        UnsupportedModelError: nothing to stream, or weights that cannot be.
        PlanError: it does not fit.
        ConfigError: settings that contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        setup: Setup,
        *,
        for_training: bool = True,
        decisions: Decisions | None = None,
        delays: Mapping[str, Callable[[str], float]] | None = None,
    ) -> None:
        compatibility.check(compatibility.ENGINE)
        compatibility.check_adapters()
        check_has_data(model)
        self.setup = setup = _with_index(setup)
        self.config, self.device, self.read_only = setup.config, setup.device, setup.read_only
        self._steps = 0
        self._left = ""
        self._optimizers: weakref.WeakSet[SlideOptimizer] = weakref.WeakSet()  # all that were ever attached
        self._on_release: list[Callable[[], None]] = []
        # Whether a trainer is in the middle of training, when the model must not leave; whoever prepares it says so.
        self.in_training: Callable[[], bool] = lambda: False
        if self.read_only:
            model.requires_grad_(False)
            setup = setup.for_reading()
        self._blueprint = Blueprint.of(model, setup)
        self.overlapped = self._blueprint.overlapped
        gc.collect()  # an engine that was dropped lies in a reference cycle, its memory still mapped
        self._refusal: PlanError | None = None
        self._said: list[str] = []
        self._planned = self._make_plan(model, setup, decisions, for_training and not self.read_only)
        self.plan = self._planned.evaluating()
        use_expandable_segments(self.device)
        self.metrics = metrics = Metrics()
        metrics.tracing = self.config.trace_steps > 0
        self._runtime = runtime = Runtime(
            self.device,
            pinned_bytes=find_budgets(setup).pinned,
            threads=self.config.cpu_threads or default_update_threads(self.device),
            metrics=metrics,
            delays=delays,
        )
        # From here on: what fails below must leave no thread and no file either.
        self._finalizer = weakref.finalize(self, runtime.close)
        try:
            self._make_parts(model, runtime)
        except BaseException:
            self._finalizer()
            raise

    # -- construction ----------------------------------------------------------------------------------------

    def _make_plan(
        self, model: nn.Module, setup: Setup, decisions: Decisions | None, for_training: bool
    ) -> Planned:
        try:  # also where only evaluation is asked for now: training may follow
            return plan_for(model, self._blueprint, setup, training=not setup.read_only, decisions=decisions)
        except PlanError as error:
            if for_training:
                raise
            self._refusal = error
            return plan_for(model, self._blueprint, setup, training=False)

    def _make_parts(self, model: nn.Module, runtime: Runtime) -> None:
        blueprint, decisions = self._blueprint, self.plan.decisions
        self._placed = placed = PlacedModel(
            model, blueprint, decisions, self._planned.input_bytes, self.config.nvme_dirs, runtime
        )
        self.states = placed.states
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # weights that were there before left gaps of other sizes
        layouts = blueprint.streamed_layouts(decisions)
        slot_bytes = max((layout.weight_bytes for layout in layouts), default=0)
        self.pool = SlotPool(runtime, slot_bytes, decisions.slots)
        self.gradients: Gradients | None = None
        self.executor = Executor(self.device, placed.units, self.pool, TensorOffload(runtime), self)
        self._methods: list[ReplacedMethod] = []
        for unit in placed.units:
            forward = UnitForward(self.executor, unit)
            forward.put("forward")
            self._methods.append(forward)
        self.clipping = Clipping(self.states, self.device, overlapped=self.overlapped)
        self._updates = Updates(placed, blueprint.rule, runtime, self.executor.tape, self.clipping)
        self._access = StateAccess(placed, self._updates, self.pool)
        # Resident parameters whose gradient became an fp32 sum, for a second backward that nobody had announced.
        self._promoted: list[ParamState] = []
        self._in_units = {id(param) for unit in placed.units for param in unit.found.parameters.values()}
        self._logits_readers: set[str] = set()
        self._watch(model)
        self._names = _names(model)
        # Until there is an optimizer: nothing else would notice that gradients of resident parameters have no place.
        self._gradient_hooks: list[RemovableHandle] = []
        self._runtime.when_closed(first=functools.partial(_remove_all, self._gradient_hooks))
        self._hook_gradients(SlideEngine._refuse_backward)

    def _watch(self, model: nn.Module) -> None:
        """Notice what the model's own code and scripts do to it."""
        head = self._blueprint.head.module
        if head is not None:
            self._methods.append(defer_logits(head, self._fused_loss_ran, self._logits_read))
        self._access.watch(model)
        self._methods += watch_leaving(model, self)
        units = self.executor.units
        self._checkpointing = LayerCheckpointing(unit.found.module for unit in units)
        self._hooks = [
            module.register_forward_pre_hook(Hook(self, SlideEngine._recompute_once))
            for module in callers_of(model, [unit.name for unit in units])
        ]

    def _hook_gradients(self, run: Callable[..., None], *, knows_state: bool = False) -> None:
        """Have `run` called before autograd fills the gradient of a parameter, or adds to it."""
        for state in self._placed.computing:
            if state.param.requires_grad:
                call = functools.partial(run, state=state) if knows_state else run
                self._gradient_hooks.append(state.param.register_hook(Hook(self, call)))

    def _recompute_once(self, *_: object) -> None:
        self._checkpointing.switch_off()

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

    def attach_optimizer(self, optimizer: SlideOptimizer) -> None:
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
        self._check_rule(optimizer)
        self._updates.find_groups(optimizer)  # raises before anything is changed
        first = self._updates.optimizer is None
        if not first:
            self._access.forget_moments()
        self._placed.allocate_for_training()
        if first:
            _remove_all(self._gradient_hooks)
            self._hook_gradients(SlideEngine._before_sum, knows_state=True)
            self._update_residents_in_backward()
        self._updates.use(optimizer)
        optimizer.bind(self)
        self._optimizers.add(optimizer)
        self.plan = self._plan_with_notes()
        self.gradients = self.clipping.gradients = self._make_gradients()

    def _check_rule(self, optimizer: SlideOptimizer) -> None:
        """Raise `StateError` where the model was prepared for an optimizer of another rule."""
        rule = optimizer.rule_for(optimizer.param_groups, self.config.optimizer_states)
        other = self.setup.difference(dataclasses.replace(self.setup, rule=rule))
        if other:
            raise StateError(f"{other}; prepare the model together with its optimizer")

    def _plan_with_notes(self) -> Plan:
        return dataclasses.replace(self._planned.plan, notes=(*self._planned.plan.notes, *self._said))

    def _make_gradients(self) -> Gradients:
        layouts = self._blueprint.streamed_layouts(self.plan.decisions)
        largest = max((layout.grad_bytes for layout in layouts), default=0)
        # Without accumulation sums are rare (a layer used twice, a second backward): then one buffer serves,
        # and is made only when the first sum needs it.
        count = self.plan.decisions.staging_buffers
        if self.gradients is None:
            self._staging_pin = self._runtime.pins.take(count * largest)
        staging = StagingBuffers(largest, max(1, count), pin=self._staging_pin)
        return Gradients(
            self._runtime,
            self._updates,
            self.pool,
            self.executor.offload,
            staging,
            fp32_sums=self._blueprint.fp32_sums,
        )

    # -- sink of the executor ----------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """See `GradientSink`."""
        with unguarded(state.param for state in self._placed.computing):
            for state in self._placed.computing:
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
        can_wait = self.config.update == "auto" and all(
            group.home.gradients_can_wait for group in self._placed.groups
        )
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
        self.plan = self._plan_with_notes()
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
        self._placed.group_of(state).home.before_sum(state)
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
            for param in [p for p in unit.shared if id(p) in self._in_units]:
                hook = Hook(self, SlideEngine._use_up_gradient)
                self._gradient_hooks.append(param.register_post_accumulate_grad_hook(hook))

    def _use_up_gradient(self, param: nn.Parameter) -> None:
        state, grad = self.param_state(param), param.grad
        if not self.overlapped:  # any more
            return
        if grad is not None and self._updates.use_up(state, grad):
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

    @property
    def rule(self) -> UpdateRule:
        """See `OptimizerBackend`."""
        return self.setup.update_rule

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
                self._runtime.failure.note(error)  # some parameters are a step ahead of the others
            raise
        self.clipping.clear()
        self.gradients.forget_norms()
        self.executor.tape.restart()
        for unit in self.executor.units:
            unit.begin_step()
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
        self._runtime.failure.check()

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
        self._runtime.drain()
        self.pool.reset()
        self._access.forget_runs()
        for state in self.states:
            state.param.grad = None
        self.clipping.clear()
        self.executor.tape.recorded.clear()
        for unit in self.executor.units:
            unit.begin_step()
        self.check()

    def _abandon(self) -> None:
        """Forget what is on its way between device and RAM."""
        if self.gradients is not None:
            self.gradients.abandon()
        self.executor.offload.abandon()
        self.executor.drop_inputs()

    def states_by_unit(self) -> list[list[ParamState]]:
        """The states of each unit, streamed or resident, and last those outside of units; in the model's order."""
        return [group.states for group in self._placed.groups]

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

    def check_setup(self, wanted: Setup) -> None:
        """Raise `StateError` if the model was prepared for something else."""
        other = self.setup.difference(wanted)
        if other:
            raise StateError(
                f"{other}; release() the model, and prepare it again, for other settings (precision, clipping, "
                "accumulation, optimizer, slide_config)"
            )

    @property
    def host_state_bytes(self) -> int:
        """Bytes of host buffers for state and offloaded activations allocated now."""
        return self._placed.host_bytes + self.executor.offload.host_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of state on disk."""
        return self._placed.disk_bytes

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
        _remove_all(self._gradient_hooks)
        try:
            self._access.give_up()
        except BaseException as error:
            self._runtime.failure.note(error)
            raise StateError(
                f"{reason}, for which the model has to leave its engine, but that failed ({error}); load the model anew"
            ) from error
        self._left = reason
        _remove_all(self._methods)
        _remove_all(self._hooks)
        for optimizer in self._optimizers:
            optimizer.unbind(f"its model left the engine: {reason}")
        self._finalizer()
        self._placed.forget_disk()
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


def _with_index(setup: Setup) -> Setup:
    """The same with the number of the CUDA device that is the current one, where none is named."""
    if setup.device.type != "cuda" or setup.device.index is not None:
        return setup
    return dataclasses.replace(setup, device=torch.device("cuda", torch.cuda.current_device()))


def _remove_all(put: list[Any]) -> None:
    """Take away hooks and methods that were put on the model."""
    while put:
        put.pop().remove()


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
