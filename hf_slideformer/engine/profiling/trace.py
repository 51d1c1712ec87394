"""Profile of a model from its own code, without running it.

A copy of the model without data (`fakes.py`) runs one forward and backward while allocations and work are counted
(`allocations.py`). One unit of each kind is run as the engine runs units: forward with a graph but no activations, then
in backward a recompute that stops early, and autograd over that unit alone. The other units of that kind hand on
tensors of the right shapes, so that depth costs nothing.

Where a model's code cannot run without data (it looks at values of tensors, or calls kernels that torch knows nothing
of), the profile is estimated from the shapes of its parameters instead (`estimate.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from transformers.utils import is_liger_kernel_available

from ...planner.profile import ModelProfile, UnitProfile
from ..model.head import find_head, output_embeddings
from ..model.units import UnitModule, find_units, param_spec
from ..run.arguments import flatten, without_caches
from ..run.deferred_logits import defer_logits
from ..run.recompute import SavedActivations
from ..run.recorders import captured, captured_lengths
from .allocations import AllocationTracker, block_bytes
from .estimate import estimate_profile
from .fakes import (
    cuda_workspace_bytes,
    fake_copy,
    liger_applied,
    on_fake_tensors,
)

logger = logging.getLogger(__name__)

# Models whose Python code loops over tokens would take minutes.
_MOST_SECONDS = 15.0

# Attributes in which layers of one kind differ.
_INDEX_NAMES = ("idx", "index", "layer_id", "layer_number", "block_number")
# TRL's argument of a forward that computes the loss without all logits.
_TRL_HEAD = "fused_lm_head"
# Models whose loss wants one label for a sample.
_ONE_LABEL = ("SequenceClassification", "ImageClassification", "MultipleChoice")


def profile_model(
    model: nn.Module,
    *,
    batch_size: int,
    seq_len: int,
    bf16: bool,
    fused_loss: bool,
    device_type: str,
    liger: Mapping[str, Any] | None = None,
) -> ModelProfile:
    """What `model` needs for one micro-batch, and what it computes.

    Sequences are taken as full (no padding) and each as one sequence (not packed); no layer is dropped at random.

    Args:
        model: a transformers model, with weights anywhere or without data (meta device, `FakeTensorMode`), not yet
            given to an engine. It is not changed, and nothing is computed on its data.
        batch_size: sequences of a micro-batch.
        seq_len: tokens of a sequence.
        bf16: mixed precision, as for `SlideEngine`: fp32 weights compute in bf16, under autocast.
        fused_loss: head and cross-entropy run fused where the engine can do that (`SlideConfig.loss`).
        device_type: "cuda" for what a GPU would allocate, on whatever machine this is; "cpu" for this CPU.
        liger: what Trainer hands to Liger Kernel (`liger_kernel_config`), if it is yet to be applied to the model.

    Returns:
        The profile; `source` is "estimated" and `notes` has the reason where the code could not run without data.

    Raises:
        UnsupportedModelError: the model has no units, or weights that cannot be streamed.
    """
    units = find_units(model)
    dtypes = {
        id(param): param_spec(model, name, param, bf16=bf16).dtype for name, param in model.named_parameters()
    }
    if liger is not None and not is_liger_kernel_available():
        liger = None  # training will say so
    settings = _Settings(batch_size, seq_len, bf16, fused_loss, device_type, liger)
    try:
        return _traced(model, dtypes, settings)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.debug("the model's code could not run without data", exc_info=True)
        return estimate_profile(
            model,
            units,
            dtypes,
            batch_size=batch_size,
            seq_len=seq_len,
            fused_loss=fused_loss,
            reason=reason[:200],
        )


@dataclass(frozen=True, slots=True)
class _Settings:
    batch_size: int
    seq_len: int
    bf16: bool
    fused_loss: bool
    device_type: str
    liger: Mapping[str, Any] | None


# -- tracing -------------------------------------------------------------------------------------------------------


def _traced(model: nn.Module, dtypes: dict[int, torch.dtype], settings: _Settings) -> ModelProfile:
    cuda = settings.device_type != "cpu"
    for _ in range(2):
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        copied = fake_copy(model, fakes, dtypes)
        tracker = AllocationTracker(cuda_workspace_bytes if cuda else None, seconds=_MOST_SECONDS)
        with (
            liger_applied(copied, settings.liger),
            fakes,
            tracker,
            on_fake_tensors(tracker, cuda=cuda) as ambient,
        ):
            profile = _run(copied, tracker, settings, ambient)
        if tracker.live == tracker.nbytes(param.grad for param in copied.parameters()):
            break
        # Something kept tensors alive: an import that failed in the first use of a kernel, say, keeps the frames of all
        # its callers in its traceback. That does not happen twice.
    return profile


def _run(
    model: nn.Module,
    tracker: AllocationTracker,
    settings: _Settings,
    ambient: contextlib.AbstractContextManager,
) -> ModelProfile:
    """Run `model` once, forward and backward, with its units replaced, and read `tracker`, which is active.

    `ambient` is active too; autograd's backward leaves it, so units enter it again. `model` is left with its units
    replaced and with gradients.
    """
    recorder = _Recorder(model, tracker, ambient)
    for index, unit in enumerate(recorder.units):
        unit.module.forward = _TracedForward(recorder, index, unit)
    head = find_head(model, mode="fused" if settings.fused_loss else "model", on_gpu=True)
    if head.module is not None:
        defer_logits(head.module, lambda tokens: None, lambda reader: None)
    with torch.inference_mode(False), torch.enable_grad():
        loss = _run_forward(model, settings)
        loss.backward()
    del loss
    recorder.anchor = None
    return recorder.profile(settings)


def _run_forward(model: nn.Module, settings: _Settings) -> torch.Tensor:
    """The loss; nothing but it and its graph stays alive."""
    inputs = _inputs(model, settings)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.bf16):
        outputs = model(**inputs)
    if settings.bf16:  # as Accelerate does around a model's forward
        outputs = convert_to_fp32(outputs)
    loss = outputs["loss"] if isinstance(outputs, dict) and outputs.get("loss") is not None else None
    if loss is None:
        first = next(x for x in pytree.tree_leaves(dict(outputs)) if isinstance(x, torch.Tensor))
        loss = first.float().mean()
    return loss


def _inputs(model: nn.Module, settings: _Settings) -> dict[str, Any]:
    """Arguments of the model's forward.

    Raises:
        NotImplementedError: its main input is of a kind that is not known here.
    """
    wrapped: Any = getattr(model, "get_base_model", lambda: model)  # a PeftModel hands on what it is given
    base: Any = wrapped()
    names = inspect.signature(base.forward).parameters
    main = getattr(base, "main_input_name", "input_ids")
    batch, seq = settings.batch_size, settings.seq_len
    inputs: dict[str, Any] = {main: _main_input(main, base.config, batch, seq)}
    if "labels" in names:
        is_whole = any(name in type(base).__name__ for name in _ONE_LABEL)
        inputs["labels"] = torch.zeros((batch,) if is_whole else (batch, seq), dtype=torch.int64)
    if "use_cache" in names:
        inputs["use_cache"] = False
    if any(map(_has_trl_head, model.modules())):
        inputs[_TRL_HEAD] = True
    return inputs


def _has_trl_head(module: nn.Module) -> bool:
    """Whether TRL's trainers have put their head into a model's `forward`, which wraps that of the class.

    Without being asked for its own loss it would call the `forward` that it found, which is that of the original even
    in a copy.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and _TRL_HEAD in inspect.signature(forward, follow_wrapped=False).parameters


