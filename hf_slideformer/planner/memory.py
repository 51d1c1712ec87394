"""Bytes over time: what lies on the GPU, in RAM and on disk while a model is loaded, trained, saved and resumed.

The peak of the GPU comes from a walk over one training step. Between two moments of the walk memory is only given
back, so the largest moment is the peak. The order of events, and what is alive when, is that of the engine:

    forward of a unit     inputs of the units so far, kept activations, the unit's own temporary memory
    head and loss         all inputs and kept activations, logits and what comes with them
    backward of a unit    what is left of inputs and kept activations, the unit's recomputed activations and
                          temporary memory, its gradients, those on their way to RAM, those that stay
    end of backward       all gradients that stay

The update works in place and needs nothing on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..memory.layout import (
    DiskLayout,
    MomentFormat,
    ParamSpec,
    UnitLayout,
    lay_out,
    lay_out_on_disk,
)
from ..memory.limits import (
    BLOCK_BYTES,
    CHECKPOINT_BATCH_BYTES,
    CHECKPOINT_PIECE_BYTES,
    COPIES_IN_FLIGHT,
    INPUT_BUFFERS,
    PAGE_BYTES,
)
from .workload import Budgets, Decisions, Workload

# Workspaces that torch's allocator gives to cuBLAS at the first products of each thread that computes (the caller's and
# autograd's): on a Hopper GPU 32 MiB each, and 1 MiB for cuBLASLt where a layer has a bias. Seen in the allocator's
# history of Qwen2.5-3B (torch 2.11).
CUBLAS_BYTES = 2 * (32 + 1) * 2**20

# How many units' gradients, and how many offloaded inputs, may be on the GPU at once: one in use, others on their way.
_MOVING = 1 + COPIES_IN_FLIGHT

# Kept free below the GPU's budget. Estimates: torch's allocator had 3 % to 8 % more reserved than allocated in our rows
# of 2026-11-22, without expandable segments; kernels that are loaded at their first use take some hundred MiB of the
# GPU that torch's allocator does not count.
_FRAGMENTATION_SHARE = 0.03
_KERNEL_CODE_BYTES = 512 * 2**20
_MOST_RESERVE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the plan: a kind of state, its tier ("GPU", "RAM" or "disk"), its size, and whether it is pinned."""

    tier: str
    what: str
    nbytes: int
    pinned: bool = False


class Moment(NamedTuple):
    """What lies on the GPU beyond the state that is always there, at one place of a step; in bytes."""

    event: str
    unit: int | None = None
    inputs: int = 0
    kept: int = 0
    one_unit: int = 0
    temporary: int = 0
    loss: int = 0
    resident_gradients: int = 0
    moving_gradients: int = 0

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(self[2:])

    @property
    def where(self) -> str:
        """The place in words."""
        return self.event if self.unit is None else f"{self.event} of unit {self.unit}"


def gpu_reserve_bytes(workload: Workload, budget: int) -> int:
    """Bytes of the GPU's budget that stay free; none where RAM stands in, or where activations are not known."""
    if not workload.on_gpu or workload.profile is None:
        return 0
    return int(min(_FRAGMENTATION_SHARE * budget + _KERNEL_CODE_BYTES, _MOST_RESERVE_SHARE * budget))


