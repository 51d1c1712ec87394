"""A frozen base with adapters streams, and costs what frozen weights cost: their bytes, and nothing else."""

import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_slideformer import (
    SlideAdamW,
    SlideConfig,
    StateError,
    UnsupportedModelError,
)
from hf_slideformer.checkpoint import save_exactly
from hf_slideformer.engine.engine import SlideEngine
from hf_slideformer.engine.model.setup import Setup
from hf_slideformer.engine.profiling.trace import profile_model
from hf_slideformer.engine.reference_model import follow
from hf_slideformer.optim.adamw import AdamWRule
from tests.engine.loop import all_tensors, assert_same_bits, batches, decide, prepare, tiny_llama, train

RANK = 4
UNITS = 6
ALL = range(UNITS)
PLACEMENTS = {
    "streamed": decide(),
    "some resident": decide(resident=(0, 3), keep=(0, 3)),
    "resident, recomputed": decide(resident=ALL),
    "all kept": decide(keep=ALL),
    "some of each": decide(resident=(0, 1), keep=(1, 4, 5), offload=(0, 2), slots=2),
}


def _lora(dtype=torch.bfloat16, *, dropout=0.1, **options):
    """A llama in `dtype` with adapters that do something; in fp32 where the base is in bf16, as PEFT makes them."""
    model = tiny_llama(dtype)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=RANK, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"], **options
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(0, 0.05)
    return model


