"""Supervised fine-tuning with TRL: an ordinary SFTTrainer script, with SlideSFTTrainer in SFTTrainer's place.

    python examples/sft_trl.py --model MODEL --dataset DATA.jsonl --bf16 --output-dir outputs/sft
    python examples/sft_trl.py ... --lora-rank 16          # adapters over a streamed base
    python examples/sft_trl.py ... --packing               # wants an attention that knows packed rows

MODEL is a hub name or a directory. DATA is a hub name, a directory, or a .json, .jsonl, .csv or .parquet file, with
the columns that TRL knows: `text`, `messages`, or `prompt` and `completion`. Local paths need no network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig

from hf_slideformer import SlideSFTTrainer  # was: from trl import SFTTrainer

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says, and save the model, or its adapter, and the tokenizer."""
    options = parse(arguments)
    set_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    trainer = SlideSFTTrainer(
        model=model,
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
    add("--max-length", type=int, default=1024, help="tokens in a row (default: %(default)s)")
    add("--packing", action="store_true", help="fill rows with several samples")
    add("--lora-rank", type=int, default=0, help="train adapters of this rank (default: all weights)")
    add("--output-dir", default="outputs/sft", help="(default: %(default)s)")
    add("--bf16", action="store_true", help="compute in bf16; masters stay fp32")
    add("--max-steps", type=int, default=-1, help="optimizer steps (default: one epoch)")
    add("--batch-size", type=int, default=1, help="rows in a micro-batch (default: %(default)s)")
    add("--gradient-accumulation-steps", type=int, default=1, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=1e-5, help="its peak (default: %(default)s)")
    add("--max-grad-norm", type=float, default=1.0, help="0 turns clipping off (default: %(default)s)")
    add("--save-steps", type=int, default=0, help="steps between checkpoints (default: none are written)")
    add("--resume-from-checkpoint", help="a checkpoint's directory")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args(arguments)


def load(options: argparse.Namespace) -> Dataset:
    """Return the dataset as it is; TRL applies the chat template, tokenizes and packs."""
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


def training_arguments(options: argparse.Namespace) -> SFTConfig:
    """Ordinary training arguments; nothing in them is about streaming."""
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=options.output_dir,
        max_length=options.max_length,
        packing=options.packing,
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
