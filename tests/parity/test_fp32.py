"""In fp32 on the CPU, `SlideTrainer` produces what plain `Trainer` does.

Same seed, twenty steps, clipping that clips, two micro-batches a step, warm-up and cosine, weight decay with its
no-decay group, ragged samples with labels of -100, an evaluation every five steps: losses, gradient norms and
evaluation losses agree to 1e-5 relative, final weights to 1e-5 absolute.
"""

import functools
import re

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer

from hf_slideformer import SlideConfig, SlideTrainer

from . import harness
from .data import IGNORE
from .harness import Case
from .models import MODELS


@functools.cache
def _plain(case: Case) -> harness.RunResult:
    """Plain `Trainer`'s result, computed once for the tests that share a case."""
    return harness.run(Trainer, case)


def _assert_parity(case: Case) -> tuple[harness.RunResult, harness.RunResult]:
    """Run ``case`` both ways, fail unless they agree, and return (plain, slide)."""
    plain, slide = _plain(case), harness.run(SlideTrainer, case)
    harness.assert_same_run(plain, slide, case.spec)
    return plain, slide


# Long enough for warm-up, the cosine's bend, two epochs and two evaluations.
SHORT = dict(max_steps=10)

FAMILIES = {name: Case(name) for name in MODELS}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    plain, _ = _assert_parity(FAMILIES[name])
    harness.assert_clips(plain)
    assert len(plain.losses) == harness.STEPS
    assert len(plain.eval_losses) == harness.STEPS // 5


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_tied_embeddings(name):
    # Untied is the default of `MODELS` for all but gpt2, t5 and bart, so `test_family` covers it.
    case = Case(name, config={"tie_word_embeddings": True}, args={} if name == "llama" else SHORT)
    plain, slide = _assert_parity(case)
    for result in (plain, slide):
        assert torch.equal(result.weights["lm_head.weight"], result.weights["model.embed_tokens.weight"])


FOUR_LAYERS = {"num_hidden_layers": 4}

