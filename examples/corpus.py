"""The demo's examples as `datasets.Dataset`s: the library's docstrings, or any dataset the user names."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from docstrings import INSTRUCTION, Docstring, read_docstrings, split_by_module
from failure import DemoError

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
HELD_OUT_SPLITS = ("validation", "test", "eval", "dev")
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Corpus:
    """What to train on and what to judge by.

    Both datasets have the columns `prompt` and `completion`; `prompt` is empty for plain text, all of which
    is learnt. `instruction` is put before every prompt as the chat's system message.
    """

    name: str
    train: Dataset
    held_out: Dataset
    instruction: str | None = None


def load_corpus(source: str | None, seed: int, held_out_rows: int) -> Corpus:
    """Load the dataset `source`, or the standard library's docstrings where it is None.

    Args:
        source: A hub name, a file (.json, .jsonl, .csv, .parquet, .txt) or a directory, with the columns
            `prompt` and `completion`, or `text`.
        seed: Decides the order of the rows, and which are held out where the dataset does not say.
        held_out_rows: How many held-out rows to keep at most.

    Raises:
        DemoError: It cannot be read, or has no usable rows.
    """
    corpus = docstring_corpus(seed) if source is None else _named_corpus(source, seed)
    for side, rows in (("train", corpus.train), ("held-out", corpus.held_out)):
        if not len(rows):
            raise DemoError(f"the dataset {corpus.name} has no usable {side} rows")
    held_out = corpus.held_out.select(range(min(held_out_rows, len(corpus.held_out))))
    return Corpus(corpus.name, corpus.train, held_out, corpus.instruction)


def docstring_corpus(seed: int, root: Path | None = None) -> Corpus:
    """Build the default corpus from the Python sources under `root` (the standard library if None)."""
    sides = []
    for docstrings in split_by_module(read_docstrings(root)):
        random.Random(seed).shuffle(docstrings)
        sides.append(_docstring_rows(docstrings))
    return Corpus("Python's standard library", sides[0], sides[1], INSTRUCTION)


def _docstring_rows(docstrings: list[Docstring]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [docstring.signature for docstring in docstrings],
            "completion": [docstring.summary for docstring in docstrings],
            "module": [docstring.module for docstring in docstrings],
        }
    )


def _named_corpus(source: str, seed: int) -> Corpus:
    splits = _read(source)
    train = splits["train"] if "train" in splits else splits[next(iter(splits))]
    train = _rows(train, source).shuffle(seed=seed)
    held_out_name = next((name for name in HELD_OUT_SPLITS if name in splits), None)
    if held_out_name is not None and "train" in splits:
        return Corpus(source, train, _rows(splits[held_out_name], source).shuffle(seed=seed))
    if len(train) < 2:
        raise DemoError(f"the dataset {source} has {len(train)} usable rows; at least 2 are needed")
    parts = train.train_test_split(test_size=max(1, round(len(train) * HELD_OUT_SHARE)), seed=seed)
    return Corpus(source, parts["train"], parts["test"])


def _read(source: str) -> DatasetDict:
    """Read every split of a file, a directory or a hub dataset."""
    path = Path(source)
    try:
        if path.is_file():
            if not path.stat().st_size:
                raise DemoError(f"the dataset {source} is empty")
            if path.suffix not in READERS:
                raise DemoError(f"cannot read {source}: the file types are {', '.join(READERS)}")
            return load_dataset(READERS[path.suffix], data_files=str(path))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = load_from_disk(source)
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        return load_dataset(source)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DemoError(f"cannot load the dataset {source!r}: {reason}") from error


def _rows(dataset: Dataset, source: str) -> Dataset:
    """Bring the columns to `prompt` and `completion`, and drop rows that have nothing to learn."""
    columns = set(dataset.column_names)
    if {"prompt", "completion"} <= columns:
        dataset = dataset.select_columns(["prompt", "completion"])
    elif "text" in columns:
        texts = dataset["text"]
        dataset = Dataset.from_dict({"prompt": [""] * len(texts), "completion": list(texts)})
    else:
        raise DemoError(
            f"the dataset {source} has the columns {', '.join(sorted(columns))}; "
            "wanted are `prompt` and `completion`, or `text`"
        )
    if len(dataset) and not isinstance(dataset[0]["completion"], str):
        raise DemoError(
            f"the dataset {source} holds {type(dataset[0]['completion']).__name__}s; wanted is text"
        )
    return dataset.filter(lambda row: bool((row["completion"] or "").strip()))
