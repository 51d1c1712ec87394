"""State on disk: contents, striping, order, faults with their numbers, and nothing left behind."""

import collections
import contextlib
import errno
import gc
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch

from hf_slideformer.errors import (
    ConfigError,
    DiskError,
    SlideFormerError,
    StateError,
    TransferError,
)
from hf_slideformer.memory.buffers import HostBuffer, MappedFile
from hf_slideformer.memory.disk.calls import free_bytes
from hf_slideformer.memory.disk.files import check_directory
from hf_slideformer.memory.disk.store import DiskStore
from hf_slideformer.memory.transfer import Handle
from hf_slideformer.metrics import Metrics

from .faulty import FaultyOps

PAGE = 4096
MIB = 2**20
# Set before anything moves, so that a missing wait shows and a hang ends.
TIMEOUT_S = 20


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def ops():
    return FaultyOps()


@pytest.fixture
def make_store(tmp_path, metrics, ops):
    """Stores over `directories` fresh directories; whether they take O_DIRECT is up to the machine, unless cached."""
    with contextlib.ExitStack() as stack:

        def make(directories=1, *, cached=False, **options):
            paths = [tmp_path / f"disk{i}" for i in range(directories)]
            for path in paths:
                path.mkdir(exist_ok=True)
            if cached:
                ops.fail("set_direct", errno.EINVAL)
            with quiet():
                store = DiskStore(paths, metrics=metrics, calls=ops, **options)
            stack.callback(store.close)
            return store

        yield make


@pytest.fixture
def make_gate(make_store):
    """Handles to wait for, completed before the stores close, so that a test that fails does not hang."""
    gates = []

    def make():
        gates.append(Handle("update"))
        return gates[-1]

    yield make
    for gate in gates:
        gate.complete()


