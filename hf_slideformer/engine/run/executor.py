"""Executor: runs one unit forward and backward with weights that are on the device only meanwhile.

Model code stays untouched: each unit's instance `forward` is replaced by a `UnitForward`. With autograd on it
hands the call to one autograd Function that

1. leases the unit's weights and runs the original forward, keeping its graph but none of its activations
   (`recompute.py`), with the next units already on their way;
2. in backward, leases the weights again, restores RNG and autocast state, recomputes, differentiates the unit
   alone, and hands the parameters' gradients to the engine.

A unit whose activations are kept skips the recompute; one whose inputs are offloaded has them in RAM meanwhile. A
resident unit's weights are where they belong, so there is nothing to lease; if its activations are kept as well, it
runs as if the engine were not there.

Everything between units is the model's own code under ordinary autograd, so any loss works.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from ...errors import StateError, UnsupportedModelError
from ...memory.limits import INPUTS_COMING
from ...memory.offload import OffloadedTensor, TensorOffload
from ...memory.pool import SlotLease, SlotPool
from ..model.stand_ins import ReplacedMethod
from ..model.units import check_no_hooks
from ..state.order import Tape, after_backward, after_forward
from ..state.unit import Unit, check_unchanged
from .arguments import containers_changed, flatten, without_caches
from .layer_state import LayerSnapshot, LayerState
from .leaks import check_no_leaks, guard_leaf
from .recompute import SavedActivations
from .recorders import captured, captured_lengths


class GradientSink(Protocol):
    """Takes a unit's gradients as soon as its backward has been issued."""

    def check(self) -> None:
        """Called at every use of a unit; raises if the engine cannot go on."""

    def begin_forward(self) -> None:
        """Called before the first unit runs forward since the last backward or step, with autograd on."""

    def runs_again(self, unit: Unit) -> None:
        """Called before a unit runs forward a second time since the last step, with autograd on."""

    def begin_unit(self, unit: Unit) -> None:
        """Called before a unit's backward is recomputed."""

    def push(self, unit: Unit, grads: list[torch.Tensor | None]) -> None:
        """Gradients of the unit's trainable parameters in layout order, on the device, ready on its stream."""