def _main_input(name: str, config: Any, batch: int, seq: int) -> torch.Tensor:
    if name == "input_ids":
        return torch.zeros((batch, seq), dtype=torch.int64)
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        return torch.zeros(batch, config.num_channels, config.image_size, config.image_size)
    if name == "input_features" and hasattr(
        config, "max_source_positions"
    ):  # before a convolution of stride 2
        return torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions)
    if name == "input_values":
        return torch.zeros(batch, seq)
    raise NotImplementedError(f"its main input is {name}, of which no shape is known")


@dataclass(slots=True, eq=False)
class _Kind:
    """What units of one kind share: the figures of the one that was run, and the shapes of what it returned."""

    outputs: list[tuple[torch.Size, torch.dtype, bool]] = field(default_factory=list)
    # For each output: which of the inputs it is, or None.
    aliases: list[int | None] = field(default_factory=list)
    flat: list[Any] = field(default_factory=list)
    spec: pytree.TreeSpec | None = None
    profile: UnitProfile = UnitProfile(0, 0, 0, 0, 0.0, 0.0, 0.0)


class _Recorder:
    """Figures of all units of one run, and the marks between units and loss."""

    def __init__(
        self,
        model: nn.Module,
        tracker: AllocationTracker,
        ambient: contextlib.AbstractContextManager,
    ) -> None:
        self.model = model
        self.units = units = find_units(model)
        self.tracker = tracker
        self.ambient = ambient
        self.kinds: dict[tuple, _Kind] = {}
        # For each unit: kind and inputs (bytes by storage) of each of its runs that autograd is to differentiate.
        self.runs: list[list[tuple[_Kind, dict[int, int]]]] = [[] for _ in units]
        self.held_bytes = 0
        self.loss_peak: int | None = None
        self.loss_grad_bytes = 0
        self.flops = self.traffic = 0.0
        # Gives units an input that requires grad where the embedding is frozen.
        self.anchor: torch.Tensor | None = torch.zeros((), requires_grad=True)

    def unit_ran_forward(self, outputs: list[torch.Tensor]) -> None:
        """Everything that comes until the next unit's forward may be the loss, the unit's outputs included."""
        inputs = {number for runs in self.runs for _, seen in runs for number in seen}
        new = {n: size for n, size in self.tracker.counted(outputs).items() if n not in inputs}
        self.held_bytes = self.tracker.live - sum(new.values())
        self.tracker.restart_peak()
        self.flops, self.traffic = self.tracker.flops, self.tracker.traffic

    def unit_begins_backward(self) -> None:
        """The first unit to do so ends the loss."""
        if self.loss_peak is None:
            self.loss_peak = self.tracker.peak
            self.loss_grad_bytes = _loss_grad_bytes(self.model, self.units)
            self.flops = self.tracker.flops - self.flops
            self.traffic = self.tracker.traffic - self.traffic

    def profile(self, settings: _Settings) -> ModelProfile:
        """The figures of the whole run."""
        if self.loss_peak is None:
            raise NotImplementedError("the loss does not reach its layers")
        users: dict[int, int] = {}
        for runs in self.runs:
            for _, inputs in runs:
                for number in inputs:
                    users[number] = users.get(number, 0) + 1
        profiles = []
        for runs in self.runs:
            boundary = sum(n for _, inputs in runs for number, n in inputs.items() if users[number] == 1)
            profiles.append(_sum_of_runs([kind.profile for kind, _ in runs], boundary))
        boundaries = sum(unit.boundary_bytes for unit in profiles)
        return ModelProfile(
            batch_size=settings.batch_size,
            seq_len=settings.seq_len,
            units=tuple(profiles),
            held_bytes=self.held_bytes - boundaries,
            loss_bytes=max(0, self.loss_peak - self.held_bytes - self.loss_grad_bytes),
            loss_flops=self.flops,
            loss_traffic=self.traffic,
        )


