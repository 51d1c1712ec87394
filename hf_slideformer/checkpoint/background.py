"""A checkpoint that is finished in a thread of its own while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .directory import NewCheckpoint


class BackgroundSave:
    """Finishes a checkpoint beside training.

    Not a daemon: a program that ends meanwhile waits for it.

    Args:
        checkpoint: all of it but its tensors is written.
        finished: called in the thread once it is in its place: rotation.
    """

    def __init__(self, checkpoint: NewCheckpoint, finished: Callable[[], None]) -> None:
        self.checkpoint = checkpoint
        self._finished = finished
        self._error: BaseException | None = None
        name = f"saving {checkpoint.target.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)
        try:
            checkpoint.request()
            self._thread.start()
        except BaseException:
            checkpoint.abandon()
            raise

    def _run(self) -> None:
        try:
            self.checkpoint.finish_then(self._finished)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits
            self._error = error

    @property
    def is_in_place(self) -> bool:
        """Whether the checkpoint is there, whole; it may be although saving failed."""
        return self.checkpoint.is_in_place

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not; never blocks."""
        return not self._thread.is_alive()

    def wait(self) -> BaseException | None:
        """Block until it has ended; the error if it failed. If it is not in its place then nothing of it is left."""
        self._thread.join()
        return self._error
