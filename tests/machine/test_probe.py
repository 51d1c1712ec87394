"""Measuring a machine: what comes out, what is kept, and what is said when it cannot be done."""

import dataclasses
import errno
import json
import math
import os
import threading
import time

import pytest
import torch
from slideformer_kernels import build

from hf_slideformer.errors import ConfigError, ProbeError
from hf_slideformer.machine import hardware as hardware_module
from hf_slideformer.machine import probe as probe_module
from hf_slideformer.machine.hardware import (
    UPDATE_FORMATS,
    Hardware,
    cache_hardware,
    cache_path,
    cached_hardware,
)
from hf_slideformer.machine.presets import PRESETS
from hf_slideformer.machine.probe import (
    ProbeSizes,
    hardware_of_this_machine,
    named_hardware,
    probe,
)

CPU = torch.device("cpu")
MIB = 2**20
TINY = ProbeSizes(link_bytes=MIB, update_numel=MIB, matrix_sizes=(64, 128), disk_bytes=4 * MIB, seconds=0.01)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache directory of the test's own."""
    build.is_available()  # while the C kernels' own cache is still found
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hf_slideformer"


@pytest.fixture
def disk(tmp_path):
    directory = tmp_path / "disk"
    directory.mkdir()
    return directory


def _rates(machine):
    """Every rate of a description, by name."""
    values = {}
    for name, value in machine.as_dict().items():
        if isinstance(value, dict):
            values |= {f"{name}.{key}": rate for key, rate in value.items()}
        elif isinstance(value, (int, float)):
            values[name] = value
    return values


def _check(machine, device):
    assert machine.source == "measured" and machine.advice is None
    rates = _rates(machine)
    assert all(0 < rate < math.inf for rate in rates.values()), rates
    assert max(machine.h2d, machine.d2h) <= machine.duplex
    assert all(machine.cpu_update_loaded[key] <= machine.cpu_update[key] for key in UPDATE_FORMATS)
    assert Hardware.from_dict(json.loads(json.dumps(machine.as_dict()))) == machine
    assert (machine.gpu is None) == (device.type == "cpu")


def test_probe_without_a_gpu(disk, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(probe_module, "default_update_threads", lambda _: threads + 1)
    random_state = torch.get_rng_state()
    machine = probe("cpu", disk, sizes=TINY)
    _check(machine, CPU)
    assert machine.gpu_bytes == machine.ram_bytes and machine.gpu_update == machine.cpu_update
    assert machine.disk_read > 0 and machine.disk_write > 0
    assert machine.disk_duplex is None or machine.disk_duplex > 0  # None: the file system refuses O_DIRECT
    assert list(disk.iterdir()) == []
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)


def test_without_a_directory_no_disk_is_measured():
    machine = probe("cpu", sizes=TINY)
    assert {machine.disk_bytes, machine.disk_read, machine.disk_write, machine.disk_duplex} == {None}


@pytest.mark.gpu
def test_probe_of_a_gpu(disk):
    device = torch.device("cuda")
    begin = time.perf_counter()
    machine = probe(device, disk)
    assert time.perf_counter() - begin < 60  # seconds, with compilation on a slow machine
    _check(machine, device)
    # A GPU that is worth streaming to; a rate of launches instead of work would be below these.
    assert machine.gpu_copy > machine.ram_copy and machine.gpu_copy > machine.duplex
    assert all(machine.gpu_update[key] > machine.cpu_update[key] for key in UPDATE_FORMATS)
    assert machine.bf16_flops > machine.fp32_flops > 1e12
    assert machine.gpu_bytes == torch.cuda.get_device_properties(device).total_memory


def test_rates_are_amounts_by_time(monkeypatch):
    """With a clock that says 0.5 s for each sample, every rate is known."""
    now = iter(i * 0.5 for i in range(10**6))
    monkeypatch.setattr(probe_module.time, "perf_counter", lambda: next(now))
    machine = probe("cpu", sizes=TINY)
    assert machine.cpu_update == dict.fromkeys(UPDATE_FORMATS, TINY.update_numel / 0.5)
    assert machine.ram_copy == 2 * 4 * TINY.update_numel / 0.5
    assert machine.h2d == 4 * TINY.link_bytes / 0.5
    assert machine.duplex == 2 * machine.h2d
    assert machine.bf16_flops == 2 * 128**3 / 0.5  # the larger matrix counts


