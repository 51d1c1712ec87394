"""Code of a script's own that runs while a checkpoint is saved: it finds the files, and what it leaves there stays."""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from hf_slideformer import SlideTrainer, SlideTrainerMixin, trainer_checkpoints
from hf_slideformer.checkpoint import CheckpointCalls, SavedCheckpoint
from hf_slideformer.errors import CheckpointError
from tests.trainer import runs

NAME = "added.bin"


def _folder(trainer, trial=None) -> Path:
    return Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"


class Adds:
    """After the save, where it is."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        torch.save(torch.ones(2), _folder(self, trial) / NAME)


class AddsBefore:
    """Before it, where it will be."""

    def _save_checkpoint(self, model, trial):
        _folder(self, trial).mkdir(exist_ok=True, parents=True)
        (_folder(self, trial) / "sub").mkdir(exist_ok=True)
        torch.save(torch.ones(2), _folder(self, trial) / "sub" / NAME)
        super()._save_checkpoint(model, trial)


class Rewrites:
    """Another configuration, and weights with a note."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        config = json.loads((_folder(self) / "config.json").read_text())
        (_folder(self) / "config.json").write_text(json.dumps({**config, "mine": [1] * 99}))
        weights = load_file(_folder(self) / "model.safetensors")
        save_file(weights, _folder(self) / "model.safetensors", metadata={"format": "pt", "by": "me"})


class Removes:
    """What it does not need: a run that is resumed makes its optimizer anew."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        for name in ("optimizer", "optimizer.pt"):
            path = _folder(self) / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class RenamesWeights:
    """In the middle of a save: the weights have been written when `_save` returns."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        weights = load_file(Path(output_dir) / "model.safetensors")
        save_file({"mine": next(iter(weights.values()))}, Path(output_dir) / NAME)
        save_file(weights, Path(output_dir) / "model.safetensors", metadata={"format": "pt", "by": "me"})


class SavesTwice:
    """A second copy, from inside of a save."""

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        assert (Path(output_dir) / "model.safetensors").exists()
        self.model.save_pretrained(Path(output_dir) / "copy")


class LooksAtOptimizer:
    """Optimizer state has been written when the method returns."""

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        path = Path(output_dir)
        assert (path / "optimizer.pt").exists() or list((path / "optimizer").glob("*.safetensors"))
        (path / NAME).write_text("seen")


class LogsAfterwards:
    """After everything."""

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.state.global_step % 2 == 0:
            (_folder(self) / NAME).write_text("logged")


class Elsewhere(Adds):
    """All checkpoints in a directory of their own."""

    def _get_output_dir(self, trial):
        return os.path.join(self.args.output_dir, "mine")


MIXINS = [
    Adds,
    AddsBefore,
    Rewrites,
    Removes,
    RenamesWeights,
    SavesTwice,
    LooksAtOptimizer,
    LogsAfterwards,
    Elsewhere,
]


