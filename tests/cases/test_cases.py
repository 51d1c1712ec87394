"""Small scripts that each showed a silent fault once; they end in PASS, and take no part of the suite's fixtures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = sorted(
    path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("test_", "__"))
)
ROOT = Path(__file__).parents[2]


def _last_line(script: Path) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    said = done.stdout.strip().splitlines() or [done.stderr.strip()]
    return said[-1]


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if not path.stem.startswith("gpu-")], ids=lambda path: path.stem
)
def test_on_the_cpu(script):
    assert _last_line(script).startswith("PASS")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.stem.startswith("gpu-")], ids=lambda path: path.stem
)
def test_on_a_gpu(script):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if script.stem == "gpu-second-device" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    if script.stem == "gpu-accumulation-cost":
        pytest.skip("measures what accumulation costs today; nothing has been done about it yet")
    assert _last_line(script).startswith("PASS")
