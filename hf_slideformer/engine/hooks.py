"""Hooks that an engine's parts put on modules and parameters of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from .replaced import raise_not_picklable


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
