"""What SlideTrainer says and does about memory: the plan is shown, written, followed, and changes no number."""

import dataclasses
import json
import re

import pytest
import torch

from hf_slideformer import SlideAccelerator, SlideConfig, SlideTrainer
from hf_slideformer.engine.engine import engine_of
from hf_slideformer.errors import PlanError

from . import runs

SHAPE = {"num_hidden_layers": 6}


def _train(tmp_path, name, slide_config, **arguments):
    model = runs.llama(seed=1, **SHAPE)
    trainer = runs.make(
        SlideTrainer, model, tmp_path / name, trainer_kwargs={"slide_config": slide_config}, **arguments
    )
    trainer.train()
    return trainer


def _weights(trainer):
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


def _needed(tmp_path, **config):
    """GPU bytes of the plan that streams everything."""
    model = runs.llama(seed=1, **SHAPE)
    config = SlideConfig(placement="stream", gpu_memory="1GiB", **config)
    return runs.make(
        SlideTrainer, model, tmp_path / "plan", trainer_kwargs={"slide_config": config}
    ).slide.plan


def test_the_plan_fills_what_it_is_given_and_changes_no_bit(tmp_path):
    plain = _train(tmp_path, "stream", SlideConfig(placement="stream"))
    expected = _weights(plain)
    least = _needed(tmp_path).peaks["train"]["GPU"]
    stays = []
    for share in (1.02, 1.3, 1.8, 4.0):
        trainer = _train(tmp_path, str(share), SlideConfig(gpu_memory=int(least * share)))
        plan = trainer.slide.plan
        assert plan.peaks["train"]["GPU"] <= least * share
        stays.append(len(plan.decisions.resident) + plan.decisions.kept)
        for name, weight in _weights(trainer).items():
            assert torch.equal(weight, expected[name]), (share, name)
    assert stays == sorted(stays) and stays[0] < stays[-1]


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
def test_activations_are_treated_as_the_user_says(tmp_path, activations):
    trainer = _train(tmp_path, activations, SlideConfig(activations=activations))
    assert set(trainer.slide.plan.decisions.activations) == {activations}
    expected = _weights(_train(tmp_path, "stream", SlideConfig(placement="stream")))
    for name, weight in _weights(trainer).items():
        assert torch.equal(weight, expected[name]), name


def test_the_plan_is_written_beside_the_outputs_and_shown(tmp_path, capsys):
    trainer = _train(tmp_path, "out", SlideConfig(gpu_memory="1GiB"), disable_tqdm=False)
    written = json.loads((tmp_path / "out" / "slideformer_plan.json").read_text())
    assert written == json.loads(json.dumps(trainer.slide.plan.as_dict()))
    assert str(trainer.slide.plan) in capsys.readouterr().out
    assert "tokens/s" in str(trainer.slide.plan)


def test_without_progress_bars_nothing_is_printed(tmp_path, capsys):
    _train(tmp_path, "out", SlideConfig(), disable_tqdm=True)
    assert "training state" not in capsys.readouterr().out


def test_the_plan_counts_on_the_longest_sample(tmp_path):
    plan = _needed(tmp_path)
    assert (plan.batch_size, plan.seq_len) != (None, None)
    longer = _needed(tmp_path, seq_len=8 * plan.seq_len)
    assert longer.peaks["train"]["GPU"] > 1.5 * plan.peaks["train"]["GPU"]
    assert any("as seq_len says" in note for note in longer.notes)


def test_what_does_not_fit_is_refused_with_a_remedy_that_helps(tmp_path):
    config = SlideConfig(gpu_memory=int(_needed(tmp_path).peaks["train"]["GPU"] * 0.95), activations="keep")

    def make(batch_size, config):
        model = runs.llama(seed=1, **SHAPE)
        how = {"per_device_train_batch_size": batch_size, "trainer_kwargs": {"slide_config": config}}
        return runs.make(SlideTrainer, model, tmp_path / "out", **how)

    with pytest.raises(PlanError, match=r"of GPU .*may be used\.") as caught:
        make(2, config)
    message = str(caught.value)
    remedies = {
        "activations='auto'": lambda: make(2, dataclasses.replace(config, activations="auto")),
        "optimizer_states='8bit'": lambda: make(2, dataclasses.replace(config, optimizer_states="8bit")),
        "batch_size=1": lambda: make(1, config),
    }
    helpful = [
        name
        for name in remedies
        if re.search(rf"With {re.escape(name)} [^.]*\.\d\d \wiB of GPU, which", message)
    ]
    assert helpful, message
    for name, remedy in remedies.items():
        if name in helpful:
            remedy()
        elif f"With {name} " in message:
            with pytest.raises(PlanError):
                remedy()


