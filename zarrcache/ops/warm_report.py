"""The results of a warm-up: the outcome of each density, and the report on all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import FLOAT32, ROLES, Channel, Role, density_name
from zarrcache.data import ZarrS3Reader
from zarrcache.disk import BLOCK_BYTES, SOUND, Flaws, expected_bytes
from zarrcache.stats import Stats

__all__ = ["Density", "Tally", "WarmReport", "WarmResult"]

Density = tuple[str, Role, str]
Outcome = Literal["hit", "miss", "bypass", "failed", "absent"]


@dataclass(frozen=True, slots=True)
class WarmResult:
    """The outcome of one density.

    Attributes
    ----------
    task_id : str
    role : {"data", "label"}
    outcome : {"hit", "miss", "bypass", "failed", "absent"}
        Stored and fresh, fetched and stored, not admitted, not readable; or the material lacks the
        channel, which is filled with zeros, or the material is left out (``missing``).
    nbytes : int
        Size of the decoded density; 0 if it was not read.
    error : str
        Message of the error, if it failed.
    is_down : bool
        Failed with an error that affects every request: the origin is unavailable or denies access.
    is_gone : bool
        Failed because the store does not exist.
    is_absent : bool
        The store exists and lacks the array.
    flaws : Flaws
        What is wrong with a density that was read.
    array : str
        Name of the array in the store.
    listed_objects, listed_bytes : int
        Number and size of its objects, if they would be fetched and were listed only.
    """

    task_id: str
    role: Role
    outcome: Outcome
    nbytes: int = 0
    error: str = ""
    is_down: bool = False
    is_gone: bool = False
    flaws: Flaws = SOUND
    array: str = ""
    is_absent: bool = False
    listed_objects: int = 0
    listed_bytes: int = 0

    @property
    def name(self) -> str:
        """``mp-1 (label)``, and of an array that is not the total density its name."""
        name = density_name(self.array)
        return f"{self.task_id} ({self.role}{'' if name in ('', 'total') else f', {name}'})"


@dataclass(frozen=True, slots=True)
class WarmReport:
    """The outcome of all ids.

    Attributes
    ----------
    ids : int
        Task ids of the plan.
    warm : int
        Ids with every channel of input and label cached, in the origin's present version, or
        filled with zeros (``missing: zero``).
    fresh : int
        Ids among them that were cached before the run.
    bypassed : tuple of str
        Ids that were not admitted, or evicted again before the end of the run.
    untried : int
        Ids left when ``limit_bytes`` was reached.
    failed : tuple of WarmResult
    unequal : tuple of str
        Ids whose input and label have different shapes, among up to 1,000 that differ in size.
    nbytes, disk_bytes : int
        Decoded bytes that are warm, and their bytes on disk. The decoded size of trusted densities
        is known to a multiple of 4096 bytes only, rounded up.
    needed_bytes : int
        Estimated bytes on disk of the whole cache if it held all ids, plus 10 %. For ids that were
        not read, the estimate uses the sizes of their objects. 0 if no size is known.
    is_disk_full : bool
        A density was not admitted although ``cache.limit`` is not reached: the file system is
        full, or ``cache.min_free`` is reached.
    stats : Stats
        Counters of the run. ``stats.cache_errors`` > 0 means that the cache itself failed.
    seconds : float
    lacking : tuple of str
        Ids that lack a channel. ``missing`` fills it, or leaves them out; then they are not among
        ``ids``.
    flawed : tuple of WarmResult
        Densities that were read, or compared with the origin, and have flaws: absent chunks (with
        ``cache.missing_chunks: fill``), or values that are NaN or infinite.
    refusal : str
        The error with which the training refuses the config, because materials lack channels;
        empty if it does not, or if this run has not found out.
    """

    ids: int
    warm: int
    fresh: int
    bypassed: tuple[str, ...]
    untried: int
    failed: tuple[WarmResult, ...]
    unequal: tuple[str, ...]
    nbytes: int
    disk_bytes: int
    needed_bytes: int
    is_disk_full: bool
    stats: Stats
    seconds: float
    flawed: tuple[WarmResult, ...] = ()
    lacking: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the warm-up succeeded.

        Nothing failed, at least one id is warm, all values are finite, and the training accepts the
        config. Ids beyond ``cache.limit`` are not failures, because the limit is the user's choice,
        unless no id fits. Filled chunks are not failures. Ids that do not fit on the disk are.
        """
        is_useful = self.warm > 0 or not (self.ids or self.lacking)
        is_useful = is_useful and not self.is_disk_full
        is_finite = not any(result.flaws.nonfinite for result in self.flawed)
        is_sound = is_useful and is_finite and not self.refusal
        return is_sound and not self.failed and not self.stats.cache_errors

    @property
    def failed_ids(self) -> tuple[str, ...]:
        """Ids with at least one failed density, each once."""
        return tuple(dict.fromkeys(result.task_id for result in self.failed))