def test_median_is_taken_of_at_least_three_samples(monkeypatch):
    samples = iter([5.0, 1.0, 3.0])
    assert probe_module._samples(lambda: next(samples), 0.0) == [5.0, 1.0, 3.0]


def test_an_update_runs_beside_copies_both_ways():
    links = probe_module._Links(CPU, 4096)
    for direction in links.directions:
        direction.target.zero_()
    with links.traffic():
        deadline = time.monotonic() + 30
        while not all(direction.target.all() for direction in links.directions):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert all(direction.target.all() for direction in links.directions)


def test_a_failed_copy_is_reported():
    links = probe_module._Links(CPU, 4096)
    tried = threading.Event()

    def fail():
        tried.set()
        raise RuntimeError("the bus is gone")

    links.directions[1].copy = fail
    with pytest.raises(ProbeError, match="a copy failed: the bus is gone"), links.traffic():
        assert tried.wait(30)


# --- disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["pwrite", "preadv", "fdatasync"])
def test_nothing_is_left_on_a_disk_that_fails(disk, monkeypatch, failing):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    handles = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(probe_module.os, failing, fail)
    with pytest.raises(ProbeError, match=rf"{disk} .*No space left on device \(ENOSPC\)"):
        probe_module._measure_disk(disk, TINY)
    assert list(disk.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == handles


def test_short_write_is_an_error(disk, monkeypatch):
    monkeypatch.setattr(probe_module.os, "pwrite", lambda handle, view, offset: len(view) // 2)
    with pytest.raises(ProbeError, match="of 1048576 bytes were moved at offset 0"):
        probe_module._measure_disk(disk, TINY)


def test_disk_without_direct_access_is_measured_with_a_note(disk, monkeypatch):
    refuse = probe_module._set_direct
    monkeypatch.setattr(probe_module, "_set_direct", lambda handle, wanted: refuse(handle, False) and False)
    rates, notes = probe_module._measure_disk(disk, TINY)
    assert rates["disk_read"] > 0 and rates["disk_write"] > 0
    assert rates["disk_duplex"] is None  # what is read for the second time would come from RAM
    assert len(notes) == 1 and "O_DIRECT" in notes[0]


def test_disk_that_refuses_direct_writes_is_measured_with_a_note(disk, monkeypatch):
    direct = True
    write, switch = os.pwrite, probe_module._set_direct

    def set_direct(handle, wanted):
        nonlocal direct
        direct = wanted
        switch(handle, False)
        return True

    def pwrite(*arguments):
        if direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(*arguments)

    monkeypatch.setattr(probe_module, "_set_direct", set_direct)
    monkeypatch.setattr(probe_module.os, "pwrite", pwrite)
    rates, notes = probe_module._measure_disk(disk, TINY)
    assert rates["disk_write"] > 0 and len(notes) == 1


def test_slow_disk_ends_in_time_and_counts_what_was_moved(disk, monkeypatch):
    written = []
    write = os.pwrite

    def slow(handle, view, offset):
        time.sleep(0.1)
        written.append((offset, len(view)))
        return write(handle, view, offset)

    monkeypatch.setattr(probe_module.os, "pwrite", slow)
    monkeypatch.setattr(probe_module, "_transfer_both_ways", lambda *_: None)
    sizes = dataclasses.replace(TINY, disk_bytes=512 * MIB)
    rates, _ = probe_module._measure_disk(disk, sizes)
    chunk = 16 * MIB
    assert len(written) < 512 // 16  # the time was over first
    assert sorted(written) == [(index * chunk, chunk) for index in range(len(written))]  # no hole to read
    assert rates["disk_write"] < len(written) * chunk / 0.1


def test_reads_and_writes_at_once_stay_in_their_halves(disk, monkeypatch):
    """Both go around in their half until the time is over; their bytes are counted together."""
    chunk, chunks = MIB, 7
    moved = {"pwrite": [], "preadv": []}
    for name, seen in moved.items():
        operation = getattr(os, name)

        def noted(handle, view, offset, operation=operation, seen=seen):
            seen.append(offset)
            return operation(handle, view, offset)

        monkeypatch.setattr(probe_module.os, name, noted)
    with open(disk / "file", "w+b") as file:
        file.truncate(chunks * chunk)
        begin = time.perf_counter()
        rate = probe_module._transfer_both_ways(file.fileno(), chunks * chunk, chunk, TINY)
        seconds = time.perf_counter() - begin
    assert set(moved["preadv"]) <= {0, chunk, 2 * chunk}
    assert set(moved["pwrite"]) <= {3 * chunk, 4 * chunk, 5 * chunk}
    assert rate * seconds >= (len(moved["preadv"]) + len(moved["pwrite"])) * chunk
    assert seconds >= 4 * TINY.seconds
    assert probe_module._transfer_both_ways(file.fileno, chunk, chunk, TINY) is None


def test_full_disk_is_refused_before_anything_is_written(disk, monkeypatch):
    usage = probe_module.shutil.disk_usage(disk)
    monkeypatch.setattr(probe_module.shutil, "disk_usage", lambda _: usage._replace(free=MIB))
    monkeypatch.setattr(probe_module.tempfile, "mkstemp", lambda **_: pytest.fail("a file was made"))
    with pytest.raises(ProbeError, match=r"has 1\.0 MiB free"):
        probe_module._measure_disk(disk, TINY)


# --- sizes and refusals ------------------------------------------------------------------------------------------


def test_sizes_shrink_to_what_is_free(monkeypatch):
    monkeypatch.setattr(probe_module, "available_ram_bytes", lambda: 2 * 2**30)
    sizes = ProbeSizes.of_machine(CPU)
    assert sizes._ram_bytes(on_gpu=False) <= 2 * 2**30 // 3
    assert sizes.link_bytes < ProbeSizes().link_bytes and "little memory" in sizes.notes[0]


def test_machine_that_is_too_full_is_refused_with_numbers(monkeypatch):
    monkeypatch.setattr(probe_module, "available_ram_bytes", lambda: 256 * MIB)
    with pytest.raises(ProbeError, match=r"wants at least 0\.\d+ GiB of free RAM, and 0\.25 GiB is free"):
        probe("cpu")


def test_refused_memory_is_a_probe_error(monkeypatch):
    def refuse(*_):
        raise MemoryError("no")

    monkeypatch.setattr(probe_module, "_State", refuse)
    with pytest.raises(ProbeError, match="too little memory"):
        probe("cpu", sizes=TINY)


def test_missing_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="missing is not a directory"):
        probe("cpu", tmp_path / "missing", sizes=TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_refused():
    with pytest.raises(ConfigError, match="finds no GPU"):
        probe("cuda", sizes=TINY)


# --- descriptions ------------------------------------------------------------------------------------------------


def _described(**changes):
    return PRESETS["rtx4090-256gb"].as_dict() | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h2d": 0}, "h2d must be positive and finite, got 0"),
        ({"h2d": -1.5}, "h2d must be positive"),
        ({"h2d": math.nan}, "h2d must be positive"),
        ({"h2d": math.inf}, "h2d must be positive"),
        ({"h2d": 10**400}, "h2d must be positive"),
        ({"h2d": "fast"}, "h2d must be a number, got 'fast'"),
        ({"h2d": True}, "h2d must be a number"),
        ({"h2d": None}, "h2d must be a number"),
        ({"cores": 2.5}, "cores must be a whole number"),
        ({"gpu_bytes": 0}, "gpu_bytes must be positive"),
        ({"disk_read": 0}, "disk_read must be positive"),
        ({"cpu_update": {"fp32": 1e9}}, "cpu_update must have one rate each for fp32, 8bit"),
        ({"cpu_update": 1e9}, "cpu_update must have one rate each"),
        ({"gpu_update": {"fp32": 1e9, "8bit": 0}}, "gpu_update.8bit must be positive"),
        ({"source": "guessed"}, "source must be one of measured, estimated"),
        ({"source": []}, "source must be one of"),
        ({"gpu": 4090}, "gpu must be a text"),
        ({"notes": "slow"}, "notes must be a list of texts"),
        ({"h2h": 1}, "unknown: h2h"),
    ],
)
def test_description_that_no_machine_has_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Hardware.from_dict(_described(**changes), "box.json")


