"""Measure how long a training waits for data, and what it waits for.

In the training process the time in the DataLoader is compared with the time between its batches. In
the processes that read, the parts of the work are timed by wrappers that exist only while a monitor
is attached (:mod:`zarrcache.train.clock`); a training without one runs the same code as before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from zarrcache.config import CacheConfig
from zarrcache.disk import CACHE_FAULTS, CacheDir, is_resident, populate
from zarrcache.stats import Stats
from zarrcache.train.clock import (
    PARTS,
    Clock,
    InWorker,
    Parts,
    Timed,
    faults,
    instrument,
)
from zarrcache.train.verdict import WAITS, EpochTimes, Verdict, Wait, judge

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["LoaderMonitor", "Recorder"]

logger = logging.getLogger(__name__)

#: Files of earlier runs that are kept for `zarrcache report`.
_RUNS_KEPT = 50
#: A cache whose volume is above this share of its limit is full.
_FULL_RATIO = 0.9
#: Nesting of lists and mappings in a batch, and length of those that are looked at.
_DEEPEST, _LONGEST = 4, 1000
#: Of loaders that are or were watched.
_clocks: WeakKeyDictionary[Any, Clock] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Mark:
    """Resources used by the training process when it begins to wait or to work."""

    wall_s: float
    cpu_s: float
    queued_s: float
    faults: int
    fetched_s: float


class Recorder:
    """Times of a loader's epochs: the part that Lightning and plain loops have in common."""

    def __init__(self) -> None:
        self.epochs: list[EpochTimes] = []
        self.clock = Clock()
        self._loader: Any = None
        self._readers: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._workers, self._is_foreign = 0, False
        # Of this thread: after each use of OpenMP, its threads keep cores busy for some ms.
        self._cpu_s: Callable[[], float] = time.thread_time
        self._waits: dict[Wait, float] = dict.fromkeys(WAITS, 0.0)
        self._worked_s = self._start_s = self._begun_s = 0.0
        self._steps = 0
        self._mark: _Mark | None = None
        self._before: tuple[dict[str, int], int, Stats] | None = None
        self._path: Path | None = None

    def attach(self, loader: Any) -> None:
        """Time a loader from its next iterator on, if that is possible."""
        try:
            self._attach(loader)
        except Exception:
            # It measures; the training must not end because of that.
            self.detach()
            logger.warning("this loader cannot be measured", exc_info=True)

    def _attach(self, loader: Any) -> None:
        # Not above: `zarrcache report` judges recorded epochs where torch may not be installed.
        import torch
        from torch.utils.data import DataLoader

        if self.is_attached or not isinstance(loader, DataLoader):
            return
        self._loader, self._workers = loader, loader.num_workers
        # Persistent workers add to the clock of the first monitor of their loader.
        self.clock = _clocks.setdefault(loader, self.clock)
        parts = Parts.of(loader.dataset)
        self._is_foreign, self._readers = bool(parts.foreign), parts.readers
        if loader.pin_memory and torch.cuda.is_available():
            self._cpu_s = time.process_time  # another thread copies into pinned memory
        collate = loader.collate_fn
        self._undo.append(lambda: setattr(loader, "collate_fn", collate))
        is_own = getattr(collate, "__module__", "").partition(".")[0] not in ("zarrcache", "torch")
        # A worker gets it with the loader, and instruments its own copy of the dataset.
        loader.collate_fn = Timed(collate, self.clock, "collate" if is_own else "copy")
        if loader.num_workers:
            begin = loader.worker_init_fn
            self._undo.append(lambda: setattr(loader, "worker_init_fn", begin))
            loader.worker_init_fn = InWorker(begin, self.clock)
        else:
            self._undo += instrument(loader.dataset, self.clock)

    @property
    def is_attached(self) -> bool:
        """Whether a loader is timed."""
        return self._loader is not None

    def detach(self) -> None:
        """Leave the loader and its dataset as they were."""
        while self._undo:
            self._undo.pop()()

    @property
    def config(self) -> CacheConfig | None:
        """The cache of the first reader."""
        if not self._readers:
            return None
        found: CacheConfig | None = getattr(self._readers[0], "cache_config", None)
        return found

    # -- one epoch

    def begin(self) -> None:
        """An epoch begins, with waiting for its first batch."""
        self._waits = dict.fromkeys(WAITS, 0.0)
        self._worked_s = self._start_s = 0.0
        self._steps = 0
        self._before = self.clock.total(), _device_bytes(), self._stats()
        self._mark = self._now()
        self._begun_s = self._mark.wall_s

    def _now(self) -> _Mark:
        # The time last: what a monitor does itself is neither waiting nor work.
        fetched_s = self.clock.fetched_s()
        return _Mark(
            cpu_s=self._cpu_s(),
            queued_s=self.clock.queued_s(),
            faults=faults(),
            fetched_s=fetched_s,
            wall_s=time.perf_counter(),
        )

    def interrupt(self) -> None:
        """Stop the clock until the next batch, for a validation or a checkpoint."""
        self._mark = None

    def got_batch(self, batch: Any = None) -> None:
        """End the waiting, begin the work."""
        now_s = time.perf_counter()
        if self._mark is not None:
            self._add_wait(self._mark, now_s)
            if not self._steps:
                self._start_s = now_s - self._mark.wall_s
        self._steps += 1
        self._waits["disk"] += _page_in(batch)
        self._mark = self._now()

    def _add_wait(self, mark: _Mark, now_s: float) -> None:
        waits, left_s = self._waits, now_s - mark.wall_s
        now = self._now()
        used_s, fetched_s = now.cpu_s - mark.cpu_s, now.fetched_s - mark.fetched_s
        queued_s = now.queued_s - mark.queued_s
        if self._workers:
            if not self._steps:
                first_s = self.clock.first_after_s(self._begun_s)
                started_s = 0.0 if first_s is None else min(left_s, first_s - self._begun_s)
                waits["start"] += started_s
                left_s -= started_s
                used_s -= started_s
            left_s = max(0.0, left_s - queued_s)
            # The CPU time first: while it runs, this process does not wait for a worker.
            left_s -= self._take("receive", used_s, left_s)
            left_s -= self._take("fetch", fetched_s, left_s)
        else:
            left_s -= self._take("fetch", fetched_s, left_s)
            left_s = max(0.0, left_s - queued_s)  # some of it was a part of what was fetched
            if not self._is_foreign:  # otherwise it counts as work of that dataset
                left_s -= self._take("receive", used_s - fetched_s, left_s)
        waits["disk" if now.faults > mark.faults else "other"] += left_s

    def _take(self, name: Wait, seconds: float, most_s: float) -> float:
        taken = min(most_s, max(0.0, seconds))
        self._waits[name] += taken
        return taken

    def ends_step(self) -> None:
        """Work ends, waiting begins."""
        if self._mark is not None:
            self._worked_s += time.perf_counter() - self._mark.wall_s
        self._mark = self._now()

    def so_far(self) -> EpochTimes | None:
        """The present epoch up to now; None if none has begun."""
        if self._before is None:
            return None
        before, device_bytes, stats = self._before
        news = self.clock.since(before)
        parts: dict[str, float] = {name: news[name] for name in PARTS}
        waits: dict[str, float] = dict(self._waits.items())
        disk_bytes = _device_bytes() - device_bytes
        if self._workers:
            disk_bytes += int(news["disk_bytes"])
            # Other worker time: copying, pickling, waiting for a core.
            for name, found in (("receive", "sent"), ("cores", "queued")):
                seconds = min(waits["other"], news[found])
                waits["other"] -= seconds
                waits[name] += seconds
        elif self._is_foreign:
            parts["dataset"] += waits["other"]
            waits["fetch"] += waits["other"]
            waits["other"] = 0.0
        return EpochTimes(
            epoch=len(self.epochs),
            steps=self._steps,
            waited_s=sum(waits.values()),
            worked_s=self._worked_s,
            start_s=self._start_s,
            parts=parts,
            disk_bytes=disk_bytes,
            stats=self._stats() - stats,
            waits=waits,
            is_full=self._is_full(),
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
        """The verdict for all epochs after the first, or for the first if there is no other.

        The first epoch of a cold cache waits for S3 once, which later ones do not repeat.
        """
        if not self.epochs:
            return Verdict("nothing", 0.0, "No epoch has ended yet.")
        first, *others = self.epochs
        times = others[0] if others else first
        for other in others[1:]:
            times = times + other
        found = self._judge(times)
        if others and found.cause == "nothing":
            begin = self._judge(first)
            if begin.cause != "nothing":
                was = begin.text.partition(" Do this: ")[0].removeprefix("The training ")
                more = f" The first epoch, which does not count, {was}"
                return replace(found, text=found.text + more)
        return found

    def _judge(self, times: EpochTimes) -> Verdict:
        config = self.config
        settings = {} if config is None else config.model_dump(include={"verify", "revalidate"})
        return judge(times, workers=self._workers, **settings)

    def _stats(self) -> Stats:
        total = Stats()
        for reader in self._readers:
            total += getattr(reader, "stats", Stats())
        return total

    def _is_full(self) -> bool:
        config = self.config
        index = getattr(getattr(self._readers[0], "cache", None), "index", None) if config else None
        if config is None or index is None:
            return False
        try:
            return bool(index.volume_bytes() > _FULL_RATIO * config.limit)
        except CACHE_FAULTS:  # counted and logged by the first read
            return False

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
    """Measures how long a loop over a DataLoader waits, and finds the cause.

    >>> with LoaderMonitor(loader) as batches:
    ...     for epoch in range(3):
    ...         for batch in batches:
    ...             train(batch)
    >>> print(batches.verdict)
    The training waited 12 % of the time, for S3 (cold misses). Do this: ...

    Parameters
    ----------
    loader : DataLoader
        Over a ``ZarrDataset``, a ``RhoData`` or a combination of them. Pass it before its workers
        start; the monitor cannot measure workers that already run.

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

    def __exit__(self, *exc_info: object) -> None:
        self._recorder.detach()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        recorder = self._recorder
        recorder.begin()
        try:
            for batch in self._loader:
                recorder.got_batch(batch)
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


def _device_bytes() -> int:
    """Bytes that this process has had from a storage device."""
    return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def _page_in(batch: Any, depth: int = 0) -> float:
    """Read the pages of a batch that are not in memory, and return the seconds that this took.

    A worker sends a density as a place in a file. If its pages have been dropped since, the
    training step would read them from the disk, at the first use of each, and count as work.
    """
    if depth > _DEEPEST or (isinstance(batch, (list, tuple, Mapping)) and len(batch) > _LONGEST):
        return 0.0
    if isinstance(batch, Mapping):
        return sum(_page_in(value, depth + 1) for value in batch.values())
    if isinstance(batch, (list, tuple)):
        return sum(_page_in(value, depth + 1) for value in batch)
    if getattr(getattr(batch, "device", None), "type", "") != "cpu" or not hasattr(batch, "stride"):
        return 0.0
    try:
        address, steps = batch.data_ptr(), zip(batch.shape, batch.stride(), strict=True)
        nbytes = batch.itemsize * (1 + sum((n - 1) * step for n, step in steps))
    except (RuntimeError, AttributeError, TypeError):  # sparse, or no tensor
        return 0.0
    if not address or not batch.numel() or is_resident(address, nbytes):
        return 0.0
    start_s = time.perf_counter()
    populate(address, nbytes)
    return time.perf_counter() - start_s
