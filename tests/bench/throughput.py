#!/usr/bin/env python
"""How many tokens per second does full-parameter training of one model shape reach?

A model of the given shape with random weights trains on random tokens through the ordinary `Trainer.train()`,
once per batch size, and each run appends one JSON row (docs/benchmarks/README.md names its keys).

What is timed: the host's clock at the start of each optimizer step, that is at its first `training_step`. The
device is synchronised twice only, at the end of the warm-up and at the end of the measured steps, so that work
which a step leaves for the next one to hide stays hidden. Both ends lie at the same place of a step, hence one
more step runs after the last measured one. A callback would be the obvious place for the clock, but SlideTrainer
drains pending updates before callbacks that are not transformers' own, and would be timed without its overlap.

Examples:
    python tests/bench/throughput.py --shape llama-3.1-8b --batch-sizes 8 16 32 --liger --out rows.jsonl
    python tests/bench/throughput.py --shape llama-3.1-8b --layers 4 --baseline --max-grad-norm 0
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

SHAPES = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen2.5-3b": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "llama-2-13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "mistral-small-24b": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000000.0},
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "mistral-large-123b": {
        "model_type": "mistral",
        "hidden_size": 12288,
        "intermediate_size": 28672,
        "num_hidden_layers": 88,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", default="tiny", help=f"{', '.join(SHAPES)}, or a model's config.json")
    parser.add_argument("--layers", type=int, help="number of layers instead of the shape's own")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8], metavar="N", help="sequences each")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="0 turns clipping off")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps that are measured")
    parser.add_argument("--warmup", type=int, default=3, help="optimizer steps before them")
    parser.add_argument("--liger", action="store_true", help="use_liger_kernel=True")
    parser.add_argument("--deterministic", action="store_true", help="full_determinism=True")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--placement", choices=("stream", "auto"), default="stream", help="of SlideTrainer")
    which.add_argument(
        "--baseline", action="store_true", help="transformers' Trainer instead of SlideTrainer"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for --baseline only")
    parser.add_argument(
        "--slide", nargs="+", default=[], metavar="KEY=VALUE", help="more of SlideConfig: update=overlapped"
    )
    parser.add_argument("--gpu-cap", help="torch may take no more of the GPU than this: 24GiB")
    parser.add_argument(
        "--trace", type=Path, help="write a Chrome trace of two steps after the measured ones"
    )
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--commit", help="what the rows say where the checkout has no git")
    parser.add_argument("--isolate", action="store_true", help="one process per batch size")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")
    if args.shape not in SHAPES and not Path(args.shape).is_file():
        parser.error(f"--shape {args.shape}: neither one of {', '.join(SHAPES)} nor a file")
    if args.baseline and args.slide:
        parser.error("--slide configures SlideTrainer, which --baseline does not use")
    if args.gradient_checkpointing and not args.baseline:
        parser.error("--gradient-checkpointing is for --baseline: SlideTrainer decides for itself")
    if any("=" not in item for item in args.slide):
        parser.error("--slide takes KEY=VALUE")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure every batch size; return 1 if one of them ran out of memory."""
    args = parse_arguments(argv)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    if args.isolate and len(args.batch_sizes) > 1:
        return run_isolated(sys.argv[1:] if argv is None else argv, args.batch_sizes)
    failed = False
    for batch_size in args.batch_sizes:
        row = measure(args, batch_size)
        failed |= row["error"] is not None
        line = json.dumps(row)
        print(line, flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as rows:
                rows.write(line + "\n")
    return int(failed)


def run_isolated(argv: list[str], batch_sizes: list[int]) -> int:
    """Run this script once per batch size, each in a process of its own; return the worst exit status."""
    # The last --batch-sizes of a command line is the one that counts.
    command = [sys.executable, __file__, *argv, "--batch-sizes"]
    return max(subprocess.run([*command, str(batch_size)]).returncode for batch_size in batch_sizes)


def measure(args: argparse.Namespace, batch_size: int) -> dict:
    """Train one fresh model at one batch size and return its row; running out of memory is a row as well."""
    import torch
    from measuring import RamPeak, describe_machine

    error, result = None, {}
    with RamPeak() as ram, tempfile.TemporaryDirectory() as output_dir:
        try:
            result = train(args, batch_size, output_dir)
        except torch.OutOfMemoryError as oom:
            error = f"out of GPU memory: {str(oom).splitlines()[0]}"
    row = describe_machine()  # first, while the GPU and its link are still awake
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if args.commit:
        row["commit"] = args.commit
    row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    row["config"] = row_config(args, batch_size)
    row["warmup_steps"], row["measured_steps"] = args.warmup, args.steps
    row |= dict.fromkeys(RESULT_KEYS) | result
    row["ram_peak_rss_bytes"] = ram.rss_peak_bytes
    row["ram_available_drop_bytes"] = ram.available_drop_bytes
    row["error"] = error
    return row


RESULT_KEYS = (
    "params",
    "step_s",
    "step_s_p20",
    "step_s_p50",
    "step_s_p80",
    "step_s_mean",
    "tokens_per_step",
    "tokens_per_s",
    "tokens_per_s_mean",
    "train_loss",
    "gpu_peak_allocated_bytes",
    "gpu_peak_reserved_bytes",
    "bytes_moved",
    "host_bytes",
    "disk_bytes",
    "host_state_bytes_per_param",
    "slide_metrics",
    "plan",
)


def row_config(args: argparse.Namespace, batch_size: int) -> dict:
    """Return what was asked for, without what does not bear on the result."""
    left_out = ("batch_sizes", "out", "commit", "isolate", "trace")
    config = {key: value for key, value in vars(args).items() if key not in left_out}
    config["placement"] = None if args.baseline else args.placement
    return config | {"batch_size": batch_size, "dtype": "bf16"}


def train(args: argparse.Namespace, batch_size: int, output_dir: str) -> dict:
    """Build model and trainer, train, and return the measured half of the row."""
    import torch
    from transformers import TrainingArguments, default_data_collator, set_seed

    on_gpu = torch.cuda.is_available()
    clock = StepClock(args.warmup, args.steps, trace_steps=2 if args.trace else 0)
    set_seed(args.seed)
    config = build_config(args)
    model = build_model(config, on_gpu)
    params = sum(parameter.numel() for parameter in model.parameters())
    if args.gpu_cap:  # from here on: the weights may have been made on the GPU, and are about to leave it
        cap_gpu_memory(args.gpu_cap)
    trainer = trainer_class(args, clock)(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=clock.total_steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=args.accumulation,
            max_grad_norm=args.max_grad_norm,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            bf16=True,
            use_cpu=not on_gpu,
            use_liger_kernel=args.liger,
            full_determinism=args.deterministic,
            seed=args.seed,
            dataloader_pin_memory=on_gpu,
            # One log at the end: each one reads the loss on the host.
            logging_strategy="steps",
            logging_steps=clock.total_steps,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            **({"gradient_checkpointing": True} if args.gradient_checkpointing else {}),
        ),
        train_dataset=random_tokens(
            clock.total_steps * args.accumulation * batch_size, args.seq_len, config.vocab_size, args.seed
        ),
        data_collator=default_data_collator,
        **slide_arguments(args),
    )
    clock.read_metrics = lambda: slide_metrics(trainer)
    del model  # the trainer's is the one that counts, wherever its tensors live now
    try:
        output = trainer.train()
    finally:
        clock.stop_trace(args.trace, batch_size)
    tokens_per_step = batch_size * args.seq_len * args.accumulation
    seconds = clock.summary()
    per_step = clock.metrics_per_step()
    return {
        "params": params,
        **seconds,
        "tokens_per_step": tokens_per_step,
        "tokens_per_s": tokens_per_step / seconds["step_s_p50"],
        "tokens_per_s_mean": tokens_per_step / seconds["step_s_mean"],
        "train_loss": output.training_loss,
        "gpu_peak_allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "gpu_peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "bytes_moved": {key: n for key, n in per_step.items() if key.endswith("_bytes")} or None,
        "slide_metrics": per_step or None,
        **slide_plan(trainer),
    }


