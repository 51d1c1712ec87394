"""Disks that fail: a typed error with numbers, nothing left of what was being written, and the last one resumes."""

import errno
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from hf_slideformer.checkpoint import CheckpointCalls, SavedCheckpoint
from hf_slideformer.errors import CheckpointError, DiskError

from .kill import SETTINGS, final_state, make_trainer

SETTING = SETTINGS[1]
CALLS = ("open", "write", "fsync", "rename")
FAULTS = [
    (call, name)
    for call, names in {
        "open": ("ENOENT", "EROFS"),
        "write": ("ENOSPC", "EIO", "EDQUOT"),
        "fsync": ("EIO",),
        "rename": ("EIO",),
    }.items()
    for name in names
]


class Faulty(CheckpointCalls):
    """Fails at one call, or writes and reads in short pieces; counts calls.

    Args:
        fail_at: call and its number, from 0.
        error: errno.
        chance: makes pieces short where it is given.
    """

    def __init__(self, fail_at: tuple[str, int] | None = None, error: int = 0, chance=None) -> None:
        self.counts = dict.fromkeys(CALLS, 0)
        self._fail_at = fail_at
        self._error = error
        self._chance = chance
        self.free: int | None = None

    def _count(self, call: str) -> None:
        number = self.counts[call]
        self.counts[call] += 1
        if (call, number) == self._fail_at:
            raise OSError(self._error, os.strerror(self._error))

    def _short(self, view: memoryview) -> memoryview:
        return view if self._chance is None else view[: self._chance.randint(1, max(1, len(view)))]

    def open(self, path, flags):
        if flags & os.O_CREAT:
            self._count("open")
        return super().open(path, flags)

    def write(self, descriptor, data):
        self._count("write")
        return super().write(descriptor, self._short(data))

    def read_into(self, descriptor, view):
        return super().read_into(descriptor, self._short(view))

    def fsync(self, descriptor):
        self._count("fsync")
        super().fsync(descriptor)

    def rename(self, source, target):
        self._count("rename")
        super().rename(source, target)

    def free_bytes(self, directory):
        return super().free_bytes(directory) if self.free is None else self.free


@pytest.fixture
def saved(tmp_path):
    """A trainer after four steps with a whole checkpoint of step 4, and the calls that saving took."""
    trainer = make_trainer(SETTING, tmp_path, Faulty(), [])
    trainer.args.max_steps = 4
    trainer.args.save_steps = 4
    trainer.train()
    counts = dict(trainer._files.counts)
    assert min(counts.values()) > 0
    return trainer, tmp_path, counts


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_failing_call_leaves_the_last_checkpoint(saved):
    trainer, directory, counts = saved
    before = _contents(directory)
    chance = random.Random(0)
    trainer.state.global_step = 6
    for call, name in FAULTS:
        number = chance.randrange(counts[call])
        trainer._files = Faulty((call, number), getattr(errno, name))
        with pytest.raises(
            DiskError, match=rf"\.tmp-checkpoint-6.* failed.*{name}.* free there; .*"
        ) as caught:
            trainer._save_checkpoint(trainer.model, None)
        assert caught.value.errno == getattr(errno, name)
        if call == "write":
            assert "at offset " in str(caught.value) and "wanted " in str(caught.value)
        assert _contents(directory) == before, (call, number)
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]
    trainer._files = Faulty()
    trainer._save_checkpoint(trainer.model, None)  # the same trainer goes on
    SavedCheckpoint(directory / "checkpoint-6", CheckpointCalls())


def test_a_failing_call_while_replacing_leaves_one_of_both(saved):
    trainer, directory, counts = saved
    renames = 2  # the old one goes, the new one comes
    for number in range(renames):
        trainer._files = Faulty(("rename", number), errno.EIO)
        with pytest.raises(DiskError):
            trainer._save_checkpoint(trainer.model, None)
        checkpoint = SavedCheckpoint(directory / "checkpoint-4", CheckpointCalls())
        checkpoint.check_files(checkpoint.records)
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]


