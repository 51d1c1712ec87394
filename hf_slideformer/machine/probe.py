"""Measuring a machine in seconds, by the engine's own means, and choosing what describes it.

Copies go between pinned host buffers and the GPU on a stream for each direction, updates are the kernels that train.
Rates are those of the median sample. On a machine without a GPU RAM stands in for its memory, so links are copies in
RAM, and the cores do its work.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import fcntl
import itertools
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from slideformer_kernels import (
    MOMENT_BLOCK_NUMEL,
    adamw_,
    adamw_scalars,
    build,
)
from slideformer_kernels.cpu import default_threads

from ..errors import ConfigError, PlanError, ProbeError
from ..memory.buffers import HostBuffer
from .hardware import (
    Hardware,
    available_gpu_bytes,
    available_ram_bytes,
    cached_hardware,
    default_update_threads,
)
from .presets import estimate, preset

GIB = 2**30
MIB = 2**20

# Any step but the first: nothing but the moments' bias correction depends on it.
_SCALARS = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=10)

# Bytes for each parameter of `_State`, rounded up.
_STATE_BYTES = 17
# As many threads as the disk's queue needs to stay filled: more gained nothing on the benchmarks' machine.
_DISK_THREADS = 4
_DISK_CHUNK_BYTES = 16 * MIB
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSizes:
    """How much a measurement moves and how long it takes.

    Attributes:
        link_bytes: of one copy between RAM and the GPU.
        update_numel: parameters of one update; its state should be larger than any cache.
        matrix_sizes: edges of square matrices; the fastest counts.
        disk_bytes: of the file that is written and read.
        seconds: for each measurement; at least three samples are taken.
        notes: what a user should know of these sizes.
    """

    link_bytes: int = 256 * MIB
    update_numel: int = 128 * MIB
    matrix_sizes: tuple[int, ...] = (4096, 8192)
    disk_bytes: int = 4 * GIB
    seconds: float = 0.4
    notes: tuple[str, ...] = ()

    @classmethod
    def of_machine(cls, device: torch.device) -> ProbeSizes:
        """Sizes that fit what is free in RAM and on the GPU.

        Raises:
            ProbeError: there is too little for a measurement.
        """
        on_gpu = device.type == "cuda"
        sizes = cls() if on_gpu else cls(update_numel=64 * MIB, matrix_sizes=(1024, 2048))
        notes = []
        if not build.is_available():  # PyTorch operators are slow and take temporary memory
            sizes = dataclasses.replace(sizes, update_numel=MIB)
            notes.append("the CPU update ran without its C kernels, since they could not be built")
        wanted_bytes = sizes.link_bytes
        ram, gpu = available_ram_bytes() // 3, available_gpu_bytes(device) * 3 // 4
        while sizes._ram_bytes(on_gpu) > ram or (on_gpu and sizes._gpu_bytes() > gpu):
            if sizes.link_bytes <= 16 * MIB:
                short = "RAM" if sizes._ram_bytes(on_gpu) > ram else "GPU memory"
                need = 3 * sizes._ram_bytes(on_gpu) if short == "RAM" else sizes._gpu_bytes() * 4 // 3
                have = 3 * ram if short == "RAM" else gpu * 4 // 3
                raise ProbeError(
                    f"a measurement wants at least {need / GIB:.2f} GiB of free {short}, and {have / GIB:.2f} GiB is "
                    "free; end what holds it, and measure again"
                )
            sizes = dataclasses.replace(
                sizes,
                link_bytes=sizes.link_bytes // 2,
                update_numel=min(sizes.update_numel, max(MIB, sizes.update_numel // 2)),
                matrix_sizes=tuple(size // 2 for size in sizes.matrix_sizes),
            )
        if sizes.link_bytes < wanted_bytes:
            notes.append("little memory was free, so little was moved, and caches may have helped")
        return dataclasses.replace(sizes, notes=tuple(notes))

    def _ram_bytes(self, on_gpu: bool) -> int:
        """RAM that is held at once: links both ways, at both ends where RAM stands in, and the update's state."""
        return (2 if on_gpu else 4) * self.link_bytes + _STATE_BYTES * self.update_numel

    def _gpu_bytes(self) -> int:
        """GPU memory that is held at once: links, and then either state or three matrices."""
        matrices = 3 * 4 * max(self.matrix_sizes) ** 2
        return 2 * self.link_bytes + max(_STATE_BYTES * self.update_numel, matrices)


