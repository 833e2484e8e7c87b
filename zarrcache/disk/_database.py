"""The index file ``cache.db``: open, check, heal and rebuild it, and keep its log short.

diskcache provides an SQLite table that survives ``kill -9``, forks and eight processes at once;
triggers keep the sum of all sizes. Its handling of files is not used (measured): it pickles
values, leaves partial files on a full disk, evicts entries in batches of ten, and unlinks a file
before it commits. So :class:`EntryDisk` stores only the location of the file.

SQLite overlooks most damage: it noticed one in six of 600 single flipped bits and truncations of an
index of 24 entries. Most others hit free space; one in twenty made it silently forget or misplace a
file. So each row carries a checksum, and :func:`damage_of` checks the whole file.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from weakref import WeakSet

import diskcache

from zarrcache._keys import FORMAT_VERSION
from zarrcache._units import counted
from zarrcache.disk.checksums import crc32c
from zarrcache.disk.directory import CacheDir, file_identity
from zarrcache.disk.entry import array_note, kind_of, read_header
from zarrcache.disk.policy import disk_bytes
from zarrcache.disk.single_flight import SingleFlight
from zarrcache.errors import ConfigError, CorruptEntryError
from zarrcache.stats import LogOnce

__all__ = [
    "CACHE_FAULTS",
    "INTENT",
    "LOG_LIMIT_BYTES",
    "EntryDisk",
    "IndexFile",
    "Stored",
    "Table",
    "damage_of",
    "is_damage",
    "is_valid_row",
    "no_fork",
    "row_mode",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Table: TypeAlias = Any  #: a :class:`diskcache.Cache`, or a :class:`_Reader`
Select: TypeAlias = Callable[..., list[tuple[Any, ...]]]

#: Errors of a broken cache; ConfigError if the directory was replaced or its permissions were
#: removed during a job. Each becomes a miss or a pass-through, never an error of a reader.
CACHE_FAULTS = (OSError, sqlite3.Error, diskcache.Timeout, UnicodeDecodeError, ConfigError)

#: Tag of rows that announce a file; their keys begin with one of the marks.
INTENT = "intent"
_MARKS = ("+", "-")

#: How long to wait for a process that is in a transaction and makes no progress. It is stopped, or
#: its disk hangs; then nothing is stored, but reading goes on.
_BUSY_S = 5.0
#: How long to wait while others make progress.
_QUEUE_S = 60.0
#: How long to look whether a process that made no progress has gone on.
_PROBE_S = 0.05
_PAGE = 10_000  # rows per query


# -- rows and their checksums
# --------------------------------------------------------------------------------------------------

#: Low bits of ``mode`` in every row of this package. diskcache's own modes are 0 to 4, so a planted
#: row with its pickle mode is refused.
_MODE_FILE = 16
_MODE_BITS = 8  # the checksum is stored above them
_ENTRY_NAME = re.compile(r"(?:entries|bytes)(?:/[0-9a-z-]+){1,2}")
_VALUE = re.compile(r"(0|[1-9][0-9]{0,17}) .*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Stored:
    """The row of one file.

    Attributes
    ----------
    filename : str
        Path below the root of the cache.
    size_bytes : int
        Bytes on disk.
    note : str
        Used only by the tier.
    """

    filename: str
    size_bytes: int
    note: str


def is_entry_name(name: object) -> bool:
    """Whether ``name`` (a path below :attr:`CacheDir.root`) can be a file of one of the tiers.

    No other file is deleted, whatever the index says.
    """
    return isinstance(name, str) and _ENTRY_NAME.fullmatch(name) is not None


def row_mode(filename: str, value: str) -> int:
    """Diskcache's column ``mode``: the kind of the row, and a checksum of its content."""
    return crc32c(f"{filename}\n{value}".encode()) << _MODE_BITS | _MODE_FILE


