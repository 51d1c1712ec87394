"""Setup: what is asked for, before anything is known of a model or done to it. Pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...config import SlideConfig
from ...memory.layout import MOMENT_FORMATS
from ...optim.adamw import AdamWRule
from ...optim.rule import UpdateRule, described
from .batch_shape import BatchShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a model is to be trained.

    Attributes:
        device: where units compute.
        bf16: mixed precision; fp32 weights become split masters that stream in bf16.
        config: the user's settings.
        micro_batches: backwards that make a step; with more than one gradients are summed in fp32.
        overlap_is_exact: no clipping and one backward a step, so that `update="auto"` may overlap.
        rule: the optimizer's; None is AdamW, with moments as `config` says.
        shape: what is known of micro-batches; without it the planner keeps away from what depends on them.
        taken: bytes by tier that other models have of what the settings allow.
        read_only: the model will never be trained (DPO's reference).
    """

    device: torch.device
    bf16: bool
    config: SlideConfig = field(default_factory=SlideConfig)
    micro_batches: int = 1
    overlap_is_exact: bool = False
    rule: UpdateRule | None = None
    shape: BatchShape | None = None
    taken: Mapping[str, int] | None = None
    read_only: bool = False

    @property
    def update_rule(self) -> UpdateRule:
        """The rule that updates follow."""
        return self.rule or AdamWRule(MOMENT_FORMATS[self.config.optimizer_states])

    @property
    def accumulates(self) -> bool:
        """Whether several backwards make a step."""
        return self.micro_batches > 1

    @property
    def overlapped(self) -> bool:
        """Whether updates overlap with backward, as long as no layer runs twice."""
        return self.config.update == "overlapped" or (self.config.update == "auto" and self.overlap_is_exact)

    def for_reading(self) -> Setup:
        """The same for a model that is never trained: what it kept on the GPU would be missing where training needs it
        more, so every unit streams.
        """
        config = dataclasses.replace(self.config, placement="stream")
        return dataclasses.replace(self, config=config, shape=None, read_only=True)

    def difference(self, wanted: Setup) -> str:
        """The first thing for which a model that was prepared like this would have to be prepared anew, in words.

        Empty if there is none: batches may have another shape, whether updates overlap is what counts, not why, and
        where nothing is known of an optimizer (`rule` is None) any will do.
        """
        for name, have, value in (
            ("bf16", self.bf16, wanted.bf16),
            ("accumulates", self.accumulates, wanted.accumulates),
            ("overlapped", self.overlapped, wanted.overlapped),
            ("optimizer_states", self.config.optimizer_states, wanted.config.optimizer_states),
            (
                "optimizer",
                described(self.update_rule),
                described((wanted if wanted.rule else self).update_rule),
            ),
            ("config", self.config, wanted.config),
        ):
            if have != value:
                return f"this model was prepared with {name}={have} and is now wanted with {value}"
        return ""
