"""`SlideAdamW`: the optimizer a user sees; a real `torch.optim.Optimizer` whose state lives in the engine.

Mathematics: AdamW with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, Algorithm 2), on
fp32 master weights. Moments are fp32, or 8-bit codes with one scale for each block of elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..errors import CheckpointError, StateError, UnsupportedModelError
from .state import ParamState


class OptimizerBackend(Protocol):
    """What `SlideAdamW` needs from the engine that owns the state."""

    def step(self) -> None:
        """Apply or enqueue one update of every parameter that has a gradient."""

    def synchronize(self) -> None:
        """Block until every enqueued update is done."""

    def param_state(self, param: torch.nn.Parameter) -> ParamState:
        """The state of a parameter in one of the optimizer's groups."""
        ...

    def state_in_memory(
        self, states: Sequence[ParamState], *, write: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Make `residual` and `moments` of one unit's parameters tensors, wherever they live.

        Residuals of weights that were written from outside are cleared first.
        """
        ...

    def state_loaded(self) -> None:
        """Called after optimizer state was replaced."""

    def groups_changed(self) -> None:
        """Called after a parameter group was added."""


class SlideAdamW(torch.optim.Optimizer):
    """AdamW whose weights, masters and moments may live anywhere.

    Works like `torch.optim.AdamW` once model and optimizer were prepared together; before that, `step()`
    raises. Schedulers, parameter groups and `state_dict` are the ordinary ones.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: a hyperparameter outside its range.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if float(lr) < 0.0:
            raise ValueError(f"lr must be >= 0, got {lr}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if eps < 0.0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._backend: OptimizerBackend | None = None
        self._unbound_by = ""

    @classmethod
    def adopt(cls, optimizer: torch.optim.Optimizer) -> SlideAdamW:
        """A SlideAdamW that shares the parameter groups of a fresh `torch.optim.AdamW`.

        The group dictionaries are shared by reference, so schedulers made for `optimizer` keep driving it.

        Raises:
            UnsupportedModelError: any other optimizer, or an option of AdamW that changes its mathematics.
        """
        if isinstance(optimizer, cls):
            return optimizer
        cls.check_adoptable(optimizer)
        adopted = cls([{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups])
        adopted.param_groups = optimizer.param_groups
        adopted.defaults = optimizer.defaults
        # Schedulers warn when the optimizer they were made for never steps; ours steps in its place.
        optimizer.__dict__["_opt_called"] = True
        return adopted

    @classmethod
    def check_adoptable(cls, optimizer: torch.optim.Optimizer) -> None:
        """Raise `UnsupportedModelError` unless `adopt` can take `optimizer`; `StateError` if it has lost its state."""
        if isinstance(optimizer, cls):
            optimizer._check_not_unbound()
            return
        if type(optimizer) is not torch.optim.AdamW:
            raise UnsupportedModelError(
                f"{type(optimizer).__name__} cannot update streamed parameters; use torch.optim.AdamW or "
                "hf_slideformer.SlideAdamW (TrainingArguments: optim='adamw_torch' or 'adamw_torch_fused')"
            )
        for group in optimizer.param_groups:
            cls.check_options(group)
        if optimizer.state:
            raise UnsupportedModelError(
                "the optimizer has already made steps; prepare it before the first one, then load its state_dict"
            )

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raise `UnsupportedModelError` for options of `torch.optim.AdamW` that change its mathematics."""
        for option in ("amsgrad", "maximize", "differentiable"):
            if options.get(option):
                raise UnsupportedModelError(f"AdamW's option {option}=True is not supported; leave it off")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim`; after preparation the parameters must be trainable ones of the prepared model."""
        super().add_param_group(param_group)
        if getattr(self, "_backend", None) is not None:
            try:
                self._bound().groups_changed()
            except Exception:
                self.param_groups.pop()
                raise

    def bind(self, backend: OptimizerBackend) -> None:
        """Connect to the engine that owns the parameters' state."""
        self._backend, self._unbound_by = backend, ""

    def trainable_state_dict(self) -> dict[str, Any]:
        """As `state_dict`, without what is kept of parameters that have been frozen since."""
        saved = self.state_dict()
        frozen = {index for index, param in enumerate(self._params()) if not param.requires_grad}
        saved["state"] = {index: values for index, values in saved["state"].items() if index not in frozen}
        return saved

    def unbind(self, reason: str) -> None:
        """Let go of the engine, and with it of all state; from then on every use says why.

        Args:
            reason: a clause that tells what happened to the model.
        """
        self._backend, self._unbound_by = None, reason

    def _check_not_unbound(self) -> None:
        if self._unbound_by:
            raise StateError(
                f"this optimizer has no state any more, because {self._unbound_by}; make a new optimizer (or a new "
                "trainer) for the model as it is now"
            )

    @property
    def is_bound(self) -> bool:
        """Whether an engine owns the parameters' state."""
        return self._backend is not None

    @property
    def has_lost_its_state(self) -> bool:
        """Whether the model has left the engine that owned the state."""
        return bool(self._unbound_by)

    def is_bound_to(self, backend: OptimizerBackend) -> bool:
        """Whether it is this engine that owns the state."""
        return self._backend is backend

    def _bound(self) -> OptimizerBackend:
        if self._backend is None:
            self._check_not_unbound()
            raise StateError(
                "SlideAdamW has no state yet: prepare model and optimizer together (SlideTrainer does it in "
                "train(); in a loop: model, optimizer = accelerator.prepare(model, optimizer))"
            )
        return self._backend

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        """One update of every parameter that has a gradient; may return before it is done.

        Args:
            closure: reevaluates the loss, as in `torch.optim`.

        Returns:
            The closure's loss, or None.

        Raises:
            StateError: model and optimizer were not prepared together.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._bound().step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State as `torch.optim` gives it: per parameter `step`, `exp_avg`, `exp_avg_sq`, and
        `master_residual` (int16) for split masters. Tensors are the live state, not copies, unless it lives on disk;
        then all of that is read into RAM.

        With 8-bit moments `exp_avg` is int8 and `exp_avg_sq` uint8, as they are stored, and `exp_avg_scale` and
        `exp_avg_sq_scale` are beside them.
        """
        if self._backend is None:
            self._check_not_unbound()
            return super().state_dict()
        self._backend.synchronize()
        packed = super().state_dict()  # groups with indices; self.state is empty
        state: dict[int, dict[str, Any]] = {}
        entries: dict[int, ParamState] = {}
        for index, param in enumerate(self._params()):
            entry = self._backend.param_state(param)
            if entry.moment_format is not None:
                entries[index] = entry
        for members in _by_unit(entries):
            copied = not members[0][1].moments  # on disk: what is read is there only for a moment
            with self._backend.state_in_memory([entry for _, entry in members]):
                for index, entry in members:
                    tensors = dict(entry.moments)
                    if entry.residual is not None:
                        tensors["master_residual"] = entry.residual
                    if copied:
                        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
                    state[index] = {"step": torch.tensor(float(entry.step)), **tensors}
        packed["state"] = {index: state[index] for index in entries}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy state into place, bit for bit; a `torch.optim.AdamW` state is accepted too.

        Where moments were saved in the other format (fp32 or 8-bit) they are converted. Load the model's weights
        first: a `master_residual` belongs to the weights it was saved with.

        Raises:
            CheckpointError: groups or shapes do not match this optimizer's; nothing was changed.
        """
        backend = self._bound()
        backend.synchronize()
        groups, saved = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
            raise CheckpointError(
                f"the saved optimizer has groups of {[len(g['params']) for g in saved]} parameters, this one of "
                f"{[len(g['params']) for g in groups]}; resume with the same model and weight-decay settings"
            )
        params = self._params()
        indices = [index for group in saved for index in group["params"]]
        entries = [
            (backend.param_state(param), state_dict["state"][index])
            for index, param in zip(indices, params, strict=True)
            if state_dict["state"].get(index) is not None
        ]
        for entry, values in entries:
            entry.check_saved_moments(values)
        saved_of = {index: values for index, (_, values) in enumerate(entries)}
        for members in _by_unit({index: entry for index, (entry, _) in enumerate(entries)}):
            with backend.state_in_memory([entry for _, entry in members], write=True):
                for index, entry in members:
                    values = saved_of[index]
                    entry.load_moments(values)
                    if entry.residual is not None and "master_residual" in values:
                        entry.residual.copy_(values["master_residual"])
                    entry.step = int(values["step"])
        for group, saved_group in zip(groups, saved, strict=True):
            group.update({key: value for key, value in saved_group.items() if key != "params"})
        backend.state_loaded()

    def _params(self) -> list[torch.nn.Parameter]:
        return [param for group in self.param_groups for param in group["params"]]


def _by_unit(entries: Mapping[int, ParamState]) -> list[list[tuple[int, ParamState]]]:
    """Entries with their indices, one list for each unit and one for all that is outside."""
    groups: dict[int | None, list[tuple[int, ParamState]]] = {}
    for index, entry in entries.items():
        groups.setdefault(entry.unit, []).append((index, entry))
    return list(groups.values())
