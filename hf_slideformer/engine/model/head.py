"""The head of a model: whether and where its loss is fused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from slideformer_kernels.cross_entropy import DEFAULT_MEMORY_BUDGET
from torch import nn
from transformers import PreTrainedModel

# In which the fused loss computes.
FUSED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class HeadChoice:
    """The head whose loss is fused, or None and the reason; made by `find_head`."""

    module: nn.Linear | None
    reason: str

    @property
    def note(self) -> str:
        """One sentence for the plan."""
        if self.module is None:
            return f"the loss is left to the model: {self.reason}"
        weight = self.module.weight
        return (
            f"the loss and the head run fused, in chunks of at most {DEFAULT_MEMORY_BUDGET / 2**30:.2f} GiB of logits; "
            f"until backward the head's gradient takes {4 * weight.numel() / 2**30:.2f} GiB in fp32"
        )


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a transformers model or of the one in a wrapper; None if it has none."""
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        try:
            head = get_head() if callable(get_head) else None
        except (AttributeError, NotImplementedError):  # a wrapper that only hands the call on
            continue
        if head is not None:
            return head
    return None


def find_head(model: nn.Module, *, mode: str, on_gpu: bool) -> HeadChoice:
    """Decide whether and where the loss is fused.

    Args:
        model: a transformers model or a wrapper around one.
        mode: `SlideConfig.loss`.
        on_gpu: whether the model computes on a GPU.
    """
    if mode == "model":
        return HeadChoice(None, "loss='model'")
    if mode == "auto" and not on_gpu:
        return HeadChoice(None, "on the CPU it is fused only by loss='fused'")
    head = output_embeddings(model)
    if head is None:
        return HeadChoice(None, "it has no output embeddings")
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return HeadChoice(None, f"its head is a {type(head).__name__} that does more than a matrix product")
    if head.weight.dtype not in FUSED_DTYPES:
        return HeadChoice(None, f"its head is in {head.weight.dtype}")
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "forward" in module.__dict__:
            return HeadChoice(None, f"{type(module).__name__}.forward was replaced by one with its own loss")
    return HeadChoice(head, "")


def liger_settings(*, fuses_loss: bool) -> dict[str, bool]:
    """What Liger Kernel is told beside the user's own settings: our loss head takes the place of its own."""
    return {"fused_linear_cross_entropy": False} if fuses_loss else {}