def probe(
    device: torch.device | str,
    directory: str | os.PathLike | None = None,
    *,
    sizes: ProbeSizes | None = None,
) -> Hardware:
    """Measure this machine; nothing else should run on it meanwhile.

    Args:
        device: the GPU, or "cpu".
        directory: on the disk for state, to measure that too.
        sizes: how much to move; None fits them to the machine.

    Returns:
        What was measured. RAM and disk are what is free now, the GPU's memory all that it has.

    Raises:
        ConfigError: there is no such device, or `directory` is none.
        ProbeError: too little memory or disk is free, or a measurement failed.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"torch finds no GPU, so {device} cannot be measured; measure 'cpu' instead")
    if directory is not None and not Path(directory).is_dir():
        raise ConfigError(f"{directory} is not a directory; name an existing one on the disk to measure")
    on_gpu = device.type == "cuda"
    ram_bytes = available_ram_bytes()
    threads = default_update_threads(device)
    try:
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            sizes = sizes or ProbeSizes.of_machine(device)
            measured = _measure(device, sizes, threads)
    except (torch.OutOfMemoryError, MemoryError, PlanError) as error:
        raise ProbeError(f"a measurement found too little memory: {error}") from error
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
    notes = (*sizes.notes, *measured.pop("notes"))
    if directory is not None:
        disk, disk_notes = _measure_disk(Path(directory), sizes)
        measured |= disk
        notes += disk_notes
    gpu = torch.cuda.get_device_name(device) if on_gpu else None
    return Hardware(
        name=f"{gpu or _cpu_name()}, {default_threads()} cores",
        source="measured",
        gpu=gpu,
        gpu_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else ram_bytes,
        ram_bytes=ram_bytes,
        cores=default_threads(),
        notes=notes,
        **measured,
    )


def hardware_of_this_machine(
    device: torch.device | str, directory: str | os.PathLike | None = None
) -> Hardware:
    """What this machine can do, without measuring it now: an earlier measurement, else an estimate.

    Args:
        device: the GPU, or "cpu".
        directory: for state on disk; its rates are known if they were measured on the same file system.

    Returns:
        A measurement that `slideformer probe` left in the cache, or the rates of the nearest preset with this
        machine's memory and cores. `Hardware.advice` says what to do about the latter.
    """
    device = torch.device(device)
    cached = cached_hardware(device, directory)
    if cached is not None:
        return cached
    ram_bytes = max(1, available_ram_bytes())
    on_gpu = device.type == "cuda"
    return estimate(
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        gpu_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else ram_bytes,
        ram_bytes=ram_bytes,
        cores=default_threads(),
    )


def named_hardware(name_or_file: str | os.PathLike) -> Hardware:
    """The preset of that name, or what a JSON file describes.

    Raises:
        ConfigError: there is neither, or the file does not describe hardware.
    """
    text = os.fspath(name_or_file)
    if os.path.isfile(text) or text.endswith(".json") or os.sep in text:
        return Hardware.from_file(text)
    try:
        return preset(text)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; or name a JSON file that `slideformer probe --output FILE` wrote"
        ) from None


def _measure(device: torch.device, sizes: ProbeSizes, threads: int) -> dict[str, Any]:
    """All rates but the disk's, by attribute of `Hardware`; `notes` too."""
    rates = _link_and_cpu_rates(device, sizes, threads)
    if device.type == "cuda":
        rates |= _gpu_rates(device, sizes)
    else:
        rates |= {"gpu_update": dict(rates["cpu_update"]), "gpu_copy": rates["ram_copy"]}
    rates["bf16_flops"] = _matrix_flops(device, torch.bfloat16, sizes)
    rates["fp32_flops"] = _matrix_flops(device, torch.float32, sizes)
    return rates


