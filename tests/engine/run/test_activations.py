"""What happens to activations: kept ones are not computed again, offloaded ones leave the device."""

import gc
import weakref

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, set_seed
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_slideformer import SlideConfig
from hf_slideformer.errors import StateError
from tests.engine.loop import assert_same_bits, batches, decide, prepare, tiny_llama, train

ALL = range(6)


@pytest.fixture
def runs_of_layers(monkeypatch):
    """Counts how often each decoder layer's code runs."""
    counts = [0] * 6
    original = LlamaDecoderLayer.forward

    def forward(self, *args, **kwargs):
        counts[self.self_attn.layer_idx] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    return counts


@pytest.mark.parametrize("resident", [(), (0, 1, 2), ALL], ids=["streamed", "some resident", "resident"])
def test_kept_units_run_once_and_recomputed_ones_twice(runs_of_layers, resident):
    train(prepare(tiny_llama(), decisions=decide(resident=resident, keep=(2, 4), offload=(0, 5))), 1)
    assert runs_of_layers == [2, 2, 1, 2, 1, 2]


def test_a_batch_larger_than_planned_is_recomputed(runs_of_layers):
    run = prepare(tiny_llama(), decisions=decide(resident=(0, 1), keep=(1, 4)))
    planned = 2 * 16 * 64 * 2  # batch, sequence, width, bytes: those of `train`
    for unit in run.engine.executor.units:
        unit.planned_bytes = planned
    train(run, 1)
    assert runs_of_layers == [2, 1, 2, 2, 1, 2]
    train(run, 1, seq=17)
    assert runs_of_layers == [4, 3, 4, 4, 3, 4]


def test_lengths_may_change_from_step_to_step():
    results = []
    for decisions in (decide(resident=ALL, keep=ALL), decide(offload=ALL), decide(keep=ALL)):
        run = prepare(tiny_llama(), decisions=decisions)
        for seq in (16, 5, 24, 11):
            train(run, 1, seq=seq, seed=seq)
        results.append(run)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def _forward(run, tokens):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run.model(input_ids=tokens, labels=tokens, use_cache=False).loss


def test_offloaded_inputs_leave_the_device():
    """Between forward and backward no tensor of hidden states is alive on the device."""
    run = prepare(tiny_llama(), decisions=decide(offload=ALL))
    seen = []
    for unit in run.engine.executor.units:
        unit.found.module.register_forward_pre_hook(
            lambda module, args: seen.append(weakref.ref(args[0].untyped_storage()))
        )
    tokens = torch.randint(96, (2, 16))
    run.model.train()
    loss = _forward(run, tokens)
    run.engine.executor.offload.settle()
    gc.collect()
    assert [ref() for ref in seen[:6]] == [None] * 6
    loss.backward()
    assert all(state.param.grad is not None for state in run.engine.states)


def test_a_forward_without_backward_leaves_nothing_behind():
    run = prepare(tiny_llama(), decisions=decide(offload=ALL))
    reference = prepare(tiny_llama(), decisions=decide(resident=ALL, keep=ALL))
    run.model.train()
    for _ in range(3):
        _forward(run, torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1)))
    gc.collect()
    held = run.engine.executor.offload.host_bytes
    train(run, 2)
    assert run.engine.executor.offload.host_bytes == held
    assert_same_bits(run, train(reference, 2))


