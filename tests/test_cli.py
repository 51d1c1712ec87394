"""The `slideformer` command: what it prints, its exit codes, and what importing it costs."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slideformer_kernels import build

from hf_slideformer import cli, errors
from hf_slideformer.machine import probe as probe_module
from hf_slideformer.machine.hardware import Hardware
from hf_slideformer.machine.presets import PRESETS

ROOT = Path(__file__).parent.parent
MIB = 2**20


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine without a GPU whose measurement is short, and a cache of the test's own. Counts measurements."""
    build.is_available()  # while the C kernels' own cache is still found
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measured = []
    measure = probe_module.probe
    sizes = probe_module.ProbeSizes(
        link_bytes=MIB, update_numel=MIB, matrix_sizes=(64,), disk_bytes=MIB, seconds=0.01
    )

    def probe(device, directory):
        measured.append(directory)
        return measure(device, directory, sizes=sizes)

    monkeypatch.setattr(probe_module, "probe", probe)
    return measured


def run(*arguments: str) -> int:
    return cli.main(arguments)


def test_table_has_every_rate_in_units_people_know(capsys):
    assert run("probe") == 0
    out = capsys.readouterr().out
    for label in (
        "RAM to stand-in for a GPU",
        "copy in RAM",
        "AdamW on the CPU, 8-bit",
        "bf16 matrix products",
    ):
        assert label in out
    for unit in ("GB/s", "Gparam/s", "TFLOP/s", "GiB"):
        assert re.search(rf"\d {unit}", out), unit
    assert "disk" not in out and "(measured)" in out


def test_table_of_a_gpu():
    table = cli.hardware_table(PRESETS["rtx4090-256gb"])
    values = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in table.splitlines()[1:-1])
    assert values["RAM to GPU"] == "27.4 GB/s"
    assert values["AdamW on the CPU, fp32 moments"] == "1.77 Gparam/s"
    assert values["AdamW on the CPU, 8-bit moments"] == "3.29 Gparam/s"
    loaded = [line.split()[-2] for line in table.splitlines() if "beside copies both ways" in line]
    assert loaded == ["0.571", "1.06"]
    assert values["bf16 matrix products"] == "121 TFLOP/s"
    assert values["disk, free"] == "3,725.3 GiB"
    assert "run `slideformer probe`" in table.splitlines()[-1]


def test_table_shows_rates_of_other_updates():
    machine = dataclasses.replace(
        PRESETS["rtx4090-256gb"],
        cpu_update=PRESETS["rtx4090-256gb"].cpu_update | {"lion": 5e9},
        gpu_update=PRESETS["rtx4090-256gb"].gpu_update | {"lion": 50e9},
    )
    rows = [re.split(r"\s{2,}", line.strip()) for line in cli.hardware_table(machine).splitlines()]
    assert ["lion on the CPU", "5.00 Gparam/s"] in rows and ["lion on the GPU", "50.0 Gparam/s"] in rows
    assert sum(row[0] == "beside copies both ways" for row in rows) == 2  # nobody measured that of lion


def test_json_is_a_description(capsys):
    assert run("probe", "--json") == 0
    assert Hardware.from_dict(json.loads(capsys.readouterr().out)).source == "measured"


def test_output_is_a_file_that_names_this_machine(tmp_path, capsys):
    path = tmp_path / "box.json"
    assert run("probe", "--json", "--output", str(path)) == 0
    assert probe_module.named_hardware(path) == Hardware.from_dict(json.loads(capsys.readouterr().out))


def test_second_time_the_kept_measurement_is_shown(machine, capsys):
    assert run("probe", "--json") == 0
    first = capsys.readouterr()
    assert run("probe", "--json") == 0
    second = capsys.readouterr()
    assert len(machine) == 1
    assert json.loads(first.out)["h2d"] == json.loads(second.out)["h2d"]
    assert "Measured earlier" in second.err and "Measured earlier" not in first.err
    assert run("probe", "--refresh") == 0
    assert len(machine) == 2


def test_no_cache_neither_reads_nor_keeps(machine, tmp_path):
    assert run("probe", "--no-cache") == 0
    assert not (tmp_path / "cache").exists()
    assert run("probe") == 0
    assert run("probe", "--no-cache") == 0
    assert len(machine) == 3


def test_a_disk_that_was_not_measured_is_measured_now(machine, tmp_path, capsys):
    assert run("probe") == 0
    assert run("probe", "--dir", str(tmp_path)) == 0
    assert machine == [None, str(tmp_path)]
    assert "disk, reading" in capsys.readouterr().out
    assert run("probe", "--dir", str(tmp_path)) == 0
    assert len(machine) == 2 and "disk, reading" in capsys.readouterr().out


def test_cache_that_cannot_be_written_is_only_mentioned(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run("probe") == 0
    assert "could not be kept" in capsys.readouterr().err


def assert_one_line(capsys, *parts):
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("Measur")]
    assert len(lines) == 1 and lines[0].startswith("slideformer: error: "), captured.err
    assert all(part in lines[0] for part in parts)
    assert captured.out == ""


def test_missing_directory_is_a_bad_argument(tmp_path, capsys):
    assert run("probe", "--dir", str(tmp_path / "missing")) == 2
    assert_one_line(capsys, "missing is not a directory")


def test_failed_measurement(monkeypatch, capsys):
    def fail(*_):
        raise errors.ProbeError("too full:\n  free some")

    monkeypatch.setattr(probe_module, "probe", fail)
    assert run("probe") == 1
    assert_one_line(capsys, "too full: free some")


def test_output_that_cannot_be_written(tmp_path, capsys):
    assert run("probe", "--output", str(tmp_path / "no" / "box.json")) == 1
    assert_one_line(capsys, "No such file or directory", "box.json")


@pytest.mark.parametrize(
    "arguments", [[], ["prob"], ["probe", "--fast"], ["probe", "--refresh", "--no-cache"]]
)
def test_arguments_that_argparse_refuses(arguments, machine, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2 and machine == []
    assert "usage: slideformer" in capsys.readouterr().err


def test_interrupt_ends_without_a_traceback(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_module, "probe", interrupt)
    assert run("probe") == 130


def _python(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["probe", "--help"]])
def test_help_runs_as_a_module_and_does_not_wait_for_torch(arguments):
    result = _python("-X", "importtime", "-m", "hf_slideformer.cli", *arguments)
    assert result.returncode == 0 and "usage: slideformer" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "hf_slideformer.errors" in imported and not imported & {
        "torch",
        "transformers",
        "slideformer_kernels",
    }


def test_module_hands_its_exit_code_on():
    result = _python("-m", "hf_slideformer.cli", "probe", "--dir", "/nonexistent")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and "/nonexistent is not a directory" in result.stderr
