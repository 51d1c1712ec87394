"""What this machine has: memory that may be used, and cores that may run the update."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from slideformer_kernels.cpu import default_threads

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
