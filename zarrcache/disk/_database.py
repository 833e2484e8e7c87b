"""The file of the index, ``cache.db``: opened for each process anew, set aside when it is broken,
rebuilt from the entries.

diskcache gives an SQLite table that survives ``kill -9``, forks and eight processes at once, with
the sum of all sizes kept by triggers.  What it does with files must not happen here (measured): it
pickles values, leaves partial files on a full disk, culls ten entries at a time, and unlinks before
it commits.  So :class:`EntryDisk` stores no value at all, only where the file is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakSet

import diskcache

from zarrcache._keys import FORMAT_VERSION
from zarrcache.disk._index_check import damage_of, is_damage, is_right_row, row_mode, schema_id
from zarrcache.disk._index_log import ShortLog
from zarrcache.disk.directory import CacheDir, is_entry_name
from zarrcache.disk.entry import read_header
from zarrcache.disk.policy import disk_bytes
from zarrcache.disk.single_flight import SingleFlight
from zarrcache.errors import ConfigError, CorruptEntryError

__all__ = ["CACHE_FAULTS", "EntryDisk", "IndexFile", "Stored", "Table", "array_note", "no_fork"]

logger = logging.getLogger(__name__)

Table: TypeAlias = diskcache.Cache

#: What a broken cache raises; ConfigError of a directory that was replaced or closed to us under a
#: running job. Each becomes a miss or a pass-through, never an error of the reader.
CACHE_FAULTS = (OSError, sqlite3.Error, diskcache.Timeout, UnicodeDecodeError, ConfigError)

_BUSY_S = 60  # how long to wait for other processes


@dataclass(frozen=True, slots=True)
class Stored:
    """What the index keeps of one file: path below the cache's root, bytes on disk, and a note that
    belongs to the tier.
    """

    filename: str
    size_bytes: int
    note: str


def array_note(origin: str, url: str, array: str) -> str:
    """What the index says of an entry of the array tier. Newlines separate: they occur in no URL."""
    return f"{origin}\n{url}\n{array}"


class EntryDisk(diskcache.Disk):  # type: ignore[misc]
    """diskcache's value store, reduced to file names. It reads, writes and deletes no file."""

    def put(self, key: str) -> tuple[str, bool]:
        return key, True

    def get(self, key: str, raw: bool) -> str:
        return key

    def store(self, value: Stored, read: bool, key: object = None) -> tuple[int, int, str, str]:
        text = f"{value.size_bytes} {value.note}"
        return value.size_bytes, row_mode(value.filename, text), value.filename, text

    def fetch(self, mode: int, filename: str, value: str, read: bool) -> Stored:
        if not is_right_row(mode, filename, value):
            raise sqlite3.DatabaseError(f"the row of {filename!r} is not as it was written")
        size, _, note = value.partition(" ")
        return Stored(filename, int(size), note)

    def remove(self, file_path: str) -> None:
        """Nothing: a file is unlinked after its row's transaction is committed, and diskcache would
        do it before.
        """


