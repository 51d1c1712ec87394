"""The shape of micro-batches, found from the data before training: what the plan of activations counts on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    dataset: Any,
    *,
    batch_size: int,
    seq_len: int | None,
    max_positions: int | None,
    collate: Callable[[list], Any] | None = None,
) -> BatchShape:
    """The shape that training will have.

    Args:
        dataset: what the data loader reads; samples with `input_ids` tell their length.
        batch_size: samples of a micro-batch.
        seq_len: tokens of the longest sequence, if the user says it.
        max_positions: what the model can take, if it says so.
        collate: makes batches of samples; asked where samples have no `input_ids` (a pair of preferences becomes two
            sequences).
    """
    if seq_len is not None:
        columns = getattr(dataset, "column_names", None)
        one = _longest(dataset, collate, samples=1) if columns and "input_ids" not in columns else None
        rows = one.rows if one is not None else 1
        return BatchShape(
            batch_size * rows, seq_len, f"sequences of up to {seq_len:,} tokens, as seq_len says"
        )
    found = _longest(dataset, collate)
    if found is not None:
        return BatchShape(
            batch_size * found.rows,
            found.tokens,
            f"sequences of up to {found.tokens:,} tokens, from {found.seen:,} of {found.total:,} samples",
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


class _Longest(NamedTuple):
    """Of the samples that were looked at: tokens of the longest, sequences that each becomes, how many, and of all."""

    tokens: int
    rows: int
    seen: int
    total: int


def _longest(dataset: Any, collate: Callable[[list], Any] | None, samples: int = _SAMPLES) -> _Longest | None:
    """What samples say of their length; None if they cannot be looked at."""
    try:
        total = len(dataset)
        get = dataset.__getitem__
    except (AttributeError, TypeError):  # an iterable dataset would lose what is taken from it
        return None
    own = [*getattr(dataset, "__dict__", {}).values(), *getattr(collate, "__dict__", {}).values()]
    if any(isinstance(value, _GENERATORS) for value in own):
        return None  # reading samples would advance its own random state, and training would see other data
    longest, most_rows, seen, start = 0, 1, 0, time.monotonic()
    with _random_state_kept():
        for index in _spread(total, samples):
            if seen and time.monotonic() - start > _MAX_SECONDS:
                break
            try:
                sample = get(index)
                rows = 1
                if collate is not None and isinstance(sample, Mapping) and "input_ids" not in sample:
                    sample = collate([sample])
                    rows = len(sample["input_ids"])
            except Exception:  # noqa: BLE001 - it will raise again where training reads it
                return None
            tokens = _tokens(sample.get("input_ids")) if isinstance(sample, Mapping) else None
            if tokens is None:
                return None
            longest, most_rows = max(longest, tokens), max(most_rows, rows)
            seen += 1
    return _Longest(longest, most_rows, seen, total) if longest else None


def _tokens(ids: Any) -> int | None:
    """Length of one sample's `input_ids`, which may have a batch dimension in front; None if they have none."""
    shape = getattr(ids, "shape", None)
    if shape is not None:
        return shape[-1] if len(shape) else None
    if not hasattr(ids, "__len__"):
        return None
    return max(map(len, ids)) if len(ids) and isinstance(ids[0], (list, tuple)) else len(ids)


def _spread(total: int, samples: int) -> Iterator[int]:
    """Up to `samples` indices, evenly spaced, the first and the last among them."""
    count = min(total, samples)
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
