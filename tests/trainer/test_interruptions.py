"""An exception or Ctrl-C anywhere in a step, then training on: the same as under plain Trainer."""

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_slideformer import SlideTrainer
from hf_slideformer.errors import StateError

from . import runs


class _Bomb:
    """Raises once when armed."""

    def __init__(self, error):
        self._error = error
        self.armed = False
        self.fired = 0

    def __call__(self, *_):
        if self.armed:
            self.armed = False
            self.fired += 1
            raise self._error


class _AtEvent(TrainerCallback):
    """Sets off a bomb at an event of the second step."""

    def __init__(self, event, bomb):
        setattr(self, event, self._run)
        self._bomb = bomb

    def _run(self, args, state, control, **kwargs):
        self._bomb.armed = state.global_step == 1 and not self._bomb.fired
        self._bomb()


def _interrupted(base, output_dir, where, error, **overrides):
    """A trainer after an interrupted second step (in its first micro-batch, where it accumulates) and a second run."""
    bomb = _Bomb(error)
    accumulation = overrides.get("gradient_accumulation_steps", 1)

    class Interrupted(base):
        calls = 0

        def compute_loss(self, model, *args, **kwargs):
            self.calls += 1
            bomb.armed = self.calls == accumulation + 1 and where in _PLACES
            loss = super().compute_loss(model, *args, **kwargs)
            if where == "between":
                bomb()
            return loss

    model = runs.llama()
    layer = model.model.layers[2]
    if where == "in_forward":
        layer.mlp.register_forward_pre_hook(bomb)
    elif where == "in_recompute":

        def second_time(module, args):
            if torch._C._current_graph_task_id() >= 0:
                bomb()

        layer.mlp.register_forward_pre_hook(second_time)
    elif where == "in_backward":

        def hook(module, args, output):
            if output.requires_grad:
                output.register_hook(bomb)

        layer.register_forward_hook(hook)
    callbacks = [] if where in _PLACES else [_AtEvent(where, bomb)]
    trainer = runs.make(
        Interrupted, model, output_dir, trainer_kwargs={"callbacks": callbacks}, max_steps=3, **overrides
    )
    with pytest.raises(type(error)):
        trainer.train()
    assert bomb.fired == 1
    assert trainer.state.global_step == 1
    trainer.train()
    assert bomb.fired == 1
    return trainer


_PLACES = ("between", "in_forward", "in_recompute", "in_backward")


_CLIPPED = "on_pre_optimizer_step"
_CASES = [
    *((where, 1, RuntimeError("boom")) for where in (*_PLACES, _CLIPPED)),
    *((where, 2, RuntimeError("boom")) for where in ("between", "in_backward", "on_substep_end", _CLIPPED)),
    *((where, 1, KeyboardInterrupt()) for where in ("between", "in_backward")),
]


