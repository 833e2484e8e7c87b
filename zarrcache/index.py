"""The one list of what lies on disk, for both tiers: a diskcache index whose files are ours.

diskcache gives an SQLite table that survives ``kill -9``, forks and eight processes at once, with the sum of all sizes kept by
triggers.  What it does with files must not happen here (measured): it pickles values, leaves partial files on a full disk, culls ten
entries at a time, and unlinks before it commits.  So :class:`EntryDisk` stores no value at all, only where the file is.

Every file is announced before it exists and forgotten after it is gone.  A row whose key starts with ``+`` is an *intent*: "the file
named here is being written, or being deleted, by this owner".  Its size counts.  Hence

* the limit holds at every instant, across processes: room is reserved in a transaction before the first byte is written;
* after a crash the intents of dead owners name exactly the files to unlink: opening costs nothing that grows with the entries.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import diskcache

from zarrcache.atomic import PARTIAL_SUFFIX
from zarrcache.codec import read_header
from zarrcache.config import CacheConfig
from zarrcache.errors import CorruptEntryError
from zarrcache.flight import SingleFlight
from zarrcache.layout import CacheDir
from zarrcache.owner import is_dead, owner_id
from zarrcache.policy import Admission, admit, choose_victims, disk_bytes, min_free_bytes

__all__ = ["CACHE_FAULTS", "EntryDisk", "Index", "Intent", "Row", "Stored"]

logger = logging.getLogger(__name__)

#: What a broken cache raises. Each becomes a miss or a pass-through, never an error of the reader.
CACHE_FAULTS = (OSError, sqlite3.Error, diskcache.Timeout)

_inherited: list[diskcache.Cache] = []

_MODE_FILE = 16  # outside diskcache's own modes 0 to 4: a planted row with its pickle mode is not ours and is not read
_INTENT = "intent"
_BATCH = 500  # rows a transaction when many are dropped: others wait for about 10 ms


@dataclass(frozen=True, slots=True)
class Stored:
    """What the index keeps of one file: path below the cache's root, bytes on disk, and a note that belongs to the tier."""

    filename: str
    size_bytes: int
    note: str


@dataclass(frozen=True, slots=True)
class Row:
    """One entry as a listing shows it."""

    digest: str
    tier: str
    filename: str
    size_bytes: int
    stored_s: float
    note: str


@dataclass(frozen=True, slots=True)
class Intent:
    """Room reserved for one file that is about to be written."""

    key: str
    filename: str
    size_bytes: int


class EntryDisk(diskcache.Disk):  # type: ignore[misc]
    """diskcache's value store, reduced to file names. It reads, writes and deletes no file."""

    def put(self, key: str) -> tuple[str, bool]:
        return key, True

    def get(self, key: str, raw: bool) -> str:
        return key

    def store(self, value: Stored, read: bool, key: object = None) -> tuple[int, int, str, str]:
        return value.size_bytes, _MODE_FILE, value.filename, f"{value.size_bytes} {value.note}"

    def fetch(self, mode: int, filename: str, value: str, read: bool) -> Stored | None:
        if mode != _MODE_FILE:
            return None
        size, _, note = value.partition(" ")
        return Stored(filename, int(size), note)

    def remove(self, file_path: str) -> None:
        """Nothing: a file is unlinked after its row's transaction is committed, and diskcache would do it before."""


