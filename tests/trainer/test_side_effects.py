"""What goes on around training: callbacks, data loading, evaluation, generation, second runs, and the end."""

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from hf_slideformer import SlideConfig, SlideTrainer
from hf_slideformer.memory import runtime

from . import runs


@pytest.fixture
def slow_updates(monkeypatch):
    """Every update of a unit starts late enough for whoever does not wait to see old weights."""
    worker = runtime.UpdateWorker
    monkeypatch.setattr(runtime, "UpdateWorker", lambda metrics, _: worker(metrics, runs.slow(0.02)))


class _ReadsWeights(TrainerCallback):
    """Sums up each layer's weights at the end of every step, as an EMA or a monitor would."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append([layer.mlp.up_proj.weight.double().sum().item() for layer in model.model.layers])


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_callbacks_see_updated_weights(tmp_path, slow_updates, max_grad_norm):
    seen = []
    for base in (SlideTrainer, Trainer):
        callback = _ReadsWeights()
        trainer = runs.make(
            base,
            runs.llama(),
            tmp_path,
            trainer_kwargs={"callbacks": [callback]},
            max_steps=3,
            max_grad_norm=max_grad_norm,
        )
        trainer.train()
        seen.append(callback.seen)
    assert len(seen[0]) == 3
    torch.testing.assert_close(torch.tensor(seen[0]), torch.tensor(seen[1]), rtol=0, atol=1e-4)


def test_callbacks_added_later_see_updated_weights(tmp_path, slow_updates):
    callback = _ReadsWeights()
    trainer = runs.make(SlideTrainer, runs.llama(), tmp_path, max_steps=1)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.seen[-1] == [
        layer.mlp.up_proj.weight.double().sum().item() for layer in trainer.model.model.layers
    ]


def test_train_returns_with_every_update_done(tmp_path, slow_updates):
    trainer = runs.make(SlideTrainer, runs.llama(), tmp_path, max_steps=1)
    trainer.train()
    before = runs.masters(trainer.model)
    runs.assert_same_weights(runs.masters(trainer.model, trainer.slide.engine), before, atol=0)
    plain = runs.make(Trainer, runs.llama(), tmp_path, max_steps=1)
    plain.train()
    runs.assert_same_weights(before, runs.masters(plain.model))


def _memory_flags(address):
    """The kernel's flags of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
def test_forked_dataloader_workers_do_not_get_the_state(tmp_path):
    trainers = [
        runs.make(
            SlideTrainer,
            runs.llama(torch.bfloat16),
            tmp_path,
            bf16=True,
            dataloader_num_workers=workers,
            max_steps=2,
        )
        for workers in (2, 0)
    ]
    for trainer in trainers:
        trainer.train()
    assert runs.logged(trainers[0]) == runs.logged(trainers[1])
    states = [state for state in trainers[0].slide.engine.states if state.streams]
    for state in states:
        for tensor in (state.weight, state.residual, *state.moments.values()):
            assert "dc" in _memory_flags(tensor.data_ptr()), state.name  # "dc": do not copy on fork
    for unit in trainers[0].slide.engine.executor.units:
        gradient = unit.group.home.memory.grads.tensor(torch.uint8, 0, 1)
        assert "dc" in _memory_flags(gradient.data_ptr()), unit.name


# -- evaluation, prediction, generation ----------------------------------------------------------------------


def _accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    return {"accuracy": float((logits.argmax(-1)[:, :-1] == labels[:, 1:]).mean())}


def test_predict_before_train(tmp_path):
    trainers = [
        runs.make(base, runs.llama(), tmp_path, trainer_kwargs={"compute_metrics": _accuracy}, max_steps=2)
        for base in (SlideTrainer, Trainer)
    ]
    first = [trainer.predict(runs.Tokens(5, seed=8)) for trainer in trainers]
    torch.testing.assert_close(torch.tensor(first[0].predictions), torch.tensor(first[1].predictions))
    assert first[0].metrics["test_accuracy"] == first[1].metrics["test_accuracy"]
    ours, theirs = trainers
    for trainer in trainers:
        trainer.train()
    runs.assert_same_logs(ours, theirs)
    second = [trainer.predict(runs.Tokens(5, seed=8)) for trainer in trainers]
    assert abs(second[1].predictions - first[1].predictions).max() > 1e-3, "training must show"
    torch.testing.assert_close(
        torch.tensor(second[0].predictions), torch.tensor(second[1].predictions), rtol=1e-4, atol=1e-5
    )
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)


