"""A penalty on weights in the loss (L2-SP, EWC, orthogonality): under overlapped updates its gradient is dropped.

It reaches p.grad past the unit. Deferred updates add it; overlapped ones leave it on p.grad and step() says nothing.
max_grad_norm=0 without accumulation, where update="auto" overlaps.
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


class Layer(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.tanh(self.lin(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(16, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x):
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean()


def train(kind):
    torch.manual_seed(0)
    model = Model()
    data = torch.randn(3, 8, 16)
    step = lambda: None
    if kind == "plain":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    else:
        engine = SlideEngine(
            model, Setup(device=torch.device("cpu"), bf16=False, config=SlideConfig(update=kind))
        )
        optimizer = SlideAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        engine.attach_optimizer(optimizer)
        step = engine.synchronize
    for x in data:
        loss = model(x) + 5.0 * sum(p.pow(2).sum() for p in model.parameters())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


plain = train("plain")
ok = True
for kind in ("deferred", "overlapped"):
    try:
        ours = train(kind)
    except Exception as error:  # refused: fine
        print(kind, "refused:", type(error).__name__, str(error)[:160])
        continue
    worst = max((plain[n] - w).abs().max().item() for n, w in ours.items())
    moved = max((plain[n] - w).abs().max().item() for n, w in ours.items() if n.startswith("layers"))
    print(
        f"{kind}: largest difference to plain AdamW after 3 steps {worst:.2e} (lr 1e-2; layers {moved:.2e})"
    )
    ok = ok and worst < 1e-4
print("PASS" if ok else "FAIL")
sys.exit(0 if ok else 1)
