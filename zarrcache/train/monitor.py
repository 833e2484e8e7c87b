"""How long a training waits for data, and for what.

In the training process the time in the DataLoader is compared with the time between its batches. In
the workers, reads, rotations, transforms and collate functions are timed by wrappers that exist
only while a monitor is attached; a training without one runs the same code as before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from zarrcache._keys import Role
from zarrcache.config import CacheConfig
from zarrcache.data import Read
from zarrcache.disk import CacheDir
from zarrcache.stats import SharedFile, Stats

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["EpochTimes", "LoaderMonitor", "Recorder", "Verdict", "judge"]

logger = logging.getLogger(__name__)

#: Waiting below this share of the time is not worth a change.
_NOTHING_RATIO = 0.05
#: The workers are not what the training waits for if they are idle for more than this.
_IDLE_RATIO = 0.5
#: Bytes that come from the storage device, per byte read, above which the page cache did not help.
_FROM_DISK_RATIO = 0.3
#: Files of earlier runs that are kept for `zarrcache report`.
_RUNS_KEPT = 50

Part = Literal["hit", "miss", "bypass", "augment", "transform", "collate"]
_PARTS: tuple[Part, ...] = ("hit", "miss", "bypass", "augment", "transform", "collate")
_NAMES = (*_PARTS, "disk_bytes")
_SLOT = struct.Struct(f"<{len(_NAMES)}q")

Cause = Literal[
    "nothing",
    "start",
    "S3",
    "peer",
    "full cache",
    "disk",
    "checksum",
    "rotation",
    "transform",
    "collate",
    "copy",
    "workers",
]


class Clock:
    """Nanoseconds of each part of the work, summed over the processes that read samples.

    An observer of reads; each process writes a slot of its own in shared memory.
    """

    def __init__(self) -> None:
        self._file = SharedFile.new("clock-")
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._values = dict.fromkeys(_NAMES, 0)
        self._slot: int | None = None
        self._disk_bytes = _read_from_disk()

    def __getstate__(self) -> SharedFile:
        return self._file

    def __setstate__(self, file: SharedFile) -> None:
        self._file = file
        self._start()

    def add(self, part: Part, seconds: float) -> None:
        """Add to one part, in this process."""
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            self._values[part] += int(seconds * 1e9)
            self._values["disk_bytes"] = _read_from_disk() - self._disk_bytes
            if self._slot is None:
                self._slot = self._file.append(bytes(_SLOT.size))
            self._file.write(self._slot, _SLOT.pack(*self._values.values()))

    def total(self) -> dict[str, float]:
        """Seconds by part, and ``disk_bytes``, of all processes since the start."""
        slots = list(_SLOT.iter_unpack(self._file.read()))
        sums = [sum(column) for column in zip(*slots, strict=True)] or [0] * len(_NAMES)
        found = {name: value / 1e9 for name, value in zip(_NAMES, sums, strict=True)}
        found["disk_bytes"] = sums[-1]
        return found

    def read_started(self, task_id: str, role: Role) -> None:
        """As a `ReadObserver`."""

    def read_finished(self, read: Read) -> None:
        """As a `ReadObserver`."""
        self.add(read.outcome, read.seconds)


class _Timed:
    """A callable whose calls are timed."""

    def __init__(self, function: Callable[..., Any], clock: Clock, part: Part) -> None:
        self.function, self.clock, self.part = function, clock, part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.clock.add(self.part, time.perf_counter() - start_s)

    def __getattr__(self, name: str) -> Any:
        if name == "function":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.function, name)


def _read_from_disk() -> int:
    """Bytes that this process has had read from a storage device; 0 where that is not known."""
    try:
        text = Path("/proc/self/io").read_text(encoding="ascii")
        return int(text.partition("\nread_bytes:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return 0


@dataclass(frozen=True)
class EpochTimes:
    """One epoch as the training process saw it.

    Attributes
    ----------
    epoch : int
        0 is the first epoch of the monitor.
    steps : int
    waited_s, worked_s : float
        Seconds in the DataLoader, and between its batches.
    start_s : float
        Part of ``waited_s`` up to the first batch: starting workers, filling their queue.
    parts : dict
        Seconds of ``hit``, ``miss``, ``bypass`` (reads by outcome), ``augment`` (rotation,
        downsampling, cast), ``transform`` and ``collate``, summed over the workers.
    disk_bytes : int
        Bytes that came from a storage device and not from the page cache.
    stats : Stats
        Counters of the epoch.
    """

    epoch: int
    steps: int
    waited_s: float
    worked_s: float
    start_s: float
    parts: dict[str, float]
    disk_bytes: int
    stats: Stats

    @property
    def waiting_ratio(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        seconds = self.waited_s + self.worked_s
        return self.waited_s / seconds if seconds else 0.0

    def __add__(self, other: EpochTimes) -> EpochTimes:
        return EpochTimes(
            self.epoch,
            self.steps + other.steps,
            self.waited_s + other.waited_s,
            self.worked_s + other.worked_s,
            self.start_s + other.start_s,
            {name: self.parts[name] + other.parts[name] for name in self.parts},
            self.disk_bytes + other.disk_bytes,
            self.stats + other.stats,
        )


@dataclass(frozen=True)
class Verdict:
    """What a training waits for.

    Attributes
    ----------
    cause : str
        ``nothing``, ``start`` (of workers), ``S3``, ``peer``, ``full cache``, ``disk``,
        ``checksum``, ``rotation``, ``transform``, ``collate``, ``copy`` (of batches from the
        workers, into pinned memory or to the device) or ``workers`` (too few).
    waiting_ratio : float
    text : str
        One paragraph: how long it waits, for what, and what to do.
    """

    cause: Cause
    waiting_ratio: float
    text: str

    def __str__(self) -> str:
        return self.text


#: For what it waits, and what to do.
_ADVICE: dict[Cause, tuple[str, str]] = {
    "start": (
        "the workers to start",
        "keep the workers between epochs: DataLoader(persistent_workers=True).",
    ),
    "S3": (
        "S3 (cold misses)",
        "run `zarrcache warm CONFIG` before the training, or fetch ahead with zarrcache.Lookahead.",
    ),
    "peer": (
        "entries from other nodes",
        "check the network and the load of the nodes in cache.peers; without them S3 is read.",
    ),
    "full cache": (
        "S3, because the cache is full",
        (
            "raise cache.limit, store less per density (cache.arrays.encoding: float16), or give "
            "each node its own share (assignment: node). `zarrcache plan CONFIG` compares them."
        ),
    ),
    "disk": (
        "the disk of the cache",
        (
            "put cache.dir on a faster local disk, or store less per density "
            "(cache.arrays.encoding: float16). `zarrcache doctor CONFIG` names the disk."
        ),
    ),
    "checksum": (
        "checksums of cached densities",
        "set cache.verify: first, which compares an entry at its first use in a run only.",
    ),
    "rotation": (
        "rotating, downsampling or casting samples on the CPU",
        "use more workers, or rotate on the device (augment_on: device of ZarrDataModule).",
    ),
    "transform": ("your transform", "use more workers, or make it faster; it runs in them."),
    "collate": (
        "the collate function",
        "use zarrcache.collate, or move its work into transform=.",
    ),
    "copy": (
        "copies of batches on their way from the workers",
        (
            "use zarrcache.collate or batches of one, which pass maps instead of copies; compare "
            "with pin_memory=False."
        ),
    ),
    "workers": ("too few DataLoader workers", "raise num_workers."),
}


def judge(
    times: EpochTimes,
    *,
    workers: int,
    pin_memory: bool = False,
    verify: str = "first",
    cores: int | None = None,
) -> Verdict:
    """Say what a training waits for.

    Parameters
    ----------
    times : EpochTimes
    workers : int
        Of the DataLoader; 0: samples are read in the training process.
    pin_memory : bool
    verify : str
        ``cache.verify``.
    cores : int, optional
        Default: those that this process may use.
    """
    ratio = times.waiting_ratio
    if ratio < _NOTHING_RATIO:
        text = f"The training waited {ratio:.1%} of the time for data. Nothing needs a change."
        return Verdict("nothing", ratio, text)
    cause = _cause(times, workers, pin_memory=pin_memory, verify=verify)
    for_what, advice = _ADVICE[cause]
    usable = len(os.sched_getaffinity(0)) if cores is None else cores
    more = ""
    if cause in ("rotation", "transform", "workers"):
        more = f" There are {workers} workers, and {usable} cores for this process."
    text = f"The training waited {ratio:.0%} of the time, for {for_what}. Do this: {advice}{more}"
    return Verdict(cause, ratio, text)


def _cause(times: EpochTimes, workers: int, *, pin_memory: bool, verify: str) -> Cause:
    parts, stats = times.parts, times.stats
    if workers and times.start_s > 0.5 * times.waited_s and times.steps > 1:
        return "start"
    busy = sum(parts.values())
    elapsed = times.waited_s + times.worked_s
    fetching, reading = parts["miss"] + parts["bypass"], parts["hit"] + parts["augment"]
    if workers and busy < (1 - _IDLE_RATIO) * elapsed * workers and fetching < 0.5 * busy:
        # They wait themselves: for the training process to take what they have made.
        return "copy"
    if not workers and busy < 0.5 * times.waited_s:
        return "copy" if pin_memory else "collate"
    if fetching > 0.5 * busy:
        if parts["bypass"] > parts["miss"]:
            return "full cache"
        return "peer" if 2 * stats.peer_hits > stats.misses else "S3"
    if reading > 0.5 * busy and times.disk_bytes > _FROM_DISK_RATIO * stats.served_bytes > 0:
        return "disk"
    largest = max(_PARTS, key=lambda part: parts[part])
    if parts[largest] < 0.5 * busy:
        return "workers"
    if largest == "hit":
        return "checksum" if verify == "always" else "workers"
    causes: dict[Part, Cause] = {
        "augment": "rotation",
        "transform": "transform",
        "collate": "collate",
    }
    return causes[largest]


class Recorder:
    """Times of a loader's epochs: the part that Lightning and plain loops have in common."""

    def __init__(self) -> None:
        self.epochs: list[EpochTimes] = []
        self.clock = Clock()
        self._readers: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._workers, self._pin_memory = 0, False
        self._seconds = {"wait": 0.0, "work": 0.0, "start": 0.0}
        self._steps = 0
        self._mark_s = 0.0
        self._before: tuple[dict[str, float], Stats] | None = None
        self._path: Path | None = None

    def attach(self, loader: Any) -> None:
        """Time a loader from its next iterator on."""
        # Not above: `zarrcache report` judges recorded epochs where torch may not be installed.
        from torch.utils.data import DataLoader

        if self._readers or not isinstance(loader, DataLoader):
            return
        self._workers, self._pin_memory = loader.num_workers, bool(loader.pin_memory)
        for dataset in _leaves(loader.dataset):
            if (reader := _reader_of(dataset)) is not None and reader not in self._readers:
                reader.observe(self.clock)
                self._undo.append(functools.partial(reader.unobserve, self.clock))
                self._readers.append(reader)
            self._time(dataset, "_to_tensors", "augment")
            self._time_functions(dataset)
        self._time(loader, "collate_fn", "collate")

    @property
    def is_attached(self) -> bool:
        """Whether a loader of our datasets is timed."""
        return bool(self._readers)

    def _time_functions(self, dataset: Any) -> None:
        functions = getattr(dataset, "_functions", ())
        if functions:
            timed = tuple(_Timed(function, self.clock, "transform") for function in functions)
            dataset._functions = timed
            self._undo.append(functools.partial(setattr, dataset, "_functions", functions))

    def _time(self, owner: Any, name: str, part: Part) -> None:
        function = getattr(owner, name, None)
        if callable(function):
            setattr(owner, name, _Timed(function, self.clock, part))
            self._undo.append(lambda: setattr(owner, name, function))

    def detach(self) -> None:
        """Leave the loader and its dataset as they were."""
        while self._undo:
            self._undo.pop()()

    @property
    def config(self) -> CacheConfig | None:
        """The cache of the first reader."""
        found: CacheConfig | None = self._readers[0].cache_config if self._readers else None
        return found

    def begin(self) -> None:
        """An epoch begins, with waiting for its first batch."""
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._steps = 0
        self._before = self.clock.total(), self._stats()
        self._mark_s = time.perf_counter()

    def got_batch(self) -> None:
        """Waiting ends, work begins."""
        now_s = time.perf_counter()
        self._seconds["wait"] += now_s - self._mark_s
        if not self._steps:
            self._seconds["start"] = now_s - self._mark_s
        self._steps += 1
        self._mark_s = now_s

    def ends_step(self) -> None:
        """Work ends, waiting begins."""
        now_s = time.perf_counter()
        self._seconds["work"] += now_s - self._mark_s
        self._mark_s = now_s

    def so_far(self) -> EpochTimes | None:
        """The present epoch up to now; None if none has begun."""
        if self._before is None:
            return None
        (clock, stats), now = self._before, self.clock.total()
        parts: dict[str, float] = {name: now[name] - clock[name] for name in _PARTS}
        return EpochTimes(
            epoch=len(self.epochs),
            steps=self._steps,
            waited_s=self._seconds["wait"],
            worked_s=self._seconds["work"],
            start_s=self._seconds["start"],
            parts=parts,
            disk_bytes=int(now["disk_bytes"] - clock["disk_bytes"]),
            stats=self._stats() - stats,
        )

    def end(self) -> EpochTimes | None:
        """The epoch is over; what it was like."""
        times = self.so_far()
        self._before = None
        if times is None or not times.steps:
            return None
        self.epochs.append(times)
        self._write(times)
        return times

    @property
    def verdict(self) -> Verdict:
        """Of all epochs after the first, or of the first if there is no other.

        The first epoch of a cold cache waits for S3 once, which later ones do not repeat.
        """
        if not self.epochs:
            return Verdict("nothing", 0.0, "No epoch has ended yet.")
        first, *others = self.epochs
        times = others[0] if others else first
        for other in others[1:]:
            times = times + other
        config = self.config
        return judge(
            times,
            workers=self._workers,
            pin_memory=self._pin_memory,
            verify="first" if config is None else config.verify,
        )

    def _stats(self) -> Stats:
        total = Stats()
        for reader in self._readers:
            total += reader.stats
        return total

    def _write(self, times: EpochTimes) -> None:
        """Append an epoch to the file of this run, which `zarrcache report` reads."""
        config = self.config
        if config is None or not config.arrays.enabled:
            return
        with contextlib.suppress(OSError):
            if self._path is None:
                directory = CacheDir(config.dir).root / "runs"
                directory.mkdir(exist_ok=True)
                for old in sorted(directory.glob("*.jsonl"))[: -_RUNS_KEPT + 1]:
                    old.unlink(missing_ok=True)
                name = time.strftime("%Y%m%dT%H%M%S")
                self._path = directory / f"{name}-{os.getpid()}.jsonl"
            line = {**asdict(times), "ended_s": time.time(), "workers": self._workers}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class LoaderMonitor:
    """Measures how long a loop over a DataLoader waits, and says for what.

    >>> with LoaderMonitor(loader) as batches:
    ...     for epoch in range(3):
    ...         for batch in batches:
    ...             train(batch)
    >>> print(batches.verdict)
    The training waited 12 % of the time, for S3 (cold misses). Do this: ...

    Parameters
    ----------
    loader : DataLoader
        Over a ``ZarrDataset``, a ``RhoData`` or a combination of them. Give it before its workers
        have started; of workers that already run, the parts of the work are unknown.

    Attributes
    ----------
    epochs : list of EpochTimes
        Of the epochs that have ended.
    verdict : Verdict
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._recorder = Recorder()

    def __enter__(self) -> Self:
        self._recorder.attach(self._loader)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._recorder.detach()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        recorder = self._recorder
        recorder.begin()
        try:
            for batch in self._loader:
                recorder.got_batch()
                yield batch
                recorder.ends_step()
        finally:
            recorder.end()

    @property
    def epochs(self) -> list[EpochTimes]:
        """Epochs that have ended."""
        return self._recorder.epochs

    @property
    def verdict(self) -> Verdict:
        """What the training waits for."""
        return self._recorder.verdict


def _leaves(dataset: Any) -> Iterator[Any]:
    """The datasets of a combination, or of a subset."""
    inner = getattr(dataset, "datasets", None)
    if inner is not None:
        for one in inner:
            yield from _leaves(one)
    elif hasattr(dataset, "dataset"):
        yield from _leaves(dataset.dataset)
    else:
        yield dataset


def _reader_of(dataset: Any) -> Any:
    found = getattr(dataset, "reader", None)
    if found is None:
        found = getattr(getattr(dataset, "data", None), "reader", None)
    return found if hasattr(found, "observe") else None
