"""One function for each operation; the tensors' device decides which implementation runs.

CPU tensors: the C kernels, or ``reference.py`` where they cannot be built. CUDA tensors (NVIDIA or AMD):
Triton, or PyTorch operators where one pass over memory hardly matters. All give the same bits.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch

from . import build, cpu, reference
from .arguments import MOMENT_BLOCK_NUMEL as MOMENT_BLOCK_NUMEL
from .arguments import check_accumulate
from .scalars import AdamWScalars, LionScalars, Scalars, SGDScalars


def adamw_(
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: AdamWScalars,
    grad_scale: float | torch.Tensor = 1.0,
    *,
    threads: int | None = None,
) -> None:
    """Update weights in place with AdamW (Loshchilov & Hutter 2019, Alg. 2; formula: reference.py).

    One pass over memory: with a bf16 gradient 26 bytes for each element, 14 with 8-bit moments. On CUDA tensors the
    update is enqueued on the current stream of their device.

    Args:
        masters: (weight,), fp32, or a split master (hi, lo), bf16 and int16; (numel,) each, CPU or CUDA, any shape,
            contiguous; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        moments: updated in place. Either ``exp_avg`` and ``exp_avg_sq``, (numel,) fp32; or 8-bit ones: ``exp_avg``,
            (numel,) int8 codes, ``exp_avg_sq``, (numel,) uint8 codes, and for each of them ``exp_avg_scale`` and
            ``exp_avg_sq_scale``, (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32. Zeros are the moments of a new parameter.
        scalars: of this step.
        grad_scale: clip coefficient, rounded to fp32; 1.0 changes nothing. A float, or a 1-element fp32 tensor on the
            tensors' device, which is read when the update runs.
        threads: CPU only: at most this many; None takes the physical cores.

    Raises:
        ValueError: if names, dtypes, devices, contiguity or numbers of elements do not fit.
        TypeError: if the scalars are another rule's.
    """
    _update("adamw_", masters, grad, moments, scalars, grad_scale, threads)


def lion_(
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: LionScalars,
    grad_scale: float | torch.Tensor = 1.0,
    *,
    threads: int | None = None,
) -> None:
    """Update weights in place with Lion (Chen et al. 2023, Alg. 2; formula: reference.py), as :func:`adamw_` does.

    One pass over memory: with a bf16 gradient 18 bytes for each element.

    Args:
        masters: as for :func:`adamw_`.
        grad: likewise.
        moments: ``exp_avg``, (numel,) fp32, updated in place; zeros for a new parameter.
        scalars: of this step.
        grad_scale: as for :func:`adamw_`.
        threads: likewise.

    Raises:
        ValueError: if names, dtypes, devices, contiguity or numbers of elements do not fit.
        TypeError: if the scalars are another rule's.
    """
    _update("lion_", masters, grad, moments, scalars, grad_scale, threads)


def sgd_(
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: SGDScalars,
    grad_scale: float | torch.Tensor = 1.0,
    *,
    threads: int | None = None,
) -> None:
    """Update weights in place as ``torch.optim.SGD`` does (formula: reference.py), as :func:`adamw_` does.

    One pass over memory: with a bf16 gradient 10 bytes for each element, 18 with momentum.

    Args:
        masters: as for :func:`adamw_`.
        grad: likewise.
        moments: ``momentum_buffer``, (numel,) fp32, updated in place, if there is momentum; else nothing. In the first
            step it may hold anything.
        scalars: of this step.
        grad_scale: as for :func:`adamw_`.
        threads: likewise.

    Raises:
        ValueError: if names, dtypes, devices, contiguity or numbers of elements do not fit, or if there is momentum
            and no buffer, or a buffer and no momentum.
        TypeError: if the scalars are another rule's.
    """
    _update("sgd_", masters, grad, moments, scalars, grad_scale, threads)


def _update(
    name: str,
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: Scalars,
    grad_scale: float | torch.Tensor,
    threads: int | None,
) -> None:
    """Call the function ``name`` of the implementation for these tensors."""
    operands = (masters, grad, moments, scalars)
    if grad.is_cuda:
        getattr(_gpu(), name)(*operands, grad_scale)
    elif build.load() is not None:
        getattr(cpu, name)(*operands, _host_float(grad_scale), threads=threads)
    else:
        getattr(reference, name)(*operands, _host_float(grad_scale))


def quantize_moments(
    exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convert fp32 moments to 8-bit ones, as a step would store them (formula: reference.py).

    Args:
        exp_avg: (numel,) fp32, CPU or CUDA, any shape, contiguous.
        exp_avg_sq: (numel,) fp32, not negative.

    Returns:
        (exp_avg codes, exp_avg_scale, exp_avg_sq codes, exp_avg_sq_scale): new tensors that the caller owns,
        on CUDA ready on the current stream. Codes are int8 and uint8 in the shape of ``exp_avg``, scales
        (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit.
    """
    return reference.quantize_moments(exp_avg, exp_avg_sq)


def dequantize_moments(
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert 8-bit moments to fp32, to what the next step reads (formula: reference.py).

    Args:
        exp_avg: (numel,) int8 codes, CPU or CUDA, any shape, contiguous.
        exp_avg_scale: (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32.
        exp_avg_sq: (numel,) uint8 codes.
        exp_avg_sq_scale: (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32.

    Returns:
        (exp_avg, exp_avg_sq): new fp32 tensors in the shape of the codes, which the caller owns; on CUDA
        ready on the current stream.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit.
    """
    return reference.dequantize_moments(exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale)


def split_master(
    fp32: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 values into their bf16 part and the residual (layout: reference.py).

    Args:
        fp32: (numel,) fp32, CPU or CUDA, any shape, contiguous.
        out: (hi, lo) to write, bf16 and int16 of the same numel; allocated in the shape of ``fp32`` if None.
        threads: CPU only: at most this many; None takes the physical cores.

    Returns:
        (hi, lo): ``out``, or new tensors that the caller owns; on CUDA ready on the current stream.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit.
    """
    if fp32.is_cuda or build.load() is None:
        return reference.split_master(fp32, out=out)
    return cpu.split_master(fp32, out=out, threads=threads)


def join_master(
    hi: torch.Tensor,
    lo: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Join a split master to fp32, bit for bit (layout: reference.py).

    Args:
        hi: (numel,) bf16, CPU or CUDA, any shape, contiguous.
        lo: (numel,) int16.
        out: (numel,) fp32 to write; allocated in the shape of ``hi`` if None.
        threads: CPU only: at most this many; None takes the physical cores.

    Returns:
        ``out``, or a new tensor that the caller owns; on CUDA ready on the current stream.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit.
    """
    if hi.is_cuda or build.load() is None:
        return reference.join_master(hi, lo, out=out)
    return cpu.join_master(hi, lo, out=out, threads=threads)


def accumulate_(acc: torch.Tensor, grad: torch.Tensor, *, threads: int | None = None) -> None:
    """Add ``grad`` to ``acc`` in fp32, in place; a NaN is stored as 0x7FC00000.

    Args:
        acc: (numel,) fp32, CPU or CUDA, any shape, contiguous; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        threads: CPU only: at most this many; None takes the physical cores.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit.
    """
    if acc.is_cuda:
        _gpu().accumulate_(acc, grad)
    elif build.load() is not None:
        cpu.accumulate_(acc, grad, threads=threads)
    else:
        reference.accumulate_(acc, grad)


def accumulate_squared_(
    acc: torch.Tensor, grad: torch.Tensor, *, is_first: bool = False, threads: int | None = None
) -> float | torch.Tensor:
    """Add ``grad`` to ``acc`` in fp32, in place, and return the sum of the squares of what is there then.

    The bits are those of ``accumulate_`` (or, at first, of ``acc.copy_(grad)``) and of ``sum_of_squares``. On the CPU
    both are one pass over memory: 10 bytes for each element with a bf16 gradient, 6 at first.

    Args:
        acc: (numel,) fp32, CPU or CUDA, any shape, contiguous; updated in place.
        grad: (numel,) bf16 or fp32; only read.
        is_first: there is nothing to add to: ``acc`` becomes ``grad``, whatever it was.
        threads: CPU only: at most this many; None takes the physical cores.

    Returns:
        As ``sum_of_squares``.

    Raises:
        ValueError: if dtypes, devices, contiguity or numbers of elements do not fit.
    """
    if not acc.is_cuda and build.load() is not None:
        return cpu.accumulate_squared_(acc, grad, is_first=is_first, threads=threads)
    if is_first:
        check_accumulate(acc, grad)
        with torch.no_grad():
            acc.view(-1).copy_(grad.view(-1))
    else:
        accumulate_(acc, grad, threads=threads)
    return sum_of_squares(acc, threads=threads)


def sum_of_squares(x: torch.Tensor, *, threads: int | None = None) -> float | torch.Tensor:
    """Return the sum of the squares in float64 by the fixed tree (reference.py).

    Args:
        x: (numel,) bf16 or fp32, CPU or CUDA, any shape, contiguous; numel may be 0.
        threads: CPU only: at most this many; None takes the physical cores.

    Returns:
        For a CPU tensor a float; for a CUDA tensor a 0-dim float64 tensor on its device, ready on the current
        stream, without waiting for it. The bits are the same.

    Raises:
        ValueError: if dtype or contiguity does not fit.
    """
    if x.is_cuda:
        return _gpu().sum_of_squares(x)
    if build.load() is not None:
        return cpu.sum_of_squares(x, threads=threads)
    return reference.sum_of_squares(x)


def _gpu() -> ModuleType:
    """Import the Triton kernels when they are first needed: Triton is slow to import."""
    from . import gpu

    return gpu


def _host_float(grad_scale: float | torch.Tensor) -> float:
    """Return a host value; a device tensor here would make the host wait for the device unseen."""
    if isinstance(grad_scale, torch.Tensor):
        if grad_scale.device.type != "cpu" or grad_scale.numel() != 1:
            raise ValueError(
                f"grad_scale for CPU tensors must be a float or a 1-element CPU tensor, got "
                f"{grad_scale.numel()} elements on {grad_scale.device}"
            )
        return float(grad_scale)
    return grad_scale
