"""What a checkpoint consists of: files that others can read, and state that any plan, format or loop can resume."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.core_model_loading import Transpose, WeightConverter

from hf_slideformer import SlideAccelerator, SlideAdamW, SlideTrainer
from hf_slideformer.checkpoint import CheckpointCalls, SavedCheckpoint
from hf_slideformer.errors import CheckpointError
from hf_slideformer.memory.layout import MOMENT_FORMATS

from .kill import SETTINGS, STEPS, Setting, Tokens, final_state, make_trainer

BY_NAME = {setting.name: setting for setting in SETTINGS}
SPLIT = BY_NAME["split masters"]


def _train(setting: Setting, directory: Path, resume: Path | None = None, **overrides):
    setting = Setting(setting.name, setting.dtype, {**setting.args, **overrides}, setting.slide)
    trainer = make_trainer(setting, directory, CheckpointCalls(), [], model_seed=0 if resume is None else 99)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda setting: setting.name)
def trained(request, tmp_path_factory):
    """A trainer at its end, and its last checkpoint."""
    directory = tmp_path_factory.mktemp("run")
    trainer = _train(request.param, directory, load_best_model_at_end=False)
    return trainer, directory / f"checkpoint-{STEPS}"


def test_files(trained):
    trainer, path = trained
    units = [f"optimizer/unit-{index:05d}.safetensors" for index in range(3)]
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    others = {"config.json", "model.safetensors", "trainer_state.json", "scheduler.pt", "rng_state.pth"}
    assert names >= {
        *units,
        *others,
        "optimizer/outside.safetensors",
        "optimizer/index.json",
        "training_args.bin",
    }
    assert "optimizer.pt" not in names
    manifest = json.loads((path / "slideformer_checkpoint.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["files"].keys() == names - {"slideformer_checkpoint.json"}
    assert all(values["bytes"] == (path / name).stat().st_size for name, values in manifest["files"].items())


def test_safetensors_reads_the_state(trained):
    trainer, path = trained
    index = json.loads((path / "optimizer" / "index.json").read_text())
    assert index["moments"] == trainer.slide.engine.config.optimizer_states
    files = {file.name: load_file(file) for file in (path / "optimizer").glob("*.safetensors")}
    seen = 0
    for state in trainer.slide.engine.states:
        entry = index["parameters"][state.name]
        assert (tuple(entry["shape"]), entry["step"]) == (state.spec.shape, state.step)
        saved = files[entry["file"]]
        for part in MOMENT_FORMATS[index["moments"]].parts:
            assert torch.equal(saved[f"{state.name}.{part.name}"], state.moments[part.name])
            seen += 1
        if state.residual is not None:
            assert torch.equal(saved[f"{state.name}.master_residual"], state.residual)
            seen += 1
    assert seen == sum(len(saved) for saved in files.values())
    groups = trainer.optimizer.param_groups
    assert [len(group["parameters"]) for group in index["groups"]] == [len(g["params"]) for g in groups]
    assert [group["lr"] for group in index["groups"]] == [group["lr"] for group in groups]


def test_weights_load_with_from_pretrained_and_give_the_same_logits(trained):
    trainer, path = trained
    loaded, report = LlamaForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    engine = trainer.slide.engine
    for state in engine.states:
        assert torch.equal(loaded.get_parameter(state.name), state.read_master()), state.name
    assert loaded.dtype == engine.states[0].spec.source_dtype
    inputs = {"input_ids": Tokens(2, seed=1)[0]["input_ids"][None]}
    with torch.no_grad():
        # In the dtype that the units compute in; what was saved from fp32 masters is rounded to it.
        expected = trainer.model.eval()(**inputs).logits.float()
        logits = loaded.eval().to(next(trainer.model.parameters()).dtype)(**inputs).logits.float()
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)


def test_shards_are_those_of_transformers(trained, tmp_path):
    trainer, path = trained
    model = trainer.model
    model.save_pretrained(tmp_path / "ours", max_shard_size="3KB")
    saved = load_file(path / "model.safetensors")
    plain = LlamaForCausalLM(model.config).to(next(iter(saved.values())).dtype)
    plain.load_state_dict(saved)
    plain.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    ours = {file.name: file for file in (tmp_path / "ours").iterdir()}
    theirs = {file.name: file for file in (tmp_path / "theirs").iterdir()}
    assert ours.keys() == theirs.keys() and len(ours) > 4
    index = "model.safetensors.index.json"
    assert json.loads(ours[index].read_text()) == json.loads(theirs[index].read_text())
    for name in (name for name in ours if name.endswith(".safetensors")):
        with safe_open(ours[name], "pt") as one, safe_open(theirs[name], "pt") as two:
            assert one.metadata() == two.metadata() and set(one.keys()) == set(two.keys())
            assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in one.keys())  # noqa: SIM118


def test_save_only_model_loads_with_checks(tmp_path):
    _train(SPLIT, tmp_path, save_only_model=True, max_steps=2)
    path = tmp_path / "checkpoint-2"
    assert SavedCheckpoint.exists(path) and not (path / "optimizer").exists()
    assert LlamaForCausalLM.from_pretrained(path, dtype="auto").dtype == torch.bfloat16


def test_rotation_keeps_the_best(tmp_path):
    setting = BY_NAME["fp32 as split masters, best model"]
    trainer = _train(setting, tmp_path, save_total_limit=1, learning_rate=0.3, lr_scheduler_type="constant")
    best = trainer.state.best_global_step
    assert best and best < STEPS  # or nothing was protected
    left = sorted(path.name for path in tmp_path.iterdir() if "checkpoint" in path.name)
    assert left == [f"checkpoint-{best}"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    state = trainer.slide.engine.states[0]
    assert torch.equal(state.read_master(), saved[state.name])


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    trainer = _train(SPLIT, tmp_path, max_steps=2)
    path = tmp_path / "checkpoint-2"
    (path / "stale").write_text("old")
    trainer._save_checkpoint(trainer.model, None)
    assert not (path / "stale").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if "checkpoint" in p.name) == ["checkpoint-2"]
    SavedCheckpoint(path, CheckpointCalls())


def test_a_replacement_that_was_cut_off_is_undone(tmp_path):
    trainer = _train(SPLIT, tmp_path, max_steps=2)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".replaced-checkpoint-2")
    (tmp_path / ".tmp-checkpoint-4" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / ".delete-checkpoint-1").mkdir()
    (tmp_path / ".hidden").mkdir()
    trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".hidden"]


# -- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_resume_is_the_uninterrupted_run(tmp_path, setting):
    whole = final_state(_train(setting, tmp_path / "whole", save_total_limit=None))
    for step in (4, STEPS):  # with none left there must be none made
        ended = final_state(
            _train(setting, tmp_path / f"from-{step}", tmp_path / "whole" / f"checkpoint-{step}")
        )
        assert ended == whole


@pytest.mark.parametrize("bf16", [False, True])
def test_resume_of_a_model_whose_saved_tensors_are_computed(tmp_path, monkeypatch, bf16):
    # Fused experts are saved one by one; plain Trainer does not find them again.
    def train(directory: Path, seed: int, resume: Path | None = None):
        base = make_trainer(SETTINGS[0], directory, CheckpointCalls(), [])
        set_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=16))
        args = TrainingArguments(**{**base.args.to_dict(), "bf16": bf16, "max_steps": 4})
        trainer = SlideTrainer(model=model, args=args, train_dataset=base.train_dataset)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return final_state(trainer)

    whole = train(tmp_path / "whole", 0)
    names = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors").keys()
    assert any("experts.3.w1" in name for name in names)
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")  # which would make a copy of all weights
    assert train(tmp_path / "resumed", 99, tmp_path / "whole" / "checkpoint-2") == whole


@pytest.mark.parametrize("moved", [True, False])
def test_resume_of_a_model_whose_saved_tensors_are_transposed(tmp_path, monkeypatch, moved):
    def train(directory: Path, seed: int, resume: Path | None = None):
        trainer = make_trainer(
            Setting("transposed", args={"bf16": True, "max_steps": 4}),
            directory,
            CheckpointCalls(),
            [],
            model_seed=seed,
        )
        trainer.model._weight_conversions = [
            WeightConverter(r"mlp.up_proj.kernel", r"mlp.up_proj.weight", [Transpose(0, 1)])
        ]
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    whole = train(tmp_path / "whole", 0)
    path = tmp_path / "whole" / "checkpoint-2"
    saved = load_file(path / "model.safetensors")
    assert saved["model.layers.1.mlp.up_proj.kernel"].shape == (16, 24)
    last = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    state = next(s for s in whole.slide.engine.states if s.name == "model.layers.1.mlp.up_proj.weight")
    assert torch.equal(last["model.layers.1.mlp.up_proj.kernel"], state.read_master().T)
    if moved:
        assert final_state(train(tmp_path / "resumed", 99, path)) == final_state(whole)
        return

    # What is not only moved is not loaded as if it were, but left to transformers.
    def halved(self, input_dict, *args, **kwargs):
        return {name: value // 2 for name, value in convert(self, input_dict, *args, **kwargs).items()}

    class Reached(Exception):
        pass

    def from_pretrained(*args, **kwargs):
        raise Reached

    convert = Transpose.convert
    monkeypatch.setattr(Transpose, "convert", halved)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", from_pretrained)
    with pytest.raises(Reached):
        train(tmp_path / "resumed", 99, path)


@pytest.mark.parametrize(("saved", "loaded"), [("fp32", "8bit"), ("8bit", "fp32")])
def test_moments_of_the_other_format(tmp_path, saved, loaded):
    one = Setting("saved", torch.bfloat16, {"bf16": True}, {"optimizer_states": saved})
    other = Setting("loaded", torch.bfloat16, {"bf16": True}, {"optimizer_states": loaded})
    first = _train(one, tmp_path, max_steps=4)
    expected = _train(other, tmp_path / "expected", max_steps=1)
    expected.optimizer.optimizer.load_state_dict(first.optimizer.optimizer.state_dict())
    resumed = _train(other, tmp_path / "resumed", tmp_path / "checkpoint-4", max_steps=4)
    for one_state, two_state in zip(resumed.slide.engine.states, expected.slide.engine.states, strict=True):
        assert one_state.step == two_state.step == 4
        for name, tensor in two_state.moments.items():
            assert torch.equal(one_state.moments[name], tensor), (one_state.name, name)


@pytest.mark.parametrize("update", ["deferred", "overlapped"])
def test_the_optimizer_of_plain_trainer_resumes(tmp_path, update):
    ours = make_trainer(SETTINGS[0], tmp_path / "ours", CheckpointCalls(), [])
    args = TrainingArguments(
        **{**ours.args.to_dict(), "output_dir": str(tmp_path / "plain"), "max_grad_norm": 0.0}
    )
    plain = Trainer(model=ours.model, args=args, train_dataset=ours.train_dataset)
    plain.train()
    setting = Setting("fp32", args={"max_grad_norm": 0.0}, slide={"update": update})
    path = tmp_path / "plain" / f"checkpoint-{STEPS - 2}"
    # It rotated earlier ones away; the state of the last but one is loaded and trained to the end.
    resumed = _train(setting, tmp_path / "resumed", path)
    assert resumed.state.global_step == STEPS
    for state in resumed.slide.engine.states:
        torch.testing.assert_close(
            state.param.detach(), plain.model.get_parameter(state.name), rtol=1e-4, atol=1e-5
        )


def test_checkpoint_of_another_model_is_refused_before_anything_changes(tmp_path):
    _train(SPLIT, tmp_path, max_steps=2)
    path = tmp_path / "checkpoint-2"
    trainer = make_trainer(SPLIT, tmp_path / "other", CheckpointCalls(), [], model_seed=3)
    del trainer.model.model.layers[2]
    trainer.model.config.num_hidden_layers = 2
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"another model: it has 30 parameters, this model 21; 9 are unknown"
    ):
        trainer.train(resume_from_checkpoint=str(path))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())

    trainer = make_trainer(SPLIT, tmp_path / "frozen", CheckpointCalls(), [], model_seed=3)
    trainer.model.lm_head.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"1 differ, such as lm_head.weight with \(\(32, 16\), True\)"):
        trainer.train(resume_from_checkpoint=str(path))


@pytest.mark.parametrize("file", ["slideformer_checkpoint.json", "optimizer/index.json"])
def test_newer_format_is_refused(tmp_path, file):
    _train(SPLIT, tmp_path, max_steps=2)
    path = tmp_path / "checkpoint-2"
    manifest_file = path / "slideformer_checkpoint.json"
    values = json.loads((path / file).read_text())
    values["format_version"] = 2
    (path / file).write_text(json.dumps(values))
    if file != manifest_file.name:
        manifest = json.loads(manifest_file.read_text())
        del manifest["files"][file]
        manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"format 2, this version of hf_slideformer reads up to 1"):
        _train(SPLIT, tmp_path / "other", path)


# -- Accelerate's loops --------------------------------------------------------------------------------------


def _prepared(setting: Setting, directory: Path, seed: int):
    trainer = make_trainer(setting, directory, CheckpointCalls(), [], model_seed=seed)
    accelerator = trainer.accelerator
    assert isinstance(accelerator, SlideAccelerator)
    model, optimizer = accelerator.prepare(trainer.model, SlideAdamW(trainer.model.parameters(), lr=1e-2))
    return accelerator, model, optimizer


def _step(accelerator, model, optimizer, seed: int) -> float:
    batch = Tokens(2, seed)[0]["input_ids"][None]
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("setting", SETTINGS[:4], ids=lambda setting: setting.name)
def test_save_state_and_load_state(tmp_path, setting):
    setting = Setting(setting.name, setting.dtype, {"bf16": setting.args.get("bf16", False)}, setting.slide)
    loop = _prepared(setting, tmp_path / "one", 0)
    for seed in range(3):
        _step(*loop, seed)
    loop[0].save_state(str(tmp_path / "state"))
    after = [_step(*loop, seed) for seed in range(3, 6)]

    files = {path.name for path in (tmp_path / "state").iterdir()}
    assert {"model.safetensors", "optimizer", "slideformer_checkpoint.json"} <= files
    assert "optimizer.bin" not in files
    other = _prepared(setting, tmp_path / "two", 99)
    other[0].load_state(str(tmp_path / "state"))
    assert [_step(*other, seed) for seed in range(3, 6)] == after
    loop[0].load_state(str(tmp_path / "state"))  # in place
    assert [_step(*loop, seed) for seed in range(3, 6)] == after
    loop[0].save_state(str(tmp_path / "state"))  # over an older one
    losses = []
    for one in (loop, other):
        one[0].load_state(str(tmp_path / "state"))
        losses.append(_step(*one, 7))
    assert losses[0] == losses[1]


def test_load_state_refuses_what_is_not_whole(tmp_path):
    loop = _prepared(SPLIT, tmp_path / "one", 0)
    _step(*loop, 0)
    loop[0].save_state(str(tmp_path / "state"))
    file = tmp_path / "state" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="model.safetensors is not whole"):
        loop[0].load_state(str(tmp_path / "state"))
    (tmp_path / "state" / "slideformer_checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="interrupted"):
        loop[0].load_state(str(tmp_path / "state"))
