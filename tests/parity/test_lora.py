"""PEFT over a streamed base: `SlideTrainer` produces what plain `Trainer` does with the same PeftModel.

fp32 as in `test_fp32`, bf16 as in `test_bf16`. What a frozen base costs: tests/engine/state/test_adapters.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import peft
import pytest
import torch
from transformers import Trainer

from hf_slideformer import SlideConfig, SlideTrainer

from . import harness
from .harness import Case
from .test_bf16 import ARGS as BF16_ARGS
from .test_bf16 import assert_both_halves, run_reference

TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True, eq=False)
class AdapterCase(Case):
    """A case whose model gets the adapter that `adapter` configures."""

    adapter: Callable[[], peft.PeftConfig] = lambda: peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS
    )

    def build_model(self):
        """The PeftModel; a fresh one of LoRA is its base, so its zero matrices are given values."""
        model = super().build_model()
        torch.manual_seed(1)
        model = peft.get_peft_model(model, self.adapter())
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "lora_B" in name:
                    param.normal_(0, 0.05)
        return model


def _lora(**options) -> Callable[[], peft.PeftConfig]:
    return lambda: peft.LoraConfig(**({"r": 4, "target_modules": TARGETS} | options))


SHORT = dict(max_steps=6, warmup_steps=2)
FOUR_LAYERS = {"num_hidden_layers": 4}

CASES = {
    "lora": AdapterCase("llama", config=FOUR_LAYERS, args={"max_steps": 10}),
    "some layers, overlapped": AdapterCase(
        "llama",
        config=FOUR_LAYERS,
        args=SHORT | {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1},
        adapter=_lora(layers_to_transform=[1, 3]),
    ),
    "dora and biases": AdapterCase("qwen2", args=SHORT, adapter=_lora(use_dora=True, bias="lora_only")),
    "embedding and whole head": AdapterCase(
        "llama",
        args=SHORT,
        adapter=_lora(target_modules=[*TARGETS, "embed_tokens"], modules_to_save=["lm_head"]),
    ),
    "experts": AdapterCase(
        "mixtral",
        args=SHORT,
        adapter=_lora(
            target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
    ),
    "encoder and decoder": AdapterCase("t5", args=SHORT, adapter=_lora(target_modules=["q", "v", "wo"])),
    "ia3": AdapterCase(
        "llama",
        args=SHORT,
        adapter=lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "prompt": AdapterCase(
        "llama",
        args=SHORT,
        adapter=lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_adapters_train_as_under_trainer(name):
    case = CASES[name]
    streamed: list[float] = []
    plain = harness.run(Trainer, case)
    slide = harness.run(
        SlideTrainer,
        case,
        after_training=lambda trainer: streamed.append(trainer.slide.metrics["h2d_bytes"]),
    )
    harness.assert_same_run(plain, slide, case.spec)
    assert streamed[0] > 0
    trained = [n for n in plain.trained if not torch.equal(plain.weights[n], plain.initial[n])]
    assert len(trained) > 0.9 * len(plain.trained)


def test_a_base_in_bf16_with_adapters_in_fp32():
    """PEFT's default for a base in bf16; without `bf16=True` adapters stay plain fp32 in the same units."""
    case = AdapterCase("llama", config=FOUR_LAYERS, args=SHORT, dtype=torch.bfloat16)
    plain, slide = harness.run(Trainer, case), harness.run(SlideTrainer, case)
    assert {plain.weights[name].dtype for name in plain.trained} == {torch.float32}
    harness.assert_same_run(plain, slide, case.spec)


@pytest.mark.parametrize(
    ("dtype", "accumulation"), [(torch.bfloat16, 1), (torch.float32, 2)], ids=["from_bf16", "from_fp32"]
)
def test_bf16_bits_of_reference(tmp_path, dtype, accumulation):
    case = AdapterCase("llama", config=FOUR_LAYERS, args=BF16_ARGS, dtype=dtype, adapter=_lora())
    expected = run_reference(case, case.build_model(), gradient_accumulation_steps=accumulation)
    trainer = harness.make_trainer(
        SlideTrainer,
        case,
        tmp_path,
        gradient_accumulation_steps=accumulation,
        trainer_kwargs={"slide_config": SlideConfig()},
    )
    initial = harness.snapshot(trainer)
    trainer.train()
    actual = harness.collect(trainer, initial)
    assert actual.losses == expected.losses
    assert len(expected.weights) == len(actual.trained)
    assert_both_halves(expected, expected.masters, trainer)  # adapters come in as fp32
