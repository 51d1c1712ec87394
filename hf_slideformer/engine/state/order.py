"""Order: which units come next. Pure data in, data out.

The order of units is the one recorded in this step's forward, not the index: layers may be dropped at random,
and encoder-decoder models have two stacks. Before anything was recorded the index order is the best guess; a
wrong guess costs a wait, never a wrong number.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tape:
    """The units run forward since the last step, in order; positions are handed to backward.

    `expected` is the order of the last complete step, or the index order.
    """

    expected: tuple[int, ...]
    recorded: list[int] = field(default_factory=list)

    def record(self, unit: int) -> int:
        """Note that `unit` runs forward now; returns its position."""
        self.recorded.append(unit)
        return len(self.recorded) - 1

    def place(self, unit: int) -> int:
        """The place of `unit` in the order of forward; last where it is not known."""
        order = self.recorded or self.expected
        return order.index(unit) if unit in order else len(order)

    def restart(self) -> None:
        """Begin a new step; what was recorded becomes what is expected."""
        if self.recorded:
            self.expected = tuple(self.recorded)
            self.recorded = []


def after_forward(
    expected: Sequence[int], unit: int, depth: int, streamed: Container[int]
) -> tuple[int, ...]:
    """Up to `depth` streamed units expected after `unit` in forward; backward starts after the last."""
    try:
        position = expected.index(unit)
    except ValueError:
        return ()
    return _first_streamed(expected[position + 1 :], depth, streamed)


def after_backward(
    recorded: Sequence[int], position: int, depth: int, streamed: Container[int]
) -> tuple[int, ...]:
    """Up to `depth` streamed units that backward needs after the one at `position` of the recorded forward."""
    return _first_streamed(recorded[:position][::-1], depth, streamed)


def _first_streamed(order: Sequence[int], depth: int, streamed: Container[int]) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for unit in order:
        if len(found) >= depth:
            break
        if unit in streamed:
            found[unit] = None
    return tuple(found)
