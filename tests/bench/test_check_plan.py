"""The script that compares rows with their plans: it sees what is wrong, and says nothing of what is right."""

import copy
import json

import pytest

from .check_plan import main

GIB = 2**30
ROW = {
    "error": None,
    "config": {"shape": "tiny", "batch_size": 2, "seq_len": 16, "max_grad_norm": 1.0, "placement": "auto"},
    "gpu_peak_allocated_bytes": 70 * GIB,
    "host_bytes": 40 * GIB,
    "step_s_p50": 1.0,
    "tokens_per_s": 32.0,
    "plan": {
        "peaks": {"train": {"GPU": 71 * GIB, "RAM": 40 * GIB}},
        "prediction": {"step_s": 1.05, "bound_by": "GPU compute"},
    },
}


def _run(tmp_path, capsys, **changes):
    row = copy.deepcopy(ROW)
    for path, value in changes.items():
        *parents, key = path.split("__")
        target = row
        for parent in parents:
            target = target[parent]
        target[key] = value
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    return main([str(file)]), capsys.readouterr()


def test_right(tmp_path, capsys):
    status, output = _run(tmp_path, capsys)
    assert status == 0
    assert "GPU  70.00 of  71.00 GiB (1.014)" in output.out and "(+5.0%)" in output.out
    assert "WRONG" not in output.out


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu_peak_allocated_bytes": 72 * GIB},
        {"gpu_peak_allocated_bytes": 60 * GIB},
        {"host_bytes": 41 * GIB},
        {"host_bytes": 30 * GIB},
        {"step_s_p50": 0.9},
        {"step_s_p50": 1.2},
    ],
    ids=str,
)
def test_wrong(tmp_path, capsys, changes):
    status, output = _run(tmp_path, capsys, **changes)
    assert status == 1
    assert output.out.count("WRONG") == 1


def test_rows_without_a_plan_are_no_proof(tmp_path, capsys):
    assert _run(tmp_path, capsys, plan=None)[0] == 1
    status, output = _run(tmp_path, capsys, error="out of GPU memory")
    assert status == 1
    assert "no row has a plan" in output.err
