"""A checkpoint knows no tiers: what a run with state on disk wrote, one in RAM resumes, and the other way."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from hf_slideformer import SlideConfig, SlideTrainer
from hf_slideformer.checkpoint import CheckpointCalls, SavedCheckpoint

from .kill import Tokens, final_state

STEPS = 4


def _trainer(directory: Path, slide: dict, *, seed: int, bf16: bool, on_gpu: bool = False) -> SlideTrainer:
    set_seed(seed)
    # Large enough that pages and the losses' temporary memory do not decide what fits.
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        attention_dropout=0.1,
    )
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        bf16=bf16,
        use_cpu=not on_gpu,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return SlideTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=Tokens(10, 5),
        slide_config=SlideConfig(**slide),
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "split masters"])
def test_state_on_disk_or_in_ram(tmp_path, bf16):
    (tmp_path / "disk").mkdir()
    in_ram = _trainer(tmp_path / "ram", {"placement": "stream"}, seed=0, bf16=bf16)
    needed = sum(in_ram.slide.plan.peaks["train"][tier] for tier in ("GPU", "RAM"))
    on_disk, whole = (
        {"cpu_memory": int(needed * share), "nvme_dir": tmp_path / "disk"} for share in (0.7, 0.5)
    )
    in_ram.train()
    expected = final_state(in_ram)
    settings = {"ram": {"placement": "stream"}, "disk": on_disk, "whole": whole, "auto": {}}

    def check(trainer: SlideTrainer, name: str) -> None:
        decisions = trainer.slide.plan.decisions
        assert bool(decisions.on_disk) == (name in ("disk", "whole"))
        # fp32 weights that train as split masters have to be in RAM while they load, so they are the last to leave it.
        assert bool(decisions.weights_on_disk) == (name == "whole" and not bf16)
        assert final_state(trainer) == expected

    from_disk = _trainer(tmp_path / "from-disk", on_disk, seed=0, bf16=bf16)
    from_disk.train()
    check(from_disk, "disk")
    all_from_disk = _trainer(tmp_path / "from-whole", whole, seed=0, bf16=bf16)
    all_from_disk.train()
    check(all_from_disk, "whole")
    for written, loaded in (
        ("ram", "disk"),
        ("from-disk", "ram"),
        ("from-disk", "disk"),
        ("from-disk", "auto"),
        ("from-whole", "ram"),
        ("from-disk", "whole"),
    ):
        resumed = _trainer(tmp_path / f"{written}-{loaded}", settings[loaded], seed=99, bf16=bf16)
        resumed.train(resume_from_checkpoint=str(tmp_path / written / "checkpoint-2"))
        check(resumed, loaded)
    one, two, three = (
        SavedCheckpoint(tmp_path / name / "checkpoint-4", CheckpointCalls()).records
        for name in ("ram", "from-disk", "from-whole")
    )
    tensors = [name for name in one if name.endswith(".safetensors")]
    assert len(tensors) == 14
    assert all(one[name] == two[name] == three[name] for name in tensors)  # the same bytes
    assert torch.isfinite(from_disk.slide.engine.states[0].live).all()


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "split masters"])
def test_placement_on_a_gpu_is_not_in_a_checkpoint(tmp_path, deterministic, bf16):
    """Resident units, streamed ones and state on disk resume one another; the CPU reads the same state."""
    (tmp_path / "disk").mkdir()
    plan = _trainer(tmp_path / "plan", {"placement": "stream"}, seed=0, bf16=bf16, on_gpu=True).slide.plan
    settings = {
        "auto": {},
        "stream": {"placement": "stream"},
        "disk": {
            "placement": "stream",
            "cpu_memory": int(plan.peaks["train"]["RAM"] * 0.7),
            "nvme_dir": tmp_path / "disk",
        },
    }
    runs = {}
    # One after another: making a trainer sets the seed that its samples come by.
    for name, slide in settings.items():
        runs[name] = _trainer(tmp_path / name, slide, seed=0, bf16=bf16, on_gpu=True)
        runs[name].train()
    expected = final_state(runs["auto"])
    assert runs["auto"].slide.plan.decisions.resident
    assert runs["disk"].slide.plan.decisions.on_disk
    assert final_state(runs["stream"]) == expected and final_state(runs["disk"]) == expected
    for written in settings:
        for loaded, slide in settings.items():
            resumed = _trainer(tmp_path / f"{written}-{loaded}", slide, seed=99, bf16=bf16, on_gpu=True)
            resumed.train(resume_from_checkpoint=str(tmp_path / written / "checkpoint-2"))
            assert final_state(resumed) == expected, (written, loaded)
    on_cpu = _trainer(tmp_path / "cpu", {}, seed=99, bf16=bf16)
    on_cpu.train(resume_from_checkpoint=str(tmp_path / "auto" / "checkpoint-4"))
    names = {state.name for state in on_cpu.slide.engine.states}
    found = final_state(on_cpu)["state"]
    assert {name: found[name] for name in names} == {name: expected["state"][name] for name in names}
