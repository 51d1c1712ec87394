"""The C kernels behind the functions of ``ops.py``: the checks of ``reference.py``, and its results bit for bit.

Arguments, results and errors are described in ``ops.py``; tensors must be on the CPU. Further, RuntimeError says that
the library could not be built (``build.is_available()`` tells), and ValueError that ``threads`` is below 1.

Calls release the GIL. Each uses at most ``threads`` OpenMP threads (small tensors fewer; None is
:func:`default_threads`), independent of OMP_NUM_THREADS, which launchers set to 1. The environment variable
SLIDEFORMER_CPU_ISA (``avx512``, ``avx2`` or ``portable``) forces one instruction set; without it the widest that the
CPU has is used.
"""

import ctypes
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from . import arguments, build, rules
from .scalars import Scalars, kernel_arguments, round_to_fp32

ISA_VARIABLE = "SLIDEFORMER_CPU_ISA"
# The numbers are those of the enumerations in slideformer_cpu.c.
ISA_NUMBERS = {"portable": 1, "avx2": 2, "avx512": 3}
UPDATE_NUMBERS = {"adamw": 0, "adamw_8bit": 1, "lion": 2, "sgd": 3, "sgd_momentum": 4}
_MOMENTS = 4
_SCALARS = 7
_BEST_ISA = 0
_STATUS_UNSUPPORTED_ISA = 1
_STATUS_NO_MEMORY = 2


def _update(
    rule: rules.Rule,
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: Scalars,
    grad_scale: float = 1.0,
    *,
    threads: int | None = None,
) -> None:
    """Update in one pass over memory."""
    update = arguments.check_update(rule, masters, grad, moments, scalars)
    numbers = round_to_fp32(grad_scale), *kernel_arguments(scalars)
    _call(
        "update",
        grad,
        UPDATE_NUMBERS[update.kernel],
        masters[0].data_ptr(),
        masters[1].data_ptr() if len(masters) == 2 else None,
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        (ctypes.c_void_p * _MOMENTS)(*(tensor.data_ptr() for tensor in update.moments)),
        (ctypes.c_float * (1 + _SCALARS))(*numbers),
        update.numel,
        threads=threads,
    )
    arguments.mark_written(*masters, *update.moments)


adamw_ = functools.partial(_update, rules.ADAMW)
lion_ = functools.partial(_update, rules.LION)
sgd_ = functools.partial(_update, rules.SGD)


def split_master(
    fp32: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 values into their bf16 part and the residual: (hi, lo)."""
    hi, lo = arguments.split_outputs(fp32, out)
    _call("split_master", fp32, fp32.data_ptr(), hi.data_ptr(), lo.data_ptr(), fp32.numel(), threads=threads)
    arguments.mark_written(hi, lo)
    return hi, lo


def join_master(
    hi: torch.Tensor,
    lo: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Join a split master to fp32, bit for bit."""
    out = arguments.join_output(hi, lo, out)
    _call("join_master", hi, hi.data_ptr(), lo.data_ptr(), out.data_ptr(), hi.numel(), threads=threads)
    arguments.mark_written(out)
    return out


def accumulate_(acc: torch.Tensor, grad: torch.Tensor, *, threads: int | None = None) -> None:
    """Add ``grad`` to ``acc`` in fp32, in place."""
    numel = arguments.check_accumulate(acc, grad)
    _call(
        "accumulate",
        acc,
        acc.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        numel,
        threads=threads,
    )
    arguments.mark_written(acc)


def accumulate_squared_(
    acc: torch.Tensor, grad: torch.Tensor, *, is_first: bool = False, threads: int | None = None
) -> float:
    """Add ``grad`` to ``acc`` and return the sum of the squares of ``acc``, in one pass over both."""
    numel = arguments.check_accumulate(acc, grad)
    result = ctypes.c_double()
    _call(
        "accumulate_squared",
        acc,
        acc.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        is_first,
        numel,
        ctypes.byref(result),
        threads=threads,
    )
    arguments.mark_written(acc)
    return math.nan if math.isnan(result.value) else result.value


def sum_of_squares(x: torch.Tensor, *, threads: int | None = None) -> float:
    """Return the sum of the squares in float64 by the fixed tree, whatever the number of threads.

    Raises:
        MemoryError: if the row sums (8 bytes for 1024 elements) cannot be allocated.
    """
    numel = arguments.check_sum_of_squares(x)
    result = ctypes.c_double()
    _call(
        "sum_of_squares",
        x,
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        numel,
        ctypes.byref(result),
        threads=threads,
    )
    return math.nan if math.isnan(result.value) else result.value


@functools.cache
def default_threads() -> int:
    """Return the number of physical cores that this process may use, within its cgroup's CPU quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {_core_of(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _cgroup_cpus()))


def supported_isas() -> list[str]:
    """Return the names of the instruction sets that this CPU can run, for SLIDEFORMER_CPU_ISA."""
    library = _library()
    return [name for name, number in ISA_NUMBERS.items() if library.slideformer_supports_isa(number)]


def _core_of(cpu: int) -> str:
    """Return a name of the physical core that the logical CPU belongs to."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> int:
    """Return the whole CPUs that the cgroup (version 2) quota allows; a large number without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return 1 << 20


def _call(function: str, operand: torch.Tensor, *values: object, threads: int | None) -> None:
    """Call a C function with ISA and threads appended; raise what its status says."""
    if operand.device.type != "cpu":
        raise ValueError(f"{function}: tensors are on {operand.device}, wanted cpu")
    if threads is None:
        threads = default_threads()
    elif threads < 1:
        raise ValueError(f"{function}: threads must be at least 1, got {threads}")
    isa = _isa_number()
    status = getattr(_library(), f"slideformer_{function}")(*values, isa, threads)
    if status == _STATUS_UNSUPPORTED_ISA:
        raise ValueError(f"{ISA_VARIABLE}={os.environ.get(ISA_VARIABLE)}: this CPU does not support it")
    if status == _STATUS_NO_MEMORY:
        raise MemoryError(f"{function}: no memory for the row sums of {operand.numel()} elements")


def _isa_number() -> int:
    name = os.environ.get(ISA_VARIABLE)
    if not name:
        return _BEST_ISA
    if name not in ISA_NUMBERS:
        raise ValueError(f"{ISA_VARIABLE}={name}: wanted one of {', '.join(ISA_NUMBERS)}")
    return ISA_NUMBERS[name]


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the library with its argument types set."""
    library = build.load()
    if library is None:
        raise RuntimeError(f"the CPU kernels are not available: {build.build_once().error}")
    pointer, number, numel = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures = {
        "update": (number, pointer, pointer, pointer, number, pointer, pointer, numel),
        "split_master": (pointer, pointer, pointer, numel),
        "join_master": (pointer, pointer, pointer, numel),
        "accumulate": (pointer, pointer, number, numel),
        "sum_of_squares": (pointer, number, numel, pointer),
        "accumulate_squared": (pointer, pointer, number, number, numel, pointer),
    }
    for name, argtypes in signatures.items():
        function = getattr(library, f"slideformer_{name}")
        function.argtypes = (*argtypes, number, number)
        function.restype = number
    library.slideformer_supports_isa.argtypes = (number,)
    library.slideformer_supports_isa.restype = number
    return library
