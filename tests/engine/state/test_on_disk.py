"""Optimizer state on disk gives the bits of state in RAM, and a disk that fails stops training."""

import errno
import functools
import gc
import os
import random
import threading
import time
import weakref

import pytest
import torch

from hf_slideformer import SlideConfig
from hf_slideformer.engine import engine as engine_module
from hf_slideformer.engine.model.batch_shape import BatchShape
from hf_slideformer.errors import (
    DiskError,
    PlanError,
    StateError,
    TransferError,
)
from hf_slideformer.memory.buffers import HostBuffer
from hf_slideformer.memory.disk import calls, desks, store
from tests.engine.loop import (
    all_tensors,
    assert_same_bits,
    assert_same_state,
    batches,
    decide,
    prepare,
    step,
    tiny_llama,
    train,
)

ALL = range(6)
PLACEMENTS = {
    "everything": decide(on_disk=ALL),
    "every other unit": decide(on_disk=(0, 2, 4), disk_buffers=2),
    "the last ones": decide(on_disk=(4, 5)),
    "beside residents": decide(resident=(0, 1), keep=(5,), on_disk=(2, 3, 4, 5), disk_buffers=2),
    "one buffer": decide(on_disk=ALL, disk_buffers=1),
    "all of everything": decide(on_disk=ALL, weights_on_disk=ALL),
    "weights of some": decide(
        resident=(0,), on_disk=(1, 3, 4), weights_on_disk=(1, 4), disk_buffers=2, slots=2
    ),
    "all, activations offloaded": decide(offload=ALL, on_disk=ALL, weights_on_disk=ALL, disk_buffers=1),
    "offloaded activations": decide(offload=ALL, on_disk=ALL, slots=2, outside_state="RAM"),
}


def _prepare(
    tmp_path,
    decisions,
    dtype=torch.bfloat16,
    *,
    device="cpu",
    accumulates=False,
    delays=None,
    seed=0,
    **settings,
):
    shape = None
    if "offload" in decisions.activations:  # inputs have a place on disk only if their size is known
        shape = BatchShape(2, 16, "of the test")
        settings.setdefault("gpu_memory", "1GiB")
    config = SlideConfig(nvme_dir=str(tmp_path), **settings)
    return prepare(
        tiny_llama(dtype, attention_dropout=0.1, seed=seed),
        device=device,
        config=config,
        accumulates=accumulates,
        shape=shape,
        decisions=decisions,
        delays=delays,
    )


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32 masters"])
def test_twenty_steps_from_disk(tmp_path, dtype, states):
    in_ram, state, everything = (
        train(_prepare(tmp_path, decisions, dtype, optimizer_states=states), 20, max_norm=0.5)
        for decisions in (decide(), decide(on_disk=ALL), PLACEMENTS["all, activations offloaded"])
    )
    assert 0 < state.engine.disk_bytes < everything.engine.disk_bytes
    assert everything.engine.host_bytes < in_ram.engine.host_bytes
    assert min(in_ram.norms) > 0.5, "the test must clip"
    assert_same_bits(in_ram, state)
    assert_same_bits(in_ram, everything)


@pytest.fixture(scope="module")
def in_ram(tmp_path_factory):
    """Runs with all state in RAM, made when first asked for."""

    @functools.cache
    def run(micro_batches, steps, update="deferred"):
        return _run(tmp_path_factory.mktemp("disk"), decide(), micro_batches, steps, update)

    return run


