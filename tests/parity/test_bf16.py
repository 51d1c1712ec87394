"""In bf16 on the CPU, `SlideTrainer` produces the bits of a plain PyTorch loop.

The loop is `reference_loop.train`. Equality of floats is asserted, not closeness: where a tensor lies and when it is
updated must not change a single bit.
"""

import itertools
from pathlib import Path

import pytest
import torch
from slideformer_kernels import reference
from transformers import Trainer, get_scheduler

from hf_slideformer import SlideConfig, SlideTrainer
from hf_slideformer.engine.state.parameters import live_tensors

from . import data, harness, reference_loop
from .harness import Case

STEPS = 10
WARMUP_STEPS = 2

ARGS = dict(
    bf16=True,
    max_steps=STEPS,
    warmup_steps=WARMUP_STEPS,
    # In order, because the loop knows nothing of Trainer's sampler.
    train_sampling_strategy="sequential",
)


def run_reference(
    case: Case,
    model: torch.nn.Module,
    *,
    keep_residual: bool = True,
    optimizer_states: str = "fp32",
    **overrides,
):
    """Train ``model`` with the reference loop as ``case`` and ``overrides`` say."""
    args = {**harness.DEFAULT_ARGS, **case.args, **overrides}
    batch_size, group = args["per_device_train_batch_size"], args["gradient_accumulation_steps"]
    samples = data.make_dataset(case.spec.task, case.samples, seed=harness.TRAIN_DATA_SEED)
    assert len(samples) % (batch_size * group) == 0  # no incomplete group at the end of an epoch
    batches = [
        data.collate([samples[index] for index in range(start, start + batch_size)])
        for start in range(0, len(samples), batch_size)
    ]
    steps = [batches[start : start + group] for start in range(0, len(batches), group)]

    schedule_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args["learning_rate"])
    scheduler = get_scheduler(
        args["lr_scheduler_type"],
        schedule_optimizer,
        num_warmup_steps=args["warmup_steps"],
        num_training_steps=args["max_steps"],
    )
    learning_rates = []
    for _ in range(args["max_steps"]):
        learning_rates.append(schedule_optimizer.param_groups[0]["lr"])
        schedule_optimizer.step()
        scheduler.step()

    return reference_loop.train(
        model,
        list(itertools.islice(itertools.cycle(steps), args["max_steps"])),
        learning_rates,
        max_grad_norm=args["max_grad_norm"],
        weight_decay=args["weight_decay"],
        keep_residual=keep_residual,
        optimizer_states=optimizer_states,
    )


def residuals_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Name -> low half of each parameter's master, out of the optimizer's state."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    packed = trainer.optimizer.state_dict()
    residuals = {}
    for group, packed_group in zip(trainer.optimizer.param_groups, packed["param_groups"], strict=True):
        for parameter, index in zip(group["params"], packed_group["params"], strict=True):
            residuals[name_of[id(parameter)]] = packed["state"][index]["master_residual"].clone()
    return residuals


def assert_both_halves(
    expected: reference_loop.ReferenceResult, whole: dict[str, torch.Tensor], trainer: Trainer
) -> None:
    """Fail unless a trained model has the halves of the reference's masters in memory, and `whole` for who reads it."""
    with live_tensors():
        halves = harness.snapshot(trainer)
    weights = harness.snapshot(trainer)
    harness.assert_same_tensors(expected.weights, {name: halves[name] for name in expected.weights})
    harness.assert_same_tensors(expected.residuals, residuals_of(trainer))
    harness.assert_same_tensors(whole, {name: weights[name] for name in whole})