class MemoryModel:
    """Bytes of one workload under any decisions.

    Sizes of single tensors and buffers are taken once, so that many decisions can be tried.

    Args:
        workload: what is planned for.

    Attributes:
        ram_state: bytes of each unit's residuals and moments in RAM, if they are there.
        disk_state: the same on disk.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._block = BLOCK_BYTES if workload.on_gpu else 1
        layouts, moments = workload.layouts, workload.moments
        self._trainable = sum(
            segment.spec.trainable for layout in layouts for segment in layout.segments
        ) + sum(spec.trainable for spec in workload.outside)
        self._specs = [[segment.spec for segment in layout.segments] for layout in layouts]
        self._slot = [self._on_gpu(layout.weight_bytes) for layout in layouts]
        # Resident units: each parameter is a tensor of its own, as outside of units.
        self._gpu_weights = [self._weights(specs) for specs in self._specs]
        self._gpu_residuals = [self._residuals(specs) for specs in self._specs]
        self._gpu_moments = [self._moments(specs, moments) for specs in self._specs]
        # Gradients as backward makes them, and as they stay with a resident unit.
        self._fresh = [self._gradients(specs, fp32=False) for specs in self._specs]
        self._staying = [self._gradients(specs, fp32=workload.fp32_sums) for specs in self._specs]
        # Where gradients are summed in fp32, one parameter at a time is widened.
        self._widened = [
            self._largest(specs, itemsize=4) if workload.fp32_sums else 0 for specs in self._specs
        ]
        self._ram_weights = [_pages(layout.weight_bytes) for layout in layouts]
        self._ram_residuals = [_pages(2 * layout.lo_numel) for layout in layouts]
        self._ram_moments = [_moment_pages(layout, moments) for layout in layouts]
        self._ram_gradients = [
            _pages(4 * layout.state_numel if workload.fp32_sums else layout.grad_bytes) for layout in layouts
        ]
        self._grad_bytes = [layout.grad_bytes for layout in layouts]
        self.ram_state = [
            residuals + state for residuals, state in zip(self._ram_residuals, self._ram_moments, strict=True)
        ]
        self.disk_state = [lay_out_on_disk(layout, moments).nbytes for layout in layouts]
        self._whole = [disk_layout(workload, layout) for layout in layouts]
        trainable = [spec for spec in workload.outside if spec.trainable]
        late = [spec for spec in trainable if spec.name in workload.last_gradients]
        early = [spec for spec in trainable if spec.name not in workload.last_gradients]
        self._early, self._late = (self._gradients(specs, fp32=workload.fp32_sums) for specs in (early, late))
        self._early_fresh, self._late_fresh = (
            self._largest(specs) if workload.fp32_sums else 0 for specs in (early, late)
        )
        self._outside_layout = lay_out(trainable)
        # Weights as they came; those that are mapped from files take no RAM.
        anonymous = [[spec for spec in specs if spec.name not in workload.mapped] for specs in self._specs]
        self._source = [_source_bytes(specs) for specs in anonymous]
        self._source_outside = _source_bytes(
            [spec for spec in workload.outside if spec.name not in workload.mapped]
        )
        # A checkpoint is written from where the state lives, and read to there; but for what is joined or read anew.
        every = [spec for specs in (workload.outside, *self._specs) for spec in specs]
        joined = max(map(_joined_bytes, every), default=0)
        # A piece, another that the C library has not given back, and one joined.
        self._saving = 2 * CHECKPOINT_PIECE_BYTES + min(CHECKPOINT_PIECE_BYTES, joined)
        # Of a unit all tensors are made at once that are saved instead of its own; one is copied twice on the way.
        remade = [[spec for spec in specs if spec.name in workload.remade] for specs in self._specs]
        self._remade = [_source_bytes(specs) for specs in remade]
        self._remade_once = [max((_source_bytes([spec]) for spec in specs), default=0) for specs in remade]
        self._remade_from = [sum(map(_joined_bytes, specs)) for specs in remade]
        self._resuming = max(CHECKPOINT_BATCH_BYTES, *(_source_bytes([spec]) for spec in every), 0)
        profiles = workload.profile.units if workload.profile is not None else ()
        absent = [0] * (len(layouts) - len(profiles))
        self._boundary = [unit.boundary_bytes for unit in profiles] or absent
        self._saved = [unit.saved_bytes for unit in profiles] or absent
        self._forward = [unit.forward_bytes for unit in profiles] or absent
        self._backward = [unit.backward_bytes for unit in profiles] or absent
        self._loss = workload.profile.loss_bytes if workload.profile is not None else 0

    # -- sizes -----------------------------------------------------------------------------------------------

    def _on_gpu(self, nbytes: int) -> int:
        return -(-nbytes // self._block) * self._block

    def _weights(self, specs: Sequence[ParamSpec]) -> int:
        return sum(self._on_gpu(spec.numel * spec.dtype.itemsize) for spec in specs)

    def _residuals(self, specs: Sequence[ParamSpec]) -> int:
        return sum(self._on_gpu(2 * spec.numel) for spec in specs if spec.split)

    def _moments(self, specs: Sequence[ParamSpec], moments: MomentFormat) -> int:
        return sum(
            self._on_gpu(part.entries(spec.numel) * part.dtype.itemsize)
            for spec in specs
            if spec.trainable
            for part in moments.parts
        )

    def _gradients(self, specs: Sequence[ParamSpec], *, fp32: bool) -> int:
        return sum(
            self._on_gpu(spec.numel * (4 if fp32 else spec.dtype.itemsize))
            for spec in specs
            if spec.trainable
        )

    def _largest(self, specs: Sequence[ParamSpec], itemsize: int | None = None) -> int:
        """Bytes of the largest gradient of a dtype that is not fp32."""
        return max(
            (
                self._on_gpu(spec.numel * (itemsize or spec.dtype.itemsize))
                for spec in specs
                if spec.trainable and spec.dtype != torch.float32
            ),
            default=0,
        )

    # -- GPU -------------------------------------------------------------------------------------------------

    def gpu_state(self, decisions: Decisions) -> dict[str, int]:
        """Bytes of the GPU that are taken for the whole of training, by name."""
        workload, resident = self.workload, decisions.resident
        streamed = self._streamed(decisions)
        # With its optimizer state in RAM a parameter outside has only its weight on the GPU.
        outside = [
            spec for spec in workload.outside if decisions.outside_state == "GPU" or not spec.trainable
        ]
        state = {
            "slots": decisions.slots * max((self._slot[unit] for unit in streamed), default=0),
            "resident weights": self._weights(workload.outside)
            + sum(self._gpu_weights[unit] for unit in resident),
            "resident master residuals": self._residuals(outside)
            + sum(self._gpu_residuals[unit] for unit in resident),
        }
        if workload.training:
            state["resident moments"] = self._moments(outside, workload.moments) + sum(
                self._gpu_moments[unit] for unit in resident
            )
        if workload.profile is not None and workload.training:
            state["held outside of units"] = workload.profile.held_bytes
            state["cuBLAS workspaces"] = CUBLAS_BYTES if workload.on_gpu else 0
            # The sum of squares of each gradient waits on the GPU for the norm.
            state["squared norms"] = self._on_gpu(8) * self._trainable if workload.on_gpu else 0
        return state

    def _streamed(self, decisions: Decisions) -> list[int]:
        resident = set(decisions.resident)
        return [unit for unit in range(len(self._slot)) if unit not in resident]

    def walk(self, decisions: Decisions) -> list[Moment]:
        """The moments of a step of training, in order; with accumulation those of a later micro-batch."""
        units = range(len(self._slot))
        resident, fp32_sums = set(decisions.resident), self.workload.fp32_sums
        keeps = [policy == "keep" for policy in decisions.activations]
        inputs = self._inputs_alive(decisions.activations)
        # Sums over micro-batches are there from the first of them on; else gradients come one by one.
        staying = 0
        if fp32_sums:
            staying = self._early + self._late + sum(self._staying[unit] for unit in decisions.resident)
        moving: list[int] = []
        if (
            self.workload.overlapped
        ):  # the last ones are let go of only when the next backward sends its first
            moving = [self._fresh[unit] for unit in units if unit not in resident][: _MOVING - 1][::-1]

        moments = []
        kept = 0
        for unit in units:
            kept += self._saved[unit] if keeps[unit] else 0
            moments.append(
                Moment("forward", unit, inputs[unit], kept, 0, self._forward[unit], 0, staying, sum(moving))
            )
        all_inputs = inputs[-1] if inputs else 0
        staying += self._early_fresh if fp32_sums else self._early
        moments.append(
            Moment("head and loss", None, all_inputs, kept, 0, 0, self._loss, staying, sum(moving))
        )
        staying -= self._early_fresh if fp32_sums else 0
        for unit in reversed(units):
            one_unit = 0 if keeps[unit] else self._saved[unit]
            own = 0
            if unit in resident:
                own = self._fresh[unit] + self._widened[unit]
            else:
                moving = [*moving[1 - _MOVING :], self._fresh[unit]]
            moments.append(
                Moment(
                    "backward",
                    unit,
                    inputs[unit],
                    kept,
                    one_unit,
                    self._backward[unit],
                    0,
                    staying + own,
                    sum(moving),
                )
            )
            kept -= self._saved[unit] if keeps[unit] else 0
            if unit in resident:
                # Sums are there already; overlapped updates use a gradient up at once.
                staying += 0 if fp32_sums or self.workload.overlapped else self._fresh[unit]
            else:
                moving = moving[1 - _MOVING :]
        staying += self._late_fresh if fp32_sums else self._late
        # The gradient of the first unit's input is what the embedding's backward starts from.
        first_input = self._boundary[0] if self._boundary else 0
        moments.append(Moment("end of backward", None, 0, 0, 0, first_input, 0, staying, sum(moving)))
        return moments

    def _inputs_alive(self, activations: Sequence[str]) -> list[int]:
        """Bytes of units' inputs on the GPU when each unit runs: those up to it, of offloaded ones the last few."""
        alive, staying = [], 0
        moving: list[int] = []
        for nbytes, policy in zip(self._boundary, activations, strict=True):
            if policy == "offload":
                moving = [*moving[1 - _MOVING :], nbytes]
            else:
                staying += nbytes
            alive.append(staying + sum(moving))
        return alive

    def gpu_peak(self, decisions: Decisions) -> int:
        """Bytes of the GPU at the peak of a training step (without training: the state)."""
        state = sum(self.gpu_state(decisions).values())
        if not self.workload.training:
            return state
        return state + max(moment.nbytes for moment in self.walk(decisions))

    def gpu_items(self, decisions: Decisions) -> tuple[str, list[Item]]:
        """Where in a step the GPU's peak is, and what it consists of."""
        items = self.gpu_state(decisions)
        where = ""
        if self.workload.training:
            peak = max(self.walk(decisions), key=lambda moment: moment.nbytes)
            where = peak.where
            items |= {
                "resident gradients": peak.resident_gradients,
                "gradients on their way": peak.moving_gradients,
                "inputs of units": peak.inputs,
                "kept activations": peak.kept,
                "activations of one unit": peak.one_unit,
                "temporary memory of kernels": peak.temporary,
                "head and loss": peak.loss,
            }
        return where, [Item("GPU", what, nbytes) for what, nbytes in items.items()]

    # -- RAM -------------------------------------------------------------------------------------------------

    def ram_items(self, decisions: Decisions) -> list[Item]:
        """What lies in RAM during training."""
        workload = self.workload
        on_gpu, streamed = workload.on_gpu, self._streamed(decisions)
        on_disk = set(decisions.on_disk)
        in_ram = [unit for unit in streamed if unit not in on_disk] if on_disk else streamed
        whole = set(decisions.weights_on_disk)
        holding = [unit for unit in streamed if unit not in whole] if whole else streamed
        items = [
            Item("RAM", "weights", sum(self._ram_weights[unit] for unit in holding), on_gpu),
            Item("RAM", "master residuals", sum(self._ram_residuals[unit] for unit in in_ram)),
        ]
        if workload.training:
            items.append(Item("RAM", "moments", sum(self._ram_moments[unit] for unit in in_ram)))
        items.append(Item("RAM", "disk buffers", self._disk_buffers(decisions)))
        if whole:
            items.append(Item("RAM", "weight buffers", self._weight_buffers(decisions), on_gpu))
        # Inputs that wait on disk pass through buffers both ways, which are there from the start.
        passing = 2 * self._input_buffers(decisions)
        if not workload.training:
            return [*items, Item("RAM", "inputs of units", passing, on_gpu)] if passing else items
        if not workload.overlapped:
            nbytes = sum(self._ram_gradients[unit] for unit in holding)
            items.append(Item("RAM", "gradients", nbytes, on_gpu and not workload.fp32_sums))
        largest = max((self._grad_bytes[unit] for unit in streamed), default=0)
        items.append(Item("RAM", "gradient staging", decisions.staging_buffers * _pages(largest), on_gpu))
        if workload.profile is not None:
            # An input waits where the unit's gradient will come, if there is such a place.
            places = dict.fromkeys(streamed, 0)
            if not workload.overlapped and not workload.fp32_sums:
                places |= {unit: self._ram_gradients[unit] for unit in holding if self._grad_bytes[unit]}
            inputs = sum(
                max(0, _pages(self._boundary[unit]) - places.get(unit, 0))
                for unit, policy in enumerate(decisions.activations)
                if policy == "offload" and unit not in whole
            )
            items.append(Item("RAM", "inputs of units", inputs + passing, on_gpu))
        if decisions.outside_state == "RAM":
            layout = self._outside_layout
            gradients = 4 * layout.state_numel if workload.fp32_sums else layout.grad_bytes
            moved = _pages(layout.weight_bytes) + _pages(gradients)
            state = _pages(2 * layout.lo_numel) + _moment_pages(layout, workload.moments)
            items += [
                Item("RAM", "weights and gradients outside of units", moved, on_gpu),
                Item("RAM", "optimizer state outside of units", state),
            ]
        return items

    def ram_train(self, decisions: Decisions) -> int:
        """Bytes of RAM during training."""
        return sum(item.nbytes for item in self.ram_items(decisions))

    def _disk_buffers(self, decisions: Decisions) -> int:
        """Bytes of the buffers that updates borrow: each for state, weights and gradients of one unit."""
        whole = set(decisions.weights_on_disk)
        sizes = (
            self._whole[unit].masters_and_gradients[1] if unit in whole else self.disk_state[unit]
            for unit in decisions.on_disk
        )
        return decisions.disk_buffers * max(sizes, default=0)

    def _inputs_on_disk(self, decisions: Decisions) -> dict[int, int]:
        """Bytes of each unit's input that waits on disk, by unit: where its weights are too."""
        return {
            unit: _pages(self._boundary[unit])
            for unit in decisions.weights_on_disk
            if decisions.activations[unit] == "offload"
        }

    def _input_buffers(self, decisions: Decisions) -> int:
        """Bytes of the buffers through which inputs go to disk, or come back."""
        return INPUT_BUFFERS * max(self._inputs_on_disk(decisions).values(), default=0)

    def _weight_buffers(self, decisions: Decisions) -> int:
        """Bytes of the buffers through which weights on disk go to their slots, as many as slots."""
        return decisions.slots * max(
            (self._ram_weights[unit] for unit in decisions.weights_on_disk), default=0
        )

    # -- disk ------------------------------------------------------------------------------------------------

    def disk_bytes(self, decisions: Decisions) -> int:
        """Bytes on disk, from loading on."""
        return sum(item.nbytes for item in self.disk_items(decisions))

    def disk_items(self, decisions: Decisions) -> list[Item]:
        """What lies on disk."""
        whole = [self._whole[unit] for unit in decisions.weights_on_disk]
        items = [
            Item("disk", "residuals and moments", sum(self.disk_state[unit] for unit in decisions.on_disk)),
            Item("disk", "weights", sum(places.weight_bytes for places in whole)),
            Item("disk", "gradients", sum(places.grad_bytes for places in whole)),
            Item("disk", "inputs of units", sum(self._inputs_on_disk(decisions).values())),
        ]
        return [item for item in items if item.nbytes]

    # -- phases ----------------------------------------------------------------------------------------------

    def peaks(self, decisions: Decisions) -> dict[str, dict[str, int]]:
        """Peak bytes by phase and tier.

        Phases: "load" (a model in RAM is moved to where its parts belong), "train", "save" (pieces of what
        is on the GPU are brought to RAM, pieces of split masters joined; what is saved as other tensors is whole, a
        unit at a time), "resume" (weights are read in batches before they are copied; the optimizer's state is read to
        where it lives).
        """
        disk = self.disk_bytes(decisions)
        gpu, ram = self.gpu_peak(decisions), self.ram_train(decisions)
        peaks = {
            "load": {"GPU": self.gpu_load(decisions), "RAM": self.ram_load(decisions), "disk": disk},
            "train": {"GPU": gpu, "RAM": ram, "disk": disk},
        }
        if not self.workload.training:
            return peaks
        on_gpu = sum(self.gpu_state(decisions).values())
        passing = sum(
            item.nbytes
            for item in self.ram_items(decisions)
            if item.what in ("inputs of units", "gradient staging")
        )
        peaks["save"] = {"GPU": on_gpu, "RAM": ram + self._saving + self._remaking(decisions), "disk": disk}
        peaks["resume"] = {"GPU": on_gpu, "RAM": ram - passing + self._resuming, "disk": disk}
        return peaks

    def _remaking(self, decisions: Decisions) -> int:
        """Bytes of the tensors that are made of a unit to be saved, and of what they are made of if RAM has it not."""
        resident, peak = set(decisions.resident), 0
        for unit, made in enumerate(self._remade):
            made_from = self._remade_from[unit] or (made if unit in resident else 0)
            peak = max(peak, made_from + made + self._remade_once[unit])
        return peak

    def gpu_load(self, decisions: Decisions) -> int:
        """Bytes of the GPU when the model has been moved and nothing has run."""
        state = self.gpu_state(decisions)
        return state["resident weights"] + state["resident master residuals"] + state["slots"]

    def ram_load(self, decisions: Decisions) -> int:
        """Peak of RAM while a model in RAM is moved to where its parts belong.

        Units are moved in order, tensor by tensor; a streamed one's new buffers are mapped before it is. Residuals on
        disk go there through one of the buffers that are there for it.
        """
        now = peak = self._source_outside + sum(self._source) + self._disk_buffers(decisions)
        now = peak = peak + self._weight_buffers(decisions) + self._input_buffers(decisions)
        whole = set(decisions.weights_on_disk)
        resident, on_disk = set(decisions.resident), set(decisions.on_disk)
        for unit, nbytes in enumerate(self._source):
            if unit not in resident:
                now += 0 if unit in whole else self._ram_weights[unit]
                now += 0 if unit in on_disk else self._ram_residuals[unit]
            peak = max(peak, now)
            now -= nbytes
        if decisions.outside_state == "RAM":
            now += _pages(self._outside_layout.weight_bytes) + _pages(2 * self._outside_layout.lo_numel)
        return max(peak, now)


