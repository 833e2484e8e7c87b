"""The index: entries, reserved room, intents of dead owners."""

from __future__ import annotations

import gc
import logging
import pickle
import sqlite3
import threading
import weakref
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import zarrcache.disk.index
from tests.support.cachedirs import settings
from zarrcache.disk._database import Stored, row_mode
from zarrcache.disk._publish import _tag_of, hidden_path, owner_id
from zarrcache.disk.index import Index, Intent, Row
from zarrcache.disk.policy import Admission

DEAD = "4 2"


def make(tmp_path: Path, **block: Any) -> Index:
    """An open index."""
    index = Index(settings(tmp_path, **block))
    index.open()
    return index


def store(index: Index, digest: str, size_bytes: int = 4096, tier: str = "array") -> Path:
    """Announce, write and commit one file of ``size_bytes``."""
    path = index.dir.entries / digest[:2] / digest
    path.parent.mkdir(exist_ok=True)
    intent = index.begin(str(path.relative_to(index.dir.root)), size_bytes)
    assert isinstance(intent, Intent), intent
    path.write_bytes(bytes(size_bytes))
    index.commit(intent, digest, tier, f"note of {digest}")
    return path


def sql(index: Index, query: str, *values: object) -> list[Any]:
    """Read or alter the table itself."""
    connection = sqlite3.connect(index.dir.index)
    try:
        with connection:
            return connection.execute(query, values).fetchall()
    finally:
        connection.close()


def machine() -> str:
    return owner_id().partition(" ")[0]


def leave_behind(index: Index, filename: str, size_bytes: int = 4096) -> Path:
    """Leave the intent and the file of a killed writer."""
    intent = index.begin(filename, size_bytes)
    assert isinstance(intent, Intent)
    value = f"{size_bytes} {machine()} {DEAD}"
    sql(
        index,
        "UPDATE Cache SET value = ?, mode = ? WHERE key = ?",
        value,
        row_mode(filename, value),
        intent.key,
    )
    path = index.dir.root / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    return path


def test_an_entry_is_found_by_its_digest(tmp_path: Path) -> None:
    index = make(tmp_path)
    store(index, "ab12", 8192)
    assert index.lookup("ab12") == Stored("entries/ab/ab12", 8192, "note of ab12")
    assert index.lookup("ab13") is None
    assert index.volume_bytes() == 8192


def test_a_loan_is_found_where_there_is_no_entry(tmp_path: Path) -> None:
    index = make(tmp_path)
    assert index.find("cd34") == (None, None)
    assert index.lend("cd34", "entries/cd/cd34-00000000")
    stored, lent = index.find("cd34")
    assert stored is None
    assert lent is not None
    assert lent.filename == "entries/cd/cd34-00000000"
    store(index, "cd34")
    assert index.find("cd34") == (index.lookup("cd34"), None)


def test_entries_are_listed_oldest_first_by_kind(tmp_path: Path) -> None:
    """A replaced entry counts as new; an intent is not an entry."""
    index = make(tmp_path)
    for digest, tier in (("aa", "array"), ("bb", "object"), ("cc", "array"), ("aa", "array")):
        store(index, digest, tier=tier)
    index.begin("entries/dd/dd", 4096)
    rows = list(index.rows())
    assert [row.digest for row in rows] == ["bb", "cc", "aa"]
    assert rows[0] == Row("bb", "object", "entries/bb/bb", 4096, rows[0].stored_s, "note of bb")
    assert [row.digest for row in index.rows("array")] == ["cc", "aa"]
    assert index.totals() == {"array": (2, 8192), "object": (1, 4096)}


