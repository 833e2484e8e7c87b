"""The byte tier: each object once, exactly the origin's bytes, and nothing half."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import Buffer

from tests.support.cachedirs import array_of, on_disk_bytes, payload_files, settings
from zarrcache._keys import BlockKey, ObjectInfo
from zarrcache.cache.byte_tier import ByteCache
from zarrcache.disk.index import Index
from zarrcache.errors import IncompleteArrayError, OriginUnavailableError
from zarrcache.origin._local import LocalOrigin
from zarrcache.stats import Counters, Stats

BLOCK = 64 * 1024


class CountingOrigin(LocalOrigin):
    """A directory that writes down each request, for any number of processes."""

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        for obj in objects:
            self._note(f"{obj.key} whole")
            yield obj, LocalOrigin.fetch_range(self, obj, 0, obj.size_bytes)

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        self._note(f"{obj.key} {start}-{stop}")
        return super().fetch_range(obj, start, stop)

    def _note(self, line: str) -> None:
        with open(f"{self.url}.log", "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    @property
    def requests(self) -> Counter[str]:
        """Number of requests of each kind."""
        log = Path(f"{self.url}.log")
        return Counter(log.read_text(encoding="utf-8").splitlines() if log.exists() else ())


def origin_with(tmp_path: Path, **sizes: int) -> tuple[CountingOrigin, dict[str, ObjectInfo]]:
    """An origin with objects of random bytes."""
    (tmp_path / "data").mkdir(exist_ok=True)
    for number, (name, size) in enumerate(sizes.items()):
        (tmp_path / "data" / name).write_bytes(array_of(number, size).tobytes())
    origin = CountingOrigin(str(tmp_path / "data"))
    return origin, {obj.key: obj for obj in origin.list_objects()}


def make(tmp_path: Path, origin: LocalOrigin, **block: Any) -> ByteCache:
    """A byte tier with small blocks."""
    config = settings(tmp_path, **{"bytes": {"block_size": BLOCK}, **block})
    return ByteCache(origin, config, Counters(), Index(config))


def counted(cache: ByteCache) -> Stats:
    return cache._counters.snapshot()


def content(tmp_path: Path, name: str) -> bytes:
    """The object at the origin."""
    return (tmp_path / "data" / name).read_bytes()


def test_second_read_makes_no_request(tmp_path: Path) -> None:
    """From another instance too; hits, misses and bytes are counted."""
    origin, objects = origin_with(tmp_path, a=1000, b=0, c=BLOCK)
    for requests in (3, 3):
        cache = make(tmp_path, origin)
        assert [cache.read(obj) for obj in objects.values()] == [
            content(tmp_path, name) for name in "abc"
        ]
        assert origin.requests.total() == requests
    assert (counted(cache).byte_hits, counted(cache).byte_misses, counted(cache).served_bytes) == (
        3,
        0,
        1000 + BLOCK,
    )


def test_warm_read_takes_no_lock(tmp_path: Path) -> None:
    """A process that is stopped while it holds one delays no hit."""
    origin, objects = origin_with(tmp_path, a=1000, b=3 * BLOCK)
    cache = make(tmp_path, origin)
    want = [cache.read(objects["a"]), cache.read(objects["b"], BLOCK, 2 * BLOCK)]
    again = make(tmp_path, origin)

    def fails(digest: str) -> Any:
        raise AssertionError(f"a lock of {digest} was taken")

    again.flight.hold = fails  # type: ignore[method-assign]
    assert [again.read(objects["a"]), again.read(objects["b"], BLOCK, 2 * BLOCK)] == want
    assert list(again.fetch([])) == []


def test_range_of_a_small_object_caches_it_whole(tmp_path: Path) -> None:
    """One request for all ranges of it."""
    origin, objects = origin_with(tmp_path, a=1000)
    cache = make(tmp_path, origin)
    data = content(tmp_path, "a")
    for start, stop in ((0, 10), (990, 2000), (500, 500), (700, 600), (1000, 1001)):
        assert cache.read(objects["a"], start, stop) == data[start:stop]
    assert origin.requests == {"a whole": 1}


def test_range_of_a_large_object_fetches_its_blocks_once(tmp_path: Path) -> None:
    """Blocks that touch the range, each with the origin's bytes; the last one is shorter."""
    size = 3 * BLOCK + 100
    origin, objects = origin_with(tmp_path, a=size)
    cache = make(tmp_path, origin)
    data = content(tmp_path, "a")
    for start, stop in (
        (10, 20),
        (BLOCK - 1, BLOCK + 1),
        (3 * BLOCK, size),
        (BLOCK, 2 * BLOCK),
        (size - 5, size + 5),
    ):
        assert cache.read(objects["a"], start, stop) == data[start:stop]
    assert origin.requests == {
        f"a {0}-{BLOCK}": 1,
        f"a {BLOCK}-{2 * BLOCK}": 1,
        f"a {3 * BLOCK}-{size}": 1,
    }
    assert cache.read(objects["a"]) == data
    assert origin.requests["a whole"] == 1


