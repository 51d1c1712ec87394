"""hf_slideformer: full-parameter fine-tuning of Hugging Face models larger than the GPU.

The public names load lazily, so `import hf_slideformer` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_EXPORTS = {
    "SlideTrainer": "trainer",
    "SlideTrainerMixin": "trainer",
    "SlideConfig": "config",
    "SlideAccelerator": "accelerator",
    "SlideFormerPlugin": "accelerator",
    "SlideAdamW": "optim",
    "SlideLion": "optim",
    "SlideSGD": "optim",
    "SlideFormerError": "errors",
    "ConfigError": "errors",
    "PlanError": "errors",
    "ProbeError": "errors",
    "UnsupportedModelError": "errors",
    "UnsupportedVersionError": "errors",
    "TransferError": "errors",
    "StateError": "errors",
    "CheckpointError": "errors",
}

# These need packages that may be missing, so `import *` leaves them out.
_OPTIONAL_EXPORTS = {
    "SlideDPOTrainer": "trl_trainers",
    "SlideSFTTrainer": "trl_trainers",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from .accelerator import SlideAccelerator as SlideAccelerator
    from .accelerator import SlideFormerPlugin as SlideFormerPlugin
    from .config import SlideConfig as SlideConfig
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import PlanError as PlanError
    from .errors import ProbeError as ProbeError
    from .errors import SlideFormerError as SlideFormerError
    from .errors import StateError as StateError
    from .errors import TransferError as TransferError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .errors import UnsupportedVersionError as UnsupportedVersionError
    from .optim import SlideAdamW as SlideAdamW
    from .optim import SlideLion as SlideLion
    from .optim import SlideSGD as SlideSGD
    from .trainer import SlideTrainer as SlideTrainer
    from .trainer import SlideTrainerMixin as SlideTrainerMixin
    from .trl_trainers import SlideDPOTrainer as SlideDPOTrainer
    from .trl_trainers import SlideSFTTrainer as SlideSFTTrainer


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name) or _OPTIONAL_EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{module}", __name__), name)
    except ImportError as error:
        from .compatibility import explained

        if (reason := explained(error)) is error:
            raise
        raise reason from error