def test_training_stops_and_the_last_checkpoint_resumes(tmp_path):
    whole = make_trainer(SETTING, tmp_path / "whole", CheckpointCalls(), [])
    whole.train()
    expected = final_state(whole)
    first = make_trainer(SETTING, tmp_path / "run", Faulty(), [])
    first.args.max_steps = 2
    first.train()
    used = first._files.counts["write"]
    shutil.rmtree(tmp_path / "run")
    trainer = make_trainer(SETTING, tmp_path / "run", Faulty(("write", used + used // 2), errno.ENOSPC), [])
    with pytest.raises(DiskError, match="ENOSPC"):
        trainer.train()
    resumed = make_trainer(SETTING, tmp_path / "run", CheckpointCalls(), [], model_seed=99)
    resumed.train(resume_from_checkpoint=True)
    assert final_state(resumed) == expected


def test_short_writes_and_reads_change_nothing(saved):
    trainer, directory, _ = saved
    before = final_state(trainer)
    trainer._files = Faulty(chance=random.Random(1))
    trainer._save_checkpoint(trainer.model, None)
    checkpoint = SavedCheckpoint(directory / "checkpoint-4", CheckpointCalls())
    checkpoint.check_files(checkpoint.records)
    resumed = make_trainer(SETTING, directory, Faulty(chance=random.Random(2)), [], model_seed=99)
    resumed.args.max_steps = 4
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-4"))
    assert final_state(resumed)["state"] == before["state"]


def test_no_space_is_refused_before_anything_is_written(saved):
    trainer, directory, _ = saved
    before = _contents(directory)
    trainer._files = Faulty()
    trainer._files.free = 2**20
    with pytest.raises(
        CheckpointError, match=r"needs 0\.06 GiB .*1,048,576 bytes are free; .*save_total_limit"
    ):
        trainer._save_checkpoint(trainer.model, None)
    assert trainer._files.counts["open"] == 0
    assert _contents(directory) == before
    with pytest.raises(CheckpointError, match=r"needs 0\.06 GiB"):  # nor does a run start that could not save
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("limit", [600, 1500, 3000, 6000])
def test_files_of_transformers_that_cannot_be_written(saved, limit):
    trainer, directory, _ = saved
    before = _contents(directory)
    trainer.state.global_step = 6
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises((CheckpointError, DiskError), match="checkpoint-6"):
            trainer._save_checkpoint(trainer.model, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert _contents(directory) == before


def test_directory_gone(saved):
    trainer, directory, _ = saved

    class Vanishing(CheckpointCalls):
        def fsync(self, descriptor):
            shutil.rmtree(directory)
            super().fsync(descriptor)

    trainer._files = Vanishing()
    with pytest.raises(
        (DiskError, CheckpointError), match="ENOENT|No such file|does not exist|cannot be opened"
    ):
        trainer._save_checkpoint(trainer.model, None)


def _damage(kind: str, file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if kind == "truncated":
        os.truncate(file, chance.randrange(len(data)))
    elif kind == "missing":
        file.unlink()
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)


@pytest.mark.parametrize("kind", ["truncated", "missing", "one bit flipped"])
def test_damage_is_found_and_named(saved, kind):
    trainer, directory, _ = saved
    trainer.state.global_step = 2
    trainer._save_checkpoint(trainer.model, None)
    path = directory / "checkpoint-4"
    names = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
    assert len(names) > 10
    chance = random.Random(3)
    for name in names:
        copy = directory / "checkpoint-9"
        shutil.copytree(path, copy)
        _damage(kind, copy / name, chance)
        resumed = make_trainer(SETTING, directory, CheckpointCalls(), [], model_seed=99)
        resumed.args.max_steps = 4
        expected = f"{name.name}.*(checkpoint-2|entry)"
        if name.name == "slideformer_checkpoint.json":  # a bit of it can be any file's name or checksum
            expected = "no manifest" if kind == "missing" else "checkpoint-9"
        with pytest.raises(CheckpointError, match=expected):
            resumed.train(resume_from_checkpoint=str(copy))
        shutil.rmtree(copy)
    resumed = make_trainer(SETTING, directory, CheckpointCalls(), [], model_seed=99)
    resumed.args.max_steps = 4
    resumed.train(resume_from_checkpoint=str(path))
    for one, two in zip(resumed.slide.engine.states, trainer.slide.engine.states, strict=True):
        assert torch.equal(one.live, two.live)
