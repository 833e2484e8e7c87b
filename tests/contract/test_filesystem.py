"""``zarrcache::`` URLs: the byte tier on its own, as fsspec and zarr use it."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server, running_server
from tests.support.stores import plain_read, small_group
from zarrcache.errors import ConfigError, IncompleteArrayError
from zarrcache.filesystem import ZarrCacheFileSystem

BODY = bytes(range(256)) * 1024


@pytest.fixture
def options(s3_server: S3Server, tmp_path: Path) -> dict[str, Any]:
    """What a user passes besides the URL."""
    return {
        "s3": s3_server.s3_kwargs,
        "zarrcache": {"dir": str(tmp_path / "cache"), "bytes": {"block_size": "64 KiB"}},
    }


def test_a_file_is_read_through_the_cache(
    s3_server: S3Server, bucket: str, options: dict[str, Any]
) -> None:
    """Read whole, in part and line by line; the second read asks S3 only whether the object has
    changed.
    """
    s3_server.put(f"s3://{bucket}/a/x.bin", BODY)
    url = f"zarrcache::s3://{bucket}/a/x.bin"
    with fsspec.open(url, **options) as file:
        assert file.read() == BODY
    with fsspec.open(url, **options) as file:
        file.seek(100_000)
        assert file.read(300) == BODY[100_000:100_300]
    fs, path = fsspec.url_to_fs(url, **options)
    assert fs.cat_file(path) == BODY
    assert fs.cat_file(path, -10) == BODY[-10:]
    assert fs.cat_ranges([path, path], [0, 70_000], [5, 70_005]) == [BODY[:5], BODY[70_000:70_005]]
    fetched = fs.stats.fetched_bytes
    assert fetched == len(BODY)
    fs.cat_file(path)
    assert fs.stats.fetched_bytes == fetched


def test_listing_looks_like_any_filesystem(
    s3_server: S3Server, bucket: str, options: dict[str, Any], put_store: Callable[..., Any]
) -> None:
    """ls, info, exists, find and isdir agree with s3fs."""
    s3_server.put(f"s3://{bucket}/a/x.bin", BODY)
    put_store(f"s3://{bucket}/a/mp-1.zarr")
    fs, _ = fsspec.url_to_fs(f"zarrcache::s3://{bucket}/a", **options)
    plain = s3_server.fs()
    for directory in (
        f"{bucket}/a",
        f"{bucket}/a/mp-1.zarr",
        f"{bucket}/a/mp-1.zarr/charge_density_total",
    ):
        assert sorted(fs.ls(directory, detail=False)) == sorted(plain.ls(directory, detail=False))
        assert sorted(fs.find(directory)) == sorted(plain.find(directory))
        assert fs.isdir(directory)
        assert not fs.isfile(directory)
    assert fs.info(f"{bucket}/a/x.bin")["size"] == len(BODY)
    assert fs.exists(f"{bucket}/a/mp-1.zarr/.zattrs")
    assert not fs.exists(f"{bucket}/a/nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        fs.cat_file(f"{bucket}/a/nothing")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="v2"),
        pytest.param({"zarr_format": 3}, id="v3", marks=pytest.mark.slow),
        pytest.param({"zarr_format": 3, "chunks": (2, 2, 2), "shards": (4, 4, 4)}, id="v3 sharded"),
        pytest.param({"consolidated": True}, id="v2 consolidated", marks=pytest.mark.slow),
    ],
)
def test_zarr_opens_the_url_and_again_without_s3(tmp_path: Path, layout: dict[str, Any]) -> None:
    """``zarr.open_group("zarrcache::…")`` equals a plain read, and a second process needs no
    server.
    """
    small_group(tmp_path / "mp-1.zarr", **layout)
    expected = plain_read(tmp_path / "mp-1.zarr")
    cache = {"dir": str(tmp_path / "cache")}
    with running_server(tmp_path / "log") as server:
        bucket = server.new_bucket()
        server.put_tree(tmp_path / "mp-1.zarr", f"s3://{bucket}/mp-1.zarr")
        url, options = (
            f"zarrcache::s3://{bucket}/mp-1.zarr",
            {"s3": server.s3_kwargs, "zarrcache": cache},
        )
        group = zarr.open_group(url, mode="r", storage_options=options)
        assert np.array_equal(np.asarray(group["charge_density_total"][...]), expected)
    code = (
        "import sys, json, numpy, zarr\n"
        "url, options, path = json.loads(sys.argv[1])\n"
        "group = zarr.open_group(url, mode='r', storage_options=options)\n"
        "assert numpy.array_equal(group['charge_density_total'][...], numpy.load(path))\n"
    )
    np.save(tmp_path / "expected.npy", expected)
    import json

    subprocess.run(
        [sys.executable, "-c", code, json.dumps([url, options, str(tmp_path / "expected.npy")])],
        check=True,
        timeout=120,
    )


def test_local_files_work_alike(tmp_path: Path) -> None:
    """A network file system is an origin too."""
    (tmp_path / "x.bin").write_bytes(BODY)
    with fsspec.open(
        f"zarrcache::file://{tmp_path}/x.bin", zarrcache={"dir": str(tmp_path / "cache")}
    ) as file:
        assert file.read() == BODY
    assert any((tmp_path / "cache" / "zarrcache-v1" / "bytes").glob("*/*"))


def test_local_directories_are_listed_as_by_fsspec(tmp_path: Path) -> None:
    """With directories that are empty, links, and paths that are relative or have a protocol."""
    small_group(tmp_path / "data" / "mp-1.zarr")
    (tmp_path / "data" / "empty").mkdir()
    (tmp_path / "data" / "x.bin").write_bytes(BODY)
    (tmp_path / "data" / "link").symlink_to("x.bin")
    (tmp_path / "data" / "broken").symlink_to("nothing")
    ours = fsspec.filesystem(
        "zarrcache", target_protocol="file", dir=str(tmp_path / "cache"), min_free=0
    )
    plain = fsspec.filesystem("file")
    root = str(tmp_path / "data")
    for path in (root, f"file://{root}", f"{root}/mp-1.zarr", f"{root}/x.bin", f"{root}/empty"):
        listed = {
            info["name"]: (info["size"], info["type"]) for info in plain.ls(path, detail=True)
        }
        for info in ours.ls(path):
            size, kind = listed.pop(info["name"])
            assert info["type"] == ("file" if info["name"].endswith("link") else kind)
            assert info["size"] == (0 if kind == "directory" else size)
        assert [name for name in listed if not name.endswith("broken")] == []
        for name in ("exists", "isdir", "isfile"):
            assert getattr(ours, name)(path) == getattr(plain, name)(path)
    assert set(plain.find(root)) - set(ours.find(root)) == {f"{root}/broken"}
    for pattern in (f"{root}/*.bin", f"{root}/**/.zarray", f"{root}/mp-*/*/", f"{root}/[e-m]*"):
        assert ours.glob(pattern) == plain.glob(pattern)
    assert ours.modified(f"{root}/x.bin") == plain.modified(f"{root}/x.bin")
    assert ours.find(root, maxdepth=1, prefix="x") == [f"{root}/x.bin"]
    assert ours.unstrip_protocol(root) == plain.unstrip_protocol(root)
    with pytest.raises(FileNotFoundError):
        ours.ls(f"{root}/nothing")
    with pytest.raises(IsADirectoryError):
        ours.open(root)
    assert ours._parent(f"{root}/x.bin") == root


def test_the_byte_tier_can_be_off(
    s3_server: S3Server, bucket: str, options: dict[str, Any]
) -> None:
    s3_server.put(f"s3://{bucket}/x.bin", BODY)
    options["zarrcache"]["bytes"] = {"enabled": False}
    fs, path = fsspec.url_to_fs(f"zarrcache::s3://{bucket}/x.bin", **options)
    assert fs.cat_file(path, 100, 300) == BODY[100:300]
    assert fs.open(path).read() == BODY
    assert fs.cat_file(path, -3) == BODY[-3:]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_bucket_that_is_gone_while_a_file_is_open_is_not_a_file_that_is_missing(
    s3_server: S3Server, bucket: str, options: dict[str, Any], enabled: bool
) -> None:
    """Also for a file outside of stores: a reader would take it for a chunk without values."""
    s3_server.put(f"s3://{bucket}/x.bin", BODY)
    options["zarrcache"]["bytes"] = {"enabled": enabled}
    fs, path = fsspec.url_to_fs(f"zarrcache::s3://{bucket}/x.bin", **options)
    with fs.open(path) as file:
        s3_server.delete(f"s3://{bucket}/x.bin")
        s3_server.client().delete_bucket(Bucket=bucket)
        with pytest.raises(IncompleteArrayError, match=f"there is no bucket '{bucket}'"):
            file.read()


def test_options_can_be_used_again_and_in_chains(
    s3_server: S3Server, bucket: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The same mapping for several URLs, of fsspec and of zarr, and one file system in others."""
    small_group(tmp_path / "mp-1.zarr")
    s3_server.put_tree(tmp_path / "mp-1.zarr", f"s3://{bucket}/mp-1.zarr")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inner.txt", "inner")
    s3_server.put_tree(tmp_path / "a.zip", f"s3://{bucket}/a.zip")
    url = f"zarrcache::s3://{bucket}/mp-1.zarr"
    for _ in range(2):
        group = zarr.open_group(url, mode="r", storage_options=options)
        assert group["charge_density_total"].shape == (12, 10, 8)
        with fsspec.open(f"{url}/.zattrs", **options) as file:
            assert file.read() == (tmp_path / "mp-1.zarr" / ".zattrs").read_bytes()
        with fsspec.open(f"zip://inner.txt::zarrcache::s3://{bucket}/a.zip", **options) as file:
            assert file.read() == b"inner"
        chain = {**options, "simplecache": {"cache_storage": str(tmp_path / "simple")}}
        with fsspec.open(f"simplecache::{url}/.zattrs", **chain) as file:
            assert file.read() == (tmp_path / "mp-1.zarr" / ".zattrs").read_bytes()
        mapper = fsspec.get_mapper(url, **options)
        assert set(mapper) >= {".zattrs", ".zgroup", "charge_density_total/.zarray"}
        assert zarr.open_group(zarr.storage.FsspecStore.from_mapper(mapper), mode="r")
        assert [file.path for file in fsspec.open_files(f"{url}/.z*", **options)] == [
            f"{bucket}/mp-1.zarr/{name}" for name in (".zattrs", ".zgroup")
        ]
    with pytest.raises(ConfigError, match="not simplecache"):
        fsspec.open(f"zarrcache::simplecache::s3://{bucket}/x", **options)
    with pytest.raises(ValueError, match="local_file"):
        fsspec.open_local(f"{url}/.zattrs", **options)


