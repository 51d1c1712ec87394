"""A backward inside a backward (reentrant checkpoint around some layers) silently drops gradients already pushed.

Gradients.begin_unit sees another graph task id, takes the outer backward for one that raised, and abandons it.
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
from torch.utils.checkpoint import checkpoint


class Layer(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(16, 32)

    def lower(self, x):
        for layer in self.layers[:2]:
            x = layer(x)
        return x

    def forward(self, ids):
        x = checkpoint(self.lower, self.embed(ids), use_reentrant=True)
        for layer in self.layers[2:]:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def grads(streamed):
    torch.manual_seed(0)
    model = Model()
    ids = torch.randint(32, (2, 8))
    if streamed:
        engine = SlideEngine(model, Setup(device=torch.device("cpu"), bf16=False, config=SlideConfig()))
        engine.attach_optimizer(SlideAdamW(model.parameters(), lr=1e-3))
    model.train()
    model(ids).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


plain, ours = grads(False), grads(True)
lost = [n for n, g in plain.items() if g is not None and ours[n] is None]
wrong = [n for n, g in plain.items() if ours[n] is not None and not torch.allclose(g, ours[n], atol=1e-6)]
print("gradients lost without an error:", lost)
print("gradients that differ:", wrong)
ok = not lost and not wrong
print("PASS" if ok else "FAIL")
sys.exit(0 if ok else 1)
