"""Gradients that take an unusual way: nested backwards, penalties on weights, tensors past a layer's arguments."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_slideformer import (
    SlideAccelerator,
    SlideAdamW,
    SlideConfig,
    SlideFormerPlugin,
)
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.model.setup import Setup
from hf_slideformer.errors import StateError, UnsupportedModelError
from tests.engine.loop import decide


class Layer(GradientCheckpointingLayer):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x, *extra, **more):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Layers between a projection and a loss; `around` says how they are run."""

    def __init__(self, layer=Layer, around=None, layers=5):
        super().__init__()
        self.inp = nn.Linear(16, 16)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.around = around

    def forward(self, x):
        x = self.inp(x)
        if self.around is not None:
            return self.around(self, x).pow(2).mean()
        return self.run(x, 0, len(self.layers)).pow(2).mean()

    def run(self, x, first, last):
        for layer in self.layers[first:last]:
            x = layer(x)
        return x


def stream(model, config=None, decisions=None, device="cpu", **settings):
    setup = Setup(device=torch.device(device), bf16=False, config=config or SlideConfig(), **settings)
    engine = SlideEngine(model, setup, decisions=decisions)
    optimizer = SlideAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine.attach_optimizer(optimizer)
    return engine, optimizer


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(ours, plain):
    assert ours.keys() == plain.keys()
    for name, grad in plain.items():
        assert (grad is None) == (ours[name] is None), name
        if grad is not None:
            torch.testing.assert_close(ours[name], grad, rtol=1e-6, atol=1e-7, msg=name)


def make(build, seed=0):
    torch.manual_seed(seed)
    return build()


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))

# -- backwards inside of backwards -------------------------------------------------------------------------------


def whole(model, x):
    return checkpoint(model.run, x, 0, 5, use_reentrant=True)


def halves(model, x):
    x = checkpoint(model.run, x, 0, 2, use_reentrant=True)
    return checkpoint(model.run, x, 2, 5, use_reentrant=True)


def nested(model, x):
    def outer(x):
        return model.run(checkpoint(model.run, model.run(x, 0, 1), 1, 3, use_reentrant=True), 3, 4)

    return model.run(checkpoint(outer, x, use_reentrant=True), 4, 5)


def same_layers_in_and_out(model, x):
    return model.run(checkpoint(model.run, model.run(x, 2, 3), 0, 5, use_reentrant=True), 1, 4)


class _Pass(torch.autograd.Function):
    """Differentiates a graph of its own in its backward, as hand-written checkpointing does."""

    @staticmethod
    def forward(ctx, x, model):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.out = model.run(ctx.x, 0, 3)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, grad):
        torch.autograd.backward(ctx.out, grad)
        return ctx.x.grad, None


