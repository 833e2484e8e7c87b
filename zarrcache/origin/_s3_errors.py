"""Classify S3 errors, and convert them to the exceptions and messages that users get.

Both engines convert the exceptions of their library to an ``S3Error``; ``to_error`` alone decides
whether the request is repeated and what the message says.
"""

from __future__ import annotations

from dataclasses import dataclass

from zarrcache._keys import ObjectInfo
from zarrcache.errors import (
    IncompleteArrayError,
    OriginAccessError,
    OriginError,
    OriginNotFoundError,
)

__all__ = [
    "NO_TLS",
    "RangeIgnoredError",
    "RequestContext",
    "S3Error",
    "TransientError",
    "altered",
    "changed",
    "to_error",
]

# To retry another answer, add its code or status here. The first two sets also pause the node.
_SLOW_DOWN_STATUS = frozenset({429, 503, 509})
_SLOW_DOWN_CODES = frozenset(
    "SlowDown Throttling ThrottlingException RequestLimitExceeded BandwidthLimitExceeded "
    "TooManyRequests ServiceUnavailable".split()
)
_TRANSIENT_STATUS = _SLOW_DOWN_STATUS | {408, 500, 502, 504}
_TRANSIENT_CODES = _SLOW_DOWN_CODES | frozenset(
    "InternalError OperationAborted RequestTimeout RequestTimeoutException "
    # An upload arrived with other bytes than were sent.
    "PriorRequestNotComplete BadDigest XAmzContentSHA256Mismatch "
    "XAmzContentChecksumMismatch".split()
)
_ELSEWHERE_CODES = frozenset(
    "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException".split()
)
#: Message of a failure when an ``https://`` endpoint is a plain one.
NO_TLS = "it does not answer in TLS; if it is a plain server, write http:// in endpoint_url"
#: Names of this package for failures without an answer from the server.
_TRANSIENT_FAILURES = frozenset({"Connection", "Timeout", "ShortBody", "Mismatch", "Altered"})

_ACCESS = {
    "NoCredentials": (
        "no credentials were found. Set key and secret or profile in s3_kwargs, or "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "or AWS_PROFILE; for a public bucket set anon: true in s3_kwargs."
    ),
    "ProfileNotFound": "Set profile in s3_kwargs (or AWS_PROFILE) to one of those in ~/.aws/config "
    "and ~/.aws/credentials.",
    "InvalidAccessKeyId": "Check that the access key belongs to this endpoint_url.",
    "SignatureDoesNotMatch": "Check the secret key, and that it belongs to the access key.",
    "ExpiredToken": "The session token has expired: log in again (aws sso login), or renew key, "
    "secret and token.",
    "RequestTimeTooSkewed": "Set the clock of this machine.",
    "InvalidObjectState": "The object is archived (Glacier): restore it first.",
}
_ACCESS_ALIASES = {
    "TokenRefreshRequired": "ExpiredToken",
    "ExpiredTokenException": "ExpiredToken",
    "InvalidToken": "ExpiredToken",
    "UnauthorizedSSOToken": "ExpiredToken",
    "RequestExpired": "RequestTimeTooSkewed",
}
_ACCESS_CODES = (
    _ACCESS.keys()
    | _ACCESS_ALIASES.keys()
    | {
        "AccessDenied",
        "AllAccessDisabled",
        "AccountProblem",
        "InvalidPayer",
        "InvalidSecurity",
        "NotSignedUp",
    }
)


class TransientError(Exception):
    """An attempt at ``url`` failed, and the next one may succeed.

    Internal: users see ``OriginUnavailableError`` when the attempts or the time are used up.

    Attributes
    ----------
    attempt : int
        Attempts made at ``url`` so far; 0 if that is the number of the policy's rounds.
    """

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(cause)
        self.url = url
        self.attempt = 0


class RangeIgnoredError(OriginError):
    """The server answers a range with the whole object or another range.

    The cache then reads the object whole.
    """


@dataclass
class S3Error(Exception):
    """A failed request, independent of the library that made it. Internal to this subpackage.

    Attributes
    ----------
    status : int or None
        HTTP status; None without an answer.
    code : str
        S3's error code, or for a failure without an answer from S3 ``NoCredentials``,
        ``Certificate``, ``NoLength``, ``Connection``, ``Timeout``, ``ShortBody``, ``Mismatch`` or
        ``Altered``;
        ``IncompleteListing`` for a listing that is not known to be complete.
    detail : str
        One line for the message.
    """

    status: int | None
    code: str
    detail: str

    def __post_init__(self) -> None:
        super().__init__(self.detail)

    @property
    def is_transient(self) -> bool:
        """Whether there was no answer, an incomplete one, or one that means "try later"."""
        if self.status is None and self.code in _TRANSIENT_FAILURES:
            return True
        return self.code in _TRANSIENT_CODES or self.status in _TRANSIENT_STATUS

    @property
    def is_timeout(self) -> bool:
        """Whether there was no answer in time."""
        return self.code == "Timeout"

    @property
    def is_slow_down(self) -> bool:
        """Whether the server says that it gets too many requests."""
        return self.code in _SLOW_DOWN_CODES or self.status in _SLOW_DOWN_STATUS

    @property
    def is_for_botocore(self) -> bool:
        """Whether botocore may succeed where obstore cannot.

        For example in another region, with a certificate, without ``Content-Length``.
        """
        return self.code in ("Certificate", "NoLength") or self.is_elsewhere

    @property
    def is_elsewhere(self) -> bool:
        """Whether the server says that the bucket is in another region."""
        return self.status in (301, 307) or self.code in _ELSEWHERE_CODES

    @property
    def is_absent(self) -> bool:
        """Whether the server says that there is no such object in the bucket."""
        return self.status == 404 and self.code != "NoSuchBucket"

    @property
    def is_expired(self) -> bool:
        """Whether the server says that the credentials have expired; they may be renewable."""
        return (
            self.status is not None and _ACCESS_ALIASES.get(self.code, self.code) == "ExpiredToken"
        )

    def __str__(self) -> str:
        answer = " ".join(
            part
            for part in (self.code, f"({self.status})" if self.status is not None else "")
            if part
        )
        detail = self.detail.rstrip(".")  # it becomes a part of sentences
        return f"{answer}: {detail}" if detail else answer


