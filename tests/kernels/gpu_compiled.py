"""Compile every Triton kernel without a GPU: OUTPUT_DIRECTORY BACKEND:ARCH:WARP_SIZE ..."""

import sys
from pathlib import Path

import torch
import triton
from slideformer_kernels import gpu
from slideformer_kernels.rules import RULES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BITS = {"bf16": "*i16", "fp32": "*i32", "fp64": "*i64"}
POINTERS = {torch.float32: "*i32", torch.int8: "*i8", torch.uint8: "*u8"}


def compiled(kernel, signature: dict[str, str], constants: dict[str, object], target: GPUTarget) -> str:
    """Return the assembly, compiled for 16-byte aligned pointers and a numel divisible by 16."""
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name == "numel"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(
        kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs=constants,
        attrs=attributes,
    )
    options = {"num_warps": gpu.NUM_WARPS, "enable_fp_fusion": False}
    result = triton.compile(source, target=target, options=options)
    return result.asm["ptx" if target.backend == "cuda" else "amdgcn"]


def update(kernel: str, is_split: bool, grad: str, scale_is_pointer: bool, target: GPUTarget) -> str:
    """Compile the kernel that ``gpu.py`` calls by this name of ``rules.py``."""
    function, tile = gpu._UPDATES[kernel]
    rule = next(rule for rule in RULES if kernel in rule.formats)
    dtypes = rule.formats[kernel]
    signature = {
        "master_ptr": "*i16" if is_split else "*i32",
        "lo_ptr": "*i16" if is_split else "*i32",
        "grad_ptr": BITS[grad],
        **{f"{name}_ptr": POINTERS[dtype] for name, dtype in dtypes.items()},
        "grad_scale": "*fp32" if scale_is_pointer else "fp32",
        "numel": "i32",
    }
    constants = {
        "IS_SPLIT": is_split,
        "SCALE_IS_POINTER": scale_is_pointer,
        "INTERPRETED": False,
        **tile,
    }
    # What is left are the scalars of a step.
    scalars = [name for name in function.arg_names if name not in {**signature, **constants}]
    assert len(scalars) == len(rule.scalars.__slots__)
    return compiled(function, {**signature, **dict.fromkeys(scalars, "fp32")}, constants, target)


def row_sums(kind: str, target: GPUTarget) -> str:
    signature = {"values_ptr": BITS[kind], "sums_ptr": "*i64", "numel": "i64", "rows": "i32"}
    constants = {"LOG2_SEGMENT": gpu.LOG2_SEGMENT_NUMEL, "ROWS": gpu.BLOCK_ROWS}
    return compiled(gpu._row_sums_kernel, signature, constants, target)


def accumulate(grad: str, target: GPUTarget) -> str:
    signature = {"acc_ptr": "*i32", "grad_ptr": BITS[grad], "numel": "i32"}
    return compiled(gpu._accumulate_kernel, signature, {"BLOCK": gpu.BLOCK_NUMEL}, target)


def compile_most(target: GPUTarget) -> dict[str, str]:
    """Compile each kernel at least once."""
    return {
        **{f"{kernel}_split_bf16": update(kernel, True, "bf16", False, target) for kernel in gpu._UPDATES},
        **{
            f"{kernel}_fp32_fp32_scaled": update(kernel, False, "fp32", True, target)
            for kernel in gpu._UPDATES
        },
        "row_sums_bf16": row_sums("bf16", target),
        "row_sums_fp64": row_sums("fp64", target),
        "accumulate_bf16": accumulate("bf16", target),
    }


def compile_rest(target: GPUTarget) -> dict[str, str]:
    """Compile the variants that differ only in their loads."""
    return {
        **{
            f"{kernel}_split_fp32_scaled": update(kernel, True, "fp32", True, target)
            for kernel in gpu._UPDATES
        },
        **{f"{kernel}_fp32_bf16": update(kernel, False, "bf16", False, target) for kernel in gpu._UPDATES},
        "row_sums_fp32": row_sums("fp32", target),
        "accumulate_fp32": accumulate("fp32", target),
    }


def main(directory: str, *targets: str) -> None:
    """Write DIRECTORY/<kernel>.<arch>.s; a target is BACKEND:ARCH:WARP_SIZE.

    All variants are compiled for the first target only, which saves time.
    """
    for index, text in enumerate(targets):
        backend, arch, warp_size = text.split(":")
        target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp_size))
        kernels = compile_most(target)
        if index == 0:
            kernels |= compile_rest(target)
        for name, assembly in kernels.items():
            Path(directory, f"{name}.{arch}.s").write_text(assembly)


if __name__ == "__main__":
    main(*sys.argv[1:])
