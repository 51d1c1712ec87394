"""Beside the device: the home of parameters that are used there and updated in RAM.

Embeddings and head of a model on a small GPU: their weights are on the device, where code outside of units reads them,
and autograd fills their gradients there. A step sends the gradients to RAM, the update worker updates a master there,
and the new weights come back. Whatever uses the model next waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...memory.buffers import HostBuffer
from ...memory.layout import UnitLayout
from ...memory.runtime import Runtime
from ...memory.streams import compute_event
from ...memory.transfer import Handle
from ...memory.unit_memory import UnitMemory
from ...optim.rule import UpdateRule
from ...optim.state import ParamState, update_unit
from .home import Home, Step

# Before units' updates: the embedding is what the next forward needs first.
_PRIORITY = -1


class BesideDevice(Home):
    """Parameters whose weights are on the device, and masters and moments in RAM.

    Those that are not in `layout` are frozen, and on the device altogether.

    Args:
        layout: of the parameters that are trained.
        runtime: moves and updates them; its pins are asked for weights and gradients.
    """

    def __init__(self, layout: UnitLayout, runtime: Runtime) -> None:
        super().__init__(runtime)
        nbytes = layout.weight_bytes + layout.grad_bytes
        self._pin = nbytes > 0 and runtime.pins.take(nbytes)
        lo = HostBuffer(2 * layout.lo_numel) if layout.lo_numel else None
        self.memory = UnitMemory(layout, HostBuffer(layout.weight_bytes, pin=self._pin), lo)

    @property
    def host_bytes(self) -> int:
        """See `Home`."""
        return self.memory.nbytes

    def allocate(self, rule: UpdateRule, *, overlapped: bool, fp32_sums: bool) -> None:
        """See `Home`; gradients pass through RAM also where they do not wait."""
        self.memory.allocate_moments(rule.format)
        self._make_gradients(fp32=fp32_sums)
        for state in self.states:
            if state.spec.trainable:
                state.rule = rule
                state.moments = self.memory.moments(state.segment)

    def _make_gradients(self, *, fp32: bool) -> None:
        memory = self.memory
        if memory.grads is None or fp32 != memory.grads_fp32:
            nbytes = 4 * memory.layout.state_numel if fp32 else memory.layout.grad_bytes
            memory.use_gradients(HostBuffer(nbytes, pin=self._pin), fp32=fp32)

    def step(self, step: Step) -> Handle | None:
        """See `Home`."""
        states = [s for s in self.states if s.param.grad is not None and step.trains(s)]
        if not states:
            return None
        for handle in step.after:
            handle.wait_host()
        runs = step.plan(states)
        grads = [state.param.grad for state in states if state.param.grad is not None]
        if any(grad.dtype != state.spec.dtype for state, grad in zip(states, grads, strict=True)):
            self._make_gradients(fp32=True)  # sums, which may not be rounded on their way
        memory, runtime = self.memory, self._runtime
        buffer, fp32 = memory.grads, memory.grads_fp32
        assert buffer is not None
        done = self._send(states, grads, lambda: update_unit(memory, buffer, fp32, runs, runtime.threads))
        for state in states:
            state.note_update()
            # Detached like streamed gradients: zero_grad(set_to_none=False) must not reach one on its way to RAM.
            state.param.grad = None
        return done

    def _send(self, states: Sequence[ParamState], grads: Sequence[torch.Tensor], update) -> Handle:
        """Gradients to RAM, `update` there, and new weights back."""
        runtime, metrics = self._runtime, self._runtime.metrics
        places = [self.memory.gradient(state.segment) for state in states]
        weights = [(state.live, state.weight) for state in states]

        def copy_gradients() -> None:
            for place, grad in zip(places, grads, strict=True):
                place.copy_(grad, non_blocking=True)

        def copy_weights() -> None:
            for live, weight in weights:
                live.copy_(weight, non_blocking=True)

        issued = compute_event(runtime.device)
        landed = runtime.to_host.submit("gradients outside of units", copy_gradients, after_events=(issued,))
        updated = runtime.worker.submit(
            "update outside of units", runtime.guarded(update), priority=_PRIORITY, after=(landed,)
        )
        done = runtime.to_device.submit(
            "weights outside of units", copy_weights, after=(updated,), after_events=(issued,)
        )
        done.keep(grads)  # their memory must not be reused before they have left
        metrics.add("d2h_bytes", sum(grad.nbytes for grad in grads))
        metrics.add("h2d_bytes", sum(live.nbytes for live, _ in weights))
        metrics.add("updated_params", sum(state.spec.numel for state in states))
        return done

    def free_for_training(self) -> None:
        """See `Home`."""
        super().free_for_training()
        self.memory.use_gradients(None, fp32=False)
        self.memory.use_moments({})

    def free(self) -> None:
        """See `Home`."""
        self.memory = UnitMemory(self.memory.layout, HostBuffer(0))
