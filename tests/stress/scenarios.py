"""What a script may do with an engine, in small: everything that moves or reads state, in every mode.

None of them waits for the device on its own account (no `.item()`), so that nothing is ordered by accident.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch

from hf_slideformer import SlideAdamW
from hf_slideformer.engine.state.snapshot import HeldState
from hf_slideformer.errors import CheckpointError
from hf_slideformer.memory.transfer import Lane
from hf_slideformer.memory.worker import UpdateWorker
from hf_slideformer.optim.state import ParamState
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


class _Reader:
    """A thread that reads held state, as one that writes a checkpoint does."""

    def __init__(self, watch: HappensBefore, held: HeldState) -> None:
        self._watch, self._held = watch, held
        self._error: BaseException | None = None
        held.request(range(len(held.groups)))
        self._begun = watch.publish()
        self._thread = threading.Thread(target=self._run, name="saving")
        self._thread.start()

    def join(self) -> None:
        """Until it has ended; raises what it raised, unless that is what it should."""
        self._thread.join()
        if self._error is not None and not isinstance(self._error, CheckpointError):
            raise self._error

    def _run(self) -> None:
        with also_watched(self._watch), self._watch.labelled("saving"):
            self._watch.know(self._begun)
            try:
                for group in self._held.order:
                    self._read(group)
                    self._held.release(group)
            except BaseException as error:  # noqa: BLE001 - for `join`
                self._error = error
            finally:
                self._held.release_all()

    def _read(self, group: int) -> None:
        with self._held.reading(group):
            for state in self._held.groups[group]:
                residual, moments = self._held.parts(state)
                for tensor in (state.live, state.weight, residual, *moments.values()):
                    if tensor is not None:
                        tensor.clone()
            self._watch.know(
                dict(self._watch.stream("saving"))
            )  # `.cpu()` of what is on the device waits for it


def _saved(mode: str) -> Scenario:
    """State is read by another thread beside the next steps."""

    def save(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        small.step(run, mode, 0)
        first = _Reader(watch, run.engine.hold())
        small.step(run, mode, 1)
        second = _Reader(watch, run.engine.hold())  # again, whether the first is through or not
        for number in (2, 3):
            small.step(run, mode, number)
        run.engine.synchronize()
        last = _Reader(watch, run.engine.hold())
        run.engine.close()
        for reader in (first, second, last):
            reader.join()

    return save


def _written_beside_a_save(mode: str) -> Scenario:
    """Whatever writes to state waits until it has been read."""

    def write(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        small.step(run, mode, 0)
        values = {name: value.clone() for name, value in run.model.state_dict().items()}

        def in_memory() -> None:
            for states in run.engine.states_by_unit():
                with run.engine.state_in_memory(states, write=True):
                    for state in states:
                        for tensor in state.moments.values():
                            tensor.zero_()

        def in_hand() -> None:
            for module in (run.model.first, run.model.layers[2].up):
                with run.engine._access.weights_in_hand(module):
                    module.weight.data.add_(1)

        for change in (
            in_memory,
            in_hand,
            lambda: run.model.load_state_dict(values),
            lambda: run.engine.weights_changed(),
            lambda: run.engine.attach_optimizer(SlideAdamW(run.model.parameters())),
        ):
            reader = _Reader(watch, run.engine.hold())
            change()
            small.step(run, mode, 1)
            reader.join()
        run.engine.close()

    return write


def _interrupted(mode: str, *, reset: bool, twice: bool = False) -> Scenario:
    """A backward is cut short, while sums of gradients are late; training goes on, with or without a reset."""

    def train(watch: HappensBefore, directory: str) -> None:
        late = ["gradient sum"]

        def delay(label: str) -> float:
            return 0.2 if late and label.startswith(late[0]) and late.pop() else 0.0

        run = small.start(mode, directory, delays={"update": delay})
        hook = run.model.layers[1].register_forward_hook(
            lambda *given: given[2].register_hook(_interrupt) and None
        )
        if twice:
            hook.remove()
            run.model(small.batch(0)).backward()
            hook = run.model.layers[1].register_forward_hook(
                lambda *given: given[2].register_hook(_interrupt) and None
            )
        with contextlib.suppress(KeyboardInterrupt):
            run.model(small.batch(1)).backward()
        hook.remove()
        if reset:
            run.engine.reset()
        else:
            run.optimizer.zero_grad()
        for number in range(2):
            small.step(run, mode, number)
        _read(run)
        run.engine.close()

    return train


def _interrupt(_: torch.Tensor) -> None:
    raise KeyboardInterrupt


def _cut_short(mode: str, owner: type, label: str) -> Scenario:
    """An exception between giving work to a thread and keeping its handle."""

    def train(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        small.step(run, mode, 0)
        submit = owner.submit

        def submit_and_raise(self, what, *args, **kwargs):
            handle = submit(self, what, *args, **kwargs)
            if what.startswith(label):
                raise KeyboardInterrupt
            return handle

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, "submit", submit_and_raise)
                small.step(run, mode, 1)
        except KeyboardInterrupt:
            run.engine.reset()
        else:
            raise AssertionError(f"nothing was submitted as {label}")
        for number in range(2):
            small.step(run, mode, number)
        _read(run)
        run.engine.close()

    return train


def _leased_for_ever(mode: str) -> Scenario:
    """An exception between leasing weights and what gives them back."""

    def train(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        small.step(run, mode, 0)
        lease = run.engine.pool.acquire(run.engine.executor.units[0])
        lease.leaves[0].sum()
        run.engine.reset()
        small.step(run, mode, 1)
        run.engine.close()

    return train


def _two_backwards(mode: str, *, last_first: bool = False) -> Scenario:
    """Gradients are added to those of a backward before, though one backward a step was planned."""

    def train(watch: HappensBefore, directory: str) -> None:
        run = small.start(mode, directory)
        for number in range(2):
            both = [run.model(small.batch(number, micro)) for micro in range(2)]
            for loss in reversed(both) if last_first else both:
                loss.backward()  # of the last first: gradients land where an input of the other still waits
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
                if state.streams:
                    state.param.grad = torch.ones(state.param.shape, dtype=_gradient_dtype(state))
                else:
                    device = run.engine.device
                    state.param.grad = torch.ones(
                        state.param.shape, dtype=_gradient_dtype(state), device=device
                    )
            run.optimizer.step()
            run.optimizer.zero_grad()
        _read(run)
        run.engine.close()

    return step


def _gradient_dtype(state: ParamState) -> torch.dtype:
    return getattr(state.param, "grad_dtype", None) or state.param.dtype


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
        f"two backwards, last first, {mode}": _two_backwards(mode, last_first=True)
        for mode in ("offload", "mixed", "weights on disk")
    },
    **{
        f"gradients by hand, {mode}": _gradients_by_hand(mode)
        for mode in ("streamed", "mixed", "sums of offload", "state on disk", "weights on disk")
    },
    **{
        f"evaluate, {mode}": _evaluated(mode)
        for mode in ("mixed", "offload", "weights on disk", "sums on disk")
    },
    **{
        f"write beside a save, {mode}": _written_beside_a_save(mode)
        for mode in ("mixed", "sums of offload", "state on disk", "weights on disk")
    },
    **{
        f"interrupt and {'reset' if reset else 'go on'}, {mode}": _interrupted(mode, reset=reset)
        for mode in ("streamed", "offload", "sums", "weights on disk")
        for reset in (True, False)
    },
    **{
        f"interrupt a second backward and {'reset' if reset else 'go on'}": _interrupted(
            "streamed", reset=reset, twice=True
        )
        for reset in (True, False)
    },
    "cut short, fetch": _cut_short("streamed", Lane, "fetch of"),
    "cut short, weights on disk": _cut_short("weights on disk", Lane, "fetch of"),
    "cut short, input": _cut_short("offload", Lane, "activations of"),
    "cut short, gradients": _cut_short("mixed", Lane, "gradients of"),
    "cut short, sum": _cut_short("sums", UpdateWorker, "gradient sum"),
    "leased for ever": _leased_for_ever("streamed"),
    "longer batches": _longer_batches("sums of offload"),
    **{
        f"write, {mode}": _written(mode)
        for mode in ("mixed", "sums", "overlapped outside in RAM", "weights on disk")
    },
}
