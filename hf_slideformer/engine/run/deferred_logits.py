"""The loss seam: a model's head hands out logits that are computed only when somebody reads them.

Model code and `model.forward` stay untouched. The head's instance `forward` returns `DeferredLogits`, which know the
hidden states that they come from. What models do between head and loss (casts, views, shifts by one token, scaling,
soft-capping) is recorded; `torch.nn.functional.cross_entropy`, which every causal language model's loss ends in,
then runs as one fused product, loss and gradient (`slideformer_kernels.cross_entropy`) that never holds all logits.
Whatever else reads them (metrics, generation, another loss) gets the ordinary tensor, with its ordinary graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from slideformer_kernels.cross_entropy import linear_cross_entropy
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from ...errors import StateError
from ..model.head import FUSED_DTYPES
from ..model.stand_ins import ReplacedMethod


def defer_logits(
    head: nn.Linear, on_loss: Callable[[int], None], on_read: Callable[[str], None]
) -> HeadForward:
    """Make `head` hand out deferred logits, until what is returned is removed.

    Args:
        head: the output embeddings.
        on_loss: called with the number of tokens whenever a loss ran fused.
        on_read: called with the name of the function that needed all logits, where gradients are on.
    """
    forward = HeadForward(head, on_loss, on_read)
    forward.put("forward")
    return forward


class HeadForward(ReplacedMethod):
    """Stands in for the head's `forward`."""

    def __init__(
        self, head: nn.Linear, on_loss: Callable[[int], None], on_read: Callable[[str], None]
    ) -> None:
        super().__init__(head, head.forward)
        self._head = head
        self.on_loss = on_loss
        self.on_read = on_read

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # named as in nn.Linear
        if self.removed:
            return self.original(input)
        weight, bias = self._head.weight, self._head.bias
        operands = [input, weight] if bias is None else [input, weight, bias]
        device = input.device.type
        if torch.is_autocast_enabled(device):
            operands = [x.to(torch.get_autocast_dtype(device)) for x in operands]
        kinds = {(x.dtype, x.device) for x in operands}
        if len(kinds) > 1 or operands[0].dtype not in FUSED_DTYPES or isinstance(input, DeferredLogits):
            return self.original(input)  # torch's own error, if it is one
        watched = tuple((x, _version(x)) for x in (input, *self._head.parameters()))
        source = _Source(operands[1], operands[2] if bias is not None else None, self, watched)
        recipe = _Recipe(nn.functional.linear, tuple(operands), source, operands[0])
        return recipe.wrapped((*input.shape[:-1], weight.shape[0]), operands[0].dtype)


@dataclass(slots=True, eq=False)
class _Source:
    """The head as it was when the logits were made, shared by all tensors that come from these logits.

    `weight` and `bias` are what computes; `watched` are tensors with their versions then; `members` are the recipes
    that are still alive; `fused` says that a loss has run without logits.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    forward: HeadForward
    watched: tuple[tuple[torch.Tensor, int], ...]
    members: weakref.WeakSet[_Recipe] = field(default_factory=weakref.WeakSet)
    fused: bool = False

    def check_unchanged(self) -> None:
        """Raise `StateError` if the head was updated since: the logits would not be those of that forward."""
        if any(_version(tensor) != version for tensor, version in self.watched):
            raise StateError(
                "the logits of a forward are read after the head's weights changed (optimizer.step()) and were not "
                "computed before; read outputs.logits before the step, or set SlideConfig(loss='model')"
            )


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Recipe:
    """How to compute a tensor of logits, and what the fused loss has to know instead.

    `compute(*inputs)` gives the tensor; an input may be another deferred one, of which this is a view or a function.
    `rows` (..., H) are the hidden states of the same rows. The logits are `factor * z`, or, once squashed,
    `factor * tanh(scale * z)`, where `z` is the head's output.
    """

    compute: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    source: _Source
    rows: torch.Tensor
    scale: float = 1.0
    factor: float = 1.0
    squashed: bool = False
    grad_mode: bool = field(default_factory=torch.is_grad_enabled)
    result: torch.Tensor | None = None
    version: int = 0

    def wrapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor that stands for the result."""
        self.source.members.add(self)
        return _Deferred.apply(self, torch.Size(shape), dtype, *self.inputs)

    def value(self, reader: str) -> torch.Tensor:
        """The result, computed when it is first asked for."""
        if self.result is None:
            if not any(isinstance(x, DeferredLogits) for x in self.inputs):
                self.source.check_unchanged()
                if self.grad_mode:
                    self.source.forward.on_read(reader)
            inputs = [x.recipe.value(reader) if isinstance(x, DeferredLogits) else x for x in self.inputs]
            device = self.source.weight.device.type
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(self.grad_mode),
                torch.autocast(device, enabled=False),
            ):
                result = self.compute(*inputs)
            self.version = self._check_not_written(result)
            self.result = result
            self.inputs = ()  # lets go of the logits that this is a view of, unless somebody else wants them
        return self.result

    def _check_not_written(self, result: torch.Tensor) -> int:
        """The version of `result` as if nobody had written to it; raises if it is a copy of what was written to."""
        for x in self.inputs:
            if isinstance(x, DeferredLogits):
                base = x.recipe.result
                assert base is not None
                if result.untyped_storage().data_ptr() == base.untyped_storage().data_ptr():
                    return x.recipe.version  # a view, which sees what was written
                if base._version != x.recipe.version:
                    raise StateError(
                        "logits were written in place, out of torch's sight, after a copy of them was asked for and "
                        "before it was computed; set SlideConfig(loss='model')"
                    )
        return result._version

    def is_untouched(self) -> bool:
        """Whether nobody has seen these logits or those they come from, and could have written to them."""
        return self.result is None and all(
            x.recipe.is_untouched() for x in self.inputs if isinstance(x, DeferredLogits)
        )


