"""Time model: how long a training step takes on one machine, and what bounds it.

A few steps are simulated with one clock for each thing that does one piece of work at a time: the GPU's compute
stream, the two directions of the link, the update worker on the CPU, the disk, and the thread that launches kernels.
Work is issued in the engine's order, and waits for what it needs:

    fetch of weights      a slot, the unit's pending update, the link
    forward, backward     the unit's weights, an input that was offloaded, the launching thread; backward also for the
                          gradients of earlier units, of which only a few may be on their way
    gradients to RAM      backward of the unit, the link, a staging buffer where they pass through one
    update of a unit      its gradients; with clipping also the norm, which is known after backward; its state
    state from disk       the disk, and a buffer, which is free again when the state of another unit has been written

The disk does one thing at a time, so that its seconds are bytes read and bytes written over their rates (an assumption:
what both at once take is not measured). Reads are asked for with the updates that need them.

The last of the simulated steps counts: by then what one step leaves to the next is as in a long run.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..machine.hardware import Hardware
from ..machine.presets import disk_rates
from ..memory.limits import COPIES_IN_FLIGHT
from .memory import disk_layout
from .workload import Decisions, Workload

COMPUTE = "GPU compute"
H2D, D2H = "PCIe to the GPU", "PCIe to RAM"
LINK = "PCIe"
UPDATE = "CPU update (RAM bandwidth)"
LAUNCH = "launching kernels"
DISK = "disk"

# A layer's matrix products reach this part of a large square product's rate, its other operations this part of a copy's
# rate.
# Attention's own kernel is slower than large products, per operation that is not masked. All three were fitted together
# to whole steps, those of docs/benchmarks/2026-11-22-h100-plan/ and the streamed ones before, with the rates in
# probe.json there: the probe multiplies without a pause, so the GPU lowers its clock more than in training.
_PRODUCT_SHARE = 1.05
_ATTENTION_SHARE = 0.7
_COPY_SHARE = 0.85

# Backward against forward. Products: each has two in backward, attention two and a half (flash attention computes its
# scores again). Other operations read the gradient besides what forward read, and write one gradient for each input.
_BACKWARD_FLOPS = 2.0
_BACKWARD_ATTENTION = 2.5
_BACKWARD_TRAFFIC = 2.5

# Time of the thread that launches kernels, for one unit; from traces of Llama layers on the H100 machine. A kept unit's
# backward is autograd's own loop, in C++ (estimate).
_LAUNCH_FORWARD_S = 2e-3
_LAUNCH_BACKWARD_S = 3e-3
_LAUNCH_KEPT_BACKWARD_S = 1e-3
# What a streamed unit adds: a fetch, and sending its gradients (estimates). Little, but where all else is equal it says
# that a unit that fits should stay.
_LAUNCH_FETCH_S = 0.1e-3
_LAUNCH_SEND_S = 0.2e-3
# Embedding, final norm, head and loss, and Trainer's own work between two steps (estimates).
_LAUNCH_LOSS_S = 2e-3
_LAUNCH_STEP_S = 15e-3
# Update of a resident unit: a kernel for each parameter (estimate).
_LAUNCH_UPDATE_S = 0.5e-3

# The CPU's update against the probe's, by format of moments, and the part of copies beside it that it really meets;
# fitted to the same rows. Why training updates faster than the probe does is not known.
_UPDATE_SHARE = {"fp32": 1.10, "8bit": 1.03}
_COPIES_MET = 0.8

# Adding a gradient to its fp32 sum on the CPU takes this many times the fp32 update of the same parameters. Measured:
# 3.1 s for twice 6.98 G parameters (docs/benchmarks/2026-11-22-h100-stream/accumulation.jsonl).
_SUM_PER_UPDATE = 1.35

# Copies from and to memory that is not pinned take this many times as long.
PAGEABLE_FACTOR = 2.0

_STEPS = 4
_STEADY = 1e-3  # two steps that differ by less are alike


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a step will take.

    Attributes:
        step_s: seconds of one optimizer step in a long run.
        tokens_per_s: tokens of all micro-batches over `step_s`.
        bound_by: what would shorten the step most if it were twice as fast, in words.
        busy_s: seconds of work in a step, by resource.
        waits_s: seconds of a step in which the GPU's compute stream has nothing to do, by what it waits for.
    """

    step_s: float
    tokens_per_s: float
    bound_by: str
    busy_s: Mapping[str, float]
    waits_s: Mapping[str, float]


