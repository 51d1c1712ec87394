"""Model weights: saved in the dtypes that they came in, and loaded, without a second copy of the model.

fp32 weights that train as split masters have a bf16 half in the model and a residual beside it. Whoever saves the live
model must get them joined, and a configuration that says so: `from_pretrained` follows the configuration's dtype.

Files, names and index are those of transformers' `save_pretrained`, which writes everything but the tensors.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from slideformer_kernels import join_master
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..engine.engine import SlideEngine
from ..engine.model.source import without_data
from ..engine.model.stand_ins import ReplacedMethod
from ..engine.state.parameters import live_tensors
from ..engine.state.snapshot import HeldState
from ..memory.limits import CHECKPOINT_BATCH_BYTES
from ..optim.state import ParamState
from .directory import SavedCheckpoint
from .files import Writer
from .parameters import check_same_parameters
from .tensors import (
    TensorEntry,
    TensorFiles,
    TensorReader,
    is_storable,
    pieces_of,
)

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"

_MAX_SHARD_BYTES = 50 * 10**9  # transformers' own default
# Up to the number of a layer in a parameter's name.
_LAYER = re.compile(r".*?\.\d+\.")
# Tensors handed to `load_state_dict` at once: a call looks at every module.
_LOAD_BYTES = CHECKPOINT_BATCH_BYTES


class SavePretrained(ReplacedMethod):
    """Stands in for a streamed model's `save_pretrained`; an explicit `state_dict=` is saved as it is."""

    def __init__(self, model: Any, engine: SlideEngine) -> None:
        super().__init__(model, model.save_pretrained)
        self._model = model
        self._engine = weakref.ref(engine)
        self._into: tuple[TensorFiles, Writer] | None = None

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        engine = None if self.removed else self._engine()
        if engine is None or args or kwargs.get("state_dict") is not None:
            return self.original(save_directory, *args, **kwargs)
        tensors, writer = self._into or (TensorFiles(engine.hold()), Writer())
        try:
            entries = None
            if kwargs.keys() <= {"state_dict", "is_main_process", "max_shard_size"}:
                entries = saved_entries(self.module, tensors.held)
            state = joined_state_dict(self.module, engine) if entries is None else {}
            result = self.original(save_directory, **{**kwargs, "state_dict": state})
            if entries is not None and kwargs.get("is_main_process", True):
                shard_bytes = kwargs.get("max_shard_size", _MAX_SHARD_BYTES)
                count = self._model.num_parameters()
                add_weights(tensors, writer, Path(save_directory), entries, count, shard_bytes)
            if self._into is None:
                tensors.write(writer)
        finally:
            if self._into is None:
                tensors.held.release_all()
        own = {id(param) for param in self.module.parameters()}
        if any(id(state.param) in own and state.spec.joined_on_save for state in engine.states):
            set_saved_dtype(Path(save_directory), torch.float32)
        return result

    @contextlib.contextmanager
    def writing_into(self, tensors: TensorFiles, writer: Writer) -> Iterator[None]:
        """For now, have tensors written with the rest of a checkpoint."""
        before, self._into = self._into, (tensors, writer)
        try:
            yield
        finally:
            self._into = before


def save_exactly(model: Any, engine: SlideEngine) -> None:
    """Make `model.save_pretrained` write what was loaded, from where it lives.

    Of a PeftModel also that of the model in it, which comes out of it merged.
    """
    for module in {model, getattr(model, "get_base_model", lambda: model)()}:
        if hasattr(module, "save_pretrained"):
            method = SavePretrained(module, engine)
            method.put("save_pretrained")
            engine.on_release(method.remove)


def joined_state_dict(model: nn.Module, engine: SlideEngine) -> dict[str, torch.Tensor] | None:
    """What is handed to `save_pretrained`: the state dict in the dtypes that it came in; None if the live one is that.

    Of a model with adapters only those are saved, so weights of the base that are in units are left as they are.
    """
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return engine.state_dict_as_loaded(model)

    def is_saved(state: ParamState) -> bool:
        in_adapter = any(part in adapters for part in state.name.split("."))
        return state.spec.trainable or not state.streams or in_adapter

    return engine.state_dict_as_loaded(model, is_saved)


def set_saved_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Make a saved configuration name the dtype of the saved weights; the live model computes in another."""
    config_file = directory / "config.json"
    if config_file.exists():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def saved_layout(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """What `save_pretrained` would write: by name an empty tensor, whose `source` is the live tensor's name.

    Tensors without a `source` are computed on saving: fused experts that are split again, for instance. None for what
    is not saved in this way: adapters, quantized weights, models that are not transformers' own.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        return None
    live = _saved_tensors(model)
    if live is None:
        return None
    return revert_weight_conversion(model, {name: without_data(name, v) for name, v in live.items()})


