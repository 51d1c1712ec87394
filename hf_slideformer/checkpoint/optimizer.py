"""Optimizer state as a folder: an index, and one safetensors file for each unit.

Written and read unit by unit where the state lives, so that no second copy of it is ever in memory. Which units
stream, and where their state lives, is not in the files: any plan can read what any other wrote.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engine.engine import SlideEngine
from ..engine.state.snapshot import HeldState
from ..errors import CheckpointError
from ..optim.adamw import SlideAdamW
from ..optim.optimizer import SlideOptimizer
from ..optim.rule import UpdateRule, saved_format
from ..optim.state import ParamState
from .directory import SavedCheckpoint
from .files import Writer
from .parameters import check_same_parameters, some_of
from .tensors import (
    TensorEntry,
    TensorFiles,
    TensorReader,
    pieces_of,
)

OPTIMIZER_FOLDER = "optimizer"
INDEX_FILE = "index.json"
OUTSIDE_FILE = "outside.safetensors"
FORMAT_VERSION = 1

_RESIDUAL = "master_residual"


def _file_of(group: int, held: HeldState) -> str:
    """The name of the file of a unit, or of what is outside of units."""
    return OUTSIDE_FILE if group == len(held.groups) - 1 else f"unit-{group:05d}.safetensors"


def _optimized(optimizer: SlideOptimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def optimizer_bytes(engine: SlideEngine, optimizer: SlideOptimizer) -> int:
    """Bytes that `save_optimizer` will write, headers and index left out."""
    optimized = _optimized(optimizer)
    return sum(
        state.rule.format.nbytes(state.spec.numel) + 2 * state.spec.numel * state.spec.split
        for state in engine.states
        if id(state.param) in optimized and state.rule is not None
    )


def _entries(state: ParamState, group: int, held: HeldState) -> list[TensorEntry]:
    moments = state.rule.format.parts if state.rule is not None else ()
    kinds = [(part.name, part.dtype, tuple(part.shape(state.spec))) for part in moments]
    if state.spec.split:
        kinds.append((_RESIDUAL, torch.int16, tuple(state.spec.shape)))

    def read(part: str, start: int, end: int) -> torch.Tensor:
        residual, tensors = held.parts(state)
        tensor = residual if part == _RESIDUAL else tensors[part]
        assert tensor is not None
        return pieces_of(tensor)(start, end)

    return [
        TensorEntry(f"{state.name}.{part}", dtype, shape, partial(read, part), group, from_state=True)
        for part, dtype, shape in kinds
    ]


def save_optimizer(
    engine: SlideEngine, optimizer: SlideOptimizer, directory: Path, tensors: TensorFiles, writer: Writer
) -> None:
    """Write the index of the state of `optimizer` to `directory`, and have its tensors written with `tensors`.

    Raises:
        DiskError: a file cannot be written.
        StateError: an update failed, so that the state is that of no step.
    """
    engine.check()
    held = tensors.held
    writer.files.make_directory(directory)
    optimized = _optimized(optimizer)
    parameters: dict[str, dict[str, Any]] = {}
    for group, states in enumerate(held.groups):
        file, entries = _file_of(group, held), []
        for state in states:
            entry = {"shape": list(state.spec.shape), "trainable": state.spec.trainable}
            if id(state.param) in optimized and state.rule is not None:
                entry["step"] = held.steps[state.order]
                if own := _entries(state, group, held):
                    entry["file"] = file
                    entries += own
            parameters[state.name] = entry
        if entries:
            tensors.add(directory / file, entries)
    groups = [
        {
            **{key: _plain(value, key) for key, value in group.items() if key != "params"},
            "parameters": [engine.param_state(param).name for param in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    rule = engine.setup.update_rule
    trained = any(state.rule is not None for state in engine.states)
    index = {
        "format_version": FORMAT_VERSION,
        "rule": rule.name,
        "moments": rule.format.name if trained else None,
        "groups": groups,
        "parameters": parameters,
    }
    text = json.dumps(index, indent=1).encode() + b"\n"
    writer.write(directory / INDEX_FILE, [memoryview(text)])


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(item, key) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"the parameter group's entry {key!r} is a {type(value).__name__}, which cannot be written to a checkpoint; "
        "keep numbers and strings there"
    )


class SavedOptimizer:
    """An optimizer folder to read from; making one reads and checks the index.

    Args:
        checkpoint: the checkpoint that it is in.
        folder: its name there.

    Raises:
        CheckpointError: the index is damaged or of a newer format.
    """

    def __init__(self, checkpoint: SavedCheckpoint, folder: str = OPTIMIZER_FOLDER) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        name = f"{folder}/{INDEX_FILE}"
        with checkpoint.explained():
            with checkpoint.reader(name) as reader:
                text = reader.read(reader.nbytes)
            index = json.loads(text)
        if index["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{checkpoint.path / folder} is in format {index['format_version']}, this version of hf_slideformer "
                f"reads up to {FORMAT_VERSION}; update hf_slideformer"
            )
        self._groups: list[dict[str, Any]] = index["groups"]
        self._parameters: dict[str, dict[str, Any]] = index["parameters"]
        # Indices of before there was another rule do not name it.
        self._rule: str = index.get("rule", SlideAdamW.rule_name)
        self._moments: str | None = index.get("moments")

    @staticmethod
    def exists(path: Path, folder: str = OPTIMIZER_FOLDER) -> bool:
        """Whether a checkpoint has optimizer state in this format."""
        return (path / folder / INDEX_FILE).is_file()

    def check_model(self, model: nn.Module) -> None:
        """Raise `CheckpointError` unless the state is that of a model with these parameters; nothing is changed."""
        have = {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
        saved = {n: (tuple(v["shape"]), v["trainable"]) for n, v in self._parameters.items()}
        check_same_parameters(self._checkpoint.path, saved, have)

    def load(self, engine: SlideEngine, optimizer: SlideOptimizer) -> None:
        """Copy the state into its place, unit by unit.

        Moments that were saved in the other format are converted. The model's weights must have been loaded before:
        a residual belongs to the weights it was saved with.

        Raises:
            CheckpointError: groups or shapes do not match, and nothing was changed; or a file is damaged, and another
                checkpoint must be loaded before training goes on.
        """
        engine.synchronize()
        self.check_groups(engine, optimizer)
        # A file is read once for each unit that has parameters in it: once, unless units were found otherwise then.
        for unit in engine.states_by_unit():
            by_file: dict[str, dict[str, ParamState]] = defaultdict(dict)
            for state in unit:
                if (step := self._parameters[state.name].get("step")) is not None:
                    state.step = int(step)
                if (file := self._parameters[state.name].get("file")) is not None:
                    by_file[file][state.name] = state
            for file, states in by_file.items():
                with (
                    self._checkpoint.explained(),
                    engine.state_in_memory(unit, write=True),
                    TensorReader(self._checkpoint.reader(f"{self._folder}/{file}")) as tensors,
                ):
                    self._load_file(tensors, states)
        for group, saved in zip(optimizer.param_groups, self._groups, strict=True):
            values = {key: value for key, value in saved.items() if key != "parameters"}
            if "betas" in values:
                values["betas"] = tuple(values["betas"])
            group.update(values)
        engine.state_loaded()

    def check_rule(self, rule: UpdateRule) -> None:
        """Raise `CheckpointError` unless updates by `rule` can go on from the state."""
        if self._rule != rule.name:
            raise CheckpointError(
                f"{self._checkpoint.path}: the saved optimizer is {self._rule}, this one is {rule.name}, whose state "
                f"is another; resume with {self._rule}, or load only the model's weights"
            )
        readable = [form.name for form in rule.readable]
        if self._moments is not None and self._moments not in readable:
            raise CheckpointError(
                f"{self._checkpoint.path}: the saved {self._rule} has state in the format {self._moments!r}, this one "
                f"in {rule.format.name!r}, which does not go on from it; set the optimizer's hyperparameters as they "
                "were, or load only the model's weights"
            )

    def check_groups(self, engine: SlideEngine, optimizer: SlideOptimizer) -> None:
        """Raise `CheckpointError` unless the state is that of an optimizer of this rule with these groups."""
        self.check_rule(engine.setup.update_rule)
        have = [[engine.param_state(p).name for p in group["params"]] for group in optimizer.param_groups]
        saved = [group["parameters"] for group in self._groups]
        if [sorted(names) for names in have] == [sorted(names) for names in saved]:
            return
        differing = sorted({n for g in have for n in g} ^ {n for g in saved for n in g})
        named = f"; only in one of them: {some_of(differing)}" if differing else ""
        raise CheckpointError(
            f"{self._checkpoint.path}: the saved optimizer has groups of {[len(g) for g in saved]} parameters, this "
            f"one of {[len(g) for g in have]}, and not the same ones{named}; resume with the same model, frozen "
            "parameters and weight-decay settings"
        )

    def _load_file(self, tensors: TensorReader, states: Mapping[str, ParamState]) -> None:
        moment_names = {
            part.name
            for state in states.values()
            if state.rule is not None
            for form in state.rule.readable
            for part in form.parts
        }
        waiting: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        found = _by_parameter(tensors)
        for name in states.keys() - found.keys() if moment_names else ():
            raise CheckpointError(f"{tensors.path} is damaged: it has no state of {name}")
        for entry in tensors.entries:
            name, _, part = entry.name.rpartition(".")
            if name not in states:
                tensors.read(entry)
                continue
            state = states[name]
            rule = state.rule
            same_format = part == _RESIDUAL or (
                rule is not None and saved_format(rule, found[name]) == rule.format
            )
            target = state.residual if part == _RESIDUAL else state.moments.get(part)
            if target is not None and same_format:
                if (target.dtype, tuple(target.shape)) != (entry.dtype, entry.shape):
                    raise CheckpointError(
                        f"{tensors.path}: {entry.name} is {entry.dtype} {entry.shape}, this model wants {target.dtype} "
                        f"{tuple(target.shape)}"
                    )
                tensors.read_into(entry, target)
                continue
            value = tensors.read(entry)
            if part in moment_names:
                waiting[name][part] = value
                if waiting[name].keys() == found[name] & moment_names:
                    saved = waiting.pop(name)
                    state.check_saved({**saved, "step": state.step})
                    state.load_moments(saved)


def _by_parameter(tensors: TensorReader) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for entry in tensors.entries:
        name, _, part = entry.name.rpartition(".")
        found[name].add(part)
    return found
