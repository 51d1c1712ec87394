"""Saving in the dtypes that weights came in.

fp32 weights that train as split masters have a bf16 half in the model and a residual beside it. Whoever saves the live
model must get them joined, and a configuration that says so: `from_pretrained` follows the configuration's dtype.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import torch

from .engine.engine import SlideEngine
from .engine.replaced import ReplacedMethod


class SavePretrained(ReplacedMethod):
    """Stands in for a streamed model's `save_pretrained`; an explicit `state_dict=` is saved as it is."""

    def __init__(self, model: Any, engine: SlideEngine) -> None:
        super().__init__(model, model.save_pretrained)
        self._engine = weakref.ref(engine)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine()
        state = None
        if engine is not None and len(args) < 2 and kwargs.get("state_dict") is None:
            state = engine.state_dict_as_loaded(self.module)
        if state is None:
            return self.original(save_directory, *args, **kwargs)
        result = self.original(save_directory, *args, **{**kwargs, "state_dict": state})
        set_saved_dtype(Path(save_directory), torch.float32)
        return result


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
