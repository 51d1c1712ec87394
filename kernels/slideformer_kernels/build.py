"""Builds the C kernels with the system's compiler at first use and loads them.

The library lies in a user cache directory under a name that is a hash of everything it depends on (sources,
flags, compiler, CPU), so a stale one is never loaded. It is compiled under a temporary name and renamed, so
two processes that start together do each other no harm. That name is a hash of public facts and anybody can
compute it, so a library is only loaded from where nobody but this user and root could have put it; otherwise a
private directory takes the cache's place. Where it cannot be built, callers fall back to
``reference.py``; :func:`load` then warns once per process with the compiler's own message.
"""

import atexit
import ctypes
import functools
import grp
import hashlib
import logging
import os
import platform
import pwd
import shlex
import shutil
import stat
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

logger = logging.getLogger(__name__)

_WRITE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_ANY_ACCESS_BY_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class BuildError(RuntimeError):
    """The C kernels could not be built or loaded; the message holds the compiler's own."""


class _NotTrusted(OSError):
    """Others than this user and root could have put a library there."""


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


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


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
            if not _is_there(path):
                _compile(compiler, flags, path)
            return ctypes.CDLL(str(path))
        except _NotTrusted as error:
            _log_once(
                f"{error}, so a library in it could be anybody's: the CPU kernels are built in a private directory "
                "instead, at every start. Set XDG_CACHE_HOME to a directory that only you may write to"
            )
            errors.append(str(error))
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
    """Return the user's cache directory, created for this user alone if missing.

    Raises:
        _NotTrusted: others could put files there.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))
    directory = root / "slideformer"
    for missing in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    return _trusted(directory)


def _trusted(directory: Path) -> Path:
    """Return ``directory`` without links, if only this user and root can put files there or put another in its place.

    Whoever may write to a directory may rename what is in it, so those above count too, as for ssh's files. Under
    the sticky bit (/tmp) only the owners of an entry and of the directory may.

    Raises:
        _NotTrusted: others can.
    """
    link = directory.lstat()
    if not _is_ours(link):
        raise _NotTrusted(f"{directory} belongs to uid {link.st_uid}")
    directory = directory.resolve(strict=True)
    for parent in directory.parents:
        found = parent.stat()
        if not _is_ours(found):
            raise _NotTrusted(f"{parent} belongs to uid {found.st_uid}")
        if _others_may_write(found) and not found.st_mode & stat.S_ISVTX:
            raise _NotTrusted(f"{parent} may be written to by others (mode {_mode(found)})")
    found = directory.stat()
    if not _is_ours(found):
        raise _NotTrusted(f"{directory} belongs to uid {found.st_uid}")
    if found.st_mode & _WRITE_BY_OTHERS:
        _close(directory, found)
    return directory


def _close(directory: Path, found: os.stat_result) -> None:
    """Take the right to write to the cache directory away from others, and what they may have put there."""
    if found.st_uid != os.geteuid():
        raise _NotTrusted(f"{directory} may be written to by others (mode {_mode(found)})")
    directory.chmod(stat.S_IMODE(found.st_mode) & ~_WRITE_BY_OTHERS)
    if _others_may_write(found):
        _log_once(
            f"{directory} could be written to by others (mode {_mode(found)}), so the libraries in it could be "
            "anybody's: it is closed to them, and the CPU kernels are built anew"
        )
        for path in directory.glob("slideformer_cpu-*"):
            path.unlink(missing_ok=True)


def _is_there(path: Path) -> bool:
    """Return whether a library lies in a trusted directory that nobody but this user and root can have written."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    # Files from compilers under umask 0002 are writable by a group that cannot get at them.
    is_out_of_reach = not path.parent.stat().st_mode & _ANY_ACCESS_BY_OTHERS
    if stat.S_ISREG(found.st_mode) and _is_ours(found) and (is_out_of_reach or not _others_may_write(found)):
        return True
    _log_once(f"{path} (uid {found.st_uid}, mode {_mode(found)}) could be anybody's and is built anew")
    return False


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0)


def _others_may_write(found: os.stat_result) -> bool:
    """Return whether users beside the owner may write; a group of the user's own, as many systems make it, is none."""
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _is_own_group(found.st_gid)


def _is_own_group(gid: int) -> bool:
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _mode(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):04o}"


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
        os.chmod(temporary, 0o700)  # the linker makes it with what the umask leaves
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
