"""Two processes on one directory: the second is told who the first is, and a dead one is in nobody's way."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import socket
import threading
import time
import warnings
from pathlib import Path

import pytest
from transformers import TrainerCallback

from hf_slideformer.checkpoint import (
    LOCK_FILE,
    CheckpointCalls,
    DirectoryLock,
    SavedCheckpoint,
    lock,
)
from hf_slideformer.errors import CheckpointError

from .kill import SETTINGS, make_trainer
from .test_format import _prepared

SPLIT = SETTINGS[1]


class Process:
    """A process of its own that does something with files; forked, for imports take long.

    Args:
        work: what it does first.
        then: what it does when it is told to go on.
    """

    def __init__(self, work, then=lambda done: None) -> None:
        told, self._tell = os.pipe()
        self._told, tells = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
            self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                os.close(self._tell)
                done = work()
                os.write(tells, b"x")
                os.read(told, 1)
                then(done)
                code = 0
            finally:
                os._exit(code)
        os.close(told)
        os.close(tells)
        assert os.read(self._told, 1) == b"x"

    def go_on(self) -> int:
        """Its exit status at the end."""
        os.write(self._tell, b"x")
        return os.waitpid(self.pid, 0)[1]

    def kill(self) -> None:
        """It is dead, and nobody has waited for it: its number is still in use."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def end(self) -> None:
        """Leave nothing of it, nor of its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self._tell)
        os.close(self._told)


@contextlib.contextmanager
def _other_process(file: Path, work=DirectoryLock):
    """A process that holds a lock until it is told to let go, or killed."""
    process = Process(lambda: work(file), DirectoryLock.release)
    try:
        yield process
    finally:
        process.end()


def _written(file: Path, **changes) -> None:
    """An owner's name, as it was left."""
    owner = dataclasses.replace(lock.Owner.of_this_process(), **changes)
    file.write_text(json.dumps(dataclasses.asdict(owner)))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another process that saves, for tests that only look at it."""
    file = tmp_path_factory.mktemp("run") / LOCK_FILE
    with _other_process(file) as process:
        yield file, process


def _refused(process) -> str:
    return rf"in use: process {process.pid} on {socket.gethostname()} saves there since 2.*another directory"


def test_the_second_process_is_told_of_the_first(other):
    file, process = other
    for _ in range(2):
        with pytest.raises(CheckpointError, match=_refused(process)) as raised:
            DirectoryLock(file)
        assert "cannot be seen" not in str(raised.value)
    assert file.exists()


def test_a_trainer_is_refused_before_it_touches_anything(other):
    file, process = other
    leftover = file.parent / ".tmp-checkpoint-2" / "checkpoint-2"
    leftover.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(SPLIT, file.parent, CheckpointCalls(), [])
    with pytest.raises(CheckpointError, match=_refused(process)):
        trainer.train()
    assert trainer.state.global_step == 0 and leftover.exists()
    # What is only read is nobody's.
    trainer.evaluate()


class _Saves(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 2


@pytest.mark.parametrize("saves", [False, True])
def test_a_trainer_that_saves_nothing_needs_no_directory_of_its_own(other, saves):
    file, process = other
    leftover = file.parent / ".tmp-checkpoint-2" / "checkpoint-2"
    leftover.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(SPLIT, file.parent, CheckpointCalls(), [_Saves()] if saves else [])
    trainer.args.save_strategy, trainer.args.max_steps = "no", 3
    if saves:
        with pytest.raises(CheckpointError, match=_refused(process)):
            trainer.train()
    else:
        trainer.train()
    assert trainer.state.global_step == (2 if saves else 3) and leftover.exists()


def test_a_killed_process_is_in_nobodys_way(tmp_path):
    file = tmp_path / LOCK_FILE
    with _other_process(file) as process:
        process.kill()
        with DirectoryLock(file):
            assert json.loads(file.read_text())["pid"] == os.getpid()
        assert not file.exists()


def test_letting_go_lets_the_next_in(tmp_path):
    file = tmp_path / LOCK_FILE
    with _other_process(file) as process:
        assert process.go_on() == 0 and not file.exists()
    with (
        DirectoryLock(file),
        pytest.raises(CheckpointError, match=rf"process {os.getpid()} \(this process\)"),
    ):
        _in_a_thread(lambda: DirectoryLock(file))


def _in_a_thread(work):
    """What `work` raised in a thread of its own is raised here."""
    raised = []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def test_within_a_thread_it_can_be_taken_again(tmp_path):
    file, settled = tmp_path / LOCK_FILE, []
    with DirectoryLock(file, settle=lambda: settled.append(1)):
        with DirectoryLock(file):
            assert settled == [1]
        assert file.exists()
        with pytest.raises(CheckpointError):
            _in_a_thread(lambda: DirectoryLock(file))
    assert not file.exists()


# Whether the kernel's lock is held (None: there are none), what the owner's name says, and what follows.
NAMES = {
    "gone": {"pid": 2**22 + 1},
    "another process by its number": {"started": 1},
    "on another machine": {"machine": "elsewhere", "host": "far"},
    "running": {},
    "nobody": None,
}
CASES = [
    (True, "gone", ""),
    (True, "another process by its number", ""),
    (True, "on another machine", r"on far saves.*another directory, or end that one first$"),
    (True, "running", "this process"),
    (True, "nobody", "another process saves there"),
    (False, "gone", ""),
    (False, "another process by its number", ""),
    (False, "on another machine", ""),  # the kernel would know
    (False, "running", "this process"),
    (False, "nobody", ""),
    (None, "gone", ""),
    (None, "another process by its number", ""),
    (
        None,
        "on another machine",
        rf"on far saves.*cannot be seen from here: if it does not, remove .*{LOCK_FILE}",
    ),
    (None, "running", "this process"),
    (None, "nobody", ""),
]


@pytest.mark.parametrize(("held", "name", "refusal"), CASES)
def test_who_may_have_it(tmp_path, monkeypatch, held, name, refusal):
    monkeypatch.setattr(lock, "_NAMELESS_S", 0.05)
    file = tmp_path / LOCK_FILE
    file.touch()
    if NAMES[name] is not None:
        _written(file, **NAMES[name])
    descriptor = os.open(file, os.O_RDWR)  # of somebody who has no name in this process
    try:
        if held:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        elif held is None:

            def refuse(*args):
                raise OSError(95, "Operation not supported")

            monkeypatch.setattr(lock.fcntl, "flock", refuse)
        if refusal:
            with pytest.raises(CheckpointError, match=refusal):
                DirectoryLock(file)
        else:
            with DirectoryLock(file):
                assert json.loads(file.read_text())["pid"] == os.getpid()
    finally:
        os.close(descriptor)


def test_a_hidden_process_is_alive(monkeypatch):
    """Systems may show a user only its own processes."""
    owner = dataclasses.replace(lock.Owner.of_this_process(), pid=1)
    process = lock._process
    monkeypatch.setattr(lock, "_process", lambda pid: None if pid == 1 else process(pid))

    def kill(pid, signal):
        assert (pid, signal) == (1, 0)
        raise PermissionError

    monkeypatch.setattr(lock.os, "kill", kill)
    assert owner.is_alive()


def test_forked_children_do_not_keep_it(tmp_path):
    """Workers of a dataloader may outlive a killed process by some seconds."""
    file = tmp_path / LOCK_FILE

    def fork_then_hold(file: Path) -> DirectoryLock:
        taken = DirectoryLock(file)
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        return taken

    with _other_process(file, fork_then_hold) as process:
        process.kill()
        descriptor = os.open(file, os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        DirectoryLock(file).release()


class _Looks(TrainerCallback):
    """Whether the directory is taken while a run goes on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.seen: list[bool] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self._file.exists())