@dataclass(slots=True)
class Durations:
    """Seconds of each piece of work of a step, before anything waits; lists are by unit.

    `compute_speed`, `link_speed`, `update_speed`, `launch_speed` and `disk_speed` of `of` say what if a resource were
    that many times faster.
    """

    micro_batches: int
    overlapped: bool
    forward: list[float]
    backward: list[float]
    recompute: list[float]
    loss: float
    weights: list[float]  # on an idle link; `busy_link` times as long while the other direction is used too
    gradients: list[float]
    inputs: list[float]
    busy_link: float
    update: list[float]
    summing: list[float]
    slowdown: float  # of the update, by a second of copying beside it on an idle link
    gpu_update: list[float]
    gpu_update_outside: float
    outside_gradients: float
    outside_weights: float
    outside_update: float
    disk_read: list[float]  # of a unit's residuals and moments
    disk_write: list[float]
    whole_read: list[float]  # with weights, and gradients that wait
    whole_write: list[float]  # with weights
    fetch_read: list[float]  # of weights
    gradients_wait: list[float]  # to the disk, and from there what they are added to
    input_read: list[float]
    input_write: list[float]
    launch: float = 1.0

    @classmethod
    def of(
        cls,
        workload: Workload,
        hardware: Hardware,
        *,
        compute_speed: float = 1.0,
        link_speed: float = 1.0,
        update_speed: float = 1.0,
        launch_speed: float = 1.0,
        disk_speed: float = 1.0,
    ) -> Durations:
        """Durations of a workload that has a profile."""
        profile, layouts, moments = workload.profile, workload.layouts, workload.moments.name
        assert profile is not None, "times need a profile"
        traffic_rate = hardware.gpu_copy * _COPY_SHARE * compute_speed

        def product_rate(dtype: torch.dtype) -> float:
            rate = hardware.fp32_flops if dtype == torch.float32 else hardware.bf16_flops
            return rate * _PRODUCT_SHARE * compute_speed

        dtypes = [_main_dtype([segment.spec for segment in layout.segments]) for layout in layouts]
        forward, backward, recompute = [], [], []
        for unit, dtype in zip(profile.units, dtypes, strict=True):
            rate, rest = product_rate(dtype), unit.forward_traffic / traffic_rate
            products = (unit.forward_flops - unit.attention_flops) / rate
            attention = unit.attention_flops / (rate * _ATTENTION_SHARE)
            forward.append(products + attention + rest)
            not_repeated = (1 - unit.recompute_share) * unit.forward_flops / rate
            recompute.append(max(0.0, products - not_repeated) + attention + rest)
            backward.append(
                _BACKWARD_FLOPS * products + _BACKWARD_ATTENTION * attention + _BACKWARD_TRAFFIC * rest
            )
        head = product_rate(_main_dtype(workload.outside))
        trainable = [spec for spec in workload.outside if spec.trainable]
        outside_bytes = sum(spec.numel * spec.dtype.itemsize for spec in trainable)
        outside_grads = sum(
            spec.numel * (4 if workload.fp32_sums else spec.dtype.itemsize) for spec in trainable
        )
        outside_numel = sum(spec.numel for spec in trainable)
        h2d, d2h = hardware.h2d * link_speed, hardware.d2h * link_speed
        cpu = _UPDATE_SHARE[moments] * hardware.cpu_adamw[moments] * update_speed
        gpu = hardware.gpu_adamw[moments] * compute_speed
        read, write = disk_rates(hardware)
        places = [disk_layout(workload, layout) for layout in layouts]
        read, write = read * disk_speed, write * disk_speed
        # While copies run both ways the update is slowed from one measured rate to the other; so each second of copying
        # costs it a part of a second.
        loaded = min(1.0, hardware.cpu_adamw_loaded[moments] / hardware.cpu_adamw[moments])
        return cls(
            micro_batches=workload.micro_batches,
            overlapped=workload.overlapped,
            forward=forward,
            backward=backward,
            recompute=recompute,
            loss=profile.loss_flops / head + profile.loss_traffic / traffic_rate,
            weights=[layout.weight_bytes / h2d for layout in layouts],
            gradients=[layout.grad_bytes / d2h for layout in layouts],
            inputs=[unit.boundary_bytes / d2h for unit in profile.units],
            busy_link=max(1.0, (hardware.h2d + hardware.d2h) / hardware.duplex),
            update=[layout.trainable_numel / cpu for layout in layouts],
            summing=[
                _SUM_PER_UPDATE * layout.trainable_numel / (hardware.cpu_adamw["fp32"] * update_speed)
                for layout in layouts
            ],
            slowdown=_COPIES_MET * (1 - loaded) * hardware.h2d / hardware.duplex * link_speed / update_speed,
            gpu_update=[layout.trainable_numel / gpu for layout in layouts],
            gpu_update_outside=outside_numel / gpu,
            outside_gradients=outside_grads / d2h,
            outside_weights=outside_bytes / h2d,
            outside_update=outside_numel / cpu,
            disk_read=[place.nbytes / read for place in places],
            disk_write=[place.nbytes / write for place in places],
            whole_read=[place.masters_and_gradients[1] / read for place in places],
            whole_write=[place.masters[1] / write for place in places],
            fetch_read=[place.weight_bytes / read for place in places],
            gradients_wait=[
                place.grad_bytes / write + (place.grad_bytes / read if workload.fp32_sums else 0.0)
                for place in places
            ],
            input_read=[unit.boundary_bytes / read for unit in profile.units],
            input_write=[unit.boundary_bytes / write for unit in profile.units],
            launch=1.0 / launch_speed,
        )


