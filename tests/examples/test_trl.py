"""The TRL scripts: whole runs with a tiny model and local files, of all weights and of adapters."""

import json

import dpo_trl
import pytest
import sft_trl
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": f"Return the sum of the list {number}."},
            ]
        }
        for number in range(16)
    ]
    return write(tmp_path_factory.mktemp("sft") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    rows = [
        {
            "prompt": f"say {number}",
            "chosen": f" the sum of the list {number}",
            "rejected": f" no values {number}",
        }
        for number in range(16)
    ]
    return write(tmp_path_factory.mktemp("dpo") / "rows.jsonl", rows)


def run(script, model, dataset, output_dir, *more):
    script.main(
        ["--model", str(model), "--dataset", str(dataset), "--output-dir", str(output_dir)]
        + ["--max-steps", "4", "--batch-size", "4", "--learning-rate", "1e-2", "--max-length", "96"]
        + list(more)
    )


def losses(output):
    """The losses of the steps, as Trainer prints them."""
    logs = [line.strip() for line in output.splitlines() if line.strip().startswith("{'loss'")]
    return [float(line.split("'")[3]) for line in logs]


@pytest.mark.parametrize(
    ("script", "more"),
    [
        (sft_trl, []),
        (sft_trl, ["--bf16", "--packing", "--gradient-accumulation-steps", "2"]),
        (dpo_trl, []),
        (dpo_trl, ["--bf16", "--reference", "precomputed"]),
    ],
    ids=["sft", "sft, packed", "dpo", "dpo, precomputed"],
)
def test_all_weights(script, more, tiny_model_dir, conversations, preferences, tmp_path, capsys):
    run(script, tiny_model_dir, conversations if script is sft_trl else preferences, tmp_path, *more)
    printed = capsys.readouterr().out
    assert "2 units" in printed
    course = losses(printed)
    assert len(course) == 4
    assert course[-1] < 0.95 * course[0]
    trained, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert all(
        not torch.equal(one, two) for one, two in zip(trained.parameters(), start.parameters(), strict=True)
    )


@pytest.mark.parametrize("script", [sft_trl, dpo_trl], ids=["sft", "dpo"])
def test_adapters(script, tiny_model_dir, conversations, preferences, tmp_path, capsys):
    dataset = conversations if script is sft_trl else preferences
    run(script, tiny_model_dir, dataset, tmp_path, "--lora-rank", "4", "--save-steps", "2")
    course = losses(capsys.readouterr().out)
    assert course[-1] < course[0]
    assert not list(tmp_path.glob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trained = PeftModel.from_pretrained(base, tmp_path)
    moved = [p.abs().max() for name, p in trained.named_parameters() if "lora_B" in name]
    assert len(moved) == 2 * 7 and all(value > 0 for value in moved)
    resumed = tmp_path / "resumed"
    run(
        script,
        tiny_model_dir,
        dataset,
        resumed,
        *("--lora-rank", "4", "--resume-from-checkpoint", str(tmp_path / "checkpoint-2")),
    )
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), resumed)
    for name, param in trained.named_parameters():
        assert torch.equal(again.get_parameter(name), param), name
