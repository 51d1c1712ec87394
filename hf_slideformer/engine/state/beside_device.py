"""Parameters outside of units whose optimizer state is in RAM: embeddings and head of a model on a small GPU.

Their weights are on the device, where code outside of units reads them, and autograd fills their gradients there.
`step()` sends the gradients to RAM, the update worker updates a master there, and the new weights come back. Whatever
uses the model next waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...memory.transfer import Handle, Lane, compute_event
from ...memory.unit_memory import UnitMemory
from ...memory.worker import UpdateWorker
from ...metrics import Metrics
from ...optim.state import ParamState

# Before units' updates: the embedding is what the next forward needs first.
_PRIORITY = -1


class OutsideUpdates:
    """Updates parameters in RAM whose weights are on the device.

    Args:
        device: where the weights are.
        memory: their host memory.
        states: their states, `weight` in `memory` and `live` on the device.
        to_host: device-to-host lane.
        to_device: host-to-device lane.
        worker: runs the update.
        metrics: receives `d2h_bytes`, `h2d_bytes` and `updated_params`.
    """

    def __init__(
        self,
        device: torch.device,
        memory: UnitMemory,
        states: Sequence[ParamState],
        to_host: Lane,
        to_device: Lane,
        worker: UpdateWorker,
        metrics: Metrics,
    ) -> None:
        self._device = device
        self.memory = memory
        self.states = list(states)
        self._to_host, self._to_device = to_host, to_device
        self._worker = worker
        self._metrics = metrics
        self._pending: Handle | None = None
        # The gradients that are on their way: their memory must not be reused before they have left.
        self._leaving: list[torch.Tensor] = []

    def step(self, states: Sequence[ParamState], update: Callable[[], None]) -> None:
        """Send the gradients of `states` to RAM, run `update` there, and bring the new weights back."""
        pairs = [
            (self.memory.gradient(state.segment), state.param.grad)
            for state in states
            if state.param.grad is not None
        ]
        weights = [(state.live, state.weight) for state in states]

        def copy_gradients() -> None:
            for target, grad in pairs:
                target.copy_(grad, non_blocking=True)

        def copy_weights() -> None:
            for live, weight in weights:
                live.copy_(weight, non_blocking=True)

        self._leaving = [grad for _, grad in pairs]
        issued = compute_event(self._device)
        landed = self._to_host.submit("gradients outside of units", copy_gradients, after_events=(issued,))
        updated = self._worker.submit("update outside of units", update, priority=_PRIORITY, after=(landed,))
        self._pending = self._to_device.submit(
            "weights outside of units", copy_weights, after=(updated,), after_events=(issued,)
        )
        self._metrics.add("d2h_bytes", sum(grad.nbytes for grad in self._leaving))
        self._metrics.add("h2d_bytes", sum(live.nbytes for live, _ in weights))
        self._metrics.add("updated_params", sum(state.spec.numel for state in states))

    def wait_stream(self) -> None:
        """Make the current stream wait for the weights of the last step."""
        if self._pending is not None:
            self._pending.wait_stream()
            self._pending, self._leaving = None, []

    def abandon(self) -> BaseException | None:
        """Block until nothing of the last step is under way any more; returns why it failed, if it did."""
        if self._pending is None:
            return None
        self._pending.settle()
        error, self._pending, self._leaving = self._pending.error, None, []
        return error

    def wait_host(self) -> None:
        """Block until the weights of the last step are in place."""
        if self._pending is not None:
            self._pending.wait_host()
            self._pending, self._leaving = None, []