def cap_gpu_memory(size: str) -> None:
    """Make torch's allocator fail beyond `size`, as a smaller GPU would."""
    import torch

    from hf_slideformer.config import parse_bytes

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(size) / total))


def build_config(args: argparse.Namespace):
    """Return the transformers config of the shape."""
    from transformers import AutoConfig

    shape = dict(SHAPES[args.shape]) if args.shape in SHAPES else json.loads(Path(args.shape).read_text())
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    if args.layers:
        config.num_hidden_layers = args.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: args.layers]
    config.use_cache = False
    if config.max_position_embeddings < args.seq_len:
        raise SystemExit(f"--seq-len {args.seq_len}: {args.shape} ends at {config.max_position_embeddings}")
    return config


def build_model(config, on_gpu: bool):
    """Return the model with random bf16 weights, made on the GPU if they take under 75 % of what is free there.

    Random numbers for 8B parameters take a second on a GPU and minutes on a CPU.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cpu"
    if on_gpu:
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        weight_bytes = 2 * sum(parameter.numel() for parameter in weights.parameters())
        device = "cuda" if weight_bytes < 0.75 * torch.cuda.mem_get_info()[0] else "cpu"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def random_tokens(sequences: int, seq_len: int, vocab_size: int, seed: int):
    """Return a map-style dataset whose item i depends on the seed and i only."""
    import torch

    class RandomTokens(torch.utils.data.Dataset):
        def __len__(self):
            return sequences

        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            tokens = torch.randint(vocab_size, (seq_len,), generator=generator)
            return {"input_ids": tokens, "labels": tokens}

    return RandomTokens()


def trainer_class(args: argparse.Namespace, clock: "StepClock") -> type:
    """Return Trainer or SlideTrainer with the clock at the start of every optimizer step."""
    if args.baseline:
        from transformers import Trainer as Base
    else:
        from hf_slideformer import SlideTrainer as Base

    class TimedTrainer(Base):
        micro_batches = 0

        def training_step(self, *step_args, **step_kwargs):
            if self.micro_batches % args.accumulation == 0:
                clock.start_step()
            self.micro_batches += 1
            return super().training_step(*step_args, **step_kwargs)

    return TimedTrainer


def slide_arguments(args: argparse.Namespace) -> dict:
    """Return SlideTrainer's own arguments."""
    if args.baseline:
        return {}
    from hf_slideformer import SlideConfig

    more = {}
    for key, value in (item.split("=", 1) for item in args.slide):
        try:
            more[key] = json.loads(value)
        except json.JSONDecodeError:
            more[key] = value
    return {"slide_config": SlideConfig(**{"placement": args.placement} | more)}