def _sum_of_runs(runs: list[UnitProfile], boundary_bytes: int) -> UnitProfile:
    """A unit that runs more than once in a forward (shared layers) keeps and computes all of it."""
    flops = sum(run.forward_flops for run in runs)
    return UnitProfile(
        boundary_bytes=boundary_bytes,
        saved_bytes=sum(run.saved_bytes for run in runs),
        forward_bytes=max((run.forward_bytes for run in runs), default=0),
        backward_bytes=max((run.backward_bytes for run in runs), default=0),
        forward_flops=flops,
        forward_traffic=sum(run.forward_traffic for run in runs),
        recompute_share=sum(run.recompute_share * run.forward_flops for run in runs) / flops
        if flops
        else 0.0,
        attention_flops=sum(run.attention_flops for run in runs),
    )


def _loss_grad_bytes(model: nn.Module, units: list[UnitModule]) -> int:
    """Bytes of the gradients, in their final dtypes, that parameters outside of units have got from the loss."""
    in_units = {id(param) for unit in units for param in unit.parameters.values()}
    head = output_embeddings(model)
    # A tied weight's gradient waits in autograd for the embedding's.
    last = {id(param) for param in head.parameters() if param.requires_grad} if head is not None else set()
    return sum(
        block_bytes(param.nbytes)
        for param in model.parameters()
        if id(param) not in in_units and (param.grad is not None or id(param) in last)
    )


