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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..machine.hardware import Hardware, update_rate
from ..machine.presets import disk_rates
from ..memory.layout import FP32_MOMENTS, MomentFormat, ParamSpec, UnitLayout
from ..memory.limits import COPIES_IN_FLIGHT
from .memory import disk_layout
from .profile import UnitProfile
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

# The CPU's update against the probe's, by format of moments (others are taken to be like fp32), and the part of copies
# beside it that it really meets; fitted to the same rows. Why training updates faster than the probe does is not known.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rates:
    """What training reaches of a machine's rates: bytes, parameters or operations a second."""

    bf16_products: float
    fp32_products: float
    traffic: float  # of the GPU's other operations
    h2d: float
    d2h: float
    cpu_update: float
    fp32_update: float  # by the CPU, with fp32 moments
    gpu_update: float
    disk_read: float
    disk_write: float

    @classmethod
    def of(
        cls,
        hardware: Hardware,
        moments: MomentFormat,
        *,
        compute_speed: float,
        link_speed: float,
        update_speed: float,
        disk_speed: float,
    ) -> _Rates:
        """Those of a machine of which a resource is so many times faster."""
        read, write = disk_rates(hardware)
        fitted = _UPDATE_SHARE.get(moments.name, _UPDATE_SHARE[FP32_MOMENTS.name])
        return cls(
            bf16_products=hardware.bf16_flops * _PRODUCT_SHARE * compute_speed,
            fp32_products=hardware.fp32_flops * _PRODUCT_SHARE * compute_speed,
            traffic=hardware.gpu_copy * _COPY_SHARE * compute_speed,
            h2d=hardware.h2d * link_speed,
            d2h=hardware.d2h * link_speed,
            cpu_update=fitted * update_rate(hardware.cpu_update, moments) * update_speed,
            fp32_update=update_rate(hardware.cpu_update, FP32_MOMENTS) * update_speed,
            gpu_update=update_rate(hardware.gpu_update, moments) * compute_speed,
            disk_read=read * disk_speed,
            disk_write=write * disk_speed,
        )

    def products(self, specs: Sequence[ParamSpec]) -> float:
        """Of matrix products with these parameters."""
        return self.fp32_products if _main_dtype(specs) == torch.float32 else self.bf16_products


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTimes:
    """Seconds of each piece of one unit's work, before anything waits.

    Attributes:
        forward, backward: on the GPU; `backward` without its `recompute`.
        recompute: on the GPU, what backward begins with where activations were not kept.
        weights: to the GPU on an idle link; `Durations.busy_link` times as long while the other direction is used too.
        gradients: to RAM, likewise.
        inputs: either way, likewise.
        update: by the CPU.
        summing: of a micro-batch's gradients to their sums, by the CPU.
        gpu_update: by the GPU.
        disk_read, disk_write: of residuals and moments.
        whole_read: of these, weights, and gradients that wait.
        whole_write: of these and weights.
        fetch_read: of weights.
        gradients_wait: of gradients to the disk, and from there of what they are added to.
        input_read, input_write: of the input.
    """

    forward: float
    backward: float
    recompute: float
    weights: float
    gradients: float
    inputs: float
    update: float
    summing: float
    gpu_update: float
    disk_read: float
    disk_write: float
    whole_read: float
    whole_write: float
    fetch_read: float
    gradients_wait: float
    input_read: float
    input_write: float

    @classmethod
    def of(cls, workload: Workload, layout: UnitLayout, profile: UnitProfile, rates: _Rates) -> UnitTimes:
        """Those of the unit of a workload that has this layout and profile."""
        products_rate = rates.products([segment.spec for segment in layout.segments])
        rest = profile.forward_traffic / rates.traffic
        products = (profile.forward_flops - profile.attention_flops) / products_rate
        attention = profile.attention_flops / (products_rate * _ATTENTION_SHARE)
        not_repeated = (1 - profile.recompute_share) * profile.forward_flops / products_rate
        trained = layout.trainable_numel
        file, read, write = disk_layout(workload, layout), rates.disk_read, rates.disk_write
        return cls(
            forward=products + attention + rest,
            backward=_BACKWARD_FLOPS * products + _BACKWARD_ATTENTION * attention + _BACKWARD_TRAFFIC * rest,
            recompute=max(0.0, products - not_repeated) + attention + rest,
            weights=layout.weight_bytes / rates.h2d,
            gradients=layout.grad_bytes / rates.d2h,
            inputs=profile.boundary_bytes / rates.d2h,
            update=trained / rates.cpu_update,
            summing=_SUM_PER_UPDATE * trained / rates.fp32_update,
            gpu_update=trained / rates.gpu_update,
            disk_read=file.nbytes / read,
            disk_write=file.nbytes / write,
            whole_read=file.masters_and_gradients[1] / read,
            whole_write=file.masters[1] / write,
            fetch_read=file.weight_bytes / read,
            gradients_wait=file.grad_bytes / write + (file.grad_bytes / read if workload.fp32_sums else 0.0),
            input_read=profile.boundary_bytes / read,
            input_write=profile.boundary_bytes / write,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds of each piece of work of a step, before anything waits.

    Attributes:
        micro_batches, overlapped: as in `Workload`.
        units: in forward order.
        loss: everything after the last unit, both ways.
        busy_link: how many times as long a copy takes while the other direction is used too.
        slowdown: of the update, by a second of copying beside it on an idle link.
        gpu_update_outside: of what is outside of units, by the GPU.
        outside_gradients, outside_update, outside_weights: of what is outside of units, to RAM, there, and back.
        launch: of kernels, against what was measured.
    """

    micro_batches: int
    overlapped: bool
    units: list[UnitTimes]
    loss: float
    busy_link: float
    slowdown: float
    gpu_update_outside: float
    outside_gradients: float
    outside_weights: float
    outside_update: float
    launch: float

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
        """Durations of a workload that has a profile, on a machine of which a resource is so many times faster."""
        profile, layouts, moments = workload.profile, workload.layouts, workload.moments
        assert profile is not None, "times need a profile"
        rates = _Rates.of(
            hardware,
            moments,
            compute_speed=compute_speed,
            link_speed=link_speed,
            update_speed=update_speed,
            disk_speed=disk_speed,
        )
        trainable = [spec for spec in workload.outside if spec.trainable]
        outside_bytes = sum(spec.numel * spec.dtype.itemsize for spec in trainable)
        outside_grads = sum(
            spec.numel * (4 if workload.fp32_sums else spec.dtype.itemsize) for spec in trainable
        )
        outside_numel = sum(spec.numel for spec in trainable)
        # While copies run both ways the update is slowed from one measured rate to the other; so each second of copying
        # costs it a part of a second.
        alone, beside = (
            update_rate(known, moments) for known in (hardware.cpu_update, hardware.cpu_update_loaded)
        )
        loaded = min(1.0, beside / alone)
        return cls(
            micro_batches=workload.micro_batches,
            overlapped=workload.overlapped,
            units=[
                UnitTimes.of(workload, layout, unit, rates)
                for layout, unit in zip(layouts, profile.units, strict=True)
            ],
            loss=profile.loss_flops / rates.products(workload.outside) + profile.loss_traffic / rates.traffic,
            busy_link=max(1.0, (hardware.h2d + hardware.d2h) / hardware.duplex),
            slowdown=_COPIES_MET * (1 - loaded) * hardware.h2d / hardware.duplex * link_speed / update_speed,
            gpu_update_outside=outside_numel / rates.gpu_update,
            outside_gradients=outside_grads / rates.d2h,
            outside_weights=outside_bytes / rates.h2d,
            outside_update=outside_numel / rates.cpu_update,
            launch=1.0 / launch_speed,
        )


@dataclass(slots=True)
class _Load:
    """What decisions make of durations. `backward` and `update` are by unit: with what is recomputed, and as slow as
    copies beside it make it.
    """

    streamed: list[int]
    forward_link: float
    backward_link: float
    backward: list[float]
    update: list[float]
    busy: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, times: Durations, decisions: Decisions, pageable: float) -> _Load:
        units, resident, activations = times.units, set(decisions.resident), decisions.activations
        streamed = [k for k in range(len(units)) if k not in resident]
        keeps = [policy == "keep" for policy in activations]
        offloaded = [unit for unit, policy in zip(units, activations, strict=True) if policy == "offload"]
        backward = [
            unit.backward + (0.0 if keep else unit.recompute) for unit, keep in zip(units, keeps, strict=True)
        ]
        slower = 1.0 + pageable * (PAGEABLE_FACTOR - 1.0)
        both = slower * times.busy_link
        fetched_again = streamed[: max(0, len(streamed) - decisions.slots)]

        moving = [units[k] for k in streamed]
        inputs = sum(unit.inputs for unit in offloaded)
        to_gpu = sum(unit.weights for unit in moving)
        again = sum(units[k].weights for k in fetched_again)
        gradients = sum(unit.gradients for unit in moving)
        # Copies that run while the worker updates: those of forward, or those of the whole step.
        beside = to_gpu + inputs + ((again + inputs + gradients) if times.overlapped else 0.0)
        update = [unit.update for unit in units]
        total = sum(unit.update for unit in moving)
        if total:
            share = times.slowdown * beside / total
            update = [seconds * (1 + share) for seconds in update]

        m = times.micro_batches
        whole, refetched = set(decisions.weights_on_disk), set(fetched_again)
        outside = decisions.outside_state == "RAM"
        launch_backward = sum(_LAUNCH_KEPT_BACKWARD_S if keep else _LAUNCH_BACKWARD_S for keep in keeps)

        def disk_s(k: int) -> float:
            unit = units[k]
            if k not in whole:
                return unit.disk_read + unit.disk_write
            return (
                unit.whole_read
                + unit.whole_write
                + m * ((1 + (k in refetched)) * unit.fetch_read + unit.gradients_wait)
                + (m * (unit.input_read + unit.input_write) if activations[k] == "offload" else 0.0)
            )

        busy = {
            COMPUTE: m * (sum(unit.forward for unit in units) + sum(backward) + times.loss)
            + sum(units[k].gpu_update for k in resident)
            + (0.0 if outside else times.gpu_update_outside),
            H2D: m * ((to_gpu + inputs) * slower + again * slower)
            + (times.outside_weights * slower if outside else 0.0),
            D2H: m * (gradients + inputs) * slower + (times.outside_gradients * slower if outside else 0.0),
            UPDATE: sum(update[k] for k in streamed)
            + (times.outside_update if outside else 0.0)
            + (m * sum(unit.summing for unit in moving) if m > 1 else 0.0),
            LAUNCH: times.launch
            * (
                m * (len(units) * _LAUNCH_FORWARD_S + launch_backward + _LAUNCH_LOSS_S)
                + m * (len(streamed) + len(fetched_again)) * _LAUNCH_FETCH_S
                + m * len(streamed) * _LAUNCH_SEND_S
                + _LAUNCH_STEP_S
                + len(resident) * _LAUNCH_UPDATE_S
            ),
            DISK: sum(map(disk_s, decisions.on_disk)),
        }
        return cls(
            streamed=streamed,
            forward_link=both if offloaded else slower,
            backward_link=both if streamed else slower,
            backward=backward,
            update=update,
            busy=busy,
        )


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
        forward = [unit.forward for unit in times.units]
        bound = max(bound, update + sum(forward[after:]) + backward)
        if decisions.on_disk:
            # All are read, and those whose buffers are needed again are written.
            on_disk = [times.units[k] for k in decisions.on_disk]
            written = sorted(unit.disk_write for unit in on_disk)
            disk = sum(unit.disk_read for unit in on_disk)
            disk += sum(written[: max(0, len(written) - decisions.disk_buffers)])
            bound = max(bound, disk + sum(forward[max(decisions.on_disk) :]) + backward)
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


def _main_dtype(specs: Sequence[ParamSpec]) -> torch.dtype:
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
        units = self.units = times.units
        self.is_streamed = [False] * len(units)
        for unit in load.streamed:
            self.is_streamed[unit] = True
        self.offloads = [policy == "offload" for policy in decisions.activations]
        self.offloaded = [unit for unit, offloads in enumerate(self.offloads) if offloads]
        self.launch_forward = _LAUNCH_FORWARD_S * times.launch
        self.launch_backward = [
            (_LAUNCH_KEPT_BACKWARD_S if policy == "keep" else _LAUNCH_BACKWARD_S) * times.launch
            for policy in decisions.activations
        ]
        self.staged = decisions.staging_buffers > 0 and (times.overlapped or times.micro_batches > 1)
        self.host = self.compute = self.h2d = self.d2h = self.issued = 0.0
        self.worker = _Worker(decisions.staging_buffers, decisions.disk_buffers)
        self.on_disk, self.whole = set(decisions.on_disk), set(decisions.weights_on_disk)
        self.pending = [False] * len(units)
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
        self.stored = [0.0] * len(units)
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
            read = self._use_disk(self.issued, self.units[unit].fetch_read)
            if read > start:
                start, updated, by = read, read, DISK
        self.h2d = start + self.units[unit].weights * self.link
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
        for unit, times in enumerate(self.units):
            ready = updated = 0.0
            by = UPDATE
            slot = -1
            if self.is_streamed[unit]:
                slot = self.acquire(unit, streamed[position + 1 : position + 1 + depth])
                ready, updated, by = self.landed[slot], self.updated[slot], self.updated_by[slot]
                position += 1
            if self.offloads[unit]:
                self.d2h = max(self.d2h, self.compute) + times.inputs * self.link
                self.stored[unit] = self.d2h
                if unit in self.whole:
                    self.stored[unit] = self._use_disk(self.d2h, times.input_write)
                leaving.append(self.d2h)
                if len(leaving) > COPIES_IN_FLIGHT:
                    ready = max(ready, leaving[-1 - COPIES_IN_FLIGHT])
            self.run(times.forward, ready, self.launch_forward, updated=updated, by=by)
            if slot >= 0:
                self.released[slot] = self.compute

    def backward(self) -> None:
        load, streamed = self.load, self.load.streamed
        self.link = load.backward_link
        depth = self.decisions.slots - 1
        position = len(streamed)
        moving: list[tuple[float, float, str]] = []
        coming: dict[int, float] = {}
        inputs = self.offloaded[::-1]
        for unit in reversed(range(len(self.units))):
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
                        there = self._use_disk(there, self.units[first].input_read)
                    self.h2d = max(self.h2d, there) + self.units[first].inputs * self.link
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
        times = self.units[unit]
        self.host += _LAUNCH_SEND_S * self.times.launch
        free, by = self.worker.take_staging() if self.staged else (0.0, UPDATE)
        issued = max(self.host, free)
        self.d2h = max(self.d2h, self.compute, issued) + times.gradients * self.link
        if unit in self.whole and not self.times.overlapped:
            self.gradients_written = self._use_disk(self.d2h, times.gradients_wait)
        if self.times.overlapped:
            self._submit_update(unit, self.d2h, staged=True)
        elif self.staged:  # sums go before updates
            self.worker.submit(_Job(self.d2h, -1, times.summing, ("sum", unit), staged=True))
        return issued, self.d2h, by

    def _submit_update(self, unit: int, ready: float, *, staged: bool = False) -> None:
        job = _Job(ready, unit, self.load.update[unit], ("update", unit), staged)
        if unit in self.on_disk:
            times, whole = self.units[unit], unit in self.whole
            read, write = (
                (times.whole_read, times.whole_write) if whole else (times.disk_read, times.disk_write)
            )
            job = job._replace(asked=self.host, read=read, write=write)
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
        seconds = sum(self.units[unit].gpu_update for unit in resident)
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
