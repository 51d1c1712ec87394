"""Whether a checkpoint is that of the model at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def check_same_parameters(path: Path, saved: Mapping[str, Any], have: Mapping[str, Any]) -> None:
    """Raise `CheckpointError`, with numbers, unless two models' parameters agree."""
    if saved == have:
        return
    missing, extra = sorted(have.keys() - saved.keys()), sorted(saved.keys() - have.keys())
    differing = sorted(name for name in have.keys() & saved.keys() if have[name] != saved[name])
    parts = [
        f"{path} is the checkpoint of another model: it has {len(saved)} parameters, this model {len(have)}"
    ]
    parts += [f"{len(missing)} are missing there ({some_of(missing)})"] if missing else []
    parts += [f"{len(extra)} are unknown here ({some_of(extra)})"] if extra else []
    if differing:
        name = differing[0]
        parts.append(
            f"{len(differing)} differ, such as {name} with {saved[name]} there and {have[name]} here"
        )
    raise CheckpointError(
        "; ".join(parts) + "; resume with the model and the frozen parameters that it was saved with"
    )


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