class _TracedForward:
    """Stands in for a unit's `forward`: runs it if it is the first of its kind, else hands on what such a one does."""

    def __init__(self, recorder: _Recorder, index: int, unit: UnitModule) -> None:
        self.recorder = recorder
        self.index = index
        self.unit = unit
        self.original = unit.module.forward
        self.__signature__ = inspect.signature(self.original)
        self._names = tuple(self.__signature__.parameters)
        own = {id(param) for param in unit.parameters.values()}
        self.shared = [p for p in unit.module.parameters() if p.requires_grad and id(p) not in own]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder, tracker = self.recorder, self.recorder.tracker
        args, kwargs = without_caches(self.unit.module, self._names, args, kwargs)
        flat, spec = flatten(args, kwargs)
        tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        trainable = [param for param in self.unit.parameters.values() if param.requires_grad]
        key = (_kind_of(self.unit), spec, tuple(_leaf_kind(leaf) for leaf in flat))
        is_new = key not in recorder.kinds
        kind = recorder.kinds.setdefault(key, _Kind())
        run_type = _FirstRun if is_new else _FurtherRun
        differentiated = trainable or any(tensor.requires_grad for tensor in (*tensors, *self.shared))
        run = run_type(recorder, kind, self, flat, spec, trainable)
        if differentiated:
            inputs = tracker.counted(tensors)
            outputs = _UnitFunction.apply(run, recorder.anchor, *tensors, *self.shared)
        else:  # the engine runs it without a graph, and nothing of it is kept
            inputs = {}
            with torch.no_grad():
                outputs = run.forward(tuple(tensors))
        recorder.runs[self.index].append((kind, inputs))
        recorder.unit_ran_forward(list(outputs))
        remaining = iter(outputs)
        assert kind.spec is not None
        return pytree.tree_unflatten(
            [next(remaining) if leaf is _TENSOR else leaf for leaf in kind.flat], kind.spec
        )


_TENSOR = object()  # stands for a tensor in a flattened structure


class _UnitFunction(torch.autograd.Function):
    """The seam between the model's graph and a unit's own, as in the executor."""

    @staticmethod
    def forward(ctx, run, anchor, *tensors):
        ctx.run = run
        ctx.set_materialize_grads(False)
        outputs = run.forward(tensors)
        ctx.mark_non_differentiable(
            *(x for x, (_, _, grad) in zip(outputs, run.kind.outputs, strict=True) if not grad)
        )
        ctx.save_for_backward(*tensors)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        ctx.run.recorder.unit_begins_backward()
        return None, None, *ctx.run.backward(grads)


