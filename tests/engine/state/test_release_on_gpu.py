"""A model on a GPU that leaves its engine, or stays although it is "moved" to where it computes."""

import pytest
import torch

from hf_slideformer.engine.engine import engine_of
from tests.engine.loop import batches, decide, prepare, tiny_llama, train

pytestmark = pytest.mark.gpu

PLACES = {
    "streamed": {},
    "mixed": {"decisions": decide(resident=(0, 2), keep=(5,), offload=(3,))},
    "outside_in_ram": {"decisions": decide(outside_state="RAM")},
}


def trained(place):
    return train(prepare(tiny_llama(torch.float32), device="cuda", **PLACES[place]), 2)


def allocated():
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("place", PLACES)
def test_weights_come_back_to_ram_and_memory_is_free(place):
    before = allocated()
    run = trained(place)
    expected = run.weights
    run.engine.release()
    for name, tensor in [*run.model.named_parameters(), *run.model.named_buffers()]:
        assert tensor.device.type == "cpu", name
        assert name not in expected or torch.equal(tensor, expected[name]), name
    assert allocated() - before < 2**16
    tokens = batches(1)[0]
    on_cpu = run.model(input_ids=tokens).logits
    on_gpu = run.model.to("cuda")(input_ids=tokens.cuda()).logits
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("move", [lambda model: model.to("cuda"), lambda model: model.cuda()])
def test_a_move_to_the_device_that_it_computes_on_changes_nothing(move):
    run = trained("streamed")
    places = [param.data_ptr() for param in run.model.parameters()]
    move(run.model)
    assert engine_of(run.model) is run.engine
    assert [param.data_ptr() for param in run.model.parameters()] == places
    train(run, 1)


def test_a_move_to_ram_leaves_the_engine():
    run = trained("mixed")
    run.model.cpu()
    assert engine_of(run.model) is None
    assert {param.device.type for param in run.model.parameters()} == {"cpu"}
