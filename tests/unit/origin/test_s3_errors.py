"""What an error answer of S3 means, and the message that users get."""

from __future__ import annotations

import pytest

from zarrcache._keys import ObjectInfo
from zarrcache.errors import (
    IncompleteArrayError,
    OriginAccessError,
    OriginError,
    OriginNotFoundError,
)
from zarrcache.origin._s3_errors import RequestContext, S3Error, TransientError, to_error

OBJECT = RequestContext("s3://b/p/x", "b", "http://gw:9000", ObjectInfo("x", 16384, "e"))
LISTING = RequestContext("s3://b/p/", "b", "http://gw:9000")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 509])
def test_a_status_that_means_try_later_is_transient_without_a_code(status: int) -> None:
    """Load balancers send no code."""
    assert S3Error(status, "", "").is_transient
    assert type(to_error(S3Error(status, "", ""), OBJECT)) is TransientError


@pytest.mark.parametrize(
    "code",
    [
        "BandwidthLimitExceeded",
        "InternalError",
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    ],
)
def test_a_code_that_means_try_later_is_transient_with_any_status(code: str) -> None:
    """RequestTimeout comes as 400, OperationAborted as 409."""
    assert type(to_error(S3Error(400, code, ""), LISTING)) is TransientError


@pytest.mark.parametrize(
    ("error", "is_slow_down"),
    [
        *((S3Error(status, "", ""), True) for status in (429, 503, 509)),
        *((S3Error(status, "", ""), False) for status in (408, 428, 430, 500, 502, 504, 508, 510)),
        (S3Error(200, "SlowDown", ""), True),
        (S3Error(400, "BandwidthLimitExceeded", ""), True),
        (S3Error(400, "RequestLimitExceeded", ""), True),
        (S3Error(400, "ServiceUnavailable", ""), True),
        (S3Error(400, "Throttling", ""), True),
        (S3Error(400, "ThrottlingException", ""), True),
        (S3Error(400, "TooManyRequests", ""), True),
        (S3Error(400, "OperationAborted", ""), False),
        (S3Error(400, "RequestTimeout", ""), False),
        (S3Error(500, "InternalError", ""), False),
        (S3Error(None, "Timeout", ""), False),
    ],
)
def test_the_code_or_the_status_alone_asks_for_fewer_requests(
    error: S3Error, is_slow_down: bool
) -> None:
    """S3 sends SlowDown with status 200 within a body, a load balancer 503 without a code."""
    assert error.is_slow_down is is_slow_down


@pytest.mark.parametrize("code", ["Connection", "Timeout", "ShortBody", "Mismatch", "Altered"])
def test_no_answer_is_transient(code: str) -> None:
    assert type(to_error(S3Error(None, code, "x"), OBJECT)) is TransientError


@pytest.mark.parametrize(
    ("error", "is_elsewhere"),
    [
        (S3Error(301, "", ""), True),
        (S3Error(307, "", ""), True),
        (S3Error(400, "AuthorizationHeaderMalformed", ""), True),
        (S3Error(400, "IllegalLocationConstraintException", ""), True),
        (S3Error(400, "PermanentRedirect", ""), True),
        (S3Error(302, "", ""), False),
        (S3Error(308, "", ""), False),
        (S3Error(400, "InvalidRequest", ""), False),
    ],
)
def test_the_code_or_the_status_alone_says_that_the_bucket_is_in_another_region(
    error: S3Error, is_elsewhere: bool
) -> None:
    assert error.is_elsewhere is is_elsewhere
    assert error.is_for_botocore is is_elsewhere
    assert ("is in another region" in str(to_error(error, LISTING))) is is_elsewhere


def test_only_a_certificate_and_another_region_are_for_botocore() -> None:
    assert S3Error(None, "Certificate", "").is_for_botocore
    assert not S3Error(None, "Connection", "").is_for_botocore


@pytest.mark.parametrize(
    "code",
    ["ExpiredToken", "TokenRefreshRequired", "ExpiredTokenException", "InvalidToken"],
)
def test_credentials_have_expired_where_the_server_says_so(code: str) -> None:
    assert S3Error(400, code, "").is_expired
    assert not S3Error(None, code, "").is_expired  # before the request: a new session may not help
    assert not S3Error(403, "AccessDenied", "").is_expired


@pytest.mark.parametrize(
    "status", [200, 301, 307, 400, 401, 403, 404, 405, 409, 411, 412, 416, 501]
)
def test_every_other_status_is_final(status: int) -> None:
    assert not S3Error(status, "", "").is_transient
    assert not isinstance(to_error(S3Error(status, "", ""), LISTING), TransientError)


