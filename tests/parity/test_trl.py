"""TRL's trainers over a streamed model: losses, norms and evaluation losses of the stock classes to 1e-5, in fp32.

Data is text, so that TRL's own tokenizing, packing and padding run. The stock runs are made once.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from trl import BEMACallback, DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_slideformer import (
    SlideConfig,
    SlideDPOTrainer,
    SlideSFTTrainer,
    UnsupportedModelError,
)
from hf_slideformer.engine.engine import engine_of

from . import harness, models

PAIRS = {SFTTrainer: SlideSFTTrainer, DPOTrainer: SlideDPOTrainer}
CONFIGS = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": models.PAD, "<s>": models.BOS, "</s>": models.EOS}
    words |= {f"w{index}": index for index in range(len(words), models.VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _words(count: int, start: int) -> str:
    return " ".join(f"w{3 + (start * 7 + index * index) % (models.VOCAB - 3)}" for index in range(count))


ROWS = range(16)
TEXTS = {"text": [_words(5 + 3 * (row % 4), row) for row in ROWS]}
COMPLETIONS = {
    "prompt": [_words(3 + row % 3, row) for row in ROWS],
    "completion": [" " + _words(4 + row % 5, row + 50) for row in ROWS],
}
PREFERENCES = {
    "prompt": COMPLETIONS["prompt"],
    "chosen": COMPLETIONS["completion"],
    "rejected": [" " + _words(3 + row % 4, row + 90) for row in ROWS],
}

ARGS: dict[str, Any] = dict(
    max_steps=4,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    max_grad_norm=1.0,
    weight_decay=0.1,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
    dataloader_pin_memory=False,
    max_length=32,
    seed=7,
)

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@dataclass(frozen=True, eq=False)
class TRLCase:
    """One run of one of TRL's trainers.

    Attributes:
        trainer: the stock class.
        data: columns of the training set; the first rows are the evaluation set.
        args: arguments that replace some of `ARGS`.
        adapter: "" trains everything, "config" hands the trainer a `peft_config`, "model" a PeftModel.
        reference: whether a reference model is given.
    """

    trainer: type
    data: Mapping[str, list]
    args: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ""
    reference: bool = False

    def make(
        self, trainer_class: type, output_dir: Path, overrides: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """The trainer; `overrides` replace training arguments, `kwargs` are further ones of its constructor."""
        args = ARGS | dict(self.args) | dict(overrides or {})
        data = Dataset.from_dict(dict(self.data))
        model = models.build("llama", num_hidden_layers=4)
        if self.adapter == "model":
            torch.manual_seed(1)
            model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
            with torch.no_grad():  # an adapter that has been trained before: the reference is not the base
                for name, param in model.named_parameters():
                    if "lora_B" in name:
                        param.normal_(0, 0.05)
        if self.adapter == "config":
            kwargs["peft_config"] = peft.LoraConfig(**LORA)
        if self.reference:
            kwargs["ref_model"] = models.build("llama", num_hidden_layers=4)
        return trainer_class(
            model=model,
            args=CONFIGS[self.trainer](output_dir=str(output_dir), **args),
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            processing_class=_tokenizer(),
            **kwargs,
        )


SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
PACKED = {"packing": True}
CASES = {
    "sft, padded": TRLCase(SFTTrainer, TEXTS),
    "sft, padded, lora": TRLCase(SFTTrainer, TEXTS, adapter="config"),
    "sft, packed": TRLCase(SFTTrainer, TEXTS, PACKED),
    "sft, packed, lora": TRLCase(SFTTrainer, TEXTS, PACKED, adapter="model"),
    "sft, packed by wrapping": TRLCase(SFTTrainer, TEXTS, PACKED | {"packing_strategy": "wrapped"}),
    "sft, completions": TRLCase(SFTTrainer, COMPLETIONS, {"activation_offloading": True}),
    "dpo, reference": TRLCase(DPOTrainer, PREFERENCES, reference=True),
    "dpo, reference that follows": TRLCase(DPOTrainer, PREFERENCES, SYNC, reference=True),
    "dpo, precomputed": TRLCase(DPOTrainer, PREFERENCES, {"precompute_ref_log_probs": True}),
    "dpo, lora": TRLCase(DPOTrainer, PREFERENCES, {"learning_rate": 0.03}, adapter="config"),
    "dpo, lora, trained before": TRLCase(DPOTrainer, PREFERENCES, {"learning_rate": 0.03}, adapter="model"),
}


@dataclass(frozen=True)
class Logged:
    """What a run logged."""

    losses: list[float]
    grad_norms: list[float]
    eval_losses: list[float]
    margins: list[float]


def _train(trainer) -> Logged:
    trainer.train()
    history = trainer.state.log_history
    steps = [entry for entry in history if "loss" in entry]
    return Logged(
        losses=[entry["loss"] for entry in steps],
        grad_norms=[entry["grad_norm"] for entry in steps],
        eval_losses=[entry["eval_loss"] for entry in history if "eval_loss" in entry],
        margins=[entry["rewards/margins"] for entry in steps if "rewards/margins" in entry],
    )


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Callable[[str], Logged]:
    """Results of the stock classes by case, made when first asked for."""

    @functools.cache
    def run(name: str) -> Logged:
        case = CASES[name]
        # TRL's offloading needs a GPU; losses are the same without it.
        plain = {"activation_offloading": False}
        return _train(case.make(case.trainer, tmp_path_factory.mktemp("stock"), plain))

    return run


def _assert_same(expected: Logged, actual: Logged) -> None:
    for metric in ("losses", "grad_norms", "eval_losses"):
        ours, theirs = getattr(actual, metric), getattr(expected, metric)
        assert len(theirs) > 0
        assert harness.relative_difference(theirs, ours) <= 1e-5, (metric, theirs, ours)
    # Differences of sums of logarithms: absolute.
    assert len(actual.margins) == len(expected.margins)
    assert all(abs(a - b) < 1e-5 for a, b in zip(actual.margins, expected.margins, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_losses_of_the_stock_trainer(name, stock, tmp_path):
    case = CASES[name]
    trainer = case.make(PAIRS[case.trainer], tmp_path)
    _assert_same(stock(name), _train(trainer))
    engine = trainer.slide.engine
    assert engine.metrics.totals()["h2d_bytes"] > 0
    assert (engine.plan.units, trainer.args.gradient_checkpointing) == (4, False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if "wrapping" not in name])
def test_losses_of_the_stock_trainer_on_the_gpu(name, tmp_path):
    """In fp32; kernels may sum in another order where a unit is run on other addresses."""
    case, on_gpu = CASES[name], {"use_cpu": False}
    stock = _train(case.make(case.trainer, tmp_path / "stock", on_gpu | {"activation_offloading": False}))
    trainer = case.make(PAIRS[case.trainer], tmp_path / "slide", on_gpu, slide_config={"placement": "stream"})
    slide = _train(trainer)
    assert harness.relative_difference(stock.losses, slide.losses) <= 1e-3
    assert trainer.slide.engine.plan.units == 4 and trainer.slide.engine.device.type == "cuda"


def test_runs_learn_and_references_matter(stock):
    """Were the reference the trained model itself, losses would stay those of the first step, and margins zero."""
    for name, case in CASES.items():
        logged = stock(name)
        assert abs(logged.losses[-1] / logged.losses[0] - 1) > 1e-4, name
        if case.trainer is DPOTrainer:
            assert abs(logged.margins[-1]) > 1e-4, name
    assert stock("dpo, reference").losses != stock("dpo, reference that follows").losses


def test_the_reference_is_read_only_and_streams(tmp_path, capsys):
    trainer = CASES["dpo, reference"].make(
        SlideDPOTrainer, tmp_path, {"disable_tqdm": False}, slide_config=SlideConfig(gpu_memory="64MiB")
    )
    trainer.train()
    assert "a model that is only read:\n4 units" in capsys.readouterr().out
    reference, trained = engine_of(trainer.ref_model), trainer.slide.engine
    assert reference is not trained
    assert not any(param.requires_grad for param in trainer.ref_model.parameters())
    fresh = models.build("llama", num_hidden_layers=4)
    for name, param in fresh.named_parameters():
        assert torch.equal(trainer.ref_model.get_parameter(name), param), name
    layer_bytes = 4 * sum(param.numel() for param in fresh.model.layers[0].parameters())
    plan = reference.plan
    assert trained.plan.budgets["GPU"] == 64 * 2**20 - plan.peaks["train"]["GPU"]
    assert plan.update == "none" and plan.units == 4 and plan.decisions.resident == ()
    assert plan.tier_bytes("RAM") == reference.host_bytes == 4 * _pages(layer_bytes)
    assert reference.metrics.totals().keys() <= {"h2d_bytes", "wait_weights_s"}  # nothing comes back


def _pages(nbytes: int) -> int:
    return -(-nbytes // 4096) * 4096


def test_a_way_of_following_that_is_not_known_is_refused(tmp_path):
    class Unknown(SlideDPOTrainer):
        def add_callback(self, callback):
            """Whatever TRL might do instead of it."""

    with pytest.raises(UnsupportedModelError, match="sync_ref_model=False"):
        CASES["dpo, reference that follows"].make(Unknown, tmp_path)


def test_what_follows_is_found_by_what_it_holds(tmp_path, monkeypatch):
    from trl.trainer.callbacks import SyncRefModelCallback

    class UnderAnotherName(SyncRefModelCallback):
        __module__ = "trl.somewhere"

    monkeypatch.setattr("trl.trainer.dpo_trainer.SyncRefModelCallback", UnderAnotherName)
    trainer = CASES["dpo, reference that follows"].make(SlideDPOTrainer, tmp_path)
    assert not any(isinstance(one, SyncRefModelCallback) for one in trainer.callback_handler.callbacks)
    # One that the arguments do not ask for: another version may have another switch.
    trainer = CASES["dpo, reference"].make(SlideDPOTrainer, tmp_path)
    trainer.add_callback(SyncRefModelCallback(ref_model=trainer.ref_model, accelerator=None))
    with pytest.raises(UnsupportedModelError, match="1 of TRL's callbacks have the reference model in hand"):
        trainer._take_over_reference()


def test_log_probabilities_are_precomputed_by_the_streamed_model(tmp_path):
    case = CASES["dpo, precomputed"]
    trainer = case.make(SlideDPOTrainer, tmp_path)
    engine = trainer.slide.engine
    assert engine is not None and trainer.ref_model is None
    assert engine.metrics.totals()["h2d_bytes"] > 0
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
    trainer.train()
    assert trainer.slide.engine is engine
    assert engine.metrics.totals()["updated_params"] > 0


def test_plans_count_on_pairs_and_on_trls_head(tmp_path):
    budget = SlideConfig(gpu_memory="256MiB")
    sft = CASES["sft, padded"].make(SlideSFTTrainer, tmp_path, slide_config=budget)
    dpo = CASES["dpo, reference"].make(SlideDPOTrainer, tmp_path, slide_config=budget)
    longest = max(len(text.split()) for text in TEXTS["text"]) + 1  # the end
    assert (sft.slide.plan.batch_size, sft.slide.plan.seq_len) == (2, longest)
    pairs = [
        len(f"{prompt} {answer}".split()) + 1
        for prompt, *answers in zip(*PREFERENCES.values(), strict=True)
        for answer in answers
    ]
    assert (dpo.slide.plan.batch_size, dpo.slide.plan.seq_len) == (4, max(pairs))
    for trainer in (sft, dpo):
        assert not any("estimated" in note and "activations" in note for note in trainer.slide.plan.notes)


def test_averages_of_weights_under_bf16_are_those_of_the_stock_trainer(tmp_path):
    """The run moves weights by less than their rounding to bf16."""
    args = {"bf16": True, "learning_rate": 1e-5, "weight_decay": 0.0, "eval_strategy": "no"}
    found = {}
    for trainer_class in (SFTTrainer, SlideSFTTrainer):
        bema = BEMACallback(update_freq=1)
        directory = tmp_path / trainer_class.__name__
        CASES["sft, padded"].make(trainer_class, directory, args, callbacks=[bema]).train()
        found[trainer_class] = load_file(directory / "bema" / "model.safetensors")
    start = models.build("llama", num_hidden_layers=4).state_dict()
    for name, value in found[SFTTrainer].items():
        moved = (value - start[name]).abs().max().item()
        assert 0 < (found[SlideSFTTrainer][name] - start[name]).abs().max().item() <= 1.5 * moved, name


def test_lora_saves_its_adapter_alone_and_resumes(tmp_path):
    case = CASES["sft, padded, lora"]
    straight = case.make(SlideSFTTrainer, tmp_path / "straight")
    straight.train()
    saving = case.make(SlideSFTTrainer, tmp_path / "run", {"save_strategy": "steps", "save_steps": 2})
    saving.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not list(checkpoint.glob("model*.safetensors"))
    resumed = case.make(SlideSFTTrainer, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, param in straight.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), param), name
