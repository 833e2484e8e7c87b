"""Fill the cache ahead: what ``zarrcache warm`` does.

>>> plan = plan_warm(DataConfig.from_yaml("configs/s3_cached.yaml"))  # doctest: +SKIP
>>> report = plan.execute()  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Literal

from zarrcache.config import CacheConfig, DataConfig
from zarrcache.errors import ConfigError, OriginAccessError, OriginError, OriginUnavailableError, ZarrCacheError
from zarrcache.keys import check_task_id, source_digest
from zarrcache.policy import BLOCK_BYTES, disk_bytes
from zarrcache.reader import ZarrS3Reader
from zarrcache.registry import open_reader
from zarrcache.scope import ROLES, cache_of, concurrently, open_index, stored_header
from zarrcache.sequences import Role
from zarrcache.stats import Stats
from zarrcache.workpool import Died, cores, spread

__all__ = ["Density", "Split", "WarmEstimate", "WarmPlan", "WarmReport", "WarmResult", "plan_warm"]

logger = logging.getLogger(__name__)

Split = Literal["train", "test", "all"]
Density = tuple[str, Role]

#: Processes, not threads: one process decodes and asks for about 1,500 objects a second, whatever the number of its threads, because all
#: of it happens under one interpreter lock (1,341 objects of 16^3: 0.9 s of CPU with 1, 4 and 8 threads). Starting one costs 0.6 s.
MOST_WORKERS = 8
DENSITIES_PER_WORKER = 16
#: Densities in a row that did not fit, after which a process only looks whether the others are fresh and fetches no more.
_FULL_AFTER = 3


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
    """

    task_id: str
    role: Role
    outcome: Literal["hit", "miss", "bypass", "failed"]
    nbytes: int = 0
    error: str = ""
    is_down: bool = False


@dataclass(frozen=True, slots=True)
class WarmEstimate:
    """What a plan would fetch, by listing only: densities that are fresh, those that are not, and their requests and bytes at the origin."""

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
        Decoded bytes that are warm, and what they take on disk.
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
    stats: Stats
    seconds: float

    @property
    def is_good(self) -> bool:
        """Nothing failed, at the origin or in the cache. Ids that did not fit are no failure: the limit is what was asked for."""
        return not self.failed and not self.stats.cache_errors

    @property
    def failed_ids(self) -> tuple[str, ...]:
        """Ids of which a density failed, each once."""
        return tuple(dict.fromkeys(result.task_id for result in self.failed))


