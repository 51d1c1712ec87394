"""Saving beside training: steps go on while files are written, and nothing of a later step gets into them."""

import dataclasses
import errno
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TrackioCallback, WandbCallback, WandbLogModel

from hf_slideformer import accelerator as accelerator_module
from hf_slideformer.checkpoint import CheckpointCalls, SavedCheckpoint
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.state import streamed
from hf_slideformer.engine.state.on_device import OnDevice
from hf_slideformer.engine.state.parameters import live_tensors
from hf_slideformer.engine.state.streamed import StreamedUnit
from hf_slideformer.engine.state.updates import Updates
from hf_slideformer.errors import CheckpointError, DiskError
from hf_slideformer.trainer_checkpoints import _reads_saved

from .kill import SETTINGS, Setting, final_state, make_trainer
from .test_faults import Faulty

BY_NAME = {setting.name: setting for setting in SETTINGS}
SPLIT = BY_NAME["split masters"]


class Gated(CheckpointCalls):
    """Writes nothing while the gate is closed, and in small pieces; a new checkpoint may close it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.closes_on_save = False

    def make_directory(self, path):
        if self.closes_on_save and path.parent.name.startswith(".tmp-checkpoint-"):
            self.gate.clear()
        super().make_directory(path)

    def write(self, descriptor, data):
        # What the main thread writes is small and comes before anything goes on.
        if threading.current_thread() is not threading.main_thread():
            assert self.gate.wait(120)
        return super().write(descriptor, data[:2048])


def _trainer(setting: Setting, directory: Path, files: CheckpointCalls | None = None, callbacks=(), **slide):
    setting = Setting(
        setting.name,
        setting.dtype,
        {**setting.args, "load_best_model_at_end": False},
        {**setting.slide, **slide},
        setting.model,
        setting.ram_share,
    )
    trainer = make_trainer(setting, directory, files or CheckpointCalls(), list(callbacks))
    trainer.args.max_steps = 4
    return trainer


def _close_gate_on_save(trainer, files: Gated) -> None:
    """After a save nothing is written until the test opens the gate, or somebody waits for the checkpoint."""
    finish = trainer._finish_save
    files.closes_on_save = True

    def finish_save():
        if trainer._pending_save is not None:
            files.gate.set()
        finish()

    trainer._finish_save = finish_save


def _records(path: Path) -> dict:
    records = SavedCheckpoint(path, CheckpointCalls()).records
    return {name: record for name, record in records.items() if name.endswith((".safetensors", ".json"))}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_steps_go_on_and_nothing_of_them_is_saved(tmp_path, monkeypatch, setting):
    blocking = _trainer(setting, tmp_path / "blocking", saving="blocking")
    blocking.train()

    files, enqueued, too_early = Gated(), [], []
    trainer = _trainer(setting, tmp_path / "overlapped", files)
    _close_gate_on_save(trainer, files)
    enqueue, update = StreamedUnit._submit_update, streamed.update_unit

    def unit_update(home, *args):
        result = enqueue(home, *args)
        # Forward is over (and backward, where updates are deferred), and nothing has been written yet.
        if not files.gate.is_set():
            pending = trainer._pending_save
            enqueued.append((trainer.state.global_step, pending.checkpoint.target.name, home.name))
            assert not pending.is_over and not pending.checkpoint.target.exists()
            if len({name for *_, name in enqueued}) == len(trainer.slide.engine.executor.units):
                files.gate.set()
        return result

    def update_unit(memory, grads, fp32, runs, threads):
        held = trainer.slide.engine._updates.held
        first = runs[0].members[0]
        if held is not None and not held.released(held.group_of[first.order]).is_complete:
            too_early.append(first.name)
        update(memory, grads, fp32, runs, threads)

    monkeypatch.setattr(StreamedUnit, "_submit_update", unit_update)
    monkeypatch.setattr(streamed, "update_unit", update_unit)
    trainer.train()
    assert too_early == []
    units = trainer.slide.engine.executor.units
    assert sorted(enqueued) == [(2, "checkpoint-2", unit.name) for unit in units]
    assert final_state(trainer) == final_state(blocking)
    for name in ("checkpoint-2", "checkpoint-4"):
        ours, theirs = _records(tmp_path / "overlapped" / name), _records(tmp_path / "blocking" / name)
        # The trainer's state has times and paths of its own.
        assert ours.pop("trainer_state.json") and theirs.pop("trainer_state.json")
        assert len(ours) > 5 and ours == theirs


@pytest.mark.parametrize("name", ["split masters", "overlapped updates"])
def test_updates_of_resident_parameters_wait(tmp_path, monkeypatch, name):
    """They are made by the main thread in `step`, or by autograd's in backward."""
    blocking = _trainer(BY_NAME[name], tmp_path / "blocking", saving="blocking")
    # The planner streams such small layers.
    decisions = dataclasses.replace(blocking.slide.plan.decisions, resident=(0, 1))
    monkeypatch.setattr(accelerator_module, "SlideEngine", partial(SlideEngine, decisions=decisions))
    blocking.train()
    files, waited = Gated(), []
    trainer = _trainer(BY_NAME[name], tmp_path / "overlapped", files)
    _close_gate_on_save(trainer, files)
    use_up = OnDevice.use_up

    def wait(home, state, grad, step):
        if not files.gate.is_set():
            assert not any(handle.is_complete for handle in step.after)
            waited.append(state.name)
            files.gate.set()
        used = use_up(home, state, grad, step)
        assert all(handle.is_complete for handle in step.after)
        return used

    monkeypatch.setattr(OnDevice, "use_up", wait)
    trainer.train()
    assert len(waited) == 1
    assert trainer.slide.plan.decisions.resident == (0, 1)
    assert final_state(trainer) == final_state(blocking)
    for step in (2, 4):
        ours, theirs = (_records(tmp_path / run / f"checkpoint-{step}") for run in ("overlapped", "blocking"))
        assert all(ours[file] == theirs[file] for file in ours if file.endswith(".safetensors"))


