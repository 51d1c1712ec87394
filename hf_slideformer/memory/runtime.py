"""Runtime: what moves bytes and runs updates for one model. Made once, closed once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping

import torch

from ..errors import StateError
from ..metrics import Metrics
from .buffers import PinBudget
from .link import Link, LocalLink
from .transfer import Lane
from .worker import UpdateWorker


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


class Runtime:
    """Device, lanes, update worker, pin budget, metrics and failure of one engine.

    Args:
        device: where units compute.
        pinned_bytes: at most so much RAM is pinned; None sets no limit.
        threads: of the CPU's update kernels.
        metrics: receives what is moved, waited for and updated.
        delays: for tests: seconds to sleep before a piece of work of "h2d" and "d2h" (on the CPU), of "update" and of
            "disk", by label.

    Attributes:
        to_device: host-to-device lane.
        to_host: device-to-host lane.
        link: moves units' weights and gradients.
        worker: runs updates and gradient sums.
        pins: asked before memory is pinned.
        failure: is told of what leaves weights that are those of no step.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        pinned_bytes: int | None = None,
        threads: int = 1,
        metrics: Metrics | None = None,
        delays: Mapping[str, Callable[[str], float]] | None = None,
    ) -> None:
        self.device = device
        self.threads = threads
        self.metrics = metrics or Metrics()
        self.delays = delays or {}
        self.failure = Failure()
        self.pins = PinBudget(device, pinned_bytes)
        with contextlib.ExitStack() as begun:  # where the system refuses one thread, the others end
            self.to_device = Lane("h2d", device, self.delays.get("h2d"))
            begun.callback(self.to_device.close)
            self.to_host = Lane("d2h", device, self.delays.get("d2h"))
            begun.callback(self.to_host.close)
            self.link: Link = LocalLink(device, self.to_device, self.to_host)
            self.worker = UpdateWorker(self.metrics, self.delays.get("update"))
            begun.pop_all()
        self._first: list[Callable[[], None]] = []
        self._last: list[Callable[[], None]] = []
        self._closed = False

    def when_closed(
        self, first: Callable[[], None] | None = None, last: Callable[[], None] | None = None
    ) -> None:
        """Have `first` called before the threads end, or `last` after; neither may keep the engine alive."""
        self._first += [first] if first is not None else []
        self._last += [last] if last is not None else []

    def drain(self) -> None:
        """Block until everything submitted before is over, well or not."""
        self.to_device.drain()
        self.to_host.drain()
        self.worker.drain()

    def guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, after whose failure state may be half updated."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.failure.note(error)
                raise

        return run

    def close(self) -> None:
        """Finish pending work, end the threads and let go of files."""
        if threading.current_thread().name.startswith("slideformer-"):
            # A garbage collection found the engine in one of its own threads, which this would wait for.
            threading.Thread(target=self.close, name="closing-slideformer").start()
            return
        if self._closed:
            return
        self._closed = True
        for callback in self._first:
            callback()
        self.to_device.close()
        self.to_host.close()
        self.worker.close()
        for callback in self._last:
            callback()
