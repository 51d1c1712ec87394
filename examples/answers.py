"""Letting the model answer held-out prompts, and scoring what it says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import evaluate
import torch
from datasets import Dataset
from prompts import Prompts
from transformers import PreTrainedModel

METRIC = Path(__file__).parent / "metrics" / "word_overlap"
MAX_ANSWER_TOKENS = 32


def answer(
    model: PreTrainedModel, prompts: Prompts, rows: Dataset, device: torch.device, batch_size: int = 12
) -> list[str]:
    """Answer the rows' prompts greedily, one line each; leaves the model in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        return [
            text for batch in _batches(rows, batch_size) for text in _answer(model, prompts, batch, device)
        ]
    finally:
        model.train(was_training)


def score(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Score answers with the metric module beside this file, between 0 and 1."""
    # `evaluate` copies a module to where it imports it from and writes its inputs to a cache; a directory of
    # our own keeps both out of the user's cache, and works where that is not writable.
    with tempfile.TemporaryDirectory(prefix="word-overlap-") as cache:
        evaluate.config.HF_MODULES_CACHE = Path(cache) / "modules"
        metric = evaluate.load(str(METRIC), cache_dir=cache, keep_in_memory=True)
        return metric.compute(predictions=predictions, references=references)


def _batches(rows: Dataset, size: int) -> Iterator[list[dict[str, str]]]:
    for start in range(0, len(rows), size):
        yield list(rows.select(range(start, min(start + size, len(rows)))))


@torch.no_grad()
def _answer(
    model: PreTrainedModel, prompts: Prompts, rows: list[dict[str, str]], device: torch.device
) -> list[str]:
    tokenizer = prompts.tokenizer
    cues = [prompts.question_tokens(row) for row in rows]
    width = max(map(len, cues))
    # Padded on the left, so that every answer begins right after its prompt.
    tokens = [[tokenizer.pad_token_id] * (width - len(cue)) + cue for cue in cues]
    mask = [[0] * (width - len(cue)) + [1] * len(cue) for cue in cues]
    output = model.generate(
        input_ids=torch.tensor(tokens, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=MAX_ANSWER_TOKENS,
        do_sample=False,
        # A model's own sampling settings have no meaning for greedy search, and would be warned about.
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]
