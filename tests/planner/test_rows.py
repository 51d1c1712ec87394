"""Rows of whole steps on an H100, placed by the planner: the time model and the plans' bytes against measurements.

The time model was fitted to these rows, so this keeps it there; it is no test on rows that it has not seen. Profiles
are those made by hand from shapes (`machines.py`), so that no model has to be traced here.
"""

import json
from pathlib import Path

import pytest

from hf_slideformer.machine.hardware import Hardware
from hf_slideformer.memory.layout import EIGHT_BIT_MOMENTS, FP32_MOMENTS
from hf_slideformer.planner.memory import MemoryModel
from hf_slideformer.planner.timeline import predict
from hf_slideformer.planner.workload import Decisions
from tests.bench.throughput import SHAPES

from .machines import PROBED, llama

DIRECTORY = Path(__file__).parents[2] / "docs/benchmarks/2026-11-22-h100-plan"
# What was measured just before the rows of a commit, on the machine that made them; the other rows are of several
# machines of the kind.
PROBES = {"7b9377c": "probe-third-machine.json", "2cac2e8": "probe-fourth-machine.json"}
MOMENTS = {moments.name: moments for moments in (FP32_MOMENTS, EIGHT_BIT_MOMENTS)}


def _name(row):
    config = row["config"]
    clipping = "" if config["max_grad_norm"] else "-unclipped"
    return f"{config['shape']}-{config['batch_size']}x{config['seq_len']}{clipping}"


def _hardware(row):
    probe = PROBES.get(row["commit"])
    return PROBED if probe is None else Hardware.from_file(DIRECTORY / probe)


def _rows():
    for path in ("auto.jsonl", "large.jsonl", "again.jsonl"):
        for line in (DIRECTORY / path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            again = f"-again-{row['commit']}" if path == "again.jsonl" else ""
            yield pytest.param(row, id=_name(row) + again)


ROWS = list(_rows())


def _workload(row):
    config, plan = row["config"], row["plan"]
    shape = SHAPES[config["shape"]]
    heads = shape["num_attention_heads"]
    width = shape.get("head_dim", shape["hidden_size"] // heads)
    return llama(
        config["batch_size"],
        config["seq_len"],
        layers=config["layers"] or shape["num_hidden_layers"],
        hidden=shape["hidden_size"],
        queries=heads * width,
        kv=shape["num_key_value_heads"] * width,
        inner=shape["intermediate_size"],
        bias=shape["model_type"] == "qwen2",
        tied=shape["tie_word_embeddings"],
        vocabulary=shape["vocab_size"],
        moments=MOMENTS[plan["moments"]],
        overlapped=config["max_grad_norm"] == 0,
    )


def _decisions(row):
    made = row["plan"]["decisions"]
    return Decisions(**made | {key: tuple(made[key]) for key in ("resident", "activations")})


def test_every_row_of_the_page_is_there():
    assert sorted(row.id for row in ROWS) == [
        "llama-2-13b-4x1024",
        "llama-3.1-8b-16x1024",
        "llama-3.1-8b-16x1024-unclipped",
        "llama-3.1-8b-1x32768",
        "llama-3.1-8b-32x1024",
        "llama-3.1-8b-32x1024-unclipped",
        "llama-3.1-8b-64x1024",
        "llama-3.1-8b-8x1024",
        "llama-3.1-8b-8x1024-again-7b9377c",
        "llama-3.1-8b-8x1024-unclipped",
        "mistral-large-123b-1x1024",
        "mistral-large-123b-1x1024-again-2cac2e8",
        "mistral-large-123b-1x1024-again-7b9377c",
        "mistral-small-24b-1x1024",
        "qwen2.5-3b-16x1024",
    ]


@pytest.mark.parametrize("row", ROWS)
def test_steps_are_predicted_within_ten_percent(row):
    prediction = predict(_workload(row), _hardware(row), _decisions(row))
    assert prediction.step_s == pytest.approx(row["step_s_p50"], rel=0.1)


@pytest.mark.parametrize("row", ROWS)
def test_model_and_ram_are_those_of_the_row(row):
    """Parameters and bytes in RAM follow from shapes and decisions alone, so today's plan has them to the byte."""
    workload, decisions = _workload(row), _decisions(row)
    parameters = sum(layout.numel for layout in workload.layouts) + sum(
        spec.numel for spec in workload.outside
    )
    assert parameters == row["params"]
    assert MemoryModel(workload).peaks(decisions)["train"]["RAM"] == row["host_bytes"]


@pytest.mark.parametrize("row", ROWS)
def test_peaks_are_within_the_row_s_own_plan(row):
    """The plan was made before the run, from the traced model; it may be three percent too high, and never too low."""
    planned = row["plan"]["peaks"]["train"]
    for tier, measured in (("GPU", row["gpu_peak_allocated_bytes"]), ("RAM", row["host_bytes"])):
        assert planned[tier] / 1.03 <= measured <= planned[tier], tier
