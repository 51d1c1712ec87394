"""Per-parameter optimizer state, wherever it lives, and the runs that one kernel call updates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from slideformer_kernels import join_master, split_master

from ..errors import CheckpointError, StateError
from ..memory.buffers import Buffer
from ..memory.layout import ALIGN_ELEMENTS, ParamSpec, Segment
from ..memory.unit_memory import UnitMemory
from .rule import UpdateRule, saved_format


@dataclass(slots=True, eq=False, weakref_slot=True)
class ParamState:
    """One parameter and everything the optimizer keeps for it.

    `weight` is what updates write (bf16 `hi` half of the master where `spec.split`, else the plain weights);
    `residual` the int16 `lo` half; `moments` by name what the format (`MomentFormat`) consists of, nothing until there
    is an optimizer. All have the parameter's shape (scales of 8-bit moments: one entry for each block), on the device
    where the parameter is updated. `live` is the tensor behind `param.data`: `weight` itself, or its copy on the GPU
    where the parameter is used there and updated in RAM. `order` is the registration order in the model, `group` the
    number of the `StateGroup` that the parameter moves with; the `segment` of one that is updated on the device has no
    offsets. `streams` says that leases stand in for it in computing. `version` is `param._version` when the residual
    was last known to belong to the weights. `rule` is None until there is an optimizer, and for frozen parameters.

    State that lives on disk is `residual` and `moments` only between `attach` and `detach`. `residual_is_stale` says
    that the one on disk belongs to other weights, and counts as zero.
    """

    order: int
    param: torch.nn.Parameter
    group: int
    streams: bool
    segment: Segment
    weight: torch.Tensor
    residual: torch.Tensor | None
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    version: int = 0
    live: torch.Tensor = None  # type: ignore[assignment] # set below
    rule: UpdateRule | None = None
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

    @property
    def is_in_memory(self) -> bool:
        """Whether residual and moments, as far as there are any, are tensors now."""
        parts = 0 if self.rule is None else len(self.rule.format.parts)
        return len(self.moments) == parts and (self.residual is not None or not self.spec.split)

    def check_outside_write(self) -> None:
        """Clear the residual if the weights were written through the parameter since it was last valid.

        `load_state_dict`, `p.copy_()` and the like raise the parameter's version; our kernels do not.
        """
        if self.param._version != self.version:
            self.follow_live()
            self.version = self.param._version

    def note_update(self) -> None:
        """Let autograd's own check find a graph that was built on the old weights."""
        torch.autograd.graph.increment_version(self.param)
        self.version = self.param._version

    def attach(self, memory: UnitMemory) -> None:
        """Use the residual and moments that `memory` has just got from disk."""
        self.residual = memory.residual(self.segment)
        if self.rule is not None:
            self.moments = memory.moments(self.segment)
        if self.residual is not None and self.residual_is_stale:
            self.residual.zero_()

    def detach(self) -> None:
        """Let go of residual and moments that live on disk."""
        self.residual, self.moments = None, {}

    def follow_live(self) -> None:
        """Make the master what the live weights are: written from outside, they know nothing of a residual."""
        _bring(self.live, self.weight)
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
            _bring(self.weight, self.live)
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
            if self.weight is not self.live:
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

    def check_saved(self, saved: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless `saved`, in any format that the rule reads, is this parameter's state."""
        rule = self.rule
        if rule is None:
            raise CheckpointError(
                f"{self.name}: the saved state has moments, but this model's parameter is frozen and has none"
            )
        for part in saved_format(rule, saved).parts:
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
        known = {part.name for form in rule.readable for part in form.parts} | {"step", "master_residual"}
        others = [name for name, value in saved.items() if name not in known and value is not None]
        if others:
            raise CheckpointError(
                f"{self.name}: the saved state has {', '.join(map(str, others))}, which is not {rule.name}'s; resume "
                "with the optimizer that saved it, or load only the model's weights"
            )
        if not isinstance(saved.get("step", None if rule.counts_steps else 1), (int, float, torch.Tensor)):
            raise CheckpointError(f"{self.name}: the saved state has no step count")
        residual = saved.get("master_residual")
        if self.spec.split and residual is not None and tuple(residual.shape) != self.spec.shape:
            raise CheckpointError(
                f"{self.name}: saved master_residual has shape {tuple(residual.shape)}, this model's parameter wants "
                f"{self.spec.shape}"
            )

    def load_moments(self, saved: Mapping[str, Any]) -> None:
        """Copy checked moments into place: bit for bit, or converted from another format."""
        rule = self.rule
        assert rule is not None, "frozen"
        have = saved_format(rule, saved)
        values = {part.name: saved[part.name] for part in have.parts}
        if (
            have != rule.format
        ):  # where the saved tensors lie: on a GPU there may be no room for a second format
            values = rule.convert({part.name: values[part.name].to(part.dtype) for part in have.parts}, have)
        assert values.keys() == self.moments.keys(), "on disk: attach it first"
        for name, value in values.items():
            self.moments[name].copy_(value)


def _bring(source: torch.Tensor, to: torch.Tensor) -> None:
    """What was written in one place to the other, where a parameter has two."""
    if to is not source:
        to.copy_(source)


def set_gradient(state: ParamState, grad: torch.Tensor) -> None:
    """Set `p.grad`, of another dtype than the parameter where it is an fp32 sum."""
    allowed = getattr(state.param, "grad_dtype", state.param.dtype)
    if grad.dtype != allowed:
        if not hasattr(state.param, "grad_dtype"):
            raise StateError(
                f"a second gradient for {state.name} needs an fp32 sum, for which bf16 weights need torch >= 2.10; "
                "upgrade torch, or make one backward per step"
            )
        state.param.grad = None
        state.param.grad_dtype = grad.dtype
    state.param.grad = grad


@dataclass(frozen=True, slots=True)
class UpdateRun:
    """Neighbouring parameters that one kernel call updates, with that call's numbers."""

    members: list[ParamState]
    rule: UpdateRule
    scalars: Any
    grad_scale: float

    def apply(
        self,
        weight: torch.Tensor,
        residual: torch.Tensor | None,
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        threads: int,
    ) -> None:
        """Update tensors of all members in place, on the device where they are."""
        masters = (weight,) if residual is None else (weight, residual)
        with torch.no_grad():
            on_cpu = weight.device.type == "cpu"
            self.rule.apply(
                masters, grad, moments, self.scalars, self.grad_scale, threads if on_cpu else None
            )


def plan_runs(
    states: Sequence[ParamState],
    hyperparams: Callable[[ParamState], Hashable],
    grad_scale: Callable[[ParamState], float],
) -> list[UpdateRun]:
    """Group neighbouring parameters of a unit that one kernel call can update.

    Neighbours join where they are adjacent in the unit's buffers, are stored alike, and share hyperparameters, step
    number and clip coefficient. Alignment padding between them, whose values nobody reads, does no harm where
    moments are elementwise. A block's scale is a maximum over its elements, so there must be none. Parameters with
    tensors of their own have no neighbours.
    """
    runs: list[tuple[list[ParamState], UpdateRule, tuple]] = []
    for state in sorted(states, key=lambda s: s.segment.state_offset):
        assert state.rule is not None, "nothing is updated without an optimizer"
        key = (state.spec.split, state.spec.dtype, hyperparams(state), state.step, grad_scale(state))
        if runs and runs[-1][2] == key and not state.segment.is_alone:
            last = runs[-1][0][-1].segment
            padding = state.segment.state_offset - last.state_offset - last.spec.numel
            if padding < (ALIGN_ELEMENTS if state.rule.format.elementwise else 1):
                runs[-1][0].append(state)
                continue
        runs.append(([state], state.rule, key))
    return [UpdateRun(members, rule, rule.scalars(key[2], key[3]), key[4]) for members, rule, key in runs]


def update_unit(
    memory: UnitMemory, grads: Buffer, grads_fp32: bool, runs: Sequence[UpdateRun], threads: int
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
        weight = memory.master_weights.tensor(spec.dtype, first.weight_offset, numel)
        run.apply(weight, residual, grad, memory.flat_moments(first.state_offset, numel), threads)


__all__ = ["ParamState", "UpdateRun", "plan_runs", "set_gradient", "update_unit"]
