"""The array tier: decoded arrays, memory-mapped on a hit; and the base class of both tiers.

`Tier` stores a file within the limit, verifies it once per run, and drops it. A cache fault (full
disk, broken index, deleted directory) is handled here: it is counted, logged once per kind, and
becomes a miss when reading and a pass-through when writing. It never stops a training run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np

from zarrcache._keys import ArrayKey
from zarrcache._units import format_bytes
from zarrcache.cache.loans import Loans
from zarrcache.config import CacheConfig
from zarrcache.disk import (
    ARRAY,
    CACHE_FAULTS,
    Admission,
    Entry,
    EntryHeader,
    EntryStream,
    Index,
    Intent,
    SingleFlight,
    Stored,
    array_note,
    disk_bytes,
    kind_of,
    map_entry,
    new_entry,
    publish,
    read_attributes_of,
    write_entry,
)
from zarrcache.errors import CorruptEntryError
from zarrcache.stats import Counters, LogOnce, SharedSet

__all__ = ["ArrayCache", "EntryInfo", "Tier", "file_id_of"]

logger = logging.getLogger(__name__)


class Tier:
    """Entries of one cache directory. Safe from any thread or process.

    Parameters
    ----------
    config : CacheConfig
    counters : Counters
    index : Index, optional
        Shared by all tiers of a directory, so that one limit holds for all. Default: a new one.
    verified : SharedSet, optional
        Files whose checksum a process of this run has verified. With ``verify: first`` they are not
        verified again.

    Attributes
    ----------
    index : Index
    flight : SingleFlight
        Locks of the cache directory.
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
        self._verified = verified or SharedSet()
        #: Whether a read may skip the checksum of a file; takes its :func:`file_id_of`.
        self._is_verified = {
            "first": self._verified.__contains__,
            "always": _never,
            "never": _always,
        }[config.verify]
        self.index = index or Index(config)
        self._root = os.fspath(self.index.dir.root)
        self.flight = SingleFlight(
            self.index.dir.locks,
            timeout_s=2 * config.retry.timeout,
            mode=self.index.dir.written_mode,
            log_once=self.index.log_once,
        )

    def _store(
        self,
        digest: str,
        filename: str,
        file_bytes: int,
        write: Callable[[FileIO], object],
        *,
        kind: str,
        note: str,
        url: str,
        replaces: str | None = None,
    ) -> Admission | None:
        """Reserve room, publish a file, and make it visible as ``digest``.

        Parameters
        ----------
        digest, filename : str
            Key of the entry, and its path below the cache's root.
        file_bytes : int
            Length of the file.
        write : callable
            Writes the open file.
        kind, note : str
            Kept in the index.
        url : str
            URL of what is stored, for the log.
        replaces : str, optional
            Digest of another entry to drop once this one is stored, or before, to make room.

        Returns
        -------
        Admission or None
            ``ADMIT`` if it is stored, otherwise the reason why not. None: the cache failed.
        """
        intent: Intent | None = None
        try:
            size_bytes = self.index.on_disk_bytes(file_bytes)
            outcome = self.index.begin(filename, size_bytes)
            # Free the room of an old version under this key, or of the row of a lost file.
            old = [digest] if replaces is None else [digest, replaces]
            if outcome is Admission.OVER_LIMIT and self.index.drop(old):
                outcome = self.index.begin(filename, size_bytes)
            if isinstance(outcome, Admission):
                return outcome
            intent = outcome
            occupied_bytes = self._publish(filename, file_bytes, write)
            occupied_bytes = max(occupied_bytes, disk_bytes(file_bytes))
            if not self.index.commit(intent, digest, kind, note, occupied_bytes):
                return Admission.OVER_LIMIT
            intent = None
            if replaces is not None:
                self.index.drop([replaces])
        except CACHE_FAULTS as exc:
            self._fault("write", url, exc)
            return None
        finally:
            if intent is not None:  # after Ctrl-C too: unused room must not stay reserved
                self._abort(intent)
        return Admission.ADMIT

    def _publish(self, filename: str, file_bytes: int, write: Callable[[FileIO], object]) -> int:
        directory = self.index.dir
        path = directory.root / filename
        directory.make(path.parent)
        with directory.opened(path.parent) as fd:
            return publish(
                path, write, expected_bytes=file_bytes, mode=directory.file_mode, dir_fd=fd
            )

    def _abort(self, intent: Intent) -> None:
        try:
            self.index.abort(intent)
        except CACHE_FAULTS as exc:  # swept when a process opens the index next
            logger.debug("intent %s is left to the next sweep: %s", intent.key, exc)

    def _read_failed(self, exc: Exception, digest: str, filename: str, url: str) -> None:
        """Handle an error while reading an entry, so that the read becomes a miss."""
        if isinstance(exc, CorruptEntryError):
            self._purge(digest, filename, url, str(exc))
        elif not isinstance(exc, FileNotFoundError):  # evicted between the row and the file
            self._fault("read", url, exc)

    def _purge(self, digest: str, filename: str, url: str, why: str) -> None:
        """Drop a bad entry, count it and log it."""
        self._counters.add(purges=1)
        logger.warning("cache entry dropped, reading %s from the origin: %s", url, why)
        self._drop(digest, filename, url)

    def _drop(self, digest: str, filename: str, url: str) -> None:
        """Drop an entry, unless another file has replaced this one."""
        if self.index.is_read_only:
            return
        try:
            self.index.drop([digest], filename=filename)
        except CACHE_FAULTS as exc:
            self._fault("drop", url, exc)

    def _fault(self, verb: str, url: str, exc: Exception) -> None:
        self._counters.add(cache_errors=1)
        self.index.reopen(exc)
        self.index.log_once.warning(
            type(exc).__name__,
            logger,
            "cache %s failed, serving %s from the origin: %s",
            verb,
            url,
            exc,
        )


