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

from collections.abc import Container, Sequence
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
from .profile import UnitProfile
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


@dataclass(frozen=True, slots=True)
class _OwnTensors:
    """Bytes on the GPU of parameters whose weight and state are tensors of their own: resident, or outside of units.

    Attributes:
        block: bytes of which torch's allocator hands out multiples; 1 where RAM stands in for the GPU.
    """

    block: int

    @classmethod
    def of(cls, workload: Workload) -> _OwnTensors:
        """Those of a workload's device."""
        return cls(BLOCK_BYTES if workload.on_gpu else 1)

    def nbytes(self, nbytes: int) -> int:
        """Of one tensor."""
        return -(-nbytes // self.block) * self.block

    def weights(self, specs: Sequence[ParamSpec]) -> int:
        """Of all weights."""
        return sum(self.nbytes(spec.numel * spec.dtype.itemsize) for spec in specs)

    def residuals(self, specs: Sequence[ParamSpec]) -> int:
        """Of the residuals of split masters."""
        return sum(self.nbytes(2 * spec.numel) for spec in specs if spec.split)

    def moments(self, specs: Sequence[ParamSpec], moments: MomentFormat) -> int:
        """Of the moments of what trains."""
        return sum(
            self.nbytes(part.entries(spec.numel) * part.dtype.itemsize)
            for spec in specs
            if spec.trainable
            for part in moments.parts
        )

    def gradients(self, specs: Sequence[ParamSpec], *, fp32: bool) -> int:
        """Of all gradients, in fp32 or in the dtype of the weights."""
        return sum(
            self.nbytes(spec.numel * (4 if fp32 else spec.dtype.itemsize)) for spec in specs if spec.trainable
        )

    def largest_gradient(self, specs: Sequence[ParamSpec], itemsize: int | None = None) -> int:
        """Of the largest gradient of a dtype that is not fp32, as it is or with elements of `itemsize` bytes."""
        return max(
            (
                self.nbytes(spec.numel * (itemsize or spec.dtype.itemsize))
                for spec in specs
                if spec.trainable and spec.dtype != torch.float32
            ),
            default=0,
        )


# What is known of a unit's activations where nothing is known of batches.
_NO_ACTIVATIONS = UnitProfile(0, 0, 0, 0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitBytes:
    """Bytes of one unit's parts, in each place where they may be.

    Attributes:
        slot: weights in a slot of the GPU.
        gpu_weights, gpu_residuals, gpu_moments: of a resident unit.
        gpu_gradients: as backward makes them on the GPU.
        gpu_sums: gradients that stay with a resident unit, in fp32 where they are summed.
        widened: the largest gradient in fp32, which is widened to be added to its sum; 0 where nothing is summed or
            all gradients are fp32.
        ram_weights, ram_residuals, ram_moments, ram_gradients: of a streamed unit, in pages.
        gradients: on their way to RAM, without padding to pages.
        file: the unit's file on disk if weights, and gradients that wait, are there too; without its input.
        source: weights as they came; those that are mapped from files take no RAM and do not count.
        remade: all tensors that are made of the unit to be saved instead of its own.
        remade_once: the largest of them, of which there is a second copy on the way.
        remade_from: what they are made of, if it is joined to be saved.
        profile: its activations.
    """

    slot: int
    gpu_weights: int
    gpu_residuals: int
    gpu_moments: int
    gpu_gradients: int
    gpu_sums: int
    widened: int
    ram_weights: int
    ram_residuals: int
    ram_moments: int
    ram_gradients: int
    gradients: int
    file: DiskLayout
    source: int
    remade: int
    remade_once: int
    remade_from: int
    profile: UnitProfile

    @classmethod
    def of(cls, workload: Workload, layout: UnitLayout, profile: UnitProfile) -> UnitBytes:
        """Those of the unit of a workload that has this layout and profile."""
        specs = [segment.spec for segment in layout.segments]
        gpu, moments, sums = _OwnTensors.of(workload), workload.moments, workload.fp32_sums
        gradients = gpu.gradients(specs, fp32=False)
        remade = [spec for spec in specs if spec.name in workload.remade]
        return cls(
            slot=gpu.nbytes(layout.weight_bytes),
            gpu_weights=gpu.weights(specs),
            gpu_residuals=gpu.residuals(specs),
            gpu_moments=gpu.moments(specs, moments),
            gpu_gradients=gradients,
            gpu_sums=gpu.gradients(specs, fp32=True) if sums else gradients,
            widened=gpu.largest_gradient(specs, itemsize=4) if sums else 0,
            ram_weights=_pages(layout.weight_bytes),
            ram_residuals=_pages(2 * layout.lo_numel),
            ram_moments=_moment_pages(layout, moments),
            ram_gradients=_pages(_waiting_gradients(workload, layout)),
            gradients=layout.grad_bytes,
            file=disk_layout(workload, layout),
            source=_source_bytes(specs, workload.mapped),
            remade=_source_bytes(remade),
            remade_once=max((_source_bytes([spec]) for spec in remade), default=0),
            remade_from=sum(map(_joined_bytes, remade)),
            profile=profile,
        )

    @property
    def ram_state(self) -> int:
        """Residuals and moments in RAM, if they are there."""
        return self.ram_residuals + self.ram_moments

    @property
    def disk_state(self) -> int:
        """Residuals and moments on disk, if they are there."""
        return self.file.nbytes


class MemoryModel:
    """Bytes of one workload under any decisions.

    Sizes of single tensors and buffers are taken once, so that many decisions can be tried.

    Args:
        workload: what is planned for.

    Attributes:
        units: bytes of each unit.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        layouts, profile, outside = workload.layouts, workload.profile, workload.outside
        profiles = (_NO_ACTIVATIONS,) * len(layouts) if profile is None else profile.units
        self.units = [
            UnitBytes.of(workload, layout, unit) for layout, unit in zip(layouts, profiles, strict=True)
        ]
        self._loss = 0 if profile is None else profile.loss_bytes
        gpu, sums = _OwnTensors.of(workload), workload.fp32_sums
        # With its optimizer state in RAM a parameter outside has only its weight on the GPU.
        frozen = [spec for spec in outside if not spec.trainable]
        self._outside_weights = gpu.weights(outside)
        self._outside_residuals = {"GPU": gpu.residuals(outside), "RAM": gpu.residuals(frozen)}
        self._outside_moments = {"GPU": gpu.moments(outside, workload.moments), "RAM": 0}
        late = [spec for spec in outside if spec.name in workload.last_gradients]
        early = [spec for spec in outside if spec.name not in workload.last_gradients]
        self._early, self._late = (gpu.gradients(specs, fp32=sums) for specs in (early, late))
        self._early_fresh, self._late_fresh = (
            gpu.largest_gradient(specs) if sums else 0 for specs in (early, late)
        )
        self._outside_layout = lay_out([spec for spec in outside if spec.trainable])
        self._outside_source = _source_bytes(outside, workload.mapped)
        every = [*outside, *(segment.spec for layout in layouts for segment in layout.segments)]
        # The sum of squares of each gradient waits on the GPU for the norm.
        self._norms = gpu.nbytes(8) * sum(spec.trainable for spec in every) if workload.on_gpu else 0
        # A checkpoint is written from where the state lives, and read to there; but for what is joined or read anew.
        joined = max(map(_joined_bytes, every), default=0)
        # A piece, another that the C library has not given back, and one joined.
        self._saving = 2 * CHECKPOINT_PIECE_BYTES + min(CHECKPOINT_PIECE_BYTES, joined)
        self._resuming = max(CHECKPOINT_BATCH_BYTES, *(_source_bytes([spec]) for spec in every), 0)

    # -- GPU -------------------------------------------------------------------------------------------------

    def gpu_state(self, decisions: Decisions) -> dict[str, int]:
        """Bytes of the GPU that are taken for the whole of training, by name."""
        workload, where = self.workload, decisions.outside_state
        resident = [self.units[unit] for unit in decisions.resident]
        slot = max((self.units[unit].slot for unit in self._streamed(decisions)), default=0)
        state = {
            "slots": decisions.slots * slot,
            "resident weights": self._outside_weights + sum(unit.gpu_weights for unit in resident),
            "resident master residuals": self._outside_residuals[where]
            + sum(unit.gpu_residuals for unit in resident),
        }
        if workload.training:
            moments = sum(unit.gpu_moments for unit in resident)
            state["resident moments"] = self._outside_moments[where] + moments
        if workload.profile is not None and workload.training:
            state["held outside of units"] = workload.profile.held_bytes
            state["cuBLAS workspaces"] = CUBLAS_BYTES if workload.on_gpu else 0
            state["squared norms"] = self._norms
        return state

    def _streamed(self, decisions: Decisions) -> list[int]:
        resident = set(decisions.resident)
        return [unit for unit in range(len(self.units)) if unit not in resident]

    def walk(self, decisions: Decisions) -> list[Moment]:
        """The moments of a step of training, in order; with accumulation those of a later micro-batch."""
        units = list(enumerate(self.units))
        resident, fp32_sums = set(decisions.resident), self.workload.fp32_sums
        overlapped = self.workload.overlapped
        keeps = [policy == "keep" for policy in decisions.activations]
        inputs = self._inputs_alive(decisions.activations)
        # Sums over micro-batches are there from the first of them on; else gradients come one by one.
        staying = 0
        if fp32_sums:
            staying = self._early + self._late
            staying += sum(self.units[unit].gpu_sums for unit in decisions.resident)
        moving: list[int] = []
        if overlapped:  # the last ones are let go of only when the next backward sends its first
            moving = [one.gpu_gradients for unit, one in units if unit not in resident][: _MOVING - 1][::-1]

        moments = []
        kept, on_their_way = 0, sum(moving)
        for unit, one in units:
            kept += one.profile.saved_bytes if keeps[unit] else 0
            moments.append(
                Moment(
                    "forward",
                    unit,
                    inputs[unit],
                    kept,
                    0,
                    one.profile.forward_bytes,
                    0,
                    staying,
                    on_their_way,
                )
            )
        all_inputs = inputs[-1] if inputs else 0
        staying += self._early_fresh if fp32_sums else self._early
        moments.append(
            Moment("head and loss", None, all_inputs, kept, 0, 0, self._loss, staying, on_their_way)
        )
        staying -= self._early_fresh if fp32_sums else 0
        for unit, one in reversed(units):
            saved, own = one.profile.saved_bytes, 0
            if unit in resident:
                own = one.gpu_gradients + one.widened
            else:
                moving = [*moving[1 - _MOVING :], one.gpu_gradients]
            moments.append(
                Moment(
                    "backward",
                    unit,
                    inputs[unit],
                    kept,
                    0 if keeps[unit] else saved,
                    one.profile.backward_bytes,
                    0,
                    staying + own,
                    sum(moving),
                )
            )
            kept -= saved if keeps[unit] else 0
            if unit in resident:
                # Sums are there already; overlapped updates use a gradient up at once.
                staying += 0 if fp32_sums or overlapped else one.gpu_gradients
            else:
                moving = moving[1 - _MOVING :]
        staying += self._late_fresh if fp32_sums else self._late
        # The gradient of the first unit's input is what the embedding's backward starts from.
        first_input = self.units[0].profile.boundary_bytes if self.units else 0
        moments.append(Moment("end of backward", None, 0, 0, 0, first_input, 0, staying, sum(moving)))
        return moments

    def _inputs_alive(self, activations: Sequence[str]) -> list[int]:
        """Bytes of units' inputs on the GPU when each unit runs: those up to it, of offloaded ones the last few."""
        alive, staying = [], 0
        moving: list[int] = []
        for unit, policy in zip(self.units, activations, strict=True):
            if policy == "offload":
                moving = [*moving[1 - _MOVING :], unit.profile.boundary_bytes]
            else:
                staying += unit.profile.boundary_bytes
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
        on_disk, whole = set(decisions.on_disk), set(decisions.weights_on_disk)
        in_ram = [self.units[unit] for unit in streamed if unit not in on_disk]
        holding = [self.units[unit] for unit in streamed if unit not in whole]
        items = [
            Item("RAM", "weights", sum(unit.ram_weights for unit in holding), on_gpu),
            Item("RAM", "master residuals", sum(unit.ram_residuals for unit in in_ram)),
        ]
        if workload.training:
            items.append(Item("RAM", "moments", sum(unit.ram_moments for unit in in_ram)))
        items.append(Item("RAM", "disk buffers", self._disk_buffers(decisions)))
        if whole:
            items.append(Item("RAM", "weight buffers", self._weight_buffers(decisions), on_gpu))
        # Inputs that wait on disk pass through buffers both ways, which are there from the start.
        passing = 2 * self._input_buffers(decisions)
        if not workload.training:
            return [*items, Item("RAM", "inputs of units", passing, on_gpu)] if passing else items
        if not workload.overlapped:
            nbytes = sum(unit.ram_gradients for unit in holding)
            items.append(Item("RAM", "gradients", nbytes, on_gpu and not workload.fp32_sums))
        largest = max((self.units[unit].gradients for unit in streamed), default=0)
        items.append(Item("RAM", "gradient staging", decisions.staging_buffers * _pages(largest), on_gpu))
        if workload.profile is not None:
            items.append(Item("RAM", "inputs of units", self._inputs_in_ram(decisions) + passing, on_gpu))
        if decisions.outside_state == "RAM":
            layout = self._outside_layout
            moved = _pages(layout.weight_bytes) + _pages(_waiting_gradients(workload, layout))
            state = _pages(2 * layout.lo_numel) + _moment_pages(layout, workload.moments)
            items += [
                Item("RAM", "weights and gradients outside of units", moved, on_gpu),
                Item("RAM", "optimizer state outside of units", state),
            ]
        return items

    def _inputs_in_ram(self, decisions: Decisions) -> int:
        """Bytes for offloaded inputs. One waits where the unit's gradient will come, if there is such a place."""
        resident, whole = set(decisions.resident), set(decisions.weights_on_disk)
        has_place = not self.workload.overlapped and not self.workload.fp32_sums
        nbytes = 0
        for index, (unit, policy) in enumerate(zip(self.units, decisions.activations, strict=True)):
            if policy == "offload" and index not in whole:
                place = unit.ram_gradients if has_place and index not in resident else 0
                nbytes += max(0, _pages(unit.profile.boundary_bytes) - place)
        return nbytes

    def ram_train(self, decisions: Decisions) -> int:
        """Bytes of RAM during training."""
        return sum(item.nbytes for item in self.ram_items(decisions))

    def _disk_buffers(self, decisions: Decisions) -> int:
        """Bytes of the buffers that updates borrow: each for state, weights and gradients of one unit."""
        whole = set(decisions.weights_on_disk)
        files = ((unit in whole, self.units[unit].file) for unit in decisions.on_disk)
        sizes = (file.masters_and_gradients[1] if is_whole else file.nbytes for is_whole, file in files)
        return decisions.disk_buffers * max(sizes, default=0)

    def _inputs_on_disk(self, decisions: Decisions) -> dict[int, int]:
        """Bytes of each unit's input that waits on disk, by unit: where its weights are too."""
        return {
            unit: _pages(self.units[unit].profile.boundary_bytes)
            for unit in decisions.weights_on_disk
            if decisions.activations[unit] == "offload"
        }

    def _input_buffers(self, decisions: Decisions) -> int:
        """Bytes of the buffers through which inputs go to disk, or come back."""
        return INPUT_BUFFERS * max(self._inputs_on_disk(decisions).values(), default=0)

    def _weight_buffers(self, decisions: Decisions) -> int:
        """Bytes of the buffers through which weights on disk go to their slots, as many as slots."""
        weights = (self.units[unit].ram_weights for unit in decisions.weights_on_disk)
        return decisions.slots * max(weights, default=0)

    # -- disk ------------------------------------------------------------------------------------------------

    def disk_bytes(self, decisions: Decisions) -> int:
        """Bytes on disk, from loading on."""
        return sum(item.nbytes for item in self.disk_items(decisions))

    def disk_items(self, decisions: Decisions) -> list[Item]:
        """What lies on disk."""
        whole = [self.units[unit].file for unit in decisions.weights_on_disk]
        state = "residuals and moments" if self.workload.moments.parts else "residuals"
        items = [
            Item("disk", state, sum(self.units[unit].disk_state for unit in decisions.on_disk)),
            Item("disk", "weights", sum(file.weight_bytes for file in whole)),
            Item("disk", "gradients", sum(file.grad_bytes for file in whole)),
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
        for index, unit in enumerate(self.units):
            made_from = unit.remade_from or (unit.remade if index in resident else 0)
            peak = max(peak, made_from + unit.remade + unit.remade_once)
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
        now = self._outside_source + sum(unit.source for unit in self.units)
        now += self._disk_buffers(decisions) + self._weight_buffers(decisions)
        now += self._input_buffers(decisions)
        peak = now
        whole = set(decisions.weights_on_disk)
        resident, on_disk = set(decisions.resident), set(decisions.on_disk)
        for index, unit in enumerate(self.units):
            if index not in resident:
                now += 0 if index in whole else unit.ram_weights
                now += 0 if index in on_disk else unit.ram_residuals
            peak = max(peak, now)
            now -= unit.source
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


def _source_bytes(specs: Sequence[ParamSpec], mapped: Container[str] = ()) -> int:
    """Bytes of parameters as they came, but for those of these names."""
    return sum(spec.numel * spec.source_dtype.itemsize for spec in specs if spec.name not in mapped)


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _moment_pages(layout: UnitLayout, moments: MomentFormat) -> int:
    return sum(_pages(part.entries(layout.state_numel) * part.dtype.itemsize) for part in moments.parts)


def _waiting_gradients(workload: Workload, layout: UnitLayout) -> int:
    """Bytes of gradients that wait for their update: as they came, or sums in fp32."""
    return 4 * layout.state_numel if workload.fp32_sums else layout.grad_bytes


def disk_layout(workload: Workload, layout: UnitLayout) -> DiskLayout:
    """The file of a unit whose weights, and gradients that wait, are on disk too; without its input.

    A file is made with room for all of it, also where only evaluation is asked for at first.
    """
    waiting = 0 if workload.overlapped else _waiting_gradients(workload, layout)
    return lay_out_on_disk(layout, workload.moments, weights=True, grad_bytes=waiting)
