"""Train one case with one trainer class and collect everything that two trainers must agree on.

Both trainers get the same model, data, seeds and arguments. What is compared is read from
``trainer.state.log_history``, which holds unrounded floats, rather than through a callback: a foreign callback makes
`SlideTrainer` finish its pending updates first, and a test that looks at every step would hide the very overlap it
is to check.
"""

import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_slideformer import SlideTrainerMixin

from . import data, models, rounding

STEPS = 20
LEARNING_RATE = 1e-3
TRAIN_DATA_SEED, EVAL_DATA_SEED = 11, 12


@dataclass(frozen=True, eq=False)  # compared by identity, so that a case can key a cache
class Case:
    """One training run, independent of the trainer class that runs it.

    Attributes:
        model: key of `models.MODELS`.
        config: arguments that replace some of the model's configuration.
        args: arguments that replace some of `DEFAULT_ARGS`.
        frozen: pattern of parameter names that get ``requires_grad=False``; None freezes nothing.
        dtype: dtype that the weights are loaded in.
        samples: size of the training set. The default makes an epoch of six full accumulation groups of two
            micro-batches, so that twenty steps cross epoch boundaries.
    """

    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    frozen: str | None = None
    dtype: torch.dtype = torch.float32
    samples: int = 24

    @property
    def spec(self) -> models.ModelSpec:
        """The model's specification."""
        return models.MODELS[self.model]

    def build_model(self) -> PreTrainedModel:
        """Build the model with its parameters frozen as asked."""
        model = models.build(self.model, dtype=self.dtype, **self.config)
        freeze(model, self.frozen)
        return model


def freeze(model: PreTrainedModel, pattern: str | None) -> None:
    """Freeze the parameters whose names match ``pattern``, none for None."""
    for name, parameter in model.named_parameters():
        if pattern is not None and re.search(pattern, name):
            parameter.requires_grad_(False)


DEFAULT_ARGS: dict[str, Any] = dict(
    max_steps=STEPS,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=LEARNING_RATE,
    lr_scheduler_type="cosine",
    warmup_steps=4,
    weight_decay=0.1,
    max_grad_norm=1.0,
    logging_strategy="steps",
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=5,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    # Pinning needs an accelerator and warns on a machine that has none.
    dataloader_pin_memory=False,
    seed=7,
)


@dataclass(frozen=True)
class RunResult:
    """What a run produced, unrounded, tensors cloned.

    Attributes:
        losses, grad_norms, learning_rates: one float per optimizer step.
        eval_losses: one float per evaluation, those before training included.
        initial: the model's state dict before training.
        weights: the model's state dict after training.
        trained: names of the parameters that require gradients.
        noise: of plain Trainer's runs, by parameter: how far rounding of gradients can move each element.
    """

    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    eval_losses: list[float]
    initial: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    trained: frozenset[str]
    noise: Mapping[str, torch.Tensor] = field(default_factory=dict)


