"""The throughput script runs end to end on a tiny shape and its rows say what docs/benchmarks/README.md says."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import check_plan

sys.path.insert(0, str(Path(__file__).parent))

import throughput

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
    "step_s",
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
    "host_bytes",
    "disk_bytes",
    "host_state_bytes_per_param",
    "slide_metrics",
    "plan",
    "error",
}


def row_of(tmp_path: Path, *arguments: str) -> dict:
    """The row that the script writes, run in this process: importing everything again takes longer than a row."""
    out = tmp_path / "rows.jsonl"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert throughput.main([*TINY, "--out", str(out), *arguments]) == 0
    return written_and_printed(out, printed.getvalue())


def written_and_printed(out: Path, printed: str) -> dict:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [json.loads(line) for line in printed.splitlines() if line.startswith('{"')]
    (row,) = rows
    return row


def check_row(row: dict):
    assert set(row) == NEVER_NULL | MAY_BE_NULL
    assert [key for key in NEVER_NULL if row[key] is None] == []
    assert row["error"] is None
    assert 0 < row["step_s_p20"] <= row["step_s_p50"] <= row["step_s_p80"]
    assert row["tokens_per_step"] == 2 * 32
    assert row["tokens_per_s"] == pytest.approx(64 / row["step_s_p50"])
    assert {"torch", "triton", "transformers", "accelerate", "liger_kernel"} <= set(row["versions"])


@pytest.fixture(scope="module")
def baseline_row(tmp_path_factory):
    return row_of(tmp_path_factory.mktemp("baseline"), "--baseline")


@pytest.fixture(scope="module")
def slide_row(tmp_path_factory):
    """Of the script in a process of its own."""
    out = tmp_path_factory.mktemp("slide") / "rows.jsonl"
    result = subprocess.run(
        [sys.executable, SCRIPT, *TINY, "--out", out, "--placement", "stream"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return written_and_printed(out, result.stdout)


def test_baseline_row(baseline_row):
    check_row(baseline_row)
    assert baseline_row["config"]["placement"] is None
    assert baseline_row["slide_metrics"] is None


def test_the_plan_of_a_row_is_right(tmp_path):
    """`auto` placement on a part of this machine's RAM, as check_plan.py compares it."""
    row = row_of(tmp_path, "--placement", "auto", "--slide", "gpu_memory=64MiB")
    check_row(row)
    assert row["plan"]["prediction"]["step_s"] > 0
    text, _ = check_plan.compare(row)  # times of a tiny model on a shared machine say nothing
    assert "RAM" in text and "WRONG" not in text.split("step")[0]


def test_slide_row(slide_row):
    check_row(slide_row)
    assert slide_row["config"]["placement"] == "stream"
    assert slide_row["config"]["max_grad_norm"] == 1.0
    assert slide_row["plan"]["update"] == "deferred"
    assert slide_row["host_state_bytes_per_param"] >= 14  # split master, two fp32 moments, bf16 gradients
    assert slide_row["bytes_moved"]["h2d_bytes"] > 0


def test_slide_row_without_clipping(tmp_path):
    row = row_of(tmp_path, "--max-grad-norm", "0")
    check_row(row)
    assert row["config"]["max_grad_norm"] == 0
    assert row["plan"]["update"] == "overlapped"
    assert row["host_state_bytes_per_param"] >= 12  # gradients need no room of their own


def test_slide_and_baseline_train_the_same_model(slide_row, baseline_row):
    """Random tokens and weights come from the seed alone; bf16 leaves the losses this close."""
    assert slide_row["params"] == baseline_row["params"]
    assert slide_row["train_loss"] == pytest.approx(baseline_row["train_loss"], rel=1e-2)


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
