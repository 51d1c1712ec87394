"""A tensor with a gradient that reaches a layer past its (flattened) arguments: its gradient is lost without a word.

Two ways in: an attribute that the model sets on the layer before it calls it (hypernetworks, XLoRA's scalings), and a
dataclass among the arguments, which pytree does not open.
"""

import os
import sys
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_slideformer import SlideAdamW, SlideConfig
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.model.setup import Setup

torch.set_num_threads(1)
from dataclasses import dataclass


@dataclass
class Extra:
    shift: torch.Tensor


class Layer(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.scaling = None

    def forward(self, x, extra=None):
        return x + torch.tanh(self.lin(x)) * self.scaling + extra.shift


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.gate, self.shift = nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(16, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        gate, extra = torch.sigmoid(self.gate(x)), Extra(self.shift(x))
        x = self.inp(x)
        for layer in self.layers:
            layer.scaling = gate
            x = layer(x, extra=extra)
        return x.pow(2).mean()


def grads(streamed):
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(4, 16)
    if streamed:
        engine = SlideEngine(model, Setup(device=torch.device("cpu"), bf16=False, config=SlideConfig()))
        engine.attach_optimizer(SlideAdamW(model.parameters(), lr=1e-3))
    model(x).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


plain = grads(False)
try:
    ours = grads(True)
except Exception as error:  # refused: fine
    print("refused:", type(error).__name__, str(error)[:200])
    print("PASS")
    sys.exit(0)
lost = [n for n, g in plain.items() if g is not None and ours[n] is None]
wrong = [n for n, g in plain.items() if ours[n] is not None and not torch.allclose(g, ours[n], atol=1e-6)]
print("gradients lost without an error:", lost)
print("gradients that differ:", wrong)
ok = not lost and not wrong
print("PASS" if ok else "FAIL")
sys.exit(0 if ok else 1)