def _clipping(accumulation):
    return {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same under plain Trainer by accumulation steps; there the place in the step makes no difference."""
    directory = tmp_path_factory.mktemp("plain")
    return {
        steps: _interrupted(Trainer, directory, "between", RuntimeError("boom"), **_clipping(steps))
        for steps in (1, 2)
    }


@pytest.mark.parametrize(
    ("where", "accumulation", "error"), _CASES, ids=[f"{w}-{a}-{type(e).__name__}" for w, a, e in _CASES]
)
def test_training_goes_on(tmp_path, plain, where, accumulation, error):
    ours = _interrupted(SlideTrainer, tmp_path, where, error, **_clipping(accumulation))
    theirs = plain[accumulation]
    assert min(entry["grad_norm"] for entry in runs.logged(theirs)) > 0.5, "the runs must clip"
    runs.assert_same_logs(ours, theirs)
    runs.assert_same_weights(runs.masters(ours.model, ours.slide.engine), runs.masters(theirs.model))


@pytest.mark.parametrize("where", ["between", "in_forward"])
def test_training_goes_on_with_overlapped_updates(tmp_path, where):
    # Interrupted before any update has started.
    ours, theirs = (
        _interrupted(base, tmp_path, where, RuntimeError("boom"), max_grad_norm=0)
        for base in (SlideTrainer, Trainer)
    )
    assert ours.slide.engine.overlapped
    runs.assert_same_logs(ours, theirs)
    runs.assert_same_weights(runs.masters(ours.model, ours.slide.engine), runs.masters(theirs.model))


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_the_first_error_is_what_one_sees(tmp_path, error):
    """Interrupted among overlapped updates there is no going on; why not is a note, and the next call's error."""
    bomb = _Bomb(error)
    model = runs.llama()

    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(bomb)

    model.model.layers[0].register_forward_hook(hook)
    trainer = runs.make(
        SlideTrainer,
        model,
        tmp_path,
        trainer_kwargs={"callbacks": [_AtEvent("on_step_begin", _Armed(bomb))]},
        max_steps=3,
        max_grad_norm=0,
    )
    with pytest.raises(type(error)) as caught:
        trainer.train()
    assert caught.value is error
    assert any("Training cannot go on" in note and "interrupted" in note for note in error.__notes__)
    with pytest.raises(StateError, match="last checkpoint"):
        trainer.train()


class _Armed:
    """At a callback's event: arms a bomb that goes off elsewhere."""

    def __init__(self, bomb):
        self.armed, self._bomb = False, bomb

    @property
    def fired(self):
        return self._bomb.fired

    def __call__(self):
        self._bomb.armed = self.armed


def test_evaluation_between_forward_and_backward(tmp_path):
    ours, plain = runs.slide_loop(), runs.plain_loop()
    for loop in (ours, plain):
        for tokens in runs.batches(2):
            loss = loop.loss(tokens)
            loop.model.eval()
            with torch.no_grad():
                loop.loss(tokens)
            loop.model.train()
            loss.backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    runs.assert_same_weights(ours.weights(), plain.weights())


@pytest.mark.parametrize("updates", ["deferred", "overlapped"])
def test_auto_find_batch_size(tmp_path, updates):
    def out_of_memory_above_two(module, args):
        if args[0].shape[0] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")

    trainers = []
    for base in (SlideTrainer, Trainer):
        model = runs.llama()
        # In the third layer: two have already run forward.
        model.model.layers[2].mlp.register_forward_pre_hook(out_of_memory_above_two)
        trainer = runs.make(
            base,
            model,
            tmp_path,
            auto_find_batch_size=True,
            per_device_train_batch_size=3,
            max_steps=2,
            max_grad_norm=0.5 if updates == "deferred" else 0,
        )
        trainer.train()
        assert trainer._train_batch_size <= 2
        trainers.append(trainer)
    ours, theirs = trainers
    assert ours._train_batch_size == theirs._train_batch_size
    assert ours.slide.engine.overlapped == (updates == "overlapped")
    runs.assert_same_logs(ours, theirs)
    runs.assert_same_weights(runs.masters(ours.model, ours.slide.engine), runs.masters(theirs.model))


def test_loops_go_on_without_a_reset():
    """In a loop of one's own nobody tells the engine of the exception."""
    ours, plain = runs.slide_loop(delays={"d2h": runs.slow(0.01)}), runs.plain_loop()
    first, second = runs.batches(2)
    for loop in (ours, plain):
        bomb = _Bomb(RuntimeError("boom"))
        handle = loop.model.model.layers[1].register_forward_hook(
            lambda module, args, out, bomb=bomb: out.register_hook(bomb) and None
        )
        loss = loop.loss(first)
        bomb.armed = True
        with pytest.raises(RuntimeError, match="boom"):
            loss.backward()
        handle.remove()
        loop.optimizer.zero_grad()
        loop.loss(second).backward()
        loop.clip(loop.model.parameters(), 0.5)
        loop.optimizer.step()
    runs.assert_same_weights(ours.weights(), plain.weights())
