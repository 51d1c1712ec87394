"""What a script may do with an engine, in small: everything that moves or reads state, in every mode.

None of them waits for the device on its own account (no `.item()`), so that nothing is ordered by accident.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from hf_slideformer.engine.held import HeldState
from tests.engine import small
from tests.engine.loop import Run

from .happens_before import HappensBefore, also_watched

Scenario = Callable[[HappensBefore, str], None]


def _read(run: Run) -> None:
    """All state, by way of the engine."""
    for states in run.engine.states_by_unit():
        with run.engine.state_in_memory(states):
            for state in states:
                for tensor in (state.live, state.weight, state.residual, *state.moments.values()):
                    if tensor is not None:
                        tensor.clone()


def _trained(mode: str) -> Scenario:
    def train(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        for number in range(3):
            small.step(run, mode, number)
        run.engine.synchronize()
        for state in run.engine.states:
            state.weight.clone()
            state.live.clone()
        _read(run)
        small.step(run, mode, 3)
        _read(run)
        run.engine.close()

    return train


def _saved(mode: str) -> Scenario:
    """State is read by another thread beside the next steps."""

    def save(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        small.step(run, mode, 0)
        held = run.engine.hold()
        held.request(range(len(held.groups)))
        begun = watch.publish()
        thread = threading.Thread(target=_read_held, args=(watch, held, begun), name="saving")
        thread.start()
        for number in (1, 2):
            small.step(run, mode, number)
        run.engine.synchronize()
        thread.join()
        run.engine.close()

    return save


def _read_held(watch: HappensBefore, held: HeldState, begun: dict[str, int]) -> None:
    with also_watched(watch), watch.labelled("saving"):
        watch.know(begun)
        try:
            for group in held.order:
                with held.reading(group):
                    for state in held.groups[group]:
                        residual, moments = held.parts(state)
                        for tensor in (state.live, state.weight, residual, *moments.values()):
                            if tensor is not None:
                                tensor.clone()
                    watch.know(dict(watch.stream("saving")))  # `.cpu()` of what is on the device waits for it
                held.release(group)
        finally:
            held.release_all()


def _two_backwards(mode: str) -> Scenario:
    """Gradients are added to those of a backward before, though one backward a step was planned."""

    def train(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        for number in range(2):
            both = [run.model(small.batch(number, micro)) for micro in range(2)]
            for loss in both:
                loss.backward()
            run.engine.clip_grad_norm_(run.model.parameters(), 0.1)
            run.model(small.batch(number, 2)).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        _read(run)
        run.engine.close()

    return train


def _gradients_by_hand(mode: str) -> Scenario:
    """Steps without a forward between them."""

    def step(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        small.step(run, mode, 0)
        for _ in range(2):
            for state in run.engine.states:
                if state.unit is not None:
                    dtype = getattr(state.param, "grad_dtype", None) or state.param.dtype
                    state.param.grad = torch.ones(state.param.shape, dtype=dtype)
            run.optimizer.step()
            run.optimizer.zero_grad()
        _read(run)
        run.engine.close()

    return step


def _evaluated(mode: str) -> Scenario:
    """Forwards without a backward, before updates are done and after."""

    def evaluate(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        for number in range(2):
            small.step(run, mode, number)
            with torch.no_grad():
                for again in range(2):
                    run.model(small.batch(again))
        loss = run.model(small.batch(0))
        with torch.no_grad():
            run.model(small.batch(1))
        loss.backward()
        run.engine.close()

    return evaluate


def _longer_batches(mode: str) -> Scenario:
    """Buffers of inputs are outgrown."""

    def train(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        for size in (3, 200, 400):
            for micro in range(2):
                run.model(small.batch(size, micro, size)).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.engine.close()

    return train


def _written(mode: str) -> Scenario:
    """Weights are written by a script, and state dicts are read and loaded."""

    def write(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        small.step(run, mode, 0)
        values = {name: value.clone() for name, value in run.model.state_dict().items()}
        small.step(run, mode, 1)
        run.model.load_state_dict(values)
        small.step(run, mode, 2)
        run.engine.synchronize()
        with torch.no_grad():
            for state in run.engine.states:
                state.param.mul_(0.5)
        small.step(run, mode, 3)
        run.engine.weights_changed()
        saved = run.optimizer.state_dict()
        small.step(run, mode, 4)
        run.optimizer.load_state_dict(saved)
        _read(run)
        run.engine.close()

    return write


SCENARIOS: dict[str, Scenario] = {
    **{f"train, {mode}": _trained(mode) for mode in small.MODES},
    **{f"save, {mode}": _saved(mode) for mode in small.MODES},
    **{
        f"two backwards, {mode}": _two_backwards(mode)
        for mode in ("streamed", "kept", "offload", "mixed", "state on disk", "weights on disk")
    },
    **{
        f"gradients by hand, {mode}": _gradients_by_hand(mode)
        for mode in ("streamed", "sums", "state on disk", "weights on disk")
    },
    **{
        f"evaluate, {mode}": _evaluated(mode)
        for mode in ("mixed", "offload", "weights on disk", "sums on disk")
    },
    "longer batches": _longer_batches("sums of offload"),
    **{
        f"write, {mode}": _written(mode)
        for mode in ("mixed", "sums", "overlapped outside in RAM", "weights on disk")
    },
}
