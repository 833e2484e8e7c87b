"""Zarr's contract of a store, over a directory and over S3 with both engines; and what a store must
never do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.testing.store import StoreTests

from tests.support.cachedirs import payload_files, settings
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server, running_server
from tests.support.stores import small_group
from zarrcache import open_group, open_store
from zarrcache.cache.cache import Cache
from zarrcache.cache.zarr_store import CachedStore
from zarrcache.errors import (
    ConfigError,
    IncompleteArrayError,
    OriginError,
    OriginNotFoundError,
    OriginUnavailableError,
)
from zarrcache.stats import Counters

#: Writes an object to the origin, by the origin's URL.
FEED: dict[str, Callable[[str, bytes], object]] = {}
KINDS = ["local", "obstore", "s3fs"]


class FedStore(CachedStore):
    """The store under test; ``set`` writes to the origin directly."""

    async def set(self, key: str, value: Buffer) -> None:
        FEED[self.origin.url](f"{self.name}/{key}", value.to_bytes())
        self._sizes = None  # it lists once; a test writes after that

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        for key, value in values:
            await self.set(key, value)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Where the origin is, and the engine."""
    return str(request.param)


@pytest.fixture
def arguments(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """For a store that does not exist yet."""
    if kind == "local":
        url, s3_kwargs = str(tmp_path / "data"), None
        (tmp_path / "data").mkdir()

        def feed(key: str, data: bytes) -> None:
            path = tmp_path / "data" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    else:
        server: S3Server = request.getfixturevalue("s3_server")
        url, s3_kwargs = f"s3://{request.getfixturevalue('bucket')}/prefix", server.s3_kwargs

        def feed(key: str, data: bytes) -> None:
            server.put(f"{url}/{key}", data)

    FEED[url] = feed
    engine = "auto" if kind == "local" else kind
    cache = Cache(settings(tmp_path, revalidate="run", fetch={"engine": engine}), Counters())
    return {"origin": cache.origin(url, s3_kwargs), "name": "mp-1.zarr", "cache": cache}


def no_writes(*_: object) -> None:
    """Replaces zarr's tests that write."""
    pytest.skip("the store is read-only: stores are written with zarr, or with zarrcache convert")


class TestZarrsContract(StoreTests[FedStore, cpu.Buffer]):
    """The read-only parts of ``zarr.testing.store.StoreTests``."""

    store_cls = FedStore
    buffer_cls = cpu.Buffer

    @pytest.fixture
    def store_kwargs(self, arguments: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return arguments

    async def set(self, store: FedStore, key: str, value: Buffer) -> None:
        await store.set(key, value)

    async def get(self, store: FedStore, key: str) -> Buffer:
        raise NotImplementedError("only the tests that write read past the store")

    def test_store_repr(self, store: FedStore) -> None:
        assert repr(store) == f"CachedStore('{store.origin.url}/mp-1.zarr')"

    def test_store_supports_writes(self, store: FedStore) -> None:
        assert not store.supports_writes
        assert not store.supports_deletes

    def test_store_supports_listing(self, store: FedStore) -> None:
        assert store.supports_listing

    def test_store_read_only(self, store: FedStore) -> None:
        assert store.read_only
        with pytest.raises(AttributeError):
            store.read_only = False  # type: ignore[misc]

    async def test_read_only_store_raises(self, arguments: dict[str, Any]) -> None:  # type: ignore[override]
        """With zarr's message and the URL."""
        store = CachedStore(**arguments)
        for write in (store.set("foo", cpu.Buffer.from_bytes(b"bar")), store.delete("foo")):
            with pytest.raises(
                ValueError,
                match=r"mp-1\.zarr: store was opened in read-only mode and does not support "
                r"writing",
            ):
                await write

    async def test_with_read_only_store(self, arguments: dict[str, Any]) -> None:  # type: ignore[override]
        """A read-only copy is the store itself; a writable copy is refused."""
        store = CachedStore(**arguments)
        assert store.with_read_only(read_only=True) == store
        with pytest.raises(NotImplementedError, match="with_read_only is not implemented"):
            store.with_read_only(read_only=False)

    test_store_open_read_only = no_writes
    test_set = no_writes
    test_set_not_open = no_writes
    test_set_many = no_writes
    test_set_if_not_exists = no_writes
    test_delete = no_writes
    test_delete_dir = no_writes
    test_delete_nonexistent_key_does_not_raise = no_writes
    test_clear = no_writes


# -- both engines, one server

SHARDED: dict[str, Any] = {
    "shape": (64, 64, 64),
    "chunks": (8, 8, 8),
    "shards": (64, 64, 64),
    "zarr_format": 3,
    "compressors": None,
}
BLOCK = 64 * 1024


class OnS3:
    """One store on the server and how it is opened."""

    def __init__(
        self,
        server: S3Server,
        bucket: str,
        engine: str,
        tmp_path: Path,
        put_store: Callable[..., dict[str, Any]],
        **layout: Any,
    ) -> None:
        self.url, self.server, self.bucket = f"s3://{bucket}/label/mp-1.zarr", server, bucket
        self.values = put_store(self.url, **layout)["charge_density_total"]
        self.cache = settings(
            tmp_path, fetch={"engine": engine}, bytes={"block_size": BLOCK}, retry={"attempts": 1}
        )

    def open(self, **changes: Any) -> zarr.Array:
        """As a new process would, with the stored listing if there is one."""
        cache = self.cache.model_copy(update=changes)
        group = open_group(self.url, s3_kwargs=self.server.s3_kwargs, cache=cache)
        array = group["charge_density_total"]
        assert isinstance(array, zarr.Array)
        return array


@pytest.fixture(params=["obstore", "s3fs"])
def on_s3(
    request: pytest.FixtureRequest,
    s3_server: S3Server,
    bucket: str,
    tmp_path: Path,
    put_store: Callable[..., Any],
) -> Callable[..., OnS3]:
    """``on_s3(**layout)``."""
    return lambda **layout: OnS3(s3_server, bucket, request.param, tmp_path, put_store, **layout)


def test_crop_of_a_sharded_store_fetches_the_blocks_it_touches_once(
    on_s3: Callable[..., OnS3],
) -> None:
    """One object of 1 MiB: the index at its end and the block of the chunk; a second read, also by
    another reader, fetches nothing. Over http:// each block is confirmed by a second request.
    """
    store = on_s3(**SHARDED)
    time.sleep(2.1)  # what was written just now is listed twice
    log = RequestLog(store.server, store.bucket)
    shard = "label/mp-1.zarr/charge_density_total/c/0/0/0"
    for _ in range(2):
        assert np.array_equal(store.open()[:8, :8, :8], store.values[:8, :8, :8])
        assert log.paths("GET")[shard] == 2 * 2
    assert np.array_equal(store.open()[:8, :8, 8:16], store.values[:8, :8, 8:16])
    assert log.paths("GET")[shard] == 2 * 2
    assert np.array_equal(store.open()[...], store.values)
    blocks = -(-(store.values.nbytes + 512 * 16 + 4) // BLOCK)
    assert log.paths("GET")[shard] <= 2 * blocks
    assert len(log.seen("LIST")) == 1


def test_second_read_of_a_group_makes_no_request(on_s3: Callable[..., OnS3]) -> None:
    """One LIST and one GET an object, then none: metadata and chunks alike."""
    store = on_s3()
    time.sleep(2.1)  # what was written just now is listed twice
    log = RequestLog(store.server, store.bucket)
    for _ in range(2):
        assert np.array_equal(store.open()[...], store.values)
    assert len(log.seen("LIST")) == 1
    assert set(log.paths("GET").values()) == {1}
    first = len(log.seen())
    assert np.array_equal(store.open()[...], store.values)
    assert len(log.seen()) == first


def test_listed_object_that_is_gone_never_becomes_fill_values(on_s3: Callable[..., OnS3]) -> None:
    """Zarr would silently fill in for a FileNotFoundError. The next opening lists again, and then
    the object is absent.
    """
    store = on_s3(chunks=(4, 4, 4))
    array = store.open()
    store.server.delete(f"{store.url}/charge_density_total/1.1.1")
    with pytest.raises(
        IncompleteArrayError, match=r"charge_density_total/1\.1\.1 is listed .* 404"
    ):
        array[...]
    again = store.open()
    assert np.array_equal(again[:4], store.values[:4])
    assert (again[4:8, 4:8, 4:8] == 0).all()


def test_bucket_that_is_gone_never_becomes_fill_values(on_s3: Callable[..., OnS3]) -> None:
    """Elsewhere its error is a FileNotFoundError."""
    store = on_s3()
    array = store.open()
    for key in store.server.keys(f"s3://{store.bucket}"):
        store.server.delete(f"s3://{store.bucket}/{key}")
    store.server.client().delete_bucket(Bucket=store.bucket)
    with pytest.raises(IncompleteArrayError, match=r"is listed .* but"):
        array[...]


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_a_bucket_that_was_never_there_is_named_by_zarr_too(
    s3_server: S3Server, tmp_path: Path, engine: str
) -> None:
    """Not zarr's GroupNotFoundError."""
    url, cache = "s3://no-such-bucket/mp-1.zarr", settings(tmp_path, fetch={"engine": engine})
    store = open_store(url, s3_kwargs=s3_server.s3_kwargs, cache=cache)
    for open_it in (zarr.open_group, zarr.open, zarr.open_array):
        with pytest.raises(OriginError, match="there is no bucket 'no-such-bucket'"):
            open_it(store, mode="r")
    with pytest.raises(OriginNotFoundError, match="there is no bucket 'no-such-bucket'"):
        open_group(url, s3_kwargs=s3_server.s3_kwargs, cache=cache)


def test_object_that_changed_since_the_listing_is_an_error_until_the_store_is_opened_again(
    on_s3: Callable[..., OnS3],
) -> None:
    """Old and new chunks are never mixed."""
    store = on_s3(chunks=(4, 4, 4), compressors=None)
    array = store.open()
    new = np.ones((4, 4, 4), "f4").tobytes()
    store.server.put(f"{store.url}/charge_density_total/0.0.0", new)
    with pytest.raises(IncompleteArrayError, match=r"0\.0\.0 was changed"):
        array[...]
    assert (store.open()[:4, :4, :4] == 1).all()


def test_stored_listing_and_objects_open_without_the_server(tmp_path: Path) -> None:
    """A warm node needs no origin; an object that was never read raises that the origin cannot be
    reached.
    """
    with running_server(tmp_path / "log") as server:
        bucket = server.new_bucket()
        arrays = small_group(tmp_path / "mp-1.zarr", diff=True)
        server.put_tree(tmp_path / "mp-1.zarr", f"s3://{bucket}/mp-1.zarr")
        cache = settings(tmp_path, retry={"attempts": 1}, fetch={"connect_timeout": 1})
        group = open_group(f"s3://{bucket}/mp-1.zarr", s3_kwargs=server.s3_kwargs, cache=cache)
        assert np.array_equal(group["charge_density_total"][...], arrays["charge_density_total"])  # type: ignore[index]
        assert group["charge_density_diff"].shape == arrays["charge_density_diff"].shape  # type: ignore[union-attr]
        s3_kwargs = server.s3_kwargs
    group = open_group(f"s3://{bucket}/mp-1.zarr", s3_kwargs=s3_kwargs, cache=cache)
    assert np.array_equal(group["charge_density_total"][...], arrays["charge_density_total"])  # type: ignore[index]
    assert set(group.attrs) == {"structure", "metadata"}
    with pytest.raises(OriginUnavailableError, match="charge_density_diff/"):
        group["charge_density_diff"][...]  # type: ignore[index]
    with pytest.raises(OriginUnavailableError):
        open_group(
            f"s3://{bucket}/mp-1.zarr",
            s3_kwargs=s3_kwargs,
            cache=cache.model_copy(update={"revalidate": "run"}),
        )


# -- a directory

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"zarr_format": 3},
    {"consolidated": True},
    {"as_zip": True},
    {"zarr_format": 3, "shards": (8, 8, 8)},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("cached", [True, False])
def test_group_of_any_layout_is_what_zarr_opens(
    tmp_path: Path, layout: dict[str, Any], cached: bool
) -> None:
    """Arrays and attributes, with and without a cache, twice."""
    name = "mp-1.zarr.zip" if layout.get("as_zip") else "mp-1.zarr"
    arrays = small_group(tmp_path / name, diff=True, metadata={"functional": "GGA"}, **layout)
    for _ in range(2):
        group = open_group(tmp_path / name, cache=settings(tmp_path) if cached else None)
        assert sorted(group.array_keys()) == sorted(arrays)
        for array, values in arrays.items():
            assert np.array_equal(group[array][...], values)  # type: ignore[index]
        assert group.attrs["metadata"] == '{"functional": "GGA"}'
    assert bool(payload_files(tmp_path)) is cached


def test_store_opens_by_path_url_or_file_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trailing slash, a relative path, ``file://``: one store."""
    small_group(tmp_path / "mp-1.zarr")
    monkeypatch.chdir(tmp_path)
    stores = [
        open_store(url)
        for url in (tmp_path / "mp-1.zarr", "mp-1.zarr/", f"file://{tmp_path}/mp-1.zarr")
    ]
    assert len(set(stores)) == 1
    assert all("charge_density_total" in zarr.open_group(store, mode="r") for store in stores)
    assert stores[0] != open_store(tmp_path / "mp-2.zarr")


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "/"])
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    """A bucket is not a store."""
    with pytest.raises(ConfigError, match="names no store"):
        open_store(url)


def test_missing_store_is_named(tmp_path: Path) -> None:
    """As a FileNotFoundError, before zarr takes it for an empty store."""
    for name in ("mp-9.zarr", "mp-9.zarr.zip"):
        with pytest.raises(OriginNotFoundError, match=f"{tmp_path}/{name} does not exist"):
            open_group(tmp_path / name)


def test_damaged_zip_is_named(tmp_path: Path) -> None:
    """It is not an empty group."""
    (tmp_path / "mp-1.zarr.zip").write_bytes(b"no zip")
    with pytest.raises(IncompleteArrayError, match="is not a readable zip file"):
        open_group(tmp_path / "mp-1.zarr.zip")
