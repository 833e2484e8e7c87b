"""Measure where the time goes in the processes that read samples, while a monitor is attached.

`Clock` sums it over all processes of a run, in shared memory; `instrument` makes one process add to
it. In DataLoader workers that is done by the worker itself, so the dataset in the training process
stays as it is; with ``num_workers=0`` it is undone when the monitor ends.

Time is measured four ways at once. Of the wall time of a part of the work, the time that the thread
stood in the queue for a core (``/proc/thread-self/schedstat``) is taken off, so that a loaded
machine changes no share. What it slept although it did not wait for a core is waiting: for the
disk, if the kernel counted major page faults or blocks read meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import operator
import os
import resource
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from zarrcache._keys import Role
from zarrcache.data import Read
from zarrcache.stats import SharedFile

__all__ = [
    "PARTS",
    "Clock",
    "InWorker",
    "Part",
    "Parts",
    "Timed",
    "faults",
    "instrument",
]

logger = logging.getLogger(__name__)

#: Parts of the work, without those inside them: `EpochTimes` says what they are.
Part = Literal[
    "hit",
    "checksum",
    "held",
    "miss",
    "bypass",
    "peer",
    "augment",
    "transform",
    "collate",
    "copy",
    "dataset",
    "disk",
    "cores",
]
PARTS: tuple[Part, ...] = get_args(Part)
#: Parts that sleep only for the disk or, in a hit, for the origin.
_OURS = ("hit", "checksum", "augment", "copy")
#: Parts that may also sleep for other reasons than the disk.
_USERS = ("transform", "collate", "dataset")
#: Longest wait of a page fault, seconds. Of pages that are being read ahead the kernel counts only
#: the first, so there are fewer faults than waits.
_FAULT_S = 0.1
#: Also summed: of parts of ours, the time that they slept; faults; wall time of all parts without
#: that in the queue for a core; between them, CPU time of other threads (torch's copies into shared
#: memory, pickling); time in the queue; bytes from a storage device; and when the process began its
#: first part.
_SLEPT = tuple(f"{part} slept" for part in _OURS)
_COLUMNS = (*PARTS, *_SLEPT, "faults", "fetched", "sent", "queued", "disk_bytes", "first")
_SLOT = struct.Struct(f"<{len(_COLUMNS)}q")
_THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)  # macOS has no usage by thread
#: Objects that are looked at for datasets and readers.
_MOST_OBJECTS = 10_000


def faults(who: int = resource.RUSAGE_SELF) -> int:
    """Major page faults and blocks read so far. More of them: something came from a disk."""
    usage = resource.getrusage(who)
    return usage.ru_majflt + usage.ru_inblock


class _Meter(NamedTuple):
    """Readings at one instant, or their differences."""

    wall_ns: int
    cpu_ns: int
    queued_ns: int
    faults: int

    def minus(self, other: _Meter) -> _Meter:
        return _Meter(*map(operator.sub, self, other))

    def plus(self, other: _Meter) -> _Meter:
        return _Meter(*map(operator.add, self, other))


class _Frame:
    """A part that has begun."""

    __slots__ = ("inner", "is_read", "start")

    def __init__(self, start: _Meter, *, is_read: bool) -> None:
        self.start, self.is_read = start, is_read
        self.inner = _Meter(0, 0, 0, 0)


class _Thread:
    """The parts that one thread has begun, from the outermost to the innermost."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        try:
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def __del__(self, close: Any = os.close) -> None:
        if self._fd >= 0:
            close(self._fd)

    def queued_ns(self) -> int:
        return int(os.pread(self._fd, 64, 0).split()[1]) if self._fd >= 0 else 0

    def meter(self) -> _Meter:
        queued_ns = self.queued_ns()
        return _Meter(time.perf_counter_ns(), time.thread_time_ns(), queued_ns, faults(_THREAD))


