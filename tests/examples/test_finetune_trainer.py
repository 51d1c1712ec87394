"""The short script: whole runs with a tiny model and a local file."""

import json

import finetune_trainer
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    rows = [{"text": f"Return the sum of the values in the list {number}."} for number in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(model, dataset, output_dir, *more):
    finetune_trainer.main(
        ["--model", str(model), "--dataset", str(dataset), "--output-dir", str(output_dir)]
        + ["--max-steps", "4", "--batch-size", "4", "--learning-rate", "1e-2", "--max-length", "64"]
        + list(more)
    )


def losses(output):
    """The losses of the steps, as Trainer prints them."""
    logs = [line.strip() for line in output.splitlines() if line.strip().startswith("{'loss'")]
    return [float(line.split("'")[3]) for line in logs]


@pytest.mark.parametrize("more", [[], ["--bf16", "--gradient-accumulation-steps", "2"]], ids=["fp32", "bf16"])
def test_whole_run(more, tiny_model_dir, texts, tmp_path, capsys):
    run(tiny_model_dir, texts, tmp_path, *more)
    printed = capsys.readouterr().out
    assert "2 units" in printed
    assert "updates: deferred" in printed
    course = losses(printed)
    assert len(course) == 4
    assert course[-1] < 0.9 * course[0]
    trained, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert trained.dtype == torch.float32
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert all(
        not torch.equal(one, two) for one, two in zip(trained.parameters(), start.parameters(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|end|>"


def test_resumed_run_is_the_uninterrupted_run(tiny_model_dir, texts, tmp_path):
    saving = ["--bf16", "--save-steps", "2"]
    run(tiny_model_dir, texts, tmp_path / "whole", *saving)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    run(tiny_model_dir, texts, tmp_path / "resumed", *saving, "--resume-from-checkpoint", checkpoint)
    whole, resumed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_clipping_off_overlaps_updates(tiny_model_dir, texts, tmp_path, capsys):
    run(tiny_model_dir, texts, tmp_path, "--max-grad-norm", "0")
    assert "updates: overlapped" in capsys.readouterr().out