def test_two_forwards_before_their_backwards():
    results = []
    for decisions in (decide(resident=ALL, keep=ALL), decide(offload=ALL), decide(keep=ALL), decide()):
        run = prepare(tiny_llama(), decisions=decisions)
        run.model.train()
        tokens = [
            torch.randint(96, (2, size), generator=torch.Generator().manual_seed(size)) for size in (16, 9)
        ]
        first, second = (_forward(run, batch) for batch in tokens)
        (first + second).backward()
        results.append({state.name: state.param.grad.clone() for state in run.engine.states})
    for other in results[2:]:
        for name, grad in other.items():
            assert torch.equal(grad, results[1][name]), name
    for name, grad in results[0].items():  # summed in bf16 there, as in torch, and in fp32 in RAM
        torch.testing.assert_close(results[1][name].float(), grad.float(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("decisions", [decide(keep=ALL), decide(offload=ALL)], ids=["keep", "offload"])
def test_a_second_backward_is_refused(decisions):
    run = prepare(tiny_llama(), decisions=decisions)
    run.model.train()
    loss = _forward(run, torch.randint(96, (2, 16)))
    loss.backward(retain_graph=True)
    with pytest.raises(StateError, match="backward ran twice"):
        loss.backward()


def test_kept_activations_changed_in_place_are_refused():
    run = prepare(tiny_llama(), decisions=decide(keep=ALL))
    run.model.train()
    caught = []
    run.model.model.layers[3].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: caught.append(args[0])
    )
    loss = _forward(run, torch.randint(96, (2, 16)))
    with torch.no_grad():
        caught[0].add_(1)
    with pytest.raises(StateError, match=r"an activation of model\.layers\.3 was changed in place"):
        loss.backward()


def test_an_interrupted_backward_leaves_the_engine_usable():
    """An exception in the middle of a backward whose inputs are on their way back from RAM."""
    run = prepare(tiny_llama(), decisions=decide(offload=ALL), delays={"h2d": lambda _: 0.002})
    run.model.train()

    def fail(grad):
        raise RuntimeError("stop here")

    handle = run.model.model.layers[2].register_forward_hook(
        lambda module, args, output: output.register_hook(fail) and None
    )
    loss = _forward(run, torch.randint(96, (2, 16)))
    with pytest.raises(RuntimeError, match="stop here"):
        loss.backward()
    handle.remove()
    run.engine.reset()
    del loss
    assert_same_bits(train(run, 2), train(prepare(tiny_llama()), 2))


def test_an_interrupted_forward_that_a_traceback_holds_costs_nothing_later():
    run = prepare(tiny_llama(), decisions=decide(offload=ALL))
    run.model.train()
    held = _forward(run, torch.randint(96, (2, 16)))
    run.engine.reset()
    offload = run.engine.executor.offload
    assert_same_bits(train(run, 2), train(prepare(tiny_llama()), 2))
    assert offload.host_bytes == 0, "inputs wait in the buffers of gradients"
    assert not offload._coming, "nothing is brought back that no backward needs"
    held = _forward(run, torch.randint(96, (2, 16)))
    run.engine.reset()
    with pytest.raises(StateError, match=r"inputs of model\.layers\.5 were let go of"):
        held.backward()


def test_overlapped_updates_use_up_the_gradients_of_resident_units():
    run = prepare(tiny_llama(), config=SlideConfig(update="overlapped"), decisions=decide(resident=(0, 1, 2)))
    run.model.train()
    norm = train(prepare(tiny_llama()), 1, max_norm=float("inf")).norms[0]
    tokens = batches(1)[0]
    _forward(run, tokens).backward()
    pending = {state.name for state in run.engine.states if state.param.grad is not None}
    assert pending == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert run.engine.clip_grad_norm_(run.model.parameters(), float("inf")).item() == norm
    with pytest.raises(
        StateError, match=r"second gradient since the last step|overlapped updates need exactly"
    ):
        _forward(run, tokens).backward()


def test_a_write_between_steps_reaches_the_master_in_ram():
    """A weight on the device whose master is in RAM: what the user writes counts, residual and all."""
    results = []
    for decisions in (decide(), decide(outside_state="RAM")):
        run = train(prepare(tiny_llama(), decisions=decisions), 2)
        with torch.no_grad():
            run.model.lm_head.weight.mul_(0.5)
            run.model.model.embed_tokens.weight[3].zero_()
        results.append(train(run, 2, seed=8))
    assert_same_bits(*results)


@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_may_be_zeroed_in_place_while_they_are_sent_to_ram(accumulates):
    results = []
    for decisions in (decide(), decide(outside_state="RAM")):
        run = prepare(
            tiny_llama(), accumulates=accumulates, decisions=decisions, delays={"d2h": lambda _: 0.01}
        )
        run.model.train()
        for tokens in batches(3):
            _forward(run, tokens).backward()
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=False)
        run.engine.synchronize()
        results.append(run)
    assert_same_bits(*results)


@pytest.mark.parametrize("resident", [(), ALL], ids=["streamed", "resident"])
def test_outputs_that_a_kept_unit_needs_are_refused_when_changed_in_place(resident, monkeypatch):
    original = LlamaDecoderLayer.forward
    monkeypatch.setattr(  # tanh saves what it returns
        LlamaDecoderLayer, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs).tanh()
    )
    run = prepare(tiny_llama(), decisions=decide(resident=resident, keep=ALL))
    run.model.model.layers[2].register_forward_hook(lambda module, args, output: output.mul_(0.5))
    run.model.train()
    loss = _forward(run, torch.randint(96, (2, 16)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_layers_that_share_an_input_have_the_same_bits_wherever_they_are():
    """Every layer of a decoder reads the encoder's output, whose gradients are summed over the layers."""
    results = []
    for decisions in (
        decide(units=4),
        decide(units=4, offload=range(4)),
        decide(units=4, resident=range(4), keep=range(4)),
    ):
        set_seed(0)
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=96,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=32,
                init_std=0.15,
                forced_eos_token_id=None,
            )
        )
        run = prepare(model.to(torch.bfloat16), decisions=decisions)
        results.append(train(run, 3))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
