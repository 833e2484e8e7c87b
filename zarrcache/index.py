"""The one list of what lies on disk, for both tiers.

Every file is announced before it exists and forgotten after it is gone.  A row whose key starts with ``+`` is an *intent*: "the file
named here is being written, or being deleted, by this owner".  Its size counts.  Hence

* the limit holds at every instant, across processes: room is reserved in a transaction before the first byte is written;
* after a crash the intents of dead owners name exactly the files to unlink: opening costs nothing that grows with the entries.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zarrcache.atomic import PARTIAL_SUFFIX
from zarrcache.config import CacheConfig
from zarrcache.indexfile import CACHE_FAULTS, IndexFile, Stored, Table, no_fork
from zarrcache.layout import CacheDir
from zarrcache.owner import is_dead, owner_id
from zarrcache.policy import Admission, admit, choose_victims, min_free_bytes

__all__ = ["CACHE_FAULTS", "Index", "Intent", "Row", "Stored"]

_INTENT = "intent"
_INTENTS = ("+", ",")  # the range of their keys
_BATCH = 500  # rows a transaction when many are dropped: others wait for about 10 ms


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


class Index:
    """Rows of one cache directory. Opens at first use; safe from any thread or process; pickles as its configuration.

    Methods raise what :data:`CACHE_FAULTS` names; callers turn that into a miss.
    """

    def __init__(self, config: CacheConfig) -> None:
        #: Kinds of faults that were logged: once each, whichever tier meets them first.
        self.told: set[str] = set()
        self._config = config
        self.dir = CacheDir(config.dir, config.shared)
        self._file = IndexFile(self.dir)

    def __reduce__(self) -> tuple[type[Index], tuple[CacheConfig]]:
        return type(self), (self._config,)

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def lookup(self, digest: str) -> Stored | None:
        """One SELECT, no write."""
        table = self._table()
        with no_fork(table):
            found = table.get(digest)
        return found if isinstance(found, Stored) else None

    def volume_bytes(self) -> int:
        """Bytes on disk of all entries, and of what is being written or deleted right now."""
        table = self._table()
        with no_fork(table):
            return int(table.reset("size"))

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

    def filenames(self) -> set[str]:
        """Files of all entries, and those that are being written or deleted; paths below the cache's root."""
        return {filename for (filename,) in self._select("SELECT filename FROM Cache", ())}

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
        with self._transaction() as table:
            doomed = self._doom(table, digest, keep=intent.filename)
            table.set(digest, Stored(intent.filename, intent.size_bytes, note), tag=tier)
            table.delete(intent.key)
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
            doomed: list[Intent] = []
            with self._transaction() as table:
                for digest in digests[start : start + _BATCH]:
                    doomed += self._doom(table, digest, only=filename)
            self._finish(doomed)
            freed += sum(intent.size_bytes for intent in doomed)
        return freed

    def sweep(self) -> int:
        """Unlink what dead owners were writing or deleting. Returns the number of files."""
        # By the range of their keys, not by tag: there is an index over the keys, and a full cache asks this at every put.
        rows = self._select("SELECT key, filename, size, value, store_time FROM Cache WHERE key >= ? AND key < ?", _INTENTS)
        now_s = time.time()
        dead = [Intent(key, filename, size) for key, filename, size, value, stored_s in rows if is_dead(value.partition(" ")[2], now_s - stored_s)]
        self._finish(dead)
        return len(dead)

    def _reserve(self, filename: str, size_bytes: int) -> Intent | Admission:
        intent = Intent(f"+{secrets.token_hex(8)}", filename, size_bytes)
        with self._transaction() as table:
            usage = shutil.disk_usage(self.dir.root)
            # What others have reserved is not on the disk yet.
            ((reserved,),) = self._select("SELECT COALESCE(SUM(size), 0) FROM Cache WHERE key >= ? AND key < ?", _INTENTS)
            outcome = admit(
                size_bytes,
                volume_bytes=int(table.reset("size")),
                limit_bytes=self._config.limit,
                free_bytes=usage.free - reserved,
                min_free_bytes=min_free_bytes(self._config.min_free, usage.total),
            )
            if outcome is Admission.ADMIT:
                table.set(intent.key, Stored(filename, size_bytes, owner_id()), tag=_INTENT)
                return intent
        return outcome

    def _make_room(self, size_bytes: int) -> None:
        # rowid order is the order of storing: a replaced entry gets a new row.
        # Listings, whose notes end with a line end, stay: they are small, and without them no run starts offline.
        oldest = self._select("SELECT key, size FROM Cache WHERE tag != ? AND substr(value, -1) != char(10) ORDER BY rowid LIMIT 10000", (_INTENT,))
        shortfall = self.volume_bytes() + size_bytes - self._config.limit
        self.drop(choose_victims(oldest, shortfall))

    def _doom(self, table: Table, digest: str, *, keep: str | None = None, only: str | None = None) -> list[Intent]:
        """Turn an entry into an intent to delete. Call inside a transaction."""
        old = table.get(digest)
        if not isinstance(old, Stored) or (only is not None and old.filename != only):
            return []
        table.delete(digest)
        if old.filename == keep:  # the byte tier publishes under one name: the new file has replaced the old one already
            return []
        intent = Intent(f"+{secrets.token_hex(8)}", old.filename, old.size_bytes)
        table.set(intent.key, Stored(old.filename, old.size_bytes, owner_id()), tag=_INTENT)
        return [intent]

    def _finish(self, intents: Sequence[Intent]) -> None:
        """Unlink the files of intents, then forget the intents."""
        if not intents:
            return
        table = self._table()
        for intent in intents:
            path = self.dir.root / intent.filename
            with no_fork(table):
                entry = table.get(path.name.partition("-")[0])
            if isinstance(entry, Stored) and entry.filename == intent.filename:
                continue  # the byte tier has one name for an object: somebody has published it again meanwhile
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
            if not path.parent.is_dir():
                continue
            for partial in path.parent.glob(f".{path.name}.*{PARTIAL_SUFFIX}"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
        with self._transaction() as table:
            for intent in intents:
                table.delete(intent.key)

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
        self._table()

    def reopen(self, after: BaseException | None = None) -> None:
        """Open anew at the next use, if ``after`` is nothing or an error that this can heal (damaged index, deleted directory)."""
        self._file.forget(after)

    def _table(self) -> Table:
        table = self._file.table
        if table is None:
            table = self._file.open()
            self.sweep()
        return table

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Table]:
        self._file.forget_if_replaced()
        self._table()
        with self._file.transaction() as table:
            yield table

    def _select(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        self._table()
        return self._file.select(query, values)
