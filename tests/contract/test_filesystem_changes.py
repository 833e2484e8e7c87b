"""``zarrcache::`` URLs while the origin changes: new bytes or an error, never a mixture."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from zarrcache import filesystem
from zarrcache.errors import IncompleteArrayError, OriginError
from zarrcache.filesystem import open_stores

ARRAY = "charge_density_total"
REVALIDATE = pytest.mark.parametrize(
    "revalidate", ["never", pytest.param("run", marks=pytest.mark.slow), "epoch"]
)
ZARR_FORMAT = pytest.mark.parametrize("zarr_format", [pytest.param(2, marks=pytest.mark.slow), 3])


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> _Place:
    """A directory of stores, on S3 and local, and the cache of its readers."""
    if request.param == "file":
        return _Place(f"file://{tmp_path}/data", tmp_path, None)
    server: S3Server = request.getfixturevalue("s3_server")
    return _Place(f"s3://{server.new_bucket()}/in", tmp_path, server)


class _Place:
    def __init__(self, url: str, tmp_path: Path, server: S3Server | None) -> None:
        self.url, self._tmp_path, self._server = url, tmp_path, server
        self._written = 0

    def options(self, revalidate: str = "never", cache: str = "cache", **more: Any) -> Any:
        options: dict[str, Any] = {
            "zarrcache": {
                "dir": str(self._tmp_path / cache),
                "min_free": 0,
                "revalidate": revalidate,
                **more,
            }
        }
        if self._server is not None:
            options["s3"] = self._server.s3_kwargs
        return options

    def fs(self, revalidate: str = "never", **more: Any) -> tuple[Any, str]:
        fs, path = fsspec.url_to_fs(f"zarrcache::{self.url}", **self.options(revalidate, **more))
        return fs, path

    def open(self, name: str, revalidate: str = "never", **more: Any) -> Any:
        options = self.options(revalidate, **more)
        url = f"zarrcache::{self.url}/{name}"
        return zarr.open_group(url, mode="r", storage_options=options)[ARRAY]

    def write(self, name: str, seed: int, **layout: Any) -> Any:
        """Write a store, over the one that is there. Its values."""
        self._written += 1
        source = self._tmp_path / f"written-{self._written}" / name
        values = small_group(source, seed=seed, **layout)[ARRAY]
        self.remove(name)
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            self.put(f"{name}/{file.relative_to(source).as_posix()}", file.read_bytes())
        return values

    def put(self, key: str, body: bytes) -> None:
        if self._server is not None:
            self._server.put(f"{self.url}/{key}", body)
            return
        path = Path(self.url.removeprefix("file://"), key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)

    def remove(self, name: str) -> None:
        """Delete what is below a name."""
        if self._server is not None:
            bucket = self.url.split("/")[2]
            for key in self._server.keys(f"{self.url}/{name}"):
                self._server.delete(f"s3://{bucket}/{key}")
            return
        for path in sorted(Path(self.url.removeprefix("file://"), name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()


@REVALIDATE
def test_an_overwritten_store_is_read_new_after_at_most_one_error(
    place: _Place, revalidate: str
) -> None:
    """With ``epoch`` there is no error if nothing is open. With the others, objects that are
    cached are of the old version until an object that is not cached shows the change.
    """
    name = "mp-1.zarr"
    place.write(name, 1)
    fs, root = place.fs(revalidate)
    key = f"{root}/{name}/{ARRAY}"
    old = fs.open(f"{key}/0.0.0").read()
    place.write(name, 2)
    new = fsspec.open(f"{place.url}/{name}/{ARRAY}/0.0.0", **_plain(place)).open().read()
    assert new != old
    if revalidate == "epoch":
        assert fs.open(f"{key}/0.0.0").read() == new
        assert fs.cat_file(f"{key}/0.0.0") == new
        return
    assert fs.open(f"{key}/0.0.0").read() == old
    with pytest.raises(IncompleteArrayError, match="changed"):
        fs.cat_file(f"{key}/0.0.1")
    with pytest.raises(IncompleteArrayError, match="Open it again"):
        fs.cat_file(f"{key}/0.0.1")
    assert fs.open(f"{key}/0.0.0").read() == new
    assert fs.cat_file(f"{key}/0.0.1") == _read(place, f"{name}/{ARRAY}/0.0.1")


@REVALIDATE
def test_an_open_array_is_never_read_from_two_versions(place: _Place, revalidate: str) -> None:
    """Half of the array is cached when the store is overwritten."""
    before = place.write("mp-1.zarr", 1)
    array = place.open("mp-1.zarr", revalidate)
    assert np.array_equal(array[:6], before[:6])
    after = place.write("mp-1.zarr", 2)
    with pytest.raises(IncompleteArrayError):
        array[...]
    with pytest.raises(IncompleteArrayError):  # still that handle
        array[...]
    assert np.array_equal(place.open("mp-1.zarr", revalidate)[...], after)


@REVALIDATE
def test_a_cached_array_is_compared_with_the_origin_in_each_epoch(
    place: _Place, revalidate: str
) -> None:
    """All of it is cached, so only ``epoch`` asks for it again: it raises, and others are old."""
    before = place.write("mp-1.zarr", 1)
    array = place.open("mp-1.zarr", revalidate)
    for _ in range(2):
        assert np.array_equal(array[...], before)
    place.write("mp-1.zarr", 2)
    if revalidate != "epoch":
        assert np.array_equal(array[...], before)
        return
    with pytest.raises(IncompleteArrayError, match="Open it again"):
        array[...]


@REVALIDATE
def test_a_store_that_was_relisted_meanwhile_is_not_mixed(
    place: _Place, revalidate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its listing had to leave memory for that of another store."""
    monkeypatch.setattr(open_stores, "_MAX_STORES", 1)
    before, other = place.write("mp-1.zarr", 1), place.write("mp-2.zarr", 3)
    array = place.open("mp-1.zarr", revalidate)
    assert np.array_equal(array[:6], before[:6])
    after = place.write("mp-1.zarr", 2)
    assert np.array_equal(place.open("mp-2.zarr", revalidate)[...], other)
    with pytest.raises(IncompleteArrayError):
        array[...]
    assert np.array_equal(place.open("mp-1.zarr", revalidate)[...], after)


