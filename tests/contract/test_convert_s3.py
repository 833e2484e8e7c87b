"""Conversions to S3: the same bytes as in a directory, visible only when complete, and a clear
error when the server refuses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from tests.support.chgcars import SMALL
from tests.support.faultproxy import FaultProxy, Rule, Seen, running_proxy
from tests.support.s3server import S3Server, running_server
from tests.support.stores import plain_read
from zarrcache.config import RetryConfig
from zarrcache.convert.density import read_density
from zarrcache.convert.plan import convert_directory, plan_convert
from zarrcache.convert.upload import S3Destination
from zarrcache.convert.writer import StoreExistsError, encode_store, is_document
from zarrcache.demo.synthetic import make_pair, write_pairs
from zarrcache.errors import OriginAccessError, OriginNotFoundError, OriginUnavailableError

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")

IDS = [f"syn-{SMALL}-0000", f"syn-{SMALL}-0001"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two small densities as text."""
    write_pairs(tmp_path / "pairs", 2, seed=SMALL)
    return tmp_path / "pairs" / "label"


@pytest.fixture(scope="module")
def _proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with running_proxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def proxy(_proxy: FaultProxy) -> FaultProxy:
    """A proxy in front of the server, with its counts at 0."""
    _proxy.reset()
    return _proxy


def _download(server: S3Server, url: str, to: Path) -> Path:
    """A store as a local copy, made with boto3 alone."""
    bucket, _, root = url.removeprefix("s3://").partition("/")
    client = server.client()
    for key in server.keys(url):
        path = to / key.removeprefix(root).lstrip("/") if key != root else to
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    return to


def _small_store(seed: int = 0, chunks: int = 4) -> dict[str, bytes]:
    pair = make_pair(seed, 0, shape=(12, 12, 12))
    return encode_store(pair.label, None, pair.structure, {"task_id": "mp-1"}, chunks=(chunks,) * 3)


@pytest.mark.parametrize(
    ("zarr_format", "as_zip", "workers"),
    [(2, False, 2), (3, False, 1), (2, True, 1), pytest.param(3, True, 1, marks=pytest.mark.slow)],
)
def test_s3_gets_the_bytes_that_a_directory_gets(
    s3_server: S3Server,
    bucket: str,
    source: Path,
    tmp_path: Path,
    zarr_format: Literal[2, 3],
    as_zip: bool,
    workers: int,
) -> None:
    """Object by object, in both formats, as trees and as zip files; zarr reads the values from a
    copy.
    """
    options: dict[str, Any] = {"zarr_format": zarr_format, "zip": as_zip}
    report = convert_directory(
        source,
        f"s3://{bucket}/some/prefix/",
        s3_kwargs=s3_server.s3_kwargs,
        workers=workers,
        **options,
    )
    assert [result.task_id for result in report.converted] == IDS
    assert report.failed == ()
    local = convert_directory(source, tmp_path / "local", workers=1, **options)
    for result, beside in zip(report.converted, local.converted, strict=True):
        copy = _download(s3_server, result.target, tmp_path / "copy" / Path(result.target).name)
        assert _tree(copy) == _tree(Path(beside.target))
        assert result.written_bytes == beside.written_bytes
        assert np.array_equal(plain_read(copy), read_density(result.path).total)


def _tree(root: Path) -> dict[str, bytes]:
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in [root, *root.rglob("*")]
        if p.is_file()
    }


def test_a_finished_store_is_skipped_for_two_lists_a_head_and_a_get(
    s3_server: S3Server, bucket: str, source: Path, proxy: FaultProxy
) -> None:
    """No PUT, and no chunk is read; the missing store is converted. The second LIST and the GET of
    the attributes show that the store is whole and of which file.
    """
    url, kwargs = f"s3://{bucket}/label", s3_server.kwargs_at(proxy.endpoint_url)
    convert_directory(source / f"{IDS[0]}.CHGCAR", url, s3_kwargs=kwargs)
    proxy.reset()
    plan = plan_convert(source, url, s3_kwargs=kwargs)
    assert [path.name for path in plan.skipped] == [f"{IDS[0]}.CHGCAR"]
    assert (proxy.count("LIST"), proxy.count("HEAD"), proxy.count("GET")) == (2, 1, 1)
    assert proxy.count() == 4
    report = plan.execute()
    assert [result.task_id for result in report.converted] == IDS[1:]
    assert plan_convert(source, url, s3_kwargs=kwargs).files == ()