class Clock:
    """Nanoseconds of each part of the work, summed over the processes that read samples.

    An observer of reads; each process writes a slot of its own in shared memory. Pickles as the
    shared memory.
    """

    def __init__(self) -> None:
        self._file = SharedFile.new("clock-")
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._threads = threading.local()
        self._values = dict.fromkeys(_COLUMNS, 0)
        self._slot: int | None = None
        self._blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        self._idle_since: tuple[int, int] | None = None

    def __getstate__(self) -> SharedFile:
        return self._file

    def __setstate__(self, file: SharedFile) -> None:
        self._file = file
        self._start()

    # -- in the processes that read

    def _thread(self) -> _Thread:
        if self._pid != os.getpid():  # forked
            self._start()
        found: _Thread | None = getattr(self._threads, "it", None)
        if found is None:
            found = self._threads.it = _Thread()
        return found

    def begin(self, *, is_read: bool = False) -> int:
        """Begin a part. Pass the result to :meth:`end`."""
        thread = self._thread()
        frames = thread.frames
        if is_read and frames and frames[-1].is_read:
            frames.pop()  # it raised, and was never finished
        start = thread.meter()
        if not frames:
            with self._lock:
                if not self._values["first"]:
                    self._values["first"] = start.wall_ns
                if self._idle_since is not None:
                    others_ns, queued_ns = self._idle_since
                    self._values["sent"] += max(0, _others_ns() - others_ns)
                    self._values["queued"] += max(0, start.queued_ns - queued_ns)
                    self._idle_since = None
        frames.append(_Frame(start, is_read=is_read))
        return len(frames) - 1

    def end(self, depth: int, part: Part) -> None:
        """End the part that began at ``depth``, and count it as ``part``."""
        thread = self._thread()
        frames = thread.frames
        if depth >= len(frames):  # it began before a fork
            return
        frame = frames[depth]
        now = thread.meter()
        whole = now.minus(frame.start)
        own = whole.minus(frame.inner)
        del frames[depth:]
        if frames:
            frames[-1].inner = frames[-1].inner.plus(whole)
        with self._lock:
            self._add(part, own)
            if not frames:
                queued_ns = min(whole.wall_ns, max(0, whole.queued_ns))
                self._values["fetched"] += whole.wall_ns - queued_ns
                self._values["queued"] += queued_ns
                self._values["faults"] += whole.faults
                self._idle_since = _others_ns(), now.queued_ns
                self._write()

    def _add(self, part: Part, own: _Meter) -> None:
        values = self._values
        queued_ns = min(own.wall_ns, max(0, own.queued_ns))
        slept_ns = max(0, own.wall_ns - queued_ns - own.cpu_ns)
        values[part] += own.wall_ns - queued_ns
        values["cores"] += queued_ns
        if part in _OURS:
            values[f"{part} slept"] += slept_ns
        elif part in _USERS and own.faults:
            values[part] -= slept_ns
            values["disk"] += slept_ns

    def _write(self) -> None:
        values = self._values
        blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        values["disk_bytes"] = 512 * (blocks - self._blocks)
        if self._slot is None:
            self._slot = self._file.append(bytes(_SLOT.size))
        self._file.write(self._slot, _SLOT.pack(*values.values()))

    def read_started(self, task_id: str, role: Role) -> None:
        """As a `ReadObserver`."""
        self.begin(is_read=True)

    def read_finished(self, read: Read) -> None:
        """As a `ReadObserver`."""
        frames = self._thread().frames
        if frames and frames[-1].is_read:
            self.end(len(frames) - 1, read.outcome)

    # -- in the training process

    def _table(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        raw = self._file.read()
        found = np.frombuffer(raw[: len(raw) // _SLOT.size * _SLOT.size], "<i8")
        return found.reshape(-1, len(_COLUMNS))

    def total(self) -> dict[str, int]:
        """The columns summed over the processes, since the start: nanoseconds, faults, bytes."""
        return dict(zip(_COLUMNS, self._table().sum(axis=0).tolist(), strict=True))

    def since(self, before: dict[str, int]) -> dict[str, float]:
        """Seconds since an earlier :meth:`total`: by part, ``sent``, ``queued``; ``disk_bytes``."""
        now = self.total()
        news = {name: now[name] - before[name] for name in _COLUMNS}
        found = {name: news[name] / 1e9 for name in (*PARTS, *_SLEPT, "sent", "queued")}
        slept_s = sum(found[name] for name in _SLEPT)
        is_disk = news["faults"] * _FAULT_S >= slept_s
        for part in _OURS:
            seconds = found.pop(f"{part} slept")
            to = "held" if part == "hit" else "disk" if is_disk else part
            found[part] -= seconds
            found[to] += seconds
        return {**found, "disk_bytes": news["disk_bytes"]}

    def queued_s(self) -> float:
        """Seconds that the calling thread has waited in the queue for a core."""
        return self._thread().queued_ns() / 1e9

    def fetched_s(self) -> float:
        """Seconds of all parts so far."""
        return float(self._table()[:, _COLUMNS.index("fetched")].sum()) / 1e9

    def first_after_s(self, start_s: float) -> float | None:
        """First read of a process that started after ``start_s``, both by ``perf_counter``."""
        first = self._table()[:, -1] / 1e9
        later = first[first > start_s]
        return float(later.min()) if len(later) else None


def _others_ns() -> int:
    """CPU time of the other threads of this process."""
    return time.process_time_ns() - time.thread_time_ns()


class Timed:
    """A callable whose calls are a part of the work."""

    def __init__(self, function: Callable[..., Any], clock: Clock, part: Part) -> None:
        self.function, self.clock, self.part = function, clock, part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        depth = self.clock.begin()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.clock.end(depth, self.part)

    def __getattr__(self, name: str) -> Any:
        if name == "function":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.function, name)


class InWorker:
    """A ``worker_init_fn`` that makes the worker add to a clock, after the user's own."""

    def __init__(self, function: Callable[[int], object] | None, clock: Clock) -> None:
        self.function, self.clock = function, clock

    def __call__(self, worker: int) -> None:
        if self.function is not None:
            self.function(worker)
        from torch.utils.data import get_worker_info

        try:
            dataset = cast(Any, get_worker_info()).dataset
            for kind in dict.fromkeys(map(type, Parts.of(dataset).foreign)):
                _time_class(kind, self.clock)
            instrument(dataset, self.clock)
        except Exception:
            # It measures; the training must not end because of that.
            logger.warning("a DataLoader worker cannot be measured", exc_info=True)


def instrument(dataset: Any, clock: Clock) -> list[Callable[[], None]]:
    """Time a dataset in this process. Returns the functions that undo this, to call in reverse.

    Of a dataset around ours, what is inside is found through its attributes.
    """
    undo: list[Callable[[], None]] = []

    def time_calls(owner: Any, name: str, part: Part) -> None:
        function = getattr(owner, name, None)
        if callable(function):
            is_own = name in vars(owner)
            setattr(owner, name, Timed(function, clock, part))
            undo.append(
                functools.partial(setattr, owner, name, function)
                if is_own
                else functools.partial(delattr, owner, name)
            )

    parts = Parts.of(dataset)
    for one in parts.own:
        time_calls(one, "_sample", "copy")
        time_calls(one, "_to_tensors", "augment")
        time_calls(one, "_selected", "augment")
        functions = getattr(one, "_functions", ())
        if functions:
            one._functions = tuple(Timed(function, clock, "transform") for function in functions)
            undo.append(functools.partial(setattr, one, "_functions", functions))
    for reader in parts.readers:
        reader.observe(clock)
        undo.append(functools.partial(reader.unobserve, clock))
        cache = getattr(reader, "cache", None)
        if (arrays := getattr(cache, "arrays", None)) is not None:
            time_calls(arrays, "is_intact", "checksum")
        if (remote := getattr(cache, "remote", None)) is not None:
            remote.lookup = functools.partial(_timed_lookup, remote.lookup, clock)
            undo.append(functools.partial(delattr, remote, "lookup"))
    return undo


@contextlib.contextmanager
def _timed_lookup(lookup: Any, clock: Clock, *args: Any) -> Iterator[Any]:
    with lookup(*args) as found:
        found.take = Timed(found.take, clock, "peer")
        yield found


def _time_class(kind: Any, clock: Clock) -> None:
    """Time the datasets of a class of the user. Call it in a worker, a process of its own.

    The class itself is changed: with a subclass in its place ``type(dataset)`` would be another,
    which the user's code may compare, pickle, or not expect to be defined.
    """
    for name, timed in (
        ("__getitem__", _timed_method),
        ("__getitems__", _timed_method),
        ("__iter__", _timed_iteration),
    ):
        method = getattr(kind, name, None)
        if callable(method):
            with contextlib.suppress(TypeError):  # a class of C
                setattr(kind, name, timed(method, clock))


def _timed_method(method: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    def timed(self: Any, index: Any) -> Any:
        depth = clock.begin()
        try:
            return method(self, index)
        finally:
            clock.end(depth, "dataset")

    return timed


def _timed_iteration(method: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    def timed(self: Any) -> Iterator[Any]:
        items = method(self)  # an iterator, which may be `self`
        while True:
            depth = clock.begin()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                clock.end(depth, "dataset")
            yield item

    return timed


class Parts(NamedTuple):
    """The parts of a dataset: datasets of this package, datasets of the user, and readers."""

    own: list[Any]
    foreign: list[Any]
    readers: list[Any]

    @classmethod
    def of(cls, root: Any) -> Parts:
        """Find the parts that can be reached from a dataset through attributes of datasets.

        Looks at classes, and at attributes that are set: properties and ``__getattr__`` of the user
        may open files, answer every name, or raise.
        """
        from torch.utils.data import Dataset

        found, seen = cls([], [], []), set[int]()
        queue = deque([root])
        while queue and len(seen) < _MOST_OBJECTS:
            one = queue.popleft()
            if id(one) in seen:
                continue
            seen.add(id(one))
            if isinstance(one, (list, tuple, dict)):
                values = one.values() if isinstance(one, dict) else one
                some = itertools.islice(values, 1000)
                queue.extend(value for value in some if not isinstance(value, (str, int, float)))
            elif hasattr(type(one), "observe") and hasattr(type(one), "unobserve"):
                found.readers.append(one)
            elif hasattr(type(one), "__getitem__"):
                package, *bases = (kind.__module__.partition(".")[0] for kind in type(one).__mro__)
                is_ours = "zarrcache" in (package, *bases)
                if is_ours and hasattr(one, "_to_tensors"):
                    found.own.append(one)
                elif package not in ("zarrcache", "torch") and (
                    one is root or isinstance(one, Dataset)
                ):
                    found.foreign.append(one)
                if is_ours:
                    queue.append(getattr(one, "reader", None))
                queue.extend(getattr(one, "__dict__", {}).values())
        return found
