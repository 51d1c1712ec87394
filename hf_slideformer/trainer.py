"""`SlideTrainer`: transformers' Trainer with a model that streams through the GPU.

Only the seams where a tensor's place matters are overridden; the training loop, logging, evaluation and resume
are Trainer's own code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints
from transformers.training_args import OptimizerNames

from .accelerator import SlideAccelerator
from .checkpoint import (
    OPTIMIZER_FOLDER,
    FileOps,
    NewCheckpoint,
    SavedCheckpoint,
    SavedOptimizer,
    SavedWeights,
    SavePretrained,
    check_free_space,
    clean_up,
    new_checkpoint,
    optimizer_bytes,
    remove_checkpoint,
    save_optimizer,
    saved_layout,
    set_saved_dtype,
)
from .config import SlideConfig
from .engine.blueprint import Blueprint
from .engine.engine import SlideEngine, engine_of
from .engine.loss import DeferredLogits, liger_settings
from .engine.planning import Planned, plan_for
from .engine.units import check_has_data
from .errors import CheckpointError, ConfigError, SlideFormerError, StateError, UnsupportedModelError
from .metrics import Metrics
from .optim import SlideAdamW
from .planner.plan import Plan

# The mixin's methods call those of the Trainer class that it is put in front of.
_Trainer: Any = Trainer if TYPE_CHECKING else object

logger = logging.getLogger(__name__)

PLAN_FILE = "slideformer_plan.json"

_OPTIMIZERS = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


class SlideStatus:
    """`trainer.slide`: what the engine is doing and where everything lives."""

    def __init__(self, trainer: SlideTrainerMixin) -> None:
        self._trainer = trainer

    @property
    def engine(self) -> SlideEngine | None:
        """The engine, once the model has been prepared by `train()` or `evaluate()`."""
        return engine_of(self._trainer.model)

    @property
    def plan(self) -> Plan:
        """Bytes per tier; before the model is prepared, as it will be for training."""
        engine = self.engine
        return engine.plan if engine is not None else self._trainer._planned().plan

    @property
    def metrics(self) -> dict[str, float]:
        """Totals so far, see `hf_slideformer.metrics.Metrics`; empty before the model is prepared."""
        engine = self.engine
        return engine.metrics.totals() if engine is not None else {}

    @property
    def recorder(self) -> Metrics | None:
        """The live metrics object (spans, trace), once the model has been prepared."""
        engine = self.engine
        return engine.metrics if engine is not None else None

    def synchronize(self) -> None:
        """Block until every update is done, so that weights can be read by hand."""
        engine = self.engine
        if engine is not None:
            engine.synchronize()

    def weights_changed(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """Call after writing weights through `p.data`, with the parameters written; other writes are noticed."""
        engine = self.engine
        if engine is not None:
            engine.weights_changed(parameters)


class SlideTrainerMixin(_Trainer):
    """Makes a Trainer class stream its model; put it first: `class MyTrainer(SlideTrainerMixin, SFTTrainer)`.

    Args:
        slide_config: a `SlideConfig`, a dict, a YAML path, or None for the defaults. Everything else is the
            Trainer's.

    Raises:
        ConfigError, UnsupportedModelError, PlanError: at construction, before anything is moved.
    """

    # Trainer's
    optimizer_cls_and_kwargs: Any
    label_smoother: Any

    def __init__(self, *args: Any, slide_config: Any = None, **kwargs: Any) -> None:
        self._slide_config = SlideConfig.of(slide_config)
        super().__init__(*args, **kwargs)
        self.slide = SlideStatus(self)
        check_has_data(self.model)
        self._check_model(self.model)
        self._check_optimizer()
        self.accelerator.count_on_batches(self.train_dataset, self.args.train_batch_size, self.model)
        if self.slide.engine is None:  # a model that streams already has its place
            self._planned()  # refuses what does not fit
        if self.label_smoother is not None:
            self.label_smoother = _FusedLabelSmoother(
                self.label_smoother.epsilon, self.label_smoother.ignore_index
            )
        self.callback_handler.callbacks[:0] = [_DrainBeforeForeignCallbacks(self), _TellPlan(self)]

    # -- construction ----------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Check the arguments before anything is built on them, then make the accelerator a streaming one."""
        self._check_arguments()
        super().create_accelerator_and_postprocess()
        # Same object, so bound methods that Trainer has already taken from it stay valid.
        self.accelerator.__class__ = SlideAccelerator
        self.accelerator.configure_slide(
            self._slide_config,
            micro_batches=self.args.gradient_accumulation_steps,
            overlap_is_exact=self._overlap_is_exact(),
        )
        self.args._n_gpu = min(1, self.args._n_gpu)  # several visible GPUs would mean DataParallel

    def _overlap_is_exact(self) -> bool:
        return self.args.max_grad_norm in (None, 0) and self.args.gradient_accumulation_steps == 1

    def _blueprint(self) -> Blueprint:
        return Blueprint.of(
            self.model,
            bf16=bool(self.accelerator._slide_bf16),
            config=self._slide_config,
            micro_batches=self.args.gradient_accumulation_steps,
            overlap_is_exact=self._overlap_is_exact(),
            on_gpu=self.accelerator.device.type == "cuda",
        )

    def _planned(self) -> Planned:
        return plan_for(
            self.model,
            self._blueprint(),
            device=self.accelerator.device,
            bf16=bool(self.accelerator._slide_bf16),
            config=self._slide_config,
            shape=self.accelerator._slide_shape,
            liger=self._liger_config() if self.args.use_liger_kernel else None,
        )

    def _liger_config(self) -> dict[str, Any]:
        """Liger's layers, and our loss head where it is used; Liger's own head on request."""
        return {**liger_settings(fuses_loss=self._fuses_loss()), **(self.args.liger_kernel_config or {})}

    def _check_arguments(self) -> None:
        args = self.args
        if args.fp16 or args.fp16_full_eval:
            raise UnsupportedModelError("fp16 is not supported (no loss scaling); use bf16=True")
        if args.torch_compile:
            raise UnsupportedModelError(
                "torch_compile=True is not supported: compiled layers cannot be given other weights; set it to False"
            )
        if args.deepspeed or args.fsdp:
            raise UnsupportedModelError(
                "hf_slideformer places the training state itself; remove deepspeed= and fsdp= from TrainingArguments"
            )
        if OptimizerNames(args.optim) not in _OPTIMIZERS:
            raise UnsupportedModelError(
                f"optim={str(args.optim)!r} cannot update streamed parameters; use "
                + " or ".join(repr(str(name.value)) for name in _OPTIMIZERS)
            )
        if args.bf16_full_eval and not args.bf16:
            raise UnsupportedModelError(
                "bf16_full_eval=True without bf16=True would cast the training state; use bf16=True, or load the "
                "model in bfloat16"
            )
        args.bf16_full_eval = (
            False  # under bf16=True units compute in bf16 anyway; Trainer would call model.to()
        )
        if self._slide_config.update == "overlapped" and not self._overlap_is_exact():
            raise ConfigError(
                f"update='overlapped' needs max_grad_norm=0 and gradient_accumulation_steps=1, got "
                f"max_grad_norm={args.max_grad_norm} and {args.gradient_accumulation_steps} steps; use update='auto'"
            )
        # Units are recomputed by the engine; the layers must not do it a second time.
        for flag in ("gradient_checkpointing", "activation_checkpointing"):
            if getattr(args, flag, False):
                setattr(args, flag, False)
        _check_writable(Path(args.output_dir))

    def _check_model(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if getattr(config, "output_attentions", False):
            raise UnsupportedModelError(
                "output_attentions=True would keep every attention matrix of a model that does not fit; set "
                "model.config.output_attentions = False"
            )
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise UnsupportedModelError(f"pass the model itself, not a {type(model).__name__} around it")
        # The older pair of names warns on versions that have the newer one.
        for kind in ("activation_checkpointing", "gradient_checkpointing"):
            if hasattr(type(model), f"is_{kind}"):
                if getattr(model, f"is_{kind}"):
                    getattr(model, f"{kind}_disable")()
                break

    def _check_optimizer(self) -> None:
        if self.optimizer is not None:
            SlideAdamW.check_adoptable(self.optimizer)
        if self.optimizer_cls_and_kwargs is not None:
            cls, kwargs = self.optimizer_cls_and_kwargs
            if cls not in (torch.optim.AdamW, SlideAdamW):
                raise UnsupportedModelError(
                    f"{getattr(cls, '__name__', cls)} cannot update streamed parameters; use torch.optim.AdamW or "
                    "SlideAdamW"
                )
            SlideAdamW.check_options(kwargs)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing to move: the engine places the model when it is prepared."""

    # -- optimizer -------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`SlideAdamW` over the groups that Trainer makes (weight decay and none)."""
        if self.optimizer is None:
            given: tuple[type, dict[str, Any]] | None = self.optimizer_cls_and_kwargs
            _, kwargs = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            # What is left out are AdamW's switches for its own loops, and options that were checked to be off.
            known = {key: kwargs[key] for key in ("lr", "betas", "eps", "weight_decay") if key in kwargs}
            self.optimizer_cls_and_kwargs = (SlideAdamW, known)
            try:
                return super().create_optimizer() if model is None else super().create_optimizer(model)
            finally:
                self.optimizer_cls_and_kwargs = given
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    # -- training --------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; when it returns, every update is done."""
        self._check_model(self.model)
        if self.args.should_save:
            clean_up(Path(self.args.output_dir), self._files)
        given = self.args.liger_kernel_config
        if self.args.use_liger_kernel:
            self.args.liger_kernel_config = self._liger_config() or given
        try:
            result = super().train(*args, **kwargs)
        finally:
            self.args.liger_kernel_config = given
        self.slide.synchronize()
        return result

    def _fuses_loss(self) -> bool:
        engine = self.slide.engine
        return engine.fuses_loss if engine is not None else self._blueprint().head.module is not None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer; an exception (out of memory, Ctrl-C) leaves the engine usable."""
        try:
            return super().training_step(*args, **kwargs)
        except BaseException as error:
            engine = self.slide.engine
            if isinstance(error, torch.OutOfMemoryError) and engine is not None and engine.plan.batch_size:
                error.add_note(
                    f"The plan counts on micro-batches of {engine.plan.batch_size:,} sequences of "
                    f"{engine.plan.seq_len:,} tokens; if some are longer, set SlideConfig(seq_len=...), otherwise "
                    "lower gpu_memory to leave more of the GPU free"
                )
            if engine is not None:
                try:
                    engine.reset()
                except StateError as broken:
                    raise broken from error
            raise

    # -- saving ----------------------------------------------------------------------------------------------

    _files = FileOps()
    _new_checkpoint: NewCheckpoint | None = None
    _push_is_due = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in Trainer, in the dtypes that the weights came in."""
        engine = self.slide.engine
        joined = None
        if engine is not None:
            engine.synchronize()
            if state_dict is None and not isinstance(self.model, PreTrainedModel):
                joined = engine.state_dict_as_loaded(self.model)
        save = getattr(self.model, "save_pretrained", None)
        with contextlib.ExitStack() as stack:
            if self._new_checkpoint is not None and isinstance(save, SavePretrained):
                stack.enter_context(save.writing_with(self._new_checkpoint.writer))
            super()._save(output_dir, state_dict=state_dict if joined is None else joined)
        if joined is not None:
            set_saved_dtype(Path(output_dir or self.args.output_dir), torch.float32)

    def _get_output_dir(self, trial: Any) -> str:
        """As in Trainer; while a checkpoint is written, the directory that hides it."""
        if self._new_checkpoint is not None:
            return str(self._new_checkpoint.outer)
        return super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Trainer; a kill at any instant leaves whole checkpoints only.

        Raises:
            CheckpointError: too little space, or a file that transformers writes could not be written.
            DiskError: a write failed. Either way nothing of the new checkpoint is left, and the others are whole.
        """
        run_dir = Path(self._get_output_dir(trial))
        target = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        try:
            with new_checkpoint(target, self._files, self._checkpoint_bytes()) as checkpoint:
                self._new_checkpoint = checkpoint
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._new_checkpoint = None
                # Trainer has looked for the best checkpoint, and put the state, where this one is written.
                self.state.best_model_checkpoint = self._best_checkpoint(run_dir, best)
                self.state.save_to_json(str(checkpoint.path / TRAINER_STATE_NAME))
        except BaseException as error:
            self.state.best_model_checkpoint = best
            self._push_is_due = False
            if not _is_about_files(error):
                raise
            raise CheckpointError(
                f"{target} could not be written ({error}); {self._free_space(run_dir)}; nothing of it is left, and "
                "earlier checkpoints are as they were"
            ) from error
        self._rotate(run_dir)
        if self._push_is_due:
            self._push_is_due = False
            super()._push_from_checkpoint(str(target))

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
        everything = isinstance(self.model, PreTrainedModel)
        weights = sum(
            state.spec.numel * state.spec.source_dtype.itemsize
            for state in engine.states
            if everything or state.spec.trainable
        )
        optimizer = _slide_optimizer(self.optimizer)
        if self.args.save_only_model or optimizer is None:
            return weights
        return weights + optimizer_bytes(engine, optimizer)

    def _rotate(self, run_dir: Path) -> None:
        """Remove checkpoints beyond `save_total_limit`: by Trainer's rule, but each at once."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
        best = self.state.best_model_checkpoint
        kept = {*checkpoints[-1:], *([str(Path(best))] if best is not None else [])}
        surplus = len(checkpoints) - max(limit, len(kept))
        for checkpoint in [path for path in checkpoints if path not in kept][: max(0, surplus)]:
            remove_checkpoint(Path(checkpoint), self._files)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; checkpoints that it would remove here are removed at once."""
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
        writer = self._new_checkpoint.writer
        save_optimizer(engine, optimizer, Path(output_dir) / OPTIMIZER_FOLDER, writer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedulers that remind one to save the optimizer too
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    # -- resuming --------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in Trainer; files are checked, and a checkpoint of another model is refused before anything changes.

        Raises:
            CheckpointError: the checkpoint is not whole, is damaged, of a newer format or of another model.
        """
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
            SavedOptimizer(checkpoint).check_model(model)
        if not weights.load(model, layout):
            checkpoint.check_files(name for name in checkpoint.records if "/" not in name)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As in Trainer; files are checked."""
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


class SlideTrainer(SlideTrainerMixin, Trainer):
    """`transformers.Trainer` for models whose training state is larger than the GPU.

    Args: as for Trainer, and `slide_config` (see `SlideConfig`).
    """


class _DrainBeforeForeignCallbacks(TrainerCallback):
    """Waits for pending updates before callbacks that are not transformers' own: some read weights."""

    def __init__(self, trainer: SlideTrainerMixin) -> None:
        self._trainer = trainer

    def _drain(self, event: str) -> None:
        for callback in self._trainer.callback_handler.callbacks:
            if callback is not self and not type(callback).__module__.startswith("transformers."):
                method = getattr(type(callback), event, None)
                if method is not None and method is not getattr(TrainerCallback, event, None):
                    self._trainer.slide.synchronize()
                    return


def _drain_on(event: str):
    def method(self, args, state, control, **kwargs):
        self._drain(event)

    method.__name__ = event
    return method


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_") and name != "on_init_end"]:
    setattr(_DrainBeforeForeignCallbacks, _event, _drain_on(_event))


class _TellPlan(TrainerCallback):
    """Shows where everything lives when training starts, and leaves the whole plan beside the run's outputs."""

    def __init__(self, trainer: SlideTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Print the plan, unless progress is not to be shown either, and write `slideformer_plan.json`.

        Raises:
            CheckpointError: the run will save, and a checkpoint does not fit the disk.
        """
        plan = self._trainer.slide.plan
        if args.disable_tqdm:
            logger.info("Where the training state lives:\n%s", plan)
        else:
            print(f"Where the training state lives:\n{plan}", flush=True)
        if SaveStrategy(args.save_strategy) != SaveStrategy.NO and args.should_save:
            check_free_space(Path(args.output_dir), self._trainer._checkpoint_bytes(), self._trainer._files)
        path = Path(args.output_dir) / PLAN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan.as_dict(), indent=2) + "\n", encoding="utf-8")


class _FusedLabelSmoother(LabelSmoother):
    """Trainer's own, by the fused loss where the logits are deferred."""

    def __call__(
        self, model_output: Any, labels: torch.Tensor, shift_labels: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if not isinstance(logits, DeferredLogits):
            return super().__call__(model_output, labels, shift_labels=shift_labels, **kwargs)
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        items = kwargs.get("num_items_in_batch")
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels.reshape(-1),
            ignore_index=self.ignore_index,
            reduction="mean" if items is None else "sum",
            label_smoothing=self.epsilon,
        )
        return loss if items is None else loss / (items.to(loss.device) if torch.is_tensor(items) else items)


def _slide_optimizer(optimizer: Any) -> SlideAdamW | None:
    """The optimizer behind Accelerate's wrapper, if it is ours."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, SlideAdamW) else None


def _is_about_files(error: BaseException) -> bool:
    """Whether writing a file failed; torch's archive writer says so by a RuntimeError."""
    if isinstance(error, RuntimeError):
        return any(
            part in str(error) for part in ("inline_container", "PytorchStreamWriter", "Parent directory")
        )
    return isinstance(error, (OSError, SafetensorError)) and not isinstance(error, SlideFormerError)


def _check_writable(directory: Path) -> None:
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output_dir {str(directory)!r} cannot be written ({existing} is not a writable directory)"
        )


__all__ = ["SlideStatus", "SlideTrainer", "SlideTrainerMixin"]
