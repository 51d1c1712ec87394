"""`update="auto"` defers updates that could have overlapped once a model runs forward more than once a step."""

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_slideformer import SlideConfig, SlideTrainer
from hf_slideformer.engine.engine import engine_of
from hf_slideformer.errors import PlanError, StateError
from tests.engine.loop import all_tensors, assert_same_state, batches, decide, prepare, tiny_llama
from tests.trainer import runs

PLACES = {
    "streamed": {},
    "resident": {"decisions": decide(resident=range(6), keep=range(6), staging_buffers=0)},
    "mixed": {"decisions": decide(resident=(0, 2), keep=(5,), offload=(3,), staging_buffers=0)},
    "outside_in_ram": {"decisions": decide(outside_state="RAM", staging_buffers=0)},
    "state_on_disk": {"decisions": decide(on_disk=(1, 4), staging_buffers=0)},
}


def two_forwards(run, tokens):
    losses = [run.model(input_ids=part, labels=part, use_cache=False).loss for part in tokens]
    torch.stack(losses).sum().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return [loss.item() for loss in losses]


def trained(place, tmp_path, *, update, forwards=(1, 2, 1, 2), dtype=torch.bfloat16):
    on_disk = place == "state_on_disk"
    config = SlideConfig(update=update, nvme_dir=str(tmp_path) if on_disk else None)
    run = prepare(tiny_llama(dtype), config=config, overlap_is_exact=True, **PLACES[place])
    data = iter(batches(sum(forwards)))
    run.losses = [two_forwards(run, [next(data) for _ in range(count)]) for count in forwards]
    run.engine.synchronize()
    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("place", PLACES)
def test_a_second_forward_defers_for_good(place, dtype, tmp_path, caplog):
    ours = trained(place, tmp_path, update="auto", dtype=dtype)
    theirs = trained(place, tmp_path, update="deferred", dtype=dtype)
    assert not ours.engine.overlapped
    assert ours.losses == theirs.losses
    expected = all_tensors(theirs.engine)
    for name, tensors in all_tensors(ours.engine).items():
        assert_same_state(tensors, expected[name], name)
    assert caplog.text.count("updates are deferred, because model.layers.0 runs forward more than once") == 1
    assert ours.engine.plan.update == "deferred"
    assert [note for note in ours.engine.plan.notes if "deferred" in note] != []
    assert len(set(ours.engine.plan.notes)) == len(ours.engine.plan.notes)
    needed = {tier: ours.engine.plan.tier_bytes(tier) for tier in ("GPU", "RAM", "disk")}
    assert needed == {tier: theirs.engine.plan.tier_bytes(tier) for tier in needed}


def test_one_forward_a_step_stays_overlapped(tmp_path):
    run = trained("streamed", tmp_path, update="auto", forwards=(1, 1, 1))
    assert run.engine.overlapped and run.engine.plan.update == "overlapped"


def test_a_forward_without_a_backward_defers(tmp_path):
    """Someone looked at the loss before the step, with gradients on."""
    run = trained("streamed", tmp_path, update="auto", forwards=(1,))
    run.model(input_ids=batches(1)[0])
    two_forwards(run, batches(1))
    assert not run.engine.overlapped


def test_a_layer_that_is_in_the_model_twice(tmp_path):
    def make(update):
        model = tiny_llama(num_hidden_layers=3)
        model.model.layers = nn.ModuleList([*model.model.layers, model.model.layers[1]])
        model.config.num_hidden_layers = 4
        model.config.layer_types = ["full_attention"] * 4
        return prepare(model, config=SlideConfig(update=update), overlap_is_exact=True)

    results = []
    for update in ("auto", "deferred"):
        run = make(update)
        results.append([two_forwards(run, [tokens]) for tokens in batches(3)])
        assert not run.engine.overlapped
    assert results[0] == results[1]


def test_too_late_after_an_update(tmp_path):
    """Forward, backward, forward, backward: units have been updated when the second forward comes."""
    run = trained("streamed", tmp_path, update="auto", forwards=(1,))
    first, second = batches(2)
    run.model(input_ids=first, labels=first).loss.backward()
    loss = run.model(input_ids=second, labels=second).loss
    with pytest.raises(StateError, match=r"use SlideConfig\(update='deferred'\)"):
        loss.backward()
    assert run.engine.overlapped


def test_what_was_asked_for_is_refused_as_before(tmp_path):
    run = prepare(tiny_llama(), config=SlideConfig(update="overlapped"))
    with pytest.raises(StateError, match=r"ran forward 2 times .*use SlideConfig\(update='deferred'\)"):
        two_forwards(run, batches(2))


def test_too_little_memory_for_gradients_that_wait():
    def needs(update):
        plan = prepare(tiny_llama(), config=SlideConfig(update=update), overlap_is_exact=True).engine.plan
        return plan.tier_bytes("RAM") + plan.tier_bytes("GPU")

    between = (needs("auto") + needs("deferred")) // 2
    run = prepare(tiny_llama(), config=SlideConfig(cpu_memory=between), overlap_is_exact=True)
    two_forwards(run, batches(1))
    with pytest.raises(
        PlanError, match=r"The plan needs .* of RAM .*gradients.*may be used.*update='deferred'"
    ):
        two_forwards(run, batches(2))
    assert run.engine.overlapped


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_a_trainer_whose_loss_runs_the_model_twice(tmp_path, bf16):
    def twice(base):
        class Twice(base):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                one = model(**inputs)
                flipped = {key: value.flip(1) for key, value in inputs.items()}
                loss = one.loss + 0.5 * model(**flipped).loss
                return (loss, one) if return_outputs else loss

        return Twice

    trainers = []
    for base in (SlideTrainer, Trainer):
        model = runs.llama(torch.float32)
        trainers.append(runs.make(twice(base), model, tmp_path, max_grad_norm=0.0, bf16=bf16))
        trainers[-1].train()
    ours, theirs = trainers
    engine = engine_of(ours.model)
    assert not engine.overlapped
    if not bf16:
        runs.assert_same_logs(ours, theirs)
        runs.assert_same_weights(runs.masters(ours.model, engine), runs.masters(theirs.model))
    ours.train()
    assert engine_of(ours.model) is engine  # its settings are what they were
    ours.evaluate()