@contextlib.contextmanager
def quiet():
    """Without the warning of a file system that refuses O_DIRECT."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*O_DIRECT", category=RuntimeWarning)
        yield


def filled(nbytes, seed):
    buffer = HostBuffer(nbytes)
    generator = torch.Generator().manual_seed(seed)
    content(buffer).copy_(torch.randint(0, 256, (buffer.nbytes,), dtype=torch.uint8, generator=generator))
    return buffer


def content(buffer, nbytes=None):
    return buffer.tensor(torch.uint8, 0, buffer.nbytes if nbytes is None else nbytes)


def takes_direct(path):
    with quiet():
        return check_directory(path)


def wait(handle):
    """`wait_host` that a lost handle cannot make hang."""
    end = time.monotonic() + TIMEOUT_S
    while not handle.is_complete:
        assert time.monotonic() < end, f"{handle.label} did not end"
        time.sleep(0.001)
    handle.wait_host()


def disk_error(handle):
    with pytest.raises(TransferError, match=re.escape(handle.label)) as caught:
        wait(handle)
    error = caught.value.__cause__
    assert isinstance(error, DiskError)
    assert str(error) in str(caught.value)
    return error


def eventually(condition):
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# --- contents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, 3 * MIB + 17, 21 * MIB + PAGE])
def test_round_trip(make_store, metrics, nbytes, cached):
    store = make_store(cached=cached)
    file = store.create("layer 0", nbytes)
    assert file.nbytes == -(-nbytes // PAGE) * PAGE
    source, target = filled(nbytes, 1), HostBuffer(nbytes)
    wait(store.read(file, target, after=store.write(file, source)))
    assert torch.equal(content(target, file.nbytes), content(source, file.nbytes))
    totals = metrics.totals()
    assert totals["disk_write_bytes"] == totals["disk_read_bytes"] == file.nbytes
    assert totals["disk_write_s"] > 0 and totals["disk_read_s"] > 0


def test_an_empty_state_still_has_a_page(make_store):
    store = make_store()
    file = store.create("no moments", 0)
    assert file.nbytes == PAGE
    wait(store.write(file, HostBuffer(0)))


@pytest.mark.parametrize("directories", [1, 3])
@pytest.mark.parametrize("reserved", [True, False])
def test_zeros_before_the_first_write(make_store, ops, directories, reserved):
    if not reserved:
        ops.fail("fallocate", errno.EOPNOTSUPP)
    store = make_store(directories, chunk_bytes=64 * 1024)
    file = store.create("moments", MIB + 5)
    target = filled(MIB + 5, 2)
    wait(store.read(file, target))
    assert not content(target, file.nbytes).any()


def test_bytes_past_the_end_of_a_buffer_stay(make_store):
    store = make_store()
    file = store.create("small", PAGE)
    buffer = filled(3 * PAGE, 3)
    rest = content(buffer)[PAGE:].clone()
    wait(store.read(file, buffer))
    assert not content(buffer, PAGE).any()
    assert torch.equal(content(buffer)[PAGE:], rest)


def test_space_is_reserved_and_given_back(make_store, ops):
    store = make_store(2, chunk_bytes=MIB)
    file = store.create("moments", 9 * MIB)
    fds = sorted(ops.open_files)
    assert sorted(os.fstat(fd).st_size for fd in fds) == [4 * MIB, 5 * MIB]
    assert sum(os.fstat(fd).st_blocks * 512 for fd in fds) >= 9 * MIB
    assert {os.fstat(fd).st_nlink for fd in fds} == {0}
    file.close()
    file.close()
    assert not ops.open_files
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_file_that_is_let_go_of_gives_its_space_back(make_store, ops):
    store = make_store()
    file = store.create("moments", MIB)
    assert len(ops.open_files) == 1
    del file
    gc.collect()
    assert not ops.open_files


@pytest.mark.parametrize("directories", [2, 3])
@pytest.mark.parametrize("chunks", [1, 2, 5, 6])
def test_striping(make_store, ops, directories, chunks):
    chunk = 2 * PAGE
    store = make_store(directories, chunk_bytes=chunk)
    nbytes = chunks * chunk - 100  # the last chunk is not whole
    files = [store.create(f"layer {i}", nbytes) for i in range(4)]
    sources = [filled(nbytes, i) for i in range(4)]
    writes = [store.write(file, source) for file, source in zip(files, sources, strict=True)]
    targets = [HostBuffer(nbytes) for _ in files]
    for file, target, write, source in zip(files, targets, writes, sources, strict=True):
        wait(store.read(file, target, after=write))
        assert torch.equal(content(target, nbytes), content(source, nbytes))
    # A descriptor for each directory that has a part, sizes differing by at most a chunk.
    assert len(ops.open_files) == 4 * min(chunks, directories)
    sizes = [os.fstat(fd).st_size for fd in ops.open_files]
    assert sum(sizes) == 4 * files[0].nbytes
    assert max(sizes) - min(sizes) <= chunk


def test_stripes_lie_where_they_should(make_store, tmp_path, ops):
    chunk = PAGE
    store = make_store(2, chunk_bytes=chunk)
    source = filled(5 * PAGE, 9)
    places = {}
    for name in ("first", "second"):  # the second file begins in the other directory
        before = set(ops.open_files)
        file = store.create(name, 5 * PAGE)
        wait(store.write(file, source))
        for fd in ops.open_files - before:
            directory = os.path.basename(os.path.dirname(os.readlink(f"/proc/self/fd/{fd}")))
            size = os.fstat(fd).st_size
            page = HostBuffer(size)
            assert os.preadv(fd, [content(page).numpy().data[:size]], 0) == size
            places[name, directory] = content(page, size).clone()
        places[name] = file
    pages = content(source).view(-1, PAGE)
    assert torch.equal(places["first", "disk0"], pages[0::2].reshape(-1))
    assert torch.equal(places["first", "disk1"], pages[1::2].reshape(-1))
    assert torch.equal(places["second", "disk1"], pages[0::2].reshape(-1))
    assert torch.equal(places["second", "disk0"], pages[1::2].reshape(-1))


# --- order and concurrency -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_random_interleavings_give_the_right_contents(make_store, seed):
    rng = random.Random(seed)
    delays = random.Random(seed + 100)
    lock = threading.Lock()

    def delay_s(_label):
        with lock:
            return delays.choice((0.0, 0.0, 0.0005, 0.003))

    store = make_store(
        rng.choice((1, 2, 3)), chunk_bytes=2 * PAGE, threads=rng.choice((1, 3)), delay_s=delay_s
    )
    sizes = [rng.choice((1, PAGE, 5 * PAGE - 3, 13 * PAGE)) for _ in range(8)]
    files = [store.create(f"layer {i}", size) for i, size in enumerate(sizes)]
    expected = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    last = [Handle.done() for _ in files]
    reads = []
    for step in range(120):
        i = rng.randrange(len(files))
        if rng.random() < 0.5:
            source = filled(sizes[i], 1000 * seed + step)
            last[i] = store.write(files[i], source, after=last[i])
            expected[i] = content(source, sizes[i]).clone()
        else:
            target = HostBuffer(sizes[i])
            last[i] = store.read(files[i], target, after=last[i])
            reads.append((last[i], target, expected[i]))
    for handle, target, wanted in reads:
        wait(handle)
        assert torch.equal(content(target, len(wanted)), wanted)
    assert len(reads) > 20


def test_a_request_waits_for_what_it_comes_after(make_store, make_gate):
    store = make_store()
    file = store.create("layer 0", PAGE)
    source, target = filled(PAGE, 1), HostBuffer(PAGE)
    update = make_gate()
    write = store.write(file, source, after=update)
    read = store.read(file, target, after=write)
    time.sleep(0.05)
    assert not write.is_complete and not read.is_complete
    content(source).fill_(7)
    update.complete()
    wait(read)
    assert (content(target) == 7).all()


def test_a_read_that_waits_holds_up_no_write_and_the_other_way_round(make_store, make_gate):
    store = make_store(threads=1)
    file, other = store.create("a", PAGE), store.create("b", PAGE)
    gate = make_gate()
    read = store.read(file, HostBuffer(PAGE), after=gate)
    wait(store.write(other, filled(PAGE, 1)))
    assert not read.is_complete
    gate.complete()
    wait(read)
    gate = make_gate()
    write = store.write(file, filled(PAGE, 1), after=gate)
    wait(store.read(other, HostBuffer(PAGE)))
    assert not write.is_complete
    gate.complete()
    wait(write)


def test_requests_begin_in_order_of_submission(make_store, make_gate):
    seen = []
    store = make_store(threads=1, delay_s=lambda label: seen.append(label) or 0.0)
    files = [store.create(f"layer {i}", PAGE) for i in range(5)]
    gate = make_gate()
    handles = [
        store.write(file, HostBuffer(PAGE), after=gate if i == 0 else None) for i, file in enumerate(files)
    ]
    gate.complete()
    for handle in handles:
        wait(handle)
    assert seen == [f"disk write of layer {i}" for i in range(5)]


@pytest.mark.parametrize("requests", [1, 4])
def test_chunks_are_in_flight_together(make_store, ops, requests):
    store = make_store(threads=4, chunk_bytes=PAGE)
    together = threading.Barrier(4)
    ops.before = lambda *_: together.wait(TIMEOUT_S)
    files = [store.create(f"layer {i}", 4 * PAGE // requests) for i in range(requests)]
    for handle in [store.read(file, HostBuffer(4 * PAGE)) for file in files]:
        wait(handle)


def test_a_file_closed_in_use_stays_open_until_its_requests_are_done(make_store, ops, make_gate):
    store = make_store()
    file = store.create("layer 0", PAGE)
    gate = make_gate()
    write = store.write(file, filled(PAGE, 1), after=gate)
    target = filled(PAGE, 2)
    read = store.read(file, target, after=write)
    file.close()
    assert len(ops.open_files) == 1
    gate.complete()
    wait(read)
    assert torch.equal(content(target), content(filled(PAGE, 1)))
    assert not ops.open_files
    with pytest.raises(TransferError, match="closed"):
        store.read(file, target).wait_host()


@pytest.mark.parametrize("failing", [False, True])
def test_finished_requests_hold_no_buffers(make_store, failing):
    store = make_store()
    file = store.create("layer 0", PAGE)
    buffer = HostBuffer(PAGE)
    gone = weakref.ref(buffer)
    before = Handle.done()
    if failing:
        before.fail(ValueError("for a test"))
    with pytest.raises(TransferError) if failing else contextlib.nullcontext():
        wait(store.write(file, buffer, after=before))
    del buffer, before

    def freed():
        gc.collect()  # an error's traceback is a cycle
        return gone() is None

    eventually(freed)


def test_spans_and_labels(make_store, metrics):
    metrics.tracing = True
    store = make_store(chunk_bytes=PAGE)
    file = store.create("layer 3", 3 * PAGE)
    wait(store.read(file, HostBuffer(3 * PAGE), after=store.write(file, HostBuffer(3 * PAGE))))
    assert [(span.lane, span.name) for span in metrics.spans] == [
        ("disk", "disk write of layer 3"),
        ("disk", "disk read of layer 3"),
    ]


def test_a_small_buffer_is_refused(make_store):
    store = make_store()
    file = store.create("layer 0", 3 * PAGE)
    with pytest.raises(StateError, match=f"{2 * PAGE} bytes, and {3 * PAGE} are to be moved"):
        store.read(file, HostBuffer(2 * PAGE))


@pytest.mark.parametrize("directories", [1, 2])
@pytest.mark.parametrize("striped", [True, False])
def test_a_span_is_moved_and_nothing_else(make_store, striped, directories):
    store = make_store(chunk_bytes=2 * PAGE, directories=directories)
    file = store.create("layer 0", 9 * PAGE, striped=striped)
    whole, part, back = filled(9 * PAGE, 1), filled(4 * PAGE, 2), HostBuffer(9 * PAGE)
    wait(store.write(file, whole))
    wait(store.write(file, part, span=(3 * PAGE, 4 * PAGE)))
    wait(store.read(file, back))
    expected = content(whole).clone()
    expected[3 * PAGE : 7 * PAGE] = content(part)
    assert torch.equal(content(back), expected)
    target = HostBuffer(2 * PAGE)
    wait(store.read(file, target, span=(6 * PAGE, 2 * PAGE)))
    assert torch.equal(content(target), expected[6 * PAGE : 8 * PAGE])


@pytest.mark.parametrize("span", [(1, PAGE), (0, PAGE + 1), (2 * PAGE, 2 * PAGE)])
def test_a_span_that_is_not_whole_pages_of_the_file_is_refused(make_store, span):
    store = make_store()
    file = store.create("layer 0", 3 * PAGE)
    with pytest.raises(StateError, match="are not whole pages of it"):
        store.read(file, HostBuffer(4 * PAGE), span=span)


@pytest.mark.parametrize("start", [0, PAGE])
def test_a_span_of_no_bytes_is_done_at_once(make_store, start):
    store = make_store()
    file = store.create("layer 0", 2 * PAGE)
    buffer = filled(PAGE, 1)
    before = content(buffer).clone()
    wait(store.write(file, buffer, span=(start, 0)))
    wait(store.read(file, buffer, span=(start, 0)))
    assert torch.equal(content(buffer), before)


def test_files_in_one_piece_are_spread_over_the_directories(make_store, ops):
    store = make_store(2)
    striped, whole, held = [], [], collections.Counter()
    for i in range(6):  # in turns, as where the weights of every other unit are on disk
        striped.append(store.create(f"striped {i}", 2 * PAGE))
        before = set(ops.open_files)
        whole.append(store.create(f"whole {i}", (1 + i % 3) * MIB, striped=False))
        (fd,) = ops.open_files - before
        held[os.path.dirname(os.readlink(f"/proc/self/fd/{fd}"))] += whole[-1].nbytes
    assert len(held) == 2 and max(held.values()) - min(held.values()) <= 3 * MIB


def test_a_file_system_that_does_not_map_is_named(make_store, ops):
    store = make_store()
    file = store.create("layer 0", PAGE, striped=False)
    ops.fail("map", errno.ENODEV)
    with pytest.raises(DiskError, match=r"layer 0: mapping 4096 bytes failed.*ENODEV.*local disk") as caught:
        file.map()
    assert caught.value.errno == errno.ENODEV


def test_memory_and_disk_agree(make_store):
    """What is written through the mapping is read from disk, and the other way round."""
    store = make_store(chunk_bytes=PAGE)
    file = store.create("layer 0", 3 * PAGE, striped=False)
    mapping = MappedFile(file.map())
    wait(store.write(file, filled(3 * PAGE, 1)))
    assert torch.equal(mapping.tensor(torch.uint8, 0, 3 * PAGE), content(filled(3 * PAGE, 1)))
    mapping.tensor(torch.uint8, PAGE, PAGE).fill_(7)
    back = HostBuffer(3 * PAGE)
    wait(store.read(file, back))
    assert (content(back)[PAGE : 2 * PAGE] == 7).all()
    wait(store.write(file, filled(PAGE, 3), span=(PAGE, PAGE)))
    assert torch.equal(mapping.tensor(torch.uint8, PAGE, PAGE), content(filled(PAGE, 3)))


def test_a_striped_file_cannot_be_mapped(make_store):
    store = make_store(chunk_bytes=PAGE, directories=2)
    with pytest.raises(StateError, match="layer 0 is striped, and cannot be mapped"):
        store.create("layer 0", 3 * PAGE).map()


# --- close -----------------------------------------------------------------------------------------------------------


def disk_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("slideformer-disk")}


def test_close_finishes_what_runs_and_ends_everything(make_store, ops):
    before = disk_threads()
    store = make_store(2, chunk_bytes=PAGE, delay_s=lambda _: 0.005)
    assert len(disk_threads() - before) == 16
    file = store.create("layer 0", 8 * PAGE)
    target = HostBuffer(8 * PAGE)
    source = filled(8 * PAGE, 1)
    read = store.read(file, target, after=store.write(file, source))
    store.close()
    assert read.is_complete
    read.wait_host()
    assert torch.equal(content(target), content(source))
    assert disk_threads() <= before
    assert not ops.open_files
    store.close()
    with pytest.raises(TransferError, match="closed"):
        store.read(file, target).wait_host()
    with pytest.raises(StateError, match="closed"):
        store.create("another", PAGE)


def test_a_store_that_is_let_go_of_ends_its_threads(tmp_path, metrics):
    before = disk_threads()
    with quiet():
        store = DiskStore([tmp_path], metrics=metrics)
    file = store.create("layer 0", PAGE)
    write = store.write(file, filled(PAGE, 1))
    del store, file
    gc.collect()
    wait(write)
    eventually(lambda: disk_threads() <= before)


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore", RuntimeWarning)
from hf_slideformer.memory.disk.store import DiskStore
from hf_slideformer.memory.buffers import HostBuffer, MappedFile
from hf_slideformer.memory.transfer import Handle
from hf_slideformer.metrics import Metrics

store = DiskStore(sys.argv[1:], metrics=Metrics(), delay_s=lambda _: 0.01)
files = [store.create(f"layer {i}", 9 * 2**20) for i in range(3)]
buffer = HostBuffer(9 * 2**20)
store.write(files[0], buffer).wait_host()
"""


