"""A run that stops at a checkpoint and goes on from it is, bit for bit, the run that never stopped.

With dropout on, so that the generators' states count; over an accumulation of two and a cosine schedule; from an
epoch's middle. The model that resumes is built from other random weights: whatever is not restored shows.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Trainer

from hf_slideformer import SlideConfig, SlideTrainer
from hf_slideformer.memory.layout import MOMENT_FORMATS

from . import harness, models
from .harness import Case

STEPS, SAVED_AT = 10, 5
ARGS = dict(max_steps=STEPS, warmup_steps=2, save_strategy="steps", save_steps=SAVED_AT)

CASES = {
    "fp32": Case("gpt2", args=ARGS),
    "bf16": Case("gpt2", args={**ARGS, "bf16": True}, dtype=torch.bfloat16),
    # fp32 weights that are trained as split masters: the checkpoint must hold both halves as one fp32 value.
    "bf16_from_fp32": Case("gpt2", args={**ARGS, "bf16": True}),
    "seq2seq": Case("t5", args=ARGS),
    "unclipped": Case("gpt2", args={**ARGS, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}),
    "frozen": Case("gpt2", args=ARGS, frozen=r"wte|wpe|h\.0\."),
}
SETTINGS = [*((name, "fp32") for name in CASES), ("fp32", "8bit"), ("bf16_from_fp32", "8bit")]


def _flatten(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in a nest of dictionaries and lists, under its path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state.detach().clone()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {
        path: tensor for key, value in items for path, tensor in _flatten(value, f"{prefix}/{key}").items()
    }


def _losses_by_step(trainer: Trainer) -> dict[int, tuple[float, float]]:
    """Step -> (loss, gradient norm), those that were loaded with the trainer's state included."""
    return {
        entry["step"]: (entry["loss"], float(entry["grad_norm"]))
        for entry in trainer.state.log_history
        if "loss" in entry
    }


def _train(
    case: Case,
    output_dir: Path,
    *,
    model_seed: int = 0,
    resume_from: Path | None = None,
    optimizer_states: str = "fp32",
) -> Trainer:
    model = models.build(case.model, seed=model_seed, dtype=case.dtype, **case.config)
    harness.freeze(model, case.frozen)
    config = SlideConfig(optimizer_states=optimizer_states)
    trainer = harness.make_trainer(
        SlideTrainer, case, output_dir, model=model, trainer_kwargs={"slide_config": config}
    )
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


@pytest.mark.parametrize(("name", "optimizer_states"), SETTINGS)
def test_resumed_run_is_the_uninterrupted_run(tmp_path, name, optimizer_states):
    case = CASES[name]
    whole = _train(case, tmp_path / "whole", optimizer_states=optimizer_states)
    whole_losses, whole_weights = _losses_by_step(whole), harness.snapshot(whole)
    whole_state = _flatten(whole.optimizer.state_dict())
    whole_schedule = whole.lr_scheduler.state_dict()
    whole_random = torch.get_rng_state()

    resumed = _train(
        case,
        tmp_path / "resumed",
        model_seed=99,
        resume_from=tmp_path / "whole" / f"checkpoint-{SAVED_AT}",
        optimizer_states=optimizer_states,
    )
    assert resumed.state.global_step == STEPS
    assert _losses_by_step(resumed) == whole_losses
    assert sorted(whole_losses) == list(range(1, STEPS + 1))
    harness.assert_same_tensors(whole_weights, harness.snapshot(resumed))
    harness.assert_same_tensors(whole_state, _flatten(resumed.optimizer.state_dict()))
    assert resumed.lr_scheduler.state_dict() == whole_schedule
    assert torch.equal(torch.get_rng_state(), whole_random)

    # What was compared is all of the state: two moments for each trained element.
    trained = [p.numel() for p in whole.model.parameters() if p.requires_grad]
    for part in MOMENT_FORMATS[optimizer_states].parts:
        moments = [tensor for path, tensor in whole_state.items() if path.endswith(f"/{part.name}")]
        assert {tensor.dtype for tensor in moments} == {part.dtype}
        assert sum(tensor.numel() for tensor in moments) == sum(map(part.entries, trained))
    assert len(whole_state) - sum("master_residual" in path for path in whole_state) == len(trained) * (
        1 + len(MOMENT_FORMATS[optimizer_states].parts)
    )

    # The checkpoints that both wrote at the end hold the same weights in the dtype that they came in.
    final = [
        load_file(tmp_path / run / f"checkpoint-{STEPS}" / "model.safetensors")
        for run in ("whole", "resumed")
    ]
    harness.assert_same_tensors(*final)
    assert {tensor.dtype for tensor in final[0].values()} == {case.dtype}


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16_from_fp32", "seq2seq"])
def test_checkpoint_loads_with_from_pretrained(tmp_path, name):
    case = CASES[name]
    trainer = _train(case, tmp_path)
    loader = AutoModelForSeq2SeqLM if case.spec.task == "seq2seq" else AutoModelForCausalLM
    loaded, report = loader.from_pretrained(
        tmp_path / f"checkpoint-{STEPS}", dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(loaded) is type(case.build_model())
    assert {parameter.dtype for parameter in loaded.parameters()} == {case.dtype}
    # fp32 masters are finer than the bf16 weights in the trained model; `test_bf16` compares those exactly.
    trained = harness.snapshot(trainer)
    for key, tensor in loaded.state_dict().items():
        if tensor.dtype == trained[key].dtype:
            assert torch.equal(tensor, trained[key]), key
        else:
            torch.testing.assert_close(tensor, trained[key].float(), rtol=2**-8, atol=0)


def test_resume_under_the_other_update_schedule(tmp_path):
    # When updates run is not state: overlapped until the checkpoint and deferred after it is the same run.
    case = CASES["unclipped"]

    def train(output_dir: Path, update: str, resume_from: Path | None = None) -> Trainer:
        trainer = harness.make_trainer(
            SlideTrainer, case, output_dir, trainer_kwargs={"slide_config": SlideConfig(update=update)}
        )
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        return trainer

    whole = train(tmp_path / "whole", "overlapped")
    whole_losses, whole_weights = _losses_by_step(whole), harness.snapshot(whole)
    resumed = train(tmp_path / "resumed", "deferred", tmp_path / "whole" / f"checkpoint-{SAVED_AT}")
    assert _losses_by_step(resumed) == whole_losses
    harness.assert_same_tensors(whole_weights, harness.snapshot(resumed))
