"""Checkpoints, and directories of them, that are symbolic links: links are removed, never what is behind."""

import shutil
from pathlib import Path

import pytest

from hf_slideformer.checkpoint import (
    CheckpointCalls,
    NewCheckpoint,
    SavedCheckpoint,
    clean_up,
    remove_checkpoint,
)

from .kill import SETTINGS, final_state, make_trainer

SPLIT = SETTINGS[1]


def _trainer(directory: Path, max_steps: int, limit: int | None = 2, seed: int = 0):
    trainer = make_trainer(SPLIT, directory, CheckpointCalls(), [], model_seed=seed)
    trainer.args.max_steps, trainer.args.save_total_limit = max_steps, limit
    return trainer


def _move_away(path: Path, elsewhere: Path) -> Path:
    """Put a checkpoint on another disk, with a link in its place."""
    elsewhere.mkdir(exist_ok=True)
    moved = elsewhere / path.name
    shutil.move(path, moved)
    path.symlink_to(moved)
    return moved


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if "checkpoint" in path.name)


def _check(path: Path) -> None:
    saved = SavedCheckpoint(path, CheckpointCalls())
    saved.check_files(saved.records)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The checkpoints of steps 2 and 4, to be copied, of a run of six; and its state at the end."""
    directory = tmp_path_factory.mktemp("run")
    trainer = _trainer(directory, 6, None)
    trainer.train()
    shutil.rmtree(directory / "checkpoint-6")
    return directory, final_state(trainer)


@pytest.fixture
def run(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints[0], tmp_path / "run")
    return tmp_path / "run", two_checkpoints[1]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_link_is_rotated_away(run, tmp_path, limit):
    directory, _ = run
    moved = [_move_away(directory / f"checkpoint-{step}", tmp_path / "large") for step in (2, 4)]
    _trainer(directory, 6, limit).train(resume_from_checkpoint=str(directory / "checkpoint-4"))
    assert _names(directory) == ["checkpoint-4", "checkpoint-6"][-limit:]
    for path in moved:
        _check(path)


def test_resuming_from_a_link(run, tmp_path):
    directory, expected = run
    _move_away(directory / "checkpoint-4", tmp_path / "large")
    link = tmp_path / "the-one"
    link.symlink_to(directory / "checkpoint-4")
    for checkpoint in (True, str(link)):
        shutil.rmtree(directory / "checkpoint-6", ignore_errors=True)
        trainer = _trainer(directory, 6, None, seed=99)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert final_state(trainer)["state"] == expected["state"]


def test_an_output_directory_that_is_a_link(run, tmp_path):
    """The best checkpoint is the same one by another path."""
    directory, expected = run
    link = tmp_path / "link"
    link.symlink_to(directory)
    trainer = _trainer(link, 6, 2, seed=99)
    load = trainer._load_optimizer_and_scheduler

    def load_and_know(checkpoint):
        load(checkpoint)
        trainer.state.best_model_checkpoint = str(directory / "checkpoint-2")

    trainer._load_optimizer_and_scheduler = load_and_know
    trainer.train(resume_from_checkpoint=True)
    assert final_state(trainer)["state"] == expected["state"]
    assert link.is_symlink() and _names(directory) == ["checkpoint-2", "checkpoint-6"]


def test_links_by_other_names_stay(run):
    directory, _ = run
    link = directory / "checkpoint-latest"
    link.symlink_to("checkpoint-4")
    _trainer(directory, 6, 1).train(resume_from_checkpoint=str(directory / "checkpoint-4"))
    assert _names(directory) == ["checkpoint-6", "checkpoint-latest"] and link.is_symlink()


def _new(directory: Path, content: str) -> NewCheckpoint:
    checkpoint = NewCheckpoint(directory / "checkpoint-3", CheckpointCalls(), 1000)
    (checkpoint.path / "config.json").write_text(content)
    return checkpoint


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_replaced(tmp_path, dangling):
    behind = tmp_path / "behind"
    if not dangling:
        _new(behind, "old").finish()
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "checkpoint-3"
    link.symlink_to(behind / "checkpoint-3")
    _new(tmp_path / "run", "new").finish()
    assert not link.is_symlink() and (link / "config.json").read_text() == "new"
    assert list((tmp_path / "run").iterdir()) == [link]
    assert dangling or (behind / "checkpoint-3" / "config.json").read_text() == "old"


@pytest.mark.parametrize("dangling", [False, True])
def test_leftovers_that_are_links(tmp_path, dangling):
    behind = tmp_path / "behind"
    _new(behind, "old").finish()
    target = behind / ("gone" if dangling else "checkpoint-3")
    run = tmp_path / "run"
    run.mkdir()
    for prefix, step in ((".tmp-", 1), (".delete-", 2), (".replaced-", 3)):
        (run / f"{prefix}checkpoint-{step}").symlink_to(target)
    clean_up(run, CheckpointCalls())
    assert _names(run) == ["checkpoint-3"] and (run / "checkpoint-3").is_symlink()
    _check(behind / "checkpoint-3")
    remove_checkpoint(run / "checkpoint-3", CheckpointCalls())
    assert _names(run) == []
    _check(behind / "checkpoint-3")
