"""The array tier: whole decoded arrays, found through the index, memory-mapped on a hit."""

from __future__ import annotations

import functools
import logging
import secrets
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np

from zarrcache._keys import ArrayKey
from zarrcache._units import format_bytes
from zarrcache.cache._tier import Tier
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
    Stored,
    array_note,
    disk_bytes,
    header_of,
    kind_of,
    map_entry,
    write_entry,
)
from zarrcache.errors import CorruptEntryError
from zarrcache.stats import Counters, LogOnce, SharedSet

__all__ = ["ArrayCache", "EntryInfo"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One entry of the array tier. ``size_bytes`` on disk; ``stored_s`` in seconds since 1970."""

    key: ArrayKey
    filename: str
    size_bytes: int
    stored_s: float


class ArrayCache(Tier):
    """Arrays by :class:`~zarrcache._keys.ArrayKey`. Safe from any thread or process.

    A fault of the cache is a miss or a pass-through, counted, and logged once per kind. ``purges``
    and ``cache_errors`` are counted here; hits and misses by the reader, which knows how a read
    ended. Pickles as its configuration.

    Parameters
    ----------
    config, counters, index, verified
        As in `Tier`.

    Attributes
    ----------
    loans : Loans or None
        In a prefetcher: holds what is not admitted. Not pickled.
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
        return _unpickled, (self._config, self._counters, self._verified)

    def get(self, key: ArrayKey, *, source: str | None = None) -> Entry | None:
        """The entry of ``key``, mapped; None if there is none.

        Parameters
        ----------
        key : ArrayKey
        source : str, optional
            What the origin lists now (:func:`zarrcache._keys.source_digest`). An entry of another
            source is stale: it is dropped and is a miss. Default: trust the entry.
        """
        digest, filename = key.digest, ""
        try:
            stored, lent = self.index.find(digest)
            if stored is None:
                return self._borrowed(key, lent, source)
            filename = stored.filename
            entry = map_entry(f"{self._root}/{filename}")
            header = entry.header
            if header.key != key:
                raise CorruptEntryError(f"it holds {header.key.url} {header.key.array}")
            if source is not None and header.source != source:
                # At once: whatever becomes of the next fetch, no reader may be given this again.
                self._drop(digest, filename, key.url)
                return None
            file_id = _file_id(digest, filename)
            if not self._is_verified(file_id):
                if not entry.is_intact():
                    raise CorruptEntryError("its checksum does not match")
                self._verified.add(file_id)
        except (CorruptEntryError, *CACHE_FAULTS) as exc:
            self._read_failed(exc, digest, filename, f"{key.url} {key.array}")
            return None
        return entry

    def _borrowed(self, key: ArrayKey, lent: Stored | None, source: str | None) -> Entry | None:
        """What a prefetcher has lent to this process: it is read once and removed."""
        if lent is None or self.loans is not None:
            return None
        entry = map_entry(f"{self._root}/{lent.filename}")
        is_right = (
            entry.header.key == key
            and source in (None, entry.header.source)
            and (self._config.verify == "never" or entry.is_intact())
        )
        # A copy: a map would keep the file's room, which the next loan needs. A copy also reaches a
        # training process that would map too late.
        taken = Entry(entry.header, entry.array.copy()) if is_right else None
        self.index.give_back(key.digest, lent.filename)
        return taken

    def put(
        self, key: ArrayKey, array: np.ndarray[Any, np.dtype[Any]], *, source: str
    ) -> Entry | None:
        """Store a decoded array.

        Returns
        -------
        Entry or None
            The stored entry, mapped: pages that the kernel may take back, and that a DataLoader
            worker hands over without a copy. None: it was not admitted, or the cache failed.
        """
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        header = header_of(key, array, source)
        write = functools.partial(write_entry, header=header, array=array)
        entry, is_stored = self._place(header, write)
        if not is_stored:
            return None
        return entry if entry is not None else Entry(header, array)

    def take(self, incoming: EntryStream) -> tuple[Entry | None, bool]:
        """Store an entry that another cache sends; faults as in :meth:`put`.

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
        return self._place(incoming.header, incoming.write)

    def _place(
        self, header: EntryHeader, write: Callable[[FileIO], object]
    ) -> tuple[Entry | None, bool]:
        """Store or lend an entry: the entry, mapped, and whether it was stored."""
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
        )
        if outcome is None:
            return None, False
        is_stored = outcome is Admission.ADMIT
        if not is_stored and not self._lend(header, filename, write):
            self._log_once.warning(
                outcome.name,
                logger,
                "not cached, read from the origin in every epoch: %s (%s): %s",
                key.url,
                format_bytes(header.nbytes),
                outcome.value,
            )
            return None, False
        try:
            entry = map_entry(f"{self._root}/{filename}")
        except (CorruptEntryError, *CACHE_FAULTS) as exc:
            self._read_failed(exc, digest, filename, key.url)
            return None, is_stored
        if is_stored:
            # Its checksum was computed, or compared, while it was written.
            self._verified.add(_file_id(digest, filename))
        return entry, is_stored

    def _lend(self, header: EntryHeader, filename: str, write: Callable[[FileIO], object]) -> bool:
        size_bytes = disk_bytes(header.file_bytes)
        try:
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


def _file_id(digest: str, filename: str) -> str:
    """32 hex digits that name one file: an entry that is stored again is another file."""
    return f"{digest[:24]}{zlib.crc32(filename.encode()):08x}"


def _unpickled(config: CacheConfig, counters: Counters, verified: SharedSet) -> ArrayCache:
    return ArrayCache(config, counters, verified=verified)