@dataclass(slots=True)
class _Load:
    """What decisions make of durations."""

    forward: list[float]
    backward: list[float]
    streamed: list[int]
    forward_link: float
    backward_link: float
    update: list[float]
    busy: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, times: Durations, decisions: Decisions, pageable: float) -> _Load:
        resident, activations = set(decisions.resident), decisions.activations
        units = range(len(times.forward))
        streamed = [unit for unit in units if unit not in resident]
        keeps = [policy == "keep" for policy in activations]
        offloaded = [unit for unit in units if activations[unit] == "offload"]
        backward = [times.backward[k] + (0.0 if keeps[k] else times.recompute[k]) for k in units]
        slower = 1.0 + pageable * (PAGEABLE_FACTOR - 1.0)
        both = slower * times.busy_link
        fetched_again = streamed[: max(0, len(streamed) - decisions.slots)]

        inputs = sum(times.inputs[unit] for unit in offloaded)
        to_gpu = sum(times.weights[k] for k in streamed)
        again = sum(times.weights[k] for k in fetched_again)
        gradients = sum(times.gradients[k] for k in streamed)
        # Copies that run while the worker updates: those of forward, or those of the whole step.
        beside = to_gpu + inputs + ((again + inputs + gradients) if times.overlapped else 0.0)
        update = [times.update[k] for k in units]
        total = sum(update[k] for k in streamed)
        if total:
            share = times.slowdown * beside / total
            update = [seconds * (1 + share) for seconds in update]

        m = times.micro_batches
        whole, refetched = set(decisions.weights_on_disk), set(fetched_again)
        outside = decisions.outside_state == "RAM"
        launch_backward = sum(_LAUNCH_KEPT_BACKWARD_S if keep else _LAUNCH_BACKWARD_S for keep in keeps)
        load = cls(
            forward=times.forward,
            backward=backward,
            streamed=streamed,
            forward_link=both if offloaded else slower,
            backward_link=both if streamed else slower,
            update=update,
        )
        load.busy = {
            COMPUTE: m * (sum(times.forward) + sum(backward) + times.loss)
            + sum(times.gpu_update[k] for k in resident)
            + (0.0 if outside else times.gpu_update_outside),
            H2D: m * ((to_gpu + inputs) * slower + again * slower)
            + (times.outside_weights * slower if outside else 0.0),
            D2H: m * (gradients + inputs) * slower + (times.outside_gradients * slower if outside else 0.0),
            UPDATE: sum(update[k] for k in streamed)
            + (times.outside_update if outside else 0.0)
            + (m * sum(times.summing[k] for k in streamed) if m > 1 else 0.0),
            LAUNCH: times.launch
            * (
                m * (len(times.forward) * _LAUNCH_FORWARD_S + launch_backward + _LAUNCH_LOSS_S)
                + m * (len(streamed) + len(fetched_again)) * _LAUNCH_FETCH_S
                + m * len(streamed) * _LAUNCH_SEND_S
                + _LAUNCH_STEP_S
                + len(resident) * _LAUNCH_UPDATE_S
            ),
            DISK: sum(
                times.whole_read[k]
                + times.whole_write[k]
                + m * ((1 + (k in refetched)) * times.fetch_read[k] + times.gradients_wait[k])
                + (m * (times.input_read[k] + times.input_write[k]) if activations[k] == "offload" else 0.0)
                if k in whole
                else times.disk_read[k] + times.disk_write[k]
                for k in decisions.on_disk
            ),
        }
        return load


