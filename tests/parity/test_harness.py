"""The comparison itself fails on the mistakes that it is there to find.

Each test breaks plain `Trainer` on purpose, in the way in which streaming, clipping or the optimizer could be wrong
without any error, and checks that the harness sees it.
"""

import functools

import pytest
import torch
from transformers import Trainer

from . import harness
from .harness import Case
from .models import MODELS, build

LLAMA, MIXTRAL = Case("llama"), Case("mixtral")


@functools.cache
def _plain(case: Case) -> harness.RunResult:
    return harness.run(Trainer, case)


def _assert_detected(case: Case, broken: harness.RunResult, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        harness.assert_same_run(_plain(case), broken, case.spec)


def test_a_run_equals_itself():
    harness.assert_same_bits(_plain(LLAMA), harness.run(Trainer, LLAMA))


def test_another_implementation_of_adamw_is_within_tolerance():
    # What the tolerance is for: the same update with its operations in another order.
    other = harness.run(Trainer, LLAMA, optim="adamw_torch")
    harness.assert_same_run(_plain(LLAMA), other, LLAMA.spec)


def test_missing_clipping_is_detected():
    _assert_detected(LLAMA, harness.run(Trainer, LLAMA, max_grad_norm=1e9), "losses differ")


def test_clipping_of_each_micro_batch_is_detected():
    class ClipsTooEarly(Trainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss

    _assert_detected(LLAMA, harness.run(ClipsTooEarly, LLAMA), "differ")


def test_decayed_norms_are_detected():
    class DecaysEverything(Trainer):
        def get_decay_parameter_names(self, model):
            return [name for name, _ in model.named_parameters()]

    _assert_detected(LLAMA, harness.run(DecaysEverything, LLAMA), "differ")


def test_lost_auxiliary_gradient_is_detected():
    class LosesAuxiliaryGradient(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            auxiliary = model.router_aux_loss_coef * outputs.aux_loss
            loss = loss - auxiliary + auxiliary.detach()
            return (loss, outputs) if return_outputs else loss

    broken = harness.run(LosesAuxiliaryGradient, MIXTRAL)
    # The value of the loss before the first update is right: only the gradient is missing.
    assert broken.losses[0] == pytest.approx(_plain(MIXTRAL).losses[0], rel=1e-6)
    _assert_detected(MIXTRAL, broken, "differ")


def test_layer_read_before_its_update_is_detected():
    class ReadsStaleLayer(Trainer):
        """Runs layer 1 with the weights that it had one optimizer step earlier."""

        _step = -1

        def training_step(self, model, *args, **kwargs):
            layer = list(model.model.layers[1].parameters())
            if self.state.global_step != self._step:
                self._step = self.state.global_step
                self._stale = getattr(self, "_now", [p.detach().clone() for p in layer])
                self._now = [p.detach().clone() for p in layer]
            for parameter, stale in zip(layer, self._stale, strict=True):
                parameter.data.copy_(stale)
            loss = super().training_step(model, *args, **kwargs)
            for parameter, now in zip(layer, self._now, strict=True):
                parameter.data.copy_(now)
            return loss

    _assert_detected(LLAMA, harness.run(ReadsStaleLayer, LLAMA), "losses differ")


def test_other_dropout_is_detected():
    case = Case("gpt2")

    class UsesAnotherRandomNumber(Trainer):
        def training_step(self, *args, **kwargs):
            torch.rand(1)
            return super().training_step(*args, **kwargs)

    _assert_detected(case, harness.run(UsesAnotherRandomNumber, case), "losses differ")


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.zero_gradient])
def test_parameters_said_to_have_no_gradient_have_none(name):
    # `assert_same_run` compares these loosely, so that must be justified: without dropout, which depends on nothing
    # here, the gradient is rounding noise.
    spec = MODELS[name]
    from . import data

    model = build(name).eval()
    samples = data.make_dataset(spec.task, 4, seed=3)
    model(**data.collate([samples[index] for index in range(4)])).loss.backward()
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters())
    affected = {key: p.grad for key, p in model.named_parameters() if spec.has_zero_gradient(key)}
    assert affected
    for key, gradient in affected.items():
        assert spec.zero_gradient_part(gradient).abs().max().item() < 1e-6 * largest, key
