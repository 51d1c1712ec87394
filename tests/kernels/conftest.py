"""Shared pieces of the kernel tests: bit comparison, inputs from every corner of fp32, one ISA at a time."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

KERNELS_DIR = Path(__file__).resolve().parents[2] / "kernels"
if importlib.util.find_spec("slideformer_kernels") is None:
    sys.path.insert(0, str(KERNELS_DIR))

INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
            "weight": normal(),
            "grad": grad,
            "exp_avg": normal() * torch.exp(normal() * 8) * 1e-2,
            "exp_avg_sq": (normal() * torch.exp(normal() * 8)).square() * 1e-3,
        }
        if not gentle:
            pairs = torch.cartesian_prod(SPECIAL, SPECIAL)
            for index, name in enumerate(("weight", "grad", "exp_avg", "exp_avg_sq")):
                # Each pair of the four meets every pair of special values somewhere.
                column = pairs.roll(37 * index, 0)[:, index % 2]
                end = min(numel, column.numel())
                state[name][:end] = column[:end]
                noise = max(0, min(numel - 1024, 4096))
                state[name][1024 : 1024 + noise] = random_bits(noise, generator)
        state["grad"] = state["grad"].to(grad_dtype)
        return state

    return make


@pytest.fixture(scope="session")
def make_8bit_state(make_state) -> Callable[..., dict[str, torch.Tensor]]:
    """Make inputs of one update on 8-bit moments, of each kind that a block can be.

    Unless ``gentle``: all codes, also those that no step stores, with scales of every kind, and in each eighth
    block gradients so small that the new scales lie around the smallest one stored.
    """

    def make(
        numel: int, grad_dtype: torch.dtype, seed: int = 0, gentle: bool = False
    ) -> dict[str, torch.Tensor]:
        from slideformer_kernels import MOMENT_BLOCK_NUMEL, quantize_moments

        state = make_state(numel, grad_dtype, seed, gentle)
        calm = make_state(numel, torch.float32, seed + 1, gentle=True)
        codes = list(quantize_moments(calm["exp_avg"], calm["exp_avg_sq"]))
        if not gentle:
            generator = torch.Generator().manual_seed(seed + 2)
            codes[0] = torch.randint(-128, 128, (numel,), dtype=torch.int8, generator=generator)
            codes[2] = torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=generator)
            block = torch.arange(codes[1].numel())
            for index, scale in enumerate((codes[1], codes[3])):
                special = SPECIAL[(block // 8 + 5 * index) % SPECIAL.numel()]
                scale.copy_(torch.where(block % 8 == 5, special, scale))
                noise = random_bits(block.numel(), generator)
                scale.copy_(torch.where(block % 8 == 6, noise, scale))
                scale[block % 8 == 7] = 0.0
            is_tiny = (torch.arange(numel) // MOMENT_BLOCK_NUMEL) % 8 == 7
            exponents = torch.randint(-160, -80, (block.numel(),), generator=generator)
            tiny = 2.0 ** exponents.float().repeat_interleave(MOMENT_BLOCK_NUMEL)[:numel] * calm["weight"]
            state["grad"] = torch.where(is_tiny, tiny.to(grad_dtype), state["grad"])
        names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        return {
            "weight": state["weight"],
            "grad": state["grad"],
            **dict(zip(names, codes, strict=True)),
        }

    return make


@pytest.fixture(scope="session")
def start_of(make_state, make_8bit_state) -> Callable[..., dict[str, torch.Tensor]]:
    """Make the operands of an update of `update_cases.py`, and nothing else."""

    def make(
        case, numel: int, grad_dtype: torch.dtype = torch.bfloat16, **options: object
    ) -> dict[str, torch.Tensor]:
        return case.select((make_8bit_state if case.is_8bit else make_state)(numel, grad_dtype, **options))

    return make


def midway_between_codes() -> torch.Tensor:
    """Return values, in rising order, whose code depends on which way a tie is rounded.

    That is for a scale equal to the number of levels, so that the root is that of the value. It is midway between
    two multiples of 1/1024, and the value's low bits are those with which these two have different codes. Of the
    1024 such roots for each code, about one has a square with these bits.
    """
    fraction = torch.arange(1024)
    squares = (torch.arange(255)[:, None] + (fraction + 0.5) / 1024).square()
    return squares[(squares.view(torch.int32) & 1023) == 1023 - fraction].sort().values


@pytest.fixture(scope="session")
def make_8bit_edges() -> Callable[[], list[tuple[dict[str, torch.Tensor], object]]]:
    """Make operands and scalars of updates that meet the edges of quantisation exactly.

    With both betas 0 the new moments are the gradient and its magnitude: ties between two codes, and the
    smallest scale with its neighbour below. Then a short block whose only second moment is infinite.
    """

    def make() -> list[tuple[dict[str, torch.Tensor], object]]:
        from slideformer_kernels import adamw_scalars, quantize_moments

        smallest = torch.zeros(256)
        smallest[7], smallest[200] = -(2.0**-90), 2.0**-90 * (1 - 2.0**-24)
        midway = midway_between_codes()
        grad = torch.cat(
            [
                -midway[:127],
                torch.tensor([127.0**2]),
                midway[:127],
                torch.tensor([255.0**2]),
                midway[-127:],
                torch.tensor([-(255.0**2)]),
                smallest,
            ]
        )
        zeros = quantize_moments(torch.zeros_like(grad), torch.zeros_like(grad))
        options = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
        names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        edges = {"weight": grad.cos(), "grad": grad, **dict(zip(names, zeros, strict=True))}
        codes = list(quantize_moments(torch.ones(129), torch.ones(129)))
        codes[3][1] = float("inf")
        short = {"weight": torch.ones(129), "grad": torch.ones(129), **dict(zip(names, codes, strict=True))}
        return [
            (edges, adamw_scalars(beta1=0.0, beta2=0.0, **options)),
            (short, adamw_scalars(beta1=0.9, beta2=0.999, **options)),
        ]

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


@pytest.fixture
def no_device_sync() -> Callable[[], contextlib.AbstractContextManager]:
    """Return a context manager inside of which it is an error to wait for the CUDA device."""

    @contextlib.contextmanager
    def refuse() -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is a prototype, PyTorch says
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return refuse


def patch_language_once() -> None:
    """Keep Triton's interpreter from patching its language again at every call inside of a kernel.

    It does so for functions of any module, though all modules share the patches, and that takes a third of the time.
    """
    from triton.runtime.interpreter import InterpretedFunction

    call, patched = InterpretedFunction.__call__, set()

    def call_patched(function, *args, **kwargs):
        if function.fn.__module__ in patched:
            return function.rewrite()(*args, **kwargs)
        patched.add(function.fn.__module__)
        return call(function, *args, **kwargs)

    InterpretedFunction.__call__ = call_patched


@pytest.fixture(scope="module")
def run_python(kernels_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a script in a subprocess and return its output: TRITON_INTERPRET is read when a kernel is defined."""
    pytest.importorskip("triton")
    cache = str(tmp_path_factory.mktemp("triton"))

    def run(*arguments: str, **environment: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(kernels_dir), "TRITON_CACHE_DIR": cache, **environment}
        done = subprocess.run(
            [sys.executable, *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    return run
