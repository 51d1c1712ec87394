"""A model that leaves its engine is an ordinary one: whole weights, its own methods, and nothing of the engine."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

from hf_slideformer import SlideConfig
from hf_slideformer.engine.engine import engine_of, engines_of
from hf_slideformer.errors import StateError
from tests.engine.loop import all_tensors, batches, decide, prepare, step, tiny_llama, train

EVERYTHING = range(6)
PLACES = {
    "streamed": (torch.float32, {}),
    "came_in_bf16": (torch.bfloat16, {}),
    "resident": (torch.float32, {"decisions": decide(resident=EVERYTHING, keep=EVERYTHING)}),
    "outside_in_ram": (torch.float32, {"decisions": decide(resident=(1, 4), outside_state="RAM")}),
    "state_on_disk": (torch.float32, {"decisions": decide(on_disk=(0, 3, 5))}),
    "weights_on_disk": (torch.float32, {"decisions": decide(on_disk=EVERYTHING, weights_on_disk=(2, 5))}),
    "overlapped": (torch.float32, {"overlap_is_exact": True}),
    "accumulates": (torch.bfloat16, {"accumulates": True}),
    "plain_fp32": (torch.float32, {"bf16": False}),
}


def trained(place, tmp_path, **more):
    dtype, how = PLACES[place]
    on_disk = how.get("decisions") is not None and how["decisions"].on_disk
    config = SlideConfig(nvme_dir=str(tmp_path)) if on_disk else SlideConfig()
    run = prepare(tiny_llama(dtype), config=config, **how, **more)
    micro_batches = 2 if how.get("accumulates") else 1
    max_norm = None if how.get("overlap_is_exact") else 1.0
    return train(run, 2, max_norm=max_norm, micro_batches=micro_batches)


def left_on(model):
    """What an engine could leave on a model."""
    methods = {key for module in model.modules() for key in ("forward", "_apply") if key in module.__dict__}
    hooks = sum(
        len(getattr(module, name))
        for module in model.modules()
        for name in (
            "_forward_pre_hooks",
            "_state_dict_pre_hooks",
            "_load_state_dict_pre_hooks",
            "_load_state_dict_post_hooks",
        )
    )
    of_params = [
        p for p in model.parameters() if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
    ]
    return methods, hooks, of_params


@pytest.mark.parametrize("place", PLACES)
def test_weights_are_whole_and_nothing_is_left(place, tmp_path):
    run = trained(place, tmp_path)
    step(run, batches(2)[-1:], max_norm=None)  # an update is pending
    run.engine.synchronize()
    expected = {}
    for states in run.engine.states_by_unit():
        with run.engine.state_in_memory(states):
            expected |= {state.name: state.read_master().clone() for state in states}
    run.engine.release()
    dtype = PLACES[place][0]
    assert {param.dtype for param in run.model.parameters()} == {dtype}
    assert {
        name: torch.equal(p, expected[name]) for name, p in run.model.named_parameters()
    } == dict.fromkeys(expected, True)
    assert left_on(run.model) == (set(), 0, [])
    assert all(param.grad is None for param in run.model.parameters())
    assert engine_of(run.model) is None
    assert run.engine.host_state_bytes <= 4096 * 16  # a page for each unit that had memory
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["streamed", "state_on_disk", "plain_fp32"])
def test_it_computes_saves_and_copies_as_a_model_that_was_never_prepared(place, tmp_path):
    run = trained(place, tmp_path)
    run.engine.release()
    plain = tiny_llama(torch.float32)
    plain.load_state_dict(run.model.state_dict())
    tokens = batches(1)[0]
    outputs = [
        model(input_ids=tokens, labels=tokens) for model in (run.model, plain, copy.deepcopy(run.model))
    ]
    assert outputs[0].loss == outputs[1].loss == outputs[2].loss
    outputs[0].loss.backward()
    assert all(param.grad.dtype == torch.float32 for param in run.model.parameters())
    restored = pickle.loads(pickle.dumps(run.model))
    assert torch.equal(restored.lm_head.weight, plain.lm_head.weight)


@pytest.mark.parametrize("announced", [True, False])
def test_gradients_of_a_model_that_accumulated_have_its_dtype_again(announced, tmp_path):
    run = trained("accumulates" if announced else "came_in_bf16", tmp_path)
    for micro_batches in (2, 1):
        step(run, batches(micro_batches), max_norm=None)
    run.engine.release()
    model = run.model.to(torch.float16)
    tokens = batches(1)[0]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert {param.grad.dtype for param in model.parameters()} == {torch.float16}


def test_threads_end_and_memory_is_let_go_of(tmp_path):
    before = set(threading.enumerate())
    run = trained("streamed", tmp_path)
    assert len(set(threading.enumerate()) - before) == 3
    run.engine.release()
    assert set(threading.enumerate()) == before
    engine = weakref.ref(run.engine)
    run.engine = None
    gc.collect()
    assert engine() is None  # although model and optimizer are there


def test_the_optimizer_says_why_it_has_no_state(tmp_path):
    run = trained("streamed", tmp_path)
    run.engine.release("somebody asked for it")
    for use in (run.optimizer.step, run.optimizer.state_dict):
        with pytest.raises(StateError, match=r"left the engine: somebody asked for it; make a new optimizer"):
            use()
    run.optimizer.zero_grad()


def test_a_backward_that_comes_too_late_is_refused(tmp_path):
    run = trained("streamed", tmp_path)
    tokens = batches(1)[0]
    loss = run.model(input_ids=tokens, labels=tokens).loss
    run.engine.release()
    with pytest.raises(StateError, match="left its engine, because release.* run forward again"):
        loss.backward()


def test_it_can_be_prepared_again(tmp_path):
    """And goes on like a run that was never interrupted, if its optimizer does."""
    run, other = trained("streamed", tmp_path), trained("streamed", tmp_path)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.engine.release()
    again = prepare(run.model)
    again.optimizer.load_state_dict(saved)
    train(again, 2, seed=11)
    train(other, 2, seed=11)
    assert again.losses == other.losses[2:]
    assert all_tensors(again.engine).keys() == all_tensors(other.engine).keys()
    for name, weight in again.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def test_memory_that_was_given_by_hand_stays(tmp_path):
    run = trained("streamed", tmp_path)
    param = run.model.model.layers[2].mlp.up_proj.weight
    param.data = torch.full(param.shape, 0.5)
    run.engine.release()
    assert param.dtype == torch.float32 and bool((param == 0.5).all())


def test_somebody_elses_wrapper_around_a_unit_stays(tmp_path):
    run = trained("plain_fp32", tmp_path)
    layer, calls = run.model.model.layers[1], []
    inner = layer.forward

    def counting(*args, **kwargs):
        calls.append(args)
        return inner(*args, **kwargs)

    layer.forward = counting
    run.engine.release()
    assert torch.isfinite(run.model(input_ids=batches(1)[0]).logits).all()
    assert len(calls) == 1


def test_an_engine_whose_update_failed_keeps_its_model():
    run = prepare(tiny_llama(), delays={"update": lambda label: 1 / 0 if "layers.3" in label else 0.0})
    run.engine._runtime.failure.note(ValueError("a kernel failed"))
    with pytest.raises(StateError, match=r"cannot \(an update failed .*a kernel failed.*load the model anew"):
        run.engine.release("it was cast")
    assert engine_of(run.model) is run.engine


def test_too_little_ram_is_said_before_anything_changes(monkeypatch, tmp_path):
    run = trained("state_on_disk", tmp_path)
    monkeypatch.setattr("hf_slideformer.engine.engine.available_ram_bytes", lambda: -(10**9))
    before = {param.data_ptr() for param in run.model.parameters()}
    with pytest.raises(StateError, match=r"weights take 0\.00 GiB of RAM.*load the model anew"):
        run.engine.release()
    assert {param.data_ptr() for param in run.model.parameters()} == before
    train(run, 1)


def test_released_twice(tmp_path):
    run = trained("streamed", tmp_path)
    run.engine.release()
    before = {param.data_ptr() for param in run.model.parameters()}
    run.engine.release()
    assert {param.data_ptr() for param in run.model.parameters()} == before


def test_engines_of_parts(tmp_path):
    runs = [prepare(tiny_llama(seed=seed)) for seed in (1, 2)]
    both = torch.nn.ModuleList([run.model for run in runs])
    assert engines_of(both) == [run.engine for run in runs]