def test_overwriting_leaves_nothing_of_the_old_store(s3_server: S3Server, bucket: str) -> None:
    """The old store had more and different chunks."""
    destination = S3Destination(f"s3://{bucket}/label", s3_server.s3_kwargs)
    old, new = _small_store(seed=1, chunks=3), _small_store(seed=2, chunks=6)
    destination.upload("mp-1.zarr", old)
    with pytest.raises(
        StoreExistsError, match=rf"s3://{bucket}/label/mp-1\.zarr exists already.*--overwrite"
    ):
        destination.upload("mp-1.zarr", new)
    assert s3_server.keys(f"s3://{bucket}/") == sorted(f"label/mp-1.zarr/{key}" for key in old)
    destination.upload("mp-1.zarr", new, overwrite=True)
    assert s3_server.keys(f"s3://{bucket}/") == sorted(f"label/mp-1.zarr/{key}" for key in new)


def test_a_store_whose_name_is_a_prefix_is_not_touched(s3_server: S3Server, bucket: str) -> None:
    """``mp-1.zarr`` is a prefix of ``mp-1.zarr.zip`` and ``mp-1`` of ``mp-10``."""
    destination = S3Destination(f"s3://{bucket}", s3_server.s3_kwargs)
    s3_server.put(f"s3://{bucket}/mp-1.zarr.zip", b"zip")
    s3_server.put(f"s3://{bucket}/mp-10.zarr/.zgroup", b"{}")
    store = _small_store()
    destination.upload("mp-1.zarr", store)
    destination.upload("mp-1.zarr", store, overwrite=True)
    assert s3_server.keys(f"s3://{bucket}/") == sorted(
        ["mp-1.zarr.zip", "mp-10.zarr/.zgroup", *(f"mp-1.zarr/{key}" for key in store)]
    )


def test_the_documents_that_make_a_store_visible_are_sent_last(
    s3_server: S3Server, bucket: str, proxy: FaultProxy
) -> None:
    """Chunks in any order, then the array's metadata, then the group's, in order of arrival at the
    server.
    """
    destination = S3Destination(f"s3://{bucket}", s3_server.kwargs_at(proxy.endpoint_url))
    destination.upload("mp-1.zarr", _small_store())
    destination.upload("mp-1.zarr", _small_store(), overwrite=True)
    sent = [(seen.op, is_document(seen.path)) for seen in proxy.seen("PUT|DELETE")]
    first, takedown, second = ([d for _, d in part] for part in _runs(sent))
    assert first == second == sorted(first)
    # and in the other direction: readers see all of the old store or none
    assert takedown == sorted(takedown, reverse=True)
    puts = [seen.path for seen in proxy.seen("PUT")]
    assert puts[-1].endswith("mp-1.zarr/.zgroup")


def test_objects_are_written_by_obstore_with_a_checksum_and_deleted_by_s3fs(
    s3_server: S3Server, bucket: str, proxy: FaultProxy
) -> None:
    """The delete of obstore is DeleteObjects, which some servers do not have."""
    kwargs = s3_server.kwargs_at(proxy.endpoint_url)
    destination = S3Destination(f"s3://{bucket}", kwargs)
    for _ in range(2):
        destination.upload("mp-1.zarr", _small_store(), overwrite=True)
    assert _agents(proxy, "PUT") == {"object_store"}
    assert _agents(proxy, "DELETE") == {"aiobotocore"}
    assert all("x-amz-checksum-sha256" in _headers(seen) for seen in proxy.seen("PUT"))
    assert proxy.count("POST") == 0
    proxy.reset()
    without = {**kwargs, "config_kwargs": {"request_checksum_calculation": "when_required"}}
    S3Destination(f"s3://{bucket}", without).upload("mp-2.zarr", _small_store())
    assert _agents(proxy, "PUT") == {"object_store"}
    assert not any("x-amz-checksum-sha256" in _headers(seen) for seen in proxy.seen("PUT"))


