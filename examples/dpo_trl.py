"""Direct preference optimization with TRL: an ordinary DPOTrainer script, with SlideDPOTrainer in DPOTrainer's place.

    python examples/dpo_trl.py --model MODEL --dataset DATA.jsonl --bf16 --output-dir outputs/dpo
    python examples/dpo_trl.py ... --reference precomputed   # one pass over the data first, then no second model
    python examples/dpo_trl.py ... --lora-rank 16            # the reference is the base without its adapters

MODEL is a hub name or a directory. DATA is a hub name, a directory, or a .json, .jsonl, .csv or .parquet file with the
columns `prompt`, `chosen` and `rejected`, texts or conversations. Local paths need no network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig

from hf_slideformer import SlideDPOTrainer  # was: from trl import DPOTrainer

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says, and save the model, or its adapter, and the tokenizer."""
    options = parse(arguments)
    set_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    reference = None
    if options.reference == "streamed" and not options.lora_rank:
        reference = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    trainer = SlideDPOTrainer(
        model=model,
        ref_model=reference,
        args=training_arguments(options),
        train_dataset=load(options),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=adapter(options),
    )
    trainer.train(resume_from_checkpoint=options.resume_from_checkpoint)
    trainer.save_model()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="hub name or directory")
    add("--dataset", required=True, help="hub name, directory or file")
    add("--split", default="train", help="(default: %(default)s)")
    add("--max-length", type=int, default=1024, help="tokens of prompt and answer (default: %(default)s)")
    add("--beta", type=float, default=0.1, help="pull towards the reference (default: %(default)s)")
    add(
        "--reference",
        choices=("streamed", "precomputed"),
        default="streamed",
        help="a second model in RAM, or its log-probabilities, computed first (default: %(default)s)",
    )
    add("--lora-rank", type=int, default=0, help="train adapters of this rank (default: all weights)")
    add("--output-dir", default="outputs/dpo", help="(default: %(default)s)")
    add("--bf16", action="store_true", help="compute in bf16; masters stay fp32")
    add("--max-steps", type=int, default=-1, help="optimizer steps (default: one epoch)")
    add("--batch-size", type=int, default=1, help="pairs in a micro-batch (default: %(default)s)")
    add("--gradient-accumulation-steps", type=int, default=1, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=1e-6, help="its peak (default: %(default)s)")
    add("--max-grad-norm", type=float, default=1.0, help="0 turns clipping off (default: %(default)s)")
    add("--save-steps", type=int, default=0, help="steps between checkpoints (default: none are written)")
    add("--resume-from-checkpoint", help="a checkpoint's directory")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args(arguments)


def load(options: argparse.Namespace) -> Dataset:
    """Return the dataset as it is; TRL applies the chat template and tokenizes."""
    path = Path(options.dataset)
    if path.is_file():
        return load_dataset(READERS[path.suffix], data_files=str(path), split=options.split)
    return load_dataset(options.dataset, split=options.split)


def adapter(options: argparse.Namespace) -> LoraConfig | None:
    """Return adapters on all linear layers of the decoder, if they were asked for."""
    if not options.lora_rank:
        return None
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def training_arguments(options: argparse.Namespace) -> DPOConfig:
    """Ordinary training arguments; nothing in them is about streaming."""
    on_gpu = torch.cuda.is_available()
    return DPOConfig(
        output_dir=options.output_dir,
        max_length=options.max_length,
        beta=options.beta,
        precompute_ref_log_probs=options.reference == "precomputed",
        max_steps=options.max_steps,
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        max_grad_norm=options.max_grad_norm,
        bf16=options.bf16,
        logging_steps=1,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        seed=options.seed,
        report_to="none",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
    )


if __name__ == "__main__":
    main()
