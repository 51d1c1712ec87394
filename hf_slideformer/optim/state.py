"""Per-parameter optimizer state, wherever it lives, and the runs that one kernel call updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from slideformer_kernels import (
    adamw_,
    dequantize_moments,
    join_master,
    quantize_moments,
    split_master,
)
from slideformer_kernels.scalars import AdamWScalars, adamw_scalars

from ..errors import CheckpointError
from ..memory.layout import (
    ALIGN_ELEMENTS,
    EIGHT_BIT_MOMENTS,
    MomentFormat,
    ParamSpec,
    Segment,
    moment_format_of,
)
from ..memory.manager import UnitMemory
from ..memory.pinned import BufferView, HostBuffer
from ..memory.transfer import Handle


@dataclass(slots=True, eq=False, weakref_slot=True)
class ParamState:
    """One parameter and everything the optimizer keeps for it.

    `weight` is what updates write (bf16 `hi` half of the master where `spec.split`, else the plain weights);
    `residual` the int16 `lo` half; `moments` by name what the format (`MomentFormat`) consists of, nothing until there
    is an optimizer. All have the parameter's shape (scales of 8-bit moments: one entry for each block), on the device
    where the parameter is updated. `live` is the tensor behind `param.data`: `weight` itself, or its copy on the GPU
    where the parameter is used there and updated in RAM. `order` is the registration order in the model; `unit` is
    None for a parameter that does not stream, whose `segment` has offsets only if it is updated in RAM. `version` is
    `param._version` when the residual was last known to belong to the weights. `moment_format` is None until there is
    an optimizer, and for frozen parameters.

    State that lives on disk is `residual` and `moments` only between `attach` and `detach`. `residual_is_stale` says
    that the one on disk belongs to other weights, and counts as zero.
    """

    order: int
    param: torch.nn.Parameter
    unit: int | None
    segment: Segment
    weight: torch.Tensor
    residual: torch.Tensor | None
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    version: int = 0
    live: torch.Tensor = None  # type: ignore[assignment] # set below
    moment_format: MomentFormat | None = None
    residual_is_stale: bool = False

    def __post_init__(self) -> None:
        if self.live is None:
            self.live = self.weight

    @property
    def updated_in_ram(self) -> bool:
        """Whether the parameter is used on the GPU and its master and moments are in RAM."""
        return self.live is not self.weight

    @property
    def spec(self) -> ParamSpec:
        """Shape, dtypes and kind of the parameter."""
        return self.segment.spec

    @property
    def name(self) -> str:
        """The parameter's qualified name in the model."""
        return self.spec.name

    def check_outside_write(self) -> None:
        """Clear the residual if the weights were written through the parameter since it was last valid.

        `load_state_dict`, `p.copy_()` and the like raise the parameter's version; our kernels do not.
        """
        if self.param._version != self.version:
            self.follow_live()
            self.version = self.param._version

    def attach(self, memory: UnitMemory) -> None:
        """Use the residual and moments that `memory` has just got from disk."""
        self.residual = memory.residual(self.segment)
        if self.moment_format is not None:
            self.moments = memory.moments(self.segment)
        if self.residual is not None and self.residual_is_stale:
            self.residual.zero_()

    def detach(self) -> None:
        """Let go of residual and moments that live on disk."""
        self.residual, self.moments = None, {}

    def follow_live(self) -> None:
        """Make the master what the live weights are: written from outside, they know nothing of a residual."""
        if self.updated_in_ram:
            self.weight.copy_(self.live)
        self._clear_residual()

    def _clear_residual(self) -> None:
        if self.residual is not None:
            self.residual.zero_()
        elif self.spec.split:  # on disk
            self.residual_is_stale = True

    def write_master(self, values: torch.Tensor) -> None:
        """Set the weights from fp32 or bf16 `values` of the parameter's shape, exactly where they are fp32."""
        with torch.no_grad():
            if self.spec.split and values.dtype == torch.float32:
                assert self.residual is not None, "on disk: attach it first"
                hi, lo = split_master(values.detach().to(self.weight.device).contiguous())
                self.weight.copy_(hi)
                self.residual.copy_(lo)
            else:
                self.weight.copy_(values)
                self._clear_residual()
            if self.updated_in_ram:
                self.live.copy_(self.weight)
        self.version = self.param._version

    def read_at(self, place: torch.Tensor) -> torch.Tensor:
        """The fp32 weights of a split master at `place`, a view of the live weights; a new tensor on its device."""
        self.check_outside_write()
        assert self.residual is not None, "on disk: attach it first"
        residual = self._at(place, self.residual).to(place.device)
        return join_master(place.detach().contiguous(), residual.contiguous())

    def write_at(self, place: torch.Tensor, values: torch.Tensor) -> None:
        """Set the weights at `place`, a view of the live weights, and nothing else.

        Args:
            place: where.
            values: of the same shape and on the same device. fp32 sets a split master exactly; in the dtype of the live
                weights, the residual is kept wherever the value is what was there.
        """
        with torch.no_grad():
            self.check_outside_write()
            torch.autograd.graph.increment_version(self.param)  # before, for those who read beside training
            if not self.spec.split:
                place.copy_(values)
            else:
                assert self.residual is not None, "on disk: attach it first"
                residual = self._at(place, self.residual)
                if values.dtype == torch.float32:
                    hi, lo = split_master(values.detach().contiguous())
                    residual.copy_(lo.view(place.shape))
                    place.copy_(hi.view(place.shape))
                else:
                    residual.masked_fill_((place != values).to(residual.device), 0)
                    place.copy_(values)
            if self.updated_in_ram:
                self._at(place, self.weight).copy_(place)
        self.version = self.param._version

    def _at(self, place: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Of another of the parameter's tensors, what `place` is of the live one."""
        offset = place.storage_offset() - self.live.storage_offset() + whole.storage_offset()
        return whole.as_strided(place.size(), place.stride(), offset)

    def read_master(self) -> torch.Tensor:
        """The weights in the dtype they came in: the tensor itself, or a new one joined from both halves."""
        self.check_outside_write()
        if not self.spec.split or self.spec.source_dtype != torch.float32:
            return self.live
        assert self.residual is not None, "on disk: attach it first"
        return join_master(self.weight, self.residual).view(self.spec.shape)

    def check_saved_moments(self, saved: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless `saved`, of either format, holds this parameter's moments."""
        if self.moment_format is None:
            raise CheckpointError(
                f"{self.name}: the saved state has moments, but this model's parameter is frozen and has none"
            )
        for part in moment_format_of(saved).parts:
            value = saved.get(part.name)
            shape = part.shape(self.spec)
            if not isinstance(value, torch.Tensor) or value.shape != shape:
                have = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else "no tensor"
                raise CheckpointError(
                    f"{self.name}: saved {part.name} has {have}, this model's parameter wants {shape}"
                )
            if value.dtype != part.dtype and not (part.dtype.is_floating_point and value.is_floating_point()):
                raise CheckpointError(
                    f"{self.name}: saved {part.name} has dtype {value.dtype}, wanted {part.dtype}; moments are "
                    "fp32, or 8-bit codes with scales as hf_slideformer writes them"
                )

        if not isinstance(saved.get("step"), (int, float, torch.Tensor)):
            raise CheckpointError(f"{self.name}: the saved state has no step count")
        residual = saved.get("master_residual")
        if self.spec.split and residual is not None and tuple(residual.shape) != self.spec.shape:
            raise CheckpointError(
                f"{self.name}: saved master_residual has shape {tuple(residual.shape)}, this model's parameter wants "
                f"{self.spec.shape}"
            )

    def load_moments(self, saved: Mapping[str, Any]) -> None:
        """Copy checked moments into place: bit for bit, or converted from the other format."""
        have, want = moment_format_of(saved), self.moment_format
        assert want is not None and self.moments, "frozen, or on disk: attach it first"
        values = {part.name: saved[part.name] for part in have.parts}
        if have is not want:  # where the saved tensors lie: on a GPU there may be no room for a second format
            values = convert_moments(
                {part.name: values[part.name].to(part.dtype) for part in have.parts}, want
            )
        for name, value in values.items():
            self.moments[name].copy_(value)


@dataclass(frozen=True, slots=True)
class Hyperparams:
    """A snapshot of one parameter group at one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    @classmethod
    def of_group(cls, group: dict) -> Hyperparams:
        """Read a `torch.optim` parameter group; tensors become Python floats."""
        beta1, beta2 = group["betas"]
        return cls(
            float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"])
        )

    def scalars(self, step: int) -> AdamWScalars:
        """The kernel's scalars for update number `step` (from 1)."""
        return adamw_scalars(
            lr=self.lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            step=step,
        )


def zero_moments(moments: MomentFormat, spec: ParamSpec, device: torch.device) -> dict[str, torch.Tensor]:
    """The moments by name of a parameter that has not been updated yet, in tensors of their own."""
    return {
        part.name: torch.zeros(part.shape(spec), dtype=part.dtype, device=device) for part in moments.parts
    }


def convert_moments(given: Mapping[str, torch.Tensor], to: MomentFormat) -> dict[str, torch.Tensor]:
    """Moments by name, from the other format, in new tensors beside those given.

    To 8 bits they are rounded as an update would round them; to fp32 they become what the next update would read.
    """
    convert: Callable[..., tuple[torch.Tensor, ...]] = (
        quantize_moments if to is EIGHT_BIT_MOMENTS else dequantize_moments
    )
    converted = convert(**{name: tensor.contiguous() for name, tensor in given.items()})
    return dict(zip([part.name for part in to.parts], converted, strict=True))


def apply_update(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: AdamWScalars,
    grad_scale: float,
    threads: int | None,
) -> None:
    """One AdamW update in place on the device of its tensors; `moments` by name, in either format."""
    masters = (weight,) if residual is None else (weight, residual)
    with torch.no_grad():
        adamw_(masters, grad, moments, scalars, grad_scale, threads=threads)


@dataclass(frozen=True, slots=True)
class UpdateRun:
    """Neighbouring parameters of a unit that one kernel call updates, with that call's numbers."""

    members: list[ParamState]
    scalars: AdamWScalars
    grad_scale: float


def plan_runs(
    states: Sequence[ParamState],
    hyperparams: Callable[[ParamState], Hyperparams],
    grad_scale: Callable[[ParamState], float],
) -> list[UpdateRun]:
    """Group neighbouring parameters of a unit that one kernel call can update.

    Neighbours join where they are adjacent in the unit's buffers, are stored alike, and share hyperparameters, step
    number and clip coefficient. Alignment padding between them, whose values nobody reads, does no harm where
    moments are elementwise. A block's scale is a maximum over its elements, so there must be none.
    """
    runs: list[tuple[list[ParamState], tuple]] = []
    for state in sorted(states, key=lambda s: s.segment.state_offset):
        key = (state.spec.split, state.spec.dtype, hyperparams(state), state.step, grad_scale(state))
        if runs and runs[-1][1] == key:
            last = runs[-1][0][-1].segment
            padding = state.segment.state_offset - last.state_offset - last.spec.numel
            assert state.moment_format is not None
            if padding < (ALIGN_ELEMENTS if state.moment_format.elementwise else 1):
                runs[-1][0].append(state)
                continue
        runs.append(([state], key))
    return [UpdateRun(members, key[2].scalars(key[3]), key[4]) for members, key in runs]


@dataclass(frozen=True, slots=True)
class UnitUpdate:
    """One update of a unit, for the worker.

    Attributes:
        run: does it, from a gradient buffer.
        after: what has to be done first: its state comes from disk.
        drop: to be called where it will not run.
    """

    run: Callable[[HostBuffer | BufferView], None]
    after: tuple[Handle, ...] = ()
    drop: Callable[[], None] = lambda: None


def update_unit(
    memory: UnitMemory,
    grads: HostBuffer | BufferView,
    grads_fp32: bool,
    runs: Sequence[UpdateRun],
    threads: int,
) -> None:
    """Update the parameters in `runs`, all of one unit, from a gradient buffer; runs on the update worker."""
    for run in runs:
        first, last = run.members[0].segment, run.members[-1].segment
        numel = last.state_offset + last.spec.numel - first.state_offset
        spec = first.spec
        residual = None
        if spec.split:
            assert memory.lo is not None
            residual = memory.lo.tensor(torch.int16, first.lo_offset * 2, numel)
        if grads_fp32:
            grad = grads.tensor(torch.float32, first.state_offset * 4, numel)
        else:
            grad = grads.tensor(spec.dtype, first.grad_offset, numel)
        apply_update(
            memory.master_weights.tensor(spec.dtype, first.weight_offset, numel),
            residual,
            grad,
            memory.flat_moments(first.state_offset, numel),
            run.scalars,
            run.grad_scale,
            threads,
        )


__all__ = [
    "Hyperparams",
    "ParamState",
    "UnitUpdate",
    "UpdateRun",
    "apply_update",
    "convert_moments",
    "plan_runs",
    "update_unit",
    "zero_moments",
]
