"""Model weights: saved in the dtypes that they came in, and loaded, without a second copy of the model.

fp32 weights that train as split masters have a bf16 half in the model and a residual beside it. Whoever saves the live
model must get them joined, and a configuration that says so: `from_pretrained` follows the configuration's dtype.

Files, names and index are those of transformers' `save_pretrained`, which writes everything but the tensors.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..engine.engine import SlideEngine
from ..engine.replaced import ReplacedMethod
from ..optim.state import ParamState
from ..planner.memory import CHECKPOINT_BATCH_BYTES
from .directory import SavedCheckpoint
from .files import Writer
from .parameters import check_same_parameters
from .tensors import TensorEntry, TensorReader, is_storable, write_tensors

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"

_MAX_SHARD_BYTES = 50 * 10**9  # transformers' own default
# Tensors handed to `load_state_dict` at once: a call looks at every module.
_LOAD_BYTES = CHECKPOINT_BATCH_BYTES


class SavePretrained(ReplacedMethod):
    """Stands in for a streamed model's `save_pretrained`; an explicit `state_dict=` is saved as it is."""

    def __init__(self, model: Any, engine: SlideEngine) -> None:
        super().__init__(model, model.save_pretrained)
        self._model = model
        self._engine = weakref.ref(engine)
        self._writer: Writer | None = None

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine()
        if engine is None or args or kwargs.get("state_dict") is not None:
            return self.original(save_directory, *args, **kwargs)
        engine.synchronize()
        with contextlib.ExitStack() as stack:
            entries = None
            if kwargs.keys() <= {"state_dict", "is_main_process", "max_shard_size"}:
                entries = saved_entries(self.module, engine, stack)
            state = joined_state_dict(self.module, engine) if entries is None else {}
            result = self.original(save_directory, **{**kwargs, "state_dict": state})
            if entries is not None and kwargs.get("is_main_process", True):
                shard_bytes = kwargs.get("max_shard_size", _MAX_SHARD_BYTES)
                count = self._model.num_parameters()
                write_weights(self._writer or Writer(), Path(save_directory), entries, count, shard_bytes)
        own = {id(param) for param in self.module.parameters()}
        if any(id(state.param) in own and state.spec.joined_on_save for state in engine.states):
            set_saved_dtype(Path(save_directory), torch.float32)
        return result

    @contextlib.contextmanager
    def writing_with(self, writer: Writer) -> Iterator[None]:
        """Write with `writer` for now, which remembers sizes and checksums."""
        before, self._writer = self._writer, writer
        try:
            yield
        finally:
            self._writer = before


def save_exactly(model: Any, engine: SlideEngine) -> None:
    """Make `model.save_pretrained` write what was loaded, from where it lives.

    Of a PeftModel also that of the model in it, which comes out of it merged.
    """
    for module in {model, getattr(model, "get_base_model", lambda: model)()}:
        if hasattr(module, "save_pretrained"):
            module.save_pretrained = SavePretrained(module, engine)


def joined_state_dict(model: nn.Module, engine: SlideEngine) -> dict[str, torch.Tensor] | None:
    """What is handed to `save_pretrained`: the state dict in the dtypes that it came in; None if the live one is that.

    Of a model with adapters only those are saved, so weights of the base that are in units are left as they are.
    """
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return engine.state_dict_as_loaded(model)

    def is_saved(state: ParamState) -> bool:
        in_adapter = any(part in adapters for part in state.name.split("."))
        return state.spec.trainable or state.unit is None or in_adapter

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
    state_dict = model.state_dict()
    if getattr(model, "hf_quantizer", None) is not None or not all(
        isinstance(value, torch.Tensor) and is_storable(value.dtype) for value in state_dict.values()
    ):
        return None
    for key in model._keys_to_ignore_on_save or ():
        state_dict.pop(key, None)
    live = remove_tied_weights_from_state_dict(state_dict, model)
    # Without data: what comes back as the same object was at most renamed.
    return revert_weight_conversion(model, {name: _without_data(name, v) for name, v in live.items()})


def sources_of(layout: Mapping[str, torch.Tensor]) -> dict[str, str] | None:
    """The live tensor's name for each saved one, or None if some are computed."""
    sources = {name: getattr(value, "source", None) for name, value in layout.items()}
    if None in sources.values():
        return None
    return {name: str(source) for name, source in sources.items()}


def saved_entries(
    model: nn.Module, engine: SlideEngine, stack: contextlib.ExitStack
) -> list[TensorEntry] | None:
    """The tensors that `save_pretrained` would write, split masters joined when their turn comes.

    None where it would write computed ones. `stack` holds what is needed to read the last one.
    """
    layout = saved_layout(model)
    sources = sources_of(layout) if layout is not None else None
    if sources is None:
        return None
    live = model.state_dict()
    masters = _Masters(engine, stack)
    return [masters.entry(name, live[source]) for name, source in sources.items()]


def live_layout(model: nn.Module) -> dict[str, torch.Tensor]:
    """What Accelerate's `save_state` would write, as `saved_layout`: live names, each shared tensor once."""
    layout: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen or not value.numel():
            seen.add(value.data_ptr())
            layout[name] = _without_data(name, value)
    return layout


def _without_data(name: str, value: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(value, device="meta")
    empty.source = name  # type: ignore[attr-defined]
    return empty


class _Masters:
    """Reads split masters one after another; what lies on disk is fetched once for each unit."""

    def __init__(self, engine: SlideEngine, stack: contextlib.ExitStack) -> None:
        self._engine = engine
        self._stack = stack
        self._states = {state.live.data_ptr(): state for state in engine.states}
        self._units = {state.order: states for states in engine.states_by_unit() for state in states}
        self._current: list[ParamState] | None = None

    def entry(self, name: str, live: torch.Tensor) -> TensorEntry:
        """A live tensor as it is to be written."""
        state = self._states.get(live.data_ptr())
        if state is None or not state.spec.joined_on_save:
            return TensorEntry(name, live.dtype, tuple(live.shape), lambda: live)
        return TensorEntry(name, torch.float32, tuple(live.shape), lambda: self._read(state))

    def _read(self, state: ParamState) -> torch.Tensor:
        unit = self._units[state.order]
        if self._current is not unit:
            self._stack.close()
            for other in unit:
                other.check_outside_write()
            self._stack.enter_context(self._engine.state_in_memory(unit))
            self._current = unit
        return state.read_master()


def save_weights(model: nn.Module, engine: SlideEngine, path: Path, writer: Writer) -> None:
    """Write a live model's state dict to one file, in the dtypes that the weights came in."""
    engine.synchronize()
    live = model.state_dict()
    with contextlib.ExitStack() as stack:
        masters = _Masters(engine, stack)
        entries = [masters.entry(name, live[name]) for name in live_layout(model)]
        write_tensors(writer, path, entries, {"format": "pt"})


def write_weights(
    writer: Writer,
    directory: Path,
    entries: list[TensorEntry],
    num_parameters: int,
    max_shard_bytes: int | str,
) -> None:
    """Write weights as `save_pretrained` lays them out: one file, or numbered shards and an index."""
    by_name = {entry.name: entry for entry in entries}
    empty = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    if split.is_sharded:
        (directory / WEIGHTS_FILE).unlink(missing_ok=True)
    for file, names in split.filename_to_tensors.items():
        write_tensors(writer, directory / file, [by_name[name] for name in names], {"format": "pt"})
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