@dataclass(frozen=True)
class WarmPlan:
    """What is to be warm. Making it listed the two directories and fetched nothing.

    Attributes
    ----------
    task_ids : tuple of str
    missing : tuple of str
        Ids of the map whose input or label the origin does not have; they are left out, as in training.
    workers : int
        Processes; 1 is this process itself.
    limit_bytes : int or None
        Stop when this many decoded bytes are warm.
    """

    task_ids: tuple[str, ...]
    missing: tuple[str, ...]
    workers: int
    limit_bytes: int | None
    reader: ZarrS3Reader = field(repr=False)

    @property
    def densities(self) -> list[Density]:
        """Input and label of every id."""
        return [(task_id, role) for task_id in self.task_ids for role in ROLES]

    @property
    def cache(self) -> CacheConfig:
        """Settings of the cache that is filled."""
        assert self.reader.tiers.config is not None
        return self.reader.tiers.config

    def estimate(self, progress: Callable[[int], object] | None = None) -> WarmEstimate:
        """List every store and compare with what is stored; one LIST a density, nothing is fetched.

        Parameters
        ----------
        progress : callable, optional
            Called with the number of densities looked at so far.
        """
        fresh = requests = fetch_bytes = 0
        failed = []
        with closing(concurrently(lambda density: _look(self.reader, *density), self.densities)) as looked:
            for done, (result, objects, nbytes) in enumerate(looked, start=1):
                requests += objects
                fetch_bytes += nbytes
                fresh += result.outcome == "hit"
                failed += [result] if result.outcome == "failed" else []
                if progress is not None:
                    progress(done)
        return WarmEstimate(fresh, len(self.densities) - fresh - len(failed), requests + len(self.densities), fetch_bytes, tuple(failed))

    def execute(self, progress: Callable[[WarmResult], object] | None = None) -> WarmReport:
        """Fetch what is not fresh.

        A density that cannot be read is named in the report, and the others go on. Interrupted (Ctrl-C) or killed, run the same again:
        what is stored is skipped by listing only.

        Parameters
        ----------
        progress : callable, optional
            Called here, in this process, with each result as it comes.

        Raises
        ------
        OriginError
            Everything fails: the origin is down, or no longer lets us in.
        """
        start_s, before = time.monotonic(), self.reader.stats
        results: dict[Density, WarmResult] = {}
        nbytes, down = 0, 0
        with closing(self._results()) as arriving:
            for result in arriving:
                results[result.task_id, result.role] = result
                if progress is not None:
                    progress(result)
                down = down + 1 if result.is_down else 0
                if down >= max(4, 2 * self.workers):
                    warm = sum(r.outcome in ("hit", "miss") for r in results.values())
                    raise OriginError(
                        f"the origin stopped answering, {down} densities in a row failed. {warm} of {len(self.densities)} are warm; "
                        f"run the same again to go on. The last error: {result.error}"
                    )
                nbytes += result.nbytes if result.outcome in ("hit", "miss") else 0
                if self.limit_bytes is not None and nbytes >= self.limit_bytes:
                    break
        # What is said to be warm was looked at last: with ``eviction: least-recently-stored``, or beside another run, early entries may be gone.
        present = {row.digest for row in open_index(self.cache).rows("array")}
        for density, result in results.items():
            if result.outcome in ("hit", "miss") and self.reader.key(*density).digest not in present:
                results[density] = replace(result, outcome="bypass")
        return self._report(results, self.reader.stats - before, time.monotonic() - start_s)

    def _results(self) -> Generator[WarmResult]:
        warmer = _Warmer(self.reader)
        if self.workers == 1:
            for density in self.densities:
                yield warmer(density)
            return
        with closing(spread(warmer, self.densities, self.workers)) as outcomes:
            for (task_id, role), outcome in outcomes:
                if isinstance(outcome, Died):
                    error = f"{task_id} ({role}): the process that read it was ended by {outcome}; a second one too. Run again with fewer workers."
                    yield WarmResult(task_id, role, "failed", error=error)
                else:
                    yield outcome

    def _report(self, results: dict[Density, WarmResult], stats: Stats, seconds: float) -> WarmReport:
        outcomes = {task_id: [results[task_id, role].outcome for role in ROLES if (task_id, role) in results] for task_id in self.task_ids}
        tried = {task_id: found for task_id, found in outcomes.items() if len(found) == len(ROLES)}
        nbytes = [result.nbytes for result in results.values() if result.outcome in ("hit", "miss")]
        return WarmReport(
            ids=len(self.task_ids),
            warm=sum(set(found) <= {"hit", "miss"} for found in tried.values()),
            fresh=sum(set(found) == {"hit"} for found in tried.values()),
            bypassed=tuple(task_id for task_id, found in tried.items() if "bypass" in found),
            untried=len(outcomes) - len(tried),
            failed=tuple(result for density in self.densities if (result := results.get(density)) and result.outcome == "failed"),
            nbytes=sum(nbytes),
            # The payload, and a page for the header.
            disk_bytes=sum(disk_bytes(n) + BLOCK_BYTES for n in nbytes),
            stats=stats,
            seconds=seconds,
        )