def _run(path, decisions, micro_batches, steps, update, delays=None):
    return train(
        _prepare(path, decisions, accumulates=micro_batches > 1, update=update, delays=delays),
        steps,
        micro_batches=micro_batches,
        max_norm=None if update == "overlapped" else 0.5,
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_disk_changes_no_bit(tmp_path, in_ram, placement, micro_batches):
    run = _run(tmp_path, PLACEMENTS[placement], micro_batches, 6, "deferred")
    assert_same_bits(run, in_ram(micro_batches, 6))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_overlapped_updates(tmp_path, in_ram, placement):
    run = _run(tmp_path, PLACEMENTS[placement], 1, 6, "overlapped")
    assert_same_bits(run, in_ram(1, 6, "overlapped"))


@pytest.mark.parametrize("update", ["deferred", "overlapped"])
@pytest.mark.parametrize("placement", ["everything", "every other unit", "one buffer", "all of everything"])
def test_a_slow_disk_changes_no_bit(tmp_path, in_ram, placement, update):
    source = random.Random(0)

    def jitter(_label):
        return source.choice((0.0, 0.002, 0.01))

    delays = dict.fromkeys(("h2d", "d2h", "update", "disk"), jitter)
    run = _run(tmp_path, PLACEMENTS[placement], 1, 6, update, delays)
    assert_same_bits(run, in_ram(1, 6, update))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32 masters"])
@pytest.mark.parametrize("placement", ["everything", "all of everything"])
def test_state_dicts_go_from_disk_to_ram_and_back(tmp_path, dtype, placement):
    on_disk = train(_prepare(tmp_path, PLACEMENTS[placement], dtype), 3, max_norm=0.5)
    saved = on_disk.optimizer.state_dict()
    weights = on_disk.engine.state_dict_as_loaded(on_disk.model) or on_disk.model.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    in_ram = _prepare(tmp_path, decide(), dtype, seed=1)
    back = _prepare(tmp_path, PLACEMENTS["every other unit"], dtype, seed=2)
    for run in (in_ram, back):
        run.model.load_state_dict(weights)
        run.optimizer.load_state_dict(saved)
        assert all_tensors(run.engine).keys() == all_tensors(on_disk.engine).keys()
        for name, tensors in all_tensors(on_disk.engine).items():
            assert_same_state(tensors, all_tensors(run.engine)[name], name)
    torch.manual_seed(0)
    data = batches(2, seed=11)
    for run in (on_disk, in_ram, back):
        run.losses.clear()
        run.norms.clear()
        for tokens in data:
            torch.manual_seed(3)  # dropout
            step(run, [tokens], max_norm=0.5)
        run.engine.synchronize()
    assert_same_bits(on_disk, in_ram)
    assert_same_bits(on_disk, back)


def test_frozen_units_have_nothing_on_disk_but_weights(tmp_path):
    def run(decisions):
        model = tiny_llama()
        for layer in model.model.layers[1:3]:
            for param in layer.parameters():
                param.requires_grad_(False)
        config = SlideConfig(nvme_dir=str(tmp_path))
        return train(prepare(model, config=config, decisions=decisions), 3, max_norm=0.5)

    assert_same_bits(run(decide()), run(PLACEMENTS["all of everything"]))


def test_an_input_on_its_way_to_disk_holds_up_no_update(tmp_path):
    """A frozen unit waits for no update: its input leaves while gradients of other units wait for a staging buffer."""

    def run(decisions, delays=None):
        model = tiny_llama(torch.float32)
        for param in model.model.layers[0].parameters():
            param.requires_grad_(False)
        return train(
            prepare(
                model,
                config=SlideConfig(nvme_dir=str(tmp_path), update="overlapped", gpu_memory="1GiB"),
                shape=BatchShape(2, 16, "of the test"),
                decisions=decisions,
                delays=delays,
            ),
            3,
            max_norm=None,
        )

    tight = decide(offload=ALL, on_disk=ALL, weights_on_disk=ALL, disk_buffers=1, staging_buffers=1)
    slow = {"disk": lambda label: 0.02 if "write" in label else 0.0}
    assert_same_bits(run(decide()), run(tight, slow))


@pytest.mark.parametrize("update", ["deferred", "overlapped"])
def test_weights_are_read_and_loaded_once_updates_have_been_written(tmp_path, update):
    def run(decisions, delays=None):
        found = _prepare(tmp_path, decisions, update=update, delays=delays)
        for tokens in batches(2):
            step(found, [tokens], max_norm=None if update == "overlapped" else 0.5)
        return found

    slow = {"disk": lambda label: 0.02 if "write" in label else 0.0}
    in_ram, on_disk = run(decide()), run(PLACEMENTS["all of everything"], slow)
    read = {name: value.clone() for name, value in on_disk.model.state_dict().items()}
    assert_same_state(read, in_ram.model.state_dict())
    for found in (in_ram, on_disk):
        step(found, batches(1, seed=9), max_norm=None)
        found.model.load_state_dict(read)
    found.engine.close()  # with all that is still to be written
    assert_same_state(on_disk.model.state_dict(), read)


@pytest.mark.parametrize("how", ["copy_", "data"])
def test_writes_from_outside_clear_the_residual_on_disk(tmp_path, how):
    runs = []
    for decisions in (decide(), decide(on_disk=ALL), PLACEMENTS["all of everything"]):
        run = train(_prepare(tmp_path, decisions, torch.float32), 2, max_norm=0.5)
        runs.append(run)
        weight = run.model.model.layers[2].mlp.up_proj.weight
        with torch.no_grad():
            if how == "copy_":
                weight.copy_(torch.full_like(weight, 0.25))
            else:
                weight.data.copy_(torch.full_like(weight, 0.25))
                run.engine.weights_changed([weight])
        train(run, 2, max_norm=0.5, seed=3)
    assert_same_bits(*runs[:2])
    assert_same_bits(runs[0], runs[2])


def test_a_second_optimizer_starts_from_zero(tmp_path):
    run = train(_prepare(tmp_path, decide(on_disk=ALL)), 2, max_norm=0.5)
    second = type(run.optimizer)(run.model.parameters(), lr=1e-3)
    run.engine.attach_optimizer(second)
    for entry in second.state_dict()["state"].values():
        assert entry["step"] == 0
        assert not entry["exp_avg"].any() and not entry["exp_avg_sq"].any()


def test_bytes_are_counted_and_nothing_is_left(tmp_path):
    run = train(_prepare(tmp_path, decide(on_disk=(1, 2))), 3, max_norm=0.5)
    layout = run.engine._blueprint.layouts[1]
    state = 10 * layout.state_numel
    assert 2 * state <= run.engine.disk_bytes <= 2 * (state + 3 * 4096)
    assert (
        run.engine.host_bytes
        < train(_prepare(tmp_path, decide()), 1, max_norm=0.5).engine.host_bytes + 2 * state
    )
    totals = run.engine.metrics.totals()
    assert totals["disk_read_bytes"] >= 3 * run.engine.disk_bytes
    assert totals["disk_write_bytes"] >= 3 * run.engine.disk_bytes
    run.engine.close()
    assert os.listdir(tmp_path) == []


class _FailingOps(calls.DiskCalls):
    """Fails the n-th read or write of more than a page (a check of the directory comes first)."""

    def __init__(self, kind, number, error):
        self._kind, self._left, self._error = kind, number, error

    def _maybe_fail(self, kind, view):
        if kind == self._kind and len(view) > 4096:
            self._left -= 1
            if self._left == 0:
                if self._error is None:
                    return 0  # a short transfer
                raise OSError(self._error, os.strerror(self._error))
        return None

    def preadv(self, fd, view, offset):
        failed = self._maybe_fail("read", view)
        return super().preadv(fd, view, offset) if failed is None else failed

    def pwritev(self, fd, view, offset):
        failed = self._maybe_fail("write", view)
        return super().pwritev(fd, view, offset) if failed is None else failed


def _chain(error):
    while error is not None:
        yield error
        error = error.__cause__


def test_a_second_gradient_is_summed_as_in_ram(tmp_path):
    """Nobody said that there would be two backwards a step, so the file has no room for an fp32 sum."""

    def run(decisions):
        found = _prepare(tmp_path, decisions)
        data = batches(6)
        for first, second in zip(data[::2], data[1::2], strict=True):
            step(found, [first, second], max_norm=0.5)
        step(found, [data[0]], max_norm=0.5)  # and back to gradients that wait on disk
        return found

    assert_same_bits(run(decide()), run(PLACEMENTS["all of everything"]))


def test_parameters_that_get_gradients_in_different_backwards(tmp_path):
    def run(decisions):
        found = _prepare(tmp_path, decisions)
        layers = found.model.model.layers
        for tokens in batches(3):
            for layer in layers:
                layer.mlp.forward = torch.nn.functional.silu
            found.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            assert layers[3].mlp.up_proj.weight.grad is None
            assert layers[3].self_attn.q_proj.weight.grad is not None
            for layer in layers:
                layer.mlp.forward = functools.partial(type(layer.mlp).forward, layer.mlp)
            loss = found.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            found.losses.append(loss.item())
            found.norms.append(found.engine.clip_grad_norm_(found.model.parameters(), 0.5).item())
            found.optimizer.step()
            found.optimizer.zero_grad()
        return found

    assert_same_bits(run(decide()), run(PLACEMENTS["all of everything"]))


def test_gradients_on_disk_can_be_edited(tmp_path):
    def run(decisions):
        found = _prepare(tmp_path, decisions)
        for tokens in batches(3):
            loss = found.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            found.losses.append(loss.item())
            with torch.no_grad():
                found.model.model.layers[1].mlp.up_proj.weight.grad.mul_(0.5)
                found.model.model.layers[2].mlp.up_proj.weight.grad[0] = 0.125
            torch.nn.utils.clip_grad_norm_(found.model.parameters(), 0.5)  # torch's own, in place
            found.optimizer.step()
            found.optimizer.zero_grad()
        return found

    assert_same_bits(run(decide()), run(PLACEMENTS["all of everything"]))


def test_inputs_wait_on_disk(tmp_path):
    """Also those of two forwards in a row, of which the second has no place there."""

    def run(decisions):
        found = _prepare(tmp_path, decisions)
        for first, second in zip(batches(3), batches(3, seed=8), strict=True):
            losses = [
                found.model(input_ids=tokens, labels=tokens, use_cache=False).loss
                for tokens in (first, second)
            ]
            for loss in losses:
                loss.backward()
            found.losses.append(sum(loss.item() for loss in losses))
            found.norms.append(found.engine.clip_grad_norm_(found.model.parameters(), 0.5).item())
            found.optimizer.step()
            found.optimizer.zero_grad()
        return found

    on_disk = run(PLACEMENTS["all, activations offloaded"])
    assert_same_bits(run(decide()), on_disk)

    def written(placement):
        found = run(PLACEMENTS[placement])
        found.engine.close()  # with all that is still to be written
        return found.engine.metrics.totals()["disk_write_bytes"]

    inputs = 3 * 6 * 4096  # in each of three steps one page of each unit; the second forward finds no place
    assert written("all, activations offloaded") - written("all of everything") == inputs


@pytest.mark.parametrize("update", ["deferred", "overlapped"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, None])
@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_failing_disk_ends_training_with_its_name(tmp_path, monkeypatch, kind, error, update):
    ops = _FailingOps(kind, 6 + 3 * 6 + 4, error)  # six to set up, then the fourth unit of the fourth step
    monkeypatch.setattr(store, "DiskCalls", lambda: ops)
    run = _prepare(tmp_path, decide(on_disk=ALL), update=update)
    data = batches(8)

    def steps():
        for tokens in data:
            step(run, [tokens], max_norm=None if update == "overlapped" else 0.5)
        run.engine.synchronize()

    with pytest.raises((StateError, TransferError)) as caught:
        steps()
    _assert_ended(run, caught.value, tmp_path, error)
    assert 3 <= len(run.losses) <= 5, "found at the next wait, not at the end"


def _assert_ended(run, raised, path, number):
    cause = next(error for error in _chain(raised) if isinstance(error, DiskError))
    assert cause.errno == number and "unit-0000" in str(cause) and str(path) in str(cause)
    with pytest.raises(StateError, match="resume from the last checkpoint"):
        run.optimizer.step()
    with pytest.raises((StateError, TransferError)):
        step(run, batches(1), max_norm=None)
    run.engine.close()
    assert os.listdir(path) == []


@pytest.mark.parametrize("update", ["deferred", "overlapped"])
@pytest.mark.parametrize("number", [20, 25, 31, 38])
@pytest.mark.parametrize("kind", ["read", "write"])
def test_whatever_fails_of_what_is_on_disk_ends_training(tmp_path, monkeypatch, kind, number, update):
    """Fetches of weights, inputs, gradients and updates take turns, so that these numbers meet all of them."""
    ops = _FailingOps(kind, number, errno.EIO)
    monkeypatch.setattr(store, "DiskCalls", lambda: ops)
    run = _prepare(tmp_path, PLACEMENTS["all, activations offloaded"], update=update)

    def steps():
        for tokens in batches(6):
            step(run, [tokens], max_norm=None if update == "overlapped" else 0.5)
        run.engine.synchronize()

    with pytest.raises((StateError, TransferError)) as caught:
        steps()
    _assert_ended(run, caught.value, tmp_path, errno.EIO)


def test_too_little_space_is_refused_before_the_start(tmp_path, monkeypatch):
    class Full(calls.DiskCalls):
        def free_bytes(self, path):
            return 100_000

    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(store, "DiskCalls", Full)
    with pytest.raises((DiskError, PlanError), match="100000|0.10 MiB|97.7 KiB|0.00 GiB"):
        prepare(model, config=SlideConfig(nvme_dir=str(tmp_path)), decisions=decide(on_disk=ALL))
    assert_same_state(model.state_dict(), before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("read", ["optimizer", "model"])
def test_a_residual_that_was_cleared_stays_cleared_when_only_read(tmp_path, read):
    runs = []
    for decisions in (decide(), decide(on_disk=ALL)):
        run = train(_prepare(tmp_path, decisions, torch.float32), 3, max_norm=0.5)
        with torch.no_grad():
            weight = run.model.model.layers[2].mlp.up_proj.weight
            weight.copy_(torch.full_like(weight, 0.25))
        run.optimizer.state_dict() if read == "optimizer" else run.engine.state_dict_as_loaded(run.model)
        residual = all_tensors(run.engine)["model.layers.2.mlp.up_proj.weight"]["residual"]
        assert not residual.any()
        runs.append(train(run, 2, max_norm=0.5, seed=3))
    assert_same_bits(*runs)


@pytest.mark.parametrize("decisions", [decide(), decide(on_disk=ALL), PLACEMENTS["all of everything"]])
def test_two_steps_without_a_forward_between_them(tmp_path, decisions):
    def run(decisions, delays, *, waits):
        found = _prepare(tmp_path, decisions, delays=delays)
        generator = torch.Generator().manual_seed(1)
        for number in range(3):
            for index, param in enumerate(found.model.parameters()):
                if index % 2 == number % 2:
                    param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            found.optimizer.step()
            found.optimizer.zero_grad()
            if waits:
                found.engine.synchronize()
        found.engine.synchronize()
        return found

    slow = {"update": lambda _: 0.01, "disk": lambda _: 0.002}
    assert_same_bits(run(decisions, slow, waits=False), run(decide(), None, waits=True))


def test_an_engine_that_its_own_thread_collects_ends_its_threads(tmp_path):
    steps, written, dropped = 2, [], threading.Event()
    writes = 1 + steps  # the first one when the model is prepared

    def delay(label):
        if label == f"disk write of unit-{ALL[-1]:05d}":
            written.append(label)
            if len(written) == writes:  # the last one of all waits until nobody else holds the engine
                assert dropped.wait(60)
                gc.collect()
        return 0.0

    def run():
        found = _prepare(tmp_path, decide(on_disk=ALL), delays={"disk": delay})
        for tokens in batches(steps):
            step(found, [tokens], max_norm=0.5)
        found.engine.synchronize()
        return weakref.ref(found.engine)

    before = threading.active_count()
    gc.disable()
    try:
        engine = run()
        dropped.set()
        deadline = time.monotonic() + 60
        while (engine() is not None or threading.active_count() > before) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        gc.enable()
    assert len(written) == writes
    assert engine() is None and threading.active_count() <= before


@pytest.mark.parametrize("failing", ["buffers", "slots"])
def test_memory_that_is_refused_leaves_no_file_and_no_thread(tmp_path, monkeypatch, failing):
    made = []

    def refuse(*args, **kwargs):
        made.append(args)
        if failing == "slots" or len(made) == 5:
            raise PlanError("no memory, for a test")
        return HostBuffer(*args, **kwargs)

    place = (desks, "HostBuffer") if failing == "buffers" else (engine_module, "SlotPool")
    monkeypatch.setattr(*place, refuse)
    before = threading.active_count()
    with pytest.raises(PlanError, match="for a test"):
        # A model that was moved keeps the files that its weights are in.
        _prepare(tmp_path, PLACEMENTS["all of everything" if failing == "buffers" else "everything"])
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert threading.active_count() <= before
    assert not any("(deleted)" in os.readlink(f"/proc/self/fd/{fd}") for fd in _open_files(tmp_path))


@pytest.mark.parametrize("failing", ["create", "read"])
def test_a_constructor_that_fails_leaves_no_file_and_no_thread(tmp_path, monkeypatch, failing):
    class Failing(calls.DiskCalls):
        calls = 0

        def fallocate(self, fd, nbytes):
            self.calls += failing == "create"
            if self.calls == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().fallocate(fd, nbytes)

        def preadv(self, fd, view, offset):
            self.calls += failing == "read" and len(view) > 4096
            if self.calls == 4:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().preadv(fd, view, offset)

    ops = Failing()
    monkeypatch.setattr(store, "DiskCalls", lambda: ops)
    before = threading.active_count()
    with pytest.raises((DiskError, TransferError)):  # the traceback is held meanwhile
        _prepare(tmp_path, decide(on_disk=ALL))
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before
    assert not any("(deleted)" in os.readlink(f"/proc/self/fd/{fd}") for fd in _open_files(tmp_path))


def _open_files(path):
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith(str(path)):
                yield fd
        except OSError:  # the listing's own
            continue


@pytest.mark.parametrize(
    "decisions", [decide(on_disk=(1,), disk_buffers=0), decide(resident=(0, 1), on_disk=(1, 2))]
)
def test_decisions_that_cannot_be_followed_are_refused(tmp_path, decisions):
    with pytest.raises(PlanError, match="on disk with"):
        _prepare(tmp_path, decisions)


def test_one_block_at_a_time(tmp_path):
    engine = _prepare(tmp_path, decide(on_disk=ALL, disk_buffers=1)).engine
    first, second, *_ = engine.states_by_unit()
    with (
        engine.state_in_memory(first),
        pytest.raises(StateError, match="inside of state_in_memory"),
        engine.state_in_memory(second),
    ):
        pass
    with engine.state_in_memory(second):
        assert second[0].moments["exp_avg"].shape == second[0].spec.shape
    assert second[0].moments == {}


@pytest.mark.gpu
@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("update", ["deferred", "overlapped"])
@pytest.mark.parametrize(
    "placement", ["everything", "beside residents", "offloaded activations", "all, activations offloaded"]
)
def test_disk_changes_no_bit_on_gpu(tmp_path, deterministic, placement, update, states):
    runs = [
        train(
            _prepare(
                tmp_path, decisions, torch.float32, device="cuda", update=update, optimizer_states=states
            ),
            20,
            max_norm=None if update == "overlapped" else 0.5,
        )
        for decisions in (decide(), PLACEMENTS[placement])
    ]
    assert runs[1].engine.disk_bytes > 0
    assert_same_bits(*runs)