class DeferredLogits(torch.Tensor):
    """Logits that are not there yet; any use but those recorded here computes them."""

    recipe: _Recipe

    @staticmethod
    def make(recipe: _Recipe, shape: torch.Size, dtype: torch.dtype) -> DeferredLogits:
        """An instance without data."""
        device = recipe.source.weight.device
        self = torch.Tensor._make_wrapper_subclass(DeferredLogits, shape, dtype=dtype, device=device)
        self.recipe = recipe
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            if args[0].recipe.result is not None:
                return func(args[0].recipe.result, *args[1:], **kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        record = _RECORDED.get(func)
        if (
            record is not None
            and args
            and isinstance(args[0], DeferredLogits)
            and args[0].recipe.result is None
        ):
            result = record(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if args and isinstance(args[0], DeferredLogits):
            source = args[0].recipe.source
            if source.fused and func in _GRADIENT_REQUESTS:
                raise StateError(
                    f"{name}() on logits whose loss has been computed without them: no gradient would arrive; call it "
                    "before the loss, or set SlideConfig(loss='model')"
                )
            if name.endswith("_") and (not name.endswith("__") or name == "__setitem__" or name in _IN_PLACE):
                for member in list(source.members):  # copies must not see what is written now
                    member.value(name)
        args, kwargs = _computed(name, args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        # Below autograd: who gets here without passing __torch_function__ is differentiated by `_Deferred`.
        args, kwargs = _computed(str(func), args, kwargs or {})
        return func(*args, **kwargs)


class _Deferred(torch.autograd.Function):
    """Puts deferred logits into the graph, for consumers that take them as they are (custom Functions)."""

    @staticmethod
    def forward(ctx, recipe, shape, dtype, *inputs):
        ctx.recipe, ctx.inputs = recipe, inputs
        return DeferredLogits.make(recipe, shape, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        result = ctx.recipe.result
        if result is not None and result._version > ctx.recipe.version:
            raise StateError(
                "deferred logits were written in place and then handed to a function that hides what it does with them "
                "from torch; set SlideConfig(loss='model')"
            )
        inputs = [x.recipe.value("backward") if isinstance(x, DeferredLogits) else x for x in ctx.inputs]
        wanted = ctx.needs_input_grad[3:]
        leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        with torch.enable_grad():
            output = ctx.recipe.compute(*leaves)
        chosen = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(output, chosen, grad))
        return None, None, None, *(next(grads) if leaf.requires_grad else None for leaf in leaves)


def _computed(reader: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments with ordinary tensors in place of deferred ones."""

    def value(x: Any) -> Any:
        return x.recipe.value(reader) if isinstance(x, DeferredLogits) else x

    return pytree.tree_map(value, (args, kwargs))


# -- what is recorded instead of computed ------------------------------------------------------------------------


def _derived(func: Callable, x: DeferredLogits, args: tuple, kwargs: dict, rows: Any, **changes: Any) -> Any:
    """What `func(x, *args, **kwargs)` will be, with the hidden states `rows`."""
    recipe = x.recipe
    meta = func(torch.empty(x.shape, dtype=x.dtype, device="meta"), *args, **kwargs)
    known = {"scale": recipe.scale, "factor": recipe.factor, "squashed": recipe.squashed, **changes}
    derived = _Recipe(lambda value: func(value, *args, **kwargs), (x,), recipe.source, rows, **known)
    return derived.wrapped(meta.shape, meta.dtype)


def _record_cast(func: Callable, x: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """`float()`, `contiguous()`, `to(dtype)`: the fused loss computes in fp32 anyway."""
    given = (*args, *kwargs.values())
    if func is torch.Tensor.to and (len(given) != 1 or given[0] not in (torch.float32, x.dtype)):
        return NotImplemented
    if func is torch.Tensor.contiguous and given:
        return NotImplemented
    return _derived(func, x, args, kwargs, x.recipe.rows)


def _record_view(func: Callable, x: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """Views that keep the vocabulary as their last dimension."""
    meta = func(torch.empty(x.shape, device="meta"), *args, **kwargs)
    if not isinstance(meta, torch.Tensor) or meta.dim() == 0 or meta.shape[-1] != x.shape[-1]:
        return NotImplemented
    if meta.dtype != torch.get_default_dtype() or meta.numel() != x.numel():  # view(dtype)
        return NotImplemented
    rows = x.recipe.rows
    return _derived(func, x, args, kwargs, rows.reshape(*meta.shape[:-1], rows.shape[-1]))


def _record_index(func: Callable, x: DeferredLogits, index: Any) -> Any:
    """Slices and integers over all dimensions but the last."""
    index = index if isinstance(index, tuple) else (index,)
    if sum(part is Ellipsis for part in index) > 1 or any(
        not (part is Ellipsis or isinstance(part, (slice, int)) and not isinstance(part, bool))
        for part in index
    ):
        return NotImplemented
    before = index.index(Ellipsis) if Ellipsis in index else len(index)
    after = index[before + 1 :]
    missing = x.dim() - before - len(after)
    if missing < 0:
        return NotImplemented
    full = (*index[:before], *(slice(None),) * missing, *after)
    if full[-1] != slice(None):
        return NotImplemented
    return _derived(func, x, (index,), {}, x.recipe.rows[full])


def _record_factor(func: Callable, x: DeferredLogits, other: Any, **kwargs: Any) -> Any:
    """Products with, and quotients by, a Python number."""
    if kwargs or isinstance(other, bool) or not isinstance(other, (int, float)) or other == 0:
        return NotImplemented
    factor = x.recipe.factor * other if func in _PRODUCTS else x.recipe.factor / other
    return _derived(func, x, (other,), {}, x.recipe.rows, factor=factor)


def _record_tanh(func: Callable, x: DeferredLogits) -> Any:
    if x.recipe.squashed:
        return NotImplemented
    return _derived(func, x, (), {}, x.recipe.rows, squashed=True, scale=x.recipe.factor, factor=1.0)


def _run_loss(
    func: Callable,
    x: DeferredLogits,
    target: Any,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`torch.nn.functional.cross_entropy`, fused where the kernel can."""
    recipe = x.recipe
    if (
        weight is not None
        or size_average is not None
        or reduce is not None
        or reduction not in ("mean", "sum")
        or x.dim() != 2
        or not isinstance(target, torch.Tensor)
        or target.dtype != torch.int64
        or target.shape != x.shape[:1]
        or target.device != x.device
        or not recipe.is_untouched()
        # torch's own error on the CPU; on a GPU the check would wait for it, and the loss becomes NaN
        or (x.device.type == "cpu" and _is_outside(target, x.shape[1], ignore_index))
    ):
        return NotImplemented
    recipe.source.check_unchanged()
    recipe.source.forward.on_loss(target.numel())
    recipe.source.fused = True
    wants_grads = torch.is_grad_enabled() and x.requires_grad
    scale, cap = recipe.factor, None
    if recipe.squashed:  # factor * tanh(scale * z) = cap * tanh(logit_scale * z / cap)
        scale, cap = recipe.scale * recipe.factor, recipe.factor
    with torch.set_grad_enabled(wants_grads), torch.autocast(x.device.type, enabled=False):
        return linear_cross_entropy(
            recipe.rows,
            recipe.source.weight,
            target,
            recipe.source.bias,
            reduction=reduction,
            ignore_index=ignore_index,
            logit_scale=scale,
            softcap=cap,
            label_smoothing=label_smoothing,
        )


def _is_outside(target: torch.Tensor, vocabulary: int, ignore_index: int) -> bool:
    return bool((((target < 0) | (target >= vocabulary)) & (target != ignore_index)).any())


# Besides `__setitem__` and whatever ends in one underscore.
_IN_PLACE = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
} | {"__ilshift__", "__irshift__"}
_GRADIENT_REQUESTS = (torch.Tensor.retain_grad, torch.Tensor.register_hook)
_PRODUCTS = (torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul)
_RECORDED: dict[Callable, Callable] = {
    **dict.fromkeys((torch.Tensor.float, torch.Tensor.to, torch.Tensor.contiguous), _record_cast),
    **dict.fromkeys((torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.flatten), _record_view),
    **dict.fromkeys((torch.reshape, torch.flatten), _record_view),
    torch.Tensor.__getitem__: _record_index,
    **dict.fromkeys(_PRODUCTS, _record_factor),
    **dict.fromkeys((torch.Tensor.div, torch.Tensor.__truediv__, torch.div), _record_factor),
    **dict.fromkeys((torch.tanh, torch.Tensor.tanh, nn.functional.tanh), _record_tanh),
    nn.functional.cross_entropy: _run_loss,
}
# What the tensor without data answers by itself.
_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "requires_grad",
    "itemsize",
    "nbytes",
    "is_cuda",
    "is_cpu",
)
_METHODS = (
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "element_size",
    "is_floating_point",
    "is_complex",
    "__len__",
)
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    torch.numel,
    torch.is_floating_point,
}
