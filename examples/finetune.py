"""The demo's run from beginning to end, one function a part."""

from __future__ import annotations

import argparse
import os
import resource
import textwrap
import time
from pathlib import Path

import torch
from answers import answer, score
from corpus import Corpus, load_corpus
from datasets import Dataset
from failure import DemoError
from pretrained import default_model, load_pretrained
from prompts import Prompts, padding_collator
from report import Course, draw_loss, plain_placement, rows, section, size
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

HELD_OUT_ROWS = 96
SCORED_ROWS = 24
SHOWN_ROWS = 2
LINES = 12  # of the training table
# How far the held-out loss of the saved model, loaded back, may be from that of the trained one, relatively.
# In fp32 only the order of sums differs. In bf16 the saved weights are fp32 and get rounded on loading, and
# plain Trainer's autocast rounds at other places than a bf16 model does.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


def fine_tune(options: argparse.Namespace) -> None:
    """Load, judge, train, judge again, save, and load back."""
    prepare_output(options.output_dir)
    set_seed(options.seed)

    section("Model and data")
    source = options.model or default_model()
    print(f"Loading {Path(source).name} ...", flush=True)
    model, tokenizer = load_pretrained(source)
    corpus = load_corpus(options.dataset, options.seed, HELD_OUT_ROWS)
    prompts = Prompts(tokenizer, corpus.instruction, options.max_length)
    train, held_out = encode(corpus, prompts, options.max_steps * options.batch_size)
    precision, reason = choose_precision(options.cpu)
    arguments = training_arguments(options, precision)
    dtype = str(model.dtype).removeprefix("torch.")
    rows(
        {
            "model": f"{Path(source).name}, {model.num_parameters() / 1e6:,.1f} M parameters in {dtype}",
            "data": f"{corpus.name}: {len(train):,} of {len(corpus.train):,} rows to train on, "
            f"{len(held_out):,} held out",
            "training": f"{options.max_steps} steps of {options.batch_size} rows, learning rate "
            f"{options.learning_rate:g}, {options.trainer} trainer on {arguments.device}",
            "precision": f"{precision} ({reason})",
        }
    )
    trainer = build_trainer(options.trainer, model, arguments, train, held_out, prompts)
    course = Course(lambda: engine_totals(trainer))
    trainer.add_callback(course)

    section("What lives where")
    show_placement(trainer)

    section("Before training")
    asked = corpus.held_out.select(range(min(SCORED_ROWS, len(corpus.held_out))))
    questions = [prompts.question(row) for row in asked]
    references = [reference for _, reference in questions]
    loss_before = trainer.evaluate()["eval_loss"]
    answers_before = answer(trainer.model, prompts, asked, arguments.device)
    scores_before = score(answers_before, references)
    rows(judgement({"held-out loss": loss_before} | scores_before))

    section("Training")
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    print()
    rows(step_summary(course, seconds, options.max_steps) | peak_memory(arguments.device))

    section("After training")
    loss_after = course.loss_at(options.max_steps) or trainer.evaluate()["eval_loss"]
    answers_after = answer(trainer.model, prompts, asked, arguments.device)
    scores_after = score(answers_after, references)
    rows(
        judgement(
            {"held-out loss": loss_before} | scores_before, {"held-out loss": loss_after} | scores_after
        )
    )
    for question, before, after in list(zip(questions, answers_before, answers_after, strict=True))[
        :SHOWN_ROWS
    ]:
        print(f"\n{textwrap.indent(question[0], '    ')}")
        rows({"  before": before, "  after": after, "  wanted": question[1]})

    section("Saved")
    trainer.save_model(str(options.output_dir))
    picture = options.output_dir / "loss.png"
    draw_loss(course, picture, f"{Path(source).name}: {options.trainer} trainer, {precision}")
    loss_loaded = reloaded_loss(options.output_dir, held_out, prompts, options, precision)
    rows(
        {
            "model": f"{options.output_dir} (read back by plain from_pretrained)",
            "held-out loss": f"{loss_after:.4f} as trained, {loss_loaded:.4f} as loaded back",
            "picture": str(picture),
        }
    )
    if abs(loss_loaded - loss_after) > LOSS_TOLERANCE[precision] * abs(loss_after):
        raise DemoError(f"the saved model is not the trained one: its held-out loss is {loss_loaded:.6f}")


