"""The index file: damage and rebuild."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sqlite3
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

import zarrcache.disk._database as database
import zarrcache.disk.entry as entry_module
import zarrcache.disk.mmap as mmap_module
from tests.support.cachedirs import array_of, key_of, payload_files, settings
from zarrcache._keys import ArrayKey
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk._database import (
    EntryDisk,
    Stored,
    is_damage,
    is_valid_row,
    row_mode,
)
from zarrcache.disk.entry import EntryHeader, read_header
from zarrcache.disk.index import Index, Intent
from zarrcache.errors import ConfigError
from zarrcache.ops.verify import verify
from zarrcache.stats import Counters

#: Only a hang takes this long.
HANG_S = 60


def fill(tmp_path: Path, entries: int) -> ArrayCache:
    cache = ArrayCache(settings(tmp_path), Counters())
    for number in range(entries):
        assert cache.put(key_of(number), array_of(number), source="s")
    return cache


def lose_index(tmp_path: Path) -> None:
    for path in (tmp_path / "cache" / "zarrcache-v1").glob("cache.db*"):
        path.unlink()


# -- rows


def test_disk_of_diskcache_touches_no_file(tmp_path: Path) -> None:
    disk = EntryDisk(str(tmp_path))
    stored = Stored("entries/aa/aa", 4096, "a note")
    size, mode, filename, value = disk.store(stored, read=False)
    assert disk.fetch(mode, filename, value, read=False) == stored
    (tmp_path / "aa").write_bytes(b"x")
    disk.remove("aa")
    assert os.listdir(tmp_path) == ["aa"]
    assert size == 4096


def test_the_checksum_of_a_row_is_part_of_the_format() -> None:
    """Indexes of other versions stay readable: a CRC-32C above 8 bits for the kind of row."""
    filename, value = "entries/ab/abcd-01", "8192 file\n/data/mp-1.zarr\na"
    mode = google_crc32c.value(f"{filename}\n{value}".encode()) << 8 | 16
    assert row_mode(filename, value) == mode
    assert is_valid_row(mode, filename, value)


@pytest.mark.parametrize(
    ("filename", "value"),
    [
        ("entries/ab/abcd-01", "8192"),
        ("entries/ab/abcd-01", "08192 note"),
        ("entries/ab/abcd-01", "-1 note"),
        ("entries/ab/abcd-01", "1e3 note"),
        ("entries/ab/abcd-01", f"{10**18} note"),
        ("entries/../cache.db", "8192 note"),
        ("/etc/passwd", "8192 note"),
        ("locks/ab", "8192 note"),
        ("entries/ab/abcd-01/x", "8192 note"),
        ("entries", "8192 note"),
        ("entries/ab/abcd-01\n", "8192 note"),
        (None, "8192 note"),
        ("entries/ab/abcd-01", None),
        ("entries/ab/abcd-01", 8192),
    ],
)
def test_a_row_that_this_package_does_not_write_is_invalid_with_any_checksum(
    filename: Any, value: Any
) -> None:
    assert not is_valid_row(row_mode(filename, value), filename, value)
    assert not is_valid_row(0, filename, value)


# -- damage


@pytest.mark.parametrize(
    ("code", "is_locked"),
    [(5, True), (6, True), (5 | 1 << 8, True), (5 | 2 << 8, True), (4, False), (7, False)],
)
def test_only_a_lock_of_another_process_is_waited_for(code: int, is_locked: bool) -> None:
    exc = sqlite3.OperationalError("database is locked")
    exc.sqlite_errorcode = code
    assert database._is_locked(exc) is is_locked
    assert not database._is_locked(sqlite3.OperationalError("without a code"))


def test_a_file_whose_type_cannot_be_determined_counts_as_regular(tmp_path: Path) -> None:
    """So a rebuild keeps it. A planted link is removed."""
    (tmp_path / "link").symlink_to(tmp_path)
    assert not database._is_regular(tmp_path / "link")
    assert database._is_regular(tmp_path / ("x" * 300))  # ENAMETOOLONG


#: Result codes of SQLite (sqlite.org/rescode.html) that say nothing about the file.
SURROUNDINGS = {
    "PERM": 3,
    "BUSY": 5,
    "LOCKED": 6,
    "NOMEM": 7,
    "READONLY": 8,
    "INTERRUPT": 9,
    "IOERR": 10,
    "FULL": 13,
    "CANTOPEN": 14,
    "PROTOCOL": 15,
    "NOLFS": 22,
    "AUTH": 23,
}


@pytest.mark.parametrize("code", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("extended", [0, 1 << 8, 9 << 8])
def test_a_busy_full_or_unreachable_index_is_not_damaged(code: int, extended: int) -> None:
    """A healthy index must not be set aside."""
    exc = sqlite3.OperationalError("database is locked")
    exc.sqlite_errorcode = code | extended
    assert not is_damage(exc)


@pytest.mark.parametrize("code", [1, 11, 20, 26])  # ERROR, CORRUPT, MISMATCH, NOTADB
def test_errors_of_the_content_are_damage(code: int) -> None:
    exc = sqlite3.DatabaseError("malformed")
    exc.sqlite_errorcode = code
    assert is_damage(exc)


def test_errors_of_text_columns_are_damage_and_other_exceptions_are_not() -> None:
    assert is_damage(sqlite3.OperationalError("Could not decode to UTF-8 column"))
    assert is_damage(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"))
    assert not is_damage(OSError(errno.EIO, "input/output error"))


@pytest.mark.parametrize(
    "change",
    [
        "key = '+' || key",
        "key = 'ffffffffffffffffffffffffffffffff'",
        "tag = 'intent'",
        "raw = 0",
        "expire_time = 1e12",
        "store_time = 'yesterday'",
        "size = size + 4096",
        "mode = mode + 256",
        "filename = 'entries/aa/aa'",
        "value = value || ' '",
    ],
)
def test_each_contradiction_in_a_row_is_found_and_healed(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With ``verify: always``; no entry is lost."""
    fill(tmp_path, 3)
    database_file = tmp_path / "cache" / "zarrcache-v1" / "cache.db"
    with sqlite3.connect(database_file) as connection:
        connection.execute(f"UPDATE Cache SET {change} WHERE rowid = 2")
    connection.close()
    cache = ArrayCache(settings(tmp_path, verify="always"), Counters())
    cache.index.open()
    assert "is broken" in caplog.text
    assert "3 entries kept, 0 files removed" in caplog.text
    assert [cache.get(key_of(number)) is not None for number in range(3)] == [True] * 3