def is_valid_row(mode: object, filename: object, value: object) -> bool:
    """Whether this package wrote the row and it is unchanged.

    No other row is read, and no file is deleted because of one.
    """
    if not isinstance(filename, str) or not isinstance(value, str):
        return False
    return (
        mode == row_mode(filename, value)
        and is_entry_name(filename)
        and _VALUE.fullmatch(value) is not None
    )


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
        if not is_valid_row(mode, filename, value):
            raise sqlite3.DatabaseError(f"the row of {filename!r} does not match its checksum")
        size, _, note = value.partition(" ")
        return Stored(filename, int(size), note)

    def remove(self, file_path: str) -> None:
        """Do nothing: diskcache would unlink before the transaction of the row is committed."""


# -- damage
# --------------------------------------------------------------------------------------------------

#: PERM, BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, FULL, CANTOPEN, PROTOCOL, NOLFS, AUTH:
#: errors of the system, not of the file.
_SURROUNDINGS = frozenset({3, 5, 6, 7, 8, 9, 10, 13, 14, 15, 22, 23})


def is_damage(exc: BaseException) -> bool:
    """Whether an SQLite error means that the file is damaged, not busy or inaccessible."""
    if isinstance(exc, UnicodeDecodeError):  # from the text of an error, which quotes the file
        return True
    if isinstance(exc, (sqlite3.ProgrammingError, sqlite3.NotSupportedError)):
        return False  # of this program: a connection that another thread has closed
    # None: raised by Python, for a text column that is not text
    code = getattr(exc, "sqlite_errorcode", None)
    return isinstance(exc, sqlite3.DatabaseError) and (
        code is None or code & 0xFF not in _SURROUNDINGS
    )


def _is_locked(exc: sqlite3.Error) -> bool:
    """Whether another process holds a lock: BUSY or LOCKED."""
    return (getattr(exc, "sqlite_errorcode", None) or 0) & 0xFF in (5, 6)


def damage_of(select: Select) -> str | None:
    """Check the whole index. Takes about 1 s for 100,000 rows.

    Parameters
    ----------
    select : callable
        Takes a query and its values; returns the rows.

    Returns
    -------
    str or None
        The first damage found; None if the index is intact.

    Raises
    ------
    sqlite3.Error, UnicodeDecodeError
    """
    if (found := select("PRAGMA integrity_check(1)")) != [("ok",)]:
        return str(found[0][0])
    if select("PRAGMA application_id") != [(_schema_id(select),)]:
        return "the definitions of its tables have changed"
    ((count, size, rows, total),) = select(
        "SELECT (SELECT value FROM Settings WHERE key = 'count'), "
        "(SELECT value FROM Settings WHERE key = 'size'), COUNT(*), COALESCE(SUM(size), 0) "
        "FROM Cache"
    )
    if (count, size) != (rows, total):
        return f"it has {rows} rows of {total} bytes, but counted {count} of {size}"
    last = 0
    while page := select(
        "SELECT rowid, key, raw, tag, size, store_time, expire_time, mode, filename, value "
        f"FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT {_PAGE}",
        (last,),
    ):
        for last, key, raw, tag, size, stored_s, expires_s, mode, filename, value in page:
            if not is_valid_row(mode, filename, value) or value.partition(" ")[0] != str(size):
                return f"row {last} does not match its checksum"
            is_intent = str(key).startswith(_MARKS)
            if (
                not (is_intent or f"/{key}" in filename)
                or (tag == INTENT) != is_intent
                or (raw, expires_s) != (1, None)
                or not isinstance(stored_s, float)
            ):
                return f"row {last} contradicts itself"
    return None


def _schema_id(select: Select) -> int:
    """A checksum of the definitions of all tables and triggers, 0 to 2**31.

    It detects a changed letter that leaves the SQL valid but changes its meaning.
    """
    return crc32c(repr(select("SELECT name, sql FROM sqlite_master ORDER BY name")).encode()) >> 1


# -- the file
# --------------------------------------------------------------------------------------------------

#: Errors of this process or machine, not of the file that it opened.
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

#: Size of the write-ahead log from which every writer tries to reset it.
_LOG_BYTES = 2 * 2**20
#: Size from which a writer waits until a reset has succeeded.
LOG_LIMIT_BYTES = 3 * 2**20
#: Longest wait, and shortest interval between two: a process that was stopped while it reads must
#: not delay the writers again and again.
_LOG_WAIT_S, _LOG_WAIT_EVERY_S = 5.0, 60.0