@REVALIDATE
def test_a_store_deleted_meanwhile_is_not_its_fill_value(place: _Place, revalidate: str) -> None:
    place.write("mp-1.zarr", 1)
    array = place.open("mp-1.zarr", revalidate)
    array[:6]
    place.remove("mp-1.zarr")
    for _ in range(2):
        with pytest.raises(IncompleteArrayError):
            array[...]
    with pytest.raises(FileNotFoundError):
        place.open("mp-1.zarr", revalidate, cache="another")


@pytest.mark.parametrize("name", ["mp-1.zarr", "mp-1"])
@ZARR_FORMAT
def test_an_array_sent_to_another_process_is_not_its_fill_value_there(
    place: _Place, tmp_path: Path, name: str, zarr_format: int
) -> None:
    """The store was deleted meanwhile, and the process has another cache: nothing is known of it
    but the chunk's key.
    """
    place.write("mp-1.zarr", 1, zarr_format=zarr_format)
    if name != "mp-1.zarr":
        place.write(name, 1, zarr_format=zarr_format)
    array = place.open(name)
    array[:1]
    fs, root = place.fs("never", cache="another")
    place.remove(name)
    chunk = "0.0.0" if zarr_format == 2 else "c/0/0/0"
    with pytest.raises(IncompleteArrayError, match="neither does an array"):
        fs.cat_file(f"{root}/{name}/{ARRAY}/{chunk}")
    assert not fs.exists(f"{root}/{name}/{ARRAY}/{chunk}")


@pytest.mark.parametrize("name", ["mp-1.zarr", "mp-1"])
@ZARR_FORMAT
def test_chunks_of_an_array_that_was_deleted_from_its_group_are_not_absent(
    place: _Place, name: str, zarr_format: int
) -> None:
    """The metadata of the group, and of its other arrays, does not count."""
    place.write(name, 1, zarr_format=zarr_format, diff=True)
    place.remove(f"{name}/{ARRAY}/")
    fs, root = place.fs()
    chunk = "0.0.0" if zarr_format == 2 else "c/0/0/0"
    with pytest.raises(IncompleteArrayError, match="neither does an array"):
        fs.cat_file(f"{root}/{name}/{ARRAY}/{chunk}")
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{root}/{name}/charge_density_diff/{chunk.replace('0', '99')}")
    results = fs.cat_ranges([f"{root}/{name}/{ARRAY}/{chunk}"], [0], [4])
    assert [type(result) for result in results] == [IncompleteArrayError]
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{root}/{name}/nothing.txt")


