"""Members of other packages that no documentation promises to keep, and what would break without each.

They are looked for when a trainer, an accelerator or an engine is made, so that a version without one of them is
refused by name before anything is moved. The worst are methods of Trainer that are overridden here: renamed upstream,
they would silently never be called. docs/compatibility.md lists all of this for readers.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .errors import UnsupportedVersionError

SUPPORTED: Mapping[str, tuple[str, str]] = {
    "torch": ("2.9", "2.13"),
    "transformers": ("5.17", "5.24"),
    "accelerate": ("1.15", "1.15"),
    "trl": ("1.16", "1.16"),
    "peft": ("0.21", "0.21"),
}
"""By package: the oldest version that works, and the newest one that was tested."""


@dataclass(frozen=True, slots=True)
class Member:
    """What must be there.

    Args:
        places: `module:attribute.attribute`; one of them is enough.
        breaks: what would go wrong without it.
        is_called: it is overridden here, so other code of the same class must call it.
        used_by: it is an attribute of instances, and these functions of their class must use it by this name.
    """

    places: tuple[str, ...]
    breaks: str
    is_called: bool = False
    used_by: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """The distribution that it belongs to."""
        return self.places[0].split(".")[0].split(":")[0]

    @property
    def owner(self) -> str:
        """The place of the class or module that it is in."""
        place = self.places[0]
        return place[: max(place.rfind("."), place.rfind(":"))]

    @property
    def last_name(self) -> str:
        """Its own name there."""
        return self.places[0][len(self.owner) + 1 :]


def _members(owner: str, breaks: str, *names: str, is_called: bool = False) -> tuple[Member, ...]:
    return tuple(Member((f"{owner}{name}",), breaks, is_called) for name in names)


_TRAINER = "transformers.trainer:Trainer."
_SAVING = "checkpoints would be written by Trainer itself, without masters and moments"
_LOADING = "a resumed run would start from other weights or moments"

TRAINER: tuple[Member, ...] = (
    *_members(
        _TRAINER,
        "the model would be placed and trained by plain Accelerate",
        "create_accelerator_and_postprocess",
        "_move_model_to_device",
        "create_optimizer",
        "training_step",
        is_called=True,
    ),
    *_members(
        _TRAINER,
        _SAVING,
        "_save",
        "_save_checkpoint",
        "_save_optimizer_and_scheduler",
        "_get_output_dir",
        "_push_from_checkpoint",
        is_called=True,
    ),
    *_members(
        _TRAINER,
        "files that a subclass adds to a checkpoint would be missed",
        "save_model",
        "_save_rng_state",
        "_save_scaler",
    ),
    *_members(
        _TRAINER,
        "saves would never overlap with training, or go on while somebody reads them",
        "_maybe_log_save_evaluate",
        "_finalize_training",
        is_called=True,
    ),
    *_members(
        _TRAINER,
        _LOADING,
        "_load_from_checkpoint",
        "_load_best_model",
        "_load_optimizer_and_scheduler",
        is_called=True,
    ),
    *_members(
        _TRAINER, "a resumed run would make one step more than `max_steps`", "_run_epoch", is_called=True
    ),
    *_members(_TRAINER, _LOADING, "_load_rng_state"),
    *_members(
        _TRAINER, "the learning rate and decay would not be those asked for", "get_optimizer_cls_and_kwargs"
    ),
    Member(
        ("transformers.trainer_pt_utils:LabelSmoother",),
        "label smoothing would need all logits",
    ),
    Member(
        ("transformers.training_args:TrainingArguments._n_gpu",),
        "several visible GPUs would wrap the model in DataParallel",
        used_by=("n_gpu",),
    ),
    Member(
        (
            "transformers.modeling_utils:PreTrainedModel.is_activation_checkpointing",
            "transformers.modeling_utils:PreTrainedModel.is_gradient_checkpointing",
        ),
        "layers would be recomputed a second time by transformers",
    ),
)

ACCELERATOR: tuple[Member, ...] = (
    Member(
        ("accelerate.accelerator:Accelerator._models",),
        "prepared models would not be found when gradients are clipped and state is saved",
        used_by=("prepare_model", "save_state", "load_state"),
    ),
    Member(
        ("accelerate.accelerator:Accelerator._optimizers",),
        "the optimizer's state would be saved by Accelerate itself",
        used_by=("prepare_optimizer", "save_state", "load_state"),
    ),
    *_members(
        "accelerate.accelerator:Accelerator.",
        "weights and optimizer state would be saved or loaded by Accelerate itself",
        "register_save_state_pre_hook",
        "register_load_state_pre_hook",
        "get_state_dict",
    ),
    *_members(
        "accelerate.accelerator:Accelerator.",
        "the model or its optimizer would be placed by Accelerate",
        "prepare_model",
        "prepare_optimizer",
        is_called=True,
    ),
    *_members(
        "accelerate.utils.deepspeed:",
        "stand-ins for DeepSpeed's optimizer would not be refused",
        "DummyOptim",
        "DummyScheduler",
    ),
)

_C = "torch._C:"

ENGINE: tuple[Member, ...] = (
    *_members(
        _C,
        "the end of a backward would not be noticed, and gradients would be used before they are there",
        "_current_graph_task_id",
    ),
    Member(
        ("torch.autograd:Variable._execution_engine.queue_callback",),
        "the end of a backward would not be noticed, and gradients would be used before they are there",
    ),
    *_members(
        _C, "`torch.autograd.grad` would fill the gradients of parameters", "_will_engine_execute_node"
    ),
    Member(
        ("torch._C:_autograd._get_sequence_nr",),
        "a tensor with a gradient that reaches a layer past its arguments would not be noticed",
    ),
    Member(
        ("torch:Tensor._version",),
        "writes to weights and activations would not be noticed",
    ),
    *_members("torch:Tensor.", "gradient hooks that cannot run would not be refused", "_backward_hooks"),
    Member(
        ("torch:Tensor.register_post_accumulate_grad_hook",),
        "overlapped updates of resident parameters would not start",
    ),
    Member(
        ("torch.nn.modules.batchnorm:_NormBase",),
        "running statistics would be written twice",
    ),
    *_members(
        "torch.utils._pytree:",
        "layers' arguments could not be taken apart",
        "tree_flatten",
        "tree_unflatten",
    ),
    *_members(
        _C,
        "logits that are computed only when somebody reads them could not be handed out",
        "DisableTorchFunctionSubclass",
        "_disabled_torch_function_impl",
    ),
    *_members(
        "torch:Tensor.",
        "logits that are computed only when somebody reads them could not be handed out",
        "_make_wrapper_subclass",
    ),
    *_members(
        "torch._subclasses.fake_tensor:",
        "models could not be looked at without data, and weights without any not be told from others",
        "FakeTensor",
        "FakeTensorMode",
    ),
    Member(
        ("transformers.modeling_layers:GradientCheckpointingLayer",),
        "layers would not be found",
    ),
    *_members(
        "transformers.cache_utils:",
        "key-value caches would be filled twice, and gradients be wrong",
        "Cache",
        "CacheLayerMixin",
    ),
    Member(
        ("transformers.utils.output_capturing:_active_collector.get",),
        "gradients of router logits and recorded hidden states would be lost",
    ),
    *_members(
        "transformers.modeling_utils:PreTrainedModel.",
        "weights that a model keeps in fp32 on purpose would compute in bf16",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
    ),
    Member(
        ("transformers.core_model_loading:revert_weight_conversion",),
        "weights would be saved under other names than checkpoints have",
    ),
    Member(
        ("transformers.modeling_utils:remove_tied_weights_from_state_dict",),
        "tied weights would be saved twice",
    ),
    *_members(
        "transformers.modeling_utils:PreTrainedModel.",
        "buffers that a model does not save would be saved",
        "_keys_to_ignore_on_save",
    ),
    Member(
        ("transformers.integrations.peft:PeftAdapterMixin._hf_peft_config_loaded",),
        "a model with adapters of its own would be saved whole",
    ),
)

ADAPTERS: tuple[Member, ...] = (
    *_members(
        "peft.tuners.tuners_utils:BaseTunerLayer.",
        "adapters would be merged into the bf16 halves of fp32 weights",
        "merge",
        "unmerge",
        "get_base_layer",
    ),
    *_members(
        "peft.peft_model:PeftModel.",
        "the model inside would not be found when it is saved",
        "get_base_model",
    ),
)

REFERENCES: tuple[Member, ...] = (
    Member(
        ("trl.trainer.dpo_trainer:DPOTrainer.compute_ref_log_probs",),
        "reference log-probabilities would be computed by a model that is not prepared",
        is_called=True,
    ),
    *_members(
        "trl.trainer.dpo_config:DPOConfig.",
        "a reference model that follows the trained one would not be noticed",
        "sync_ref_model",
        "ref_model_sync_steps",
        "ref_model_mixup_alpha",
    ),
)

LAUNCHER: tuple[Member, ...] = (
    *_members(
        "accelerate.commands.launch:",
        "scripts would be started without being streamed",
        "simple_launcher",
        "load_config_from_file",
        "default_config_file",
    ),
)

GROUPS: Mapping[str, tuple[Member, ...]] = {
    "a trainer is made": TRAINER,
    "an accelerator is made": ACCELERATOR,
    "a model is prepared": ENGINE,
    "a model is prepared, where PEFT is in use": ADAPTERS,
    "a trainer of TRL's is made": REFERENCES,
    "a script is launched": LAUNCHER,
}
"""All of them, by the time when they are looked for."""


def check(members: tuple[Member, ...]) -> None:
    """Look for `members`.

    Raises:
        UnsupportedVersionError: one is missing or no longer in use; it names the package and its version.
    """
    for member in members:
        for user in member.used_by:
            if not _uses(_find(f"{member.owner}.{user}"), member.last_name):
                raise UnsupportedVersionError(_message(member, f"no longer uses, in `{user}`,"))
        if not member.used_by and all(_find(place) is _MISSING for place in member.places):
            raise UnsupportedVersionError(_message(member, "has no"))
    for member in members:  # once all are there: what is missing calls nothing either
        if member.is_called and not _is_called(member):
            raise UnsupportedVersionError(_message(member, "no longer calls"))


def check_overrides(overriding: type, members: tuple[Member, ...]) -> None:
    """Check that methods of `overriding` take what the methods that they override are called with.

    Raises:
        UnsupportedVersionError: one has a parameter that the method here does not know.
    """
    for member in members:
        ours = getattr(overriding, member.last_name, None)
        theirs = _find(member.places[0])
        if not member.is_called or ours is None or not callable(theirs):
            continue
        known = inspect.signature(ours).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            continue
        for name in inspect.signature(theirs).parameters:
            if name not in known:
                raise UnsupportedVersionError(_message(member, f"added the parameter `{name}` to"))


def check_adapters() -> None:
    """Look for what is used of PEFT, if it is in use. Raises as `check`."""
    if "peft.tuners.tuners_utils" in sys.modules:
        check(ADAPTERS)


def check_references(trainer: type) -> None:
    """Look for what is used of TRL, if `trainer` has a reference model of its kind. Raises as `check`."""
    if any(cls.__module__ == "trl.trainer.dpo_trainer" for cls in trainer.__mro__):
        check(REFERENCES)


def explained(error: ImportError) -> ImportError:
    """The error to raise for a module of this package that could not be imported: `error`, or what it comes from."""
    for members in (ENGINE, TRAINER, ACCELERATOR):
        try:
            check(members)
        except UnsupportedVersionError as reason:
            return reason
    return error


_MISSING: Any = object()


def _find(place: str) -> Any:
    module_name, _, path = place.partition(":")
    try:
        found: Any = import_module(module_name)
    except ImportError:
        return _MISSING
    for name in path.split("."):
        if (found := getattr(found, name, _MISSING)) is _MISSING:
            return _MISSING
    return found


def _is_called(member: Member) -> bool:
    """Whether a method's name is in the code of another function of its class; True where there is none to look at."""
    functions = [
        value
        for cls in _find(member.owner).__mro__
        for key, value in vars(cls).items()
        if key != member.last_name and _code_of(value) is not None
    ]
    return not functions or any(_uses(function, member.last_name) for function in functions)


def _uses(function: Any, name: str) -> bool:
    if function is _MISSING:
        return False
    code = _code_of(function)
    return code is None or any(name in part.co_names for part in _parts(code))


def _code_of(function: Any) -> types.CodeType | None:
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    if isinstance(function, (property, functools.cached_property)):
        function = function.fget if isinstance(function, property) else function.func
    unwrapped: Callable[..., Any] | None = inspect.unwrap(function) if callable(function) else None
    return getattr(unwrapped, "__code__", None)


def _parts(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _parts(constant)


def _message(member: Member, what: str) -> str:
    package = member.package
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "(of unknown version)"
    oldest, newest = SUPPORTED[package]
    tested = f"{oldest} to {newest}" if newest != oldest else oldest
    return (
        f"{package} {installed} {what} {' or '.join(place.replace(':', '.') for place in member.places)}, which "
        f"hf_slideformer relies on: {member.breaks}. It works with {package} {tested}; install one of those "
        f"(pip install '{package}>={oldest},<={newest}.*'), or a newer hf_slideformer"
    )