class StepClock:
    """Times optimizer steps `warmup` to `warmup + steps`, and traces the `trace_steps` after them."""

    def __init__(self, warmup: int, steps: int, trace_steps: int):
        """Say how many steps to skip, to time and to trace."""
        self.first, self.last = warmup, warmup + steps
        # The last measured step ends where the next one starts.
        self.total_steps = self.last + max(1, trace_steps)
        self.trace_steps = trace_steps
        self.step = 0
        self.starts_s: list[float] = []
        self.read_metrics: Callable[[], dict[str, float]] = dict
        self.snapshots: list[dict[str, float]] = []
        self.profiler = None

    def start_step(self):
        """Note the time; at both ends of what is measured, wait for the device first."""
        import torch

        if self.step == 0 and torch.cuda.is_available():
            # Peaks are those of training: the weights were made on the GPU and have gone where they belong.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if self.step in (self.first, self.last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.snapshots.append(self.read_metrics())
        if self.first <= self.step <= self.last:
            self.starts_s.append(time.perf_counter())
        if self.step == self.last and self.trace_steps:
            self.profiler = torch.profiler.profile()  # every activity that this machine supports
            self.profiler.start()
        self.step += 1

    def stop_trace(self, path: Path | None, batch_size: int):
        """End the trace, if there is one, and write it with the batch size in its name."""
        if self.profiler is not None:
            self.profiler.stop()
            path.parent.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(path.with_stem(f"{path.stem}-b{batch_size}")))
            self.profiler = None

    def metrics_per_step(self) -> dict[str, float]:
        """Return by how much each total grew in a measured step, on average."""
        before, after = self.snapshots
        return {key: (after[key] - before.get(key, 0)) / (self.last - self.first) for key in after}

    def summary(self) -> dict[str, float]:
        """Return every measured step, their quantiles, and the mean between the two synchronisations, in seconds."""
        import numpy as np

        seconds = np.diff(self.starts_s)
        p20, p50, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
        return {
            "step_s": seconds.tolist(),
            "step_s_p20": p20,
            "step_s_p50": p50,
            "step_s_p80": p80,
            "step_s_mean": float(seconds.mean()),
        }


def slide_metrics(trainer) -> dict[str, float]:
    """Return the running totals that SlideTrainer keeps; {} for Trainer."""
    return dict(trainer.slide.metrics) if hasattr(trainer, "slide") else {}


def slide_plan(trainer) -> dict:
    """Return what lived where, and the measured bytes of host buffers per parameter that has its state there."""
    if not hasattr(trainer, "slide"):
        return {}
    plan, engine = trainer.slide.plan, trainer.slide.engine
    return {
        "plan": plan.as_dict(),
        "host_bytes": engine.host_bytes,
        "disk_bytes": engine.disk_bytes,
        "host_state_bytes_per_param": engine.host_state_bytes / plan.host_params
        if plan.host_params
        else None,
    }


if __name__ == "__main__":
    sys.exit(main())