class IndexFile:
    """One ``cache.db`` and the connections of this process to it, opened at first use.

    Safe from any thread; a forked child opens its own connections.

    Parameters
    ----------
    directory : CacheDir
    has_log : bool
        Use SQLite's write-ahead log. It shares memory through a mapped file, which other nodes do
        not see, and a write to it on a full copy-on-write disk kills the process
        (:func:`~zarrcache.disk.filesystems.can_map_to_write`).
    is_checked : bool
        Check the whole file at each open.
    after_open : callable, optional
        Called after each open, before the first use.
    log_once : LogOnce, optional

    Attributes
    ----------
    unit_bytes : int
        In which the file system allocates; 0 before the first open.
    """

    def __init__(
        self,
        directory: CacheDir,
        *,
        has_log: bool = True,
        is_checked: bool = False,
        after_open: Callable[[], object] = lambda: None,
        log_once: LogOnce | None = None,
    ) -> None:
        self._dir = directory
        # Not mode=ro: after a killed process, the next one has to undo or finish its transaction
        # (tests/processes/test_crash.py).
        self._uri = f"{directory.index.absolute().as_uri()}?mode=rw"
        self._has_log = has_log
        self._is_checked = is_checked
        self._after_open = after_open
        self._opened: _Opened | None = None
        self._is_suspect = False
        self._is_blocked = self._is_unreadable = False
        self._log_once = LogOnce() if log_once is None else log_once
        self.unit_bytes = 0
        self._log_path = f"{directory.index}-wal"
        self._log_waited_s = -_LOG_WAIT_EVERY_S
        closed_before_fork.add(self)

    # -- use

    def lookup(self, key: str, table: Table | None = None) -> Stored | None:
        """The row of an entry or a loan (whose key has a mark before the digest). One SELECT.

        Raises
        ------
        sqlite3.DatabaseError
            The row is damaged, or of another entry.
        """
        # Inside a transaction ``table`` is its own: another thread may have reopened the index.
        table = table if table is not None else self.open()
        if self._is_unreadable:
            self._execute("SELECT COUNT(*) FROM Settings", wait_s=_PROBE_S)
            self._is_unreadable = False
        try:
            with no_fork(table):
                found: Stored | None = table.get(key)
        except sqlite3.OperationalError as exc:
            # Without a write-ahead log, a process that is stopped in a COMMIT locks readers out.
            # Only the first look-up waits for it.
            self._is_unreadable = _is_locked(exc)
            raise
        if found is not None and key.rpartition("-")[2] not in found.filename:
            raise sqlite3.DatabaseError(f"the row of {key} names {found.filename}")
        return found

    def volume_bytes(self, table: Table | None = None) -> int:
        """The sum of all sizes, bytes. ``table``: see :meth:`lookup`.

        Raises
        ------
        sqlite3.DatabaseError
            The stored sum is not a number.
        """
        table = table if table is not None else self.open()
        with no_fork(table):
            volume = table.reset("size")
        try:
            return int(volume)
        except (TypeError, ValueError) as exc:
            raise sqlite3.DatabaseError(f"the sum of all sizes is not a number ({exc})") from exc

    def select(
        self, query: str, values: tuple[Any, ...] = (), table: Table | None = None
    ) -> list[tuple[Any, ...]]:
        """Committed rows of a query that diskcache has no method for.

        With ``table``, that of a transaction, the index is not opened: that would wait for the
        transaction.
        """
        if table is None:
            self.open()
        return self._execute(query, values)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Table]:
        """The open table, in a transaction.

        Raises
        ------
        OSError
            The cache can only be read.
        diskcache.Timeout
            Another process is in a transaction, and is stopped or hangs.
        """
        # Writes to an unlinked file are lost: the directory may have been deleted, or another
        # process may have replaced a broken index.
        if self._opened is not None and self._opened.identity != file_identity(self._dir.index):
            self.forget()
        elif self._is_blocked:
            # Once the other process has gone on, a table that was opened for reading is opened
            # again.
            self._wait_for_writers()
            if isinstance(self.table, _Reader):
                self.forget()
        table = self.open()
        if isinstance(table, _Reader):
            if self._is_blocked:
                self._wait_for_writers()
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(self._dir.root))
        with no_fork(table):
            try:
                with self._begin(table):
                    yield table
            except (sqlite3.Error, UnicodeDecodeError):
                # A COMMIT that fails (disk full) leaves its transaction open. The next call
                # connects again.
                table.close()
                raise
        self._shorten_log()

    def _begin(self, table: Table) -> contextlib.ExitStack:
        deadline_s = time.monotonic() + _QUEUE_S
        with contextlib.ExitStack() as stack:
            while True:
                before = self._stamp()
                try:
                    stack.enter_context(table.transact())
                except diskcache.Timeout as exc:
                    # diskcache raises it for every error. A connection that could open the log
                    # only for reading, for example, does not get better by waiting.
                    cause = exc.__context__
                    if isinstance(cause, sqlite3.OperationalError) and not _is_locked(cause):
                        raise cause from None
                    self._wait_for_writers(before)
                    if time.monotonic() > deadline_s:
                        raise
                else:
                    return stack.pop_all()

    def _wait_for_writers(self, before: tuple[object, ...] = ()) -> None:
        """Wait until no process is in a transaction.

        SQLite gives the lock to any of those who wait, so a writer among many may wait long; but
        then the files change. A process that was stopped in a transaction holds the lock without
        a change. It must not cost every write of the others another wait.

        ``before`` is :meth:`_stamp` at the beginning of a wait that did not get the lock.
        """
        deadline_s = time.monotonic() + _QUEUE_S
        while True:
            wait_s = _PROBE_S if self._is_blocked or before else _BUSY_S
            before = before or self._stamp()
            try:
                _ask(self._uri, "BEGIN IMMEDIATE", (), wait_s)
            except sqlite3.OperationalError as exc:
                if not _is_locked(exc):
                    raise
                if self._stamp() != before and time.monotonic() < deadline_s:
                    before = ()
                    continue
            else:
                self._is_blocked = False
                return
            self._is_blocked = True
            raise diskcache.Timeout(
                f"{self._dir.index} is locked by another process that makes no progress; entries "
                "are read, and nothing is stored until it goes on. Look for a stopped process "
                "(state T in `ps`) of the same cache."
            )

    def _stamp(self) -> tuple[object, ...]:
        """Changes with each commit."""
        stamp: list[object] = []
        for path in (self._log_path, os.fspath(self._dir.index)):
            with contextlib.suppress(OSError):
                found = os.stat(path)
                stamp += [found.st_mtime_ns, found.st_size]
        return tuple(stamp)

    def healing(self, ask: Callable[[], T]) -> T:
        """Call ``ask``; if it finds the index damaged, rebuild the index and call again.

        Not inside a transaction.
        """
        try:
            return ask()
        except CACHE_FAULTS as exc:
            if not is_damage(exc):
                raise
            self.forget(exc)
            return ask()

    # -- open and heal

    @property
    def is_read_only(self) -> bool:
        """Whether the open file cannot be written at all; False while it is not open."""
        return isinstance(self.table, _Reader) and not self._is_blocked

    @property
    def table(self) -> Table | None:
        """The open table of this process; None before :meth:`open`, and in a child forked later."""
        opened = self._opened
        return opened.table if opened is not None and opened.pid == os.getpid() else None

    def open(self) -> Table:
        """The open table. Creates the file, or sets a broken one aside, if it is not open yet.

        Raises
        ------
        ConfigError
            The directory must not be used.
        OSError, sqlite3.Error, diskcache.Timeout
            It cannot be created or opened.
        """
        table = self.table
        if table is None:
            table = self._open()
            try:
                self._after_open()
            except CACHE_FAULTS as exc:
                if not is_damage(exc):
                    raise
                self.forget(exc)
                table = self._open()
        return table

    def forget(self, after: BaseException | None = None) -> None:
        """Open the file again at its next use, if that can heal the error ``after`` (None: always).

        After a damaged database the next open checks the whole file; after a deleted directory it
        creates a new one.
        """
        if after is not None and is_damage(after):
            self._is_suspect = True
        elif after is not None and not isinstance(after, FileNotFoundError):
            return  # busy, read-only, full: another open would fail in the same way
        if self._opened is not None:
            _kept.append(self._opened.table)
        self._opened = None

    def close_before_fork(self) -> None:
        """Close this thread's connection, because only the parent holds its file locks."""
        if (table := self.table) is not None:
            table.close()

    def _open(self) -> Table:
        self.forget()
        if self._dir.is_read_only:
            return self._open_to_read("it cannot be written by this process")
        self._dir.ensure()
        self.unit_bytes = os.stat(self._dir.tag).st_blocks * 512  # a file of less than a block
        try:
            if self._dir.index.exists() and not self._is_emptied():
                self._wait_for_writers()  # diskcache would wait for 60 s, for each setting
        except diskcache.Timeout as exc:
            return self._open_to_read(str(exc))
        except (sqlite3.Error, UnicodeDecodeError) as exc:
            if not is_damage(exc):  # which is mended below
                raise
        # One process at a time: each open writes diskcache's settings, and only one process may set
        # aside and rebuild a broken index. Two threads that get here together open one after the
        # other, and one of the two tables is kept.
        with SingleFlight(
            self._dir.locks,
            timeout_s=60.0,
            mode=self._dir.written_mode,
            name="open",
            log_once=self._log_once,
        ).hold("0" * 8):
            with no_fork():
                table, broken = self._connect_or_replace()
            with no_fork(table):
                # A new file does not list the entries on disk: the old one was deleted or broken,
                # or its rebuild was killed.
                if self._execute("PRAGMA user_version") != [(FORMAT_VERSION,)]:
                    self._rebuild(table, broken)
                    self._execute(f"PRAGMA application_id = {_schema_id(self._execute)}")
                    self._execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        self.forget()  # another thread may have opened it meanwhile
        self._opened = _Opened(os.getpid(), table, file_identity(self._dir.index))
        return table

    def _open_to_read(self, why: str) -> Table:
        """Open an index that cannot be written, or not now."""
        self._dir.check()
        table = _Reader(self._dir.index)
        if table.execute("PRAGMA user_version") != [(FORMAT_VERSION,)]:
            raise sqlite3.DatabaseError(f"{self._dir.index} was not finished")
        if self._is_checked and (damage := damage_of(table.execute)) is not None:
            raise sqlite3.DatabaseError(f"{self._dir.index} is broken: {damage}")
        self._log_once.warning(
            "read-only",
            logger,
            "cache.dir %s is only read: its entries are used, and nothing will be stored (%s)",
            self._dir.parent,
            why,
        )
        self.forget()
        self._opened = _Opened(os.getpid(), table, file_identity(self._dir.index))
        return table

    def _connect_or_replace(self) -> tuple[Table, str]:
        """The open table, and the damage of a file that was set aside, or ''."""
        index, broken = self._dir.index, ""
        if self._is_emptied():
            # Make a new file. At each open of this one SQLite would wait a minute for the locks
            # of the processes that have it open.
            self._remove_with_log()
        try:
            table = self._connect()
            if (
                (self._is_checked or self._is_suspect)
                and not self._is_new()
                and (damage := damage_of(self._execute)) is not None
            ):
                table.close()
                raise sqlite3.DatabaseError(damage)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as exc:
            if not is_damage(exc):
                raise
            aside = index.with_name(f"{index.name}.broken-{time.time_ns()}")
            broken = f"is broken ({exc}); it is set aside as {aside.name}"
            for path in index.parent.glob(f"{index.name}.broken-*"):
                with contextlib.suppress(OSError):  # one is kept, for a report
                    path.unlink()
            os.replace(index, aside)
            self._remove_with_log()
            table = self._connect()
        self._is_suspect = False
        return table, broken

    def _is_emptied(self) -> bool:
        """Whether the file is empty: it was truncated, or its first writer was killed."""
        try:
            return not self._dir.index.stat().st_size
        except FileNotFoundError:
            return False

    def _remove_with_log(self) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._dir.index}{suffix}")

    def _is_new(self) -> bool:
        """Whether the file was created just now, so that :meth:`_rebuild` fills it."""
        return self._execute(
            "SELECT user_version, (SELECT COUNT(*) FROM Cache) FROM pragma_user_version"
        ) == [(0, 0)]

    def _connect(self) -> Table:
        # SQLite gives its log and journal the permissions of an existing file.
        self._dir.touch(self._dir.index)
        checked = file_identity(self._dir.index)
        self._check_settings()
        deadline_s = time.monotonic() + _QUEUE_S
        while True:
            try:
                table = diskcache.Cache(
                    os.fspath(self._dir.root),
                    timeout=_BUSY_S,
                    disk=EntryDisk,
                    eviction_policy="none",
                    cull_limit=0,
                    statistics=0,
                    size_limit=2**62,
                    sqlite_mmap_size=0,  # truncating a mapped file kills the processes that read it
                    # Set at each open: diskcache keeps it in the file, which may have been copied
                    # from another kind of disk. Not "truncate": every reader would have to read the
                    # journal.
                    sqlite_journal_mode="wal" if self._has_log else "delete",
                )
                # SQLite cannot be asked not to follow a link that replaces the file after the check
                # of `ensure`; nothing is stored through one.
                self._dir.check_index()
                if file_identity(self._dir.index) != checked:
                    table.close()
                    raise FileNotFoundError(errno.ENOENT, "it was replaced", str(self._dir.index))
                return table
            except sqlite3.OperationalError as exc:
                # diskcache's drop_tag_index does not wait for other processes, which matters
                # without a write-ahead log.
                if "locked" not in str(exc) or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)

    def _check_settings(self) -> None:
        """Refuse planted settings: diskcache turns them into pragmas, arguments and attributes."""
        try:
            found = dict(self._execute("SELECT key, value FROM Settings"))
        except sqlite3.OperationalError as exc:
            if "no such table" in str(exc):  # a new file
                return
            raise
        texts = {"eviction_policy": {"none"}, "sqlite_journal_mode": {"wal", "delete"}}
        known = diskcache.DEFAULT_SETTINGS.keys() | {"count", "size", "hits", "misses"}
        for key, value in found.items():
            if key not in known or (
                value not in texts[key] if key in texts else type(value) is not int
            ):
                raise sqlite3.DatabaseError(
                    f"it has a setting that zarrcache does not write: {key!r}"
                )

    def _execute(
        self, query: str, values: tuple[Any, ...] = (), *, wait_s: float = _BUSY_S
    ) -> list[tuple[Any, ...]]:
        """Rows of a query, over a new connection."""
        if isinstance(self.table, _Reader):
            return self.table.execute(query, values)
        return _ask(self._uri, query, values, wait_s)

    # -- rebuild

    def _rebuild(self, table: Table, broken: str) -> None:
        """Fill an empty index from the headers of the entries.

        Objects of the byte tier are removed, because their files do not identify them. A file that
        cannot be read is kept: its disk may recover, and `zarrcache verify` removes files without
        a row. If this process or machine has no descriptors or memory left, that is raised, and the
        next open rebuilds again.
        """
        found: dict[str, tuple[Stored, str]] = {}
        entries: list[tuple[int, Path]] = []
        doomed: list[Path] = []
        n_unreadable = 0
        for path in self._dir.files():
            if is_entry_name(self._dir.name_of(path)) and path.is_relative_to(self._dir.entries):
                with contextlib.suppress(FileNotFoundError):
                    entries.append((path.lstat().st_mtime_ns, path))
            else:
                doomed.append(path)
        for _, path in sorted(entries):
            try:
                header = read_header(path)
                if not path.name.startswith(f"{header.key.digest}-"):
                    raise CorruptEntryError("it is the entry of another name")
                occupied_bytes = max(disk_bytes(header.file_bytes), path.lstat().st_blocks * 512)
            except CorruptEntryError:
                doomed.append(path)
                continue
            except OSError as exc:
                if exc.errno in _OUT_OF_RESOURCES:
                    raise
                if _is_regular(path):
                    n_unreadable += 1
                else:  # a planted link or socket
                    doomed.append(path)
                continue
            key = header.key
            stored = Stored(self._dir.name_of(path), occupied_bytes, array_note(key))
            if key.digest in found:  # an older file of this name, whose deletion was cut short
                doomed.append(self._dir.root / found.pop(key.digest)[0].filename)
            found[key.digest] = stored, kind_of(key)
        with table.transact():
            for digest, (stored, kind) in found.items():
                table.set(digest, stored, tag=kind)
        for path in doomed:
            with contextlib.suppress(OSError):  # a directory was planted
                self._dir.unlink(path)
        if broken or found or doomed or n_unreadable:
            logger.warning(
                "the index %s %s and rebuilt from the entries: %s kept, %s removed%s",
                self._dir.index,
                broken or "was lost",
                counted(len(found), "entry", "entries"),
                counted(len(doomed), "file"),
                f", {n_unreadable} that cannot be read left alone" if n_unreadable else "",
            )

    # -- the write-ahead log

    def _shorten_log(self) -> None:
        """Reset the write-ahead log if it is long. Call after a transaction, outside of it.

        SQLite resets its log only while no process reads or writes. With eight busy processes that
        never happened (20 MiB after 20 s), so every writer tries above one size. Success is a
        matter of chance, so above a second size writers wait until one has succeeded. This bounds
        the log to 3 MiB plus the transactions in progress (tests/processes/test_limit.py). Errors
        are left to the next writer.
        """
        start_s = time.monotonic()
        with contextlib.suppress(OSError, sqlite3.Error):  # no log, on a network file system
            while (size := os.stat(self._log_path).st_size) > _LOG_BYTES:
                self._execute("PRAGMA wal_checkpoint(TRUNCATE)", wait_s=0.1)
                if size <= LOG_LIMIT_BYTES or start_s < self._log_waited_s + _LOG_WAIT_EVERY_S:
                    return
                if time.monotonic() > start_s + _LOG_WAIT_S:
                    self._log_waited_s = time.monotonic()
                time.sleep(0.01)  # SQLite returns at once while another process resets it


