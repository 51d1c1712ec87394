"""Blueprint: what a model consists of for the engine, known before anything is moved. Pure data over its structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ...errors import ConfigError, UnsupportedModelError
from ...memory.layout import EIGHT_BIT_MOMENTS, ParamSpec, UnitLayout, lay_out
from ...memory.mappings import mapped_from_files
from ...optim.rule import UpdateRule
from ...planner.profile import ModelProfile
from ...planner.workload import Decisions, Workload
from .head import HeadChoice, find_head, output_embeddings
from .setup import Setup
from .source import without_data
from .units import (
    UnitModule,
    check_no_hooks,
    find_units,
    param_spec,
)


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """One model's parts and how it is trained.

    `specs` is keyed by `id(parameter)`; `layouts`, of all units as if they streamed, belong to `units` one to one;
    `outside` are the parameters that no unit owns, `last_gradients` the names of those among them that come before the
    units, so that backward reaches them last; `mapped` the names of those whose weights are pages of a file, `remade`
    of those that `save_pretrained` makes other tensors of.
    """

    units: list[UnitModule]
    layouts: list[UnitLayout]
    specs: dict[int, ParamSpec]
    outside: list[ParamSpec]
    last_gradients: frozenset[str]
    overlapped: bool
    head: HeadChoice
    micro_batches: int
    rule: UpdateRule
    on_gpu: bool
    mapped: frozenset[str]
    remade: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, setup: Setup) -> Blueprint:
        """The parts of `model`, trained as `setup` says.

        Raises:
            UnsupportedModelError: nothing to stream, or weights that cannot be.
            ConfigError: settings that contradict each other.
        """
        units = find_units(model)
        specs = {}
        for name, param in model.named_parameters():
            specs[id(param)] = param_spec(model, name, param, bf16=setup.bf16)
        for unit in units:
            for name, param in unit.parameters.items():
                check_no_hooks(name, param)
        if (
            setup.accumulates
            and not hasattr(torch.Tensor, "grad_dtype")
            and any(spec.trainable and spec.dtype != torch.float32 for spec in specs.values())
        ):
            raise UnsupportedModelError(
                "gradient accumulation in fp32 with bf16 weights needs torch >= 2.10, this is "
                f"{torch.__version__}; upgrade torch, or use gradient_accumulation_steps=1"
            )
        owned = {id(param) for unit in units for param in unit.parameters.values()}
        if setup.config.update == "overlapped" and setup.accumulates:
            raise ConfigError(
                "update='overlapped' needs gradient_accumulation_steps=1: a unit's update would start before its "
                "gradient is complete; use update='deferred'"
            )
        on_gpu = setup.device.type == "cuda"
        return cls(
            units=units,
            layouts=[lay_out([specs[id(param)] for param in unit.parameters.values()]) for unit in units],
            specs=specs,
            outside=[spec for key, spec in specs.items() if key not in owned],
            last_gradients=_before_units(model, specs, owned),
            overlapped=setup.overlapped,
            head=find_head(model, mode=setup.config.loss, on_gpu=on_gpu),
            micro_batches=setup.micro_batches,
            rule=setup.update_rule,
            on_gpu=on_gpu,
            mapped=_mapped(model, specs),
            remade=_remade(model, specs),
        )

    def workload(self, profile: ModelProfile | None, *, training: bool) -> Workload:
        """What is planned for, given what is known of batches."""
        return Workload(
            layouts=tuple(self.layouts),
            outside=tuple(self.outside),
            profile=profile,
            training=training,
            overlapped=self.overlapped,
            micro_batches=self.micro_batches,
            moments=self.rule.format,
            on_gpu=self.on_gpu,
            last_gradients=self.last_gradients,
            mapped=self.mapped,
            remade=self.remade,
        )

    @property
    def fp32_sums(self) -> bool:
        """Whether gradients are fp32 from the first micro-batch on."""
        return self.micro_batches > 1

    def streamed_layouts(self, decisions: Decisions) -> list[UnitLayout]:
        """Layouts of the units that stream."""
        return [layout for index, layout in enumerate(self.layouts) if index not in decisions.resident]

    def outside_layout(self, decisions: Decisions) -> UnitLayout:
        """Of the parameters outside of units whose optimizer state is in RAM."""
        in_ram = decisions.outside_state == "RAM"
        return lay_out([spec for spec in self.outside if in_ram and spec.trainable])

    def notes(self, *, training: bool) -> list[str]:
        """Differences from plain training that a user should know."""
        notes = []
        if any(spec.split and spec.source_dtype == torch.float32 for spec in self.specs.values()):
            notes.append(
                "fp32 weights with bf16=True are exact fp32 masters that compute in bf16, residual stream included; "
                "they are saved in fp32"
            )
        if training and self.rule.format == EIGHT_BIT_MOMENTS:
            notes.append(
                "8-bit moments are rounded at every update: results differ from those of plain AdamW"
            )
        notes.append(self.head.note)
        return notes


def _mapped(model: nn.Module, specs: dict[int, ParamSpec]) -> frozenset[str]:
    params = list(model.parameters())
    found = mapped_from_files(param.data for param in params)
    return frozenset(specs[id(param)].name for param, mapped in zip(params, found, strict=True) if mapped)


def _remade(model: nn.Module, specs: dict[int, ParamSpec]) -> frozenset[str]:
    if not isinstance(model, PreTrainedModel):
        return frozenset()
    live = {name: without_data(specs[id(p)].name, p.data) for name, p in model.named_parameters()}
    saved = revert_weight_conversion(model, live).values()
    names = {specs[id(param)].name for param in model.parameters()}
    return frozenset(names - {getattr(value, "source", None) for value in saved})


def _before_units(model: nn.Module, specs: dict[int, ParamSpec], owned: set[int]) -> frozenset[str]:
    """Names of parameters registered before the first unit's and not shared with the head: input embeddings."""
    head = output_embeddings(model)
    shared = set() if head is None else {id(param) for param in head.parameters()}
    names = set()
    for param in model.parameters():
        if id(param) in owned:
            break
        if id(param) not in shared:
            names.add(specs[id(param)].name)
    return frozenset(names)
