"""`SlideConfig`: the user's settings, frozen and checked when they are made."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

# How a launcher hands the settings to the process that trains: a mapping of them, as JSON.
CONFIG_VARIABLE = "SLIDEFORMER_CONFIG"

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

_CHOICES = {
    "placement": ("auto", "stream"),
    "activations": ("auto", "keep", "recompute", "offload"),
    "optimizer_states": ("fp32", "8bit"),
    "update": ("auto", "deferred", "overlapped"),
    "accumulation": ("auto", "vertical", "horizontal"),
    "loss": ("auto", "fused", "model"),
    "saving": ("overlapped", "blocking"),
}

# Accepted names whose mechanism has not landed: refused with the way out rather than ignored.
_NOT_YET = {
    ("accumulation", "vertical"): "use accumulation='horizontal'; the result is the same",
}


def parse_bytes(size: int | str) -> int:
    """Bytes of a size such as `"24GiB"`, `"80GB"`, `"1.5 TiB"` or a plain number.

    Args:
        size: an integer number of bytes, or a number with a decimal (kB, MB, GB, TB) or binary (KiB, MiB,
            GiB, TiB) unit; case does not matter.

    Returns:
        The size in bytes, rounded down.

    Raises:
        ConfigError: the text is not a size, or the size is not positive.
    """
    if isinstance(size, bool):
        raise ConfigError(f"{size!r} is not a size; write a number of bytes or a text such as '24GiB'")
    if isinstance(size, int):
        result = size
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(size))
        if match is None or match.group(2).lower() not in _UNITS:
            raise ConfigError(f"{size!r} is not a size; write a number of bytes or a text such as '24GiB'")
        try:
            result = int(float(match.group(1)) * _UNITS[match.group(2).lower()])
        except OverflowError:
            raise ConfigError(f"{size!r} is more than any memory; write a text such as '24GiB'") from None
    if result <= 0:
        raise ConfigError(f"a memory size must be positive, got {size!r}")
    return result


def _directories(given: Any) -> tuple[str, ...]:
    """The directories that a value of `nvme_dir` names; whether they exist is for the machine to say that trains."""
    several = given.split(os.pathsep) if isinstance(given, str) else given
    if isinstance(several, os.PathLike):
        several = [several]
    if not isinstance(several, (list, tuple)):
        raise ConfigError(f"nvme_dir must be a directory or a list of directories, got {given!r}")
    paths = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in several]
    if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
        raise ConfigError(f"nvme_dir must be a directory or a list of directories, got {given!r}")
    if len({os.path.normpath(path) for path in paths}) < len(paths):
        raise ConfigError(f"nvme_dir names a directory twice: {', '.join(map(repr, paths))}; name each once")
    return tuple(paths)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideConfig:
    """Where training state may live and how a step is run.

    Args:
        gpu_memory: bytes of GPU memory that may be used ("24GiB", a number, or None for what is there).
        cpu_memory: bytes of RAM that may be used, likewise.
        pinned_memory: bytes of RAM that may be pinned, likewise. Above it, buffers stay pageable.
        nvme_dir: directory for state that exceeds RAM; None keeps all state off disk. Several directories, on
            drives of their own, share the work: a list, or one text with `os.pathsep` between them. Kept as a tuple.
        nvme_memory: bytes that may be used there in all, or None for what is free.
        placement: "stream" streams every unit from RAM; "auto" lets the planner fill the GPU. Without a GPU, "auto"
            means "stream" unless `gpu_memory` says how much RAM stands in for it.
        activations: what happens to the activations of units: "keep" holds them on the GPU, "recompute" holds only
            each unit's input, "offload" holds that input in RAM; "auto" lets the planner decide unit by unit.
        optimizer_states: "fp32" moments (exact), or with AdamW "8bit": block-wise, 6 instead of 12 bytes per parameter
            at rest, other numbers.
        update: "deferred" updates after the gradient norm is known (exact always); "overlapped" updates under
            backward (no clipping, one backward per step); "auto" takes "overlapped" where it is exact.
        accumulation: order of micro-batches; "auto" means "horizontal".
        loss: "fused" computes the head and the cross-entropy together and never holds all logits; "model" leaves them
            to the model's code; "auto" means "fused" on a GPU.
        saving: "overlapped" writes a checkpoint's tensors beside the next steps, whose updates wait for them;
            "blocking" stops training until all is on the disk, for code that writes weights between steps unannounced.
        seq_len: tokens of the longest sequence, which the plan counts on; None finds it by reading samples of the
            training data.
        cpu_threads: threads of the CPU update; None sizes them to the machine.
        trace_steps: number of first training steps to record for `trainer.slide.metrics`.

    Raises:
        ConfigError: a value that cannot be used, with the values that can.
    """

    gpu_memory: int | str | None = None
    cpu_memory: int | str | None = None
    pinned_memory: int | str | None = None
    nvme_dir: str | os.PathLike | Sequence[str | os.PathLike] | None = None
    nvme_memory: int | str | None = None
    placement: str = "auto"
    activations: str = "auto"
    optimizer_states: str = "fp32"
    update: str = "auto"
    accumulation: str = "auto"
    loss: str = "auto"
    saving: str = "overlapped"
    seq_len: int | None = None
    cpu_threads: int | None = None
    trace_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("gpu_memory", "cpu_memory", "pinned_memory", "nvme_memory"):
            value = getattr(self, name)
            if value is not None:
                try:
                    object.__setattr__(self, name, parse_bytes(value))
                except ConfigError as error:
                    raise ConfigError(f"{name}: {error}") from None
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
            if (name, value) in _NOT_YET:
                raise ConfigError(f"{name}={value!r} is not available yet; {_NOT_YET[name, value]}")
        if self.nvme_dir is not None:
            object.__setattr__(self, "nvme_dir", _directories(self.nvme_dir))
        elif self.nvme_memory is not None:
            raise ConfigError(
                "nvme_memory says how much of nvme_dir may be used, and there is no nvme_dir; name a directory"
            )
        for name in ("cpu_threads", "seq_len"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} must be a positive integer or None, got {value!r}")
        steps = self.trace_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ConfigError(f"trace_steps must be a non-negative integer, got {steps!r}")

    @property
    def nvme_dirs(self) -> tuple[str, ...]:
        """The directories for state on disk, `~` expanded; none where nothing may lie there."""
        directories = self.nvme_dir or ()
        assert isinstance(directories, tuple), "made so when it was checked"
        return tuple(os.path.expanduser(directory) for directory in directories)

    @classmethod
    def of(
        cls,
        value: SlideConfig | Mapping[str, Any] | str | os.PathLike | None,
        *,
        origin: str = "slide_config",
    ) -> SlideConfig:
        """The configuration that `value` stands for: itself, a mapping, a YAML file, or None for the defaults.

        Args:
            value: the settings.
            origin: what they are called in errors.

        Raises:
            ConfigError: unknown keys (with the nearest valid one) or a file that cannot be read.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls._of_mapping(value, origin)
        if isinstance(value, (str, os.PathLike)):
            return cls._of_file(Path(value))
        raise ConfigError(
            f"{origin} must be a SlideConfig, dict, YAML path or None, got {type(value).__name__}"
        )

    @classmethod
    def of_launch(cls) -> SlideConfig:
        """The settings that the launcher of this process handed on, or the defaults where it handed on none.

        Raises:
            ConfigError: they cannot be used.
        """
        text = os.environ.get(CONFIG_VARIABLE)
        if text is None:
            return cls()
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the environment variable {CONFIG_VARIABLE} is not JSON: {error}") from error
        return cls.of(content, origin=f"the environment variable {CONFIG_VARIABLE}")

    @classmethod
    def _of_mapping(cls, mapping: Mapping[str, Any], origin: str) -> SlideConfig:
        known = [field.name for field in dataclasses.fields(cls)]
        for key in mapping:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; valid keys: {', '.join(known)}"
                raise ConfigError(f"unknown key {key!r} in {origin}{hint}")
        return cls(**mapping)

    @classmethod
    def _of_file(cls, path: Path) -> SlideConfig:
        import yaml  # comes with accelerate

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read slide_config from {path}: {error}") from error
        if content is None:
            content = {}
        if isinstance(content, Mapping) and "slideformer_config" in content:
            content = content["slideformer_config"] or {}
        if not isinstance(content, Mapping):
            raise ConfigError(f"{path} holds a {type(content).__name__}, not a mapping of settings")
        return cls._of_mapping(content, str(path))
