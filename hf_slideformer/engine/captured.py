"""What transformers' output recorders catch inside units: router logits and the like, by hooks on modules there."""

from __future__ import annotations

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # versions that do it in another way; the mixture-of-experts parity tests would tell
    _active_collector = None


def captured() -> dict[str, list]:
    """The live lists that recorders have filled so far in this forward, by name."""
    collected = _active_collector.get() if _active_collector is not None else None
    return {key: values for key, values in (collected or {}).items() if isinstance(values, list)}


def captured_lengths() -> dict[str, int]:
    """How much each of them holds now; what comes later was caught later."""
    return {key: len(values) for key, values in captured().items()}