def _saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """The live tensors that `save_pretrained` would write, or make what it writes from; None as for `saved_layout`."""
    with live_tensors():
        state_dict = model.state_dict()
    if getattr(model, "hf_quantizer", None) is not None or not all(
        isinstance(value, torch.Tensor) and is_storable(value.dtype) for value in state_dict.values()
    ):
        return None
    for key in model._keys_to_ignore_on_save or ():
        state_dict.pop(key, None)
    return remove_tied_weights_from_state_dict(state_dict, model)


def weight_bytes(engine: SlideEngine, *, trainable_only: bool = False) -> int:
    """Bytes of the weights in the dtypes that they came in."""
    return sum(
        state.spec.numel * state.spec.source_dtype.itemsize
        for state in engine.states
        if state.spec.trainable or not trainable_only
    )


def sources_of(layout: Mapping[str, torch.Tensor]) -> dict[str, str] | None:
    """The live tensor's name for each saved one, or None if some are computed."""
    sources = {name: getattr(value, "source", None) for name, value in layout.items()}
    if None in sources.values():
        return None
    return {name: str(source) for name, source in sources.items()}


def saved_entries(model: nn.Module, held: HeldState) -> list[TensorEntry] | None:
    """The tensors that `save_pretrained` would write; split masters are joined, and what is computed is, in their turn.

    None as for `saved_layout`, and where computed ones come from more than one unit.
    """
    layout = saved_layout(model)
    if layout is None:
        return None
    live = _saved_tensors(model)
    assert live is not None
    entries = _entries_of(live, held)
    sources = sources_of(layout)
    if sources is not None:
        return [replace(entries[source], name=name) for name, source in sources.items()]
    by_group: dict[int, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in entries.items():
        by_group[entry.group][name] = entry
    saved = [entry for members in by_group.values() for entry in _converted(model, members)]
    if {entry.name: entry.shape for entry in saved} != {n: tuple(v.shape) for n, v in layout.items()}:
        return None
    place = {name: index for index, name in enumerate(layout)}
    return sorted(saved, key=lambda entry: place[entry.name])


def _entries_of(live: Mapping[str, torch.Tensor], held: HeldState) -> dict[str, TensorEntry]:
    """Live tensors as they are to be written, before they are renamed or converted."""
    states = {state.live.data_ptr(): state for members in held.groups for state in members}
    entries = {}
    for name, value in live.items():
        state = states.get(value.data_ptr())
        shape = tuple(value.shape)
        if state is None:  # a buffer, which the next forward may change
            copied = value.detach().to("cpu", copy=True)
            entries[name] = TensorEntry(name, value.dtype, shape, pieces_of(copied), len(held.groups) - 1)
            continue
        group = held.group_of[state.order]
        if state.spec.joined_on_save:
            read = partial(_read_joined, state, held)
            entries[name] = TensorEntry(name, torch.float32, shape, read, group, from_state=True)
        else:
            entries[name] = TensorEntry(name, value.dtype, shape, pieces_of(value), group)
    return entries


def _read_joined(state: ParamState, held: HeldState, start: int, end: int) -> torch.Tensor:
    residual, _ = held.parts(state)
    assert residual is not None
    # Joined in RAM, of one thread: training goes on beside it, and the GPU may be full.
    return join_master(pieces_of(state.weight)(start, end), pieces_of(residual)(start, end), threads=1).view(
        -1
    )


def _converted(model: nn.Module, entries: Mapping[str, TensorEntry]) -> list[TensorEntry]:
    """What transformers saves of these tensors, which are those of one group."""
    empty = {}
    for name, entry in entries.items():
        empty[name] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        empty[name].source = name  # type: ignore[attr-defined]
    layout = revert_weight_conversion(model, empty)
    sources = {name: getattr(value, "source", None) for name, value in layout.items()}
    used = set(sources.values())
    computed = _Computed(model, {name: entry for name, entry in entries.items() if name not in used})
    result = []
    for name, value in layout.items():
        if (source := sources[name]) is not None:
            result.append(replace(entries[source], name=name))
        else:
            like = next(iter(entries.values()))
            result.append(
                TensorEntry(
                    name,
                    value.dtype,
                    tuple(value.shape),
                    partial(computed.read, name),
                    like.group,
                    from_state=computed.from_state,
                )
            )
    return result


class _Computed:
    """Saved tensors that are made of a unit's live ones, such as an expert's part of fused weights.

    All of a unit are made when the first is read; each is let go of when its end has been read.
    """

    def __init__(self, model: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
        self._model = model
        self._entries = entries
        self._made: dict[str, torch.Tensor] = {}
        self.from_state = any(entry.from_state for entry in entries.values())

    def read(self, name: str, start: int, end: int) -> torch.Tensor:
        """See `TensorEntry`."""
        if name not in self._made:
            whole = {}
            for key, entry in self._entries.items():
                assert entry.read is not None
                whole[key] = entry.read(0, entry.numel).view(entry.shape)
            self._made = revert_weight_conversion(self._model, whole)
        tensor = self._made[name]
        if end == tensor.numel():
            del self._made[name]
        return tensor.reshape(-1)[start:end]


def live_layout(model: nn.Module) -> dict[str, torch.Tensor]:
    """What Accelerate's `save_state` would write, as `saved_layout`: live names, each shared tensor once."""
    layout: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    with live_tensors():
        live = model.state_dict()
    for name, value in live.items():
        if value.data_ptr() not in seen or not value.numel():
            seen.add(value.data_ptr())
            layout[name] = without_data(name, value)
    return layout


def add_live_weights(model: nn.Module, path: Path, tensors: TensorFiles) -> None:
    """Have a live model's state dict written to one file, in the dtypes that the weights came in."""
    with live_tensors():
        live = model.state_dict()
    entries = _entries_of({name: live[name] for name in live_layout(model)}, tensors.held)
    tensors.add(path, list(entries.values()), {"format": "pt"})


def add_weights(
    tensors: TensorFiles,
    writer: Writer,
    directory: Path,
    entries: list[TensorEntry],
    num_parameters: int,
    max_shard_bytes: int | str,
) -> None:
    """Have weights written as `save_pretrained` lays them out: one file, or numbered shards and an index."""
    by_name = {entry.name: entry for entry in entries}
    empty = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    if split.is_sharded:
        (directory / WEIGHTS_FILE).unlink(missing_ok=True)
    for file, names in split.filename_to_tensors.items():
        tensors.add(directory / file, [by_name[name] for name in names], {"format": "pt"})
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": num_parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        writer.write(directory / WEIGHTS_INDEX_FILE, [memoryview(text)])


# -- loading ---------------------------------------------------------------------------------------------------


def weight_files(checkpoint: SavedCheckpoint) -> list[str]:
    """Names of the files with the model's weights; none in a checkpoint of adapters."""
    if checkpoint.has(WEIGHTS_FILE):
        return [WEIGHTS_FILE]
    if not checkpoint.has(WEIGHTS_INDEX_FILE):
        return []
    with checkpoint.explained(), checkpoint.reader(WEIGHTS_INDEX_FILE) as reader:
        text = reader.read(reader.nbytes)
    return sorted(set(json.loads(text)["weight_map"].values()))


class SavedWeights:
    """The weights of a checkpoint; making one reads the files' headers.

    Args:
        checkpoint: where they are.
        files: their names; None stands for those of `save_pretrained`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, checkpoint: SavedCheckpoint, files: Sequence[str] | None = None) -> None:
        self._checkpoint = checkpoint
        self._files = weight_files(checkpoint) if files is None else files
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files:
            with checkpoint.explained():
                reader = checkpoint.reader(file)
                tensors = TensorReader(reader)
                reader.close()
                self._shapes.update({entry.name: entry.shape for entry in tensors.entries})

    def check_model(self, layout: Mapping[str, torch.Tensor] | None) -> None:
        """Raise `CheckpointError` unless these are the weights of a model with this layout; nothing is changed."""
        if layout is not None and self._files:
            check_same_parameters(
                self._checkpoint.path,
                {name: (shape,) for name, shape in self._shapes.items()},
                {name: (tuple(value.shape),) for name, value in layout.items()},
            )

    def load(self, model: nn.Module, layout: Mapping[str, torch.Tensor] | None) -> bool:
        """Copy the weights into the model's tensors: a few at a time, or all where they have to be computed.

        Returns:
            False if there is no layout to go by, and nothing was changed.

        Raises:
            CheckpointError: a file is damaged; weights have been changed, and another checkpoint must be loaded.
        """
        if layout is None or not self._files:
            return False
        sources = sources_of(layout)
        if sources is None:
            try:
                self._load_moved(model, layout)
            except _NotMovedError:
                # Trainer would look for the model's own names, find none and train from other weights.
                self._checkpoint.check_files(self._files)
                model_class: Any = type(model)
                computed = model_class.from_pretrained(self._checkpoint.path, dtype="auto")
                model.load_state_dict(computed.state_dict(), strict=False)
            return True
        for file in self._files:
            with self._checkpoint.explained(), TensorReader(self._checkpoint.reader(file)) as tensors:
                batch: dict[str, torch.Tensor] = {}
                for entry in tensors.entries:
                    batch[sources[entry.name]] = tensors.read(entry)
                    if sum(value.nbytes for value in batch.values()) >= _LOAD_BYTES:
                        model.load_state_dict(batch, strict=False)
                        batch = {}
                model.load_state_dict(batch, strict=False)
        return True

    def _load_moved(self, model: nn.Module, layout: Mapping[str, torch.Tensor]) -> None:
        """Load what was converted for saving: elements go back to where they came from, a layer at a time.

        Raises:
            _NotMovedError: saving does more than move elements within layers.
        """
        places = _Places.of(model, layout)
        for file in self._files:
            with self._checkpoint.explained(), TensorReader(self._checkpoint.reader(file)) as tensors:
                for entry in tensors.entries:
                    done = places[entry.name].put_back(entry.name, tensors.read(entry))
                    if done:
                        model.load_state_dict(done, strict=False)


class _NotMovedError(Exception):
    """What is saved is not just the live tensors' elements in other places."""


class _Places:
    """Where the elements of one layer's saved tensors belong in its live ones.

    transformers' own conversion for saving tells: it is given the elements' numbers in place of their values.

    Args:
        model: whose tensors they are.
        shapes: of the live tensors, by name.
        names: of the saved ones.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], names: set[str]) -> None:
        self._model = model
        self._shapes = shapes
        self._left = names
        self._numel = sum(math.prod(shape) for shape in shapes.values())
        self._numbers: dict[str, torch.Tensor] = {}
        self._values: torch.Tensor | None = None
        self._filled: torch.Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, layout: Mapping[str, torch.Tensor]) -> dict[str, _Places]:
        """By saved name.

        Raises:
            _NotMovedError: layers are not converted one by one.
        """
        assert isinstance(model, PreTrainedModel)
        live = _saved_tensors(model)
        assert live is not None
        by_layer: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name, value in live.items():
            match = _LAYER.match(name)
            by_layer[match[0] if match else name].update({name: tuple(value.shape)})
        found: dict[str, tuple[int, ...]] = {}
        places = {}
        for shapes in by_layer.values():
            empty = {n: torch.empty(shape, dtype=torch.int32, device="meta") for n, shape in shapes.items()}
            saved = {name: tuple(v.shape) for name, v in revert_weight_conversion(model, empty).items()}
            found.update(saved)
            places.update(dict.fromkeys(saved, cls(model, shapes, set(saved))))
        if found != {name: tuple(value.shape) for name, value in layout.items()}:
            raise _NotMovedError
        return places

    def put_back(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take a saved tensor; with the last one of the layer, its live tensors are returned.

        Raises:
            _NotMovedError: some elements of a live tensor are not saved.
        """
        if self._values is None or self._filled is None:
            self._numbers = self._number()
            self._values = torch.empty(self._numel, dtype=value.dtype)
            self._filled = torch.zeros(self._numel, dtype=torch.bool)
        numbers = self._numbers.pop(name).reshape(-1)
        if value.dtype != self._values.dtype:
            raise _NotMovedError
        first, count = int(numbers[0]) if numbers.numel() else 0, numbers.numel()
        if torch.equal(numbers, torch.arange(first, first + count, dtype=numbers.dtype)):
            self._values[first : first + count] = value.reshape(-1)
            self._filled[first : first + count] = True
        else:
            self._values[numbers.long()] = value.reshape(-1)
            self._filled[numbers.long()] = True
        self._left.discard(name)
        if self._left:
            return {}
        if not self._filled.all():
            raise _NotMovedError
        values, self._values, self._filled = self._values, None, None
        ends = itertools.accumulate(math.prod(shape) for shape in self._shapes.values())
        return {
            name: values[end - math.prod(shape) : end].view(shape)
            for (name, shape), end in zip(self._shapes.items(), ends, strict=True)
        }

    def _number(self) -> dict[str, torch.Tensor]:
        dtype = torch.int32 if self._numel < 2**31 else torch.int64
        numbered, start = {}, 0
        for name, shape in self._shapes.items():
            end = start + math.prod(shape)
            numbered[name] = torch.arange(start, end, dtype=dtype).view(shape)
            start = end
        return revert_weight_conversion(self._model, numbered)
