"""Placement never changes the numbers: streamed units give the bits of units that stay on the device.

The units that stay run the model's own code under ordinary autograd with their activations kept, so these tests
compare streaming, recomputing, deferred updates and host gradients against none of them.
"""

import pytest
import torch

from hf_slideformer import SlideConfig

from .loop import assert_same_bits, prepare, tiny_llama, train

ALL = range(6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("resident", [ALL, (0, 3, 5)], ids=["all", "some"])
def test_streamed_equals_resident_on_cpu(dtype, micro_batches, resident):
    bf16 = dtype == torch.bfloat16
    runs = [
        train(
            prepare(tiny_llama(dtype), bf16=bf16, accumulates=micro_batches > 1, resident_units=units),
            10,
            micro_batches=micro_batches,
            autocast=bf16,
            max_norm=0.5,
        )
        for units in ((), resident)
    ]
    assert min(runs[0].norms) > 0.5, "the test must clip"
    assert_same_bits(*runs)


@pytest.mark.parametrize("tied", [False, True])
def test_overlapped_equals_deferred_on_cpu(tied):
    runs = [
        train(
            prepare(tiny_llama(tie_word_embeddings=tied), config=SlideConfig(update=update)),
            10,
            max_norm=None,
        )
        for update in ("overlapped", "deferred")
    ]
    assert_same_bits(*runs)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_streamed_equals_resident_on_gpu(attention, micro_batches, deterministic):
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
                resident_units=units,
                lr=1e-4,
            ),
            10,
            micro_batches=micro_batches,
            max_norm=0.5,
            batch=4,
            seq=512,
        )
        for units in ((), ALL, (0, 3, 5))
    ]
    assert min(runs[0].norms) > 0.5, "the test must clip"
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


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
