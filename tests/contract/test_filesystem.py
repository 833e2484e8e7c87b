"""``zarrcache::`` URLs: the byte tier on its own, as fsspec and zarr use it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr

from tests.support.s3server import S3Server, running_server
from tests.support.stores import plain_read
from zarrcache.errors import ConfigError
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
def test_zarr_opens_the_url_and_again_without_s3(
    tmp_path: Path, layout: dict[str, Any], small_group: Callable[..., Any]
) -> None:
    """``zarr.open_group("zarrcache::…")`` equals a plain read, and a second process needs no
    server.
    """
    small_group("mp-1.zarr", **layout)
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
