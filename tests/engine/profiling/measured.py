"""What tests of profiles compare with: the same code on real tensors, and a timeline of the engine's memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import torch
from torch import nn

from hf_slideformer.engine.model.units import find_units, param_spec
from hf_slideformer.engine.profiling import trace as profiling
from hf_slideformer.engine.profiling.allocations import AllocationTracker, block_bytes
from hf_slideformer.planner.profile import ModelProfile


def profile(model: nn.Module, **overrides) -> ModelProfile:
    """A profile by default for a small CPU run in bf16 with the model's own loss."""
    settings = dict(batch_size=2, seq_len=16, bf16=True, fused_loss=False, device_type="cpu")
    return profiling.profile_model(model, **(settings | overrides))


def profile_of_real_run(model: nn.Module, **overrides) -> ModelProfile:
    """The same figures from real tensors with real numbers in them."""
    settings = (
        dict(batch_size=2, seq_len=16, bf16=True, fused_loss=False, device_type="cpu", liger=None) | overrides
    )
    copied = as_computed(model, bf16=settings["bf16"])
    tracker = AllocationTracker()
    with tracker:
        return profiling._run(copied, tracker, profiling._Settings(**settings), contextlib.nullcontext())


def as_computed(model: nn.Module, *, bf16: bool) -> nn.Module:
    """A copy in training mode whose weights have the dtypes in which the engine lets them compute."""
    dtypes = {name: param_spec(model, name, p, bf16=bf16).dtype for name, p in model.named_parameters()}
    copied = copy.deepcopy(model).train()
    for name, param in copied.named_parameters():
        param.data = param.data.to(dtypes[name])
    return copied


class PlainRun:
    """One plain forward and backward of a model, in which a unit's inputs and what it saves are watched."""

    def __init__(self, model: nn.Module, *, bf16: bool = True, batch: int = 2, seq: int = 16) -> None:
        self.model = as_computed(model, bf16=bf16)
        self.saved_bytes = 0
        unit = find_units(self.model)[0].module
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        original = unit.forward

        def watched(*args, **kwargs):
            own = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            own += [x for value in kwargs.values() if isinstance(value, tuple) for x in value]
            known = weights | {x.untyped_storage().data_ptr() for x in own}
            saved: dict[int, torch.UntypedStorage] = {}

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    saved[storage.data_ptr()] = storage  # held, so that no address comes twice
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = original(*args, **kwargs)
            self.saved_bytes = sum(block_bytes(storage.nbytes()) for storage in saved.values())
            return output

        unit.forward = watched
        tokens = torch.zeros(batch, seq, dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            self.model(input_ids=tokens, labels=tokens, use_cache=False)


def predicted_gpu_peak(
    profile: ModelProfile, unit_grad_bytes: Sequence[int], loss_grad_bytes: int, embedding_grad_bytes: int
) -> int:
    """Most bytes at once beyond what lives there for the whole run, with every unit streamed and recomputed.

    Args:
        profile: of the micro-batch.
        unit_grad_bytes: gradients of each unit, in forward order.
        loss_grad_bytes: gradients of final norm and head.
        embedding_grad_bytes: gradient of the embedding.
    """
    held, peak = profile.held_bytes, 0
    for unit in profile.units:
        held += unit.boundary_bytes
        peak = max(peak, held + unit.forward_bytes)
    peak = max(peak, held + profile.loss_bytes + loss_grad_bytes)
    held += loss_grad_bytes
    leaving: list[int] = []  # gradients on their way to RAM: two units' besides those of the current one
    for unit, grads in zip(reversed(profile.units), reversed(unit_grad_bytes), strict=True):
        own = unit.saved_bytes + unit.backward_bytes + grads
        peak = max(peak, held + own + sum(leaving))
        held -= unit.boundary_bytes
        leaving = [*leaving, grads][-2:]
    return max(peak, held + profile.units[0].boundary_bytes + embedding_grad_bytes + sum(leaving))
