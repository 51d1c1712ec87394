"""The training state of one step while it is being saved.

Forward and backward of later steps only read it; what changes it is the update of a unit. So each unit's update waits
until that unit has been written: saving goes on beside training, and nothing of a later step gets into it. Groups are
released in the order in which their updates come.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from ...errors import CheckpointError
from ...memory.disk.desks import Loan
from ...memory.streams import compute_event, new_stream
from ...memory.transfer import Handle
from ...memory.unit_memory import UnitMemory
from ...optim.state import ParamState


class HeldState:
    """State that nobody changes until it has been read; made by `Updates.hold`.

    Before the next update `request` is called; then, in any thread, each group in `order` is read inside of
    `reading(group)` and let go of by `release(group)`; `release_all` comes at the end, also after a failure.

    Args:
        groups: states by unit, and last those outside of units: `PlacedState.by_unit()`.
        order: positions in `groups`, in the order in which their updates come.
        device: where some of it lives.
        borrow: fetches a group's state from disk; None if it lives elsewhere.
        attach: makes a group's residuals and moments tensors in what was borrowed.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[ParamState]],
        order: Sequence[int],
        *,
        device: torch.device,
        borrow: Callable[[int], Loan | None],
        attach: Callable[[int, Loan], UnitMemory],
    ) -> None:
        self.groups = groups
        self.order = tuple(order)
        self.group_of = {state.order: group for group, states in enumerate(groups) for state in states}
        self.steps = {state.order: state.step for states in groups for state in states}
        self._versions = {state.order: state.param._version for states in groups for state in states}
        # Of residuals on disk: they belong to other weights and count as zero.
        self._stale = {state.order for states in groups for state in states if state.residual_is_stale}
        self._released = [Handle(f"reading group {group} to save it") for group in range(len(groups))]
        self._borrow, self._attach = borrow, attach
        self._loans: dict[int, Loan] = {}
        self._requested = False
        self._attached: UnitMemory | None = None
        self._spoiled = ""
        self._lock = threading.Lock()
        # What had been asked of the GPU before is done when this fires.
        self._ready = compute_event(device)
        self._stream = new_stream(device)

    def released(self, group: int) -> Handle:
        """Done when the group may be changed."""
        return self._released[group]

    def wait_host(self) -> None:
        """Block until everything may be changed."""
        for handle in self._released:
            handle.wait_host()

    def spoil(self, reason: str) -> None:
        """Say that something was changed that may not have been read yet."""
        with self._lock:
            if not all(handle.is_complete for handle in self._released):
                self._spoiled = self._spoiled or reason

    # -- for the thread that reads ---------------------------------------------------------------------------

    def request(self, groups: Collection[int]) -> None:
        """Ask for the state of `groups` that is on disk.

        All at once, once, and before any update asks for the same buffers: requests are served in their order, so no
        update holds a buffer that this is waiting for while it waits for this.
        """
        for group in self.order if not self._requested else ():
            if group in groups and (loan := self._borrow(group)) is not None:
                self._loans[group] = loan
        self._requested = True

    @contextlib.contextmanager
    def reading(self, group: int) -> Iterator[None]:
        """Residuals and moments of the group, wherever they live, and everything on the GPU can be read inside.

        Raises:
            TransferError: reading from disk failed; the cause is chained.
        """
        loan = self._loans.pop(group, None)
        try:
            if loan is not None:
                loan.ready.wait_host()
                self._attached = self._attach(group, loan)
            with torch.no_grad(), self._beside():
                yield
        finally:
            self._attached = None
            if loan is not None:
                loan.give_back()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Copies from the GPU do not queue behind what trains there."""
        with self._stream.active():
            self._stream.wait(self._ready)
            yield

    def parts(self, state: ParamState) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """A parameter's residual and moments; inside of `reading` of its group."""
        memory = self._attached
        if memory is None:
            return state.residual, state.moments
        residual = memory.residual(state.segment)
        if residual is not None and state.order in self._stale:
            residual.zero_()  # of a copy
        return residual, memory.moments(state.segment) if state.moment_format is not None else {}

    def release(self, group: int) -> None:
        """Let the group's updates go on.

        Raises:
            CheckpointError: weights were changed meanwhile by others than updates.
        """
        for state in self.groups[group]:
            if state.param._version != self._versions[state.order]:
                self.spoil(f"{state.name} was written to")
        with self._lock:
            if self._spoiled:
                raise CheckpointError(
                    f"the checkpoint was given up: {self._spoiled} while it was being written beside training; call "
                    "trainer.slide.synchronize() before you change weights, or set SlideConfig(saving='blocking')"
                )
            self._released[group].complete()

    def release_all(self) -> None:
        """Let everything go on."""
        for loan in self._loans.values():
            loan.give_back()
        self._loans = {}
        for handle in self._released:
            handle.complete()