class IndexFile:
    """One ``cache.db`` and this process's connections to it. Safe from any thread; a forked child
    opens its own.

    Parameters
    ----------
    directory : CacheDir
    has_log : bool
        With SQLite's write-ahead log, beside which lies memory that is shared by a map. Other nodes
        do not see it, and on a copy-on-write disk that is full, writing there ends the process
        (:func:`~zarrcache.disk.filesystems.can_map_to_write`).
    is_checked : bool
        Look at the whole of it each time it is opened.
    """

    def __init__(
        self, directory: CacheDir, *, has_log: bool = True, is_checked: bool = False
    ) -> None:
        self._dir = directory
        self._has_log = has_log
        self._is_checked = is_checked
        self._opened: _Opened | None = None
        self._is_suspect = False
        self._log = ShortLog(f"{directory.index}-wal", functools.partial(self.select, wait_s=0.1))
        _alive.add(self)

    @property
    def table(self) -> Table | None:
        """The open table of this process; None before :meth:`open`, and in a child that was forked
        after it.
        """
        opened = self._opened
        return opened.table if opened is not None and opened.pid == os.getpid() else None

    def open(self) -> Table:
        """Create or open the file; set a broken one aside.

        Raises
        ------
        ConfigError
            The directory cannot be ours.
        OSError, sqlite3.Error, diskcache.Timeout
            It cannot be created or opened.
        """
        self.forget()
        self._dir.ensure()
        # One at a time: each open writes diskcache's settings, and a broken index is set aside and
        # rebuilt by one process only. Two threads that come here together both open, one after the
        # other, and one of the two stays.
        with SingleFlight(
            self._dir.locks, timeout_s=60.0, mode=self._dir.written_mode, name="open"
        ).hold("0" * 8):
            with no_fork():
                table, broken = self._connect_or_replace()
            with no_fork(table):
                # A new file does not know what lies there: the old one was deleted, emptied or
                # broken, or its rebuilding was killed.
                if self.select("PRAGMA user_version") != [(FORMAT_VERSION,)]:
                    kept, removed = self._rebuild(table)
                    self.select(f"PRAGMA application_id = {schema_id(self.select)}")
                    self.select(f"PRAGMA user_version = {FORMAT_VERSION}")
                    if broken or kept or removed:
                        words = "the index %s %s and rebuilt from what lies there: %d entries kept, %d files removed"
                        logger.warning(words, self._dir.index, broken or "was lost", kept, removed)
        self.forget()  # another thread may have opened it meanwhile
        self._opened = _Opened(os.getpid(), table, _identity(self._dir.index))
        return table

    def forget(self, after: BaseException | None = None) -> None:
        """Have the file opened anew, if ``after`` is nothing or an error that this can heal.

        After a damaged database the next open looks at the whole file; after a directory that is
        gone it makes a new one.
        """
        if after is not None and is_damage(after):
            self._is_suspect = True
        elif after is not None and not isinstance(after, FileNotFoundError):
            return  # busy, read-only, full: another open finds the same
        if self._opened is not None:
            _kept.append(self._opened.table)
        self._opened = None

    def forget_if_replaced(self) -> None:
        """What is written to a file that lost its name is lost: the directory was deleted, or
        another process replaced a broken index.
        """
        if self._opened is not None and self._opened.identity != _identity(self._dir.index):
            self.forget()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Table]:
        """The open table, in a transaction."""
        table = self.table
        if table is None:
            table = self.open()
        with no_fork(table):
            try:
                with table.transact():
                    yield table
            except (sqlite3.Error, UnicodeDecodeError):
                # a COMMIT that fails (disk full) leaves its transaction open; the next call
                # connects again
                table.close()
                raise
        self._log.keep()

    def select(
        self, query: str, values: tuple[Any, ...] = (), *, wait_s: float = _BUSY_S
    ) -> list[tuple[Any, ...]]:
        """Rows of a query that diskcache has no method for, over a connection of its own."""
        with no_fork():
            # Not mode=ro: whoever comes first after a killed process has to undo or to finish what
            # it left (tests/processes/test_crash.py).
            connection = sqlite3.connect(
                f"{self._dir.index.as_uri()}?mode=rw", uri=True, timeout=wait_s
            )
            try:
                return connection.execute(query, values).fetchall()
            finally:
                connection.close()

    def close_before_fork(self) -> None:
        """Close this thread's connection: what a child inherits believes in locks that it does not
        hold.
        """
        if (table := self.table) is not None:
            table.close()

    def _connect_or_replace(self) -> tuple[Table, str]:
        """The open table, and what became of a broken one."""
        index, broken = self._dir.index, ""
        try:
            table = self._connect()
            if (self._is_checked or self._is_suspect) and (
                damage := damage_of(self.select)
            ) is not None:
                table.close()
                raise sqlite3.DatabaseError(damage)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as exc:
            if not is_damage(exc):
                raise
            aside = index.with_name(f"{index.name}.broken-{time.time_ns()}")
            broken = f"is broken ({exc}); it is set aside as {aside.name}"
            os.replace(index, aside)
            for suffix in ("-wal", "-shm", "-journal"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{index}{suffix}")
            table = self._connect()
        self._is_suspect = False
        return table, broken

    def _connect(self) -> Table:
        # SQLite gives its log and journal the permissions of the file that it finds
        self._dir.touch(self._dir.index)
        self._check_settings()
        deadline_s = time.monotonic() + _BUSY_S
        while True:
            try:
                return diskcache.Cache(
                    os.fspath(self._dir.root),
                    timeout=_BUSY_S,
                    disk=EntryDisk,
                    eviction_policy="none",
                    cull_limit=0,
                    statistics=0,
                    size_limit=2**62,
                    sqlite_mmap_size=0,  # a mapped file that somebody truncates kills the process
                    # Said each time: diskcache keeps it in the file, and a file may have been
                    # copied from the other kind of disk. Not TRUNCATE: a reader would have to look
                    # into the journal each time.
                    sqlite_journal_mode="wal" if self._has_log else "delete",
                )
            except sqlite3.OperationalError as exc:
                # One of its statements does not wait for others (drop_tag_index), which matters
                # where there is no write-ahead log.
                if "locked" not in str(exc) or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)

    def _check_settings(self) -> None:
        """Refuse settings that nobody here has written: diskcache makes pragmas, arguments and
        attributes of them.

        Raises
        ------
        sqlite3.DatabaseError
        """
        try:
            found = dict(self.select("SELECT key, value FROM Settings"))
        except sqlite3.OperationalError as exc:
            if "no such table" in str(exc):  # a new file
                return
            raise
        words = {"eviction_policy": {"none"}, "sqlite_journal_mode": {"wal", "delete"}}
        known = diskcache.DEFAULT_SETTINGS.keys() | {"count", "size", "hits", "misses"}
        strange = [
            key
            for key, value in found.items()
            if key not in known
            or (value not in words[key] if key in words else type(value) is not int)
        ]
        if strange:
            raise sqlite3.DatabaseError(
                f"it has settings that zarrcache does not write: {strange[0]!r}"
            )

    def _rebuild(self, table: Table) -> tuple[int, int]:
        """Fill an empty index from the files of the array tier; they say themselves what they are.
        Byte-tier files are fetched again.

        Returns the entries kept and the files removed.
        """
        found: dict[str, Stored] = {}
        entries: list[Path] = []
        unknown: list[Path] = []
        for path in self._dir.files():
            (
                entries
                if is_entry_name(self._dir.name_of(path)) and path.is_relative_to(self._dir.entries)
                else unknown
            ).append(path)
        for path in sorted(entries, key=lambda p: p.lstat().st_mtime_ns):
            try:
                key = read_header(path).key
                stored = Stored(
                    self._dir.name_of(path),
                    disk_bytes(path.stat().st_size),
                    array_note(key.origin, key.url, key.array),
                )
            except (CorruptEntryError, OSError):
                unknown.append(path)
                continue
            if key.digest in found:  # an older file of the same name, whose deletion was cut short
                unknown.append(self._dir.root / found.pop(key.digest).filename)
            found[key.digest] = stored
        with table.transact():
            for digest, stored in found.items():
                table.set(digest, stored, tag="array")
        for path in unknown:
            with contextlib.suppress(OSError):  # a directory was planted
                path.unlink()
        return len(found), len(unknown)


