"""Ctrl-C while a unit's successors are prefetched: the slot that was just leased is never released.

Executor.lease acquires, then prefetches, and its callers enter their try only afterwards; reset() does not look at the
pool. With two slots all transfers are serial from then on; after two such interruptions nothing runs any more.
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


torch.manual_seed(0)
model = Model()
engine = SlideEngine(model, Setup(device=torch.device("cpu"), bf16=False, config=SlideConfig()))
optimizer = SlideAdamW(model.parameters(), lr=1e-3)
engine.attach_optimizer(optimizer)
x = torch.randn(4, 16)
model(x).backward()
optimizer.step()
optimizer.zero_grad()

original, problems = engine.pool.prefetch, []
for attempt in range(len(engine.pool._slots) + 1):
    calls = 0

    def prefetch(unit, keep):
        global calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt  # what a signal handler does, at this line
        return original(unit, keep)

    engine.pool.prefetch = prefetch
    try:
        model(x).backward()
    except KeyboardInterrupt:
        engine.reset()
    except BaseException as error:
        problems.append(repr(error))
        break
    engine.pool.prefetch = original
    print("after interruption", attempt + 1, "leases:", [slot.leases for slot in engine.pool._slots])
engine.pool.prefetch = original
try:
    model(x).backward()
except BaseException as error:
    problems.append(repr(error))
leaked = sum(slot.leases for slot in engine.pool._slots)
print("leases that nobody holds:", leaked, "; training afterwards:", problems or "works")
ok = not leaked and not problems
print("PASS" if ok else "FAIL")
sys.stdout.flush()
os._exit(0 if ok else 1)