def make_trainer(
    trainer_class: type[Trainer],
    case: Case,
    output_dir: str | Path,
    *,
    model: PreTrainedModel | None = None,
    trainer_kwargs: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Trainer:
    """Construct a trainer for ``case`` with all generators seeded.

    Args:
        trainer_class: `Trainer` or a drop-in for it.
        case: what to train.
        output_dir: where checkpoints go.
        model: used instead of a freshly built one.
        trainer_kwargs: further arguments of the constructor (``slide_config``, ``compute_metrics``).
        overrides: replace training arguments of the case.
    """
    args = TrainingArguments(output_dir=str(output_dir), **{**DEFAULT_ARGS, **case.args, **overrides})
    model = case.build_model() if model is None else model
    # Building the model used the generators; the run must not depend on how much.
    set_seed(args.seed)
    return trainer_class(
        model=model,
        args=args,
        train_dataset=data.make_dataset(case.spec.task, case.samples, seed=TRAIN_DATA_SEED),
        eval_dataset=data.make_dataset(case.spec.task, 10, seed=EVAL_DATA_SEED),
        data_collator=data.collate,
        **(trainer_kwargs or {}),
    )


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Clone the state dict of the trainer's unwrapped model."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def collect(trainer: Trainer, initial: dict[str, torch.Tensor]) -> RunResult:
    """Read the results of a finished run from its trainer."""
    history = trainer.state.log_history
    steps = [entry for entry in history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return RunResult(
        losses=[entry["loss"] for entry in steps],
        grad_norms=[float(entry["grad_norm"]) for entry in steps],
        learning_rates=[entry["learning_rate"] for entry in steps],
        eval_losses=[entry["eval_loss"] for entry in history if "eval_loss" in entry],
        initial=initial,
        weights=snapshot(trainer),
        trained=frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
    )


def run(
    trainer_class: type[Trainer],
    case: Case,
    *,
    before_training: Callable[[Trainer], None] | None = None,
    after_training: Callable[[Trainer], None] | None = None,
    trainer_kwargs: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> RunResult:
    """Train ``case`` with ``trainer_class`` and return what it produced.

    Args:
        trainer_class: `Trainer` or a drop-in for it.
        case: what to train.
        before_training: called with the trainer before `train()`.
        after_training: called with the trainer after it, when what `RunResult` holds was read.
        trainer_kwargs: further arguments of the trainer's constructor.
        overrides: replace training arguments of the case.
    """
    model = case.build_model()
    initial = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(
            trainer_class, case, output_dir, model=model, trainer_kwargs=trainer_kwargs, **overrides
        )
        # Of the engine's runs nothing is watched: it would finish its updates before each step for a callback.
        sensitivity = None if isinstance(trainer, SlideTrainerMixin) else rounding.Sensitivity()
        if sensitivity is not None:
            trainer.add_callback(sensitivity)
        if before_training is not None:
            before_training(trainer)
        trainer.train()
        result = collect(trainer, initial)
        if sensitivity is not None:
            result = replace(result, noise=sensitivity.by_name())
        if after_training is not None:
            after_training(trainer)
        return result


def relative_difference(left: list[float], right: list[float]) -> float:
    """Largest relative difference of two equally long lists of finite floats."""
    assert len(left) == len(right)
    assert all(map(math.isfinite, [*left, *right]))
    return max(
        (abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in zip(left, right, strict=True)), default=0.0
    )


def assert_clips(result: RunResult, max_grad_norm: float = 1.0, *, steps: int = 5) -> None:
    """Fail unless at least ``steps`` steps of ``result`` were really clipped."""
    clipped = sum(norm > 1.05 * max_grad_norm for norm in result.grad_norms)
    assert clipped >= steps, f"only {clipped} of {len(result.grad_norms)} steps clip: {result.grad_norms}"


def assert_same_run(
    expected: RunResult, actual: RunResult, spec: models.ModelSpec, *, rtol: float = 1e-5, atol: float = 1e-5
) -> None:
    """Fail unless two runs agree: metrics to ``rtol`` relative, weights to ``atol`` absolute, frozen ones in bits.

    The few elements that rounding errors of their gradients can move further are compared to that (`rounding`).
    Parameters whose true gradient is zero (`ModelSpec.zero_gradient`) are compared with the bound of
    `_assert_close_within_noise` instead.
    """
    assert expected.learning_rates == actual.learning_rates
    for metric in ("losses", "grad_norms", "eval_losses"):
        expected_values, actual_values = getattr(expected, metric), getattr(actual, metric)
        difference = relative_difference(expected_values, actual_values)
        assert difference <= rtol, f"{metric} differ by {difference:.2e}:\n{expected_values}\n{actual_values}"

    assert expected.trained == actual.trained
    assert expected.weights.keys() == actual.weights.keys()
    for name, expected_weight in expected.weights.items():
        actual_weight = actual.weights[name]
        assert actual_weight.dtype == expected_weight.dtype, name
        assert actual_weight.shape == expected_weight.shape, name
        # Strict about what is missing from `trained`: tied heads and buffers are in the state dict too.
        if torch.equal(expected_weight, expected.initial[name]):
            assert torch.equal(actual_weight, expected_weight), f"{name} changed, under Trainer it does not"
            continue
        if spec.has_zero_gradient(name):
            expected_weight, actual_weight = expected_weight.clone(), actual_weight.clone()
            expected_part, actual_part = map(spec.zero_gradient_part, (expected_weight, actual_weight))
            _assert_close_within_noise(name, expected_part, actual_part, expected.learning_rates)
            expected_part.zero_()
            actual_part.zero_()
        difference = (actual_weight - expected_weight).abs()
        allowed = torch.full_like(difference, atol).double()
        if name in expected.noise and not spec.has_zero_gradient(name):
            allowed = allowed.maximum(expected.noise[name])
            loose = (allowed > atol).sum().item()
            assert loose <= 1 + allowed.numel() / 500, (
                f"{loose} elements of {name} have no gradient to compare"
            )
        worst = (difference - allowed).argmax()
        assert (difference <= allowed).all(), (
            f"{name} differs by {difference.flatten()[worst]:.2e}, {allowed.flatten()[worst]:.2e} are allowed"
        )


def _assert_close_within_noise(
    name: str, expected: torch.Tensor, actual: torch.Tensor, learning_rates: list[float]
) -> None:
    """Compare a parameter whose true gradient is zero.

    What autograd returns for it is rounding noise of about 1e-9, in another order of additions other noise, and Adam
    divides it by its own size: every step moves each element by up to the learning rate in a direction that means
    nothing. All that is defined is that an element cannot move further than Adam's steps can carry it. That the model
    does not depend on these elements is checked where it shows: losses and evaluation losses agree to 1e-5 although
    they differ.
    """
    bound = (
        2 * 1.1 * sum(learning_rates)
    )  # each run at most the sum of its steps; 10 % for Adam's first steps
    difference = (actual - expected).abs().max().item()
    assert difference <= bound, (
        f"{name} differs by {difference:.2e}, more than Adam can move it ({bound:.2e})"
    )


def assert_same_tensors(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor]) -> None:
    """Fail unless two named sets of tensors are the same in names, dtypes, shapes and bits (signs of zero aside)."""
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        if not torch.equal(actual[name], tensor):
            count = (actual[name] != tensor).sum().item()
            raise AssertionError(f"{name}: {count} of {tensor.numel()} elements differ")


def assert_same_bits(expected: RunResult, actual: RunResult) -> None:
    """Fail unless two runs are the same in every bit that `RunResult` holds."""
    for metric in ("losses", "grad_norms", "learning_rates", "eval_losses"):
        assert getattr(expected, metric) == getattr(actual, metric), metric
    assert expected.trained == actual.trained
    assert_same_tensors(expected.weights, actual.weights)
