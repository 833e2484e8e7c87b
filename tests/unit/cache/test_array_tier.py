"""The array tier: what is put is got or is a miss, and nothing else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cachedirs import (
    array_of,
    array_on_disk,
    key_of,
    on_disk_bytes,
    payload_files,
    settings,
)
from zarrcache.cache import tiers
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk import is_mapped
from zarrcache.errors import CorruptEntryError
from zarrcache.stats import Counters, Stats


def make(tmp_path: Path, **block: Any) -> ArrayCache:
    """A cache with counters of its own, at ``cache._counters``."""
    return ArrayCache(settings(tmp_path, **block), Counters())


def counted(cache: ArrayCache) -> Stats:
    """What the cache itself counts."""
    return cache._counters.snapshot()


def test_put_is_got_bit_for_bit(tmp_path: Path) -> None:
    """From another instance too, writable, and what a reader writes stays its own."""
    array = np.random.default_rng(0).random((5, 6, 7), "f4")
    assert make(tmp_path).put(key_of(1), array, source="s")
    cache = make(tmp_path)
    entry = cache.get(key_of(1))
    assert entry is not None
    assert np.array_equal(entry.array, array)
    entry.array[:] = 0
    again = cache.get(key_of(1))
    assert again is not None
    assert np.array_equal(again.array, array)
    assert cache.get(key_of(2)) is None
    assert counted(cache) == Stats()


def test_what_was_put_is_returned_as_a_map_of_its_file(tmp_path: Path) -> None:
    """The kernel may reclaim its pages, and a worker transfers it without a copy."""
    entry = make(tmp_path).put(key_of(1), array_of(1), source="s")
    assert entry is not None
    assert is_mapped(entry.array)
    assert np.array_equal(entry.array, array_of(1))


@pytest.mark.parametrize("fault", [FileNotFoundError, PermissionError, CorruptEntryError])
def test_what_was_put_and_cannot_be_mapped_is_returned_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    """Another process evicted it at once, or the disk failed."""
    cache = make(tmp_path)

    def fails(path: str) -> Any:
        raise fault(path)

    monkeypatch.setattr(tiers, "map_entry", fails)
    entry = cache.put(key_of(1), array_of(1), source="s")
    assert entry is not None
    assert entry.header.key == key_of(1)
    assert np.array_equal(entry.array, array_of(1))
    # An eviction is no fault of the cache.
    assert counted(cache) == Stats(
        purges=int(fault is CorruptEntryError), cache_errors=int(fault is PermissionError)
    )


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4).T,
        np.arange(6, dtype=">f4"),
        np.arange(40)[::2],
        np.zeros((0, 3)),
    ],
)
def test_any_memory_layout_is_stored_in_c_order(tmp_path: Path, array: Any) -> None:
    """Little endian, contiguous; values and shape as they were."""
    cache = make(tmp_path)
    assert cache.put(key_of(1), array, source="s")
    entry = cache.get(key_of(1))
    assert entry is not None
    assert entry.array.shape == array.shape
    assert np.array_equal(entry.array, array)
    assert entry.array.flags.c_contiguous


def test_entry_of_another_source_is_stale(tmp_path: Path) -> None:
    """It is a miss from then on, also for readers that do not compare with the origin."""
    cache = make(tmp_path)
    cache.put(key_of(1), array_of(1), source="old")
    assert cache.get(key_of(1), source="old") is not None
    assert cache.get(key_of(1)) is not None
    assert cache.get(key_of(1), source="new") is None
    assert cache.get(key_of(1)) is None
    cache.put(key_of(1), array_of(2), source="new")
    entry = cache.get(key_of(1), source="new")
    assert entry is not None
    assert np.array_equal(entry.array, array_of(2))
    assert len(payload_files(tmp_path)) == 1


def test_volume_is_what_du_says(tmp_path: Path) -> None:
    """Header page and payload in blocks."""
    cache = make(tmp_path)
    for number, nbytes in enumerate((0, 1, 4096, 5000)):
        cache.put(key_of(number), array_of(number, nbytes), source="s")
    assert (
        cache.index.volume_bytes()
        == on_disk_bytes(tmp_path)
        == sum(array_on_disk(n) for n in (0, 1, 4096, 5000))
    )
    assert cache.drop(key_of(3)) == array_on_disk(5000)
    assert cache.index.volume_bytes() == on_disk_bytes(tmp_path)


def test_full_cache_says_so_once_and_takes_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The message names the store and the reason."""
    cache = make(tmp_path, limit=2 * 8192)
    stored = [cache.put(key_of(n), array_of(n), source="s") is not None for n in range(5)]
    assert stored == [True, True, False, False, False]
    assert on_disk_bytes(tmp_path) == 2 * 8192
    (record,) = caplog.records
    assert (
        record.getMessage()
        == "not cached, read from the origin in every epoch: /data/mp-2.zarr (1000 B): the limit "
        "is reached"
    )
    assert counted(cache) == Stats()


