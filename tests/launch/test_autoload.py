"""The hook that `import torch` calls: cheap, without a trace outside of Accelerate's command, and never in the way."""

import importlib.metadata
import json
import sys

import pytest

from hf_slideformer import autoload

# Calls the entry point as torch does, once for each program in ARGV, in an interpreter that has what torch has
# imported by then.
CALL = """
import argparse, contextlib, functools, importlib.metadata, json, os, runpy, subprocess, sys, tempfile, time, typing
(hook,) = (e for e in importlib.metadata.entry_points(group="torch.backends") if e.name == "slideformer")
for sys.argv in json.loads(os.environ["ARGV"]):
    before = list(sys.meta_path), dict(os.environ), list(sys.path), set(sys.modules)
    started = time.thread_time()
    hook.load()()
    seconds = time.thread_time() - started
    *after, modules = list(sys.meta_path), dict(os.environ), list(sys.path), set(sys.modules)
    new = sorted(modules - before[3])
    print(json.dumps({"seconds": seconds, "same": [*before[:3]] == after, "modules": new}))
    for name in new:
        del sys.modules[name]
"""

OTHERS = [
    ["train.py"],
    ["-c"],
    [""],
    ["/usr/bin/torchrun", "launch", "--config_file", "accelerate"],
    ["my-accelerate"],
    ["/srv/accelerate/train.py", "launch"],
]


@pytest.fixture
def call(run, tmp_path):
    """Calls the entry point for several programs, its modules compiled as installing them does."""

    def call(*programs):
        compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
        result = run("-c", CALL, ARGV=json.dumps(programs), **compiled)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    return call


def test_no_trace_in_other_processes(call):
    for argv, done in zip(OTHERS, call(*OTHERS), strict=True):
        assert done["modules"] == ["hf_slideformer", "hf_slideformer.autoload"], argv
        assert done["same"], argv


def test_costs_less_than_a_millisecond(call):
    # Of this thread's own time, and the least of many: what else the machine does is not counted.
    assert min(done["seconds"] for done in call(*[["train.py"]] * 20)) < 0.001


def test_this_environment_has_the_entry_point():
    """The other tests bring metadata of their own; this one is about the environment that runs them."""
    found = importlib.metadata.entry_points(group="torch.backends", name="slideformer")
    assert [entry.value for entry in found][:1] == ["hf_slideformer.autoload:autoload"], (
        "hf_slideformer was installed here before it had its entry point; install it again (pip install -e .)"
    )


@pytest.mark.parametrize(
    ("argv", "orig_argv"),
    [
        (["/usr/bin/accelerate", "env"], []),
        (["/usr/bin/accelerate-launch", "train.py"], []),
        (["-m"], ["python", "-m", "accelerate.commands.launch", "train.py"]),
        (["-m"], ["python", "-X", "dev", "-m", "accelerate.commands.accelerate_cli", "launch"]),
    ],
)
def test_accelerates_own_commands_are_known(monkeypatch, argv, orig_argv):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert autoload._is_accelerate()


@pytest.mark.parametrize("argv", [None, [], [None], ["-m"]])
def test_never_raises(monkeypatch, argv):
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    if argv is None:
        monkeypatch.delattr(sys, "argv")
    else:
        monkeypatch.setattr(sys, "argv", argv)
    finders = list(sys.meta_path)
    autoload.autoload()
    assert sys.meta_path == finders


def test_torch_imports_where_the_hook_fails(run):
    program = (
        "import sys\nsys.argv = ['accelerate', 'launch']\nsys.modules['hf_slideformer.launch'] = None\n"
        "import torch\nassert 'hf_slideformer.autoload' in sys.modules\nprint(torch.ones(2).sum().item())"
    )
    result = run("-c", program)
    assert (result.returncode, result.stdout) == (0, "2.0\n"), result.stderr
