"""The store over one listing: byte ranges, names, identity, and what it makes of an old listing."""

from __future__ import annotations

import asyncio
import pickle
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.buffer import default_buffer_prototype

from tests.support.cachedirs import settings
from tests.support.stores import small_group
from zarrcache.cache.cache import Cache
from zarrcache.cache.zarr_store import CachedStore, _bounds, open_group, open_store
from zarrcache.errors import (
    IncompleteArrayError,
    OriginError,
    OriginNotFoundError,
    SchemaError,
)
from zarrcache.stats import Counters


def read(store: CachedStore, key: str) -> bytes | None:
    """A whole object, as zarr reads it."""
    found = asyncio.run(store.get(key, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


async def collect(names: AsyncIterator[str]) -> list[str]:
    return [name async for name in names]


@pytest.mark.parametrize(
    ("byte_range", "bounds"),
    [
        (None, (0, 10)),
        (RangeByteRequest(2, 5), (2, 5)),
        (RangeByteRequest(2, 50), (2, 10)),
        (RangeByteRequest(20, 50), (10, 10)),
        (OffsetByteRequest(4), (4, 10)),
        (OffsetByteRequest(40), (10, 10)),
        (SuffixByteRequest(3), (7, 10)),
        (SuffixByteRequest(30), (0, 10)),
    ],
)
def test_byte_range_stays_within_the_object(byte_range: Any, bounds: tuple[int, int]) -> None:
    assert _bounds(byte_range, 10) == bounds


def test_object_is_read_by_its_name_and_no_other_exists(tmp_path: Path) -> None:
    small_group(tmp_path / "mp-1.zarr")
    store = open_store(tmp_path / "mp-1.zarr")
    assert {key: len(read(store, key) or b"") for key in store.sizes()} == store.sizes()
    assert read(store, ".zgroup") == (tmp_path / "mp-1.zarr" / ".zgroup").read_bytes()
    assert read(store, "nothing") is None


def test_object_larger_than_any_array_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of it is read."""
    small_group(tmp_path / "mp-1.zarr")
    with (tmp_path / "mp-1.zarr" / "huge").open("wb") as file:
        file.truncate(1001)
    store = open_store(tmp_path / "mp-1.zarr")
    monkeypatch.setattr("zarrcache.arrays.listing.most_bytes", lambda: 1000)
    with pytest.raises(SchemaError, match="huge lists objects of 1001 bytes"):
        read(store, "huge")
    part = asyncio.run(store.get("huge", default_buffer_prototype(), RangeByteRequest(0, 1000)))
    assert part is not None
    assert part.to_bytes() == bytes(1000)


def test_store_is_its_url_at_its_origin(tmp_path: Path) -> None:
    """Two handles are equal; another endpoint is another store."""
    one, same = (open_store(tmp_path / "mp-1.zarr") for _ in range(2))
    here, there = (
        open_store("s3://b/mp-1.zarr", s3_kwargs={"endpoint_url": f"http://{host}"})
        for host in ("here", "there")
    )
    assert one == same == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(same)
    assert here != there


def test_old_listing_is_an_error_once_and_forgotten(tmp_path: Path) -> None:
    """Versions are never mixed; the store that is opened next is the present version."""
    small_group(tmp_path / "data" / "mp-1.zarr", seed=1)
    cache = Cache(settings(tmp_path), Counters())
    origin = cache.origin(str(tmp_path / "data"))
    CachedStore(origin, "mp-1.zarr", cache).sizes()
    chunk = tmp_path / "data" / "mp-1.zarr" / "charge_density_total" / "0.0.0"
    chunk.write_bytes(b"another length")
    old = CachedStore(origin, "mp-1.zarr", cache)
    with pytest.raises(IncompleteArrayError, match="changed after it was listed"):
        read(old, "charge_density_total/0.0.0")
    new = CachedStore(origin, "mp-1.zarr", cache)
    assert read(new, "charge_density_total/0.0.0") == b"another length"


@pytest.mark.parametrize("key", ["charge_density_total/0.0.0", "charge_density_total/.zarray"])
@pytest.mark.parametrize("deleted", ["data/mp-1.zarr", "data"], ids=["store", "directory"])
@pytest.mark.parametrize("hops", [0, 1, 2])
def test_a_store_that_was_there_and_is_deleted_is_an_error_after_pickling_too(
    tmp_path: Path, key: str, deleted: str, hops: int
) -> None:
    """An absent key would be read as fill values, or as a store without this array."""
    small_group(tmp_path / "data" / "mp-1.zarr", seed=1)
    store = open_store(tmp_path / "data" / "mp-1.zarr")
    assert read(store, key) is not None
    for _ in range(hops):
        store = pickle.loads(pickle.dumps(store))
    shutil.rmtree(tmp_path / deleted)
    with pytest.raises(IncompleteArrayError):
        read(store, key)
    if hops:  # else its listing is in memory
        for call in (store.exists(key), store.getsize(key), collect(store.list())):
            with pytest.raises(IncompleteArrayError, match="was deleted after it was opened"):
                asyncio.run(call)
        with pytest.raises(IncompleteArrayError, match="was deleted after it was opened"):
            store.sizes()


@pytest.mark.parametrize("hops", [0, 1])
def test_a_store_that_was_never_there_has_no_keys_and_no_chunks(tmp_path: Path, hops: int) -> None:
    """Metadata may be requested of what does not exist, a chunk only of what was opened."""
    (tmp_path / "data").mkdir()
    store = open_store(tmp_path / "data" / "mp-1.zarr")
    assert store.sizes() == {}
    for _ in range(hops):
        store = pickle.loads(pickle.dumps(store))
    assert read(store, "charge_density_total/.zarray") is None
    with pytest.raises(IncompleteArrayError, match="it has no metadata of the array"):
        read(store, "charge_density_total/0.0.0")


def test_a_directory_that_was_never_there_is_named_and_is_no_missing_chunk(tmp_path: Path) -> None:
    """Zarr gets no FileNotFoundError, which it takes for "not written"; others do."""
    store = open_store(tmp_path / "nothing" / "mp-1.zarr")
    for call in (
        store.get("charge_density_total/.zarray", default_buffer_prototype()),
        store.get("charge_density_total/0.0.0", default_buffer_prototype()),
        store.exists("zarr.json"),
        store.getsize("zarr.json"),
        collect(store.list()),
        collect(store.list_prefix("")),
        collect(store.list_dir("")),
    ):
        with pytest.raises(OriginError, match="nothing") as raised:
            asyncio.run(call)
        assert not isinstance(raised.value, FileNotFoundError)
    with pytest.raises(OriginError, match=f"{tmp_path}/nothing"):
        zarr.open_group(store, mode="r")
    with pytest.raises(OriginNotFoundError, match=f"{tmp_path}/nothing"):
        open_group(tmp_path / "nothing" / "mp-1.zarr")
