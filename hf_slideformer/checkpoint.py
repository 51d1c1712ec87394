"""Saving in the dtypes that weights came in.

fp32 weights that train as split masters have a bf16 half in the model and a residual beside it. Whoever saves the live
model must get them joined, and a configuration that says so: `from_pretrained` follows the configuration's dtype.
"""

from __future__ import annotations

import copy
import functools
import json
import types
import weakref
from pathlib import Path
from typing import Any

import torch

from .engine.engine import SlideEngine
from .engine.executor import raise_not_picklable


class SavePretrained:
    """Stands in for a streamed model's `save_pretrained`; an explicit `state_dict=` is saved as it is."""

    def __init__(self, model: Any, engine: SlideEngine) -> None:
        self._original: Any = model.save_pretrained
        functools.update_wrapper(self, self._original)
        self._model = weakref.ref(model)
        self._engine = weakref.ref(engine)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model, engine = self._model(), self._engine()
        state = None
        if model is not None and engine is not None and len(args) < 2 and kwargs.get("state_dict") is None:
            state = engine.state_dict_as_loaded(model)
        if state is None:
            return self._original(save_directory, *args, **kwargs)
        result = self._original(save_directory, *args, **{**kwargs, "state_dict": state})
        set_saved_dtype(Path(save_directory), torch.float32)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._model()))
        if isinstance(self._original, types.MethodType) and copied is not None:
            return types.MethodType(self._original.__func__, copied)
        return copy.deepcopy(self._original, memo)

    def __reduce__(self):
        raise_not_picklable()


def save_exactly(model: Any, engine: SlideEngine) -> None:
    """Make `model.save_pretrained` write what was loaded, where the live tensors are only halves of it."""
    if hasattr(model, "save_pretrained") and engine.joins_on_save:
        model.save_pretrained = SavePretrained(model, engine)


def set_saved_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Make a saved configuration name the dtype of the saved weights; the live model computes in another."""
    config_file = directory / "config.json"
    if config_file.exists():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