@pytest.mark.parametrize(
    ("options", "prefix"),
    [({"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}, ""), ({}, "a//b")],
)
def test_s3fs_writes_what_obstore_cannot(
    s3_server: S3Server, bucket: str, proxy: FaultProxy, options: dict[str, Any], prefix: str
) -> None:
    """An option that obstore does not have, and a name that it would change."""
    kwargs = {**s3_server.kwargs_at(proxy.endpoint_url), **options}
    url = f"s3://{bucket}/{prefix}".rstrip("/")
    store = _small_store()
    S3Destination(url, kwargs).upload("mp-1.zarr", store)
    assert _agents(proxy, "PUT") == {"aiobotocore"}
    assert s3_server.keys(url) == sorted(f"{prefix}/mp-1.zarr/{k}".lstrip("/") for k in store)


def _agents(proxy: FaultProxy, op: str) -> set[str]:
    """The libraries that sent these requests."""
    return {_headers(seen)["user-agent"].split("/")[0].lower() for seen in proxy.seen(op)}


def _headers(seen: Seen) -> dict[str, str]:
    return {name.lower(): value for name, value in seen.headers.items()}


def _runs(sent: list[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    import itertools

    for _, part in itertools.groupby(sent, key=lambda item: item[0]):
        yield list(part)


def test_an_unfinished_store_is_neither_skipped_nor_mixed_with_the_new_one(
    s3_server: S3Server, bucket: str, source: Path
) -> None:
    """A killed upload left chunks and array metadata; the next conversion removes them."""
    url = f"s3://{bucket}/label"
    s3_server.put(f"{url}/{IDS[0]}.zarr/charge_density_total/9.9.9", b"left")
    s3_server.put(f"{url}/{IDS[0]}.zarr/charge_density_total/.zarray", b"{}")
    plan = plan_convert(source, url, s3_kwargs=s3_server.s3_kwargs, workers=1)
    assert plan.skipped == ()
    plan.execute()
    assert f"label/{IDS[0]}.zarr/charge_density_total/9.9.9" not in s3_server.keys(url)


@pytest.mark.parametrize("fault", ["503", "500", "429", "reset"])
def test_failed_uploads_are_retried(
    s3_server: S3Server, bucket: str, proxy: FaultProxy, fault: str
) -> None:
    """Each PUT fails once; the store is complete, and no object was sent more often than needed."""
    proxy.rules(Rule((fault,), op="PUT", per_object=True))
    store = _small_store(chunks=6)
    S3Destination(f"s3://{bucket}", s3_server.kwargs_at(proxy.endpoint_url)).upload(
        "mp-1.zarr", store
    )
    assert s3_server.keys(f"s3://{bucket}/") == sorted(f"mp-1.zarr/{key}" for key in store)
    assert proxy.count("PUT") == 2 * len(store)


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("fault", ["frames", "flipped"])
def test_an_upload_that_the_server_stores_otherwise_is_an_error(
    s3_server: S3Server, bucket: str, source: Path, proxy: FaultProxy, fault: str, as_zip: bool
) -> None:
    """One object of the store, always: the run ends, and nothing is left of the store."""
    proxy.rules(Rule(then=fault, op="PUT", key=r"/0\.0\.0$|\.zip$"))
    with pytest.raises(
        OriginUnavailableError,
        # A server that checks the signed digest of the body refuses it itself.
        match=r"\.zarr.* was sent with \d+ bytes and is stored with \d+ bytes that differ.*"
        "request_checksum_calculation: when_required|Mismatch|BadDigest",
    ):
        S3Destination(
            f"s3://{bucket}/label",
            s3_server.kwargs_at(proxy.endpoint_url),
            retry=RetryConfig(attempts=2, timeout=30),
        ).upload(
            "mp-1.zarr.zip" if as_zip else "mp-1.zarr",
            {"": b"zip file"} if as_zip else _small_store(),
        )
    assert s3_server.keys(f"s3://{bucket}/") == []


def test_a_bit_that_flips_once_in_an_upload_is_repaired(
    s3_server: S3Server, bucket: str, proxy: FaultProxy
) -> None:
    proxy.rules(Rule(("flipped",), op="PUT", per_object=True))
    store = _small_store(chunks=6)
    S3Destination(f"s3://{bucket}", s3_server.kwargs_at(proxy.endpoint_url)).upload(
        "mp-1.zarr", store
    )
    client = s3_server.client()
    for key, body in store.items():
        stored = client.get_object(Bucket=bucket, Key=f"mp-1.zarr/{key}")["Body"].read()
        assert stored == body


def test_where_the_etag_is_no_md5_each_object_is_read_back(
    s3_server: S3Server, bucket: str, proxy: FaultProxy
) -> None:
    """With SSE-KMS for example; an MD5 costs no further request."""
    store = _small_store(chunks=6)
    destination = S3Destination(f"s3://{bucket}", s3_server.kwargs_at(proxy.endpoint_url))
    destination.upload("mp-1.zarr", store)
    assert proxy.count("GET") == 0
    proxy.reset()
    proxy.rules(Rule(then="opaque", op="PUT"))
    destination.upload("mp-2.zarr", store)
    assert (proxy.count("GET"), proxy.count("PUT")) == (len(store), len(store))
    proxy.rules(Rule(then="opaque", op="PUT"), Rule(then="corrupt", op="GET", key="/0.0.0$"))
    with pytest.raises(OriginUnavailableError, match="bytes that differ"):
        S3Destination(
            f"s3://{bucket}",
            s3_server.kwargs_at(proxy.endpoint_url),
            retry=RetryConfig(attempts=2, timeout=30),
        ).upload("mp-3.zarr", store)


@pytest.mark.parametrize(("as_zip", "zarr_format"), [(False, 2), (False, 3), (True, 2)])
def test_a_store_on_s3_that_is_not_whole_or_of_another_file_is_not_skipped(
    s3_server: S3Server, bucket: str, source: Path, as_zip: bool, zarr_format: Literal[2, 3]
) -> None:
    options: dict[str, Any] = {
        "s3_kwargs": s3_server.s3_kwargs,
        "zip": as_zip,
        "zarr_format": zarr_format,
        "chunks": 8,
    }
    url = f"s3://{bucket}/label"
    convert_directory(source, url, workers=1, **options)
    assert len(plan_convert(source, url, **options).skipped) == 2
    if not as_zip:
        prefix = f"{url}/{IDS[0]}.zarr/charge_density_total"
        name = next(k for k in s3_server.keys(prefix) if k.endswith(("1.1.1", "c/1/1/1")))
        s3_server.client().delete_object(Bucket=bucket, Key=name)
        plan = plan_convert(source, url, workers=1, **options)
        assert [path.name for path in plan.files] == [f"{IDS[0]}.CHGCAR"]
        (done,) = plan.execute().converted
        assert "was incomplete" in done.warnings[-1]
        assert name in s3_server.keys(prefix)
    other = source.parent / "other" / f"{IDS[0]}.CHGCAR"
    other.parent.mkdir()
    other.write_bytes((source / f"{IDS[1]}.CHGCAR").read_bytes())
    (failed,) = convert_directory(other, url, **options).failed
    assert f"{url}/{IDS[0]}.zarr" in (failed.error or "")
    assert "was made from another file" in (failed.error or "")


def test_a_server_that_fails_while_stores_are_compared_ends_the_plan(
    s3_server: S3Server, bucket: str, source: Path, proxy: FaultProxy
) -> None:
    """It is not taken for a store that cannot be read."""
    url, kwargs = f"s3://{bucket}/label", s3_server.kwargs_at(proxy.endpoint_url)
    convert_directory(source, url, s3_kwargs=kwargs, workers=1, chunks=64)
    proxy.rules(Rule(then="403", op="GET", key="zattrs"))
    with pytest.raises(OriginAccessError, match=rf"{url}/.*403"):
        plan_convert(source, url, s3_kwargs=kwargs)


def test_an_upload_that_fails_is_removed(
    s3_server: S3Server, bucket: str, proxy: FaultProxy
) -> None:
    """The attempts are bounded, the error names the store, and no object of it remains."""
    proxy.rules(Rule(then="503", op="PUT", key=r"/2\.\d\.\d$"))
    destination = S3Destination(
        f"s3://{bucket}",
        s3_server.kwargs_at(proxy.endpoint_url),
        retry=RetryConfig(attempts=2, timeout=30),
    )
    with pytest.raises(
        OriginUnavailableError,
        match=rf"s3://{bucket}/mp-1\.zarr could not be written: .*503.*2 attempts.*convert again",
    ):
        destination.upload("mp-1.zarr", _small_store())
    assert len([seen for seen in proxy.seen("PUT") if re.search(r"/2\.0\.0$", seen.path)]) == 2
    assert s3_server.keys(f"s3://{bucket}/") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_credentials_that_may_not_write_end_the_run_at_once(
    s3_server: S3Server, bucket: str, source: Path, proxy: FaultProxy, workers: int
) -> None:
    """Every file would fail alike; the error names the store and the missing permissions."""
    proxy.rules(Rule(then="403", op="PUT"))
    with pytest.raises(
        OriginAccessError,
        match=rf"s3://{bucket}/label/.*\.zarr: writing was refused: "
        rf".*403.*s3:PutObject.*'{bucket}'",
    ):
        convert_directory(
            source,
            f"s3://{bucket}/label",
            s3_kwargs=s3_server.kwargs_at(proxy.endpoint_url),
            workers=workers,
        )
    assert s3_server.keys(f"s3://{bucket}/") == []


def test_a_bucket_that_does_not_exist_is_named_by_the_plan(
    s3_server: S3Server, source: Path
) -> None:
    """By the plan, so a dry run finds it too."""
    with pytest.raises(
        OriginNotFoundError, match=r"there is no bucket 'no-such-bucket' at http://127.0.0.1"
    ):
        plan_convert(source, "s3://no-such-bucket/label", s3_kwargs=s3_server.s3_kwargs)


def test_an_endpoint_that_refuses_connections_is_named(
    s3_server: S3Server, bucket: str, proxy: FaultProxy
) -> None:
    """The error says what to check."""
    proxy.down()
    destination = S3Destination(
        f"s3://{bucket}/label",
        s3_server.kwargs_at(proxy.endpoint_url),
        retry=RetryConfig(attempts=1),
    )
    with pytest.raises(
        OriginUnavailableError,
        match=rf"s3://{bucket}/label could not be written: .*Check that the server runs",
    ):
        destination.names()


def test_stores_on_all_pages_of_a_listing_are_found(tmp_path: Path) -> None:
    """With pages of two names. Only complete stores count."""
    with running_server(
        tmp_path / "log", {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "2"}
    ) as server:
        url = f"s3://{server.new_bucket()}/label"
        for n in range(5):
            server.put(f"{url}/mp-{n}.zarr.zip", b"zip")
        server.put(f"{url}/half.zarr/charge_density_total/0.0.0", b"left")
        destination = S3Destination(url, server.s3_kwargs)
        assert destination.names() == {*(f"mp-{n}.zarr.zip" for n in range(5)), "half.zarr"}
        assert destination.finished(
            {"mp-0.zarr.zip", "mp-4.zarr.zip", "mp-5.zarr.zip", "half.zarr"}
        ) == {"mp-0.zarr.zip", "mp-4.zarr.zip"}
        whole = _small_store()
        assert len(whole) > 20
        destination.upload("half.zarr", whole)
        destination.upload("half.zarr", whole, overwrite=True)
        assert destination.finished({"half.zarr"}) == {"half.zarr"}
        assert [k for k in server.keys(url) if "/half.zarr/" in k] == sorted(
            f"label/half.zarr/{key}" for key in whole
        )
