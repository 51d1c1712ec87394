"""In RAM: the home of a streamed unit whose whole state is in host buffers."""

from __future__ import annotations

from ...memory.buffers import Buffer, HostBuffer, Pin
from ...memory.layout import UnitLayout
from ...memory.runtime import Runtime
from ...memory.unit_memory import UnitMemory
from ...optim.rule import UpdateRule
from .streamed import StreamedUnit


class InRam(StreamedUnit):
    """State of one unit in buffers of its own.

    What the device never touches (residuals, moments) is not pinned; nor are fp32 sums, which the CPU makes from
    staging buffers.

    Args:
        name: of the unit.
        layout: of its parameters.
        input_bytes: of an input that waits for backward in the memory of gradients, which is empty until then; 0 where
            none does.
        runtime: moves and updates the state; its pins are asked for weights and gradients.
    """

    def __init__(self, name: str, layout: UnitLayout, input_bytes: int, runtime: Runtime) -> None:
        self._pin: Pin = runtime.pins.take(layout.weight_bytes + layout.grad_bytes)
        self._least_bytes = input_bytes
        memory = UnitMemory(layout, HostBuffer(layout.weight_bytes, pin=self._pin), self._residuals(layout))
        super().__init__(name, memory, runtime)

    @staticmethod
    def _residuals(layout: UnitLayout) -> Buffer | None:
        return HostBuffer(2 * layout.lo_numel) if layout.lo_numel else None

    def _allocate_moments(self, rule: UpdateRule) -> None:
        self.memory.allocate_moments(rule.format)

    def _gradient_buffer(self, nbytes: int, *, fp32: bool) -> Buffer:
        return HostBuffer(nbytes if fp32 else max(nbytes, self._least_bytes), pin=not fp32 and self._pin)

    def free_for_training(self) -> None:
        """See `Home`."""
        super().free_for_training()
        self.memory.use_moments({})
