"""Parameters as code outside of the engine meets them.

A streamed parameter is a tensor in RAM that a worker updates while user code goes on, and a split master that came in
as fp32 is only half of its weight. Such parameters get a class of their own, whose `__torch_function__` sees every
operation of torch on them: it first waits for the update of their unit, computes with the weights in the dtype that
they came in, and takes over what an operation writes into them, without losing a master's low half.

`p.detach()`, `p.data` and views are `WeightView`s: they cost no memory, and act in the same way. So do the tensors of
`model.state_dict()`.

Nothing of this is in the way of training. Streamed parameters take no part in computing (leaves over slots stand in
for them). Those on the device do, so they are ordinary parameters while their model runs forward or backward. What asks
for no data (shape, dtype, gradient) neither waits nor reads.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...optim.state import ParamState
from .torch_functions import (
    COMPUTE,
    LIKE,
    METADATA,
    VIEWS,
    may_write,
)

_raw = torch._C.DisableTorchFunctionSubclass


class WeightAccess(Protocol):
    """The way to weights wherever they live."""

    def settle(self, state: ParamState) -> None:
        """Block until no update of the parameter is pending.

        Raises:
            TransferError: the update failed; the cause is chained.
        """

    def read_weight(self, state: ParamState, place: torch.Tensor) -> torch.Tensor:
        """`place`, a view of live weights, as fp32 in a new tensor."""

    def write_weight(self, state: ParamState, place: torch.Tensor, values: torch.Tensor) -> None:
        """Set the weights at `place`; see `ParamState.write_at`."""

    def is_loading(self, state: ParamState) -> bool:
        """Whether a `load_state_dict` that is going on will write the whole weight at its end."""


class ModelRuns(threading.local):
    """Whether this thread is inside of a forward of the model: then its code reads parameters, not the user's."""

    depth = 0

    def synchronize(self) -> None:
        """Nothing to wait for; see `Hook`."""

    def begin(self, *_: object) -> None:
        """Called before a module's forward."""
        self.depth += 1

    def forget(self, *_: object) -> None:
        """Called where none is under way, whatever an interrupted one has left."""
        self.depth = 0

    def end(self, *_: object) -> None:
        """Called after it, also where it raised."""
        self.depth = max(0, self.depth - 1)


class Guard:
    """What a guarded parameter knows of its engine, without keeping it alive.

    Args:
        state: of the parameter.
        access: the way to its weights.
        runs: of the model.

    Attributes:
        counter: an ordinary tensor that counts versions with the parameter.
    """

    __slots__ = ("_access", "_state", "counter", "runs")

    def __init__(self, state: ParamState, access: WeightAccess, runs: ModelRuns) -> None:
        self._state, self._access = weakref.ref(state), weakref.ref(access)
        self.counter = state.param.detach()
        self.runs = runs

    def found(self, place: torch.Tensor) -> tuple[ParamState, WeightAccess] | None:
        """What is known of a view of live weights; None where it is one of other memory, or the engine is gone."""
        state, access = self._state(), self._access()
        if state is None or access is None:
            return None
        with _raw():
            ours = place.untyped_storage().data_ptr() == state.live.untyped_storage().data_ptr()
        return (state, access) if ours else None

    def settle(self) -> None:
        """Block until no update of the parameter is pending."""
        state, access = self._state(), self._access()
        if state is not None and access is not None:
            access.settle(state)

    def joins(self, place: torch.Tensor) -> bool:
        """Whether what is at a view of live weights is only half of them."""
        found = self.found(place)
        return found is not None and found[0].spec.joined_on_save

    def joined(self, place: torch.Tensor) -> torch.Tensor:
        """fp32 weights of a split master at a view of live ones, in a new tensor."""
        found = self.found(place)
        assert found is not None
        state, access = found
        with torch.inference_mode(False), torch.no_grad():
            return access.read_weight(state, place)


class _RelatedToTensors(type(torch.Tensor)):  # type: ignore[misc]
    """`torch.testing` compares tensors of which one is an instance of the other's class."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch.Tensor)


class WeightView(torch.Tensor, metaclass=_RelatedToTensors):
    """`p.detach()`, `p.data`, or a view of a guarded parameter: the memory of live weights, used as `p` is."""

    _guard: Guard

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = values_of(self).requires_grad_(_is_trainable(self))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return values_of(self).requires_grad_(_is_trainable(self)).__reduce_ex__(protocol)


def _direct(name: str) -> Any:
    """An attribute of tensors past `__torch_function__`, which takes five times as long: the engine asks often."""
    attribute = getattr(torch.Tensor, name)
    getter, setter = attribute.__get__, attribute.__set__
    direct: Callable[..., Any] = torch._C._disabled_torch_function_impl

    def get(tensor: torch.Tensor) -> Any:
        return direct(getter, (), (tensor,))

    def put(tensor: torch.Tensor, value: Any) -> None:
        direct(setter, (), (tensor, value))

    return property(get, put)


class StreamedParameter(nn.Parameter):
    """A parameter in RAM; see the module's text."""

    guarded = True
    _guard: Guard

    grad = _direct("grad")
    requires_grad = _direct("requires_grad")
    dtype = _direct("dtype")
    _backward_hooks = _direct("_backward_hooks")
    _post_accumulate_grad_hooks = _direct("_post_accumulate_grad_hooks")
    if hasattr(torch.Tensor, "grad_dtype"):  # torch >= 2.10
        grad_dtype = _direct("grad_dtype")

    @property
    def _version(self) -> int:  # type: ignore[override]
        return self._guard.counter._version

    def data_ptr(self) -> int:
        """As for every tensor."""
        with _raw():
            return super().data_ptr()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = _copied(self)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _copied(self).__reduce_ex__(protocol)


