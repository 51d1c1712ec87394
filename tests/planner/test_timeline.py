"""The time model against measured rows, and against what must hold for any machine."""

import dataclasses
import random

import pytest
import torch

from hf_slideformer.machine.presets import disk_rates
from hf_slideformer.memory.layout import EIGHT_BIT_MOMENTS, lay_out
from hf_slideformer.planner.timeline import (
    COMPUTE,
    DISK,
    LAUNCH,
    LINK,
    UPDATE,
    Durations,
    predict,
    shortest_step_s,
    step_seconds,
)
from hf_slideformer.planner.workload import Decisions

from .machines import H100, NO_MOMENTS, ONE_IN_BLOCKS, ONE_MOMENT, OTHER_H100, llama, spec

# Median seconds of a step, everything streamed and recomputed: docs/benchmarks/2026-11-22-h100-kernels/; for batches 16
# and 32 without clipping, and for accumulation, docs/benchmarks/2026-11-22-h100-stream/.
# They are older than the probe, so whose rates they had is not known; they stand against the middle of four machines.
ROWS = {
    "clipped-8": (8, {}, 1.810, UPDATE),
    "clipped-16": (16, {}, 2.352, COMPUTE),
    "clipped-32": (32, {}, 3.472, COMPUTE),
    "unclipped-8": (8, {"overlapped": True}, 1.563, UPDATE),
    "unclipped-16": (16, {"overlapped": True}, 1.635, COMPUTE),
    "unclipped-32": (32, {"overlapped": True}, 3.068, COMPUTE),
    "8bit-8": (8, {"moments": EIGHT_BIT_MOMENTS}, 1.729, UPDATE),
    "accumulated-8": (8, {"micro_batches": 2}, 4.731, UPDATE),
}


@pytest.mark.parametrize("row", ROWS)
def test_measured_rows_are_predicted_within_ten_percent(row):
    batch_size, settings, measured_s, bound_by = ROWS[row]
    workload = llama(batch_size, **settings)
    prediction = predict(workload, OTHER_H100, Decisions.streamed(workload))
    assert prediction.step_s == pytest.approx(measured_s, rel=0.1)
    assert prediction.bound_by == bound_by
    tokens = batch_size * 1024 * workload.micro_batches
    assert prediction.tokens_per_s == pytest.approx(tokens / prediction.step_s)


def test_where_a_clipped_step_waits():
    """The row's own totals: the update was busy 1.21 s, and the launching thread waited 0.98 s for it."""
    prediction = predict(llama(8), OTHER_H100, Decisions.streamed(llama(8)))
    assert prediction.busy_s[UPDATE] == pytest.approx(1.21, rel=0.1)
    assert prediction.waits_s[UPDATE] == pytest.approx(0.98, rel=0.1)
    idle = prediction.step_s - prediction.busy_s[COMPUTE]
    assert sum(prediction.waits_s.values()) == pytest.approx(idle, abs=1e-3)


