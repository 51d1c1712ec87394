"""Seeded ragged datasets with labels of -100, and the collator that pads them.

Samples are plain dictionaries of lists, as `datasets` would give them, so that the trainers under test run their
own code for collating, counting label tokens and padding predictions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from .models import PAD, VOCAB

IGNORE = -100
"""Label of positions that do not count."""

CLASSES = 3
_FIRST_WORD = 4  # ids below are special tokens

Sample = dict[str, Any]


class Samples(Dataset):
    """A list of samples as a map-style dataset."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        """Keep ``samples``, which are never changed."""
        self._samples = list(samples)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """Return sample ``index``."""
        return self._samples[index]


def _words(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(_FIRST_WORD, VOCAB, (length,), generator=generator).tolist()


def _causal_sample(length: int, generator: torch.Generator) -> Sample:
    """A sequence whose first third (a prompt) and a few later positions carry no label."""
    input_ids = _words(length, generator)
    ignored = torch.rand(length, generator=generator) < 0.15
    ignored[: length // 3] = True
    # The last position always counts: a micro-batch without a single label would have a loss of 0 / 0.
    ignored[-1] = False
    labels = [IGNORE if skip else token for token, skip in zip(input_ids, ignored.tolist(), strict=True)]
    return {"input_ids": input_ids, "labels": labels}


def _classification_sample(length: int, generator: torch.Generator) -> Sample:
    label = int(torch.randint(0, CLASSES, (1,), generator=generator))
    return {"input_ids": _words(length, generator), "labels": label}


def _seq2seq_sample(length: int, generator: torch.Generator) -> Sample:
    target_length = int(torch.randint(3, 12, (1,), generator=generator))
    labels = [
        IGNORE if skip else token
        for token, skip in zip(
            _words(target_length, generator),
            (torch.rand(target_length, generator=generator) < 0.15).tolist(),
            strict=True,
        )
    ]
    labels[-1] = _words(1, generator)[0]
    return {"input_ids": _words(length, generator), "labels": labels}


_SAMPLERS = {"causal": _causal_sample, "classification": _classification_sample, "seq2seq": _seq2seq_sample}


def make_dataset(task: str, count: int, seed: int) -> Samples:
    """Make ``count`` samples of 5 to 20 tokens for ``task``, the same for the same ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 21, (count,), generator=generator).tolist()
    return Samples([_SAMPLERS[task](length, generator) for length in lengths])


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Pad ``rows`` on the right with ``value`` to the longest: (batch, longest) int64."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def collate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Pad a micro-batch on the right to its longest sample; labels are padded with `IGNORE`."""
    input_ids = [sample["input_ids"] for sample in samples]
    labels = [sample["labels"] for sample in samples]
    return {
        "input_ids": _pad(input_ids, PAD),
        "attention_mask": _pad([[1] * len(row) for row in input_ids], 0),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else _pad(labels, IGNORE),
    }
