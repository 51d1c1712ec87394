"""Reading and writing a model's state from outside of training steps.

By those who ask for it (optimizer state dicts, checkpoints), and by those who know nothing of engines: `state_dict`,
`load_state_dict` and the `merge` of adapters are noticed by hooks. All of them wait for updates; whoever writes also
waits for a checkpoint that is being written beside training, and leaves no stale copy on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...memory.pool import SlotPool
from ...optim.state import ParamState
from ..model.stand_ins import Hook, ReplacedMethod
from .adapters import watch_adapters
from .group import StateGroup
from .parameters import (
    ModelRuns,
    ResidentParameter,
    StreamedParameter,
    guard_parameter,
    live_tensors,
    ordinary_parameter,
    share_tied,
    unguarded,
)
from .placement import PlacedModel, make_ordinary
from .updates import Updates


class StateAccess:
    """The way to one model's state for everyone but its updates.

    Args:
        placed: the state.
        updates: are waited for.
        pool: copies of units on the device.
    """

    def __init__(self, placed: PlacedModel, updates: Updates, pool: SlotPool) -> None:
        self._placed = placed
        self._updates = updates
        self._pool = pool
        self._in_hand = False
        # What `watch` has put on the model.
        self._watching: list[RemovableHandle | ReplacedMethod] = []
        self._runs = ModelRuns()
        self._run_hooks: list[RemovableHandle] = []
        # A `load_state_dict` that is going on: of which module, and its fp32 values by parameter.
        self._load_root: nn.Module | None = None
        self._loading: dict[int, torch.Tensor] = {}

    def watch(self, model: nn.Module) -> None:
        """Notice from now on who reads and writes the state without asking, and who runs the model."""
        watching = self._watching
        watching += watch_adapters(model, self.weights_in_hand)
        # Before the model runs, and before a module of its own that a script runs by itself.
        outside = {id(state.param) for state in self._placed.returning}
        for module in model.modules() if outside else ():
            owns = any(id(param) in outside for param in module.parameters(recurse=False))
            if owns or module is model or isinstance(module, PreTrainedModel):
                wait = Hook(self._updates, Updates.wait_outside)
                watching.append(module.register_forward_pre_hook(wait))
        for module in model.modules():
            watching += [
                module.register_state_dict_pre_hook(Hook(self, StateAccess.synchronize)),
                module.register_state_dict_post_hook(Hook(self, StateAccess.has_state_dict)),
                module.register_load_state_dict_pre_hook(Hook(self, StateAccess.load_begins)),
                module.register_load_state_dict_post_hook(Hook(self, StateAccess.load_ends)),
            ]
        self._guard(model)

    def _guard(self, model: nn.Module) -> None:
        """Have code outside of the engine meet whole weights, and wait for them."""
        for state in self._placed.leased:
            guard_parameter(state, StreamedParameter, self, self._runs)
        halves = [state for state in self._placed.computing if state.spec.split]
        for state in {id(state): state for state in (*halves, *self._placed.returning)}.values():
            guard_parameter(state, ResidentParameter, self, self._runs)
        streamed = {id(state.param) for state in self._placed.leased}
        inside = {id(module) for unit in self._placed.units for module in unit.found.module.modules()}
        units = {id(unit.found.module) for unit in self._placed.units if not unit.streams}
        hooks = self._run_hooks
        hooks.append(model.register_forward_pre_hook(Hook(self._runs, ModelRuns.forget)))
        for module in model.modules():
            owns = any(id(param) not in streamed for param in module.parameters(recurse=False))
            if (
                isinstance(module, PreTrainedModel)
                or id(module) in units
                or (owns and id(module) not in inside)
            ):
                begins, ends = Hook(self._runs, ModelRuns.begin), Hook(self._runs, ModelRuns.end)
                hooks.append(module.register_forward_pre_hook(begins))
                hooks.append(module.register_forward_hook(ends, always_call=True))

    def unguard(self) -> None:
        """Make every parameter one of torch's own class again; its memory is left as it is."""
        for state in self._placed.states:
            ordinary_parameter(state.param)
        while self._run_hooks:
            self._run_hooks.pop().remove()

    def forget_runs(self) -> None:
        """Called when a forward was interrupted: none of the model's modules is running."""
        self._runs.forget()

    def give_up(self) -> None:
        """Make every parameter an ordinary tensor in RAM, unit by unit, and stop noticing who reads and writes it.

        Raises:
            TransferError: reading from disk failed; the cause is chained. Some units have been given up, others not.
        """
        self.unguard()
        for state in self._placed.states:
            state.param.grad = None
        for group in self._placed.groups:
            group.home.free_for_training()
        for group in self._placed.groups:
            with self.opened(group):
                make_ordinary(group.states)
            self._placed.free(group)
        while self._watching:
            self._watching.pop().remove()

    def synchronize(self, *_: object) -> None:
        """See `Updates.synchronize`; called before `state_dict` of the model or a part of it."""
        self._updates.synchronize()

    def has_state_dict(
        self, module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: object
    ) -> None:
        """Called after `state_dict` of the model or a part of it, and before for each part inside."""
        if not prefix:
            share_tied(state_dict)

    # -- for whoever uses parameters; see `parameters.py` -------------------------------------------------------

    def settle(self, state: ParamState) -> None:
        """See `WeightAccess`."""
        self._placed.group_of(state).wait_host()

    def read_weight(self, state: ParamState, place: torch.Tensor) -> torch.Tensor:
        """See `WeightAccess`."""
        state.check_outside_write()
        group = self._placed.group_of(state)
        with group.home.open_residual(state, group.pending):
            return state.read_at(place)

    def write_weight(self, state: ParamState, place: torch.Tensor, values: torch.Tensor) -> None:
        """See `WeightAccess`."""
        if state.residual is not None or not state.spec.split:
            state.write_at(place, values)
            return
        with self.opened(self._placed.group_of(state), write=True):
            state.write_at(place, values)

    def is_loading(self, state: ParamState) -> bool:
        """See `WeightAccess`."""
        return state.order in self._loading

    # -- for those who ask -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, group: StateGroup, *, write: bool = False) -> Iterator[None]:
        """See `StateGroup.open`; once updates are done, and before it is written to what is being saved.

        Args:
            group: of parameters.
            write: put changes back where the state lives.

        Raises:
            TransferError: reading from disk failed; the cause is chained.
        """
        if write:
            self._updates.wait_held()
        self.synchronize()
        with group.open(write=write):
            yield

    def state_in_memory(
        self, states: Sequence[ParamState], *, write: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """The same for the group of `states`, which are of one."""
        if not states:
            return contextlib.nullcontext()
        return self.opened(self._placed.group_of(states[0]), write=write)

    @contextlib.contextmanager
    def weights_in_hand(self, module: nn.Module) -> Iterator[None]:
        """Make the parameters of `module`, of one unit or none, what they came in as; take over what is written there.

        For code that reads and writes `p.data`. Split masters of fp32 weights are joined meanwhile.
        """
        if self._in_hand:
            yield
            return
        self._updates.wait_held()
        self.synchronize()
        states = [state for p in module.parameters() if (state := self._placed.state_of(p)) is not None]
        groups = dict.fromkeys(self._placed.group_of(state) for state in states)
        before: list[torch.Tensor | None] = []
        self._in_hand = True
        try:
            with contextlib.ExitStack() as stack:
                for group in groups:
                    stack.enter_context(self.opened(group, write=True))
                stack.enter_context(unguarded(state.param for state in states))
                for state in states:
                    joined = state.read_master()
                    before.append(None if joined is not state.live else state.live.clone())
                    state.param.data = joined
                try:
                    yield
                finally:
                    for state, was in zip(states, before, strict=True):
                        written = state.param.data
                        state.param.data = state.live
                        if written.data_ptr() != state.live.data_ptr():
                            state.write_master(written)
                        elif was is not None and not torch.equal(was, written):
                            state.follow_live()
                        state.version = state.param._version
        finally:
            self._in_hand = False
            self._pool.invalidate()

    def weights_changed(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """See `SlideEngine.weights_changed`."""
        if self._updates.held is not None:
            self._updates.held.spoil("weights_changed() was called")
        self._updates.wait_held()
        self.synchronize()
        self._pool.invalidate()
        own = {id(state.param): state for state in self._placed.states}
        for state in own.values() if parameters is None else [own[id(p)] for p in parameters]:
            state.follow_live()

    def forget_moments(self) -> None:
        """Make every moment and step count zero."""
        self._updates.wait_held()
        for group in self._placed.groups:
            with self.opened(group, write=True):
                for state in group.states:
                    state.step = 0
                    for tensor in state.moments.values():
                        tensor.zero_()

    def state_dict_as_loaded(
        self, model: nn.Module, wanted: Callable[[ParamState], bool] | None = None
    ) -> dict[str, torch.Tensor] | None:
        """See `SlideEngine.state_dict_as_loaded`."""
        if not any(state.spec.joined_on_save for state in self._placed.states):
            return None
        self.synchronize()
        with live_tensors():
            result = model.state_dict()
        joined: dict[int, torch.Tensor] = {}  # by address of the live tensor
        for group in self._placed.groups:
            halves = [
                state
                for state in group.states
                if state.spec.joined_on_save and (wanted is None or wanted(state))
            ]
            with self.state_in_memory(halves):  # of those without, nothing is read
                for state in halves:
                    joined[state.live.data_ptr()] = state.read_master()
        return {name: joined.get(value.data_ptr(), value) for name, value in result.items()}

    # -- for `load_state_dict` -------------------------------------------------------------------------------

    def load_begins(
        self, module: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, *_: object
    ) -> None:
        """Called before `load_state_dict` of the model or a part of it, and again for each part inside."""
        if prefix and self._load_root is not None:
            return
        self._updates.wait_held()
        self.synchronize()
        self._load_root = module
        for key, param in module.named_parameters():
            state, value = self._placed.state_of(param), state_dict.get(prefix + key)
            if state is None or not state.spec.split or value is None:
                continue
            if value.dtype == torch.float32:
                self._loading[state.order] = value

    def load_ends(self, module: nn.Module, *_: object) -> None:
        """Called after `load_state_dict`: residuals follow the weights, fp32 ones exactly."""
        if module is not self._load_root:
            return  # a part of a load that is still going on
        for group in self._placed.groups:
            loaded = any(state.order in self._loading for state in group.states)
            with self.opened(group, write=True) if loaded else contextlib.nullcontext():
                for state in group.states:
                    if state.order in self._loading:
                        state.write_master(self._loading[state.order])
                    state.check_outside_write()
        self._loading = {}
        self._load_root = None
        self._pool.invalidate()
