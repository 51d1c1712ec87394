"""Rates of updates, measured and not, and descriptions that earlier versions wrote."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hf_slideformer.errors import ConfigError
from hf_slideformer.machine.hardware import UPDATE_FORMATS, Hardware, update_bytes, update_rate
from hf_slideformer.machine.presets import PRESETS
from hf_slideformer.memory.layout import EIGHT_BIT_MOMENTS, FP32_MOMENTS, MomentFormat, MomentPart

PROBES = Path(__file__).parents[2] / "docs/benchmarks"
EARLIER = {"cpu_update": "cpu_adamw", "cpu_update_loaded": "cpu_adamw_loaded", "gpu_update": "gpu_adamw"}
MACHINE = PRESETS["h200"]


def _moments(*parts):
    return MomentFormat(
        "other", tuple(MomentPart(f"part {index}", *part) for index, part in enumerate(parts))
    )


@pytest.mark.parametrize(
    ("moments", "nbytes"),
    [
        (FP32_MOMENTS, 2 + 2 * (4 + 8)),
        (EIGHT_BIT_MOMENTS, 2 + 2 * (4 + 2)),  # and an eighth of a byte for scales
        (_moments(), 2 + 2 * 4),
        (_moments((torch.float32,)), 2 + 2 * (4 + 4)),
        (_moments((torch.bfloat16,)), 2 + 2 * (4 + 2)),
        (_moments((torch.uint8, 2)), 2 + 2 * 4 + 1),
    ],
)
def test_bytes_of_an_update(moments, nbytes):
    assert update_bytes(moments) == nbytes


@pytest.mark.parametrize("rates", EARLIER)
def test_an_update_that_nobody_measured_is_estimated_by_its_bytes(rates):
    known = getattr(MACHINE, rates)
    for moments in (FP32_MOMENTS, EIGHT_BIT_MOMENTS):
        assert update_rate(known, moments) == known[moments.name]
    one = _moments((torch.float32,))
    assert update_rate(known, _moments()) == pytest.approx(known["fp32"] * 26 / 10)
    assert update_rate(known, one) == pytest.approx(known["fp32"] * 26 / 18)
    assert update_rate({**known, "other": 7.0}, one) == 7.0


@pytest.mark.parametrize("path", sorted(PROBES.glob("*/probe*.json")), ids=lambda path: path.stem)
def test_descriptions_of_earlier_versions_are_read(path):
    values = json.loads(path.read_text())
    values = values.get("hardware", values)
    machine = Hardware.from_dict(values)
    for now, earlier in EARLIER.items():
        assert getattr(machine, now) == values[earlier]
        assert set(getattr(machine, now)) == set(UPDATE_FORMATS)
    assert Hardware.from_dict(machine.as_dict()) == machine
    assert not set(EARLIER.values()) & set(machine.as_dict())


def test_a_name_may_not_be_there_twice():
    values = MACHINE.as_dict()
    with pytest.raises(ConfigError, match="unknown: cpu_adamw"):
        Hardware.from_dict(values | {"cpu_adamw": values["cpu_update"]})


def test_rates_of_other_updates_are_kept():
    machine = dataclasses.replace(MACHINE, cpu_update={**MACHINE.cpu_update, "lion": 5e9})
    assert Hardware.from_dict(json.loads(json.dumps(machine.as_dict()))) == machine
    values = machine.as_dict()
    values["cpu_update"]["lion"] = -1
    with pytest.raises(ConfigError, match=r"cpu_update\.lion must be positive"):
        Hardware.from_dict(values)
