"""Update rules: what each keeps for an element, and in which order its kernels take that."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .scalars import AdamWScalars, LionScalars, SGDScalars


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One way to update weights, in all implementations.

    Attributes:
        name: of the function that applies it, as messages have it.
        scalars: class of the numbers of a step; kernels take them in the order of its fields.
        formats: by kernel, the dtypes of what is kept between steps, by name and in the kernel's order. It has the
            weights' number of elements; where the name ends in ``_scale``, one for each MOMENT_BLOCK_NUMEL of them.
    """

    name: str
    scalars: type
    formats: Mapping[str, Mapping[str, torch.dtype]]


ADAMW = Rule(
    "adamw_",
    AdamWScalars,
    {
        "adamw": {"exp_avg": torch.float32, "exp_avg_sq": torch.float32},
        "adamw_8bit": {
            "exp_avg": torch.int8,
            "exp_avg_scale": torch.float32,
            "exp_avg_sq": torch.uint8,
            "exp_avg_sq_scale": torch.float32,
        },
    },
)

LION = Rule("lion_", LionScalars, {"lion": {"exp_avg": torch.float32}})

SGD = Rule("sgd_", SGDScalars, {"sgd": {}, "sgd_momentum": {"momentum_buffer": torch.float32}})

RULES = (ADAMW, LION, SGD)
