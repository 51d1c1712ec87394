"""Profile of a model estimated from the shapes of its parameters, where its code cannot be traced (`trace.py`).

Meant to be too high rather than too low. A parameter of two dimensions or more, (..., a, b), is a product with `a + b`
features of input and output; of experts as many are active as the configuration says. With T tokens, hidden size H and
`w` bytes of an entry, a unit

- saves the input and the output of each product once, three times that for experts (routing and gating copy the rows
  of each), and 16 H entries of 4 bytes for norms, residuals, activations in fp32 and dropout;
- with eager attention, saves 12 bytes for each pair of tokens and head;
- takes as much again while it runs, forward or backward;
- hands on hidden states in fp32, which some models have under autocast;
- computes 2 T operations per active parameter of its products, and 8 H for each pair of tokens (twice what attention
  takes, for a second one over an encoder's output); all is recomputed;
- reads and writes four times what it saves.

Beyond units eight hidden states are held, and masks of a byte (eager: four) for each pair of tokens. The loss takes
five hidden states in fp32 and, unless it is fused, four copies of the logits in fp32, and reads and writes that six
times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from slideformer_kernels.cross_entropy import logits_chunk_shape
from torch import nn

from ...planner.profile import ModelProfile, UnitProfile
from ..model.head import find_head
from ..model.units import UnitModule
from .allocations import block_bytes

_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_ALL_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def estimate_profile(
    model: nn.Module,
    units: list[UnitModule],
    dtypes: Mapping[int, torch.dtype],
    *,
    batch_size: int,
    seq_len: int,
    fused_loss: bool,
    reason: str,
) -> ModelProfile:
    """The estimate that the module's text describes.

    Args:
        model: with weights anywhere or without data.
        units: of the model.
        dtypes: in which a parameter computes, by `id(parameter)`.
        batch_size: sequences of a micro-batch.
        seq_len: tokens of a sequence.
        fused_loss: head and cross-entropy run fused where that is possible.
        reason: why it is not traced; for the notes.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokens = batch_size * seq_len
    hidden = _hidden_size(text, units)
    pairs = batch_size * seq_len**2
    eager_heads = (
        _first(text, ("num_attention_heads", "n_head", "num_heads")) or hidden // 64
        if getattr(text, "_attn_implementation", "eager") == "eager"
        else 0
    )
    experts, active = _first(text, _ALL_EXPERTS), _first(text, _ACTIVE_EXPERTS)
    share = min(1.0, active / experts) if experts and active else 1.0
    profiles = [
        _unit(unit, dtypes, tokens, hidden, pairs, eager_heads, share, int(active or 1)) for unit in units
    ]
    width = max((unit.boundary_bytes for unit in profiles), default=0)
    loss_bytes, loss_flops = _loss(model, text, tokens, hidden, fused_loss)
    return ModelProfile(
        batch_size=batch_size,
        seq_len=seq_len,
        units=tuple(profiles),
        held_bytes=block_bytes(16 * tokens) + 8 * width + block_bytes((4 if eager_heads else 1) * pairs),
        loss_bytes=loss_bytes + 20 * tokens * hidden,
        loss_flops=loss_flops,
        loss_traffic=6.0 * loss_bytes,
        source="estimated",
        notes=(
            "memory and time of activations are estimated, too high rather than too low: the model's code could not be "
            f"traced without data ({reason})",
        ),
    )


def _unit(
    unit: UnitModule,
    dtypes: Mapping[int, torch.dtype],
    tokens: int,
    hidden: int,
    pairs: int,
    eager_heads: int,
    share: float,
    active: int,
) -> UnitProfile:
    features = numel = 0.0
    for name, param in unit.parameters.items():
        if param.dim() < 2:
            continue
        size = dtypes[id(param)].itemsize
        is_expert = ".experts." in name
        numel += param.numel() * (share if is_expert else 1.0)
        if not is_expert:
            times = 1.0
        elif param.dim() == 3:  # all experts in one parameter
            times = 3.0 * active
        else:
            times = 3.0 * share
        features += times * size * sum(param.shape[-2:])
    saved = block_bytes(int(tokens * (features + 16 * 4 * hidden)) + 12 * pairs * eager_heads)
    return UnitProfile(
        boundary_bytes=block_bytes(4 * tokens * hidden),
        saved_bytes=saved,
        forward_bytes=saved,
        backward_bytes=saved,
        forward_flops=2.0 * tokens * numel + 8.0 * pairs * hidden,
        forward_traffic=4.0 * saved,
        recompute_share=1.0,
    )


def _loss(model: nn.Module, config: object, tokens: int, hidden: int, fused_loss: bool) -> tuple[int, float]:
    """Bytes and operations of head and loss."""
    head = find_head(model, mode="fused", on_gpu=True).module
    vocabulary = head.weight.shape[0] if head is not None else _first(config, ("vocab_size",)) or 0
    flops = 6.0 * tokens * vocabulary * hidden
    if not fused_loss or head is None:
        return 16 * tokens * vocabulary, flops
    rows, stride = logits_chunk_shape(tokens, vocabulary, 4)
    return 4 * (rows * stride + (tokens + vocabulary) * hidden) + 4 * tokens * hidden, flops


def _hidden_size(config: object, units: list[UnitModule]) -> int:
    sizes = [size for unit in units for param in unit.parameters.values() for size in param.shape[-1:]]
    return _first(config, ("hidden_size", "d_model", "n_embd")) or max(sizes, default=1)


def _first(config: object, names: tuple[str, ...]) -> int | None:
    """The first of these settings that is a positive number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
