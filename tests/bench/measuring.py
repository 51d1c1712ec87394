"""What a benchmark row says about the machine and the software it ran on, and how peak RAM is read.

Everything here is read from `/proc`, `nvidia-smi` and package metadata; what cannot be read is None, never
guessed. Scripts in this folder import it as a sibling.
"""

import contextlib
import os
import platform
import subprocess
import threading
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "accelerate", "liger_kernel")


def describe_machine() -> dict:
    """Return commit, versions, GPU, PCIe link, CPU and RAM, as the first keys of a row."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    versions = {name: package_version(name) for name in PACKAGES}
    return {
        "commit": git_commit(),
        "versions": {"python": platform.python_version()} | versions,
        "cuda": torch.version.cuda,
        "gpu": gpu.name if gpu else None,
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "pcie": pcie_link(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_total_bytes": meminfo_bytes("MemTotal"),
        "ram_cgroup_limit_bytes": cgroup_limit_bytes(),
    }


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` if tracked files differ from it; None outside git."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def pcie_link() -> dict | None:
    """Return generation and width of the first visible GPU's link; None without a GPU or nvidia-smi.

    An idle link clocks down, so call it while the GPU works, or read the `max` values.
    """
    if not torch.cuda.is_available():
        return None
    fields = ("gen.current", "gen.max", "width.current", "width.max")
    query = ",".join(f"pcie.link.{field}" for field in fields)
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    if uuid is not None:
        command += ["-i", f"GPU-{uuid}"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        values = [int(value) for value in output.splitlines()[0].split(",")]
        return {field.replace(".", "_"): value for field, value in zip(fields, values, strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def cpu_model() -> str | None:
    """Return the processor's name."""
    for line in read_lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or None


def meminfo_bytes(field: str) -> int | None:
    """Return one line of /proc/meminfo in bytes."""
    return _kib_field("/proc/meminfo", field)


def cgroup_limit_bytes() -> int | None:
    """Return the memory limit of this process's control group (v2, then v1), or None if there is none."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        for line in read_lines(path):
            if line.strip().isdigit() and int(line) < 1 << 60:  # v1 says "none" with a huge number
                return int(line)
    return None


def read_lines(path: str) -> list[str]:
    """Return the lines of a small file, none if it cannot be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _kib_field(path: str, field: str) -> int | None:
    for line in read_lines(path):
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


class RamPeak:
    """Peak RAM of a `with` block, read in two independent ways.

    `rss_peak_bytes` is the kernel's own high-water mark of this process (VmHWM, reset on entry where the
    kernel allows it). `available_drop_bytes` is how far the machine's MemAvailable fell below its value on
    entry, sampled, and therefore counts what other processes and the driver took for us as well.
    """

    def __init__(self, interval_s: float = 0.2):
        """Sample MemAvailable every `interval_s` seconds."""
        self.interval_s = interval_s
        self.rss_peak_bytes: int | None = None
        self.available_drop_bytes: int | None = None

    def __enter__(self):
        """Reset the high-water mark and start sampling."""
        with contextlib.suppress(OSError):  # where refused, VmHWM counts from the start of the process
            Path("/proc/self/clear_refs").write_text("5")
        self._start = self._lowest = meminfo_bytes("MemAvailable") or 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="ram-peak", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        """Stop sampling and keep both figures."""
        self._stop.set()
        self._thread.join()
        self.rss_peak_bytes = _kib_field("/proc/self/status", "VmHWM")
        self.available_drop_bytes = self._start - self._lowest

    def _sample(self):
        while True:
            self._lowest = min(self._lowest, meminfo_bytes("MemAvailable") or self._lowest)
            if self._stop.wait(self.interval_s):
                return
