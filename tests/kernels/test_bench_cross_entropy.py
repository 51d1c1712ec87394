"""A tiny run of the benchmark script: it must work when it is wanted on the large machine."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_rows_are_json():
    script = Path(__file__).with_name("bench_cross_entropy.py")
    sizes = ["--tokens", "8", "24", "--hidden", "16", "--vocabulary", "203", "--memory-budget-mib", "1"]
    command = [sys.executable, str(script), *sizes, "--warmup", "1", "--repeats", "3", "--commit", "abc"]
    # A GPU would only add seconds of compiling.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=120, check=True, env=environment
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["tokens"], row["implementation"]) for row in rows] == [
        (tokens, name) for tokens in (8, 24) for name in ("products_before", "products_after", "ours")
    ]
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows)
    assert all(row["commit"] == "abc" and row["torch"] and "device" in row for row in rows)
    ours = rows[2]
    assert (
        ours["ratio_to_products"] > 0 and 4 < ours["loss"] < 8 and ours["weight_grad_bytes"] == 203 * 16 * 2
    )
