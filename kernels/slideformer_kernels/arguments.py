"""Checks of the tensors that every implementation takes, so that all refuse the same mistakes alike."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .rules import ADAMW, Rule
from .scalars import SGDScalars

GRADIENT_DTYPES = (torch.bfloat16, torch.float32)
MASTER_DTYPES = {1: {"weight": torch.float32}, 2: {"hi": torch.bfloat16, "lo": torch.int16}}
"""By the number of its tensors, what a master consists of."""

Operands = Mapping[str, tuple[torch.Tensor, Sequence[torch.dtype]]]
"""Name -> (tensor, allowed dtypes)."""

MOMENT_BLOCK_NUMEL = 128
"""Consecutive elements of a flat parameter that share one scale of each 8-bit moment."""


def check_operands(operation: str, operands: Operands) -> int:
    """Check that all operands are contiguous, of an allowed dtype, on one device and equally long.

    Args:
        operation: name used in the message.
        operands: what is checked; the first one sets numel and device.

    Returns:
        The common number of elements.

    Raises:
        ValueError: naming the operand with what it has and what is wanted.
    """
    first_name, (first, _) = next(iter(operands.items()))
    for name, (tensor, dtypes) in operands.items():
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{operation}: {name} has dtype {tensor.dtype}, wanted {wanted}")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: {name} is not contiguous (shape {tuple(tensor.shape)}, "
                f"strides {tensor.stride()})"
            )
        if tensor.device != first.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, {first_name} is on {first.device}")
        if tensor.numel() != first.numel():
            raise ValueError(
                f"{operation}: {name} has {tensor.numel()} elements, {first_name} has {first.numel()}"
            )
    return first.numel()


class Update(NamedTuple):
    """A checked update: the kernel for it, the number of elements, and the moments in the kernel's order."""

    kernel: str
    numel: int
    moments: tuple[torch.Tensor, ...]


def check_update(
    rule: Rule,
    masters: Sequence[torch.Tensor],
    grad: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    scalars: object,
) -> Update:
    """Check what an update is given, as the functions of ``ops.py`` describe it.

    Raises:
        ValueError: naming the operand with what it has and what is wanted.
        TypeError: if the scalars are another rule's.
    """
    if not isinstance(scalars, rule.scalars):
        raise TypeError(f"{rule.name}: scalars are {type(scalars).__name__}, wanted {rule.scalars.__name__}")
    if len(masters) not in (1, 2):
        raise ValueError(f"{rule.name}: masters are {len(masters)} tensors, wanted (weight,) or (hi, lo)")
    names = MASTER_DTYPES[len(masters)]
    operands: Operands = {
        **{name: (tensor, (dtype,)) for (name, dtype), tensor in zip(names.items(), masters, strict=True)},
        "grad": (grad, GRADIENT_DTYPES),
    }
    for kernel, dtypes in rule.formats.items():
        if dtypes.keys() == moments.keys():
            numel = _check_moments(rule.name, operands, moments, dtypes)
            _check_momentum(rule.name, moments, scalars)
            return Update(kernel, numel, tuple(moments[name] for name in dtypes))
    wanted = "; or ".join(", ".join(dtypes) or "none" for dtypes in rule.formats.values())
    raise ValueError(f"{rule.name}: moments are {', '.join(moments) or 'none'}, wanted {wanted}")


def _check_momentum(operation: str, moments: Mapping[str, torch.Tensor], scalars: object) -> None:
    """Check that there is a buffer if and only if there is momentum."""
    if isinstance(scalars, SGDScalars) and (scalars.momentum != 0.0) != bool(moments):
        have, wanted = ", ".join(moments) or "none", "momentum_buffer" if scalars.momentum else "none"
        raise ValueError(f"{operation}: with momentum={scalars.momentum} moments are {have}, wanted {wanted}")


def _check_moments(
    operation: str, others: Operands, moments: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]
) -> int:
    """Check moments with whatever else of the same numel belongs to the operation; returns numel."""
    given = {name: (moments[name], (dtype,)) for name, dtype in dtypes.items()}
    scales = {name: given.pop(name) for name in dtypes if name.endswith("_scale")}
    numel = check_operands(operation, {**others, **given})
    if scales:
        have, wanted = check_operands(operation, scales), -(-numel // MOMENT_BLOCK_NUMEL)
        code, scale = next(iter(given)), next(iter(scales))
        if have != wanted:
            raise ValueError(f"{operation}: {scale} has {have} elements, {numel} codes want {wanted}")
        device, scale_device = moments[code].device, moments[scale].device
        if scale_device != device:
            raise ValueError(f"{operation}: {scale} is on {scale_device}, {code} is on {device}")
    return numel


def check_moments(operation: str, kernel: str, *moments: torch.Tensor) -> int:
    """Check all moments of one of AdamW's formats, given in its order; returns numel."""
    dtypes = ADAMW.formats[kernel]
    return _check_moments(operation, {}, dict(zip(dtypes, moments, strict=True)), dtypes)


def check_accumulate(acc: torch.Tensor, grad: torch.Tensor) -> int:
    """Check the tensors of ``accumulate_``; returns numel."""
    return check_operands("accumulate_", {"acc": (acc, (torch.float32,)), "grad": (grad, GRADIENT_DTYPES)})


def check_sum_of_squares(x: torch.Tensor) -> int:
    """Check the tensor of ``sum_of_squares``; returns numel."""
    return check_operands("sum_of_squares", {"x": (x, GRADIENT_DTYPES)})


def split_outputs(
    master: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check ``master`` and ``out`` of ``split_master``; allocate (hi, lo) like ``master`` if out is None."""
    check_operands("split_master", {"fp32": (master, (torch.float32,))})
    if out is None:
        return (
            torch.empty(master.shape, dtype=torch.bfloat16, device=master.device),
            torch.empty(master.shape, dtype=torch.int16, device=master.device),
        )
    hi, lo = out
    check_operands(
        "split_master",
        {
            "fp32": (master, (torch.float32,)),
            "out hi": (hi, (torch.bfloat16,)),
            "out lo": (lo, (torch.int16,)),
        },
    )
    return hi, lo


def join_output(hi: torch.Tensor, lo: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Check the tensors of ``join_master``; allocate the fp32 output in the shape of ``hi`` if None."""
    check_operands("join_master", {"hi": (hi, (torch.bfloat16,)), "lo": (lo, (torch.int16,))})
    if out is None:
        return torch.empty(hi.shape, dtype=torch.float32, device=hi.device)
    check_operands("join_master", {"hi": (hi, (torch.bfloat16,)), "out": (out, (torch.float32,))})
    return out


def mark_written(*tensors: torch.Tensor) -> None:
    """Tell autograd that ``tensors`` were written through their address.

    PyTorch's own in-place operators do this; without it, a backward that saved one of them would silently use
    the new values instead of raising.
    """
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
