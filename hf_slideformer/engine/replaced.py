"""Standing in for a method of one module instance, as Accelerate's hooks do, and what copies make of it."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from ..errors import UnsupportedModelError


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
