"""A tiny run of the benchmark script: it must work when it is wanted on the large machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from slideformer_kernels import build


@pytest.mark.skipif(not build.is_available(), reason="no C compiler")
def test_rows_are_json():
    script = Path(__file__).with_name("bench_updates.py")
    options = ["--numel", "65536", "--threads", "1", "2", "--isa", "portable", "--warmup", "1"]
    command = [sys.executable, str(script), *options, "--repeats", "2"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    cpu_rows = [row for row in rows if row["device"] == "cpu"]
    operations = [
        "adamw_split",
        "adamw_split_8bit",
        "lion_split",
        "sgd_split",
        "sgd_momentum_split",
        "sum_of_squares",
        "accumulate",
        "accumulate_squared",
    ]
    assert [row["operation"] for row in cpu_rows] == operations * 2 + ["copy"] * 2
    assert all(row["gb_per_s"] > 0 and row["p20_s"] <= row["p80_s"] for row in rows)