def by_hand(model, x):
    return model.run(_Pass.apply(x, model), 3, 5)


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad:UserWarning"
)  # torch's, in the outer forward
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("around", [whole, halves, nested, same_layers_in_and_out, by_hand])
def test_backward_inside_a_backward(around, micro_batches):
    plain, ours = (make(lambda: Model(around=around)) for _ in range(2))
    stream(ours, micro_batches=micro_batches)
    for model in (plain, ours):
        for part in X.split(4 // micro_batches):
            model(part).backward()
    assert_same_gradients(gradients(ours), gradients(plain))


def test_backward_that_raised_is_not_taken_for_an_outer_one():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("boom")

    def broken(model, x):
        return model.run(Breaks.apply(model.run(x, 0, 2)), 2, 5)

    plain, ours = (make(lambda: Model(around=broken)) for _ in range(2))
    engine, _ = stream(ours)
    with pytest.raises(RuntimeError, match="boom"):
        ours(X).backward()
    engine.reset()
    for model in (plain, ours):
        model.around = None
        model(X).backward()
    assert_same_gradients(gradients(ours), gradients(plain))
    assert not engine.gradients._backwards


def test_overlapped_updates_of_layers_that_are_checkpointed_together():
    runs = []
    for update in ("deferred", "overlapped"):
        model = make(lambda: Model(around=halves))
        engine, optimizer = stream(model, SlideConfig(update=update))
        for _ in range(2):
            model(X).backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.synchronize()
        runs.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


# -- gradients that reach a weight past its layer ------------------------------------------------------------------


def l2(model):
    return sum(p.pow(2).sum() for p in model.parameters())


def orthogonality(model):
    weight = model.layers[1].up.weight
    return (weight.T @ weight - torch.eye(16)).pow(2).sum()


@pytest.mark.parametrize("penalty", [l2, orthogonality])
@pytest.mark.parametrize("separately", [False, True])
def test_penalty_on_weights(penalty, separately):
    def backward(model):
        if separately:
            penalty(model).backward()
            model(X).backward()
        else:
            (model(X) + penalty(model)).backward()

    plain, ours, overlapped = (make(Model) for _ in range(3))
    stream(ours)
    for model in (plain, ours):
        backward(model)
    assert_same_gradients(gradients(ours), gradients(plain))
    stream(overlapped, SlideConfig(update="overlapped"))
    with pytest.raises(StateError, match=r"got a gradient past its layer.*update='deferred'"):
        backward(overlapped)


def test_penalty_after_the_backward_of_overlapped_updates_is_seen_by_step():
    model = make(Model)
    _, optimizer = stream(model, SlideConfig(update="overlapped"))
    model(X).backward()
    l2(model).backward()
    with pytest.raises(StateError, match="got a gradient past its layer"):
        optimizer.step()


# -- tensors that reach a layer past its arguments -------------------------------------------------------------------


@dataclass
class Extra:
    shift: torch.Tensor


class Scaled(Layer):
    scaling = None

    def forward(self, x, extra=None):
        out = super().forward(x)
        if self.scaling is not None:
            out = out * self.scaling
        return out if extra is None else out + extra.shift


class Gated(Model):
    """Hands a gate to its layers in the way that `hand` says."""

    def __init__(self, hand):
        super().__init__(Scaled)
        self.gate = nn.Linear(16, 1)
        self.hand = hand

    def run(self, x, first, last):
        gate = torch.sigmoid(self.gate(x))
        for layer in self.layers[first:last]:
            x = self.hand(layer, x, gate)
        return x


def as_attribute(layer, x, gate):
    layer.scaling = gate
    return layer(x)


def in_an_object(layer, x, gate):
    return layer(x, extra=Extra(gate))


def in_a_closure(layer, x, gate):
    layer.up.forward = lambda value: nn.functional.linear(value, layer.up.weight * gate.mean(), layer.up.bias)
    return layer(x)


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("hand", [as_attribute, in_an_object, in_a_closure])
def test_gradient_past_the_arguments_is_refused(hand, activations):
    model = make(lambda: Gated(hand))
    stream(model, SlideConfig(activations=activations))
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0 uses a tensor with a gradient .* as an argument"
    ):
        model(X)


def test_it_is_refused_in_whichever_forward_it_comes():
    model = make(lambda: Gated(lambda layer, x, gate: layer(x)))
    stream(model)
    model(X).backward()
    model.hand = as_attribute
    with pytest.raises(UnsupportedModelError, match="as an argument"):
        model(X)


@pytest.mark.parametrize("hand", [as_attribute, in_an_object])
def test_it_is_refused_where_the_layer_itself_is_frozen(hand):
    # Nothing else of these layers has a gradient.
    model = make(lambda: Gated(hand))
    for part in (model.inp, model.layers):
        part.requires_grad_(False)
    stream(model)
    with pytest.raises(UnsupportedModelError, match="as an argument"):
        model(X)


def test_a_tensor_without_a_gradient_may_come_in_any_way():
    def hand(layer, x, gate):
        layer.scaling = torch.full((4, 1), 0.5)
        return layer(x, extra=Extra(torch.ones(16)))

    plain, ours = (make(lambda: Gated(hand)) for _ in range(2))
    stream(ours)
    for model in (plain, ours):
        model(X).backward()
    assert_same_gradients(gradients(ours), gradients(plain))


