"""Planning for a real model on this machine: gathers what the planner needs to know and asks it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import SlideConfig, parse_bytes
from ..machine.hardware import Hardware, available_gpu_bytes, available_ram_bytes
from ..machine.probe import hardware_of_this_machine
from ..memory.disk.calls import free_bytes
from ..memory.mappings import mapped_from_files
from ..planner.plan import Plan, check_budgets, describe
from ..planner.profile import ModelProfile
from ..planner.solve import solve
from ..planner.workload import Budgets, Decisions, Workload
from .model.blueprint import Blueprint
from .model.setup import Setup
from .model.units import check_no_filled_cache
from .profiling.trace import profile_model

NOTHING_KNOWN_OF_BATCHES = (
    "every unit streams, because nothing is known of batches; prepare the data loader together with the model"
)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what is known of micro-batches behind it (None where nothing is).

    `profile_for` gives the profile of another number of sequences.
    """

    plan: Plan
    workload: Workload
    profile_for: Callable[[int], ModelProfile] | None = None

    @property
    def profile(self) -> ModelProfile | None:
        """Activations of one micro-batch."""
        return self.workload.profile

    def input_bytes(self, unit: int) -> int | None:
        """Bytes of a unit's input that the plan counts on."""
        return None if self.profile is None else self.profile.units[unit].boundary_bytes

    def evaluating(self) -> Plan:
        """The same placement without optimizer state."""
        workload = replace(self.workload, training=False)
        return describe(workload, self.plan.decisions, notes=self.plan.notes)

    def deferring(self, note: str) -> Planned:
        """The same placement with updates that wait for `step`, and gradients that wait for them.

        Args:
            note: for the plan, says why.

        Raises:
            PlanError: gradients do not fit beside the rest.
        """
        workload, given = replace(self.workload, overlapped=False), self.plan.budgets
        streamed = len(workload.layouts) - len(self.plan.decisions.resident)
        staging = workload.staging_buffers(streamed)
        budgets = Budgets(gpu=given["GPU"], ram=given["RAM"], disk=given.get("disk"))
        again = self.profile.notes if self.profile is not None else ()
        plan = describe(
            workload,
            replace(self.plan.decisions, staging_buffers=staging),
            budgets=budgets,
            notes=[*(known for known in self.plan.notes if known not in again), note],
        )
        check_budgets(plan, budgets, [f"Or set SlideConfig(update='deferred') from the start: {note}."])
        return replace(self, plan=plan, workload=workload)


def plans_activations(device: torch.device, config: SlideConfig) -> bool:
    """Whether there is memory to fill: that of a GPU, or as much RAM as the user lets stand in for one."""
    return device.type == "cuda" or config.gpu_memory is not None


def plan_for(
    model: nn.Module,
    blueprint: Blueprint,
    setup: Setup,
    *,
    training: bool = True,
    liger: Mapping[str, Any] | None = None,
    decisions: Decisions | None = None,
    hardware: Hardware | None = None,
    budgets: Budgets | None = None,
) -> Planned:
    """The plan of one model's training (or evaluation).

    Args:
        model: not yet given to an engine; needs no data (meta device).
        blueprint: its parts.
        setup: how it is to be trained; without a shape no activations are planned, and then every unit streams.
        training: whether there will be optimizer state and gradients.
        liger: what Trainer will hand to Liger Kernel, if it is yet to be applied to the model.
        decisions: use these instead of the planner's.
        hardware: the machine that is planned for; None is this one.
        budgets: bytes that may be used; None takes what the settings allow of what is there.

    Raises:
        UnsupportedModelError: it would train a key-value cache.
        PlanError: it does not fit, with numbers and remedies.
        DiskError: a directory for state on disk is missing.
    """
    config, device, shape = setup.config, setup.device, setup.shape
    if training:
        check_no_filled_cache(model)
    budgets = budgets or find_budgets(setup, model)
    hardware = hardware or hardware_of_this_machine(device, next(iter(config.nvme_dirs), None))
    placement, notes = config.placement, blueprint.notes(training=training)
    limited = plans_activations(device, config)
    if placement == "auto" and not limited:
        placement = "stream"
    if placement == "auto" and shape is None and training and decisions is None:
        placement = "stream"
        notes.append(NOTHING_KNOWN_OF_BATCHES)
    profile_for = None
    if training and shape is not None and limited:
        profile_for = profiler(model, blueprint, setup, seq_len=shape.seq_len, liger=liger)
        notes.append(f"planned for batch size {shape.batch_size:,}: {shape.source}")
    profile = profile_for(shape.batch_size) if profile_for is not None and shape is not None else None
    workload = blueprint.workload(profile, training=training)
    if decisions is not None:
        plan = describe(workload, decisions, budgets=budgets, notes=notes)
        check_budgets(plan, budgets)
        return Planned(plan, workload, profile_for)
    plan = solve(
        workload,
        hardware,
        budgets,
        placement=placement,
        activations=config.activations,
        profile_for=profile_for,
        notes=[*notes, *([hardware.advice] if profile is not None and hardware.advice else [])],
    )
    return Planned(plan, workload, profile_for)


def profiler(
    model: nn.Module,
    blueprint: Blueprint,
    setup: Setup,
    *,
    seq_len: int,
    liger: Mapping[str, Any] | None = None,
) -> Callable[[int], ModelProfile]:
    """The profile of a micro-batch by its number of sequences; arguments as for `plan_for`."""

    @functools.cache
    def profile_for(batch_size: int) -> ModelProfile:
        return profile_model(
            model,
            batch_size=batch_size,
            seq_len=seq_len,
            bf16=setup.bf16,
            fused_loss=blueprint.head.module is not None,
            device_type=setup.device.type,
            liger=liger,
        )

    return profile_for


def find_budgets(setup: Setup, model: nn.Module | None = None) -> Budgets:
    """Bytes that may be used: what the user allows, at most what is there.

    The weights of `model` give up their present place when they are moved, so that place counts as free. Of what the
    user allows, other models may have some.
    """
    config, device, taken = setup.config, setup.device, setup.taken
    ram, gpu = available_ram_bytes(), available_gpu_bytes(device)
    if model is not None:
        own = {"cpu": 0, "cuda": 0}
        params = list(model.parameters())
        for param, mapped in zip(params, mapped_from_files(params), strict=True):
            if not mapped:  # what is mapped from a file takes no RAM that would come free
                own[param.device.type] = own.get(param.device.type, 0) + param.nbytes
        ram += min(own["cpu"], _anonymous_bytes())
        gpu = gpu + own["cuda"] if device.type == "cuda" else ram

    def allowed(setting: int | str | None, there: int, tier: str) -> int:
        if setting is None:
            return there
        return min(max(0, parse_bytes(setting) - (taken or {}).get(tier, 0)), there)

    return Budgets(
        gpu=allowed(config.gpu_memory, gpu, "GPU"),
        ram=allowed(config.cpu_memory, ram, "RAM"),
        pinned=parse_bytes(config.pinned_memory) if config.pinned_memory is not None else None,
        disk=_disk_budget(config),
    )


def _disk_budget(config: SlideConfig) -> int | None:
    if not config.nvme_dirs:
        return None
    free = free_bytes(config.nvme_dirs)
    return min(parse_bytes(config.nvme_memory or free), free)


def _anonymous_bytes() -> int:
    """RAM of this process that no file stands for; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
