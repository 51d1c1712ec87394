"""The C kernels behind the signatures of ``reference.py``: same checks, same results bit for bit.

Calls release the GIL. Each uses ``threads`` OpenMP threads (small tensors fewer), independent of
OMP_NUM_THREADS, which launchers set to 1. The environment variable SLIDEFORMER_CPU_ISA (``avx512``, ``avx2``
or ``portable``) forces one instruction set; without it the widest that the CPU has is used.
"""

import ctypes
import functools
import math
import os
from pathlib import Path

import torch

from . import arguments, build
from .scalars import AdamWScalars, round_to_fp32

ISA_VARIABLE = "SLIDEFORMER_CPU_ISA"
# The numbers are those of the enumeration in slideformer_cpu.c.
ISA_NUMBERS = {"portable": 1, "avx2": 2, "avx512": 3}
_BEST_ISA = 0
_STATUS_UNSUPPORTED_ISA = 1
_STATUS_NO_MEMORY = 2


def adamw_split_(
    hi: torch.Tensor,
    lo: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: AdamWScalars,
    grad_scale: float = 1.0,
    *,
    threads: int | None = None,
) -> None:
    """Update a split master in place with AdamW (Loshchilov & Hutter 2019, Alg. 2; formula: reference.py).

    One pass over memory: 26 bytes per element with a bf16 gradient.

    Args:
        hi: (numel,) bf16, CPU, any shape, contiguous; updated in place.
        lo: (numel,) int16; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        exp_avg: (numel,) fp32; updated in place.
        exp_avg_sq: (numel,) fp32; updated in place.
        scalars: of this step.
        grad_scale: clip coefficient, rounded to fp32; 1.0 changes nothing.
        threads: at most this many; None takes :func:`default_threads`.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit, or threads < 1.
        RuntimeError: if the library could not be built (``build.is_available()`` tells).
    """
    numel = arguments.check_adamw_split(hi, lo, grad, exp_avg, exp_avg_sq)
    _call(
        "adamw_split",
        hi,
        hi.data_ptr(),
        lo.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        numel,
        _scalar_array(scalars, grad_scale),
        threads=threads,
    )
    arguments.mark_written(hi, lo, exp_avg, exp_avg_sq)


def adamw_fp32_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: AdamWScalars,
    grad_scale: float = 1.0,
    *,
    threads: int | None = None,
) -> None:
    """Update fp32 parameters in place with AdamW (Loshchilov & Hutter 2019, Alg. 2; formula: reference.py).

    Args:
        param: (numel,) fp32, CPU, any shape, contiguous; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        exp_avg: (numel,) fp32; updated in place.
        exp_avg_sq: (numel,) fp32; updated in place.
        scalars: of this step.
        grad_scale: clip coefficient, rounded to fp32; 1.0 changes nothing.
        threads: at most this many; None takes :func:`default_threads`.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit, or threads < 1.
        RuntimeError: if the library could not be built.
    """
    numel = arguments.check_adamw_fp32(param, grad, exp_avg, exp_avg_sq)
    _call(
        "adamw_fp32",
        param,
        param.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        numel,
        _scalar_array(scalars, grad_scale),
        threads=threads,
    )
    arguments.mark_written(param, exp_avg, exp_avg_sq)


def adamw_split_8bit_(
    hi: torch.Tensor,
    lo: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
    scalars: AdamWScalars,
    grad_scale: float = 1.0,
    *,
    threads: int | None = None,
) -> None:
    """Update a split master in place with AdamW on 8-bit moments (formula: reference.py).

    One pass over memory: 14 bytes per element with a bf16 gradient.

    Args:
        hi: (numel,) bf16, CPU, any shape, contiguous; updated in place.
        lo: (numel,) int16; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        exp_avg: (numel,) int8 codes; updated in place.
        exp_avg_scale: (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32; updated in place.
        exp_avg_sq: (numel,) uint8 codes; updated in place.
        exp_avg_sq_scale: (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32; updated in place.
        scalars: of this step.
        grad_scale: clip coefficient, rounded to fp32; 1.0 changes nothing.
        threads: at most this many; None takes :func:`default_threads`.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit, or threads < 1.
        RuntimeError: if the library could not be built.
    """
    codes = exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale
    numel = arguments.check_adamw_split_8bit(hi, lo, grad, *codes)
    _call(
        "adamw_split_8bit",
        hi,
        hi.data_ptr(),
        lo.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        *(tensor.data_ptr() for tensor in codes),
        numel,
        _scalar_array(scalars, grad_scale),
        threads=threads,
    )
    arguments.mark_written(hi, lo, *codes)


