"""The one list of what lies on disk, for both tiers.

Every file is announced before it exists and forgotten after it is gone.  A row whose key starts
with ``+`` is an *intent*: "the file named here is being written, or being deleted, by this owner".
Its size counts.  Hence

* the limit holds at every instant, across processes: room is reserved in a transaction before the
  first byte is written;
* after a crash the intents of dead owners name exactly the files to unlink: opening costs nothing
  that grows with the entries.

A row whose key is ``-`` and a digest is a *loan*: read once, and removed by its reader, in room
that its owner, a prefetcher, has reserved.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from zarrcache.config import CacheConfig
from zarrcache.disk._database import CACHE_FAULTS, IndexFile, Stored, Table, no_fork
from zarrcache.disk._index_check import is_damage, is_right_row, row_of, volume_of
from zarrcache.disk._owner import is_dead, owner_id
from zarrcache.disk._publish import PARTIAL_SUFFIX
from zarrcache.disk.directory import CacheDir
from zarrcache.disk.filesystems import can_map_to_write, refuse_network
from zarrcache.disk.policy import Admission, EvictionPolicy, admit, choose_victims, min_free_bytes
from zarrcache.stats import LogOnce

__all__ = ["CACHE_FAULTS", "LENT", "Index", "Intent", "Row", "Stored"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_INTENT = "intent"
_INTENTS = ("+", ",")  # the range of their keys
LENT = "-"  # before the digest of what is lent
_ANNOUNCED = ("+", ".")  # both
_PAGE = 10_000  # rows in memory at a time when all are looked at
_FEW = 100  # rows that make room for one entry, mostly
_BATCH = 500  # rows a transaction when many are dropped: others wait for about 10 ms


class Row(NamedTuple):
    """One entry as a listing shows it. A tuple: there may be 400,000 of them."""

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
    """Rows of one cache directory. Opens at first use; safe from any thread or process; pickles as
    its configuration.

    Methods raise what :data:`CACHE_FAULTS` names; callers turn that into a miss.

    Raises
    ------
    ConfigError
        ``cache.dir`` is on a network file system, and ``cache.allow_network_fs`` is not set. Told
        before a run starts: it is no fault that comes and goes, and a run without its cache would
        be slow from the first epoch to the last.
    """

    def __init__(self, config: CacheConfig) -> None:
        #: Cache faults, whichever tier meets them first.
        self.log_once = LogOnce()
        #: Who knows what is needed last; for ``eviction: belady``.
        self.eviction_policy: EvictionPolicy | None = None
        self._config = config
        self.dir = CacheDir(config.dir, config.shared)
        refuse_network(config.dir, is_allowed=config.allow_network_fs)
        self._file = IndexFile(
            self.dir, has_log=can_map_to_write(config.dir), is_checked=config.verify == "always"
        )
        self._root = os.fspath(self.dir.root)

    def __reduce__(self) -> tuple[type[Index], tuple[CacheConfig]]:
        return type(self), (self._config,)

    # -- reading
    # ---------------------------------------------------------------------------------------------------------------

    def lookup(self, digest: str) -> Stored | None:
        """One SELECT, no write."""
        table = self._table()
        with no_fork(table):
            row: Stored | None = row_of(table, digest)
        return row

    def path_of(self, stored: Stored) -> str:
        """Full path of a file. A string: making a ``Path`` is a tenth of a warm hit."""
        return f"{self._root}/{stored.filename}"

    def volume_bytes(self) -> int:
        """Bytes on disk of all entries, and of what is being written or deleted right now."""

        def ask() -> int:
            table = self._table()
            with no_fork(table):
                return volume_of(table)

        return self._healing(ask)

    def rows(self, tier: str | None = None) -> Iterator[Row]:
        """Every entry, oldest first. One that is replaced meanwhile may come twice, as what it was
        and as what it is.
        """
        where, columns = (
            "tag = ?" if tier else "tag != ?",
            "rowid, key, tag, size, store_time, mode, filename, value",
        )
        query = (
            f"SELECT {columns} FROM Cache WHERE rowid > ? AND {where} ORDER BY rowid LIMIT {_PAGE}"
        )
        last = 0
        while page := self._healing(
            functools.partial(self._select, query, (last, tier or _INTENT))
        ):
            for _, key, tag, size, stored_s, mode, filename, value in page:
                # A damaged or planted row is left to the next look at the whole index: it must stop
                # nobody.
                if (
                    is_right_row(mode, filename, value)
                    and isinstance(size, int)
                    and isinstance(stored_s, float)
                    and f"/{key}" in filename
                ):
                    yield Row(key, tag, filename, size, stored_s, value.partition(" ")[2])
            last = page[-1][0]

    def totals(self) -> dict[str, tuple[int, int]]:
        """``{tier: (entries, bytes)}``."""
        rows = self._healing(
            lambda: self._select(
                "SELECT tag, COUNT(*), SUM(size) FROM Cache WHERE tag != ? GROUP BY tag", (_INTENT,)
            )
        )
        return {tag: (count, size) for tag, count, size in rows}

    def entry_sizes(self, prefixes: Sequence[str], suffix: str) -> list[dict[str, int]]:
        """Bytes on disk of the entries of the array tier whose notes begin and end so, by what
        stands in between; a dictionary a prefix.

        One pass over the table for each, and one over the directories: what a cleaner of the disk
        has taken is not there, whatever the table says.
        """
        # As many files as rows: all are there, unless a cleaner took as many as killed processes
        # have left. Names take 0.7 s more for 400,000.
        ((count,),) = self._healing(
            lambda: self._select("SELECT COUNT(*) FROM Cache WHERE tag = 'array'", ())
        )
        there = None if self.dir.count_entries() == count else self.dir.entry_names()
        # A value is the size, a blank and the note; the size has no blank. It is cut here: SQLite
        # counts characters from the start each time.
        query = (
            f"SELECT value, size, {'NULL' if there is None else 'filename'} FROM Cache WHERE tag = "
            "'array' "
            "AND instr(value, ?) = instr(value, ' ') AND substr(value, -?) = ? AND typeof(value) = "
            "'text' AND typeof(filename) = 'text'"
        )
        sizes, end = [], len(suffix)
        for prefix in prefixes:
            rows, skip = (
                self._healing(functools.partial(self._select, query, (f" {prefix}", end, suffix))),
                len(prefix) + 1,
            )
            rows = (
                rows
                if there is None
                else [row for row in rows if row[2].rpartition("/")[2] in there]
            )
            sizes.append({value[value.index(" ") + skip : -end]: size for value, size, _ in rows})
        return sizes

    def filenames(self) -> set[str]:
        """Files of all entries, and those that are being written or deleted; paths below the
        cache's root.
        """
        return {
            filename
            for (filename,) in self._healing(lambda: self._select("SELECT filename FROM Cache", ()))
        }

    # -- writing
    # ---------------------------------------------------------------------------------------------------------------

    def begin(self, filename: str, size_bytes: int) -> Intent | Admission:
        """Reserve room for a file of ``size_bytes`` (on disk), or say why not."""
        refusal = self._reserve(filename, size_bytes)
        if refusal is Admission.OVER_LIMIT and self.sweep():
            refusal = self._reserve(filename, size_bytes)
        # others may take the room that was made; after that the entry is a bypass
        for _ in range(8):
            if refusal is not Admission.OVER_LIMIT or not self._make_room(filename, size_bytes):
                break
            refusal = self._reserve(filename, size_bytes)
        return refusal

    def commit(self, intent: Intent, digest: str, tier: str, note: str) -> None:
        """Make the file that ``intent`` announced visible as ``digest``. What it replaces is
        unlinked after that.
        """
        with self._transaction() as table:
            doomed = self._doom(table, digest, keep=intent.filename)
            table.set(digest, Stored(intent.filename, intent.size_bytes, note), tag=tier)
            table.delete(intent.key)
        self._finish(doomed)

    def abort(self, intent: Intent) -> None:
        """Forget a file that will not come."""
        self._finish([intent])

    def drop(self, digests: Sequence[str], *, filename: str | None = None) -> int:
        """Drop entries: the rows in one transaction, then the files. A reader that has one mapped
        keeps it.

        Parameters
        ----------
        digests : sequence of str
        filename : str, optional
            Drop only if the entry still is this file: the reader that found a bad entry must not
            drop the good one that replaced it.

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

    def lend(self, digest: str, filename: str) -> bool:
        """Announce a loan, in room that is reserved already, before its file is written. Found by
        ``lookup(LENT + digest)``.

        False if another rank of the node has lent it: of two rows under one name the first would be
        lost, and its file with it.
        """
        with self._transaction() as table:
            if is_free := row_of(table, LENT + digest) is None:
                table.set(LENT + digest, Stored(filename, 0, owner_id()), tag=_INTENT)
        return is_free

    def loans(self) -> set[str]:
        """Digests of what is lent right now."""
        return {
            key[len(LENT) :]
            for (key,) in self._select(
                "SELECT key FROM Cache WHERE key >= ? AND key < ?", (LENT, _ANNOUNCED[1])
            )
        }

    def give_back(self, digest: str, filename: str) -> None:
        """Remove a loan. The file goes first: when the row is gone, its owner takes the room for
        free.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.dir.root / filename)
        self.drop([LENT + digest], filename=filename)

    def sweep(self) -> int:
        """Unlink what dead owners were writing or deleting. Returns the number of files."""
        # By the range of their keys, not by tag: there is an index over the keys, and a full cache
        # asks this at every put.
        rows = self._select(
            "SELECT key, filename, size, mode, value, store_time FROM Cache WHERE key >= ? AND key "
            "< ?",
            _ANNOUNCED,
        )
        now_s = time.time()
        dead = []
        for key, filename, size, mode, value, stored_s in rows:
            if not is_right_row(mode, filename, value) or not isinstance(stored_s, float):
                raise sqlite3.DatabaseError(f"the row of {filename!r} is not as it was written")
            owner = value.partition(" ")[2]
            if is_dead(owner, now_s - stored_s):
                dead.append(Intent(key, filename, size))
                self._remove_partials(filename, owner)
        self._finish(dead)
        return len(dead)

    def _remove_partials(self, filename: str, owner: str) -> None:
        """Unlink what a dead writer left unfinished. Only here: a living one removes its own, and
        to look for it is to list a directory.
        """
        path, pid = self.dir.root / filename, owner.partition(" ")[2].partition(" ")[0]
        for partial in path.parent.glob(f".{path.name}.{pid}-*{PARTIAL_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)

    def _reserve(self, filename: str, size_bytes: int) -> Intent | Admission:
        intent = Intent(f"+{secrets.token_hex(8)}", filename, size_bytes)
        with self._transaction() as table:
            usage = shutil.disk_usage(self.dir.root)
            # What others have reserved is not on the disk yet.
            ((reserved,),) = self._select(
                "SELECT COALESCE(SUM(size), 0) FROM Cache WHERE key >= ? AND key < ?", _INTENTS
            )
            outcome = admit(
                size_bytes,
                volume_bytes=volume_of(table),
                limit_bytes=self._config.limit,
                free_bytes=usage.free - reserved,
                min_free_bytes=min_free_bytes(self._config.min_free, usage.total),
            )
            if outcome is Admission.ADMIT:
                table.set(intent.key, Stored(filename, size_bytes, owner_id()), tag=_INTENT)
                return intent
        return outcome

    def drop_oldest(self, needed_bytes: int) -> int:
        """Drop what was stored first. Returns the bytes freed."""
        # rowid order is the order of storing: a replaced entry gets a new row. Listings, whose
        # notes end with a line end, stay: they are small, and without them no run starts offline.
        query = "SELECT key, size FROM Cache WHERE tag != ? AND substr(value, -1) != char(10) ORDER BY rowid LIMIT ?"
        # One or two will do, as a rule; 10,000 rows would be 8 ms at every put. -1: all of them.
        for most in (_FEW, _PAGE, -1):
            oldest = self._select(query, (_INTENT, most))
            if sum(size for _, size in oldest) >= needed_bytes:
                break
        return self.drop(choose_victims(oldest, needed_bytes))

    def shortfall_bytes(self, size_bytes: int) -> int:
        """What has to go before a file of ``size_bytes`` is within the limit."""
        return self.volume_bytes() + size_bytes - self._config.limit

    def _make_room(self, filename: str, size_bytes: int) -> bool:
        """Drop what ``cache.eviction`` says. False if nothing is to be dropped."""
        shortfall = self.shortfall_bytes(size_bytes)
        if self._config.eviction == "least-recently-stored":
            self.drop_oldest(shortfall)
            return True
        if self._config.eviction == "none" or self.eviction_policy is None:
            return False
        digest = filename.rpartition("/")[2].partition("-")[0]
        victims = self.eviction_policy.victims(
            digest,
            shortfall,
            lambda: self._select("SELECT key, size FROM Cache WHERE tag = 'array'", ()),
        )
        self.drop(victims)
        return bool(victims)

    def _doom(
        self, table: Table, digest: str, *, keep: str | None = None, only: str | None = None
    ) -> list[Intent]:
        """Turn an entry into an intent to delete. Call inside a transaction."""
        old = row_of(table, digest)
        if old is None or (only is not None and old.filename != only):
            return []
        table.delete(digest)
        # the byte tier publishes under one name: the new file has replaced the old one already
        if old.filename == keep:
            return []
        intent = Intent(f"+{secrets.token_hex(8)}", old.filename, old.size_bytes)
        table.set(intent.key, Stored(old.filename, old.size_bytes, owner_id()), tag=_INTENT)
        return [intent]

    def _finish(self, intents: Sequence[Intent]) -> None:
        """Unlink the files of intents, then forget the intents."""
        if not intents:
            return
        table = self._table()
        kept: set[str] = set()
        for intent in intents:
            path = self.dir.root / intent.filename
            with no_fork(table):
                entry = row_of(table, path.name.partition("-")[0])
            if entry is not None and entry.filename == intent.filename:
                # the byte tier has one name for an object: somebody has published it again
                # meanwhile
                continue
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as exc:
                # A directory was planted, or the file is another user's. Its intent stays, and its
                # bytes count; the others are not to blame.
                kept.add(intent.key)
                self.log_once.warning(
                    "unlink",
                    logger,
                    "%s cannot be removed (%s) and goes on to count; remove it by hand",
                    path,
                    exc.strerror or exc,
                )
        with self._transaction() as table:
            for intent in intents:
                if intent.key not in kept:
                    table.delete(intent.key)

    # -- opening
    # ---------------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open now: create the directory, sweep after the dead. Everything else does it by itself
        at first use.

        Raises
        ------
        ConfigError
            The directory cannot be ours.
        OSError, sqlite3.Error, diskcache.Timeout
            It cannot be created or opened.
        """
        self._table()

    def reopen(self, after: BaseException | None = None) -> None:
        """Open anew at the next use, if ``after`` is nothing or an error that this can heal
        (damaged index, deleted directory).
        """
        self._file.forget(after)

    def _table(self) -> Table:
        table = self._file.table
        if table is None:
            table = self._file.open()
            try:
                self.sweep()
            except CACHE_FAULTS as exc:
                if not is_damage(exc):
                    raise
                self._file.forget(exc)
                table = self._file.open()
        return table

    def _healing(self, ask: Callable[[], T]) -> T:
        """``ask()``, and once more over a rebuilt index if the one that there is turns out to be
        damaged. Not inside a transaction.
        """
        try:
            return ask()
        except CACHE_FAULTS as exc:
            if not is_damage(exc):
                raise
            self._file.forget(exc)
            return ask()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Table]:
        self._file.forget_if_replaced()
        self._table()
        with self._file.transaction() as table:
            yield table

    def _select(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        self._table()
        return self._file.select(query, values)
