"""Compile the loss kernels without a GPU: OUTPUT_DIRECTORY BACKEND:ARCH:WARP_SIZE ..."""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from slideformer_kernels import cross_entropy_gpu as gpu
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTEGERS = ("row_stride", "label_stride", "vocabulary", "ignore_index")
FLOATS = ("logit_scale", "softcap", "label_smoothing", "z_loss", "scale_per_unit")


def compiled(
    kernel, signature: dict[str, str], constants: dict, aligned: tuple[str, ...], warps: int, target
):
    """Compile for 16-byte aligned pointers; the integers named in ``aligned`` are divisible by 16."""
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned += tuple(name for name, kind in signature.items() if kind.startswith("*"))
    source = ASTSource(
        kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def cross_entropy(target, dtype: str, has_options: bool, write_grad: bool, aligned: tuple[str, ...]):
    pointers = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "losses_ptr": "*fp32"}
    signature = pointers | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(FLOATS, "fp32")
    constants = {
        "HAS_SOFTCAP": has_options,
        "HAS_SMOOTHING": has_options,
        "WRITE_GRAD": write_grad,
        "INTERPRETED": False,
        "BLOCK": gpu.ROW_BLOCK,
    }
    warps = gpu.row_warps(gpu.ROW_BLOCK, target.warp_size)
    return compiled(gpu._cross_entropy_kernel, signature, constants, aligned, warps, target)


def scaled(target):
    signature = {"grad_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": "*bf16", "numel": "i32"}
    constants = {"INTERPRETED": False, "BLOCK": gpu.SCALE_BLOCK}
    return compiled(gpu._scaled_kernel, signature, constants, ("numel",), gpu.SCALE_WARPS, target)


def compile_variants(target, is_first: bool):
    """Yield (name, kernel); names end in ``_odd`` where the vocabulary is no multiple of 16.

    All variants are compiled for the first target only, which saves time.
    """
    for dtype, has_options, write_grad in itertools.product(("bf16", "fp32"), (False, True), (False, True)):
        if is_first or (write_grad and has_options == (dtype == "fp32")):
            name = f"{dtype}_{'all' if has_options else 'plain'}_{'grad' if write_grad else 'loss'}"
            aligned = ("row_stride", "vocabulary")
            yield f"cross_entropy_{name}", cross_entropy(target, dtype, has_options, write_grad, aligned)
    if is_first:
        yield "cross_entropy_bf16_all_grad_odd", cross_entropy(target, "bf16", True, True, ("row_stride",))
    yield "scaled_bf16", scaled(target)


def spilled_bytes(kernel, backend: str) -> int:
    """Return the bytes of each thread's registers and arrays that do not fit and live in (local) memory."""
    if backend == "hip":
        sizes = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", kernel.asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", done.stdout)
    return max(map(int, sizes))


def main(directory: str, *targets: str) -> None:
    """Write DIRECTORY/<kernel>.<arch>.s, and spilled_bytes.json; a target is BACKEND:ARCH:WARP_SIZE."""
    spilled = {}
    for index, text in enumerate(targets):
        backend, arch, warp_size = text.split(":")
        target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp_size))
        for name, kernel in compile_variants(target, is_first=index == 0):
            assembly = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
            Path(directory, f"{name}.{arch}.s").write_text(assembly)
            spilled[f"{name}.{arch}"] = spilled_bytes(kernel, backend)
    Path(directory, "spilled_bytes.json").write_text(json.dumps(spilled, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
