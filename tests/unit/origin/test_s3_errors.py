"""What an answer of S3 means, and its words."""

from __future__ import annotations

import pytest

from zarrcache._keys import ObjectInfo
from zarrcache.errors import (
    IncompleteArrayError,
    OriginAccessError,
    OriginError,
    OriginNotFoundError,
)
from zarrcache.origin._retry import TransientError
from zarrcache.origin._s3_errors import RequestContext, S3Fault, to_error

OBJECT = RequestContext("s3://b/p/x", "b", "http://gw:9000", ObjectInfo("x", 16384, "e"))
LISTING = RequestContext("s3://b/p/", "b", "http://gw:9000")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 509])
def test_try_later_is_transient_whatever_the_code(status: int) -> None:
    """A load balancer sends no code."""
    assert S3Fault(status, "", "").is_transient
    assert type(to_error(S3Fault(status, "", ""), OBJECT)) is TransientError


@pytest.mark.parametrize(
    "code",
    [
        "SlowDown",
        "RequestTimeout",
        "InternalError",
        "ThrottlingException",
        "OperationAborted",
        "ServiceUnavailable",
    ],
)
def test_codes_that_mean_try_later_are_transient_whatever_the_status(code: str) -> None:
    """RequestTimeout comes as 400, OperationAborted as 409."""
    assert type(to_error(S3Fault(400, code, ""), LISTING)) is TransientError


@pytest.mark.parametrize("code", ["Connection", "Timeout", "ShortBody"])
def test_no_answer_is_transient(code: str) -> None:
    """Names of ours."""
    assert type(to_error(S3Fault(None, code, "x"), OBJECT)) is TransientError


@pytest.mark.parametrize(
    "status", [200, 301, 307, 400, 401, 403, 404, 405, 409, 411, 412, 416, 501]
)
def test_every_other_status_is_final(status: int) -> None:
    """Also with a body that could not be read."""
    assert not S3Fault(status, "", "").is_transient
    assert not isinstance(to_error(S3Fault(status, "", ""), LISTING), TransientError)


def test_what_went_wrong_below_is_final_unless_it_is_known() -> None:
    """A fault of ours or of a library must show, not be tried five times."""
    error = to_error(S3Fault(None, "KeyError", "'ETag'"), OBJECT)
    assert type(error) is OriginError
    assert (
        str(error)
        == "s3://b/p/x: the request could not be made: KeyError: 'ETag'. Check s3_kwargs and the "
        "URL."
    )


@pytest.mark.parametrize(
    ("fault", "asked", "error", "words"),
    [
        (
            S3Fault(404, "NoSuchKey", ""),
            OBJECT,
            IncompleteArrayError,
            "s3://b/p/x is listed (16384 bytes) but returned 404. The store is incomplete",
        ),
        (
            S3Fault(404, "", ""),
            OBJECT,
            IncompleteArrayError,
            "is listed (16384 bytes) but returned 404",
        ),
        (
            S3Fault(412, "PreconditionFailed", ""),
            OBJECT,
            IncompleteArrayError,
            "was changed while it was being read. Read it again",
        ),
        (
            S3Fault(416, "InvalidRange", ""),
            OBJECT,
            IncompleteArrayError,
            "was changed while it was being read",
        ),
        (
            S3Fault(404, "NoSuchBucket", ""),
            OBJECT,
            OriginNotFoundError,
            "there is no bucket 'b' at http://gw:9000",
        ),
        (
            S3Fault(404, "NoSuchKey", "m"),
            LISTING,
            OriginError,
            "s3://b/p/: http://gw:9000 refused the request: NoSuchKey (404): m",
        ),
        (
            S3Fault(403, "", ""),
            LISTING,
            OriginAccessError,
            "s3://b/p/: access refused: (403). These credentials may not read it",
        ),
        (S3Fault(401, "", ""), LISTING, OriginAccessError, "access refused: (401)."),
        (
            S3Fault(None, "NoCredentials", ""),
            LISTING,
            OriginAccessError,
            "s3://b/p/: no credentials were found. Set key and secret",
        ),
        (
            S3Fault(400, "TokenRefreshRequired", "m"),
            LISTING,
            OriginAccessError,
            "The session token has expired: log in again",
        ),
        (
            S3Fault(None, "UnauthorizedSSOToken", "m"),
            LISTING,
            OriginAccessError,
            "The session token has expired: log in again (aws sso login)",
        ),
        (
            S3Fault(403, "InvalidObjectState", "m"),
            OBJECT,
            OriginAccessError,
            "The object is archived (Glacier): restore it first.",
        ),
        (
            S3Fault(403, "RequestExpired", "m"),
            OBJECT,
            OriginAccessError,
            "Set the clock of this machine.",
        ),
        (
            S3Fault(301, "PermanentRedirect", "Moved."),
            LISTING,
            OriginError,
            "is in another region: PermanentRedirect (301): Moved. Set client_kwargs",
        ),
        (
            S3Fault(None, "Certificate", ""),
            LISTING,
            OriginError,
            "the certificate of http://gw:9000 is not trusted. Name the file of its CA",
        ),
    ],
)
def test_a_fault_has_its_error_and_its_words(
    fault: S3Fault, asked: RequestContext, error: type[Exception], words: str
) -> None:
    """What, where, what to do."""
    raised = to_error(fault, asked)
    assert type(raised) is error
    assert words in str(raised)
    assert ".." not in str(raised).replace("...", "")
    assert raised.__cause__ is fault


def test_the_cause_is_the_library_s_exception_where_there_is_one() -> None:
    """S3Fault itself is ours and says no more than the message."""
    fault, library = S3Fault(403, "", ""), OSError("from below")
    fault.__cause__ = library
    assert to_error(fault, LISTING).__cause__ is library


def test_anon_is_told_from_missing_permissions() -> None:
    """Credentials that are not sent need no permissions."""
    anon = RequestContext("s3://b/p/", "b", "http://gw:9000", anon=True)
    assert "remove anon: true" in str(to_error(S3Fault(403, "AccessDenied", ""), anon))
    assert "requester_pays: true" in str(to_error(S3Fault(403, "AccessDenied", ""), LISTING))


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (S3Fault(503, "SlowDown", "Reduce."), "SlowDown (503): Reduce."),
        (S3Fault(502, "", ""), "(502)"),
        (S3Fault(None, "Timeout", "no answer in time"), "Timeout: no answer in time"),
        (S3Fault(403, "AccessDenied", ""), "AccessDenied (403)"),
    ],
)
def test_a_fault_in_a_sentence(fault: S3Fault, text: str) -> None:
    """Code, status, detail, whichever there are."""
    assert str(fault) == text