class Index:
    """Rows of one cache directory. Opens at first use; safe from any thread or process; pickles as its configuration.

    Methods raise what :data:`CACHE_FAULTS` names; callers turn that into a miss.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self.dir = CacheDir(config.dir, config.shared)
        self._opened: tuple[int, diskcache.Cache] | None = None

    def __reduce__(self) -> tuple[type[Index], tuple[CacheConfig]]:
        return type(self), (self._config,)

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def lookup(self, digest: str) -> Stored | None:
        """One SELECT, no write."""
        found = self._cache().get(digest)
        return found if isinstance(found, Stored) else None

    def volume_bytes(self) -> int:
        """Bytes on disk of all entries, and of what is being written or deleted right now."""
        return int(self._cache().reset("size"))

    def rows(self, tier: str | None = None) -> Iterator[Row]:
        """Every entry, oldest first."""
        where = "tag = ?" if tier else "tag != ?"
        for key, tag, filename, size, stored_s, value in self._select(
            f"SELECT key, tag, filename, size, store_time, value FROM Cache WHERE {where} ORDER BY rowid",
            (tier or _INTENT,),
        ):
            yield Row(key, tag, filename, size, stored_s, value.partition(" ")[2])

    def totals(self) -> dict[str, tuple[int, int]]:
        """``{tier: (entries, bytes)}``."""
        rows = self._select("SELECT tag, COUNT(*), SUM(size) FROM Cache WHERE tag != ? GROUP BY tag", (_INTENT,))
        return {tag: (count, size) for tag, count, size in rows}

    # -- writing ---------------------------------------------------------------------------------------------------------------

    def begin(self, filename: str, size_bytes: int) -> Intent | Admission:
        """Reserve room for a file of ``size_bytes`` (on disk), or say why not."""
        refusal = self._reserve(filename, size_bytes)
        if refusal is Admission.OVER_LIMIT and self.sweep():
            refusal = self._reserve(filename, size_bytes)
        for _ in range(8):  # others may take the room that was made; after that the entry is a bypass
            if refusal is not Admission.OVER_LIMIT or self._config.eviction == "none":
                break
            self._make_room(size_bytes)
            refusal = self._reserve(filename, size_bytes)
        return refusal

    def commit(self, intent: Intent, digest: str, tier: str, note: str) -> None:
        """Make the file that ``intent`` announced visible as ``digest``. What it replaces is unlinked after that."""
        cache = self._cache()
        with cache.transact():
            doomed = self._doom(cache, digest, keep=intent.filename)
            cache.set(digest, Stored(intent.filename, intent.size_bytes, note), tag=tier)
            cache.delete(intent.key)
        self._finish(doomed)

    def abort(self, intent: Intent) -> None:
        """Forget a file that will not come."""
        self._finish([intent])

    def drop(self, digests: Sequence[str], *, filename: str | None = None) -> int:
        """Drop entries: the rows in one transaction, then the files. A reader that has one mapped keeps it.

        Parameters
        ----------
        digests : sequence of str
        filename : str, optional
            Drop only if the entry still is this file: the reader that found a bad entry must not drop the good one that replaced it.

        Returns
        -------
        int
            Bytes freed on disk.
        """
        freed = 0
        for start in range(0, len(digests), _BATCH):
            cache = self._cache()
            doomed: list[Intent] = []
            with cache.transact():
                for digest in digests[start : start + _BATCH]:
                    doomed += self._doom(cache, digest, only=filename)
            self._finish(doomed)
            freed += sum(intent.size_bytes for intent in doomed)
        return freed

    def sweep(self) -> int:
        """Unlink what dead owners were writing or deleting. Returns the number of files."""
        rows = self._select("SELECT key, filename, size, value FROM Cache WHERE tag = ?", (_INTENT,))
        dead = [Intent(key, filename, size) for key, filename, size, value in rows if is_dead(value.partition(" ")[2])]
        self._finish(dead)
        return len(dead)

    def _reserve(self, filename: str, size_bytes: int) -> Intent | Admission:
        cache = self._cache()
        usage = shutil.disk_usage(self.dir.root)
        intent = Intent(f"+{secrets.token_hex(8)}", filename, size_bytes)
        with cache.transact():
            outcome = admit(
                size_bytes,
                volume_bytes=int(cache.reset("size")),
                limit_bytes=self._config.limit,
                free_bytes=usage.free,
                min_free_bytes=min_free_bytes(self._config.min_free, usage.total),
            )
            if outcome is Admission.ADMIT:
                cache.set(intent.key, Stored(filename, size_bytes, owner_id()), tag=_INTENT)
                return intent
        return outcome

    def _make_room(self, size_bytes: int) -> None:
        # rowid order is the order of storing: a replaced entry gets a new row.
        oldest = self._select("SELECT key, size FROM Cache WHERE tag != ? ORDER BY rowid LIMIT 10000", (_INTENT,))
        shortfall = self.volume_bytes() + size_bytes - self._config.limit
        self.drop(choose_victims(oldest, shortfall))

    def _doom(self, cache: diskcache.Cache, digest: str, *, keep: str | None = None, only: str | None = None) -> list[Intent]:
        """Turn an entry into an intent to delete. Call inside a transaction."""
        old = cache.get(digest)
        if not isinstance(old, Stored) or (only is not None and old.filename != only):
            return []
        cache.delete(digest)
        if old.filename == keep:  # the byte tier publishes under one name: the new file has replaced the old one already
            return []
        intent = Intent(f"+{secrets.token_hex(8)}", old.filename, old.size_bytes)
        cache.set(intent.key, Stored(old.filename, old.size_bytes, owner_id()), tag=_INTENT)
        return [intent]

    def _finish(self, intents: Sequence[Intent]) -> None:
        """Unlink the files of intents, then forget the intents."""
        if not intents:
            return
        for intent in intents:
            path = self.dir.root / intent.filename
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
            if not path.parent.is_dir():
                continue
            for partial in path.parent.glob(f".{path.name}.*{PARTIAL_SUFFIX}"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
        cache = self._cache()
        with cache.transact():
            for intent in intents:
                cache.delete(intent.key)

    # -- opening ---------------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open now: create the directory, sweep after the dead. Everything else does it by itself at first use.

        Raises
        ------
        ConfigError
            The directory cannot be ours.
        OSError, sqlite3.Error, diskcache.Timeout
            It cannot be created or opened.
        """
        self._cache()

    def reopen(self) -> None:
        """Forget the open index: its directory was replaced, or its file is broken."""
        self._opened = None

    def _cache(self) -> diskcache.Cache:
        opened = self._opened
        # A new object in a forked child: the inherited one may be in the middle of another thread's transaction.
        if opened is not None and opened[0] == os.getpid():
            return opened[1]
        if opened is not None:
            _inherited.append(opened[1])  # never closed here: SQLite's locks and its log are the parent's
        # Two threads may come here together: both open, one after the other, and one of the two stays.
        cache = self._open()
        self._opened = (os.getpid(), cache)
        self.sweep()
        return cache

    def _open(self) -> diskcache.Cache:
        self.dir.ensure()
        # One at a time: each open writes diskcache's settings, and a broken index is set aside and rebuilt by one process only.
        with SingleFlight(self.dir.locks, timeout_s=60.0, mode=self.dir.file_mode).hold("0" * 8):
            try:
                return self._connect()
            except sqlite3.DatabaseError as exc:
                if isinstance(exc, sqlite3.OperationalError):
                    raise  # busy, read-only, full: not a broken file
                aside = self.dir.root / f"cache.db.broken-{time.time_ns()}"
                logger.warning("the index %s is broken (%s); it is set aside as %s and rebuilt from the entries", self.dir.index, exc, aside.name)
                os.replace(self.dir.index, aside)
                for suffix in ("-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(f"{self.dir.index}{suffix}")
                cache = self._connect()
                self._rebuild(cache)
                return cache

    def _connect(self) -> diskcache.Cache:
        cache = diskcache.Cache(
            os.fspath(self.dir.root), timeout=60, disk=EntryDisk, eviction_policy="none", cull_limit=0, statistics=0, size_limit=2**62
        )
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another user's file keeps its own mode
            for suffix in ("", "-wal", "-shm"):
                os.chmod(f"{self.dir.index}{suffix}", self.dir.file_mode)
        return cache

    def _rebuild(self, cache: diskcache.Cache) -> None:
        """Fill an empty index from the files of the array tier; they say themselves what they are. Byte-tier files are fetched again."""
        kept = 0
        with cache.transact():
            for path in sorted(self.dir.entries.glob("*/*")):
                try:
                    header = read_header(path)
                    stat = path.stat()
                except (CorruptEntryError, OSError):
                    path.unlink(missing_ok=True)
                    continue
                stored = Stored(
                    f"{path.relative_to(self.dir.root)}", disk_bytes(stat.st_size), array_note(header.key.origin, header.key.url, header.key.array)
                )
                cache.set(header.key.digest, stored, tag="array")
                kept += 1
        for path in self.dir.bytes.glob("*/*"):
            path.unlink(missing_ok=True)
        logger.warning("the index was rebuilt: %d entries kept", kept)

    def _select(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Rows of a query that diskcache has no method for, on a read-only connection of its own."""
        self._cache()
        connection = sqlite3.connect(f"{self.dir.index.as_uri()}?mode=ro", uri=True, timeout=60)
        try:
            return connection.execute(query, values).fetchall()
        finally:
            connection.close()


def array_note(origin: str, url: str, array: str) -> str:
    """What the index says of an entry of the array tier. Newlines separate: they occur in no URL."""
    return f"{origin}\n{url}\n{array}"