@pytest.mark.parametrize("is_deleted", [True, False])
def test_sizes_are_chosen_by_how_notes_begin_and_end(tmp_path: Path, is_deleted: bool) -> None:
    """Of one tier; what only holds the beginning somewhere, or is shorter than both parts, is
    another's. A file that is gone has none.
    """
    index = make(tmp_path)
    for digest, note, tier in (
        ("a1", "file\n/d/mp-1.zarr\ntotal", "array"),
        ("a2", "file\n/d/mp ü 2.zarr\ntotal", "array"),
        ("a3", "file\n/d/mp-3.zarr\ndiff", "array"),
        ("a4", "file\n/d/", "array"),
        ("a5", "s3\n/e/ file\n/d/mp-5.zarr\ntotal", "array"),
        ("a6", "file\n/d/mp-6.zarr\ntotal", "object"),
        ("a8", "file\n/d/mp-8.zarr\ntotal", "array"),
    ):
        intent = index.begin(
            f"{'entries' if tier == 'array' else 'bytes'}/{digest[0]}/{digest}", 4096
        )
        assert isinstance(intent, Intent)
        file = index.dir.root / intent.filename
        index.dir.make(file.parent)
        file.touch()
        index.commit(intent, digest, tier, note)
        if digest == "a8" and is_deleted:  # by a cleaner of the disk
            file.unlink()
    index.begin("entries/a/a7", 4096)
    first = {"mp-1.zarr": 4096, "mp ü 2.zarr": 4096} | ({} if is_deleted else {"mp-8.zarr": 4096})
    assert index.entry_sizes(["file\n/d/", "s3\n/e/"], "\ntotal") == [
        first,
        {" file\n/d/mp-5.zarr": 4096},
    ]


