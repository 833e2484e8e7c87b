"""S3 through s3fs: the engine for whatever obstore cannot do, for forked children, and for listing
directories. The only import of s3fs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fsspec.asyn import get_loop

from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig
from zarrcache.errors import ConfigError
from zarrcache.origin._backoff import Backoff
from zarrcache.origin._concurrent import SLOWEST_BYTES_PER_S, Page, Received, pump, run
from zarrcache.origin._s3_errors import S3Fault
from zarrcache.origin._s3_options import S3Options

if TYPE_CHECKING:
    import s3fs

__all__ = ["S3fsEngine", "make_s3fs"]


def make_s3fs(s3_kwargs: Mapping[str, Any] | None = None) -> s3fs.S3FileSystem:
    """``s3fs.S3FileSystem(**s3_kwargs)``, exactly as one would write it: with s3fs's own time-outs
    and retries.
    """
    import s3fs

    try:
        return s3fs.S3FileSystem(**dict(s3_kwargs or {}))
    except (TypeError, KeyError, ValueError) as exc:
        raise ConfigError(
            f"s3fs does not accept s3_kwargs: {exc}. Correct them; the names are those of "
            "s3fs.S3FileSystem."
        ) from exc


class S3fsEngine:
    """Requests to one bucket. One object belongs to one process. It retries nothing.

    One layer below does, out of reach: aiohttp sends a GET or HEAD once more, at once, when its
    connection is cut before the answer begins.

    Parameters
    ----------
    bucket : str
    options : S3Options
    fetch : FetchConfig
    """

    def __init__(self, bucket: str, options: S3Options, fetch: FetchConfig) -> None:
        self._bucket = bucket
        self._fetch = fetch
        config = {
            "connect_timeout": fetch.connect_timeout,
            "read_timeout": fetch.read_timeout,
            **(options.kwargs.get("config_kwargs") or {}),
        }
        config |= {
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": fetch.concurrency,
        }
        # An instance of our own: s3fs shares instances by their arguments, and these settings must
        # not reach anybody else's.
        kwargs = {
            **options.kwargs,
            "config_kwargs": config,
            "skip_instance_cache": True,
            "use_listings_cache": False,
        }
        if options.endpoint_url is not None:
            kwargs["endpoint_url"] = options.endpoint_url
        self._fs = make_s3fs(kwargs)
        self._fs.retries = 1
        self._opening = asyncio.Lock()

    def list_page(
        self, prefix: str, *, patience_s: float, token: str | None = None, delimiter: str = ""
    ) -> Page:
        """One LIST."""
        more = {"ContinuationToken": token} if token else {}
        answer = run(
            get_loop(),
            self._call("list_objects_v2", patience_s, Prefix=prefix, Delimiter=delimiter, **more),
        )
        return Page(
            [
                ObjectInfo(o["Key"], o["Size"], o["ETag"].strip('"'), o["LastModified"].timestamp())
                for o in answer.get("Contents", [])
            ],
            [p["Prefix"] for p in answer.get("CommonPrefixes", [])],
            answer["NextContinuationToken"] if answer.get("IsTruncated") else None,
        )

    def head(self, key: str, *, patience_s: float) -> ObjectInfo | None:
        """One object as a HEAD shows it, None if there is none."""
        try:
            answer = run(get_loop(), self._call("head_object", patience_s, Key=key))
        except S3Fault as fault:
            if fault.status == 404 and fault.code != "NoSuchBucket":
                return None
            raise
        return ObjectInfo(
            key,
            answer["ContentLength"],
            answer["ETag"].strip('"'),
            answer["LastModified"].timestamp(),
        )

    def is_md5_hidden(self, key: str, *, patience_s: float) -> bool:
        """Whether the object is encrypted with a key of KMS or of the customer: then its ETag is no
        MD5 of what one reads.
        """
        answer = run(get_loop(), self._call("head_object", patience_s, Key=key))
        return (
            str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
            or "SSECustomerAlgorithm" in answer
        )

    def bucket_region(self, *, patience_s: float) -> str | None:
        """The bucket's region, None if the server does not say."""
        try:
            answer = run(get_loop(), self._call("head_bucket", patience_s))
        except S3Fault as fault:
            answer = (
                getattr(fault.__cause__.__cause__, "response", {})
                if fault.__cause__ is not None
                else {}
            )
            # S3 names the region even to those who may not enter
            if fault.status != 403 or not answer:
                raise
        region = answer.get("BucketRegion") or answer["ResponseMetadata"]["HTTPHeaders"].get(
            "x-amz-bucket-region"
        )
        return str(region) if region else None

    def get_many(
        self, objects: Sequence[ObjectInfo], *, patience_s: float, backoff: Backoff | None = None
    ) -> Generator[tuple[ObjectInfo, Received | S3Fault | None]]:
        """One GET for each object; see ``pump``. A request that is silent for ``patience_s`` is
        given up.
        """
        return pump(
            get_loop(),
            lambda obj: self._get(obj, None, patience_s),
            objects,
            self._fetch.concurrency,
            backoff,
        )

    def get_range(self, obj: ObjectInfo, start: int, stop: int, *, patience_s: float) -> Received:
        """Bytes ``start`` to ``stop`` (exclusive) of one object."""
        return run(get_loop(), self._get(obj, (start, stop), patience_s))

    async def _get(
        self, obj: ObjectInfo, part: tuple[int, int] | None, patience_s: float
    ) -> Received:
        size = obj.size_bytes if part is None else part[1] - part[0]
        more = {"IfMatch": f'"{obj.etag}"'} if obj.etag else {}
        if part is not None:
            more["Range"] = f"bytes={part[0]}-{part[1] - 1}"
        await self._open()
        try:
            async with asyncio.timeout(
                min(self._fetch.read_timeout, patience_s) + size / SLOWEST_BYTES_PER_S
            ):
                # Not fs._cat_file: that sends a HEAD before each GET.
                answer = await self._fs._call_s3(
                    "get_object", Bucket=self._bucket, Key=obj.key, **more
                )
                async with answer["Body"] as body:
                    return Received(await body.read(), answer["ETag"].strip('"'))
        except Exception as exc:
            raise _fault(exc) from exc

    async def _open(self) -> None:
        # Before the time-out starts: a client takes 0.3 s of CPU. Under a lock: s3fs would make one
        # for each of the first requests.
        async with self._opening:
            try:
                await self._fs.set_session()
            except (TypeError, ValueError) as exc:
                raise ConfigError(
                    f"s3fs does not accept s3_kwargs: {exc}. Correct them; the names are those of "
                    "s3fs.S3FileSystem."
                ) from exc
            except Exception as exc:
                raise _fault(exc) from exc

    async def _call(self, method: str, patience_s: float, **kwargs: Any) -> Any:
        await self._open()
        try:
            async with asyncio.timeout(patience_s):
                return await self._fs._call_s3(method, Bucket=self._bucket, **kwargs)
        except Exception as exc:
            raise _fault(exc) from exc


