"""The index of one cache directory: the list of all its files, for both tiers.

Every file is recorded before it exists and forgotten after it is gone. A row whose key starts with
``+`` is an *intent*: the process named in it is writing or deleting a file. Its size counts. So

* the limit holds at every instant, across processes: room is reserved in a transaction before the
  first byte is written;
* after a crash the intents of dead owners name exactly the files to unlink, so the cost of opening
  does not grow with the number of entries.

A row whose key is ``-`` and a digest is a *loan*: an entry that is read once and removed by its
reader. It takes room that its owner, a prefetcher, has reserved.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import secrets
import shutil
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from zarrcache.config import CacheConfig
from zarrcache.disk._database import (
    CACHE_FAULTS,
    INTENT,
    IndexFile,
    Stored,
    Table,
    is_valid_row,
)
from zarrcache.disk._publish import partials_of
from zarrcache.disk.directory import CacheDir
from zarrcache.disk.entry import ARRAY, LISTING, OBJECT
from zarrcache.disk.filesystems import can_map_to_write, refuse_network
from zarrcache.disk.policy import (
    BLOCK_BYTES,
    Admission,
    EvictionPolicy,
    LeastRecentlyStored,
    admit,
    min_free_bytes,
    policy_of,
)
from zarrcache.disk.single_flight import Owners
from zarrcache.errors import ConfigError
from zarrcache.stats import LogOnce

__all__ = ["CACHE_FAULTS", "LENT", "Index", "Intent", "Row", "Stored"]

logger = logging.getLogger(__name__)

#: Prefix of the key of a loan, before the digest.
LENT = "-"
# Ranges of keys: SQLite has an index over the keys, and a full cache queries them at every put.
_INTENTS = ("+", ",")
_LOANS = ("-", ".")
_ANNOUNCED = ("+", ".")  # both
_PAGE = 10_000  # rows per query
_UNLINKED = 50  # files of the byte tier unlinked per transaction
_BATCH = 500  # rows dropped per transaction: other processes wait for about 10 ms
_ATTEMPTS = 8  # to reserve the room that was made, which other processes may take


class Row(NamedTuple):
    """One entry. A tuple, because there may be 400,000 of them.

    ``kind`` is :data:`~zarrcache.disk.entry.ARRAY`, ``LISTING`` or ``OBJECT``.
    """

    digest: str
    kind: str
    filename: str
    size_bytes: int
    stored_s: float
    note: str


@dataclass(frozen=True, slots=True)
class Intent:
    """Bytes reserved for one file that is about to be written."""

    key: str
    filename: str
    size_bytes: int


class Index:
    """The rows of one cache directory. Safe from any thread or process.

    It opens at first use and pickles as its configuration. Methods raise :data:`CACHE_FAULTS`;
    callers turn these into a miss.

    Parameters
    ----------
    config : CacheConfig

    Attributes
    ----------
    dir : CacheDir
    log_once : LogOnce
        For cache faults, shared by both tiers.

    Raises
    ------
    ConfigError
        ``cache.dir`` is on a network file system, and ``cache.allow_network_fs`` is not set. This
        is raised before a run starts: a run without its cache would be slow in every epoch.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.log_once = LogOnce()
        self._config = config
        self.eviction_policy: EvictionPolicy = policy_of(config.eviction)
        self.dir = CacheDir(config.dir, config.shared)
        refuse_network(config.dir, is_allowed=config.allow_network_fs)
        self._file = IndexFile(
            self.dir,
            has_log=can_map_to_write(config.dir),
            is_checked=config.verify == "always",
            after_open=functools.partial(_sweep, weakref.ref(self)),
            log_once=self.log_once,
        )
        self._owners = Owners(self.dir)
        self._unfinished: list[Intent] = []
        # A file may occupy more than its rounded length: largest excess that this process has seen.
        self._excess_bytes = 0
        self._root = os.fspath(self.dir.root)

    def __reduce__(self) -> tuple[type[Index], tuple[CacheConfig]]:
        return type(self), (self._config,)

    def set_eviction_policy(self, eviction_policy: EvictionPolicy | None) -> None:
        """Let ``eviction_policy`` choose victims in this process. Not pickled with the index.

        None: the policy that ``cache.eviction`` names.
        """
        self.eviction_policy = eviction_policy or policy_of(self._config.eviction)

    # -- reading

    def lookup(self, key: str) -> Stored | None:
        """The row of a digest, or of a loan (``LENT + digest``). One SELECT, no write."""
        return self._file.lookup(key)

    def find(self, digest: str) -> tuple[Stored | None, Stored | None]:
        """The row of an entry, or if there is none, the row of its loan."""
        stored = self._file.lookup(digest)
        return stored, None if stored is not None else self._file.lookup(LENT + digest)

    def path_of(self, stored: Stored | Intent) -> str:
        """Full path of a file, as a string: a ``Path`` would take a tenth of a warm hit."""
        return f"{self._root}/{stored.filename}"

    def volume_bytes(self) -> int:
        """Bytes on disk of all entries, and of files that are being written or deleted now."""
        return self._file.healing(self._file.volume_bytes)

    def rows(self, kind: str | None = None) -> Iterator[Row]:
        """Every entry (or those of one kind), oldest first.

        An entry that is replaced meanwhile may occur twice, in its old and its new version.
        """
        query = (
            "SELECT rowid, key, tag, size, store_time, mode, filename, value FROM Cache "
            f"WHERE rowid > ? AND tag {'=' if kind else '!='} ? ORDER BY rowid LIMIT {_PAGE}"
        )
        last = 0
        while page := self._ask(query, last, kind or INTENT):
            for _, key, tag, size, stored_s, mode, filename, value in page:
                # Damaged and planted rows are skipped: the next check of the whole index finds
                # them.
                if (
                    is_valid_row(mode, filename, value)
                    and isinstance(size, int)
                    and isinstance(stored_s, float)
                    and f"/{key}" in filename
                ):
                    note = value.partition(" ")[2]
                    yield Row(key, tag, filename, size, stored_s, note)
            last = page[-1][0]

    def totals(self) -> dict[str, tuple[int, int]]:
        """``{kind: (entries, bytes)}``."""
        # Not GROUP BY, which sorts the rows and takes twice as long.
        kinds = (ARRAY, LISTING, OBJECT)
        columns = ", ".join(
            f"COUNT(*) FILTER (WHERE tag = '{kind}'), "
            f"COALESCE(SUM(size) FILTER (WHERE tag = '{kind}'), 0)"
            for kind in kinds
        )
        ((*found,),) = self._ask(f"SELECT {columns} FROM Cache")
        pairs = zip(kinds, found[::2], found[1::2], strict=True)
        return {kind: (count, size) for kind, count, size in pairs if count}

    def entry_sizes(self, prefixes: Sequence[str], suffix: str) -> list[dict[str, int]]:
        """Bytes on disk of arrays, by the part of their note between a prefix and ``suffix``.

        Entries whose file is gone (scratch disks are often purged) are left out.

        Returns
        -------
        list of dict
            One per prefix. Each takes one pass over the table; the directories are listed once.
        """
        names = None if self._has_all_files() else self.dir.entry_names()
        files = "NULL" if names is None else "group_concat(filename, char(0))"
        found = []
        for prefix in prefixes:
            stems, (sizes, filenames) = self._stems(
                prefix, suffix, f"group_concat(size, ' '), {files}"
            )
            pairs: Iterable[tuple[str, int]] = zip(
                stems, map(int, sizes.split(" ") if stems else ()), strict=True
            )
            if names is not None and stems:
                is_there = (file.rpartition("/")[2] in names for file in filenames.split("\0"))
                pairs = itertools.compress(pairs, is_there)
            found.append(dict(pairs))
        return found

    def entry_names(self, prefixes: Sequence[str], suffix: str) -> list[tuple[set[str], int]]:
        """The names that :meth:`entry_sizes` returns, and the sum of the sizes, in half the time.

        0.6 s for 400,000 entries.
        """
        # The directories are listed while SQLite works; neither holds the GIL for long.
        with ThreadPoolExecutor() as pool:
            has_all_files = pool.submit(self._has_all_files)
            found = list(pool.map(lambda one: self._stems(one, suffix, "SUM(size)"), prefixes))
            if has_all_files.result():
                return [(set(stems), total or 0) for stems, (total,) in found]
        sizes = self.entry_sizes(prefixes, suffix)
        return [(set(of_prefix), sum(of_prefix.values())) for of_prefix in sizes]

    def array_names(self, prefix: str) -> set[str]:
        """The texts after the name of the store in notes that begin with ``prefix``.

        There are few different texts, so this takes one pass over the table.
        """
        rows = self._ask(
            "SELECT DISTINCT substr(name, instr(name, char(10)) + 1) FROM (SELECT "
            "substr(value, instr(value, ' ') + ?) AS name FROM Cache WHERE tag = ? "
            "AND instr(value, ?) = instr(value, ' ') AND typeof(value) = 'text')",
            len(prefix) + 1,
            ARRAY,
            f" {prefix}",
        )
        return {array for (array,) in rows if array}

    def _stems(self, prefix: str, suffix: str, columns: str) -> tuple[list[str], tuple[Any, ...]]:
        """The part of the note of arrays between ``prefix`` and ``suffix``, and other columns."""
        # A value is the size, a blank and the note. One row of joined texts, which Python splits at
        # the suffix: 200,000 rows of their own take three times as long as this query.
        ((stems, *others),) = self._ask(
            f"SELECT group_concat(substr(value, instr(value, ' ') + ?), char(0)), {columns} "
            "FROM Cache WHERE tag = ? AND instr(value, ?) = instr(value, ' ') "
            "AND substr(value, -?) = ? AND typeof(value) = 'text' AND typeof(size) = 'integer' "
            "AND typeof(filename) = 'text'",
            len(prefix) + 1,
            ARRAY,
            f" {prefix}",
            len(suffix),
            suffix,
        )
        parts = [] if stems is None else stems.removesuffix(suffix).split(f"{suffix}\0")
        return parts, tuple(others)

    def _has_all_files(self) -> bool:
        """Whether there are as many files as rows; then no file is taken to be missing.

        This is wrong only if a purge deleted as many files as killed processes have left. Comparing
        names takes 0.7 s more for 400,000 entries.
        """
        ((count,),) = self._ask("SELECT COUNT(*) FROM Cache WHERE tag IN (?, ?)", ARRAY, LISTING)
        return bool(self.dir.count_entries() == count)

    def filenames(self) -> set[str]:
        """Paths below the root of all files, also those that are being written or deleted."""
        return {filename for (filename,) in self._ask("SELECT filename FROM Cache")}

    # -- writing

    @property
    def is_read_only(self) -> bool:
        """Whether this process can only read: nothing is stored or dropped. As of the last use."""
        return self._file.is_read_only

    def on_disk_bytes(self, nbytes: int) -> int:
        """Bytes to reserve for a file of ``nbytes``: the most that it can occupy on disk.

        The allocation unit is that of this file system (64 KiB on some), not a constant.
        """
        if not self._file.unit_bytes:
            self._file.open()
        unit = max(self._file.unit_bytes, BLOCK_BYTES)
        return -(-nbytes // unit) * unit + self._excess_bytes

    def begin(self, filename: str, size_bytes: int) -> Intent | Admission:
        """Reserve room for a file of ``size_bytes`` (on disk), or return why that is refused."""
        self._file.open()
        if self._file.is_read_only:
            if self.dir.is_read_only:
                return Admission.READ_ONLY
            self._file.forget()  # its disk is mounted writable again
            self._file.open()
        if self._unfinished:
            intents, self._unfinished = self._unfinished, []
            self._end(intents)
        outcome = self._reserve(filename, size_bytes)
        if outcome is Admission.OVER_LIMIT and self.sweep():
            outcome = self._reserve(filename, size_bytes)
        # Other processes may take the room that was made. After the last attempt it is a bypass.
        for _ in range(_ATTEMPTS):
            if outcome is not Admission.OVER_LIMIT or not self._make_room(filename, size_bytes):
                break
            outcome = self._reserve(filename, size_bytes)
        return outcome

    def commit(
        self,
        intent: Intent,
        digest: str,
        kind: str,
        note: str,
        occupied_bytes: int | None = None,
    ) -> bool:
        """Make the file of ``intent`` visible as ``digest``, then unlink the one it replaces.

        Parameters
        ----------
        occupied_bytes : int, optional
            Bytes that the file occupies, which count from now on. Default: the reserved bytes.

        Returns
        -------
        bool
            False if it occupies more than was reserved, and the limit has no room for that, or if
            the file is gone already: another process dropped an older object of this name. The
            caller aborts ``intent``.
        """
        if occupied_bytes is None:
            occupied_bytes = intent.size_bytes
        excess_bytes = occupied_bytes - intent.size_bytes
        with self._file.transaction() as table:
            if excess_bytes > 0:
                self._excess_bytes += excess_bytes
                if self._file.volume_bytes(table) + excess_bytes > self._config.limit:
                    return False
            if _is_reused(intent.filename) and not os.path.lexists(self.path_of(intent)):
                return False
            doomed = self._doom(table, digest, keep=intent.filename)
            table.set(digest, Stored(intent.filename, occupied_bytes, note), tag=kind)
            table.delete(intent.key)
        self._finish(doomed)
        return True

    def abort(self, intent: Intent) -> None:
        """Unlink the file of ``intent``, if it exists, and free its room.

        If the index fails, :meth:`begin` does it: no sweep does while this process lives.
        """
        self._end([intent])

    def _end(self, intents: list[Intent]) -> None:
        try:
            self._finish(intents)
        except BaseException:
            self._unfinished += intents
            raise

    def drop(self, digests: Sequence[str], *, filename: str | None = None) -> int:
        """Drop entries: the rows in one transaction, then the files. Existing maps stay valid.

        Parameters
        ----------
        digests : sequence of str
        filename : str, optional
            Drop only if the entry still is this file, because a reader that found a bad entry must
            not drop the good one that replaced it.

        Returns
        -------
        int
            Bytes freed on disk.
        """
        return self._drop([(digest, filename, None) for digest in digests])

    def drop_rows(self, rows: Sequence[Row]) -> int:
        """Like :meth:`drop`, but keep an entry that was stored again after its row was read."""
        return self._drop([(row.digest, row.filename, row.stored_s) for row in rows])

    def _drop(self, entries: Sequence[tuple[str, str | None, float | None]]) -> int:
        freed = 0
        if entries and self.is_read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), self._root)
        for start in range(0, len(entries), _BATCH):
            doomed: list[Intent] = []
            with self._file.transaction() as table:
                for digest, filename, stored_s in entries[start : start + _BATCH]:
                    doomed += self._doom(table, digest, only=filename, stored_s=stored_s)
            self._finish(doomed)
            freed += sum(intent.size_bytes for intent in doomed)
        return freed

    def drop_oldest(self, needed_bytes: int) -> int:
        """Drop the entries that were stored first. Returns the bytes freed."""
        return self.drop(LeastRecentlyStored().victims("", needed_bytes, self._oldest))

    def shortfall_bytes(self, size_bytes: int) -> int:
        """Bytes to free before a file of ``size_bytes`` is within the limit."""
        return self.volume_bytes() + size_bytes - self._config.limit

    def sweep(self) -> int:
        """Unlink files that dead owners were writing or deleting. Returns their number."""
        if self.is_read_only:
            return 0
        now_s = time.time()
        dead = []
        for key, filename, size, mode, value, stored_s in self._file.select(
            "SELECT key, filename, size, mode, value, store_time FROM Cache "
            "WHERE key >= ? AND key < ?",
            _ANNOUNCED,
        ):
            if not is_valid_row(mode, filename, value) or not isinstance(stored_s, float):
                raise sqlite3.DatabaseError(f"the row of {filename!r} does not match its checksum")
            owner = value.partition(" ")[2]
            if self._owners.is_dead(owner, now_s - stored_s):
                dead.append(Intent(key, filename, size))
                # Only for dead writers: a live one removes its own partial files, and this lists
                # a directory.
                path = self.dir.root / filename
                with (
                    contextlib.suppress(FileNotFoundError, NotADirectoryError),
                    self.dir.opened(path.parent) as fd,
                ):
                    for name in partials_of(path.name, owner, fd):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(name, dir_fd=fd)
        self._finish(dead)
        return len(dead)

    # -- loans

    def lend(self, digest: str, filename: str) -> bool:
        """Record a loan, in room that is reserved already, before its file is written.

        False if another rank of the node has lent the same entry: a second row under one key would
        replace the first, whose file would be lost.
        """
        with self._file.transaction() as table:
            owner = self._owners.announce()
            if is_free := self._file.lookup(LENT + digest, table) is None:
                table.set(LENT + digest, Stored(filename, 0, owner), tag=INTENT)
        return is_free

    def loans(self) -> set[str]:
        """Digests of all entries on loan."""
        found = self._file.select("SELECT key FROM Cache WHERE key >= ? AND key < ?", _LOANS)
        return {key.removeprefix(LENT) for (key,) in found}

    def give_back(self, digest: str, filename: str) -> None:
        """Remove a loan: first the file, because its owner reuses the room once the row is gone."""
        with contextlib.suppress(FileNotFoundError):
            self.dir.unlink(self.dir.root / filename)
        self.drop([LENT + digest], filename=filename)

    # -- parts

    def _ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of a query; a damaged index is rebuilt first. Not inside a transaction."""
        return self._file.healing(lambda: self._file.select(query, values))

    def _oldest(self, most: int = -1, *, kind: str | None = None) -> list[tuple[str, int]]:
        """See :class:`~zarrcache.disk.policy.StoredEntries`."""
        # Row ids are in the order of storing, because a replaced entry gets a new row.
        kinds = (ARRAY, OBJECT) if kind is None else (kind,)
        return self._file.select(
            f"SELECT key, size FROM Cache WHERE tag IN ({', '.join('?' * len(kinds))}) "
            "ORDER BY rowid LIMIT ?",
            (*kinds, most),
        )

    def _reserve(self, filename: str, size_bytes: int) -> Intent | Admission:
        intent = Intent(f"+{secrets.token_hex(8)}", filename, size_bytes)
        with self._file.transaction() as table:
            owner = self._owners.announce()  # inside: this creates the directory if it is gone
            usage = shutil.disk_usage(self.dir.root)
            # Reserved bytes are not on the disk yet.
            ((reserved,),) = self._file.select(
                "SELECT COALESCE(SUM(size), 0) FROM Cache WHERE key >= ? AND key < ?",
                _INTENTS,
                table,
            )
            outcome = admit(
                size_bytes,
                volume_bytes=self._file.volume_bytes(table),
                limit_bytes=self._config.limit,
                free_bytes=usage.free - reserved,
                min_free_bytes=min_free_bytes(self._config.min_free, usage.total),
            )
            if outcome is Admission.ADMIT:
                table.set(intent.key, Stored(filename, size_bytes, owner), tag=INTENT)
                return intent
        return outcome

    def _make_room(self, filename: str, size_bytes: int) -> bool:
        """Drop the entries that the eviction policy chooses. False if it chooses none."""
        needed_bytes = self.shortfall_bytes(size_bytes)
        if needed_bytes <= 0:  # another process has made room
            return True
        digest = filename.rpartition("/")[2].partition("-")[0]
        victims = self.eviction_policy.victims(digest, needed_bytes, self._oldest)
        self.drop(victims)
        return bool(victims)

    def _doom(
        self,
        table: Table,
        digest: str,
        *,
        keep: str | None = None,
        only: str | None = None,
        stored_s: float | None = None,
    ) -> list[Intent]:
        """Turn an entry into an intent to delete. Call inside a transaction."""
        old = self._file.lookup(digest, table)
        if old is None or (only is not None and old.filename != only):
            return []
        # An object is stored again under the same file name.
        query = "SELECT 1 FROM Cache WHERE key = ? AND store_time = ?"
        if stored_s is not None and not self._file.select(query, (digest, stored_s), table):
            return []
        table.delete(digest)
        # An object has one file name, so the new file has replaced the old one already.
        if old.filename == keep:
            return []
        intent = Intent(f"+{secrets.token_hex(8)}", old.filename, old.size_bytes)
        owner = self._owners.announce()
        table.set(intent.key, Stored(old.filename, old.size_bytes, owner), tag=INTENT)
        return [intent]

    def _finish(self, intents: Sequence[Intent]) -> None:
        """Unlink the files of intents, then forget the intents."""
        if not intents:
            return
        kept: set[str] = set()

        def unlink(intent: Intent) -> None:
            path = self.dir.root / intent.filename
            try:
                self.dir.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as exc:
                # A planted directory, or another user's file. Its intent stays and its bytes count;
                # the other intents are not affected.
                kept.add(intent.key)
                self.log_once.warning(
                    "unlink",
                    logger,
                    "%s cannot be removed (%s) and still counts towards cache.limit; remove it by "
                    "hand",
                    path,
                    exc.strerror or exc,
                )

        for intent in intents:
            if not _is_reused(intent.filename):
                unlink(intent)
        for start in range(0, len(intents), _UNLINKED):
            self._forget(intents[start : start + _UNLINKED], kept, unlink)

    def _forget(
        self, intents: Sequence[Intent], kept: set[str], unlink: Callable[[Intent], None]
    ) -> None:
        """Forget intents in one transaction, in which files of names that are used again go."""
        with self._file.transaction() as table:
            for intent in intents:
                if _is_reused(intent.filename):
                    # In the transaction: another process that has published the object again
                    # commits it either before, and it stays, or after, and finds it gone.
                    entry = self._file.lookup(intent.filename.rpartition("/")[2], table)
                    if entry is None or entry.filename != intent.filename:
                        unlink(intent)
                if intent.key not in kept:
                    table.delete(intent.key)

    # -- opening

    def open(self) -> None:
        """Open now: create the directory and sweep after dead owners. Other methods do it too.

        Raises
        ------
        ConfigError
            The directory cannot be used. Training would continue without a cache; a command whose
            purpose is the cache must not.
        """
        try:
            self._file.open()
        except ConfigError:
            raise
        except CACHE_FAULTS as exc:
            why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            raise ConfigError(
                f"cache.dir {self.dir.parent} cannot be used ({why}). Choose a directory on a "
                "local disk of this node that you may write to and that has room."
            ) from exc

    def reopen(self, after: BaseException | None = None) -> None:
        """Open again at the next use, if that can heal the error ``after`` (None: always).

        It can for a damaged index or a deleted directory.
        """
        self._file.forget(after)


def _is_reused(filename: str) -> bool:
    """Whether the next file of the same entry has the same name: it is an object's."""
    return "-" not in filename


def _sweep(index: weakref.ref[Index]) -> None:
    # A weak reference: a cycle would keep connections open until the garbage collector runs.
    if (found := index()) is not None:
        found.sweep()