def prepare_output(directory: Path) -> None:
    """Create the output directory, and find out now rather than after training if it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot create the output directory {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise DemoError(f"the output directory {directory} is not writable")


def encode(corpus: Corpus, prompts: Prompts, train_rows: int) -> tuple[Dataset, Dataset]:
    """Tokenize both sides of the corpus; of the training side no more than will be used."""
    used = corpus.train.select(range(min(train_rows, len(corpus.train))))
    train, held_out = prompts.encode_all(used), prompts.encode_all(corpus.held_out)
    if not len(train) or not len(held_out):
        raise DemoError(
            f"no row of {corpus.name} leaves room for an answer in --max-length {prompts.max_length}"
        )
    return train, held_out


def on_gpu(cpu_only: bool) -> bool:
    """Whether there is a CUDA device, and it may be used."""
    return torch.cuda.is_available() and not cpu_only


def choose_precision(cpu_only: bool) -> tuple[str, str]:
    """Return "bf16" or "fp32", and why.

    On a GPU bf16. On a CPU whichever multiplies matrices faster: bf16 is fast with AMX or AVX512-BF16, and
    several times slower than fp32 without. Asking the processor beats keeping a list of its features.
    """
    if on_gpu(cpu_only):
        return (
            ("bf16", "the GPU has it") if torch.cuda.is_bf16_supported() else ("fp32", "this GPU has no bf16")
        )
    fp32_ms, bf16_ms = (matmul_ms(dtype) for dtype in (torch.float32, torch.bfloat16))
    timings = f"on this CPU a product of layer size takes {fp32_ms:.1f} ms in fp32, {bf16_ms:.1f} ms in bf16"
    # Products are not everything that bf16 changes, so it has to be clearly faster.
    return ("bf16" if bf16_ms < 0.75 * fp32_ms else "fp32"), timings


def matmul_ms(dtype: torch.dtype, repeats: int = 25) -> float:
    """Time one matrix product on the CPU, the best of some: other programs may be running."""
    left, right = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def training_arguments(options: argparse.Namespace, precision: str) -> TrainingArguments:
    """The demo's arguments: ordinary ones, the same for both trainers."""
    return TrainingArguments(
        output_dir=str(options.output_dir),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.max_steps // 10),
        weight_decay=0.01,
        bf16=precision == "bf16",
        use_cpu=not on_gpu(options.cpu),  # bf16 without a GPU has to be told that the CPU is meant
        seed=options.seed,
        logging_steps=max(1, options.max_steps // LINES),
        eval_strategy="steps",
        eval_steps=max(1, -(-options.max_steps // 3)),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu(options.cpu),
    )


def build_trainer(
    kind: str,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    train: Dataset,
    held_out: Dataset,
    prompts: Prompts,
) -> Trainer:
    """Make the trainer. The class is the only difference between SlideTrainer and transformers' own."""
    trainer_class = Trainer
    if kind == "slide":
        from hf_slideformer import SlideTrainer

        trainer_class = SlideTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=padding_collator(prompts.tokenizer),
        processing_class=prompts.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # The demo prints its own table.
    return trainer


def engine_totals(trainer: Trainer) -> dict[str, float]:
    """Return SlideFormer's counters so far; empty for plain Trainer."""
    return dict(trainer.slide.metrics) if hasattr(trainer, "slide") else {}


def show_placement(trainer: Trainer) -> None:
    """Print the plan: which state lives in GPU memory, in RAM, on disk."""
    if hasattr(trainer, "slide"):
        print(trainer.slide.plan, flush=True)
    else:
        rows(plain_placement(trainer.model, str(trainer.args.device)))


def judgement(before: dict[str, float], after: dict[str, float] | None = None) -> dict[str, str]:
    """Format the held-out figures, beside those of before if there are later ones."""
    if after is None:
        return {name: f"{value:.4f}" for name, value in before.items()}
    return {name: f"{value:.4f} -> {after[name]:.4f}" for name, value in before.items()}


def step_summary(course: Course, seconds: float, steps: int) -> dict[str, str]:
    """Say how long training took and, where the engine counts it, what an average step spent."""
    summary = {"time": f"{seconds:.0f} s for {steps} steps, held-out evaluations included"}
    per_step = {key: value / steps for key, value in course.spent.items()}
    waited = {word: per_step.get(f"wait_{word}_s", 0.0) for word in ("weights", "gradients")}
    if per_step:
        summary["a step waited"] = ", ".join(f"{value:.3f} s for {word}" for word, value in waited.items())
    if "update_s" in per_step:
        summary["a step's update"] = f"{per_step['update_s']:.3f} s on the CPU, beside the rest"
    if "h2d_bytes" in per_step:
        moved = (per_step["h2d_bytes"], per_step.get("d2h_bytes", 0.0))
        summary["a step moved"] = f"{size(moved[0])} to the device, {size(moved[1])} back"
    return summary


def peak_memory(device: torch.device) -> dict[str, str]:
    """Return this process's peaks."""
    peaks = f"{size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} of RAM"
    if device.type == "cuda":
        peaks += f", {size(torch.cuda.max_memory_allocated(device))} of GPU memory"
    return {"peak so far": peaks}


@torch.no_grad()
def reloaded_loss(
    directory: Path, held_out: Dataset, prompts: Prompts, options: argparse.Namespace, precision: str
) -> float:
    """Load the saved model as anybody would, and return its held-out loss, without any trainer."""
    dtype = torch.bfloat16 if precision == "bf16" else "auto"
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    wrong = {name: keys for name, keys in report.items() if keys}
    if wrong:
        raise DemoError(f"the saved model does not load cleanly: {wrong}")
    device = roomy_device(model, options.cpu)
    model.to(device).eval()
    collate = padding_collator(prompts.tokenizer)
    total = 0.0
    for start in range(0, len(held_out), options.batch_size):
        batch = [held_out[index] for index in range(start, min(start + options.batch_size, len(held_out)))]
        # Weighted as Trainer does: a batch's mean over its tokens, times its rows.
        total += model(**collate(batch).to(device)).loss.item() * len(batch)
    return total / len(held_out)


def roomy_device(model: PreTrainedModel, cpu_only: bool) -> torch.device:
    """Return the GPU if the whole model fits beside the trainer's, else the CPU."""
    if on_gpu(cpu_only):
        free_bytes, _ = torch.cuda.mem_get_info()
        if model.get_memory_footprint() < 0.5 * free_bytes:
            return torch.device("cuda")
    return torch.device("cpu")
