"""The Triton kernels without a GPU: values in Triton's interpreter, and ahead-of-time compilation.

Both run in a subprocess: TRITON_INTERPRET is read when a kernel is defined.
"""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent


# NVIDIA H100, A100 and RTX 50; AMD MI300 and RX 7900.
TARGETS = ("cuda:90:32", "cuda:80:32", "cuda:120:32", "hip:gfx942:64", "hip:gfx1100:32")


@pytest.fixture(scope="module")
def assembly(run_python, tmp_path_factory):
    """Compile every kernel for every target once: {(kernel, arch): text}."""
    out = tmp_path_factory.mktemp("assembly")
    run_python("-W", "ignore", str(HERE / "gpu_compiled.py"), str(out), *TARGETS, TRITON_INTERPRET="0")
    return {tuple(path.stem.split(".")): path.read_text() for path in out.iterdir()}


def test_interpreter_has_the_reference_bits(run_python):
    output = run_python("-W", "ignore", str(HERE / "gpu_interpreted.py"), TRITON_INTERPRET="1")
    assert output.strip().endswith("all bits equal")


def test_all_kernels_compile_for_all_targets(assembly):
    assert len({name for name, arch in assembly if arch == "90"}) == 13
    assert len(assembly) == 13 + 7 * (len(TARGETS) - 1)


@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_nvidia_code_is_exact_and_loads_wide(assembly, arch):
    kernels = {name: text for (name, target), text in assembly.items() if target == arch}
    for name, ptx in kernels.items():
        assert "ftz" not in ptx, f"{name} flushes denormals"
        assert not re.search(r"(div|sqrt|rcp)\.(approx|full)", ptx), f"{name} divides approximately"
    update = kernels["adamw_split_bf16"]
    assert "div.rn.f32" in update and "sqrt.rn.f32" in update
    # Four fma (RTX 50 has packed ones) for each division and nothing contracted beyond them.
    fma = update.count("fma.rn.f32 ") + 2 * update.count("fma.rn.f32x2 ")
    assert fma == 4 * update.count("div.rn.f32 ")
    assert update.count("ld.global.v4.b32") >= 7, "loads are not 16 bytes wide"
    assert "fma.rn.f64" not in kernels["row_sums_bf16"]
    update = kernels["adamw_8bit_split_bf16"]
    # Three square roots for the four fma of an element; NaN are never converted to integers.
    fma = update.count("fma.rn.f32 ") + 2 * update.count("fma.rn.f32x2 ")
    assert 3 * fma == 4 * update.count("sqrt.rn.f32 ") > 0
    assert not re.search(r"cvt\.r[a-z]*i\.", update), "floats are converted to integers"
    assert update.count("ld.global.v4.b32") >= 3 and update.count("st.global.v4.b32") >= 2
