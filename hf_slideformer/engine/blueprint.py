"""Blueprint: what will be streamed and how, known before anything is moved. Pure data over a model's structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..config import SlideConfig, parse_bytes
from ..errors import ConfigError, UnsupportedModelError
from ..hardware import available_gpu_bytes, available_ram_bytes
from ..memory.layout import FP32_MOMENTS, MOMENT_FORMATS, MomentFormat, ParamSpec, UnitLayout, lay_out
from ..planner.plan import Budgets, Decisions, Plan, make_plan
from .loss import HeadChoice, find_head
from .units import UnitModule, check_no_hooks, find_units, param_spec

# One slot in use, the rest arriving: bursts of late copies are absorbed by the one beyond the minimum.
_SLOTS = 3
_MAX_OVERLAP_STAGING = 5
_SUM_STAGING = 3


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """The decisions about one model.

    `specs` is keyed by `id(parameter)`; `layouts`, of all units as if they streamed, belong to `units` one to one;
    `outside` are the parameters that no unit owns.
    """

    units: list[UnitModule]
    layouts: list[UnitLayout]
    specs: dict[int, ParamSpec]
    outside: list[ParamSpec]
    decisions: Decisions
    overlapped: bool
    head: HeadChoice
    accumulates: bool
    moments: MomentFormat
    on_gpu: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        bf16: bool,
        config: SlideConfig,
        accumulates: bool,
        overlap_is_exact: bool,
        on_gpu: bool,
        decisions: Decisions | None = None,
    ) -> Blueprint:
        """Decide for `model`; arguments as for `SlideEngine`.

        Raises:
            UnsupportedModelError: nothing to stream, or weights that cannot be.
            ConfigError: settings that contradict each other.
        """
        units = find_units(model)
        specs = {}
        for name, param in model.named_parameters():
            if param.device.type == "meta":
                raise UnsupportedModelError(
                    f"{name} has no data (meta device); load the model's weights before preparing it"
                )
            specs[id(param)] = param_spec(model, name, param, bf16=bf16)
        for unit in units:
            for name, param in unit.parameters.items():
                check_no_hooks(name, param)
        if (
            accumulates
            and not hasattr(torch.Tensor, "grad_dtype")
            and any(spec.trainable and spec.dtype != torch.float32 for spec in specs.values())
        ):
            raise UnsupportedModelError(
                "gradient accumulation in fp32 with bf16 weights needs torch >= 2.10, this is "
                f"{torch.__version__}; upgrade torch, or use gradient_accumulation_steps=1"
            )
        owned = {id(param) for unit in units for param in unit.parameters.values()}
        if config.update == "overlapped" and accumulates:
            raise ConfigError(
                "update='overlapped' needs gradient_accumulation_steps=1: a unit's update would start before its "
                "gradient is complete; use update='deferred'"
            )
        overlapped = config.update == "overlapped" or (config.update == "auto" and overlap_is_exact)
        if decisions is None:
            decisions = stream_all(len(units), overlapped=overlapped, accumulates=accumulates)
        return cls(
            units=units,
            layouts=[lay_out([specs[id(param)] for param in unit.parameters.values()]) for unit in units],
            specs=specs,
            outside=[spec for key, spec in specs.items() if key not in owned],
            decisions=decisions,
            overlapped=overlapped,
            head=find_head(model, mode=config.loss, on_gpu=on_gpu),
            accumulates=accumulates,
            moments=MOMENT_FORMATS[config.optimizer_states],
            on_gpu=on_gpu,
        )

    @property
    def streamed(self) -> frozenset[int]:
        """Indices of the units that stream."""
        return frozenset(range(len(self.units))) - frozenset(self.decisions.resident)

    @property
    def streamed_layouts(self) -> list[UnitLayout]:
        """Their layouts."""
        return [layout for index, layout in enumerate(self.layouts) if index in self.streamed]

    @property
    def outside_layout(self) -> UnitLayout:
        """Of the parameters outside of units whose optimizer state is in RAM."""
        in_ram = self.decisions.outside_state == "RAM"
        return lay_out([spec for spec in self.outside if in_ram and spec.trainable])

    def planned_bytes(self, index: int) -> int | None:
        """Bytes of a unit's input that the plan counts on; None where nothing is known of batches."""
        return None

    def plan(self, *, training: bool) -> Plan:
        """What lives where, with or without optimizer state."""
        notes = []
        if any(spec.split and spec.source_dtype == torch.float32 for spec in self.specs.values()):
            notes.append(
                "fp32 weights with bf16=True are exact fp32 masters that compute in bf16, residual stream included; "
                "they are saved in fp32"
            )
        if training and self.moments is not FP32_MOMENTS:
            notes.append(
                "8-bit moments are rounded at every update: results differ from those of plain AdamW"
            )
        notes.append(self.head.note)
        return make_plan(
            layouts=self.streamed_layouts,
            resident=[
                *self.outside,
                *(s.spec for index in self.decisions.resident for s in self.layouts[index].segments),
            ],
            slots=self.decisions.slots,
            training=training,
            overlapped=self.overlapped,
            fp32_sums=self.accumulates,
            moments=self.moments,
            staging_buffers=self.decisions.staging_buffers if training else 0,
            on_gpu=self.on_gpu,
            notes=notes,
        )


def stream_all(units: int, *, overlapped: bool, accumulates: bool) -> Decisions:
    """The decisions that put the least on the GPU without moving activations."""
    if overlapped:  # enough for the worker to stay busy while the next gradients land
        staging = min(_MAX_OVERLAP_STAGING, max(2, units // 4))
    else:
        staging = _SUM_STAGING if accumulates else 0
    return Decisions(
        resident=(),
        activations=("recompute",) * units,
        slots=min(_SLOTS, max(2, units)),
        staging_buffers=staging,
    )


def find_budgets(config: SlideConfig, device: torch.device) -> Budgets:
    """Bytes that may be used: what the user allows, at most what is there."""
    ram, gpu = available_ram_bytes(), available_gpu_bytes(device)
    return Budgets(
        gpu=min(parse_bytes(config.gpu_memory or gpu), gpu),
        ram=min(parse_bytes(config.cpu_memory or ram), ram),
        pinned=parse_bytes(config.pinned_memory) if config.pinned_memory is not None else None,
    )
