"""Is every wait needed, and every record? Leaves out one after the other and sees what notices.

A site is a wait (of a thread, or of a stream), the recording of an event, one thing of an `after=` or `after_events=`,
or a reference that is held until a copy is done, in the engine's source. Without it the function that has it gets other
bytecode, in a process of its own, and the scenarios (`scenarios.py`) run under the race detector (`happens_before.py`)
until one fails; where none does, the other tests of order and failures.

    python -m tests.stress.mutate                # all sites: a table, and exit code 1 if one is not needed
    python -m tests.stress.mutate pool.py        # those whose name has this in it
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import inspect
import os
import signal
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import hf_slideformer
from hf_slideformer.memory import streams

ROOT = Path(hf_slideformer.__file__).parent
FOLDERS = ("memory", "engine", "optim")

_WAITS = {
    *("wait_host", "wait_stream", "wait_issued", "wait", "synchronize", "settle", "drain"),
    *("wait_held", "wait_outside"),
}
_REFERENCES = {"_in_flight", "_leaving"}
_AFTER = ("after", "after_events")
# What takes several things to come after; the others take one.
_TAKE_MANY = ("submit", "submit_sum", "collect", "land")
_LIMIT_S = 60


@dataclass(frozen=True)
class Site:
    """One place in the source: what is left out in which function, at which line and column."""

    file: str
    function: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.text}"


class _Sites(ast.NodeVisitor):
    """Finds the sites of one file."""

    def __init__(self, file: str) -> None:
        self.file, self.found = file, list[Site]()
        self._scope: list[str] = []

    def _enter(self, node: ast.AST) -> None:
        self._scope.append(node.name)
        self.generic_visit(node)
        self._scope.pop()

    visit_ClassDef = visit_FunctionDef = _enter

    def _add(self, node: ast.AST, text: str) -> None:
        self.found.append(Site(self.file, ".".join(self._scope), node.lineno, node.col_offset, text))

    def visit_Expr(self, node: ast.Expr) -> None:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            on = ast.unparse(call.func.value)
            if (call.func.attr in _WAITS and on != "self._wake") or (
                (call.func.attr == "append" and on.removeprefix("self.") in _REFERENCES)
                or call.func.attr == "keep"
            ):
                self._add(node, ast.unparse(node))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {ast.unparse(target).removeprefix("self.") for target in node.targets}
        if names & _REFERENCES and isinstance(node.value, ast.ListComp):
            self._add(node, ast.unparse(node))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg in _AFTER and not _is_passed_on(keyword):
                for part in _parts(keyword.value):
                    self._add(part, f"{keyword.arg}={ast.unparse(part)}")
        if _records(node):
            self._add(node, ast.unparse(node))
        self.generic_visit(node)


def _is_passed_on(keyword: ast.keyword) -> bool:
    """Whether it is what the function itself was given, which has its site where that comes from."""
    return isinstance(keyword.value, ast.Name) and keyword.value.id == keyword.arg


def _parts(value: ast.expr) -> list[ast.expr]:
    """What is left out one at a time: of several things each."""
    return value.elts if isinstance(value, ast.Tuple) and len(value.elts) > 1 else [value]


def _records(node: ast.Call) -> bool:
    name = ast.unparse(node.func)
    return name == "compute_event" or name.endswith("_stream.record")


def never_recorded() -> streams.CpuEvent:
    """An event that nobody has recorded: waiting for it is waiting for nothing."""
    event = streams.CpuEvent()
    event.clock = {}
    return event


class _LeftOut(ast.NodeTransformer):
    """The same source without one site."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.done = False

    def _is_it(self, node: ast.AST, text: str) -> bool:
        here = (node.lineno, node.col_offset, text) == (self._site.line, self._site.column, self._site.text)
        self.done = self.done or here
        return here

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if not self._is_it(node, ast.unparse(node)):
            return self.generic_visit(node)
        if node.value.func.attr in _WAITS:  # what is waited for is made all the same
            return ast.copy_location(ast.Expr(node.value.func.value), node)
        return ast.copy_location(ast.Pass(), node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return (
            ast.copy_location(ast.Pass(), node)
            if self._is_it(node, ast.unparse(node))
            else self.generic_visit(node)
        )

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if _records(node) and self._is_it(node, ast.unparse(node)):
            return ast.parse(f"__import__('{__name__}', fromlist=['']).never_recorded()", mode="eval").body
        for keyword in node.keywords:
            for part in _parts(keyword.value) if keyword.arg else ():
                if self._is_it(part, f"{keyword.arg}={ast.unparse(part)}"):
                    left = [other for other in _parts(keyword.value) if other is not part]
                    many = ast.unparse(node.func).endswith(_TAKE_MANY)
                    nothing = ast.Tuple(left, ast.Load()) if many else ast.Constant(None)
                    keyword.value = ast.copy_location(nothing, keyword.value)
        return self.generic_visit(node)


def sites() -> list[Site]:
    """All sites, in the order of the source."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            visitor = _Sites(str(path.relative_to(ROOT)))
            visitor.visit(ast.parse(path.read_text()))
            found += visitor.found
    # Those of the abstraction itself are what every other one is made of.
    return [site for site in found if site.file != "memory/streams.py"]


@contextlib.contextmanager
def left_out(site: Site) -> Iterator[None]:
    """In the block the function runs without the site."""
    function, code = _without(site)
    before, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = before


def _without(site: Site) -> tuple[types.FunctionType, types.CodeType]:
    """The function that has the site, and its code without it."""
    path = ROOT / site.file
    transformer = _LeftOut(site)
    tree = ast.fix_missing_locations(transformer.visit(ast.parse(path.read_text())))
    assert transformer.done, site
    module = importlib.import_module(f"hf_slideformer.{site.file.removesuffix('.py').replace('/', '.')}")
    codes = {code.co_qualname: code for code in _codes(compile(tree, str(path), "exec"))}
    function, owner = None, module
    name = ""
    for part in site.function.split(
        "."
    ):  # the outermost function: what is inside of it is a part of its code
        name = f"{name}.{part}".lstrip(".")
        owner = inspect.getattr_static(owner, part)
        if not inspect.isclass(owner):
            function = owner
            break
    assert function is not None
    function = getattr(function, "fget", None) or getattr(function, "__func__", None) or function
    function = inspect.unwrap(function)
    return function, codes[name]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def noticed_by(names: list[str]) -> str:
    """Which of the scenarios notices that something is missing, and how; "" if none does.

    One that takes too long ends the process.
    """
    from .happens_before import watching
    from .scenarios import SCENARIOS

    for name in names:
        signal.alarm(_LIMIT_S)
        with tempfile.TemporaryDirectory() as directory:
            try:
                with watching() as watch:
                    SCENARIOS[name](watch, directory)
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is noticed
                return f"{name}: {type(error).__name__}: {error}".splitlines()[0]
            if watch.races:
                return f"{name}: race: {watch.races[0]}"
    return ""


def in_a_process(run: Callable[[], str], limit_s: float = _LIMIT_S) -> str:
    """What `run` returns in a fork of this process, or that it did not end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            signal.alarm(int(limit_s))
            os.write(writer, run().encode()[:2000])
        except BaseException:  # noqa: BLE001 - of this program, not of what it looks at
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return "does not end" if os.WIFSIGNALED(status) else text


def without(site: Site, names: list[str]) -> str:
    """What notices that the site is left out."""

    def run() -> str:
        with left_out(site):
            return noticed_by(names)

    return in_a_process(run)


def _by_tests(site: Site) -> str:
    """Which of the other tests notices it; those of its module first."""
    import pytest

    class Failed:
        first = ""

        def pytest_runtest_logreport(self, report):
            if report.failed and not self.first:
                self.first = report.nodeid

    failed = Failed()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        quiet = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
        own = Path("tests", site.file)
        own = own.with_name(f"test_{own.name}")
        pytest.main(
            ["-x", *quiet, "-k", "not process", *([str(own)] if own.exists() else []), *_TESTS],
            plugins=[failed],
        )
    return failed.first


_TESTS = [
    *(
        f"tests/memory/test_{name}.py"
        for name in ("lease", "transfer", "pool", "offload", "staging", "worker", "runtime")
    ),
    "tests/memory/disk",
    "tests/faults/test_dead_device.py",
    "tests/stress/test_order.py",
    "tests/faults/test_anywhere.py",
    "tests/engine/run/test_activations.py",
    "tests/engine/state/test_on_disk.py",
    "tests/checkpoint/test_overlap.py",
    "tests/trainer/test_plain_loops.py",
]


def main(wanted: str) -> int:
    """Leave out each site in turn; print what notices it."""
    from .scenarios import SCENARIOS

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # every engine collects garbage when it is made
    missed = 0
    for site in sites():
        if wanted not in str(site):
            continue
        how = without(site, list(SCENARIOS))
        if not how:

            def by_tests(site: Site = site) -> str:
                with left_out(site):
                    return _by_tests(site)

            how = in_a_process(by_tests, 600)
        missed += not how
        print(f"| `{site}` | {how.replace('|', '/') or '**nothing**'} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
