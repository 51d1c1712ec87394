"""Building the C kernels: the cache, races, and what happens where there is no compiler."""

import ctypes
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from slideformer_kernels import accumulate_, build, sum_of_squares

needs_compiler = pytest.mark.skipif(not build.is_available(), reason="no C compiler")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Forget this process's library and use an empty cache; the real one is found again afterwards.

    What is built is not optimised: that takes most of the time, and the cache does not know the difference.
    """
    caches = (build.build_once, build._warn_once, build._log_once)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "slideformer"
    for cache in caches:
        cache.cache_clear()


def libraries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.so"))


@needs_compiler
def test_the_library_is_built_once_and_found_again(fresh):
    assert build.load() is not None
    (first,) = libraries(fresh)
    built_at = first.stat().st_mtime_ns
    build.build_once.cache_clear()
    assert build.load() is not None
    assert libraries(fresh) == [first] and first.stat().st_mtime_ns == built_at
    assert list(fresh.iterdir()) == [first], "temporary files were left"
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700


@needs_compiler
def test_changed_source_or_flags_get_another_name(fresh, tmp_path, monkeypatch):
    names = {build._build_key("gcc 1", build.FLAGS), build._build_key("gcc 2", build.FLAGS)}
    names.add(build._build_key("gcc 1", (*build.FLAGS, "-g")))
    changed = tmp_path / "csrc"
    shutil.copytree(build.SOURCE_DIR, changed)
    (changed / "kernels.h").write_text("/* changed */")
    monkeypatch.setattr(build, "SOURCE_DIR", changed)
    names.add(build._build_key("gcc 1", build.FLAGS))
    assert len(names) == 4


@pytest.mark.parametrize(
    ("compiler", "cause"),
    [("/bin/false", "exited with 1"), ("/no/such/compiler --fast", "No such file")],
)
def test_without_a_compiler_it_warns_once_and_still_works(fresh, monkeypatch, compiler, cause):
    monkeypatch.setenv("CC", compiler)
    assert not build.is_available()
    with pytest.warns(RuntimeWarning, match="100 times slower") as caught:
        total = sum_of_squares(torch.full((5,), 2.0))
    assert total == 20.0
    assert len(caught) == 1 and cause in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acc = torch.ones(3)
        accumulate_(acc, torch.ones(3))
        assert sum_of_squares(acc) == 12.0


def write_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_compilers_own_message_is_shown(fresh, tmp_path, monkeypatch):
    script = 'case "$1" in --version) echo fake 1.0;; *) echo "fatal: no headers here" >&2; exit 4;; esac'
    monkeypatch.setenv("CC", write_compiler(tmp_path / "fakecc", script))
    with pytest.warns(RuntimeWarning, match="(?s)exited with 4.*fatal: no headers here"):
        assert build.load() is None
    assert libraries(fresh) == []
    assert list(fresh.iterdir()) == [], "temporary files were left"


@needs_compiler
def test_a_compiler_without_openmp_builds_a_serial_library(fresh, tmp_path, monkeypatch):
    compiler = build._find_compiler()[0]
    script = (
        'for word in "$@"; do if [ "$word" = -fopenmp ]; then echo "no libomp"; exit 1; fi; done\n'
        f'exec {compiler} "$@"'
    )
    monkeypatch.setenv("CC", write_compiler(tmp_path / "serialcc", script))
    with pytest.warns(RuntimeWarning, match="(?s)one thread only.*no libomp"):
        library = build.load()
    assert library is not None and library.slideformer_has_openmp() == 0


@needs_compiler
def test_an_unusable_cache_directory_is_replaced_by_a_private_one(fresh, monkeypatch):
    fresh.parent.joinpath("slideformer").write_text("a file where the directory should be")
    assert build.load() is not None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    build.build_once.cache_clear()
    assert build.load() is not None


@needs_compiler
def test_processes_that_start_together_do_not_disturb_each_other(tmp_path, kernels_dir):
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('build', sys.argv[1]); "
        "m = u.module_from_spec(s); sys.modules['build'] = m; s.loader.exec_module(m); m.FLAGS += ('-O0',); "
        "assert m.load() is not None; assert m.load().slideformer_supports_isa(1) == 1"
    )
    path = kernels_dir / "slideformer_kernels" / "build.py"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code, str(path)], env=env) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert len(list((tmp_path / "slideformer").iterdir())) == 1


def test_import_is_light(tmp_path, kernels_dir):
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import slideformer_kernels; "
        "assert ('triton' in sys.modules) == before; assert 'slideformer_kernels.gpu' not in sys.modules"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(kernels_dir)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == [], "something was compiled at import"


@needs_compiler
def test_a_forked_child_does_not_hang(tmp_path):
    """GNU OpenMP's threads do not survive a fork; dataloader workers are forked."""
    x = torch.ones(1_000_000)
    from slideformer_kernels import cpu

    assert cpu.sum_of_squares(x, threads=2) == 1_000_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        child = os.fork()
    if child == 0:
        os._exit(0 if cpu.sum_of_squares(x, threads=2) == 1_000_000 else 1)
    status = None
    try:
        deadline = time.monotonic() + 20
        while status is None and time.monotonic() < deadline:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status = code
            else:
                time.sleep(0.05)
    finally:
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert status == 0, "the forked child hangs" if status is None else "wrong sum in the forked child"


