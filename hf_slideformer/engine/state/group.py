"""Groups: parameters whose training state moves together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ...memory.transfer import Handle
from ...optim.state import ParamState
from .home import Home


class StateGroup:
    """The parameters of one unit, streamed or not, or those outside of units.

    Args:
        index: its number in the model: that of the unit; the last one is outside of units.
        name: of the unit.
        states: of the parameters, in the model's order.
        home: where the state lives.

    Attributes:
        pending: done when the weights are those of the last update; None if that is long ago.
    """

    def __init__(self, index: int, name: str, states: Sequence[ParamState], home: Home) -> None:
        self.index, self.name = index, name
        self.states = sorted(states, key=lambda state: state.order)
        self.home = home
        self.pending: Handle | None = None

    def wait_host(self) -> None:
        """Block until no update is pending, and weights can be read.

        Raises:
            TransferError: an update failed, or the write of its weights to disk; the cause is chained.
        """
        if self.pending is not None:
            self.pending.wait_host()
        self.home.settle()

    def wait_stream(self) -> None:
        """Make the current stream of the device wait for the pending update."""
        if self.pending is not None:
            self.pending.wait_stream()
            self.pending = None

    def abandon(self) -> BaseException | None:
        """Block until nothing works on a pending update any more; returns why it failed, if it did."""
        self.home.abandon()
        if self.pending is None:
            return None
        self.pending.settle()
        error = self.pending.error
        if error is None:
            self.pending = None
        return error

    @contextlib.contextmanager
    def open(self, *, write: bool = False) -> Iterator[None]:
        """Residuals and moments are tensors that can be read while the block runs, wherever they live.

        Residuals of weights that were written from outside are cleared first. No update may be pending.

        Args:
            write: put changes back where the state lives.

        Raises:
            StateError: inside of another such block.
            TransferError: reading from disk failed; the cause is chained.
        """
        for state in self.states:
            state.check_outside_write()  # of what is on disk: what this clears stays cleared there
        with self.home.open(write=write):
            yield
