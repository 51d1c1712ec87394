"""Models from their configuration alone: a directory, a `config.json` or a hub id, built without data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from ...errors import ConfigError

# Tried in this order, unless the configuration names a class of a later one.
_AUTO_CLASSES: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText)

_MOST_OF_A_REASON = 300


def without_data(source: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor like `value` on the meta device whose `source` is its name, to see what becomes of it.

    What transformers hands back as the same object, it has at most renamed.
    """
    empty = torch.empty_like(value, device="meta")
    empty.source = source  # type: ignore[attr-defined]
    return empty


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration that `source` names; of a model on the hub nothing else is fetched.

    Args:
        source: a directory with a `config.json`, such a file itself, or a hub id.
        trust_remote_code: whether code that comes with the configuration may run.

    Raises:
        ConfigError: there is none, or it is not that of a model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
    looks_like_path = source.startswith((".", "~", os.sep)) or source.count("/") > 1 or path.suffix == ".json"
    if looks_like_path and not path.is_file():
        raise ConfigError(
            f"there is no file {str(path)!r}; name a directory with a config.json, such a file, or a hub id"
        )
    if path.is_file() and path.suffix != ".json":
        raise ConfigError(
            f"{str(path)!r} is not a configuration; name the config.json, or the directory that it is in"
        )
    # A local model's own code is looked for in its directory.
    local = str(path.parent) if path.name == "config.json" else str(path)
    try:
        config = AutoConfig.from_pretrained(
            local if path.is_file() else source, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers, hub and the model's own checks raise many kinds
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ConfigError(
                f"{source!r} comes with code of its own; if you trust it, let it run (--trust-remote-code)"
            ) from error
        raise ConfigError(
            f"cannot read the configuration of {source!r} (a directory with a config.json, such a file, or a hub id): "
            f"{_reason(error)}"
        ) from error
    return config


def model_without_data(config: Any, *, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model of a configuration on the meta device: parameters have shapes and `dtype`, and take no memory.

    It is a causal language model where there is one of that kind; else one from sequence to sequence, or from images
    and text to text; a class that the configuration names among these comes first.

    Raises:
        ConfigError: no such model belongs to it, or its code needs data to build it.
    """
    auto_class = _auto_class(config)
    try:
        with torch.device("meta"):
            model: nn.Module = auto_class.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise ConfigError(
            f"cannot build the model of this {type(config).__name__} without its weights: {_reason(error)}"
        ) from error
    return model


def _auto_class(config: Any) -> Any:
    remote = getattr(config, "auto_map", None) or {}
    kind = type(config)
    possible = [
        auto_class
        for auto_class in _AUTO_CLASSES
        if kind in auto_class._model_mapping or auto_class.__name__ in remote
    ]
    if not possible:
        raise ConfigError(
            f"no language model belongs to a {kind.__name__} (model_type {config.model_type!r}); plans are made for "
            "causal, sequence-to-sequence and image-text-to-text models"
        )
    wanted = set(config.architectures or ())
    for auto_class in possible:
        if kind in auto_class._model_mapping and wanted & _class_names(auto_class._model_mapping[kind]):
            return auto_class
    return possible[0]


def _class_names(classes: Any) -> set[str]:
    return {cls.__name__ for cls in (classes if isinstance(classes, (tuple, list)) else (classes,))}


def _reason(error: Exception) -> str:
    """What went wrong, in one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_OF_A_REASON else text[:_MOST_OF_A_REASON].rsplit(" ", 1)[0] + " ..."
