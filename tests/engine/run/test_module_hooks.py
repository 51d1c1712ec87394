"""Hooks on modules of streamed layers: what passes through them, how often they run, and what is refused."""

import pytest

from hf_slideformer.errors import StateError, UnsupportedModelError
from tests.trainer import runs

HOOKS = {
    "register_forward_hook": lambda module, args, output: output * 1.5,
    "register_forward_pre_hook": lambda module, args: (args[0] * 1.5, *args[1:]),
    "register_full_backward_hook": lambda module, grad_input, grad_output: tuple(
        None if grad is None else grad * 1.5 for grad in grad_input
    ),
    "register_full_backward_pre_hook": lambda module, grad_output: tuple(grad * 1.5 for grad in grad_output),
}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "layer"])
@pytest.mark.parametrize("kind", HOOKS)
def test_what_a_hook_changes_is_changed(kind, inside):
    def trained(make):
        model, calls = runs.llama(), []
        layer = model.model.layers[1]

        def hook(*args):
            calls.append(1)
            return HOOKS[kind](*args)

        getattr(layer.mlp.up_proj if inside else layer, kind)(hook)
        loop = make(model)
        for tokens in runs.batches(2):
            loop.loss(tokens).backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        return loop.weights(), len(calls)

    ours, theirs = trained(runs.slide_loop), trained(runs.plain_loop)
    runs.assert_same_weights(ours[0], theirs[0])
    recomputed = inside and "forward" in kind
    assert ours[1] == theirs[1] * (2 if recomputed else 1)


def losses_on(taken):
    """A loss with a term on what `taken` puts into a list in forward."""

    def run(make):
        model, found = runs.llama(), []
        taken(model.model.layers[1], found)
        loop = make(model)
        loss = loop.loss(runs.batches(1)[0]) + found[0].square().mean()
        loss.backward()
        return {name: param.grad.clone() for name, param in model.named_parameters()}

    return run


def test_a_loss_on_the_output_of_a_layer():
    run = losses_on(lambda layer, found: layer.register_forward_hook(lambda m, a, out: found.append(out)))
    runs.assert_same_weights(run(runs.slide_loop), run(runs.plain_loop))


@pytest.mark.parametrize("part", ["mlp", "self_attn.q_proj"])
def test_a_loss_on_something_inside_a_layer_is_refused(part):
    def take(layer, found):
        layer.get_submodule(part).register_forward_hook(lambda m, a, out: found.append(out))

    with pytest.raises(StateError, match=r"layers\.1 was used outside .*through the layer's outputs"):
        losses_on(take)(runs.slide_loop)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_that_come_later_are_refused(kind):
    loop = runs.slide_loop()
    getattr(loop.model.model.layers[2].mlp.up_proj.weight, kind)(lambda grad: None)
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.up_proj\.weight has a gradient hook"):
        loop.loss(runs.batches(1)[0])
