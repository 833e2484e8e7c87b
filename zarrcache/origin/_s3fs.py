"""Requests to S3 through s3fs. The only importer of s3fs.

Used for options that obstore does not support, in forked children, for listing (obstore does not
show whether a listing is complete), and for deleting.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fsspec.asyn import get_loop

from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig
from zarrcache.errors import ConfigError
from zarrcache.origin._content import etag_in, version_of
from zarrcache.origin._in_flight import FETCH_REQUESTS, InFlight
from zarrcache.origin._requests import (
    PAGE_OBJECTS,
    SLOWEST_BYTES_PER_S,
    Answers,
    Backoff,
    Page,
    Received,
    concurrent_requests,
)
from zarrcache.origin._s3_errors import NO_TLS, S3Error
from zarrcache.origin._s3_options import S3Options, typed_kwargs

if TYPE_CHECKING:
    import s3fs

__all__ = ["S3fsEngine", "make_s3fs"]

#: This machine's clock and a date in whole seconds, which an answer takes a moment to bring, agree.
_AGREE_S = 2.0


def make_s3fs(s3_kwargs: Mapping[str, Any] | None = None) -> s3fs.S3FileSystem:
    """``s3fs.S3FileSystem(**s3_kwargs)``, with s3fs's own timeouts and retries.

    Raises
    ------
    ConfigError
    """
    import s3fs

    try:
        return s3fs.S3FileSystem(**typed_kwargs(s3_kwargs))
    except (TypeError, KeyError, ValueError) as exc:
        raise _not_accepted(exc) from exc


def _not_accepted(exc: Exception) -> ConfigError:
    return ConfigError(
        f"s3fs does not accept s3_kwargs: {exc}. Correct them; the names are those of "
        "s3fs.S3FileSystem."
    )


class S3fsEngine:
    """Requests to one bucket, each a coroutine for fsspec's event loop. One object per process.

    It retries nothing. aiohttp, below it, immediately repeats a GET or HEAD once if its connection
    is closed before the answer begins; that cannot be switched off.

    Parameters
    ----------
    bucket : str
    options : S3Options
    fetch : FetchConfig
    in_flight : InFlight
        Limit of the requests of a fetch.
    """

    def __init__(
        self, bucket: str, options: S3Options, fetch: FetchConfig, in_flight: InFlight
    ) -> None:
        self._bucket = bucket
        self._fetch, self._in_flight = fetch, in_flight
        pinned = options.pinned_kwargs
        config = {
            "connect_timeout": fetch.connect_timeout,
            "read_timeout": fetch.read_timeout,
            **(pinned.get("config_kwargs") or {}),
        }
        config |= {
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": FETCH_REQUESTS
            if fetch.concurrency == "auto"
            else fetch.concurrency,
        }
        # A separate instance: s3fs shares instances by their arguments, and these settings must not
        # affect those of other code.
        kwargs = {
            **pinned,
            "config_kwargs": config,
            "skip_instance_cache": True,
            "use_listings_cache": False,
        }
        # Older versions of s3fs (2025.10) leave it to each call; methods without it drop it.
        self._payer = {"RequestPayer": "requester"} if options.requester_pays else {}
        self._fs = make_s3fs(kwargs)
        self._fs.retries = 1
        self._opening = asyncio.Lock()

    async def list_page(
        self,
        prefix: str,
        *,
        patience_s: float,
        token: str | None = None,
        start_after: str | None = None,
        delimiter: str = "",
    ) -> Page:
        """Make one LIST.

        Raises
        ------
        S3Error
            Also if the answer contradicts itself, with the code ``IncompleteListing``.
        """
        more = {"ContinuationToken": token} if token else {}
        if start_after is not None:
            more["StartAfter"] = start_after
        answer = await self._call(
            "list_objects_v2", patience_s, Prefix=prefix, Delimiter=delimiter, **more
        )
        return _page(answer, prefix, delimiter)

    async def head(self, key: str, *, patience_s: float) -> ObjectInfo | None:
        """HEAD one object; None if it does not exist."""
        try:
            answer = await self._call("head_object", patience_s, Key=key)
        except S3Error as error:
            if error.is_absent:
                return None
            raise
        if "ContentLength" not in answer:  # some proxies leave it out
            page = await self.list_page(key, patience_s=patience_s)
            return next((obj for obj in page.objects if obj.key == key), None)
        return _info(answer, key, answer["ContentLength"])

    async def is_md5_hidden(self, key: str, *, patience_s: float) -> bool:
        """Whether the ETag is not an MD5, because a KMS or customer-provided key encrypts it."""
        answer = await self._call("head_object", patience_s, Key=key)
        return (
            str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
            or "SSECustomerAlgorithm" in answer
        )

    async def bucket_region(self, *, patience_s: float) -> str | None:
        """The bucket's region; None if the server does not name it."""
        try:
            answer = await self._call("head_bucket", patience_s)
        except S3Error as error:
            answer = (
                getattr(error.__cause__.__cause__, "response", {})
                if error.__cause__ is not None
                else {}
            )
            # S3 also names the region if it refuses the request.
            if error.status != 403 or not answer:
                raise
        region = answer.get("BucketRegion") or answer["ResponseMetadata"]["HTTPHeaders"].get(
            "x-amz-bucket-region"
        )
        return str(region) if region else None

    def get_many(
        self, objects: Sequence[ObjectInfo], *, patience_s: float, backoff: Backoff | None = None
    ) -> Answers:
        """Make one GET per object. A request that is silent for ``patience_s`` is given up."""
        return concurrent_requests(
            get_loop(),
            lambda obj: self.get(obj, patience_s=patience_s),
            objects,
            self._in_flight,
            backoff,
        )

    async def get(
        self, obj: ObjectInfo, part: tuple[int, int] | None = None, *, patience_s: float
    ) -> Received:
        """GET one object, or ``part`` of it: ``(start, stop)`` in bytes, ``stop`` exclusive."""
        size = obj.size_bytes if part is None else part[1] - part[0]
        etag = etag_in(obj.etag)
        more = {"IfMatch": f'"{etag}"', **self._payer} if etag else {**self._payer}
        if part is not None:
            more["Range"] = f"bytes={part[0]}-{part[1] - 1}"
        await self._open()
        try:
            async with asyncio.timeout(
                min(self._fetch.read_timeout, patience_s) + size / SLOWEST_BYTES_PER_S
            ):
                # Not fs._cat_file, which sends a HEAD before each GET.
                answer = await self._fs._call_s3(
                    "get_object", Bucket=self._bucket, Key=obj.key, **more
                )
                if part is not None and not _is_part(answer, part):
                    answer["Body"].close()
                    raise S3Error(None, "RangeIgnored", "")
                async with answer["Body"] as body:
                    data = await body.read()
                    return Received(data, version_of(answer.get("ETag"), 0.0), _modified_s(answer))
        except S3Error:
            raise
        except Exception as exc:
            raise _s3_error(exc) from exc

    async def put(self, key: str, body: bytes, *, patience_s: float) -> Received:
        """Write one object in a single request."""
        answer = await self._call(
            "put_object", patience_s + len(body) / SLOWEST_BYTES_PER_S, Key=key, Body=body
        )
        return Received(b"", version_of(answer.get("ETag"), 0.0))

    async def delete(self, key: str, *, patience_s: float) -> Received:
        """Delete one object, if it exists.

        DeleteObjects is not used: it answers 200 for keys that it could not delete, and some
        servers do not support it.
        """
        await self._call("delete_object", patience_s, Key=key)
        return Received(b"", "")

    async def _open(self) -> None:
        # Create the client before the timeout starts, because that takes 0.3 s of CPU, and under a
        # lock, because s3fs would create one for each of the first requests.
        async with self._opening:
            try:
                if self._fs.session is None:
                    from aiobotocore.session import AioSession

                    # As s3fs makes it, except for the parsing: listing 343 objects takes 4 ms of
                    # CPU instead of 20 (obstore: 2.3 ms).
                    session = AioSession(**self._fs.kwargs)
                    session.get_component("response_parser_factory").set_parser_defaults(
                        timestamp_parser=_timestamp
                    )
                    session.get_component("event_emitter").register_first(
                        "before-parse.s3.ListObjectsV2", _parse_objects
                    )
                    self._fs.session = session
                await self._fs.set_session()
            except (TypeError, ValueError) as exc:
                raise _not_accepted(exc) from exc
            except Exception as exc:
                raise _s3_error(exc) from exc

    async def _call(self, method: str, patience_s: float, **kwargs: Any) -> Any:
        await self._open()
        try:
            async with asyncio.timeout(patience_s):
                return await self._fs._call_s3(method, Bucket=self._bucket, **self._payer, **kwargs)
        except Exception as exc:
            raise _s3_error(exc) from exc


