"""Fine-tune a causal language model on text with a training loop of one's own: a plain Accelerate script.

    slideformer config --config_file slideformer.yaml
    accelerate launch --config_file slideformer.yaml examples/finetune_accelerate.py \
        --model MODEL --dataset DATA.jsonl --output-dir outputs/mine

Nothing in it is about streaming: the configuration is, and `accelerate launch` without one trains it as ever. MODEL is
a hub name or a directory. DATA is a hub name, a directory, or a .json, .jsonl, .csv, .parquet or .txt file with a
column of text. Local paths need no network. Precision is the launcher's (--mixed_precision).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def main(arguments: list[str] | None = None) -> list[float]:
    """Train as the command line says; save the model and its tokenizer. Return the loss of every step."""
    options = parse(arguments)
    accelerator = Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        # Shuffles by seed and epoch alone, so that a resumed run goes on with the same batches.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    train_rows, eval_rows = split(load_tokens(options, tokenizer), options.eval_rows)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    train_loader = DataLoader(train_rows, batch_size=options.batch_size, shuffle=True, collate_fn=collate)
    eval_loader = DataLoader(eval_rows, batch_size=options.batch_size, collate_fn=collate)

    optimizer = torch.optim.AdamW(weight_decay_groups(model), lr=options.learning_rate)
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, options.warmup_steps, options.max_steps * accelerator.num_processes
    )
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if options.resume_from is not None:
        accelerator.load_state(options.resume_from)

    losses: list[float] = []
    model.train()
    while progress.step < options.max_steps:
        train_loader.set_epoch(progress.epoch)
        for batch in accelerator.skip_first_batches(train_loader, progress.batch):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            progress.batch += 1
            progress.loss += loss.item()
            progress.micro_batches += 1
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            losses.append(progress.loss / progress.micro_batches)
            progress.loss, progress.micro_batches = 0.0, 0
            accelerator.print(
                f"step {progress.step}: loss {losses[-1]:.6f}, gradient norm {float(norm):.4f}, "
                f"learning rate {scheduler.get_last_lr()[0]:.3e}",
                flush=True,
            )
            if options.eval_steps and progress.step % options.eval_steps == 0:
                accelerator.print(
                    f"step {progress.step}: held-out loss {evaluate(accelerator, model, eval_loader):.6f}"
                )
            if options.save_steps and progress.step % options.save_steps == 0:
                accelerator.save_state(str(Path(options.output_dir) / f"state-{progress.step}"))
            if progress.step == options.max_steps:
                break
        else:
            progress.epoch, progress.batch = progress.epoch + 1, 0

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        options.output_dir,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(options.output_dir)
    accelerator.end_training()
    return losses


class Progress:
    """Where training is; `save_state` keeps it and `load_state` brings it back.

    Attributes:
        step: optimizer steps so far.
        epoch: of the data.
        batch: micro-batches of this epoch so far.
        loss: sum over the `micro_batches` since the last step.
    """

    def __init__(self) -> None:
        """Start at the beginning."""
        self.step = self.epoch = self.batch = self.micro_batches = 0
        self.loss = 0.0

    def state_dict(self) -> dict[str, float]:
        """Return everything."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take everything back."""
        vars(self).update(state)


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
    add("--max-steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    add("--warmup-steps", type=int, default=0, help="(default: %(default)s)")
    add("--batch-size", type=int, default=1, help="rows in a micro-batch (default: %(default)s)")
    add("--gradient-accumulation-steps", type=int, default=1, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=1e-5, help="its peak (default: %(default)s)")
    add("--max-grad-norm", type=float, default=1.0, help="(default: %(default)s)")
    add("--eval-rows", type=int, default=8, help="rows held out of training (default: %(default)s)")
    add("--eval-steps", type=int, default=0, help="steps between evaluations (default: none)")
    add("--save-steps", type=int, default=0, help="steps between saved states (default: none)")
    add("--resume-from", help="a saved state's directory")
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


def split(rows: Dataset, held_out: int) -> tuple[Dataset, Dataset]:
    """Return the rows to train on and the last `held_out` rows."""
    if held_out >= len(rows):
        raise SystemExit(f"the dataset has {len(rows)} rows, and --eval-rows holds {held_out} out")
    return rows.select(range(len(rows) - held_out)), rows.select(range(len(rows) - held_out, len(rows)))


def weight_decay_groups(model: torch.nn.Module) -> list[dict]:
    """Matrices decay, norms and biases do not."""
    matrices = [param for param in model.parameters() if param.dim() > 1]
    others = [param for param in model.parameters() if param.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    """Return the mean loss over the held-out batches."""
    model.eval()
    losses = [accelerator.gather_for_metrics(model(**batch).loss.reshape(1)) for batch in loader]
    model.train()
    return torch.cat(losses).mean().item()


if __name__ == "__main__":
    main()
