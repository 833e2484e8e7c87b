"""What a run of ``zarrcache warm`` did: a result a density, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import Role
from zarrcache.disk import BLOCK_BYTES
from zarrcache.stats import Stats

__all__ = ["Tally", "WarmEstimate", "WarmReport", "WarmResult"]


@dataclass(frozen=True, slots=True)
class WarmResult:
    """What became of one density.

    Attributes
    ----------
    task_id : str
    role : {"data", "label"}
    outcome : {"hit", "miss", "bypass", "failed"}
        Was there and fresh, was fetched and stored, did not fit, or could not be read.
    nbytes : int
        Size of the decoded density; 0 if it was not read.
    error : str
        Why it failed.
    is_down : bool
        It failed as everything fails when the origin is down, or no longer lets us in.
    is_gone : bool
        It failed because there is no such store.
    """

    task_id: str
    role: Role
    outcome: Literal["hit", "miss", "bypass", "failed"]
    nbytes: int = 0
    error: str = ""
    is_down: bool = False
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class WarmEstimate:
    """What a plan would fetch, by listing only: densities that are fresh, those that are not, and
    their requests and bytes at the origin.
    """

    fresh: int
    to_fetch: int
    requests: int
    fetch_bytes: int
    failed: tuple[WarmResult, ...]


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What became of all ids.

    Attributes
    ----------
    ids : int
        Task ids of the plan.
    warm : int
        Ids of which both densities are in the cache, as the origin has them now.
    fresh : int
        Ids among them that were there before.
    bypassed : tuple of str
        Ids that did not fit, or were evicted again before the end.
    untried : int
        Ids left when ``limit_bytes`` was reached.
    failed : tuple of WarmResult
    nbytes, disk_bytes : int
        Decoded bytes that are warm, and what they take on disk. Of those that were not asked for,
        the first is rounded up to a page.
    needed_bytes : int
        What all ids would take on disk. If some did not fit, the origin was asked how large they
        are (of many, of some: then rather more); else by the mean of those whose size is known. 0
        if that is none.
    beside_bytes : int
        What the cache holds beside them: listings, entries of others. Looked at only if some did
        not fit.
    stats : Stats
        What it cost; ``stats.cache_errors`` is not 0 if the cache itself failed.
    seconds : float
    """

    ids: int
    warm: int
    fresh: int
    bypassed: tuple[str, ...]
    untried: int
    failed: tuple[WarmResult, ...]
    nbytes: int
    disk_bytes: int
    needed_bytes: int
    beside_bytes: int
    stats: Stats
    seconds: float

    @property
    def is_good(self) -> bool:
        """Nothing failed, at the origin or in the cache. Ids that did not fit are no failure: the
        limit is what was asked for.
        """
        return not self.failed and not self.stats.cache_errors

    @property
    def failed_ids(self) -> tuple[str, ...]:
        """Ids of which a density failed, each once."""
        return tuple(dict.fromkeys(result.task_id for result in self.failed))


_OUTCOMES = ("untried", "hit", "miss", "bypass", "failed")
_UNTRIED, _HIT, _MISS, _BYPASS, _FAILED = range(5)


