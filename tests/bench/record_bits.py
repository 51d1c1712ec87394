#!/usr/bin/env python
"""Does a change of the code change any bit of training? Records a fixed list of runs, or compares with a record.

Each run trains a tiny random model on seeded tokens through the public names only, so the script runs on both sides of
a rewrite of the engine: losses, gradient norms, and a checksum of every weight and of all optimizer state.

Examples:
    python tests/bench/record_bits.py --out before.json
    python tests/bench/record_bits.py --against before.json
"""

import argparse
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use

import torch
import transformers
from transformers import TrainingArguments

from hf_slideformer import SlideTrainer

_WIDTHS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_WIDTHS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER | {"tie_word_embeddings": True}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _DECODER | {"num_local_experts": 4, "output_router_logits": True},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **_WIDTHS,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.1,
            "decoder_start_token_id": 0,
        },
    ),
}

# Of each run: settings of SlideConfig, and what else differs from a bf16 run of a llama that came in as fp32, clipped.
# "{dir}" is a new directory. The sizes of a GPU, which RAM stands in for on the CPU, make units resident, or some.
RUNS: dict[str, dict[str, Any]] = {
    "streamed": {},
    "fp32": {"bf16": False},
    "from bf16": {"dtype": "bfloat16"},
    "offloaded": {"slide": {"activations": "offload"}},
    "kept": {"slide": {"activations": "keep"}},
    "a large GPU": {"slide": {"gpu_memory": "1GiB"}},
    "a small GPU": {"slide": {"gpu_memory": "900KiB"}},
    "accumulation": {"args": {"gradient_accumulation_steps": 3}},
    "accumulation in fp32": {"bf16": False, "args": {"gradient_accumulation_steps": 3}},
    "overlapped": {"args": {"max_grad_norm": 0.0}},
    "deferred, unclipped": {"slide": {"update": "deferred"}, "args": {"max_grad_norm": 0.0}},
    "8-bit": {"slide": {"optimizer_states": "8bit"}},
    "disk": {"slide": {"nvme_dir": "{dir}", "cpu_memory": "2MiB"}},
    "disk, accumulation": {
        "slide": {"nvme_dir": "{dir}", "cpu_memory": "2MiB"},
        "args": {"gradient_accumulation_steps": 2},
    },
    "LoRA": {"lora": True},
    "mixture of experts": {"model": "mixtral"},
    "mixture of experts, small GPU": {"model": "mixtral", "slide": {"gpu_memory": "1500KiB"}},
    "encoder-decoder": {"model": "t5"},
    "encoder-decoder, fp32": {"model": "t5", "bf16": False},
    "resumed": {"resume": True},
    "resumed, 8-bit": {"resume": True, "slide": {"optimizer_states": "8bit"}},
}
STEPS = 4


def main(argv: list[str] | None = None) -> int:
    """Record or compare; return 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here")
    parser.add_argument("--against", type=Path, help="compare with this record")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), metavar="NAME", help="instead of all")
    arguments = parser.parse_args(argv)
    torch.use_deterministic_algorithms(True)
    found = {name: record(**RUNS[name]) for name in arguments.runs}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.against is None:
        return 0
    known = json.loads(arguments.against.read_text())
    differs = [name for name, what in found.items() if known.get(name) != what]
    for name in differs:
        print(f"{name}: {_first_difference(known.get(name), found[name])}")
    print(f"{len(found) - len(differs)} of {len(found)} runs have the bits of {arguments.against}")
    return 1 if differs else 0


def record(
    *,
    model: str = "llama",
    dtype: str = "float32",
    bf16: bool = True,
    slide: dict[str, Any] | None = None,
    args: dict[str, Any] | None = None,
    lora: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Losses, norms and checksums of one run; see `RUNS`."""
    with tempfile.TemporaryDirectory() as directory:
        settings = {key: directory if value == "{dir}" else value for key, value in (slide or {}).items()}
        common = {"output_dir": directory, "bf16": bf16, "slide": settings, "args": args or {}}
        trainer = _trainer(_model(model, dtype, lora), **common, steps=STEPS)
        if resume:
            trainer = _trainer(_model(model, dtype, lora), **common, steps=STEPS // 2)
            trainer.train()
            trainer = _trainer(_model(model, dtype, lora), **common, steps=STEPS)
        trainer.train(resume_from_checkpoint=resume or None)
        logged = [row for row in trainer.state.log_history if "loss" in row]
        weights = trainer.accelerator.get_state_dict(trainer.model)
        optimizer = trainer.optimizer.state_dict()["state"]
        return {
            "losses": [row["loss"] for row in logged],
            "norms": [row.get("grad_norm") for row in logged],
            "weights": {name: _checksum(value) for name, value in weights.items()},
            "state": {
                f"{index}.{name}": _checksum(value) if isinstance(value, torch.Tensor) else value
                for index, entries in optimizer.items()
                for name, value in entries.items()
            },
        }


def _model(name: str, dtype: str, lora: bool) -> torch.nn.Module:
    config_name, model_name, settings = MODELS[name]
    transformers.set_seed(0)
    config = getattr(transformers, config_name)(**settings)
    model = getattr(transformers, model_name)(config).to(getattr(torch, dtype))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


def _trainer(
    model: torch.nn.Module, *, output_dir: str, bf16: bool, slide: dict, args: dict, steps: int
) -> SlideTrainer:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(4, 96, (48, 12), generator=generator).tolist()
    arguments = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_steps": STEPS // 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": bf16,
        "seed": 3,
        "lr_scheduler_type": "constant",
    } | args
    data = [{"input_ids": row, "labels": list(row)} for row in rows]
    return SlideTrainer(
        model=model, args=TrainingArguments(**arguments), train_dataset=data, slide_config=slide or None
    )


def _checksum(tensor: torch.Tensor) -> str:
    value = tensor.detach().cpu().contiguous()
    data = value.view(-1).view(torch.uint8).numpy() if value.numel() else b""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {zlib.crc32(data):08x}"


def _first_difference(known: dict | None, found: dict) -> str:
    if known is None:
        return "not in the record"
    for part, values in found.items():
        if known[part] == values:
            continue
        if isinstance(values, list):
            return f"{part} were {known[part]}, are {values}"
        names = [
            name for name in values.keys() | known[part].keys() if values.get(name) != known[part].get(name)
        ]
        return f"{len(names)} of {len(values)} {part} differ, {min(names)} among them"
    return "the record has other parts"


if __name__ == "__main__":
    sys.exit(main())
