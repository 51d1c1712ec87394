"""Weights and gradients are whole on the device and nowhere else, as far as all that is above the link knows.

`TwoRanks` keeps the two halves of a unit's weights apart, as two ranks would, and joins them in the slot; gradients are
cut and joined in the same way before they land. Runs with it have the bits of runs with copies that are whole.
"""

from __future__ import annotations

import pytest
import torch

from hf_slideformer import SlideConfig
from hf_slideformer.memory import runtime
from hf_slideformer.memory.link import LocalLink
from hf_slideformer.memory.transfer import compute_event
from hf_slideformer.memory.unit_memory import grad_view
from tests.engine.loop import (
    Run,
    all_tensors,
    assert_same_bits,
    bits,
    decide,
    prepare,
    tiny_llama,
    train,
)

STEPS = 3
UNITS = range(6)
ALL_ON_DISK = {"on_disk": UNITS, "disk_buffers": 2}

PLACES = {
    "streamed": {},
    "offloaded": {"decisions": decide(offload=UNITS, outside_state="RAM")},
    "sums": {"accumulates": True},
    "sums of kept": {"accumulates": True, "decisions": decide(keep=UNITS, staging_buffers=1)},
    "overlapped": {"config": {"update": "overlapped"}},
    "on disk": {"decisions": decide(**ALL_ON_DISK)},
    "weights on disk": {"decisions": decide(**ALL_ON_DISK, weights_on_disk=UNITS)},
    "weights on disk, sums": {
        "accumulates": True,
        "decisions": decide(**ALL_ON_DISK, weights_on_disk=UNITS, offload=UNITS),
    },
    "weights on disk, overlapped": {
        "config": {"update": "overlapped"},
        "decisions": decide(**ALL_ON_DISK, weights_on_disk=UNITS),
    },
}

pytestmark = pytest.mark.timeout(60)


class TwoRanks:
    """A link whose every copy goes in two halves, by way of memory that only one of them is in.

    Attributes:
        swaps: of "weights" or "gradients" the halves change places.
        filled, collected: labels of what went through it.
    """

    swaps = ""

    def __init__(self, device, to_device, to_host):
        self._device, self._to_device, self._to_host = device, to_device, to_host
        self.filled: set[str] = set()
        self.collected: set[str] = set()

    def _split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Of a 1-D tensor, what each of the ranks has; the halves need not be equal."""
        cut = (whole.numel() + 1) // 2
        return [whole[:cut].clone(), whole[cut:].clone()]

    def _join(self, what: str, parts: list[torch.Tensor], whole: torch.Tensor) -> None:
        """Each rank's part in its place; nothing is left of what was there."""
        first, second = reversed(parts) if what == self.swaps else parts
        whole[: first.numel()].copy_(first)
        whole[first.numel() :].copy_(second)

    def fill(self, label, slot, source, *, after=None):
        parts = []

        def split():
            parts.extend(self._split(source.buffer.tensor(torch.uint8, 0, slot.numel())))

        def join():
            self.filled.add(label)
            self._join("weights", parts, slot)

        there = self._to_device.submit(f"{label}, shards", split, after=(source.ready,))
        return self._to_device.submit(label, join, after=(there,), after_events=(after,))

    def collect(self, label, grads, into, *, after=()):
        parts = []

        def split():
            parts.extend(self._split(grad.view(-1)) for _, grad in grads)

        def join():
            self.collected.add(label)
            with into.filled() as buffer:
                for (segment, _), halves in zip(grads, parts, strict=True):
                    self._join("gradients", halves, grad_view(buffer, segment, fp32=False).view(-1))

        left = self._to_host.submit(f"{label}, shards", split, after_events=(compute_event(self._device),))
        return self._to_host.submit(label, join, after=(left, *after))


def run(place: str, directory, dtype: torch.dtype = torch.bfloat16) -> Run:
    settings = dict(PLACES[place])
    on_disk = "disk" in place
    config = SlideConfig(**settings.pop("config", {}), nvme_dir=str(directory) if on_disk else None)
    overlapped, sums = config.update == "overlapped", "accumulates" in settings
    found = prepare(tiny_llama(dtype), config=config, **settings)
    return train(found, STEPS, max_norm=None if overlapped else 0.5, micro_batches=2 if sums else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("place", PLACES)
def test_halves_that_are_kept_apart_change_no_bit(monkeypatch, tmp_path, place, dtype):
    expected = run(place, tmp_path, dtype)
    assert isinstance(expected.engine._runtime.link, LocalLink)
    monkeypatch.setattr(runtime, "LocalLink", TwoRanks)
    ours = run(place, tmp_path, dtype)
    link = ours.engine._runtime.link
    assert link.filled == {f"fetch of model.layers.{unit}" for unit in UNITS}
    assert link.collected == {f"gradients of model.layers.{unit}" for unit in UNITS}
    assert_same_bits(ours, expected)
    for one in (ours, expected):
        one.engine.close()


@pytest.mark.parametrize("what", ["weights", "gradients"])
@pytest.mark.parametrize("place", PLACES)
def test_halves_in_the_wrong_places_are_seen(monkeypatch, tmp_path, place, what):
    """All weights and gradients of units go through the link, and through nothing else."""
    expected = run(place, tmp_path)
    monkeypatch.setattr(runtime, "LocalLink", TwoRanks)
    monkeypatch.setattr(TwoRanks, "swaps", what)
    ours = run(place, tmp_path)
    # The first forward is before the first gradient.
    assert (ours.losses[0] == expected.losses[0]) == (what == "gradients")
    theirs = all_tensors(expected.engine)
    same = {
        name: torch.equal(bits(tensors["exp_avg"]), bits(theirs[name]["exp_avg"]))
        for name, tensors in all_tensors(ours.engine).items()
        if ".layers." in name
    }
    assert len(same) == 9 * len(UNITS) and not any(same.values())
    for one in (ours, expected):
        one.engine.close()
