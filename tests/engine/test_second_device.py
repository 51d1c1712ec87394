"""A model on another GPU than the current one: the same bits, whatever moves and wherever updates run."""

import pytest
import torch

from hf_slideformer import SlideConfig

from .loop import assert_same_bits, decide, prepare, tiny_llama, train

ALL = tuple(range(6))
# Long copies and short kernels, so that a kernel that does not wait reads what is not there yet.
SHAPE = {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 4}

MODES = {
    "streamed": ({}, {}),
    "kept": ({"keep": ALL}, {}),
    "offload, outside in RAM": ({"offload": ALL, "outside_state": "RAM"}, {}),
    "resident": ({"resident": ALL, "keep": (0, 3)}, {}),
    "sums": ({}, {"accumulates": True}),
    "overlapped": ({}, {"config": SlideConfig(update="overlapped")}),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("mode", MODES)
def test_the_current_device_does_not_matter(mode, deterministic):
    decisions, settings = MODES[mode]
    runs = []
    for device in ("cuda:0", "cuda:1"):
        with torch.cuda.device(0):
            run = prepare(tiny_llama(**SHAPE), device=device, decisions=decide(**decisions), **settings)
            max_norm = None if mode == "overlapped" else 0.5
            micro_batches = 2 if mode == "sums" else 1
            runs.append(train(run, 3, max_norm=max_norm, micro_batches=micro_batches, seq=32))
            run.engine.close()
    assert_same_bits(*runs)


def test_a_checkpoint_may_be_read_beside_training(deterministic):
    """State on the second device, read by another thread on a stream of its own."""
    states = []
    for device in ("cuda:0", "cuda:1"):
        with torch.cuda.device(0):
            run = prepare(tiny_llama(**SHAPE), device=device, decisions=decide(resident=(1, 4)))
            train(run, 1, seq=32)
            held = run.engine.hold()
            held.request(range(len(held.groups)))
            found = {}
            for group in held.order:
                with held.reading(group):
                    for state in held.groups[group]:
                        residual, moments = held.parts(state)
                        for name, tensor in {"residual": residual, **moments}.items():
                            if tensor is not None:
                                found[state.name, name] = tensor.cpu().clone()
                held.release(group)
            held.release_all()
            train(run, 1, seq=32)
            run.engine.close()
            states.append(found)
    ours, theirs = states
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_nothing_is_made_on_the_current_device():
    with torch.cuda.device(0):
        torch.cuda.synchronize(1)
        before = torch.cuda.memory_stats(0).get("allocation.all.allocated", 0)
        run = prepare(tiny_llama(**SHAPE), device="cuda:1")
        train(run, 1, seq=32)
        run.engine.close()
        assert torch.cuda.memory_stats(0).get("allocation.all.allocated", 0) == before
