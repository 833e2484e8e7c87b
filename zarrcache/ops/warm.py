"""Fill the array tier before a training: plan, estimate, execute, report (``zarrcache warm``).

>>> plan = plan_warm(DataConfig.from_yaml("configs/s3_cached.yaml"))  # doctest: +SKIP
>>> report = plan.execute()  # doctest: +SKIP
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from zarrcache._keys import FLOAT32, Channel, Role, check_task_ids, source_digest
from zarrcache._units import whole_number
from zarrcache.arrays import is_fetched_whole
from zarrcache.config import CacheConfig, DataConfig, cache_of
from zarrcache.data import ZarrS3Reader, training_count
from zarrcache.disk import SOUND, Index
from zarrcache.errors import (
    ArrayNotFoundError,
    ConfigError,
    OriginAccessError,
    OriginError,
    OriginNotFoundError,
    OriginUnavailableError,
    ZarrCacheError,
)
from zarrcache.ops.selection import concurrently, stored_header
from zarrcache.ops.warm_report import Density, Tally, WarmReport, WarmResult
from zarrcache.origin import refuse_secrets
from zarrcache.parallel import Died, Engine, Reserve, World, cores, spread
from zarrcache.train import node_of

__all__ = ["Split", "WarmEstimate", "WarmPlan", "plan_warm"]

logger = logging.getLogger(__name__)

Split = Literal["train", "test", "all"]
#: Processes, not threads: fetching and decoding run under one interpreter lock, which limits a
#: process to about 2,000 objects per second with any number of threads. A process starts in 0.6 s.
MAX_WORKERS = 8
DENSITIES_PER_WORKER = 16
#: Densities in flight per process: while one waits for its listing or its last objects, another
#: is fetched and decoded.
THREADS = 3
#: After this many consecutive densities that were not admitted, a process only compares the
#: remaining ones with the origin and fetches no more.
_FULL_AFTER = 3
#: Densities that a dry run compares with the origin.
_COMPARED = 1000
#: Seconds a worker process may go on after Ctrl-C. The next run fetches what it did not finish.
_STOP_S = 2.0


@dataclass(frozen=True, slots=True)
class WarmEstimate:
    """An estimate of the fetches of a plan, from listings alone.

    Attributes
    ----------
    ids : int
        Task ids of the plan.
    compared : int
        Densities that were compared with the origin. If these are not all of the plan, the other
        numbers are extrapolated from them.
    fresh, to_fetch : int
        Densities.
    requests, fetch_bytes : int
        Requests and stored bytes at the origin.
    failed : tuple of WarmResult
    lacking : tuple of str
        Ids of those compared that lack a channel; ``missing`` fills it or leaves them out.
    unread : int
        Compared files and zipped stores. A listing does not show whether they have
        all channels.
    refusal : str
        As in `WarmReport`.
    """

    ids: int
    compared: int
    fresh: int
    to_fetch: int
    requests: int
    fetch_bytes: int
    failed: tuple[WarmResult, ...]
    lacking: tuple[str, ...] = ()
    unread: int = 0
    refusal: str = ""

    @property
    def is_good(self) -> bool:
        """Whether every density could be compared."""
        return not self.failed


@dataclass(frozen=True)
class WarmPlan:
    """The densities to make warm. Planning fetches no object.

    Attributes
    ----------
    task_ids : tuple of str
    missing : tuple of str
        Ids of the map without input or label at the origin; left out, as in training.
    densities : tuple of (task_id, role, array)
        Those to fetch or to compare with the origin: all, or without ``revalidate`` those that
        are not cached.
    channels : tuple of Channel
        The channels of each id; each array once if input and label are the same directory.
    absent : tuple of (task_id, role, array)
        Densities that the origin is known to lack, which are not tried.
    revalidate : bool
        Cached densities are compared with the origin.
    workers : int
        Processes; 1 is the calling process, which reads one density after the other.
    limit_bytes : int or None
        Stop when this many decoded bytes are warm.
    stored : mapping
        Bytes on disk of the cached densities that are trusted, by channel and task id.
    """

    task_ids: tuple[str, ...]
    missing: tuple[str, ...]
    densities: tuple[Density, ...]
    channels: tuple[Channel, ...]
    absent: tuple[Density, ...]
    revalidate: bool
    workers: int
    limit_bytes: int | None
    reader: ZarrS3Reader = field(repr=False)
    stored: Mapping[Channel, Mapping[str, int]] = field(repr=False)

    @property
    def trusted(self) -> int:
        """Number of densities that are cached and taken for fresh without a request."""
        known = len(self.densities) + len(self.absent)
        return len(self.task_ids) * len(self.channels) - known

    @property
    def threads(self) -> int:
        """Densities in flight per process."""
        is_long = len(self.densities) > DENSITIES_PER_WORKER * self.workers
        return THREADS if self.workers > 1 and is_long else 1

    @property
    def cache(self) -> CacheConfig:
        """Settings of the cache to fill."""
        assert self.reader.cache_config is not None
        return self.reader.cache_config

    def estimate(self, progress: Callable[[int, int], object] | None = None) -> WarmEstimate:
        """Compare up to 1,000 densities of the plan with the origin: one LIST each, no GET.

        Parameters
        ----------
        progress : callable, optional
            Called with the number of densities compared so far, and to compare.
        """
        chosen = np.linspace(0, len(self.densities) - 1, min(_COMPARED, len(self.densities)))
        densities = [self.densities[place] for place in chosen.astype(np.int64)]
        with concurrently(lambda one: _compare(self.reader, *one), densities, progress) as answers:
            results = list(answers)
        found: dict[Channel, dict[str, bool]] = defaultdict(dict)
        unread = set()
        for result in results:
            density = task_id, role, array = result.task_id, result.role, result.array
            if not self.reader.is_optional(role, array):
                continue
            if result.outcome == "bypass" and _is_whole(self.reader, density):
                unread.add((task_id, role))
            elif result.is_absent or result.outcome != "failed":
                found[Channel(role, array)][task_id] = result.is_absent
        if found:
            self.reader.absences.note(found)
        outcomes = Counter(result.outcome for result in results)
        lacking = {result.task_id for result in results if result.outcome == "absent"}
        lacking |= {task_id for task_id, *_ in self.absent}
        scale = len(self.densities) / max(1, len(densities))
        return WarmEstimate(
            ids=len(self.task_ids),
            compared=len(densities),
            fresh=self.trusted + round(scale * outcomes["hit"]),
            to_fetch=round(scale * outcomes["bypass"]),
            requests=len(self.densities)
            + round(scale * sum(result.listed_objects for result in results)),
            fetch_bytes=round(scale * sum(result.listed_bytes for result in results)),
            failed=tuple(result for result in results if result.outcome == "failed"),
            lacking=tuple(id_ for id_ in self.task_ids if id_ in lacking),
            unread=len(unread),
            refusal=self.reader.absences.refusal(),
        )

    def execute(
        self,
        progress: Callable[[WarmResult], object] | None = None,
        *,
        engine: Engine | None = None,
    ) -> WarmReport:
        """Fetch densities that are not fresh.

        The report lists densities that cannot be read; the others are fetched.
        After an interruption (Ctrl-C, kill), run the same plan again: stored densities are not
        fetched a second time.

        Parameters
        ----------
        progress : callable, optional
            Called in this process with each result as it arrives.
        engine : Engine, optional
            Runs the work in processes of this machine, where the cache is. Default: ``workers``
            processes.

        Raises
        ------
        OriginError
            Many consecutive densities failed: the origin is unavailable or denies access.
        ConfigError
            The cache directory became unusable during the run, or ``s3_kwargs`` has secrets that
            an ``engine`` would send to a cluster.
        """
        if engine is not None:
            refuse_secrets(self.reader.s3_kwargs)
        start_s, before = time.monotonic(), self.reader.stats
        tally = Tally(
            self.reader,
            self.task_ids,
            self.channels,
            untried=self.densities,
            absent=self.absent,
            stored=self.stored,
        )
        target_bytes = sys.maxsize if self.limit_bytes is None else self.limit_bytes
        down = 0
        with closing(self._results(engine)) as results:
            # Compare with the target before waiting for a result: trusted densities may suffice.
            while tally.nbytes < target_bytes and (result := next(results, None)) is not None:
                tally.add(result)
                if progress is not None:
                    progress(result)
                down = down + 1 if result.is_down else 0
                if down >= max(4, 2 * self.workers * self.threads):
                    raise OriginError(
                        f"The origin does not answer, or denies access: {down} densities in a row "
                        f"failed. {tally.warm} of {len(self.task_ids) * len(self.channels)} "
                        "densities are warm; run the same command again to continue. "
                        f"The last error: {result.error}"
                    )
        index = _index(self.reader)
        index.reopen()  # worker processes may have replaced a deleted directory or broken index
        index.open()
        if tally.found:
            self.reader.absences.note(tally.found)
        return tally.report(
            self.reader.stats - before,
            time.monotonic() - start_s,
            self.reader.stored(),
            index.volume_bytes(),
        )

    def _results(self, engine: Engine | None) -> Generator[WarmResult]:
        warmer = _Warmer(self.reader)
        if engine is None and self.workers == 1:
            yield from map(warmer, self.densities)
            return
        if engine is None:
            engine = functools.partial(
                spread,
                workers=self.workers,
                threads=self.threads,
                budget_bytes=self.cache.fetch.memory,
                stop_s=_STOP_S,
            )
        with closing(engine(warmer, self.densities)) as outcomes:
            for density, outcome in outcomes:
                if isinstance(outcome, Died):
                    task_id, role, array = density
                    error = (
                        f"{task_id} ({role}): two worker processes died while reading it "
                        f"({outcome}). Retry with fewer --workers."
                    )
                    yield WarmResult(task_id, role, "failed", error=error, array=array)
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
    """Find the densities that have to be fetched or compared with the origin.

    With ``cache.revalidate: never`` cached densities are taken for fresh, as in training, and the
    directories are listed only if their stored listings lack an id: no request on a warm node.
    Otherwise both directories are listed, and every density will be compared with the origin.

    Parameters
    ----------
    source : DataConfig or ZarrS3Reader
        With a cache.
    split : {"train", "test", "all"}
        Part of the config's ids.
    ids : iterable of str, optional
        These ids instead, whether or not the map has them. An id that the origin does not have is
        a failure of the run.
    revalidate : bool, optional
        List the directories and compare cached densities with the origin. Default: False with
        ``cache.revalidate: never``, else True.
    workers : int, optional
        Processes; 1 is the calling process, which reads one density after the other.
        Default: min(max(2, cores), 8, densities / 16).
    limit_bytes : int, optional
        Stop when this many decoded bytes are warm.
    world : World, optional
        Only this node's share, as ``NodeSampler(assignment="node")`` reads it, of the training set
        and of the test set.

    Raises
    ------
    ConfigError
        There is no cache block, the array tier is disabled, the cache directory cannot be used, or
        an id is not a plain name.
    OriginError
        A directory cannot be listed.
    """
    if workers is not None:
        whole_number("workers", workers, least=1)
    if ids is not None and split != "all":
        raise ConfigError("ids and split exclude each other. Give one of them.")
    reader = _open_reader(source)
    asks = not reader.trusts_entries if revalidate is None else revalidate
    wanted = reader.mapped_ids() if ids is None else check_task_ids(list(ids))
    if asks:
        reader.relist()
    else:
        reader.relist_unless_known(wanted)
    if ids is None:
        wanted = _ids_of(reader, split)
        if wanted and reader.split_file is None:
            try:
                training_count(len(reader.stored_ids), reader.tf)
            except ConfigError as exc:  # hours later it would stop the training
                logger.warning("%s", exc)
    if world is not None:
        # The sampler assigns each split separately: shares of all ids together would differ.
        parts = _split_of(reader) if ids is None and split == "all" else (wanted,)
        own = {task_id for part in parts for task_id in _share(part, world)}
        wanted = [task_id for task_id in wanted if task_id in own]
    task_ids = tuple(dict.fromkeys(wanted))
    channels = reader.channels
    stored: Mapping[Channel, Mapping[str, int]] = {} if asks else reader.stored()
    # With `missing: error` the origin is asked once more: they may have been converted since.
    known = {} if asks or reader.if_missing == "error" else reader.absences.stored()
    absent = tuple(
        (task_id, *channel)
        for task_id in task_ids
        for channel in channels
        if task_id in known.get(channel, ())
    )
    if reader.if_missing == "drop":
        dropped = {task_id for task_id, *_ in absent}
        task_ids, absent = tuple(id_ for id_ in task_ids if id_ not in dropped), ()
    densities = tuple(
        (task_id, *channel)
        for task_id in task_ids
        for channel in channels
        if task_id not in stored.get(channel, ()) and task_id not in known.get(channel, ())
    )
    if workers is None:
        # At least two, also on one core: a worker waits more than it computes.
        enough = -(-len(densities) // DENSITIES_PER_WORKER)
        workers = min(MAX_WORKERS, max(2, cores()), enough)
    return WarmPlan(
        task_ids=task_ids,
        missing=reader.missing if ids is None else (),
        densities=tuple(_in_order(reader, channels, densities)),
        channels=channels,
        absent=absent,
        revalidate=asks,
        workers=max(1, min(workers, len(densities))),
        limit_bytes=limit_bytes,
        reader=reader,
        stored=stored,
    )


def _in_order(
    reader: ZarrS3Reader, channels: Sequence[Channel], densities: Sequence[Density]
) -> Sequence[Density]:
    """Put densities first that save requests for the others, or free bytes."""
    if len(channels) > len(reader.roles):
        # Reading the first array of a file or a zipped store also stores the others.
        firsts = {channel.role: channel.array for channel in reversed(channels)}
        densities = sorted(
            densities, key=lambda one: one[2] != firsts[one[1]] and _is_whole(reader, one)
        )
    assert reader.cache_config is not None
    if reader.cache_config.arrays.encoding != FLOAT32:
        # Encoding an entry in float32 frees bytes for the others.
        in_float32 = reader.stored(in_float32=True)
        densities = sorted(densities, key=lambda one: one[0] not in in_float32[Channel(*one[1:])])
    return densities


def _ids_of(reader: ZarrS3Reader, split: Split) -> list[str]:
    if split != "all":
        return _split_of(reader)[split == "test"]
    if reader.split_file is None:
        return reader.stored_ids  # this run finds out which of them lack a channel
    train, test = _split_of(reader)  # what the split file leaves out is not trained on
    return [*train, *test]


def _is_whole(reader: ZarrS3Reader, density: Density) -> bool:
    """Whether a density is fetched with all others of its source."""
    task_id, role, _ = density
    store = reader.store_names(role).get(task_id)
    return store is not None and is_fetched_whole(store)


def _split_of(reader: ZarrS3Reader) -> tuple[list[str], list[str]]:
    """Training and test ids. This run finds out their channels, unless the split depends on them.

    If it does, the origin is asked for channels that are neither cached nor known.
    """
    return reader.split_task_ids(decided=reader.if_missing == "drop")


def _share(task_ids: Sequence[str], world: World) -> list[str]:
    """The ids that ``NodeSampler(assignment="node")`` assigns to the node of ``world``."""
    nodes = node_of(task_ids, world.nodes)
    pairs = zip(task_ids, nodes, strict=True)
    return [task_id for task_id, node in pairs if node == world.node]


def _open_reader(source: DataConfig | ZarrS3Reader) -> ZarrS3Reader:
    """The reader of a config, with its cache directory opened."""
    cache = source.cache_config if isinstance(source, ZarrS3Reader) else cache_of(source)
    if cache is None:
        raise ConfigError(
            "The reader has no cache, so there is nothing to fill. Pass one: "
            "ZarrS3Reader(..., cache={'dir': ...})."
        )
    if not cache.arrays.enabled:
        raise ConfigError(
            "cache.arrays.enabled is false, but warm fills the array tier. Set it to true; the "
            "byte tier fills by itself during training."
        )
    if isinstance(source, ZarrS3Reader):
        reader = source
    else:
        # Entries are compared with the origin's listing, not read: `zarrcache verify`, and training
        # at first use, verify their checksums.
        unverified = cache.model_copy(update={"verify": "never"})
        reader = ZarrS3Reader.from_config(source.model_copy(update={"cache": unverified}))
    _index(reader).open()
    return reader


def _index(reader: ZarrS3Reader) -> Index:
    assert reader.cache.index is not None  # a plan's reader has a cache
    return reader.cache.index


class _Warmer:
    """Makes one density warm per call. Picklable; each process has one, shared by its threads."""

    def __init__(self, reader: ZarrS3Reader) -> None:
        self._reader = reader
        self._bypassed_in_a_row = 0

    def __call__(self, density: Density, reserve: Reserve | None = None) -> WarmResult:
        # Once the cache is full, fetching would cost requests without storing anything.
        if self._bypassed_in_a_row >= _FULL_AFTER:
            result = _compare(self._reader, *density)
            if result.outcome == "bypass" or result.is_absent:
                self._drop(density)
            return result
        task_id, role, array = density
        flaws = [SOUND]
        try:
            outcome, nbytes = self._reader.ensure(
                task_id, role, array, reserve=reserve, on_flaws=flaws.append
            )
        except ZarrCacheError as exc:
            logger.debug("%s (%s) failed", task_id, role, exc_info=True)
            result = _failure(density, exc, self._reader)
            if result.is_absent:
                self._drop(density)
            return result
        if outcome != "hit":
            self._bypassed_in_a_row = self._bypassed_in_a_row + 1 if outcome == "bypass" else 0
        return WarmResult(task_id, role, outcome, nbytes, flaws=flaws[-1], array=array)

    def _drop(self, density: Density) -> None:
        """Drop a stale entry, so that training does not read it as fresh.

        If the store no longer has the array, the entry would be a channel of another version than
        the others.
        """
        key = self._reader.key(*density)
        keys = (key,) if key.exact is None else (key, key.exact)
        _index(self._reader).drop([one.digest for one in keys])


def _compare(reader: ZarrS3Reader, task_id: str, role: Role, array: str) -> WarmResult:
    """Compare one density with the origin, by one LIST.

    The result is ``hit`` if it is fresh, ``bypass`` if it would be fetched, or ``failed``.
    """
    try:
        listed = reader.listing(task_id, role, array)
    except ZarrCacheError as exc:
        return _failure((task_id, role, array), exc, reader)
    key = reader.key(task_id, role, array)
    for one in (key, key.exact):  # an entry in float32 is encoded without a request
        header = stored_header(_index(reader), one.digest) if one is not None else None
        if header is not None and header.source == source_digest(listed):
            return WarmResult(
                task_id, role, "hit", header.decoded_bytes, flaws=header.flaws, array=array
            )
    return WarmResult(
        task_id,
        role,
        "bypass",
        array=array,
        listed_objects=len(listed),
        listed_bytes=sum(obj.size_bytes for obj in listed),
    )


def _failure(density: Density, exc: ZarrCacheError, reader: ZarrS3Reader) -> WarmResult:
    task_id, role, array = density
    is_absent = isinstance(exc, ArrayNotFoundError) and reader.is_optional(role, array)
    if is_absent and reader.if_missing != "error":
        return WarmResult(task_id, role, "absent", array=array, is_absent=True)
    return WarmResult(
        task_id,
        role,
        "failed",
        error=str(exc),
        array=array,
        is_absent=is_absent,
        is_down=isinstance(exc, (OriginUnavailableError, OriginAccessError)),
        is_gone=isinstance(exc, OriginNotFoundError),
    )
