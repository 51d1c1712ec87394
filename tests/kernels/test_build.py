"""Building the C kernels: the cache, races, and what happens where there is no compiler."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from slideformer_kernels import accumulate_, build, sum_of_squares

needs_compiler = pytest.mark.skipif(not build.is_available(), reason="no C compiler")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Forget this process's library and use an empty cache; the real one is found again afterwards.

    What is built is not optimised: that takes most of the time, and the cache does not know the difference.
    """
    caches = (build.build_once, build._warn_once)
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