def test_an_unknown_failure_below_is_final() -> None:
    """A bug here or in a library has to show at once, not after five attempts."""
    error = to_error(S3Error(None, "KeyError", "'ETag'"), OBJECT)
    assert type(error) is OriginError
    assert (
        str(error)
        == "s3://b/p/x: the request could not be made: KeyError: 'ETag'. Check s3_kwargs and the "
        "URL."
    )


@pytest.mark.parametrize(
    ("error", "context", "expected", "words"),
    [
        (
            S3Error(404, "NoSuchKey", ""),
            OBJECT,
            IncompleteArrayError,
            "s3://b/p/x is listed (16384 bytes) but returned 404. The store is incomplete",
        ),
        (
            S3Error(404, "", ""),
            OBJECT,
            IncompleteArrayError,
            "is listed (16384 bytes) but returned 404",
        ),
        (
            S3Error(412, "PreconditionFailed", ""),
            OBJECT,
            IncompleteArrayError,
            "was changed while it was being read. Read it again",
        ),
        (
            S3Error(416, "InvalidRange", ""),
            OBJECT,
            IncompleteArrayError,
            "was changed while it was being read",
        ),
        (
            S3Error(404, "NoSuchBucket", ""),
            OBJECT,
            OriginNotFoundError,
            "there is no bucket 'b' at http://gw:9000",
        ),
        (
            S3Error(404, "NoSuchKey", "m"),
            LISTING,
            OriginError,
            "s3://b/p/: http://gw:9000 refused the request: NoSuchKey (404): m",
        ),
        (
            S3Error(403, "", ""),
            LISTING,
            OriginAccessError,
            "s3://b/p/: access refused: (403). These credentials may not read it",
        ),
        (S3Error(401, "", ""), LISTING, OriginAccessError, "access refused: (401)."),
        (
            S3Error(None, "NoCredentials", ""),
            LISTING,
            OriginAccessError,
            "s3://b/p/: no credentials were found. Set key and secret",
        ),
        (
            S3Error(400, "TokenRefreshRequired", "m"),
            LISTING,
            OriginAccessError,
            "The session token has expired: log in again",
        ),
        (
            S3Error(None, "UnauthorizedSSOToken", "m"),
            LISTING,
            OriginAccessError,
            "The session token has expired: log in again (aws sso login)",
        ),
        (
            S3Error(403, "InvalidObjectState", "m"),
            OBJECT,
            OriginAccessError,
            "The object is archived (Glacier): restore it first.",
        ),
        (
            S3Error(403, "RequestExpired", "m"),
            OBJECT,
            OriginAccessError,
            "Set the clock of this machine.",
        ),
        (
            S3Error(301, "PermanentRedirect", "Moved."),
            LISTING,
            OriginError,
            "is in another region: PermanentRedirect (301): Moved. Set client_kwargs",
        ),
        (
            S3Error(None, "Certificate", ""),
            LISTING,
            OriginError,
            "the certificate of http://gw:9000 is not trusted. Name the file of its CA",
        ),
    ],
)
def test_an_s3_error_becomes_its_exception_and_message(
    error: S3Error, context: RequestContext, expected: type[Exception], words: str
) -> None:
    raised = to_error(error, context)
    assert type(raised) is expected
    assert words in str(raised)
    assert ".." not in str(raised).replace("...", "")
    assert raised.__cause__ is error


def test_the_cause_is_the_library_s_exception_where_there_is_one() -> None:
    error, library = S3Error(403, "", ""), OSError("from below")
    error.__cause__ = library
    assert to_error(error, LISTING).__cause__ is library


def test_a_refused_upload_names_the_permissions_that_writing_needs() -> None:
    upload = RequestContext("s3://b/p/mp-1.zarr", "b", "http://gw:9000", writes=True)
    refused = to_error(S3Error(403, "AccessDenied", "Access Denied."), upload)
    assert type(refused) is OriginAccessError
    assert str(refused).startswith(
        "s3://b/p/mp-1.zarr: writing was refused: AccessDenied (403): Access Denied. Converting "
        "needs s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject on bucket 'b'."
    )


def test_the_advice_for_anon_is_not_about_permissions() -> None:
    anon = RequestContext("s3://b/p/", "b", "http://gw:9000", anon=True)
    assert "remove anon: true" in str(to_error(S3Error(403, "AccessDenied", ""), anon))
    assert "requester_pays: true" in str(to_error(S3Error(403, "AccessDenied", ""), LISTING))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (S3Error(503, "SlowDown", "Reduce."), "SlowDown (503): Reduce"),
        (S3Error(502, "", ""), "(502)"),
        (S3Error(None, "Timeout", "no answer in time"), "Timeout: no answer in time"),
        (S3Error(403, "AccessDenied", ""), "AccessDenied (403)"),
    ],
)
def test_an_s3_error_in_a_message(error: S3Error, text: str) -> None:
    assert str(error) == text
