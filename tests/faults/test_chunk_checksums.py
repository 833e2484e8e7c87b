"""Zarr's own checksums (codec ``crc32c``) in chunks and shard indexes: what the byte tier holds
against them is dropped and fetched again; what the origin holds against them is an error.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.buffer import default_buffer_prototype
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from zarrcache import open_store
from zarrcache._keys import ObjectInfo
from zarrcache.cache import Cache, CachedStore
from zarrcache.cache.zarr_store import store_at
from zarrcache.config import CacheConfig
from zarrcache.errors import IncompleteArrayError
from zarrcache.origin._local import LocalOrigin
from zarrcache.stats import Counters

VALUES = np.random.default_rng(5).random((32, 32, 32), dtype="f4")
INNER = [BytesCodec(), Crc32cCodec()]


def sharded(**more: Any) -> list[Any]:
    return [ShardingCodec(chunk_shape=(8, 16, 16), codecs=INNER, **more)]


LAYOUTS: dict[str, tuple[tuple[int, int, int], list[Any]]] = {
    "chunks": ((16, 32, 32), [BytesCodec(), ZstdCodec(), Crc32cCodec()]),
    "shards": ((32, 32, 32), sharded()),
    "shards, index at the start": ((32, 32, 32), sharded(index_location="start")),
}


@pytest.fixture(params=LAYOUTS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store whose objects (64 KiB and more) are cached in blocks."""
    chunks, codecs = LAYOUTS[request.param]
    path = tmp_path / "mp-1.zarr"
    group = zarr.create_group(path, zarr_format=3)
    array = zarr.create(
        store=group.store_path / "a",
        shape=VALUES.shape,
        dtype="f4",
        chunks=chunks,
        codecs=codecs,
        zarr_format=3,
    )
    array[...] = VALUES
    for file in path.rglob("*"):  # not written just now
        os.utime(file, (1_600_000_000, 1_600_000_000))
    return path


def opened(store: Path) -> tuple[zarr.Array[Any], Counters]:
    counters = Counters()
    config = CacheConfig(
        dir=store.parent / "cache", min_free=0, bytes={"block_size": "64 KiB"}, verify="always"
    )
    cached: CachedStore = store_at(store, Cache(config, counters))
    array = zarr.open_group(cached, mode="r")["a"]
    assert isinstance(array, zarr.Array)
    return array, counters


def crops(array: zarr.Array[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(array[i : i + 8]) for i in range(0, 32, 8)])


def test_a_sound_store_reads_equal_and_drops_nothing(store: Path) -> None:
    for _ in range(2):
        array, counters = opened(store)
        assert np.array_equal(crops(array), VALUES)
        assert np.array_equal(array[...], VALUES)
        assert counters.snapshot().purges == 0


def test_an_object_that_is_damaged_at_the_origin_is_an_error(store: Path) -> None:
    for file in (store / "a" / "c").rglob("*"):
        if file.is_file():
            data = bytearray(file.read_bytes())
            data[100] ^= 1
            data[-60] ^= 1
            file.write_bytes(data)
            os.utime(file, (1_600_000_000, 1_600_000_000))
    for array in (opened(store)[0], zarr.open_group(open_store(store), mode="r")["a"]):
        with pytest.raises(IncompleteArrayError, match=r"a/c/0/0/0 contradicts the checksum"):
            crops(array)  # type: ignore[arg-type]


def test_a_chunk_is_checked_before_its_metadata_was_read(store: Path) -> None:
    """The metadata is fetched for that."""
    (chunk, *_) = sorted(f for f in (store / "a" / "c").rglob("*") if f.is_file())
    key = str(chunk.relative_to(store))
    good, damaged = chunk.read_bytes(), bytearray(chunk.read_bytes())
    damaged[100] ^= 1
    damaged[-60] ^= 1

    def read(directory: str) -> bytes:
        config = CacheConfig(dir=store.parent / directory, min_free=0)
        cached = store_at(store, Cache(config, Counters()))
        found = asyncio.run(cached.get(key, default_buffer_prototype()))
        assert found is not None
        return found.to_bytes()

    assert read("one") == good
    chunk.write_bytes(damaged)
    os.utime(chunk, (1_600_000_001, 1_600_000_001))
    with pytest.raises(IncompleteArrayError, match="contradicts the checksum"):
        read("other")


def test_a_bad_block_in_the_cache_is_dropped_and_fetched_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It matches the cache's own checksum: the damage came before it was stored."""
    fetch_range = LocalOrigin.fetch_range

    def damaged(self: LocalOrigin, obj: ObjectInfo, start: int, stop: int) -> bytes:
        data = bytearray(fetch_range(self, obj, start, stop))
        if not obj.key.endswith(".json"):
            data[100] ^= 4
            data[-60] ^= 4
        return bytes(data)

    monkeypatch.setattr(LocalOrigin, "fetch_range", damaged)
    with pytest.raises(IncompleteArrayError, match="contradicts the checksum"):
        crops(opened(store)[0])
    monkeypatch.undo()
    array, counters = opened(store)
    assert np.array_equal(crops(array), VALUES)
    assert counters.snapshot().purges > 0
    array, counters = opened(store)
    assert np.array_equal(crops(array), VALUES)
    assert counters.snapshot().purges == counters.snapshot().byte_misses == 0
