"""The plain Accelerate script with `SlideAccelerator` in `Accelerator`'s place: the same losses, resumed or not."""

import json
from pathlib import Path

import finetune_accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from hf_slideformer import SlideAccelerator, SlideConfig
from hf_slideformer.engine.engine import engine_of

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    rows = [{"text": "Return the sum of the values " * (1 + number % 4)} for number in range(34)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(tiny_model_dir, texts, tmp_path, monkeypatch):
    """Runs the script with an accelerator class, and gives its losses; five steps of an epoch and a bit."""
    streamed = []

    class Counted(SlideAccelerator):
        def end_training(self):
            streamed.extend(engine_of(model).metrics.totals()["h2d_bytes"] for model in self._models)
            super().end_training()

    def run(accelerator_class, output, *more):
        monkeypatch.setattr(finetune_accelerate, "Accelerator", accelerator_class)
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {"model": tiny_model_dir, "dataset": texts, "output-dir": tmp_path / output}
        options |= {"max-steps": 5, "batch-size": 2, "gradient-accumulation-steps": 4, "eval-rows": 4}
        options |= {
            "learning-rate": 1e-2,
            "max-length": 48,
            "warmup-steps": 1,
            "eval-steps": 2,
            "save-steps": 3,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return finetune_accelerate.main([*flags, *map(str, more)])

    run.slide, run.streamed = Counted, streamed
    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def test_same_losses_as_plain_accelerate(run, tmp_path, capsys):
    plain = run(Accelerator, "plain")
    printed = [capsys.readouterr().out]
    ours = run(run.slide, "ours")
    printed.append(capsys.readouterr().out)
    assert run.streamed[0] > 0
    assert len(plain) == 5 and plain[-1] < 0.9 * plain[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=0)
    assert all(text.count("held-out loss") == 2 for text in printed)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "ours")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", ["ours", "plain"])
def test_resumed_run_is_the_uninterrupted_run(first, run, tmp_path):
    whole = run(run.slide if first == "ours" else Accelerator, first)
    resumed = run(run.slide, "resumed", "--resume-from", tmp_path / first / "state-3")
    assert run.streamed[-1] > 0
    tolerance = 0 if first == "ours" else 1e-5
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(whole[3:]), rtol=tolerance, atol=0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_can_be_read(path):
    SlideConfig.of(path)
    from hf_slideformer.launch import read_configuration

    content = read_configuration(path)
    assert "slideformer_config" in content and content["num_processes"] == 1