def test_missing_key_is_named():
    values = _described()
    del values["duplex"], values["cores"]
    with pytest.raises(ConfigError, match="box.json.*missing: cores, duplex"):
        Hardware.from_dict(values, "box.json")


def test_disk_and_notes_may_be_missing():
    values = {key: value for key, value in _described().items() if not key.startswith(("disk", "notes"))}
    machine = Hardware.from_dict(values)
    assert machine.disk_bytes is None and machine.notes == ()


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_file_that_is_no_description_is_refused(tmp_path, content):
    path = tmp_path / "box.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="box.json"):
        named_hardware(path)


def test_names_and_files(tmp_path):
    machine = dataclasses.replace(PRESETS["h200"], name="mine", notes=("hot",))
    path = tmp_path / "box.json"
    path.write_text(json.dumps(machine.as_dict()))
    assert named_hardware(path) == named_hardware(str(path)) == machine
    assert named_hardware("h200") is PRESETS["h200"]
    with pytest.raises(ConfigError, match="did you mean 'h200'.*JSON file"):
        named_hardware("h20")
    with pytest.raises(ConfigError, match="cannot read .*nowhere.json"):
        named_hardware("nowhere.json")


# --- what is kept ------------------------------------------------------------------------------------------------


@pytest.fixture
def measured():
    """A measurement that cannot be mistaken for an estimate of this machine."""
    return dataclasses.replace(PRESETS["h200"], name="kept", source="measured", gpu=None, h2d=123.0)


