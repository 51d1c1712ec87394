"""Presets: machines that people have, described without measuring them. Pure data.

The H100's rates are those of the machine behind `docs/benchmarks/`, as `slideformer probe` measured them
(`2026-11-22-h100-plan/probe.json` there). Another host with that GPU will differ, so they count as estimates here. All
other presets are derived from published peaks (memory transfers a second, PCIe
generation, bandwidth of GPU memory, dense matrix rate) by the share of its own peaks that the H100 machine reached.
Peaks are those of NVIDIA's architecture white papers (GA102, Ada, RTX Blackwell, A100) and data sheets (H100 SXM,
H200), of AMD's MI300X data sheet and of AMD's Ryzen and EPYC product pages.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import ConfigError
from ..memory.layout import EIGHT_BIT_MOMENTS, FP32_MOMENTS
from .hardware import Hardware, update_bytes

GIB = 2**30
GB = 10**9

# Bytes of RAM or GPU memory that one parameter's update reads and writes: 26 and 14.
_UPDATE_BYTES = {moments.name: update_bytes(moments) for moments in (FP32_MOMENTS, EIGHT_BIT_MOMENTS)}

# PCIe x16, one direction, after line coding: 16 or 32 GT/s x 16 lanes x 128/130.
_PCIE4, _PCIE5 = 31.5 * GB, 63.0 * GB

# Shares that the H100 machine reached: 54.7 of 63 GB/s on the link, and 91.9 instead of 2 x 54.7 GB/s both ways; of
# 3,350 GB/s 2,977 copying in GPU memory, 2,990 and 2,675 in the updates with fp32 and 8-bit moments; 726 of 989 TFLOP/s
# in bf16 (the clock falls under load: shorter runs reach more), 51.7 of 66.9 in fp32.
_LINK_SHARE = 54.7 / 63
_DUPLEX_FACTOR = 91.9 / 54.7
_GPU_COPY_SHARE = 2977 / 3350
_GPU_UPDATE_SHARES = {"fp32": 2990 / 3350, "8bit": 2675 / 3350}
_MATRIX_SHARE = 726 / 989
_FP32_SHARE = 51.7 / 66.9

# That machine is a part of a larger server, so its RAM says nothing of the share of the channels' peak. 0.8 is
# what streaming loops usually reach (an assumption). torch's copy reached 62 where the fp32 update reached 162 GB/s.
_RAM_SHARE = 0.8
_RAM_COPY_SHARE = _RAM_SHARE * 62 / 162
# One core of it moved 10 GB/s in the fp32 update, and updated 0.53e9 parameters with 8-bit moments, which is bound
# by arithmetic there.
_CORE_BANDWIDTH = 162 / 16 * GB
_CORE_8BIT_UPDATES = 8.55e9 / 16
# Copies at 91.9 GB/s took 63 GB/s from the fp32 update (6.24 to 3.82e9 parameters a second).
_RAM_PER_COPIED_BYTE = 0.68

# The driver and its context take some of the GPU's memory; firmware, kernel and desktop some of RAM (assumptions).
_USABLE_GPU = 0.97
_USABLE_RAM = 0.95

# A core with AVX2 at 3 GHz: two units x 8 lanes x multiply and add.
_CORE_FLOPS = 2 * 8 * 2 * 3e9


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gpu:
    """Published figures of a GPU: bytes, bytes a second, dense operations a second (bf16 with fp32 sums)."""

    name: str
    nbytes: int
    bandwidth: float
    bf16: float
    fp32: float
    pcie: float
    matrix_share: float = _MATRIX_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Host:
    """Published figures of a host: cores, RAM and its channels, transfers a second, and the disk's peaks."""

    name: str
    cores: int
    ram_gib: int
    channels: int
    transfers: float
    disk_bytes: int
    disk_read: float
    disk_write: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second that all channels carry at most; a transfer is 8 bytes wide."""
        return 8 * self.channels * self.transfers


_RTX_3090 = _Gpu(
    name="NVIDIA GeForce RTX 3090", nbytes=24 * GIB, bandwidth=936e9, bf16=71e12, fp32=35.6e12, pcie=_PCIE4
)
_RTX_4090 = _Gpu(
    name="NVIDIA GeForce RTX 4090",
    nbytes=24 * GIB,
    bandwidth=1008e9,
    bf16=165.2e12,
    fp32=82.6e12,
    pcie=_PCIE4,
)
_RTX_5090 = _Gpu(
    name="NVIDIA GeForce RTX 5090",
    nbytes=32 * GIB,
    bandwidth=1792e9,
    bf16=209.5e12,
    fp32=104.8e12,
    pcie=_PCIE5,
)
_A100_40GB = _Gpu(
    name="NVIDIA A100-SXM4-40GB", nbytes=40 * GIB, bandwidth=1555e9, bf16=312e12, fp32=19.5e12, pcie=_PCIE4
)
_A100_80GB = _Gpu(
    name="NVIDIA A100-SXM4-80GB", nbytes=80 * GIB, bandwidth=2039e9, bf16=312e12, fp32=19.5e12, pcie=_PCIE4
)
_H200 = _Gpu(name="NVIDIA H200", nbytes=141 * GIB, bandwidth=4800e9, bf16=989e12, fp32=66.9e12, pcie=_PCIE5)
_MI300X = _Gpu(
    name="AMD Instinct MI300X",
    nbytes=192 * GIB,
    bandwidth=5300e9,
    bf16=1307e12,
    fp32=163.4e12,
    pcie=_PCIE5,
    # AMD says itself that what this GPU can reach is far below its peak, which is for a clock that it cannot hold
    # under load (rocm.blogs.amd.com, "Measuring Max-Achievable FLOPs"); half is an assumption.
    matrix_share=0.5,
)


def _desktop(ram_gib: int, transfers: float) -> _Host:
    """A desktop with two channels and 16 cores.

    The disk is a PCIe 4.0 consumer drive of 4 TB: 7.45 GB/s reading and 6.9 writing are published, the latter until
    its cache is full; a quarter beyond that is an assumption.
    """
    return _Host(
        name=f"desktop with {ram_gib} GiB",
        cores=16,
        ram_gib=ram_gib,
        channels=2,
        transfers=transfers,
        disk_bytes=4 * 10**12,
        disk_read=7.45 * GB,
        disk_write=6.9 * GB / 4,
    )


def _server(cores: int, channels: int, transfers: float) -> _Host:
    """One socket of a server with 512 GiB; the disk is a PCIe 4.0 data-centre drive (published: 6.8 and 4 GB/s)."""
    return _Host(
        name="host with 512 GiB",
        cores=cores,
        ram_gib=512,
        channels=channels,
        transfers=transfers,
        disk_bytes=3840 * GB,
        disk_read=6.8 * GB,
        disk_write=4.0 * GB,
    )


def _derived(gpu: _Gpu, host: _Host) -> Hardware:
    """The rates of a machine from its peaks."""
    ram = min(_RAM_SHARE * host.bandwidth, host.cores * _CORE_BANDWIDTH)
    link = min(_LINK_SHARE * gpu.pcie, ram)
    duplex = min(_DUPLEX_FACTOR * link, ram)
    left = ram - _RAM_PER_COPIED_BYTE * duplex
    most = {"fp32": math.inf, "8bit": host.cores * _CORE_8BIT_UPDATES}
    return Hardware(
        name=f"{gpu.name}, {host.name}",
        source="estimated",
        gpu=gpu.name,
        gpu_bytes=int(_USABLE_GPU * gpu.nbytes),
        ram_bytes=int(_USABLE_RAM * host.ram_gib * GIB),
        cores=host.cores,
        h2d=link,
        d2h=link,
        duplex=duplex,
        ram_copy=min(_RAM_COPY_SHARE * host.bandwidth, host.cores * _CORE_BANDWIDTH),
        cpu_update={name: min(most[name], ram / nbytes) for name, nbytes in _UPDATE_BYTES.items()},
        cpu_update_loaded={name: min(most[name], left / nbytes) for name, nbytes in _UPDATE_BYTES.items()},
        gpu_update={
            name: _GPU_UPDATE_SHARES[name] * gpu.bandwidth / nbytes for name, nbytes in _UPDATE_BYTES.items()
        },
        gpu_copy=_GPU_COPY_SHARE * gpu.bandwidth,
        bf16_flops=gpu.matrix_share * gpu.bf16,
        fp32_flops=min(_FP32_SHARE, gpu.matrix_share / _MATRIX_SHARE * _FP32_SHARE) * gpu.fp32,
        disk_bytes=host.disk_bytes,
        disk_read=host.disk_read,
        disk_write=host.disk_write,
    )


# Two memory modules run at the full rate; four of two ranks each, which 128 GiB of DDR4 and more than 128 GiB of
# DDR5 need, at 2,667 and 3,600 million transfers a second (AMD, Ryzen 5000, 7000 and 9000).
_DESKTOPS = {
    "rtx3090": (_RTX_3090, {64: 3200e6, 128: 2667e6}),
    "rtx4090": (_RTX_4090, {64: 5200e6, 128: 5200e6, 192: 3600e6, 256: 3600e6}),
    "rtx5090": (_RTX_5090, {64: 5600e6, 128: 5600e6, 192: 3600e6, 256: 3600e6}),
}

_H100_HOST = Hardware(
    name="NVIDIA H100 80GB HBM3, host with 16 cores and 128 GiB",
    source="estimated",
    gpu="NVIDIA H100 80GB HBM3",
    gpu_bytes=int(_USABLE_GPU * 80 * GIB),
    ram_bytes=int(_USABLE_RAM * 128 * GIB),
    cores=16,
    h2d=54.7 * GB,
    d2h=54.8 * GB,
    duplex=91.9 * GB,
    ram_copy=62.2 * GB,
    cpu_update={"fp32": 6.24e9, "8bit": 8.55e9},
    cpu_update_loaded={"fp32": 3.82e9, "8bit": 6.43e9},
    gpu_update={"fp32": 115e9, "8bit": 191e9},
    gpu_copy=2977 * GB,
    bf16_flops=726e12,
    fp32_flops=51.7e12,
    disk_read=1.61 * GB,
    disk_write=2.18 * GB,
)

PRESETS: Mapping[str, Hardware] = MappingProxyType(
    {
        f"{name}-{ram_gib}gb": _derived(gpu, _desktop(ram_gib, transfers))
        for name, (gpu, sizes) in _DESKTOPS.items()
        for ram_gib, transfers in sizes.items()
    }
    | {
        "a100-40gb": _derived(_A100_40GB, _server(32, 8, 3200e6)),  # EPYC 7003
        "a100-80gb": _derived(_A100_80GB, _server(32, 8, 3200e6)),
        "h100": _H100_HOST,
        "h200": _derived(_H200, _server(48, 8, 4800e6)),  # Xeon, 4th generation
        "mi300x": _derived(_MI300X, _server(64, 12, 4800e6)),  # EPYC 9004
    }
)


def preset(name: str) -> Hardware:
    """The preset of that name; case, spaces and dashes do not matter.

    Raises:
        ConfigError: there is none, with the names that there are and the nearest one.
    """
    plain = {_plain(known): known for known in PRESETS}
    wanted = _plain(name)
    if wanted in plain:
        return PRESETS[plain[wanted]]
    near = [key for key in plain if wanted and (wanted in key or key in wanted)]
    near = near or difflib.get_close_matches(wanted, plain, n=1)
    hint = f" (did you mean {plain[near[0]]!r}?)" if near else ""
    raise ConfigError(f"no preset is called {name!r}{hint}; there are {', '.join(PRESETS)}")


def estimate(*, gpu: str | None, gpu_bytes: int, ram_bytes: int, cores: int) -> Hardware:
    """A machine that nobody measured, after the preset that is nearest to it.

    Args:
        gpu: the GPU's name, or None where RAM and cores stand in for one.
        gpu_bytes: memory of the GPU.
        ram_bytes: RAM that may be used.
        cores: physical cores.

    Returns:
        The preset's rates, those of the CPU lowered where there are too few cores for them; memory and cores as given.
    """
    if gpu is None:
        return _without_gpu(ram_bytes, cores)
    name, near = _nearest(gpu, gpu_bytes, ram_bytes)
    most = {"fp32": cores * _CORE_BANDWIDTH / _UPDATE_BYTES["fp32"], "8bit": cores * _CORE_8BIT_UPDATES}
    share = {key: min(1.0, most[key] / rate) for key, rate in near.cpu_update.items()}
    return dataclasses.replace(
        near,
        name=f"{gpu}, {cores} cores (after the preset {name})",
        gpu=gpu,
        gpu_bytes=gpu_bytes,
        ram_bytes=ram_bytes,
        cores=cores,
        ram_copy=min(near.ram_copy, cores * _CORE_BANDWIDTH),
        cpu_update={key: share[key] * rate for key, rate in near.cpu_update.items()},
        cpu_update_loaded={key: share[key] * rate for key, rate in near.cpu_update_loaded.items()},
        disk_bytes=None,
        disk_read=None,
        disk_write=None,
        disk_duplex=None,
    )


def disk_rates(hardware: Hardware) -> tuple[float, float]:
    """Bytes a second that the disk for state reads and writes in training; where nobody measured it those of the
    nearest preset.

    Training reads and writes about as much, at the same time. Where that was measured too, both rates are scaled so
    that as many bytes each way, one after the other, take as long as at once.
    """
    read, write, both = hardware.disk_read, hardware.disk_write, hardware.disk_duplex
    if read is not None and write is not None:
        share = 1.0 if both is None else both * (1 / read + 1 / write) / 2
        return share * read, share * write
    if hardware.gpu is None:
        host = _desktop(64, 3200e6)
        return host.disk_read, host.disk_write
    _, near = _nearest(hardware.gpu, hardware.gpu_bytes, hardware.ram_bytes)
    assert near.disk_read is not None and near.disk_write is not None, "every preset has a disk"
    return near.disk_read, near.disk_write


def _nearest(gpu: str, gpu_bytes: int, ram_bytes: int) -> tuple[str, Hardware]:
    """Name and preset with that GPU; where none has it, with one of nearly as much memory. RAM decides among them."""
    model = _plain(gpu)
    named = {
        key: value for key, value in PRESETS.items() if _plain(key.split("-")[0].removeprefix("rtx")) in model
    }

    def distance(item: tuple[str, Hardware]) -> tuple[float, float]:
        """Apart in GPU memory, then in RAM, as logarithms."""
        return (
            round(abs(math.log(item[1].gpu_bytes / gpu_bytes)), 1),
            abs(math.log(item[1].ram_bytes / max(1, ram_bytes))),
        )

    return min((named or PRESETS).items(), key=distance)


def _without_gpu(ram_bytes: int, cores: int) -> Hardware:
    """A machine without a GPU: two channels of DDR4-3200, the slowest RAM at the full rate among the presets.

    Its "links" are copies in RAM, and what runs beside another takes half.
    """
    host = _desktop(64, 3200e6)
    ram = min(_RAM_SHARE * host.bandwidth, cores * _CORE_BANDWIDTH)
    copy = ram * _RAM_COPY_SHARE / _RAM_SHARE
    updates = {
        "fp32": ram / _UPDATE_BYTES["fp32"],
        "8bit": min(ram / _UPDATE_BYTES["8bit"], cores * _CORE_8BIT_UPDATES),
    }
    return Hardware(
        name=f"{cores} cores without a GPU",
        source="estimated",
        gpu=None,
        gpu_bytes=ram_bytes,
        ram_bytes=ram_bytes,
        cores=cores,
        h2d=copy / 2,
        d2h=copy / 2,
        duplex=copy / 2,
        ram_copy=copy,
        cpu_update=updates,
        cpu_update_loaded={key: rate / 2 for key, rate in updates.items()},
        gpu_update=updates,
        gpu_copy=copy,
        bf16_flops=_MATRIX_SHARE * _CORE_FLOPS * cores,
        fp32_flops=_MATRIX_SHARE * _CORE_FLOPS * cores,
    )


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
