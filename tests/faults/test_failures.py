"""Failures of lanes and of the worker reach the caller with their cause; nothing hangs and nothing is hidden."""

import subprocess
import sys
import textwrap

import pytest
import torch

from hf_slideformer import SlideConfig
from hf_slideformer.engine.state import streamed
from hf_slideformer.errors import StateError, TransferError
from tests.engine.loop import assert_same_bits, decide, prepare, tiny_llama, train


def _fail_on_call(function, number, error):
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("update", ["deferred", "overlapped"])
def test_a_failed_update_is_raised_with_its_cause_and_stops_the_engine(monkeypatch, update):
    run = prepare(tiny_llama(), config=SlideConfig(update=update))
    cause = MemoryError("out of arms")
    monkeypatch.setattr(streamed, "update_unit", _fail_on_call(streamed.update_unit, 3, cause))
    with pytest.raises((TransferError, StateError), match="out of arms") as caught:
        train(run, 3, max_norm=None)
    assert _has_cause(caught.value, cause)
    # The weights are half one step and half another: it must not go on as if nothing had happened.
    with pytest.raises(StateError, match="last checkpoint"):
        train(run, 1, max_norm=None)


def test_a_failed_gradient_copy_is_raised_and_a_reset_makes_the_engine_usable(monkeypatch):
    reference = train(prepare(tiny_llama()), 3)
    run = prepare(tiny_llama())
    broken = {"left": 1}

    def fail_once(label):
        if broken["left"] and label.startswith("gradients"):
            broken["left"] -= 1
            raise OSError("link down")
        return 0.0

    monkeypatch.setattr(run.engine._runtime.to_host, "_delay_s", fail_once)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    loss = run.model(input_ids=tokens, labels=tokens, use_cache=False).loss
    with pytest.raises(TransferError, match="link down"):
        loss.backward()
    run.engine.reset()
    assert all(p.grad is None for p in run.model.parameters())
    assert_same_bits(train(run, 3), reference)


def test_a_failed_fetch_is_raised_and_the_next_one_works(monkeypatch):
    reference = train(prepare(tiny_llama()), 3)
    run = prepare(tiny_llama())
    broken = {"left": 1}

    def fail_once(label):
        if broken["left"] and label == "fetch of model.layers.4":
            broken["left"] -= 1
            raise OSError("link down")
        return 0.0

    monkeypatch.setattr(run.engine._runtime.to_device, "_delay_s", fail_once)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    with pytest.raises(TransferError, match=r"fetch of model\.layers\.4.*link down"):
        run.model(input_ids=tokens, labels=tokens, use_cache=False)
    run.engine.reset()
    assert_same_bits(train(run, 3), reference)


@pytest.mark.timeout(60)  # a staging buffer that is lost hangs
def test_an_overlapped_update_that_cannot_be_made_keeps_no_staging_buffer():
    overlapped = {"config": SlideConfig(update="overlapped"), "decisions": decide(staging_buffers=1)}
    reference = train(prepare(tiny_llama(), **overlapped), 2, max_norm=None)
    run = prepare(tiny_llama(), **overlapped)
    groups = run.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for _ in range(2):
        for group in groups:
            group["lr"] = "fast"
        with pytest.raises(ValueError, match="fast"):
            _loss(run).backward()
        run.engine.reset()
    for group, lr in zip(groups, rates, strict=True):
        group["lr"] = lr
    assert_same_bits(train(run, 2, max_norm=None), reference)


@pytest.mark.timeout(60)  # a staging buffer that is lost hangs
def test_a_sum_that_cannot_be_made_keeps_no_staging_buffer():
    summed = {"accumulates": True, "decisions": decide(staging_buffers=1)}
    reference = train(prepare(tiny_llama(), **summed), 2, micro_batches=2)
    run = prepare(tiny_llama(), **summed)
    for _ in range(2):
        _loss(run).backward()
        run.engine.clip_grad_norm_(run.model.parameters(), 1e-3)
        with torch.no_grad():
            run.model.model.layers[2].mlp.up_proj.weight.grad.mul_(2.0)
        with pytest.raises(StateError, match=r"layers\.2\.mlp\.up_proj\.weight was edited"):
            _loss(run).backward()
        run.engine.reset()
    assert_same_bits(train(run, 2, micro_batches=2), reference)


def test_a_reset_does_not_hide_the_cause(monkeypatch):
    run = prepare(tiny_llama(), config=SlideConfig(update="overlapped"))
    cause = MemoryError("out of arms")
    # That of the last unit in backward: nothing after it would notice.
    monkeypatch.setattr(streamed, "update_unit", _fail_on_call(streamed.update_unit, 6, cause))
    _loss(run).backward()
    with pytest.raises(StateError, match="out of arms") as caught:
        run.engine.reset()
    assert caught.value.__cause__ is cause


def _loss(run):
    tokens = torch.zeros(2, 16, dtype=torch.long)
    return run.model(input_ids=tokens, labels=tokens, use_cache=False).loss


def test_an_interrupted_overlapped_backward_is_not_trusted():
    run = prepare(tiny_llama(), config=SlideConfig(update="overlapped"))
    tokens = torch.zeros(2, 16, dtype=torch.long)
    hidden = run.model.model.embed_tokens(tokens)
    hidden.retain_grad()
    hidden.register_hook(_interrupt)
    loss = run.model(inputs_embeds=hidden, labels=tokens, use_cache=False).loss
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    with pytest.raises(StateError, match="interrupted"):
        run.engine.reset()


def _interrupt(_grad):
    raise KeyboardInterrupt


def test_a_process_with_a_failed_worker_ends(tmp_path):
    """Exit code and traceback, not a hang."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            from hf_slideformer.engine.state import streamed
            from tests.engine.loop import prepare, tiny_llama, train

            def fail(*args):
                raise RuntimeError("broken on purpose")

            streamed.update_unit = fail
            train(prepare(tiny_llama()), 3)
            """
        )
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        f"import sys; sys.path[:0] = {sys.path!r}; exec(open({str(script)!r}).read())",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "broken on purpose" in done.stderr


def _has_cause(error, cause):
    while error is not None:
        if error is cause:
            return True
        error = error.__cause__
    return False
