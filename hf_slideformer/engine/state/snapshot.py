"""The training state of one step while it is being saved.

Forward and backward of later steps only read it; what changes it is the update of a unit. So each unit's update waits
until that unit has been written: saving goes on beside training, and nothing of a later step gets into it. Groups are
released in the order in which their updates come.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence

import torch

from ...errors import CheckpointError
from ...memory.streams import compute_event, new_stream
from ...memory.transfer import Handle
from ...optim.state import ParamState
from .group import StateGroup
from .home import Reader


class HeldState:
    """State that nobody changes until it has been read; made by `Updates.hold`.

    Before the next update `request` is called; then, in any thread, each group in `order` is read inside of
    `reading(group)` and let go of by `release(group)`; `release_all` comes at the end, also after a failure.

    Args:
        groups: all of a model.
        order: the same, as their updates come.
        device: where some of it lives.

    Attributes:
        groups: states by group; the last one is outside of units.
        order: numbers of groups.
    """

    def __init__(
        self, groups: Sequence[StateGroup], order: Sequence[StateGroup], device: torch.device
    ) -> None:
        self._groups = groups
        self.groups: list[list[ParamState]] = [group.states for group in groups]
        self.order = tuple(group.index for group in order)
        states = [state for group in groups for state in group.states]
        self.group_of = {state.order: state.group for state in states}
        self.steps = {state.order: state.step for state in states}
        self._versions = {state.order: state.param._version for state in states}
        self._released = [Handle(f"reading {group.name} to save it") for group in groups]
        self._requested: dict[int, Reader] | None = None
        self._reader: Reader | None = None
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
        if self._requested is None:
            self._requested = {}
            for group in self.order:
                if group in groups:
                    self._requested[group] = self._groups[group].home.reader()

    @contextlib.contextmanager
    def reading(self, group: int) -> Iterator[None]:
        """Residuals and moments of the group, wherever they live, and everything on the GPU can be read inside.

        Raises:
            TransferError: reading from disk failed; the cause is chained.
        """
        self._reader = reader = (self._requested or {}).pop(group, None)
        try:
            if reader is not None:
                reader.ready.wait_host()
            with torch.no_grad(), self._beside():
                yield
        finally:
            self._reader = None
            if reader is not None:
                reader.release()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Copies from the GPU do not queue behind what trains there."""
        with self._stream.active():
            self._stream.wait(self._ready)
            yield

    def parts(self, state: ParamState) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """A parameter's residual and moments; inside of `reading` of its group."""
        assert self._reader is not None, "not requested"
        return self._reader.parts(state)

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
        for reader in (self._requested or {}).values():
            reader.release()
        self._requested = {}
        for handle in self._released:
            handle.complete()
