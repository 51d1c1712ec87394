"""A wheel in a clean environment: what is in it, and a plain script that it streams under `accelerate launch`."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT, TRAIN


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_slideformer", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", target, source],
        check=True,
    )
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel, and every other package of this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", wheel], check=True
    )
    (site,) = home.glob("lib/python*/site-packages")
    # A directory on the path, not a site directory: what it installs in editable mode is not found through it.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # As pip writes it.
    command = home / "bin" / "accelerate"
    command.write_text(f"#!{python}\nfrom accelerate.commands.accelerate_cli import main\nmain()\n")
    command.chmod(0o755)
    return home


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        text = archive.read(entry_points).decode()
    assert {"hf_slideformer/autoload.py", "hf_slideformer/launch.py"} <= names
    assert "slideformer_kernels/csrc/slideformer_cpu.c" in names
    assert "[torch.backends]\nslideformer = hf_slideformer.autoload:autoload" in text
    assert "slideformer = hf_slideformer.cli:main" in text
    assert not any(name.startswith(("tests/", "examples/", "kernels/")) for name in names)


@pytest.mark.parametrize("command", ["accelerate launch", "slideformer launch"])
def test_streams_under(command, environment, tmp_path):
    program, *arguments = command.split()
    script, config = tmp_path / "train.py", tmp_path / "slideformer.yaml"
    script.write_text(TRAIN + "    import hf_slideformer; print(hf_slideformer.__file__)\n")
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"PYTHONWARNINGS": "ignore"}

    def run(*line):
        result = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    binaries = environment / "bin"
    run(binaries / "slideformer", "config", "--config_file", config, "--placement", "stream", "--cpu")
    printed = run(binaries / program, *arguments, "--config_file", config, script)
    trained, imported = printed.splitlines()[-2:]
    assert json.loads(trained)["h2d_bytes"] > 0
    assert Path(imported).is_relative_to(environment)