# -- whose library it is -------------------------------------------------------------------------------------

SOMEBODY = 12345


@pytest.fixture(scope="module")
def libraries_of_two(tmp_path_factory):
    """Two libraries: what our compiler makes, and what somebody put into the cache."""
    directory = tmp_path_factory.mktemp("libraries")
    found = []
    for name, value in (("ours", 1), ("planted", 2)):
        source = directory / f"{name}.c"
        source.write_text(f"int whose(void) {{ return {value}; }}")
        library = directory / f"{name}.so"
        subprocess.run(
            [*build._find_compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True
        )
        found.append(library)
    return found


class Cache:
    """A cache directory with a library in it, and how often one was compiled."""

    def __init__(self, directory: Path, ours: Path, planted: Path) -> None:
        self.directory = directory
        self.compiled = 0
        self._ours = ours
        key = build._build_key(
            build._compiler_identity(build._find_compiler()), (*build.FLAGS, build.OPENMP_FLAG)
        )
        self.library = directory / f"slideformer_cpu-{key}.so"
        directory.mkdir()
        shutil.copy(planted, self.library)
        self.library.chmod(0o755)
        directory.chmod(0o755)

    def compile(self, compiler, flags, path: Path) -> None:
        self.compiled += 1
        temporary = path.with_suffix(".tmp")
        shutil.copy(self._ours, temporary)
        os.replace(temporary, path)

    def whose(self) -> str:
        """Whose library this process loads."""
        build.build_once.cache_clear()
        library = build.build_once().library
        assert isinstance(library, ctypes.CDLL)
        return {1: "ours", 2: "planted"}[library.whose()]


@pytest.fixture
def cache(fresh, libraries_of_two, monkeypatch):
    cache = Cache(fresh, *libraries_of_two)
    monkeypatch.setattr(build, "_compile", cache.compile)
    private = fresh.parent / "private"
    private.mkdir()
    monkeypatch.setattr(build, "_private_dir", lambda: private)
    monkeypatch.setattr(build, "_is_own_group", lambda gid: False)
    return cache


def _link_of_somebody(cache: Cache) -> None:
    cache.directory.rename(cache.directory.with_name("elsewhere"))
    cache.directory.symlink_to("elsewhere")
    os.chown(cache.directory, SOMEBODY, SOMEBODY, follow_symlinks=False)


PLACES: dict[str, tuple[Callable[[Cache], object], str]] = {
    "directory of somebody": (
        lambda cache: os.chown(cache.directory, SOMEBODY, SOMEBODY),
        f"belongs to uid {SOMEBODY}",
    ),
    "directory above of somebody": (
        lambda cache: os.chown(cache.directory.parent, SOMEBODY, SOMEBODY),
        f"belongs to uid {SOMEBODY}",
    ),
    "sticky directory above of somebody": (
        lambda cache: (
            cache.directory.parent.chmod(0o1777),
            os.chown(cache.directory.parent, SOMEBODY, SOMEBODY),
        ),
        f"belongs to uid {SOMEBODY}",
    ),
    "link of somebody": (_link_of_somebody, f"belongs to uid {SOMEBODY}"),
    "directory above that all may write to": (
        lambda cache: cache.directory.parent.chmod(0o777),
        r"written to by others \(mode 0777\)",
    ),
    "directory above that a group may write to": (
        lambda cache: cache.directory.parent.chmod(0o770),
        r"written to by others \(mode 0770\)",
    ),
}


@needs_compiler
@pytest.mark.parametrize("place", PLACES)
def test_a_directory_of_others_is_replaced_by_a_private_one(cache, caplog, place):
    prepare, reason = PLACES[place]
    if "somebody" in place and os.geteuid() != 0:
        pytest.skip("only root can give files to others")
    prepare(cache)
    with caplog.at_level(logging.WARNING):
        assert cache.whose() == "ours"
        assert cache.whose() == "ours"
    assert cache.compiled == 1
    assert len(caplog.messages) == 1
    assert re.search(f"{reason}.*private directory.*XDG_CACHE_HOME", caplog.messages[0])


FILES: dict[str, Callable[[Cache], object]] = {
    "all may write to it": lambda cache: cache.library.chmod(0o666),
    "a group may write to it": lambda cache: cache.library.chmod(0o775),
    "it is somebody's": lambda cache: os.chown(cache.library, SOMEBODY, SOMEBODY),
    "it is somebody's, where nobody else gets": lambda cache: (
        os.chown(cache.library, SOMEBODY, SOMEBODY),
        cache.directory.chmod(0o700),
    ),
    "it is a link": lambda cache: (
        cache.library.rename(cache.directory / "other.so"),
        cache.library.symlink_to("other.so"),
    ),
    "all may write to the directory": lambda cache: cache.directory.chmod(0o777),
    "all may write to the sticky directory": lambda cache: cache.directory.chmod(0o1777),
    "a group may write to the directory": lambda cache: cache.directory.chmod(0o2770),
}


@needs_compiler
@pytest.mark.parametrize("file", FILES)
def test_a_library_that_may_be_somebodys_is_built_anew(cache, caplog, file):
    """The directory is ours, so it is put right, once and for all."""
    if "somebody" in file and os.geteuid() != 0:
        pytest.skip("only root can give files to others")
    FILES[file](cache)
    with caplog.at_level(logging.WARNING):
        assert cache.whose() == "ours"
    assert len(caplog.messages) == 1 and "could be anybody's" in caplog.messages[0]
    build._log_once.cache_clear()
    caplog.clear()
    assert cache.whose() == "ours" and caplog.messages == []
    assert cache.compiled == 1 and cache.library.stat().st_uid == os.geteuid()
    assert cache.directory.stat().st_mode & 0o022 == 0


OWN: dict[str, Callable[[Cache], object]] = {
    "as it is made": lambda cache: cache.directory.chmod(0o700),
    "that others may read": lambda cache: None,
    "made under umask 0002": lambda cache: (cache.library.chmod(0o775), cache.directory.chmod(0o700)),
    "in a sticky directory": lambda cache: cache.directory.parent.chmod(0o1777),
    "behind a link of one's own": lambda cache: (
        cache.directory.rename(cache.directory.with_name("elsewhere")),
        cache.directory.symlink_to("elsewhere"),
    ),
}


@needs_compiler
@pytest.mark.parametrize("own", OWN)
def test_a_cache_of_ones_own_is_used(cache, caplog, own):
    OWN[own](cache)
    with caplog.at_level(logging.WARNING):
        assert cache.whose() == "planted"  # by this user
    assert cache.compiled == 0 and caplog.messages == []


@needs_compiler
def test_a_group_of_ones_own_is_nobody_else(cache, caplog, monkeypatch):
    monkeypatch.setattr(build, "_is_own_group", lambda gid: True)
    cache.directory.parent.chmod(0o770)
    cache.directory.chmod(0o775)
    cache.library.chmod(0o775)
    with caplog.at_level(logging.WARNING):
        assert cache.whose() == "planted"  # by this user
    assert cache.compiled == 0 and caplog.messages == []
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("group", "own"),
    [
        (SimpleNamespace(gr_name="ada", gr_mem=[]), True),
        (SimpleNamespace(gr_name="ada", gr_mem=["ada"]), True),
        (SimpleNamespace(gr_name="ada", gr_mem=["ada", "bob"]), False),
        (SimpleNamespace(gr_name="users", gr_mem=[]), False),
        (None, False),
    ],
)
def test_which_group_is_ones_own(monkeypatch, group, own):
    monkeypatch.setattr(build.pwd, "getpwuid", lambda uid: SimpleNamespace(pw_gid=7, pw_name="ada"))
    monkeypatch.setattr(build.grp, "getgrgid", lambda gid: {7: group}[gid] if group else {}[gid])
    assert build._is_own_group(7) is own
    if group is not None:
        monkeypatch.setattr(build.grp, "getgrgid", lambda gid: group)
        assert not build._is_own_group(8)


@needs_compiler
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_built_is_for_this_user_alone(fresh, tmp_path, monkeypatch, umask):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    before = os.umask(umask)
    try:
        directory = build._cache_dir()
    finally:
        os.umask(before)
    for made in (directory, directory.parent, directory.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) & 0o077 == 0
    source = tmp_path / "csrc"
    source.mkdir()
    (source / build.MAIN_SOURCE).write_text("int nothing(void) { return 0; }")
    monkeypatch.setattr(build, "SOURCE_DIR", source)
    before = os.umask(umask)
    try:
        build._compile(build._find_compiler(), build.FLAGS, directory / "slideformer_cpu-x.so")
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "slideformer_cpu-x.so").stat().st_mode) == 0o700