@pytest.mark.parametrize("size", [100, 3 * BLOCK])
def test_an_empty_range_makes_no_request(tmp_path: Path, size: int) -> None:
    origin, listed = origin_with(tmp_path, a=size)
    cache = make(tmp_path, origin)
    assert [cache.read(listed["a"], at, at) for at in (0, 5, 10**6)] == [b"", b"", b""]
    assert origin.requests == {}


def test_other_block_size_never_mixes_blocks(tmp_path: Path) -> None:
    """A user changes ``block_size`` between two runs over one directory."""
    origin, objects = origin_with(tmp_path, a=8 * BLOCK)
    data = content(tmp_path, "a")
    for block_size in (BLOCK, 2 * BLOCK, 3 * BLOCK, BLOCK):
        cache = make(tmp_path, origin, bytes={"block_size": block_size})
        assert cache.read(objects["a"], BLOCK + 5, 4 * BLOCK + 5) == data[BLOCK + 5 : 4 * BLOCK + 5]


@pytest.mark.parametrize("name", ["a b", "a#b", "a*b?c[d]", "ünï", "a%20b", "a::b", "{a}"])
def test_any_name_is_a_key(tmp_path: Path, name: str) -> None:
    """Characters that have a meaning in paths, globs and URLs."""
    origin, objects = origin_with(tmp_path, **{name: 100})
    assert (
        make(tmp_path, origin).read(objects[name])
        == make(tmp_path, origin).read(objects[name])
        == content(tmp_path, name)
    )
    assert origin.requests.total() == 1


def test_changed_object_is_another_entry(tmp_path: Path) -> None:
    """Readers with the old listing keep the old version."""
    origin, objects = origin_with(tmp_path, a=1000)
    cache = make(tmp_path, origin)
    old = cache.read(objects["a"])
    (tmp_path / "data" / "a").write_bytes(b"new")
    (new,) = origin.list_objects()
    assert cache.read(new) == b"new"
    assert cache.read(objects["a"]) == old
    assert len(payload_files(tmp_path)) == 2


def test_object_that_changed_since_its_listing_is_an_error_and_not_kept(tmp_path: Path) -> None:
    """Never the new bytes under the old name."""
    origin, objects = origin_with(tmp_path, a=1000)
    (tmp_path / "data" / "a").write_bytes(bytes(1000))
    cache = make(tmp_path, origin)
    with pytest.raises(IncompleteArrayError, match="changed after it was listed"):
        cache.read(objects["a"])
    assert payload_files(tmp_path) == []
    assert cache.index.volume_bytes() == 0


def test_full_cache_hands_the_bytes_through(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One request per read, and nothing is written."""
    origin, objects = origin_with(tmp_path, a=4096, b=4096)
    cache = make(tmp_path, origin, limit=4096)
    for _ in range(3):
        assert [cache.read(obj) for obj in objects.values()] == [
            content(tmp_path, name) for name in "ab"
        ]
    assert origin.requests == {"a whole": 1, "b whole": 3}
    assert on_disk_bytes(tmp_path) == cache.index.volume_bytes() == 4096
    assert counted(cache).cache_errors == 0
    assert caplog.records == []


def test_file_that_was_deleted_gives_its_room_back(tmp_path: Path) -> None:
    """In a full cache too."""
    origin, objects = origin_with(tmp_path, a=4096)
    make(tmp_path, origin, limit=4096).read(objects["a"])
    payload_files(tmp_path)[0].unlink()
    cache = make(tmp_path, origin, limit=4096)
    cache.read(objects["a"])
    assert len(payload_files(tmp_path)) == 1
    assert cache.index.volume_bytes() == 4096


def test_failing_cache_is_logged_once_and_fetches_once_a_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: pass-through, counted each time, logged once."""
    origin, objects = origin_with(tmp_path, a=100, b=100)
    cache = make(tmp_path, origin)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zarrcache.cache.tiers.publish", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [cache.read(obj) for obj in objects.values()] == [
                content(tmp_path, name) for name in "ab"
            ]
    assert origin.requests == {"a whole": 2, "b whole": 2}
    assert counted(cache).cache_errors == counted(cache).byte_misses == 4
    (record,) = caplog.records
    assert f"cache write failed, serving {tmp_path}/data/a from the origin" in record.getMessage()
    assert cache.index.volume_bytes() == 0