def start(script, *directories):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + script, *map(str, directories)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_processes_leave_nothing(tmp_path):
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        directory.mkdir()
    endless = "print('ready', flush=True)\nwhile True: store.write(files[1], buffer).wait_host()"
    process = start(endless, *directories)
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        # Without a name already: the kernel frees such a file with its last descriptor, however a process ends.
        links = []
        for fd in os.listdir(f"/proc/{process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{process.pid}/fd/{fd}").startswith(str(tmp_path)):
                    links.append(os.stat(f"/proc/{process.pid}/fd/{fd}").st_nlink)
        assert links == [0] * 6
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [list(directory.iterdir()) for directory in directories] == [[], []]


def test_a_process_may_end_while_requests_run_or_wait_for_ever(tmp_path):
    script = "store.read(files[1], buffer)\nstore.write(files[2], buffer, after=Handle('never'))"
    process = start(script, tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# --- faults ----------------------------------------------------------------------------------------------------------


def test_no_directory(metrics):
    with pytest.raises(ConfigError, match="nvme_dir"):
        DiskStore([], metrics=metrics)


def test_a_missing_directory(tmp_path, metrics):
    missing = tmp_path / "gone"
    with pytest.raises(DiskError, match=rf"{missing}: .*\(ENOENT\); create the directory") as caught:
        DiskStore([tmp_path, missing], metrics=metrics)
    assert caught.value.errno == errno.ENOENT and caught.value.filename == str(missing)
    with pytest.raises(DiskError, match="ENOENT"):
        free_bytes([missing])


def test_a_file_for_a_directory(tmp_path, metrics):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(DiskError, match=rf"{path}: .*\(ENOTDIR\); name a directory"):
        DiskStore([path], metrics=metrics)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "mount it writable"),
        (errno.EACCES, "allow this user to write"),
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "raise the quota"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "check the disk"),
    ],
)
def test_a_directory_that_takes_no_files(tmp_path, metrics, ops, number, remedy):
    ops.fail("open", number)
    pattern = rf"{tmp_path}: .*\({errno.errorcode[number]}\); .*{remedy}"
    with pytest.raises(DiskError, match=pattern) as caught:
        DiskStore([tmp_path], metrics=metrics, calls=ops)
    assert caught.value.errno == number
    assert isinstance(caught.value, OSError) and isinstance(caught.value, SlideFormerError)