def test_runs_one_after_another(tmp_path):
    """Also after one that failed, by another trainer, and resumed."""
    looks = _Looks(tmp_path / LOCK_FILE)
    first = make_trainer(SPLIT, tmp_path, CheckpointCalls(), [looks])
    first.args.max_steps = 2
    first.train()
    assert looks.seen == [True] * 2 and not (tmp_path / LOCK_FILE).exists()
    step = first.training_step

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    first.training_step = fails
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert not (tmp_path / LOCK_FILE).exists()
    first.training_step = step
    second = make_trainer(SPLIT, tmp_path, CheckpointCalls(), [])
    second.args.max_steps = 4
    second.train(resume_from_checkpoint=True)
    first.args.max_steps = 6
    first.train(resume_from_checkpoint=True)
    assert first.state.global_step == 6 and not (tmp_path / LOCK_FILE).exists()


class _TrainsAnother(TrainerCallback):
    """Trains and saves to the same directory before the outer run's third step, while its save may go on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            inner = make_trainer(SPLIT, self._directory, CheckpointCalls(), [])
            inner.args.max_steps, inner.args.save_steps = 1, 1
            inner.train()


def test_a_run_inside_of_another(tmp_path):
    outer = make_trainer(SPLIT, tmp_path, CheckpointCalls(), [_TrainsAnother(tmp_path)])
    outer.args.max_steps, outer.args.save_total_limit = 4, None
    outer.train()
    names = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    for name in names:
        saved = SavedCheckpoint(tmp_path / name, CheckpointCalls())
        saved.check_files(saved.records)


@pytest.mark.parametrize("named", [False, True])
def test_states_of_accelerate(tmp_path, named):
    loop = _prepared(SPLIT, tmp_path / "run", 0)
    base = tmp_path / "checkpoints"
    if named:
        loop[0].project_configuration.set_directories(str(tmp_path))
        loop[0].project_configuration.automatic_checkpoint_naming = True
    target = base / ("checkpoint_0" if named else "state")
    file = base / (LOCK_FILE if named else ".lock-state")
    loop[0].save_state(None if named else str(target))
    leftover = base / f".tmp-{target.name}"
    leftover.mkdir()
    before = loop[0].save_iteration
    with _other_process(file) as process:
        with pytest.raises(CheckpointError, match=_refused(process)):
            loop[0].save_state(None if named else str(target))
        loop[0].load_state(None if named else str(target))  # reading is not in its way, nor is it in ours
        assert leftover.exists() and loop[0].save_iteration == before
        if not named:
            loop[0].save_state(str(base / "beside"))  # another name is another place
    loop[0].load_state(None if named else str(target))
    assert not leftover.exists()
    assert not list(base.glob("*lock*"))


def test_a_state_that_is_written_in_place(tmp_path):
    loop = _prepared(SPLIT, tmp_path / "run", 0)
    target = tmp_path / "state"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with (
        _other_process(target / LOCK_FILE) as process,
        pytest.raises(CheckpointError, match=_refused(process)),
    ):
        loop[0].save_state(str(target))
    loop[0].save_state(str(target))
    records = SavedCheckpoint(target, CheckpointCalls()).records
    assert "notes.txt" in records and LOCK_FILE not in records and not (target / LOCK_FILE).exists()
