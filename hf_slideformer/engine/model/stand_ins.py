"""What an engine's parts put on a model: methods that stand in for its own, hooks, and what copies make of either."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from torch import nn

from ...errors import UnsupportedModelError


class ReplacedMethod:
    """Base of what is put in place of an instance's method; looks like the original to `inspect.signature`.

    A copied model is an ordinary one: its modules run their own methods over their own (copied) weights.

    Args:
        module: whose method is replaced.
        original: what it was.
    """

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # type: ignore[arg-type]  # subclasses are callable
        self.module = module
        self.original = original
        self.removed = False
        self._name = ""
        self._was_its_own = False

    def put(self, name: str) -> None:
        """Take the place of the module's method `name`."""
        self._name, self._was_its_own = name, name in self.module.__dict__
        setattr(self.module, name, self)

    def remove(self) -> None:
        """Give the place back. Where somebody has wrapped this since, it stays and hands every call on."""
        self.removed = True
        if self.module.__dict__.get(self._name) is not self:
            return
        if self._was_its_own:
            setattr(self.module, self._name, self.original)
        else:
            delattr(self.module, self._name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.module))
        if isinstance(self.original, types.MethodType) and copied is not None:
            return types.MethodType(self.original.__func__, copied)
        return copy.deepcopy(self.original, memo)

    def __reduce__(self):
        raise_not_picklable()


def raise_not_picklable() -> NoReturn:
    """Refuse to pickle what belongs to a running engine."""
    raise UnsupportedModelError(
        "a streamed model cannot be pickled; save it with save_pretrained or save its state_dict()"
    )


class _Owner(Protocol):
    def synchronize(self) -> None:
        """Block until weights can be read."""


class Hook:
    """A hook that does not keep its owner alive and does nothing in a copy of the model.

    Args:
        owner: held weakly; None in a copy.
        run: called with the owner and what the hook is called with.
    """

    # The first is torch's, which marks hooks of `state_dict`.
    __slots__ = ("_from_public_api", "_owner", "_run")

    def __init__(self, owner: _Owner | None, run: Callable[..., None]) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self._run = run

    def __call__(self, *args: Any) -> None:
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            self._run(owner, *args)

    def __deepcopy__(self, memo: dict) -> Hook:
        # A module's hooks are copied before its submodules, so their weights are up to date when they are copied.
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            owner.synchronize()
        return Hook(None, self._run)

    def __reduce__(self):
        if self._owner is not None:
            raise_not_picklable()
        return Hook, (None, self._run)
