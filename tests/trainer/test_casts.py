"""Casting or moving a streamed model, and then saving or using it: what plain Trainer's model would be."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_slideformer import SlideConfig, SlideTrainer
from hf_slideformer.engine.engine import engine_of
from hf_slideformer.engine.model.setup import Setup
from hf_slideformer.errors import StateError
from tests.engine.loop import decide
from tests.trainer import runs


def trained(tmp_path, trainer_class=SlideTrainer, dtype=torch.float32, **overrides):
    options = {"max_steps": 2, "bf16": True, "learning_rate": 1e-4} | overrides
    trainer = runs.make(trainer_class, runs.llama(dtype), tmp_path, **options)
    trainer.train()
    return trainer


CASTS = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "method_bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "device_and_dtype": lambda model: model.to(device="cpu", dtype=torch.float16),
    "like_a_tensor": lambda model: model.to(torch.empty(1, dtype=torch.float64)),
    "type": lambda model: model.type(torch.float16),
    "inner_model": lambda model: (model.model.to(torch.float16), model)[1],
    "a_layer": lambda model: (model.model.layers[1].double(), model)[1],
    "head": lambda model: (model.lm_head.to(torch.bfloat16), model)[1],
    "norms_one_by_one": lambda model: (
        [m.half() for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"],
        model,
    )[1],
    "twice": lambda model: model.half().float(),
    "nothing": lambda model: model.to("cpu").cpu(),
}


@pytest.mark.parametrize("name", CASTS)
def test_saved_weights(tmp_path, name):
    trainer = trained(tmp_path)
    trainer.save_model(tmp_path / "exact")
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    plain = runs.llama()
    plain.load_state_dict(exact)
    for model, path in ((plain, tmp_path / "plain"), (trainer.model, tmp_path / "slide")):
        CASTS[name](model).save_pretrained(path)
    ours, theirs = (load_file(tmp_path / kind / "model.safetensors") for kind in ("slide", "plain"))
    assert {key: value.dtype for key, value in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    dtypes = [
        json.loads((tmp_path / kind / "config.json").read_text())["dtype"] for kind in ("slide", "plain")
    ]
    assert dtypes[0] == dtypes[1]


def test_bf16_weights_cast_to_fp32_are_what_they_were_saved_as(tmp_path):
    model = trained(tmp_path, dtype=torch.bfloat16).model
    model.save_pretrained(tmp_path / "bf16")
    saved = load_file(tmp_path / "bf16" / "model.safetensors")
    model.float()
    assert all(torch.equal(param, saved[name].float()) for name, param in model.named_parameters())


@pytest.mark.parametrize("cast", ["half", "float"])
def test_state_dict_and_forward_after_a_cast(tmp_path, cast):
    trainer = trained(tmp_path)
    getattr(trainer.model, cast)()
    plain = runs.llama()
    getattr(plain, cast)()
    plain.load_state_dict(trainer.model.state_dict())
    tokens = runs.batches(1)[0]
    # Accelerate's wrapper of the forward, which plain Trainer leaves there too, computes in bf16.
    forward = trainer.model.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    assert torch.equal(forward(trainer.model, tokens).logits, plain(tokens).logits)


def test_trainer_goes_on_evaluating_and_saving(tmp_path):
    results = []
    for trainer_class in (SlideTrainer, Trainer):
        trainer = trained(tmp_path, trainer_class, bf16=False)
        trainer.model.to(torch.bfloat16)
        results.append(trainer.evaluate()["eval_loss"])
        trainer.save_model(tmp_path / "saved")
        assert load_file(tmp_path / "saved" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_a_call_that_changes_nothing_keeps_the_engine(tmp_path):
    trainer = trained(tmp_path, dtype=torch.bfloat16)
    model, engine = trainer.model, trainer.slide.engine
    model.to(engine.device)
    model.to(torch.bfloat16).bfloat16().cpu()
    model.model.layers.to("cpu")
    assert engine_of(model) is engine
    trainer.train()


def test_a_part_without_weights_is_cast_alone(tmp_path):
    trainer = trained(tmp_path)
    trainer.model.model.rotary_emb.to(torch.float64)
    assert trainer.model.model.rotary_emb.inv_freq.dtype == torch.float64
    assert trainer.slide.engine is not None


def test_other_peoples_parameters_are_moved_where_the_engines_stay(tmp_path):
    """The call changes nothing of the engine's, but something of a module that was added since."""
    trainer = trained(tmp_path, dtype=torch.bfloat16)
    model, engine = trainer.model, trainer.slide.engine
    added = nn.Linear(2, 2)
    model.model.layers[0].added = added
    places = [param.data_ptr() for param in model.model.layers[1].parameters()]
    model.to(torch.bfloat16)
    assert added.weight.dtype == torch.bfloat16
    assert engine_of(model) is engine
    assert places == [param.data_ptr() for param in model.model.layers[1].parameters()]


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_in_a_callback(tmp_path, cast):
    class Cast(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            getattr(model, cast)()

    trainer = runs.make(
        SlideTrainer, runs.llama(), tmp_path, bf16=True, trainer_kwargs={"callbacks": [Cast()]}
    )
    with pytest.raises(StateError, match=r"while it is trained \(it was cast or moved"):
        trainer.train()
    getattr(trainer.model, cast)()  # and once training is over it is done
    assert trainer.slide.engine is None


def test_in_a_callback_to_what_it_came_in_as(tmp_path):
    class Cast(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.float()

    def logs(callbacks):
        trainer = runs.make(
            SlideTrainer, runs.llama(), tmp_path, bf16=True, trainer_kwargs={"callbacks": callbacks}
        )
        trainer.train()
        return runs.logged(trainer), runs.masters(trainer.model, trainer.slide.engine)

    ours, theirs = logs([Cast()]), logs([])
    assert ours[0] == theirs[0]
    runs.assert_same_weights(ours[1], theirs[1], atol=0)


def test_between_backward_and_step_the_step_is_refused():
    loop = runs.slide_loop(bf16=True)
    loop.loss(runs.batches(1)[0]).backward()
    loop.model.half()
    with pytest.raises(StateError, match="it was cast or moved.*make a new optimizer"):
        loop.optimizer.step()


def test_copies_cast_without_the_original(tmp_path):
    trainer = trained(tmp_path)
    copied = copy.deepcopy(trainer.model).half()
    assert {param.dtype for param in copied.parameters()} == {torch.float16}
    assert trainer.slide.engine is not None
    assert "float16" not in {str(param.dtype) for param in trainer.model.parameters()}


@pytest.mark.parametrize(
    "decisions",
    [decide(resident=(0, 2), units=4), decide(on_disk=(1, 2), units=4), decide(outside_state="RAM", units=4)],
    ids=["resident", "on_disk", "outside_in_ram"],
)
def test_wherever_state_is(tmp_path, decisions):
    from hf_slideformer.engine.engine import SlideEngine

    model = runs.llama()
    expected = runs.masters(model)
    SlideEngine(
        model,
        Setup(
            device=torch.device("cpu"),
            bf16=True,
            config=SlideConfig(nvme_dir=str(tmp_path)) if decisions.on_disk else SlideConfig(),
        ),
        decisions=decisions,
    )
    runs.assert_same_weights(runs.masters(model.float()), expected, atol=0)


def test_sharing_memory(tmp_path):
    model = trained(tmp_path).model
    model.share_memory()
    assert all(param.is_shared() for param in model.parameters())
    assert engine_of(model) is None