def _fault(exc: BaseException) -> S3Fault:
    """s3fs turns botocore's ClientError into builtin errors and keeps it as the cause."""
    from aiohttp import ClientError as HttpError
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    for error in (exc, exc.__cause__):
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response["Error"].get("Code", ""))
            if code.isdigit():  # an answer without a body: botocore makes words of the status
                return S3Fault(status or int(code), "", "")
            return S3Fault(status, code, str(response["Error"].get("Message") or ""))
    if isinstance(exc, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return S3Fault(None, "NoCredentials", "")
    if isinstance(exc, boto.ProfileNotFound):
        return S3Fault(None, "ProfileNotFound", str(exc))
    if isinstance(
        exc, (boto.UnauthorizedSSOTokenError, boto.SSOTokenLoadError, boto.TokenRetrievalError)
    ):
        return S3Fault(None, "UnauthorizedSSOToken", str(exc))
    if isinstance(exc, (boto.ConnectTimeoutError, boto.ReadTimeoutError, TimeoutError)):
        return S3Fault(None, "Timeout", "no answer in time")
    cut = (
        boto.ConnectionClosedError,
        boto.IncompleteReadError,
        boto.ResponseStreamingError,
        boto.FlexibleChecksumError,
    )
    if isinstance(exc, cut) or "ContentLengthError" in repr(exc):
        return S3Fault(None, "ShortBody", "the connection closed in the middle of an answer")
    if "CERTIFICATE_VERIFY_FAILED" in str(exc):
        return S3Fault(None, "Certificate", "")
    if isinstance(
        exc, (boto.HTTPClientError, boto.ConnectionError, ResponseParserError, HttpError, OSError)
    ):
        return S3Fault(None, "Connection", _reason(exc))
    return S3Fault(None, type(exc).__name__, str(exc))


def _reason(exc: BaseException) -> str:
    """What the operating system said, further down the chain; botocore says the URL, which the
    error has anyway.
    """
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno and cause.strerror:
            return os.strerror(cause.errno) if cause.errno > 0 else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(exc)