@pytest.mark.parametrize("name", ["count", "size"])
def test_a_wrong_sum_is_found_and_healed(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    volume_bytes = fill(tmp_path, 3).index.volume_bytes()
    with sqlite3.connect(tmp_path / "cache" / "zarrcache-v1" / "cache.db") as connection:
        connection.execute("UPDATE Settings SET value = value + 1 WHERE key = ?", (name,))
    connection.close()
    index = Index(settings(tmp_path, verify="always"))
    assert index.volume_bytes() == volume_bytes
    assert "but counted" in caplog.text


# -- rebuild


def _rebuild_with_few_descriptors(tmp_path: Path) -> None:
    n_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 16,) * 2)
    lose_index(tmp_path)
    Index(settings(tmp_path)).open()


def test_a_rebuild_needs_few_descriptors(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    child = get_context("fork").Process(target=_rebuild_with_few_descriptors, args=(tmp_path,))
    child.start()
    child.join(HANG_S)
    assert child.exitcode == 0
    assert Index(settings(tmp_path)).totals()["array"][0] == 40


def _rebuild_out_of_descriptors(tmp_path: Path) -> None:
    limit = 64 + max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    lose_index(tmp_path)

    def read_while_others_hold_them_all(path: Path) -> EntryHeader:
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        try:
            return read_header(path)
        finally:
            for fd in taken:
                os.close(fd)

    database.read_header = read_while_others_hold_them_all  # type: ignore[assignment]
    try:
        Index(settings(tmp_path)).open()
    except ConfigError as exc:
        os._exit(0 if getattr(exc.__cause__, "errno", None) == errno.EMFILE else 1)
    os._exit(2)


def test_a_rebuild_that_runs_out_of_descriptors_deletes_no_good_entry(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    files = payload_files(tmp_path)
    child = get_context("fork").Process(target=_rebuild_out_of_descriptors, args=(tmp_path,))
    child.start()
    child.join(HANG_S)
    assert child.exitcode == 0
    assert payload_files(tmp_path) == files
    assert Index(settings(tmp_path)).totals()["array"][0] == 5


#: Errors of the machine, the disk, the network or the permissions; they say nothing about an entry.
FAULTS = [
    errno.EACCES,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENODEV,
    errno.ENOMEM,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
]


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["open", "fstat", "pread"])
def test_no_entry_is_unlinked_for_a_fault_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    """Neither by a rebuild, nor by ``verify``, nor by a read. Afterwards all are there."""
    cache = fill(tmp_path, 3)
    files = payload_files(tmp_path)
    real = getattr(os, call)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if call != "open" or "entries" in os.fspath(args[0]):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    def with_the_fault(act: Callable[[], object]) -> None:
        with monkeypatch.context() as patch, contextlib.suppress(OSError, ConfigError):
            patch.setattr(mmap_module, "os", _Os(call, fails))
            patch.setattr(entry_module, "os", _Os(call, fails))
            act()

    with_the_fault(lambda: cache.get(key_of(1)))
    with_the_fault(lambda: verify(settings(tmp_path)))
    assert cache.index.totals()["array"][0] == 3
    lose_index(tmp_path)
    with_the_fault(lambda: Index(settings(tmp_path)).open())
    assert payload_files(tmp_path) == files
    lose_index(tmp_path)
    assert Index(settings(tmp_path)).totals()["array"][0] == 3
    assert verify(settings(tmp_path)).is_good


class _Os:
    """The module ``os``, one function of which fails."""

    def __init__(self, call: str, function: Callable[..., Any]) -> None:
        self.__dict__[call] = function

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def test_verify_names_what_cannot_be_read_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 2)

    def fails(*args: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(entry_module, "os", _Os("pread", fails))
        report = verify(settings(tmp_path))
    assert not report.is_good
    assert not report.corrupt
    assert [problem.why for problem in report.unreadable] == [os.strerror(errno.EIO)] * 2
    assert verify(settings(tmp_path)).is_good


def test_a_new_directory_is_not_called_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With ``verify: always``, which checks the whole index at each open."""
    cache = ArrayCache(settings(tmp_path, verify="always"), Counters())
    assert cache.put(key_of(1), array_of(1), source="s")
    cache.index.reopen()
    assert cache.get(key_of(1)) is not None
    assert caplog.text == ""
    assert not list(cache.index.dir.root.glob("*broken*"))


def test_of_broken_indexes_one_is_kept(tmp_path: Path) -> None:
    cache = fill(tmp_path, 2)
    names = set()
    for _ in range(3):
        cache.index._file.close_before_fork()
        for suffix in ("-wal", "-shm"):
            Path(f"{cache.index.dir.index}{suffix}").unlink(missing_ok=True)
        cache.index.dir.index.write_bytes(b"no database" * 1000)
        assert Index(settings(tmp_path)).totals()["array"][0] == 2
        (broken,) = cache.index.dir.root.glob("cache.db.broken-*")
        names.add(broken.name)
    assert len(names) == 3


def test_a_thread_that_reopens_the_index_does_not_hold_up_a_transaction(tmp_path: Path) -> None:
    """Opening writes, so it would wait for a transaction that waits for it."""
    index = fill(tmp_path, 2).index
    start_s = time.monotonic()
    with index._file.transaction() as table:
        index.reopen()  # as another thread does after a fault
        assert index._file.volume_bytes(table) == 2 * 8192
        assert index._file.select("SELECT COUNT(*) FROM Cache", (), table) == [(2,)]
        assert index._file.lookup(key_of(1).digest, table) is not None
        assert index._file.table is None
    assert time.monotonic() - start_s < HANG_S / 2


def test_connection_that_cannot_write_is_replaced_without_a_wait(tmp_path: Path) -> None:
    """As one whose log SQLite could open only for reading, for want of descriptors or after EIO:
    no other process holds a lock.
    """
    index = fill(tmp_path, 1).index
    index._file.open().reset("sqlite_query_only", 1, update=False)
    start_s = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        index.drop([key_of(0).digest])
    assert index.drop([key_of(0).digest]) > 0
    assert time.monotonic() - start_s < HANG_S / 2


@pytest.mark.parametrize("method", ["begin", "lend", "commit"])
def test_every_transaction_of_the_index_uses_its_own_table(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread reopens the index just after the transaction began."""
    index = fill(tmp_path, 2).index
    intent = index.begin("entries/ab/abcd-01", 4096)
    assert isinstance(intent, Intent)
    real = index._owners.announce
    opened = []

    def reopen_and_announce() -> str:
        index.reopen()
        monkeypatch.setattr(index._file, "open", lambda: opened.append(method))
        return real()

    monkeypatch.setattr(index._owners, "announce", reopen_and_announce)
    if method == "begin":
        index._reserve("entries/cd/cdef-01", 4096)
    elif method == "lend":
        assert index.lend("abcd", "entries/ab/abcd-02")
    else:
        with index._file.transaction() as table:
            index._doom(table, key_of(1).digest)
    assert opened == []


def test_a_connection_that_another_thread_closed_is_not_damage() -> None:
    connection = sqlite3.connect(":memory:")
    connection.close()
    with pytest.raises(sqlite3.ProgrammingError) as raised:
        connection.execute("SELECT 1")
    assert not is_damage(raised.value)


def test_a_rebuild_leaves_an_entry_that_the_disk_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk may recover. Until then ``verify`` removes it, for no row names it."""
    fill(tmp_path, 3)
    files = payload_files(tmp_path)
    lose_index(tmp_path)

    def fail_at_one(path: Path) -> EntryHeader:
        if path == files[1]:
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))
        return read_header(path)

    monkeypatch.setattr(database, "read_header", fail_at_one)
    assert Index(settings(tmp_path)).totals()["array"][0] == 2
    assert "2 entries kept, 0 files removed, 1 that cannot be read left alone" in caplog.text
    assert payload_files(tmp_path) == files
    root = tmp_path / "cache" / "zarrcache-v1"
    assert verify(settings(tmp_path)).strays == (str(files[1].relative_to(root)),)


def test_a_rebuild_removes_what_is_not_an_entry(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    files = payload_files(tmp_path)
    lose_index(tmp_path)
    files[0].with_name("torn").write_bytes(files[0].read_bytes()[:-1])
    files[0].with_name("link").symlink_to(files[1])
    (tmp_path / "cache" / "zarrcache-v1" / "bytes" / "ab").mkdir()
    (tmp_path / "cache" / "zarrcache-v1" / "bytes" / "ab" / "abcd").write_bytes(b"object")
    assert Index(settings(tmp_path)).totals()["array"][0] == 2
    assert payload_files(tmp_path) == files


def test_a_listing_is_a_kind_of_its_own_after_a_rebuild_too(tmp_path: Path) -> None:
    cache = fill(tmp_path, 2)
    listing = ArrayKey("file", "/data", "")
    assert cache.put(listing, array_of(9), source="listing")
    assert cache.index.totals() == {"array": (2, 2 * 8192), "listing": (1, 8192)}
    lose_index(tmp_path)
    index = Index(settings(tmp_path))
    assert index.totals() == {"array": (2, 2 * 8192), "listing": (1, 8192)}
    assert [row.note for row in index.rows("listing")] == ["file\n/data\n"]
