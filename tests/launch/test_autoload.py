"""The hook that `import torch` calls: cheap, without a trace outside of Accelerate's command, and never in the way."""

import json
import sys

import pytest

from hf_slideformer import autoload

# Calls the entry point as torch does, in an interpreter that has what torch has imported by then.
CALL = """
import argparse, contextlib, functools, importlib.metadata, json, os, runpy, subprocess, sys, tempfile, time, typing
(hook,) = (e for e in importlib.metadata.entry_points(group="torch.backends") if e.name == "slideformer")
sys.argv = json.loads(os.environ["ARGV"])
before = list(sys.meta_path), dict(os.environ), set(sys.modules), list(sys.path)
started = time.perf_counter()
hook.load()()
seconds = time.perf_counter() - started
after = list(sys.meta_path), dict(os.environ), set(sys.modules), list(sys.path)
print(json.dumps({"seconds": seconds, "same": [b == a for b, a in zip(before, after)],
                  "modules": sorted(after[2] - before[2])}))
"""

OTHERS = [
    ["train.py"],
    ["-c"],
    [""],
    ["/usr/bin/torchrun", "launch", "--config_file", "accelerate"],
    ["my-accelerate"],
    ["/srv/accelerate/train.py", "launch"],
]


def call(run, argv, **environment):
    result = run("-c", CALL, ARGV=json.dumps(argv), **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("argv", OTHERS, ids=lambda argv: argv[0] or "interactive")
def test_no_trace_in_other_processes(run, argv):
    done = call(run, argv)
    assert done["modules"] == ["hf_slideformer", "hf_slideformer.autoload"]
    assert done["same"] == [True, True, False, True]


def test_costs_less_than_a_millisecond(run, tmp_path):
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    call(run, ["train.py"], **compiled)  # compiles the modules, as installing them does
    # 1 ms is for a machine that does nothing else; this one may.
    assert min(call(run, ["train.py"], **compiled)["seconds"] for _ in range(5)) < 0.003


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
