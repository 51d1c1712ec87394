"""What transformers' output recorders catch inside units: router logits and the like, by hooks on modules there."""

from __future__ import annotations

from transformers.utils.output_capturing import _active_collector  # `compatibility` says what it is for

from ...errors import UnsupportedVersionError


def captured() -> dict[str, list]:
    """The live lists that recorders have filled so far in this forward, by name.

    Raises:
        UnsupportedVersionError: recorders keep what they catch in another way, so its gradients would be lost.
    """
    found = {}
    for key, values in (_active_collector.get() or {}).items():
        if isinstance(values, list):
            found[key] = values
        elif not isinstance(values, (set, frozenset)):  # numbers of the layers that are asked for
            raise UnsupportedVersionError(
                f"transformers keeps the recorded {key!r} in a {type(values).__name__}, of which hf_slideformer does "
                "not know how to hand on gradients; install a version that docs/compatibility.md names"
            )
    return found


def captured_lengths() -> dict[str, int]:
    """How much each of them holds now; what comes later was caught later."""
    return {key: len(values) for key, values in captured().items()}
