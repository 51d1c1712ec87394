"""A short run of kill.py, in a process of its own that may fork: no threads, no engines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(180)
def test_killed_runs_end_like_uninterrupted_ones():
    script = Path(__file__).with_name("kill.py")
    command = [sys.executable, str(script), "--kills", "6", "--seed", "11", "--settings", "2"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "   6 kills" in result.stdout and "same end" in result.stdout