def test_a_directory_that_is_gone_later(make_store, tmp_path):
    store = make_store()
    (tmp_path / "disk0").rmdir()
    with pytest.raises(DiskError, match=r"making a file for layer 0 failed: .*\(ENOENT\)"):
        store.create("layer 0", PAGE)


def test_a_full_disk_at_create_leaves_nothing(make_store, tmp_path, ops):
    store = make_store(3, chunk_bytes=PAGE)
    ops.fail("fallocate", errno.ENOSPC, skip=2)
    ops.free(123 * PAGE)
    pattern = (
        rf"layer 0: reserving {2 * PAGE} bytes failed with {123 * PAGE} bytes free in .*ENOSPC\); free some"
    )
    with pytest.raises(DiskError, match=pattern) as caught:
        store.create("layer 0", 6 * PAGE)
    error = caught.value
    assert (error.errno, error.wanted, error.got) == (errno.ENOSPC, 2 * PAGE, 123 * PAGE)
    assert error.filename == str(tmp_path / "disk2" / "layer 0")
    assert not ops.open_files
    ops.heal()
    assert store.create("layer 0", 6 * PAGE).nbytes == 6 * PAGE


@pytest.mark.parametrize("reservable", [True, False])
def test_more_than_is_free_is_refused_even_where_nothing_can_be_reserved(make_store, ops, reservable):
    store = make_store()
    if not reservable:
        ops.fail("fallocate", errno.EOPNOTSUPP)
    with pytest.raises(DiskError, match="ENOSPC") as caught:
        store.create("too much", 2**60)
    assert caught.value.wanted == 2**60 and 0 <= caught.value.got < 2**60
    assert not ops.open_files