def shortest_step_s(times: Durations, decisions: Decisions, pageable: float = 0.0) -> float:
    """A time that no simulated step is shorter than: the work of the busiest resource, and with clipping that of the
    update, or of the disk for it, followed by the backward pass, which needs all of it.
    """
    load = _Load.of(times, decisions, pageable)
    bound = max(load.busy.values())
    if not times.overlapped and load.streamed:
        after = load.streamed[-1]
        update = sum(load.update[k] for k in load.streamed)
        backward = times.loss + sum(load.backward)
        bound = max(bound, update + sum(load.forward[after:]) + backward)
        if decisions.on_disk:
            # All are read, and those whose buffers are needed again are written.
            written = sorted(times.disk_write[k] for k in decisions.on_disk)
            disk = sum(times.disk_read[k] for k in decisions.on_disk)
            disk += sum(written[: max(0, len(written) - decisions.disk_buffers)])
            bound = max(bound, disk + sum(load.forward[max(decisions.on_disk) :]) + backward)
    return bound


def step_seconds(times: Durations, decisions: Decisions, pageable: float = 0.0) -> float:
    """Seconds of a step in a long run.

    Args:
        times: of the workload on the machine.
        decisions: what to simulate.
        pageable: share of the copied memory that is not pinned.
    """
    return _simulate(_Load.of(times, decisions, pageable), times, decisions)[0]


def predict(
    workload: Workload, hardware: Hardware, decisions: Decisions, pageable: float = 0.0
) -> Prediction:
    """What a step takes under these decisions, and what bounds it.

    Args:
        workload: with a profile.
        hardware: the machine.
        decisions: what lives where.
        pageable: share of the copied memory that is not pinned.
    """
    assert workload.profile is not None, "times need a profile"
    times = Durations.of(workload, hardware)
    load = _Load.of(times, decisions, pageable)
    step_s, waits = _simulate(load, times, decisions)
    twice_as_fast = {
        COMPUTE: {"compute_speed": 2.0},
        UPDATE: {"update_speed": 2.0},
        LINK: {"link_speed": 2.0},
        LAUNCH: {"launch_speed": 2.0},
    } | ({DISK: {"disk_speed": 2.0}} if decisions.on_disk else {})
    what_if = {
        resource: step_seconds(Durations.of(workload, hardware, **speed), decisions, pageable)
        for resource, speed in twice_as_fast.items()
    }
    return Prediction(
        step_s=step_s,
        tokens_per_s=workload.profile.tokens * workload.micro_batches / step_s,
        bound_by=min(what_if, key=lambda resource: what_if[resource]),
        busy_s=load.busy,
        waits_s=waits,
    )


