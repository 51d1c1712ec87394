"""`SlideAccelerator` by itself: where its settings come from, and what it refuses when it is made."""

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend

from hf_slideformer import SlideAccelerator, SlideConfig, SlideFormerPlugin
from hf_slideformer.accelerator import check_environment
from hf_slideformer.config import CONFIG_VARIABLE
from hf_slideformer.engine.engine import engine_of
from hf_slideformer.errors import ConfigError, UnsupportedModelError
from tests.trainer import runs


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps precision and plugins for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(**options):
    loop = runs.plain_loop()
    model, _ = SlideAccelerator(cpu=True, **options).prepare(loop.model, loop.optimizer)
    return engine_of(model).config


@pytest.mark.parametrize("config", [SlideConfig(trace_steps=3), {"trace_steps": 3}])
def test_plugins_settings_reach_the_engine(config, monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, '{"trace_steps": 2}')
    assert prepared(slideformer_plugin=SlideFormerPlugin(config)).trace_steps == 3


def test_launchers_settings_reach_the_engine(monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, '{"trace_steps": 2}')
    assert prepared().trace_steps == 2
    assert prepared(slideformer_plugin=SlideFormerPlugin()).trace_steps == 2


def test_defaults(monkeypatch):
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert prepared() == SlideConfig()


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ('{"gpu_memry": 1}', "did you mean 'gpu_memory'")]
)
def test_launchers_settings_are_checked(text, message, monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{CONFIG_VARIABLE}.*{message}|{message}.*"):
        SlideAccelerator(cpu=True)


def test_compilation_is_refused():
    with pytest.raises(UnsupportedModelError, match="dynamo_backend"):
        SlideAccelerator(cpu=True, dynamo_backend=DynamoBackend.EAGER)


@pytest.mark.parametrize(
    "kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM]
)
def test_other_placements_are_refused(kind):
    accelerator = SlideAccelerator(cpu=True)
    accelerator.state.distributed_type = kind
    with pytest.raises(UnsupportedModelError, match="Megatron-LM; remove"):
        check_environment(accelerator)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fsdp_plugin": object()}, "fsdp_plugin; leave it out"),
        ({"parallelism_config": object()}, "parallelism_config"),
        ({"mixed_precision": "fp16"}, "'fp16' is not supported"),
        ({"mixed_precision": "fp8"}, "'fp8' is not supported"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_refused_when_made(asked, message):
    with pytest.raises(UnsupportedModelError, match=message):
        SlideAccelerator(cpu=True, **asked)


def test_precision_is_the_accelerators():
    assert SlideAccelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
    loop = runs.plain_loop()
    accelerator = SlideAccelerator(cpu=True, mixed_precision="bf16")
    model, _ = accelerator.prepare(loop.model, loop.optimizer)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
