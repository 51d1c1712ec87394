"""Lanes: the threads and streams that move data, and the handles that say when it has moved.

A lane is a first-in-first-out queue served by one thread, and a stream. On a CUDA device the thread only issues copies
to the stream, after waiting on the host for what the copy needs from the host (a finished update), and an event marks
completion for whoever reads the data. On the CPU the thread does the copy itself, after an injectable delay, so that a
missing wait shows in tests. Because each direction has its own thread, a copy that waits for an update never holds up
one that could go.

Whoever waits is answered, whatever fails: work that raises, an event that cannot be recorded, asked or waited for
(after a device-side assertion every call of CUDA raises). Threads go on after it, so that nothing waits for ever.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch

from ..errors import StateError, TransferError
from .streams import Event, compute_event, new_stream

logger = logging.getLogger(__name__)


class Handle:
    """A promise of one piece of asynchronous work.

    `wait_issued` and `wait_host` block the calling thread, `wait_stream` only the current stream of the device that
    does the work (beyond the time until the work has been issued). Each raises `TransferError` with the cause if the
    work failed.
    """

    __slots__ = ("_error", "_issued", "_kept", "event", "label")

    def __init__(self, label: str) -> None:
        self.label = label
        self.event: Event | None = None
        self._issued = threading.Event()
        self._error: BaseException | None = None
        self._kept: Sequence[object] = ()

    def keep(self, what: Sequence[object]) -> None:
        """Hold references to what the work uses, as long as somebody has this handle."""
        self._kept = what

    @classmethod
    def done(cls, label: str = "") -> Handle:
        """A handle of work that is already complete."""
        handle = cls(label)
        handle._issued.set()
        return handle

    def complete(self, event: Event | None = None) -> None:
        """Mark the work as issued (with `event`, done when it fires) or done (without)."""
        self.event = event
        self._issued.set()

    def fail(self, error: BaseException) -> None:
        """Hand `error` to everyone who waits."""
        self._error = error
        self._issued.set()

    @property
    def is_complete(self) -> bool:
        """Whether the work is done; never blocks.

        A failed handle counts as complete, and so does one whose event cannot be asked: who waits for it is told why.
        """
        if not self._issued.is_set():
            return False
        try:
            return self.event is None or self.event.query()
        except Exception:  # noqa: BLE001 - raised again by the wait that follows
            return True

    @property
    def failed(self) -> bool:
        """Whether the work has failed."""
        return self._error is not None

    @property
    def error(self) -> BaseException | None:
        """Why the work has failed; None if it has not."""
        return self._error

    def wait_issued(self) -> None:
        """Block until the work has been issued."""
        self._issued.wait()
        if self._error is not None:
            raise self._failure(self._error) from self._error

    def wait_host(self) -> None:
        """Block until the work is done."""
        self.wait_issued()
        if self.event is not None:
            try:
                self.event.synchronize()
            except Exception as error:
                raise self._failure(error) from error

    def wait_stream(self) -> None:
        """Make the current stream of the work's device wait for it (on the CPU: block until it is done)."""
        self.wait_issued()
        if self.event is not None:
            try:
                self.event.wait()
            except Exception as error:
                raise self._failure(error) from error

    def settle(self) -> None:
        """Block until nothing works on it any more, whether it succeeded or not."""
        try:
            self.wait_host()
        except Exception:  # noqa: BLE001 - reported to whoever needs the result
            return

    def _failure(self, error: BaseException) -> TransferError:
        return TransferError(f"{self.label} failed: {error}")


class Lane:
    """One direction of transfer: a thread, and a stream.

    Args:
        name: shown in thread lists and traces ("h2d", "d2h").
        device: the device whose stream is used; the CPU's is the thread itself.
        delay_s: called before each piece of work on the CPU, returns seconds to sleep; for tests.
    """

    def __init__(
        self, name: str, device: torch.device, delay_s: Callable[[str], float] | None = None
    ) -> None:
        self.name = name
        self._delay_s = delay_s if device.type == "cpu" else None
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._stream = new_stream(device)
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=f"slideformer-{name}", daemon=True)
        self._thread.start()

    def submit(
        self,
        label: str,
        work: Callable[[], object],
        *,
        after: Sequence[Handle] = (),
        after_events: Sequence[Event | None] = (),
        dropped: Callable[[], None] | None = None,
    ) -> Handle:
        """Run `work` on the lane once `after` is done and `after_events` have fired, on the host or on the stream.

        `dropped` is called instead of `work` where something of these failed.
        """
        handle = Handle(label)
        if self._closed:
            handle.fail(StateError("the engine was closed; prepare the model again"))
            if dropped is not None:
                dropped()
            return handle
        events = tuple(event for event in after_events if event is not None)
        self._queue.put((handle, work, tuple(after), events, dropped))
        return handle

    def drain(self) -> None:
        """Block until everything submitted before is over, well or not."""
        self.submit("what came before", lambda: None).settle()

    def close(self) -> None:
        """Finish what is queued, end the thread, and wait until the stream has moved everything."""
        self._closed = True
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        try:
            self._stream.synchronize()  # buffers may be freed and unpinned from here on
        except Exception as error:  # noqa: BLE001 - a device that answers nothing moves nothing either
            # Not raised: what broke the device has been, where it happened, and others are still to be closed.
            logger.warning("the stream of lane %s ended with an error: %s", self.name, error)

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            handle, work, after, events, dropped = item
            try:
                handle.complete(self._run(handle.label, work, after, events, dropped))
            except BaseException as error:  # noqa: BLE001 - carried to the waiting thread
                handle.fail(error)
            # Nothing of a finished item may stay referenced while the thread sleeps in get().
            del item, handle, work, after, events, dropped

    def _run(self, label, work, after, events, dropped) -> Event:
        with self._stream.active():
            try:
                for handle in after:
                    handle.wait_issued()
                    if handle.event is not None:
                        self._stream.wait(handle.event)
                for event in events:
                    self._stream.wait(event)
                if self._delay_s is not None:
                    time.sleep(self._delay_s(label))
            except BaseException:
                if dropped is not None:
                    dropped()
                raise
            work()
            return self._stream.record()


__all__ = ["Event", "Handle", "Lane", "compute_event"]
