"""How far the rounding of gradients alone can move a weight.

Adam divides a gradient by its own size, so that an element whose true gradient is nearly zero is moved by rounding
errors: of 4,096 elements of an embedding one had a gradient of -8.6e-8 in the only step in which its token occurs, an
error in it of 4e-9 (another order of additions, another CPU) moved it by 1e-5, and against the same training in float64
plain Trainer was off by 6e-6 to 1.3e-5 there, SlideTrainer by 1.1e-5 to 3.4e-5, depending on the CPU's instructions.
Neither is wrong, and no tolerance for all elements says anything about this one. So each has its own: what Adam makes
of the gradients that were there, and of the same with an error added.
"""

from __future__ import annotations

import torch
from transformers import TrainerCallback

ERROR = 1.0
"""Rounding error of a gradient's element, in units of fp32's spacing at the largest element of that gradient."""


class Sensitivity(TrainerCallback):
    """Records what the optimizer is given in a run, and says what errors in it would have done."""

    def __init__(self) -> None:
        self._steps: dict[torch.Tensor, list[tuple[torch.Tensor, float]]] = {}
        self._names: dict[str, torch.Tensor] = {}
        self._groups: dict[torch.Tensor, dict] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Keep the gradients, clipped as they are, and the learning rate."""
        self._names = dict(model.named_parameters(remove_duplicate=False))
        for group in optimizer.param_groups:
            for param in group["params"]:
                self._groups[param] = group
                if param.grad is not None:
                    self._steps.setdefault(param, []).append(
                        (param.grad.double().clone(), float(group["lr"]))
                    )

    def by_name(self) -> dict[str, torch.Tensor]:
        """For each parameter that got gradients: how far errors can move each element, float64."""
        moved = {param: self._moved(param) for param in self._steps}
        return {name: moved[param] for name, param in self._names.items() if param in moved}

    def _moved(self, param: torch.Tensor) -> torch.Tensor:
        up, down = (self._total_update(param, sign * ERROR) for sign in (1.0, -1.0))
        return (up - down).abs()

    def _total_update(self, param: torch.Tensor, error: float) -> torch.Tensor:
        """The sum of Adam's updates, with an error of `error` spacings in each gradient that is not exactly zero."""
        group = self._groups[param]
        (beta1, beta2), eps = group["betas"], group["eps"]
        first = torch.zeros_like(param, dtype=torch.float64)
        second, total = torch.zeros_like(first), torch.zeros_like(first)
        for step, (grad, lr) in enumerate(self._steps[param], 1):
            spacing = torch.finfo(torch.float32).eps * grad.abs().max()
            seen = torch.where(grad == 0, grad, grad + error * spacing)
            first.lerp_(seen, 1 - beta1)
            second.lerp_(seen * seen, 1 - beta2)
            size = (second / (1 - beta2**step)).sqrt_().add_(eps)
            total.addcdiv_(first, size, value=-lr / (1 - beta1**step))
        return total
