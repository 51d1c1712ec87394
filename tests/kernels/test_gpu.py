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

# Explicit fma for each element, as reference.py has them.
FMA = {"adamw": 4, "adamw_8bit": 4, "lion": 3, "sgd": 2, "sgd_momentum": 4}
ELEMENTS_PER_THREAD = 8


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
    # Each update for two kinds of masters and of gradients, or for one each; row sums and accumulation.
    all_of_them, most = 4 * len(FMA) + 5, 2 * len(FMA) + 3
    assert len({name for name, arch in assembly if arch == "90"}) == all_of_them
    assert len(assembly) == all_of_them + most * (len(TARGETS) - 1)


@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_nvidia_code_is_exact_and_loads_wide(assembly, arch):
    kernels = {name: text for (name, target), text in assembly.items() if target == arch}
    for name, ptx in kernels.items():
        assert "ftz" not in ptx, f"{name} flushes denormals"
        assert not re.search(r"(div|sqrt|rcp)\.(approx|full)", ptx), f"{name} divides approximately"
    for name, count in FMA.items():
        update = kernels[f"{name}_split_bf16"]
        # The documented fma (RTX 50 has packed ones), and nothing contracted beyond them.
        fma = update.count("fma.rn.f32 ") + 2 * update.count("fma.rn.f32x2 ")
        assert fma == count * ELEMENTS_PER_THREAD, name
    update = kernels["adamw_split_bf16"]
    assert update.count("div.rn.f32 ") == update.count("sqrt.rn.f32 ") == ELEMENTS_PER_THREAD
    assert update.count("ld.global.v4.b32") >= 7, "loads are not 16 bytes wide"
    assert kernels["lion_split_bf16"].count("ld.global.v4.b32") >= 5, "loads are not 16 bytes wide"
    assert "fma.rn.f64" not in kernels["row_sums_bf16"]
    update = kernels["adamw_8bit_split_bf16"]
    # NaN are never converted to integers.
    assert update.count("sqrt.rn.f32 ") == 3 * ELEMENTS_PER_THREAD
    assert not re.search(r"cvt\.r[a-z]*i\.", update), "floats are converted to integers"
    assert update.count("ld.global.v4.b32") >= 3 and update.count("st.global.v4.b32") >= 2