def test_stale_entry_gives_its_room_to_the_fresh_one(tmp_path: Path) -> None:
    """In a full cache too."""
    cache = make(tmp_path, limit=8192)
    assert cache.put(key_of(1), array_of(1), source="old")
    assert cache.put(key_of(1), array_of(2), source="new")
    assert cache.get(key_of(1), source="new") is not None
    assert on_disk_bytes(tmp_path) == 8192


def test_entry_whose_file_was_deleted_is_a_miss_and_stored_again(tmp_path: Path) -> None:
    """In a full cache too: the row of the lost file gives its room back."""
    cache = make(tmp_path, limit=8192)
    cache.put(key_of(1), array_of(1), source="s")
    payload_files(tmp_path)[0].unlink()
    assert cache.get(key_of(1)) is None
    assert cache.put(key_of(1), array_of(1), source="s")
    assert cache.get(key_of(1)) is not None
    assert cache.index.volume_bytes() == on_disk_bytes(tmp_path) == 8192


@pytest.mark.parametrize(
    ("verify", "finds"),
    [
        ("first", {"first": True, "later": False, "written": True, "replaced": True}),
        ("always", {"first": True, "later": True}),
        ("never", {"first": False, "later": False, "written": False}),
    ],
)
def test_verify_says_when_the_checksum_is_read(
    tmp_path: Path, verify: str, finds: dict[str, bool]
) -> None:
    """At the first use and after the file was written to or replaced, at each use, or never."""
    for use, is_found in finds.items():
        directory = tmp_path / use
        make(directory).put(key_of(1), array_of(1), source="s")
        cache = make(directory, verify=verify)
        if use != "first":
            assert cache.get(key_of(1)) is not None
        (path,) = payload_files(directory)
        raw, before = bytearray(path.read_bytes()), path.stat()
        raw[-1] ^= 4
        if use == "replaced":
            path.rename(directory / "aside")  # its inode stays in use
        path.write_bytes(raw)
        if use != "written":  # a disk that fails changes no time
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (cache.get(key_of(1)) is None) is is_found
        assert counted(cache).purges == int(is_found)


def test_purge_spares_the_good_entry_that_replaced_the_bad_one(tmp_path: Path) -> None:
    """Another process has stored it again, in a file of another name."""
    slow, fast = make(tmp_path), make(tmp_path)
    slow.put(key_of(1), array_of(1), source="s")
    stale = slow.index.lookup(key_of(1).digest)
    assert stale is not None
    fast.put(key_of(1), array_of(1), source="s")
    slow._purge(key_of(1).digest, stale.filename, "/data/mp-1.zarr", "its checksum does not match")
    assert fast.get(key_of(1)) is not None


def test_interrupted_put_gives_its_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C in a notebook the process lives on, and so would its reservation."""
    cache = make(tmp_path, limit=8192)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zarrcache.cache.tiers.write_entry", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.put(key_of(1), array_of(1), source="s")
    assert cache.index.volume_bytes() == on_disk_bytes(tmp_path) == 0
    assert cache.put(key_of(1), array_of(1), source="s")


def test_entries_say_what_they_are(tmp_path: Path) -> None:
    """Key, file, bytes on disk and time, oldest first."""
    cache = make(tmp_path)
    for number in (3, 1, 2):
        cache.put(key_of(number), array_of(number), source="s")
    infos = list(cache.entries())
    assert [info.key for info in infos] == [key_of(3), key_of(1), key_of(2)]
    assert {info.size_bytes for info in infos} == {8192}
    assert [info.stored_s for info in infos] == sorted(info.stored_s for info in infos)
    assert all((cache.index.dir.root / info.filename).is_file() for info in infos)


def test_cache_pickles_as_its_settings(tmp_path: Path) -> None:
    cache = make(tmp_path)
    cache.put(key_of(1), array_of(1), source="s")
    assert pickle.loads(pickle.dumps(cache)).get(key_of(1)) is not None


def test_cache_is_made_without_touching_the_disk(tmp_path: Path) -> None:
    """A reader may be made on a machine that does not use it."""
    make(tmp_path)
    assert os.listdir(tmp_path) == []
