"""Fine-tune a causal language model on text: an ordinary Trainer script, with SlideTrainer in Trainer's place.

    python examples/finetune_trainer.py --model MODEL --dataset DATA.jsonl --bf16 --output-dir outputs/mine

MODEL is a hub name or a directory. DATA is a hub name, a directory, or a .json, .jsonl, .csv, .parquet or .txt
file with a column of text. Local paths need no network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_slideformer import SlideTrainer  # was: from transformers import Trainer

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says, and save the model and its tokenizer."""
    options = parse(arguments)
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")

    trainer = SlideTrainer(
        model=model,
        args=training_arguments(options),
        train_dataset=load_tokens(options, tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
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
    add("--text-column", default="text", help="(default: %(default)s)")
    add("--max-length", type=int, default=1024, help="tokens in a row (default: %(default)s)")
    add("--output-dir", default="outputs/finetune", help="(default: %(default)s)")
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


def load_tokens(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the dataset's texts as tokens, cut to `max_length`."""
    path = Path(options.dataset)
    if path.is_file():
        texts = load_dataset(READERS[path.suffix], data_files=str(path), split=options.split)
    else:
        texts = load_dataset(options.dataset, split=options.split)

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return tokenizer(rows[options.text_column], truncation=True, max_length=options.max_length)

    return texts.map(tokenize, batched=True, remove_columns=texts.column_names)


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Ordinary training arguments; nothing in them is about streaming."""
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
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