class Tally:
    """What became of each density of a plan. Nine bytes each: there may be 400,000.

    Parameters
    ----------
    task_ids, roles : tuple
        All that is to be warm.
    asked : sequence of (task_id, role)
        Those of them that results will come for; the others are in the cache.
    stored : callable
        Bytes on disk of what is in the cache, by role and task id. Asked at the beginning and at
        the end.
    """

    def __init__(
        self,
        task_ids: tuple[str, ...],
        roles: tuple[Role, ...],
        asked: Sequence[tuple[str, Role]],
        stored: Callable[[], Mapping[Role, Mapping[str, int]]],
    ) -> None:
        self._task_ids, self._roles, self._stored = task_ids, roles, stored
        self._row = {task_id: number for number, task_id in enumerate(task_ids)}
        self._column = {role: number for number, role in enumerate(roles)}
        self._outcomes = np.full((len(task_ids), len(roles)), _HIT, np.uint8)
        for task_id, role in asked:
            self._outcomes[self._row[task_id], self._column[role]] = _UNTRIED
        self._nbytes = np.zeros(self._outcomes.shape, np.int64)
        if len(asked) < self._outcomes.size:
            self._nbytes += np.where(
                self._outcomes == _HIT, np.maximum(self._on_disk() - BLOCK_BYTES, 0), 0
            )
        self._failed: dict[tuple[int, int], WarmResult] = {}
        #: Decoded bytes that are warm.
        self.nbytes = int(self._nbytes.sum())

    @property
    def warm(self) -> int:
        """Densities that are warm."""
        return int(self._is_warm().sum())

    def add(self, result: WarmResult) -> None:
        """Count one more."""
        at = self._row[result.task_id], self._column[result.role]
        self._outcomes[at] = _OUTCOMES.index(result.outcome)
        self._nbytes[at] = result.nbytes
        if result.outcome == "failed":
            self._failed[at] = result
        if result.outcome in ("hit", "miss"):
            self.nbytes += result.nbytes

    def unsized(self, most: int) -> list[tuple[str, Role]]:
        """If some did not fit, densities whose size is not known: all, or ``most`` of them, from
        everywhere in the list.
        """
        if not (self._outcomes == _BYPASS).any():
            return []
        cells = np.argwhere((self._nbytes == 0) & (self._outcomes != _FAILED))
        if len(cells) > most:
            cells = cells[np.linspace(0, len(cells) - 1, most).astype(np.int64)]
        return [(self._task_ids[row], self._roles[column]) for row, column in cells]

    def report(
        self,
        stats: Stats,
        seconds: float,
        measured: Sequence[int] = (),
        volume: Callable[[], int] | None = None,
    ) -> WarmReport:
        """What it adds up to.

        Parameters
        ----------
        stats, seconds
            Of the whole run.
        measured : sequence of int
            Bytes on disk that those of :meth:`unsized` would take.
        volume : callable, optional
            Bytes of the whole cache; called if some did not fit.
        """
        # What is said to be warm was looked at last: with ``eviction: least-recently-stored``, or
        # beside another run, early entries may be gone.
        on_disk = self._on_disk()
        self._outcomes[self._is_warm() & (on_disk == 0)] = _BYPASS
        is_warm, is_tried = self._is_warm(), (self._outcomes != _UNTRIED).all(axis=1)
        is_bypassed = (self._outcomes == _BYPASS).any(axis=1) & is_tried
        return WarmReport(
            ids=len(self._task_ids),
            warm=int(is_warm.all(axis=1).sum()),
            fresh=int((self._outcomes == _HIT).all(axis=1).sum()),
            bypassed=tuple(self._task_ids[row] for row in np.flatnonzero(is_bypassed)),
            untried=int((~is_tried).sum()),
            failed=tuple(result for _, result in sorted(self._failed.items())),
            nbytes=int(self._nbytes[is_warm].sum()),
            disk_bytes=int(on_disk[is_warm].sum()),
            needed_bytes=self._needed_bytes(measured),
            beside_bytes=max(0, volume() - int(on_disk.sum()))
            if volume is not None and is_bypassed.any()
            else 0,
            stats=stats,
            seconds=seconds,
        )

    def _needed_bytes(self, measured: Sequence[int]) -> int:
        known = self._nbytes[self._nbytes > 0]
        # the payload, and a page for the header
        sizes = -(-known // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES
        sample = np.array(measured, np.int64) if len(measured) else sizes
        rest = self._outcomes.size - len(sizes)
        if not rest or not len(sample):
            return int(sizes.sum())
        # Of a sample the mean and two standard errors: a limit that is a little too large costs
        # nothing, one that is too small another run.
        margin = (
            2 * float(sample.std()) * rest / len(sample) ** 0.5 if 0 < len(measured) < rest else 0.0
        )
        return int(sizes.sum()) + -(-int(sample.sum()) * rest // len(sample)) + int(margin)

    def _is_warm(self) -> NDArray[np.bool_]:
        return np.isin(self._outcomes, (_HIT, _MISS))

    def _on_disk(self) -> NDArray[np.int64]:
        """Bytes on disk of each density, 0 of those that are not there."""
        found = self._stored()
        stored = [found[role] for role in self._roles]
        return np.array(
            [[sizes.get(task_id, 0) for sizes in stored] for task_id in self._task_ids], np.int64
        ).reshape(self._outcomes.shape)
