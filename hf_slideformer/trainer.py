"""`SlideTrainer`: transformers' Trainer with a model that streams through the GPU.

Only the seams where a tensor's place matters are overridden; the training loop, logging, evaluation and resume
are Trainer's own code.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from . import compatibility
from .accelerator import SlideAccelerator
from .checkpoint import check_free_space
from .config import SlideConfig
from .engine.engine import SlideEngine, engine_of
from .engine.model.blueprint import Blueprint
from .engine.model.head import liger_settings
from .engine.model.setup import Setup
from .engine.model.units import check_has_data
from .engine.planning import Planned, plan_for
from .engine.reference_model import follow
from .engine.run.deferred_logits import DeferredLogits
from .errors import ConfigError, PlanError, SlideFormerError, UnsupportedModelError
from .metrics import Metrics
from .optim import SlideOptimizer, check_adoptable, check_class, check_name, optimizer_class
from .optim.rule import UpdateRule
from .planner.plan import Plan
from .trainer_checkpoints import CheckpointMixin

logger = logging.getLogger(__name__)

PLAN_FILE = "slideformer_plan.json"


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
        """Block until every update is done and what is being saved is, so that weights can be read or written by hand.

        Raises:
            TransferError: an update failed; the cause is chained.
            CheckpointError, DiskError: the checkpoint that was being written could not be.
        """
        self._trainer._finish_save()
        engine = self.engine
        if engine is not None:
            engine.synchronize()

    def release(self) -> None:
        """Make the model an ordinary one again, in RAM, with its weights in the dtypes that they came in.

        Training it goes on with a new trainer.

        Raises:
            StateError: while `train()` runs; the weights are those of no step; or there is too little RAM.
        """
        self._trainer._finish_save()
        engine = self.engine
        if engine is not None:
            engine.release("trainer.slide.release() was called")

    def weights_changed(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """Call after writing weights past torch's functions (a kernel, numpy), with the parameters written.

        Other writes are noticed. Call `synchronize` before writing: a checkpoint that is being written would get some
        of them.
        """
        engine = self.engine
        if engine is not None:
            engine.weights_changed(parameters)


class SlideTrainerMixin(CheckpointMixin):
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
        compatibility.check(compatibility.TRAINER)
        compatibility.check_overrides(type(self), compatibility.TRAINER)
        compatibility.check_references(type(self))
        self._slide_config = SlideConfig.of_launch() if slide_config is None else SlideConfig.of(slide_config)
        self.slide = SlideStatus(self)
        self._in_training = False
        super().__init__(*args, **kwargs)
        self._configure_accelerator()  # the optimizer is known by now
        self._check_before_streaming()
        if self.slide.engine is None:  # a model that streams already has its place
            self._refuse_what_does_not_fit()
        if self.label_smoother is not None:
            self.label_smoother = _FusedLabelSmoother(
                self.label_smoother.epsilon, self.label_smoother.ignore_index
            )
        self.callback_handler.callbacks[:0] = [_DrainBeforeForeignCallbacks(self), _TellPlan(self)]
        self._take_over_reference()

    # -- construction ----------------------------------------------------------------------------------------

    def _check_before_streaming(self) -> None:
        check_has_data(self.model)
        self._check_model(self.model)
        self._check_optimizer()
        self._count_on_batches()

    def _take_over_reference(self) -> None:
        """Let the reference model follow in the place of a callback of TRL's that has it in hand."""
        reference = getattr(self, "ref_model", None)
        callbacks = self.callback_handler.callbacks
        theirs = [
            callback
            for callback in callbacks
            if type(callback).__module__.startswith("trl.")
            and any(value is reference for value in vars(callback).values() if value is not None)
        ]
        if len(theirs) != bool(getattr(self.args, "sync_ref_model", False)):
            raise UnsupportedModelError(
                f"{len(theirs)} of TRL's callbacks have the reference model in hand, and sync_ref_model="
                f"{getattr(self.args, 'sync_ref_model', False)}: this version of TRL synchronizes it in a way that is "
                "not known here; set sync_ref_model=False and remove such callbacks"
            )
        if theirs:
            callbacks[callbacks.index(theirs[0])] = _FollowingReference(self)

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """As in TRL's DPOTrainer, which may run the model when the trainer is made: it streams from then on."""
        if self.slide.engine is None and getattr(self, "ref_model", None) is None:
            self._check_before_streaming()
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return super().compute_ref_log_probs(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Check the arguments before anything is built on them, then make the accelerator a streaming one."""
        self._check_arguments()
        super().create_accelerator_and_postprocess()
        # Same object, so bound methods that Trainer has already taken from it stay valid.
        self.accelerator.__class__ = SlideAccelerator
        trainer = weakref.ref(self)
        self.accelerator._slide_will_train = lambda model: model is getattr(trainer(), "model", None)
        self.accelerator._slide_in_training = lambda: getattr(trainer(), "_in_training", False)
        self._configure_accelerator()
        if getattr(self, "train_dataset", None) is not None:  # made anew, for a trial of a search
            self._count_on_batches()
        self.args._n_gpu = min(1, self.args._n_gpu)  # several visible GPUs would mean DataParallel

    def _configure_accelerator(self) -> None:
        self.accelerator.configure_slide(
            self._slide_config,
            micro_batches=self.args.gradient_accumulation_steps,
            overlap_is_exact=self._overlap_is_exact(),
            # Trainer makes the accelerator before it takes the optimizer that it was given.
            rule=self._rule() if hasattr(self, "optimizer_cls_and_kwargs") else None,
            shape=self.accelerator.slide_setup.shape,
        )

    def _refuse_what_does_not_fit(self) -> None:
        try:
            self._planned()
        except PlanError:
            if self._rule() is not None:
                raise
            # Planned for AdamW; it may be for another one, with which the model is prepared.

    def _count_on_batches(self) -> None:
        self.accelerator.count_on_batches(
            self.train_dataset, self._train_batch_size, self.model, collate=self.data_collator
        )

    def _overlap_is_exact(self) -> bool:
        return self.args.max_grad_norm in (None, 0) and self.args.gradient_accumulation_steps == 1

    def _setup(self) -> Setup:
        """What training would be prepared with now."""
        return dataclasses.replace(
            self.accelerator.slide_setup,
            config=self._slide_config,
            micro_batches=self.args.gradient_accumulation_steps,
            overlap_is_exact=self._overlap_is_exact(),
            rule=self._rule(),
            taken=self.accelerator.slide_taken(),
        )

    def _planned(self) -> Planned:
        setup = self._setup()
        return plan_for(
            self.model,
            Blueprint.of(self.model, setup),
            setup,
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
        check_name(OptimizerNames(args.optim).value)
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
        # Units are recomputed by the engine; the layers must not do it a second time. Nor must TRL copy activations to
        # RAM: where they go is in the plan.
        for flag in ("gradient_checkpointing", "activation_checkpointing", "activation_offloading"):
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
        for module in model.modules():  # the model itself, or the one in a PeftModel
            if isinstance(module, PreTrainedModel):
                _disable_checkpointing(module)
                break

    def _check_optimizer(self) -> None:
        if self.optimizer is not None:
            check_adoptable(self.optimizer)
        if self.optimizer_cls_and_kwargs is not None:
            check_class(*self.optimizer_cls_and_kwargs)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing to move: the engine places the model when it is prepared."""

    # -- optimizer -------------------------------------------------------------------------------------------

    def _chosen_optimizer(self) -> tuple[type[SlideOptimizer], dict[str, Any]]:
        """The class that the arguments name, and its hyperparameters.

        Raises:
            UnsupportedModelError: there is none, or an option that changes its mathematics.
            ConfigError: a hyperparameter that it does not know, or outside of its range.
        """
        given: tuple[type, dict[str, Any]] | None = self.optimizer_cls_and_kwargs
        if given is None and self._overrides("get_optimizer_cls_and_kwargs"):
            given = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        kwargs = dict[str, Any]()
        if given is not None:
            kind, theirs = check_class(*given), given[1]
        else:
            kind = check_name(OptimizerNames(self.args.optim).value)
            kwargs, theirs = kind.arguments_of(self.args), {}
            # Of an optimizer that is not torch's, Trainer would look for the package that it is from.
            if kind.same_as is not None:
                _, theirs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        # What is left out are switches of torch's loops, and options that were checked to be off.
        known = inspect.signature(kind).parameters
        switches = inspect.signature(kind.same_as).parameters if kind.same_as is not None else {}
        kwargs |= {name: value for name, value in theirs.items() if name in known or name not in switches}
        try:
            kind([nn.Parameter(torch.empty(0))], **kwargs)  # knows what values it takes
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{kind.rule_name} cannot be made of these arguments: {error}") from None
        return kind, kwargs

    def _overrides(self, name: str) -> bool:
        """Whether a subclass of the user's has a method of its own in the place of Trainer's or ours."""
        ours = getattr(SlideTrainerMixin, name, None) or getattr(Trainer, name)
        return getattr(type(self), name) is not ours

    def _rule(self) -> UpdateRule | None:
        """How parameters will be updated; None where that is known only once the optimizer is made."""
        states = self._slide_config.optimizer_states
        optimizer = self.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper of a run before
        if inner is not None:
            kind = optimizer_class(type(inner)) or check_adoptable(inner)
            return kind.rule_for(inner.param_groups, states)
        if self._overrides("create_optimizer"):
            return None
        if self.optimizer_cls_and_kwargs is None and self._overrides("get_optimizer_cls_and_kwargs"):
            return None
        kind, kwargs = self._chosen_optimizer()
        return kind.rule_for([kwargs], states)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over the groups that Trainer makes (weight decay and none)."""
        given = self.optimizer_cls_and_kwargs
        if self.optimizer is None:
            self.optimizer_cls_and_kwargs = self._chosen_optimizer()
        try:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given

    # -- training --------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, with the arguments that are in force now; when it returns, every update is done."""
        self._check_arguments()
        self._configure_accelerator()
        self._check_model(self.model)
        given = self.args.liger_kernel_config
        if self.args.use_liger_kernel:
            self.args.liger_kernel_config = self._liger_config() or given
        try:
            result = super().train(*args, **kwargs)
        except BaseException as error:
            # A checkpoint of an earlier step is worth as much as ever; its own failure would hide what happened.
            try:
                self._finish_save()
            except SlideFormerError as of_saving:
                error.add_note(f"A checkpoint could not be written either: {of_saving}")
            raise
        finally:
            self._in_training = False
            self.args.liger_kernel_config = given
        self.slide.synchronize()
        return result

    def _fuses_loss(self) -> bool:
        engine = self.slide.engine
        return (
            engine.fuses_loss
            if engine is not None
            else Blueprint.of(self.model, self._setup()).head.module is not None
        )

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
                except Exception as broken:  # noqa: BLE001 - every later use of the engine raises it again
                    error.add_note(f"Training cannot go on after this: {broken}")
            raise


class SlideTrainer(SlideTrainerMixin, Trainer):
    """`transformers.Trainer` for models whose training state is larger than the GPU.

    Args: as for Trainer, and `slide_config` (see `SlideConfig`).
    """


class _DrainBeforeForeignCallbacks(TrainerCallback):
    """Waits for updates and saves before callbacks that are not transformers' own: some read or write weights."""

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


class _FollowingReference(TrainerCallback):
    """Lets TRL's reference model follow the trained one, in the place of TRL's own callback.

    That one adds parameters of the two models, which may lie on different devices, through `p.data`.
    """

    def __init__(self, trainer: SlideTrainerMixin) -> None:
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        """Every `ref_model_sync_steps` steps."""
        trained = self._trainer.slide.engine
        if trained is not None and state.global_step % args.ref_model_sync_steps == 0:
            for reference in self._trainer.accelerator.slide_references():
                follow(reference, trained, args.ref_model_mixup_alpha)


class _TellPlan(TrainerCallback):
    """Shows where everything lives when training starts, and leaves the whole plan beside the run's outputs."""

    def __init__(self, trainer: SlideTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Print the plan, unless progress is not to be shown either, and write `slideformer_plan.json`.

        Raises:
            CheckpointError: the run will save, and a checkpoint does not fit the disk.
        """
        self._trainer._in_training = True
        plan = self._trainer.slide.plan
        if args.disable_tqdm:
            logger.info("Where the training state lives:\n%s", plan)
        else:
            print(f"Where the training state lives:\n{plan}", flush=True)
            for reference in self._trainer.accelerator.slide_references():
                print(f"Beside it, a model that is only read:\n{reference.plan}", flush=True)
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


def _disable_checkpointing(model: PreTrainedModel) -> None:
    # The older pair of names warns on versions that have the newer one.
    for kind in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(type(model), f"is_{kind}"):
            if getattr(model, f"is_{kind}"):
                getattr(model, f"{kind}_disable")()
            return


def _check_writable(directory: Path) -> None:
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output_dir {str(directory)!r} cannot be written ({existing} is not a writable directory)"
        )


__all__ = ["SlideStatus", "SlideTrainer", "SlideTrainerMixin"]
