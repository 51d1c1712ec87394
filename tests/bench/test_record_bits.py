"""The script that records the bits of a list of runs: the same code has the same, other arithmetic has not."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import record_bits


@pytest.fixture(autouse=True)
def deterministic_again():
    yield
    torch.use_deterministic_algorithms(False)


def test_the_same_code_has_the_same_bits_and_other_arithmetic_is_found(tmp_path, monkeypatch, capsys):
    path, names = tmp_path / "bits.json", ["streamed", "disk", "resumed"]
    assert record_bits.main(["--out", str(path), "--runs", *names]) == 0
    recorded = json.loads(path.read_text())
    assert recorded["streamed"]["weights"] == recorded["disk"]["weights"] == recorded["resumed"]["weights"]
    assert len(recorded["streamed"]["losses"]) == 4 and min(recorded["streamed"]["norms"]) > 0.5
    assert record_bits.main(["--against", str(path), "--runs", "streamed", "disk"]) == 0
    assert "2 of 2 runs have the bits" in capsys.readouterr().out
    monkeypatch.setitem(record_bits.RUNS, "streamed", {"args": {"weight_decay": 0.101}})
    assert record_bits.main(["--against", str(path), "--runs", "streamed"]) == 1
    assert "streamed: losses were" in capsys.readouterr().out or "differ" in path.read_text()
