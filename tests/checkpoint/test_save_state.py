"""Accelerate's `save_state`: the old state or the new one, whole, wherever saving stops."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import ProjectConfiguration

from hf_slideformer.checkpoint import CheckpointCalls, SavedCheckpoint
from hf_slideformer.errors import CheckpointError, DiskError

from .kill import SETTINGS
from .test_faults import Faulty, _contents
from .test_format import _prepared, _step

SETTING = SETTINGS[0]


class _Killed(BaseException):
    pass


class Stopping(CheckpointCalls):
    """From one call on, nothing reaches the file system any more, cleaning up included."""

    def __init__(self, after: int | None = None) -> None:
        self.calls = 0
        self._after = after

    def _count(self) -> None:
        if self.calls == self._after:
            raise _Killed
        self.calls += 1

    def open(self, path, flags):
        self._count()
        return super().open(path, flags)

    def write(self, descriptor, data):
        self._count()
        return super().write(descriptor, data)

    def rename(self, source, target):
        self._count()
        super().rename(source, target)

    def make_directory(self, path):
        self._count()
        super().make_directory(path)

    def remove_tree(self, path):
        self._count()
        if path.is_dir():  # a kill may come between one file and the next
            for file in [file for file in path.rglob("*") if file.is_file()]:
                file.unlink()
                self._count()
        super().remove_tree(path)


@pytest.fixture
def loops(tmp_path):
    """A loop to save from, and one to load into."""
    return _prepared(SETTING, tmp_path / "one", 0), _prepared(SETTING, tmp_path / "two", 99)


def _name(accelerator, directory: Path, limit: int = 2) -> None:
    accelerator.project_configuration = ProjectConfiguration(
        project_dir=str(directory), automatic_checkpoint_naming=True, total_limit=limit
    )


def _check(path: Path) -> bytes:
    """The weights of a state, all of whose files are whole."""
    saved = SavedCheckpoint(path, CheckpointCalls())
    saved.check_files(saved.records)
    return (path / "model.safetensors").read_bytes()


def _visible(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def _save(loop, path: Path, named: bool, iteration: int) -> None:
    loop[0].project_configuration.iteration = iteration
    loop[0].save_state(None if named else str(path))


@pytest.mark.parametrize("named", [False, True], ids=["a directory", "automatic naming"])
def test_stopped_anywhere(tmp_path, loops, named):
    """One state is there, and a second one takes its place: as a directory, or as the newest of at most one."""
    loop, other = loops
    base = tmp_path / "project" / "checkpoints"
    if named:
        _name(loop[0], tmp_path / "project", limit=1)
        _name(other[0], tmp_path / "project", limit=1)
    first, second = (base / f"checkpoint_{0 if not named else index}" for index in range(2))
    _step(*loop, 0)
    _save(loop, first, named, 0)
    old = _check(first)
    _step(*loop, 1)
    shutil.copytree(tmp_path / "project", tmp_path / "kept")

    def attempt(files: Stopping) -> None:
        shutil.rmtree(tmp_path / "project")
        shutil.copytree(tmp_path / "kept", tmp_path / "project")
        loop[0]._slide_files = files
        _save(loop, second, named, 1)

    counting = Stopping()
    attempt(counting)
    assert _visible(base) == [second]
    new = _check(second)
    assert new != old
    found = []
    # Everything that happens once the files are written, and some of what comes before.
    for stop in [*range(0, counting.calls - 40, 7), *range(counting.calls - 40, counting.calls)]:
        with pytest.raises(_Killed):
            attempt(Stopping(stop))
        assert len(list(base.iterdir())) <= 3
        other[0].load_state(None if named else str(second))  # and leftovers go
        states = _visible(base)
        assert {_check(path) for path in states} <= {old, new}
        found.append(_check(states[-1]) == new)
        assert not [path for path in base.iterdir() if path.name.startswith(".")]
    assert found == sorted(found) and set(found) == {False, True}  # from some call on it is the new one
    for one, two in zip(loop[1].parameters(), other[1].parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("named", [False, True], ids=["a directory", "automatic naming"])
def test_a_failing_call_changes_nothing(tmp_path, loops, named):
    loop, _ = loops
    base = tmp_path / "project" / "checkpoints"
    if named:
        _name(loop[0], tmp_path / "project")
    for iteration in range(2):
        _save(loop, base / "checkpoint_0", named, iteration)
    _step(*loop, 0)
    before = _contents(base)
    counting = loop[0]._slide_files = Faulty()
    counting.free = 2**20
    with pytest.raises(CheckpointError, match=r"1,048,576 bytes are free"):
        _save(loop, base / "checkpoint_0", named, 2)
    for call in ("open", "write", "fsync", "rename"):
        loop[0]._slide_files = Faulty((call, 0), errno.ENOSPC)
        with pytest.raises(DiskError, match=r"checkpoint_.* failed.*ENOSPC"):
            _save(loop, base / "checkpoint_0", named, 2)
        assert loop[0].save_iteration == 2
        assert _contents(base) == before
        assert not [path for path in base.iterdir() if path.name.startswith(".")]
    loop[0]._slide_files = CheckpointCalls()
    _save(loop, base / "checkpoint_0", named, 2)
    names = ["checkpoint_1", "checkpoint_2"] if named else ["checkpoint_0"]
    assert [path.name for path in _visible(base)] == names


def test_automatic_naming(tmp_path, loops):
    loop, other = loops
    for one in loops:
        _name(one[0], tmp_path)
    returned = []
    for index in range(12):  # names of one digit and of two
        returned.append(loop[0].save_state())
        if index == 10:
            _step(*loop, 0)
    base = tmp_path / "checkpoints"
    assert returned[-1] == base / "checkpoint_11"
    assert [path.name for path in _visible(base)] == ["checkpoint_10", "checkpoint_11"]
    (base / ".tmp-checkpoint_12" / "checkpoint_12").mkdir(parents=True)
    other[0].load_state()
    for one, two in zip(loop[1].parameters(), other[1].parameters(), strict=True):
        assert torch.equal(one, two)
    assert not (base / ".tmp-checkpoint_12").exists()
    loop[0].project_configuration.iteration = 11
    with pytest.raises(ValueError, match=r"checkpoint_11 \(11\) already exists"):
        loop[0].save_state()
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="there is no saved state in"):
        other[0].load_state()


def test_files_of_others_stay(tmp_path, loops):
    """A directory with other files in it cannot be replaced; it is refused until it is whole again."""
    loop, other = loops
    path = tmp_path / "state"
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    loop[0].save_state(str(path))
    assert (path / "notes.txt").read_text() == "mine"
    other[0].load_state(str(path))
    _step(*loop, 0)
    (path / "more.txt").write_text("mine too")
    loop[0]._slide_files = Faulty(("write", 2), errno.EIO)
    with pytest.raises(DiskError, match="EIO"):
        loop[0].save_state(str(path))
    with pytest.raises(CheckpointError, match="interrupted"):
        other[0].load_state(str(path))
    loop[0]._slide_files = CheckpointCalls()
    loop[0].save_state(str(path))
    other[0].load_state(str(path))
    for one, two in zip(loop[1].parameters(), other[1].parameters(), strict=True):
        assert torch.equal(one, two)
    assert (path / "more.txt").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_working_directory_is_not_replaced(tmp_path, loops, monkeypatch):
    path = tmp_path / "state"
    path.mkdir()
    monkeypatch.chdir(path)
    for _ in range(2):
        loops[0][0].save_state(".")
        assert Path.cwd() == path
    loops[1][0].load_state(".")
