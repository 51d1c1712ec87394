"""`slideformer plan`: its answers, exit codes, and that it needs nothing but a configuration."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from hf_slideformer import cli
from hf_slideformer.config import parse_bytes
from hf_slideformer.engine.model.source import load_config, model_without_data
from hf_slideformer.engine.profiling import trace as profile
from hf_slideformer.machine.presets import PRESETS
from hf_slideformer.planner import solve
from hf_slideformer.planner.plan import format_bytes
from hf_slideformer.planner.timeline import UPDATE
from tests.parity import models

ROOT = Path(__file__).parent.parent
GIB, MIB = 2**30, 2**20

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
# Mistral-Large-123B.
LARGE = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 12288,
    "intermediate_size": 28672,
    "num_hidden_layers": 88,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 131072,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine without a GPU that nobody measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_advice(monkeypatch):
    """Advice tries other batch sizes, which takes seconds."""
    monkeypatch.setattr(solve, "advise", lambda *args, **kwargs: ())


@pytest.fixture
def config_file(tmp_path):
    """Writes a `config.json` and returns it as an argument."""

    def write(values, name="model") -> str:
        path = tmp_path / name / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return write


@pytest.fixture
def small(config_file):
    return config_file(SMALL, "small")


@pytest.fixture
def answer(capsys):
    """Runs a plan with `--json`; gives the exit code and what was printed."""

    def run(*arguments: str) -> tuple[int, dict]:
        code = cli.main(["plan", *arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


RULES = {
    "adamw": ((), "fp32", "fp32 moments"),
    "lion": (("--optim", "lion_32bit"), "lion", "Lion (exp_avg)"),
    "sgd": (("--optim", "sgd"), "sgd", "SGD (no state)"),
    "momentum": (
        ("--optim", "sgd", "--optim-args", "momentum=0.9"),
        "sgd-momentum",
        "SGD (momentum_buffer)",
    ),
}


def test_optimizers(small, answer, capsys, no_advice):
    nbytes, seconds = {}, {}
    for name, (flags, moments, shown) in RULES.items():
        arguments = (small, "--hardware", "rtx4090-64gb", "--placement", "stream", *flags)
        code, plan = answer(*arguments)
        assert code == 0 and plan["moments"] == moments
        nbytes[name] = plan["peaks"]["train"]["RAM"]
        seconds[name] = plan["prediction"]["busy_s"][UPDATE]
        assert cli.main(["plan", *arguments]) == 0
        assert f"; {shown}\n" in capsys.readouterr().out
    assert nbytes["adamw"] > nbytes["lion"] == nbytes["momentum"] > nbytes["sgd"]
    # An update that nobody measured takes as long as its bytes: gradient, and masters and moments both ways.
    assert seconds["lion"] == seconds["momentum"] == pytest.approx(seconds["adamw"] * 18 / 26, rel=0.05)
    assert seconds["sgd"] == pytest.approx(seconds["adamw"] * 10 / 26, rel=0.1)


def test_text_and_json_say_the_same(small, answer, capsys):
    arguments = (small, "--hardware", "rtx4090-64gb", "--gpu", "300MiB")
    assert cli.main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    code, plan = answer(*arguments)
    assert code == 0 and plan["fits"] is True
    assert plan["model"] == {
        "source": small,
        "class": "LlamaForCausalLM",
        "parameters": sum(
            p.numel() for p in model_without_data(load_config(small), dtype=torch.bfloat16).parameters()
        ),
        "dtype": "bf16",
    }
    assert f"{plan['model']['parameters'] / 1e6:,.2f} M parameters" in text
    assert f"{plan['hardware']['name']} (estimated)" in text
    shown = [item for item in plan["items"] if item["nbytes"]]
    assert len(shown) > 10
    for item in shown:
        assert re.search(rf"{item['what']}.* {re.escape(format_bytes(item['nbytes']))}\n", text), item
    assert list(plan["peaks"]) == ["load", "train", "save", "resume"]
    for phase, peak in plan["peaks"].items():
        assert re.search(
            rf"{phase} +{re.escape(format_bytes(peak['GPU']))} +{re.escape(format_bytes(peak['RAM']))}\n",
            text,
        )
    told = plan["prediction"]
    assert (
        f"predicted: {told['tokens_per_s']:,.0f} tokens/s, {told['step_s']:.2f} s a step, bound by {told['bound_by']}"
        in text
    )
    assert all(f"note: {note}" in text for note in plan["notes"])
    assert plan["advice"] and all(f"advice: {line}" in text for line in plan["advice"])


@pytest.mark.usefixtures("no_advice")
@pytest.mark.parametrize(("gpu", "ram"), [("150MiB", "1GiB"), ("300MiB", "600MiB"), ("2GiB", "300MiB")])
def test_budgets_are_kept(small, answer, gpu, ram):
    code, plan = answer(small, "--hardware", "rtx3090-64gb", "--gpu", gpu, "--ram", ram)
    assert code == 0
    assert plan["budgets"] == {"GPU": parse_bytes(gpu), "RAM": parse_bytes(ram)}
    assert (plan["hardware"]["gpu_bytes"], plan["hardware"]["ram_bytes"]) == (
        parse_bytes(gpu),
        parse_bytes(ram),
    )
    assert plan["reserve_bytes"] > 0
    for phase in ("load", "train"):
        assert plan["peaks"][phase]["GPU"] + plan["reserve_bytes"] <= parse_bytes(gpu)
        assert plan["peaks"][phase]["RAM"] <= parse_bytes(ram)


@pytest.mark.usefixtures("no_advice")
def test_without_sizes_the_preset_has_them(small, answer):
    _, plan = answer(small, "--hardware", "rtx4090-256gb")
    preset = PRESETS["rtx4090-256gb"]
    assert plan["budgets"] == {"GPU": preset.gpu_bytes, "RAM": preset.ram_bytes}
    assert plan["hardware"] == json.loads(json.dumps(preset.as_dict()))


@pytest.mark.usefixtures("no_advice")
def test_hardware_from_a_file(small, answer, tmp_path):
    path = tmp_path / "box.json"
    values = PRESETS["h100"].as_dict() | {"name": "my box", "source": "measured", "notes": ["it was busy"]}
    path.write_text(json.dumps(values))
    code, plan = answer(small, "--hardware", str(path))
    assert code == 0 and plan["hardware"] == values
    assert "it was busy" in plan["notes"] and not any("slideformer probe" in note for note in plan["notes"])


@pytest.mark.usefixtures("no_advice")
def test_settings_reach_the_plan(small, answer):
    h100 = ("--hardware", "h100")
    _, plain = answer(small, *h100)
    # The model takes 256 tokens, fewer than the default of 4,096.
    assert (plain["batch_size"], plain["seq_len"], plain["update"], plain["moments"]) == (
        1,
        256,
        "deferred",
        "fp32",
    )
    _, other = answer(
        small,
        *h100,
        "--seq-len",
        "128",
        "--batch-size",
        "4",
        "--max-grad-norm",
        "0",
        "--optimizer-states",
        "8bit",
    )
    assert (other["batch_size"], other["seq_len"], other["update"], other["moments"]) == (
        4,
        128,
        "overlapped",
        "8bit",
    )
    _, streamed = answer(small, *h100, "--placement", "stream", "--activations", "offload")
    assert streamed["decisions"]["resident"] == []
    assert set(streamed["decisions"]["activations"]) == {"offload"}
    _, sums = answer(small, *h100, "--placement", "stream", "--grad-accum", "4")
    gradients = {item["what"]: item["nbytes"] for item in sums["items"] if item["tier"] == "RAM"}["gradients"]
    assert gradients == 4 * streamed["host_params"]
    _, fp32 = answer(small, *h100, "--dtype", "fp32")
    assert fp32["model"]["dtype"] == "fp32"
    weights = {item["what"]: item["nbytes"] for item in fp32["items"]}["resident weights"]
    assert weights == 4 * fp32["resident_params"]


def test_advice_holds_when_it_is_followed(small, answer):
    arguments = (small, "--hardware", "rtx4090-64gb", "--gpu", "300MiB")
    _, plan = answer(*arguments)
    size, gain = next(
        found.groups()
        for line in plan["advice"]
        if (found := re.fullmatch(r"with batch size (\d+): ([\d.]+)x the tokens/s", line))
    )
    code, larger = answer(*arguments, "--batch-size", size)
    assert code == 0
    ratio = larger["prediction"]["tokens_per_s"] / plan["prediction"]["tokens_per_s"]
    assert ratio == pytest.approx(float(gain), abs=0.051) and ratio > 1.1


def test_what_does_not_fit_is_told_with_numbers_and_a_remedy_that_holds(small, answer, capsys):
    arguments = (small, "--hardware", "rtx4090-64gb", "--gpu", "150MiB", "--ram", "120MiB")
    assert cli.main(["plan", *arguments]) == 3
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[2] == "It does not fit."
    assert re.search(r"needs [\d.]+ GiB of RAM \(weights .*\); 0\.12 GiB may be used", captured.out)
    assert any(
        re.fullmatch(r"  With optimizer_states='8bit' it needs .* of RAM, which fits\.", line)
        for line in lines
    )
    code, refused = answer(*arguments)
    assert code == 3 and refused["fits"] is False and "disk" not in refused
    assert " ".join(line.strip() for line in lines[3:]) == refused["error"]
    assert answer(*arguments, "--optimizer-states", "8bit")[0] == 0


def test_gpu_that_is_too_small(config_file, capsys):
    model = config_file(LARGE)
    assert cli.main(["plan", model, "--hardware", "rtx4090-256gb", "--gpu", "4GiB", "--nvme", "4TB"]) == 3
    out = capsys.readouterr().out
    assert re.search(r"needs [\d.]+ GiB of GPU", out) and "No setting makes it fit" in out


@pytest.mark.usefixtures("no_advice")
def test_123_b_on_a_desktop_says_where_it_would_go(config_file, answer, capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arguments = (config_file(LARGE), "--hardware", "rtx4090-256gb")
    code, plan = answer(*arguments, "--nvme", "4TB")
    # Linux counts in KiB. The weights alone would be 228 GiB.
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIB
    assert code == 0 and plan["model"]["parameters"] == 122_610_069_504
    decisions, hardware = plan["decisions"], plan["hardware"]
    assert hardware["disk_bytes"] == 4 * 10**12
    whole = len(decisions["weights_on_disk"])
    assert 0 < whole < len(decisions["on_disk"]) == 88
    for tier, budget in (("GPU", "gpu_bytes"), ("RAM", "ram_bytes"), ("disk", "disk_bytes")):
        assert all(peak[tier] <= hardware[budget] for peak in plan["peaks"].values())
    layer = (12288 * (2 * 96 + 2 * 8) * 128 + 3 * 12288 * 28672) + 2 * 12288
    on_disk = {item["what"]: item["nbytes"] for item in plan["items"] if item["tier"] == "disk"}
    assert on_disk["residuals and moments"] == 88 * 10 * layer
    assert on_disk["weights"] == on_disk["gradients"] == whole * 2 * layer
    # No step is shorter than what the disk moves at least: all state once each way.
    rates = 1 / hardware["disk_read"] + 1 / hardware["disk_write"]
    assert plan["prediction"]["step_s"] > 88 * 10 * layer * rates
    assert cli.main(["plan", *arguments, "--nvme", "1TB"]) == 3
    assert re.search(r"needs 1[,\d.]+ GiB of disk \(.*\); 931\.32 GiB may be used", capsys.readouterr().out)


@pytest.mark.usefixtures("no_advice")
def test_disk_that_is_not_needed(small, answer):
    code, plan = answer(small, "--hardware", "h100", "--nvme", "1TB")
    assert code == 0 and "it fits without a disk" in plan["notes"]
    assert plan["decisions"]["on_disk"] == [] and plan["budgets"]["disk"] == 10**12


@pytest.mark.usefixtures("no_advice")
def test_optimizer_state_goes_to_disk(small, answer, capsys):
    arguments = (small, "--hardware", "rtx4090-64gb", "--gpu", "150MiB", "--ram", "120MiB")
    code, refused = answer(*arguments)
    assert code == 3
    needed = re.search(
        r"With nvme_dir it needs .*, which fits, and ([\d.]+ MiB|[\d.]+ GiB) of disk", refused["error"]
    )
    arguments += ("--nvme", "1GB")
    code, plan = answer(*arguments)
    assert code == 0 and plan["decisions"]["on_disk"]
    (item,) = (item for item in plan["items"] if item["tier"] == "disk")
    assert item["what"] == "residuals and moments" and item["nbytes"] <= 10**9
    assert item["nbytes"] >= parse_bytes(needed[1]) * 0.99  # that was with the fewest buffers
    assert plan["budgets"]["disk"] == plan["hardware"]["disk_bytes"] == 10**9
    assert plan["left"]["disk"] == 10**9 - item["nbytes"]
    assert {peak["disk"] for peak in plan["peaks"].values()} == {item["nbytes"]}
    assert max(plan["peaks"][phase]["RAM"] for phase in ("load", "train")) <= parse_bytes("120MiB")
    assert not any("without a disk" in note for note in plan["notes"])
    assert cli.main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    size = re.escape(format_bytes(item["nbytes"]))
    assert re.search(rf"\n  disk +{size}, .* left\n    residuals and moments +{size}\n", text)
    assert re.search(r"\n  peaks +GPU +RAM +disk\n", text) and re.search(rf"\n    resume .* {size}\n", text)


def test_disk_that_is_too_small(small, answer):
    arguments = (small, "--hardware", "rtx4090-64gb", "--gpu", "150MiB", "--ram", "120MiB", "--nvme", "10MB")
    code, refused = answer(*arguments)
    assert code == 3
    assert re.match(r"The plan needs [\d.]+ \wiB of disk \(.*\); 9\.54 MiB may be used", refused["error"])


def test_this_machine_without_a_gpu(small, answer, capsys):
    code, plan = answer(small)
    assert code == 0 and plan["device"] == "CPU" and plan["prediction"] is None
    assert any("--hardware" in line for line in plan["advice"])
    assert cli.main(["plan", small, "--gpu", "2GiB", "--ram", "9TiB"]) == 0
    text = capsys.readouterr().out
    assert "9,216.0 GiB of RAM, of which 2.0 GiB stand in for a GPU" in text
    assert "note: --ram is more than the" in text and "tokens/s" in text


@pytest.mark.usefixtures("no_advice")
def test_names_of_models(small, answer, tmp_path, monkeypatch):
    """A directory, a file, and a hub id of which only the configuration is there."""
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps(SMALL))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    h100 = ("--hardware", "h100")
    plans = [answer(name, *h100) for name in (small, str(Path(small).parent), "some/model")]
    assert [code for code, _ in plans] == [0, 0, 0]
    assert plans[0][1]["items"] == plans[1][1]["items"] == plans[2][1]["items"]


@pytest.mark.usefixtures("no_advice")
def test_without_liger_installed_plain_layers_are_planned_for(small, answer, monkeypatch):
    for module in (transformers.utils, profile):
        monkeypatch.setattr(module, "is_liger_kernel_available", lambda: False)
    how = (small, "--hardware", "rtx4090-64gb", "--activations", "keep")
    (_, plain), (code, planned) = answer(*how), answer(*how, "--liger")
    assert code == 0
    assert planned["peaks"] == plain["peaks"]
    said = [note for note in planned["notes"] if note not in plain["notes"]]
    assert len(said) == 1 and "pip install liger-kernel" in said[0]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.usefixtures("no_advice")
def test_experts_in_fp32_are_traced(family, tmp_path, answer):
    spec = models.MODELS[family]
    config = getattr(transformers, spec.config_class)(**spec.config, architectures=[spec.model_class])
    config.save_pretrained(tmp_path)
    how = (str(tmp_path), "--hardware", "rtx4090-64gb", "--seq-len", "32", "--activations", "keep")
    code, planned = answer(*how, "--dtype", "fp32")
    assert code == 0
    assert not any("without data" in note for note in planned["notes"])


@pytest.mark.usefixtures("no_advice")
def test_ligers_layers_are_planned_for(small, answer, monkeypatch):
    """A stand-in for Liger Kernel whose MLPs save nothing."""
    from transformers.integrations import liger

    def apply(model, config):
        assert config == {"fused_linear_cross_entropy": False}
        for layer in model.model.layers:
            layer.mlp.forward = lambda x: x * 1

    monkeypatch.setattr(liger, "apply_liger_kernel", apply)
    for module in (transformers.utils, profile):
        monkeypatch.setattr(module, "is_liger_kernel_available", lambda: True)
    how = (small, "--hardware", "rtx4090-64gb", "--activations", "keep", "--batch-size", "64")
    (_, plain), (code, planned) = answer(*how), answer(*how, "--liger")
    assert code == 0
    assert planned["peaks"]["train"]["GPU"] < plain["peaks"]["train"]["GPU"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (SMALL | {"model_type": "t5", "decoder_start_token_id": 0}, "T5ForConditionalGeneration"),
        (
            {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]},
            "BartForConditionalGeneration",
        ),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"]}, "BartForCausalLM"),
        ({"model_type": "qwen2_5_vl"}, "Qwen2_5_VLForConditionalGeneration"),
    ],
)
def test_kinds_of_models(config_file, values, expected):
    model = model_without_data(load_config(config_file(values)), dtype=torch.bfloat16)
    assert type(model).__name__ == expected
    assert all(param.is_meta and param.dtype == torch.bfloat16 for param in model.parameters())


@pytest.mark.usefixtures("no_advice")
def test_longer_than_the_model_takes_and_quantized(config_file, answer):
    model = config_file(SMALL | {"quantization_config": {"quant_method": "mxfp4"}})
    _, plan = answer(model, "--hardware", "h100", "--seq-len", "300")
    assert any("256 tokens at most" in note for note in plan["notes"])
    assert any("quantized" in note for note in plan["notes"])


def refused_in_one_line(capsys, *arguments: str) -> str:
    """What is wrong with arguments that cannot be used."""
    assert cli.main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("slideformer: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--hardware", "rtx4090"], ["no preset is called 'rtx4090'", "rtx4090-64gb", "slideformer probe"]),
        (["--hardware", "box.json"], ["cannot read", "box.json"]),
        (["--gpu", "lots"], ["--gpu", "'lots' is not a size", "24GiB"]),
        (["--ram", "0"], ["--ram", "must be positive"]),
        (["--nvme", "4 apples"], ["--nvme", "is not a size"]),
        (["--seq-len", "0"], ["--seq-len must be a positive whole number"]),
        (["--batch-size", "1.5"], ["--batch-size must be a positive whole number"]),
        (["--grad-accum", "many"], ["--grad-accum must be a positive whole number"]),
        (["--max-grad-norm", "nan"], ["--max-grad-norm must be a number"]),
        (["--dtype", "fp16"], ["--dtype must be bf16 or fp32"]),
        (["--placement", "gpu"], ["placement='gpu'", "'stream'"]),
        (["--activations", "none"], ["activations='none'", "'offload'"]),
        (["--optimizer-states", "4bit"], ["optimizer_states='4bit'", "'8bit'"]),
        (["--optimizer-states", "8bit", "--optim", "sgd"], ["optimizer_states='8bit' is for AdamW; SGD"]),
        (["--optim", "adafactor"], ["optim='adafactor'", "'adamw_torch'", "'lion_32bit' or 'sgd'"]),
        (
            ["--optim", "sgd", "--optim-args", "beta=1"],
            ["'beta=1'", "momentum, dampening, weight_decay, nesterov"],
        ),
    ],
)
def test_arguments_that_cannot_be_used(small, capsys, arguments, parts):
    message = refused_in_one_line(capsys, small, *arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ("{nope", ["not a valid JSON file"]),
        ({"hidden_size": 5}, ["model_type"]),
        ({"model_type": "nonsense"}, ["`nonsense`"]),
        ({"model_type": "llama", "hidden_size": "big"}, ["hidden_size", "expected int"]),
        ({"model_type": "resnet"}, ["no language model", "'resnet'"]),
        (
            {
                "model_type": "own",
                "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
            },
            ["code of its own", "--trust-remote-code"],
        ),
    ],
)
def test_models_that_cannot_be_used(config_file, capsys, values, parts):
    message = refused_in_one_line(capsys, config_file(values), "--hardware", "h100")
    assert all(part in message for part in parts), message


def test_models_that_are_not_there(tmp_path, capsys):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    for name, part in (
        (str(tmp_path), "there is no file"),
        (str(tmp_path / "missing"), "there is no file"),
        (str(weights), "is not a configuration"),
        ("some/unknown-model", "cannot read the configuration of 'some/unknown-model'"),
    ):
        assert part in refused_in_one_line(capsys, name, "--hardware", "h100")


def test_model_whose_layers_cannot_be_streamed(config_file, capsys):
    model = config_file({"model_type": "gemma3n_text", "num_hidden_layers": 20, "vocab_size": 100})
    assert "use plain Trainer" in refused_in_one_line(capsys, model, "--hardware", "h100")


@pytest.mark.usefixtures("no_advice")
def test_own_code_runs_only_if_it_is_trusted(config_file, answer, capsys):
    model = config_file(
        SMALL
        | {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        },
        "with_code",
    )
    (Path(model).parent / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    directory = str(Path(model).parent)
    assert "--trust-remote-code" in refused_in_one_line(capsys, directory, "--hardware", "h100")
    code, plan = answer(directory, "--hardware", "h100", "--trust-remote-code")
    assert code == 0 and plan["model"]["class"] == "OwnForCausalLM"


def test_help_does_not_wait_for_torch():
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hf_slideformer.cli", "plan", "--help"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    for flag in ("--seq-len", "--gpu", "--ram", "--nvme", "--hardware", "--optimizer-states", "--json"):
        assert flag in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "hf_slideformer.config" in imported
    assert not imported & {"torch", "transformers", "slideformer_kernels"}