@dataclass(frozen=True, slots=True)
class _Opened:
    """An open table: by which process, and which file it was."""

    pid: int
    table: Table
    identity: tuple[int, int] | None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


_alive: WeakSet[IndexFile] = WeakSet()
#: Tables that are used no more. Never finalised, for that closes connections: those of a parent,
#: whose locks and log they share, or those of other threads, at a moment when a child may be
#: forked. There are few: after a fork, a deleted directory, a broken index.
_kept: list[Table] = []


#: SQLite itself waits up to 60 s for another process; a thread that is inside for longer is stuck.
_FORK_WAIT_S = 90.0


class _ForkGate:
    """Threads inside SQLite, and a fork that waits until there are none.

    SQLite has mutexes for the whole process. A child that is forked while another thread holds one
    waits for it for ever, in its first ``connect`` (measured: 1 child in 12 beside three reading
    threads), and with it whoever waits for the child's lock.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # thread: how many times
        self._is_forking = False

    def enter(self) -> None:
        me = threading.get_ident()
        with self._changed:
            # who is inside already must not wait for a fork that waits for him
            while self._is_forking and me not in self._inside:
                self._changed.wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    @property
    def is_outermost(self) -> bool:
        """One ``leave`` takes this thread outside."""
        return self._inside.get(threading.get_ident()) == 1

    def leave(self) -> None:
        me = threading.get_ident()
        with self._changed:
            depth = self._inside.pop(me, 1) - 1  # Ctrl-C may have come before it was counted
            if depth:
                self._inside[me] = depth
            self._changed.notify_all()

    def close(self) -> None:
        deadline_s = time.monotonic() + _FORK_WAIT_S
        with self._changed:
            while self._is_forking:  # another thread forks too
                self._changed.wait()
            self._is_forking = True
            # Who forks is not inside SQLite, whatever a Ctrl-C has left here.
            self._inside.pop(threading.get_ident(), None)
            while self._inside.keys() & {thread.ident for thread in threading.enumerate()}:
                if (
                    not self._changed.wait(max(0.0, deadline_s - time.monotonic()))
                    and time.monotonic() >= deadline_s
                ):
                    logger.warning(
                        "a child is forked while a thread has been inside the index for %.0f s; "
                        "the child may hang",
                        _FORK_WAIT_S,
                    )
                    break

    def open(self) -> None:
        with self._changed:
            self._is_forking = False
            self._changed.notify_all()


_gate = _ForkGate()


@contextlib.contextmanager
def no_fork(table: Table | None = None) -> Iterator[None]:
    """No child is forked while a thread is in here. Around everything that calls SQLite; may be
    nested.

    Threads other than the main one leave no connection of ``table`` behind: it would be closed when
    the thread ends, outside of here. That costs them 0.3 ms a look-up; the main thread, which is
    where DataLoader workers read, keeps its own and takes 8 us.
    """
    gate = _gate
    try:
        gate.enter()
        yield
    finally:
        if (
            table is not None
            and gate.is_outermost
            and threading.current_thread() is not threading.main_thread()
        ):
            table.close()
        gate.leave()


def _before_fork() -> None:
    _gate.close()
    for file in list(_alive):
        with contextlib.suppress(sqlite3.Error):
            file.close_before_fork()


def _in_child() -> None:
    global _gate
    _gate = _ForkGate()  # the other threads are not here


os.register_at_fork(
    before=_before_fork, after_in_parent=lambda: _gate.open(), after_in_child=_in_child
)
