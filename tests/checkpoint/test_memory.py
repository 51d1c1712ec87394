"""Saving and resuming take no second copy of the state: measured in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ["", "-experts"])
def test_peak_ram_of_saving_and_resuming(tmp_path, kind):
    script = Path(__file__).with_name("memory.py")
    result = subprocess.run(
        [sys.executable, str(script), f"save{kind},resume{kind}", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=160,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"')]
    saving, resuming = map(json.loads, lines)
    assert (
        saving["state"] > 1100 * MIB
    )  # a copy of the moments, or of the fp32 weights, would be over the bound
    # Stricter than what is promised, one unit and 512 MiB, so that half a GiB too much is found at this size.
    assert saving["rise"] < saving["unit"] + 128 * MIB
    assert abs(saving["rise"] - saving["planned"]) < 24 * MIB
    assert resuming["weights"] < resuming["unit"] + 192 * MIB  # a copy of the weights has 490 MiB
    assert resuming["rise"] < resuming["state"] + resuming["unit"] + 256 * MIB