def its_input(layer, args):
    layer.taken = args[0]


def its_weight(layer, args):
    layer.taken = layer.up.weight


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("take", [its_input, its_weight])
@pytest.mark.parametrize("inner", [False, True])
def test_what_a_hook_takes_out_of_a_layer_may_not_be_used_in_the_loss(take, activations, inner):
    model = make(Model)
    layer = model.layers[2]
    if inner:  # inside the layer, where its stand-ins are
        layer.up.register_forward_pre_hook(lambda _, args: take(layer, args))
    else:
        layer.register_forward_pre_hook(take)
    stream(model, SlideConfig(activations=activations))
    loss = model(X)
    assert layer.taken.requires_grad
    if not inner and take is its_input:  # comes from the model's own graph
        (loss + layer.taken.sum()).backward()
        return
    if not inner:  # the model's own parameter
        (loss + layer.taken.sum()).backward()
        assert layer.up.weight.grad is not None
        return
    with pytest.raises(StateError):
        (loss + layer.taken.sum()).backward()


# -- layers that run a part of themselves again ---------------------------------------------------------------------


class Checkpointed(Layer):
    """Its weights must be the device's whenever its code runs."""

    def inner(self, x):
        self.found.append(self.up.weight.data_ptr())
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x):
        self.__dict__.setdefault("found", [])
        return x + checkpoint(self.inner, x, use_reentrant=False)


class Tiled(Checkpointed):
    def forward(self, x):
        self.__dict__.setdefault("found", [])
        return x + torch.cat([checkpoint(self.inner, part, use_reentrant=False) for part in x.split(2)])


@pytest.mark.parametrize("activations", ["recompute", "keep", "offload"])
@pytest.mark.parametrize("layer", [Checkpointed, Tiled])
def test_a_layer_that_checkpoints_a_part_of_itself(layer, activations):
    plain, ours = (make(lambda: Model(layer)) for _ in range(2))
    every = range(5)
    decisions = decide(
        units=5,
        keep=every if activations == "keep" else (),
        offload=every if activations == "offload" else (),
        slots=2,
    )
    stream(ours, decisions=decisions)
    for model in (plain, ours):
        model(X).backward()
    assert_same_gradients(gradients(ours), gradients(plain))
    for part in ours.layers:
        assert len(part.found) >= 2
        assert part.up.weight.data_ptr() not in part.found, "ran on the host's weights"


# -- what layers write on themselves --------------------------------------------------------------------------------


class Writes(Layer):
    """Scales by what it keeps of its inputs, which it updates first."""

    def __init__(self, write):
        super().__init__()
        self.register_buffer("top", torch.ones(()))
        self.register_buffer("large", torch.ones(2**15))  # 128 KiB
        self.seen = torch.ones(())
        self.calls = 0
        self.write = write

    def forward(self, x):
        with torch.no_grad():
            scale = self.write(self, x.abs().max())
        return super().forward(x) * scale


def in_place(layer, top):
    return layer.top.mul_(0.5).add_(0.5 * top).clone()


def replaced(layer, top):
    layer.top = 0.5 * layer.top + 0.5 * top
    return layer.top


def through_data(layer, top):
    layer.top.data.mul_(0.5).add_(0.5 * top)
    return layer.top.clone()


def large_through_data(layer, top):
    layer.large.data.mul_(0.5).add_(0.5 * top)
    return layer.large.mean()


def a_tensor_that_is_no_buffer(layer, top):
    layer.seen.mul_(0.5).add_(0.5 * top)
    return layer.seen.clone()


def a_number(layer, top):
    layer.calls += 1
    return 1 / layer.calls


def made_by_the_first_forward(layer, top):
    if not hasattr(layer, "late"):
        layer.late = torch.zeros(())
        return 0.25
    return 1.0


WAYS = [
    in_place,
    replaced,
    through_data,
    large_through_data,
    a_tensor_that_is_no_buffer,
    a_number,
    made_by_the_first_forward,
]


