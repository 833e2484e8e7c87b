"""S3 through obstore: the fast engine. The only import of obstore.

obstore's threads do not survive a fork: a child whose parent has used it hangs or aborts at its
first request.  ``is_usable`` knows.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import re
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.asyn import get_loop

from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig
from zarrcache.origin._backoff import Backoff
from zarrcache.origin._concurrent import (
    PAGE_OBJECTS,
    SLOWEST_BYTES_PER_S,
    Page,
    Received,
    pump,
    pump_threads,
    run,
)
from zarrcache.origin._s3_errors import S3Fault
from zarrcache.origin._s3_options import S3Options

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, S3Credential, S3Store

__all__ = ["CannotNameError", "ObstoreEngine", "can_name", "is_usable"]

#: botocore renews credentials that have less than 10 minutes left; asking it every few minutes is
#: enough.
CREDENTIALS_TTL = timedelta(minutes=10)

#: A small object is asked for in a thread of its own, which costs a third of the CPU of a
#: coroutine, but which nothing can interrupt. So the request may take this long and no longer: S3's
#: own advice for requests below 512 KB is to ask again after 2 seconds.
QUICK_S = 2.0
QUICK_BYTES = 512 * 1024
#: Where more than this share is late, the line is slow and not the odd request: for a while nothing
#: is tried the quick way.
_LATE_SHARE = 0.05
_PATIENT_S = 60.0

_broken_by_fork = False


def is_usable() -> bool:
    """False in a process that was forked from one in which obstore was loaded, by us or by anybody."""
    return not _broken_by_fork


_EXIT_WAIT_S = 0.05


@functools.cache
def _settle_at_exit() -> None:
    """Let obstore's threads finish waking the loop before the interpreter goes: one that asks for
    it later aborts the process.

    Measured: 7 of 60 scripts that ended right after a LIST died with SIGABRT, their work done; none
    with this pause.
    """
    atexit.register(time.sleep, _EXIT_WAIT_S)


@functools.cache
def _threads() -> Executor:
    """Threads for quick requests, started as they are needed. They are joined before the
    interpreter goes.
    """
    return ThreadPoolExecutor(1024, thread_name_prefix="zarrcache-get")


def _after_fork_in_child() -> None:
    global _broken_by_fork
    _broken_by_fork = _broken_by_fork or "obstore" in sys.modules


os.register_at_fork(after_in_child=_after_fork_in_child)


class CannotNameError(Exception):
    """The listing holds names that obstore refuses or returns changed. Internal: such a listing
    goes through s3fs.
    """


_UNNAMEABLE = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")


def can_name(path: str) -> bool:
    """Whether obstore takes this key, or this prefix with its slash at the end, as it is: no empty
    segment, no dots alone, no control characters.
    """
    return not path or _UNNAMEABLE.search(path.removesuffix("/")) is None


class ObstoreEngine:
    """Requests to one bucket. One object belongs to one process.

    Parameters
    ----------
    bucket : str
    options : S3Options
    region : str
        The bucket's region; obstore does not follow S3 to another one.
    fetch : FetchConfig
    """

    def __init__(self, bucket: str, options: S3Options, region: str, fetch: FetchConfig) -> None:
        # The package first: it imports obstore.store before it is whole itself, and a thread that
        # finds only this one would go on too early.
        import obstore  # noqa: F401
        from obstore.store import S3Store

        _settle_at_exit()
        self._fetch = fetch
        endpoint, virtual = _endpoint(bucket, options, region)
        credentials = None if options.anon else _Credentials(options)

        def store(*, quick_s: float | None = None) -> S3Store:
            return S3Store(
                bucket,
                config={
                    # Every setting that obstore would otherwise take from the environment, by other
                    # rules than botocore.
                    "endpoint": endpoint,
                    "aws_endpoint_url_s3": endpoint,
                    "region": region,
                    "virtual_hosted_style_request": virtual,
                    "skip_signature": options.anon,
                    "request_payer": options.requester_pays,
                    "s3_express": False,
                },
                client_options=_client_options(endpoint, options, fetch, quick_s),
                retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
                credential_provider=credentials,
            )

        self._store = store()
        self._quick_s = min(QUICK_S, fetch.read_timeout)
        self._quick_store = store(quick_s=self._quick_s)
        self._patient_until_s = 0.0

    def list_page(self, prefix: str, *, patience_s: float, token: str | None = None) -> Page:
        """Every object below ``prefix``, which ends with ``/`` or is empty: all pages in one.

        Raises
        ------
        CannotNameError
        """
        found = run(get_loop(), self._list(prefix, patience_s))
        if not all(o.size_bytes for o in found):
            # Perhaps the marker of a directory: obstore takes the slash off its name, and it cannot
            # be told from an empty object any more.
            raise CannotNameError(prefix)
        return Page(found, [], None)

    def head(self, key: str, *, patience_s: float) -> ObjectInfo | None:
        """One object as a HEAD shows it, None if there is none."""
        return run(get_loop(), self._head(key, patience_s))

    def get_many(
        self, objects: Sequence[ObjectInfo], *, patience_s: float, backoff: Backoff | None = None
    ) -> Generator[tuple[ObjectInfo, Received | S3Fault | None]]:
        """One GET for each object; see ``pump``. A request that is silent for ``patience_s`` is
        given up.

        A small object whose answer is late comes twice: as a time-out, and as what a second,
        patient request brought.
        """
        may_be_quick = patience_s >= self._quick_s and time.monotonic() >= self._patient_until_s
        if may_be_quick and all(obj.size_bytes <= QUICK_BYTES for obj in objects):
            patience_s = min(self._fetch.read_timeout, patience_s) - self._quick_s
            objects = yield from self._get_quickly(
                objects, backoff, may_be_asked_again=patience_s > 0
            )
        if objects:
            yield from pump(
                get_loop(),
                lambda obj: self._get(obj, None, patience_s),
                objects,
                self._fetch.concurrency,
                backoff,
            )

    def _get_quickly(
        self, objects: Sequence[ObjectInfo], backoff: Backoff | None, *, may_be_asked_again: bool
    ) -> Generator[tuple[ObjectInfo, Received | S3Fault | None], None, list[ObjectInfo]]:
        """One GET for each object in threads; those for which it was too quick are returned."""
        late: list[ObjectInfo] = []
        for obj, answer in pump_threads(
            _threads(), self._get_in_thread, objects, self._fetch.concurrency, backoff
        ):
            if may_be_asked_again and (
                (isinstance(answer, S3Fault) and answer.code == "Timeout")
                or (late and answer is None)
            ):
                late.append(obj)
            if answer is not None or not late:
                yield obj, answer
        if len(late) > 1 + _LATE_SHARE * len(objects):
            self._patient_until_s = time.monotonic() + _PATIENT_S
        return late

    def get_range(self, obj: ObjectInfo, start: int, stop: int, *, patience_s: float) -> Received:
        """Bytes ``start`` to ``stop`` (exclusive) of one object."""
        return run(get_loop(), self._get(obj, (start, stop), patience_s))

    async def _list(self, prefix: str, patience_s: float) -> list[ObjectInfo]:
        from obstore.exceptions import InvalidPathError

        found: list[ObjectInfo] = []
        stream = self._store.list(prefix or None, chunk_size=PAGE_OBJECTS)
        try:
            while True:
                async with asyncio.timeout(patience_s):
                    chunk = await anext(stream, None)
                if chunk is None:
                    return found
                found += [_info(meta) for meta in chunk]
        except InvalidPathError as exc:
            raise CannotNameError(prefix) from exc
        except Exception as exc:
            raise _fault(exc) from exc
        finally:
            del stream  # whoever holds it holds its request: a traceback would keep it in flight

    async def _head(self, key: str, patience_s: float) -> ObjectInfo | None:
        try:
            async with asyncio.timeout(patience_s):
                return _info(await self._store.head_async(key))
        except FileNotFoundError:
            return None
        except Exception as exc:
            raise _fault(exc) from exc

    def _get_in_thread(self, obj: ObjectInfo) -> Received:
        try:
            result = self._quick_store.get(obj.key, options=_options(obj))
            return Received(result.bytes(), (result.meta["e_tag"] or "").strip('"'))
        except Exception as exc:
            raise _fault(exc) from exc

    async def _get(
        self, obj: ObjectInfo, part: tuple[int, int] | None, patience_s: float
    ) -> Received:
        size = obj.size_bytes if part is None else part[1] - part[0]
        try:
            async with asyncio.timeout(
                min(self._fetch.read_timeout, patience_s) + size / SLOWEST_BYTES_PER_S
            ):
                result = await self._store.get_async(obj.key, options=_options(obj, part))
                body = await result.bytes_async()
                return Received(body, (result.meta["e_tag"] or "").strip('"'))
        except Exception as exc:
            raise _fault(exc) from exc


def _options(obj: ObjectInfo, part: tuple[int, int] | None = None) -> GetOptions:
    """Only the listed version: of another one not even the bytes come."""
    options: GetOptions = {"if_match": f'"{obj.etag}"'} if obj.etag else {}
    if part is not None:
        options["range"] = part
    return options


class _Credentials:
    """obstore's credential provider: the credentials of ``s3_kwargs``, or botocore's chain
    (profile, environment, SSO, instance, ...).
    """

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._chain: Any = None

    def __call__(self) -> S3Credential:
        if self._options.key is not None and self._options.secret is not None:
            # Through the provider as well: given as settings, obstore would add a session token
            # that it finds in the environment.
            return {
                "access_key_id": self._options.key,
                "secret_access_key": self._options.secret,
                "token": self._options.token,
                "expires_at": None,
            }
        from botocore.credentials import RefreshableCredentials

        if self._chain is None:
            import botocore.session

            self._chain = botocore.session.Session(profile=self._options.profile).get_credentials()
        if self._chain is None:
            raise LookupError("NoCredentials")
        frozen = self._chain.get_frozen_credentials()  # renews what is about to expire
        # What lives shorter than that is asked for before each request, as botocore does it;
        # obstore sees to it that it is not more often.
        is_short = isinstance(self._chain, RefreshableCredentials) and self._chain.refresh_needed(
            CREDENTIALS_TTL.total_seconds()
        )
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + (timedelta(0) if is_short else CREDENTIALS_TTL),
        }


def _endpoint(bucket: str, options: S3Options, region: str) -> tuple[str, bool]:
    """URL to send requests to, and whether the bucket is in its host name."""
    if options.endpoint_url is None:
        scheme = "https" if options.use_ssl else "http"
        domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        # A dot in the bucket's name does not match the certificate's wildcard.
        virtual = options.virtual_hosted is not False and "." not in bucket
        return f"{scheme}://{bucket + '.' if virtual else ''}s3.{region}.{domain}", virtual
    if options.virtual_hosted:
        scheme, _, host = options.endpoint_url.partition("://")
        return f"{scheme}://{bucket}.{host}", True
    return options.endpoint_url, False


def _client_options(
    endpoint: str, options: S3Options, fetch: FetchConfig, quick_s: float | None
) -> ClientConfig:
    client: ClientConfig = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=fetch.connect_timeout),
        "read_timeout": timedelta(seconds=fetch.read_timeout),
        # The default of 30 s for a whole request would cut large objects on a slow line; silence is
        # bounded above, slowness in _get.
        "timeout": timedelta(days=1) if quick_s is None else timedelta(seconds=quick_s),
    }
    if options.verify is False:
        client["allow_invalid_certificates"] = True
    elif isinstance(options.verify, str):
        client["root_certificate"] = Path(options.verify).read_bytes()
    return client


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(
        meta["path"],
        meta["size"],
        (meta["e_tag"] or "").strip('"'),
        meta["last_modified"].timestamp(),
    )


_PROFILE = re.compile(r"ProfileNotFound: ([^\n]*)")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_OS_MESSAGE = re.compile(r'(?:message|error): "(?:failed to lookup address information: )?([^"]*)"')


def _fault(exc: Exception) -> S3Fault:
    """Obstore says everything in the message: one line, then a dump of the error that it comes
    from.
    """
    line, _, dump = str(exc).partition("\n\nDebug source:")
    status, code, message = _STATUS.search(line), _CODE.search(line), _MESSAGE.search(line)
    if status is not None:
        return S3Fault(int(status[1]), code[1] if code else "", message[1] if message else "")
    if "Received redirect without LOCATION" in line:
        return S3Fault(301, "PermanentRedirect", "")
    if "NoCredentials" in line or "NoCredentials" in dump:
        return S3Fault(None, "NoCredentials", "")
    profile = _PROFILE.search(line)
    if profile is not None:
        return S3Fault(None, "ProfileNotFound", profile[1])
    if isinstance(exc, TimeoutError) or "TimedOut" in dump or "kind: Timeout" in dump:
        return S3Fault(None, "Timeout", "no answer in time")
    if "IncompleteBody" in dump or "UnexpectedEof" in dump:
        return S3Fault(None, "ShortBody", "the connection closed in the middle of an answer")
    if "InvalidCertificate" in dump:
        return S3Fault(None, "Certificate", "")
    os_message = _OS_MESSAGE.search(dump)
    if "HTTP error" in line or "InvalidXml" in dump:
        return S3Fault(
            None, "Connection", os_message[1] if os_message else line.rpartition(" - ")[2]
        )
    return S3Fault(None, type(exc).__name__, line)
