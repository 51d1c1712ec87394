"""Lanes: the threads and streams that move data, and the handles that say when it has moved.

A lane is a first-in-first-out queue served by one thread. On a CUDA device it owns a stream: the thread only
issues copies there, after waiting on the host for what the copy needs from the host (a finished update), and
an event marks completion for whoever reads the data. On the CPU the thread does the copy itself, after an
injectable delay, so that a missing wait shows in tests. Because each direction has its own thread, a copy
that waits for an update never holds up one that could go.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch

from ..errors import StateError, TransferError


class Handle:
    """A promise of one piece of asynchronous work.

    `wait_issued` and `wait_host` block the calling thread, `wait_stream` only the current CUDA stream (beyond
    the time until the work has been issued). Each raises `TransferError` with the cause if the work failed.
    """

    __slots__ = ("_error", "_issued", "event", "label")

    def __init__(self, label: str) -> None:
        self.label = label
        self.event: torch.cuda.Event | None = None
        self._issued = threading.Event()
        self._error: BaseException | None = None

    @classmethod
    def done(cls, label: str = "") -> Handle:
        """A handle of work that is already complete."""
        handle = cls(label)
        handle._issued.set()
        return handle

    def complete(self, event: torch.cuda.Event | None = None) -> None:
        """Mark the work as issued (with `event`, done when it fires) or done (without)."""
        self.event = event
        self._issued.set()

    def fail(self, error: BaseException) -> None:
        """Hand `error` to everyone who waits."""
        self._error = error
        self._issued.set()

    @property
    def is_complete(self) -> bool:
        """Whether the work is done; never blocks. A failed handle counts as complete."""
        return self._issued.is_set() and (self.event is None or self.event.query())

    @property
    def failed(self) -> bool:
        """Whether the work has failed."""
        return self._error is not None

    def wait_issued(self) -> None:
        """Block until the work has been issued."""
        self._issued.wait()
        if self._error is not None:
            raise TransferError(f"{self.label} failed: {self._error}") from self._error

    def wait_host(self) -> None:
        """Block until the work is done."""
        self.wait_issued()
        if self.event is not None:
            self.event.synchronize()

    def wait_stream(self) -> None:
        """Make the current stream wait for the work (on the CPU: block until it is done)."""
        self.wait_issued()
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


def compute_event(device: torch.device) -> torch.cuda.Event | None:
    """An event that fires when what the current stream has been given so far is done; None on the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class Lane:
    """One direction of transfer: a thread, and on a GPU a stream.

    Args:
        name: shown in thread lists and traces ("h2d", "d2h").
        device: the device whose stream is used.
        delay_s: called before each piece of work on the CPU, returns seconds to sleep; for tests.
    """

    def __init__(
        self, name: str, device: torch.device, delay_s: Callable[[str], float] | None = None
    ) -> None:
        self.name = name
        self._device = device
        self._delay_s = delay_s
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=f"slideformer-{name}", daemon=True)
        self._thread.start()

    def submit(
        self,
        label: str,
        work: Callable[[], object],
        *,
        after: Sequence[Handle] = (),
        after_events: Sequence[torch.cuda.Event | None] = (),
    ) -> Handle:
        """Run `work` on the lane once `after` is done on the host or stream and `after_events` have fired."""
        handle = Handle(label)
        if self._closed:
            handle.fail(StateError("the engine was closed; prepare the model again"))
            return handle
        self._queue.put((handle, work, tuple(after), tuple(e for e in after_events if e is not None)))
        return handle

    def close(self) -> None:
        """Finish what is queued, end the thread, and wait until the stream has moved everything."""
        self._closed = True
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._stream is not None:
            self._stream.synchronize()  # buffers may be freed and unpinned from here on

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            handle, work, after, after_events = item
            try:
                handle.complete(self._run(handle.label, work, after, after_events))
            except BaseException as error:  # noqa: BLE001 - carried to the waiting thread
                handle.fail(error)
            # Nothing of a finished item may stay referenced while the thread sleeps in get().
            del item, handle, work, after, after_events

    def _run(self, label, work, after, after_events) -> torch.cuda.Event | None:
        if self._stream is None:
            for handle in after:
                handle.wait_host()
            if self._delay_s is not None:
                time.sleep(self._delay_s(label))
            work()
            return None
        with torch.cuda.stream(self._stream):
            for handle in after:
                handle.wait_stream()
            for event in after_events:
                self._stream.wait_event(event)
            work()
            # Blocking: a thread that waits for it sleeps rather than spins on a core.
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
        return event
