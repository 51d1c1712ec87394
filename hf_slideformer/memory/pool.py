"""Slots: the few GPU buffers that units take turns in, and the leases on them.

Hazard "slot reuse" (referred to elsewhere by that name): a slot's next copy must not start before the last
kernel that reads the slot has finished, and a kernel must not start before the copy into the slot has landed.
The first is ordered by the event recorded when a lease ends, the second by the handle that `acquire` waits for
on the current stream. Neither blocks the host, except for work that has not been issued yet.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .buffers import Buffer
from .layout import UnitLayout
from .lease import Lease, used_by
from .runtime import Runtime
from .streams import Event
from .transfer import Handle, compute_event


class WeightSource(Protocol):
    """What the pool needs to know of a unit."""

    @property
    def index(self) -> int:
        """Its number, unique in the pool."""
        ...

    @property
    def name(self) -> str:
        """Its name in messages."""
        ...

    @property
    def layout(self) -> UnitLayout:
        """Where its parameters lie in its weights."""
        ...

    def source(self) -> Lease[Buffer] | None:
        """Asks for its weights on the host, `layout.weight_bytes`, as its pending update leaves them; None if there is
        nothing to fetch.
        """
        ...


@dataclass(slots=True, eq=False)
class _Slot:
    buffer: torch.Tensor
    unit: int | None = None
    handle: Handle = field(default_factory=Handle.done)
    released: Event | None = None
    leases: int = 0
    last_use: int = 0
    leaves: dict[UnitLayout, list[torch.nn.Parameter]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class SlotLease:
    """The right to compute with a unit's weights until `release`.

    `leaves` are the unit's parameters on the device, in the order of `layout.segments`: autograd leaves over
    the slot's memory, valid only until `release`.
    """

    leaves: list[torch.nn.Parameter]
    _pool: SlotPool | None
    _slot: _Slot | None
    _round: int = 0

    @classmethod
    def nothing(cls) -> SlotLease:
        """The lease of a unit that needs no slot."""
        return cls([], None, None)

    @property
    def ready(self) -> Handle:
        """Done when the weights are there; the current stream has been told to wait for it."""
        return Handle.done() if self._slot is None else self._slot.handle

    @property
    def buffer(self) -> torch.Tensor | None:
        """(bytes,) uint8: the slot, if there is one."""
        return None if self._slot is None else self._slot.buffer

    def release(self, *, after: Handle | None = None) -> None:
        """End the lease; the slot may be overwritten once what the current stream was given is done.

        Args:
            after: None; what reads a slot is on that stream.
        """
        assert after is None
        pool, self._pool = self._pool, None
        if pool is not None and self._slot is not None:
            pool._release(self._slot, self._round)


class SlotPool:
    """A fixed number of equal GPU buffers with the weights of the units used last and next.

    On the CPU the pool copies too, and fills a slot with NaN bytes when it is given to another unit, so that a read
    outside a lease cannot go unnoticed.

    Args:
        runtime: device, link and lane; its metrics receive `h2d_bytes` and `wait_weights_s`.
        slot_bytes: size of one slot, that of the largest unit.
        num_slots: at least 2 (one in use, one arriving), or 0 where nothing streams.
    """

    def __init__(self, runtime: Runtime, slot_bytes: int, num_slots: int) -> None:
        self._device = device = runtime.device
        self._link, self._lane = runtime.link, runtime.to_device
        self._metrics = runtime.metrics
        self._lock = threading.Lock()  # forward runs on the user's thread, backward on autograd's
        self._clock = 0
        self._round = 0  # of leases; a reset ends all of them
        # Slots outlive any inference_mode that happens to be active at the first fetch.
        with torch.inference_mode(False):
            self._slots = [
                _Slot(torch.empty(slot_bytes, dtype=torch.uint8, device=device)) for _ in range(num_slots)
            ]
        for slot in self._slots:
            # The allocator orders reuse of memory on the current stream only; the first copy runs on another.
            slot.released = compute_event(device)

    @property
    def depth(self) -> int:
        """How many units can be on their way while one is in use."""
        return max(0, len(self._slots) - 1)

    def prefetch(self, unit: WeightSource, keep: Collection[int]) -> None:
        """Start fetching `unit` if a slot is free that does not hold one of the units `keep`."""
        with self._lock:
            if self._find(unit.index) is None:
                slot = self._victim(keep)
                if slot is not None:
                    self._fetch(slot, unit)

    def acquire(self, unit: WeightSource) -> SlotLease:
        """The unit's weights on the device; the current stream waits for them, the host does not."""
        if not unit.layout.segments:  # it computes with what is there
            return SlotLease.nothing()
        with self._lock:
            slot = self._find(unit.index)
            if slot is None:
                slot = self._victim(())
                assert slot is not None, "more units leased at once than there are slots"
                self._fetch(slot, unit)
            slot.leases += 1
            self._clock += 1
            slot.last_use = self._clock
        try:
            with self._metrics.timed("wait_weights_s", unit.name):
                slot.handle.wait_stream()
            return SlotLease(self._leaves(slot, unit.layout), self, slot, self._round)
        except BaseException:
            with self._lock:
                slot.leases -= 1
                slot.unit = None
            raise

    def invalidate(self) -> None:
        """Forget every unit's weights; they are about to change on the host."""
        with self._lock:
            for slot in self._slots:
                slot.unit = None

    def invalidate_unit(self, index: int) -> None:
        """Forget one unit's weights."""
        with self._lock:
            slot = self._find(index)
            if slot is not None:
                slot.unit = None

    def wait(self) -> None:
        """Block until no fetch is under way. Failures stay with the handles that hold them."""
        for slot in self._slots:
            slot.handle.settle()

    def reset(self) -> None:
        """End every lease and forget every unit's weights, after what an exception or Ctrl-C cut short anywhere.

        Nobody computes with a lease any more; one that is released later has no effect.
        """
        self.wait()
        with self._lock:
            self._round += 1
            for slot in self._slots:
                slot.unit, slot.leases = None, 0
                slot.released = compute_event(self._device)

    def free(self) -> None:
        """Let go of the slots, once no fetch is under way; nothing can be acquired from then on."""
        self.wait()
        self._slots = []

    def _find(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.unit == index), None)

    def _victim(self, keep: Collection[int]) -> _Slot | None:
        free = [
            slot for slot in self._slots if slot.leases == 0 and (slot.unit is None or slot.unit not in keep)
        ]
        return min(free, key=lambda slot: (slot.unit is not None, slot.last_use), default=None)

    def _fetch(self, slot: _Slot, unit: WeightSource) -> None:
        nbytes = unit.layout.weight_bytes
        slot.unit = None  # until a fetch of the unit is on its way, whatever happens meanwhile
        if self._device.type == "cpu":
            self._poison(slot)
        self._clock += 1
        source = unit.source()
        assert source is not None, "a unit that does not stream needs no slot"
        with used_by(self._lane, source):
            slot.handle = self._link.fill(
                f"fetch of {unit.name}",
                slot.buffer[:nbytes],
                source,
                after=slot.released,  # hazard "slot reuse"
            )
            source.release(after=slot.handle)
        slot.unit, slot.last_use = unit.index, self._clock
        self._metrics.add("h2d_bytes", nbytes)

    @staticmethod
    def _poison(slot: _Slot) -> None:
        """Make a read by who has no lease on the slot any more show."""
        if not slot.handle.failed:
            slot.handle.wait_issued()
        slot.buffer.fill_(0xFF)  # NaN in every float dtype

    def _release(self, slot: _Slot, round_: int) -> None:
        event = compute_event(self._device)
        with self._lock:
            if round_ == self._round:
                slot.leases -= 1
                slot.released = event

    def _leaves(self, slot: _Slot, layout: UnitLayout) -> list[torch.nn.Parameter]:
        leaves = slot.leaves.get(layout)
        if leaves is None:
            with torch.inference_mode(False):
                leaves = []
                for segment in layout.segments:
                    spec = segment.spec
                    nbytes = spec.numel * spec.dtype.itemsize
                    view = slot.buffer[segment.weight_offset : segment.weight_offset + nbytes].view(
                        spec.dtype
                    )
                    leaves.append(torch.nn.Parameter(view.view(spec.shape), requires_grad=spec.trainable))
            slot.leaves[layout] = leaves
        return leaves
