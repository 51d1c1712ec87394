"""`SlideOptimizer`: what all optimizers here are: real `torch.optim.Optimizer`s whose state lives in the engine.

An optimizer is a file of its own (`adamw.py`, `lion.py`, `sgd.py`): the class that users see, and its `UpdateRule`. The
list of all is in `optim/__init__.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from ..errors import CheckpointError, ConfigError, StateError, UnsupportedModelError
from .rule import UpdateRule, described
from .state import ParamState


class OptimizerBackend(Protocol):
    """What a `SlideOptimizer` needs from the engine that owns the state."""

    @property
    def rule(self) -> UpdateRule:
        """What the state is for."""
        ...

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


class SlideOptimizer(torch.optim.Optimizer):
    """Base of optimizers whose weights, masters and moments may live anywhere.

    Works like any of `torch.optim` once model and optimizer were prepared together; before that, `step()` raises.
    Schedulers, parameter groups and `state_dict` are the ordinary ones.

    Args:
        params: parameters or parameter groups.
        defaults: hyperparameters of groups that do not say them.

    Attributes:
        rule_name: as users know the rule, and as checkpoints name it.
        same_as: torch's optimizer of the same mathematics, of which a fresh one is taken over; None if there is none.
        trainer_names: values of `TrainingArguments.optim` that stand for it.
    """

    rule_name: ClassVar[str]
    same_as: ClassVar[type[torch.optim.Optimizer] | None] = None
    trainer_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, params: Iterable[torch.Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]
    ) -> None:
        super().__init__(params, defaults)
        self._backend: OptimizerBackend | None = None
        self._unbound_by = ""

    # -- what a rule says of itself --------------------------------------------------------------------------

    @classmethod
    def rule_for(cls, groups: Sequence[Mapping[str, Any]], optimizer_states: str) -> UpdateRule:
        """The rule that parameter groups with these hyperparameters are updated by.

        Args:
            groups: hyperparameters; what a group leaves out is the default.
            optimizer_states: `SlideConfig.optimizer_states`.

        Raises:
            ConfigError: the rule's state cannot be kept so.
        """
        raise NotImplementedError

    @classmethod
    def arguments_of(cls, args: Any) -> dict[str, Any]:
        """Hyperparameters for one of `trainer_names`, from transformers' `TrainingArguments`.

        Raises:
            ConfigError: `optim_args` says what the optimizer does not know.
        """
        raise NotImplementedError

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raise `UnsupportedModelError` for options of torch's optimizer that change its mathematics."""

    # -- taking over torch's ---------------------------------------------------------------------------------

    @classmethod
    def adopt(cls, optimizer: torch.optim.Optimizer) -> SlideOptimizer:
        """One of this kind that shares the parameter groups of a fresh optimizer of torch; one of ours as it is.

        The group dictionaries are shared by reference, so schedulers made for `optimizer` keep driving it.

        Raises:
            UnsupportedModelError, StateError: as `check_adoptable`.
        """
        cls.check_adoptable(optimizer)
        if isinstance(optimizer, cls):
            return optimizer
        adopted = cls([{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups])  # type: ignore[call-arg]
        adopted.param_groups = optimizer.param_groups
        adopted.defaults = optimizer.defaults
        # Schedulers warn when the optimizer they were made for never steps; ours steps in its place.
        optimizer.__dict__["_opt_called"] = True
        return adopted

    @classmethod
    def check_adoptable(cls, optimizer: torch.optim.Optimizer) -> None:
        """Raise if `adopt` cannot take `optimizer`.

        Raises:
            UnsupportedModelError: another optimizer, an option that changes its mathematics, or steps that were made.
            StateError: it has lost its state.
        """
        if isinstance(optimizer, cls):
            optimizer.check_not_unbound()
            return
        if type(optimizer) is not cls.same_as:
            raise UnsupportedModelError(
                f"{type(optimizer).__name__} is not what {cls.__name__} stands for; make a {cls.__name__}"
            )
        for group in optimizer.param_groups:
            cls.check_options(group)
        if optimizer.state:
            raise UnsupportedModelError(
                "the optimizer has already made steps; prepare it before the first one, then load its state_dict"
            )

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

    def check_not_unbound(self) -> None:
        """Raise `StateError` if the model has left the engine that owned the state."""
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
            self.check_not_unbound()
            raise StateError(
                f"{type(self).__name__} has no state yet: prepare model and optimizer together (SlideTrainer does it "
                "in train(); in a loop: model, optimizer = accelerator.prepare(model, optimizer))"
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
        """State as `torch.optim` gives it: per parameter `step`, moments by their names, and `master_residual` (int16)
        for split masters. Tensors are the live state, not copies, unless it lives on disk; then all of that is read
        into RAM.

        AdamW has `exp_avg` and `exp_avg_sq`, Lion `exp_avg`, SGD with momentum `momentum_buffer`. 8-bit moments are
        int8 and uint8, as they are stored, with `exp_avg_scale` and `exp_avg_sq_scale` beside them.
        """
        if self._backend is None:
            self.check_not_unbound()
            return super().state_dict()
        self._backend.synchronize()
        packed = super().state_dict()  # groups with indices; self.state is empty
        state: dict[int, dict[str, Any]] = {}
        entries: dict[int, ParamState] = {}
        for index, param in enumerate(self._params()):
            entry = self._backend.param_state(param)
            if entry.rule is not None:
                entries[index] = entry
        for members in _by_group(entries):
            copied = not members[0][1].is_in_memory  # what is read is there only for a moment
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
        """Copy state into place, bit for bit; the state of torch's optimizer of the same rule is accepted too.

        Where moments were saved in another format (fp32 or 8-bit) they are converted. Load the model's weights
        first: a `master_residual` belongs to the weights it was saved with.

        Raises:
            CheckpointError: groups, rule or shapes do not match this optimizer's; nothing was changed.
            UnsupportedModelError: options that change the mathematics of torch's optimizer, likewise.
        """
        backend = self._bound()
        backend.synchronize()
        groups, saved = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
            raise CheckpointError(
                f"the saved optimizer has groups of {[len(g['params']) for g in saved]} parameters, this one of "
                f"{[len(g['params']) for g in groups]}; resume with the same model and weight-decay settings"
            )
        self._check_saved_groups(saved)
        params = self._params()
        indices = [index for group in saved for index in group["params"]]
        entries = [
            (backend.param_state(param), state_dict["state"][index])
            for index, param in zip(indices, params, strict=True)
            if _has_state(state_dict["state"].get(index))
        ]
        for entry, values in entries:
            entry.check_saved(values)
        saved_of = {index: values for index, (_, values) in enumerate(entries)}
        for members in _by_group({index: entry for index, (entry, _) in enumerate(entries)}):
            with backend.state_in_memory([entry for _, entry in members], write=True):
                for index, entry in members:
                    values = saved_of[index]
                    entry.load_moments(values)
                    if entry.residual is not None and "master_residual" in values:
                        entry.residual.copy_(values["master_residual"])
                    # Where the number does not matter, torch does not count.
                    entry.step = int(values.get("step", 1))
        for group, saved_group in zip(groups, saved, strict=True):
            group.update({key: value for key, value in saved_group.items() if key != "params"})
        backend.state_loaded()

    def _check_saved_groups(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Raise `CheckpointError` where groups are another optimizer's, or come with another format of state."""
        rule = self._bound().rule
        # "fp32" is what every rule can read; other values of `optimizer_states` are no matter of the groups.
        theirs = self.rule_for(saved, "fp32")
        if theirs.format not in rule.readable:
            raise CheckpointError(
                f"the saved optimizer is {described(theirs)}, this one {described(rule)}, which does not go on from "
                "it; set its hyperparameters as they were, or load only the model's weights"
            )
        for group in saved:
            self.check_options(group)
            try:
                rule.hyperparams(group)
            except KeyError as missing:
                raise CheckpointError(
                    f"the saved parameter groups have no {missing}: they are not those of {rule.name}; resume with the "
                    "optimizer that saved them, or load only the model's weights"
                ) from None

    def _params(self) -> list[torch.nn.Parameter]:
        return [param for group in self.param_groups for param in group["params"]]


def _by_group(entries: Mapping[int, ParamState]) -> list[list[tuple[int, ParamState]]]:
    """Entries with their indices, by the group that they move with."""
    groups: dict[int, list[tuple[int, ParamState]]] = {}
    for index, entry in entries.items():
        groups.setdefault(entry.group, []).append((index, entry))
    return list(groups.values())


def _has_state(values: Mapping[str, Any] | None) -> bool:
    """Whether the optimizer had updated a parameter; torch keeps entries without tensors, too."""
    return values is not None and any(value is not None for value in values.values())


def parsed_arguments(text: str | None, **kinds: Callable[[str], Any]) -> dict[str, Any]:
    """`TrainingArguments.optim_args`, "name=value, ...", as a dictionary.

    Args:
        text: the argument; None is empty.
        kinds: what makes a value of its text, by name.

    Raises:
        ConfigError: another name, or a part that is not of this form.
    """
    found = {}
    for part in (text or "").replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if not part:
            continue
        try:
            found[name] = kinds[name](value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"optim_args: {part!r} in {text!r} is not name=value for one of {', '.join(kinds)}"
            ) from None
    return found
