"""What S3 answered when it did not deliver, and the words for it.

Both engines reduce their library's exceptions to an ``S3Fault``; ``to_error`` is the one place that
decides what it means and what to do.
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
from zarrcache.origin._retry import TransientError

__all__ = ["RequestContext", "S3Fault", "to_error"]

_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504, 509})
#: Fewer requests, please: from everybody, not only from whoever was told.
_SLOW_DOWN_STATUS = frozenset({429, 503, 509})
_SLOW_DOWN_CODES = frozenset(
    "SlowDown Throttling ThrottlingException RequestLimitExceeded BandwidthLimitExceeded "
    "TooManyRequests ServiceUnavailable".split()
)
_TRANSIENT_CODES = _SLOW_DOWN_CODES | frozenset(
    "InternalError OperationAborted RequestTimeout RequestTimeoutException "
    "PriorRequestNotComplete".split()
)

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


@dataclass
class S3Fault(Exception):
    """One request that failed, without the library it failed in. Internal to the origin.

    Attributes
    ----------
    status : int or None
        HTTP status; None if there was no answer.
    code : str
        S3's error code, or a name of ours for what is no answer of S3 (``NoCredentials``,
        ``Certificate``, ``Connection``, ``Timeout``, ``ShortBody``).
    detail : str
        One line for people.
    """

    status: int | None
    code: str
    detail: str

    def __post_init__(self) -> None:
        super().__init__(self.detail)

    @property
    def is_transient(self) -> bool:
        """No answer, half an answer, or "try later"."""
        return self.code in _TRANSIENT_CODES or (
            self.status in _TRANSIENT_STATUS
            if self.status is not None
            else self.code in ("Connection", "Timeout", "ShortBody")
        )

    @property
    def is_slow_down(self) -> bool:
        """The server has too many requests."""
        return self.code in _SLOW_DOWN_CODES or self.status in _SLOW_DOWN_STATUS

    @property
    def is_expired(self) -> bool:
        """The credentials were good once; whoever gave them may have new ones."""
        return (
            self.status is not None and _ACCESS_ALIASES.get(self.code, self.code) == "ExpiredToken"
        )

    def __str__(self) -> str:
        what = " ".join(
            part
            for part in (self.code, f"({self.status})" if self.status is not None else "")
            if part
        )
        return f"{what}: {self.detail}" if self.detail else what


@dataclass(frozen=True)
class RequestContext:
    """What a request was for: the words of its error depend on it.

    Attributes
    ----------
    url : str
        Full URL of the object or prefix.
    bucket : str
    obj : ObjectInfo or None
        The listed object; None for a listing.
    anon : bool
    """

    url: str
    bucket: str
    endpoint: str
    obj: ObjectInfo | None = None
    anon: bool = False


def to_error(fault: S3Fault, asked: RequestContext) -> Exception:
    """The exception to raise for ``fault``: ``TransientError`` or a public error; its cause is set."""
    error = _error(fault, asked)
    error.__cause__ = fault.__cause__ or fault
    return error


def _error(fault: S3Fault, asked: RequestContext) -> Exception:
    if fault.code == "NoCredentials":
        return OriginAccessError(f"{asked.url}: {_ACCESS[fault.code]}")
    if fault.code in _ACCESS_CODES or fault.status in (401, 403):
        return OriginAccessError(
            f"{asked.url}: access refused: {fault}. {_what_to_set(fault, asked)}".replace(
                ".. ", ". "
            )
        )
    if fault.code == "NoSuchBucket":
        return OriginNotFoundError(
            f"{asked.url}: there is no bucket {asked.bucket!r} at {asked.endpoint}. Check the "
            "bucket's name and endpoint_url in s3_kwargs."
        )
    if fault.is_transient:
        return TransientError(asked.url, str(fault))
    if fault.code == "Certificate":
        return OriginError(
            f"{asked.url}: the certificate of {asked.endpoint} is not trusted. "
            "Name the file of its CA in s3_kwargs (client_kwargs: {verify: /path/ca.pem}) or in "
            "AWS_CA_BUNDLE."
        )
    if asked.obj is not None and fault.status in (404, 412, 416):
        if fault.status == 404:
            return IncompleteArrayError(
                f"{asked.url} is listed ({asked.obj.size_bytes} bytes) but returned 404. The store "
                "is incomplete: convert it again."
            )
        return IncompleteArrayError(
            f"{asked.url} was changed while it was being read. Read it again when the writer has "
            "finished."
        )
    if fault.status in (301, 307) or fault.code in (
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    ):
        return OriginError(
            f"{asked.url}: bucket {asked.bucket!r} is in another region: {str(fault).rstrip('.')}. "
            "Set client_kwargs: {region_name: ...} in s3_kwargs to the bucket's region."
        )
    if fault.status is None:
        return OriginError(
            f"{asked.url}: the request could not be made: {fault}. Check s3_kwargs and the URL."
        )
    return OriginError(
        f"{asked.url}: {asked.endpoint} refused the request: {fault}. Check endpoint_url and the "
        "URL."
    )


def _what_to_set(fault: S3Fault, asked: RequestContext) -> str:
    code = _ACCESS_ALIASES.get(fault.code, fault.code)
    if code in _ACCESS:
        return _ACCESS[code]
    if asked.anon:
        return "The bucket is not public: remove anon: true from s3_kwargs and give credentials (key and secret, or profile)."
    return (
        "These credentials may not read it: they need s3:ListBucket and s3:GetObject on bucket "
        f"{asked.bucket!r}. "
        "Set other ones in s3_kwargs (key and secret, or profile); if the bucket is requester-pays "
        "set requester_pays: true."
    )
