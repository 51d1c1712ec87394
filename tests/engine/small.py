"""A model of a few small layers, and a training loop over it: for tests that need many runs."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_slideformer import SlideConfig
from hf_slideformer.engine.planning import Planned

from .loop import Run, decide, prepare

UNITS = 4
ALL = tuple(range(UNITS))
WIDTH = 16


class Layer(GradientCheckpointingLayer):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return hidden_BH + self.down(torch.tanh(self.up(hidden_BH)))


class Stack(nn.Module):
    """Layers between two parameters outside of them; returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(UNITS))
        self.last = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x_BH: torch.Tensor) -> torch.Tensor:
        hidden_BH = self.first(x_BH)
        for layer in self.layers:
            hidden_BH = layer(hidden_BH)
        return self.last(hidden_BH).float().pow(2).mean()


# Every way of a weight, an input, a gradient and an update, by name.
MODES = {
    "streamed": {},
    "kept": {"keep": ALL},
    "offload": {"offload": ALL},
    "mixed": {"resident": (1,), "keep": (1, 2), "offload": (0, 3), "outside_state": "RAM"},
    "overlapped": {},
    "overlapped resident": {"resident": (1, 3)},
    "overlapped outside in RAM": {"outside_state": "RAM", "staging_buffers": 1},
    "sums": {"staging_buffers": 1},
    "sums of offload": {"offload": ALL, "staging_buffers": 2, "outside_state": "RAM"},
    "state on disk": {"on_disk": ALL, "disk_buffers": 2},
    "weights on disk": {"on_disk": ALL, "disk_buffers": 2, "weights_on_disk": ALL, "offload": ALL},
    "sums on disk": {"on_disk": ALL, "disk_buffers": 1, "staging_buffers": 1},
    "overlapped on disk": {"on_disk": ALL, "disk_buffers": 2, "weights_on_disk": ALL},
}


def micro_batches(mode: str) -> int:
    """Backwards that make a step."""
    return 2 if mode.startswith("sums") else 1


def start(mode: str, directory: str = "", dtype: torch.dtype = torch.bfloat16, **overrides) -> Run:
    """Engine and optimizer over a new model, in one of `MODES`."""
    torch.manual_seed(0)
    config = SlideConfig(
        update="overlapped" if mode.startswith("overlapped") else "deferred",
        nvme_dir=str(directory) if "on_disk" in MODES[mode] else None,
    )
    # Inputs have a place on disk only if their size is known, and this model cannot be profiled.
    with mock.patch.object(Planned, "input_bytes", return_value=batch(0).to(dtype).nbytes):
        return prepare(
            Stack().to(dtype),
            config=config,
            accumulates=micro_batches(mode) > 1,
            decisions=decide(units=UNITS, slots=2, **MODES[mode]),
            **overrides,
        )


def batch(step: int, micro: int = 0, size: int = 3) -> torch.Tensor:
    """The input of a micro-batch, (size, width) bf16."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(size, WIDTH, generator=generator).to(torch.bfloat16)


def step(run: Run, mode: str, number: int) -> torch.Tensor:
    """Train one step; returns its loss, without waiting for it."""
    losses = []
    for micro in range(micro_batches(mode)):
        loss = run.model(batch(number, micro).to(run.engine.device, run.model.first.weight.dtype))
        loss.backward()
        losses.append(loss.detach())
    if not run.engine.overlapped:
        run.engine.clip_grad_norm_(run.model.parameters(), 0.1)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return torch.stack(losses).sum()