def test_error_of_the_origin_is_not_a_fault_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised unchanged, after one request."""
    origin, objects = origin_with(tmp_path, a=100)
    cache = make(tmp_path, origin)
    asked = []

    def fail(self: LocalOrigin, objects: Sequence[ObjectInfo]) -> Iterator[Any]:
        asked.append(objects)
        raise OriginUnavailableError("s3://b is down")

    monkeypatch.setattr(CountingOrigin, "fetch", fail)
    with pytest.raises(OriginUnavailableError, match="s3://b is down"):
        cache.read(objects["a"])
    assert len(asked) == 1
    assert counted(cache).cache_errors == 0
    assert payload_files(tmp_path) == []


@pytest.mark.parametrize("verify", ["first", "always"])
def test_corrupt_object_is_purged_and_fetched_again(tmp_path: Path, verify: str) -> None:
    """Once; the next reader has a hit."""
    origin, objects = origin_with(tmp_path, a=1000)
    make(tmp_path, origin).read(objects["a"])
    (path,) = payload_files(tmp_path)
    path.write_bytes(bytes(1000))
    cache = make(tmp_path, origin, verify=verify)
    assert cache.read(objects["a"]) == cache.read(objects["a"]) == content(tmp_path, "a")
    assert origin.requests == {"a whole": 2}
    assert (counted(cache).purges, counted(cache).byte_misses, counted(cache).byte_hits) == (
        1,
        1,
        1,
    )


@pytest.mark.parametrize("damage", [bytes(1000), bytes(999), b""])
def test_file_that_does_not_match_is_dropped_only_by_who_holds_its_lock(
    tmp_path: Path, damage: bytes
) -> None:
    """Without the lock it may be a file that another process has not committed yet."""
    origin, objects = origin_with(tmp_path, a=1000)
    make(tmp_path, origin).read(objects["a"])
    (path,) = payload_files(tmp_path)
    path.write_bytes(damage)
    cache = make(tmp_path, origin)
    key = BlockKey(origin.identity, origin.url, objects["a"])
    assert key.digest == path.name
    assert cache._from_disk(key) is None
    assert (path.exists(), counted(cache).purges) == (True, 0)
    assert cache.index.lookup(path.name) is not None
    assert cache._from_disk(key, is_alone=True) is None
    assert (path.exists(), counted(cache).purges) == (False, 1)
    assert cache.index.lookup(path.name) is None


def test_file_that_no_row_knows_is_not_trusted(tmp_path: Path) -> None:
    """It may have been planted, or left by a writer that was killed."""
    origin, objects = origin_with(tmp_path, a=1000)
    make(tmp_path, origin).read(objects["a"])
    (path,) = payload_files(tmp_path)
    name = path.relative_to(tmp_path / "cache" / "zarrcache-v1")
    cache = make(tmp_path, origin)
    cache.index.drop([path.name])
    path.write_bytes(b"planted")
    assert cache.read(objects["a"]) == content(tmp_path, "a")
    assert cache.index.lookup(path.name).filename == str(name)  # type: ignore[union-attr]


def test_cache_pickles_without_its_open_parts(tmp_path: Path) -> None:
    origin, objects = origin_with(tmp_path, a=1000)
    cache = make(tmp_path, origin)
    cache.read(objects["a"])
    assert pickle.loads(pickle.dumps(cache)).read(objects["a"]) == content(tmp_path, "a")
    assert origin.requests.total() == 1


def _read_all(tmp_path: Path, start: Event) -> None:
    origin, objects = CountingOrigin(str(tmp_path / "data")), {}
    objects = {obj.key: obj for obj in origin.list_objects()}
    cache = make(tmp_path, origin)
    start.wait(60)
    for name, obj in objects.items():
        assert cache.read(obj) == content(tmp_path, name)
    assert counted(cache).purges == 0


def test_eight_processes_and_eight_threads_make_one_get_per_object(tmp_path: Path) -> None:
    """They meet at each object; a file that is not committed yet is not taken for a bad one."""
    origin, objects = origin_with(tmp_path, **{f"o{n:02}": 3000 for n in range(30)})
    context = get_context("fork")
    start = context.Event()
    children = [context.Process(target=_read_all, args=(tmp_path, start)) for _ in range(7)]
    for child in children:
        child.start()
    cache = make(tmp_path, origin)
    barrier = threading.Barrier(8)

    def read(_: int) -> list[bytes]:
        barrier.wait()
        return [cache.read(obj) for obj in objects.values()]

    start.set()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(read, range(8)))
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * 7
    assert all(result == [content(tmp_path, name) for name in objects] for result in results)
    assert set(origin.requests.values()) == {1}
    assert len(origin.requests) == 30
    assert counted(cache).purges == 0
    assert len(os.listdir(tmp_path / "cache" / "zarrcache-v1" / "locks")) <= 32
