"""A cache directory that breaks in every way: the reader continues, the fault is counted and logged
once, and no wrong value is served.
"""

from __future__ import annotations

import os
import pickletools
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cachedirs import array_of, key_of, on_disk_bytes, payload_files, settings
from tests.support.smalldisk import small_disk_at
from tests.support.stores import small_group
from zarrcache.cache.cache import Cache
from zarrcache.cache.tiers import ArrayCache
from zarrcache.cache.zarr_store import CachedStore
from zarrcache.stats import Counters, Stats


def make(tmp_path: Path, **block: Any) -> ArrayCache:
    """An array tier for this test."""
    return ArrayCache(settings(tmp_path, **block), Counters())


def counted(cache: ArrayCache) -> Stats:
    """What the cache counted."""
    return cache._counters.snapshot()


def root_of(tmp_path: Path) -> Path:
    """The only directory that may be written."""
    return tmp_path / "cache" / "zarrcache-v1"


class Density:
    """A store on disk, read through both tiers as the reader does it."""

    def __init__(self, tmp_path: Path, **layout: Any) -> None:
        self.arrays = small_group(tmp_path / "data" / "mp-1.zarr", shape=(8, 8, 8), **layout)
        self.tmp_path = tmp_path
        self.open()

    def open(self, **block: Any) -> None:
        """As a new process would."""
        self.cache = Cache(settings(self.tmp_path, **block), Counters())
        self.store = CachedStore(
            self.cache.origin(str(self.tmp_path / "data")), "mp-1.zarr", self.cache
        )

    def read(self) -> None:
        """Read through both tiers and compare."""
        import zarr

        group = zarr.open_group(self.store, mode="r")
        assert np.array_equal(
            group["charge_density_total"][...], self.arrays["charge_density_total"]
        )  # type: ignore[index]

    @property
    def stats(self) -> Stats:
        """Of both tiers."""
        return self.cache.counters.snapshot()


@pytest.fixture
def density(tmp_path: Path) -> Density:
    """Read once, so that its objects are in the byte tier."""
    density = Density(tmp_path, compressors=None)
    density.read()
    assert density.stats.byte_misses > 8
    return density


# -- bad entries


def flip(path: Path) -> None:
    """Flip one bit in the last quarter, after the header of an entry."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 7 // 8] ^= 16
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    """Keep the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    """As some file systems leave a file after a power failure."""
    path.write_bytes(b"")


def link(path: Path) -> None:
    """A link to another file with the same content."""
    other = path.parents[4] / "elsewhere"
    shutil.move(path, other)
    path.symlink_to(other)


