"""Launching plain Accelerate scripts: `accelerate launch` with a `slideformer_config` section, `slideformer launch`.

Two processes. In the launcher's, `accept_section` takes the section out of the configuration that Accelerate reads
and changes what Accelerate starts: this module, with the script as its argument. In the script's, `main` binds
`accelerate.Accelerator` to `SlideAccelerator` and runs the script. The settings travel in an environment variable.
Importing this module imports neither torch nor Accelerate. docs/decisions/0014.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.machinery
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from . import compatibility
from .config import CONFIG_VARIABLE, SlideConfig
from .errors import ConfigError, UnsupportedModelError, UnsupportedVersionError

SECTION = "slideformer_config"

# What Accelerate starts a script with, by the name of the function, and the setting that chose it.
_REFUSED_LAUNCHERS = {
    "multi_gpu_launcher": "several processes, FSDP or Megatron-LM",
    "deepspeed_launcher": "DeepSpeed",
    "tpu_launcher": "TPUs",
    "tpu_pod_launcher": "TPUs",
    "sagemaker_launcher": "SageMaker",
}
_LAUNCHER = "simple_launcher"
_PLACED_BY_OTHERS = {"use_deepspeed": "DeepSpeed", "use_fsdp": "FSDP", "use_megatron_lm": "Megatron-LM"}


# -- the launcher's process --------------------------------------------------------------------------------------------


def launch(arguments: Sequence[str]) -> int:
    """Run a script as `accelerate launch` does, streamed: `slideformer launch`.

    Args:
        arguments: Accelerate's options, the script, and the script's arguments. Settings come from the configuration
            file (`--config_file`, or Accelerate's default one); without a section the defaults of `SlideConfig` hold.

    Returns:
        The script's exit code.

    Raises:
        ConfigError: the file cannot be read, or its section or the launch cannot be used.
    """
    from accelerate.commands import config as accelerate_config
    from accelerate.commands import launch as accelerate_launch

    options = accelerate_launch.launch_command_parser().parse_args(list(arguments))
    path = options.config_file
    if path is None and os.path.isfile(accelerate_config.default_config_file):
        path = accelerate_config.default_config_file
    content = {} if path is None else read_configuration(path)
    if options.num_processes is None and "num_processes" not in content and not options.multi_gpu:
        options.num_processes = 1  # Accelerate would take as many as there are GPUs
    accept_section(accelerate_launch)
    origin = "slideformer launch" if path is None else f"{SECTION} of {path}"
    stream_with(accelerate_launch, content.get(SECTION), origin)
    try:
        accelerate_launch.launch_command(options)
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except ValueError as error:  # what Accelerate says of options and files that it cannot use
        raise ConfigError(str(error)) from error
    return 0


def write_configuration(
    path: str | os.PathLike | None,
    settings: Mapping[str, Any],
    *,
    mixed_precision: str = "bf16",
    use_cpu: bool = False,
    replace: bool = False,
) -> Path:
    """Write an Accelerate configuration of one process with our section.

    Args:
        path: of the file, YAML or, by its name, JSON; None for the one that Accelerate reads by default.
        settings: as in `SlideConfig`.
        mixed_precision: "bf16" or "no".
        use_cpu: train on the CPU whatever there is.
        replace: an existing file may be replaced.

    Returns:
        The file's path.

    Raises:
        ConfigError: settings that cannot be used, or a file that is there.
    """
    from accelerate.commands.config.config_args import default_yaml_config_file

    SlideConfig.of(settings, origin=SECTION)
    path = Path(default_yaml_config_file if path is None else path).expanduser()
    if path.exists() and not replace:
        raise ConfigError(f"{path} is there already; --force replaces it, --config_file names another")
    content = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "num_machines": 1,
        "num_processes": 1,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": mixed_precision,
        "use_cpu": use_cpu,
        "debug": False,
        SECTION: dict(settings),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, content)
    return path


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a configuration in the format that its name stands for."""
    import yaml

    is_json = path.name.endswith(".json")
    text = json.dumps(content, indent=2) + "\n" if is_json else yaml.safe_dump(content, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def accept_section(module: ModuleType) -> None:
    """Make the `load_config_from_file` of one of Accelerate's modules accept our section, and launch with it.

    A configuration without the section goes to Accelerate's function as it came.
    """
    load = module.load_config_from_file

    @functools.wraps(load)
    def load_config_from_file(config_file: str | None) -> Any:
        path = config_file or module.default_config_file
        try:
            content = read_configuration(path)
        except ConfigError:
            return load(config_file)  # says what is wrong in its own words
        if SECTION not in content:
            return load(config_file)
        section = content.pop(SECTION)
        launchers = map(sys.modules.get, ("accelerate.commands.launch", "__main__"))
        known = [launcher for launcher in launchers if launcher is not None and hasattr(launcher, _LAUNCHER)]
        if not known:
            with _errors_in_one_line():
                compatibility.check(compatibility.LAUNCHER)
        for launcher in known:
            stream_with(launcher, section, f"{SECTION} of {path}")
        with tempfile.TemporaryDirectory(prefix="slideformer-") as directory:
            rest = Path(directory) / Path(path).name
            _write(rest, content)
            try:
                return load(str(rest))
            except ValueError as error:
                raise ValueError(str(error).replace(str(rest), str(path))) from None

    module.load_config_from_file = load_config_from_file  # type: ignore[attr-defined]


def read_configuration(path: str | os.PathLike) -> dict[str, Any]:
    """The content of an Accelerate configuration, YAML or, by its name, JSON.

    Raises:
        ConfigError: the file cannot be read or is no mapping.
    """
    import yaml  # comes with accelerate

    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds no Accelerate configuration, which is a mapping of settings")
    return dict(content)


def stream_with(launcher: ModuleType, section: Any, origin: str) -> None:
    """Make Accelerate's launching module start scripts streamed, and refuse what cannot be streamed.

    Args:
        launcher: `accelerate.commands.launch`, whose functions are replaced.
        section: the settings; None stands for the defaults.
        origin: what the settings are called in errors.
    """
    start = getattr(launcher, _LAUNCHER)
    start = getattr(start, "__wrapped__", start)

    @functools.wraps(start)
    def start_streamed(args: argparse.Namespace) -> None:
        with _errors_in_one_line():
            settings = {} if section is None else section
            if not isinstance(settings, Mapping):
                raise ConfigError(f"{origin} must be a mapping of settings, got {settings!r}")
            SlideConfig.of(settings, origin=origin)
            check_launch(args)
        os.environ[CONFIG_VARIABLE] = json.dumps(settings)
        module = ["-m"] if args.module else []
        args.training_script_args = [*module, args.training_script, *args.training_script_args]
        args.training_script, args.module = __name__, True
        start(args)

    setattr(launcher, _LAUNCHER, start_streamed)
    for name, what in _REFUSED_LAUNCHERS.items():
        setattr(launcher, name, functools.partial(_refuse_launcher, what, origin))


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """End the process with our error in one line, instead of a traceback through Accelerate's command."""
    try:
        yield
    except (ConfigError, UnsupportedModelError, UnsupportedVersionError) as error:
        print(f"slideformer: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _refuse_launcher(what: str, origin: str, *_: Any) -> None:
    with _errors_in_one_line():
        raise UnsupportedModelError(
            f"{origin}: hf_slideformer trains in one process on one GPU and places the training state itself; this "
            f"launch asks for {what}. Set distributed_type: 'NO' and num_processes: 1 and remove what belongs to it"
        )


def check_launch(args: argparse.Namespace) -> None:
    """Refuse launches that cannot be streamed.

    Args:
        args: of `accelerate launch`, with the configuration file's values filled in.

    Raises:
        UnsupportedModelError: with what to do instead.
    """
    processes, machines = (getattr(args, name, 1) or 1 for name in ("num_processes", "num_machines"))
    precision = str(getattr(args, "mixed_precision", "no")).lower()
    dynamo = str(getattr(args, "dynamo_backend", "no") or "no").lower()
    if processes > 1 or machines > 1:
        raise UnsupportedModelError(
            f"hf_slideformer runs in one process, this launch has {processes} on {machines} machine(s); launch with "
            "--num_processes 1 --num_machines 1"
        )
    for flag, what in _PLACED_BY_OTHERS.items():  # which Accelerate ignores without a word under --cpu
        if getattr(args, flag, False):
            raise UnsupportedModelError(
                f"hf_slideformer places the training state itself, and this launch asks for {what}; remove what "
                "belongs to it from the configuration"
            )
    if getattr(args, "mpirun_hostfile", None) is not None:
        raise UnsupportedModelError(
            "hf_slideformer runs in one process and not under mpirun; remove mpirun_config"
        )
    if precision not in ("no", "bf16"):
        raise UnsupportedModelError(
            f"mixed precision {precision!r} is not supported; use --mixed_precision bf16 (exact fp32 masters) or no"
        )
    if dynamo != "no":
        raise UnsupportedModelError(
            f"layers that are streamed cannot be compiled, and this launch asks for the backend {dynamo!r}; use "
            "--dynamo_backend no"
        )
    if getattr(args, "no_python", False):
        raise UnsupportedModelError(
            "--no_python starts a program in which Accelerator cannot be replaced; launch the Python script itself"
        )


# -- the script's process ----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script as `__main__`, with `accelerate.Accelerator` bound to `SlideAccelerator`.

    Args:
        arguments: the script and its arguments, or `-m`, a module and its arguments; None takes this process's.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_module = given[:1] == ["-m"]
    sys.argv = given[1:] if is_module else given
    if not is_module:
        with _errors_in_one_line():
            if not os.path.exists(sys.argv[0]):
                raise ConfigError(f"there is no script {sys.argv[0]!r}; -m runs a module")
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))  # as Python has it for a script
    after_import("accelerate", bind_accelerator)
    after_import("transformers.trainer", refuse_plain_trainer)
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            # Absolute, because it becomes `__file__`, which Python makes absolute for a script. It becomes
            # `sys.argv[0]` too, which differs from Python's for a relative path.
            runpy.run_path(os.path.abspath(sys.argv[0]), run_name="__main__")
    except SystemExit as end:
        if not end.code:
            _warn_if_not_streamed()
        raise
    _warn_if_not_streamed()


def _warn_if_not_streamed() -> None:
    if "hf_slideformer.accelerator" not in sys.modules:
        print(
            f"slideformer: warning: {sys.argv[0]} ended without using accelerate.Accelerator, so nothing was streamed",
            file=sys.stderr,
        )


def bind_accelerator(accelerate: ModuleType) -> None:
    """Bind the package's `Accelerator` to `SlideAccelerator`.

    `SlideAccelerator` is imported when the name is first looked up: it imports transformers, which may be what is
    importing Accelerate.
    """
    others = vars(accelerate).get("__getattr__")

    def getattr_(name: str) -> Any:
        if name == "Accelerator":
            try:
                from .accelerator import SlideAccelerator
            except ImportError as error:
                if (reason := compatibility.explained(error)) is error:
                    raise
                raise reason from error
            return SlideAccelerator
        if others is not None:
            return others(name)
        raise AttributeError(f"module {accelerate.__name__!r} has no attribute {name!r}")

    if not hasattr(accelerate, "__all__"):
        accelerate.__all__ = [name for name in vars(accelerate) if not name.startswith("_")]  # type: ignore[attr-defined]
    del accelerate.Accelerator
    accelerate.__getattr__ = getattr_  # type: ignore[method-assign]


def refuse_plain_trainer(trainer_module: ModuleType) -> None:
    """Make transformers' Trainer say that it cannot be streamed as it is: it puts the model on the GPU."""
    create = trainer_module.Trainer.create_accelerator_and_postprocess

    @functools.wraps(create)
    def create_accelerator_and_postprocess(trainer: Any) -> None:
        if not hasattr(trainer, "_slide_config"):
            raise UnsupportedModelError(
                f"{type(trainer).__name__} does not stream, and this launch has a {SECTION}; use SlideTrainer in place "
                "of Trainer, or class MyTrainer(SlideTrainerMixin, ...) with the mixin first"
            )
        create(trainer)

    trainer_module.Trainer.create_accelerator_and_postprocess = create_accelerator_and_postprocess


# -- both --------------------------------------------------------------------------------------------------------------


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module `name` when its import has run; at once if it has already.

    The finder that does it leaves `sys.meta_path` with that.
    """
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


class _AfterImport:
    """A finder of one module, which it lets the others find."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._then = then
        self._asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As for every finder; None leaves a module to the others."""
        if name != self._name or self._asking:
            return None
        self._asking = True  # the others, which are asked through the same list
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # Only now: packages are also looked up without being imported, to see whether they are there.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if __name__ == "__main__":
    main()
