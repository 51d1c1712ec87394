"""A model whose parameters or settings changed since it was prepared is prepared anew; training goes on as plain."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_slideformer import SlideAccelerator, SlideTrainer
from hf_slideformer.engine.engine import engine_of
from hf_slideformer.errors import StateError
from tests.trainer import runs


def lora(model, **options):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))


def unfreeze_some(model):
    model.model.layers[1].requires_grad_(True)
    return model


def freeze_embeddings(model):
    model.get_input_embeddings().requires_grad_(False)
    return model


def resize(model):
    torch.manual_seed(4)
    model.resize_token_embeddings(runs.VOCAB + 6)
    return model


def tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def drop_a_layer(model):
    model.model.layers = nn.ModuleList(model.model.layers[:-1])
    model.config.num_hidden_layers -= 1
    return model


def new_head(model):
    torch.manual_seed(6)
    model.lm_head = nn.Linear(model.config.hidden_size, runs.VOCAB, bias=False)
    return model


def frozen_layers():
    model = runs.llama()
    model.model.layers.requires_grad_(False)
    return model


def write_by_hand(model):
    param = model.model.layers[0].mlp.up_proj.weight
    param.data = param.data * 0.5
    return model


CHANGES = {
    "unfreeze": (frozen_layers, unfreeze_some),
    "freeze": (runs.llama, freeze_embeddings),
    "resize": (runs.llama, resize),
    "tie": (runs.llama, tie),
    "untie": (lambda: runs.llama(tie_word_embeddings=True), untie),
    "drop_a_layer": (runs.llama, drop_a_layer),
    "new_head": (runs.llama, new_head),
    "memory_replaced": (runs.llama, write_by_hand),
    "full_then_lora": (runs.llama, lora),
    "lora_then_merged": (lambda: lora(runs.llama()), lambda model: model.merge_and_unload()),
    "lora_then_full": (
        lambda: lora(runs.llama()),
        lambda model: model.merge_and_unload().requires_grad_(True),
    ),
    "lora_unloaded": (lambda: lora(runs.llama()), lambda model: lora(model.unload(), lora_alpha=4)),
    "lora_then_lora": (lambda: lora(runs.llama()), lambda model: lora(model.merge_and_unload())),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "lora_then_merged"])
def test_second_trainer(tmp_path, name):
    make, change = CHANGES[name]

    def trained(trainer_class):
        model = make()
        first = runs.make(trainer_class, model, tmp_path, max_steps=2)
        first.train()
        second = runs.make(trainer_class, change(model), tmp_path, max_steps=3, seed=11)
        second.train()
        return first, second

    ours, theirs = trained(SlideTrainer), trained(Trainer)
    for one, two in zip(ours, theirs, strict=True):
        runs.assert_same_logs(one, two)
    model = ours[1].model
    runs.assert_same_weights(runs.masters(model, engine_of(model)), runs.masters(theirs[1].model), atol=2e-5)


@pytest.mark.parametrize("name", ["resize", "freeze", "lora_then_lora"])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_masters_are_whole_in_between(tmp_path, name):
    """Under bf16 a parameter is half of its master; what is made of it must be made of the whole."""
    make, change = CHANGES[name]
    model = make()
    first = runs.make(SlideTrainer, model, tmp_path, max_steps=2, bf16=True, learning_rate=1e-5)
    first.train()
    first.accelerator.unwrap_model(model)
    exact = {
        key.replace(".base_layer", ""): value
        for key, value in engine_of(model).state_dict_as_loaded(model).items()
    }
    changed = change(model)
    second = runs.make(SlideTrainer, changed, tmp_path, max_steps=1, bf16=True, learning_rate=0.0)
    second.train()
    found = engine_of(changed).state_dict_as_loaded(changed)
    for key, value in found.items():
        known = exact.get(key.replace(".base_layer", ""))
        if known is not None and "lora" not in key and not (name.startswith("lora") and "_proj" in key):
            assert value.dtype == torch.float32
            assert torch.equal(value[: len(known)], known), key


@pytest.mark.parametrize("then", ["save", "train"])
def test_merged_model(tmp_path, then):
    def merged(trainer_class):
        trainer = runs.make(trainer_class, lora(runs.llama()), tmp_path, max_steps=2)
        trainer.train()
        return trainer.model.merge_and_unload()

    ours, theirs = merged(SlideTrainer), merged(Trainer)
    if then == "save":
        weights = []
        for index, model in enumerate((ours, theirs)):
            model.save_pretrained(tmp_path / str(index))
            weights.append(load_file(tmp_path / str(index) / "model.safetensors"))
        runs.assert_same_weights(*weights)
    else:
        trainers = [
            runs.make(trainer_class, model.requires_grad_(True), tmp_path, max_steps=2)
            for trainer_class, model in ((SlideTrainer, ours), (Trainer, theirs))
        ]
        for trainer in trainers:
            trainer.train()
        runs.assert_same_logs(*trainers)


def test_nothing_changed_keeps_the_engine(tmp_path):
    model = runs.llama()
    runs.make(SlideTrainer, model, tmp_path, max_steps=1).train()
    engine = engine_of(model)
    second = runs.make(SlideTrainer, model, tmp_path, max_steps=1)
    second.evaluate()
    second.train()
    assert engine_of(model) is engine


def test_evaluation_does_not_mind_what_is_trainable(tmp_path):
    model = runs.llama()
    runs.make(SlideTrainer, model, tmp_path, max_steps=1).train()
    engine = engine_of(model)
    model.model.layers.requires_grad_(False)
    second = runs.make(SlideTrainer, model, tmp_path, max_steps=1)
    second.evaluate()
    assert engine_of(model) is engine
    second.train()
    assert engine_of(model) is not engine


def test_model_is_ordinary_before_the_new_engine_is_made(tmp_path, monkeypatch):
    """There are never two engines' buffers at once."""
    from hf_slideformer import accelerator

    seen = []

    class Watched(accelerator.SlideEngine):
        def __init__(self, model, setup, **kwargs):
            seen.append((engine_of(model), {p.dtype for p in model.parameters()}))
            super().__init__(model, setup, **kwargs)

    monkeypatch.setattr(accelerator, "SlideEngine", Watched)
    model = runs.llama()
    runs.make(SlideTrainer, model, tmp_path, max_steps=1, bf16=True).train()
    model.lm_head.requires_grad_(False)
    runs.make(SlideTrainer, model, tmp_path, max_steps=1, bf16=True).train()
    assert seen == [(None, {torch.float32})] * 2