def test_evaluation_first_then_training(tmp_path):
    """The engine that evaluation made has room for what training adds."""
    model = runs.llama(seed=1, **SHAPE)
    trainer = runs.make(
        SlideTrainer, model, tmp_path / "out", trainer_kwargs={"slide_config": SlideConfig(gpu_memory="1GiB")}
    )
    trainer.evaluate()
    assert trainer.slide.plan.update == "none"
    trainer.train()
    assert trainer.slide.plan.update == "deferred"
    expected = _weights(_train(tmp_path, "stream", SlideConfig(placement="stream")))
    for name, weight in _weights(trainer).items():
        assert torch.equal(weight, expected[name]), name


def test_an_engine_made_for_evaluation_refuses_training_that_does_not_fit(tmp_path):
    model = runs.llama(seed=1, **SHAPE)
    weights = sum(param.nbytes for param in model.parameters())
    trainer = runs.make(SlideTrainer, model, tmp_path / "out", trainer_kwargs={})
    trainer._slide_config = SlideConfig(cpu_memory=3 * weights)
    trainer._configure_accelerator()
    trainer.evaluate()
    with pytest.raises(PlanError, match="moments"):
        trainer.train()


@pytest.mark.parametrize("together", [True, False])
def test_a_loop_of_ones_own_is_planned_for_its_data_loader(together):
    """A data loader that is prepared with the model, or before it, says what batches are like."""
    accelerator = SlideAccelerator(cpu=True)
    accelerator.configure_slide(SlideConfig(gpu_memory="1GiB"), micro_batches=1, overlap_is_exact=False)
    model = runs.llama(seed=1, **SHAPE)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = torch.utils.data.DataLoader(runs.Tokens(length=20), batch_size=3)
    if together:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    else:
        loader = accelerator.prepare(loader)
        model, optimizer = accelerator.prepare(model, optimizer)
    plan = engine_of(model).plan
    assert (plan.batch_size, plan.seq_len) == (3, 20)


def test_a_loop_without_a_data_loader_streams_and_says_why():
    accelerator = SlideAccelerator(cpu=True)
    accelerator.configure_slide(SlideConfig(gpu_memory="1GiB"), micro_batches=1, overlap_is_exact=False)
    model = runs.llama(seed=1, **SHAPE)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    plan = engine_of(model).plan
    assert plan.units == 6 and plan.batch_size is None
    assert any("prepare the data loader together with the model" in note for note in plan.notes)


@pytest.mark.gpu
def test_the_plan_is_kept_on_a_gpu(tmp_path, deterministic):
    """Same bits as streaming everything, and a peak within the plan, whatever the budget."""
    shape = {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    }
    how = {"use_cpu": False, "bf16": True, "per_device_train_batch_size": 4}

    def train(name, config):
        model = runs.llama(torch.bfloat16, seed=1, **shape)
        trainer = runs.make(
            SlideTrainer, model, tmp_path / name, trainer_kwargs={"slide_config": config}, **how
        )
        trainer.train_dataset = runs.Tokens(16, length=1024)
        trainer.accelerator.count_on_batches(trainer.train_dataset, 4, model)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.train()
        return trainer, torch.cuda.max_memory_allocated() - before

    streamed, _ = train("stream", SlideConfig(placement="stream"))
    expected = {name: weight.cpu() for name, weight in _weights(streamed).items()}
    least = streamed.slide.plan.peaks["train"]["GPU"]
    kinds = set()
    for budget in (int(1.3 * least) + 2**28, int(2.0 * least) + 2**28, None):
        trainer, peak = train(str(budget), SlideConfig(gpu_memory=budget))
        plan = trainer.slide.plan
        assert peak <= plan.peaks["train"]["GPU"] <= plan.budgets["GPU"]
        kinds.add((len(plan.decisions.resident), plan.decisions.activations))
        for name, weight in _weights(trainer).items():
            assert torch.equal(weight.cpu(), expected[name]), (budget, name)
    assert len(kinds) > 1