def state_of(layer):
    return [
        layer.top,
        layer.large,
        layer.seen,
        torch.tensor(layer.calls),
        torch.tensor(hasattr(layer, "late")),
    ]


@pytest.mark.parametrize("activations", ["recompute", "keep", "offload"])
@pytest.mark.parametrize("write", WAYS)
def test_recompute_starts_from_the_layer_as_it_was(write, activations):
    plain, ours = (make(lambda: Model(lambda: Writes(write))) for _ in range(2))
    every = range(5)
    decisions = decide(
        units=5,
        keep=every if activations == "keep" else (),
        offload=every if activations == "offload" else (),
        slots=2,
    )
    stream(ours, decisions=decisions, micro_batches=2)
    for model in (plain, ours):
        model(X[:2]).backward()
        first, second = model(X[:2]), model(X[2:])  # two forwards before their backwards
        (first + second).backward()
        model.losses = [first.item(), second.item()]
    assert ours.losses == plain.losses
    assert_same_gradients(gradients(ours), gradients(plain))
    for mine, theirs in zip(ours.layers, plain.layers, strict=True):
        for one, two in zip(state_of(mine), state_of(theirs), strict=True):
            assert torch.equal(one, two)


# -- clipping together with others ------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield SlideAccelerator(cpu=True, slideformer_plugin=SlideFormerPlugin({}))
    AcceleratorState._reset_state(reset_partial_state=True)


def clipped(models, others, accelerator, max_norm, accumulated):
    """Norm and resulting weights and gradients of one step with a joint clip."""
    optimizers = [torch.optim.SGD(other.parameters(), lr=1.0) for other in others]
    clip = torch.nn.utils.clip_grad_norm_
    own = [torch.optim.AdamW(model.parameters(), lr=1e-2, eps=0.1) for model in models]
    if accelerator is not None:
        clip = accelerator.clip_grad_norm_
        own = [accelerator.prepare(model, optimizer)[1] for model, optimizer in zip(models, own, strict=True)]
    for part in X.split(2) if accumulated else [X]:
        loss = sum(model(part) for model in models) + sum(100 * other(part).pow(2).mean() for other in others)
        loss.backward()
    norm = clip([p for module in (*models, *others) for p in module.parameters()], max_norm)
    for optimizer in (*own, *optimizers):
        optimizer.step()
    if accelerator is not None:
        for model in models:
            accelerator.unwrap_model(model)
    return float(norm), [p.detach().clone() for module in (*models, *others) for p in module.parameters()]


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("max_norm", [1.0, 1e9, float("inf")])
@pytest.mark.parametrize(("models", "others"), [(1, 1), (2, 0), (2, 2)])
def test_the_joint_norm_of_models_and_others(accelerator, models, others, max_norm, accumulated):
    def build():
        torch.manual_seed(1)
        return [Model(layers=3) for _ in range(models)], [nn.Linear(16, 1) for _ in range(others)]

    plain = clipped(*build(), None, max_norm, accumulated)
    ours = clipped(*build(), accelerator, max_norm, accumulated)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    for one, two in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_a_sparse_gradient_counts_too(accelerator):
    def run(accelerator):
        torch.manual_seed(2)
        model, table = Model(layers=2), nn.Embedding(8, 16, sparse=True)
        optimizer, clip = torch.optim.AdamW(model.parameters()), None
        if accelerator is not None:
            accelerator.prepare(model, optimizer)
            clip = accelerator.clip_grad_norm_
        model(X + table(torch.tensor([1, 2, 3, 4]))).backward()
        dense = table.weight.grad.to_dense().norm()
        if clip is None:
            rest = [p.grad.norm() for p in model.parameters()]
            return torch.stack([*rest, dense]).norm().item()
        return clip([*model.parameters(), *table.parameters()], 1.0).item()

    assert run(accelerator) == pytest.approx(run(None), rel=1e-6)


def test_a_copied_model_has_no_engine_behind_its_hooks():
    model = make(Model)
    stream(model)
    model(X).backward()
    copied = copy.deepcopy(model)
    copied(X).backward()
    assert all(p.grad is not None for p in copied.parameters())