@pytest.mark.parametrize(
    ("operation", "number", "remedy"),
    [
        ("pwritev", errno.ENOSPC, "free some space"),
        ("pwritev", errno.EIO, "check the disk"),
        ("preadv", errno.EIO, "check the disk"),
        ("preadv", errno.ENODEV, "check the disk"),
    ],
)
def test_a_transfer_that_fails(make_store, tmp_path, ops, operation, number, remedy):
    store = make_store(chunk_bytes=2 * PAGE, threads=1)
    file = store.create("layer 7", 8 * PAGE)
    ops.fail(operation, number, skip=2, times=1)
    submit = store.write if operation == "pwritev" else store.read
    error = disk_error(submit(file, HostBuffer(8 * PAGE)))
    assert error.errno == number and error.__cause__.errno == number
    assert (error.offset, error.wanted, error.got) == (4 * PAGE, 2 * PAGE, 0)
    assert error.filename == str(tmp_path / "disk0" / "layer 7")
    for part in (
        error.filename,
        f"offset {4 * PAGE}",
        f"{2 * PAGE} bytes",
        "after 0",
        errno.errorcode[number],
        remedy,
    ):
        assert part in str(error)
    wait(submit(file, HostBuffer(8 * PAGE)))  # whether to go on is for others to say


@pytest.mark.parametrize("operation", ["preadv", "pwritev"])
@pytest.mark.parametrize("cached", [False, True])
def test_transfers_in_parts(make_store, tmp_path, ops, operation, cached):
    store = make_store(cached=cached)
    file = store.create("layer 0", 16 * PAGE)
    # Past the page cache a part of a page must be moved again; through it any number of bytes is progress.
    step = 1000 if not takes_direct(tmp_path) or cached else PAGE + 1000
    ops.shorten(operation, step)
    source, target = filled(16 * PAGE, 4), HostBuffer(16 * PAGE)
    wait(store.read(file, target, after=store.write(file, source)))
    assert torch.equal(content(target), content(source))
    assert ops.struck >= 16 * PAGE // step


