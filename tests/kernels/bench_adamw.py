"""How fast are the update and the gradient norm, against the bandwidth of a copy on the same machine?

Prints one JSON row for each measurement: CPU for each thread count and instruction set asked for, GPU if
there is one. Example: ``python tests/kernels/bench_adamw.py --numel 256000000 --threads 1 8 16``.
"""

import argparse
import contextlib
import json
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from slideformer_kernels import (  # noqa: E402
    MOMENT_BLOCK_NUMEL,
    adamw_scalars,
    adamw_split_,
    adamw_split_8bit_,
    build,
    cpu,
    sum_of_squares,
)

# hi, lo, exp_avg, exp_avg_sq read and written, bf16 gradient read.
UPDATE_BYTES = 2 * (2 + 2 + 4 + 4) + 2
# The same with one byte for each moment; two scales of 4 bytes for each block.
UPDATE_8BIT_BYTES = 2 * (2 + 2 + 1 + 1) + 2 + 2 * 8 / MOMENT_BLOCK_NUMEL
SCALARS = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=10)


def zeros(numel: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Allocate as the engine does: on the CPU an anonymous mapping that may have huge pages."""
    if device != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    memory = mmap.mmap(-1, max(1, numel * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=numel).zero_()


def make_state(numel: int, device: str) -> list[torch.Tensor]:
    """Allocate hi, lo, grad, exp_avg and exp_avg_sq."""
    hi, lo = zeros(numel, torch.bfloat16, device), zeros(numel, torch.int16, device)
    grad = zeros(numel, torch.bfloat16, device).normal_()
    return [hi, lo, grad, zeros(numel, torch.float32, device), zeros(numel, torch.float32, device).fill_(1.0)]


def make_codes(numel: int, device: str) -> list[torch.Tensor]:
    """Allocate codes and scales of exp_avg and exp_avg_sq, the moments of a new parameter."""
    blocks = -(-numel // MOMENT_BLOCK_NUMEL)
    codes = ((numel, torch.int8), (blocks, torch.float32), (numel, torch.uint8), (blocks, torch.float32))
    return [zeros(count, dtype, device) for count, dtype in codes]


def percentiles_s(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {f"p{p}_s": ordered[round((len(ordered) - 1) * p / 100)] for p in (20, 50, 80)}


def time_cpu(run: Callable[[], object], warmup: int, repeats: int) -> list[float]:
    samples = []
    for index in range(warmup + repeats):
        begin = time.perf_counter()
        run()
        if index >= warmup:
            samples.append(time.perf_counter() - begin)
    return samples


def time_gpu(run: Callable[[], object], warmup: int, repeats: int) -> list[float]:
    samples = []
    for index in range(warmup + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if index >= warmup:
            samples.append(begin.elapsed_time(end) / 1e3)
    return samples


def print_row(operation: str, numel: int, moved_bytes: float, samples: list[float], **extra: object) -> None:
    times = percentiles_s(samples)
    row = {
        "operation": operation,
        "numel": numel,
        "gparam_per_s": round(numel / times["p50_s"] / 1e9, 3),
        "gb_per_s": round(moved_bytes / times["p50_s"] / 1e9, 3),
        **times,
        **extra,
        "torch": torch.__version__,
        "cpu": cpu_name(),
    }
    print(json.dumps(row), flush=True)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def bench_cpu(numel: int, thread_counts: list[int], isas: list[str], warmup: int, repeats: int) -> None:
    state = make_state(numel, "cpu")
    state_8bit = [*state[:3], *make_codes(numel, "cpu")]
    for isa in isas:
        os.environ[cpu.ISA_VARIABLE] = isa
        for threads in thread_counts:
            extra = {"device": "cpu", "threads": threads, "isa": isa}
            samples = time_cpu(lambda t=threads: adamw_split_(*state, SCALARS, threads=t), warmup, repeats)
            print_row("adamw_split", numel, UPDATE_BYTES * numel, samples, **extra)
            samples = time_cpu(
                lambda t=threads: adamw_split_8bit_(*state_8bit, SCALARS, threads=t), warmup, repeats
            )
            print_row("adamw_split_8bit", numel, UPDATE_8BIT_BYTES * numel, samples, **extra)
            samples = time_cpu(lambda t=threads: sum_of_squares(state[2], threads=t), warmup, repeats)
            print_row("sum_of_squares", numel, 2 * numel, samples, **extra)
    copy = torch.empty_like(state[4])
    for threads in thread_counts:
        torch.set_num_threads(threads)
        samples = time_cpu(lambda: copy.copy_(state[3]), warmup, repeats)
        print_row("copy", numel, 8 * numel, samples, device="cpu", threads=threads)


def bench_gpu(numel: int, warmup: int, repeats: int) -> None:
    import triton

    state = make_state(numel, "cuda")
    state_8bit = [*state[:3], *make_codes(numel, "cuda")]
    scale = torch.ones(1, device="cuda")
    copy = torch.empty_like(state[4])
    extra = {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    for operation, moved_bytes, run in (
        ("adamw_split", UPDATE_BYTES * numel, lambda: adamw_split_(*state, SCALARS, scale)),
        (
            "adamw_split_8bit",
            UPDATE_8BIT_BYTES * numel,
            lambda: adamw_split_8bit_(*state_8bit, SCALARS, scale),
        ),
        ("sum_of_squares", 2 * numel, lambda: sum_of_squares(state[2])),
        ("copy", 8 * numel, lambda: copy.copy_(state[3])),
    ):
        print_row(operation, numel, moved_bytes, time_gpu(run, warmup, repeats), **extra)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=218_112_000, help="elements (default: a Llama-8B layer)")
    parser.add_argument("--threads", type=int, nargs="+", default=[cpu.default_threads()])
    parser.add_argument("--isa", nargs="+", default=None, help="default: all that the CPU has, but portable")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    if build.is_available():
        isas = options.isa or [isa for isa in cpu.supported_isas() if isa != "portable"] or ["portable"]
        bench_cpu(options.numel, options.threads, isas, options.warmup, options.repeats)
    if torch.cuda.is_available():
        bench_gpu(options.numel, options.warmup, options.repeats)


if __name__ == "__main__":
    main()
