"""Checkpoints of a model with adapters: the adapters alone, as PEFT and plain Trainer write and read them."""

import copy

import peft
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from transformers import Trainer

from hf_slideformer import (
    CheckpointError,
    SlideAccelerator,
    SlideTrainer,
    UnsupportedModelError,
)
from hf_slideformer.checkpoint import joined_state_dict

from .runs import Loop, Tokens, assert_same_weights, batches, llama, make, masters, plain_loop

PRECISIONS = {
    "fp32": (torch.float32, False),
    "fp32 base, bf16": (torch.float32, True),
    "bf16 base": (torch.bfloat16, True),
}


def _lora(dtype=torch.float32):
    model = llama(dtype)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))


def _adapters(trainer):
    weights = masters(trainer.model, trainer.slide.engine)
    return {name: value for name, value in weights.items() if "lora_" in name}


def _saved_name(name):
    return name.replace(".default", "")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_checkpoint_holds_adapters_and_resumes_bit_for_bit(tmp_path, precision):
    dtype, bf16 = PRECISIONS[precision]
    straight = make(SlideTrainer, _lora(dtype), tmp_path / "straight", bf16=bf16)
    straight.train()
    saving = make(
        SlideTrainer,
        _lora(dtype),
        tmp_path / "run",
        bf16=bf16,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    saving.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer"} <= files
    assert not [name for name in files if name.startswith("model") or name == "optimizer.pt"]

    saved = load_file(checkpoint / "adapter_model.safetensors")
    live = _adapters(saving)
    assert saved.keys() == {_saved_name(name) for name in live}
    for name, value in live.items():
        assert saved[_saved_name(name)].dtype == torch.float32
        assert torch.equal(saved[_saved_name(name)], value), name

    resumed = make(SlideTrainer, _lora(dtype), tmp_path / "resumed", bf16=bf16)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(_adapters(resumed), _adapters(straight), atol=0)
    assert any(not torch.equal(live[name], value) for name, value in _adapters(straight).items())


def _checkpoint(trainer_class, output_dir):
    """The trainer after two steps, and what it saved."""
    trainer = make(trainer_class, _lora(), output_dir, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    return trainer, output_dir / "checkpoint-2"


def test_peft_loads_the_adapter(tmp_path):
    trainer, checkpoint = _checkpoint(SlideTrainer, tmp_path)
    loaded = dict(peft.PeftModel.from_pretrained(llama(), checkpoint).named_parameters())
    for name, value in _adapters(trainer).items():
        assert torch.equal(loaded[name], value), name


def test_a_checkpoint_of_plain_trainer_is_resumed(tmp_path):
    straight = make(Trainer, _lora(), tmp_path / "straight")
    straight.train()
    _, checkpoint = _checkpoint(Trainer, tmp_path / "run")
    resumed = make(SlideTrainer, _lora(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = {name: value for name, value in masters(straight.model).items() if "lora_" in name}
    assert_same_weights(_adapters(resumed), expected)


def test_a_damaged_adapter_is_refused(tmp_path):
    _, checkpoint = _checkpoint(SlideTrainer, tmp_path)
    file = checkpoint / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    resumed = make(SlideTrainer, _lora(), tmp_path / "resumed")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    trainer = make(
        SlideTrainer,
        _lora(),
        tmp_path,
        learning_rate=0.05,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    saved = load_file(best / "adapter_model.safetensors")
    for name, value in _adapters(trainer).items():
        assert torch.equal(value, saved[_saved_name(name)]), name


def test_saving_joins_no_weight_of_the_base(tmp_path):
    """Their number is that of a whole model, in fp32."""
    trainer = make(SlideTrainer, _lora(), tmp_path, bf16=True, max_steps=1)
    trainer.train()
    state = joined_state_dict(trainer.model, trainer.slide.engine)
    for name, value in state.items():
        in_unit = ".layers." in name
        assert value.dtype == (torch.bfloat16 if in_unit and "lora_" not in name else torch.float32), name
    trainer.save_model(str(tmp_path / "final"))
    assert {path.name for path in (tmp_path / "final").glob("*.safetensors")} == {"adapter_model.safetensors"}


def test_a_plain_loop_prepares_a_model_with_adapters():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    tokens = batches(4)
    expected = _losses(plain_loop(_lora()), tokens)
    accelerator = SlideAccelerator(cpu=True)
    loop = plain_loop(_lora())
    model, optimizer, _ = accelerator.prepare(
        loop.model, loop.optimizer, torch.utils.data.DataLoader(Tokens(), batch_size=2)
    )
    streamed = Loop(model, optimizer, accelerator.clip_grad_norm_)
    assert _losses(streamed, tokens, accelerator) == pytest.approx(expected, rel=1e-5)


def _losses(loop, tokens, accelerator=None):
    losses = []
    for batch in tokens:
        loss = loop.loss(batch)
        accelerator.backward(loss) if accelerator is not None else loss.backward()
        loop.clip(loop.model.parameters(), 0.1)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# What is tuned, where nothing of the model has to be named for it.
OTHER_KINDS = {
    "adalora": peft.AdaLoraConfig(total_step=10, tinit=1, tfinal=1, deltaT=1, target_modules=["q_proj"]),
    "vera": peft.VeraConfig(target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's word on norms
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapters_train_as_with_trainer(tmp_path, kind):
    losses = []
    for trainer_class in (Trainer, SlideTrainer):
        model = llama(torch.float32)
        torch.manual_seed(1)
        config = copy.deepcopy(OTHER_KINDS[kind])
        config.task_type = "CAUSAL_LM"
        trainer = make(trainer_class, peft.get_peft_model(model, config), tmp_path / trainer_class.__name__)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    plain, ours = losses
    assert ours == pytest.approx(plain, rel=1e-5) and len(ours) > 1
    assert ours[0] != ours[-1]


def test_prefix_tuning_is_refused_before_the_start(tmp_path):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedModelError, match=r"adapter 'default' is PREFIX_TUNING.*key-value cache"):
        make(SlideTrainer, peft.get_peft_model(llama(torch.float32), config), tmp_path)