FROZEN = {
    # The input of the first trained layer then does not require gradients.
    "lower_half": Case("llama", config=FOUR_LAYERS, args=SHORT, frozen=r"embed_tokens|layers\.[01]\."),
    # Gradients pass through frozen layers, which have none of their own to hand on.
    "upper_half": Case("llama", config=FOUR_LAYERS, args=SHORT, frozen=r"layers\.[23]\."),
    "alternating": Case("qwen2", config=FOUR_LAYERS, args=SHORT, frozen=r"layers\.[02]\."),
    # Within one unit some parameters are trained and some are not.
    "within_layers": Case("llama", args=SHORT, frozen=r"k_proj|gate_proj|input_layernorm"),
    "dropout": Case("gpt2", config={"n_layer": 4}, args=SHORT, frozen=r"wte|wpe|h\.[01]\."),
    "encoder": Case("t5", args=SHORT, frozen=r"^encoder\.block"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters(name):
    case = FROZEN[name]
    plain, slide = _assert_parity(case)
    harness.assert_clips(plain)
    frozen = [key for key in slide.weights if re.search(case.frozen, key)]
    assert frozen
    for key in frozen:
        assert torch.equal(slide.weights[key], slide.initial[key]), key
    for key in slide.trained:
        assert not torch.equal(slide.weights[key], slide.initial[key]), key


VARIANTS = {
    # Without clipping and with one micro-batch a step, updates may run under the backward pass.
    "unclipped": Case(
        "llama",
        args=dict(
            max_grad_norm=0.0,
            gradient_accumulation_steps=1,
            lr_scheduler_type="constant",
            warmup_steps=0,
            **SHORT,
        ),
    ),
    "unclipped_accumulated": Case(
        "llama", args=dict(max_grad_norm=0.0, lr_scheduler_type="constant", warmup_steps=0, **SHORT)
    ),
    "one_micro_batch": Case("llama", args=dict(gradient_accumulation_steps=1, **SHORT)),
    "four_micro_batches": Case("llama", args=dict(gradient_accumulation_steps=4, max_steps=6)),
    # About the median norm: some steps are clipped and some must not be scaled at all.
    "sometimes_clipped": Case("llama", args=dict(max_grad_norm=4.1)),
    "label_smoothing": Case("llama", args=dict(label_smoothing_factor=0.1, **SHORT)),
    # Here the labels are not shifted, and the loss is computed from the logits outside the model too.
    "label_smoothing_classification": Case("bert", args=dict(label_smoothing_factor=0.1, **SHORT)),
    # Eleven micro-batches, the last of one sample: each epoch ends with half an accumulation group.
    "incomplete_group": Case("llama", args=SHORT, samples=21),
    # bert does not count label tokens, so the loss is divided by the number of micro-batches actually taken.
    "incomplete_group_classification": Case("bert", args=SHORT, samples=21),
    "betas_and_epsilon": Case(
        "llama", args=dict(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, **SHORT)
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    _assert_parity(VARIANTS[name])


def test_sometimes_clipped_case_clips_sometimes():
    norms = _plain(VARIANTS["sometimes_clipped"]).grad_norms
    assert 4 <= sum(norm > 4.1 for norm in norms) <= len(norms) - 4


# 5.23 calls the argument `activation_checkpointing`; the name that 5.17 knows still works in both.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name):
    # The layers are recomputed anyway; asking for it too must not change anything.
    plain, _ = _assert_parity(Case(name, args=dict(gradient_checkpointing=True, **SHORT)))
    assert len(plain.losses) == SHORT["max_steps"]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "t5"])
def test_cache_left_on(name):
    # A layer that is run again in backward appends its keys a second time: the loss stays right, gradients do not.
    case = Case(name, args=dict(use_cache=True, **SHORT))

    def check(trainer):
        assert trainer.model.config.use_cache

    results = [harness.run(cls, case, before_training=check) for cls in (Trainer, SlideTrainer)]
    harness.assert_same_run(*results, case.spec)


NO_DECAY = {
    "llama": r"norm",
    "gpt2": r"ln_|bias",
}


@pytest.mark.parametrize("name", NO_DECAY)
def test_no_decay_group(name):
    # At this weight decay a step shrinks a decayed parameter by up to 2 %, a thousand times what is tolerated.
    case = Case(name, args=dict(weight_decay=20.0))
    plain, slide = _assert_parity(case)
    spared = [key for key in slide.trained if re.search(NO_DECAY[name], key)]
    decayed = sorted(slide.trained - set(spared))
    assert spared
    for key in decayed:
        assert slide.weights[key].norm() < 0.9 * slide.initial[key].norm(), key
    for key in spared:
        # Twenty steps of Adam cannot move it further than the sum of the learning rates.
        moved = (slide.weights[key] - slide.initial[key]).abs().max().item()
        assert 0 < moved < 1.1 * sum(plain.learning_rates), key


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = (
        prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    )
    counted = prediction.label_ids != IGNORE
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids)[counted].mean())}


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_predict_before_training(name):
    case = Case(name, args=SHORT)
    outputs = []

    def predict(trainer):
        outputs.append(trainer.predict(trainer.eval_dataset))

    plain, slide = (
        harness.run(
            cls,
            case,
            before_training=predict,
            trainer_kwargs={"compute_metrics": _accuracy},
            prediction_loss_only=False,
        )
        for cls in (Trainer, SlideTrainer)
    )
    harness.assert_same_run(plain, slide, case.spec)
    plain_output, slide_output = outputs
    assert np.array_equal(plain_output.label_ids, slide_output.label_ids)
    flat_plain, flat_slide = (
        output.predictions if isinstance(output.predictions, tuple) else (output.predictions,)
        for output in outputs
    )
    assert len(flat_plain) == len(flat_slide)
    for expected, actual in zip(flat_plain, flat_slide, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    for metric in ("test_accuracy", "test_loss"):
        assert slide_output.metrics[metric] == pytest.approx(plain_output.metrics[metric], rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_evaluate_around_training(name):
    # Evaluations have forward passes without backward passes, before anything was trained too, and must not count
    # as one of a step's.
    case = Case(name, args=SHORT)
    evaluated = []

    def evaluate(trainer):
        evaluated.append(trainer.evaluate()["eval_loss"])

    plain, slide = (
        harness.run(cls, case, before_training=evaluate, after_training=evaluate)
        for cls in (Trainer, SlideTrainer)
    )
    harness.assert_same_run(plain, slide, case.spec)
    assert harness.relative_difference(evaluated[:2], evaluated[2:]) <= 1e-5
    assert evaluated[0] > evaluated[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_overlapped_and_deferred_updates_agree_in_bits(name):
    case = Case(name, args=dict(max_grad_norm=0.0, gradient_accumulation_steps=1, **SHORT))
    overlapped, deferred = (
        harness.run(SlideTrainer, case, trainer_kwargs={"slide_config": SlideConfig(update=update)})
        for update in ("overlapped", "deferred")
    )
    harness.assert_same_bits(overlapped, deferred)
    harness.assert_same_run(_plain(case), deferred, case.spec)
