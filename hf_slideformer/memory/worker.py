"""The update worker: one thread that runs CPU updates and gradient sums beside the GPU.

The next forward needs units in order, so of the jobs whose gradients have landed the worker takes the one with
the lowest priority number, which callers set to the unit's place in the forward order. Under overlapped updates
this leaves the last units, the ones whose weights are needed last, for the time of the next forward.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import StateError
from ..metrics import Metrics
from .transfer import Handle

# After every other job that can run.
_LAST = sys.maxsize


@dataclass(slots=True, eq=False)
class _Job:
    priority: int
    number: int
    after: tuple[Handle, ...]
    work: Callable[[], None]
    dropped: Callable[[], None] | None
    handle: Handle


class UpdateWorker:
    """A thread with a priority queue whose jobs wait for transfers.

    Args:
        metrics: receives `update_s`.
        delay_s: seconds to sleep before a job, by label; for tests.
    """

    def __init__(self, metrics: Metrics, delay_s: Callable[[str], float] | None = None) -> None:
        self._metrics = metrics
        self._delay_s = delay_s
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._jobs: list[_Job] = []
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="slideformer-update", daemon=True)
        self._thread.start()

    def submit(
        self,
        label: str,
        work: Callable[[], None],
        *,
        priority: int,
        after: Sequence[Handle] = (),
        dropped: Callable[[], None] | None = None,
    ) -> Handle:
        """Run `work` when all of `after` is done; jobs that could run go by lowest `priority`, then by age.

        `dropped` is called instead of `work` where something of `after` failed.
        """
        handle = Handle(label)
        with self._wake:
            if not self._closed:
                self._jobs.append(_Job(priority, next(self._numbers), tuple(after), work, dropped, handle))
                self._wake.notify()
                return handle
        handle.fail(StateError("the engine was closed; prepare the model again"))
        if dropped is not None:
            dropped()
        return handle

    def drain(self) -> None:
        """Block until everything submitted before that waits for nothing is over, well or not."""
        self.submit("what came before", lambda: None, priority=_LAST).settle()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _serve(self) -> None:
        while (job := self._take()) is not None:
            try:
                self._wait(job)
                with self._metrics.timed("update_s", job.handle.label, lane="update"):
                    job.work()
                job.handle.complete()
            except BaseException as error:  # noqa: BLE001 - carried to the waiting thread
                job.handle.fail(error)
            del job

    def _wait(self, job: _Job) -> None:
        try:
            for handle in job.after:
                handle.wait_host()
            if self._delay_s is not None:
                time.sleep(self._delay_s(job.handle.label))
        except BaseException:
            if job.dropped is not None:
                job.dropped()
            raise

    def _take(self) -> _Job | None:
        with self._wake:
            while not self._jobs and not self._closed:
                self._wake.wait()
            if not self._jobs:
                return None
            ready = [job for job in self._jobs if all(handle.is_complete for handle in job.after)]
            # Nothing has landed yet: the oldest lands first, since transfers are first in, first out.
            job = min(ready, key=lambda j: (j.priority, j.number)) if ready else self._jobs[0]
            self._jobs.remove(job)
            return job
