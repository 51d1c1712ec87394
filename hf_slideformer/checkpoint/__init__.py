"""Checkpoints: whole or not there, checked, and written and read a unit at a time; docs/checkpoints.md."""

from .background import BackgroundSave
from .directory import (
    Manifest,
    NewCheckpoint,
    SavedCheckpoint,
    check_free_space,
    clean_up,
    must_be_written_in_place,
    names_of,
    remove_checkpoint,
)
from .files import CheckpointCalls, Writer
from .lock import LOCK_FILE, DirectoryLock
from .optimizer import (
    OPTIMIZER_FOLDER,
    SavedOptimizer,
    optimizer_bytes,
    save_optimizer,
)
from .tensors import TensorFiles
from .weights import (
    SavedWeights,
    SavePretrained,
    add_live_weights,
    joined_state_dict,
    live_layout,
    save_exactly,
    saved_layout,
    set_saved_dtype,
    weight_bytes,
)

__all__ = [
    "BackgroundSave",
    "LOCK_FILE",
    "OPTIMIZER_FOLDER",
    "DirectoryLock",
    "CheckpointCalls",
    "Manifest",
    "NewCheckpoint",
    "SavePretrained",
    "SavedCheckpoint",
    "SavedOptimizer",
    "SavedWeights",
    "TensorFiles",
    "Writer",
    "add_live_weights",
    "check_free_space",
    "clean_up",
    "joined_state_dict",
    "live_layout",
    "must_be_written_in_place",
    "names_of",
    "optimizer_bytes",
    "remove_checkpoint",
    "save_exactly",
    "save_optimizer",
    "saved_layout",
    "set_saved_dtype",
    "weight_bytes",
]