@pytest.mark.parametrize("urls", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_urls_share_one_cache(tmp_path: Path, urls: int) -> None:
    """Also in other threads and with options that are written differently: no descriptors or
    connections of their own, and stores in memory only while they are used.
    """
    stores, keys = urls // 10, 10
    for i in range(stores):
        (tmp_path / "data" / f"mp-{i}.zarr").mkdir(parents=True)
        for j in range(keys):
            (tmp_path / "data" / f"mp-{i}.zarr" / f"k{j}").touch()
    dirs = [str(tmp_path / "cache"), tmp_path / "cache", f"{tmp_path}/./cache"]

    def open_one(i: int, j: int) -> None:
        options = {"dir": dirs[j % 3], "min_free": 0}
        url = f"zarrcache::file://{tmp_path}/data/mp-{i}.zarr/k{j}"
        fs, path = fsspec.url_to_fs(url, zarrcache=options)
        assert fs.info(path)["size"] == 0

    open_one(0, 0)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(open_one, range(8), range(8)))
    instances, descriptors = len(ZarrCacheFileSystem._cache), len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    try:
        for i in range(stores):
            for j in range(keys):
                open_one(i, j)
        used_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(ZarrCacheFileSystem._cache) <= instances + 3
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 3
    assert used_bytes < 8 * 2**20


