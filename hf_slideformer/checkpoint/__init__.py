"""Checkpoints: whole or not there, checked, and written and read a unit at a time; docs/checkpoints.md."""

from .directory import (
    NewCheckpoint,
    SavedCheckpoint,
    check_free_space,
    clean_up,
    new_checkpoint,
    remove_checkpoint,
    remove_manifest,
    write_manifest,
)
from .files import FileOps, Writer
from .optimizer import OPTIMIZER_FOLDER, SavedOptimizer, optimizer_bytes, save_optimizer
from .weights import (
    SavedWeights,
    SavePretrained,
    joined_state_dict,
    live_layout,
    save_exactly,
    save_weights,
    saved_layout,
    set_saved_dtype,
)

__all__ = [
    "OPTIMIZER_FOLDER",
    "FileOps",
    "NewCheckpoint",
    "SavePretrained",
    "SavedCheckpoint",
    "SavedOptimizer",
    "SavedWeights",
    "Writer",
    "check_free_space",
    "clean_up",
    "joined_state_dict",
    "live_layout",
    "new_checkpoint",
    "optimizer_bytes",
    "remove_checkpoint",
    "remove_manifest",
    "save_exactly",
    "save_optimizer",
    "save_weights",
    "saved_layout",
    "set_saved_dtype",
    "write_manifest",
]
