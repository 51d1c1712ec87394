"""Layers that run twice, and several backwards before a step: one order and one dtype of the sum, wherever it is."""

import functools

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration, set_seed

from hf_slideformer import SlideConfig
from tests.engine.loop import assert_same_bits, batches, decide, prepare, tiny_llama

SETTINGS = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "attention_dropout": 0.0}


class Counter(nn.Module):
    """A projection that scales by what it has counted so far, and counts in the same forward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.seen += x.abs().mean().float()
        return self.inner(x) / (1 + self.seen.to(x.dtype))


def looped(dtype, *, counts=False):
    """A llama whose layers run twice in a forward, the second one a third time, as looped transformers do."""
    model = tiny_llama(dtype, num_hidden_layers=3, hidden_size=32, intermediate_size=48)
    layers = model.model.layers
    if counts:
        for layer in layers:
            layer.mlp.down_proj = Counter(layer.mlp.down_proj)
    model.model.layers = nn.ModuleList([*layers, *layers, layers[1]])
    model.config.num_hidden_layers = 7
    return model


def mixture(dtype):
    set_seed(0)
    config = MixtralConfig(
        **SETTINGS,
        intermediate_size=48,
        num_hidden_layers=3,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
    )
    return MixtralForCausalLM(config).to(dtype)


def encoder_decoder(dtype):
    set_seed(0)
    config = T5Config(
        vocab_size=96,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).to(dtype)


def shared(dtype):
    """A weight that two layers share."""
    model = tiny_llama(dtype, num_hidden_layers=3, hidden_size=32, intermediate_size=48)
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


MODELS = {
    "looped": (looped, 3),
    "looped, with buffers": (functools.partial(looped, counts=True), 3),
    "mixture of experts": (mixture, 3),
    "encoder-decoder": (encoder_decoder, 4),
    "shared weight": (shared, 3),
}


def once(run, tokens):
    return [run.model(input_ids=tokens, labels=tokens).loss]


def one_after_the_other(run, tokens):
    for row in tokens.split(1):
        yield run.model(input_ids=row, labels=row).loss


def both_forwards_first(run, tokens):
    return list(one_after_the_other(run, tokens))


def both_in_one_loss(run, tokens):
    first, second = one_after_the_other(run, tokens)
    return [first + 0.5 * second**2]


# How losses are differentiated, and whether the engine was told that a step has several backwards.
ORDERS = [
    (once, False),
    (once, True),
    (one_after_the_other, False),
    (one_after_the_other, True),
    (both_forwards_first, False),
    (both_in_one_loss, True),
]


def run_of(model, dtype, decisions, *, backwards, announced):
    bf16 = dtype == torch.bfloat16
    run = prepare(MODELS[model][0](dtype), bf16=bf16, decisions=decisions, accumulates=announced)
    return train_by(run, backwards)


def train_by(run, backwards, steps=2):
    run.model.train()
    for tokens in batches(steps):
        tokens, total = tokens.to(run.engine.device), 0.0
        for loss in backwards(run, tokens):
            loss.backward()
            total += loss.item()
        run.losses.append(total)
        run.norms.append(run.engine.clip_grad_norm_(run.model.parameters(), 0.1).item())
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.engine.synchronize()
    return run


@functools.cache
def plain(*how):
    """The model's own code under ordinary autograd: every unit stays on the device, with its activations."""
    model, dtype, backwards, announced = how
    units = MODELS[model][1]
    decisions = decide(resident=range(units), keep=range(units), units=units)
    return run_of(model, dtype, decisions, backwards=backwards, announced=announced)


@pytest.mark.parametrize(
    ("backwards", "announced"), ORDERS, ids=[f"{way.__name__}-{told}" for way, told in ORDERS]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("model", MODELS)
def test_placement_changes_no_bit(model, dtype, backwards, announced):
    units = MODELS[model][1]
    placements = (
        decide(units=units, resident=(0,), offload=range(1, units), slots=2, outside_state="RAM"),
        decide(units=units, keep=(1,), slots=2),
    )
    expected = plain(model, dtype, backwards, announced)
    assert min(expected.norms) > 0.1, "the test must clip"
    for decisions in placements:
        run = run_of(model, dtype, decisions, backwards=backwards, announced=announced)
        assert_same_bits(run, expected)


def test_gradients_that_wait_on_disk_are_summed_alike(tmp_path):
    expected = plain("looped", torch.bfloat16, one_after_the_other, False)
    decisions = decide(units=3, slots=2, on_disk=range(3), weights_on_disk=range(3))
    run = prepare(looped(torch.bfloat16), decisions=decisions, config=SlideConfig(nvme_dir=str(tmp_path)))
    assert_same_bits(train_by(run, one_after_the_other), expected)