def test_a_failed_write_ends_training_at_the_next_step(tmp_path):
    trainer = _trainer(SPLIT, tmp_path, Faulty(("write", 3), errno.EIO))
    steps = []
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer._pending_save is not None:
            trainer._pending_save.wait()
        steps.append(trainer.state.global_step)
        return step(*args, **kwargs)

    trainer.training_step = training_step
    with pytest.raises(DiskError, match=r"\.tmp-checkpoint-2.* failed.*EIO"):
        trainer.train()
    assert steps[-1] == 2 and steps.count(2) == 1
    assert trainer._pending_save is None and trainer.state.best_model_checkpoint is None
    assert not [path for path in tmp_path.iterdir() if "checkpoint" in path.name]
    trainer._files = CheckpointCalls()
    trainer.train()  # updates were let go of, and the same trainer can go on
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_failed_last_write_is_raised_by_train(tmp_path):
    first = _trainer(SPLIT, tmp_path / "first", Faulty())
    first.args.max_steps = 2
    first.train()
    number = first._files.counts["fsync"] + 3
    trainer = _trainer(SPLIT, tmp_path / "run", Faulty(("fsync", number), errno.EIO))
    with pytest.raises(DiskError, match=r"\.tmp-checkpoint-4.* failed.*EIO"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert trainer.state.global_step == 4


def test_weights_written_while_they_are_saved_are_noticed(tmp_path):
    files = Gated()
    trainer = _trainer(SPLIT, tmp_path, files)
    _close_gate_on_save(trainer, files)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if not files.gate.is_set():
            with torch.no_grad():
                trainer.model.model.norm.weight.mul_(2.0)
            files.gate.set()
        return step(*args, **kwargs)

    trainer.training_step = training_step
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight was written to .*synchronize.*blocking"):
        trainer.train()
    assert not [path for path in tmp_path.iterdir() if "checkpoint" in path.name]


@pytest.mark.parametrize("how", ["load_state_dict", "weights_changed", "optimizer", "synchronize"])
def test_whoever_changes_state_waits(tmp_path, monkeypatch, how):
    files = Gated()
    trainer = _trainer(SPLIT, tmp_path, files)
    trainer.args.save_total_limit = None
    _close_gate_on_save(trainer, files)
    step, waited = trainer.training_step, []

    def then_open(original):
        def wait(*args):
            waited.append(how)
            files.gate.set()
            return original(*args)

        return wait

    def training_step(*args, **kwargs):
        if not files.gate.is_set():
            with monkeypatch.context() as patch:
                if how == "synchronize":
                    patch.setattr(trainer, "_finish_save", then_open(trainer._finish_save))
                    trainer.slide.synchronize()
                    assert (tmp_path / "checkpoint-2").exists()
                else:
                    patch.setattr(Updates, "wait_held", then_open(Updates.wait_held))
                    if how == "load_state_dict":
                        doubled = {name: 2 * value for name, value in trainer.model.state_dict().items()}
                        trainer.model.load_state_dict(doubled)
                    elif how == "optimizer":
                        optimizer = trainer.optimizer.optimizer
                        state = optimizer.state_dict()
                        doubled = {
                            key: {name: 2 * tensor for name, tensor in values.items()}
                            for key, values in state["state"].items()
                        }
                        optimizer.load_state_dict({**state, "state": doubled})
                    else:
                        trainer.slide.weights_changed()
        return step(*args, **kwargs)

    trainer.training_step = training_step
    if how == "weights_changed":  # what had been written by then is not known
        with pytest.raises(CheckpointError, match=r"weights_changed\(\) was called"):
            trainer.train()
        assert waited
        return
    trainer.train()
    assert waited
    expected = _trainer(SPLIT, tmp_path / "expected", saving="blocking")
    expected.args.max_steps = 2
    expected.train()
    ours, theirs = _records(tmp_path / "checkpoint-2"), _records(tmp_path / "expected" / "checkpoint-2")
    tensors = [name for name in theirs if name.endswith(".safetensors")]
    assert len(tensors) == 5 and all(ours[name] == theirs[name] for name in tensors)


class _Looks(TrainerCallback):
    """Looks for the checkpoint when it is told of it, and before the step after that."""

    def __init__(self, event: str, output_dir: Path) -> None:
        self.seen: list[bool] = []

        def look(args, state, control, **kwargs):
            if event == "on_save" or (state.global_step and state.global_step % 2 == 0):
                self.seen.append((output_dir / f"checkpoint-{state.global_step}").exists())

        self.look = look


class _LooksOnSave(_Looks):
    def on_save(self, args, state, control, **kwargs):
        self.look(args, state, control)


class _LooksOnStepBegin(_Looks):
    def on_step_begin(self, args, state, control, **kwargs):
        self.look(args, state, control)


@pytest.mark.parametrize("kind", [_LooksOnSave, _LooksOnStepBegin])
def test_callbacks_of_others_see_whole_checkpoints(tmp_path, kind):
    callback = kind("on_save" if kind is _LooksOnSave else "on_step_begin", tmp_path)
    trainer = _trainer(SPLIT, tmp_path, callbacks=[callback])
    trainer.train()
    assert callback.seen == [True] * (2 if kind is _LooksOnSave else 1)


def test_loggers_of_transformers_are_waited_for_where_they_upload():
    class Own(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            pass

    assert not _reads_saved(Own())
    assert _reads_saved(_LooksOnSave("on_save", Path()))
    wandb, trackio = WandbCallback.__new__(WandbCallback), TrackioCallback.__new__(TrackioCallback)
    for value, reads in ((WandbLogModel.FALSE, False), (WandbLogModel.CHECKPOINT, True)):
        wandb._log_model = value
        assert _reads_saved(wandb) == reads
    assert not _reads_saved(trackio)


def test_stale_residuals_on_disk_are_saved_as_zeros(tmp_path):
    """Weights that were written by hand have no residual, also while the one on disk is that of other weights."""
    trainer = _trainer(BY_NAME["state on disk"], tmp_path)
    trainer.args.max_steps = 2
    trainer.train()
    engine = trainer.slide.engine
    unit = engine.plan.decisions.on_disk[0]
    name, param = next(
        (name, param)
        for name, param in trainer.model.model.layers[unit].named_parameters()
        if param.dim() == 2
    )
    with torch.no_grad(), live_tensors():  # as by a function that torch hands the memory to
        param.mul_(0.5)
    trainer.state.global_step = 4
    trainer._save_checkpoint(trainer.model, None)
    saved = load_file(tmp_path / "checkpoint-4" / "optimizer" / f"unit-{unit:05d}.safetensors")
    prefix = f"model.layers.{unit}."
    assert not saved[f"{prefix}{name}.master_residual"].any()
    assert any(saved[key].any() for key in saved if key.endswith("master_residual"))
    weights = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert torch.equal(weights[f"{prefix}{name}"], param.float())


def test_blocking(tmp_path):
    trainer = _trainer(SPLIT, tmp_path, saving="blocking")
    step, found = trainer.training_step, []

    def training_step(*args, **kwargs):
        found.append(trainer._pending_save is None and (tmp_path / "checkpoint-2").exists())
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert found == [False] * 4 + [True] * 3  # two micro-batches a step, one where an epoch ends


@pytest.mark.parametrize("name", ["split masters", "overlapped updates"])
def test_units_are_released_in_the_order_of_their_updates(tmp_path, name):
    trainer = _trainer(BY_NAME[name], tmp_path)
    trainer.args.max_steps = 2
    trainer.train()
    held = trainer.slide.engine.hold()
    outside = len(held.groups) - 1
    assert [state.streams for state in held.groups[outside]] == [False] * 3
    assert held.order == ((2, 1, 0, outside) if name == "overlapped updates" else (outside, 0, 1, 2))
    held.release_all()
