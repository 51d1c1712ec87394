"""Saving and resuming: Trainer's checkpoints, written by `hf_slideformer.checkpoint`.

Trainer's own code decides when a checkpoint is written and what is in it. It is led into a hidden directory that takes
its place once it is whole, optimizer state and weights are written from where they live, and what is read is checked.

Between a step and the next only small files are written. Tensors follow in a thread beside the next steps, whose
updates wait for them (`engine/state/snapshot.py`). Whoever may look at the checkpoint, or change what it is of, waits
until it is in its place: callbacks that are not transformers' own, `on_save` of any, the next save, and the end of
training. Where code of others takes part in saving nothing overlaps, and files are written when the methods that write
them return.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints

from .checkpoint import (
    LOCK_FILE,
    OPTIMIZER_FOLDER,
    BackgroundSave,
    CheckpointCalls,
    DirectoryLock,
    Manifest,
    NewCheckpoint,
    SavedCheckpoint,
    SavedOptimizer,
    SavedWeights,
    SavePretrained,
    TensorFiles,
    clean_up,
    joined_state_dict,
    optimizer_bytes,
    remove_checkpoint,
    save_optimizer,
    saved_layout,
    set_saved_dtype,
    weight_bytes,
)
from .config import SlideConfig
from .errors import CheckpointError, DiskError, SlideFormerError
from .optim import SlideOptimizer
from .optim.rule import UpdateRule

# The mixin's methods call those of the Trainer class that it is put in front of.
_Trainer: Any = Trainer if TYPE_CHECKING else object

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


class CheckpointMixin(_Trainer):
    """The seams of a Trainer class where checkpoints are written and read; part of `SlideTrainerMixin`."""

    # SlideTrainerMixin's
    slide: Any
    _slide_config: SlideConfig
    _rule: Callable[[], UpdateRule | None]

    _files = CheckpointCalls()
    _locks: tuple[DirectoryLock, ...] = ()
    _is_training = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; what a killed run left is removed, and nobody else saves to the same place meanwhile.

        Raises:
            CheckpointError: another process, or another thread, trains there.
        """
        self._finish_save()
        if self._is_training:  # a subclass that comes back here
            return super().train(*args, **kwargs)
        trial = kwargs.get("trial", args[1] if len(args) > 1 else None)
        directory = Path(self._get_output_dir(trial=trial))
        self._is_training = True
        try:
            self._remove_leftovers(directory)
            result = super().train(*args, **kwargs)
            self._finish_save()
            self._enter_changes()
            return result
        finally:
            self._is_training = False
            try:
                self._settle()
            finally:
                locks, self._locks = self._locks, ()
                for lock in locks:
                    lock.release()

    def _remove_leftovers(self, directory: Path) -> None:
        """Remove what a killed run left of checkpoints, and own the directory if this run saves there."""
        if not self.args.should_save:
            return
        if SaveStrategy(self.args.save_strategy) != SaveStrategy.NO:
            with self._owning(directory):
                clean_up(directory, self._files)
        elif directory.is_dir():
            # It may be shared, until something is saved there after all.
            with contextlib.suppress(CheckpointError, DiskError), DirectoryLock(directory / LOCK_FILE):
                clean_up(directory, self._files)

    @contextlib.contextmanager
    def _owning(self, directory: Path) -> Iterator[None]:
        """The only process that saves to `directory`; until training ends, if this is a part of it."""
        file = (directory / LOCK_FILE).absolute()
        if not self.args.should_save or any(lock.file == file for lock in self._locks):
            yield
            return
        lock = DirectoryLock(file, settle=self._settle)
        if self._is_training:
            self._locks += (lock,)
            yield
            return
        with lock:
            yield

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written, if there is one; `_finish_save` tells how it went."""
        if self._pending_save is not None:
            self._pending_save.wait()

    # -- saving ----------------------------------------------------------------------------------------------

    _new_checkpoint: NewCheckpoint | None = None
    _push_is_due = False
    # Whether the save that comes may go on beside training, and the one that does; the best checkpoint before it.
    _may_overlap = False
    _pending_save: BackgroundSave | None = None
    _best_before_save: str | None = None
    # Of the checkpoint that was saved last.
    _manifest: Manifest | None = None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; here, and nowhere else, a save may go on beside what follows."""
        before = self._manifest
        self._may_overlap = (
            self._slide_config.saving == "overlapped"
            and not self.args.push_to_hub
            and not any(_reads_saved(callback) for callback in self.callback_handler.callbacks)
        )
        try:
            result = super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._may_overlap = False
        if self._manifest is not before:
            self._enter_changes()
        return result

    def _enter_changes(self) -> None:
        """Take notice of what somebody's code did to the files of the last checkpoint: that is no damage."""
        if self._manifest is not None:
            self._manifest.enter_changes()

    def _finish_save(self) -> None:
        """Wait until the checkpoint that is being written is in its place.

        Raises:
            CheckpointError, DiskError, TransferError: it could not be written; as from `_save_checkpoint`.
        """
        if self._pending_save is None:
            return
        save, self._pending_save = self._pending_save, None
        error = save.wait()
        if error is None:
            self._manifest = save.checkpoint.manifest
            return
        if not save.is_in_place:
            self.state.best_model_checkpoint = self._best_before_save
        explained = self._explained(save.checkpoint.target, error, is_in_place=save.is_in_place)
        raise explained from (None if explained is error else error)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer, unless a checkpoint could not be written meanwhile."""
        if self._pending_save is not None and self._pending_save.is_over:
            self._finish_save()
        return super().training_step(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in Trainer, in the dtypes that the weights came in."""
        engine = self.slide.engine
        joined = None
        if self._new_checkpoint is None:
            self._finish_save()
        if engine is not None:
            engine.synchronize()
            if state_dict is None and not isinstance(self.model, PreTrainedModel):
                joined = joined_state_dict(self.model, engine)
        with self._weights_into_checkpoint():
            super()._save(output_dir, state_dict=state_dict if joined is None else joined)
        if joined is not None:
            set_saved_dtype(Path(output_dir or self.args.output_dir), torch.float32)

    @contextlib.contextmanager
    def _weights_into_checkpoint(self) -> Iterator[None]:
        """While a checkpoint is made, `save_pretrained` of the model has its tensors written with the rest of it."""
        new, save = self._new_checkpoint, getattr(self.model, "save_pretrained", None)
        if new is None or not isinstance(save, SavePretrained):
            yield
        elif new.tensors:
            with save.writing_into(new.tensors[0], new.writer):
                yield
        else:

            def save_at_once(*args: Any, **kwargs: Any) -> Any:
                with self._tensors_of(new) as tensors, save.writing_into(tensors, new.writer):
                    return save(*args, **kwargs)

            self.model.save_pretrained = save_at_once
            try:
                yield
            finally:
                self.model.save_pretrained = save

    @contextlib.contextmanager
    def _tensors_of(self, new: NewCheckpoint) -> Iterator[TensorFiles]:
        """Where to add tensors: to the checkpoint's; where others look at its files, to some that are written then."""
        if new.tensors:
            yield new.tensors[0]
            return
        tensors = TensorFiles(self.slide.engine.hold())
        try:
            yield tensors
            tensors.write(new.writer)
        finally:
            tensors.held.release_all()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Trainer; a kill at any instant leaves whole checkpoints only.

        Raises:
            CheckpointError: too little space, a file that transformers writes could not be written, or another process
                saves to the same place.
            DiskError: a write failed. Either way nothing of the new checkpoint is left, and the others are whole,
                unless the error says that it is in its place. If it was to go on beside training, `_finish_save`
                raises what happens then.
        """
        self._finish_save()
        self._enter_changes()
        run_dir = Path(self._get_output_dir(trial=trial))
        with self._owning(run_dir):
            self._write_checkpoint(run_dir, model, trial)
        if self._push_is_due:
            self._push_is_due = False
            super()._push_from_checkpoint(str(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))

    def _write_checkpoint(self, run_dir: Path, model: nn.Module, trial: Any) -> None:
        target = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self._best_before_save = self.state.best_model_checkpoint
        others = _code_of_others(self)
        if others:
            logger.info(
                "Training stops while checkpoints are written, for %s to find them", ", ".join(others)
            )
        checkpoint: NewCheckpoint | None = None
        try:
            checkpoint = NewCheckpoint(target, self._files, self._checkpoint_bytes())
            try:
                if self.slide.engine is not None and not others:
                    checkpoint.tensors.append(TensorFiles(self.slide.engine.hold()))
                with self._led_into(checkpoint):
                    super()._save_checkpoint(model, trial)
                # Trainer has looked for the best checkpoint, and put the state, where this one is written.
                self.state.best_model_checkpoint = self._best_checkpoint(run_dir, best)
                self.state.save_to_json(str(checkpoint.path / TRAINER_STATE_NAME))
                if others:
                    checkpoint.writer.forget_changed()
            except BaseException:
                checkpoint.abandon()
                raise
            rotate = partial(self._rotate, run_dir, self.state.best_model_checkpoint)
            if self._may_overlap and not others:
                self._pending_save = BackgroundSave(checkpoint, rotate)
                return
            checkpoint.finish_then(rotate)
        except BaseException as error:
            is_in_place = checkpoint is not None and checkpoint.is_in_place
            if not is_in_place:
                self.state.best_model_checkpoint = best
            self._push_is_due = False
            explained = self._explained(target, error, is_in_place=is_in_place)
            if explained is error:
                raise
            raise explained from error
        self._manifest = checkpoint.manifest

    @contextlib.contextmanager
    def _led_into(self, checkpoint: NewCheckpoint) -> Iterator[None]:
        """Trainer's own code, and what of a subclass runs in it, writes into the hidden directory."""
        given = vars(self).get("_get_output_dir")
        # On the instance, for subclasses may have one of their own.
        self.__dict__["_get_output_dir"] = lambda trial=None: str(checkpoint.outer)
        self._new_checkpoint = checkpoint
        try:
            yield
        finally:
            self._new_checkpoint = None
            del self.__dict__["_get_output_dir"]
            if given is not None:
                self.__dict__["_get_output_dir"] = given

    def _explained(self, target: Path, error: BaseException, *, is_in_place: bool) -> BaseException:
        """The error to raise for one that came up while `target` was written."""
        if not _is_about_files(error):
            return error
        if is_in_place:
            return CheckpointError(
                f"{target} is in its place and whole, but what comes after that failed ({error})"
            )
        advice = ""
        if str(target) in str(error) and not target.exists():
            advice = (
                "; a checkpoint is not in its place before it is whole: code that adds to it takes its directory from "
                "self._get_output_dir(trial=trial), or stands in a subclass of the class with SlideTrainerMixin"
            )
        return CheckpointError(
            f"{target} could not be written ({error}); {self._free_space(target.parent)}; nothing of it is left, and "
            f"earlier checkpoints are as they were{advice}"
        )

    def _free_space(self, directory: Path) -> str:
        try:
            return f"{self._files.free_bytes(directory) / 2**30:.2f} GiB are free there"
        except OSError as error:
            return f"its directory cannot be used ({error})"

    def _best_checkpoint(self, run_dir: Path, known: str | None) -> str | None:
        """The checkpoint of the best step, which may be the one that is being written; by Trainer's rule."""
        strategies = (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        step = self.state.best_global_step
        if step and self.args.save_strategy in strategies:
            path = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if step == self.state.global_step or path.exists():
                return str(path)
        return known

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in Trainer, once the checkpoint is in its place."""
        if self._new_checkpoint is not None:
            self._push_is_due = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint's tensors."""
        engine = self.slide.engine
        if engine is None:
            return 0
        # Of a model with adapters only those are saved.
        weights = weight_bytes(engine, trainable_only=not isinstance(self.model, PreTrainedModel))
        optimizer = _slide_optimizer(self.optimizer)
        if self.args.save_only_model or optimizer is None:
            return weights
        return weights + optimizer_bytes(engine, optimizer)

    def _rotate(self, run_dir: Path, best: str | None) -> None:
        """Remove checkpoints beyond `save_total_limit`: by Trainer's rule, but each at once."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        # A link by another name (checkpoint-latest) is somebody's own.
        checkpoints = [
            path
            for path in sort_checkpoints(str(run_dir), use_mtime=True)
            if _CHECKPOINT.fullmatch(Path(path).name)
        ]
        kept = {
            *checkpoints[-1:],
            *(path for path in checkpoints if best is not None and _is_same(path, best)),
        }
        surplus = len(checkpoints) - max(limit, len(kept))
        for checkpoint in [path for path in checkpoints if path not in kept][: max(0, surplus)]:
            remove_checkpoint(Path(checkpoint), self._files)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; checkpoints that it would remove here are removed at once."""
        self._finish_save()
        best = self.state.best_model_checkpoint
        if best is not None and self.args.save_total_limit == 1 and os.path.isdir(best):
            for checkpoint in sort_checkpoints(self._get_output_dir(trial)):
                if not os.path.samefile(checkpoint, best):
                    remove_checkpoint(Path(checkpoint), self._files)
        return super()._finalize_training(trial, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer's state unit by unit, from where it lives; the scheduler as in Trainer."""
        engine, optimizer = self.slide.engine, _slide_optimizer(self.optimizer)
        if engine is None or optimizer is None or self._new_checkpoint is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        new = self._new_checkpoint
        with self._tensors_of(new) as tensors:
            save_optimizer(engine, optimizer, Path(output_dir) / OPTIMIZER_FOLDER, tensors, new.writer)
        if _next_definition(self, "_save_optimizer_and_scheduler") is not Trainer:
            self._save_what_others_add(output_dir)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedulers that remind one to save the optimizer too
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_what_others_add(self, output_dir: str) -> None:
        """Run a class between ours and Trainer, whose own code at the end would pickle all state of the optimizer."""
        self.optimizer.__dict__["state_dict"] = dict
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            del self.optimizer.__dict__["state_dict"]
        Path(output_dir, OPTIMIZER_NAME).unlink(missing_ok=True)

    # -- resuming --------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in Trainer; files are checked, and a checkpoint of another model is refused before anything changes.

        Raises:
            CheckpointError: the checkpoint is not whole, is damaged, of a newer format, of another model or of
                another optimizer.
        """
        self._finish_save()
        path = Path(resume_from_checkpoint)
        if not SavedCheckpoint.exists(path):
            if SavedOptimizer.exists(path):
                raise CheckpointError(f"{path} is not whole: it has optimizer state, but no manifest")
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.model if model is None else model
        checkpoint = SavedCheckpoint(path, self._files)
        small = (name for name in checkpoint.records if not name.endswith(".safetensors"))
        checkpoint.check_files(small)
        weights = SavedWeights(checkpoint)
        layout = saved_layout(model)
        weights.check_model(layout)
        if SavedOptimizer.exists(path):
            optimizer = SavedOptimizer(checkpoint)
            optimizer.check_model(model)
            if model is self.model and (rule := self._rule()) is not None:
                optimizer.check_rule(rule)
        if not weights.load(model, layout):
            checkpoint.check_files(name for name in checkpoint.records if "/" not in name)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As in Trainer; files are checked."""
        self._finish_save()
        path = Path(self.state.best_model_checkpoint)
        if SavedCheckpoint.exists(path):
            checkpoint = SavedCheckpoint(path, self._files)
            weights = SavedWeights(checkpoint)
            layout = saved_layout(self.model)
            weights.check_model(layout)
            logger.info("Loading the best model from %s (score: %s)", path, self.state.best_metric)
            if weights.load(self.model, layout):
                return
            checkpoint.check_files(name for name in checkpoint.records if "/" not in name)
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer's state unit by unit into its place; the scheduler, and plain checkpoints, as in Trainer."""
        engine, optimizer = self.slide.engine, _slide_optimizer(self.optimizer)
        if (
            checkpoint is None
            or engine is None
            or optimizer is None
            or not SavedOptimizer.exists(Path(checkpoint))
        ):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = SavedCheckpoint(Path(checkpoint), self._files)
        SavedOptimizer(saved).load(engine, optimizer)
        # Trainer loads it again where it needs it, but not if no step is left to be made.
        self._load_rng_state(checkpoint)
        scheduler_file = os.path.join(checkpoint, SCHEDULER_NAME)
        if os.path.isfile(scheduler_file):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.lr_scheduler.load_state_dict(torch.load(scheduler_file, weights_only=True))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, which would make one step more than `max_steps` where a resumed run has made them all."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)


def _slide_optimizer(optimizer: Any) -> SlideOptimizer | None:
    """The optimizer behind Accelerate's wrapper, if it is ours."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, SlideOptimizer) else None


# Loggers of transformers that do nothing with a checkpoint unless they are asked to, and what says so.
_UPLOADS = {"TrackioCallback": None, "WandbCallback": "_log_model", "MLflowCallback": "_log_artifacts"}


def _reads_saved(callback: TrainerCallback) -> bool:
    """Whether a callback may look for the checkpoint in `on_save`."""
    kind = type(callback)
    if "on_save" in vars(callback):
        return True
    if kind.on_save is TrainerCallback.on_save or kind.__module__.startswith("hf_slideformer."):
        return False
    if not kind.__module__.startswith("transformers.") or kind.__name__ not in _UPLOADS:
        return True
    attribute = _UPLOADS[kind.__name__]
    flag = attribute is not None and getattr(callback, attribute, True)
    return bool(getattr(flag, "is_enabled", flag))


# What Trainer goes through when it saves: code of others in there may look at the files, or add some.
_SAVING = (
    "_maybe_log_save_evaluate",
    "_save_checkpoint",
    "save_model",
    "_save",
    "_save_optimizer_and_scheduler",
    "_save_scaler",
    "_save_rng_state",
)
# Packages whose trainers leave files alone after a save, or write them where it leads them.
_KNOWN = ("hf_slideformer", "transformers", "trl")


def _code_of_others(trainer: Any) -> list[str]:
    """Methods that take part in saving and are neither ours nor transformers': a subclass's, or put in their place."""
    places = [("trainer", vars(trainer)), *((kind.__name__, vars(kind)) for kind in type(trainer).__mro__)]
    return [
        f"{place}.{name}"
        for place, found in places
        for name in _SAVING
        if name in found and _is_others(found[name])
    ]


def _is_others(method: Any) -> bool:
    function = getattr(method, "__func__", method)
    # Not `__module__`, which wrappers copy.
    module = getattr(function, "__globals__", {}).get("__name__", "")
    return module.partition(".")[0] not in _KNOWN


def _next_definition(trainer: Any, name: str) -> type:
    """The class whose method `super()` finds from here."""
    order = type(trainer).__mro__
    return next(kind for kind in order[order.index(CheckpointMixin) + 1 :] if name in vars(kind))


def _is_same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.abspath(path) == os.path.abspath(other)


def _is_about_files(error: BaseException) -> bool:
    """Whether writing a file failed; torch's archive writer says so by a RuntimeError."""
    if isinstance(error, RuntimeError):
        return any(
            part in str(error) for part in ("inline_container", "PytorchStreamWriter", "Parent directory")
        )
    return isinstance(error, (OSError, SafetensorError)) and not isinstance(error, SlideFormerError)