@REVALIDATE
@pytest.mark.parametrize("name", ["mp-1.zarr", "mp-1"])
@ZARR_FORMAT
def test_a_chunk_that_was_never_written_is_the_fill_value(
    place: _Place, revalidate: str, name: str, zarr_format: int
) -> None:
    values = np.arange(960, dtype="f4").reshape(12, 10, 8)
    values[:6, :5, :4] = 7
    place.write(
        name,
        1,
        arrays={ARRAY: values},
        chunks=(6, 5, 4),
        zarr_format=zarr_format,
        fill_value=7,
    )
    assert np.array_equal(place.open(name, revalidate)[...], values)


@REVALIDATE
def test_invalidate_cache_lists_again(place: _Place, revalidate: str) -> None:
    place.write("mp-1.zarr", 1)
    place.write("mp-2.zarr", 1)
    fs, root = place.fs(revalidate)
    for name in ("mp-1.zarr", "mp-2.zarr"):
        assert not fs.exists(f"{root}/{name}/new")
        place.put(f"{name}/new", b"1")
    assert fs.exists(f"{root}/mp-1.zarr/new") == (revalidate == "epoch")
    fs.invalidate_cache(f"{root}/mp-1.zarr/{ARRAY}")
    assert fs.exists(f"{root}/mp-1.zarr/new")
    assert fs.exists(f"{root}/mp-2.zarr/new") == (revalidate == "epoch")
    fs.invalidate_cache()
    assert fs.cat_file(f"{root}/mp-2.zarr/new") == b"1"
    place.put("mp-2.zarr/newer", b"2")
    assert fs.info(f"{root}/mp-2.zarr/newer", refresh=True)["size"] == 1