@pytest.mark.parametrize("damage", [flip, truncate, empty, link])
def test_bad_array_is_purged_counted_and_stored_again(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A miss, one log line that names the store, and a hit afterwards."""
    make(tmp_path).put(key_of(1), array_of(1), source="s")
    damage(payload_files(tmp_path)[0])
    cache = make(tmp_path)
    assert cache.get(key_of(1)) is None
    assert counted(cache).purges + counted(cache).cache_errors == 1
    assert "/data/mp-1.zarr" in caplog.text
    assert cache.put(key_of(1), array_of(1), source="s")
    entry = cache.get(key_of(1))
    assert entry is not None
    assert np.array_equal(entry.array, array_of(1))


def test_swapped_arrays_are_detected_by_their_headers(tmp_path: Path) -> None:
    """Both are whole, with correct checksums, under each other's names."""
    cache = make(tmp_path)
    for number in (1, 2):
        cache.put(key_of(number), array_of(number), source="s")
    one, two = payload_files(tmp_path)
    os.rename(one, tmp_path / "third")
    os.rename(two, one)
    os.rename(tmp_path / "third", two)
    assert [make(tmp_path).get(key_of(number)) for number in (1, 2)] == [None, None]


@pytest.mark.parametrize("damage", [flip, truncate, empty])
def test_bad_object_is_purged_counted_and_fetched_again(
    density: Density, damage: Callable[[Path], None]
) -> None:
    """Each once; then they are hits again."""
    files = [path for path in payload_files(density.tmp_path) if path.parts[-3] == "bytes"]
    for path in files:
        damage(path)
    density.open()
    density.read()
    assert density.stats.purges == density.stats.byte_misses == len(files)
    density.open()
    density.read()
    assert density.stats.purges == density.stats.byte_misses == 0


def test_swapped_objects_are_detected_by_their_checksums(density: Density) -> None:
    """Chunks of equal length, under each other's names."""
    files = [path for path in payload_files(density.tmp_path) if path.parts[-3] == "bytes"]
    path, other = next(
        (a, b)
        for a in files
        for b in files
        if a.stat().st_size == b.stat().st_size and a.read_bytes() != b.read_bytes()
    )
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    density.open()
    density.read()
    assert density.stats.purges == 2


# -- a bad index


def garbage(index: Path) -> None:
    """Not an SQLite file."""
    index.write_bytes(b"garbage" * 1000)


def halved(index: Path) -> None:
    """Its header announces pages that are missing."""
    os.truncate(index, index.stat().st_size // 8192 * 4096)


def emptied(index: Path) -> None:
    """SQLite takes this for a new database."""
    index.write_bytes(b"")


def deleted(index: Path) -> None:
    index.unlink()


def scribbled(index: Path) -> None:
    """The header is intact, the pages are not."""
    raw = bytearray(index.read_bytes())
    raw[4096:] = os.urandom(len(raw) - 4096)
    index.write_bytes(raw)


def settle(tmp_path: Path) -> None:
    """Close an index: one file, without a log."""
    import sqlite3

    connection = sqlite3.connect(root_of(tmp_path) / "cache.db")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    for name in ("cache.db-wal", "cache.db-shm"):
        (root_of(tmp_path) / name).unlink(missing_ok=True)


@pytest.mark.parametrize("damage", [garbage, halved, emptied, deleted, scribbled])
@pytest.mark.parametrize("open_already", [False, True], ids=["new process", "running process"])
def test_broken_index_heals_and_knows_its_entries_again(
    tmp_path: Path, damage: Callable[[Path], None], open_already: bool
) -> None:
    """Hits again after a few misses; the volume equals the bytes on disk; no whole entry is
    lost.
    """
    cache = make(tmp_path)
    for number in range(8):
        cache.put(key_of(number), array_of(number), source="s")
    (root_of(tmp_path) / "entries" / "zz").mkdir()
    (root_of(tmp_path) / "entries" / "zz" / "half").write_bytes(b"half")
    cache.index._file.open().close()
    settle(tmp_path)
    damage(root_of(tmp_path) / "cache.db")
    if not open_already:
        cache = make(tmp_path)
    for number in range(8):
        entry = cache.get(key_of(number))
        assert entry is None or np.array_equal(entry.array, array_of(number))
        assert cache.put(key_of(number), array_of(number), source="s") or number == 0
    for reader in (cache, make(tmp_path)):
        for number in range(8):
            entry = reader.get(key_of(number))
            assert entry is not None
            assert np.array_equal(entry.array, array_of(number))
    assert cache.index.volume_bytes() == on_disk_bytes(tmp_path) == 8 * 8192


def test_broken_index_of_a_new_process_loses_no_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is set aside, logged once, and rebuilt from the files."""
    cache = make(tmp_path)
    for number in range(8):
        cache.put(key_of(number), array_of(number), source="s")
    cache.index._file.open().close()
    settle(tmp_path)
    garbage(root_of(tmp_path) / "cache.db")
    cache = make(tmp_path)
    assert all(cache.get(key_of(number)) is not None for number in range(8))
    assert [info.key for info in cache.entries()] == [key_of(number) for number in range(8)]
    assert "is broken (file is not a database); it is set aside as cache.db.broken-" in caplog.text
    assert "8 entries kept" in caplog.text
    assert counted(cache) == Stats()


# -- a bad directory


def test_directory_deleted_under_a_running_reader_is_made_again(density: Density) -> None:
    """Misses, then hits; with the permissions it had."""
    cache = density.cache.arrays
    assert cache is not None
    cache.put(key_of(1), array_of(1), source="s")
    shutil.rmtree(density.tmp_path / "cache")
    assert cache.get(key_of(1)) is None
    density.read()
    assert cache.put(key_of(1), array_of(1), source="s")
    assert cache.get(key_of(1)) is not None
    assert density.cache.index is not None
    assert density.cache.index.volume_bytes() == on_disk_bytes(density.tmp_path)
    assert {
        stat.S_IMODE(path.stat().st_mode)
        for path in root_of(density.tmp_path).rglob("*")
        if path.is_dir()
    } == {0o700}
    density.open()
    density.read()
    assert density.stats.byte_misses == 0


def blocked_by_a_file(tmp_path: Path) -> None:
    """A file in place of the directory."""
    (tmp_path / "cache").write_text("not a directory")


def blocked_by_a_link(tmp_path: Path) -> None:
    """A link to a foreign directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "cache").mkdir()
    root_of(tmp_path).symlink_to(tmp_path / "home")


@pytest.mark.parametrize("block", [blocked_by_a_file, blocked_by_a_link])
def test_directory_that_cannot_be_used_costs_the_cache_and_nothing_else(
    tmp_path: Path, block: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Both tiers pass through, count, and log the reason once per kind; nothing is written through
    a link.
    """
    block(tmp_path)
    density = Density(tmp_path)
    density.read()
    cache = density.cache.arrays
    assert cache is not None
    assert cache.get(key_of(1)) is None
    assert not cache.put(key_of(1), array_of(1), source="s")
    assert density.stats.cache_errors > 0
    assert density.stats.byte_hits == 0
    assert len({record.getMessage() for record in caplog.records}) <= 8
    assert not (tmp_path / "home").exists() or os.listdir(tmp_path / "home") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two MiB."""
    with small_disk_at(tmp_path / "cache", "2m"):
        yield tmp_path


def test_full_disk_is_passed_by_and_used_again_when_there_is_room(small_disk: Path) -> None:
    """The limit allows more than the disk has; a failed write leaves no file, and existing entries
    stay readable.
    """
    cache = make(small_disk)
    stored = [cache.put(key_of(n), array_of(n, 60_000), source="s") is not None for n in range(30)]
    assert stored[0]
    assert not all(stored)
    for number, was_stored in enumerate(stored):
        entry = cache.get(key_of(number))
        assert (entry is not None) is was_stored
    assert [p for p in payload_files(small_disk) if ".partial-" in p.name] == []
    assert len(payload_files(small_disk)) == sum(stored)
    for number in range(4):
        assert cache.drop(key_of(number)) > 0
    assert cache.put(key_of(99), array_of(99, 60_000), source="s")
    assert cache.get(key_of(99)) is not None


def test_a_disk_filled_by_another_program_is_read_past(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The index cannot be written either; the byte tier still reads, and both recover when there is
    space.
    """
    density = Density(small_disk)
    density.cache.index.open()  # type: ignore[union-attr]
    ballast = small_disk / "cache" / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    density.read()
    assert density.cache.arrays is not None
    assert not density.cache.arrays.put(key_of(1), array_of(1), source="s")
    assert len({record.getMessage() for record in caplog.records}) <= 6
    os.unlink(ballast)
    density.read()
    assert density.cache.arrays.put(key_of(1), array_of(1), source="s")
    assert density.cache.arrays.get(key_of(1)) is not None
    density.open()
    density.read()
    assert density.stats.byte_misses == 0


def test_read_only_directory_serves_what_it_has_or_nothing(small_disk: Path) -> None:
    """Remounted read-only, as ext4 does after an error."""
    density = Density(small_disk)
    # in a child: a file that is open for writing prevents the remount
    filler = get_context("fork").Process(target=density.read)
    filler.start()
    filler.join()
    made = subprocess.run(
        ["mount", "-o", "remount,ro", small_disk / "cache"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip("a file system cannot be remounted read-only here")
    try:
        for _ in range(2):
            density.read()
            assert density.cache.arrays is not None
            assert not density.cache.arrays.put(key_of(1), array_of(1), source="s")
            density.open()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", small_disk / "cache"], check=True)


# -- permissions, and what may be written


@pytest.mark.parametrize(
    ("shared", "dirs", "files", "entries"),
    [(False, 0o700, 0o600, 0o600), (True, 0o2770, 0o660, 0o640)],
)
def test_every_file_has_the_promised_permissions(
    tmp_path: Path, shared: bool, dirs: int, files: int, entries: int
) -> None:
    """Entries, objects, locks, and the index with its log. Entries never change, so other users
    need no write permission.
    """
    before = os.umask(0o027)
    try:
        density = Density(tmp_path)
        density.open(shared=shared)
        density.read()
        assert density.cache.arrays is not None
        density.cache.arrays.put(key_of(1), array_of(1), source="s")
        found = [root_of(tmp_path), *root_of(tmp_path).rglob("*")]
        assert {path.name for path in found} >= {
            "cache.db",
            "cache.db-wal",
            "CACHEDIR.TAG",
            "entries",
            "bytes",
            "locks",
        }
        assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_dir()} == {dirs}
        assert {stat.S_IMODE(path.stat().st_mode) for path in payload_files(tmp_path)} == {entries}
        others = [path for path in found if path.is_file() and path not in payload_files(tmp_path)]
        assert [path for path in others if stat.S_IMODE(path.stat().st_mode) != files] == []
    finally:
        os.umask(before)


def test_nothing_outside_our_directory_is_made(density: Density) -> None:
    """Besides the files of the test there is only ``zarrcache-v1``."""
    assert os.listdir(density.tmp_path / "cache") == ["zarrcache-v1"]
    assert sorted(os.listdir(density.tmp_path)) == ["cache", "data"]


def test_no_pickle_lies_on_disk(density: Density) -> None:
    """Neither a file nor a row of the index is one."""
    import sqlite3

    assert density.cache.arrays is not None
    density.cache.arrays.put(key_of(1), array_of(1), source="s")
    connection = sqlite3.connect(root_of(density.tmp_path) / "cache.db")
    rows = connection.execute("SELECT mode, value FROM Cache").fetchall()
    connection.close()
    assert rows
    assert {(mode & 0xFF, type(value)) for mode, value in rows} == {(16, str)}
    for path in (p for p in root_of(density.tmp_path).rglob("*") if p.is_file()):
        assert not is_pickle(path.read_bytes()), path


def is_pickle(raw: bytes) -> bool:
    """Whether all of it is a pickle."""
    try:
        return sum(1 for _ in pickletools.genops(raw)) > 1
    except Exception:  # noqa: BLE001 - any error of the parser: not a pickle
        return False