def test_rows_come_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400,000 must not be in memory at once."""
    monkeypatch.setattr(zarrcache.disk.index, "_PAGE", 3)
    index = make(tmp_path)
    for number in range(10):
        store(index, f"{number:02x}", 0)
    index.drop(["03", "04", "05"])
    assert [row.digest for row in index.rows()] == ["00", "01", "02", "06", "07", "08", "09"]


def test_many_small_entries_make_room_for_a_large_one(tmp_path: Path) -> None:
    """More than the policy looks at first."""
    index = make(tmp_path, limit=150 * 4096, eviction="least-recently-stored")
    for number in range(150):
        store(index, f"{number:02x}")
    assert isinstance(index.begin("entries/ff/ff", 130 * 4096), Intent)
    assert len(list(index.rows())) == 20


def test_reserved_room_counts_until_it_is_given_back(tmp_path: Path) -> None:
    """Two writers at once cannot both take the last room."""
    index = make(tmp_path, limit=10000)
    first = index.begin("entries/aa/aa", 8192)
    assert isinstance(first, Intent)
    assert index.volume_bytes() == 8192
    assert index.begin("entries/bb/bb", 4096) is Admission.OVER_LIMIT
    assert index.begin("entries/bb/bb", 12288) is Admission.TOO_LARGE
    index.abort(first)
    assert index.volume_bytes() == 0
    assert isinstance(index.begin("entries/bb/bb", 4096), Intent)


def test_min_free_stays_free_below_the_limit(tmp_path: Path) -> None:
    assert make(tmp_path, min_free=2**60).begin("entries/aa/aa", 4096) is Admission.DISK_FULL


def test_least_recently_stored_makes_room_and_none_does_not(tmp_path: Path) -> None:
    full = make(tmp_path / "none", limit=3 * 4096)
    moving = make(tmp_path / "lrs", limit=3 * 4096, eviction="least-recently-stored")
    for index in (full, moving):
        paths = [store(index, digest) for digest in ("aa", "bb", "cc")]
    assert full.begin("entries/dd/dd", 4096) is Admission.OVER_LIMIT
    store(moving, "dd", 8192)
    assert [row.digest for row in moving.rows()] == ["cc", "dd"]
    assert [path.exists() for path in paths] == [False, False, True]
    assert moving.volume_bytes() == 3 * 4096


def test_replaced_file_is_unlinked_after_the_new_one_is_there(tmp_path: Path) -> None:
    """Each entry of the array tier has a file name of its own."""
    index = make(tmp_path)
    old = store(index, "aa")
    intent = index.begin("entries/aa/aa-new", 4096)
    assert isinstance(intent, Intent)
    (index.dir.entries / "aa" / "aa-new").write_bytes(bytes(4096))
    index.commit(intent, "aa", "array", "new")
    assert not old.exists()
    assert index.lookup("aa") == Stored("entries/aa/aa-new", 4096, "new")
    assert index.volume_bytes() == 4096


def test_a_file_that_is_published_again_under_its_name_stays(tmp_path: Path) -> None:
    """An object has one file name: the rename has replaced the old file already."""
    index = make(tmp_path)
    store(index, "aa")
    path = store(index, "aa", 8192)
    assert path.stat().st_size == 8192
    assert index.volume_bytes() == 8192
    assert index.totals() == {"array": (1, 8192)}


def test_an_object_that_is_published_while_it_is_dropped_is_either_there_or_not_counted(
    tmp_path: Path,
) -> None:
    """Otherwise its row would count bytes of a file that the other process has removed."""
    index, other = make(tmp_path), make(tmp_path)
    path = store(index, "aa")
    intent = other.begin("entries/aa/aa", 4096)
    assert isinstance(intent, Intent)
    committed: list[bool] = []
    thread = threading.Thread(
        target=lambda: committed.append(other.commit(intent, "aa", "object", "again"))
    )
    unlink = index.dir.unlink

    def unlink_late(removed: Path) -> None:
        path.write_bytes(bytes(4096))  # published by the other process
        thread.start()
        thread.join(0.2)  # its commit ends before the file is removed, or waits for that
        unlink(removed)

    index.dir.unlink = unlink_late  # type: ignore[method-assign]
    index.drop(["aa"])
    thread.join()
    assert committed == [path.exists()] == [other.lookup("aa") is not None]
    if not committed[0]:
        other.abort(intent)
    assert index.volume_bytes() == sum(
        file.stat().st_size for file in index.dir.entries.rglob("aa") if file.is_file()
    )


def test_drop_returns_the_bytes_that_it_frees(tmp_path: Path) -> None:
    """A file or row that is missing already is not an error."""
    index = make(tmp_path)
    paths = [store(index, digest) for digest in ("aa", "bb", "cc")]
    paths[1].unlink()
    assert index.drop(["aa", "bb", "zz"]) == 8192
    assert [path.exists() for path in paths] == [False, False, True]
    assert index.volume_bytes() == 4096
    assert index.drop(["cc"], filename="entries/cc/another") == 0
    assert index.lookup("cc") is not None


def test_drop_of_many_takes_several_transactions(tmp_path: Path) -> None:
    index = make(tmp_path)
    digests = [f"{n:04x}" for n in range(0, 6600, 11)]
    for digest in digests:
        store(index, digest, 0)
    assert len(digests) == 600
    index.drop(digests)
    assert index.totals() == {}
    assert [p for p in index.dir.entries.rglob("*") if p.is_file()] == []


def test_files_and_room_of_dead_owners_are_swept_at_opening(tmp_path: Path) -> None:
    index = make(tmp_path)
    path = leave_behind(index, "entries/ab/abcd")
    partial = path.with_name(f".abcd.partial-{_tag_of(f'{machine()} {DEAD}')}-0123abcd")
    partial.write_bytes(b"half")
    # the second: a living writer of the same object
    bystanders = [path.with_name("abce"), hidden_path(path, "partial")]
    for bystander in bystanders:
        bystander.write_bytes(b"other")
    again = make(tmp_path)
    assert [p.exists() for p in (path, partial, *bystanders)] == [False, False, True, True]
    assert again.volume_bytes() == 0


def test_files_of_living_owners_are_left_alone(tmp_path: Path) -> None:
    index = make(tmp_path)
    index.begin("entries/ab/abcd", 4096)
    path = hidden_path(index.dir.entries / "ab" / "abcd", "partial")
    path.parent.mkdir()
    path.write_bytes(b"half")
    assert make(tmp_path).sweep() == 0
    assert path.exists()
    assert index.volume_bytes() == 4096


def test_a_full_cache_takes_back_the_room_of_dead_owners(tmp_path: Path) -> None:
    """Without a restart: a worker was killed, the others go on."""
    index = make(tmp_path, limit=4096)
    leave_behind(index, "entries/ab/abcd")
    assert isinstance(index.begin("entries/aa/aa", 4096), Intent)


@pytest.mark.parametrize(
    "change",
    [
        "filename = 'entries/cd/cdef'",
        "filename = '../victim'",
        "value = '4096 ' || substr(value, 6) || ' '",
        "mode = 16",
        "store_time = 'yesterday'",
    ],
)
def test_no_file_is_swept_because_of_a_planted_row(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    index = make(tmp_path)
    store(index, "cdef")
    leave_behind(index, "entries/ab/abcd")
    victim = index.dir.root.parent / "victim"
    victim.write_bytes(b"of others")
    sql(index, f"UPDATE Cache SET {change} WHERE key LIKE '+%'")
    with pytest.raises(sqlite3.DatabaseError, match="does not match its checksum"):
        index.sweep()
    assert victim.exists()
    assert (index.dir.entries / "cd" / "cdef").exists()
    make(tmp_path)
    assert "is broken (" in caplog.text
    assert victim.exists()


def test_a_cache_that_is_only_read_sweeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make(tmp_path)
    path = leave_behind(index, "entries/ab/abcd")
    monkeypatch.setattr(Index, "is_read_only", True)
    assert index.sweep() == 0
    assert path.exists()


def test_sweep_spares_a_file_that_was_published_again(tmp_path: Path) -> None:
    """An object that a killed writer announced is a good entry of another process by now."""
    index = make(tmp_path)
    leave_behind(index, "entries/ab/abcd")
    path = store(index, "abcd")
    assert index.sweep() == 1
    assert path.exists()
    assert index.volume_bytes() == 4096


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4])
def test_a_planted_row_of_diskcache_is_not_read(tmp_path: Path, mode: int) -> None:
    """Mode 4 is a pickle; reading it would run code."""
    index = make(tmp_path)
    payload = pickle.dumps(_Bomb())
    sql(
        index,
        "INSERT INTO Cache(key, raw, store_time, tag, size, mode, filename, value) VALUES ('evil', "
        "1, 0, 'array', 1, ?, NULL, ?)",
        mode,
        payload,
    )
    with pytest.raises(sqlite3.DatabaseError, match="the row of None does not match its checksum"):
        index.lookup("evil")
    with pytest.raises(AssertionError, match="bomb"):
        pickle.loads(payload)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return _explode, ()


def _explode() -> None:
    raise AssertionError("bomb")


def test_index_pickles_as_its_settings(tmp_path: Path) -> None:
    index = make(tmp_path)
    store(index, "aa")
    assert pickle.loads(pickle.dumps(index)).lookup("aa") == index.lookup("aa")


def test_a_forked_child_shares_the_index_and_not_the_connection(tmp_path: Path) -> None:
    """Both write afterwards; the file stays sound."""
    index = make(tmp_path)
    store(index, "aa")
    child = get_context("fork").Process(target=store, args=(index, "bb"))
    child.start()
    store(index, "cc")
    child.join()
    assert child.exitcode == 0
    assert [index.lookup(digest) is not None for digest in ("aa", "bb", "cc")] == [True] * 3
    assert sql(index, "PRAGMA integrity_check") == [("ok",)]
    assert index.volume_bytes() == 3 * 4096


def test_a_replaced_index_is_noticed_at_the_next_write(tmp_path: Path) -> None:
    """What is written to a file without a name is lost."""
    index = make(tmp_path)
    store(index, "aa")
    for path in index.dir.root.glob("cache.db*"):
        path.unlink()
    other = make(tmp_path)
    store(index, "bb")
    assert other.lookup("bb") is not None


def test_a_failed_commit_leaves_a_working_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a full disk the open transaction would make every later write fail."""
    index = make(tmp_path)
    intent = index.begin("entries/aa/aa-1", 4096)
    assert isinstance(intent, Intent)

    def fail(*args: object, **kwargs: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(type(index._file.open()), "set", fail)
        with pytest.raises(sqlite3.OperationalError):
            index.commit(intent, "aa", "array", "note")
    index.commit(intent, "aa", "array", "note")
    assert index.lookup("aa") is not None


def test_opening_again_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a healthy nor an empty index is rebuilt."""
    with caplog.at_level(logging.INFO):
        make(tmp_path)
        store(make(tmp_path), "aa")
        assert make(tmp_path).lookup("aa") is not None
    assert caplog.records == []


def test_a_dropped_index_is_gone_without_the_garbage_collector(tmp_path: Path) -> None:
    """In a circle of references its connections would stay open."""
    index = make(tmp_path)
    left = [weakref.ref(index), weakref.ref(index._file.open())]
    gc.disable()
    try:
        del index
        assert [ref() for ref in left] == [None, None]
    finally:
        gc.enable()
