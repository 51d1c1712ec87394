"""Unit layouts: alignment, order, and no two parameters on the same bytes."""

import random

import pytest
import torch

from hf_slideformer.memory.layout import (
    MOMENT_FORMATS,
    ParamSpec,
    Segment,
    lay_out,
    lay_out_on_disk,
)

_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.int8)


def _spec(name, shape, dtype=torch.bfloat16, *, split=None, trainable=True):
    split = dtype == torch.bfloat16 if split is None else split
    return ParamSpec(name, shape, dtype, dtype, split, trainable)


def _random_specs(seed):
    random_ = random.Random(seed)
    specs = []
    for number in range(random_.randint(1, 12)):
        shape = tuple(random_.choice((1, 2, 3, 7, 63, 64, 65, 128)) for _ in range(random_.randint(0, 3)))
        dtype = random_.choice(_DTYPES)
        trainable = dtype in (torch.bfloat16, torch.float32) and random_.random() < 0.7
        split = dtype == torch.bfloat16 and trainable
        specs.append(_spec(f"p{number}", shape, dtype, split=split, trainable=trainable))
    return specs


def _places(layout, buffer):
    """(start, end) in bytes of every segment that has a place in `buffer`."""
    places = []
    for segment in layout.segments:
        numel, itemsize = segment.spec.numel, segment.spec.dtype.itemsize
        start, size = {
            "weights": (segment.weight_offset, numel * itemsize),
            "gradients": (segment.grad_offset, numel * itemsize),
            "states": (segment.state_offset * 4, numel * 4),
            "residuals": (segment.lo_offset * 2, numel * 2),
        }[buffer]
        if start >= 0:
            places.append((start, start + size))
    return places


@pytest.mark.parametrize("seed", range(40))
def test_random_units(seed):
    specs = _random_specs(seed)
    layout = lay_out(specs)
    assert sorted(segment.spec.name for segment in layout.segments) == sorted(spec.name for spec in specs)
    sizes = {
        "weights": layout.weight_bytes,
        "gradients": layout.grad_bytes,
        "states": layout.state_numel * 4,
        "residuals": layout.lo_numel * 2,
    }
    trainable = sum(spec.trainable for spec in specs)
    expected = {
        "weights": len(specs),
        "gradients": trainable,
        "states": trainable,
        "residuals": sum(spec.split for spec in specs),
    }
    for buffer, size in sizes.items():
        places = _places(layout, buffer)
        assert len(places) == expected[buffer], buffer
        end = 0
        for start, stop in places:
            assert start % 256 == 0, buffer  # matrix libraries choose kernels by alignment
            assert start >= end, f"{buffer} overlap"
            # Neighbours stay close enough for one kernel call: what lies between is padding of one of them.
            assert start - end < 128 * 4, buffer
            end = stop
        assert end <= size < end + 128 * 4, buffer
    assert layout.numel == sum(spec.numel for spec in specs)
    assert layout.trainable_numel == sum(spec.numel for spec in specs if spec.trainable)


def test_order_keeps_what_is_updated_together_adjacent():
    specs = [
        _spec("frozen_plain", (4,), torch.float32, trainable=False),
        _spec("plain", (4,), torch.float32),
        _spec("split_b", (4,)),
        _spec("frozen_split", (4,), split=True, trainable=False),
        _spec("split_a", (4,)),
    ]
    names = [segment.spec.name for segment in lay_out(specs).segments]
    assert names == ["split_b", "split_a", "plain", "frozen_split", "frozen_plain"]


def test_sizes_by_hand():
    layout = lay_out(
        [_spec("w", (3, 50)), _spec("b", (5,), torch.float32), _spec("f", (300,), trainable=False)]
    )
    # 150 and 300 elements pad to 256 and 384, 5 to 128; the frozen one streams and keeps its residual.
    assert [segment.weight_offset for segment in layout.segments] == [0, 512, 1024]
    assert [segment.grad_offset for segment in layout.segments] == [0, 512, -1]
    assert [segment.state_offset for segment in layout.segments] == [0, 256, -1]
    assert [segment.lo_offset for segment in layout.segments] == [0, -1, 256]
    assert (layout.weight_bytes, layout.grad_bytes) == (512 + 512 + 768, 512 + 512)
    assert (layout.state_numel, layout.lo_numel) == (256 + 128, 256 + 384)
    assert (layout.numel, layout.trainable_numel) == (455, 155)


def test_empty_and_scalar_parameters():
    layout = lay_out([_spec("empty", (0, 4)), _spec("scalar", ())])
    assert [segment.spec.numel for segment in layout.segments] == [0, 1]
    assert layout.state_numel == 128


def test_a_resident_parameter_has_no_place():
    segment = Segment.alone(_spec("head", (4, 4)))
    places = (segment.weight_offset, segment.grad_offset, segment.state_offset, segment.lo_offset)
    assert places == (-1, -1, -1, -1)


@pytest.mark.parametrize("moments", MOMENT_FORMATS.values(), ids=MOMENT_FORMATS)
@pytest.mark.parametrize("seed", range(20))
def test_parts_on_disk_are_aligned_and_do_not_overlap(seed, moments):
    layout = lay_out(_random_specs(seed))
    on_disk = lay_out_on_disk(layout, moments)
    sizes = [part.entries(layout.state_numel) * part.dtype.itemsize for part in moments.parts]
    places = list(zip(on_disk.moment_offsets, sizes, strict=True))
    assert (on_disk.lo_offset < 0) == (layout.lo_numel == 0)
    if layout.lo_numel:
        places.append((on_disk.lo_offset, 2 * layout.lo_numel))
    end = 0
    for offset, nbytes in places:
        assert offset % 4096 == 0 and end <= offset < end + 4096
        end = offset + nbytes
    assert on_disk.nbytes % 4096 == 0 and end <= on_disk.nbytes < end + 4096


def test_a_unit_without_optimizer_state_takes_nothing_on_disk():
    layout = lay_out([_spec("w", (300,), torch.float32, trainable=False)])
    on_disk = lay_out_on_disk(layout, MOMENT_FORMATS["8bit"])
    assert (on_disk.moment_offsets, on_disk.lo_offset, on_disk.nbytes) == ((0, 0, 0, 0), -1, 0)
