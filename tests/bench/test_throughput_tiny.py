"""The throughput script runs end to end on a tiny shape and its rows say what docs/benchmarks/README.md says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("throughput.py")
ROOT = SCRIPT.parents[2]
# What pytest's `pythonpath` gives this process, for the script's.
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
TINY = (
    "--shape",
    "tiny",
    "--layers",
    "2",
    "--seq-len",
    "32",
    "--batch-sizes",
    "2",
    "--steps",
    "2",
    "--warmup",
    "1",
)

NEVER_NULL = {
    "versions",
    "cores",
    "ram_total_bytes",
    "date",
    "config",
    "warmup_steps",
    "measured_steps",
    "params",
    "step_s_p20",
    "step_s_p50",
    "step_s_p80",
    "step_s_mean",
    "tokens_per_step",
    "tokens_per_s",
    "tokens_per_s_mean",
    "train_loss",
    "ram_peak_rss_bytes",
    "ram_available_drop_bytes",
}
MAY_BE_NULL = {
    "commit",
    "cuda",
    "gpu",
    "gpu_memory_bytes",
    "pcie",
    "cpu",
    "ram_cgroup_limit_bytes",
    "gpu_peak_allocated_bytes",
    "gpu_peak_reserved_bytes",
    "bytes_moved",
    "host_state_bytes_per_param",
    "slide_metrics",
    "error",
}


def rows_of(tmp_path: Path, *arguments: str) -> list[dict]:
    out = tmp_path / "rows.jsonl"
    result = subprocess.run(
        [sys.executable, SCRIPT, *TINY, "--out", out, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"')]
    return rows


def check_row(row: dict):
    assert set(row) == NEVER_NULL | MAY_BE_NULL
    assert [key for key in NEVER_NULL if row[key] is None] == []
    assert row["error"] is None
    assert 0 < row["step_s_p20"] <= row["step_s_p50"] <= row["step_s_p80"]
    assert row["tokens_per_step"] == 2 * 32
    assert row["tokens_per_s"] == pytest.approx(64 / row["step_s_p50"])
    assert {"torch", "triton", "transformers", "accelerate", "liger_kernel"} <= set(row["versions"])


def test_baseline_row(tmp_path):
    (row,) = rows_of(tmp_path, "--baseline")
    check_row(row)
    assert row["config"]["placement"] is None
    assert row["slide_metrics"] is None


@pytest.mark.parametrize("max_grad_norm", ["1.0", "0"])
def test_slide_row(tmp_path, max_grad_norm):
    (row,) = rows_of(tmp_path, "--placement", "stream", "--max-grad-norm", max_grad_norm)
    check_row(row)
    assert row["config"]["placement"] == "stream"
    assert row["config"]["max_grad_norm"] == float(max_grad_norm)


def test_slide_and_baseline_train_the_same_model(tmp_path):
    """Random tokens and weights come from the seed alone; bf16 leaves the losses this close."""
    (slide,) = rows_of(tmp_path / "slide")
    (baseline,) = rows_of(tmp_path / "baseline", "--baseline")
    assert slide["params"] == baseline["params"]
    assert slide["train_loss"] == pytest.approx(baseline["train_loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "no-such-shape"), "neither one of"),
        (("--baseline", "--slide", "update=overlapped"), "--baseline does not use"),
        (("--warmup", "0"), "at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_built(arguments, message):
    result = subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert message in result.stderr