def plan_warm(
    source: DataConfig | ZarrS3Reader,
    *,
    split: Split = "all",
    ids: Iterable[str] | None = None,
    workers: int | None = None,
    limit_bytes: int | None = None,
) -> WarmPlan:
    """List the origin's directories anew, and keep the listing for runs without the origin.

    Parameters
    ----------
    source : DataConfig or ZarrS3Reader
        With a cache.
    split : {"train", "test", "all"}
        Which ids of the config.
    ids : iterable of str, optional
        These ids instead, whether or not the map has them; one that the origin does not have will be a failure.
    workers : int, optional
        Processes. Default: one a core that this process may use and 16 densities, 8 at the most.
    limit_bytes : int, optional
        Stop when this many decoded bytes are warm.

    Raises
    ------
    ConfigError
        No cache block, the array tier is switched off, a cache directory that cannot be used, an id that is not a plain name.
    OriginError
        A directory cannot be listed.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers!r}; it has to be a whole number from 1.")
    if ids is not None and split != "all":
        raise ConfigError("ids and split exclude each other. Give one of them.")
    reader = _reader(source)
    reader.relist()
    if ids is not None:
        chosen = list(dict.fromkeys(map(check_task_id, ids)))
    else:
        chosen = reader.task_ids if split == "all" else reader.split_task_ids()[split == "test"]
    enough = min(MOST_WORKERS, cores(), -(-2 * len(chosen) // DENSITIES_PER_WORKER))
    return WarmPlan(tuple(chosen), reader.missing if ids is None else (), max(1, min(workers or enough, 2 * len(chosen))), limit_bytes, reader)


def _reader(source: DataConfig | ZarrS3Reader) -> ZarrS3Reader:
    cache = source.tiers.config if isinstance(source, ZarrS3Reader) else cache_of(source)
    if cache is None:
        raise ConfigError("the reader has no cache, so there is nothing to fill. Give it one: ZarrS3Reader(..., cache={'dir': ...}).")
    if not cache.arrays.enabled:
        raise ConfigError("cache.arrays.enabled is false, and the array tier is what warm fills. Enable it; the byte tier fills by itself.")
    open_index(cache)
    if isinstance(source, ZarrS3Reader):
        return source
    # What is stored already is compared with the listing, not read: `zarrcache verify` reads it, and so does training at its first use.
    return open_reader(source.model_copy(update={"cache": cache.model_copy(update={"verify": "never"})}))


class _Warmer:
    """Warms one density after the other. Picklable; each process has its own."""

    def __init__(self, reader: ZarrS3Reader) -> None:
        self._reader = reader
        self._bypassed_in_a_row = 0

    def __call__(self, density: Density) -> WarmResult:
        if self._bypassed_in_a_row >= _FULL_AFTER:  # fetching what will not be stored would cost the origin and help nobody
            result, *_ = _look(self._reader, *density)
            if result.outcome == "bypass" and self._reader.tiers.arrays is not None:
                self._reader.tiers.arrays.drop(self._reader.key(*density))  # old, if it is there: training must not take it for fresh
            return result
        task_id, role = density
        try:
            outcome, nbytes = self._reader.ensure(task_id, role)
        except ZarrCacheError as exc:
            return _failure(density, exc)
        except Exception as exc:  # one strange store must not end a run of hours; the others are not to blame
            logger.warning("%s (%s) could not be read", task_id, role, exc_info=True)
            error = f"{task_id} ({role}) could not be read: {type(exc).__name__}: {exc}. Please report this with the store."
            return WarmResult(task_id, role, "failed", error=error)
        if outcome != "hit":
            self._bypassed_in_a_row = self._bypassed_in_a_row + 1 if outcome == "bypass" else 0
        return WarmResult(task_id, role, outcome, nbytes)


def _look(reader: ZarrS3Reader, task_id: str, role: Role) -> tuple[WarmResult, int, int]:
    """Whether a density is fresh (``hit``) or not (``bypass``), by one LIST; objects and bytes to fetch if not."""
    try:
        listed = reader.listing(task_id, role)
        assert reader.tiers.index is not None
        header = stored_header(reader.tiers.index, reader.key(task_id, role).digest)
    except ZarrCacheError as exc:
        return _failure((task_id, role), exc), 0, 0
    if header is not None and header.source == source_digest(listed):
        return WarmResult(task_id, role, "hit", header.nbytes), 0, 0
    return WarmResult(task_id, role, "bypass"), len(listed), sum(obj.size_bytes for obj in listed)


def _failure(density: Density, exc: ZarrCacheError) -> WarmResult:
    return WarmResult(*density, "failed", error=str(exc), is_down=isinstance(exc, (OriginUnavailableError, OriginAccessError)))
