"""`SlideAccelerator`: Accelerate's entry point, with one model streamed instead of placed.

Only what depends on where tensors live is overridden; precision, data loaders, trackers and saving are
Accelerate's own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator  # not from the package, where a launcher may have bound ours
from accelerate.utils import DistributedType, DynamoBackend
from accelerate.utils.deepspeed import DummyOptim, DummyScheduler

from . import compatibility
from .checkpoint import (
    LOCK_FILE,
    OPTIMIZER_FOLDER,
    CheckpointCalls,
    DirectoryLock,
    NewCheckpoint,
    SavedCheckpoint,
    SavedOptimizer,
    SavedWeights,
    TensorFiles,
    add_live_weights,
    clean_up,
    live_layout,
    must_be_written_in_place,
    names_of,
    optimizer_bytes,
    remove_checkpoint,
    save_exactly,
    save_optimizer,
    weight_bytes,
)
from .config import SlideConfig
from .engine.engine import SlideEngine, engine_of, engines_of
from .engine.model.batch_shape import BatchShape, find_batch_shape, max_positions
from .engine.model.setup import Setup
from .engine.planning import NOTHING_KNOWN_OF_BATCHES, plans_activations
from .engine.state.clipping import clip_grad_norm_
from .errors import (
    CheckpointError,
    DiskError,
    StateError,
    UnsupportedModelError,
)
from .optim import SlideOptimizer, adopt, check_adoptable
from .optim.rule import UpdateRule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SlideFormerPlugin:
    """How `SlideAccelerator` streams.

    Args:
        config: a `SlideConfig`, a dict or a YAML path. None takes what the launcher handed on (`accelerate launch` with
            a `slideformer_config` section), and the defaults without one. Kept as a `SlideConfig`.

    Raises:
        ConfigError: settings that cannot be used.
    """

    config: SlideConfig | Mapping[str, Any] | str | os.PathLike | None = None

    def __post_init__(self) -> None:
        given = self.config
        object.__setattr__(
            self, "config", SlideConfig.of_launch() if given is None else SlideConfig.of(given)
        )


class SlideAccelerator(Accelerator):
    """An `Accelerator` whose `prepare` streams the model.

    Args: as for `Accelerator`, and `slideformer_plugin`, which says how.

    Raises:
        ConfigError: settings that cannot be used.
        UnsupportedModelError: a launch mode or precision that cannot be combined with streaming.
    """

    _slide_plugin_config: SlideConfig | None = None
    _slide_setup: Setup | None = None
    _slide_shape_is_of_a_loader = False
    # Says of a model that is prepared for evaluation whether training follows; Trainer evaluates before it trains.
    _slide_will_train: Callable[[torch.nn.Module], bool] = staticmethod(lambda model: False)
    # Whether a Trainer is in the middle of training, when no model may leave its engine.
    _slide_in_training: Callable[[], bool] = staticmethod(lambda: False)
    _slide_references: tuple[weakref.ref[SlideEngine], ...] = ()

    def __init__(
        self, *args: Any, slideformer_plugin: SlideFormerPlugin | None = None, **kwargs: Any
    ) -> None:
        plugin = SlideFormerPlugin() if slideformer_plugin is None else slideformer_plugin
        _check_asked(kwargs)  # Accelerate drops plugins without a word where there is one process
        super().__init__(*args, **kwargs)
        check_environment(self)
        self._slide_plugin_config = SlideConfig.of(plugin.config)

    @property
    def slide_setup(self) -> Setup:
        """What the next model is prepared with, as far as it is known without the model and its optimizer.

        Raises:
            UnsupportedModelError: a launch mode or precision that cannot be combined with streaming.
        """
        if self._slide_setup is None:
            check_environment(self)
            # Accelerate keeps precision in state that all accelerators of the process share; this one's is fixed now.
            self._slide_setup = Setup(
                device=self.device,
                bf16=self.mixed_precision == "bf16",
                config=self._slide_plugin_config or SlideConfig(),
            )
        return self._slide_setup

    def configure_slide(
        self,
        config: SlideConfig,
        *,
        micro_batches: int,
        overlap_is_exact: bool,
        rule: UpdateRule | None = None,
        shape: BatchShape | None = None,
    ) -> None:
        """Set how the next model is streamed.

        Args:
            config: the user's settings.
            micro_batches: backwards that make a step.
            overlap_is_exact: no clipping and one backward a step.
            rule: of the optimizer that will be prepared with the model, if that is known.
            shape: of micro-batches; None finds it from a data loader that is prepared with the model.

        Raises:
            UnsupportedModelError: a launch mode or precision that cannot be combined with streaming.
        """
        check_environment(self)
        self._slide_setup = replace(
            self.slide_setup,
            config=config,
            micro_batches=micro_batches,
            overlap_is_exact=overlap_is_exact,
            rule=rule,
            shape=shape,
        )

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As in Accelerate; models are streamed, and an optimizer of their parameters is connected to them.

        Model and optimizer may be given together, or one after the other in either order. A model without an
        optimizer can be evaluated.

        Raises:
            UnsupportedModelError: a model that cannot be streamed, or an optimizer that cannot train it.
            PlanError: it does not fit.
        """
        for obj in args:
            if isinstance(obj, (DummyOptim, DummyScheduler)):
                raise UnsupportedModelError(
                    f"{type(obj).__name__} stands for one that DeepSpeed makes; give a torch.optim.AdamW and, made for "
                    "it, a scheduler"
                )
        models = [obj for obj in args if isinstance(obj, torch.nn.Module)]
        optimizers = [_unwrapped(obj) for obj in args if isinstance(obj, torch.optim.Optimizer)]
        for obj in args:
            if isinstance(obj, torch.utils.data.DataLoader) and self.slide_setup.shape is None:
                self.count_on_batches(
                    obj.dataset, obj.batch_size, models[0] if models else None, collate=obj.collate_fn
                )
                self._slide_shape_is_of_a_loader = True
        known = [*map(_unwrapped, self._optimizers), *optimizers]
        for model in [*self._models, *models]:
            _check_optimizers(model, known)
        if len(models) == 1:
            for optimizer in optimizers:
                if not any(_shares_parameters(optimizer, model) for model in [*self._models, *models]):
                    raise UnsupportedModelError(
                        f"the {type(optimizer).__name__} holds no parameter of the {type(models[0]).__name__} that it "
                        "is prepared with; make the optimizer from the same model object"
                    )
        # Models first, and with what is known of all optimizers: Accelerate goes through the arguments one by one.
        for model in models:
            for_training = any(_shares_parameters(opt, model) for opt in known)
            self._slide_stream(model, for_training=for_training, given=optimizers)
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(
        self, model: torch.nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> torch.nn.Module:
        """Stream `model`; a model that is streamed already, and has not changed since, is returned as it is.

        With `evaluation_mode` it is for reading only (DPO's reference model): its parameters are frozen, and it has
        room for nothing but weights.
        """
        known = [_unwrapped(optimizer) for optimizer in self._optimizers]
        _check_optimizers(model, known)
        for_training = not evaluation_mode and any(_shares_parameters(opt, model) for opt in known)
        self._slide_stream(model, for_training=for_training, evaluation_mode=evaluation_mode)
        return model

    def _slide_stream(
        self,
        model: torch.nn.Module,
        *,
        for_training: bool,
        evaluation_mode: bool = False,
        given: Iterable[torch.optim.Optimizer] = (),
    ) -> None:
        """Give `model` an engine, unless it has one that fits, and connect it to its optimizer, if that is prepared.

        Where it has one that was made for other parameters or settings, the model leaves that first. An optimizer of
        those `given`, or otherwise of those that are prepared, goes on with its state.
        """
        setup = self._slide_setup_for(model, given)
        engine, carried = self._slide_fitting(model, for_training, evaluation_mode, given, setup)
        if engine is None:
            read_only = evaluation_mode and not self._slide_will_train(model)
            setup = replace(setup, read_only=read_only, taken=self.slide_taken())
            engine = SlideEngine(model, setup, for_training=for_training)
            if engine.read_only:
                self._slide_references = (*self._slide_references, weakref.ref(engine))
            this = weakref.ref(self)
            engine.on_release(lambda: _forget_released(this()))
            save_exactly(model, engine)
            # Accelerate's own preparation still wraps autocast; evaluation_mode keeps it from wrapping more.
            super().prepare_model(model, device_placement=False, evaluation_mode=True)
        elif model not in self._models:
            self._models.append(model)
        engine.in_training = self._slide_in_training
        for optimizer, saved in carried:
            engine.attach_optimizer(optimizer)
            optimizer.load_state_dict(saved)
        self._slide_connect()

    def _slide_setup_for(self, model: torch.nn.Module, given: Iterable[torch.optim.Optimizer]) -> Setup:
        """What `model` is prepared with, by the optimizer that has its parameters, if one does."""
        setup = self.slide_setup
        known = [*given, *map(_unwrapped, self._optimizers)]
        optimizer = next((one for one in known if _shares_parameters(one, model)), None)
        rule = setup.rule
        if optimizer is not None:
            kind = check_adoptable(optimizer)
            rule = kind.rule_for(optimizer.param_groups, setup.config.optimizer_states)
        micro_batches = max(setup.micro_batches, self.gradient_accumulation_steps)
        return replace(setup, micro_batches=micro_batches, rule=rule)

    def _slide_fitting(
        self,
        model: torch.nn.Module,
        for_training: bool,
        evaluation_mode: bool,
        given: Iterable[torch.optim.Optimizer],
        setup: Setup,
    ) -> tuple[SlideEngine | None, list[tuple[SlideOptimizer, dict[str, Any]]]]:
        """The engine that fits `model`; None if there is none, any more, and state that optimizers go on with.

        Raises:
            StateError: the model cannot leave an engine that does not fit.
        """
        engines = engines_of(model)
        if not engines:
            return None, []
        engine = engines[0]
        other = "" if evaluation_mode else engine.setup.difference(setup)
        if len(engines) == 1 and not other and engine.fits(model, training=not evaluation_mode):
            return engine, []
        if for_training and engine.read_only and not any(p.requires_grad for p in model.parameters()):
            raise StateError(
                "this model was prepared for evaluation only (evaluation_mode=True), which froze it; call "
                "model.requires_grad_(True) before its optimizer or trainer is made"
            )
        known = [optimizer for optimizer in given if _shares_parameters(optimizer, model)]
        known = known or [_unwrapped(optimizer) for optimizer in self._optimizers]
        going_on = [
            optimizer
            for optimizer in known
            if isinstance(optimizer, SlideOptimizer) and any(map(optimizer.is_bound_to, engines))
        ]
        if going_on and any(engine.disk_bytes for engine in engines):
            raise StateError(
                f"{other or 'the parameters of this model have changed'}, and its optimizer has state on disk that "
                "would have to go on; make a new trainer or optimizer for the model as it is now"
            )
        if other and going_on and engine.rule.format not in setup.update_rule.readable:
            raise StateError(
                f"{other}, and its optimizer has state of the former kind; set its hyperparameters as they were, or "
                "make a new optimizer for the model"
            )
        carried = [(optimizer, optimizer.trainable_state_dict()) for optimizer in going_on]
        wrappers = [wrapped for wrapped in self._optimizers if _unwrapped(wrapped) in going_on]
        for engine in engines:
            engine.release(other or "its parameters were not those that it was prepared with")
        self._optimizers += [wrapped for wrapped in wrappers if wrapped not in self._optimizers]
        return None, carried

    def _slide_connect(self) -> None:
        """Give engines the optimizers of their parameters, where both are prepared now."""
        for wrapped in list(self._optimizers):
            models = [model for model in self._models if _shares_parameters(wrapped.optimizer, model)]
            if not models:
                continue
            wrapped.optimizer = adopt(wrapped.optimizer)
            if wrapped.optimizer.is_bound:
                continue
            engines = [(engine_of(model), model) for model in models]
            engine = next((one for one, model in engines if one and one.fits(model, training=True)), None)
            setup = self._slide_setup_for(models[0], [wrapped.optimizer])
            # Parameters have changed since the model was prepared, or it was prepared for another optimizer.
            if engine is None or engine.setup.difference(replace(engine.setup, rule=setup.rule)):
                self._slide_stream(models[0], for_training=True, given=[wrapped.optimizer])
                continue
            engine.attach_optimizer(wrapped.optimizer)
            logger.info("Where the training state lives:\n%s", engine.plan)
            if NOTHING_KNOWN_OF_BATCHES in engine.plan.notes:
                logger.warning(NOTHING_KNOWN_OF_BATCHES)

    def slide_references(self) -> list[SlideEngine]:
        """Engines of models that were prepared for reading only, as long as they are there."""
        return [engine for reference in self._slide_references if (engine := reference()) is not None]

    def slide_taken(self) -> dict[str, int]:
        """Bytes by tier that such models take of what the settings allow."""
        taken: dict[str, int] = {}
        for engine in self.slide_references():
            for tier, nbytes in engine.plan.peaks["train"].items():
                taken[tier] = taken.get(tier, 0) + nbytes
        return taken

    def count_on_batches(
        self,
        dataset: Any,
        batch_size: int | None,
        model: torch.nn.Module | None,
        collate: Callable[[list], Any] | None = None,
    ) -> None:
        """Find out what batches are like, where activations are planned for.

        Args:
            dataset: what the data loader reads.
            batch_size: sequences of a micro-batch; None where the dataset or a sampler makes the batches.
            model: to be trained, if it is known already.
            collate: makes batches of samples.
        """
        config = self.slide_setup.config
        if batch_size is not None and plans_activations(self.device, config):
            shape = find_batch_shape(
                dataset,
                batch_size=batch_size,
                seq_len=config.seq_len,
                max_positions=max_positions(getattr(model, "config", None)),
                collate=collate,
            )
            self._slide_setup = replace(self.slide_setup, shape=shape)

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> Any:
        """Wrap the optimizer; its state is placed by the engine, never by Accelerate."""
        known = [_unwrapped(opt) for opt in (*self._optimizers, optimizer)]
        for model in self._models:
            _check_optimizers(model, known)
        prepared = super().prepare_optimizer(optimizer, device_placement=False)
        self._slide_connect()
        return prepared

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor | None:
        """The global gradient norm before clipping; see `hf_slideformer.engine.state.clipping.clip_grad_norm_`."""
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        engines = dict.fromkeys(filter(None, map(engine_of, self._models)))
        used = [engine.clipping for engine in engines if any(map(engine.owns, parameters))]
        if used:
            return clip_grad_norm_(used, parameters, max_norm, norm_type)
        return super().clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """As in Accelerate, on the gradients that wait for `step()`.

        Raises:
            StateError: updates that overlap with backward have used them already.
        """
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for engine in filter(None, map(engine_of, self._models)):
            if engine.overlapped and any(engine.owns(param) for param in parameters):
                raise StateError(
                    f"clip_grad_value_(clip_value={clip_value}) after overlapped updates have started; use "
                    "SlideConfig(update='deferred')"
                )
        super().clip_grad_value_(parameters, clip_value)

    def unwrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The model itself, with every pending update done."""
        engine = engine_of(model)
        if engine is not None:
            engine.synchronize()
        return super().unwrap_model(model, *args, **kwargs)

    def get_state_dict(self, model: torch.nn.Module, unwrap: bool = True) -> dict[str, torch.Tensor]:
        """The state dict in the dtypes the weights came in."""
        engine = engine_of(model)
        if engine is not None and self._slide_streams_weights:
            return {}  # `_save_streamed` writes them
        state = engine.state_dict_as_loaded(model) if engine is not None else None
        return super().get_state_dict(model, unwrap=unwrap) if state is None else state

    def free_memory(self, *objects: Any) -> list[Any]:
        """As in Accelerate; the next plan counts on the batches of a data loader that is prepared from now on."""
        if self._slide_shape_is_of_a_loader:
            self._slide_setup = replace(self.slide_setup, shape=None)
            self._slide_shape_is_of_a_loader = False
        return super().free_memory(*objects)

    def end_training(self) -> None:
        """As in Accelerate, once every pending update is done."""
        try:
            for engine in filter(None, map(engine_of, self._models)):
                engine.synchronize()
        finally:
            super().end_training()

    # -- saving and loading everything -----------------------------------------------------------------------

    _slide_files = CheckpointCalls()
    _slide_streams_weights = False
    _optimizers: list[Any]

    def save_state(
        self, output_dir: str | None = None, safe_serialization: bool = True, **save_model_func_kwargs: Any
    ) -> Any:
        """As in Accelerate; a kill at any instant leaves what was there before, or the new state whole.

        A directory that holds other files too is written in place: `load_state` refuses it until it is whole again.

        Weights and optimizer state are written from where they live. The optimizer's state is a folder `optimizer`
        (`optimizer_1`, ...) instead of a file; docs/checkpoints.md. With automatic naming, old states are removed once
        the new one is in its place.

        Raises:
            CheckpointError: too little space, or another process saves to the same place.
            DiskError: a file cannot be written. Either way what was there is as it was, unless the error says that
                the new state is in its place and only the disk did not confirm it.
            ValueError: automatic naming would write over an older state.
        """
        if not self._slide_owns_everything() or not safe_serialization:
            return super().save_state(output_dir, safe_serialization, **save_model_func_kwargs)
        project = self.project_configuration
        named = project.automatic_checkpoint_naming
        if named:
            target = Path(self.project_dir) / "checkpoints" / f"checkpoint_{self.save_iteration}"
            if target.exists():
                raise ValueError(
                    f"Checkpoint directory {target} ({self.save_iteration}) already exists. Please manually override "
                    "`self.save_iteration` with what iteration to start with."
                )
        else:
            assert output_dir is not None, "Accelerate wants a directory too"
            target = Path(output_dir).resolve()
        in_place = must_be_written_in_place(target)
        lock = _lock_file(target, named=named, in_place=in_place)
        with DirectoryLock(lock) if self.is_main_process else contextlib.nullcontext():
            self._slide_save_state(target, in_place, safe_serialization, save_model_func_kwargs)
        return target if named else Path(output_dir or "")

    def _slide_save_state(
        self, target: Path, in_place: bool, safe_serialization: bool, kwargs: dict[str, Any]
    ) -> None:
        project = self.project_configuration
        named = project.automatic_checkpoint_naming
        checkpoint = NewCheckpoint(
            target,
            self._slide_files,
            self._slide_state_bytes(),
            _STATE if named else names_of(target),
            in_place=in_place,
        )
        iteration = project.iteration
        try:
            project.automatic_checkpoint_naming = False  # it would choose another place
            with self._slide_writes_into(checkpoint), self._slide_state_is_ours():
                super().save_state(str(checkpoint.path), safe_serialization, **kwargs)
            checkpoint.finish_then(lambda: self._slide_rotate(target.parent) if named else None)
        except BaseException:
            if not checkpoint.is_in_place:
                project.iteration = iteration
            checkpoint.abandon()
            raise
        finally:
            project.automatic_checkpoint_naming = named

    def _slide_rotate(self, directory: Path) -> None:
        """Remove old states beyond the limit of automatic naming."""
        limit = self.project_configuration.total_limit
        if limit is not None:
            for old in _states_in(directory)[: -max(1, limit)]:
                remove_checkpoint(old, self._slide_files)

    @contextlib.contextmanager
    def _slide_writes_into(self, checkpoint: NewCheckpoint) -> Iterator[None]:
        """Models and optimizers are written with `checkpoint` when Accelerate has made the list of both."""
        optimizers = self._optimizers

        def save(models: list, weights: list, directory: str) -> None:
            weights.clear()
            for index, model in enumerate(models):
                engine = engine_of(model)
                assert engine is not None
                tensors = TensorFiles(engine.hold())
                checkpoint.tensors.append(tensors)
                add_live_weights(model, checkpoint.path / f"model{_ending(index)}.safetensors", tensors)
                for number, optimizer in enumerate(optimizers):
                    if self._slide_engine_of(optimizer.optimizer) is engine:
                        folder = checkpoint.path / f"{OPTIMIZER_FOLDER}{_ending(number)}"
                        save_optimizer(engine, optimizer.optimizer, folder, tensors, checkpoint.writer)

        hook = self.register_save_state_pre_hook(save)
        try:
            yield
        finally:
            hook.remove()

    def _slide_state_bytes(self) -> int:
        """Bytes of the tensors of all models and optimizers."""
        optimizers = [optimizer.optimizer for optimizer in self._optimizers]
        weights = sum(weight_bytes(engine) for model in self._models if (engine := engine_of(model)))
        return weights + sum(optimizer_bytes(self._slide_engine_of(one), one) for one in optimizers)

    def load_state(
        self, input_dir: str | None = None, load_kwargs: dict | None = None, **load_model_func_kwargs: Any
    ) -> None:
        """As in Accelerate; also what plain Accelerate has saved.

        Raises:
            CheckpointError: files are missing, damaged, or those of another model.
        """
        if not self._slide_owns_everything():
            super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)
            return
        if input_dir is not None:
            target = Path(input_dir).expanduser().resolve()
            lock = _lock_file(target, named=False, in_place=False)
            self._slide_clean_up(target.parent, names_of(target), lock)
        elif self.project_configuration.automatic_checkpoint_naming:
            base = Path(self.project_dir) / "checkpoints"
            self._slide_clean_up(base, _STATE, base / LOCK_FILE)
            states = _states_in(base)
            if not states:
                raise CheckpointError(f"there is no saved state in {base}; name one: load_state(input_dir)")
            input_dir = str(states[-1])

        def load(models: list, directory: str) -> None:
            path = Path(directory)
            if not SavedCheckpoint.exists(path):
                if SavedOptimizer.exists(path):
                    raise CheckpointError(
                        f"{path} is not whole: saving into it was interrupted; load another state"
                    )
                self._optimizers.extend(optimizers)  # Accelerate has taken this list already
                return
            saved = SavedCheckpoint(path, self._slide_files)
            saved.check_files(name for name in saved.records if not name.endswith(".safetensors"))
            weights = [
                SavedWeights(saved, [f"model{_ending(index)}.safetensors"]) for index in range(len(models))
            ]
            states = [
                SavedOptimizer(saved, f"{OPTIMIZER_FOLDER}{_ending(index)}")
                for index in range(len(optimizers))
            ]
            for part, model in zip(weights, models, strict=True):
                part.check_model(live_layout(model))
            for state, optimizer in zip(states, optimizers, strict=True):
                state.check_groups(self._slide_engine_of(optimizer.optimizer), optimizer.optimizer)
            for part, model in zip(weights, models, strict=True):
                part.load(model, live_layout(model))
            for state, optimizer in zip(states, optimizers, strict=True):
                state.load(self._slide_engine_of(optimizer.optimizer), optimizer.optimizer)
            models.clear()

        hook = self.register_load_state_pre_hook(load)
        with self._slide_state_is_ours() as optimizers:
            try:
                super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)
            finally:
                hook.remove()

    def _slide_clean_up(self, directory: Path, names: re.Pattern[str], lock: Path) -> None:
        """Remove what a killed run left; what another process is writing is no leftover."""
        if directory.is_dir():
            with contextlib.suppress(CheckpointError, DiskError), DirectoryLock(lock):
                clean_up(directory, self._slide_files, names)

    def _slide_owns_everything(self) -> bool:
        return (
            bool(self._models)
            and all(engine_of(model) is not None for model in self._models)
            and all(_is_optimizer(optimizer) for optimizer in self._optimizers)
        )

    def _slide_engine_of(self, optimizer: SlideOptimizer) -> SlideEngine:
        param = optimizer.param_groups[0]["params"][0]
        return next(
            engine for engine in map(engine_of, self._models) if engine is not None and engine.owns(param)
        )

    @contextlib.contextmanager
    def _slide_state_is_ours(self) -> Iterator[list[Any]]:
        """Accelerate handles neither the weights of models nor the optimizers, which are handed out."""
        optimizers: list[Any] = self._optimizers
        self._optimizers = []
        self._slide_streams_weights = True
        try:
            yield optimizers
        finally:
            self._optimizers = optimizers
            self._slide_streams_weights = False


# What Accelerate's automatic naming makes.
_STATE = re.compile(r"checkpoint_(\d+)")


def _lock_file(target: Path, *, named: bool, in_place: bool) -> Path:
    """What keeps other processes from saving a state to the same place: the directory of all, or one name in it."""
    if in_place:
        return target / LOCK_FILE
    return target.parent / (LOCK_FILE if named else f".lock-{target.name}")


def _states_in(directory: Path) -> list[Path]:
    """States that were saved under automatic names, oldest first."""
    paths = directory.iterdir() if directory.is_dir() else ()
    found = [(int(match[1]), path) for path in paths if (match := _STATE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _ending(index: int) -> str:
    """Accelerate's names of the second object of a kind and those after it."""
    return f"_{index}" if index else ""


def _is_optimizer(obj: Any) -> bool:
    return isinstance(getattr(obj, "optimizer", None), SlideOptimizer)


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer in Accelerate's wrapper, or itself."""
    return getattr(optimizer, "optimizer", optimizer)


def _forget_released(accelerator: SlideAccelerator | None) -> None:
    """Count a model that has left its engine, and its optimizers, as not prepared."""
    if accelerator is None:
        return
    accelerator._models = [model for model in accelerator._models if engine_of(model) is not None]
    accelerator._optimizers = [
        wrapped
        for wrapped in accelerator._optimizers
        if not getattr(_unwrapped(wrapped), "has_lost_its_state", False)
    ]


def _shares_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> bool:
    own = {id(param) for param in model.parameters()}
    return any(id(param) in own for group in optimizer.param_groups for param in group["params"])


def _check_optimizers(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Refuse optimizers of a model's parameters that cannot train it.

    Raises:
        UnsupportedModelError: an optimizer of another kind than those of `optim`, one with parameters of something
            else, or two of them.
    """
    own = {id(param) for param in model.parameters()}
    seen: list[tuple[set[int], bool]] = []
    for optimizer in dict.fromkeys(optimizers):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        given = {id(param) for param in params}
        if given.isdisjoint(own):
            continue
        check_adoptable(optimizer)
        others = [tuple(param.shape) for param in params if id(param) not in own]
        if others:
            raise UnsupportedModelError(
                f"{len(others)} of the optimizer's {len(params)} parameters, the first of shape {others[0]}, are not "
                f"in the {type(model).__name__} that the others are in; make one optimizer for each model"
            )
        bound = isinstance(optimizer, SlideOptimizer) and optimizer.is_bound
        # A new one may take the place of one that has trained the same parameters.
        if any(given.isdisjoint(earlier) or not (bound or was_bound) for earlier, was_bound in seen):
            raise UnsupportedModelError(
                f"the parameters of the {type(model).__name__} are in two optimizers; make one with a parameter group "
                "for each, which has its own lr, betas, eps and weight_decay"
            )
        seen.append((given, bound))


def _check_asked(kwargs: Mapping[str, Any]) -> None:
    plugins = (
        "deepspeed_plugin",
        "deepspeed_plugins",
        "fsdp_plugin",
        "megatron_lm_plugin",
        "parallelism_config",
    )
    given = [name for name in plugins if kwargs.get(name) is not None]
    if given:
        raise UnsupportedModelError(
            f"hf_slideformer places the training state itself, in one process, and cannot run together with "
            f"{', '.join(given)}; leave it out"
        )
    precision = kwargs.get("mixed_precision")
    if precision is not None and str(precision) not in ("no", "bf16"):
        raise UnsupportedModelError(_precision_message(str(precision)))


def _precision_message(precision: str) -> str:
    return (
        f"mixed precision {precision!r} is not supported; use bf16=True, mixed_precision='bf16' with Accelerate (exact "
        "fp32 masters), or fp32"
    )


def check_environment(accelerator: Accelerator) -> None:
    """Refuse launch modes and precisions that streaming cannot be combined with.

    Raises:
        UnsupportedModelError: with what to do instead.
        UnsupportedVersionError: this version of Accelerate lacks what is built on.
    """
    compatibility.check(compatibility.ACCELERATOR)
    compatibility.check_overrides(type(accelerator), compatibility.ACCELERATOR)
    state = accelerator.state
    others = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    plugins = ("deepspeed_plugin", "fsdp_plugin", "megatron_lm_plugin")
    # What a launcher asks for, and Accelerate drops where there is one process.
    asked = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
    if (
        accelerator.distributed_type in others
        or any(getattr(state, plugin, None) is not None for plugin in plugins)
        or any(os.environ.get(variable, "false").lower() == "true" for variable in asked)
    ):
        raise UnsupportedModelError(
            "hf_slideformer places the training state itself and cannot run together with DeepSpeed, FSDP or "
            "Megatron-LM; remove their configuration"
        )
    if accelerator.num_processes > 1:
        raise UnsupportedModelError(
            f"hf_slideformer runs in one process, this launch has {accelerator.num_processes}; launch with "
            "--num_processes 1, or from a notebook with notebook_launcher(..., num_processes=1)"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UnsupportedModelError(_precision_message(accelerator.mixed_precision))
    dynamo = getattr(state, "dynamo_plugin", None)
    if dynamo is not None and dynamo.backend != DynamoBackend.NO:
        raise UnsupportedModelError(
            f"layers that are streamed cannot be compiled, and this accelerator has dynamo_backend={dynamo.backend}; "
            "leave it out"
        )
