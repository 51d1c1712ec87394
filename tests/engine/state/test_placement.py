"""Placement never changes the numbers: streamed units give the bits of units that stay on the device.

Units that stay with their activations kept run the model's own code under ordinary autograd, so these tests compare
streaming, recomputing, offloaded activations, deferred updates and host gradients against none of them.
"""

import functools
import random

import pytest
import torch

from hf_slideformer import SlideConfig
from tests.engine.loop import assert_same_bits, decide, prepare, tiny_llama, train

ALL = range(6)


PLACEMENTS = {
    "streamed": decide(),
    "some resident": decide(resident=(0, 3, 5), keep=(0, 3, 5)),
    "resident, recomputed": decide(resident=(0, 1, 2)),
    "all resident and recomputed": decide(resident=ALL),
    "kept": decide(keep=(3, 4, 5)),
    "all kept": decide(keep=ALL),
    "offloaded": decide(offload=ALL),
    "some of each": decide(resident=(0, 1), keep=(1, 4, 5), offload=(0, 2), slots=2),
    "state outside of units in RAM": decide(outside_state="RAM"),
    "everything in RAM": decide(offload=ALL, slots=2, outside_state="RAM"),
}


@pytest.fixture(scope="module")
def plain():
    """Runs of the model's own code under ordinary autograd, made when first asked for."""
    return functools.cache(lambda *how: _run(decide(resident=ALL, keep=ALL), *how))


STEPS = 10


def _run(decisions, dtype, micro_batches, delays=None):
    bf16 = dtype == torch.bfloat16
    return train(
        prepare(
            tiny_llama(dtype, attention_dropout=0.1),
            bf16=bf16,
            accumulates=micro_batches > 1,
            decisions=decisions,
            delays=delays,
        ),
        STEPS,
        micro_batches=micro_batches,
        autocast=bf16,
        max_norm=0.5,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_changes_no_bit_on_cpu(plain, dtype, micro_batches, placement):
    expected = plain(dtype, micro_batches)
    assert min(expected.norms) > 0.5, "the test must clip"
    assert_same_bits(_run(PLACEMENTS[placement], dtype, micro_batches), expected)


@pytest.mark.parametrize("placement", ["kept", "offloaded", "some of each", "everything in RAM"])
def test_slow_transfers_change_no_bit(plain, placement):
    source = random.Random(0)

    def jitter(_label):
        return source.choice((0.0, 0.002, 0.01))

    delays = {"h2d": jitter, "d2h": jitter, "update": jitter}
    assert_same_bits(_run(PLACEMENTS[placement], torch.bfloat16, 1, delays), plain(torch.bfloat16, 1))


def _run_unclipped(update, decisions=None, *, tied=False):
    prepared = prepare(
        tiny_llama(tie_word_embeddings=tied), config=SlideConfig(update=update), decisions=decisions
    )
    return train(prepared, STEPS, max_norm=None)


@pytest.fixture(scope="module")
def deferred():
    """Unclipped runs with deferred updates, made when first asked for."""
    return functools.cache(lambda tied: _run_unclipped("deferred", tied=tied))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_overlapped_updates_change_no_bit(deferred, placement):
    assert_same_bits(_run_unclipped("overlapped", PLACEMENTS[placement]), deferred(False))


@pytest.mark.parametrize("tied", [False, True])
def test_overlapped_equals_deferred_on_cpu(deferred, tied):
    assert_same_bits(_run_unclipped("overlapped", tied=tied), deferred(tied))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_placement_changes_no_bit_on_gpu(attention, micro_batches, deterministic):
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
        "attn_implementation": attention,
    }
    runs = [
        train(
            prepare(
                tiny_llama(**shape),
                device="cuda",
                accumulates=micro_batches > 1,
                decisions=decisions,
                lr=1e-4,
            ),
            10,
            micro_batches=micro_batches,
            max_norm=0.5,
            batch=4,
            seq=512,
        )
        for decisions in (decide(resident=ALL, keep=ALL), *PLACEMENTS.values())
    ]
    assert min(runs[0].norms) > 0.5, "the test must clip"
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@pytest.mark.gpu
def test_overlapped_equals_deferred_on_gpu(deterministic):
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 4096}
    runs = [
        train(
            prepare(tiny_llama(**shape), device="cuda", config=SlideConfig(update=update)),
            10,
            max_norm=None,
            batch=4,
            seq=512,
        )
        for update in ("overlapped", "deferred")
    ]
    assert_same_bits(*runs)
