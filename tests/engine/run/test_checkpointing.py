"""Gradient checkpointing that a script turns on itself: layers train as without it, and are recomputed once."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, set_seed

from hf_slideformer import SlideAccelerator, SlideTrainer
from hf_slideformer.engine.engine import engine_of
from tests.trainer import runs

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def enable(model, *, reentrant):
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    kwargs = {f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}}
    getattr(model, f"{name}_checkpointing_enable")(**kwargs)


def on_layers(model, *, reentrant):
    enable(model, reentrant=reentrant)
    flags = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in flags:
        module.gradient_checkpointing = False
    for layer in model.model.layers[1:3]:
        layer.gradient_checkpointing = True


def with_input_grads(model, *, reentrant):
    enable(model, reentrant=reentrant)
    model.enable_input_require_grads()


def as_for_quantized_bases(model, *, reentrant):
    kwargs = {"use_reentrant": reentrant}
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    model.requires_grad_(True)


WAYS = {
    "enabled": enable,
    "set_on_layers": on_layers,
    "input_grads": with_input_grads,
    "kbit": as_for_quantized_bases,
}


def trained(accelerator, way, when, *, reentrant):
    """Losses, weights, and how often each layer's projection ran."""
    loop = runs.plain_loop()
    calls = []
    loop.model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda *args: calls.append(1))
    if way is not None and when == "before":
        WAYS[way](loop.model, reentrant=reentrant)
    loop.model.train()
    model, optimizer = accelerator.prepare(loop.model, loop.optimizer)
    losses = []
    for step, tokens in enumerate(runs.batches(3)):
        if way is not None and when == "between" and step == 1:
            WAYS[way](model, reentrant=reentrant)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, runs.masters(model, engine_of(model)), len(calls)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize(
    ("way", "when"),
    [*((way, "before") for way in WAYS), ("enabled", "between"), ("set_on_layers", "between")],
)
def test_in_a_loop(way, when, reentrant):
    losses, weights, calls = trained(SlideAccelerator(cpu=True), way, when, reentrant=reentrant)
    without = trained(SlideAccelerator(cpu=True), None, when, reentrant=reentrant)
    assert losses == without[0]
    runs.assert_same_weights(weights, without[1], atol=0)
    assert calls == without[2] == 6  # forward and one recompute, of three steps


class Enable(TrainerCallback):
    """Turns it on when training begins, and again after each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        enable(model, reentrant=True)

    on_step_end = on_train_begin


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_in_a_callback(tmp_path, adapters):
    def train(trainer_class):
        model = runs.llama()
        model.enable_input_require_grads()
        if adapters:
            torch.manual_seed(3)
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        trainer = runs.make(trainer_class, model, tmp_path, trainer_kwargs={"callbacks": [Enable()]})
        trainer.train()
        return trainer

    runs.assert_same_logs(train(SlideTrainer), train(Trainer))


def test_encoder_and_decoder():
    set_seed(2)
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    tokens = runs.batches(1)[0]

    def gradients(model, accelerator, *, checkpointing):
        model.train()
        if checkpointing:
            enable(model, reentrant=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        return {name: param.grad.clone() for name, param in model.named_parameters()}

    # Plain reentrant checkpointing loses gradients of what is handed over by keyword, the encoder's output here.
    theirs = gradients(copy.deepcopy(model), Accelerator(cpu=True), checkpointing=False)
    ours = gradients(model, SlideAccelerator(cpu=True), checkpointing=True)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_modules_outside_of_layers_keep_their_flag(caplog):
    accelerator = SlideAccelerator(cpu=True)
    loop = runs.plain_loop()
    outside = nn.Linear(2, 2)
    outside.gradient_checkpointing = True
    loop.model.outside = outside
    loop.optimizer.add_param_group({"params": list(outside.parameters())})
    model, _ = accelerator.prepare(loop.model, loop.optimizer)
    enable(model, reentrant=False)
    tokens = runs.batches(1)[0]
    with caplog.at_level("INFO"):
        for _ in range(2):
            with torch.no_grad():
                model(input_ids=tokens)
    assert outside.gradient_checkpointing and model.model.gradient_checkpointing
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    assert caplog.text.count("switched off in streamed layers") == 1
