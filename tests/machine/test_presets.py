"""Presets: rates that belong together, names that are found, and estimates after the nearest one."""

import dataclasses
from pathlib import Path

import pytest

from hf_slideformer.errors import ConfigError
from hf_slideformer.machine.hardware import UPDATE_FORMATS, Hardware
from hf_slideformer.machine.presets import (
    PRESETS,
    disk_rates,
    estimate,
    preset,
)

GIB = 2**30
ROOT = Path(__file__).parents[2]
MACHINES = PRESETS | {
    "no GPU": estimate(gpu=None, gpu_bytes=8 * GIB, ram_bytes=8 * GIB, cores=2),
    "few cores": estimate(gpu="NVIDIA GeForce RTX 4090", gpu_bytes=24 * GIB, ram_bytes=60 * GIB, cores=2),
}


@pytest.mark.parametrize("name", MACHINES)
def test_description_is_valid_and_survives_json(name):
    assert Hardware.from_dict(MACHINES[name].as_dict()) == MACHINES[name]


@pytest.mark.parametrize("name", MACHINES)
def test_rates_belong_together(name):
    machine = MACHINES[name]
    assert machine.source == "estimated"
    assert max(machine.h2d, machine.d2h) <= machine.duplex <= machine.h2d + machine.d2h
    for key in UPDATE_FORMATS:
        assert machine.cpu_update_loaded[key] < machine.cpu_update[key] <= machine.gpu_update[key]
    # Fewer bytes a parameter: faster, wherever memory bounds the update.
    for rates in (machine.cpu_update, machine.cpu_update_loaded, machine.gpu_update):
        assert rates["8bit"] > rates["fp32"]
    assert machine.ram_copy <= machine.gpu_copy
    assert machine.fp32_flops <= machine.bf16_flops


def test_h100_is_the_measured_machine():
    measured = Hardware.from_file(ROOT / "docs/benchmarks/2026-11-22-h100-plan/probe.json").as_dict()
    for name, value in preset("h100").as_dict().items():
        if name in ("name", "source", "notes", "gpu_bytes", "ram_bytes", "disk_bytes", "disk_duplex"):
            continue
        assert value == (pytest.approx(measured[name], rel=0.005) if name != "gpu" else measured[name]), name


def test_four_modules_are_slower_than_two():
    for gpu in ("rtx4090", "rtx5090"):
        assert preset(f"{gpu}-256gb").cpu_update["fp32"] < preset(f"{gpu}-128gb").cpu_update["fp32"]


@pytest.mark.parametrize("spelling", ["rtx4090-256gb", "RTX 4090 256GB", "rtx4090_256gb"])
def test_spelling_does_not_matter(spelling):
    assert preset(spelling) is PRESETS["rtx4090-256gb"]


@pytest.mark.parametrize(
    ("name", "near"), [("rtx4090", "rtx4090-64gb"), ("h10", "h100"), ("mi300", "mi300x")]
)
def test_unknown_name_is_answered_with_the_nearest_and_all(name, near):
    with pytest.raises(ConfigError, match=f"{name}.*did you mean '{near}'") as caught:
        preset(name)
    assert all(known in str(caught.value) for known in PRESETS)


@pytest.mark.parametrize("name", ["", "?", "quantum"])
def test_name_like_no_other_is_answered_with_all(name):
    with pytest.raises(ConfigError, match="there are rtx3090-64gb") as caught:
        preset(name)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("gpu", "gpu_gib", "ram_gib", "nearest"),
    [
        ("NVIDIA GeForce RTX 4090", 23.6, 240, "rtx4090-256gb"),
        ("NVIDIA GeForce RTX 3090 Ti", 23.7, 60, "rtx3090-64gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, 200, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 79.2, 200, "a100-80gb"),
        ("NVIDIA H100 PCIe", 79.1, 200, "h100"),
        ("NVIDIA H200", 139.8, 200, "h200"),
        ("AMD Instinct MI300X", 192, 900, "mi300x"),
        # Unknown ones go by memory.
        ("NVIDIA L40S", 44.5, 250, "a100-40gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, 60, "rtx3090-64gb"),
    ],
)
def test_estimate_takes_the_nearest_preset_and_the_machine_s_own_memory(gpu, gpu_gib, ram_gib, nearest):
    machine = estimate(gpu=gpu, gpu_bytes=int(gpu_gib * GIB), ram_bytes=ram_gib * GIB, cores=64)
    near = PRESETS[nearest]
    assert nearest in machine.name and gpu in machine.name
    assert (machine.gpu, machine.ram_bytes, machine.cores) == (gpu, ram_gib * GIB, 64)
    assert (machine.h2d, machine.bf16_flops) == (near.h2d, near.bf16_flops)
    assert machine.cpu_update == near.cpu_update  # more cores do not make RAM faster
    assert machine.disk_bytes is None and machine.disk_read is None


def test_rates_of_a_disk_that_nobody_measured_are_those_of_the_nearest_preset():
    h100 = preset("h100")
    assert disk_rates(h100) == (h100.disk_read, h100.disk_write)
    other = estimate(gpu="NVIDIA H100 PCIe", gpu_bytes=79 * GIB, ram_bytes=200 * GIB, cores=64)
    assert disk_rates(other) == (h100.disk_read, h100.disk_write)
    half = dataclasses.replace(other, disk_read=5e9)
    assert disk_rates(half) == disk_rates(other)
    assert disk_rates(MACHINES["no GPU"]) == disk_rates(preset("rtx3090-64gb"))


@pytest.mark.parametrize("both", [1e9, 3e9, 6e9])
def test_rates_of_a_disk_that_was_measured_both_ways_at_once(both):
    machine = dataclasses.replace(preset("h100"), disk_read=4e9, disk_write=2e9, disk_duplex=both)
    read, write = disk_rates(machine)
    assert read == 2 * write
    assert 1e9 / read + 1e9 / write == pytest.approx(2e9 / both)


def test_few_cores_slow_the_updates_and_nothing_else():
    near = preset("h100")
    machine = estimate(gpu=near.gpu, gpu_bytes=near.gpu_bytes, ram_bytes=near.ram_bytes, cores=4)
    for key in UPDATE_FORMATS:
        assert machine.cpu_update[key] == pytest.approx(near.cpu_update[key] / 4, rel=0.01)
        assert machine.cpu_update_loaded[key] < near.cpu_update_loaded[key]
    assert machine.gpu_update == near.gpu_update and machine.h2d == near.h2d


def test_estimates_say_how_to_measure():
    machine = preset("h200")
    assert "slideformer probe" in machine.advice
    assert dataclasses.replace(machine, source="measured").advice is None


def test_the_documentation_lists_every_preset_with_its_rates():
    lines = (ROOT / "docs/probe.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| `")
    ]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PRESETS}
    assert list(table) == list(PRESETS)
    for name, (gpu_gib, ram_gib, link, update, update_8bit, bf16) in table.items():
        machine = PRESETS[name]
        assert float(gpu_gib) == pytest.approx(machine.gpu_bytes / GIB, abs=0.51)
        assert float(ram_gib) == pytest.approx(machine.ram_bytes / GIB, abs=0.51)
        assert link == f"{machine.h2d / 1e9:.0f} / {machine.duplex / 1e9:.0f}"
        for cell, key in ((update, "fp32"), (update_8bit, "8bit")):
            alone, loaded = machine.cpu_update[key] / 1e9, machine.cpu_update_loaded[key] / 1e9
            assert cell == f"{alone:.1f} / {loaded:.1f}"
        assert float(bf16) == pytest.approx(machine.bf16_flops / 1e12, abs=0.51)