class Executor:
    """Runs units.

    Args:
        device: where units compute.
        units: all units in registration order.
        pool: the slots.
        offload: moves units' inputs to RAM and back.
        sink: receives gradients.
    """

    def __init__(
        self,
        device: torch.device,
        units: list[Unit],
        pool: SlotPool,
        offload: TensorOffload,
        sink: GradientSink,
    ) -> None:
        self.device = device
        self.units = units
        self.pool = pool
        self.offload = offload
        self._streamed = frozenset(unit.index for unit in units if unit.streams)
        self._layer_states = {unit.index: LayerState(unit.found.module) for unit in units}
        # Runs whose inputs are in RAM, in forward order; gone when their graph is.
        self._parked: list[weakref.ref[UnitCall]] = []
        self.sink = sink
        # While a unit is differentiated alone, which calls hooks on resident parameters too, once more than autograd's
        # own run does when it fills their gradients.
        self.in_unit = False
        self.tape = Tape(tuple(unit.index for unit in units))
        # Gives the Function an input that requires grad where the embedding is frozen.
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def prefetch_first(self) -> None:
        """Start fetching the units that the next forward needs first."""
        first = tuple(index for index in self.tape.expected if index in self._streamed)[: self.pool.depth]
        for index in first:
            self.pool.prefetch(self.units[index], keep=first)

    def lease(self, unit: Unit, following: tuple[int, ...]) -> SlotLease:
        """Weights of `unit` on the device, the units `following` on their way."""
        self.sink.check()
        unit.drop_stale_copy(self.pool)
        lease = self.pool.acquire(unit)
        try:
            for index in following:
                self.pool.prefetch(self.units[index], keep=(unit.index, *following))
        except BaseException:
            lease.release()  # the caller does not have it yet
            raise
        return lease

    def _following(self, unit: Unit) -> tuple[int, ...]:
        return after_forward(self.tape.expected, unit.index, self.pool.depth, self._streamed)

    # -- forward ---------------------------------------------------------------------------------------------

    def forward(self, unit: Unit, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the unit's original forward returns for these arguments."""
        if not torch.is_grad_enabled():
            # What is trainable does not matter here: PEFT freezes adapters while they are disabled.
            return self._run_plain(unit, args, kwargs, check_trainable=False)
        args, kwargs = without_caches(unit.found.module, unit.argument_names, args, kwargs)
        leaves, spec = flatten(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not unit.trainable and not any(tensor.requires_grad for tensor in (*tensors, *unit.shared)):
            # Nothing to differentiate here, so nothing to recompute later.
            started = torch._C._autograd._get_sequence_nr()
            output = self._run_plain(unit, args, kwargs)
            check_no_leaks(unit.name, _edges(pytree.tree_leaves(output)), [], since=started)
            return output
        if not self.tape.recorded or unit.index == self.tape.expected[0]:
            self.sink.begin_forward()
        position = self.tape.record(unit.index)
        if unit.ran_forward() == 2:
            self.sink.runs_again(unit)
        keeps = unit.keeps_for(tensors)
        # What all layers share (an encoder's output) would get its gradients summed in another order than where units
        # stream, so such layers go the same way as those.
        if keeps and not unit.streams and sum(tensor.requires_grad for tensor in tensors) <= 1:
            self.lease(unit, self._following(unit))
            return unit.original_forward(*args, **kwargs)
        call = UnitCall(self, unit, leaves, spec, position, keeps)
        unit.open_calls.add(call)
        outputs = _UnitFunction.apply(call, self.anchor, *tensors, *unit.shared)
        return call.rebuild(outputs)

    def _run_plain(
        self, unit: Unit, args: tuple, kwargs: dict[str, Any], *, check_trainable: bool = True
    ) -> Any:
        lease = self.lease(unit, self._following(unit))
        try:
            with bound(unit, lease, check_trainable=check_trainable), Ambient.current(self.device).autocast():
                return unit.original_forward(*args, **kwargs)
        finally:
            lease.release()

    def run_forward(self, call: UnitCall, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Run a unit under autograd of its own and keep the graph in `call`; returns detached outputs."""
        unit = call.unit
        call.inputs = [_as_leaf(tensor) for tensor in tensors[: len(tensors) - len(unit.shared)]]
        call.written = unit.written()
        snapshot = None if call.keeps else self._layer_states[unit.index].before()
        call.ambient = Ambient.current(self.device)
        before = captured_lengths()
        started = torch._C._autograd._get_sequence_nr()
        lease = self.lease(unit, self._following(unit))
        saving = call.saved.keeping(lease.buffer) if call.keeps else call.saved.recording()
        try:
            call.leaves = lease.leaves
            for leaf in call.leaves:
                guard_leaf(leaf)
            with bound(unit, lease), call.ambient.autocast(), torch.enable_grad(), saving:
                args, kwargs = call.arguments()
                output = unit.original_forward(*args, **kwargs)
        finally:
            lease.release()
        if containers_changed(call.leaves_in_place(), call.spec, args, kwargs, call.arguments):
            raise UnsupportedModelError(
                f"{unit.name} adds to a dictionary or list among its arguments, or changes what is in it, which "
                "streaming would not hand on; use plain Trainer for this model"
            )
        if snapshot is not None:
            snapshot.keep_changes()
            call.snapshot = snapshot
        outputs = call.keep_outputs(output, before)
        check_no_leaks(unit.name, call.edges, [*call.inputs, *call.leaves, *unit.shared], since=started)
        if unit.offloads and not call.keeps:
            self._park(call)
        return outputs

    def _park(self, call: UnitCall) -> None:
        """Move the hidden states that the unit will be recomputed from to RAM or disk.

        They are the first input with a gradient, by convention; others (an encoder's output) are shared by all layers.
        """
        for position, leaf in enumerate(call.inputs):
            if not leaf.requires_grad:
                continue
            if leaf.is_contiguous() and leaf.numel() > 0:
                place = call.unit.place_for(leaf)
                call.parked[position] = parked = self.offload.store(call.unit.name, leaf, into=place)
                if place is not None:
                    call.unit.wait_in_place(parked)
                leaf.data = leaf.new_empty(0)
                self._parked = [ref for ref in self._parked if ref() is not None]
                self._parked.append(weakref.ref(call))
            break

    def _fetch_inputs(self) -> None:
        """Start bringing back the inputs that backward needs next."""
        if not self._parked:
            return
        self.offload.settle()
        self._parked = [ref for ref in self._parked if (call := ref()) is not None and call.parked]
        for ref in self._parked[-INPUTS_COMING:][::-1]:
            call = ref()
            for parked in call.parked.values() if call is not None else ():
                self.offload.fetch(parked)

    @contextlib.contextmanager
    def _differentiating(self) -> Iterator[None]:
        self.in_unit = True
        try:
            yield
        finally:
            self.in_unit = False

    def _unpark(self, call: UnitCall) -> None:
        for position, parked in call.parked.items():
            call.inputs[position].data = self.offload.take(parked)
        call.parked = {}
        self._fetch_inputs()

    def drop_inputs(self) -> None:
        """Let go of inputs in RAM whose backward will not come; a traceback may hold their graph for long."""
        for ref in self._parked:
            if (call := ref()) is not None:
                call.inputs, call.parked, call.dropped = [], {}, True
        self._parked = []

    # -- backward --------------------------------------------------------------------------------------------

    def run_backward(
        self, call: UnitCall, grads: tuple[torch.Tensor | None, ...], *, with_params: bool
    ) -> list[torch.Tensor | None]:
        """Differentiate a unit.

        Parameter gradients go to the sink, unless autograd was asked for gradients of other tensors only; gradients
        of the inputs and of shared parameters are returned.
        """
        unit = call.unit
        if unit.written() != call.written:
            raise StateError(
                f"the weights of {unit.name} changed between its forward and its backward (a step, or a write to a "
                "parameter), so the gradient would be that of neither; run forward again after the change"
            )
        if with_params:
            self.sink.begin_unit(unit)
        call.saved.check_unspent()  # before its inputs, which are gone after one backward, are looked for
        if call.dropped:
            raise StateError(
                f"the inputs of {unit.name} were let go of when training was interrupted; run forward again"
            )
        self._fetch_inputs()  # before weights, which would be in front of them on the way
        following = after_backward(self.tape.recorded, call.position, self.pool.depth, self._streamed)
        lease = self.lease(unit, following)
        try:
            with bound(unit, lease):
                if call.keeps:
                    call.saved.restore(lease.buffer)
                else:
                    self._unpark(call)
                    self._recompute(call)
                # Still bound: a layer that checkpoints a part of itself runs that part again in here.
                input_grads, leaf_grads = self._differentiate(call, grads, with_params=with_params)
        finally:
            call.saved.clear()
            lease.release()
        unit.open_calls.discard(call)
        if unit.trainable and with_params:
            self.sink.push(unit, leaf_grads)
        call.free()
        return input_grads

    @staticmethod
    def _recompute(call: UnitCall) -> None:
        args, kwargs = call.arguments()
        assert call.snapshot is not None, "made in every forward that is recomputed"
        with call.ambient.restored(), call.snapshot.restored(), torch.enable_grad():
            call.saved.recompute(lambda: call.unit.original_forward(*args, **kwargs))

    def _differentiate(
        self, call: UnitCall, grads: tuple[torch.Tensor | None, ...], *, with_params: bool
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Gradients of a unit's inputs and shared parameters, and of its trainable leaves."""
        pairs = [
            (edge, grad)
            for edge, grad in zip(call.edges, grads, strict=True)
            if grad is not None and edge is not None
        ]
        given_back = [*call.inputs, *call.unit.shared]
        inputs = [tensor for tensor in given_back if tensor.requires_grad]
        leaves = [leaf for leaf in call.leaves if leaf.requires_grad and with_params]
        results: tuple[torch.Tensor | None, ...] = (None,) * (len(inputs) + len(leaves))
        if pairs:
            with self._differentiating():
                results = torch.autograd.grad(
                    [edge for edge, _ in pairs],
                    [*inputs, *leaves],
                    [grad for _, grad in pairs],
                    allow_unused=True,
                )
        given = iter(results)
        input_grads = [next(given) if tensor.requires_grad else None for tensor in given_back]
        return input_grads, list(given)


@dataclass(slots=True, eq=False, weakref_slot=True)
class UnitCall:
    """One call of a unit under autograd: what its backward needs."""

    executor: Executor
    unit: Unit
    flat: list[Any]
    spec: pytree.TreeSpec
    position: int
    keeps: bool
    parked: dict[int, OffloadedTensor] = field(default_factory=dict)
    dropped: bool = False
    inputs: list[torch.Tensor] = field(default_factory=list)
    leaves: list[torch.nn.Parameter] = field(default_factory=list)
    # Where the unit's own graph ends, None for outputs without a gradient. Not the outputs themselves: one of them is
    # the next unit's input, which may be in RAM meanwhile.
    edges: list[GradientEdge | None] = field(default_factory=list)
    output_flat: list[Any] = field(default_factory=list)
    output_spec: pytree.TreeSpec | None = None
    captured: list[tuple[list, int]] = field(default_factory=list)
    snapshot: LayerSnapshot | None = None
    written: tuple[int, int] = (0, 0)
    ambient: Ambient = None  # type: ignore[assignment] # set before the unit runs
    saved: SavedActivations = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.saved = SavedActivations(self.unit.name)
        # Only the structure is kept here; the tensors are the Function's.
        self.flat = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in self.flat]

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """`args` and `kwargs` of the original call over the unit's own leaf tensors."""
        return pytree.tree_unflatten(self.leaves_in_place(), self.spec)

    def leaves_in_place(self) -> list[Any]:
        """The leaves of the original call's arguments, with the unit's own leaf tensors among them."""
        tensors = iter(self.inputs)
        return [next(tensors) if leaf is _TENSOR else leaf for leaf in self.flat]

    def keep_outputs(self, output: Any, before: dict[str, int]) -> tuple[torch.Tensor, ...]:
        """Remember the graph of the unit's outputs and of what output recorders caught inside it.

        transformers collects router logits through hooks on modules inside the layer. What it caught belongs to
        the unit's own graph, so the auxiliary loss would not reach the weights through it; it is returned as
        extra outputs of the Function and put back in place by `rebuild`.
        """
        self.output_flat, self.output_spec = pytree.tree_flatten(output)
        tensors = [leaf for leaf in self.output_flat if isinstance(leaf, torch.Tensor)]
        collected = captured()
        for key, start in before.items():
            values = collected.get(key, [])
            for position in range(start, len(values)):
                if isinstance(values[position], torch.Tensor) and values[position].requires_grad:
                    self.captured.append((values, position))
                    tensors.append(values[position])
        self.edges = _edges(tensors)
        self.output_flat = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in self.output_flat]
        # `.data` rather than detach(): a view of the inner graph's tensor could not be changed in place outside.
        return tuple(tensor.data for tensor in tensors)

    def rebuild(self, outputs: tuple[torch.Tensor, ...]) -> Any:
        """The unit's return value over the Function's outputs."""
        remaining = iter(outputs)
        flat = [next(remaining) if leaf is _TENSOR else leaf for leaf in self.output_flat]
        for values, position in self.captured:
            values[position] = next(remaining)
        self.captured = []
        assert self.output_spec is not None, "rebuild before the unit ran"
        return pytree.tree_unflatten(flat, self.output_spec)

    def free(self) -> None:
        """Let go of inputs and graph once backward is through."""
        self.inputs, self.edges, self.leaves, self.parked, self.snapshot = [], [], [], {}, None


class _UnitFunction(torch.autograd.Function):
    """The seam between the model's graph and a unit's own."""

    @staticmethod
    def forward(ctx, call: UnitCall, anchor: torch.Tensor, *tensors: torch.Tensor):
        ctx.call = call
        ctx.set_materialize_grads(False)
        outputs = call.executor.run_forward(call, tensors)
        ctx.mark_non_differentiable(
            *(out for out, edge in zip(outputs, call.edges, strict=True) if edge is None)
        )
        # Saved for autograd's check that nobody changed in place what backward needs: the unit's inputs, and those of
        # its outputs that its own graph keeps too.
        ctx.save_for_backward(
            *(t for position, t in enumerate(tensors) if position not in call.parked),
            *(out for out in outputs if call.saved.holds(out)),
        )
        return outputs

    @staticmethod
    def backward(ctx, *grads: torch.Tensor | None):
        call: UnitCall = ctx.call
        if torch.is_grad_enabled():
            raise StateError(
                "double backward (create_graph=True) through a streamed layer is not supported; use plain Trainer"
            )
        ctx.saved_tensors  # noqa: B018 - performs the in-place check
        # The anchor takes part in every backward() and in no autograd.grad(): only the former fills p.grad.
        with_params = torch._C._will_engine_execute_node(ctx.next_functions[0][0])
        return None, None, *call.executor.run_backward(call, grads, with_params=with_params)


def _edges(values: list[Any]) -> list[GradientEdge | None]:
    """Where the graph of each tensor ends, None for those without a gradient."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in tensors]


_TENSOR = object()  # stands for a tensor in a flattened structure


def _as_leaf(tensor: torch.Tensor) -> torch.Tensor:
    leaf = tensor.detach().requires_grad_(tensor.requires_grad)
    guard_leaf(leaf)
    return leaf


@dataclass(frozen=True, slots=True)
class Ambient:
    """The state around a call that changes numbers: random generators and autocast."""

    device: torch.device
    cpu_rng: torch.Tensor
    device_rng: torch.Tensor | None
    autocast_enabled: bool
    autocast_dtype: torch.dtype

    @classmethod
    def current(cls, device: torch.device) -> Ambient:
        """Read the state of the calling thread."""
        return cls(
            device,
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        """The recorded autocast mode, without its weight cache.

        The cache is keyed by tensor identity, and the same leaf holds another unit's weights a moment later.
        """
        return torch.autocast(
            self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_enabled, cache_enabled=False
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Random generators and autocast as recorded; the generators continue afterwards where they were."""
        now = Ambient.current(self.device)
        self._seed()
        try:
            with self.autocast():
                yield
        finally:
            now._seed()

    def _seed(self) -> None:
        torch.set_rng_state(self.cpu_rng)
        if self.device_rng is not None:
            torch.cuda.set_rng_state(self.device_rng, self.device)


@contextlib.contextmanager
def bound(unit: Unit, lease: SlotLease, *, check_trainable: bool = True) -> Iterator[None]:
    """Put the device leaves in the place of the unit's parameters in the module tree.

    The parameters themselves (host tensors that the optimizer and the user hold) are never touched.
    """
    for owners, state in zip(unit.owners, unit.states, strict=True):
        check_unchanged(state, check_trainable=check_trainable)
        for owner in owners:
            if owner.module._parameters.get(owner.key) is not state.param:
                raise StateError(
                    f"{state.name} was replaced by another parameter after the model was prepared; copy into the "
                    "one that is there: `with torch.no_grad(): p.copy_(values)`"
                )
        check_no_hooks(state.name, state.param)
    try:
        for owners, leaf in zip(unit.owners, lease.leaves, strict=True):
            for owner in owners:
                owner.module._parameters[owner.key] = leaf
        yield
    finally:
        for owners, state in zip(unit.owners, unit.states, strict=True):
            for owner in owners:
                owner.module._parameters[owner.key] = state.param


class UnitForward(ReplacedMethod):
    """Stands in for a layer's `forward`."""

    def __init__(self, executor: Executor, unit: Unit) -> None:
        super().__init__(unit.found.module, unit.original_forward)
        self.executor: Executor | None = executor
        self.unit: Unit | None = unit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.executor is None or self.unit is None:
            return self.original(*args, **kwargs)
        return self.executor.forward(self.unit, args, kwargs)

    def remove(self) -> None:
        """As for every `ReplacedMethod`; lets go of the engine."""
        super().remove()
        self.executor = self.unit = None
