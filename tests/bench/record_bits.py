#!/usr/bin/env python
"""Does a change of the code change any bit of training? Records a fixed list of runs, or compares with a record.

Each run trains a tiny random model on seeded tokens through public names (and the planner's data), so the script runs
on both sides of a rewrite of the engine: losses, gradient norms, and a checksum of every weight and of all optimizer
state. Where state lives is decided here for some runs, in the planner's place. Resumed runs can begin with checkpoints
that the other side has written.

Examples:
    python tests/bench/record_bits.py --out before.json --checkpoints before
    python tests/bench/record_bits.py --against before.json
    python tests/bench/record_bits.py --against before.json --checkpoints before
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use

import torch
import transformers
from transformers import TrainingArguments

from hf_slideformer import SlideTrainer
from hf_slideformer.planner.plan import describe
from hf_slideformer.planner.workload import Decisions

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

# Of real sizes, for a GPU: layers of Llama-3.1-8B, and all of Qwen2.5-0.5B.
_LLAMA_8B = {
    "vocab_size": 4096,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MODELS |= {
    "8B slice": ("LlamaConfig", "LlamaForCausalLM", _LLAMA_8B),
    "0.5B": ("Qwen2Config", "Qwen2ForCausalLM", _QWEN),
}

_DISK = {"slide": {"nvme_dir": "{dir}"}}
_ON_DISK = {"on_disk": (1, 2, 3), "disk_buffers": 2}
_WHOLE_ON_DISK = _ON_DISK | {"weights_on_disk": (2, 3)}
_MIXED = {
    "resident": (0,),
    "outside_state": "RAM",
    "activations": ("keep", "offload", "recompute", "keep"),
    "on_disk": (2, 3),
    "weights_on_disk": (3,),
    "disk_buffers": 1,
}
_ACCUMULATE = {"gradient_accumulation_steps": 3}
_UNCLIPPED = {"max_grad_norm": 0.0}

# Of each run: settings of SlideConfig, what the plan is to decide (`place`, otherwise the planner's own), and what else
# differs from a bf16 run of a llama that came in as fp32, clipped. "{dir}" is a new directory.
RUNS: dict[str, dict[str, Any]] = {
    "streamed": {},
    "fp32": {"bf16": False},
    "from bf16": {"dtype": "bfloat16"},
    "offloaded": {"slide": {"activations": "offload"}},
    "kept": {"slide": {"activations": "keep"}},
    "a large GPU": {"slide": {"gpu_memory": "1GiB"}},
    "accumulation": {"args": _ACCUMULATE},
    "accumulation in fp32": {"bf16": False, "args": _ACCUMULATE},
    "overlapped": {"args": _UNCLIPPED},
    "deferred, unclipped": {"slide": {"update": "deferred"}, "args": _UNCLIPPED},
    "8-bit": {"slide": {"optimizer_states": "8bit"}},
    "resident": {"place": {"resident": (0, 1, 2, 3)}},
    "half resident, accumulation": {"place": {"resident": (0, 1)}, "args": _ACCUMULATE},
    "half resident, overlapped": {"place": {"resident": (0, 1)}, "args": _UNCLIPPED},
    "half resident, 8-bit": {"place": {"resident": (0, 1)}, "slide": {"optimizer_states": "8bit"}},
    "outside in RAM": {"place": {"outside_state": "RAM"}},
    "outside in RAM, accumulation": {"place": {"outside_state": "RAM"}, "args": _ACCUMULATE},
    "outside in RAM, overlapped": {"place": {"outside_state": "RAM"}, "args": _UNCLIPPED},
    "disk": _DISK | {"place": _ON_DISK},
    "disk, fp32": _DISK | {"place": _ON_DISK, "bf16": False},
    "disk, accumulation": _DISK | {"place": _ON_DISK, "args": _ACCUMULATE},
    "disk, overlapped": _DISK | {"place": _ON_DISK, "args": _UNCLIPPED},
    "disk, 8-bit": {"place": _ON_DISK, "slide": {"nvme_dir": "{dir}", "optimizer_states": "8bit"}},
    "weights on disk": _DISK | {"place": _WHOLE_ON_DISK | {"activations": ("offload",) * 4}},
    "weights on disk, accumulation": _DISK | {"place": _WHOLE_ON_DISK, "args": _ACCUMULATE},
    "weights on disk, overlapped": _DISK | {"place": _WHOLE_ON_DISK, "args": _UNCLIPPED},
    "everywhere": _DISK | {"place": _MIXED},
    "everywhere, accumulation": _DISK | {"place": _MIXED, "args": _ACCUMULATE},
    "everywhere, overlapped": _DISK | {"place": _MIXED, "args": _UNCLIPPED},
    "LoRA": {"lora": True},
    "LoRA everywhere": _DISK | {"lora": True, "place": _MIXED},
    "mixture of experts": {"model": "mixtral"},
    "mixture of experts everywhere": _DISK | {"model": "mixtral", "place": _MIXED},
    "encoder-decoder": {"model": "t5"},
    "encoder-decoder, fp32": {"model": "t5", "bf16": False},
    "encoder-decoder everywhere": _DISK | {"model": "t5", "place": _MIXED},
    "resumed": {"resume": True},
    "resumed, 8-bit": {"resume": True, "slide": {"optimizer_states": "8bit"}},
    "resumed, LoRA": {"resume": True, "lora": True},
    "resumed, mixture of experts": {"resume": True, "model": "mixtral"},
    "resumed everywhere": _DISK | {"resume": True, "place": _MIXED},
    "resumed everywhere, saved beside training": {
        "resume": True,
        "place": _MIXED,
        "slide": {"nvme_dir": "{dir}", "saving": "overlapped"},
    },
}
_UNSAVED = {"save_strategy": "no"}
LARGE: dict[str, dict[str, Any]] = {
    "8B slice": {"model": "8B slice", "dtype": "bfloat16", "tokens": 512, "args": _UNSAVED},
    "8B slice, half resident": {
        "model": "8B slice",
        "dtype": "bfloat16",
        "tokens": 512,
        "args": _UNSAVED,
        "place": {"resident": (0,), "activations": ("keep", "offload", "recompute"), "outside_state": "RAM"},
    },
    "8B slice, overlapped": {
        "model": "8B slice",
        "dtype": "bfloat16",
        "tokens": 512,
        "args": _UNSAVED | _UNCLIPPED,
    },
    "0.5B": {"model": "0.5B", "tokens": 256, "args": _UNSAVED},
    "0.5B, accumulation": {"model": "0.5B", "tokens": 256, "args": _UNSAVED | _ACCUMULATE},
}
STEPS = 4


def main(argv: list[str] | None = None) -> int:
    """Record or compare; return 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here")
    parser.add_argument("--against", type=Path, help="compare with this record")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="instead of all")
    parser.add_argument("--large", action="store_true", help="models of real sizes instead, for a GPU")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="resume from what is here; written if there is none"
    )
    arguments = parser.parse_args(argv)
    torch.use_deterministic_algorithms(True)
    known_runs = LARGE if arguments.large else RUNS
    names = arguments.runs or list(known_runs)
    found = {
        name: record(**known_runs[name], saved=_place_of(arguments.checkpoints, name, known_runs[name]))
        for name in names
    }
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


