"""How fast are the updates and the gradient norm, against the bandwidth of a copy on the same machine?

Prints one JSON row for each measurement: CPU for each thread count and instruction set asked for, GPU if
there is one. Example: ``python tests/kernels/bench_updates.py --numel 256000000 --threads 1 8 16``.
"""

import argparse
import contextlib
import functools
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

import slideformer_kernels as kernels  # noqa: E402
from slideformer_kernels import (
    MOMENT_BLOCK_NUMEL,
    accumulate_,
    accumulate_squared_,
    adamw_scalars,
    build,
    cpu,
    lion_scalars,
    sgd_scalars,
    sum_of_squares,
)  # noqa: E402
from slideformer_kernels.rules import ADAMW, LION, SGD, Rule  # noqa: E402

ADAMW_SCALARS = adamw_scalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=10)
LION_SCALARS = lion_scalars(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.1, step=10)
SGD_OPTIONS = {"lr": 1e-3, "dampening": 0.0, "weight_decay": 0.1, "step": 10}
# Operation -> rule, its kernel, numbers of a step.
UPDATES: dict[str, tuple[Rule, str, object]] = {
    "adamw_split": (ADAMW, "adamw", ADAMW_SCALARS),
    "adamw_split_8bit": (ADAMW, "adamw_8bit", ADAMW_SCALARS),
    "lion_split": (LION, "lion", LION_SCALARS),
    "sgd_split": (SGD, "sgd", sgd_scalars(momentum=0.0, nesterov=False, **SGD_OPTIONS)),
    "sgd_momentum_split": (SGD, "sgd_momentum", sgd_scalars(momentum=0.9, nesterov=True, **SGD_OPTIONS)),
}


def zeros(numel: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Allocate as the engine does: on the CPU an anonymous mapping that may have huge pages."""
    if device != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    memory = mmap.mmap(-1, max(1, numel * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=numel).zero_()


class Updates:
    """Split masters and bf16 gradients of ``numel`` elements, and all rules' moments for them."""

    def __init__(self, numel: int, device: str) -> None:
        self.numel = numel
        self.masters = zeros(numel, torch.bfloat16, device), zeros(numel, torch.int16, device)
        self.grad = zeros(numel, torch.bfloat16, device).normal_()
        blocks = -(-numel // MOMENT_BLOCK_NUMEL)
        self.moments = {
            operation: {
                name: zeros(blocks if name.endswith("_scale") else numel, dtype, device)
                for name, dtype in rule.formats[kernel].items()
            }
            for operation, (rule, kernel, _) in UPDATES.items()
        }

    def run(self, operation: str, **options: object) -> None:
        rule, _, scalars = UPDATES[operation]
        getattr(kernels, rule.name)(self.masters, self.grad, self.moments[operation], scalars, **options)

    def moved_bytes(self, operation: str) -> int:
        """Return the bytes that an update reads and writes: all but the gradient both ways."""
        both_ways = [*self.masters, *self.moments[operation].values()]
        return sum(2 * tensor.nbytes for tensor in both_ways) + self.grad.nbytes


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
    updates = Updates(numel, "cpu")
    for isa in isas:
        os.environ[cpu.ISA_VARIABLE] = isa
        for threads in thread_counts:
            extra = {"device": "cpu", "threads": threads, "isa": isa}
            for operation in UPDATES:
                run = functools.partial(updates.run, operation, threads=threads)
                samples = time_cpu(run, warmup, repeats)
                print_row(operation, numel, updates.moved_bytes(operation), samples, **extra)
            run = functools.partial(sum_of_squares, updates.grad, threads=threads)
            print_row("sum_of_squares", numel, 2 * numel, time_cpu(run, warmup, repeats), **extra)
            acc = updates.moments["adamw_split"]["exp_avg"]  # any fp32 tensor of this size
            for operation, moved in ((accumulate_, 10), (accumulate_squared_, 10)):
                run = functools.partial(operation, acc, updates.grad, threads=threads)
                name = operation.__name__.rstrip("_")
                print_row(name, numel, moved * numel, time_cpu(run, warmup, repeats), **extra)
    one, other = updates.moments["adamw_split"].values()
    for threads in thread_counts:
        torch.set_num_threads(threads)
        samples = time_cpu(lambda: one.copy_(other), warmup, repeats)
        print_row("copy", numel, 8 * numel, samples, device="cpu", threads=threads)


def bench_gpu(numel: int, warmup: int, repeats: int) -> None:
    import triton

    updates = Updates(numel, "cuda")
    scale = torch.ones(1, device="cuda")
    extra = {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    for operation in UPDATES:
        run = functools.partial(updates.run, operation, grad_scale=scale)
        samples = time_gpu(run, warmup, repeats)
        print_row(operation, numel, updates.moved_bytes(operation), samples, **extra)
    one, other = updates.moments["adamw_split"].values()
    for operation, moved_bytes, run in (
        ("sum_of_squares", 2 * numel, lambda: sum_of_squares(updates.grad)),
        ("copy", 8 * numel, lambda: one.copy_(other)),
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