def _is_part(answer: Mapping[str, Any], part: tuple[int, int]) -> bool:
    """Whether an answer is the part that was requested.

    Some servers and proxies send the whole object for a range, or another range of it.
    """
    range_sent = f"bytes {part[0]}-{part[1] - 1}/"
    is_partial = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    return is_partial and str(answer.get("ContentRange", "")).startswith(range_sent)


def _info(
    answer: Mapping[str, Any], key: str | None, size_bytes: int | None, listed_s: float = 0.0
) -> ObjectInfo:
    if key is None or size_bytes is None or size_bytes < 0:
        # Not a KeyError, which zarr takes for a key that does not exist.
        raise S3Error(None, "BadAnswer", "the server names an object without its key or size")
    modified_s = _modified_s(answer)
    version = version_of(answer.get("ETag"), modified_s)
    return ObjectInfo(key, size_bytes, version, modified_s, listed_s)


def _modified_s(answer: Mapping[str, Any]) -> float:
    modified = answer.get("LastModified")
    return float(modified.timestamp()) if modified is not None else 0.0


def _date_s(header: str | None) -> float:
    """Seconds since 1970 by the clock of the server; 0.0 if it sends no ``Date``.

    By this machine's, which has fractions, if both agree.
    """
    try:
        date_s = parsedate_to_datetime(header or "").timestamp()
    except ValueError:
        return 0.0
    now_s = time.time()
    return now_s if 0.0 <= now_s - date_s < _AGREE_S else date_s


