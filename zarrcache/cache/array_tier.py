"""The array tier: decoded whole arrays, found through the index, mapped on a hit."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from typing import Any, Literal

import numpy as np

from zarrcache._keys import ArrayKey, file_digest
from zarrcache._shared_memory import SharedSet
from zarrcache._units import format_bytes
from zarrcache.cache.loans import Loans
from zarrcache.config import CacheConfig
from zarrcache.disk import (
    ARRAY,
    CACHE_FAULTS,
    LENT,
    Admission,
    Entry,
    EntryHeader,
    EntryStream,
    Index,
    Intent,
    Stored,
    array_note,
    disk_bytes,
    header_of,
    is_fresh,
    kind_of,
    map_entry,
    publish,
    write_entry,
)
from zarrcache.errors import CorruptEntryError
from zarrcache.stats import Counters, LogOnce

__all__ = ["ArrayCache", "EntryInfo"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One entry of the array tier as a listing shows it. ``stored_s`` is seconds since 1970."""

    key: ArrayKey
    filename: str
    size_bytes: int
    stored_s: float


class ArrayCache:
    """Entries by :class:`~zarrcache._keys.ArrayKey`. Safe from any thread or process; pickles as
    its configuration.

    A fault of the cache (full disk, broken index, deleted directory) is a miss or a pass-through,
    counted, and logged once a kind.

    Parameters
    ----------
    config : CacheConfig
    counters : Counters
        ``purges`` and ``cache_errors`` are counted here; hits and misses by the reader, which knows
        how a read ended.
    index : Index, optional
        Shared with the byte tier.
    verified : SharedSet, optional
        Entries whose checksum some process of this run has found right; with ``verify: first`` they
        are not read through again.
    """

    def __init__(
        self,
        config: CacheConfig,
        counters: Counters,
        *,
        index: Index | None = None,
        verified: SharedSet | None = None,
    ) -> None:
        self._config = config
        self._counters = counters
        self.index = index or Index(config)
        self._verified = verified or SharedSet()
        #: Where a prefetcher keeps what is not admitted. Not pickled.
        self.loans: Loans | None = None
        self._log_once = LogOnce()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._config, self._counters, self._verified)

    def get(self, key: ArrayKey, *, source: str | None = None) -> Entry | None:
        """The entry of ``key``, mapped; None if it is not there.

        Parameters
        ----------
        key : ArrayKey
        source : str, optional
            What the origin lists now (:func:`zarrcache._keys.source_digest`); an entry of anything
            else is stale: dropped, and a miss.
        """
        stored: Stored | None = None
        try:
            stored = self.index.lookup(key.digest)
            if stored is None:
                return self._borrowed(key, source)
            entry = map_entry(self.index.path_of(stored))
        except FileNotFoundError:  # evicted between the row and the file
            return None
        except CorruptEntryError as exc:
            self._purge(key, stored.filename if stored else "", str(exc))
            return None
        except CACHE_FAULTS as exc:
            self._fault("read", key, exc)
            return None
        if entry.header.key != key:
            self._purge(
                key, stored.filename, f"it holds {entry.header.key.url} {entry.header.key.array}"
            )
            return None
        if not is_fresh(entry.header.source, source):
            # Dropped at once: whatever becomes of the fetch that follows, nobody may be given this
            # one again.
            self._drop(key, stored.filename)
            return None
        if self._is_checked_now(key, stored.filename):
            try:
                is_intact = entry.is_intact()
            except OSError as exc:
                self._fault("read", key, exc)
                return None
            if not is_intact:
                self._purge(key, stored.filename, "its checksum does not match")
                return None
            self._verified.add(file_digest(stored.filename))
        return entry

    def _borrowed(self, key: ArrayKey, source: str | None) -> Entry | None:
        """What a prefetcher has lent: read once, and removed."""
        lent = self.index.lookup(LENT + key.digest) if self.loans is None else None
        if lent is None:
            return None
        entry = map_entry(self.index.path_of(lent))
        is_right = (
            entry.header.key == key
            and is_fresh(entry.header.source, source)
            and (self._config.verify == "never" or entry.is_intact())
        )
        # A copy: the file's room is for the next loan, and a mapped file keeps it. It also reaches
        # a training process that would come too late.
        taken = Entry(entry.header, entry.array.copy()) if is_right else None
        self.index.give_back(key.digest, lent.filename)
        return taken

    def _is_checked_now(self, key: ArrayKey, filename: str) -> bool:
        # A listing decides which materials there are, and is read once a run: always.
        if key.is_listing or self._config.verify == "always":
            return True
        return self._config.verify == "first" and file_digest(filename) not in self._verified

    def put(self, key: ArrayKey, array: np.ndarray[Any, np.dtype[Any]], *, source: str) -> bool:
        """Store a decoded array. False if it was not admitted or the cache failed: the caller has
        the array anyway.
        """
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        header = header_of(key, array, source)
        return self._store(header, lambda file: write_entry(file, header, array))[0] == "stored"

    def take(self, incoming: EntryStream) -> tuple[Entry | None, bool]:
        """Store an entry that comes from elsewhere, as :meth:`put`.

        Returns
        -------
        Entry or None
            Mapped, if it was stored or lent. None: ``incoming.is_spent`` says whether it can still
            be read.
        bool
            Whether it was stored.

        Raises
        ------
        CorruptEntryError
            It broke off, or its checksum does not match. Nothing is stored.
        """
        key = incoming.header.key
        outcome, filename = self._store(incoming.header, incoming.write)
        if outcome == "stored":
            return self.get(key, source=incoming.header.source), True
        if outcome == "lent":
            try:
                return map_entry(self.index.dir.root / filename), False
            except FileNotFoundError:  # the training has taken it already
                pass
            except (CorruptEntryError, *CACHE_FAULTS) as exc:
                self._fault("read", key, exc)
        return None, False

    def _store(
        self, header: EntryHeader, write: Callable[[FileIO], object]
    ) -> tuple[Literal["stored", "lent", "refused", "failed"], str]:
        """What became of an entry, and its file's name."""
        key = header.key
        filename = f"entries/{key.digest[:2]}/{key.digest}-{secrets.token_hex(4)}"
        intent: Intent | None = None
        try:
            size_bytes = disk_bytes(header.file_bytes)
            outcome = self.index.begin(filename, size_bytes)
            # what is stored under this key is stale: no reason to keep it
            if outcome is Admission.OVER_LIMIT and self.index.drop([key.digest]):
                outcome = self.index.begin(filename, size_bytes)
            if isinstance(outcome, Admission):
                if self.loans is not None and self.loans.lend(key.digest, filename, size_bytes):
                    self._publish(filename, header, write)
                    return "lent", filename
                self._log_once.warning(
                    outcome.name,
                    logger,
                    "not cached, read from the origin in every epoch: %s (%s): %s",
                    key.url,
                    format_bytes(header.nbytes),
                    outcome.value,
                )
                return "refused", filename
            intent = outcome
            self._publish(filename, header, write)
            self.index.commit(intent, key.digest, kind_of(key), array_note(key))
            intent = None
        except CACHE_FAULTS as exc:
            self._fault("write", key, exc)
            return "failed", filename
        finally:
            # also after Ctrl-C: room that nobody will use must not stay reserved
            if intent is not None:
                self._abort(intent)
        return "stored", filename

    def _publish(
        self, filename: str, header: EntryHeader, write: Callable[[FileIO], object]
    ) -> None:
        path = self.index.dir.root / filename
        self.index.dir.make(path.parent)
        publish(path, write, expected_bytes=header.file_bytes, mode=self.index.dir.file_mode)

    def drop(self, key: ArrayKey) -> int:
        """Evict one entry. Returns the bytes freed."""
        return self.index.drop([key.digest])

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry, oldest first."""
        for row in self.index.rows(ARRAY):
            origin, url, array = row.note.split("\n")
            yield EntryInfo(
                ArrayKey(origin, url, array), row.filename, row.size_bytes, row.stored_s
            )

    def _purge(self, key: ArrayKey, filename: str, why: str) -> None:
        self._counters.add(purges=1)
        logger.warning(
            "cache entry dropped, reading %s %s from the origin: %s", key.url, key.array, why
        )
        self._drop(key, filename)

    def _drop(self, key: ArrayKey, filename: str) -> None:
        """Drop an entry if it still is this file."""
        try:
            self.index.drop([key.digest], filename=filename)
        except CACHE_FAULTS as exc:
            self._fault("drop", key, exc)

    def _abort(self, intent: Intent) -> None:
        try:
            self.index.abort(intent)
        except CACHE_FAULTS as exc:  # the next process that opens the index sweeps it
            logger.debug("intent %s is left to the next sweep: %s", intent.key, exc)

    def _fault(self, verb: str, key: ArrayKey, exc: BaseException) -> None:
        self._counters.add(cache_errors=1)
        self.index.reopen(exc)
        self.index.log_once.warning(
            type(exc).__name__,
            logger,
            "cache %s failed, serving %s from the origin: %s",
            verb,
            key.url,
            exc,
        )


def _unpickled(config: CacheConfig, counters: Counters, verified: SharedSet) -> ArrayCache:
    return ArrayCache(config, counters, verified=verified)