def _always(file_id: str) -> bool:
    return True


def _never(file_id: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One entry of the array tier: ``size_bytes`` on disk, ``stored_s`` in seconds since 1970."""

    key: ArrayKey
    filename: str
    size_bytes: int
    stored_s: float


class ArrayCache(Tier):
    """Arrays by :class:`~zarrcache._keys.ArrayKey`. Safe from any thread or process.

    A cache fault becomes a miss or a pass-through; it is counted, and logged once per kind.
    ``purges`` and ``cache_errors`` are counted here; hits and misses by the reader, which knows how
    a read ended. Pickles as its configuration.

    Parameters
    ----------
    config, counters, index, verified
        As in `Tier`.

    Attributes
    ----------
    loans : Loans or None
        In a prefetcher: holds entries that are not admitted. Not pickled.
    """

    def __init__(
        self,
        config: CacheConfig,
        counters: Counters,
        *,
        index: Index | None = None,
        verified: SharedSet | None = None,
    ) -> None:
        super().__init__(config, counters, index=index, verified=verified)
        self.loans: Loans | None = None
        self._log_once = LogOnce()

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(ArrayCache, verified=self._verified)
        return make, (self._config, self._counters)

    def get(
        self, key: ArrayKey, *, source: str | None = None, lazily: bool = False
    ) -> Entry | None:
        """The entry of ``key``, mapped; None if there is none.

        Parameters
        ----------
        key : ArrayKey
        source : str, optional
            Digest of what the origin lists now (:func:`zarrcache._keys.source_digest`). An entry of
            another source is stale: it is dropped, a miss. Default: trust the entry.
        lazily : bool
            Its `Entry.grid` will be used, and not its whole array.
        """
        digest, filename = key.digest, ""
        try:
            stored, lent = self.index.find(digest)
            if stored is None:
                return self._borrowed(key, lent, source)
            filename = stored.filename
            path = f"{self._root}/{filename}"
            entry = map_entry(path)
            header = entry.header
            if header.key != key:
                raise CorruptEntryError(f"it holds {header.key.url} {header.key.array}")
            if source is not None and header.source != source:
                # Drop it now: even if the next fetch fails, no reader may get this entry again.
                self._drop(digest, filename, key.url)
                return None
            file_id = file_id_of(digest, filename, entry.written)
            if not self._is_verified(file_id):
                if not self.is_intact(entry):
                    raise CorruptEntryError("its checksum does not match")
                if header.attributes_bytes:
                    # This checks them. An entry that was evicted just now is read nevertheless.
                    with contextlib.suppress(FileNotFoundError):
                        read_attributes_of(path)
                self._verified.add(file_id)
            if header.stored_as is not None:
                _ = entry.grid if lazily else entry.array  # decoded here: a failure is a miss
        except (CorruptEntryError, *CACHE_FAULTS) as exc:
            self._read_failed(exc, digest, filename, f"{key.url} {key.array}".rstrip())
            return None
        return entry

    def is_intact(self, entry: Entry) -> bool:
        """Whether an entry matches its checksum. A monitor replaces this to time it."""
        return entry.is_intact()

    def _borrowed(self, key: ArrayKey, lent: Stored | None, source: str | None) -> Entry | None:
        """Read an entry that a prefetcher has lent, and remove it."""
        if lent is None or self.loans is not None:
            return None
        path = f"{self._root}/{lent.filename}"
        entry = map_entry(path)  # fails while it is announced and not written yet
        try:
            if entry.header.key != key or source not in (None, entry.header.source):
                return None
            if self._config.verify != "never" and not self.is_intact(entry):
                return None
            _, attributes = read_attributes_of(path)
            # A copy, because a map would keep the file's disk space, which the next loan needs, and
            # the training process might map the file only after it was removed.
            taken = Entry(entry.header, entry.stored.copy(), attributes=attributes)
            _ = taken.array  # as in `get`
            return taken
        finally:
            self.index.give_back(key.digest, lent.filename)

    def put(
        self, key: ArrayKey, array: np.ndarray[Any, np.dtype[Any]], *, source: str
    ) -> Entry | None:
        """Store a decoded array, in the encoding of ``key``; see :meth:`store`."""
        return self.store(new_entry(key, array, source))

    def store(self, entry: Entry, *, replaces: ArrayKey | None = None) -> Entry | None:
        """Store an entry that was made in memory.

        Parameters
        ----------
        entry : Entry
        replaces : ArrayKey, optional
            An entry to drop once this one is stored, or before, if there is no room for both.

        Returns
        -------
        Entry or None
            The stored entry, mapped: the kernel may reclaim its pages, and a DataLoader worker
            transfers it without a copy. None: it was not admitted, or the cache failed.
        """
        write = functools.partial(
            write_entry,
            header=entry.header,
            stored=entry.stored,
            attributes=entry.attributes or b"",
        )
        mapped, is_stored = self._place(entry.header, write, replaces)
        if not is_stored:
            return None
        return mapped if mapped is not None else entry

    def take(self, incoming: EntryStream) -> tuple[Entry | None, bool]:
        """Store an entry that another cache sends. Cache faults are handled as in :meth:`put`.

        Returns
        -------
        Entry or None
            Mapped, if it was stored or lent. If None, ``incoming.is_spent`` says whether the stream
            can still be read.
        bool
            Whether it was stored.

        Raises
        ------
        CorruptEntryError
            The stream ended early, or its checksum does not match. Nothing is stored.
        """
        return self._place(incoming.header, incoming.write)

    def _place(
        self,
        header: EntryHeader,
        write: Callable[[FileIO], object],
        replaces: ArrayKey | None = None,
    ) -> tuple[Entry | None, bool]:
        """Store or lend an entry. Returns it, mapped, and whether it was stored."""
        key, digest = header.key, header.key.digest
        filename = f"entries/{digest[:2]}/{digest}-{secrets.token_hex(4)}"
        outcome = self._store(
            digest,
            filename,
            header.file_bytes,
            write,
            note=array_note(key),
            kind=kind_of(key),
            url=key.url,
            replaces=replaces.digest if replaces is not None else None,
        )
        if outcome is None:
            return None, False
        is_stored = outcome is Admission.ADMIT
        if outcome is Admission.READ_ONLY:  # logged when the index was opened
            return None, False
        if not is_stored and not self._lend(header, filename, write):
            self._log_once.warning(
                outcome.name,
                logger,
                "not cached, read from the origin in every epoch: %s (%s): %s",
                key.url,
                format_bytes(header.decoded_bytes),
                outcome.value,
            )
            return None, False
        try:
            entry = map_entry(f"{self._root}/{filename}")
        except (CorruptEntryError, *CACHE_FAULTS) as exc:
            self._read_failed(exc, digest, filename, key.url)
            return None, is_stored
        if is_stored:
            # The checksum was computed or verified while the file was written.
            self._verified.add(file_id_of(digest, filename, entry.written))
        return entry, is_stored

    def _lend(self, header: EntryHeader, filename: str, write: Callable[[FileIO], object]) -> bool:
        try:
            size_bytes = self.index.on_disk_bytes(header.file_bytes)
            if self.loans is None or not self.loans.lend(header.key.digest, filename, size_bytes):
                return False
            self._publish(filename, header.file_bytes, write)
        except CACHE_FAULTS as exc:
            self._fault("write", header.key.url, exc)
            return False
        return True

    def drop(self, key: ArrayKey) -> int:
        """Evict one entry. Returns the bytes freed on disk."""
        return self.index.drop([key.digest])

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry, oldest first."""
        for row in self.index.rows(ARRAY):
            origin, url, array = row.note.split("\n")
            yield EntryInfo(
                ArrayKey(origin, url, array), row.filename, row.size_bytes, row.stored_s
            )


def file_id_of(digest: str, filename: str, written: int) -> str:
    """32 hex digits that identify one file.

    They change when the entry is stored again, and when another program replaces the file or writes
    to it (``written``: its `written_stamp`).
    """
    return f"{digest[:24]}{zlib.crc32(filename.encode(), written):08x}"