def _place_of(directory: Path | None, name: str, run: dict[str, Any]) -> Path | None:
    kept = directory is not None and run.get("resume")
    return directory / name.replace(" ", "-").replace(",", "") if directory and kept else None


def record(
    *,
    model: str = "llama",
    dtype: str = "float32",
    bf16: bool = True,
    slide: dict[str, Any] | None = None,
    args: dict[str, Any] | None = None,
    lora: bool = False,
    resume: bool = False,
    place: dict[str, Any] | None = None,
    tokens: int = 12,
    saved: Path | None = None,
) -> dict[str, Any]:
    """Losses, norms and checksums of one run; see `RUNS`. `saved` has its first half's checkpoint, or will have it."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        if place is not None:
            solve = functools.partial(_decided, place)
            stack.enter_context(mock.patch("hf_slideformer.engine.planning.solve", solve))
        settings = {key: directory if value == "{dir}" else value for key, value in (slide or {}).items()}
        common = {
            "output_dir": directory,
            "bf16": bf16,
            "slide": settings,
            "args": args or {},
            "tokens": tokens,
        }
        trainer = _trainer(_model(model, dtype, lora), **common, steps=STEPS)
        if resume and (saved is None or not saved.exists()):
            trainer = _trainer(_model(model, dtype, lora), **common, steps=STEPS // 2)
            trainer.train()
            if saved is not None:
                shutil.copytree(Path(directory, f"checkpoint-{STEPS // 2}"), saved)
            trainer = _trainer(_model(model, dtype, lora), **common, steps=STEPS)
        elif saved is not None:
            shutil.copytree(saved, Path(directory, f"checkpoint-{STEPS // 2}"))
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


def _decided(
    place: dict[str, Any], workload: Any, _hardware: Any, budgets: Any, *, notes: Any, **_: Any
) -> Any:
    """Stands in for the planner."""
    units = len(workload.layouts)
    known = {
        "resident": (),
        "activations": ("recompute",) * units,
        "slots": 2,
        "staging_buffers": workload.staging_buffers(
            units - len(place.get("resident", ())), to_disk=bool(place.get("weights_on_disk"))
        ),
    }
    return describe(workload, Decisions(**known | place), budgets=budgets, notes=notes)


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
    model: torch.nn.Module,
    *,
    output_dir: str,
    bf16: bool,
    slide: dict,
    args: dict,
    steps: int,
    tokens: int = 12,
) -> SlideTrainer:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(4, 96, (48, tokens), generator=generator).tolist()
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