def _padded(numel, itemsize):
    return -(-numel // 128) * 128 * itemsize


def _pages(nbytes):
    return -(-nbytes // 4096) * 4096


# -- bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("dtype", "bf16"), [(torch.bfloat16, True), (torch.float32, False)])
def test_frozen_weights_cost_their_own_bytes_in_ram(dtype, bf16, micro_batches):
    """Counted from the model's shapes: no moments, no gradients, no residual for what is frozen."""
    model = _lora(dtype)
    layer = model.base_model.model.model.layers[0]
    frozen = [param.numel() for param in layer.parameters() if not param.requires_grad]
    trained = [param.numel() for param in layer.parameters() if param.requires_grad]
    assert len(trained) == 6 and sum(frozen) > 10 * sum(trained)
    outside = sum(param.nbytes for name, param in model.named_parameters() if ".layers." not in name)

    run = prepare(model, bf16=bf16, accumulates=micro_batches > 1)
    weights = sum(_padded(numel, dtype.itemsize) for numel in [*frozen, *trained])
    moments = 2 * _pages(sum(_padded(numel, 4) for numel in trained))
    residuals = _pages(sum(_padded(numel, 2) for numel in trained)) if bf16 else 0
    live = sum(_padded(numel, dtype.itemsize) for numel in trained)
    gradients = _pages(sum(_padded(numel, 4) for numel in trained)) if micro_batches > 1 else _pages(live)
    expected = {
        "weights": UNITS * _pages(weights),
        "master residuals": UNITS * residuals,
        "moments": UNITS * moments,
        "gradients": UNITS * gradients,
        "gradient staging": 3 * _pages(live) if micro_batches > 1 else 0,
    }
    planned = {item.what: item.nbytes for item in run.engine.plan.items if item.tier == "RAM"}
    assert {what: nbytes for what, nbytes in planned.items() if nbytes} == {
        what: nbytes for what, nbytes in expected.items() if nbytes
    }
    # And so it is allocated.
    assert run.engine.host_state_bytes == sum(expected.values()) - expected["gradient staging"]
    gpu = {item.what: item.nbytes for item in run.engine.plan.items if item.tier == "GPU"}
    assert gpu["resident weights"] == outside  # embedding, norm and head are frozen: nothing beside them
    assert not any(gpu.get(f"resident {kind}") for kind in ("moments", "master residuals", "gradients"))
    for state in run.engine.states:
        assert bool(state.moments) == state.spec.trainable
        assert (state.residual is not None) == (state.spec.trainable and bf16)
        assert state.rule == (AdamWRule() if state.spec.trainable else None)


def test_a_frozen_base_in_fp32_keeps_its_lower_half_in_ram_only():
    """Under bf16 it streams in bf16; the rest of it is what makes it fp32 again when it is merged or saved."""
    model = _lora(torch.float32)
    layer = model.base_model.model.model.layers[0]
    sizes = [param.numel() for param in layer.parameters()]
    run = prepare(model, bf16=True)
    planned = {item.what: item.nbytes for item in run.engine.plan.items}
    assert planned["weights"] == UNITS * _pages(sum(_padded(numel, 2) for numel in sizes))
    assert planned["master residuals"] == UNITS * _pages(sum(_padded(numel, 2) for numel in sizes))
    assert planned["slots"] == 3 * sum(_padded(numel, 2) for numel in sizes)


def test_a_step_moves_weights_down_and_gradients_of_adapters_up():
    model = _lora()
    unit_bytes = sum(_padded(p.numel(), 2) for p in model.base_model.model.model.layers[0].parameters())
    adapter_params = sum(param.numel() for param in model.parameters() if param.requires_grad)
    run = prepare(model)
    train(run, 1)
    before = run.engine.metrics.totals()
    train(run, 1)
    after = run.engine.metrics.totals()
    moved = {key: after[key] - before[key] for key in ("h2d_bytes", "d2h_bytes", "updated_params")}
    # Forward fetches six units; backward has the last three in their slots and fetches three; three are prefetched
    # for the next forward after step(), as they were before this one.
    assert moved == {
        "h2d_bytes": 9 * unit_bytes,
        "d2h_bytes": 2 * adapter_params,
        "updated_params": adapter_params,
    }


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_loss_of_a_peft_model_is_profiled(task_type):
    """Without a task PEFT's wrapper takes any arguments, so the base says what it wants."""
    settings = {"batch_size": 2, "seq_len": 16, "bf16": False, "fused_loss": False, "device_type": "cpu"}
    base = tiny_llama(torch.float32).requires_grad_(False)
    base.model.layers[0].requires_grad_(True)
    profile = profile_model(_lora(torch.float32, task_type=task_type), **settings)
    assert profile.source != "estimated"
    assert profile.loss_bytes == profile_model(base, **settings).loss_bytes


# -- bits ------------------------------------------------------------------------------------------------------


def _run(decisions):
    return train(prepare(_lora(), decisions=decisions), 5, max_norm=0.05)


@pytest.fixture(scope="module")
def plain():
    """Nothing streamed, nothing recomputed."""
    return _run(decide(resident=ALL, keep=ALL))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_changes_no_bit(plain, placement):
    assert min(plain.norms) > 0.05, "the test must clip"
    assert_same_bits(_run(PLACEMENTS[placement]), plain)


def test_frozen_weights_never_change():
    model = _lora()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    run = train(prepare(model, decisions=decide(resident=(1,))), 3)
    for name, param in model.named_parameters():
        state = run.engine.param_state(param)
        assert torch.equal(param, before[name]) != param.requires_grad, name
        assert state.step == (3 if param.requires_grad else 0)


# -- adapters that are switched -----------------------------------------------------------------------------------


def test_disabled_adapters_give_the_base_model_between_forward_and_backward():
    """As DPO does: the reference is the same model without its adapters."""
    model = _lora(torch.float32, dropout=0.0)
    tokens = batches(1)[0]
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=tokens).logits
    twin = prepare(copy.deepcopy(model), bf16=False)
    run = prepare(model, bf16=False)
    for one, interrupted in ((twin, False), (run, True)):
        one.model.train()
        loss = one.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        if interrupted:
            with torch.no_grad(), model.disable_adapter():
                torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        one.optimizer.step()
        one.engine.synchronize()
    ours, theirs = all_tensors(run.engine), all_tensors(twin.engine)
    for name, tensors in ours.items():
        assert torch.equal(tensors["weight"], theirs[name]["weight"]), name


def test_disabled_adapters_with_gradients_are_refused():
    run = prepare(_lora())
    with run.model.disable_adapter(), pytest.raises(StateError, match=r"torch\.no_grad"):
        run.model(input_ids=batches(1)[0])


# -- merging ----------------------------------------------------------------------------------------------------


def _merged_by_peft(model, **options):
    return dict(copy.deepcopy(model).merge_and_unload(**options).named_parameters())


@pytest.mark.parametrize(("safe_merge", "outside_state"), [(False, "GPU"), (True, "RAM")])
@pytest.mark.parametrize(
    ("dtype", "bf16"), [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)]
)
def test_merging_is_that_of_the_whole_weights(dtype, bf16, outside_state, safe_merge):
    """The split halves of an fp32 base and of its adapters are joined for it, bit for bit."""
    model = _lora(dtype, modules_to_save=["lm_head"])
    expected = _merged_by_peft(model, safe_merge=safe_merge)
    run = prepare(model, bf16=bf16, decisions=decide(resident=(2,), outside_state=outside_state))
    merged = model.merge_and_unload(safe_merge=safe_merge)
    states = {id(state.param): state for state in run.engine.states}
    for name, param in merged.named_parameters():
        assert torch.equal(states[id(param)].read_master(), expected[name]), name
    # It still streams, with the merged weights.
    live = merged.get_parameter("model.layers.0.mlp.down_proj.weight").dtype
    plain = tiny_llama(live)
    plain.load_state_dict({name: value.to(live) for name, value in expected.items()})
    tokens = batches(1)[0]
    with torch.no_grad():
        logits, wanted = merged(input_ids=tokens).logits, plain(input_ids=tokens).logits
    torch.testing.assert_close(logits, wanted, rtol=0.02, atol=0.02)
    assert run.engine.metrics.totals()["h2d_bytes"] > 0