def test_first_trainer_after_the_second_took_the_model(tmp_path):
    model = frozen_layers()
    first = runs.make(SlideTrainer, model, tmp_path, max_steps=1)
    first.train()
    second = runs.make(SlideTrainer, unfreeze_some(model), tmp_path, max_steps=1)
    second.train()
    assert first.evaluate()["eval_loss"] == pytest.approx(second.evaluate()["eval_loss"])
    with pytest.raises(StateError, match=r"left the engine.*make a new optimizer \(or a new trainer\)"):
        first.train()


def test_model_that_was_only_read_is_trained(tmp_path):
    def trained(trainer_class, accelerator):
        model = runs.llama()
        accelerator.prepare_model(model, evaluation_mode=True)
        if trainer_class is SlideTrainer:
            refused = runs.make(trainer_class, model, tmp_path)
            with pytest.raises(StateError, match=r"evaluation only.*model\.requires_grad_\(True\)"):
                refused.accelerator._slide_stream(model, for_training=True)
        trainer = runs.make(trainer_class, model.requires_grad_(True), tmp_path)
        trainer.train()
        return trainer

    runs.assert_same_logs(
        trained(SlideTrainer, SlideAccelerator(cpu=True)), trained(Trainer, Accelerator(cpu=True))
    )


def test_engine_that_is_broken_says_to_load_the_model_anew(tmp_path):
    model = runs.llama()
    runs.make(SlideTrainer, model, tmp_path, max_steps=1).train()
    engine_of(model)._runtime.failure.note(ValueError("the kernel failed"))
    model.lm_head.requires_grad_(False)
    with pytest.raises(StateError, match=r"an update failed \(the kernel failed\).*load the model anew"):
        runs.make(SlideTrainer, model, tmp_path).train()


def test_a_callback_cannot_take_the_model_from_training(tmp_path):
    class Resize(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.resize_token_embeddings(runs.VOCAB)  # what it is already
            model.resize_token_embeddings(runs.VOCAB + 2)

    trainer = runs.make(SlideTrainer, runs.llama(), tmp_path, trainer_kwargs={"callbacks": [Resize()]})
    with pytest.raises(StateError, match=r"while it is trained \(resize_token_embeddings\(\) was called\)"):
        trainer.train()


# -- settings ----------------------------------------------------------------------------------------------------------

CLIPS, FREE = {"max_grad_norm": 1.0}, {"max_grad_norm": 0.0}
SETTINGS = {
    "clipping": (FREE, CLIPS),
    "no_clipping": (CLIPS, FREE),
    "accumulation": (FREE, {"gradient_accumulation_steps": 2}),
    "no_accumulation": ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 1, **FREE}),
    "rate": (CLIPS, {"learning_rate": 3e-4, "adam_beta1": 0.8}),
}


