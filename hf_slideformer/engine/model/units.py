"""Units: the decoder (or encoder) layers of a Hugging Face model, found by structure.

A unit is a `GradientCheckpointingLayer` in a `ModuleList`: the contract that transformers itself relies on when
it recomputes layers. Everything else (embeddings, final norm, head) is resident.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from ...errors import UnsupportedModelError
from ...memory.layout import ParamSpec
from .stand_ins import Hook

# Arguments through which layers hand each other tensors by mutating a dictionary: flattening the arguments
# would cut that path, and gradients through it would be lost.
_SIDE_CHANNELS = ("shared_kv_states", "shared_key_value_states")

# PEFT's kinds of adapters that fill the key-value cache.
_FILLED_CACHES = ("PREFIX_TUNING", "CARTRIDGE")


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """One place in the module tree that holds a parameter."""

    module: nn.Module
    key: str


@dataclass(frozen=True, slots=True, eq=False)
class UnitModule:
    """A layer found in the model: its qualified name and its own parameters, each once."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    owners: dict[str, list[Owner]]


def find_units(model: nn.Module) -> list[UnitModule]:
    """The model's units in registration order.

    A parameter that is shared with another unit or with anything outside is left out of the unit (it stays
    resident).

    Raises:
        UnsupportedModelError: no such layers, or layers that exchange tensors through a side channel.
    """
    found: list[tuple[str, nn.Module]] = []
    aliases: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer, _ in found):
            continue  # a list inside a unit belongs to that unit
        if all(isinstance(child, GradientCheckpointingLayer) for child in module):
            for index, child in enumerate(module):
                full_name = f"{name}.{index}" if name else str(index)
                original = next((first for first, other in found if other is child), None)
                if original is None:
                    found.append((full_name, child))
                else:
                    aliases[full_name] = original  # the same layer again: one unit that runs twice
    if not found:
        lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        raise UnsupportedModelError(
            f"no layers to stream were found in {type(model).__name__}: none of its module lists "
            f"({', '.join(lists) or 'it has none'}) holds transformers' GradientCheckpointingLayer. Models that "
            "support gradient checkpointing in transformers >= 5 work; use plain Trainer for this one"
        )
    for name, module in found:
        for argument in inspect.signature(module.forward).parameters:
            if argument in _SIDE_CHANNELS:
                raise UnsupportedModelError(
                    f"{name} ({type(module).__name__}) hands tensors to later layers through `{argument}`, which "
                    "streaming would cut; use plain Trainer for this model"
                )
    uses: dict[int, set[str]] = {}
    unit_names = [*(name for name, _ in found), *aliases]
    for full_name, param in model.named_parameters(remove_duplicate=False):
        owner = next((n for n in unit_names if full_name.startswith(f"{n}.")), "")
        uses.setdefault(id(param), set()).add(aliases.get(owner, owner))
    units = []
    for name, module in found:
        parameters: dict[str, nn.Parameter] = {}
        owners: dict[str, list[Owner]] = {}
        names: dict[int, str] = {}
        for module_name, submodule in module.named_modules():
            for key, param in submodule._parameters.items():
                if param is None or len(uses[id(param)]) > 1:
                    continue
                full_name = ".".join(part for part in (name, module_name, key) if part)
                first = names.setdefault(id(param), full_name)
                parameters[first] = param
                owners.setdefault(first, []).append(Owner(submodule, key))
        units.append(UnitModule(name, module, parameters, owners))
    return units


def param_spec(model: nn.Module, name: str, param: nn.Parameter, *, bf16: bool) -> ParamSpec:
    """How a parameter streams and what its master is.

    bf16 weights get a split master. fp32 weights become split masters under `bf16` (mixed precision), except
    those that the model class keeps in fp32 on purpose; otherwise they stay plain fp32. Frozen weights of other
    dtypes stream as they are.

    Raises:
        UnsupportedModelError: trainable weights in another dtype (fp16), or a quantized weight.
    """
    if not is_ordinary(param) and not isinstance(param, FakeTensor):
        raise UnsupportedModelError(
            f"{name} is a {type(param).__name__}, of which only the data would stream (a quantized weight has more); "
            "load the model without quantization, in bfloat16"
        )
    trainable = param.requires_grad
    if param.dtype == torch.bfloat16:
        return ParamSpec(name, tuple(param.shape), torch.bfloat16, torch.bfloat16, trainable, trainable)
    if param.dtype == torch.float32:
        split = bf16 and not _kept_in_fp32(model, name)
        dtype = torch.bfloat16 if split else torch.float32
        return ParamSpec(name, tuple(param.shape), dtype, torch.float32, split, trainable)
    if trainable:
        raise UnsupportedModelError(
            f"{name} is trainable in {param.dtype}; load the model in bfloat16 or float32 "
            "(from_pretrained(..., dtype=torch.bfloat16))"
        )
    return ParamSpec(name, tuple(param.shape), param.dtype, param.dtype, False, False)


def check_has_data(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for weights that were not loaded."""
    for name, param in model.named_parameters():
        if param.device.type == "meta":
            raise UnsupportedModelError(
                f"{name} has no data (meta device); load the model's weights before preparing it"
            )


def check_no_filled_cache(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for adapters that hand layers a key-value cache to train (PEFT's prefix tuning)."""
    for name, config in getattr(model, "peft_config", {}).items():
        kind = getattr(config, "peft_type", None)
        kind = getattr(kind, "value", kind)  # an enumeration, or its text
        if kind in _FILLED_CACHES:
            raise UnsupportedModelError(
                f"adapter {name!r} is {kind}: it puts what it trains into the key-value cache, "
                "on top of which streamed layers cannot train; use prompt tuning or LoRA, or plain Trainer"
            )


def check_no_hooks(name: str, param: nn.Parameter) -> None:
    """Raise `UnsupportedModelError` for others' hooks on a unit's parameter.

    The gradient of a streamed one never passes through them, that of a resident one perhaps twice.
    """
    hooks = [*(param._backward_hooks or {}).values()]
    hooks += (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()
    if any(not isinstance(hook, Hook) for hook in hooks):
        raise UnsupportedModelError(
            f"{name} has a gradient hook, which would not run: a streamed parameter's gradient is complete when "
            "backward returns; read or edit p.grad after backward() instead"
        )


def is_ordinary(param: nn.Parameter) -> bool:
    """Whether a parameter is of torch's own class, or of one that an engine has given it (`state/parameters.py`)."""
    return type(param) is nn.Parameter or getattr(type(param), "guarded", False)


def _kept_in_fp32(model: nn.Module, name: str) -> bool:
    patterns: set[str] = set()
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            patterns.update(getattr(module, attribute, None) or ())
    return any(pattern in name.split(".") for pattern in patterns)
