"""Credentials on a server that checks them: refused by name, at once, and never taken for a missing
store.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.faultproxy import FaultProxy
from tests.support.readers import make_reader
from tests.support.s3server import S3Server
from tests.support.training import write_pairs
from zarrcache import ZarrS3Reader
from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig
from zarrcache.errors import OriginAccessError
from zarrcache.origin import Origin, open_origin

LISTED = ObjectInfo("mp-0.zarr/.zgroup", 20, "x")
ASK = {
    "LIST": lambda origin: origin.list_objects("mp-0.zarr/"),
    "names": lambda origin: origin.list_names(),
    "GET": lambda origin: [*origin.fetch([LISTED])],
}


@pytest.fixture(autouse=True)
def strict(s3_server: S3Server) -> None:
    """A server that checks credentials."""
    if not s3_server.checks_credentials:
        pytest.skip('moto takes any credentials; a gateway does not: eval "$(tools/rgw up)"')


@pytest.fixture
def url(s3_server: S3Server, bucket: str, tmp_path: Path) -> str:
    """A pair of stores in a private bucket."""
    write_pairs(tmp_path, 1)
    for role in ("data", "label"):
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
    return f"s3://{bucket}/data"


@pytest.fixture(params=["s3fs", "obstore"])
def engine(request: pytest.FixtureRequest) -> str:
    """Both engines; they see the same answers in different forms."""
    return str(request.param)


def opened(url: str, engine: str, proxy: FaultProxy, **s3_kwargs: Any) -> Origin:
    """The origin, behind a proxy that counts requests."""
    return open_origin(
        url,
        s3_kwargs={"endpoint_url": proxy.endpoint_url, **s3_kwargs},
        fetch=FetchConfig(engine=engine),
    )


@pytest.mark.parametrize("op", ASK)
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"secret": "of-somebody-else"}, "SignatureDoesNotMatch (403)"),
        ({"key": "NOBODY", "secret": "of-nobody"}, "InvalidAccessKeyId (403)"),
        (
            {"anon": True, "key": None, "secret": None},
            "The bucket is not public: remove anon: true from s3_kwargs",
        ),
    ],
    ids=["wrong secret", "unknown key", "anonymous"],
)
def test_a_server_that_refuses_is_quoted_after_one_request(
    url: str,
    engine: str,
    s3_server: S3Server,
    fault_proxy: FaultProxy,
    op: str,
    wrong: dict[str, Any],
    words: str,
) -> None:
    """The error says which part is wrong, where, and what to do, and holds no secret."""
    credentials = {
        name: value
        for name, value in {"key": s3_server.key, "secret": s3_server.secret, **wrong}.items()
        if value is not None
    }
    with pytest.raises(OriginAccessError) as caught:
        ASK[op](opened(url, engine, fault_proxy, **credentials))
    assert str(caught.value).startswith(url)
    assert words in str(caught.value)
    assert not [
        value
        for value in credentials.values()
        if isinstance(value, str) and value in str(caught.value)
    ]
    assert fault_proxy.count() == 1


def test_a_public_bucket_is_read_without_credentials(
    url: str, engine: str, bucket: str, s3_server: S3Server, fault_proxy: FaultProxy
) -> None:
    """Listed and fetched under the policy of a public data set, without an Authorization header."""
    allow = {"Effect": "Allow", "Principal": "*"}
    statements = [
        {**allow, "Action": ["s3:ListBucket"], "Resource": [f"arn:aws:s3:::{bucket}"]},
        {**allow, "Action": ["s3:GetObject"], "Resource": [f"arn:aws:s3:::{bucket}/*"]},
    ]
    s3_server.client().put_bucket_policy(
        Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": statements})
    )
    origin = opened(url, engine, fault_proxy, anon=True)
    objects = origin.list_objects("mp-0.zarr/")
    assert len(objects) > 5
    assert origin.list_names() == ["mp-0.zarr"]
    assert {obj.key: len(memoryview(body)) for obj, body in origin.fetch(objects)} == {
        obj.key: obj.size_bytes for obj in objects
    }
    assert not [
        seen for seen in fault_proxy.seen() if "authorization" in map(str.lower, seen.headers)
    ]


def test_a_chunk_that_may_not_be_read_is_an_error_and_no_fill_value(
    url: str, engine: str, bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    """The bucket may be listed but one object not read: the error names it, and nothing of the
    store is cached.
    """
    denied = f"{bucket}/data/mp-0.zarr/charge_density_total/*"
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": ["s3:GetObject"],
        "Resource": [f"arn:aws:s3:::{denied}"],
    }
    s3_server.client().put_bucket_policy(
        Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    )
    reader = reader_of(url, tmp_path, engine, s3_server.s3_kwargs)
    with pytest.raises(
        OriginAccessError,
        match=f"{url}/mp-0.zarr/charge_density_total/.* access refused: AccessDenied",
    ):
        reader.load("mp-0", "data")
    s3_server.client().delete_bucket_policy(Bucket=bucket)
    want = write_pairs(tmp_path / "again", 1)["mp-0", "data"].ravel()
    assert np.array_equal(reader.load("mp-0", "data")[0], want)


def reader_of(url: str, tmp_path: Path, engine: str, s3_kwargs: dict[str, Any]) -> ZarrS3Reader:
    """As a training run makes it."""
    cache = {"fetch": {"engine": engine}}
    return make_reader(tmp_path, url.removesuffix("/data"), s3_kwargs=s3_kwargs, cache=cache)


def test_wrong_credentials_shrink_no_split_and_leave_nothing_behind(
    url: str, engine: str, s3_server: S3Server, tmp_path: Path
) -> None:
    """The run stops with an error; with correct credentials the same cache directory works."""
    with pytest.raises(OriginAccessError, match="Check the secret key"):
        _ = reader_of(
            url, tmp_path, engine, {**s3_server.s3_kwargs, "secret": "of-somebody-else"}
        ).task_ids
    reader = reader_of(url, tmp_path, engine, s3_server.s3_kwargs)
    assert reader.task_ids == ["mp-0"]
    assert np.array_equal(
        reader.load("mp-0", "data")[0], write_pairs(tmp_path / "again", 1)["mp-0", "data"].ravel()
    )
