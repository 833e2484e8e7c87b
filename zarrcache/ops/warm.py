"""Fill the cache ahead: what ``zarrcache warm`` does.

>>> plan = plan_warm(DataConfig.from_yaml("configs/s3_cached.yaml"))  # doctest: +SKIP
>>> report = plan.execute()  # doctest: +SKIP
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from zarrcache._keys import ROLES, Role, check_task_ids, source_digest, stem_of
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.data import ZarrS3Reader, ids_of, open_reader, read_map
from zarrcache.disk import BLOCK_BYTES, disk_bytes
from zarrcache.errors import (
    ConfigError,
    OriginAccessError,
    OriginError,
    OriginNotFoundError,
    OriginUnavailableError,
    ZarrCacheError,
)
from zarrcache.ops._sizing import measure_size
from zarrcache.ops._warm_report import Tally, WarmEstimate, WarmReport, WarmResult
from zarrcache.ops.selection import (
    cache_of,
    concurrently,
    open_index,
    stored_header,
    stored_listing,
)
from zarrcache.parallel import Died, Engine, Reserve, World, cores, spread
from zarrcache.train import node_of

__all__ = ["Density", "Split", "WarmPlan", "plan_warm"]

logger = logging.getLogger(__name__)

Split = Literal["train", "test", "all"]
Density = tuple[str, Role]

#: Processes, not threads: one process decodes and asks for about 2,000 objects a second, whatever
#: the number of its threads, because all of it happens under one interpreter lock. Starting one
#: costs 0.6 s.
MOST_WORKERS = 8
DENSITIES_PER_WORKER = 16
#: Densities at a time in each process: while one waits for its listing, or for its last objects,
#: another is fetched and decoded.
LANES = 3
#: Densities in a row that did not fit, after which a process only looks whether the others are
#: fresh and fetches no more.
_FULL_AFTER = 3
#: Densities that did not fit and were not read, whose size the origin is asked for at the end: one
#: LIST and one small GET each.
_MEASURED = 256
#: Of zipped stores fewer: they have to be fetched whole.
_MEASURED_ZIPPED = 16
#: How long a process may go on after Ctrl-C. What it had not finished is fetched by the next run.
_STOP_S = 2.0


@dataclass(frozen=True)
class WarmPlan:
    """What is to be warm. Making it fetched nothing.

    Attributes
    ----------
    task_ids : tuple of str
    missing : tuple of str
        Ids of the map whose input or label the origin does not have; they are left out, as in
        training.
    densities : tuple of (task_id, role)
        What the origin is asked for: all, or without ``revalidate`` those that are not in the
        cache.
    roles : tuple of {"data", "label"}
        One where input and label are the same directory.
    revalidate : bool
        What is in the cache is compared with the origin.
    workers : int
        Processes; 1 is this process itself, one density after the other.
    limit_bytes : int or None
        Stop when this many decoded bytes are warm.
    """

    task_ids: tuple[str, ...]
    missing: tuple[str, ...]
    densities: tuple[Density, ...]
    roles: tuple[Role, ...]
    revalidate: bool
    workers: int
    limit_bytes: int | None
    reader: ZarrS3Reader = field(repr=False)

    @property
    def trusted(self) -> int:
        """Densities that are in the cache and are not asked for."""
        return len(self.task_ids) * len(self.roles) - len(self.densities)

    @property
    def lanes(self) -> int:
        """Densities at a time in each process."""
        return (
            LANES
            if self.workers > 1 and len(self.densities) > DENSITIES_PER_WORKER * self.workers
            else 1
        )

    @property
    def cache(self) -> CacheConfig:
        """Settings of the cache that is filled."""
        assert self.reader.cache.config is not None
        return self.reader.cache.config

    def estimate(self, progress: Callable[[int], object] | None = None) -> WarmEstimate:
        """List every store that is asked for and compare with what is stored; one LIST a density,
        nothing is fetched.

        Parameters
        ----------
        progress : callable, optional
            Called with the number of densities looked at so far.
        """
        fresh, requests, fetch_bytes = self.trusted, len(self.densities), 0
        failed = []
        with closing(
            concurrently(lambda density: _look(self.reader, *density), self.densities)
        ) as looked:
            for done, (result, objects, nbytes) in enumerate(looked, start=1):
                requests += objects
                fetch_bytes += nbytes
                fresh += result.outcome == "hit"
                failed += [result] if result.outcome == "failed" else []
                if progress is not None:
                    progress(done)
        return WarmEstimate(
            fresh,
            self.trusted + len(self.densities) - fresh - len(failed),
            requests,
            fetch_bytes,
            tuple(failed),
        )

    def execute(
        self,
        progress: Callable[[WarmResult], object] | None = None,
        *,
        engine: Engine | None = None,
    ) -> WarmReport:
        """Fetch what is not fresh.

        A density that cannot be read is named in the report, and the others go on. Interrupted
        (Ctrl-C) or killed, run the same again: what is stored is not fetched again.

        Parameters
        ----------
        progress : callable, optional
            Called here, in this process, with each result as it comes.
        engine : Engine, optional
            What does the work, with processes of this machine: the cache is here. Default:
            ``workers`` processes.

        Raises
        ------
        OriginError
            Everything fails: the origin is down, or no longer lets us in.
        """
        start_s, before = time.monotonic(), self.reader.stats
        tally = Tally(self.task_ids, self.roles, self.densities, self.reader.stored)
        most_bytes = sys.maxsize if self.limit_bytes is None else self.limit_bytes
        down = 0
        with closing(self._results(engine)) as arriving:
            # Looked at before a result is waited for: what was trusted may be enough.
            while tally.nbytes < most_bytes and (result := next(arriving, None)) is not None:
                tally.add(result)
                if progress is not None:
                    progress(result)
                down = down + 1 if result.is_down else 0
                if down >= max(4, 2 * self.workers * self.lanes):
                    raise OriginError(
                        f"the origin stopped answering, {down} densities in a row failed. "
                        f"{tally.warm} of {len(self.task_ids) * len(self.roles)} "
                        f"are warm; run the same again to go on. The last error: {result.error}"
                    )
        index = open_index(self.cache)  # an error in words, if it has gone
        measured = self._measured(tally)
        seconds = time.monotonic() - start_s
        return tally.report(
            self.reader.stats - before,
            seconds,
            measured,
            lambda: index.volume_bytes() + self._unstored_bytes(),
        )

    def _measured(self, tally: Tally) -> list[int]:
        """Bytes that densities which did not fit would take on disk; without those that the origin
        does not tell.
        """

        def size(density: Density) -> int:
            try:
                return measure_size(self.reader, *density).disk_bytes
            except ZarrCacheError:
                return 0

        asked = tally.unsized(_MEASURED)
        if any(self._is_zipped(density) for density in asked):
            asked = tally.unsized(_MEASURED_ZIPPED)
        with closing(concurrently(size, asked)) as sizes:
            return [found for found in sizes if found]

    def _is_zipped(self, density: Density) -> bool:
        try:
            return self.reader.store_name(*density).endswith(".zip")
        except OriginNotFoundError:
            return False

    def _unstored_bytes(self) -> int:
        """What the listings of the directories take on disk, if they too did not fit."""
        unstored = [
            origin
            for origin in map(self.reader.origin, self.roles)
            if stored_listing(self.reader.cache, origin) is None
        ]
        try:
            listings = [
                {stem: name for name in origin.list_names() if (stem := stem_of(name)) is not None}
                for origin in unstored
            ]
        except OriginError:  # what was done is to be told all the same
            return 0
        return sum(
            BLOCK_BYTES + disk_bytes(len(json.dumps(names, separators=(",", ":"))))
            for names in listings
        )

    def _results(self, engine: Engine | None) -> Generator[WarmResult]:
        warmer = _Warmer(self.reader)
        if engine is None and self.workers == 1:
            for density in self.densities:
                yield warmer(density)
            return
        here = functools.partial(
            spread,
            workers=self.workers,
            lanes=self.lanes,
            budget_bytes=self.cache.fetch.memory,
            stop_s=_STOP_S,
        )
        with closing((engine or here)(warmer, self.densities)) as outcomes:
            for (task_id, role), outcome in outcomes:
                if isinstance(outcome, Died):
                    error = f"{task_id} ({role}): the process that read it was ended by {outcome}; a second one too. Run again with fewer workers."
                    yield WarmResult(task_id, role, "failed", error=error)
                else:
                    yield outcome


def plan_warm(
    source: DataConfig | ZarrS3Reader,
    *,
    split: Split = "all",
    ids: Iterable[str] | None = None,
    revalidate: bool | None = None,
    workers: int | None = None,
    limit_bytes: int | None = None,
    world: World | None = None,
) -> WarmPlan:
    """Find out which densities the origin has to be asked for.

    With ``cache.revalidate: never`` what is in the cache is taken for fresh, as in training, and
    the directories are listed only if the listing that is stored with the entries lacks an id. On a
    warm node that is no request. Otherwise both directories are listed anew, and every density will
    be compared with the origin.

    Parameters
    ----------
    source : DataConfig or ZarrS3Reader
        With a cache.
    split : {"train", "test", "all"}
        Which ids of the config.
    ids : iterable of str, optional
        These ids instead, whether or not the map has them; one that the origin does not have will
        be a failure.
    revalidate : bool, optional
        List the directories, and compare what is in the cache with the origin. Default: not with
        ``cache.revalidate: never``.
    workers : int, optional
        Processes; with 1, this one, one density after the other. Default: one a core that this
        process may use and 16 densities that are asked for, at least 2 if there are more than 16, 8
        at the most.
    limit_bytes : int, optional
        Stop when this many decoded bytes are warm.
    world : World, optional
        Only what belongs to this node, as ``NodeSampler(assignment="node")`` reads it: of the
        training set its share, and so of the test set.

    Raises
    ------
    ConfigError
        No cache block, the array tier is switched off, a cache directory that cannot be used, an id
        that is not a plain name.
    OriginError
        A directory cannot be listed.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers!r}; it has to be a whole number from 1.")
    if ids is not None and split != "all":
        raise ConfigError("ids and split exclude each other. Give one of them.")
    reader = _reader(source)
    asks = (
        reader.cache.config is None or reader.cache.config.revalidate != "never"
        if revalidate is None
        else revalidate
    )
    wanted = (
        ids_of(read_map(reader.map_dir), reader.functional)
        if ids is None
        else check_task_ids(list(ids))
    )
    if asks or not _are_listed(reader, wanted):
        reader.relist()
    if ids is None:
        wanted = reader.task_ids if split == "all" else reader.split_task_ids()[split == "test"]
    if world is not None:
        # A share is a share of what is shuffled together: cut from all ids at once it would be
        # another one.
        parts = reader.split_task_ids() if ids is None and split == "all" else (wanted,)
        own = {
            task_id
            for part in parts
            for task_id, node in zip(part, node_of(part, world.nodes), strict=True)
            if node == world.node
        }
        wanted = [task_id for task_id in wanted if task_id in own]
    chosen = tuple(dict.fromkeys(wanted))
    # Asked for once where it is input and label.
    roles = (
        ROLES[:1]
        if reader.origin("data").url_of("") == reader.origin("label").url_of("")
        else ROLES
    )
    there: Mapping[Role, Container[str]] = dict.fromkeys(roles, ()) if asks else reader.stored()
    densities = tuple(
        (task_id, role) for task_id in chosen for role in roles if task_id not in there[role]
    )
    # Two on a machine of one core as well: a worker waits more than it computes.
    enough = min(MOST_WORKERS, max(2, cores()), -(-len(densities) // DENSITIES_PER_WORKER))
    return WarmPlan(
        task_ids=chosen,
        missing=reader.missing if ids is None else (),
        densities=densities,
        roles=roles,
        revalidate=asks,
        workers=max(1, min(workers or enough, len(densities))),
        limit_bytes=limit_bytes,
        reader=reader,
    )


def _are_listed(reader: ZarrS3Reader, task_ids: Sequence[str]) -> bool:
    """Whether the listings that are stored with the entries have all of these ids."""
    listings = [stored_listing(reader.cache, reader.origin(role)) for role in ROLES]
    return all(names is not None and names.keys() >= set(task_ids) for names in listings)


def _reader(source: DataConfig | ZarrS3Reader) -> ZarrS3Reader:
    cache = source.cache.config if isinstance(source, ZarrS3Reader) else cache_of(source)
    if cache is None:
        raise ConfigError(
            "the reader has no cache, so there is nothing to fill. Give it one: ZarrS3Reader(..., "
            "cache={'dir': ...})."
        )
    if not cache.arrays.enabled:
        raise ConfigError(
            "cache.arrays.enabled is false, and the array tier is what warm fills. Enable it; the "
            "byte tier fills by itself."
        )
    open_index(cache)
    if isinstance(source, ZarrS3Reader):
        return source
    # What is stored already is compared with the listing, not read: `zarrcache verify` reads it,
    # and so does training at its first use.
    return open_reader(
        source.model_copy(update={"cache": cache.model_copy(update={"verify": "never"})})
    )


class _Warmer:
    """Warms densities. Picklable; each process has its own, for all its threads."""

    def __init__(self, reader: ZarrS3Reader) -> None:
        self._reader = reader
        self._bypassed_in_a_row = 0

    def __call__(self, density: Density, reserve: Reserve | None = None) -> WarmResult:
        # fetching what will not be stored would cost the origin and help nobody
        if self._bypassed_in_a_row >= _FULL_AFTER:
            result, *_ = _look(self._reader, *density)
            if result.outcome == "bypass" and self._reader.cache.arrays is not None:
                # old, if it is there: training must not take it for fresh
                self._reader.cache.arrays.drop(self._reader.key(*density))
            return result
        task_id, role = density
        try:
            outcome, nbytes = self._reader.ensure(task_id, role, reserve=reserve)
        except ZarrCacheError as exc:
            return _failure(density, exc)
        except Exception as exc:
            # one strange store must not end a run of hours; the others are not to blame
            logger.warning("%s (%s) could not be read", task_id, role, exc_info=True)
            error = f"{task_id} ({role}) could not be read: {type(exc).__name__}: {exc}. Please report this with the store."
            return WarmResult(task_id, role, "failed", error=error)
        if outcome != "hit":
            self._bypassed_in_a_row = self._bypassed_in_a_row + 1 if outcome == "bypass" else 0
        return WarmResult(task_id, role, outcome, nbytes)


def _look(reader: ZarrS3Reader, task_id: str, role: Role) -> tuple[WarmResult, int, int]:
    """Whether a density is fresh (``hit``) or not (``bypass``), by one LIST; objects and bytes to
    fetch if not.
    """
    try:
        listed = reader.listing(task_id, role)
        assert reader.cache.index is not None
        header = stored_header(reader.cache.index, reader.key(task_id, role).digest)
    except ZarrCacheError as exc:
        return _failure((task_id, role), exc), 0, 0
    if header is not None and header.source == source_digest(listed):
        return WarmResult(task_id, role, "hit", header.nbytes), 0, 0
    return WarmResult(task_id, role, "bypass"), len(listed), sum(obj.size_bytes for obj in listed)


def _failure(density: Density, exc: ZarrCacheError) -> WarmResult:
    is_down, is_gone = (
        isinstance(exc, (OriginUnavailableError, OriginAccessError)),
        isinstance(exc, OriginNotFoundError),
    )
    return WarmResult(*density, "failed", error=str(exc), is_down=is_down, is_gone=is_gone)