#: Bytes that every encoding divides without a remainder: for its ratio, without rounding.
_POINTS = 32
_OUTCOMES = ("untried", "hit", "miss", "bypass", "failed", "absent")
_UNTRIED, _HIT, _MISS, _BYPASS, _FAILED, _ABSENT = range(6)


class Tally:
    """Outcome and size of each density of a plan, in 18 bytes: there may be 400,000.

    A plan has a density for each id and channel. Those that are neither ``untried`` nor ``absent``
    at the origin are warm, with the bytes on disk in ``stored``, by channel and task id.
    """

    def __init__(
        self,
        reader: ZarrS3Reader,
        task_ids: tuple[str, ...],
        channels: tuple[Channel, ...],
        *,
        untried: Iterable[Density],
        absent: Iterable[Density],
        stored: Mapping[Channel, Mapping[str, int]],
    ) -> None:
        cache = reader.cache_config
        assert cache is not None
        self._reader, self._task_ids, self._channels = reader, task_ids, channels
        self._optional = {channel for channel in channels if reader.is_optional(*channel)}
        self._limit_bytes = cache.limit
        self._encoding = encoding = cache.arrays.encoding
        self._row = {task_id: number for number, task_id in enumerate(task_ids)}
        self._column = {tuple(one): number for number, one in enumerate(channels)}
        self._outcomes = np.full((len(task_ids), len(channels)), _HIT, np.uint8)
        for outcome, densities in ((_UNTRIED, untried), (_ABSENT, absent)):
            for task_id, *channel in densities:
                self._outcomes[self._row[task_id], self._column[tuple(channel)]] = outcome
        #: Which channels ids lack (True), as the origin has shown.
        self.found: dict[Channel, dict[str, bool]] = {}
        header_bytes = BLOCK_BYTES if encoding == FLOAT32 else 0
        payload = np.maximum(self._on_disk(stored) - header_bytes, 0)
        # With bits:N an estimate that is too small: it does not know how well they compress.
        decoded = payload * _POINTS // expected_bytes(_POINTS, encoding)
        self._nbytes = np.where(self._outcomes == _HIT, decoded, 0)
        self._failed: dict[tuple[int, int], WarmResult] = {}
        self._is_read = np.zeros(self._outcomes.shape, np.bool_)
        self._listed_bytes = np.zeros(self._outcomes.shape, np.int64)
        self._flawed: dict[tuple[int, int], WarmResult] = {}
        #: Decoded bytes that are warm.
        self.nbytes = int(self._nbytes.sum())

    @property
    def warm(self) -> int:
        """Densities that are warm."""
        return int(self._is_warm().sum())

    def add(self, result: WarmResult) -> None:
        """Record one result."""
        at = self._row[result.task_id], self._column[result.role, result.array]
        channel = self._channels[at[1]]
        if channel in self._optional and (result.is_absent or result.outcome != "failed"):
            self.found.setdefault(channel, {})[result.task_id] = result.is_absent
        self._outcomes[at] = _OUTCOMES.index(result.outcome)
        self._nbytes[at] = result.nbytes
        self._is_read[at] = result.nbytes > 0
        self._listed_bytes[at] = result.listed_bytes
        if result.outcome == "failed":
            self._failed[at] = result
        if result.flaws != SOUND:
            self._flawed[at] = result
        if result.outcome in ("hit", "miss"):
            self.nbytes += result.nbytes

    def report(
        self,
        stats: Stats,
        seconds: float,
        stored: Mapping[Channel, Mapping[str, int]],
        volume_bytes: int,
    ) -> WarmReport:
        """Sum up, given what is stored, and the size of the whole cache, at the end of the run."""
        # With ``eviction: least-recently-stored``, or during another run, entries may be evicted
        # before the end: the report has to agree with the disk.
        on_disk = self._on_disk(stored)
        self._outcomes[self._is_warm() & (on_disk == 0)] = _BYPASS
        is_absent = self._outcomes == _ABSENT
        lacks = is_absent.any(axis=1)
        kept = ~lacks if self._reader.if_missing == "drop" else np.ones_like(lacks)
        is_warm, is_tried = self._is_warm(), (self._outcomes != _UNTRIED).all(axis=1)
        is_done = is_warm | is_absent
        is_bypassed = (self._outcomes == _BYPASS).any(axis=1) & is_tried
        # An entry has a page for its header, and ends in a page of its own.
        largest_bytes = int(self._nbytes.max(initial=0)) + 2 * BLOCK_BYTES
        has_room = volume_bytes + largest_bytes <= self._limit_bytes
        needed_bytes = self._needed_bytes(on_disk, volume_bytes, stats.fetched_bytes)
        if needed_bytes and is_bypassed.any() and not has_room:
            needed_bytes = max(needed_bytes, self._limit_bytes + largest_bytes)
        return WarmReport(
            ids=int(kept.sum()),
            warm=int((is_done.all(axis=1) & kept).sum()),
            fresh=int((self._outcomes == _HIT).all(axis=1).sum()),
            bypassed=tuple(self._task_ids[row] for row in np.flatnonzero(is_bypassed)),
            untried=int((~is_tried).sum()),
            failed=(
                *(result for _, result in sorted(self._failed.items())),
                *(
                    WarmResult(task_id, "data", "failed", error=error)
                    for task_id, error in self._reader.grids.uneven(self._task_ids).items()
                ),
            ),
            unequal=tuple(self._reader.grids.unequal(self._differing(on_disk))),
            nbytes=int(self._nbytes[is_warm].sum()),
            disk_bytes=int(on_disk[is_warm].sum()),
            needed_bytes=needed_bytes,
            is_disk_full=bool(is_bypassed.any()) and has_room,
            stats=stats,
            seconds=seconds,
            flawed=tuple(result for _, result in sorted(self._flawed.items())),
            lacking=tuple(self._task_ids[row] for row in np.flatnonzero(lacks)),
            refusal=self._reader.absences.refusal(),
        )

    def _differing(self, on_disk: NDArray[np.int64]) -> Iterator[str]:
        """Ids whose input and label differ in size: exactly if both were read."""
        places = (self._reader.column(role, self._reader.arrays[role][0]) for role in ROLES)
        first = [self._column[tuple(place)] for place in places]
        is_read = self._is_read[:, first[0]] & self._is_read[:, first[1]]
        sizes: NDArray[np.int64] = np.where(is_read[:, None], self._nbytes, on_disk)[:, first]
        data, label = sizes.T
        rows = np.flatnonzero(np.minimum(data, label) * np.abs(data - label))
        return (self._task_ids[row] for row in rows)

    def _needed_bytes(
        self, on_disk: NDArray[np.int64], volume_bytes: int, fetched_bytes: int
    ) -> int:
        """Size of the whole cache if it held all densities; 0 if none was read."""
        decoded = np.where(self._is_read & (on_disk == 0), self._nbytes, 0)
        if fetched_bytes:
            # By the ratio of those that were fetched. It is too large if peers have sent some.
            is_fetched = self._is_read & np.isin(self._outcomes, (_MISS, _BYPASS))
            ratio = self._nbytes[is_fetched].sum() / fetched_bytes
            decoded = np.where(self._listed_bytes > 0, self._listed_bytes * ratio, decoded)
        payload = decoded * expected_bytes(_POINTS, self._encoding) / _POINTS
        pages = np.ceil(payload / BLOCK_BYTES) + 1
        sizes = np.where(payload > 0, pages * BLOCK_BYTES, on_disk)
        is_known = sizes > 0
        if not is_known.any():
            return 0
        unknown = int((~is_known & (self._outcomes != _ABSENT)).sum())
        others = float(sizes[on_disk == 0].sum() + unknown * sizes[is_known].mean())
        # 10 % for attributes, and because a limit that is too small costs another run.
        return volume_bytes + round(1.1 * others)

    def _is_warm(self) -> NDArray[np.bool_]:
        return np.isin(self._outcomes, (_HIT, _MISS))

    def _on_disk(self, stored: Mapping[Channel, Mapping[str, int]]) -> NDArray[np.int64]:
        """Bytes on disk of each density; 0 where it is not cached."""
        columns: Sequence[Mapping[str, int]] = [
            stored.get(channel, {}) for channel in self._channels
        ]
        rows = [[sizes.get(task_id, 0) for sizes in columns] for task_id in self._task_ids]
        return np.array(rows, np.int64).reshape(self._outcomes.shape)