@pytest.mark.parametrize(("operation", "noun"), [("preadv", "short read"), ("pwritev", "short write")])
def test_a_transfer_that_comes_to_a_halt(make_store, ops, operation, noun):
    store = make_store(chunk_bytes=4 * PAGE)
    file = store.create("layer 0", 4 * PAGE)
    ops.shorten(operation, PAGE, times=3)
    ops.shorten(operation, 0)
    submit = store.write if operation == "pwritev" else store.read
    error = disk_error(submit(file, HostBuffer(4 * PAGE)))
    assert (error.offset, error.wanted, error.got, error.errno) == (0, 4 * PAGE, 3 * PAGE, None)
    assert noun in str(error) and f"ended after {3 * PAGE}" in str(error)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("left", "offset"), [(0, 0), (PAGE, 0), (2 * PAGE + 100, 2 * PAGE), (3 * PAGE + 100, 2 * PAGE)]
)
def test_a_truncated_file(make_store, ops, left, offset, cached):
    store = make_store(cached=cached, chunk_bytes=2 * PAGE, threads=1)
    file = store.create("layer 0", 4 * PAGE)
    (fd,) = ops.open_files
    os.ftruncate(fd, left)
    error = disk_error(store.read(file, HostBuffer(4 * PAGE)))
    assert (error.offset, error.wanted, error.got) == (offset, 2 * PAGE, left - offset)
    assert "short read" in str(error)


