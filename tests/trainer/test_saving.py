"""What a streamed model gives to saving code: every tensor, its own storage, in the dtype it came in."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_slideformer import SlideTrainer
from hf_slideformer.engine.engine import engine_of
from hf_slideformer.errors import UnsupportedModelError

from . import runs

# Load dtype and `bf16`; the last one is trained as split masters and must come out as fp32.
PRECISIONS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, True),
    "bf16_from_fp32": (torch.float32, True),
}


@pytest.fixture(scope="module", params=[(p, tied) for p in PRECISIONS for tied in (False, True)], ids=str)
def trained(request, tmp_path_factory):
    """A trainer after two steps, shared by the tests of this module, which only read."""
    precision, tied = request.param
    dtype, bf16 = PRECISIONS[precision]
    model = runs.llama(dtype, tie_word_embeddings=tied)
    trainer = runs.make(SlideTrainer, model, tmp_path_factory.mktemp("run"), bf16=bf16, max_steps=2)
    trainer.train()
    return trainer


def _expected(trainer):
    """All tensors by name in the dtypes they came in; a tied head has no entry of its own."""
    return runs.masters(trainer.model, trainer.slide.engine)


def test_state_dict_shares_memory_with_the_weights(trained):
    state = trained.model.state_dict()
    assert state.keys() == runs.llama().state_dict().keys()
    for name, tensor in state.items():
        param = trained.model.get_parameter(name)
        assert tensor.data_ptr() == param.data_ptr(), name
        assert tensor.shape == param.shape, name
        # One storage per tensor: code that saves takes tensors of one storage for tied weights, or writes all of it.
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
    pointers = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert len(pointers) == len(list(trained.model.parameters()))


def test_torch_save_writes_each_tensor_once(trained, tmp_path):
    torch.save(trained.model.state_dict(), tmp_path / "state.pt")
    payload = sum(value.numel() * value.element_size() for value in _expected(trained).values())
    assert (tmp_path / "state.pt").stat().st_size < 1.25 * payload + 20_000


def _assert_loads_exactly(directory, trainer):
    loaded, report = LlamaForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    runs.assert_same_weights(runs.masters(loaded), _expected(trainer), atol=0)
    tied = trainer.model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_save_model_of_the_trainer(trained, tmp_path):
    trained.save_model(tmp_path)
    _assert_loads_exactly(tmp_path, trained)


def test_save_pretrained_on_the_live_model(trained, tmp_path):
    trained.model.save_pretrained(tmp_path)
    _assert_loads_exactly(tmp_path, trained)


def test_accelerator_save_model(trained, tmp_path):
    trained.accelerator.save_model(trained.model, tmp_path)
    saved, expected = load_file(tmp_path / "model.safetensors"), _expected(trained)
    # Of tied tensors only one name is written; which one is Accelerate's choice.
    if trained.model.config.tie_word_embeddings and "lm_head.weight" in saved:
        saved["model.embed_tokens.weight"] = saved.pop("lm_head.weight")
    runs.assert_same_weights(saved, expected, atol=0)


def test_accelerator_state_dict(trained):
    state, expected = trained.accelerator.get_state_dict(trained.model), _expected(trained)
    assert state.keys() == trained.model.state_dict().keys()
    if trained.model.config.tie_word_embeddings:
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
        del state["lm_head.weight"]
    runs.assert_same_weights(state, expected, atol=0)


def test_save_load_state_of_accelerate(trained, tmp_path):
    """`save_state` writes everything that `load_state` needs to undo changes."""
    before = _expected(trained)
    moments = copy.deepcopy(trained.optimizer.optimizer.state_dict()["state"])
    trained.accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for param in trained.model.parameters():
            param.add_(1.0)
    for values in trained.optimizer.optimizer.state_dict()["state"].values():
        values["exp_avg"].zero_()
    trained.accelerator.load_state(str(tmp_path))
    runs.assert_same_weights(_expected(trained), before, atol=0)
    restored = trained.optimizer.optimizer.state_dict()["state"]
    assert all(
        torch.equal(restored[index]["exp_avg"], values["exp_avg"]) for index, values in moments.items()
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_8bit_moments_change_nothing_about_saved_weights(tmp_path, precision):
    dtype, bf16 = PRECISIONS[precision]
    trainer = runs.make(
        SlideTrainer,
        runs.llama(dtype),
        tmp_path,
        trainer_kwargs={"slide_config": {"optimizer_states": "8bit"}},
        bf16=bf16,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    _assert_loads_exactly(tmp_path / "checkpoint-2", trainer)
    trainer.model.save_pretrained(tmp_path / "live")
    _assert_loads_exactly(tmp_path / "live", trainer)
    # The optimizer's state is written as it is: two bytes an element, and 8 for each block that has begun.
    folder = tmp_path / "checkpoint-2" / "optimizer"
    saved = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    params = list(trainer.model.parameters())
    assert sum(name.endswith(".exp_avg") for name in saved) == len(params)
    nbytes = sum(tensor.nbytes for name, tensor in saved.items() if "exp_avg" in name)
    assert nbytes == sum(2 * param.numel() + 8 * -(-param.numel() // 128) for param in params)


@pytest.mark.parametrize("part", ["model", "layer"])
def test_pickling_is_refused(tmp_path, part):
    model = runs.slide_loop().model
    whole = model if part == "model" else model.model.layers[0]
    for write in (pickle.dumps, lambda value: torch.save(value, tmp_path / "model.pt")):
        with pytest.raises(UnsupportedModelError, match="save_pretrained"):
            write(whole)


@pytest.mark.parametrize("part", ["", "model", "model.layers", "model.layers.3", "model.layers.3.mlp"])
def test_state_dict_waits_for_updates(part):
    loop = runs.slide_loop(delays={"update": runs.slow(0.02)})
    loop.loss(runs.batches(1)[0]).backward()
    loop.optimizer.step()
    module = loop.model.get_submodule(part)
    seen = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loop.engine.synchronize()
    runs.assert_same_weights(seen, module.state_dict(), atol=0)


# -- deepcopy ------------------------------------------------------------------------------------------------


def _logits(model, *, bf16=False):
    model.eval()
    bf16 = bf16 or model.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=runs.batches(1)[0]).logits.float()


@pytest.mark.parametrize(
    ("precision", "when"), [("fp32", "before_training"), *((name, "after_training") for name in PRECISIONS)]
)
def test_deepcopy_is_an_independent_model(tmp_path, precision, when):
    dtype, bf16 = PRECISIONS[precision]
    trainer = runs.make(SlideTrainer, runs.llama(dtype), tmp_path, bf16=bf16, max_steps=2)
    trainer.evaluate() if when == "before_training" else trainer.train()
    copied = copy.deepcopy(trainer.model)
    assert engine_of(copied) is None
    live = {param.data_ptr() for param in trainer.model.parameters()}
    assert not live & {param.data_ptr() for param in copied.parameters()}
    as_loaded = runs.llama(dtype)
    as_loaded.load_state_dict(runs.masters(trainer.model, trainer.slide.engine))
    # Trainer's autocast is copied with the model.
    live, expected = _logits(trainer.model), _logits(as_loaded, bf16=bf16)
    assert torch.equal(_logits(copied), expected)
    assert (
        torch.equal(live, expected) or precision == "bf16_from_fp32"
    )  # whose copy has an fp32 residual stream

    trainer.train()
    assert not torch.equal(_logits(trainer.model), live)
    assert torch.equal(_logits(copied), expected)

    # It trains by itself: all gradients are its own, and the original's weights stay.
    before = runs.masters(trainer.model, trainer.slide.engine)
    copied.train()
    copied(input_ids=runs.batches(1)[0], labels=runs.batches(1)[0]).loss.backward()
    assert all(param.grad is not None for param in copied.parameters())
    torch.optim.SGD(copied.parameters(), lr=1.0).step()
    assert not torch.equal(_logits(copied), expected)
    runs.assert_same_weights(runs.masters(trainer.model, trainer.slide.engine), before, atol=0)


@pytest.mark.parametrize("part", ["model", "layer"])
def test_deepcopy_waits_for_updates(part):
    loop = runs.slide_loop(delays={"update": runs.slow(0.02)})
    loop.loss(runs.batches(1)[0]).backward()
    loop.optimizer.step()
    original = loop.model if part == "model" else loop.model.model.layers[3]
    copied = copy.deepcopy(original)
    loop.engine.synchronize()
    runs.assert_same_weights(runs.masters(copied), runs.masters(original), atol=0)


def test_a_copy_can_be_pickled():
    copied = copy.deepcopy(runs.slide_loop().model)
    restored = pickle.loads(pickle.dumps(copied))
    assert torch.equal(_logits(restored), _logits(copied))


def test_a_copy_can_be_streamed_itself():
    first = runs.slide_loop()
    second = runs.slide_loop(copy.deepcopy(first.model))
    for loop in (first, second):
        loop.loss(runs.batches(1)[0]).backward()
        loop.optimizer.step()
    runs.assert_same_weights(first.weights(), second.weights(), atol=0)
