"""The shape of micro-batches, found from the data before training: what the plan of activations counts on."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Used where nothing is known of the data.
DEFAULT_SEQ_LEN = 4096
_SAMPLES = 256
_MAX_SECONDS = 2.0
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Sequences of a micro-batch, tokens of the longest one, and a sentence on where the latter is from."""

    batch_size: int
    seq_len: int
    source: str


def find_batch_shape(
    dataset: Any, *, batch_size: int, seq_len: int | None, max_positions: int | None
) -> BatchShape:
    """The shape that training will have.

    Args:
        dataset: what the data loader reads; samples with `input_ids` tell their length.
        batch_size: sequences of a micro-batch.
        seq_len: tokens of the longest sequence, if the user says it.
        max_positions: what the model can take, if it says so.
    """
    if seq_len is not None:
        return BatchShape(batch_size, seq_len, f"sequences of up to {seq_len:,} tokens, as seq_len says")
    found = _longest(dataset)
    if found is not None:
        longest, seen, total = found
        return BatchShape(
            batch_size, longest, f"sequences of up to {longest:,} tokens, from {seen:,} of {total:,} samples"
        )
    assumed = min(DEFAULT_SEQ_LEN, max_positions or DEFAULT_SEQ_LEN)
    return BatchShape(
        batch_size,
        assumed,
        f"the data does not tell its lengths, so sequences of {assumed:,} tokens are assumed; set "
        "SlideConfig(seq_len=...)",
    )


def max_positions(config: Any) -> int | None:
    """Tokens that a sequence may have, where a model's configuration says it; None stands for no configuration."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _longest(dataset: Any) -> tuple[int, int, int] | None:
    """Longest `input_ids`, samples looked at, and samples there are; None if they cannot be looked at."""
    try:
        total = len(dataset)
        get = dataset.__getitem__
    except (AttributeError, TypeError):  # an iterable dataset would lose what is taken from it
        return None
    if any(isinstance(value, _GENERATORS) for value in getattr(dataset, "__dict__", {}).values()):
        return None  # reading samples would advance its own random state, and training would see other data
    longest, seen, start = 0, 0, time.monotonic()
    with _random_state_kept():
        for index in _spread(total):
            if seen and time.monotonic() - start > _MAX_SECONDS:
                break
            try:
                sample = get(index)
            except Exception:  # noqa: BLE001 - it will raise again where training reads it
                return None
            tokens = _tokens(sample.get("input_ids")) if isinstance(sample, Mapping) else None
            if tokens is None:
                return None
            longest = max(longest, tokens)
            seen += 1
    return (longest, seen, total) if longest else None


def _tokens(ids: Any) -> int | None:
    """Length of one sample's `input_ids`, which may have a batch dimension in front; None if they have none."""
    shape = getattr(ids, "shape", None)
    if shape is not None:
        return shape[-1] if len(shape) else None
    if not hasattr(ids, "__len__"):
        return None
    return max(map(len, ids)) if len(ids) and isinstance(ids[0], (list, tuple)) else len(ids)


def _spread(total: int) -> Iterator[int]:
    """Up to `_SAMPLES` indices, evenly spaced, the first and the last among them."""
    count = min(total, _SAMPLES)
    for step in range(count):
        yield step * (total - 1) // max(1, count - 1)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Datasets may draw random numbers; training must start from the state that the user set."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
