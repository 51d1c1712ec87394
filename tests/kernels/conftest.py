"""Shared pieces of the kernel tests: bit comparison, inputs from every corner of fp32, one ISA at a time."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

KERNELS_DIR = Path(__file__).resolve().parents[2] / "kernels"
if importlib.util.find_spec("slideformer_kernels") is None:
    sys.path.insert(0, str(KERNELS_DIR))

INTEGER_OF_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


@pytest.fixture(scope="session")
def kernels_dir() -> Path:
    return KERNELS_DIR


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[..., None]:
    """Compare tensors bit by bit: NaN equals the same NaN, -0 differs from 0."""

    def check(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
        integer = INTEGER_OF_WIDTH[actual.element_size()]
        actual, expected = actual.detach().cpu().reshape(-1), expected.detach().cpu().reshape(-1)
        a, e = actual.view(integer), expected.view(integer)
        if not torch.equal(a, e):
            where = (a != e).nonzero().flatten().tolist()
            i = where[0]
            raise AssertionError(
                f"{what}: {len(where)} of {a.numel()} differ, first at {i}: "
                f"{a[i].item():#x} ({actual[i].item()}) instead of {e[i].item():#x} ({expected[i].item()})"
            )

    return check


def random_bits(numel: int, generator: torch.Generator) -> torch.Tensor:
    """Return fp32 of uniformly random bits: every exponent, denormals, infinities and NaN."""
    bits = torch.randint(-(2**31), 2**31, (numel,), dtype=torch.int64, generator=generator)
    return bits.int().view(torch.float32)


SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 3.4028235e38, -3.4028235e38]
    + [float("inf"), float("-inf"), float("nan"), 1e-30, -1e-30, 1e30],
    dtype=torch.float32,
)


@pytest.fixture(scope="session")
def make_state() -> Callable[..., dict[str, torch.Tensor]]:
    """Make inputs of one update: gradients over many decades, then all pairs of special values, then noise.

    ``gentle`` leaves out what is not finite.
    """

    def make(
        numel: int, grad_dtype: torch.dtype, seed: int = 0, gentle: bool = False
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> torch.Tensor:
            return torch.randn(numel, generator=generator)

        grad = normal() * torch.exp(normal() * 8)
        state = {
            "param": normal(),
            "grad": grad,
            "exp_avg": normal() * torch.exp(normal() * 8) * 1e-2,
            "exp_avg_sq": (normal() * torch.exp(normal() * 8)).square() * 1e-3,
        }
        if not gentle:
            pairs = torch.cartesian_prod(SPECIAL, SPECIAL)
            for index, name in enumerate(("param", "grad", "exp_avg", "exp_avg_sq")):
                # Each pair of the four meets every pair of special values somewhere.
                column = pairs.roll(37 * index, 0)[:, index % 2]
                end = min(numel, column.numel())
                state[name][:end] = column[:end]
                noise = max(0, min(numel - 1024, 4096))
                state[name][1024 : 1024 + noise] = random_bits(noise, generator)
        state["grad"] = state["grad"].to(grad_dtype)
        return state

    return make


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one instruction set of the C kernels."""
    from slideformer_kernels import build, cpu

    if not build.is_available():
        pytest.skip("no C compiler")
    if request.param not in cpu.supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param)
    return request.param
