"""A wheel in a clean environment: what is in it, and a plain script that it streams under `accelerate launch`."""

import functools
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from tests.examples.conftest import EXAMPLES, make_tokenizer, own_surroundings  # noqa: F401

from .conftest import ROOT

import finetune_accelerate  # isort: skip  (found once tests.examples is imported)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_slideformer", "kernels"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-q",
            "-w",
            target,
            source,
        ],
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
    # Directories on the path, not site directories: what they install in editable mode is not found through them.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    # As pip writes it.
    command = home / "bin" / "accelerate"
    command.write_text(f"#!{python}\nfrom accelerate.commands.accelerate_cli import main\nmain()\n")
    command.chmod(0o755)
    return home


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    set_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    directory = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


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


def run_in(environment, directory, *line):
    """Run a command line of the environment's own, in a process that nothing of this one reaches; its output."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_HOME": str(directory), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program, *arguments = map(str, line)
    result = subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=directory,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_slideformers_command(environment, tmp_path):
    script, config = tmp_path / "where.py", tmp_path / "slideformer.yaml"
    script.write_text("import hf_slideformer; print(hf_slideformer.__file__)")
    run_in(
        *(environment, tmp_path, "slideformer", "config", "--config_file", config, "--placement", "stream"),
        *("--cpu", "--mixed-precision", "no"),
    )
    printed = run_in(environment, tmp_path, "slideformer", "launch", "--config_file", config, script)
    assert Path(printed.strip()).is_relative_to(environment)


# Runs the script in the first argument once with the others and once going on from what it saved, and prints what each
# run has streamed.
TWICE = """
import runpy, sys
from accelerate import Accelerator

def end_training(accelerator, end=Accelerator.end_training):
    engine = sys.modules.get("hf_slideformer.engine.engine")
    print("bytes:", sum(engine.engine_of(m).metrics.totals()["h2d_bytes"] for m in accelerator._models))
    end(accelerator)

Accelerator.end_training = end_training
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.argv += ["--resume-from", "slide/state-3"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_example_under_accelerate_launch(environment, tiny_model, tmp_path, monkeypatch, capsys):
    """Accumulation, clipping, a scheduler, evaluation, saving, and going on: the losses of plain Accelerate."""
    (tmp_path / "twice.py").write_text(TWICE)
    rows = [{"text": "Return the sum of the values " * (1 + number % 4)} for number in range(34)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(tiny_model), "--dataset", "rows.jsonl"]
    flags += ["--batch-size", "2", "--gradient-accumulation-steps", "4", "--learning-rate", "1e-2"]
    flags += ["--max-steps", "5", "--eval-steps", "2", "--eval-rows", "4", "--save-steps", "3"]
    config = tmp_path / "slideformer.yaml"
    config.write_text(
        "distributed_type: 'NO'\nnum_processes: 1\nmixed_precision: 'no'\nuse_cpu: true\n"
        "slideformer_config:\n  placement: stream\n"
    )
    example = EXAMPLES / "finetune_accelerate.py"
    launched = run_in(
        *(environment, tmp_path, "accelerate", "launch", "--config_file", config, "twice.py", example),
        *(*flags, "--output-dir", "slide"),
    ).splitlines()
    losses = [line for line in launched if "loss" in line]
    assert losses[7:] == losses[4:7]
    streamed = [float(line.removeprefix("bytes:")) for line in launched if line.startswith("bytes:")]
    assert len(streamed) == 2 and min(streamed) > 0
    for ours, theirs in zip(losses[:7], plain_losses(flags, tmp_path, monkeypatch, capsys), strict=True):
        assert_same_numbers(ours, theirs)


def plain_losses(flags, directory, monkeypatch, capsys):
    """The lines with losses that the example prints under plain Accelerate."""
    monkeypatch.chdir(directory)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(finetune_accelerate, "Accelerator", functools.partial(Accelerator, cpu=True))
    finetune_accelerate.main([*flags, "--output-dir", "plain"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return [line for line in capsys.readouterr().out.splitlines() if "loss" in line]


def assert_same_numbers(ours, theirs):
    """Two printed lines have the same words, and numbers that agree to their last digits."""
    for one, two in zip(ours.replace(",", "").split(), theirs.replace(",", "").split(), strict=True):
        if "." in two:
            assert float(one) == pytest.approx(float(two), rel=1e-5, abs=2e-6), (ours, theirs)
        else:
            assert one == two, (ours, theirs)