def test_buckets_that_were_read_keep_no_connections(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zarrcache.cache.cache._MAX_ORIGINS", 2)
    cache = {"dir": str(tmp_path / "cache"), "min_free": 0}
    fs = fsspec.filesystem(
        "zarrcache", target_protocol="s3", target_options=s3_server.s3_kwargs, **cache
    )
    descriptors = []
    for _ in range(6):
        bucket = s3_server.new_bucket()
        s3_server.put(f"s3://{bucket}/x", b"1")
        assert fs.cat_file(f"{bucket}/x") == b"1"
        gc.collect()
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert descriptors[-1] <= descriptors[2] + 2


def test_threads_that_open_a_store_together_list_it_once(
    s3_server: S3Server, bucket: str, options: dict[str, Any], tmp_path: Path
) -> None:
    values = small_group(tmp_path / "mp-1.zarr")["charge_density_total"]
    s3_server.put_tree(tmp_path / "mp-1.zarr", f"s3://{bucket}/mp-1.zarr")
    log = RequestLog(s3_server, bucket)

    def read(_: int) -> bool:
        group = zarr.open_group(
            f"zarrcache::s3://{bucket}/mp-1.zarr", mode="r", storage_options=options
        )
        return np.array_equal(np.asarray(group["charge_density_total"][...]), values)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(8)))
    requests = log.seen()
    # A store that was just written is listed until two listings agree.
    assert [request.op for request in requests].count("LIST") == 2
    keys = [request.path for request in requests if request.op == "GET"]
    assert len(keys) == len(set(keys))