def test_measurement_is_kept_and_found(measured, cache):
    assert cached_hardware(CPU) is None
    path = cache_hardware(measured, CPU)
    assert list(cache.iterdir()) == [path]
    found = cached_hardware(CPU)
    assert (found.name, found.h2d) == ("kept", 123.0)
    chosen = hardware_of_this_machine("cpu")
    assert (chosen.name, chosen.h2d, chosen.source) == ("kept", 123.0, "measured")
    assert found.ram_bytes <= hardware_module.total_ram_bytes()  # what is free now, not what was


def test_disk_counts_only_on_the_same_file_system(measured, disk):
    cache_hardware(measured, CPU, disk)
    assert cached_hardware(CPU).disk_read is None
    same = cached_hardware(CPU, disk.parent)
    assert same.disk_read == measured.disk_read and same.disk_bytes != measured.disk_bytes
    assert cached_hardware(CPU, "/proc").disk_read is None
    assert cached_hardware(CPU, disk / "missing").disk_read is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"null", b'{"machine": 1}', b"[" * 100_000],
    ids=["empty", "cut off", "no text", "list", "null", "other keys", "deep"],
)
def test_cache_that_cannot_be_read_is_ignored(content, measured):
    path = cache_hardware(measured, CPU)
    path.write_bytes(content)
    assert cached_hardware(CPU) is None
    assert hardware_of_this_machine("cpu").source == "estimated"
    cache_hardware(measured, CPU)
    assert cached_hardware(CPU).name == "kept"


def test_cache_with_an_impossible_rate_is_ignored(measured):
    path = cache_hardware(measured, CPU)
    kept = json.loads(path.read_text())
    kept["hardware"]["h2d"] = -1
    path.write_text(json.dumps(kept))
    assert cached_hardware(CPU) is None


@pytest.mark.parametrize(
    ("function", "value"), [("usable_cores", 999), ("total_ram_bytes", 3 * 2**40), ("available_ram_bytes", 7)]
)
def test_measurement_of_another_machine_is_not_taken(measured, monkeypatch, function, value):
    path = cache_hardware(measured, CPU)
    monkeypatch.setattr(hardware_module, function, lambda: value)
    if function == "available_ram_bytes":  # free memory changes; the machine does not
        assert cached_hardware(CPU).ram_bytes == 7
        return
    assert cached_hardware(CPU) is None
    # Nor if the file was copied to where this machine looks.
    other = cache_path(CPU)
    assert other != path
    other.write_bytes(path.read_bytes())
    assert cached_hardware(CPU) is None


def test_home_that_cannot_be_written_fails_nothing(measured, tmp_path, monkeypatch):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert cache_hardware(measured, CPU) is None
    assert cached_hardware(CPU) is None
    # No home at all: nothing may appear under the working directory instead.
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(hardware_module.os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert cache_hardware(measured, CPU) is None
    assert not (tmp_path / "~").exists() and not (tmp_path / "relative").exists()


def test_nothing_is_left_when_the_disk_fills_up(measured, cache, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hardware_module.os, "replace", fail)
    assert cache_hardware(measured, CPU) is None
    assert list(cache.iterdir()) == []


def test_estimate_is_made_without_measuring(monkeypatch):
    monkeypatch.setattr(probe_module, "_measure", lambda *_: pytest.fail("it measured"))
    machine = hardware_of_this_machine("cpu")
    assert machine.source == "estimated" and machine.gpu is None
    assert machine.cores == probe_module.default_threads()
    assert "slideformer probe" in machine.advice
