"""Per-parameter optimizer state, wherever it lives, and the runs that one kernel call updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from slideformer_kernels import adamw_fp32_, adamw_split_, join_master, split_master
from slideformer_kernels.scalars import AdamWScalars, adamw_scalars

from ..memory.layout import ALIGN_ELEMENTS, ParamSpec, Segment
from ..memory.manager import UnitMemory
from ..memory.pinned import HostBuffer


@dataclass(slots=True, eq=False)
class ParamState:
    """One parameter and everything the optimizer keeps for it.

    `weight` is the tensor behind `param.data` (bf16 `hi` half of the master where `spec.split`, else the plain
    weights); `residual` the int16 `lo` half; moments are fp32. All have the parameter's shape, on the device
    where the parameter is updated. `order` is the registration order in the model;
    `unit` is None, and `segment` without offsets, for a resident parameter. `version` is
    `param._version` when the residual was last known to belong to the weights.
    """

    order: int
    param: torch.nn.Parameter
    unit: int | None
    segment: Segment
    weight: torch.Tensor
    residual: torch.Tensor | None
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None
    step: int = 0
    version: int = 0

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
            if self.residual is not None:
                self.residual.zero_()
            self.version = self.param._version

    def write_master(self, values: torch.Tensor) -> None:
        """Set the weights from fp32 or bf16 `values` of the parameter's shape, exactly where they are fp32."""
        with torch.no_grad():
            if self.residual is not None and values.dtype == torch.float32:
                hi, lo = split_master(values.detach().to(self.weight.device).contiguous())
                self.weight.copy_(hi)
                self.residual.copy_(lo)
            else:
                self.weight.copy_(values)
                if self.residual is not None:
                    self.residual.zero_()
        self.version = self.param._version

    def read_master(self) -> torch.Tensor:
        """The weights in the dtype they came in: the tensor itself, or a new one joined from both halves."""
        self.check_outside_write()
        if self.residual is None or self.spec.source_dtype != torch.float32:
            return self.weight
        return join_master(self.weight, self.residual).view(self.spec.shape)


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


def apply_update(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: AdamWScalars,
    grad_scale: float,
    threads: int | None,
) -> None:
    """One AdamW update in place on the device of its tensors."""
    kwargs = {"threads": threads} if weight.device.type == "cpu" else {}
    with torch.no_grad():
        if residual is None:
            adamw_fp32_(weight, grad, exp_avg, exp_avg_sq, scalars, grad_scale, **kwargs)
        else:
            adamw_split_(weight, residual, grad, exp_avg, exp_avg_sq, scalars, grad_scale, **kwargs)


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

    Neighbours join where they are adjacent in the unit's buffers (up to alignment padding, whose values
    nobody reads), are stored alike, and share hyperparameters, step number and clip coefficient.
    """
    runs: list[tuple[list[ParamState], tuple]] = []
    for state in sorted(states, key=lambda s: s.segment.state_offset):
        key = (state.spec.split, state.spec.dtype, hyperparams(state), state.step, grad_scale(state))
        if runs and runs[-1][1] == key:
            last = runs[-1][0][-1].segment
            end = last.state_offset + last.spec.numel
            if state.segment.state_offset - end < ALIGN_ELEMENTS:
                runs[-1][0].append(state)
                continue
        runs.append(([state], key))
    return [UpdateRun(members, key[2].scalars(key[3]), key[4]) for members, key in runs]


def update_unit(
    memory: UnitMemory,
    grads: HostBuffer,
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
        assert memory.exp_avg is not None and memory.exp_avg_sq is not None
        apply_update(
            memory.weights.tensor(spec.dtype, first.weight_offset, numel),
            residual,
            grad,
            memory.exp_avg.tensor(torch.float32, first.state_offset * 4, numel),
            memory.exp_avg_sq.tensor(torch.float32, first.state_offset * 4, numel),
            run.scalars,
            run.grad_scale,
            threads,
        )


__all__ = ["Hyperparams", "ParamState", "UpdateRun", "apply_update", "plan_runs", "update_unit"]
