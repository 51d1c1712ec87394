"""What a machine has: memory that may be used, cores that may run the update, and measured rates.

A measurement (`machine/probe.py`) is kept as JSON in the user's cache directory, under a name that stands for
machine and software. Reading it never fails a run, nor does writing it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from slideformer_kernels.cpu import default_threads

from ..errors import ConfigError
from ..memory.layout import EIGHT_BIT_MOMENTS, FP32_MOMENTS, MomentFormat

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_ram_bytes() -> int:
    """RAM that this process can still take: MemAvailable, or what the cgroup leaves if that is less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    for limit_file, usage_file in _CGROUP_FILES:
        try:
            limit = int(Path(limit_file).read_text())
            usage = int(Path(usage_file).read_text())
        except (OSError, ValueError):  # no such controller, or "max"
            continue
        available = min(available, max(0, limit - usage))
    return available


def total_ram_bytes() -> int:
    """RAM that there is: the machine's, or the cgroup's limit if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit_file, _ in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # no such controller, or "max"
            total = min(total, int(Path(limit_file).read_text()))
    return total


def available_gpu_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device plus what torch's allocator holds unused there; RAM on the CPU."""
    if device.type != "cuda":
        return available_ram_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_update_threads(device: torch.device) -> int:
    """Threads for the CPU update.

    Physical cores: the update is bound by memory, which a second thread on a core does not widen. Beside a GPU one
    core is left to the thread that launches kernels, unless it has its own hardware thread. The size is ours to
    choose, since launchers set OMP_NUM_THREADS=1.
    """
    physical = default_threads()
    spare = usable_cores() - physical
    return max(1, physical - 1) if device.type == "cuda" and spare < 1 else physical


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What one machine can do: the planner's picture of it. Rates are bytes, parameters or operations a second.

    Attributes:
        name: of the machine, or of the preset.
        source: "measured" or "estimated".
        gpu: the GPU's name, or None where RAM and cores stand in for one.
        gpu_bytes: memory of the GPU.
        ram_bytes: RAM that may be used.
        disk_bytes: free bytes on the disk for state, or None.
        cores: physical cores.
        h2d, d2h, duplex: copies between pinned RAM and the GPU, alone and both at once (the sum).
        ram_copy: a copy in RAM, bytes read plus bytes written, with all cores.
        cpu_update: parameters a second by the CPU update, by name of the moments' format: those of `UPDATE_FORMATS`,
            and any others that were measured. `update_rate` reads it.
        cpu_update_loaded: the same while copies run both ways.
        gpu_update: parameters a second by the GPU update, likewise.
        gpu_copy: a copy in GPU memory, bytes read plus bytes written.
        bf16_flops, fp32_flops: of large matrix products.
        disk_read, disk_write, disk_duplex: of the disk for state, alone and both at once (the sum), or None.
        notes: what a user should know of these figures.
    """

    name: str
    source: str
    gpu: str | None
    gpu_bytes: int
    ram_bytes: int
    cores: int
    h2d: float
    d2h: float
    duplex: float
    ram_copy: float
    cpu_update: Mapping[str, float]
    cpu_update_loaded: Mapping[str, float]
    gpu_update: Mapping[str, float]
    gpu_copy: float
    bf16_flops: float
    fp32_flops: float
    disk_bytes: int | None = None
    disk_read: float | None = None
    disk_write: float | None = None
    disk_duplex: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def advice(self) -> str | None:
        """What to do about rates that nobody measured; None where they were measured."""
        if self.source == "measured":
            return None
        return (
            f"the rates of {self.name} are estimates; run `slideformer probe` on that machine to measure them"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                value = dict(value)
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "the hardware description") -> Hardware:
        """The hardware that `as_dict` described.

        Args:
            values: one entry for each attribute; those with defaults may be missing. What earlier versions wrote is
                read too.
            origin: where it came from, for errors.

        Raises:
            ConfigError: unknown or missing keys, or a value that no machine has.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{origin} must be a mapping of settings, got {type(values).__name__}")
        values = dict(values)
        for earlier, now in _EARLIER_NAMES.items():
            if earlier in values and now not in values:
                values[now] = values.pop(earlier)
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {field.name for field in fields})
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if unknown or missing:
            parts = [f"unknown: {', '.join(map(str, unknown))}"] if unknown else []
            parts += [f"missing: {', '.join(missing)}"] if missing else []
            raise ConfigError(
                f"{origin} does not have the keys of a hardware description ({'; '.join(parts)}); "
                "`slideformer probe --json` prints one"
            )
        optional = {field.name for field in fields if field.default is None}
        checked: dict[str, Any] = {
            name: None if value is None and name in optional else _checked(name, value, origin)
            for name, value in values.items()
        }
        return cls(**checked)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Hardware:
        """The hardware that a JSON file describes (`slideformer probe --output FILE` writes one).

        Raises:
            ConfigError: the file cannot be read, or does not describe hardware.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read a hardware description from {path}: {error}") from error
        return cls.from_dict(values, str(path))


# Formats of moments with which every description of a machine has rates.
UPDATE_FORMATS = (FP32_MOMENTS.name, EIGHT_BIT_MOMENTS.name)


def update_bytes(moments: MomentFormat) -> int:
    """Bytes that one parameter's update reads and writes, to the whole byte.

    A bf16 gradient is read, a split master and the moments are read and written.
    """
    return round(2 + 2 * (4 + sum(part.dtype.itemsize / part.block_numel for part in moments.parts)))


def update_rate(rates: Mapping[str, float], moments: MomentFormat) -> float:
    """Parameters a second of an update.

    Args:
        rates: one of `Hardware`'s, by name of the moments' format.
        moments: what is updated besides the masters.

    Returns:
        The measured rate. Where nobody measured it an estimate: that with fp32 moments as many times as fewer bytes are
        moved, since memory bounds an update.
    """
    measured = rates.get(moments.name)
    if measured is not None:
        return measured
    return rates[FP32_MOMENTS.name] * update_bytes(FP32_MOMENTS) / update_bytes(moments)


_SOURCES = ("measured", "estimated")
_COUNTS = ("gpu_bytes", "ram_bytes", "cores", "disk_bytes")
_BY_FORMAT = ("cpu_update", "cpu_update_loaded", "gpu_update")
# What earlier versions called these.
_EARLIER_NAMES = {
    "cpu_adamw": "cpu_update",
    "cpu_adamw_loaded": "cpu_update_loaded",
    "gpu_adamw": "gpu_update",
}


def _checked(name: str, value: Any, origin: str) -> Any:
    """One value of a hardware description, in the type that the attribute has."""
    if name in ("name", "gpu"):
        if isinstance(value, str) or (name == "gpu" and value is None):
            return value
        raise ConfigError(f"{origin}: {name} must be a text, got {value!r}")
    if name == "source":
        if value in _SOURCES:
            return value
        raise ConfigError(f"{origin}: source must be one of {', '.join(_SOURCES)}, got {value!r}")
    if name == "notes":
        if isinstance(value, (list, tuple)) and all(isinstance(note, str) for note in value):
            return tuple(value)
        raise ConfigError(f"{origin}: notes must be a list of texts, got {value!r}")
    if name in _BY_FORMAT:
        if isinstance(value, Mapping) and set(value) >= set(UPDATE_FORMATS):
            return {key: _positive(f"{name}.{key}", rate, origin) for key, rate in value.items()}
        raise ConfigError(f"{origin}: {name} must have one rate each for {', '.join(UPDATE_FORMATS)}")
    number = _positive(name, value, origin)
    if name not in _COUNTS:
        return number
    if number != int(number):
        raise ConfigError(f"{origin}: {name} must be a whole number, got {value!r}")
    return int(value)


def _positive(name: str, value: Any, origin: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{origin}: {name} must be a number, got {value!r}")
    if not 0 < value <= sys.float_info.max:  # neither NaN nor an integer that no float can hold
        raise ConfigError(f"{origin}: {name} must be positive and finite, got {value!r}")
    return float(value)


def measured_as(device: torch.device) -> dict[str, Any]:
    """What a measurement of this machine stands for: it is another one when any of this changes."""
    try:
        version = metadata.version("hf-slideformer")
    except metadata.PackageNotFoundError:  # run from a checkout
        version = "not installed"
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cores": usable_cores(),
        "ram_gib": round(total_ram_bytes() / 2**30),
        "torch": str(torch.__version__),
        "hf_slideformer": version,
    }


def cache_path(device: torch.device) -> Path | None:
    """The file that keeps a measurement of this machine; None where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))
    if not root.is_absolute():
        return None
    identity = json.dumps(measured_as(device), sort_keys=True)
    return root / "hf_slideformer" / f"hardware-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def cached_hardware(device: torch.device, directory: str | os.PathLike | None = None) -> Hardware | None:
    """An earlier measurement of this machine, with the RAM and the disk that are free now.

    Args:
        device: as in the measurement.
        directory: for state on disk; its rates are known if the measurement was on the same file system.

    Returns:
        The measurement; None if there is none, or none that can be read and is of this machine.
    """
    path = cache_path(device)
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
        if not isinstance(kept, dict) or kept.get("machine") != measured_as(device):
            return None
        hardware = Hardware.from_dict(kept.get("hardware", {}), str(path))
    except (OSError, ValueError, RecursionError):
        return None
    ram = max(1, available_ram_bytes())
    hardware = dataclasses.replace(
        hardware, ram_bytes=ram, gpu_bytes=hardware.gpu_bytes if hardware.gpu else ram
    )
    if directory is not None and _same_file_system(directory, kept.get("directory")):
        return dataclasses.replace(hardware, disk_bytes=max(1, shutil.disk_usage(directory).free))
    return dataclasses.replace(hardware, disk_bytes=None, disk_read=None, disk_write=None, disk_duplex=None)


def cache_hardware(
    hardware: Hardware, device: torch.device, directory: str | os.PathLike | None = None
) -> Path | None:
    """Keep a measurement of this machine.

    Returns:
        The file, which appears whole or not at all; None if it could not be written (a read-only home).
    """
    path = cache_path(device)
    if path is None:
        return None
    kept = {
        "machine": measured_as(device),
        "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "directory": None if directory is None else os.path.abspath(directory),
        "hardware": hardware.as_dict(),
    }
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.stem + "-", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(kept, file, indent=2)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError:
        return None
    return path


def _same_file_system(one: str | os.PathLike, other: Any) -> bool:
    try:
        return isinstance(other, str) and os.stat(one).st_dev == os.stat(other).st_dev
    except OSError:
        return False
