"""Checks of the tensors that every implementation takes, so that all refuse the same mistakes alike."""

from collections.abc import Mapping, Sequence

import torch

GRADIENT_DTYPES = (torch.bfloat16, torch.float32)

MOMENT_BLOCK_NUMEL = 128
"""Consecutive elements of a flat parameter that share one scale of each 8-bit moment."""


def check_operands(operation: str, operands: Mapping[str, tuple[torch.Tensor, Sequence[torch.dtype]]]) -> int:
    """Check that all operands are contiguous, of an allowed dtype, on one device and equally long.

    Args:
        operation: name used in the message.
        operands: name -> (tensor, allowed dtypes); the first one sets numel and device.

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


def check_adamw_split(
    hi: torch.Tensor,
    lo: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
) -> int:
    """Check the tensors of ``adamw_split_``; returns numel."""
    return check_operands(
        "adamw_split_",
        {
            "hi": (hi, (torch.bfloat16,)),
            "lo": (lo, (torch.int16,)),
            "grad": (grad, GRADIENT_DTYPES),
            "exp_avg": (exp_avg, (torch.float32,)),
            "exp_avg_sq": (exp_avg_sq, (torch.float32,)),
        },
    )


def check_adamw_fp32(
    param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor
) -> int:
    """Check the tensors of ``adamw_fp32_``; returns numel."""
    return check_operands(
        "adamw_fp32_",
        {
            "param": (param, (torch.float32,)),
            "grad": (grad, GRADIENT_DTYPES),
            "exp_avg": (exp_avg, (torch.float32,)),
            "exp_avg_sq": (exp_avg_sq, (torch.float32,)),
        },
    )


def check_moment_codes(
    operation: str,
    masters: Mapping[str, tuple[torch.Tensor, Sequence[torch.dtype]]],
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
) -> int:
    """Check 8-bit moments, with whatever else of the same numel belongs to the operation; returns numel.

    Args:
        operation: name used in messages.
        masters: further operands as in :func:`check_operands`.
        exp_avg: (numel,) int8 codes.
        exp_avg_scale: (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32.
        exp_avg_sq: (numel,) uint8 codes.
        exp_avg_sq_scale: (ceil(numel / MOMENT_BLOCK_NUMEL),) fp32.

    Raises:
        ValueError: naming the operand with what it has and what is wanted.
    """
    numel = check_operands(
        operation,
        {**masters, "exp_avg": (exp_avg, (torch.int8,)), "exp_avg_sq": (exp_avg_sq, (torch.uint8,))},
    )
    check_operands(
        operation,
        {
            "exp_avg_scale": (exp_avg_scale, (torch.float32,)),
            "exp_avg_sq_scale": (exp_avg_sq_scale, (torch.float32,)),
        },
    )
    blocks = -(-numel // MOMENT_BLOCK_NUMEL)
    if exp_avg_scale.numel() != blocks:
        raise ValueError(
            f"{operation}: exp_avg_scale has {exp_avg_scale.numel()} elements, {numel} codes want {blocks}"
        )
    if exp_avg_scale.device != exp_avg.device:
        raise ValueError(
            f"{operation}: exp_avg_scale is on {exp_avg_scale.device}, exp_avg is on {exp_avg.device}"
        )
    return numel


def check_adamw_split_8bit(
    hi: torch.Tensor,
    lo: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
) -> int:
    """Check the tensors of ``adamw_split_8bit_``; returns numel."""
    masters = {"hi": (hi, (torch.bfloat16,)), "lo": (lo, (torch.int16,)), "grad": (grad, GRADIENT_DTYPES)}
    return check_moment_codes(
        "adamw_split_8bit_", masters, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale
    )


def check_adamw_fp32_8bit(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
) -> int:
    """Check the tensors of ``adamw_fp32_8bit_``; returns numel."""
    masters = {"param": (param, (torch.float32,)), "grad": (grad, GRADIENT_DTYPES)}
    return check_moment_codes(
        "adamw_fp32_8bit_", masters, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale
    )


def check_fp32_moments(exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> int:
    """Check the tensors of ``quantize_moments``; returns numel."""
    return check_operands(
        "quantize_moments",
        {"exp_avg": (exp_avg, (torch.float32,)), "exp_avg_sq": (exp_avg_sq, (torch.float32,))},
    )


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
