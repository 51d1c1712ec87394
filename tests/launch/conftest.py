"""An installed package without installing it: its metadata, made from pyproject.toml, first on the path."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Trains three steps and prints what happened; `h2d_bytes` are the engine's own count of what was streamed.
TRAIN = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from accelerate import Accelerator

def main():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(3):
        tokens = torch.arange(24).view(2, 12) + step
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    engine = sys.modules.get("hf_slideformer.engine.engine")
    engine = engine and engine.engine_of(model)
    streamed = engine.metrics.totals()["h2d_bytes"] if engine else 0
    print(json.dumps({"losses": losses, "h2d_bytes": streamed, "argv": sys.argv[1:]}))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Environment variables of a process in which the package is installed."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = site / "hf_slideformer-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in project["entry-points"].items()
        )
    )
    home = tmp_path_factory.mktemp("home")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (site, ROOT, ROOT / "kernels"))),
        "HF_HOME": str(home),  # no default configuration of the user's own
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture
def run(installed, tmp_path):
    """Runs a Python command line in a directory of the test's own."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=installed | environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def accelerate(run, tmp_path):
    """Runs command lines of Accelerate one after the other in a process whose program is its console script."""
    script = tmp_path / "bin" / "accelerate"
    script.parent.mkdir()
    script.write_text(
        "import sys\nfrom accelerate.commands.accelerate_cli import main\nlines = sys.argv[1:]\nwhile lines:\n"
        "    count = int(lines.pop(0))\n    sys.argv[1:], lines = lines[:count], lines[count:]\n    main()\n"
    )

    def accelerate(*lines, **environment):
        return run(script, *(part for line in lines for part in (len(line), *line)), **environment)

    return accelerate
