"""A streamed layer is called with what it was given: types, values, and containers that it must not change."""

import collections
import copy
import enum
import typing

import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree
from transformers import BatchEncoding
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from hf_slideformer.errors import UnsupportedModelError
from tests.engine.loop import prepare

_TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=16,
    patch_size=4,
    num_labels=3,
)


@pytest.mark.parametrize(
    "bias", [{}, {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}]
)
@pytest.mark.parametrize("family", ["Beit", "Data2VecVision"])
def test_layers_that_are_handed_a_resolution(family, bias):
    # Their `resolution` is a torch.Size: pixel_values.shape[2:].
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**_TINY, **bias)
    model = getattr(transformers, f"{family}ForImageClassification")(config).train()
    for param in model.parameters():
        nn.init.normal_(param, std=0.1)
    plain = copy.deepcopy(model)
    run = prepare(model, bf16=False)
    pixels, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    losses = []
    for trained in (plain, run.model):
        torch.manual_seed(1)
        loss = trained(pixel_values=pixels, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    gradients = {name: param.grad for name, param in run.model.named_parameters()}
    for name, param in plain.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(gradients[name], param.grad, rtol=1e-4, atol=1e-7, msg=name)
    if bias:
        assert any(grad.any() for name, grad in gradients.items() if "relative_position_bias" in name)


class Pair(typing.NamedTuple):
    first: torch.Tensor
    second: int


class Mode(enum.Enum):
    FAST = "fast"


class Layer(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.change = lambda given: None
        self.seen = []

    def forward(self, hidden, *given, **named):
        self.seen.append((given, named))
        self.change((*given, *named.values()))
        return hidden + torch.tanh(self.linear(hidden))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, hidden, *given, **named):
        for layer in self.layers:
            hidden = layer(hidden, *given, **named)
        return hidden.sum()


def tensor():
    return torch.arange(8.0)


CONTAINERS = {
    "size": lambda: torch.Size([2, 4]),
    "empty_size": lambda: torch.Size([]),
    "named_tuple": lambda: Pair(tensor(), 3),
    "enum": lambda: Mode.FAST,
    "ordered": lambda: collections.OrderedDict(b=tensor(), a=1),
    "default": lambda: collections.defaultdict(list, a=tensor()),
    "deque": lambda: collections.deque([tensor(), 2], maxlen=4),
    "encoding": lambda: BatchEncoding({"input_ids": tensor()}),
    "output": lambda: BaseModelOutput(last_hidden_state=tensor()),
    "result": lambda: torch.topk(tensor(), 2),
    "nested": lambda: {"shapes": [torch.Size([1]), (torch.Size([2]), None)], "mode": Mode.FAST},
    "dtype": lambda: torch.float32,
    "slice": lambda: slice(1, 3),
}


def types_in(value):
    if isinstance(value, dict):
        return type(value), {key: types_in(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [types_in(inner) for inner in value]
    return type(value)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_arguments_come_as_they_are(kind):
    run = prepare(Model(), bf16=False)
    given, named = CONTAINERS[kind](), CONTAINERS[kind]()
    hidden = torch.randn(2, 8, requires_grad=True)
    run.model(hidden, given, other=named).backward()
    assert hidden.grad.any()
    for layer in run.model.layers:
        assert len(layer.seen) == 2  # forward and recompute
        for args, kwargs in layer.seen:
            assert types_in(args) == types_in((given,))
            assert types_in(kwargs) == types_in({"other": named})


class Lossy(tuple):
    """A container that pytree gives back as another one."""


pytree.register_pytree_node(Lossy, lambda x: (list(x), None), lambda x, _: tuple(x))


def test_a_container_that_comes_back_as_another_one_is_not_taken_for_a_changed_one():
    run = prepare(Model(), bf16=False)
    hidden = torch.randn(2, 8, requires_grad=True)
    run.model(hidden, Lossy((tensor(), 1))).backward()
    assert hidden.grad.any()


CHANGES = {
    "adds_to_a_list": (lambda: [1], lambda given: given[0].append(2)),
    "adds_a_key": (lambda: {"a": tensor()}, lambda given: given[0].update(b=1)),
    "replaces_a_value": (lambda: {"a": tensor(), "b": None}, lambda given: given[0].update(b=tensor())),
    "replaces_a_tensor": (lambda: [tensor()], lambda given: given[0].__setitem__(0, tensor() * 2)),
    "takes_out": (lambda: {"a": 1, "b": 2}, lambda given: given[0].pop("a")),
    "deep": (lambda: {"all": ({"a": 1},)}, lambda given: given[0]["all"][0].update(a=2)),
    "beside_a_size": (lambda: [torch.Size([1]), [1]], lambda given: given[0][1].append(3)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_layer_that_changes_a_container_is_refused(kind):
    make, change = CHANGES[kind]
    run = prepare(Model(), bf16=False)
    run.model.layers[1].change = change
    hidden = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 adds to a dictionary or list"):
        run.model(hidden, other=make())
