"""Counters and spans of what the engine did: bytes per link, seconds lost to each resource, a trace."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of host-side work: its lane, name, start and end in seconds of `time.perf_counter`."""

    lane: str
    name: str
    start: float
    end: float


class Metrics:
    """Totals since the engine started (or since `reset`), safe to add to from any thread.

    Keys used by the engine: `h2d_bytes`, `d2h_bytes`, `updated_params`, and seconds `wait_weights_s`
    (the computing thread waited for a unit's weights), `wait_gradients_s` (it waited for gradients to
    land), `update_s` (the update worker was busy). With state on disk also `disk_read_bytes`, `disk_write_bytes`, and
    the seconds that reads and writes took, `disk_read_s` and `disk_write_s` (several may run at once).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, float] = defaultdict(float)
        self.spans: list[Span] = []
        self.tracing = False

    def add(self, key: str, amount: float) -> None:
        """Add `amount` to the total named `key`."""
        with self._lock:
            self._totals[key] += amount

    @contextmanager
    def timed(self, key: str, name: str = "", lane: str = "main"):
        """Add the seconds spent inside to `key`; keep a span too while tracing."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            with self._lock:
                self._totals[key] += end - start
                if self.tracing:
                    self.spans.append(Span(lane, name or key, start, end))

    def totals(self) -> dict[str, float]:
        """A copy of all totals."""
        with self._lock:
            return dict(self._totals)

    def reset(self) -> None:
        """Forget totals and spans."""
        with self._lock:
            self._totals.clear()
            self.spans.clear()

    def write_trace(self, path: str | Path) -> None:
        """Write the spans as Chrome/Perfetto trace JSON (microseconds, one row a lane)."""
        with self._lock:
            spans = list(self.spans)
        events = [
            {
                "name": s.name,
                "ph": "X",
                "pid": 0,
                "tid": s.lane,
                "ts": s.start * 1e6,
                "dur": (s.end - s.start) * 1e6,
            }
            for s in spans
        ]
        Path(path).write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