class _FirstRun:
    """Runs a unit forward and backward as the engine does, and notes what that takes."""

    def __init__(
        self,
        recorder: _Recorder,
        kind: _Kind,
        unit: _TracedForward,
        flat: list[Any],
        spec: pytree.TreeSpec,
        trainable: list[nn.Parameter],
    ) -> None:
        self.recorder = recorder
        self.kind = kind
        self._original = unit.original
        self._shared = unit.shared
        self._flat = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        self._spec = spec
        self._trainable = trainable
        self._saved = SavedActivations(unit.unit.name)
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []
        self._autocast = False

    def _run(self) -> Any:
        tensors = iter(self._inputs)
        flat = [next(tensors) if leaf is _TENSOR else leaf for leaf in self._flat]
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        return self._original(*args, **kwargs)

    def forward(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Outputs without the graph, which is kept here."""
        own = tensors[: len(tensors) - len(self._shared)] if self._shared else tensors
        self._inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in own]
        with_graph = any(x.requires_grad for x in (*self._inputs, *self._trainable, *self._shared))
        tracker, kind = self.recorder.tracker, self.kind
        tracker.restart_peak()
        before = (tracker.live, tracker.flops, tracker.traffic, tracker.attention_flops)
        recorded = captured_lengths()
        self._autocast = torch.is_autocast_enabled("cpu")
        with torch.set_grad_enabled(with_graph), _uncached_autocast(self._autocast), self._saved.recording():
            output = self._run()
        _detach_captured(recorded)
        flat, kind.spec = pytree.tree_flatten(output)
        self._outputs = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        kind.flat = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        kind.outputs = [(x.shape, x.dtype, x.requires_grad) for x in self._outputs]
        kind.aliases = [_position_of(x, self._inputs) for x in self._outputs]
        kind.profile = replace(
            kind.profile,
            forward_bytes=tracker.peak - before[0],
            forward_flops=tracker.flops - before[1],
            forward_traffic=tracker.traffic - before[2],
            attention_flops=tracker.attention_flops - before[3],
        )
        return tuple(output.data for output in self._outputs)

    def backward(self, grads: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """Gradients of the inputs and of parameters that the unit shares."""
        tracker, kind = self.recorder.tracker, self.kind
        tracker.restart_peak()
        base, flops = tracker.live - tracker.nbytes(grads), tracker.flops
        before = tracker.live
        with self.recorder.ambient, torch.enable_grad(), _uncached_autocast(self._autocast):
            self._saved.recompute(self._run)
        saved_bytes = tracker.live - before
        share = (tracker.flops - flops) / kind.profile.forward_flops if kind.profile.forward_flops else 0.0
        pairs = [
            (output, grad)
            for output, grad in zip(self._outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        given_back = [*self._inputs, *self._shared]
        wanted = [tensor for tensor in given_back if tensor.requires_grad]
        results: tuple[torch.Tensor | None, ...] = (None,) * (len(wanted) + len(self._trainable))
        if pairs:
            results = torch.autograd.grad(
                [output for output, _ in pairs],
                [*wanted, *self._trainable],
                [grad for _, grad in pairs],
                allow_unused=True,
            )
        # Gradients of parameters are counted as if all of them had been there from the start: so they are planned for.
        grad_bytes = tracker.nbytes(results[len(wanted) :])
        kind.profile = replace(
            kind.profile,
            saved_bytes=saved_bytes,
            backward_bytes=max(0, tracker.peak - base - saved_bytes - grad_bytes),
            recompute_share=share,
        )
        self._saved.clear()
        self._inputs, self._outputs = [], []
        given = iter(results)
        return [next(given) if tensor.requires_grad else None for tensor in given_back]


class _FurtherRun:
    """Hands on tensors of the shapes that the first unit of its kind returned."""

    def __init__(self, recorder: _Recorder, kind: _Kind, unit: _TracedForward, *_: Any) -> None:
        self.recorder = recorder
        self.kind = kind
        self._shapes: list[tuple[torch.Size, torch.dtype] | None] = []

    def forward(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """New tensors, or the inputs that the first unit returned."""
        self._shapes = [(x.shape, x.dtype) if x.requires_grad else None for x in tensors]
        return tuple(
            tensors[0].new_empty(shape, dtype=dtype) if alias is None else tensors[alias].data
            for (shape, dtype, _), alias in zip(self.kind.outputs, self.kind.aliases, strict=True)
        )

    def backward(self, grads: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """A gradient for every input that wants one."""
        first = next(grad for grad in grads if grad is not None)
        return [None if x is None else first.new_empty(x[0], dtype=x[1]) for x in self._shapes]


@contextlib.contextmanager
def _uncached_autocast(enabled: bool) -> Iterator[None]:
    """Autocast without its weight cache, as the executor runs units."""
    with torch.autocast("cpu", dtype=torch.get_autocast_dtype("cpu"), enabled=enabled, cache_enabled=False):
        yield


def _detach_captured(before: dict[str, int]) -> None:
    """Cut what recorders caught inside a unit (router logits) off the unit's own graph.

    The engine hands it on as further outputs; the little that its gradient takes is not counted.
    """
    for key, values in captured().items():
        start = before.get(key, 0)
        values[start:] = [x.detach() if isinstance(x, torch.Tensor) else x for x in values[start:]]


def _position_of(tensor: torch.Tensor, inputs: list[torch.Tensor]) -> int | None:
    for position, other in enumerate(inputs):
        same = tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
        if same and tensor.shape == other.shape and tensor.dtype == other.dtype:
            return position
    return None


def _kind_of(unit: UnitModule) -> tuple:
    """Equal for units that run the same operators on the same shapes."""
    parts: list[Any] = []
    for name, module in unit.module.named_modules():
        settings = tuple(
            (key, bool(value) if isinstance(value, float) else value)
            for key, value in sorted(module.__dict__.items())
            if isinstance(value, (bool, int, float, str, type(None))) and not key.endswith(_INDEX_NAMES)
        )
        params = tuple(
            (key, param.shape, param.dtype, param.requires_grad)
            for key, param in module._parameters.items()
            if param is not None
        )
        parts.append((name, type(module), settings, params))
    return tuple(parts)


def _leaf_kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad)
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf)