@pytest.mark.parametrize("anew", [True, False], ids=["model_init", "same_model"])
@pytest.mark.parametrize("name", SETTINGS)
def test_arguments_changed_between_two_runs(tmp_path, name, anew):
    """Trials of a search; and the same model and optimizer, which go on with their moments."""
    before, after = SETTINGS[name]

    def trained(trainer_class):
        model = {"model_init": lambda: runs.llama()} if anew else {"model": runs.llama()}
        args = runs.arguments(tmp_path, max_steps=2, **before)
        trainer = trainer_class(args=args, train_dataset=runs.Tokens(), **model)
        logs = []
        for changes in ({}, after, before):
            for key, value in changes.items():
                setattr(trainer.args, key, value)
            trainer.train()
            logs += runs.logged(trainer)
        return logs, runs.masters(trainer.model, engine_of(trainer.model))

    ours, theirs = trained(SlideTrainer), trained(Trainer)
    for one, two in zip(ours[0], theirs[0], strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    runs.assert_same_weights(ours[1], theirs[1], atol=2e-5)


def test_arguments_that_cannot_be_used_are_refused_when_training_starts(tmp_path):
    trainer = runs.make(SlideTrainer, runs.llama(), tmp_path, max_steps=1)
    trainer.train()
    trainer.args.gradient_checkpointing = True
    trainer.train()
    assert trainer.args.gradient_checkpointing is False
    trainer.args.optim = "adafactor"
    with pytest.raises(Exception, match="cannot update streamed parameters"):
        trainer.train()


def test_moments_on_disk_do_not_go_on(tmp_path):
    config = {"slide_config": {"nvme_dir": str(tmp_path), "cpu_memory": "1.3MiB"}}
    model = runs.llama(hidden_size=64)
    trainer = runs.make(SlideTrainer, model, tmp_path, trainer_kwargs=config, max_steps=1, bf16=True)
    trainer.train()
    assert trainer.slide.engine.disk_bytes
    trainer.args.gradient_accumulation_steps = 2
    with pytest.raises(
        StateError, match=r"accumulates=False and is now wanted with True.*make a new trainer"
    ):
        trainer.train()


# -- plain loops -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_accelerate_state")
@pytest.mark.parametrize(
    "how", ["together", "optimizer_alone", "same_optimizer", "same_optimizer_model_alone"]
)
def test_unfreezing_in_a_loop(how):
    def trained(accelerator):
        model = frozen_layers()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []

        def some_steps(model, optimizer):
            for tokens in runs.batches(2):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())

        model, optimizer = accelerator.prepare(model, optimizer)
        some_steps(model, optimizer)
        unfreeze_some(model)
        if how == "together":
            model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        elif how == "optimizer_alone":
            optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-3))
        elif how == "same_optimizer":
            model, optimizer = accelerator.prepare(model, optimizer)
        else:
            model = accelerator.prepare(model)
        some_steps(model, optimizer)
        return losses, runs.masters(model, engine_of(model)), accelerator

    ours, theirs = trained(SlideAccelerator(cpu=True)), trained(Accelerator(cpu=True))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    runs.assert_same_weights(ours[1], theirs[1])
    assert len(ours[2]._models) == 1
    assert len(ours[2]._optimizers) == 1


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_accumulation_set_on_the_accelerator_between_two_preparations():
    def trained(accelerator):
        loop = runs.plain_loop(runs.llama(torch.float32))
        model, optimizer = accelerator.prepare(loop.model, loop.optimizer)
        losses = []
        for steps in (1, 2):
            accelerator.gradient_accumulation_steps = steps
            model, optimizer = accelerator.prepare(model, optimizer)
            for tokens in runs.batches(4):
                with accelerator.accumulate(model):
                    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(loss.item())
        return losses, runs.masters(model, engine_of(model))

    ours, theirs = trained(SlideAccelerator(cpu=True)), trained(Accelerator(cpu=True))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    runs.assert_same_weights(ours[1], theirs[1])


def test_copy_of_a_released_model_trains(tmp_path):
    model = runs.llama()
    first = runs.make(SlideTrainer, model, tmp_path, max_steps=1)
    first.train()
    first.slide.release()
    trainers = [
        runs.make(cls, copy.deepcopy(model), tmp_path, max_steps=2) for cls in (SlideTrainer, Trainer)
    ]
    for trainer in trainers:
        trainer.train()
    runs.assert_same_logs(*trainers)
