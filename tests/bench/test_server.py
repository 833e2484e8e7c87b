"""The S3 server of the benchmarks answers as S3 does: otherwise its requests, bytes and seconds
would be of something else.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.server import BenchServer, Request, running
from zarrcache.config import FetchConfig
from zarrcache.origin import open_origin

BODIES = {f"data/mp-1.zarr/{i}": bytes([i]) * (i + 1) for i in range(5)} | {
    "data/mp-2.zarr.zip": b"0123456789",
    "data/a&b ü": b"",
    "top": b"t",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with some objects."""
    root = tmp_path_factory.mktemp("bench")
    for key, body in BODIES.items():
        path = root / "bucket" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[BenchServer]:
    """It runs."""
    with running(root) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BenchServer) -> Any:
    """boto3, for an opinion that is not ours."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id="bench",
        aws_secret_access_key="bench",
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 0}),
    )


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_a_list_has_every_key_once_in_its_order(client: Any, page: int) -> None:
    """By pages, with sizes and MD5 sums; and by directories."""
    pages = list(
        client.get_paginator("list_objects_v2").paginate(
            Bucket="bucket", Prefix="data/", PaginationConfig={"PageSize": page}
        )
    )
    found = {
        item["Key"]: (item["Size"], item["ETag"]) for answer in pages for item in answer["Contents"]
    }
    want = {
        key: (len(body), f'"{hashlib.md5(body).hexdigest()}"')
        for key, body in BODIES.items()
        if key.startswith("data/")
    }
    assert list(found.items()) == sorted(want.items())
    pages = list(
        client.get_paginator("list_objects_v2").paginate(
            Bucket="bucket", Prefix="data/", Delimiter="/", PaginationConfig={"PageSize": page}
        )
    )
    names = [
        entry
        for answer in pages
        for entry in (*answer.get("Contents", ()), *answer.get("CommonPrefixes", ()))
    ]
    assert sorted(entry.get("Key") or entry["Prefix"] for entry in names) == [
        "data/a&b ü",
        "data/mp-1.zarr/",
        "data/mp-2.zarr.zip",
    ]


def test_contents_ranges_and_conditions(client: Any) -> None:
    """As S3 answers them."""
    key = {"Bucket": "bucket", "Key": "data/mp-2.zarr.zip"}
    head = client.head_object(**key)
    assert head["ContentLength"] == 10
    for more, body in (
        ({}, b"0123456789"),
        ({"Range": "bytes=2-5"}, b"2345"),
        ({"Range": "bytes=8-99"}, b"89"),
        ({"Range": "bytes=-3"}, b"789"),
    ):
        assert client.get_object(**key, **more, IfMatch=head["ETag"])["Body"].read() == body
    assert client.get_object(Bucket="bucket", Key="data/a&b ü")["Body"].read() == b""


@pytest.mark.parametrize(
    ("status", "code", "arguments"),
    [
        (404, "NoSuchKey", {"Key": "data/absent"}),
        (404, "NoSuchKey", {"Key": "data/mp-1.zarr"}),
        (404, "NoSuchBucket", {"Bucket": "absent", "Key": "x"}),
        (412, "PreconditionFailed", {"Key": "top", "IfMatch": '"other"'}),
        (416, "InvalidRange", {"Key": "top", "Range": "bytes=5-6"}),
    ],
)
def test_errors_are_those_of_s3(
    client: Any, status: int, code: str, arguments: dict[str, str]
) -> None:
    """Their status and their XML."""
    with pytest.raises(client.exceptions.ClientError) as caught:
        client.get_object(**{"Bucket": "bucket", **arguments})
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert caught.value.response["Error"]["Code"] == code


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_it_serves_our_engines_and_logs_what_they_ask(server: BenchServer, engine: str) -> None:
    """One LIST, one GET an object."""
    origin = open_origin(
        "s3://bucket/data", s3_kwargs=server.s3_kwargs, fetch=FetchConfig(engine=engine)
    )
    server.reset_log()
    listed = origin.list_objects("mp-1.zarr/")
    assert {f"data/{obj.key}": bytes(memoryview(body)) for obj, body in origin.fetch(listed)} == {
        k: b for k, b in BODIES.items() if "mp-1" in k
    }
    first, *others = server.log()
    assert (first.op, first.bucket, first.key, first.status) == (
        "LIST",
        "bucket",
        "data/mp-1.zarr/",
        200,
    )
    assert sorted(others, key=lambda request: request.key) == [
        Request("GET", "bucket", k, 200, len(b)) for k, b in BODIES.items() if "mp-1" in k
    ]


def test_a_file_that_was_replaced_is_another_version(
    root: Path, server: BenchServer, client: Any
) -> None:
    """Nothing that it remembers outlives the file."""
    path = root / "bucket" / "top"
    before = client.get_object(Bucket="bucket", Key="top")["ETag"]
    path.with_name("beside").write_bytes(b"changed")
    os.replace(path.with_name("beside"), path)
    assert client.get_object(Bucket="bucket", Key="top")["Body"].read() == b"changed"
    [listed] = client.list_objects_v2(Bucket="bucket", Prefix="top")["Contents"]
    assert listed["ETag"] == f'"{hashlib.md5(b"changed").hexdigest()}"' != before


def test_a_request_takes_at_least_its_latency(server: BenchServer, client: Any) -> None:
    """And the bandwidth is that of all bodies."""
    server.set(latency_s=0.05)
    start = time.perf_counter()
    client.head_object(Bucket="bucket", Key="data/mp-2.zarr.zip")
    assert time.perf_counter() - start >= 0.05
    server.set(latency_s=0, bandwidth_bytes_s=2000)
    start = time.perf_counter()
    client.get_object(Bucket="bucket", Key="data/mp-2.zarr.zip")["Body"].read()
    assert time.perf_counter() - start >= 10 / 2000
    server.set(bandwidth_bytes_s=0)
