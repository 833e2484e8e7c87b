"""Conclude from the times of an epoch what a training waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from zarrcache._units import counted
from zarrcache.parallel import cores as usable_cores
from zarrcache.stats import Stats
from zarrcache.train.clock import PARTS, Part

__all__ = ["WAITS", "EpochTimes", "Verdict", "Wait", "judge"]

#: Waiting below this share of the time is not worth a change.
_NOTHING_RATIO = 0.05

#: What the training process waits for.
Wait = Literal["start", "fetch", "receive", "disk", "cores", "other"]
WAITS: tuple[Wait, ...] = ("start", "fetch", "receive", "disk", "cores", "other")

Cause = Literal[
    "nothing",
    "start",
    "S3",
    "peer",
    "lower",
    "full cache",
    "disk",
    "checksum",
    "rotation",
    "transform",
    "collate",
    "dataset",
    "copy",
    "cores",
    "workers",
    "unknown",
]


@dataclass(frozen=True)
class EpochTimes:
    """One epoch as the training process saw it.

    Attributes
    ----------
    epoch : int
        0 is the first epoch of the monitor.
    steps : int
    waited_s, worked_s : float
        Seconds in the DataLoader, without those in which the training process stood in the queue
        for a core; and between its batches.
    start_s : float
        Part of ``waited_s`` up to the first batch: starting workers, filling their queue.
    parts : dict
        Seconds, summed over the processes that read. Each is without the parts inside it:

        - reads by outcome: ``hit`` (with decoding), ``miss``, ``bypass`` (not admitted), without
          ``peer``, entries from other nodes or ``cache.lower``, and ``checksum``, the comparison of
          an entry with its checksum;
        - ``held``: a hit that slept. In an epoch with requests it waited for the origin, to compare
          versions or because another process was fetching the density; without, for the disk;
        - ``augment`` (rotation, crop, downsampling, cast), ``transform`` and ``collate`` (your own
          functions), ``dataset`` (your own dataset around ours);
        - ``copy``: stacking batches, and copies into memory that the training process can map;
        - ``disk``: waiting for the disk, in any of these but ``held``;
        - ``cores``: waiting for a core, in any of these.
    disk_bytes : int
        Bytes that these processes had from a storage device, not from the page cache.
    stats : Stats
        Counters of the epoch.
    waits : dict
        Parts of ``waited_s``: ``start`` (of the workers' processes), ``fetch`` (a sample or batch
        that was being made), ``receive`` (its way from the worker, and into pinned memory),
        ``disk`` (pages of a batch that were not in memory), ``cores`` (a worker that stood in the
        queue for a core) and ``other``.
    is_full : bool
        Whether the cache was full at the end of the epoch.
    """

    epoch: int
    steps: int
    waited_s: float
    worked_s: float
    start_s: float
    parts: Mapping[str, float]
    disk_bytes: int
    stats: Stats
    waits: Mapping[str, float] = field(default_factory=dict)
    is_full: bool = False

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
            _sum(self.parts, other.parts),
            self.disk_bytes + other.disk_bytes,
            self.stats + other.stats,
            _sum(self.waits, other.waits),
            self.is_full or other.is_full,
        )


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    names = dict.fromkeys((*one, *other))
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in names}


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a monitor: the cause of the waiting, and what to do.

    Attributes
    ----------
    cause : str
        ``nothing``, ``start`` (of workers), ``S3``, ``peer``, ``lower`` (``cache.lower``),
        ``full cache``, ``disk``, ``checksum``, ``rotation``, ``transform``, ``collate``,
        ``dataset`` (your own, around ours), ``copy`` (of batches, on their way to the training
        process), ``cores`` (of the CPU), ``workers`` (too few) or ``unknown``.
    waiting_ratio : float
    text : str
        One paragraph: how long it waits, for what, and what to do.
    """

    cause: Cause
    waiting_ratio: float
    text: str

    def __str__(self) -> str:
        return self.text


_COMPARED = (
    "S3, to compare cached densities with it",
    "set cache.revalidate: run, which compares each once in a run, or never.",
)
_FIRST_USE = (
    "checksums of cached densities",
    (
        "nothing, if later epochs are fast: with cache.verify: first an entry is compared at its "
        "first use in a run only."
    ),
)
_NOTHING_CACHED = (
    "S3, because nothing is cached",
    (
        "let the cache store something: raise cache.limit, free space for cache.min_free, or "
        "choose a cache.dir that can be written. `zarrcache doctor CONFIG` finds the cause."
    ),
)
#: Each cause in words, and the remedy.
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
    "lower": (
        "entries of cache.lower",
        "run `zarrcache warm CONFIG` before the training, which copies them to this node.",
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
        "raise num_workers, or rotate on the device (augment_on: device of ZarrDataModule).",
    ),
    "transform": ("your transform", "raise num_workers, or make it faster; workers run it."),
    "collate": (
        "the collate function",
        "use zarrcache.collate, or move its work into transform=.",
    ),
    "dataset": (
        "your own dataset, around that of zarrcache",
        "raise num_workers, or make its __getitem__ faster; workers run it.",
    ),
    "copy": (
        "copies of batches on their way to the training process",
        (
            "use zarrcache.collate or batches of one, which pass maps instead of copies; let a "
            "transform or collate function return tensors, not arrays; compare with "
            "pin_memory=False."
        ),
    ),
    "cores": (
        "cores of the CPU, which workers and training have to share",
        "give the job more cores (srun --cpus-per-task), or lower num_workers.",
    ),
    "workers": ("too few DataLoader workers", "raise num_workers."),
    "unknown": (
        "an unknown cause, neither reading nor copying",
        (
            "check the sampler, and enter the monitor before the loader starts its workers, "
            "because it cannot measure workers that already run."
        ),
    ),
}
#: Waiting that is not for a core. More workers do not make it faster.
_NOT_CPU = ("S3", "full cache", "peer", "lower", "disk")
_OF_WORKERS = ("rotation", "transform", "collate", "dataset", "cores", "workers")


