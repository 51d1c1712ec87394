"""Pairs of a function's signature and the first line of its docstring, from Python's standard library.

Text that every machine has, so that the demo needs neither a hub nor a download. The sources are parsed,
never imported. The split is by top-level module: no module gives examples to both sides, and a held-out
pair that some training module repeats word for word (`io` and `_pyio` share docstrings) is dropped.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = "Answer with the first line of the docstring of this Python function: one short sentence."

# Not the library proper, and some distributions leave them out: tests, vendored copies, an editor, games.
EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
    | {"_vendor", "_bundled", "distutils", "ensurepip", "pydoc_data", "__pycache__", "__phello__"}
)
HELD_OUT_ONE_IN = 6
MIN_WORDS, MAX_WORDS = 3, 20
MAX_SIGNATURE_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Docstring:
    """One function: its dotted module, what stands above its body, and its docstring's first line."""

    module: str
    signature: str
    summary: str

    @property
    def top_module(self) -> str:
        """The module's first name without its leading underscore, so `io` and `_io` count as one."""
        return self.module.partition(".")[0].lstrip("_")


def read_docstrings(root: Path | None = None) -> list[Docstring]:
    """Read every documented function below `root`, in the order of file names and lines.

    Args:
        root: A directory of Python sources; the installed standard library where None.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found: dict[Docstring, None] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if EXCLUDED.isdisjoint(parts):
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.update(dict.fromkeys(parse_docstrings(path, module)))
    return list(found)


def split_by_module(docstrings: list[Docstring]) -> tuple[list[Docstring], list[Docstring]]:
    """Split into (train, held out) by a checksum of the top-level module's name.

    A checksum rather than a shuffle: one module's side does not depend on which others are installed.
    """
    train: list[Docstring] = []
    held_out: list[Docstring] = []
    for docstring in docstrings:
        side = zlib.crc32(docstring.top_module.encode()) % HELD_OUT_ONE_IN
        (train if side else held_out).append(docstring)
    seen = {_text(docstring) for docstring in train}
    return train, [docstring for docstring in held_out if _text(docstring) not in seen]


def parse_docstrings(path: Path, module: str) -> Iterator[Docstring]:
    """Yield the documented functions of one source file that make usable examples."""
    try:
        with warnings.catch_warnings():
            # Old escapes such as "\d" in the library's own strings are no business of the reader.
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # A file that cannot be read or parsed here is one source fewer, not a failure.
    yield from _documented_functions(tree, f"# {module}", module)


def _documented_functions(node: ast.AST, heading: str, module: str) -> Iterator[Docstring]:
    """Walk definitions in source order; `heading` says where the function stands."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _documented_functions(child, f"# {module}, class {child.name}", module)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            summary = _summary(child)
            signature = f"{heading}\n{_signature(child)}"
            if summary and len(signature) <= MAX_SIGNATURE_CHARACTERS:
                yield Docstring(module, signature, summary)
        else:
            yield from _documented_functions(child, heading, module)


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Render the `def` line on one line, whatever its layout in the source."""
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{keyword} {function.name}({ast.unparse(function.args)}){returns}:"


def _summary(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """Return the docstring's first line if it is one plain sentence, else None."""
    first = (ast.get_docstring(function) or "").strip().partition("\n")[0].strip()
    usable = first.isascii() and first.endswith(".") and MIN_WORDS <= len(first.split()) <= MAX_WORDS
    return first if usable else None


def _text(docstring: Docstring) -> tuple[str, str]:
    """What makes two functions the same example: the `def` line and the answer, wherever they stand."""
    return docstring.signature.partition("\n")[2], docstring.summary