def _page(answer: Mapping[str, Any], prefix: str, delimiter: str) -> Page:
    """Check one answer to ListObjectsV2. A field that is missing is an error, never a default."""

    def incomplete(why: str) -> S3Error:
        return S3Error(200, "IncompleteListing", why)

    listed_s = _date_s(answer["ResponseMetadata"]["HTTPHeaders"].get("date"))
    objects = [_info(o, o.get("Key"), o.get("Size"), listed_s) for o in answer.get("Contents", [])]
    prefixes = [str(p.get("Prefix", "")) for p in answer.get("CommonPrefixes", [])]
    n = len(objects) + len(prefixes)
    token = answer.get("NextContinuationToken") or None
    if "IsTruncated" not in answer:
        raise incomplete("it does not say whether more objects follow (no IsTruncated)")
    if answer["IsTruncated"] and token is None:
        raise incomplete(
            f"it says after {n} names that more follow (IsTruncated), and does not say where "
            "(no NextContinuationToken)"
        )
    if answer.get("KeyCount", 0) > n:
        raise incomplete(f"it announces {answer['KeyCount']} names and has {n}")
    if not all(o.key.startswith(prefix) for o in objects) or not all(
        p.startswith(prefix) for p in prefixes
    ):
        raise incomplete(f"it has names that do not begin with {prefix!r}")
    start = len(prefix)
    if delimiter and any(delimiter in o.key[start:-1] for o in objects):
        raise incomplete(f"it has names below those that were requested (Delimiter {delimiter!r})")
    if prefixes and not delimiter:
        raise incomplete("it has prefixes of objects (CommonPrefixes) instead of all objects")
    # A token is followed even if IsTruncated is false: the next page shows which of them is right.
    return Page(objects, prefixes, token, n >= answer.get("MaxKeys", PAGE_OBJECTS))