@pytest.mark.parametrize("refusing", ["set_direct", "pwritev", "preadv"])
def test_without_direct_access_one_warning_and_the_right_bytes(tmp_path, metrics, ops, refusing):
    if not takes_direct(tmp_path) and refusing != "set_direct":
        pytest.skip("the machine's own file system refuses O_DIRECT")
    other = tmp_path / "other"
    other.mkdir()
    ops.fail(refusing, errno.EINVAL, times=1)  # the first directory only
    with pytest.warns(RuntimeWarning, match="O_DIRECT") as warned:
        store = DiskStore([tmp_path, other], metrics=metrics, calls=ops, chunk_bytes=PAGE)
    assert len(warned) == 1
    assert str(warned[0].message).startswith(f"{tmp_path}")
    assert warned[0].filename == __file__
    try:
        source, target = filled(5 * PAGE, 1), HostBuffer(5 * PAGE)
        file = store.create("layer 0", 5 * PAGE)
        wait(store.read(file, target, after=store.write(file, source)))
        assert torch.equal(content(target), content(source))
    finally:
        store.close()
    assert list(tmp_path.iterdir()) == [other]


def test_a_cached_write_fails_when_its_bytes_do_not_reach_the_disk(make_store, ops):
    store = make_store(cached=True)
    file = store.create("layer 0", 3 * PAGE)
    ops.fail("fdatasync", errno.EIO)
    error = disk_error(store.write(file, HostBuffer(3 * PAGE)))
    assert error.errno == errno.EIO and error.wanted == 3 * PAGE
    wait(store.read(file, HostBuffer(3 * PAGE)))


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR])
def test_without_nameless_files(make_store, tmp_path, ops, number, monkeypatch):
    opened = []
    monkeypatch.setattr(ops, "open", _open_without_tmpfile(ops, number, opened))
    store = make_store(2, chunk_bytes=PAGE)
    file = store.create("layer 0", 3 * PAGE)
    assert len(opened) == 4  # two of them to look at the directories
    assert {os.fstat(fd).st_nlink for fd in opened[-2:]} == {0}
    assert [list((tmp_path / f"disk{i}").iterdir()) for i in range(2)] == [[], []]
    source, target = filled(3 * PAGE, 1), HostBuffer(3 * PAGE)
    wait(store.read(file, target, after=store.write(file, source)))
    assert torch.equal(content(target), content(source))


