"""The script that compares runs bit by bit, on a model that fits anywhere."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import bit_identity


@pytest.fixture(autouse=True)
def deterministic_again():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("against", ["resident", "disk"])
def test_row(tmp_path, against):
    rows = tmp_path / "rows.jsonl"
    more = ["--nvme-dir", str(tmp_path)] if against == "disk" else []
    arguments = ["--steps", "2", "--batch-size", "2", "--seq-len", "16", "--out", str(rows)]
    assert bit_identity.main([*arguments, "--against", against, *more]) == 0
    row = json.loads(rows.read_text())
    assert row["identical"] and row["tensors_different"] == [] and row["tensors_compared"] > 50
    assert row["losses_streamed"] == row[f"losses_{against}"] and len(row["losses_streamed"]) == 2
    if against == "disk":
        # Every byte of state is read once a step at least, and written.
        assert row["disk"]["read_bytes"] > 2 * 0.7 * row["disk"]["file_bytes"]
        assert row["disk"]["write_bytes"] > 2 * 0.7 * row["disk"]["file_bytes"]


def test_a_difference_is_found(tmp_path, monkeypatch, capsys):
    checksums = bit_identity.checksums
    calls = []

    def changed(engine):
        calls.append(engine)
        if len(calls) == 2:
            engine.states[5].weight.view(-1).view(torch.int16)[3] ^= 1
        return checksums(engine)

    monkeypatch.setattr(bit_identity, "checksums", changed)
    assert bit_identity.main(["--steps", "1", "--batch-size", "2", "--seq-len", "16"]) == 1
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(row["tensors_different"]) == 1 and not row["identical"]


def test_a_disk_needs_a_directory(capsys):
    with pytest.raises(SystemExit):
        bit_identity.main(["--against", "disk"])
    assert "belong together" in capsys.readouterr().err