def test_a_forked_child_and_a_pickle_read_too(
    s3_server: S3Server, bucket: str, options: dict[str, Any]
) -> None:
    """The instance of the parent, after the parent has read with it."""
    s3_server.put(f"s3://{bucket}/x.bin", BODY)
    fs, path = fsspec.url_to_fs(f"zarrcache::s3://{bucket}/x.bin", **options)
    assert fs.cat_file(path) == BODY
    copy = pickle.loads(pickle.dumps(fs))
    assert copy == fs
    s3_server.put(f"s3://{bucket}/x.bin", BODY[::-1])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(
                write,
                fs.cat_file(path, 0, 9)
                + fsspec.open(f"zarrcache::s3://{bucket}/x.bin", **options).open().read(9),
            )
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == BODY[::-1][:9] * 2
    os.waitpid(child, 0)


def test_it_is_used_asynchronously_through_the_wrapper_of_fsspec(
    s3_server: S3Server, bucket: str, options: dict[str, Any]
) -> None:
    """As zarr does."""
    s3_server.put(f"s3://{bucket}/x.bin", BODY)
    fs, path = fsspec.url_to_fs(f"zarrcache::s3://{bucket}/x.bin", **options)
    wrapped = AsyncFileSystemWrapper(fs, asynchronous=True)

    async def read() -> list[Any]:
        return list(
            await asyncio.gather(
                wrapped._cat_file(path),
                wrapped._exists(path),
                wrapped._ls(bucket, detail=False),
                wrapped._cat_ranges([path], [1], [3]),
            )
        )

    assert asyncio.run(read()) == [BODY, True, [path], [BODY[1:3]]]


def test_unsupported_operations_raise_errors_that_say_so() -> None:
    """Another protocol, a missing directory, writing."""
    with pytest.raises(ConfigError, match="zarrcache::s3://bucket/key"):
        ZarrCacheFileSystem("gs", {})
    with pytest.raises(ConfigError, match=r"cache\.dir is missing"):
        ZarrCacheFileSystem("s3", {})


def test_writing_is_refused(bucket: str, options: dict[str, Any]) -> None:
    with (
        pytest.raises(ValueError, match="is read-only"),
        fsspec.open(f"zarrcache::s3://{bucket}/x", mode="wb", **options),
    ):
        pass