def _open_without_tmpfile(ops, number, opened):
    real = ops.open

    def opening(path, flags):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        opened.append(real(path, flags))
        return opened[-1]

    return opening


def test_a_failed_request_ends_only_after_all_that_had_begun(make_store, ops):
    store = make_store(chunk_bytes=PAGE, threads=2)
    file = store.create("layer 0", 8 * PAGE)
    begun, failed, going_on = [], threading.Event(), threading.Event()
    both = threading.Barrier(2)

    def before(_operation, offset):
        begun.append(offset)
        both.wait(TIMEOUT_S)
        if offset == 0:
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert going_on.wait(TIMEOUT_S)

    ops.before = before
    read = store.read(file, HostBuffer(8 * PAGE))
    assert failed.wait(TIMEOUT_S)
    time.sleep(0.05)
    assert not read.is_complete  # the other chunk still writes into the buffer
    going_on.set()
    assert disk_error(read).offset == 0
    assert sorted(begun) == [0, PAGE]  # nothing new began


def test_what_comes_after_a_failure_fails_too_and_the_next_does_not(make_store, ops):
    store = make_store(threads=1)
    file, other = store.create("a", PAGE), store.create("b", PAGE)
    ops.fail("pwritev", errno.EIO, times=1)
    read = store.read(file, HostBuffer(PAGE), after=store.write(file, HostBuffer(PAGE)))
    with pytest.raises(TransferError, match="disk read of a failed: disk write of a failed: .*EIO"):
        wait(read)
    wait(store.read(other, HostBuffer(PAGE)))
    file.close()
    other.close()
    assert not ops.open_files


# --- free space ------------------------------------------------------------------------------------------------------


def test_free_bytes_of_directories(tmp_path, monkeypatch, ops):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.mkdir()
    ops.free(1000 * PAGE)
    assert (
        free_bytes(paths[:1], ops) == free_bytes(paths, ops) == 1000 * PAGE
    )  # one disk, whatever the directories
    assert free_bytes([], ops) == 0
    ops.heal()
    # Two disks, "c" on a smaller one: a third of each file goes there.
    monkeypatch.setattr(os, "stat", lambda path: SimpleNamespace(st_dev=path.endswith("c")))
    monkeypatch.setattr(ops, "free_bytes", lambda path: 90 * PAGE if path.endswith("c") else 1000 * PAGE)
    assert free_bytes(paths, ops) == 270 * PAGE


def test_error_without_details():
    error = DiskError("nothing more is known")
    assert str(error) == "nothing more is known"
    assert (error.errno, error.filename, error.offset, error.wanted, error.got) == (None,) * 5
