"""Credentials that expire are renewed once, where they can be."""

from __future__ import annotations

from typing import Any

import pytest

from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import OriginAccessError
from zarrcache.origin._s3 import Operation, S3Bucket
from zarrcache.origin._s3_errors import S3Error, TransientError

EXPIRED = S3Error(400, "ExpiredToken", "The token has expired.")


def operation(attempts: int, **kwargs: Any) -> tuple[Operation, S3Bucket]:
    retry = RetryConfig(attempts=attempts)
    bucket = S3Bucket("b", kwargs, fetch=FetchConfig(), retry=retry)
    return Operation(bucket), bucket


def raised(one: Operation, bucket: S3Bucket, error: S3Error, engine: object) -> Exception:
    return one.error(error, bucket.context("s3://b/k"), engine)


def test_all_requests_of_the_engine_that_expired_are_repeated_once() -> None:
    one, bucket = operation(2)
    first, second = object(), object()
    bucket._engines[1, "obstore"], bucket._engines[2, "s3fs"] = first, second
    for _ in range(2):  # they were in flight together
        error = raised(one, bucket, EXPIRED, first)
        assert type(error) is TransientError
        assert error.__cause__ is EXPIRED
    assert list(bucket._engines.values()) == [second]
    refused = raised(one, bucket, EXPIRED, second)
    assert type(refused) is OriginAccessError
    assert "log in again" in str(refused)
    assert type(raised(Operation(bucket), bucket, EXPIRED, second)) is TransientError


def test_the_cause_is_that_of_the_library() -> None:
    one, bucket = operation(2)
    error = S3Error(403, "ExpiredToken", "")
    error.__cause__ = library = OSError("from below")
    assert raised(one, bucket, error, object()).__cause__ is library


@pytest.mark.parametrize(
    ("attempts", "kwargs"), [(1, {}), (2, {"key": "k", "secret": "s", "token": "t"})]
)
def test_what_cannot_be_renewed_is_refused_at_once(attempts: int, kwargs: Any) -> None:
    """Keys in s3_kwargs, and a single attempt."""
    one, bucket = operation(attempts, **kwargs)
    assert type(raised(one, bucket, EXPIRED, object())) is OriginAccessError


def test_other_errors_close_no_engine() -> None:
    one, bucket = operation(2)
    engine = bucket._engines[1, "obstore"] = object()
    denied = raised(one, bucket, S3Error(403, "AccessDenied", ""), engine)
    assert type(denied) is OriginAccessError
    assert type(raised(one, bucket, S3Error(503, "SlowDown", ""), engine)) is TransientError
    assert list(bucket._engines.values()) == [engine]
