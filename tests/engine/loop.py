"""A plain training loop over `SlideEngine`, without Trainer: what order and placement tests drive."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_slideformer import SlideAdamW, SlideConfig
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.model.batch_shape import BatchShape
from hf_slideformer.engine.model.setup import Setup
from hf_slideformer.optim import SlideOptimizer
from hf_slideformer.optim.state import ParamState
from hf_slideformer.planner.workload import Decisions


@dataclass
class Run:
    """What a run leaves behind: losses, norms, and final weights joined to the dtypes they came in."""

    engine: SlideEngine
    model: torch.nn.Module
    optimizer: SlideOptimizer
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def tiny_llama(dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, **overrides) -> torch.nn.Module:
    """A random llama of six layers: more than there are slots."""
    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_dropout": 0.0,
    }
    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).to(dtype)


def prepare(
    model: torch.nn.Module,
    *,
    device: str = "cpu",
    bf16: bool = True,
    config: SlideConfig | None = None,
    accumulates: bool = False,
    overlap_is_exact: bool = False,
    shape: BatchShape | None = None,
    decisions: Decisions | None = None,
    delays: Mapping[str, Callable[[str], float]] | None = None,
    optimizer: type[SlideOptimizer] = SlideAdamW,
    **hyperparameters: Any,
) -> Run:
    """Engine and optimizer (weight decay on matrices only) over `model`."""
    config, hyperparameters = config or SlideConfig(), {"lr": 1e-3} | hyperparameters
    engine = SlideEngine(
        model,
        Setup(
            device=torch.device(device),
            bf16=bf16,
            config=config,
            micro_batches=2 if accumulates else 1,
            overlap_is_exact=overlap_is_exact,
            shape=shape,
            rule=optimizer.rule_for([hyperparameters], config.optimizer_states),
        ),
        decisions=decisions,
        delays=delays,
    )
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    ours = optimizer(groups, **hyperparameters)
    engine.attach_optimizer(ours)
    return Run(engine, model, ours)


def decide(
    *,
    resident: Collection[int] = (),
    keep: Collection[int] = (),
    offload: Collection[int] = (),
    units: int = 6,
    slots: int = 3,
    staging_buffers: int = 3,
    outside_state: str = "GPU",
    on_disk: Collection[int] = (),
    disk_buffers: int = 3,
    weights_on_disk: Collection[int] = (),
) -> Decisions:
    """Decisions by hand: which units are resident, keep or offload their activations, have state on disk."""
    return Decisions(
        resident=tuple(resident),
        activations=tuple(
            "keep" if index in keep else "offload" if index in offload else "recompute"
            for index in range(units)
        ),
        slots=slots if len(resident) < units else 0,
        staging_buffers=staging_buffers,
        outside_state=outside_state,
        on_disk=tuple(on_disk),
        disk_buffers=disk_buffers if on_disk else 0,
        weights_on_disk=tuple(weights_on_disk),
    )


def batches(
    steps: int, *, batch: int = 2, seq: int = 16, vocab: int = 96, seed: int = 7
) -> list[torch.Tensor]:
    """Seeded random token batches, (batch, seq) int64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (batch, seq), generator=generator) for _ in range(steps)]


def train(
    run: Run,
    steps: int,
    *,
    max_norm: float | None = 1.0,
    micro_batches: int = 1,
    seed: int = 7,
    batch: int = 2,
    seq: int = 16,
    autocast: bool = True,
) -> Run:
    """Train `run` for `steps` steps; `max_norm=None` does not call clip at all."""
    data = iter(
        batches(steps * micro_batches, batch=batch, seq=seq, vocab=run.model.config.vocab_size, seed=seed)
    )
    run.model.train()
    for _ in range(steps):
        step(run, [next(data) for _ in range(micro_batches)], max_norm=max_norm, autocast=autocast)
    run.engine.synchronize()
    run.weights = {}
    for states in run.engine.states_by_unit():
        with run.engine.state_in_memory(states):
            run.weights |= {state.name: state.read_master().detach().cpu().clone() for state in states}
    return run


def step(
    run: Run, micro_batches: list[torch.Tensor], *, max_norm: float | None, autocast: bool = True
) -> None:
    """One optimizer step on these tokens."""
    device, total = run.engine.device, 0.0
    for tokens in micro_batches:
        tokens = tokens.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = run.model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(micro_batches)
        loss.backward()
        total += loss.item()
    run.losses.append(total)
    if max_norm is not None:
        run.norms.append(run.engine.clip_grad_norm_(run.model.parameters(), max_norm).item())
    run.optimizer.step()
    run.optimizer.zero_grad()


def assert_same_bits(first: Run, second: Run) -> None:
    """Losses, norms, weights, residuals and moments of two runs agree bit for bit."""
    assert first.losses == second.losses
    assert first.norms == second.norms
    ours, theirs = all_tensors(first.engine), all_tensors(second.engine)
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        assert_same_state(tensors, theirs[name], name)


def all_tensors(engine: SlideEngine) -> dict[str, dict[str, torch.Tensor]]:
    """All that is kept of every parameter, by its name; copies of what lives on disk."""
    found = {}
    for states in engine.states_by_unit():
        with engine.state_in_memory(states):
            for state in states:
                tensors = tensors_of(state) | {"step": torch.tensor(state.step)}
                on_disk = engine.disk_bytes > 0
                found[state.name] = {key: x.clone() if on_disk else x for key, x in tensors.items()}
    return found


def tensors_of(state: ParamState) -> dict[str, torch.Tensor]:
    """All that is kept of a parameter, by name."""
    residual = {} if state.residual is None else {"residual": state.residual}
    return {"weight": state.weight, **residual, **state.moments}


def assert_same_state(
    one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor], name: str = ""
) -> None:
    """Tensors by name agree in dtype, shape and bits."""
    assert one.keys() == two.keys(), name
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype and tensor.shape == two[key].shape, (name, key)
        assert torch.equal(bits(tensor), bits(two[key])), (name, key)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers, so that NaN equals NaN and -0 is not 0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(kinds[tensor.element_size()])