def _link_and_cpu_rates(device: torch.device, sizes: ProbeSizes, threads: int) -> dict[str, Any]:
    links = _Links(device, sizes.link_bytes)
    h2d, d2h = (links.rate([direction], sizes.seconds) for direction in links.directions)
    both = links.rate(links.directions, sizes.seconds)
    state = _State(sizes.update_numel, torch.device("cpu"))
    alone, loaded = {}, {}
    for name, update in state.updates(threads).items():
        alone[name] = sizes.update_numel / _host_seconds(update, sizes.seconds)
        with links.traffic():
            # Noise must not say that an update is faster beside copies than alone.
            loaded[name] = min(alone[name], sizes.update_numel / _host_seconds(update, sizes.seconds))
    with _torch_threads(threads):
        ram_copy = state.copy_bytes / _host_seconds(state.copy, sizes.seconds)
    refused = device.type == "cuda" and not links.pinned
    return {
        "h2d": h2d,
        "d2h": d2h,
        "duplex": max(both, h2d, d2h),  # what carries both at once carries one, whatever the noise says
        "cpu_update": alone,
        "cpu_update_loaded": loaded,
        "ram_copy": ram_copy,
        "notes": ("pinning RAM was refused, so links were measured with pageable memory",) if refused else (),
    }


def _gpu_rates(device: torch.device, sizes: ProbeSizes) -> dict[str, Any]:
    state = _State(sizes.update_numel, device)
    updates = {
        name: sizes.update_numel / _gpu_seconds(update, sizes.seconds)
        for name, update in state.updates(None).items()
    }
    return {"gpu_update": updates, "gpu_copy": state.copy_bytes / _gpu_seconds(state.copy, sizes.seconds)}


