"""What crosses the seam between the model's graph and a unit's own: shared weights, buffers, containers, requests."""

import copy
import inspect

import pytest
import torch
from torch import nn

from hf_slideformer import SlideConfig
from hf_slideformer.engine.model.setup import Setup
from hf_slideformer.errors import StateError, TransferError, UnsupportedModelError

from .loop import assert_same_bits, prepare, tiny_llama, train

TOKENS = torch.arange(32).view(2, 16) % 96


def loss_of(model, tokens=TOKENS):
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def plain_gradients(model):
    model = copy.deepcopy(model)
    loss_of(model).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def share_one_weight(model):
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def share_a_layer(model):
    model.model.layers[1] = model.model.layers[0]


@pytest.mark.parametrize("share", [share_one_weight, share_a_layer])
def test_weights_shared_between_layers_get_all_their_gradients(share):
    model = tiny_llama(torch.float32)
    share(model)
    expected = plain_gradients(model)
    run = prepare(model, bf16=False)
    loss_of(model).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    before = run.engine.states[1].read_master().clone()
    run.optimizer.step()
    run.engine.synchronize()
    assert not torch.equal(before, run.engine.states[1].read_master())


@pytest.mark.parametrize("update", ["deferred", "overlapped"])
def test_autograd_grad_leaves_parameters_alone(update):
    run = prepare(tiny_llama(torch.float32), bf16=False, config=SlideConfig(update=update))
    before = {state.name: state.read_master().clone() for state in run.engine.states}
    embedded = run.model.model.embed_tokens(TOKENS).detach().requires_grad_()
    loss = run.model(inputs_embeds=embedded, labels=TOKENS, use_cache=False).loss
    (grad,) = torch.autograd.grad(loss, [embedded])
    assert grad.abs().sum() > 0
    run.engine.synchronize()
    for state in run.engine.states:
        assert state.param.grad is None, state.name
        assert torch.equal(before[state.name], state.read_master()), state.name


@pytest.mark.parametrize("change", ["step", "write"])
def test_a_backward_of_a_forward_from_before_a_change_is_refused(change):
    run = prepare(tiny_llama())
    first, second = loss_of(run.model), loss_of(run.model, TOKENS.flip(0))
    first.backward()
    if change == "step":
        run.optimizer.step()
        run.optimizer.zero_grad()
    else:
        with torch.no_grad():
            run.model.model.layers[5].mlp.up_proj.weight.mul_(2)
    with pytest.raises((StateError, RuntimeError), match="changed between its forward|inplace operation"):
        second.backward()


def test_running_statistics_are_written_once():
    def with_statistics():
        model = tiny_llama(torch.float32)
        for layer in model.model.layers:
            layer.mlp = nn.Sequential(layer.mlp, _Statistics(64))
        return model

    plain = with_statistics().train()
    loss_of(plain).backward()
    run = prepare(with_statistics().train(), bf16=False)
    loss_of(run.model).backward()
    buffers = dict(run.model.named_buffers())
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-6, atol=1e-7, msg=name)


class _Statistics(nn.BatchNorm1d):
    def forward(self, hidden):
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


def test_a_container_that_a_layer_adds_to_is_refused():
    model = tiny_llama()
    store: dict = {}
    original = model.model.layers[3].forward

    def forward(*args, found=store, **kwargs):
        found["hidden"] = args[0]
        return original(*args, **kwargs)

    model.model.layers[3].forward = forward
    layer = model.model.layers[3]
    prepare(model)
    hidden = torch.zeros(1, 4, 64, dtype=torch.bfloat16, requires_grad=True)
    rope = model.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.3 adds to a dictionary"):
        layer(hidden, position_embeddings=rope, found=store)


def test_a_filled_cache_under_grad_is_refused():
    run = prepare(tiny_llama())
    with torch.no_grad():
        cache = run.model(input_ids=TOKENS, use_cache=True).past_key_values
    # 5.24 calls the argument `cache`; versions before it know that as nothing.
    name = "cache" if "cache" in inspect.signature(run.model.forward).parameters else "past_key_values"
    with pytest.raises(UnsupportedModelError, match="DynamicCache that already holds 16 positions"):
        run.model(input_ids=TOKENS, labels=TOKENS, **{name: cache})


def test_a_closed_engine_says_so_and_does_not_hang():
    run = prepare(tiny_llama())
    run.engine.close()
    with pytest.raises(TransferError, match="closed"):
        loss_of(run.model)


def test_a_second_optimizer_starts_with_fresh_moments():
    from hf_slideformer import SlideAdamW

    run = train(prepare(tiny_llama()), 2)
    fresh = prepare(copy.deepcopy(run.model))
    second = SlideAdamW(run.model.parameters(), lr=1e-3)
    run.engine.attach_optimizer(second)
    run.optimizer = second
    fresh.optimizer = SlideAdamW(fresh.model.parameters(), lr=1e-3)
    fresh.engine.attach_optimizer(fresh.optimizer)
    # The copy rounded its masters to bf16; so does this.
    run.engine.weights_changed()
    run.losses, run.norms = [], []
    assert train(run, 2).losses == train(fresh, 2).losses


def test_a_refused_second_optimizer_changes_nothing():
    from hf_slideformer import SlideAdamW

    run = train(prepare(tiny_llama()), 2)
    other = SlideAdamW(tiny_llama().parameters())
    with pytest.raises(UnsupportedModelError, match="not in the prepared model"):
        run.engine.attach_optimizer(other)
    assert_same_bits(train(run, 2), train(train(prepare(tiny_llama()), 2), 2))


def test_other_settings_on_a_prepared_model_are_refused():
    run = prepare(tiny_llama())
    with pytest.raises(StateError, match="accumulates=False and is now wanted with True"):
        run.engine.check_setup(
            Setup(
                device=run.engine.device,
                bf16=True,
                config=SlideConfig(),
                micro_batches=2,
                overlap_is_exact=False,
            )
        )
