"""TRL's trainers over a streamed model: their classes with `SlideTrainerMixin` in front.

Any other of TRL's trainers that computes its loss in `compute_loss` takes the mixin in the same way.
"""

from __future__ import annotations

try:
    from trl import DPOTrainer, SFTTrainer
except ModuleNotFoundError as error:
    raise ImportError(
        f"SlideSFTTrainer and SlideDPOTrainer need TRL, and {error.name} is not installed: "
        "pip install 'hf-slideformer[trl]'"
    ) from error

from .trainer import SlideTrainerMixin


class SlideSFTTrainer(SlideTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` over a streamed model.

    Args: as for SFTTrainer, and `slide_config` (see `SlideConfig`).
    """


class SlideDPOTrainer(SlideTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` over a streamed model.

    A reference model streams too, read-only and unit by unit; with adapters, or with precomputed log-probabilities,
    there is none.

    Args: as for DPOTrainer, and `slide_config` (see `SlideConfig`).
    """


__all__ = ["SlideDPOTrainer", "SlideSFTTrainer"]