def adamw_fp32_8bit_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
    scalars: AdamWScalars,
    grad_scale: float = 1.0,
    *,
    threads: int | None = None,
) -> None:
    """Update fp32 parameters in place with AdamW on 8-bit moments (formula: reference.py).

    Args:
        param: (numel,) fp32, CPU, any shape, contiguous; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        exp_avg: (numel,) int8 codes; updated in place.
        exp_avg_scale: (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32; updated in place.
        exp_avg_sq: (numel,) uint8 codes; updated in place.
        exp_avg_sq_scale: (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32; updated in place.
        scalars: of this step.
        grad_scale: clip coefficient, rounded to fp32; 1.0 changes nothing.
        threads: at most this many; None takes :func:`default_threads`.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit, or threads < 1.
        RuntimeError: if the library could not be built.
    """
    codes = exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale
    numel = arguments.check_adamw_fp32_8bit(param, grad, *codes)
    _call(
        "adamw_fp32_8bit",
        param,
        param.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        *(tensor.data_ptr() for tensor in codes),
        numel,
        _scalar_array(scalars, grad_scale),
        threads=threads,
    )
    arguments.mark_written(param, *codes)


def split_master(
    fp32: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 values into their bf16 part and the residual (layout: reference.py).

    Args:
        fp32: (numel,) fp32, CPU, any shape, contiguous.
        out: (hi, lo) to write, bf16 and int16 of the same numel; allocated in the shape of ``fp32`` if None.
        threads: at most this many; None takes :func:`default_threads`.

    Returns:
        (hi, lo): ``out``, or new tensors that the caller owns.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit, or threads < 1.
        RuntimeError: if the library could not be built.
    """
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
    """Join a split master to fp32, bit for bit (layout: reference.py).

    Args:
        hi: (numel,) bf16, CPU, any shape, contiguous.
        lo: (numel,) int16.
        out: (numel,) fp32 to write; allocated in the shape of ``hi`` if None.
        threads: at most this many; None takes :func:`default_threads`.

    Returns:
        ``out``, or a new tensor that the caller owns.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit, or threads < 1.
        RuntimeError: if the library could not be built.
    """
    out = arguments.join_output(hi, lo, out)
    _call("join_master", hi, hi.data_ptr(), lo.data_ptr(), out.data_ptr(), hi.numel(), threads=threads)
    arguments.mark_written(out)
    return out


def accumulate_(acc: torch.Tensor, grad: torch.Tensor, *, threads: int | None = None) -> None:
    """Add ``grad`` to ``acc`` in fp32, in place; a NaN is stored as 0x7FC00000.

    Args:
        acc: (numel,) fp32, CPU, any shape, contiguous; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        threads: at most this many; None takes :func:`default_threads`.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit, or threads < 1.
        RuntimeError: if the library could not be built.
    """
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


def sum_of_squares(x: torch.Tensor, *, threads: int | None = None) -> float:
    """Return the sum of the squares in float64 by the fixed tree (reference.py).

    Args:
        x: (numel,) bf16 or fp32, CPU, any shape, contiguous; numel may be 0.
        threads: at most this many; None takes :func:`default_threads`. The result does not depend on it.

    Returns:
        The sum; NaN and infinity pass through.

    Raises:
        ValueError: if dtype, device or contiguity does not fit, or threads < 1.
        MemoryError: if the row sums (8 bytes for 1024 elements) cannot be allocated.
        RuntimeError: if the library could not be built.
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


def _scalar_array(scalars: AdamWScalars, grad_scale: float) -> ctypes.Array:
    """Return the scalars in the order that adamw_args_of in slideformer_cpu.c reads them."""
    return (ctypes.c_float * 8)(
        scalars.decay,
        scalars.one_minus_beta1,
        scalars.beta2,
        scalars.one_minus_beta2,
        scalars.inv_bias_correction2_sqrt,
        scalars.eps,
        scalars.step_size,
        round_to_fp32(grad_scale),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the library with its argument types set."""
    library = build.load()
    if library is None:
        raise RuntimeError(f"the CPU kernels are not available: {build.build_once().error}")
    pointer, number, numel = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures = {
        "adamw_split": (pointer, pointer, pointer, number, pointer, pointer, numel, pointer),
        "adamw_fp32": (pointer, pointer, number, pointer, pointer, numel, pointer),
        "adamw_split_8bit": (pointer, pointer, pointer, number, *[pointer] * 4, numel, pointer),
        "adamw_fp32_8bit": (pointer, pointer, number, *[pointer] * 4, numel, pointer),
        "split_master": (pointer, pointer, pointer, numel),
        "join_master": (pointer, pointer, pointer, numel),
        "accumulate": (pointer, pointer, number, numel),
        "sum_of_squares": (pointer, number, numel, pointer),
    }
    for name, argtypes in signatures.items():
        function = getattr(library, f"slideformer_{name}")
        function.argtypes = (*argtypes, number, number)
        function.restype = number
    library.slideformer_supports_isa.argtypes = (number,)
    library.slideformer_supports_isa.restype = number
    return library