def _assert_bits_of_reference(
    case: Case, output_dir: Path, *, model_factory=None, slide_config=None, **overrides
) -> tuple[reference_loop.ReferenceResult, harness.RunResult]:
    """Train both ways from the same weights, fail unless all bits agree, and return both results.

    Losses, weights, both halves of every master and the saved weights (in the dtype that they came in) are compared.
    """
    model_factory = model_factory or case.build_model
    slide_config = slide_config or SlideConfig()
    expected = run_reference(
        case, model_factory(), optimizer_states=slide_config.optimizer_states, **overrides
    )

    trainer = harness.make_trainer(
        SlideTrainer,
        case,
        output_dir,
        model=model_factory(),
        trainer_kwargs={"slide_config": slide_config},
        **overrides,
    )
    initial = harness.snapshot(trainer)
    trainer.train()
    actual = harness.collect(trainer, initial)

    assert actual.losses == expected.losses
    # Logged as fp32 or as float64, that is left open: nothing but the log depends on it.
    assert harness.relative_difference(actual.grad_norms, expected.grad_norms) < 1e-6
    whole = expected.masters if case.dtype == torch.float32 else expected.weights
    assert_both_halves(expected, whole, trainer)

    trainer.save_model(str(output_dir / "final"))
    # Loaded rather than read: mixtral's experts are stored one by one, under other names.
    loaded = type(model_factory()).from_pretrained(output_dir / "final", dtype="auto")
    saved = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
    harness.assert_same_tensors(whole, saved)
    return expected, actual


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["from_bf16", "from_fp32"])
def test_bits_of_reference(tmp_path, dtype, max_grad_norm, accumulation):
    case = Case("llama", args=ARGS, dtype=dtype)
    expected, actual = _assert_bits_of_reference(
        case, tmp_path, max_grad_norm=max_grad_norm, gradient_accumulation_steps=accumulation
    )
    assert len(actual.losses) == STEPS
    if max_grad_norm:
        harness.assert_clips(actual)
    # Most residuals are in use, or nothing here would depend on them.
    in_use = sum((residual != 0).sum().item() for residual in expected.residuals.values())
    assert in_use > 0.9 * sum(residual.numel() for residual in expected.residuals.values())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bits_of_reference_qwen2(tmp_path, tied):
    case = Case("qwen2", config={"tie_word_embeddings": tied}, args=ARGS, dtype=torch.bfloat16)
    _assert_bits_of_reference(case, tmp_path)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3_text", "mixtral"])
def test_bits_of_reference_other_families(tmp_path, name):
    _assert_bits_of_reference(Case(name, args=ARGS, dtype=torch.bfloat16), tmp_path)


def test_sometimes_clipped_bits_of_reference(tmp_path):
    # A coefficient of one must leave the gradients as they are; 4.0 lies among this run's norms.
    case = Case("llama", args=ARGS, dtype=torch.bfloat16)
    expected, _ = _assert_bits_of_reference(case, tmp_path, max_grad_norm=4.0)
    assert 2 <= sum(norm > 4.0 for norm in expected.grad_norms) <= STEPS - 2


@pytest.mark.parametrize("update", ["overlapped", "deferred"])
def test_update_schedule_does_not_change_bits(tmp_path, update):
    case = Case("llama", args=ARGS, dtype=torch.bfloat16)
    _assert_bits_of_reference(
        case,
        tmp_path,
        slide_config=SlideConfig(update=update),
        max_grad_norm=0.0,
        gradient_accumulation_steps=1,
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_bits_of_reference_8bit(tmp_path, name):
    config = SlideConfig(optimizer_states="8bit")
    _assert_bits_of_reference(Case(name, args=ARGS), tmp_path, slide_config=config)


def test_low_halves_of_fp32_weights_matter(tmp_path):
    # The same model started from its bf16 rounding must end elsewhere; otherwise `from_fp32` proves nothing.
    case = Case("llama", args=ARGS)
    exact = run_reference(case, case.build_model())
    rounded_model = case.build_model()
    for parameter in rounded_model.parameters():
        parameter.data = reference.split_master(parameter.data)[0].float()
    rounded = run_reference(case, rounded_model)
    assert any(not torch.equal(exact.masters[name], rounded.masters[name]) for name in exact.masters)
    assert exact.losses != rounded.losses


def _with_unit_norms(case: Case) -> torch.nn.Module:
    """Build the case's model with all norm weights exactly 1."""
    model = case.build_model()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
    return model


CONSTANT = {**ARGS, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}


def test_steps_too_small_for_bf16_move_the_master(tmp_path):
    # At 1, bf16 numbers are 2^-8 apart below and 2^-7 above, so steps of 1e-5 are lost on bf16 weights for good.
    case = Case("llama", args={**CONSTANT, "learning_rate": 1e-5})
    expected, _ = _assert_bits_of_reference(case, tmp_path, model_factory=lambda: _with_unit_norms(case))
    norms = [name for name in expected.weights if "norm" in name]
    assert norms
    for name in norms:
        assert (expected.weights[name] == 1.0).all(), name
        # A few come back to exactly 1 where their gradients have taken turns.
        assert (expected.masters[name] != 1.0).float().mean() > 0.9, name


def test_many_small_steps_add_up_in_the_weights(tmp_path):
    # No single step of 5e-4 changes a weight of 1 in bf16 (half a spacing is 2e-3); ten in one direction do, but
    # only if what each left behind was kept.
    case = Case("llama", args={**CONSTANT, "learning_rate": 5e-4}, dtype=torch.bfloat16)

    def moved(result: reference_loop.ReferenceResult) -> int:
        return sum((weight != 1.0).sum().item() for name, weight in result.weights.items() if "norm" in name)

    without_residual = run_reference(case, _with_unit_norms(case), keep_residual=False)
    assert moved(without_residual) == 0
    expected, _ = _assert_bits_of_reference(case, tmp_path, model_factory=lambda: _with_unit_norms(case))
    assert moved(expected) > 20
