"""The convergence script from end to end, on two steps."""

import json

from . import convergence


def test_rows_and_picture(tmp_path):
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "picture.svg"
    settings = ["--scratch", "--steps", "2", "--batch-size", "2", "--held-out", "2", "--max-length", "16"]
    convergence.main([*settings, "--learning-rates", "1e-3", "--seeds", "0", "--out", str(rows)])
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["optimizer_states"] for row in read] == ["fp32", "8bit"]
    for row in read:
        assert [point["step"] for point in row["curve"]] == [0, 1, 2]
        assert row["held_out_loss"] < row["held_out_loss_before"]
    assert read[0]["held_out_loss"] != read[1]["held_out_loss"]
    convergence.main(["--plot", str(rows), "--out", str(picture)])
    assert picture.read_text().rstrip().endswith("</svg>")