def _parse_objects(
    response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any
) -> None:
    """Parse the objects of a LIST before botocore does, which takes four times as long for them.

    botocore parses what remains of the answer, and decodes the keys. It parses all of an answer
    that is not as expected.
    """
    if response_dict["status_code"] != 200:
        return
    try:
        root = ElementTree.fromstring(response_dict["body"])
        namespace, _brace, name = root.tag.rpartition("}")
        if name != "ListBucketResult":
            return
        prefix = namespace + "}" if namespace else ""
        elements = root.findall(f"{prefix}Contents")
        objects = []
        for element in elements:
            fields = {child.tag.removeprefix(prefix): child.text or "" for child in element}
            found: dict[str, Any] = {k: fields[k] for k in ("Key", "ETag") if k in fields}
            if "Size" in fields:
                found["Size"] = int(fields["Size"])
            if "LastModified" in fields:
                found["LastModified"] = _timestamp(fields["LastModified"])
            objects.append(found)
            root.remove(element)
        body = ElementTree.tostring(root)
    except (ElementTree.ParseError, ValueError):
        return
    if objects:
        response_dict["body"] = body
        customized_response_dict["Contents"] = objects


def _timestamp(value: Any) -> datetime:
    """A date of an answer. botocore's own parser takes two thirds of the time of a LIST."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        from botocore.utils import parse_timestamp

        parsed: datetime = parse_timestamp(value)
        return parsed


def _s3_error(exc: BaseException) -> S3Error:
    """Convert an exception. s3fs raises a builtin one, with botocore's ClientError as its cause."""
    from aiohttp import ClientError as HttpError
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    for error in (exc, exc.__cause__):
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response["Error"].get("Code", ""))
            if code.isdigit():  # an answer without a body: botocore puts the status here
                return S3Error(status or int(code), "", "")
            return S3Error(status, code, str(response["Error"].get("Message") or ""))
    if isinstance(exc, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return S3Error(None, "NoCredentials", "")
    if isinstance(exc, boto.ProfileNotFound):
        return S3Error(None, "ProfileNotFound", str(exc))
    if isinstance(
        exc, (boto.UnauthorizedSSOTokenError, boto.SSOTokenLoadError, boto.TokenRetrievalError)
    ):
        return S3Error(None, "UnauthorizedSSOToken", str(exc))
    if isinstance(exc, (boto.ConnectTimeoutError, boto.ReadTimeoutError, TimeoutError)):
        return S3Error(None, "Timeout", "no answer in time")
    cut = (
        boto.ConnectionClosedError,
        boto.IncompleteReadError,
        boto.ResponseStreamingError,
    )
    if isinstance(exc, boto.FlexibleChecksumError):
        return S3Error(None, "Mismatch", "the content does not match the checksum sent with it")
    if isinstance(exc, cut) or "ContentLengthError" in repr(exc):
        return S3Error(None, "ShortBody", "the connection closed in the middle of an answer")
    if "CERTIFICATE_VERIFY_FAILED" in str(exc):
        return S3Error(None, "Certificate", "")
    if isinstance(
        exc, (boto.HTTPClientError, boto.ConnectionError, ResponseParserError, HttpError, OSError)
    ):
        return S3Error(None, "Connection", _reason(exc))
    return S3Error(None, type(exc).__name__, str(exc))


def _reason(exc: BaseException) -> str:
    """The operating system's message, from further down the chain; botocore's repeats the URL."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLError):  # whose errno is not one of the system
            return NO_TLS if "WRONG_VERSION_NUMBER" in str(cause) else str(cause)
        if isinstance(cause, OSError) and cause.errno and cause.strerror:
            return os.strerror(cause.errno) if cause.errno > 0 else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(exc)