def test_a_store_is_listed_once_after_invalidate_cache(
    s3_server: S3Server, fault_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its listing is let go of meanwhile: the one on disk is newer than the call."""
    monkeypatch.setattr(open_stores, "_MAX_STORES", 1)
    bucket = s3_server.new_bucket()
    for name in ("mp-1.zarr", "mp-2.zarr"):
        s3_server.put(f"s3://{bucket}/{name}/zarr.json", b"{}")
    fs = fsspec.filesystem(
        "zarrcache",
        target_protocol="s3",
        target_options=s3_server.kwargs_at(fault_proxy.endpoint_url),
        dir=str(tmp_path),
        min_free=0,
    )

    def read_both() -> int:
        before = fault_proxy.count("LIST")
        for _ in range(3):
            for name in ("mp-1.zarr", "mp-2.zarr"):
                assert fs.cat_file(f"{bucket}/{name}/zarr.json") == b"{}"
        return fault_proxy.count("LIST") - before

    read_both()
    assert read_both() == 0
    for path, n_stores in ((None, 2), (f"{bucket}/mp-2.zarr", 1), (bucket, 2)):
        fs.invalidate_cache(path)
        first = read_both()
        assert n_stores <= first <= 2 * n_stores  # a young store is listed twice
        assert read_both() == 0


def test_listings_in_memory_are_bounded_by_their_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_stores, "_MAX_OBJECTS", 25)
    for i in range(6):
        for j in range(10):
            path = tmp_path / f"mp-{i}.zarr" / f"k{j}"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    fs = fsspec.filesystem(
        "zarrcache", target_protocol="file", dir=str(tmp_path / "cache"), min_free=0
    )
    for _ in range(2):
        for i in range(6):
            assert len(fs.ls(f"{tmp_path}/mp-{i}.zarr")) == 10
    shared = fs._places.stores
    assert len(shared._stores) == len(shared._n_objects) == 2
    assert len(shared._versions) == 6


def test_invalidate_cache_reaches_a_listing_on_disk(place: _Place) -> None:
    """One that another process has stored, and that this one has not opened yet."""
    place.write("mp-1.zarr", 1)
    place.fs()[0].ls(place.fs()[1] + "/mp-1.zarr")
    place.put("mp-1.zarr/new", b"1")
    filesystem.ZarrCacheFileSystem.clear_instance_cache()
    fs, root = place.fs()
    assert not fs.exists(f"{root}/mp-1.zarr/new")
    filesystem.ZarrCacheFileSystem.clear_instance_cache()
    del fs
    fs, root = place.fs()
    fs.invalidate_cache()
    assert fs.exists(f"{root}/mp-1.zarr/new")


@REVALIDATE
def test_directories_outside_of_stores_are_always_current(place: _Place, revalidate: str) -> None:
    place.put("a/one", b"1")
    fs, root = place.fs(revalidate)
    assert fs.ls(f"{root}/a", detail=False) == [f"{root}/a/one"]
    place.put("a/two", b"22")
    place.put("a/one", b"333")
    place.write("late.zarr", 1)
    assert fs.du(f"{root}/a", total=False) == {f"{root}/a/one": 3, f"{root}/a/two": 2}
    assert fs.cat_file(f"{root}/a/one") == b"333"
    assert fs.glob(f"{root}/*.zarr") == [f"{root}/late.zarr"]
    place.remove("a")
    assert not fs.exists(f"{root}/a/one")


@pytest.mark.parametrize("name", ["big.bin", "mp-1.zarr/big"])
def test_an_open_file_is_never_read_from_two_versions(place: _Place, name: str) -> None:
    """Neither through a file object, nor a pickled one, nor in ranges of one call."""
    size, block = 300_000, 64 * 1024
    place.put(name, b"1" * size)
    fs, root = place.fs("epoch", bytes={"block_size": block})
    path = f"{root}/{name}"
    with fs.open(path, cache_type="none") as file, fs.open(path) as other:
        assert file.read(10) == b"1" * 10
        pickled = pickle.dumps(other)
        place.put(name, b"2" * size)
        file.seek(200_000)
        with pytest.raises(IncompleteArrayError):
            file.read(10)
    with pytest.raises(IncompleteArrayError, match="Open it again"):
        pickle.loads(pickled)
    with fs.open(path) as file:
        assert pickle.loads(pickle.dumps(file)).read() == b"2" * size
    fs.open(path).close()
    parts = fs.cat_ranges([path] * 3, [0, 100_000, -5], [5, 100_005, size])
    assert parts == [b"2" * 5] * 3


def test_errors_of_the_origin_are_not_absence(
    s3_server: S3Server, bucket: str, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """No method answers False, nothing or "not found" if S3 does not answer."""
    s3_server.put(f"s3://{bucket}/a/x", b"1")
    small_group(tmp_path / "mp-1.zarr")
    s3_server.put_tree(tmp_path / "mp-1.zarr", f"s3://{bucket}/mp-1.zarr")
    fs = fsspec.filesystem(
        "zarrcache",
        target_protocol="s3",
        target_options=s3_server.kwargs_at(fault_proxy.endpoint_url),
        dir=str(tmp_path / "cache"),
        retry={"attempts": 1},
        min_free=0,
    )
    assert fs.exists(f"{bucket}/a/x")
    calls: list[Callable[[str], Any]] = [
        *(fs.exists, fs.isdir, fs.isfile, fs.info, fs.ls, fs.find, fs.du, fs.cat_file, fs.open),
        lambda path: fs.expand_path(path, recursive=True),
        lambda path: fs.glob(f"{path}/*"),
        lambda path: list(fs.walk(path)),
    ]
    for fault in ("500", "403", "404:NoSuchBucket"):
        fault_proxy.rules(Rule(then=fault))
        for path in (bucket, f"{bucket}/a/x", f"{bucket}/b", f"{bucket}/mp-1.zarr/.zattrs"):
            for call in calls:
                with pytest.raises((OriginError, IncompleteArrayError)) as caught:
                    call(path)
                assert not isinstance(
                    caught.value, (FileNotFoundError, NotADirectoryError, IsADirectoryError)
                ), (fault, path, call)


def _plain(place: _Place) -> dict[str, Any]:
    options = place.options()
    return {**options.get("s3", {}), "use_listings_cache": False} if "s3" in options else {}


def _read(place: _Place, key: str) -> bytes:
    with fsspec.open(f"{place.url}/{key}", **_plain(place)) as file:
        data: bytes = file.read()
    return data