def test_generate_after_training(tmp_path, slow_updates):
    ours, theirs = (runs.make(base, runs.llama(), tmp_path, max_steps=2) for base in (SlideTrainer, Trainer))
    texts = []
    for trainer in (ours, theirs):
        trainer.train()
        trainer.model.eval()
        torch.manual_seed(0)
        prompt = runs.batches(1)[0]
        options = {"max_new_tokens": 6, "do_sample": True, "use_cache": True}
        texts.append(trainer.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
        torch.manual_seed(trainer.args.seed)  # the order of samples depends on the last seed that was set
    assert torch.equal(*texts)
    for trainer in (ours, theirs):  # its inference mode leaves nothing behind that training could trip over
        trainer.train()
    runs.assert_same_weights(runs.masters(ours.model, ours.slide.engine), runs.masters(theirs.model))


# -- several runs --------------------------------------------------------------------------------------------


def test_second_train(tmp_path):
    ours, theirs = (runs.make(base, runs.llama(), tmp_path, max_steps=2) for base in (SlideTrainer, Trainer))
    for trainer in (ours, theirs):
        trainer.train()
        trainer.evaluate()
        trainer.args.max_steps = 3
        trainer.train()
        assert trainer.state.global_step == 3
    runs.assert_same_logs(ours, theirs)
    runs.assert_same_weights(runs.masters(ours.model, ours.slide.engine), runs.masters(theirs.model))


def test_trainers_of_other_precision_do_not_disturb_each_other(tmp_path):
    # Accelerate keeps the precision in state that all accelerators of a process share.
    def make(bf16):
        return runs.make(SlideTrainer, runs.llama(), tmp_path, bf16=bf16, max_steps=2)

    results = []
    for together in (False, True):
        if together:
            trainers = [make(False), make(True)]
            for trainer in trainers:
                trainer.train()
        else:
            trainers = []
            for bf16 in (False, True):
                trainers.append(make(bf16))
                trainers[-1].train()
        results.append([runs.masters(trainer.model, trainer.slide.engine) for trainer in trainers])
    for alone, together in zip(*results, strict=True):
        runs.assert_same_weights(together, alone, atol=0)


def test_optimizer_and_scheduler_of_ones_own(tmp_path):
    """A torch AdamW and the LambdaLR made for it, passed in `optimizers=`."""
    trainers = []
    for base in (SlideTrainer, Trainer):
        model = runs.llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.8, 0.95), weight_decay=0.05)
        schedule = LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
        trainers.append(
            runs.make(base, model, tmp_path, trainer_kwargs={"optimizers": (optimizer, schedule)})
        )
        trainers[-1].train()
    ours, theirs = trainers
    assert [entry["learning_rate"] for entry in runs.logged(ours)] == pytest.approx(
        [2e-3, 1e-3, 2e-3 / 3, 5e-4]
    )
    runs.assert_same_logs(ours, theirs)
    runs.assert_same_weights(runs.masters(ours.model, ours.slide.engine), runs.masters(theirs.model))


# -- the end -------------------------------------------------------------------------------------------------


def _engine_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("slideformer-")]


@pytest.mark.parametrize("update", ["deferred", "overlapped"])
def test_threads_and_memory_end_with_the_trainer(tmp_path, update):
    gc.collect()
    before = set(_engine_threads())
    trainer = runs.make(
        SlideTrainer,
        runs.llama(),
        tmp_path,
        trainer_kwargs={"slide_config": SlideConfig(update=update)},
        max_steps=2,
        max_grad_norm=0.0,
    )
    trainer.train()
    trainer.evaluate()
    mine = set(_engine_threads()) - before
    assert len(mine) == 3  # two lanes and the update worker
    alive = [weakref.ref(trainer.slide.engine)]
    alive += [weakref.ref(unit.group.home.memory.weights) for unit in trainer.slide.engine.executor.units]
    del trainer
    gc.collect()
    assert [reference() for reference in alive if reference() is not None] == []
    for thread in mine:
        thread.join(timeout=60)
        assert not thread.is_alive(), thread.name


def test_weights_outlive_the_trainer(tmp_path):
    trainer = runs.make(SlideTrainer, runs.llama(), tmp_path, max_steps=1)
    trainer.train()
    expected = runs.masters(trainer.model, trainer.slide.engine)
    kept = trainer.model.model.layers[1].mlp.up_proj.weight
    del trainer
    gc.collect()
    assert torch.equal(kept, expected["model.layers.1.mlp.up_proj.weight"])


def test_closing_twice():
    loop = runs.slide_loop()
    loop.loss(runs.batches(1)[0]).backward()
    loop.optimizer.step()
    before = set(_engine_threads())
    loop.engine.close()
    loop.engine.close()
    assert len(before - set(_engine_threads())) == 3
    plain = runs.plain_loop()
    plain.loss(runs.batches(1)[0]).backward()
    plain.optimizer.step()
    runs.assert_same_weights(runs.masters(loop.model), plain.weights())  # what was queued has been done
