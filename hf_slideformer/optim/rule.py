"""Update rules: all that one optimizer's mathematics is for everything else.

Whoever places, saves or updates state knows only this: which tensors a parameter needs besides its master, what a
parameter group says, and a call that updates a run of elements in place. A rule is data, and equal to another one that
does the same.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping
from typing import Any, Protocol

import torch

from ..memory.layout import MomentFormat, ParamSpec


class UpdateRule(Protocol):
    """One way to update parameters.

    Attributes:
        name: as users know it, and as checkpoints name it.
        format: tensors that are kept for each parameter besides its master.
        readable: formats of saved state that it can go on from.
        counts_steps: whether the number of a parameter's updates so far changes the next one, so that saved state must
            say it.
    """

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> MomentFormat: ...

    @property
    def readable(self) -> tuple[MomentFormat, ...]: ...

    @property
    def counts_steps(self) -> bool: ...

    def hyperparams(self, group: Mapping[str, Any]) -> Hashable:
        """A snapshot of what a parameter group says; equal to another one where updates would be the same.

        Raises:
            StateError: it asks for an update that needs other state than `format`.
        """
        ...

    def scalars(self, hyperparams: Any, step: int) -> Any:
        """The kernels' numbers for a parameter's update number `step` (from 1)."""
        ...

    def apply(
        self,
        masters: tuple[torch.Tensor, ...],
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        scalars: Any,
        grad_scale: float,
        threads: int | None,
    ) -> None:
        """Update a run of elements in place, on the device of its tensors.

        Args:
            masters: (numel,) fp32 weights, or the bf16 and int16 halves of split ones.
            grad: (numel,) bf16 or fp32.
            moments: by name, as `format` says.
            scalars: of this step.
            grad_scale: the gradient is multiplied by it first.
            threads: of the CPU's kernels; None elsewhere.
        """

    def convert(self, moments: Mapping[str, torch.Tensor], have: MomentFormat) -> dict[str, torch.Tensor]:
        """Moments by name from another of the `readable` formats, in new tensors beside those given."""
        ...


def saved_format(rule: UpdateRule, names: Container[str]) -> MomentFormat:
    """The format of saved state with these names, of those that `rule` can read: that of which most parts are there."""
    return max(rule.readable, key=lambda form: sum(part.name in names for part in form.parts))


def described(rule: UpdateRule) -> str:
    """A rule and what it keeps, for messages."""
    return f"{rule.name} ({', '.join(part.name for part in rule.format.parts) or 'no state'})"


def zero_moments(moments: MomentFormat, spec: ParamSpec, device: torch.device) -> dict[str, torch.Tensor]:
    """The moments by name of a parameter that has not been updated yet, in tensors of their own."""
    return {
        part.name: torch.zeros(part.shape(spec), dtype=part.dtype, device=device) for part in moments.parts
    }
