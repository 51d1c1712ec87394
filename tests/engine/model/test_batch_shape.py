"""What the plan of activations counts on is found in the data, without touching it."""

import random

import numpy as np
import pytest
import torch

from hf_slideformer.engine.model.batch_shape import DEFAULT_SEQ_LEN, find_batch_shape


def _find(dataset, seq_len=None, max_positions=32768):
    return find_batch_shape(dataset, batch_size=4, seq_len=seq_len, max_positions=max_positions)


def test_the_user_knows_best():
    shape = _find([{"input_ids": [1] * 10}], seq_len=77)
    assert (shape.batch_size, shape.seq_len) == (4, 77)
    assert "seq_len says" in shape.source


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_the_longest_of_few_samples_is_found(kind):
    shape = _find([{"input_ids": kind([1] * size)} for size in (3, 19, 7)])
    assert shape.seq_len == 19
    assert "19 tokens, from 3 of 3 samples" in shape.source


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_a_batch_dimension_of_one_sample_is_not_its_length(kind):
    assert _find([{"input_ids": kind([[1] * size])} for size in (3, 19, 7)]).seq_len == 19


def test_many_samples_are_looked_at_evenly():
    class Dataset:
        asked = []

        def __len__(self):
            return 100_000

        def __getitem__(self, index):
            self.asked.append(index)
            return {"input_ids": range(index // 1000 + 1)}

    shape = _find(Dataset())
    assert Dataset.asked[0] == 0 and Dataset.asked[-1] == 99_999 and len(Dataset.asked) == 256
    assert shape.seq_len == 100
    assert "256 of 100,000 samples" in shape.source


class _Streaming:
    def __iter__(self):
        raise AssertionError("what is taken here is lost to training")


class _Broken:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise OSError("disk gone")


@pytest.mark.parametrize(
    "dataset",
    [
        None,
        [],
        _Streaming(),
        _Broken(),
        [{"text": "not tokenized"}],
        [torch.arange(3)],
        [{"input_ids": 5}],
        [{"input_ids": torch.tensor(5)}],
    ],
    ids=["none", "empty", "iterable", "broken", "text", "not a mapping", "no length", "no dimension"],
)
def test_where_the_data_says_nothing_a_length_is_assumed(dataset):
    shape = _find(dataset)
    assert shape.seq_len == DEFAULT_SEQ_LEN
    assert "SlideConfig(seq_len=...)" in shape.source
    assert _find(dataset, max_positions=512).seq_len == 512
    assert _find(dataset, max_positions=None).seq_len == DEFAULT_SEQ_LEN


def test_random_numbers_of_training_stay_the_same():
    class Augmented:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"input_ids": [random.random(), torch.rand(()).item()] * 3}

    random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), torch.rand(3)
    random.seed(1)
    torch.manual_seed(1)
    assert _find(Augmented()).seq_len == 6
    assert random.random() == expected[0]
    assert torch.equal(torch.rand(3), expected[1])


@pytest.mark.parametrize(
    "generator", [random.Random(0), np.random.default_rng(0), np.random.RandomState(0), torch.Generator()]
)
def test_a_dataset_with_random_numbers_of_its_own_is_not_read(generator):
    class Augmented(list):
        def __init__(self):
            super().__init__([{"input_ids": [1, 2]}])
            self.generator = generator

        def __getitem__(self, index):
            raise AssertionError("this draws a number that training was to draw")

    assert _find(Augmented()).seq_len == DEFAULT_SEQ_LEN


# -- samples that only the collator knows --------------------------------------------------------------------------


def _pairs(samples):
    """Each sample becomes two sequences, as pairs of preferences do."""
    return {"input_ids": torch.ones(2 * len(samples), max(sample["length"] for sample in samples))}


class _Columns(list):
    column_names = ("length",)


def test_the_collator_is_asked_where_samples_have_no_tokens():
    dataset = [{"length": size} for size in (3, 19, 7)]
    shape = find_batch_shape(dataset, batch_size=4, seq_len=None, max_positions=None, collate=_pairs)
    assert (shape.batch_size, shape.seq_len) == (8, 19)
    assert "19 tokens, from 3 of 3 samples" in shape.source


def test_rows_of_a_sample_count_where_the_user_says_the_length():
    dataset = _Columns({"length": size} for size in (3, 19, 7))
    shape = find_batch_shape(dataset, batch_size=4, seq_len=50, max_positions=None, collate=_pairs)
    assert (shape.batch_size, shape.seq_len) == (8, 50)


def test_the_collator_is_not_asked_where_samples_have_tokens():
    def collate(samples):
        raise AssertionError("not needed")

    dataset = [{"input_ids": [1] * 5}]
    shape = find_batch_shape(dataset, batch_size=4, seq_len=None, max_positions=None, collate=collate)
    assert (shape.batch_size, shape.seq_len) == (4, 5)


def test_a_collator_with_a_generator_of_its_own_is_left_alone():
    class Collator:
        def __init__(self):
            self.generator = torch.Generator()

        def __call__(self, samples):
            raise AssertionError("would draw from it")

    shape = find_batch_shape(
        [{"length": 5}], batch_size=4, seq_len=None, max_positions=None, collate=Collator()
    )
    assert (shape.batch_size, shape.seq_len) == (4, DEFAULT_SEQ_LEN)


def test_a_collator_that_fails_fails_in_training_not_here():
    def collate(samples):
        raise ValueError("no such column")

    shape = find_batch_shape([{"length": 5}], batch_size=4, seq_len=None, max_positions=None, collate=collate)
    assert (shape.batch_size, shape.seq_len) == (4, DEFAULT_SEQ_LEN)
