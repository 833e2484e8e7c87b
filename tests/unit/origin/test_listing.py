"""The objects of a LIST are parsed here, the rest of the answer by botocore: both agree."""

from __future__ import annotations

from typing import Any

import botocore.session
import pytest
from botocore.parsers import create_parser

from zarrcache.origin._s3fs import _parse_objects

_HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult'
_S3 = f'{_HEAD} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
_DATE = "<LastModified>2026-01-02T03:04:05.678Z</LastModified>"
_FULL = (
    f"<Contents><Key>a/0.0.0</Key>{_DATE}<ETag>&quot;0123&quot;</ETag><Size>12</Size>"
    "<StorageClass>STANDARD</StorageClass><Owner><ID>1</ID></Owner></Contents>"
)
_BODIES = {
    "as S3": f"{_S3}<IsTruncated>false</IsTruncated><KeyCount>1</KeyCount>{_FULL}"
    "</ListBucketResult>",
    "two, more follow": f"{_S3}{_FULL}<IsTruncated>true</IsTruncated>{_FULL}<NextContinuationToken>"
    "a&amp;b</NextContinuationToken></ListBucketResult>",
    "no namespace": f"{_HEAD}>{_FULL}<IsTruncated>false</IsTruncated></ListBucketResult>",
    "prefixes": f"{_S3}{_FULL}<CommonPrefixes><Prefix>x/</Prefix></CommonPrefixes>"
    "<CommonPrefixes><Prefix>y/</Prefix></CommonPrefixes></ListBucketResult>",
    "encoded keys": f"{_S3}<EncodingType>url</EncodingType><Contents><Key>a%20b%2Bc+d</Key>"
    "<Size>1</Size></Contents></ListBucketResult>",
    "not a letter of ASCII": f"{_S3}<Contents><Key>ü 日</Key><Size>1</Size></Contents>"
    "</ListBucketResult>",
    "fields are missing": f"{_S3}<Contents><Size>1</Size></Contents><Contents><Key>k</Key>"
    "</Contents><Contents/></ListBucketResult>",
    "empty fields": f"{_S3}<Contents><Key/><ETag></ETag><Size>0</Size></Contents>"
    "</ListBucketResult>",
    "pretty": f"{_S3}\n  <Contents>\n    <Key>k</Key>\n    {_DATE}\n    <Size>7</Size>\n  "
    "</Contents>\n</ListBucketResult>",
    "no objects": f"{_S3}<IsTruncated>false</IsTruncated></ListBucketResult>",
    "another document": f"{_HEAD.replace('ListBucketResult', 'Other')}>{_FULL}</Other>",
    "dates of other servers": f"{_S3}<Contents><Key>k</Key><LastModified>Fri, 02 Jan 2026 03:04:05"
    " GMT</LastModified><Size>7</Size></Contents></ListBucketResult>",
}


def _parsed(body: bytes, status: int = 200, *, here: bool) -> Any:
    """The answer as botocore returns it, with or without the objects parsed here."""
    model = botocore.session.Session().get_service_model("s3").operation_model("ListObjectsV2")
    answer = {"status_code": status, "headers": {}, "body": body}
    ours: dict[str, Any] = {}
    if here:
        _parse_objects(answer, ours)
    parsed = create_parser("rest-xml").parse(answer, model.output_shape)
    return {**parsed, **ours}


def _of_interest(parsed: Any) -> Any:
    objects = [
        {name: obj[name] for name in ("Key", "ETag", "Size", "LastModified") if name in obj}
        for obj in parsed.get("Contents", [])
    ]
    return {**parsed, "Contents": objects}


@pytest.mark.parametrize("case", _BODIES)
def test_objects_are_parsed_as_botocore_parses_them(case: str) -> None:
    body = _BODIES[case].encode()
    assert _of_interest(_parsed(body, here=True)) == _of_interest(_parsed(body, here=False))


def test_objects_are_not_parsed_twice() -> None:
    """The test above would pass if nothing were parsed here."""
    answer = {"status_code": 200, "headers": {}, "body": _BODIES["as S3"].encode()}
    ours: dict[str, Any] = {}
    _parse_objects(answer, ours)
    assert [obj["Key"] for obj in ours["Contents"]] == ["a/0.0.0"]
    assert b"Contents" not in answer["body"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        f"{_S3}<Contents><Key>k</Key><Size>many</Size></Contents></ListBucketResult>".encode(),
        f"{_S3}<Contents><Key>k</Key><LastModified>soon</LastModified></Contents>"
        "</ListBucketResult>".encode(),
        f"{_S3}{_FULL}".encode(),
    ],
)
def test_an_answer_that_cannot_be_parsed_is_left_to_botocore(body: bytes) -> None:
    answer = {"status_code": 200, "headers": {}, "body": body}
    ours: dict[str, Any] = {}
    _parse_objects(answer, ours)
    assert (answer["body"], ours) == (body, {})
    if body:
        with pytest.raises(Exception):  # noqa: B017,PT011 the parser's own, or of the number
            _parsed(body, here=True)
