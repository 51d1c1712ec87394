"""A race detector for the engine on the CPU: what is ordered by nothing but speed is found, however fast it was.

The model. Every host thread has a vector clock, and so has every stream: *compute*, to which the training thread gives
its work, those of the lanes *h2d* and *d2h*, and the one on which a checkpoint is read (*saving*). Work that is given
to a stream comes after everything that the thread which gives it knows of, and after the events that the stream has
waited for; the thread does not know when it is done. So work of the compute stream comes before work of a lane only by
way of an event that was recorded there and waited for here, and not because the thread submitted one after it had
issued the other: on the CPU it was over by then, on a GPU it is not.

What carries clocks from one to the other, and nothing else does:

* queues, and a worker's list of jobs: from who submits to who takes;
* handles: `complete` and `fail` publish the thread's clock, `wait_issued` and a true `is_complete` take it over;
* events: made with the clock of the stream, taken over by the thread (`synchronize`, a true `query`) or by the stream
  that waits;
* `.item()` and `.tolist()`, and copies between host and device that are not `non_blocking`: the thread waits for what
  it has given to its stream;
* a free staging buffer: from who gives it back to who takes it.

Memory, the bytes of files included. Accesses are seen through a dispatch mode in every thread, and those of C kernels
and of system calls where they are called. Host buffers and mapped files are host memory. Device memory is what was
allocated with a device named, or by an operation on device memory. An operation of the training thread that touches
device memory is the compute stream's, any other its own. A write must come after all earlier accesses of these bytes, a
read after the last write. What is freed goes back to the compute stream, as with CUDA's caching allocator, so that
accesses by others must come before what that stream does next; what is allocated counts as written by the compute
stream, since others may have used it there a moment ago.

A copy of weights that is made ahead, on its way from the disk or RAM to the device, may be torn where somebody writes
to them meanwhile. That is right as long as nobody reads it: who writes to weights makes the engine fetch them anew. So
it is a race when the copy is read.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import threading
import traceback
import types
import weakref
from _queue import SimpleQueue
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_slideformer.engine.state import gradients, snapshot
from hf_slideformer.memory import (
    buffers,
    pool,
    staging,
    streams,
    transfer,
    worker,
)
from hf_slideformer.memory.disk import desks, files, store
from hf_slideformer.optim import state

COMPUTE = "compute"
_STREAMS_OF_LANES = ("h2d", "d2h")

Clock = dict[str, int]


def _join(clock: Clock, other: Clock) -> None:
    for actor, tick in other.items():
        if clock.get(actor, 0) < tick:
            clock[actor] = tick


class _Cell:
    """Bytes that were always accessed together: the last write, and the reads since, by actor."""

    __slots__ = ("end", "reads", "write")

    def __init__(self, end: int, write: tuple | None = None, reads: dict | None = None) -> None:
        self.end, self.write, self.reads = end, write, dict(reads or {})


class _Copy:
    """A copy of weights on their way to the device, and why what it has copied may be torn."""

    __slots__ = ("nbytes", "source", "target", "torn")

    def __init__(self, source: int, target: int, nbytes: int) -> None:
        self.source, self.target, self.nbytes = source, target, nbytes
        self.torn = ""

    def fills(self, start: int, end: int) -> bool:
        """Whether it has written some of these bytes."""
        return self.target < end and start < self.target + self.nbytes


class _Memory:
    """Cells of bytes by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._cells: dict[int, _Cell] = {}

    def cells(self, start: int, end: int) -> list[_Cell]:
        """The cells that cover these bytes exactly; missing ones are made."""
        self._split(start)
        self._split(end)
        found, at = [], start
        index = bisect.bisect_left(self._starts, start)
        while at < end:
            if index < len(self._starts) and self._starts[index] == at:
                cell = self._cells[at]
            else:
                until = min(end, self._starts[index]) if index < len(self._starts) else end
                cell = self._insert(index, at, _Cell(until))
            found.append(cell)
            at, index = cell.end, index + 1
        return found

    def forget(self, start: int, end: int) -> None:
        """These bytes are somebody else's from now on."""
        self._split(start)
        self._split(end)
        first, last = bisect.bisect_left(self._starts, start), bisect.bisect_left(self._starts, end)
        for at in self._starts[first:last]:
            del self._cells[at]
        del self._starts[first:last]

    def _split(self, at: int) -> None:
        index = bisect.bisect_right(self._starts, at) - 1
        if index >= 0 and self._starts[index] < at < self._cells[self._starts[index]].end:
            cell = self._cells[self._starts[index]]
            self._insert(index + 1, at, _Cell(cell.end, cell.write, cell.reads))
            cell.end = at

    def _insert(self, index: int, at: int, cell: _Cell) -> _Cell:
        self._starts.insert(index, at)
        self._cells[at] = cell
        return cell


