"""What a script does to a streamed model that an engine cannot follow, and that makes the model leave it first.

A cast (`model.to(torch.bfloat16)`, `half()`, `float()`) or a move to another device wants whole parameters, and a
method of transformers that gives a model other ones (`resize_token_embeddings`, `add_adapter`) makes them of those that
are there, which may be half of a split master. Both are noticed by their method, and get an ordinary model.

A call that would change nothing of an ordinary model (`model.to(device)` after it was prepared) changes nothing here:
streamed weights count as being on the engine's device, where they compute.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from ...optim.state import ParamState
from ..model.stand_ins import ReplacedMethod


class Leavable(Protocol):
    """What is needed of an engine."""

    device: torch.device

    def owned(self, module: nn.Module) -> list[ParamState]:
        """States of the parameters in `module` and below."""
        ...

    def in_training(self) -> bool:
        """Whether a trainer is in the middle of training."""
        ...

    def release(self, reason: str) -> None:
        """Make the model an ordinary one."""


class ApplyMethod(ReplacedMethod):
    """Stands in for a module's `_apply`, which every cast and move goes through."""

    def __init__(self, module: nn.Module, engine: Leavable) -> None:
        super().__init__(module, module._apply)
        self._engine = weakref.ref(engine)

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        engine = None if self.removed else self._engine()
        states = engine.owned(self.module) if engine is not None else []
        if engine is None or not states:
            return self.original(fn, recurse)
        # What came in as fp32 is live as bf16: `float()` changes it, though not in the eyes of a script that trains.
        dtypes = {state.spec.source_dtype for state in states}
        if not engine.in_training():
            dtypes |= {state.spec.dtype for state in states}
        if any(changes(fn, dtype, engine.device) for dtype in dtypes):
            engine.release("it was cast or moved (model.to(...), float(), half(), cpu(), ...)")
            return self.original(fn, recurse)
        return self.original(_on_all_but(states, fn), recurse)


def changes(fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `fn` makes something else of a tensor of this dtype on this device."""
    with torch.no_grad():
        tensor = torch.empty(1, dtype=dtype, device=device)
        return fn(tensor) is not tensor or (device.type == "cpu" and tensor.is_shared())


def _on_all_but(
    states: list[ParamState], fn: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn`, but for parameters of the engine and their gradients: these may lie elsewhere than they seem to."""
    own = {id(tensor): tensor for state in states for tensor in (state.param, state.param.grad)}
    return lambda tensor: tensor if id(tensor) in own else fn(tensor)


class ReparametrizingMethod(ReplacedMethod):
    """Stands in for a method that gives a model other parameters."""

    def __init__(self, module: nn.Module, name: str, engine: Leavable) -> None:
        super().__init__(module, getattr(module, name))
        self._method = name
        self._engine = weakref.ref(engine)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine = None if self.removed else self._engine()
        if engine is not None and not _asks_for_nothing(self.module, self._method, args, kwargs):
            engine.release(f"{self._method}() was called")
        return self.original(*args, **kwargs)


_REPARAMETRIZING = ("resize_token_embeddings", "add_adapter")


def _asks_for_nothing(module: Any, method: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call resizes to what is there already."""
    if method != "resize_token_embeddings" or len(args) > 1:
        return False
    size = args[0] if args else kwargs.get("new_num_tokens")
    have = module.get_input_embeddings().weight.shape[0]
    return kwargs.get("pad_to_multiple_of") is None and size in (None, have)


def watch_leaving(model: nn.Module, engine: Leavable) -> list[ReplacedMethod]:
    """Make `model` leave `engine` before it is cast, moved or given other parameters; returns what was put there."""
    methods: list[ReplacedMethod] = []
    for module in model.modules():
        apply = ApplyMethod(module, engine)
        apply.put("_apply")
        methods.append(apply)
        for name in _REPARAMETRIZING:
            if callable(getattr(type(module), name, None)):
                method = ReparametrizingMethod(module, name, engine)
                method.put(name)
                methods.append(method)
    return methods