def missing_bytes(workload: Workload, budgets: Budgets, gpu: int, ram: int, disk: int = 0) -> dict[str, int]:
    """Bytes by which needs exceed what may be used, by tier; where RAM stands in for the GPU both come out of it."""
    if not workload.on_gpu:
        ram += gpu
    usable = budgets.gpu - gpu_reserve_bytes(workload, budgets.gpu)
    return {
        "GPU": max(0, gpu - usable),
        "RAM": max(0, ram - budgets.ram),
        "disk": max(0, disk - (budgets.disk or 0)),
    }


def _joined_bytes(spec: ParamSpec) -> int:
    """Bytes of an fp32 weight that trains as a split master and is joined to be saved; 0 of others."""
    return 4 * spec.numel if spec.split and spec.source_dtype == torch.float32 else 0


def _source_bytes(specs: Sequence[ParamSpec]) -> int:
    """Bytes of parameters as they came."""
    return sum(spec.numel * spec.source_dtype.itemsize for spec in specs)


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _moment_pages(layout: UnitLayout, moments: MomentFormat) -> int:
    return sum(_pages(part.entries(layout.state_numel) * part.dtype.itemsize) for part in moments.parts)


def disk_layout(workload: Workload, layout: UnitLayout) -> DiskLayout:
    """The file of a unit whose weights, and gradients that wait, are on disk too; without its input.

    A file is made with room for all of it, also where only evaluation is asked for at first.
    """
    waiting = 0
    if not workload.overlapped:
        waiting = 4 * layout.state_numel if workload.fp32_sums else layout.grad_bytes
    return lay_out_on_disk(layout, workload.moments, weights=True, grad_bytes=waiting)