def _run(cls, directory: Path, steps: int = 4, resume=None, **kwargs):
    trainer = runs.make(
        cls,
        runs.llama(),
        directory,
        max_steps=steps,
        save_strategy="steps",
        save_steps=2,
        trainer_kwargs=kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _files(directory: Path) -> dict[str, list[str]]:
    """Of each checkpoint the names of its files, but for those in which plain Trainer keeps the optimizer."""
    return {
        path.name: sorted(
            name
            for file in path.rglob("*")
            if file.is_file()
            and not (name := file.relative_to(path).as_posix()).startswith(("optimizer", "slideformer_"))
        )
        for path in sorted(directory.rglob("checkpoint-*"))
    }


def _check(directory: Path) -> None:
    for path in directory.rglob("checkpoint-*"):
        saved = SavedCheckpoint(path, CheckpointCalls())
        saved.check_files(saved.records)
        found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        assert saved.records.keys() == found - {"slideformer_checkpoint.json"}


@pytest.mark.parametrize("below", [False, True], ids=["in front", "behind"])
@pytest.mark.parametrize("mixin", MIXINS, ids=lambda mixin: mixin.__name__)
def test_every_checkpoint_has_what_was_added(tmp_path, mixin, below):
    """With the class in front of ours, or ours in front of it: as with plain Trainer; and it resumes."""
    theirs = type("Theirs", (mixin, Trainer), {})
    ours = type("Ours", (SlideTrainerMixin, theirs) if below else (mixin, SlideTrainer), {})
    _run(theirs, tmp_path / "plain")
    _run(ours, tmp_path / "slide")
    expected = _files(tmp_path / "plain")
    assert len(expected) == 2 and _files(tmp_path / "slide") == expected
    _check(tmp_path / "slide")
    last = next((tmp_path / "slide").rglob("checkpoint-4"))
    resumed = _run(ours, tmp_path / "slide", steps=6, resume=str(last))
    assert resumed.state.global_step == 6
    _check(tmp_path / "slide")
    assert len(_files(tmp_path / "slide")) == 3


def _replaced_on_the_instance(trainer):
    save = trainer._save_checkpoint

    def save_and_add(model, trial):
        save(model, trial)
        (_folder(trainer) / NAME).write_text("here")

    return {"_save_checkpoint": save_and_add}


def _wrapped_on_the_instance(trainer):
    save = trainer._save_checkpoint

    @functools.wraps(Trainer._save_checkpoint)
    def save_and_add(model, trial):
        save(model, trial)
        (_folder(trainer) / NAME).write_text("here")

    return {"_save_checkpoint": save_and_add}


@pytest.mark.parametrize("replaced", [_replaced_on_the_instance, _wrapped_on_the_instance])
def test_methods_put_in_place_of_ours(tmp_path, replaced):
    trainer = runs.make(
        SlideTrainer, runs.llama(), tmp_path, max_steps=4, save_strategy="steps", save_steps=2
    )
    vars(trainer).update(replaced(trainer))
    trainer.train()
    assert all(NAME in names for names in _files(tmp_path).values()) and len(_files(tmp_path)) == 2
    _check(tmp_path)


class _AddsOnSave(TrainerCallback):
    """A callback that adds a file and rewrites another."""

    def on_save(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (path / NAME).write_text("here")
        (path / "config.json").write_text((path / "config.json").read_text() + "\n")


@pytest.mark.parametrize("on_the_instance", [False, True])
def test_callbacks(tmp_path, on_the_instance):
    callback = _AddsOnSave()
    if on_the_instance:
        callback, adds = TrainerCallback(), callback
        callback.on_save = adds.on_save
    _run(SlideTrainer, tmp_path, callbacks=[callback])
    assert all(NAME in names for names in _files(tmp_path).values())
    _check(tmp_path)
    _run(SlideTrainer, tmp_path, steps=6, resume=True)


def test_adding_where_the_checkpoint_is_not_yet(tmp_path):
    """A class behind ours that takes the path from the arguments: it is told what to take."""

    class Theirs(Trainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            torch.save(torch.ones(2), path / NAME)

    class Ours(SlideTrainerMixin, Theirs):
        pass

    with pytest.raises(CheckpointError, match=r"not in its place before it is whole.*_get_output_dir"):
        _run(Ours, tmp_path)
    assert not list(tmp_path.glob("*checkpoint*"))

    class MakesIt(Trainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            path.mkdir(exist_ok=True)
            torch.save(torch.ones(2), path / NAME)

    _run(type("Ours", (SlideTrainerMixin, MakesIt), {}), tmp_path)
    assert all(NAME in names for names in _files(tmp_path).values()) and len(_files(tmp_path)) == 2
    _check(tmp_path)


def test_an_earlier_checkpoint_is_replaced_but_for_what_was_added(tmp_path):
    """Saved again at the same step, with less in it: state that nobody wrote is gone."""
    _run(SlideTrainer, tmp_path, steps=2)
    path = tmp_path / "checkpoint-2"
    (path / NAME).write_text("mine")
    (path / "tokens").mkdir()
    (path / "tokens" / "link").symlink_to("../config.json")
    (path / "nowhere").symlink_to("gone")
    trainer = runs.make(
        SlideTrainer,
        runs.llama(),
        tmp_path,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_only_model=True,
    )
    trainer.train()
    assert (path / NAME).read_text() == "mine" and (path / "tokens" / "link").is_file()
    assert not (path / "optimizer").exists() and not (path / "scheduler.pt").exists()
    _check(tmp_path)


def test_a_plain_checkpoint_is_replaced(tmp_path):
    """Plain Trainer's optimizer would belong to other weights."""
    plain = runs.make(Trainer, runs.llama(), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    plain.train()
    (tmp_path / "checkpoint-2" / NAME).write_text("mine")
    _run(SlideTrainer, tmp_path, steps=2)
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert NAME in names and "optimizer" in names and "optimizer.pt" not in names
    _check(tmp_path)


def test_saving_overlaps_where_nobody_looks(tmp_path, monkeypatch):
    began = []
    background = trainer_checkpoints.BackgroundSave
    monkeypatch.setattr(
        trainer_checkpoints, "BackgroundSave", lambda *args: began.append(1) or background(*args)
    )

    class Quiet(SlideTrainer):
        """Overrides what has nothing to do with files."""

        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

        def log(self, *args, **kwargs):
            super().log(*args, **kwargs)

        def create_scheduler(self, *args, **kwargs):
            return super().create_scheduler(*args, **kwargs)

    _run(Quiet, tmp_path / "quiet")
    assert began == [1, 1]
    _run(type("Ours", (Adds, SlideTrainer), {}), tmp_path / "adds")
    assert began == [1, 1]


def test_what_counts_as_code_of_others(monkeypatch):
    def of(cls):
        return trainer_checkpoints._code_of_others(cls.__new__(cls))

    assert of(SlideTrainer) == []
    assert of(type("Named", (SlideTrainer,), {})) == []
    assert of(type("Ours", (Adds, SlideTrainer), {})) == ["Adds._save_checkpoint"]
    assert of(type("Ours", (SlideTrainerMixin, type("Theirs", (Adds, Trainer), {})), {})) == [
        "Adds._save_checkpoint"
    ]
    monkeypatch.setattr(Trainer, "_save_rng_state", lambda self, output_dir: None)
    assert of(SlideTrainer) == ["Trainer._save_rng_state"]


def test_trainers_of_trl_save_beside_training():
    """They write a card before they save, and what they add they put where they are led."""
    trl_trainers = pytest.importorskip("hf_slideformer.trl_trainers")
    for cls in (trl_trainers.SlideSFTTrainer, trl_trainers.SlideDPOTrainer):
        assert "_save_checkpoint" in vars(cls.__mro__[cls.__mro__.index(SlideTrainerMixin) + 2])
        assert trainer_checkpoints._code_of_others(cls.__new__(cls)) == []
