"""The last calls of a save: wherever one fails, what the error says of the checkpoint is what lies there."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from hf_slideformer.checkpoint import (
    BackgroundSave,
    CheckpointCalls,
    NewCheckpoint,
    SavedCheckpoint,
    clean_up,
)
from hf_slideformer.checkpoint.directory import remove_checkpoint
from hf_slideformer.errors import DiskError

from .kill import SETTINGS, make_trainer
from .test_format import _prepared, _step
from .test_save_state import _check, _name, _visible

BY_NAME = {setting.name: setting for setting in SETTINGS}
SPLIT, BEST = BY_NAME["split masters"], BY_NAME["fp32 as split masters, best model"]


class Failing(CheckpointCalls):
    """Fails where it is told to.

    Args:
        fsync_of: syncing this directory fails once there is a checkpoint in it that was renamed into place.
        times: how often that fails.
        rename_to: renaming to this name fails.
        done: and is done all the same.
        remove: removing directories that begin so fails.
    """

    def __init__(
        self,
        *,
        fsync_of: Path | None = None,
        after: Path | None = None,
        times: int = 10**6,
        rename_to: str = "",
        done: bool = False,
        remove: str = "never",
    ) -> None:
        self._fsync_of, self._after, self._times = fsync_of, after, times
        self._rename_to, self._done, self._remove = rename_to, done, remove

    def _fail(self) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fsync(self, descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        after = self._after is None or self._after.exists()
        if path == self._fsync_of and after and self._times > 0:
            self._times -= 1
            self._fail()
        super().fsync(descriptor)

    def rename(self, source, target):
        if target.name == self._rename_to:
            if self._done:
                super().rename(source, target)
            self._fail()
        super().rename(source, target)

    def remove_tree(self, path):
        if path.name.startswith(self._remove) and path.exists():
            self._fail()
        super().remove_tree(path)


def _new(directory: Path, files: CheckpointCalls, content: str) -> NewCheckpoint:
    checkpoint = NewCheckpoint(directory / "checkpoint-3", files, 1000)
    (checkpoint.path / "config.json").write_text(content)
    return checkpoint


def _content(directory: Path) -> str:
    saved = SavedCheckpoint(directory / "checkpoint-3", CheckpointCalls())
    saved.check_files(saved.records)
    return (saved.path / "config.json").read_text()


def _hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


@pytest.fixture
def old(tmp_path):
    """A directory with a whole checkpoint that is about to be replaced."""
    _new(tmp_path, CheckpointCalls(), "old").finish()
    return tmp_path


def test_a_rename_that_the_disk_does_not_confirm(tmp_path):
    checkpoint = _new(tmp_path, Failing(fsync_of=tmp_path, after=tmp_path / "checkpoint-3"), "new")
    with pytest.raises(
        DiskError, match=r"checkpoint-3 is in its place and whole, .*not confirm.*EIO"
    ) as raised:
        checkpoint.finish()
    assert raised.value.errno == errno.EIO and "what it replaced" not in str(raised.value)
    checkpoint.abandon()  # as whoever made it does after an error
    assert checkpoint.is_in_place and _content(tmp_path) == "new" and _hidden(tmp_path) == []


def test_what_was_replaced_stays_until_the_disk_confirms(old):
    failing = Failing(fsync_of=old)
    checkpoint = _new(old, failing, "new")
    with pytest.raises(DiskError, match=r"whole, .*replaced is kept in .*\.replaced-checkpoint-3"):
        checkpoint.finish()
    assert checkpoint.is_in_place and _content(old) == "new"
    assert (old / ".replaced-checkpoint-3" / "config.json").read_text() == "old"
    clean_up(old, failing)  # it still does not
    assert _hidden(old) == [".replaced-checkpoint-3"]
    clean_up(old, CheckpointCalls())
    assert _hidden(old) == [] and _content(old) == "new"


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("name", [".replaced-checkpoint-3", "checkpoint-3"])
def test_a_rename_that_fails(old, name, done):
    """Over a network a call may fail although it was done."""
    arrives = name == "checkpoint-3" and done
    checkpoint = _new(old, Failing(rename_to=name, done=done), "new")
    # Putting the old one back is a rename to the same name.
    undoes = name == "checkpoint-3" and not done
    with pytest.raises(DiskError, match="renaming .*EIO") as raised:
        checkpoint.finish()
    assert checkpoint.is_in_place == arrives
    notes = " ".join(getattr(raised.value, "__notes__", []))
    assert (
        ".replaced-checkpoint-3 is the earlier checkpoint-3; the next start puts it back" in notes
    ) == undoes
    clean_up(old, CheckpointCalls())
    assert _content(old) == ("new" if arrives else "old") and _hidden(old) == []


@pytest.mark.parametrize("leftover", [".tmp-", ".replaced-"])
def test_leftovers_that_cannot_be_removed_are_no_failure(old, caplog, leftover):
    files = Failing()
    checkpoint = _new(old, files, "new")
    files._remove = leftover
    checkpoint.finish()
    assert checkpoint.is_in_place and _content(old) == "new" and _hidden(old) == [f"{leftover}checkpoint-3"]
    assert any(f"{leftover}checkpoint-3 could not be removed" in message for message in caplog.messages)
    clean_up(old, CheckpointCalls())
    assert _hidden(old) == []


def test_a_directory_written_in_place(tmp_path):
    target = tmp_path / "checkpoint-3"
    for failing, whole in (
        (Failing(fsync_of=target, after=target / "slideformer_checkpoint.json"), True),
        (_Last(), False),
    ):
        checkpoint = NewCheckpoint(target, failing, 1000, in_place=True)
        (target / "config.json").write_text("{}")
        with pytest.raises(
            DiskError, match="in its place" if whole else "slideformer_checkpoint.json failed"
        ):
            checkpoint.finish()
        checkpoint.abandon()
        assert checkpoint.is_in_place == whole == SavedCheckpoint.exists(target)


class _Last(CheckpointCalls):
    """The manifest gets all its bytes, but not to the disk."""

    def fsync(self, descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("slideformer_checkpoint.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync(descriptor)


@pytest.mark.parametrize("times", [1, 10**6])
def test_rotation_follows_what_is_in_its_place(tmp_path, times):
    """Nothing goes before the disk has confirmed the new one: an older checkpoint is all that would be left."""
    _new(tmp_path, CheckpointCalls(), "old").finish()
    (tmp_path / "checkpoint-3").rename(tmp_path / "checkpoint-1")
    files = Failing(fsync_of=tmp_path, after=tmp_path / "checkpoint-3", times=times)
    save = BackgroundSave(
        _new(tmp_path, files, "new"), lambda: remove_checkpoint(tmp_path / "checkpoint-1", files)
    )
    error = save.wait()
    assert isinstance(error, DiskError) and "in its place" in str(error) and save.is_in_place
    remaining = sorted(path.name for path in tmp_path.iterdir())
    if times == 1:
        assert remaining == ["checkpoint-3"]
    else:
        assert remaining == ["checkpoint-1", "checkpoint-3"]
        assert "syncing" in error.__notes__[0]


@pytest.mark.parametrize("saving", ["overlapped", "blocking"])
def test_the_best_checkpoint_is_known_though_not_confirmed(tmp_path, saving):
    trainer = make_trainer(
        BEST, tmp_path, Failing(fsync_of=tmp_path, after=tmp_path / "checkpoint-4", times=1), []
    )
    trainer._slide_config = trainer._slide_config.__class__(saving=saving)
    trainer.args.save_total_limit = 1
    trainer.args.max_steps = 6
    trainer._determine_best_metric = _always_better(trainer)
    with pytest.raises(DiskError, match=r"checkpoint-4 is in its place and whole"):
        trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4"]
    resumed = make_trainer(BEST, tmp_path, CheckpointCalls(), [], model_seed=99)
    resumed.args.max_steps = 6
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def _always_better(trainer):
    def determine(metrics, trial):
        trainer.state.best_metric, trainer.state.best_global_step = (
            metrics["eval_loss"],
            trainer.state.global_step,
        )
        return True

    return determine


def test_a_state_that_is_not_confirmed_counts(tmp_path):
    loop = _prepared(SPLIT, tmp_path / "run", 0)
    _name(loop[0], tmp_path, limit=1)
    base = tmp_path / "checkpoints"
    loop[0].save_state()
    _step(*loop, 0)
    loop[0]._slide_files = Failing(fsync_of=base, after=base / "checkpoint_1", times=1)
    with pytest.raises(DiskError, match="checkpoint_1 is in its place"):
        loop[0].save_state()
    assert _visible(base) == [base / "checkpoint_1"] and loop[0].save_iteration == 2
    _check(base / "checkpoint_1")
    loop[0].save_state()  # under the next name
    assert [path.name for path in _visible(base)] == ["checkpoint_2"]
    shutil.rmtree(base)