class HappensBefore:
    """Watches engines that are made and trained, by this thread, while it is active.

    Attributes:
        races: what was ordered by nothing, in words; each pair of operations once.
        accesses: how many were looked at.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.accesses = 0
        self.lock = threading.RLock()
        self._seen: set[str] = set()
        self._memory = _Memory()
        self._host_ranges: list[tuple[int, int]] = []
        # Memory outside of host buffers; which stream has allocated it, if it is the device's.
        self._known: dict[int, tuple[StorageWeakRef, str | None]] = {}
        # What of the compute stream's others have touched, with their epochs.
        self._lent: dict[int, dict[str, tuple[int, str]]] = {}
        # Copies of weights that are there now, oldest first.
        self._copies: list[_Copy] = []
        self._threads: dict[str, Clock] = {}
        self._streams: dict[str, Clock] = {}
        self._local = threading.local()
        self._training = threading.current_thread()

    # -- clocks ----------------------------------------------------------------------------------------------

    def host(self) -> Clock:
        """The clock of the calling thread."""
        thread = threading.current_thread()
        return self._threads.setdefault(f"thread {thread.name} {thread.ident}", {})

    def current(self) -> str | None:
        """The stream to which the calling thread gives work of the device; None in threads that have none."""
        stream = getattr(self._local, "stream", None)
        if stream is None and threading.current_thread() is self._training:
            return COMPUTE
        return stream

    def stream(self, name: str) -> Clock:
        """The clock of a stream."""
        return self._streams.setdefault(name, {})

    def tick(self) -> Clock:
        """One more operation of the calling thread; a copy of its clock."""
        clock = self.host()
        thread = threading.current_thread()
        name = f"thread {thread.name} {thread.ident}"
        clock[name] = clock.get(name, 0) + 1
        return dict(clock)

    def issue(self, name: str) -> Clock:
        """One more operation of a stream, given to it by the calling thread."""
        clock = self.stream(name)
        _join(clock, self.host())
        clock[name] = clock.get(name, 0) + 1
        return clock

    def know(self, clock: Clock | None) -> None:
        """The calling thread has waited for what has this clock."""
        if clock is not None and not self.suppressed:
            with self.lock:
                _join(self.host(), clock)

    def publish(self) -> Clock:
        """What the calling thread knows, for who takes it over."""
        with self.lock:
            return self.tick()

    def wait_on_stream(self, name: str | None, clock: Clock) -> None:
        """The stream waits for what has this clock; without one the thread does."""
        if name is None:
            return self.know(clock)
        with self.lock:
            _join(self.stream(name), clock)
        return None

    def event_clock(self) -> Clock:
        """Of an event that is recorded now."""
        with self.lock:
            name = self.current()
            return self.publish() if name is None else dict(self.issue(name))

    def know_compute(self) -> None:
        """The training thread waits for the compute stream."""
        self.know(dict(self.stream(COMPUTE)))

    @property
    def suppressed(self) -> bool:
        """Whether the calling thread is doing what it does only on the CPU."""
        return getattr(self._local, "suppressed", False)

    @contextlib.contextmanager
    def on_stream(self, name: str | None) -> Iterator[None]:
        """The thread gives its work to this stream."""
        before = getattr(self._local, "stream", None)
        self._local.stream = name
        try:
            yield
        finally:
            self._local.stream = before

    @contextlib.contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What the thread is doing, for messages."""
        before, self._local.label = getattr(self._local, "label", ""), label
        try:
            yield
        finally:
            self._local.label = before

    @contextlib.contextmanager
    def not_looking(self) -> Iterator[None]:
        """What the calling thread does in the block would not be there on a GPU."""
        before = self.suppressed
        self._local.suppressed = True
        try:
            yield
        finally:
            self._local.suppressed = before

    # -- memory ----------------------------------------------------------------------------------------------

    def add_host_memory(self, owner: object, start: int, nbytes: int) -> None:
        """These bytes are host memory for as long as `owner` lives."""
        with self.lock:
            self._memory.forget(start, start + nbytes)
            bisect.insort(self._host_ranges, (start, start + nbytes))
        weakref.finalize(owner, self._drop_host_memory, start, nbytes).atexit = False

    def _drop_host_memory(self, start: int, nbytes: int) -> None:
        with self.lock:
            self._memory.forget(start, start + nbytes)
            self._host_ranges.remove((start, start + nbytes))

    def is_host(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is in a host buffer or a mapped file."""
        index = bisect.bisect_right(self._host_ranges, (tensor.data_ptr(), float("inf"))) - 1
        return index >= 0 and tensor.data_ptr() < self._host_ranges[index][1]

    def is_device(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is in device memory."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known is not None and known[1] is not None and not known[0].expired()

    def allocated(self, tensor: torch.Tensor, *, device: bool) -> None:
        """An operation has made this tensor."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        self._memory.forget(start, start + storage.nbytes())
        self._lent.pop(storage._cdata, None)
        self._known[storage._cdata] = StorageWeakRef(storage), self.current() if device else None

    def _meet(self, tensor: torch.Tensor) -> None:
        """Notice memory that was allocated unseen: there may have been something else before."""
        if not self.is_host(tensor):
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is None or known[0].expired():
                self.allocated(tensor, device=False)

    def access(
        self, tensors: list[torch.Tensor], what: str, *, write: bool, actor: str, clock: Clock
    ) -> None:
        """`actor` reads or writes these tensors at `clock`."""
        label = f"{what} ({getattr(self._local, 'label', '') or actor})"
        for tensor in tensors:
            nbytes = _extent_bytes(tensor)
            if not nbytes:
                continue
            self.bytes_accessed(tensor.data_ptr(), nbytes, label, write=write, actor=actor, clock=clock)
            key = tensor.untyped_storage()._cdata
            if actor != COMPUTE and key in self._known and self._known[key][1] == COMPUTE:
                self._lent.setdefault(key, {})[actor] = (clock[actor], label)

    def bytes_accessed(
        self,
        start: int,
        nbytes: int,
        label: str,
        *,
        write: bool,
        actor: str,
        clock: Clock,
        copy: _Copy | None = None,
    ) -> None:
        """The same of bytes at an address; `copy` is what reads them, if it is one that may be torn."""
        self.accesses += 1
        end, mine = start + nbytes, f"{'write' if write else 'read'} by {actor}: {label}"
        if write:
            self._copies = [one for one in self._copies if not one.fills(start, end)]
        for one in self._copies if not write else ():
            if one.torn and one.fills(start, end):
                self._tear(copy, f"{one.torn} | and then {mine}")
        for cell in self._memory.cells(start, end):
            if cell.write is not None and clock.get(cell.write[0], 0) < cell.write[1]:
                self._tear(copy, f"write by {cell.write[0]}: {cell.write[2]} | {mine}")
            for other, (tick, earlier, by) in cell.reads.items() if write else ():
                if clock.get(other, 0) < tick:
                    self._tear(by, f"read by {other}: {earlier} | {mine}")
            if write:
                cell.write, cell.reads = (actor, clock[actor], label), {}
            else:
                cell.reads[actor] = clock[actor], label, copy

    def copied(self, source: int, target: int, nbytes: int, label: str, *, actor: str, clock: Clock) -> None:
        """Weights are copied, and may be torn until somebody reads what was copied."""
        copy = _Copy(source, target, nbytes)
        self.bytes_accessed(source, nbytes, label, write=False, actor=actor, clock=clock, copy=copy)
        self.bytes_accessed(target, nbytes, label, write=True, actor=actor, clock=clock)
        self._copies.append(copy)

    def _tear(self, copy: _Copy | None, race: str) -> None:
        """What was read was being written, as far as one can tell."""
        if copy is None:
            self._race(race)
            return
        copy.torn = copy.torn or race
        following = self._copies[self._copies.index(copy) + 1 :] if copy in self._copies else ()
        for later in following:
            if not later.torn and copy.fills(later.source, later.source + later.nbytes):
                self._tear(later, race)

    def _race(self, race: str) -> None:
        if race in self._seen:
            return
        self._seen.add(race)
        frames = [
            f
            for f in traceback.extract_stack()
            if "/hf_slideformer/" in f.filename or "/tests/" in f.filename
        ]
        where = " < ".join(f"{f.name}:{f.lineno}" for f in frames[-9:-3][::-1])
        self.races.append(f"{race} | {where}")

    def _check_freed(self, clock: Clock) -> None:
        """Memory that is gone since the last look is the compute stream's, which goes on with this clock."""
        for key in [key for key in self._lent if self._known[key][0].expired()]:
            for actor, (tick, label) in self._lent.pop(key).items():
                if clock.get(actor, 0) < tick:
                    self._race(
                        f"access by {actor}: {label} | its memory is freed, and {COMPUTE} may write there"
                    )
            del self._known[key]

    # -- operations ------------------------------------------------------------------------------------------

    def operation(self, what: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        """The calling thread reads and writes these tensors, or gives that to its stream."""
        if self.suppressed:
            return
        with self.lock:
            for tensor in (*reads, *writes):
                self._meet(tensor)
            name = self.current()
            if name == COMPUTE and not any(self.is_device(tensor) for tensor in (*reads, *writes)):
                name = None
            if name is None:
                clock = self.tick()
                thread = threading.current_thread()
                actor = f"thread {thread.name} {thread.ident}"
            else:
                actor, clock = name, self.issue(name)
                if name == COMPUTE:
                    self._check_freed(clock)
            if name == "h2d" and getattr(self._local, "label", "").startswith("fetch of"):
                (source,), (target,) = reads, writes
                label = f"{what} ({self._local.label})"
                addresses = source.data_ptr(), target.data_ptr()
                self.copied(*addresses, _extent_bytes(target), label, actor=actor, clock=clock)
                return
            self.access(reads, what, write=False, actor=actor, clock=clock)
            self.access(writes, what, write=True, actor=actor, clock=clock)

    def dispatched(self, func, args: tuple, kwargs: dict, result: object) -> None:
        """An operator of torch has run."""
        schema = func._schema
        if schema.returns and all(
            r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
        ):
            return  # a view
        given = list(zip(schema.arguments, args, strict=False))
        given += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
        reads, writes = [], []
        for argument, value in given:
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if written else reads).extend(tensors)
        storages = {tensor.untyped_storage()._cdata for tensor in (*reads, *writes)}
        made = [
            leaf
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in storages
        ]
        with self.lock:
            on_device = kwargs.get("device") is not None or any(self.is_device(t) for t in (*reads, *writes))
            for tensor in made:
                self.allocated(tensor, device=on_device)
            if _reads_no_data(func):
                reads = []
            self.operation(func.name(), reads, [*writes, *made])
            if func is torch.ops.aten._local_scalar_dense.default and self.current() == COMPUTE and on_device:
                self.know_compute()
            if (
                func is torch.ops.aten.copy_.default
                and self.current() == COMPUTE
                and not _non_blocking(args, kwargs)
                and on_device
                and any(self.is_host(tensor) for tensor in (*reads, *writes))
            ):
                self.know_compute()


def _reads_no_data(func) -> bool:
    name = func._schema.name.removeprefix("aten::")
    return name.endswith("_like") or name.startswith("new_")


def _non_blocking(args: tuple, kwargs: dict) -> bool:
    return kwargs.get("non_blocking", args[2] if len(args) > 2 else False)


def _extent_bytes(tensor: torch.Tensor) -> int:
    """From the first byte to the last."""
    if tensor.numel() == 0 or tensor.is_meta:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Mode(TorchDispatchMode):
    """Shows the operators of one thread."""

    def __init__(self, watch: HappensBefore) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self._watch.suppressed:
            self._watch.dispatched(func, args, kwargs or {}, result)
        return result


# -- what carries clocks --------------------------------------------------------------------------------------


def _watched_event(watch: HappensBefore) -> type:
    class Event(streams.CpuEvent):
        __slots__ = ("clock",)

        def __init__(self) -> None:
            self.clock = watch.event_clock()

        def query(self) -> bool:
            watch.know(self.clock)
            return True

        def synchronize(self) -> None:
            watch.know(self.clock)

        def wait(self) -> None:
            watch.wait_on_stream(watch.current(), self.clock)

    return Event


def _watched_queue(watch: HappensBefore) -> type:
    class Queue:
        def __init__(self) -> None:
            self._queue: SimpleQueue = SimpleQueue()

        def put(self, item: object) -> None:
            self._queue.put((watch.publish(), item))

        def get(self) -> object:
            clock, item = self._queue.get()
            watch.know(clock)
            return item

    return Queue


def _watch_streams(watch: HappensBefore, patch: pytest.MonkeyPatch) -> None:
    names: dict[int, str] = {}

    def init_lane(original, self, name, device, delay_s=None):
        original(self, name, device, delay_s)
        if name in _STREAMS_OF_LANES:
            names[id(self._stream)] = name

    def init_held(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        names[id(self._stream)] = "saving"

    def wait(original, self, event):
        watch.wait_on_stream(names.get(id(self)), event.clock)

    patch.setattr(streams, "CpuEvent", _watched_event(watch))
    _wrap(patch, transfer.Lane, "__init__", init_lane)
    _wrap(patch, snapshot.HeldState, "__init__", init_held)
    _wrap(patch, streams.CpuStream, "active", lambda original, self: watch.on_stream(names.get(id(self))))
    _wrap(patch, streams.CpuStream, "wait", wait)


def _watch_handles(watch: HappensBefore, patch: pytest.MonkeyPatch) -> None:
    clocks: dict[transfer.Handle, Clock] = {}

    def publish(original, self, *args):
        clocks.setdefault(self, watch.publish())  # what came first: later calls change nothing
        original(self, *args)

    def wait_issued(original, self):
        try:
            original(self)
        finally:
            watch.know(clocks.get(self))

    was_complete = transfer.Handle.is_complete

    def is_complete(self) -> bool:
        complete = was_complete.fget(self)
        if complete:
            watch.know(clocks.get(self))
        return complete

    _wrap(patch, transfer.Handle, "complete", publish)
    _wrap(patch, transfer.Handle, "fail", publish)
    _wrap(patch, transfer.Handle, "wait_issued", wait_issued)
    patch.setattr(transfer.Handle, "is_complete", property(is_complete))


class _Files:
    """Where the bytes of files are: at the addresses where they are mapped, or at some that no memory has."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[object, int]] = {}

    def address(self, piece: object) -> int:
        """Of the first byte."""
        return self._places.setdefault(id(piece), (piece, 1 << 60 | len(self._places) << 40))[1]

    def mapped(self, piece: object, address: int) -> None:
        """From now on its bytes are memory too."""
        self._places[id(piece)] = piece, address


def _watch_threads(watch: HappensBefore, patch: pytest.MonkeyPatch) -> None:
    submitted: dict[int, tuple[Callable, Clock]] = {}
    given_back: dict[int, Clock] = {}
    begun: dict[int, tuple[object, Clock]] = {}

    def serve(original, self):
        with _Mode(watch):
            original(self)

    def run(original, self, label, *args):
        with watch.labelled(label):
            return original(self, label, *args)

    def submit(original, self, label, work, **kwargs):
        submitted[id(work)] = work, watch.publish()
        return original(self, label, work, **kwargs)

    def take(original, self):
        job = original(self)
        if job is not None:
            watch.know(submitted.pop(id(job.work))[1])
            watch._local.label = job.handle.label
        return job

    def give_back(original, self, buffer):
        given_back[id(buffer)] = watch.publish()
        original(self, buffer)

    def take_staging(original, self):
        buffer = original(self)
        watch.know(given_back.pop(id(buffer), None))
        return buffer

    def begin(original, self):
        chunks = original(self)
        begun[id(self)] = self, watch.publish()
        return chunks

    def move(original, self, chunk):
        watch.know(begun[id(self)][1])
        start, nbytes = watch_address(self._buffer) + chunk.span.start, chunk.span.stop - chunk.span.start
        with watch.lock:
            clock = watch.tick()
            thread = threading.current_thread()
            actor = f"thread {thread.name} {thread.ident}"
            file, label = places.address(chunk.piece) + chunk.offset, self._handle.label
            if self._writing:
                watch.bytes_accessed(start, nbytes, label, write=False, actor=actor, clock=clock)
                watch.bytes_accessed(file, nbytes, label, write=True, actor=actor, clock=clock)
            else:
                watch.copied(file, start, nbytes, label, actor=actor, clock=clock)
            _join(begun[id(self)][1], watch.tick())
        original(self, chunk)

    def end(original, self):
        if id(self) in begun:
            watch.know(begun[id(self)][1])
        original(self)

    addresses: dict[int, tuple[object, int]] = {}
    places = _Files()

    def map_file(original, self):
        mapping = original(self)
        with watch.not_looking():
            places.mapped(self, torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr())
        return mapping

    def watch_address(buffer) -> int:
        if id(buffer) not in addresses:
            with watch.not_looking():
                addresses[id(buffer)] = buffer, buffer.tensor(torch.uint8, 0, 1).data_ptr()
        return addresses[id(buffer)][1]

    queues = types.SimpleNamespace(SimpleQueue=_watched_queue(watch))
    for module in (transfer, desks, store):
        patch.setattr(module, "queue", queues)
    _wrap(patch, transfer.Lane, "_serve", serve)
    _wrap(patch, transfer.Lane, "_run", run)
    _wrap(patch, worker.UpdateWorker, "_serve", serve)
    _wrap(patch, worker.UpdateWorker, "submit", submit)
    _wrap(patch, worker.UpdateWorker, "_take", take)
    _wrap(patch, staging.StagingBuffers, "give_back", give_back)
    _wrap(patch, staging.StagingBuffers, "take", take_staging)
    _wrap(patch, files._Piece, "map", map_file)
    _wrap(patch, store._Request, "begin", begin)
    _wrap(patch, store._Request, "move", move)
    _wrap(patch, store._Request, "_end", end)


# -- what touches memory unseen by torch ----------------------------------------------------------------------


def _watch_memory(watch: HappensBefore, patch: pytest.MonkeyPatch) -> None:
    def init(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        with watch.not_looking():
            start = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        watch.add_host_memory(self._map, start, len(self._map))

    def poison(original, slot):
        with watch.not_looking():
            original(slot)

    _wrap(patch, buffers.HostBuffer, "__init__", init)
    _wrap(patch, buffers.MappedFile, "__init__", init)
    poison_original = pool.SlotPool._poison
    patch.setattr(pool.SlotPool, "_poison", staticmethod(functools.partial(poison, poison_original)))


def _watch_kernels(watch: HappensBefore, patch: pytest.MonkeyPatch) -> None:
    def update(original, self, weight, residual, grad, moments, threads):
        original(self, weight, residual, grad, moments, threads)
        masters = [weight] if residual is None else [weight, residual]
        watch.operation(self.rule.name, [grad], [*masters, *moments.values()])

    def accumulate(original, acc, grad, **kwargs):
        original(acc, grad, **kwargs)
        watch.operation("accumulate_", [acc, grad], [acc])

    def accumulate_squared(original, acc, grad, *, is_first=False, **kwargs):
        result = original(acc, grad, is_first=is_first, **kwargs)
        watch.operation("accumulate_squared_", [grad] if is_first else [acc, grad], [acc])
        return result

    def sum_of_squares(original, x, **kwargs):
        result = original(x, **kwargs)
        watch.operation("sum_of_squares", [x], [])
        return result

    def split(original, fp32, **kwargs):
        halves = original(fp32, **kwargs)
        watch.operation("split_master", [fp32], list(halves))
        return halves

    def join(original, hi, lo, **kwargs):
        result = original(hi, lo, **kwargs)
        watch.operation("join_master", [hi, lo], [result])
        return result

    _wrap(patch, state.UpdateRun, "apply", update)
    _wrap(patch, gradients, "accumulate_", accumulate)
    _wrap(patch, gradients, "accumulate_squared_", accumulate_squared)
    _wrap(patch, gradients, "sum_of_squares", sum_of_squares)
    _wrap(patch, state, "split_master", split)
    _wrap(patch, state, "join_master", join)


def _wrap(patch: pytest.MonkeyPatch, owner: object, name: str, around: Callable) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    patch.setattr(owner, name, wrapped)


@contextlib.contextmanager
def watching() -> Iterator[HappensBefore]:
    """Watch the engines that the calling thread makes and trains in the block, where they must also be closed."""
    watch = HappensBefore()
    with pytest.MonkeyPatch.context() as patch:
        for part in (_watch_streams, _watch_handles, _watch_threads, _watch_memory, _watch_kernels):
            part(watch, patch)
        with _Mode(watch):
            yield watch


@contextlib.contextmanager
def also_watched(watch: HappensBefore) -> Iterator[None]:
    """For another thread of a test: show what it does."""
    with _Mode(watch):
        yield


__all__ = ["HappensBefore", "also_watched", "watching"]
