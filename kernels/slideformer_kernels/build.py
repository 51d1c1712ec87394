"""Builds the C kernels with the system's compiler at first use and loads them.

The library lies in a user cache directory under a name that is a hash of everything it depends on (sources,
flags, compiler, CPU), so a stale one is never loaded. It is compiled under a temporary name and renamed, so
two processes that start together do each other no harm. Where it cannot be built, callers fall back to
``reference.py``; :func:`load` then warns once per process with the compiler's own message.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "csrc"
MAIN_SOURCE = "slideformer_cpu.c"
# No contraction and no fast-math: the kernels' bits are part of their interface.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
)
OPENMP_FLAG = "-fopenmp"
COMPILE_TIMEOUT_S = 120


class BuildError(RuntimeError):
    """The C kernels could not be built or loaded; the message holds the compiler's own."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What the one attempt of this process came to: a library, or the reason why there is none."""

    library: ctypes.CDLL | None
    error: str | None


def is_available() -> bool:
    """Return whether the C kernels can be used; builds them at the first call, never warns."""
    return build_once().library is not None


def load() -> ctypes.CDLL | None:
    """Return the library of C kernels, or None where it cannot be had.

    The first call builds it (a few seconds) unless it is in the cache. Where that fails, one RuntimeWarning
    per process says why and what it costs.
    """
    result = build_once()
    if result.error is not None:
        _warn_once(
            "The CPU kernels could not be built; PyTorch operators do the same arithmetic instead, which "
            "makes optimizer updates on the CPU about 100 times slower. Install a C compiler (gcc or clang) "
            f"or name one in the environment variable CC. Cause: {result.error}"
        )
    return result.library


@functools.cache
def build_once() -> BuildResult:
    """Build and load the library; the outcome, good or bad, is kept for this process."""
    try:
        return BuildResult(library=_build(), error=None)
    except BuildError as error:
        return BuildResult(library=None, error=str(error))


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _build() -> ctypes.CDLL:
    compiler = _find_compiler()
    identity = _compiler_identity(compiler)
    try:
        return _build_with_flags(compiler, identity, (*FLAGS, OPENMP_FLAG))
    except BuildError as openmp_error:
        # Some clang installations come without the OpenMP runtime.
        library = _build_with_flags(compiler, identity, FLAGS)
        _warn_once(
            "The CPU kernels were built without OpenMP and will use one thread only, because "
            f"{shlex.join(compiler)} failed with {OPENMP_FLAG}. Cause: {openmp_error}"
        )
        return library


def _build_with_flags(compiler: list[str], identity: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Load the library built with ``flags`` from the cache, or build it there first."""
    name = f"slideformer_cpu-{_build_key(identity, flags)}.so"
    errors = []
    for directory in (_cache_dir, _private_dir):
        try:
            path = directory() / name
            if not path.exists():
                _compile(compiler, flags, path)
            return ctypes.CDLL(str(path))
        except OSError as error:  # not writable, full, mounted noexec
            errors.append(str(error))
    raise BuildError("; ".join(errors))


def _find_compiler() -> list[str]:
    """Return the command of the C compiler: CC if it is set, else the first of cc, gcc and clang."""
    chosen = os.environ.get("CC", "").strip()
    if chosen:
        return shlex.split(chosen)
    for candidate in ("cc", "gcc", "clang"):
        if shutil.which(candidate):
            return [candidate]
    raise BuildError("no C compiler found (looked for CC, cc, gcc and clang)")


def _compiler_identity(compiler: list[str]) -> str:
    """Return path and version of the compiler, as part of the cache key."""
    output = _run([*compiler, "--version"])
    return f"{shutil.which(compiler[0])}\n{shlex.join(compiler)}\n{output}"


def _build_key(identity: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (identity, *flags, _cpu_identity()):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCE_DIR.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _cpu_identity() -> str:
    """Return architecture, model and features of the CPU: home directories are shared between machines."""
    lines = [platform.machine()]
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    for field in ("model name", "flags", "Features"):
        lines += [line for line in cpuinfo.splitlines() if line.startswith(field)][:1]
    return "\n".join(lines)


def _cache_dir() -> Path:
    """Return the user's cache directory, created for this user alone if missing."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))
    directory = root / "slideformer"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


@functools.cache
def _private_dir() -> Path:
    """Return a temporary directory of this process, removed when it exits."""
    directory = tempfile.mkdtemp(prefix="slideformer-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _compile(compiler: list[str], flags: tuple[str, ...], path: Path) -> None:
    """Compile to ``path``, which appears whole or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=path.stem + "-", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        _run([*compiler, *flags, str(SOURCE_DIR / MAIN_SOURCE), "-o", temporary, "-lm"])
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    """Run ``command`` and return its output; raise BuildError with what it said if it fails."""
    shown = shlex.join(command)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMPILE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"`{shown}`: {error}") from error
    if done.returncode != 0:
        message = done.stdout.strip() or "(no output)"
        raise BuildError(f"`{shown}` exited with {done.returncode}: {message}")
    return done.stdout
