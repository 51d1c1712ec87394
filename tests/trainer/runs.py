"""What the tests of `SlideTrainer` share: a tiny llama, fixed data, trainers and plain loops over both."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_slideformer import SlideAdamW, SlideConfig
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.model.setup import Setup

VOCAB = 64


def llama(dtype: torch.dtype = torch.float32, *, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Build a random llama of four layers, one more than there are slots, with random norms too."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:  # ones are the same in every dtype, which would hide a lost residual
                param.add_(0.1 * torch.randn_like(param))
    model = model.to(dtype)
    model.config.dtype = dtype
    return model


class Tokens(Dataset):
    """Seeded random token sequences with labels, of one length."""

    def __init__(self, count: int = 16, *, length: int = 12, seed: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._rows = torch.randint(3, VOCAB, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def batches(count: int, *, seed: int = 5) -> list[torch.Tensor]:
    """Seeded random token batches, (2, 12) int64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (2, 12), generator=generator) for _ in range(count)]


DEFAULT_ARGS: dict[str, Any] = dict(
    max_steps=4,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    weight_decay=0.1,
    max_grad_norm=1.0,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,  # needs an accelerator, and warns where there is none
    seed=7,
)


def arguments(output_dir: Path, **overrides: Any) -> TrainingArguments:
    """Training arguments of a four-step run on the CPU that clips."""
    return TrainingArguments(output_dir=str(output_dir), **(DEFAULT_ARGS | overrides))


def make(
    trainer_class: type[Trainer],
    model: nn.Module,
    output_dir: Path,
    *,
    trainer_kwargs: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Trainer:
    """Construct a trainer over `model`; `overrides` replace training arguments."""
    return trainer_class(
        model=model,
        args=arguments(output_dir, **overrides),
        train_dataset=Tokens(),
        eval_dataset=Tokens(4, seed=6),
        **(trainer_kwargs or {}),
    )


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """Loss, gradient norm and learning rate of every logged step."""
    keys = ("step", "loss", "grad_norm", "learning_rate")
    return [
        {key: float(entry[key]) for key in keys} for entry in trainer.state.log_history if "loss" in entry
    ]


def assert_same_logs(actual: Trainer, expected: Trainer) -> None:
    """Logged steps agree to 1e-5 relative, NaN equal to NaN."""
    ours, theirs = logged(actual), logged(expected)
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            torch.tensor(list(one.values())),
            torch.tensor(list(two.values())),
            rtol=1e-5,
            atol=1e-7,
            equal_nan=True,
        )


def masters(model: nn.Module, engine: SlideEngine | None = None) -> dict[str, torch.Tensor]:
    """Clones of a model's weights by name, in the dtypes they came in where `engine` streams it."""
    if engine is None:
        return {name: param.detach().clone() for name, param in model.named_parameters()}
    engine.synchronize()
    return {state.name: state.read_master().detach().clone() for state in engine.states}


def assert_same_weights(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, atol: float = 1e-5
) -> None:
    """Weights by name agree to `atol`, in dtype, and in which of them are NaN; `atol=0` asks for the same values."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=atol, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


# -- plain loops ---------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """A model with its optimizer and the clipping function that belongs to them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: Callable[..., torch.Tensor]
    engine: SlideEngine | None = None

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """The language-modelling loss."""
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def weights(self) -> dict[str, torch.Tensor]:
        """Clones of the weights once every update is done."""
        return masters(self.model, self.engine)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    def select(keep: Callable[[nn.Parameter], bool]) -> Iterable[nn.Parameter]:
        return [param for param in model.parameters() if param.requires_grad and keep(param)]

    return [
        {"params": select(lambda p: p.dim() > 1), "weight_decay": 0.1},
        {"params": select(lambda p: p.dim() <= 1), "weight_decay": 0.0},
    ]


def plain_loop(model: nn.Module | None = None, *, lr: float = 1e-3) -> Loop:
    """A loop over torch's own AdamW and clipping."""
    model = llama() if model is None else model
    return Loop(model, torch.optim.AdamW(_groups(model), lr=lr), torch.nn.utils.clip_grad_norm_)


def slide_loop(
    model: nn.Module | None = None,
    *,
    lr: float = 1e-3,
    bf16: bool = False,
    update: str = "deferred",
    accumulates: bool = False,
    delays: Mapping[str, Callable[[str], float]] | None = None,
) -> Loop:
    """The same loop over an engine, with `delays` in seconds by lane."""
    model = llama() if model is None else model
    engine = SlideEngine(
        model,
        Setup(
            device=torch.device("cpu"),
            bf16=bf16,
            config=SlideConfig(update=update),
            micro_batches=2 if accumulates else 1,
        ),
        delays=delays,
    )
    optimizer = SlideAdamW(_groups(model), lr=lr)
    engine.attach_optimizer(optimizer)
    return Loop(model, optimizer, engine.clip_grad_norm_, engine)


def slow(seconds: float) -> Callable[[str], float]:
    """A delay of every piece of work."""
    return lambda label: seconds