def _main_dtype(specs) -> torch.dtype:
    """The dtype of most parameters."""
    numel: dict[torch.dtype, int] = {}
    for spec in specs:
        numel[spec.dtype] = numel.get(spec.dtype, 0) + spec.numel
    return max(numel, key=lambda dtype: numel[dtype], default=torch.float32)


# -- simulation ------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """Work for the update worker. A staged one gives its staging buffer back when it is done; one whose state is on
    disk has that read before, written after, and keeps one of the disk's buffers meanwhile.
    """

    ready: float
    priority: int
    seconds: float
    what: tuple[str, int]
    staged: bool = False
    asked: float = 0.0
    read: float | None = None
    write: float = 0.0


class _Worker:
    """The update worker, of the jobs that are ready it takes the first in forward order, and the disk beside it."""

    def __init__(self, staging_buffers: int, disk_buffers: int) -> None:
        self.clock = self.disk = 0.0
        self.done: dict[tuple[str, int], float] = {}
        self._held_up: set[tuple[str, int]] = set()
        # When each free staging buffer became so, and what that had waited for.
        self._staging = [(0.0, UPDATE)] * staging_buffers
        self._buffers = [0.0] * disk_buffers
        self._unread: deque[_Job] = deque()
        self._coming: list[_Job] = []
        self._ready: list[tuple[int, float, _Job]] = []

    def submit(self, job: _Job) -> None:
        """Add a job."""
        self.done.pop(job.what, None)
        if job.read is None:
            heapq.heappush(self._coming, job)
        else:
            self._unread.append(job)
            self._read_ahead()

    def finish(self, what: tuple[str, int]) -> float:
        """When the job is done."""
        while what not in self.done:
            self._run_one()
        return self.done[what]

    def finish_all(self) -> float:
        """When all jobs are done."""
        while self._coming or self._ready:
            self._run_one()
        return self.clock

    def take_staging(self) -> tuple[float, str]:
        """When a staging buffer is free, and what that waited for."""
        while not self._staging:
            self._run_one()
        return heapq.heappop(self._staging)

    def waited_for(self, what: tuple[str, int]) -> str:
        """What a job that is done began after: `DISK` where the worker had time before its state came."""
        return DISK if what in self._held_up else UPDATE

    def _read_ahead(self) -> None:
        while self._unread and self._buffers:
            job = self._unread.popleft()
            assert job.read is not None
            self.disk = max(self.disk, heapq.heappop(self._buffers), job.asked) + job.read
            self._held_up.discard(job.what)
            if self.disk > job.ready:
                self._held_up.add(job.what)
            heapq.heappush(self._coming, job._replace(ready=max(job.ready, self.disk)))

    def _run_one(self) -> None:
        if not self._ready and self._coming[0].ready > self.clock:
            self.clock = self._coming[0].ready
        while self._coming and self._coming[0].ready <= self.clock:
            job = heapq.heappop(self._coming)
            heapq.heappush(self._ready, (job.priority, job.ready, job))
        _, ready, job = heapq.heappop(self._ready)
        if self.clock > ready:
            self._held_up.discard(job.what)
        self.clock += job.seconds
        self.done[job.what] = self.clock
        if job.staged:
            heapq.heappush(self._staging, (self.clock, self.waited_for(job.what)))
        if job.read is not None:
            self.disk = max(self.disk, self.clock) + job.write
            heapq.heappush(self._buffers, self.disk)
            self._read_ahead()


class _Step:
    """Clocks of all resources, and the rules of one step."""

    def __init__(self, load: _Load, times: Durations, decisions: Decisions) -> None:
        self.load, self.times, self.decisions = load, times, decisions
        units = range(len(load.forward))
        self.is_streamed = [False] * len(load.forward)
        for unit in load.streamed:
            self.is_streamed[unit] = True
        self.offloads = [policy == "offload" for policy in decisions.activations]
        self.offloaded = [unit for unit in units if self.offloads[unit]]
        self.launch_forward = _LAUNCH_FORWARD_S * times.launch
        self.launch_backward = [
            (_LAUNCH_KEPT_BACKWARD_S if policy == "keep" else _LAUNCH_BACKWARD_S) * times.launch
            for policy in decisions.activations
        ]
        self.staged = decisions.staging_buffers > 0 and (times.overlapped or times.micro_batches > 1)
        self.host = self.compute = self.h2d = self.d2h = self.issued = 0.0
        self.worker = _Worker(decisions.staging_buffers, decisions.disk_buffers)
        self.on_disk, self.whole = set(decisions.on_disk), set(decisions.weights_on_disk)
        self.pending = [False] * len(load.forward)
        # Slots: the unit in each, when its copy lands, what that waited for, when the slot may be overwritten.
        self.holds: list[int | None] = [None] * decisions.slots
        self.landed = [0.0] * decisions.slots
        self.updated = [0.0] * decisions.slots
        self.updated_by = [UPDATE] * decisions.slots
        self.copy_issued = [0.0] * decisions.slots
        self.released = [0.0] * decisions.slots
        self.last_use = [0] * decisions.slots
        self.uses = 0
        self.outside_ready = 0.0
        self.gradients_written = 0.0
        self.link = load.forward_link
        # When each offloaded input is where it waits.
        self.stored = [0.0] * len(load.forward)
        self.waits = {UPDATE: 0.0, LINK: 0.0, LAUNCH: 0.0, DISK: 0.0}

    # -- weights ---------------------------------------------------------------------------------------------

    def prefetch(self, units: list[int], current: int | None) -> None:
        for unit in units:
            if unit not in self.holds:
                keep = {*units, current}
                free = [slot for slot, held in enumerate(self.holds) if held is None or held not in keep]
                if free:
                    self._fetch(min(free, key=self._age), unit)

    def _use_disk(self, ready: float, seconds: float) -> float:
        """When the disk has done what it may begin at `ready`."""
        self.worker.disk = max(self.worker.disk, ready) + seconds
        return self.worker.disk

    def _age(self, slot: int) -> tuple[bool, int]:
        return self.holds[slot] is not None, self.last_use[slot]

    def _fetch(self, slot: int, unit: int) -> None:
        updated, by = 0.0, UPDATE
        if self.pending[unit]:
            updated = self.worker.finish(("update", unit))
            by = self.worker.waited_for(("update", unit))
            self.pending[unit] = False
        self.host += _LAUNCH_FETCH_S * self.times.launch
        self.issued = max(self.issued, self.host, updated)
        start = max(self.h2d, self.issued, self.released[slot])
        if unit in self.whole:
            read = self._use_disk(self.issued, self.times.fetch_read[unit])
            if read > start:
                start, updated, by = read, read, DISK
        self.h2d = start + self.times.weights[unit] * self.link
        self.uses += 1
        self.holds[slot], self.last_use[slot] = unit, self.uses
        self.landed[slot], self.copy_issued[slot] = self.h2d, self.issued
        self.updated[slot], self.updated_by[slot] = updated, by

    def acquire(self, unit: int, following: list[int]) -> int:
        if unit not in self.holds:
            self._fetch(min(range(len(self.holds)), key=self._age), unit)
        slot = self.holds.index(unit)
        self.uses += 1
        self.last_use[slot] = self.uses
        self.prefetch(following, unit)
        # The launching thread waits until the copy has been handed to the link.
        self.host = max(self.host, self.copy_issued[slot])
        return slot

    # -- compute ---------------------------------------------------------------------------------------------

    def run(
        self, seconds: float, ready: float, launch_s: float, *, updated: float = 0.0, by: str = UPDATE
    ) -> None:
        """Work on the compute stream that needs `ready`, and cannot end before it has been launched.

        Waiting for an update that was done at `updated` counts as waiting for `by`.
        """
        self.host += launch_s
        if ready > self.compute:
            self.waits[by if updated > self.compute else LINK] += ready - self.compute
            self.compute = ready
        end = self.compute + seconds
        if self.host > end:
            self.waits[LAUNCH] += self.host - end
            end = self.host
        self.compute = end

    def forward(self) -> None:
        load, streamed = self.load, self.load.streamed
        self.link = load.forward_link
        depth = self.decisions.slots - 1
        position = 0
        leaving: list[float] = []
        self.host += _LAUNCH_LOSS_S * self.times.launch
        for unit, seconds in enumerate(load.forward):
            ready = updated = 0.0
            by = UPDATE
            slot = -1
            if self.is_streamed[unit]:
                slot = self.acquire(unit, streamed[position + 1 : position + 1 + depth])
                ready, updated, by = self.landed[slot], self.updated[slot], self.updated_by[slot]
                position += 1
            if self.offloads[unit]:
                self.d2h = max(self.d2h, self.compute) + self.times.inputs[unit] * self.link
                self.stored[unit] = self.d2h
                if unit in self.whole:
                    self.stored[unit] = self._use_disk(self.d2h, self.times.input_write[unit])
                leaving.append(self.d2h)
                if len(leaving) > COPIES_IN_FLIGHT:
                    ready = max(ready, leaving[-1 - COPIES_IN_FLIGHT])
            self.run(seconds, ready, self.launch_forward, updated=updated, by=by)
            if slot >= 0:
                self.released[slot] = self.compute

    def backward(self) -> None:
        load, streamed, times = self.load, self.load.streamed, self.times
        self.link = load.backward_link
        depth = self.decisions.slots - 1
        position = len(streamed)
        moving: list[tuple[float, float, str]] = []
        coming: dict[int, float] = {}
        inputs = self.offloaded[::-1]
        for unit in range(len(load.backward) - 1, -1, -1):
            ready = 0.0
            slot = -1
            if self.is_streamed[unit]:
                position -= 1
                slot = self.acquire(unit, streamed[max(0, position - depth) : position][::-1])
                ready = self.landed[slot]
            if self.offloads[unit]:
                while inputs and len(coming) < COPIES_IN_FLIGHT + 1:
                    first = inputs.pop(0)
                    there = max(self.host, self.stored[first])
                    if first in self.whole:
                        there = self._use_disk(there, times.input_read[first])
                    self.h2d = max(self.h2d, there) + times.inputs[first] * self.link
                    coming[first] = self.h2d
                ready = max(ready, coming.pop(unit))
            self.run(load.backward[unit], ready, self.launch_backward[unit])
            if slot >= 0:
                self.released[slot] = self.compute
                moving.append(self._send_gradients(unit))
                if len(moving) > COPIES_IN_FLIGHT:
                    issued, landed, by = moving.pop(0)
                    self.host = max(self.host, issued)
                    self.run(0.0, landed, 0.0, updated=issued if self.staged else 0.0, by=by)

    def _send_gradients(self, unit: int) -> tuple[float, float, str]:
        """When the copy of a unit's gradients is handed to the link, when it lands, and whom a staging buffer kept."""
        self.host += _LAUNCH_SEND_S * self.times.launch
        free, by = self.worker.take_staging() if self.staged else (0.0, UPDATE)
        issued = max(self.host, free)
        self.d2h = max(self.d2h, self.compute, issued) + self.times.gradients[unit] * self.link
        if unit in self.whole and not self.times.overlapped:
            self.gradients_written = self._use_disk(self.d2h, self.times.gradients_wait[unit])
        if self.times.overlapped:
            self._submit_update(unit, self.d2h, staged=True)
        elif self.staged:  # sums go before updates
            self.worker.submit(_Job(self.d2h, -1, self.times.summing[unit], ("sum", unit), staged=True))
        return issued, self.d2h, by

    def _submit_update(self, unit: int, ready: float, *, staged: bool = False) -> None:
        job = _Job(ready, unit, self.load.update[unit], ("update", unit), staged)
        if unit in self.on_disk:
            times = self.times
            whole = unit in self.whole
            read, write = (
                (times.whole_read, times.whole_write) if whole else (times.disk_read, times.disk_write)
            )
            job = job._replace(asked=self.host, read=read[unit], write=write[unit])
        self.worker.submit(job)
        self.pending[unit] = True

    # -- a step ----------------------------------------------------------------------------------------------

    def step(self) -> float:
        """Run one step; returns when it ended for the launching thread."""
        times = self.times
        # An update outside of units is waited for before anything of the model runs.
        self.run(0.0, self.outside_ready, 0.0, updated=self.outside_ready)
        for _ in range(times.micro_batches):
            self.forward()
            self.run(times.loss, 0.0, _LAUNCH_LOSS_S * times.launch)
            self.backward()
            # Trainer reads the loss, and deferred gradients are in RAM when backward returns.
            self.host = max(self.host, self.compute)
            if not times.overlapped:
                if self.gradients_written > max(self.host, self.d2h):
                    self.waits[DISK] += self.gradients_written - max(self.host, self.d2h)
                self.host = max(self.host, self.d2h, self.gradients_written)
                if self.staged:
                    self.host = max(self.host, self.worker.finish_all())
        self._update()
        return self.host

    def _update(self) -> None:
        times, load = self.times, self.load
        resident = self.decisions.resident
        if not times.overlapped:
            for unit in load.streamed:
                self._submit_update(unit, self.host)
        seconds = sum(times.gpu_update[unit] for unit in resident)
        if self.decisions.outside_state == "RAM":
            self.d2h = max(self.d2h, self.compute) + times.outside_gradients
            self.worker.submit(_Job(self.d2h, -1, times.outside_update, ("outside", 0)))
            self.h2d = max(self.h2d, self.worker.finish(("outside", 0))) + times.outside_weights
            self.outside_ready = self.h2d
        else:
            seconds += times.gpu_update_outside
        self.run(seconds, 0.0, (_LAUNCH_STEP_S + len(resident) * _LAUNCH_UPDATE_S) * times.launch)
        # The weights in all slots are old now; the first units' are on their way again.
        self.holds = [None] * len(self.holds)
        self.link = load.forward_link
        self.prefetch(load.streamed[: len(self.holds) - 1], None)


def _simulate(load: _Load, times: Durations, decisions: Decisions) -> tuple[float, dict[str, float]]:
    """Seconds of the last simulated step, and what the compute stream waited for in it."""
    machine = _Step(load, times, decisions)
    ends = [0.0]
    waited: dict[str, float] = {}
    for _ in range(_STEPS):
        waited = dict(machine.waits)
        ends.append(machine.step())
        # Where steps are shorter than the disk's work its backlog grows, until all its buffers are part of it.
        if len(ends) > 3 and abs(ends[-1] - 2 * ends[-2] + ends[-3]) <= _STEADY * (ends[-1] - ends[-2]):
            break
    waits = {what: seconds - waited[what] for what, seconds in machine.waits.items()}
    step_s = ends[-1] - ends[-2]
    backlog = max(0.0, load.busy[DISK] - step_s)
    waits[DISK] += backlog
    return step_s + backlog, waits