@dataclass(frozen=True, slots=True)
class _Opened:
    """An open table, with the process that opened it and the identity of its file."""

    pid: int
    table: Table
    identity: tuple[int, int] | None


class _Reader:
    """The part of :class:`diskcache.Cache` that looks up, without a write to the directory.

    Each look-up opens a connection (0.1 ms): none is open at a fork.
    """

    def __init__(self, index: Path) -> None:
        self._disk = EntryDisk(os.fspath(index.parent))
        uri = f"{index.absolute().as_uri()}?mode=ro"
        # SQLite reads a write-ahead log only together with its shared memory, which it cannot
        # create here. Without the two files, or with a log that was left without shared memory,
        # what has reached the file itself is read (sqlite.org/wal.html, "Read-Only Databases").
        # Nothing else is needed: rows and entries have checksums.
        self._uri = uri
        try:
            self.execute("SELECT COUNT(*) FROM Settings")
        except sqlite3.OperationalError:
            self._uri = f"{uri}&immutable=1"
            self.execute("SELECT COUNT(*) FROM Settings")

    def execute(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query."""
        return _ask(self._uri, query, values, _BUSY_S)

    def get(self, key: str) -> Stored | None:
        """The row of a key."""
        query = "SELECT mode, filename, value FROM Cache WHERE key = ?"
        for mode, filename, value in self.execute(query, (key,)):
            return self._disk.fetch(mode, filename, value, read=False)
        return None

    def reset(self, name: str) -> object:
        """The value of a setting."""
        ((value,),) = self.execute("SELECT value FROM Settings WHERE key = ?", (name,))
        return value

    def close(self) -> None:
        """Do nothing: no connection is open."""


def _ask(uri: str, query: str, values: tuple[Any, ...], wait_s: float) -> list[tuple[Any, ...]]:
    """Rows of a query, over a new connection."""
    with no_fork():
        connection = sqlite3.connect(uri, uri=True, timeout=wait_s)
        try:
            return connection.execute(query, values).fetchall()
        finally:
            connection.close()


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return True  # its type cannot be determined


#: Tables that are not used any more. They are kept because finalising one closes connections that
#: share the locks and log of a parent, or that other threads use while a child may be forked.
#: There are few: after a fork, a deleted directory, a broken index.
_kept: list[Table] = []


# -- forks
# --------------------------------------------------------------------------------------------------


#: Their connection in the forking thread is closed, because only the parent holds its file locks.
closed_before_fork: WeakSet[IndexFile] = WeakSet()

#: SQLite itself waits up to 60 s for another process; a thread that is inside for longer hangs.
_FORK_WAIT_S = 90.0


class no_fork:
    """Block forks while a thread is in this block. Used around every call of SQLite; reentrant.

    SQLite has process-wide mutexes. A child that is forked while another thread holds one waits for
    it forever in its first ``connect`` (measured: 1 child in 12 with three reading threads), and so
    does every process that waits for a lock of that child. So each thread holds a lock of its own
    while it is inside, and a fork takes them all. One lock for all threads would be less code, but
    a look-up would wait for the transactions of other threads
    (docs/explanation/decisions/001-fork-and-sqlite.md).

    Threads other than the main one close their connection of ``table``, because Python would close
    it when the thread ends, outside of any such block. That costs them 0.2 ms per look-up; the main
    thread, where DataLoader workers read, keeps its connection and takes 8 us.
    """

    __slots__ = ("_table",)

    def __init__(self, table: Table | None = None) -> None:
        self._table = table

    def __enter__(self) -> None:
        thread = _thread
        if not thread.depth:
            with _fork_lock:  # not taken when nested: a fork may be waiting for this thread
                thread.lock.acquire()
        thread.depth += 1

    def __exit__(self, *exc_info: object) -> None:
        thread = _thread
        thread.depth -= 1
        if not thread.depth:
            try:
                if self._table is not None and not thread.is_main:
                    self._table.close()
            finally:
                thread.lock.release()


class _Thread(threading.local):
    """The lock of a thread.

    Reentrant: after a Ctrl-C between taking and counting it, the main thread must not wait for
    itself.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.lock = threading.RLock()
        self.is_main = threading.current_thread() is threading.main_thread()
        with _fork_lock:
            _locks.add(self.lock)


#: Held during a fork, so that no thread enters and no other thread forks meanwhile. Reentrant like
#: the others: a signal handler may read or fork while the main thread holds it.
_fork_lock = threading.RLock()
#: Locks of running threads; a lock is dropped with its thread, even if it is still held.
_locks: WeakSet[Any] = WeakSet()
_thread = _Thread()
_taken: list[Any] = []


def _before_fork() -> None:
    mine = _thread.lock  # created first, because that takes _fork_lock
    _fork_lock.acquire()
    deadline_s = time.monotonic() + _FORK_WAIT_S
    for lock in list(_locks):
        if lock is mine:
            continue
        if lock.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            _taken.append(lock)
        else:
            logger.warning(
                "a child is forked while a thread has been inside the index for %.0f s; the child "
                "may hang",
                _FORK_WAIT_S,
            )
    for user in list(closed_before_fork):
        with contextlib.suppress(sqlite3.Error):
            user.close_before_fork()


def _after_fork_in_parent() -> None:
    while _taken:
        _taken.pop().release()
    with contextlib.suppress(RuntimeError):  # Ctrl-C came while this thread waited for it
        _fork_lock.release()


def _after_fork_in_child() -> None:
    global _fork_lock, _locks, _thread
    _fork_lock, _locks = threading.RLock(), WeakSet()  # the other threads do not exist here
    _thread = _Thread()
    _taken.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
