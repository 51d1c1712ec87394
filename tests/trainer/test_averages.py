"""Averages of weights that somebody keeps beside training, under `bf16` on weights that came in as fp32.

An average must move with the exact weights: at this learning rate a whole run is smaller than the rounding to bf16.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback
from trl import BEMACallback

from hf_slideformer import SlideTrainer

from . import runs

LEARNING_RATE = 1e-5
STEPS = 4


def exact(trainer):
    """The weights as they are saved, by a way that does not pass through parameters."""
    return {name: value.clone() for name, value in trainer.accelerator.get_state_dict(trainer.model).items()}


class Recorder(TrainerCallback):
    """Keeps the exact weights of every step, and whatever a callback under test keeps."""

    def __init__(self):
        self.trainer = None
        self.steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(exact(self.trainer))

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(exact(self.trainer))


def train(trainer_class, tmp_path, callback, **overrides):
    recorder = Recorder()
    recorder.trainer = runs.make(
        trainer_class,
        runs.llama(),
        tmp_path,
        bf16=True,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        trainer_kwargs={"callbacks": [recorder, callback]},
        **overrides,
    )
    recorder.trainer.train()
    return recorder


class Averaged(TrainerCallback):
    """torch's averaged model, which copies the model and reads `p.detach()`."""

    def __init__(self, **how):
        self.how = how
        self.average = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = AveragedModel(model, **self.how)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


def by_hand(steps, decay):
    """What `Averaged` is to hold: the first update copies."""
    average = dict(steps[1])
    for count, weights in enumerate(steps[2:], start=1):
        share = 1 - decay if decay is not None else 1 / (count + 1)
        average = {name: average[name].lerp(weights[name], share) for name in average}
    return average


@pytest.mark.parametrize(
    ("how", "decay"),
    [
        ({}, None),
        ({"use_buffers": True}, None),
        ({"multi_avg_fn": get_ema_multi_avg_fn(0.5)}, 0.5),
        ({"avg_fn": lambda average, current, _: average.lerp(current, 0.25), "device": "cpu"}, 0.75),
    ],
)
def test_averaged_models(tmp_path, how, decay):
    averaged, plain = Averaged(**how), Averaged(**how)
    recorder = train(SlideTrainer, tmp_path / "slide", averaged)
    train(Trainer, tmp_path / "plain", plain)
    start, expected = recorder.steps[0], by_hand(recorder.steps, decay)
    found, theirs = averaged.average.module.state_dict(), plain.average.module.state_dict()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=0, atol=5e-7, msg=name)
        moved = (found[name] - start[name]).abs().max()
        assert 0 < moved <= 1.5 * (theirs[name] - start[name]).abs().max() <= 1.5 * STEPS * LEARNING_RATE, (
            name
        )


class Shadow(TrainerCallback):
    """An average in a dictionary, evaluated in the place of the weights, which then come back."""

    def __init__(self, read, write):
        self.read, self.write = read, write
        self.shadow, self.evaluated, self.came_back = {}, [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.shadow = {name: self.read(param) for name, param in model.named_parameters()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, param in model.named_parameters():
            self.shadow[name] = (0.75 * self.shadow[name] + 0.25 * param.data).clone()
        before = exact(self.trainer)
        backup = {name: self.read(param) for name, param in model.named_parameters()}
        for name, param in model.named_parameters():
            self.write(param, self.shadow[name])
        self.evaluated.append(exact(self.trainer))
        loss = model(**self.batch).loss
        assert loss.isfinite()
        for name, param in model.named_parameters():
            self.write(param, backup[name])
        self.came_back.append(all(torch.equal(before[n], v) for n, v in exact(self.trainer).items()))


def _copy(param, value):
    param.copy_(value)


def _copy_data(param, value):
    param.data.copy_(value)


@pytest.mark.parametrize("write", [_copy, _copy_data])
@pytest.mark.parametrize(
    "read",
    [
        lambda param: param.detach().clone(),
        lambda param: param.data.clone(),
        lambda param: copy.deepcopy(param.detach().cpu()),
    ],
)
def test_an_average_in_a_dictionary(tmp_path, read, write):
    callback = Shadow(read, write)
    tokens = runs.batches(1)[0]
    callback.batch = {"input_ids": tokens, "labels": tokens}

    class WithTrainer(Recorder):
        def on_train_begin(self, args, state, control, **kwargs):
            callback.trainer = self.trainer

    recorder = WithTrainer()
    recorder.trainer = runs.make(
        SlideTrainer,
        runs.llama(),
        tmp_path,
        bf16=True,
        learning_rate=LEARNING_RATE,
        trainer_kwargs={"callbacks": [recorder, callback]},
    )
    recorder.trainer.train()
    assert callback.came_back == [True] * STEPS
    expected = {name: param.detach().clone() for name, param in runs.llama().named_parameters()}
    for weights, evaluated in zip(recorder.steps, callback.evaluated, strict=True):
        expected = {name: 0.75 * value + 0.25 * weights[name] for name, value in expected.items()}
        for name, value in expected.items():
            assert torch.equal(evaluated[name], value), name


def test_the_average_does_not_change_the_run(tmp_path):
    with_average = train(SlideTrainer, tmp_path / "with", Averaged())
    without = train(SlideTrainer, tmp_path / "without", TrainerCallback())
    for one, two in zip(with_average.steps, without.steps, strict=True):
        assert all(torch.equal(one[name], value) for name, value in two.items())


def test_trls_callback(tmp_path):
    settings = {"update_freq": 1, "update_after": 1, "device": "cpu"}
    recorder = train(SlideTrainer, tmp_path / "slide", BEMACallback(**settings))
    train(Trainer, tmp_path / "plain", BEMACallback(**settings))
    ours, theirs = (load_file(tmp_path / kind / "bema" / "model.safetensors") for kind in ("slide", "plain"))
    start, at_first = recorder.steps[:2]
    expected = {}
    ema = dict(at_first)
    for step, weights in enumerate(recorder.steps[2:], start=2):
        beta, alpha = (10 + step) ** -0.5, (10 + step) ** -0.2
        for name, value in weights.items():
            ema[name] = ema[name] * (1 - beta) + beta * value
            expected[name] = ema[name] + alpha * (value - at_first[name])
    for name, value in ours.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0, atol=5e-7, msg=name)
        moved = (value - start[name]).abs().max()
        assert 0 < moved <= 1.5 * (theirs[name] - start[name]).abs().max(), name
