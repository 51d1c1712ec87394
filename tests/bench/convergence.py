"""Does training with 8-bit moments go the way of training with fp32 moments?

Fine-tunes the demo's model (SmolLM2-135M-Instruct) on the demo's data once for each learning rate, seed and format of
the moments, everything else the same, and writes one JSON row for each run: training and held-out loss by step.
With --scratch a small byte-level llama learns the Python standard library's source text instead, from random weights,
which takes more steps and larger updates than fine-tuning.

    python tests/bench/convergence.py --steps 600 --learning-rates 2e-5 2e-4 --seeds 0 1 --out rows.jsonl
    python tests/bench/convergence.py --scratch --steps 3000 --learning-rates 1e-3 --out rows.jsonl
    python tests/bench/convergence.py --plot rows.jsonl --out picture.svg
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(REPOSITORY / "examples")]

EVALUATIONS = 12
STATES = ("fp32", "8bit")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="hub name, directory or .gguf file (default: the demo's)")
    add("--scratch", action="store_true", help="a small llama from random weights, on bytes")
    add("--dataset", help="as in the demo (default: the standard library's docstrings)")
    add("--steps", type=int, default=600)
    add("--batch-size", type=int, default=16)
    add("--max-length", type=int, default=128)
    add("--held-out", type=int, default=512, help="rows")
    add("--learning-rates", type=float, nargs="+", default=[2e-5, 2e-4])
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--states", nargs="+", choices=STATES, default=list(STATES))
    add("--commit", help="what the rows say the code was")
    add("--plot", type=Path, nargs="+", help="draw rows instead of training")
    add("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.plot:
        draw(
            [json.loads(line) for path in options.plot for line in path.read_text().splitlines()], options.out
        )
        return
    for learning_rate, seed, states in itertools.product(
        options.learning_rates, options.seeds, options.states
    ):
        row = run(options, learning_rate, seed, states)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key != "curve"}), flush=True)


def prepare_pretrained(options: argparse.Namespace, seed: int) -> tuple:
    """The demo's model and data: (name of the model, of the data, model, train, held out, collator)."""
    from corpus import load_corpus
    from pretrained import default_model, load_pretrained
    from prompts import Prompts, padding_collator

    source = options.model or default_model()
    model, tokenizer = load_pretrained(source)
    corpus = load_corpus(options.dataset, seed, options.held_out)
    prompts = Prompts(tokenizer, corpus.instruction, options.max_length)
    train, held_out = prompts.encode_all(corpus.train), prompts.encode_all(corpus.held_out)
    return Path(source).name, corpus.name, model, train, held_out, padding_collator(tokenizer)


def prepare_scratch(options: argparse.Namespace, seed: int) -> tuple:
    """A llama of 1.3 M parameters, and source text in rows of bytes; every 20th file is held out."""
    import sysconfig

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=options.max_length,
        tie_word_embeddings=True,
    )
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sides = []
    for is_held_out in (False, True):
        chosen = [path for index, path in enumerate(files) if (index % 20 == 0) == is_held_out]
        text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in chosen)), dtype=torch.uint8)
        rows = (
            text[: len(text) // options.max_length * options.max_length].view(-1, options.max_length).long()
        )
        sides.append([{"input_ids": row, "labels": row} for row in rows])
    generator = torch.Generator().manual_seed(seed)
    held_out = [sides[1][i] for i in torch.randperm(len(sides[1]), generator=generator)[: options.held_out]]
    return (
        "byte-level llama from random weights",
        "Python's standard library, source text",
        LlamaForCausalLM(config),
        sides[0],
        held_out,
        default_data_collator,
    )


def run(options: argparse.Namespace, learning_rate: float, seed: int, states: str) -> dict[str, Any]:
    """Train once; returns the row."""
    import torch
    from transformers import PrinterCallback, TrainingArguments, set_seed

    from hf_slideformer import SlideTrainer

    set_seed(seed)
    prepare = prepare_scratch if options.scratch else prepare_pretrained
    model_name, data_name, model, train, held_out, collator = prepare(options, seed)
    every = max(1, options.steps // EVALUATIONS)
    with tempfile.TemporaryDirectory() as directory:
        trainer = SlideTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=directory,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, options.steps // 20),
                weight_decay=0.01,
                bf16=torch.cuda.is_available(),
                logging_steps=every,
                eval_strategy="steps",
                eval_steps=every,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collator,
            slide_config={"optimizer_states": states},
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    history = trainer.state.log_history
    trained = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    judged = {entry["step"]: entry["eval_loss"] for entry in history if entry.get("eval_loss") is not None}
    judged[0] = before
    curve = [
        {"step": step, "train_loss": trained.get(step), "held_out_loss": judged.get(step)}
        for step in sorted({*trained, *judged})
    ]
    return {
        "model": model_name,
        "parameters": sum(param.numel() for param in model.parameters()),
        "data": data_name,
        "train_rows": len(train),
        "held_out_rows": len(held_out),
        "optimizer_states": states,
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "bf16": torch.cuda.is_available(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "commit": options.commit,
        "held_out_loss_before": before,
        "held_out_loss": judged[options.steps],
        "best_held_out_loss": min(judged.values()),
        "host_bytes_per_param": round(
            trainer.slide.engine.host_state_bytes / trainer.slide.plan.host_params, 2
        ),
        "train_seconds": round(seconds, 1),
        "curve": curve,
    }


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Held-out loss by step, one panel for each model and learning rate, one line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(row["model"], row["learning_rate"]) for row in rows}, key=lambda panel: panel[1])
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
    styles = {
        "fp32": {"color": "tab:blue", "linestyle": "-"},
        "8bit": {"color": "tab:orange", "linestyle": "--"},
    }
    for axis, (model, rate) in zip(axes[0], panels, strict=True):
        labelled = set()
        for row in (row for row in rows if (row["model"], row["learning_rate"]) == (model, rate)):
            points = [(p["step"], p["held_out_loss"]) for p in row["curve"] if p["held_out_loss"] is not None]
            states = row["optimizer_states"]
            label = None if states in labelled else f"{states} moments"
            labelled.add(states)
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.4, alpha=0.85, **styles[states])
        axis.set_title(f"{model}, learning rate {rate:g}", fontsize=9)
        axis.set(xlabel="step", ylabel="held-out loss")
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