def judge(
    times: EpochTimes,
    *,
    workers: int,
    verify: str = "first",
    revalidate: str = "never",
    cores: int | None = None,
) -> Verdict:
    """Find what a training waits for.

    The cause is that of most of the waiting: the start of processes, the transfer of batches, pages
    on the disk, or batches that were not finished. For unfinished batches, the cause is the largest
    part of the work of the processes that make them. If this part is CPU work and less than half of
    all work, there are too few workers.

    Parameters
    ----------
    times : EpochTimes
    workers : int
        Of the DataLoader; 0: samples are read in the training process.
    verify, revalidate : str
        ``cache.verify`` and ``cache.revalidate``.
    cores : int, optional
        Default: those that this process may use.
    """
    ratio = times.waiting_ratio
    if ratio < _NOTHING_RATIO:
        text = f"The training waited {ratio:.1%} of the time for data. Nothing needs a change."
        return Verdict("nothing", ratio, text)
    usable = usable_cores() if cores is None else cores
    cause = _cause(times, workers, usable)
    for_what, advice = _ADVICE[cause]
    if cause == "S3" and revalidate != "never" and _part(times, "held") > _part(times, "miss"):
        for_what, advice = _COMPARED
    if cause == "full cache" and _stores_nothing(times.stats):
        for_what, advice = _NOTHING_CACHED
    if cause == "checksum" and verify != "always":
        for_what, advice = _FIRST_USE
    text = f"The training waited {ratio:.0%} of the time, for {for_what}. Do this: {advice}"
    if cause in _OF_WORKERS:
        text += (
            f" There {'is' if workers == 1 else 'are'} {counted(workers, 'worker')}, and "
            f"{counted(usable, 'core')} for this process."
        )
    return Verdict(cause, ratio, text)


def _part(times: EpochTimes, name: Part) -> float:
    return times.parts.get(name, 0.0)


def _stores_nothing(stats: Stats) -> bool:
    """Whether almost no density that was read came from the cache or was stored in it."""
    others = stats.hits + stats.misses - stats.bypasses  # a bypass is a miss, too
    return stats.bypasses > 9 * others and not stats.byte_hits


def _cause(times: EpochTimes, workers: int, cores: int) -> Cause:
    # If there is a core for each process, other programs use them, which is not a lasting cause.
    lacks_cores = workers + 1 > cores
    known = [name for name in WAITS if name != "cores" or lacks_cores]
    largest = max(known, key=lambda name: times.waits.get(name, 0.0))
    # Recorded by an earlier version, which did not distinguish these.
    if not any(times.waits.values()) and any(times.parts.values()):
        largest = "fetch"
    # Fetching and decoding for every sample takes the cores.
    cores_cause: Cause = "full cache" if _stores_nothing(times.stats) else "cores"
    at_once: dict[Wait, Cause] = {
        "start": "start",
        "receive": "copy",
        "disk": "disk",
        "cores": cores_cause,
    }
    if largest in at_once:
        return at_once[largest]
    busy = {name: _part(times, name) for name in PARTS}
    if largest == "other" or not any(busy.values()):
        return "unknown"
    stats = times.stats
    # In later epochs: dropped to make room for others, and fetched once more.
    is_dropped = times.is_full and times.epoch > 0
    near: Cause = "lower" if stats.lower_hits > stats.peer_hits else "peer"
    causes: dict[Part, Cause] = {
        "hit": "workers",
        "checksum": "checksum",
        "held": "S3" if stats.requests else "disk",
        "miss": "full cache" if is_dropped else "S3",
        "bypass": "full cache",
        "peer": near,
        "augment": "rotation",
        "transform": "transform",
        "collate": "collate",
        "copy": "copy",
        "dataset": "dataset",
        "disk": "disk",
    }
    seconds: dict[Cause, float] = {}
    for part, cause in causes.items():
        seconds[cause] = seconds.get(cause, 0.0) + busy[part]
    first = max(seconds, key=lambda cause: seconds[cause])
    work = sum(seconds.values())
    if lacks_cores and busy["cores"] > max(work, seconds[first]):
        return cores_cause
    if first in _NOT_CPU or 2 * seconds[first] >= work:
        return first
    return "workers"
