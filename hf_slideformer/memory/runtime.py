"""Runtime."""

from __future__ import annotations

from ..errors import StateError


class Failure:
    """The first failure that left weights which are those of no step; any thread may note it."""

    def __init__(self) -> None:
        self._cause: BaseException | None = None

    def note(self, error: BaseException) -> None:
        """Keep `error`, unless there was one before."""
        if self._cause is None:
            self._cause = error

    def check(self) -> None:
        """Raise `StateError`, with the cause, if there was a failure."""
        if self._cause is not None:
            raise StateError(
                f"an update failed ({self._cause}), so the weights in memory are not those of any step; resume "
                "from the last checkpoint in a new process"
            ) from self._cause