class _UnlessModelRuns:
    """`__torch_function__` of a parameter that is used where it is: none while its model runs."""

    def __get__(self, param: ResidentParameter | None, owner: type) -> Callable[..., Any]:
        if param is not None and (param._guard.runs.depth or torch._C._current_graph_task_id() != -1):
            return torch._C._disabled_torch_function_impl
        return dispatch


class ResidentParameter(StreamedParameter):
    """A parameter on the device whose weights, as a user knows them, are not just what is there."""

    __torch_function__ = _UnlessModelRuns()


_GUARDED = frozenset({StreamedParameter, ResidentParameter, WeightView})


def guard_parameter(
    state: ParamState, kind: type[StreamedParameter], access: WeightAccess, runs: ModelRuns
) -> None:
    """Make a parameter, whose weights are anything but what is in its memory, one of `kind`."""
    param = state.param
    ordinary_parameter(param)  # of an engine that is gone
    param._guard = Guard(state, access, runs)  # type: ignore[attr-defined]
    param.__class__ = kind


def ordinary_parameter(param: nn.Parameter) -> None:
    """Make a parameter what it was before `guard_parameter`; its memory is left as it is."""
    if type(param) in _GUARDED:
        param.__class__ = nn.Parameter
        del param._guard  # type: ignore[attr-defined]


