"""Requests to S3 through obstore, the fast engine. The only importer of obstore.

obstore's threads do not survive a fork: a child whose parent has used it hangs or aborts at its
first request. ``is_usable`` returns False there.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from fsspec.asyn import get_loop

from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig
from zarrcache.origin._botocore import S3Settings
from zarrcache.origin._content import etag_in, version_of
from zarrcache.origin._in_flight import InFlight
from zarrcache.origin._requests import (
    SLOWEST_BYTES_PER_S,
    Answers,
    Backoff,
    Received,
    concurrent_requests,
    with_second_requests,
)
from zarrcache.origin._s3_errors import NO_TLS, S3Error
from zarrcache.origin._s3_options import S3Options

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, S3Config, S3Credential, S3Store

__all__ = ["ObstoreEngine", "can_name", "is_usable"]

#: How long obstore keeps credentials. botocore renews those with less than 10 minutes left, so
#: requesting them at this interval is enough.
CREDENTIALS_TTL = timedelta(minutes=10)

#: How long a connection that is not used stays open.
_IDLE = timedelta(seconds=20)
#: Timeout in seconds for a small object that is requested in a thread, which costs a third of the
#: CPU of a coroutine but cannot be interrupted. AWS advises to repeat requests below 512 KB after
#: 2 seconds.
QUICK_S = 2.0
QUICK_BYTES = 512 * 1024
#: If a larger share of the answers is late, the network is slow, not a single request: then no
#: object is requested in a thread for ``_PATIENT_S`` seconds.
_LATE_SHARE = 0.05
_PATIENT_S = 60.0

_broken_by_fork = False


def is_usable() -> bool:
    """False in a process that was forked from one in which obstore was imported, by any code."""
    return not _broken_by_fork


_EXIT_WAIT_S = 0.05
_RUNTIME_THREADS = "TOKIO_WORKER_THREADS"


@functools.cache
def _start_runtime() -> None:
    """Import obstore, and start one thread instead of one per core, unless the user sets a number.

    Each further thread costs CPU, because requests are passed between threads. Measured with 343
    GETs of 12 KB, two cores: 24 ms of CPU with one, 30 with two, 38 with four.

    The package comes first, because it imports obstore.store, which imports the package: if one
    thread imports the package and another obstore.store, the import fails with _DeadlockError (2 of
    12 runs with 16 threads; 0 with the package first in all of them).
    """
    import obstore
    from obstore.store import MemoryStore

    if _RUNTIME_THREADS in os.environ:
        return
    os.environ[_RUNTIME_THREADS] = "1"  # of tokio; read once, at the first request
    try:
        obstore.put(MemoryStore(), "start", b"")
    finally:
        os.environ.pop(_RUNTIME_THREADS, None)


@functools.cache
def _pause_at_exit() -> None:
    """Let obstore's threads finish waking the event loop before the interpreter ends.

    A thread that needs the GIL later aborts the process. Measured: 7 of 60 scripts that ended right
    after a LIST died with SIGABRT; 0 with this pause.
    """
    atexit.register(time.sleep, _EXIT_WAIT_S)


@functools.cache
def _threads() -> Executor:
    """Threads for quick requests, started on demand and joined when the interpreter ends."""
    return ThreadPoolExecutor(1024, thread_name_prefix="zarrcache-get")


# A child destroys nothing of obstore that its parent made: neither what the garbage collector finds
# nor the clients in the file systems that fsspec forgets in a child. The destructors take a lock of
# tokio; a thread that held it at the fork does not exist in the child, which would wait forever
# (docs/explanation/decisions/001-fork-and-sqlite.md).
_engines: WeakValueDictionary[int, ObstoreEngine] = WeakValueDictionary()
_held: list[tuple[list[ObstoreEngine | None], bool]] = []


def _before_fork() -> None:
    # What the program has frozen itself stays frozen in the parent, too.
    is_ours = "obstore" in sys.modules and not gc.get_freeze_count()
    if "obstore" in sys.modules:
        gc.freeze()
    _held.append(([reference() for reference in _engines.valuerefs()], is_ours))


def _after_fork_in_parent() -> None:
    _, is_ours = _held.pop()
    if is_ours:
        gc.unfreeze()


def _after_fork_in_child() -> None:
    global _broken_by_fork
    _broken_by_fork = _broken_by_fork or "obstore" in sys.modules


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


_UNNAMEABLE = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")


def can_name(path: str) -> bool:
    """Whether obstore accepts this key unchanged.

    It does unless the key has an empty segment, a segment of dots only, or control characters.
    """
    return _UNNAMEABLE.search(path) is None


class ObstoreEngine:
    """Requests to one bucket, each a coroutine for fsspec's event loop. One object per process.

    It retries nothing, and it does not delete: obstore's delete sends DeleteObjects (POST), which
    answers 200 for keys that it could not delete, and which some servers do not have.

    Parameters
    ----------
    bucket : str
    options : S3Options
    settings : S3Settings
        Where requests go, how they are signed, what is trusted: what botocore would do. The region
        has to be the bucket's, because obstore does not follow redirects to another one.
    fetch : FetchConfig
    in_flight : InFlight
        Limit of the requests of a fetch.
    """

    def __init__(
        self,
        bucket: str,
        options: S3Options,
        settings: S3Settings,
        fetch: FetchConfig,
        in_flight: InFlight,
    ) -> None:
        _start_runtime()
        from obstore.store import S3Store

        _pause_at_exit()
        self._fetch, self._in_flight = fetch, in_flight
        credentials = _Credentials(options) if settings.is_signed else None

        # Set everything that obstore would otherwise take from the environment, by rules that
        # differ from botocore's.
        config: S3Config = {
            "endpoint": settings.url,
            "aws_endpoint_url_s3": settings.url,
            "region": settings.region,
            "virtual_hosted_style_request": settings.is_virtual_hosted,
            "skip_signature": not settings.is_signed,
            "request_payer": options.requester_pays,
            "s3_express": False,
        }
        if settings.stores_checksum:  # of a PUT; it is computed for the signature anyway
            config["checksum_algorithm"] = "SHA256"

        def store(*, quick_s: float | None = None) -> S3Store:
            return S3Store(
                bucket,
                config=config,
                client_options=_client_options(settings, fetch, quick_s),
                retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
                credential_provider=credentials,
            )

        self._store = store()
        self._quick_s = min(QUICK_S, fetch.read_timeout)
        self._quick_store = store(quick_s=self._quick_s)
        self._patient_until_s = 0.0
        _engines[id(self)] = self

    async def head(self, key: str, *, patience_s: float) -> ObjectInfo | None:
        """HEAD one object; None if it does not exist."""
        try:
            async with asyncio.timeout(patience_s):
                return _info(await self._store.head_async(key))
        except FileNotFoundError:
            return None
        except Exception as exc:
            raise _s3_error(exc) from exc

    def get_many(
        self, objects: Sequence[ObjectInfo], *, patience_s: float, backoff: Backoff | None = None
    ) -> Answers:
        """Make one GET per object. A request that is silent for ``patience_s`` is given up.

        Small objects are requested in threads first. If the answer is late, the object is yielded
        twice: with a timeout, and with the answer to a second, patient request.
        """

        def patiently(objects: Sequence[ObjectInfo]) -> Answers:
            return concurrent_requests(
                get_loop(),
                lambda obj: self.get(obj, patience_s=patience_s),
                objects,
                self._in_flight,
                backoff,
            )

        def again(late: Sequence[ObjectInfo]) -> Answers:
            if len(late) > 1 + _LATE_SHARE * len(objects):
                self._patient_until_s = time.monotonic() + _PATIENT_S
            return patiently(late)

        if (
            patience_s < self._quick_s
            or time.monotonic() < self._patient_until_s
            or any(obj.size_bytes > QUICK_BYTES for obj in objects)
        ):
            return patiently(objects)
        quickly = concurrent_requests(
            _threads(), self._get_quickly, objects, self._in_flight, backoff
        )
        patience_s = min(self._fetch.read_timeout, patience_s) - self._quick_s
        return with_second_requests(quickly, again) if patience_s > 0 else quickly

    async def _get_quickly(self, obj: ObjectInfo) -> Received:
        """GET one small object. Blocks, so it runs in a thread."""
        try:
            result = self._quick_store.get(obj.key, options=_options(obj))
            return _received(result.meta, result.bytes())
        except Exception as exc:
            raise _s3_error(exc) from exc

    async def get(
        self, obj: ObjectInfo, part: tuple[int, int] | None = None, *, patience_s: float
    ) -> Received:
        """GET one object, or ``part`` of it: ``(start, stop)`` in bytes, ``stop`` exclusive."""
        size = obj.size_bytes if part is None else part[1] - part[0]
        try:
            async with asyncio.timeout(
                min(self._fetch.read_timeout, patience_s) + size / SLOWEST_BYTES_PER_S
            ):
                result = await self._store.get_async(obj.key, options=_options(obj, part))
                return _received(result.meta, await result.bytes_async())
        except Exception as exc:
            raise _s3_error(exc) from exc

    async def put(self, key: str, body: bytes, *, patience_s: float) -> Received:
        """Write one object in a single request, so that its ETag is its MD5."""
        try:
            async with asyncio.timeout(patience_s + len(body) / SLOWEST_BYTES_PER_S):
                answer = await self._store.put_async(key, body, use_multipart=False)
                return Received(b"", version_of(answer["e_tag"], 0.0))
        except Exception as exc:
            raise _s3_error(exc) from exc


def _options(obj: ObjectInfo, part: tuple[int, int] | None = None) -> GetOptions:
    """Request the listed version only; the server answers 412 for another one."""
    etag = etag_in(obj.etag)
    options: GetOptions = {"if_match": f'"{etag}"'} if etag else {}
    if part is not None:
        options["range"] = part
    return options


class _Credentials:
    """Credential provider for obstore: ``s3_kwargs``, or botocore's chain.

    The chain is profile, environment, SSO, instance, and so on.
    """

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._chain: Any = None

    def __call__(self) -> S3Credential:
        if self._options.key is not None and self._options.secret is not None:
            # Not as settings: obstore would add a session token that it finds in the environment.
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
        frozen = self._chain.get_frozen_credentials()  # renews them if they are about to expire
        # Credentials with a shorter life are requested before each request, as botocore does;
        # obstore limits the rate.
        is_short = isinstance(self._chain, RefreshableCredentials) and self._chain.refresh_needed(
            CREDENTIALS_TTL.total_seconds()
        )
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + (timedelta(0) if is_short else CREDENTIALS_TTL),
        }


def _client_options(
    settings: S3Settings, fetch: FetchConfig, quick_s: float | None
) -> ClientConfig:
    client: ClientConfig = {
        "allow_http": settings.url.startswith("http://"),
        "connect_timeout": timedelta(seconds=fetch.connect_timeout),
        "read_timeout": timedelta(seconds=fetch.read_timeout),
        # obstore's default of 90 s would keep the files of 192 connections per directory open.
        "pool_idle_timeout": _IDLE,
        # obstore's default of 30 s for a whole request would cut off large objects on a slow
        # network. read_timeout bounds silence; the engine's methods bound slowness.
        "timeout": timedelta(days=1) if quick_s is None else timedelta(seconds=quick_s),
    }
    if settings.verify is False:
        client["allow_invalid_certificates"] = True
    elif isinstance(settings.verify, str):
        client["root_certificate"] = Path(settings.verify).read_bytes()
    if settings.proxy_url is not None:
        client["proxy_url"] = settings.proxy_url
    else:
        # obstore would look for a proxy in the environment, by rules that differ from botocore's
        # (ALL_PROXY, NO_PROXY). It does not if a proxy is given; this one is excluded for the only
        # host that is used.
        client["proxy_url"] = "http://proxy.invalid"
        client["proxy_excludes"] = str(urlsplit(settings.url).hostname)
    return client


def _info(meta: Any) -> ObjectInfo:
    modified_s = meta["last_modified"].timestamp()
    return ObjectInfo(meta["path"], meta["size"], version_of(meta["e_tag"], modified_s), modified_s)


def _received(meta: Any, body: Any) -> Received:
    # Without a Last-Modified header obstore gives 1970.
    return Received(body, version_of(meta["e_tag"], 0.0), meta["last_modified"].timestamp())


_PROFILE = re.compile(r"ProfileNotFound: ([^\n]*)")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_NOT_THE_RANGE = re.compile(
    r"Received non-partial response|Requested \d+\.\.\d+, got|Wanted range|CONTENT_RANGE header"
)
_OS_MESSAGE = re.compile(r'(?:message|error): "(?:failed to lookup address information: )?([^"]*)"')


def _s3_error(exc: Exception) -> S3Error:
    """Convert an exception of obstore. Its message is one readable line, then a dump of causes."""
    line, _, dump = str(exc).partition("\n\nDebug source:")
    status, code, message = _STATUS.search(line), _CODE.search(line), _MESSAGE.search(line)
    if status is not None:
        return S3Error(int(status[1]), code[1] if code else "", message[1] if message else "")
    if "Content-Length Header missing" in line:
        return S3Error(None, "NoLength", "obstore needs Content-Length in each answer")
    if _NOT_THE_RANGE.search(line):
        return S3Error(None, "RangeIgnored", "")
    if "Received redirect without LOCATION" in line:
        return S3Error(301, "PermanentRedirect", "")
    if "NoCredentials" in line or "NoCredentials" in dump:
        return S3Error(None, "NoCredentials", "")
    profile = _PROFILE.search(line)
    if profile is not None:
        return S3Error(None, "ProfileNotFound", profile[1])
    if isinstance(exc, TimeoutError) or "TimedOut" in dump or "kind: Timeout" in dump:
        return S3Error(None, "Timeout", "no answer in time")
    if "IncompleteBody" in dump or "UnexpectedEof" in dump:
        return S3Error(None, "ShortBody", "the connection closed in the middle of an answer")
    if "InvalidCertificate" in dump:
        return S3Error(None, "Certificate", "")
    if "InvalidContentType" in dump:
        return S3Error(None, "Connection", NO_TLS)
    os_message = _OS_MESSAGE.search(dump)
    if "HTTP error" in line or "InvalidXml" in dump:
        return S3Error(
            None, "Connection", os_message[1] if os_message else line.rpartition(" - ")[2]
        )
    return S3Error(None, type(exc).__name__, line)