class _Direction:
    """One direction of a link: a copy that is issued on its own stream, or done at once without a GPU."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.source, self.target = source, target
        device = next((tensor.device for tensor in (source, target) if tensor.is_cuda), None)
        self.stream = None if device is None else torch.cuda.Stream(device)

    def copy(self) -> None:
        if self.stream is None:
            self.target.copy_(self.source)
            return
        with torch.cuda.stream(self.stream):
            self.target.copy_(self.source, non_blocking=True)

    def copy_until(self, stopped: threading.Event) -> None:
        """Copy again and again, two copies in flight so that the link never idles."""
        pending: collections.deque[torch.cuda.Event] = collections.deque()
        while not stopped.is_set():
            self.copy()
            if self.stream is not None:
                event = torch.cuda.Event(
                    blocking=True
                )  # the waiting thread must leave its core to the update
                event.record(self.stream)
                pending.append(event)
                if len(pending) == 2:
                    pending.popleft().synchronize()
        if self.stream is not None:
            self.stream.synchronize()


class _Links:
    """Buffers of `nbytes` for each direction between RAM and the device: H2D first, then D2H."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        on_gpu = device.type == "cuda"
        # Kept, since pinning ends with the buffers.
        self._host = [HostBuffer(nbytes, pin=on_gpu) for _ in range(2)]
        self.pinned = all(buffer.pinned for buffer in self._host)
        source, target = (buffer.tensor(torch.uint8, 0, nbytes).fill_(1) for buffer in self._host)
        if on_gpu:
            there = [torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
            torch.cuda.synchronize(device)  # the fills ran on another stream than the copies will
        else:
            there = [HostBuffer(nbytes).tensor(torch.uint8, 0, nbytes).fill_(1) for _ in range(2)]
        self.nbytes = nbytes
        self.directions = (_Direction(source, there[0]), _Direction(there[1], target))

    def rate(self, directions: Sequence[_Direction], seconds: float) -> float:
        """Bytes a second that these directions move together."""
        copies = 4  # in a row, so that starting and ending count little
        run = self._gpu_copies if directions[0].stream is not None else self._host_copies
        run(directions, 1)
        samples = _samples(lambda: run(directions, copies), seconds)
        return len(directions) * copies * self.nbytes / statistics.median(samples)

    @contextlib.contextmanager
    def traffic(self) -> Iterator[None]:
        """Copies both ways while the block runs, from a thread for each direction as in the engine.

        Raises:
            ProbeError: a copy failed.
        """
        stopped = threading.Event()
        with ThreadPoolExecutor(2, thread_name_prefix="slideformer-probe") as pool:
            lanes = [pool.submit(direction.copy_until, stopped) for direction in self.directions]
            try:
                yield
            finally:
                stopped.set()
            for lane in lanes:
                if (error := lane.exception()) is not None:
                    raise ProbeError(f"a copy failed: {error}") from error

    @staticmethod
    def _gpu_copies(directions: Sequence[_Direction], copies: int) -> float:
        """Seconds of the slowest direction, by the GPU's clock."""
        streams = [direction.stream for direction in directions if direction.stream is not None]
        begin, *ends = (torch.cuda.Event(enable_timing=True) for _ in range(1 + len(streams)))
        begin.record()
        for stream in streams:
            stream.wait_event(begin)
        for _ in range(copies):
            for direction in directions:
                direction.copy()
        for stream, end in zip(streams, ends, strict=True):
            end.record(stream)
        for end in ends:
            end.synchronize()
        return max(begin.elapsed_time(end) for end in ends) / 1e3

    @staticmethod
    def _host_copies(directions: Sequence[_Direction], copies: int) -> float:
        def run(direction: _Direction) -> None:
            for _ in range(copies):
                direction.copy()

        begin = time.perf_counter()
        threads = [threading.Thread(target=run, args=(direction,)) for direction in directions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begin


class _State:
    """Weights, gradients and moments of `numel` parameters, in both formats, where an update finds them.

    In RAM they are mapped as the engine maps them, with huge pages where the system has them.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
            if device.type == "cuda":
                return torch.zeros(count, dtype=dtype, device=device)
            return HostBuffer(count * dtype.itemsize).tensor(dtype, 0, count)

        blocks = -(-numel // MOMENT_BLOCK_NUMEL)
        self.master = [zeros(numel, torch.bfloat16), zeros(numel, torch.int16), zeros(numel, torch.bfloat16)]
        # Normal numbers in every vector: denormal ones would be slower than training is. A short piece repeats,
        # since drawing them all would take longer than measuring.
        piece = torch.randn(min(numel, MIB), generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
        for part in self.master[2].split(piece.numel()):
            part.copy_(piece[: part.numel()])
        self.moments = {name: zeros(numel, torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        self.codes = {
            "exp_avg": zeros(numel, torch.int8),
            "exp_avg_scale": zeros(blocks, torch.float32),
            "exp_avg_sq": zeros(numel, torch.uint8),
            "exp_avg_sq_scale": zeros(blocks, torch.float32),
        }
        self.copy_bytes = 2 * 4 * numel

    def updates(self, threads: int | None) -> dict[str, Callable[[], None]]:
        """The update of all parameters, by the moments' format."""
        *masters, grad = self.master
        return {
            "fp32": lambda: adamw_(masters, grad, self.moments, _SCALARS, threads=threads),
            "8bit": lambda: adamw_(masters, grad, self.codes, _SCALARS, threads=threads),
        }

    def copy(self) -> None:
        """Copy one moment over the other, after which updates are no longer training's."""
        self.moments["exp_avg"].copy_(self.moments["exp_avg_sq"])


def _samples(run: Callable[[], float], seconds: float) -> list[float]:
    """What `run` returns, again and again for `seconds`, three times at least."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        samples.append(run())
    return samples


def _host_seconds(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the median run on the CPU, after one that warms up."""

    def timed() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    run()
    return statistics.median(_samples(timed, seconds))


def _gpu_seconds(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the median run on the GPU's current stream, by its clock, after runs that compile and warm up."""

    def batch(count: int) -> float:
        # Runs are issued ahead, so that what launching costs the host is not counted.
        pairs = []
        for _ in range(count):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        pairs[-1][1].synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3

    run()
    count = min(8, max(1, int(seconds / 4 / batch(1))))
    return statistics.median(_samples(lambda: batch(count), seconds))


def _matrix_flops(device: torch.device, dtype: torch.dtype, sizes: ProbeSizes) -> float:
    """Operations a second of the fastest square product, on random numbers: zeros need less power and run faster."""
    generator = torch.Generator(device).manual_seed(0)
    seconds_of = _gpu_seconds if device.type == "cuda" else _host_seconds
    best = 0.0
    for size in sizes.matrix_sizes:
        a, b = (torch.randn(size, size, generator=generator, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        best = max(best, 2 * size**3 / seconds_of(product, sizes.seconds))
    return best


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _measure_disk(directory: Path, sizes: ProbeSizes) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Free bytes and rates of the disk under `directory`, and notes.

    The file has no name while it is used, so nothing of it can be left behind.
    """
    free = shutil.disk_usage(directory).free
    chunk = min(
        _DISK_CHUNK_BYTES, max(_PAGE_BYTES, sizes.disk_bytes // _DISK_THREADS // _PAGE_BYTES * _PAGE_BYTES)
    )
    nbytes = min(sizes.disk_bytes, free // 2) // chunk * chunk
    if nbytes == 0:
        raise ProbeError(
            f"{directory} has {free / MIB:.1f} MiB free, and a measurement writes at least {chunk / MIB:.1f}, half of "
            "what is free at most; free some, or name a directory on another disk"
        )
    try:
        handle, path = tempfile.mkstemp(prefix=".slideformer-probe-", dir=directory)
        try:
            os.unlink(path)
            direct = _set_direct(handle, True)
            try:
                written = _transfer(handle, os.pwrite, nbytes, chunk, sizes)
            except OSError as error:
                if (
                    not direct or error.errno != errno.EINVAL
                ):  # some file systems refuse only the write itself
                    raise
                _set_direct(handle, False)
                direct = False
                written = _transfer(handle, os.pwrite, nbytes, chunk, sizes)
            if not direct:  # or the reads would come from RAM
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            read = _transfer(handle, _pread_into, written.nbytes, chunk, sizes)
            # Buffered, what is read for the second time comes from RAM.
            both = _transfer_both_ways(handle, written.nbytes, chunk, sizes) if direct else None
        finally:
            os.close(handle)
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "unknown")
        raise ProbeError(
            f"measuring the disk under {directory} with {nbytes / MIB:.1f} MiB failed: {error.strerror or error} "
            f"({reason}); check the disk, or name a directory on another one"
        ) from error
    notes = () if direct else (f"{directory} refuses O_DIRECT, so its rates are those of buffered files",)
    rates = {"disk_read": read.rate, "disk_write": written.rate, "disk_duplex": both}
    return {"disk_bytes": free, **rates}, notes


@dataclass(frozen=True, slots=True)
class _Transfer:
    nbytes: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.nbytes / self.seconds


def _transfer(
    handle: int,
    operation: Callable[[int, memoryview, int], int],
    nbytes: int,
    chunk: int,
    sizes: ProbeSizes,
    *,
    begin: int = 0,
    again: bool = False,
) -> _Transfer:
    """Write or read a part of a file in chunks, several at a time, until `nbytes` or the time is over.

    Args:
        handle: the file.
        operation: moves a chunk and returns its bytes.
        nbytes: of the part, whole chunks.
        chunk: bytes.
        sizes: for the time.
        begin: offset of the part.
        again: go on from its start when the part ends, until the time is over.

    Raises:
        OSError: the system refuses, or moves less than it was given.
    """
    # Random, since some file systems and drives compress.
    content = torch.randint(0, 256, (chunk,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    buffers = [HostBuffer(chunk).tensor(torch.uint8, 0, chunk).copy_(content) for _ in range(_DISK_THREADS)]
    numbers = itertools.count()
    started = time.perf_counter()
    deadline = started + 4 * sizes.seconds

    def serve(buffer: torch.Tensor) -> int:
        moved = 0
        # The time is looked at before a number is taken, so that the chunks moved leave no hole.
        while moved == 0 or time.perf_counter() < deadline:
            position = next(numbers) * chunk
            if position >= nbytes and not again:
                break
            offset = begin + position % nbytes
            done = operation(handle, buffer.numpy().data, offset)
            if done != chunk:
                raise OSError(errno.EIO, f"{done} of {chunk} bytes were moved at offset {offset}")
            moved += chunk
        return moved

    with ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="slideformer-probe") as pool:
        moved = sum(pool.map(serve, buffers))
    os.fdatasync(handle)
    return _Transfer(moved, time.perf_counter() - started)


def _transfer_both_ways(handle: int, nbytes: int, chunk: int, sizes: ProbeSizes) -> float | None:
    """Bytes a second, reads and writes together, in two halves of a file; None where it has only one chunk."""
    half = nbytes // chunk // 2 * chunk
    if half == 0:
        return None
    with ThreadPoolExecutor(2, thread_name_prefix="slideformer-probe-disk") as pool:
        reading = pool.submit(_transfer, handle, _pread_into, half, chunk, sizes, again=True)
        writing = pool.submit(_transfer, handle, os.pwrite, half, chunk, sizes, begin=half, again=True)
        parts = [reading.result(), writing.result()]
    return sum(part.nbytes for part in parts) / max(part.seconds for part in parts)


def _pread_into(handle: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(handle, [buffer], offset)


def _set_direct(handle: int, wanted: bool) -> bool:
    """Switch O_DIRECT of an open file; returns whether that was possible."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
    except OSError:
        return False
    return flag != 0
