"""A run whose optimizer state exceeds the RAM it may use goes on from disk, with the same numbers."""

import json
import os

import pytest
import torch

from hf_slideformer import SlideConfig, SlideTrainer
from hf_slideformer.errors import DiskError, PlanError

from . import runs

# State large enough that pages and the losses' temporary memory do not decide.
SHAPE = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 512}


def _trainer(tmp_path, name, slide_config, **arguments):
    model = runs.llama(seed=1, **SHAPE)
    return runs.make(
        SlideTrainer, model, tmp_path / name, trainer_kwargs={"slide_config": slide_config}, **arguments
    )


def _weights(trainer):
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """A run with all state in RAM, and the bytes that its plan has there."""
    trainer = _trainer(tmp_path_factory.mktemp("ram"), "out", SlideConfig(placement="stream"))
    needed = sum(trainer.slide.plan.peaks["train"][tier] for tier in ("GPU", "RAM"))
    trainer.train()
    return (
        needed,
        _weights(trainer),
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    )


@pytest.mark.parametrize(("share", "weights_too"), [(0.9, False), (0.7, False), (0.45, True)])
def test_less_ram_and_the_same_numbers(tmp_path, streamed, share, weights_too):
    needed, weights, losses = streamed
    disk = tmp_path / "disk"
    disk.mkdir()
    trainer = _trainer(tmp_path, "out", SlideConfig(cpu_memory=int(needed * share), nvme_dir=disk))
    plan = trainer.slide.plan
    assert plan.decisions.on_disk and bool(plan.decisions.weights_on_disk) == weights_too
    trainer.train()
    assert sum(plan.peaks["train"][tier] for tier in ("GPU", "RAM")) <= needed * share
    assert trainer.slide.engine.disk_bytes <= plan.peaks["train"]["disk"]
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == losses
    for name, weight in _weights(trainer).items():
        assert torch.equal(weight, weights[name]), name
    written = json.loads((tmp_path / "out" / "slideformer_plan.json").read_text())
    assert written["decisions"]["on_disk"] == list(plan.decisions.on_disk)
    assert "disk" in str(plan)
    assert os.listdir(disk) == []


def test_without_a_disk_the_same_budget_is_refused_and_the_disk_named(tmp_path, streamed):
    with pytest.raises(PlanError, match="nvme_dir"):
        _trainer(tmp_path, "out", SlideConfig(cpu_memory=int(streamed[0] * 0.7)))


def test_a_disk_is_not_used_where_ram_is_enough(tmp_path, streamed):
    plan = _trainer(tmp_path, "out", SlideConfig(cpu_memory=2 * streamed[0], nvme_dir=tmp_path)).slide.plan
    assert plan.decisions.on_disk == () and not plan.peaks["train"]["disk"]


def test_a_missing_directory_is_named_before_the_start(tmp_path, streamed):
    with pytest.raises(DiskError, match="missing"):
        _trainer(tmp_path, "out", SlideConfig(nvme_dir=tmp_path / "missing"))


def test_too_little_disk_is_refused_with_numbers(tmp_path, streamed):
    config = SlideConfig(cpu_memory=int(streamed[0] * 0.7), nvme_dir=tmp_path, nvme_memory="64KiB")
    with pytest.raises(PlanError, match=r"nvme_memory"):
        _trainer(tmp_path, "out", config)