@contextlib.contextmanager
def unguarded(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make parameters ordinary ones while the block runs."""
    kinds = [(param, type(param)) for param in params if type(param) in _GUARDED]
    try:
        for param, _ in kinds:
            param.__class__ = nn.Parameter
        yield
    finally:
        for param, kind in kinds:
            param.__class__ = kind


def share_tied(state_dict: dict[str, Any]) -> None:
    """Make entries for the same parameter one object, as which they are copied and saved once."""
    first: dict[int, Any] = {}
    for name, value in state_dict.items():
        if type(value) is WeightView:
            state_dict[name] = first.setdefault(id(value._guard), value)


def live_tensors() -> contextlib.AbstractContextManager[None]:
    """While the block runs, this thread meets parameters as they lie in memory: `state_dict()` gives live tensors."""
    return _raw()


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a guarded parameter's or view's weights in the dtype that they came in."""
    with torch.inference_mode(False), torch.no_grad(), _raw():
        guard: Guard = tensor._guard  # type: ignore[attr-defined]
        guard.settle()
        place = tensor.detach()
        return guard.joined(place) if guard.joins(place) else place.clone()


def _copied(param: StreamedParameter) -> nn.Parameter:
    return nn.Parameter(values_of(param), _is_trainable(param))


def _is_trainable(tensor: torch.Tensor) -> bool:
    with _raw():
        return tensor.requires_grad


# -- operations ------------------------------------------------------------------------------------------------


def dispatch(func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
    """Run an operation of torch that has guarded tensors among its arguments."""
    kwargs = kwargs or {}
    if func in METADATA:
        with _raw():
            return func(*args, **kwargs)
    if func in VIEWS:
        viewed = _view(func, args, kwargs)
        if viewed is not NotImplemented:
            return viewed
    if func is torch.Tensor.copy_ and type(args[0]) in _GUARDED and _copy(*args, **kwargs):
        return args[0]
    return _Operation(func, args, kwargs).run()


_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def _view(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A view of a guarded tensor; NotImplemented where the operation copies."""
    source: Any = args[0] if args else None
    if type(source) not in _GUARDED:
        return NotImplemented
    source._guard.settle()
    with _raw():
        # `detach` for `data`, so that what is written there raises the parameter's version.
        result = source.detach() if func == _DATA else func(*args, **kwargs)
        storage = source.untyped_storage().data_ptr()
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if tensor is source:
                continue
            if tensor.untyped_storage().data_ptr() != storage or tensor.dtype != source.dtype:
                return NotImplemented
            tensor.__class__ = WeightView
            tensor._guard = source._guard
    return result


def _copy(target: torch.Tensor, source: Any, non_blocking: bool = False) -> bool:
    """`target.copy_(source)` into a split master; False where it is an operation like others."""
    guard: Guard = target._guard  # type: ignore[attr-defined]
    with _raw():
        place, follows = target.detach(), torch.is_grad_enabled() and target.requires_grad
    found = guard.found(place)
    if found is None or not found[0].spec.split or not isinstance(source, torch.Tensor):
        return False
    state, access = found
    values = values_of(source) if type(source) in _GUARDED else source.detach()
    if follows or access.is_loading(state):  # the first raises
        with _raw():
            target.copy_(values, non_blocking)
        return True
    guard.settle()
    joins = state.spec.joined_on_save
    with torch.no_grad():
        given = values.to(place.device, torch.float32 if joins else place.dtype).expand(place.shape)
        if not joins or (values.is_floating_point() and values.element_size() < given.element_size()):
            # Who writes the halves that are there, some of them changed perhaps, has read them there: the other halves
            # stay. Of other weights a few are the same by chance.
            same = given == place
            kept = int(same.sum())
            if kept == same.numel():
                return True
            given = given.float()
            if 2 * kept >= same.numel():
                given = torch.where(same, guard.joined(place), given)
        access.write_weight(state, place, given)
    return True


class _Join(torch.autograd.Function):
    """fp32 weights at a view of live ones, which get their gradient."""

    @staticmethod
    def forward(ctx, live: torch.Tensor, guard: Guard) -> torch.Tensor:
        with _raw():
            return guard.joined(live.detach())

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


@dataclass(frozen=True, slots=True)
class _StandIn:
    """An ordinary tensor in the place of a guarded one: a copy of its weights, or the same memory."""

    original: torch.Tensor
    tensor: torch.Tensor
    is_copy: bool
    version: int

    def take_over(self) -> bool:
        """Whether what the operation returns for it is the original: it was written, or is nothing else."""
        if not self.is_copy:
            return True
        if self.tensor._version == self.version:
            return False
        original, guard = self.original, self.original._guard  # type: ignore[attr-defined]
        with _raw():
            place, follows = original.detach(), original.requires_grad
        if torch.is_grad_enabled() and follows:
            raise RuntimeError(
                "a leaf Variable that requires grad, or a view of one, is being used in an in-place operation."
            )
        if (found := guard.found(place)) is not None:
            state, access = found
            access.write_weight(state, place, self.tensor.detach())
        return True


_CLONES = (torch.Tensor.clone, torch.clone)


class _Operation:
    """One operation with ordinary tensors in the place of guarded ones; what it writes into them is taken over."""

    def __init__(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self._may_write = may_write(func, kwargs)
        self._live = func in COMPUTE and self._computes_with_live()
        self._stand_ins: dict[int, _StandIn] = {}  # by identity of the guarded tensor

    def run(self) -> Any:
        """What torch returns."""
        args, kwargs = _mapped(self._args, self._replace), _mapped(self._kwargs, self._replace)
        if (
            self._func in _CLONES
            and not kwargs
            and len(args) == 1
            and self._stand_ins[id(self._args[0])].is_copy
        ):
            return args[0]
        result = self._func(*args, **kwargs)
        back = {id(x.tensor): x.original for x in self._stand_ins.values() if x.take_over()}
        return _restored(result, back)

    def _computes_with_live(self) -> bool:
        """Whether other operands are in the dtype that layers compute in, which products do not mix with fp32."""
        operands = list(_tensors((self._args, self._kwargs)))
        guarded = {x.dtype for x in operands if type(x) in _GUARDED}
        others = {x.dtype for x in operands if type(x) not in _GUARDED and x.is_floating_point()}
        if not others:
            return self._func in (nn.functional.embedding, nn.functional.embedding_bag)
        return bool(others & guarded)

    def _replace(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._stand_ins:
            follows = torch.is_grad_enabled()  # not in inference mode, whose tensors do not count writes
            with torch.inference_mode(False), torch.set_grad_enabled(follows):
                stand_in, is_copy = self._stand_in(tensor)
            self._stand_ins[id(tensor)] = _StandIn(tensor, stand_in, is_copy, stand_in._version)
        return self._stand_ins[id(tensor)].tensor

    def _stand_in(self, tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
        guard: Guard = tensor._guard  # type: ignore[attr-defined]
        with _raw():
            place, follows = tensor.detach(), torch.is_grad_enabled() and tensor.requires_grad
            joins = not self._live and guard.joins(place)
            if self._func in LIKE:
                return torch.empty_like(place, dtype=torch.float32 if joins else None), True
            guard.settle()
            if joins:
                return _Join.apply(tensor, guard) if follows else guard.joined(place), True
            if follows:
                return tensor.view_as(tensor), False
            found = guard.found(place)
            if self._may_write and found is not None and found[0].spec.split:
                return place.clone(), True
            return place, False


def _mapped(value: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if type(value) in _GUARDED:
        return replace(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, replace) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, replace) for key, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _restored(result: Any, back: dict[int, torch.Tensor]) -> Any:
    """A result in which guarded tensors are themselves again."""
    if isinstance(result, torch.Tensor):
        return back.get(id(result), result)
    if type(result) in (list, tuple) and any(id(item) in back for item in result):
        return type(result)(back.get(id(item), item) for item in result)
    return result