def test_merged_weights_are_saved_in_their_dtype(tmp_path):
    model = _lora(torch.float32)
    expected = _merged_by_peft(model)
    run = prepare(model, bf16=True)
    save_exactly(model, run.engine)
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for name, param in loaded.named_parameters():
        assert param.dtype == torch.float32 and torch.equal(param, expected[name]), name


def test_merging_for_a_while_keeps_adapters_and_their_masters():
    """`merge_adapter` and `unmerge_adapter`: adapters are not written, so their masters stay as they are."""
    model = _lora(torch.float32)
    run = train(prepare(model, bf16=True), 2)
    before = all_tensors(run.engine)
    before = {
        name: {key: value.clone() for key, value in tensors.items()} for name, tensors in before.items()
    }
    model.merge_adapter()
    model.unmerge_adapter()
    for name, tensors in all_tensors(run.engine).items():
        if "lora_" in name:
            for key, value in tensors.items():
                assert torch.equal(value, before[name][key]), (name, key)
    train(run, 1)


# -- models that are only read --------------------------------------------------------------------------------------


def _read_only(model, **options):
    return SlideEngine(
        model, Setup(**{"device": torch.device("cpu"), "bf16": True, "read_only": True} | options)
    )


def test_a_read_only_model_has_weights_and_nothing_else():
    model = tiny_llama()
    sizes = [param.numel() for param in model.model.layers[0].parameters()]
    tokens = batches(1)[0]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    engine = _read_only(model)
    assert {item.what for item in engine.plan.items if item.nbytes} == {
        "slots",
        "resident weights",
        "weights",
    }
    assert engine.host_bytes == UNITS * _pages(sum(_padded(numel, 2) for numel in sizes))
    assert not any(param.requires_grad for param in model.parameters())
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits, expected)
    # Also with gradients on: there is nothing to differentiate.
    assert not model(input_ids=tokens).logits.requires_grad


def test_a_read_only_model_streams_whatever_the_gpu_could_hold():
    engine = _read_only(tiny_llama(), config=SlideConfig(gpu_memory="8GiB"))
    assert engine.plan.units == UNITS


def test_a_read_only_model_is_not_trained():
    model = tiny_llama()
    engine = _read_only(model)
    with pytest.raises(StateError, match="evaluation only"):
        engine.attach_optimizer(SlideAdamW(model.parameters()))


@pytest.mark.parametrize(
    ("dtype", "bf16"), [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)]
)
def test_a_reference_follows_the_trained_model_wherever_both_live(dtype, bf16):
    """In the dtype that the weights came in: the halves of fp32 masters move together."""
    model, other = tiny_llama(dtype), tiny_llama(dtype, seed=1)
    tokens = batches(1)[0]
    reference = _read_only(other, bf16=bf16)
    with torch.no_grad():
        other(input_ids=tokens)  # copies in the slots
    run = train(
        prepare(model, bf16=bf16, decisions=decide(resident=(0, 4), outside_state="RAM")), 2, autocast=bf16
    )
    expected = {}
    for state in reference.states:
        was = state.read_master().clone()
        expected[state.name] = was.mul_(1 - 0.3).add_(run.weights[state.name], alpha=0.3)
    follow(reference, run.engine, 0.3)
    for state in reference.states:
        assert torch.equal(state.read_master(), expected[state.name]), state.name
    plain = tiny_llama(other.dtype)
    plain.load_state_dict({name: value.to(other.dtype) for name, value in expected.items()})
    with torch.no_grad():
        logits, wanted = other(input_ids=tokens).logits, plain(input_ids=tokens).logits
    torch.testing.assert_close(logits, wanted, rtol=0.02, atol=0.02)


# -- what cannot stream ---------------------------------------------------------------------------------------------


def test_quantized_weights_are_refused():
    class Packed(torch.nn.Parameter):
        pass

    model = tiny_llama()
    mlp = model.model.layers[2].mlp
    mlp.up_proj.weight = Packed(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.2\.mlp\.up_proj\.weight is a Packed.* bfloat16"
    ):
        prepare(model)