@dataclass(frozen=True)
class RequestContext:
    """The context of a request, for its error message.

    Attributes
    ----------
    url : str
        Full URL of the object, prefix or store.
    bucket, endpoint : str
    obj : ObjectInfo or None
        The listed object that was read; None for other requests.
    anon : bool
        The request is not signed.
    writes : bool
        The request is part of an upload.
    """

    url: str
    bucket: str
    endpoint: str
    obj: ObjectInfo | None = None
    anon: bool = False
    writes: bool = False


def to_error(error: S3Error, context: RequestContext) -> Exception:
    """The exception to raise for ``error``: ``TransientError`` or a public one, with its cause."""
    if isinstance(error.__cause__, MemoryError):
        return error.__cause__
    raised = _error(error, context)
    raised.__cause__ = error.__cause__ or error
    return raised


def altered(key: str, sent_bytes: int, stored_bytes: int) -> S3Error:
    """The failure of an upload after which the object does not hold what was sent."""
    return S3Error(
        None,
        "Altered",
        f"{key} was sent with {sent_bytes} bytes and is stored with {stored_bytes} bytes that "
        "differ; the server or a proxy changes uploads. If it stores chunk frames "
        "(x-amz-checksum), set config_kwargs: {request_checksum_calculation: when_required} in "
        "s3_kwargs",
    )


def changed(url: str) -> IncompleteArrayError:
    """The error for an object that has changed since it was listed."""
    return IncompleteArrayError(
        f"{url} was changed while it was being read. Read it again when the writer has finished."
    )


def _error(error: S3Error, context: RequestContext) -> Exception:
    url, bucket, endpoint = context.url, context.bucket, context.endpoint
    if error.code == "NoCredentials":
        return OriginAccessError(f"{url}: {_ACCESS[error.code]}")
    if error.code in _ACCESS_CODES or error.status in (401, 403):
        return OriginAccessError(_refused(error, context))
    if error.code == "NoSuchBucket":
        return OriginNotFoundError(
            f"{url}: there is no bucket {bucket!r} at {endpoint}. Check the bucket's name and "
            "endpoint_url in s3_kwargs."
        )
    if error.is_transient:
        return TransientError(url, f"{error} at {endpoint}")
    if error.code == "IncompleteListing":
        return OriginError(
            f"{url}: the listing that {endpoint} sends is not known to be complete: "
            f"{error.detail}. Objects that it omits would be taken for absent. Report this to the "
            "operator of the server, or copy the stores elsewhere."
        )
    if error.code == "Certificate":
        return OriginError(
            f"{url}: the certificate of {endpoint} is not trusted. Name the file of its CA in "
            "s3_kwargs (client_kwargs: {verify: /path/ca.pem}) or in AWS_CA_BUNDLE."
        )
    if context.obj is not None and error.status == 404:
        return IncompleteArrayError(
            f"{url} is listed ({context.obj.size_bytes} bytes) but returned 404. The store is "
            "incomplete: convert it again."
        )
    if context.obj is not None and error.status in (412, 416):
        return changed(url)
    if error.code == "RangeIgnored":
        return RangeIgnoredError(
            f"{url}: {endpoint} sent the whole object, or another range, for a range of it."
        )
    if error.is_elsewhere:
        return OriginError(
            f"{url}: bucket {bucket!r} is in another region: {error}. "
            "Set client_kwargs: {region_name: ...} in s3_kwargs to the bucket's region."
        )
    if error.status is None:
        return OriginError(
            f"{url}: the request could not be made: {error}. Check s3_kwargs and the URL."
        )
    return OriginError(
        f"{url}: {endpoint} refused the request: {error}. Check endpoint_url and the URL."
    )


def _refused(error: S3Error, context: RequestContext) -> str:
    answer = str(error)
    if context.writes and (error.code == "AccessDenied" or error.status in (401, 403)):
        return (
            f"{context.url}: writing was refused: {answer}. Converting needs s3:ListBucket, "
            "s3:GetObject, s3:PutObject and s3:DeleteObject "
            f"on bucket {context.bucket!r}. Set other credentials (key and secret, or profile)."
        )
    code = _ACCESS_ALIASES.get(error.code, error.code)
    if code in _ACCESS:
        advice = _ACCESS[code]
    elif context.anon:
        advice = (
            "The bucket is not public: remove anon: true from s3_kwargs and give credentials (key "
            "and secret, or profile)."
        )
    else:
        advice = (
            "These credentials may not read it: they need s3:ListBucket and s3:GetObject on bucket "
            f"{context.bucket!r}. Set other ones in s3_kwargs (key and secret, or profile); if the "
            "bucket is requester-pays set requester_pays: true."
        )
    return f"{context.url}: access refused: {answer}. {advice}"