@pytest.mark.parametrize(
    ("tokens", "forward_ms", "both_ms", "loss_ms"),
    [(8192, 5.6, 17.8, 39.4), (16384, 11.8, 34.7, 80.3), (32768, 23.0, 74.5, 160.0)],
)
def test_compute_alone(tokens, forward_ms, both_ms, loss_ms):
    times = Durations.of(llama(tokens // 1024), H100)
    layer = times.units[0]
    assert 1e3 * layer.forward == pytest.approx(forward_ms, rel=0.1)
    assert 1e3 * (layer.forward + layer.backward) == pytest.approx(both_ms, rel=0.1)
    assert 1e3 * times.loss == pytest.approx(loss_ms, rel=0.1)


def _bound_by(workload, hardware, decisions):
    return predict(workload, hardware, decisions).bound_by


def test_what_bounds_clear_cases():
    workload = llama(8)
    streamed, kept = Decisions.streamed(workload), Decisions.of(workload, resident=32, kept=32)
    assert _bound_by(workload, H100, kept) == COMPUTE
    assert _bound_by(workload, H100, streamed) == UPDATE
    slow_link = dataclasses.replace(H100, h2d=3e9, d2h=3e9, duplex=5e9)
    assert _bound_by(workload, slow_link, streamed) == LINK
    few_tokens = llama(1, 16)
    assert _bound_by(few_tokens, H100, Decisions.of(few_tokens, resident=32, kept=32)) == LAUNCH


def _random_case(rng):
    layers = rng.randint(1, 7)
    settings = rng.choice(({}, {"overlapped": True}, {"micro_batches": 2}))
    workload = llama(rng.choice((1, 4, 16)), layers=layers, **settings)
    factor = lambda: 10 ** rng.uniform(-1, 1)  # noqa: E731
    link = 55e9 * factor()
    rate = 6.1e9 * factor()
    hardware = dataclasses.replace(
        H100,
        h2d=link,
        d2h=link,
        duplex=link * rng.uniform(1, 2),
        cpu_update={"fp32": rate},
        cpu_update_loaded={"fp32": rate * rng.uniform(0.3, 1)},
        bf16_flops=785e12 * factor(),
        disk_read=3e10 * factor(),
        disk_write=3e10 * factor(),
    )
    decisions = Decisions.of(
        workload,
        resident=rng.randint(0, layers),
        kept=rng.randint(0, layers),
        rest=rng.choice(("recompute", "offload")),
        slots=rng.randint(2, 4),
        outside_state=rng.choice(("GPU", "RAM")),
    )
    streamed = range(len(decisions.resident), layers)
    if rng.random() < 0.6:
        on_disk = sorted(rng.sample(streamed, rng.randint(0, len(streamed))))
        decisions = dataclasses.replace(decisions, on_disk=tuple(on_disk), disk_buffers=rng.randint(1, 3))
    return workload, hardware, decisions


def test_no_step_is_shorter_than_its_bound():
    rng = random.Random(1)
    ratios = []
    for _ in range(300):
        workload, hardware, decisions = _random_case(rng)
        times = Durations.of(workload, hardware)
        bound, simulated = shortest_step_s(times, decisions), step_seconds(times, decisions)
        assert simulated >= bound * 0.999, (workload.update, decisions)
        ratios.append(simulated / bound)
    assert sorted(ratios)[150] < 1.3  # and the bound says something


def test_a_faster_machine_is_never_slower():
    rng = random.Random(2)
    for _ in range(150):
        workload, hardware, decisions = _random_case(rng)
        before = step_seconds(Durations.of(workload, hardware), decisions)
        for speed in ("compute_speed", "link_speed", "update_speed", "launch_speed", "disk_speed"):
            after = step_seconds(Durations.of(workload, hardware, **{speed: 2.0}), decisions)
            assert before / 2 * 0.98 <= after <= before * 1.02, (speed, decisions)


def test_memory_that_is_not_pinned_slows_copies():
    workload = llama(8)
    slow_link = dataclasses.replace(H100, h2d=10e9, d2h=10e9, duplex=16e9)
    times, streamed = Durations.of(workload, slow_link), Decisions.streamed(workload)
    pinned, half, pageable = (step_seconds(times, streamed, share) for share in (0.0, 0.5, 1.0))
    assert pinned < half < pageable < 2 * pinned


def test_state_outside_of_units_in_ram_costs_time():
    workload = llama(8)
    times = Durations.of(workload, H100)
    on_gpu, in_ram = (
        step_seconds(times, Decisions.of(workload, outside_state=place)) for place in ("GPU", "RAM")
    )
    trained = sum(spec.numel for spec in workload.outside)
    assert in_ram - on_gpu >= 0.9 * trained / H100.cpu_update["fp32"]


def test_fp32_models_compute_at_the_fp32_rate():
    workload = llama(8, layers=2)
    layout = lay_out([spec("w", 1024, dtype=torch.float32)])
    plain = dataclasses.replace(workload, layouts=(layout, layout))
    in_fp32, in_bf16 = (Durations.of(one, H100).units[0].forward for one in (plain, workload))
    assert in_fp32 / in_bf16 == pytest.approx(H100.bf16_flops / H100.fp32_flops, rel=0.2)


@pytest.mark.parametrize(("moments", "nbytes"), [(NO_MOMENTS, 10), (ONE_MOMENT, 18), (ONE_IN_BLOCKS, 12)])
def test_updates_that_nobody_measured_take_as_long_as_their_bytes(moments, nbytes):
    """Against 26 bytes a parameter with fp32 moments, on either device and beside copies."""
    fp32, other = (Durations.of(llama(8, **settings), H100) for settings in ({}, {"moments": moments}))
    share = pytest.approx(nbytes / 26)
    assert other.units[0].update / fp32.units[0].update == share
    assert other.units[0].gpu_update / fp32.units[0].gpu_update == share
    assert other.outside_update / fp32.outside_update == share
    assert other.gpu_update_outside / fp32.gpu_update_outside == share
    assert other.slowdown == pytest.approx(fp32.slowdown)
    assert other.units[0].summing == fp32.units[0].summing  # sums are fp32 whatever the moments
    workload = llama(8, moments=moments)
    assert (
        predict(workload, H100, Decisions.streamed(workload)).step_s
        < predict(llama(8), H100, Decisions.streamed(workload)).step_s
    )


def test_a_rate_that_was_measured_counts():
    workload = llama(8, moments=ONE_MOMENT)
    measured = dataclasses.replace(
        H100,
        cpu_update=H100.cpu_update | {"lion": 2e9},
        cpu_update_loaded=H100.cpu_update_loaded | {"lion": 1e9},
        gpu_update=H100.gpu_update | {"lion": 3e9},
    )
    estimated, times = (Durations.of(workload, machine) for machine in (H100, measured))
    numel = workload.layouts[0].trainable_numel
    assert times.units[0].gpu_update == pytest.approx(numel / 3e9)
    assert times.units[0].update == pytest.approx(numel / 2e9, rel=0.11)  # training against the probe
    assert times.slowdown / estimated.slowdown == pytest.approx(
        (1 - 1 / 2) / (1 - H100.cpu_update_loaded["fp32"] / H100.cpu_update["fp32"])
    )


def _with_disk(workload, count, buffers=3):
    units = len(workload.layouts)
    return dataclasses.replace(
        Decisions.streamed(workload), on_disk=tuple(range(units - count, units)), disk_buffers=buffers
    )


@pytest.mark.parametrize("settings", [{}, {"overlapped": True}, {"micro_batches": 2}])
def test_a_slow_disk_bounds_the_step(settings):
    workload, slow = llama(8, **settings), dataclasses.replace(H100, disk_read=2e9, disk_write=1e9)
    nbytes = 10 * workload.layouts[0].numel  # of each unit's residuals and moments
    for count in (8, 16, 32):
        prediction = predict(workload, slow, _with_disk(workload, count))
        seconds = count * (nbytes / 2e9 + nbytes / 1e9)
        assert prediction.bound_by == DISK
        assert prediction.busy_s[DISK] == pytest.approx(seconds, rel=1e-4)
        # No longer than all of the disk's work, and everything that cannot overlap with it.
        rest = prediction.busy_s[COMPUTE] + prediction.busy_s[UPDATE]
        assert seconds * 0.999 <= prediction.step_s <= seconds + rest
        assert prediction.waits_s[DISK] > 0.9 * (prediction.step_s - rest)


def test_a_fast_disk_costs_little():
    workload, quick = llama(16), dataclasses.replace(H100, disk_read=1e12, disk_write=1e12)
    in_ram, on_disk = (predict(workload, quick, _with_disk(workload, count)) for count in (0, 32))
    assert on_disk.step_s <= 1.02 * in_ram.step_s and on_disk.waits_s[DISK] < 0.02 * in_ram.step_s
    assert in_ram.busy_s[DISK] == in_ram.waits_s[DISK] == 0


def test_more_buffers_let_reads_run_ahead():
    workload, even = llama(8), dataclasses.replace(H100, disk_read=6e10, disk_write=6e10)
    times = Durations.of(workload, even)
    seconds = [step_seconds(times, _with_disk(workload, 32, buffers)) for buffers in (1, 2, 3)]
    assert seconds[0] > 1.1 * seconds[1] >= 1.1 * seconds[2]


def test_a_disk_that_nobody_measured_is_assumed():
    workload = llama(8)
    unknown = dataclasses.replace(H100, disk_read=None, disk_write=None)
    read, write = disk_rates(unknown)
    known = dataclasses.replace(H100, disk_read=read, disk_write=write)
    assert predict(workload, unknown, _with_disk(workload, 4)) == predict(
        workload, known, _with_disk(workload, 4)
    )
