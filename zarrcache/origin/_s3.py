"""Stores on S3: `S3Origin`, and `S3Bucket`, which chooses the engine for its requests."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec.asyn import get_loop

from zarrcache._keys import ObjectInfo
from zarrcache._units import counted
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import ConfigError, OriginNotFoundError
from zarrcache.origin import _obstore, _s3fs
from zarrcache.origin._botocore import S3Settings, settings_of, trusted_by
from zarrcache.origin._content import CheckedReads
from zarrcache.origin._in_flight import InFlight
from zarrcache.origin._requests import (
    Backoff,
    Page,
    Received,
    RetryPolicy,
    concurrent_requests,
    unsent,
)
from zarrcache.origin._s3_errors import (
    RequestContext,
    S3Error,
    TransientError,
    to_error,
)
from zarrcache.origin._s3_options import (
    AWS_ENDPOINT,
    S3Options,
    check_certificates,
    split_s3_url,
)
from zarrcache.stats import Counters, LogOnce

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["S3Bucket", "S3Origin"]

logger = logging.getLogger(__name__)
_warned = LogOnce()

T = TypeVar("T")
Engine = _obstore.ObstoreEngine | _s3fs.S3fsEngine


_WRITE_ADVICE = (
    "Check that the server runs and is reachable, then convert again: finished stores are skipped."
)


class S3Bucket:
    """Sends requests to one bucket, under the retry policy, through obstore or s3fs.

    obstore is preferred, because it needs a tenth of the CPU. s3fs serves options and names that
    obstore does not support, children that were forked after obstore was imported, and requests
    whose ``open_engine`` selects it. Engines are opened on demand, one set per process; an engine
    inherited over a fork is not used and not closed. Engines are not pickled.

    Parameters
    ----------
    name : str
    s3_kwargs : mapping, optional
        As for ``s3fs.S3FileSystem``.
    fetch, retry, counters
        See :func:`open_origin`.
    node_dir : Path, optional
        See :func:`open_origin`. Only requests that read obey and begin pauses of the node.
    writes : bool
        The requests are part of an upload, which error messages mention.
    """

    def __init__(
        self,
        name: str,
        s3_kwargs: Mapping[str, Any] | None,
        *,
        fetch: FetchConfig,
        retry: RetryConfig,
        counters: Counters | None = None,
        node_dir: Path | None = None,
        writes: bool = False,
    ) -> None:
        self.name = name
        try:
            self.options = S3Options.of(s3_kwargs)
        except S3Error as error:
            raise to_error(error, RequestContext(f"s3://{name}", name, AWS_ENDPOINT)) from error
        self.endpoint = self.options.identity
        #: Nothing but TCP's checksum protects what is sent.
        self.is_plain = (self.options.endpoint_url or "").startswith("http://") or (
            self.options.endpoint_url is None and not self.options.use_ssl
        )
        self.fetch = fetch
        self.in_flight = InFlight(fetch.concurrency, node_dir)
        self._settings: S3Settings | None = None
        self._has_left_obstore = False
        self._needs_s3fs(self.options.only_s3fs)  # refuses or logs them now, not at a request
        self.retry = retry
        self.counters = counters if counters is not None else Counters()
        self.backoff = None if writes else Backoff(self.endpoint, node_dir)
        self._writes = writes
        self._engines: dict[tuple[int, str], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process, maybe on another node, has its own environment and files.
        return {**self.__dict__, "_engines": {}, "_settings": None}

    def context(self, url: str, obj: ObjectInfo | None = None) -> RequestContext:
        """The context of a request for ``url``, for its error message."""
        return RequestContext(
            url, self.name, self.endpoint, obj, anon=self.options.anon, writes=self._writes
        )

    def operation(self, retry: RetryConfig | None = None) -> Operation:
        """A new operation. ``retry`` overrides the bucket's."""
        return Operation(self, retry)

    def call(
        self,
        request: Callable[[Any, float], Coroutine[Any, Any, T]],
        context: RequestContext,
        *,
        open_engine: Callable[[], Engine],
    ) -> T:
        """Make one small request.

        Parameters
        ----------
        request : callable
            Called with the engine and the seconds after which a silent server is given up.
        """

        async def one(engine: Any, _: ObjectInfo, patience_s: float) -> Any:
            return [await request(engine, patience_s)]  # which may be None

        answers: Any = self.call_all(
            one, [ObjectInfo("", 0, "")], lambda _: context, open_engine=open_engine
        )
        (answer,) = answers[""]
        found: T = answer
        return found

    def call_all(
        self,
        request: Callable[[Any, ObjectInfo, float], Coroutine[Any, Any, Received]],
        objects: Collection[ObjectInfo],
        context_of: Callable[[ObjectInfo], RequestContext],
        *,
        open_engine: Callable[[], Engine],
        retry: RetryConfig | None = None,
    ) -> dict[str, Received]:
        """Make one request per object, up to ``in_flight`` at once; answers by key.

        Counts requests, retries and the objects' sizes.

        Parameters
        ----------
        request : callable
            Called with the engine, the object, and the seconds after which a silent server is
            given up. It may raise ``S3Error``.
        context_of : callable
            The context of an object's request, for its error message.
        retry : RetryConfig, optional
            Overrides the bucket's.
        """
        operation = self.operation(retry)
        engine: Engine | None = None

        def send(missing: list[ObjectInfo], remaining_s: float) -> Any:
            nonlocal engine
            try:
                opened = engine = open_engine()
            except S3Error as error:  # the settings cannot be resolved
                return unsent(missing[0], error)
            patience_s = min(self.fetch.read_timeout, remaining_s)
            return concurrent_requests(
                get_loop(),
                lambda obj: request(opened, obj, patience_s),
                missing,
                self.in_flight,
                self.backoff,
            )

        def accept(
            obj: ObjectInfo, answer: Received | S3Error
        ) -> tuple[str, Received] | Exception | None:
            if isinstance(answer, S3Error):
                if self.leaves_obstore(answer, engine):
                    return None
                return operation.error(answer, context_of(obj), engine)
            return obj.key, answer

        return dict(
            operation.policy.call_all(
                objects,
                send,
                accept,
                url_of=lambda obj: context_of(obj).url,
                counters=self.counters,
            )
        )

    def list_objects(self, prefix: str, context: RequestContext) -> list[ObjectInfo]:
        """Every object whose key begins with ``prefix``, which ends with ``/`` or is empty."""
        return [obj for page in self.pages(prefix, context) for obj in page.objects]

    def pages(self, prefix: str, context: RequestContext, *, delimiter: str = "") -> Iterator[Page]:
        """Every page of a LIST, each with its own attempts.

        Through s3fs: obstore does not show whether the server says that it is the last page.

        Raises
        ------
        OriginError
            The listing is not known to be complete: the server contradicts itself.
        """

        def list_page(**position: Any) -> Page:
            page: Page = self.call(
                lambda engine, patience_s: engine.list_page(
                    prefix, patience_s=patience_s, delimiter=delimiter, **position
                ),
                context,
                open_engine=self.s3fs,
            )
            return page

        def incomplete(why: str) -> Exception:
            return to_error(S3Error(200, "IncompleteListing", why), context)

        names: set[str] = set()
        tokens: set[str] = set()
        page = list_page()
        while True:
            keys = {obj.key for obj in page.objects}
            # A common prefix may come twice if its keys cross the end of a page.
            if not names.isdisjoint(keys) or (page.prefixes and names.issuperset(page.prefixes)):
                raise incomplete("a page repeats an earlier one")
            names.update(keys, page.prefixes)
            yield page
            token = page.next_token
            if token is None:
                break
            if token in tokens:
                raise incomplete("a page ends with the token of an earlier one")
            tokens.add(token)
            page = list_page(token=token)
        # Some servers end every listing after one page. Servers without StartAfter repeat it.
        if page.is_full and names:
            after = list_page(start_after=max(names))
            if not names.issuperset([*(obj.key for obj in after.objects), *after.prefixes]):
                raise incomplete(f"it ends after {counted(len(names), 'name')}, but there are more")

    def engine(self, *paths: str) -> Engine:
        """The engine of this process for objects and prefixes with these full names."""
        if self.fetch.engine == "s3fs" or self.options.only_s3fs or self._has_left_obstore:
            return self.s3fs()
        opened: Engine | None = self._engines.get((os.getpid(), "obstore"))
        if opened is None and not _obstore.is_usable():
            return self.s3fs()
        if not all(map(_obstore.can_name, paths)):
            return self.s3fs()
        if opened is not None:
            return opened
        settings = self.settings()
        if self._needs_s3fs(settings.only_s3fs):
            return self.s3fs()
        return self._opened(
            "obstore",
            lambda: _obstore.ObstoreEngine(
                self.name, self.options, settings, self.fetch, self.in_flight
            ),
        )

    def settings(self) -> S3Settings:
        """Settings of botocore's requests to this bucket, in this process.

        Raises
        ------
        ConfigError, S3Error
        """
        if self._settings is None:
            kwargs = self.options.pinned_kwargs
            settings = settings_of(kwargs, self.name)
            if self.options.endpoint_url is None and self.options.region is None:
                # obstore does not follow redirects to another region
                region = self.call(
                    lambda engine, patience_s: engine.bucket_region(patience_s=patience_s),
                    self.context(f"s3://{self.name}"),
                    open_engine=self.s3fs,
                )
                if region not in (None, settings.region):
                    settings = settings_of(kwargs, self.name, region)
            check_certificates(settings.verify)
            self._settings = settings
        return self._settings

    def leaves_obstore(self, error: S3Error, engine: object) -> bool:
        """Whether to repeat a request, and send all later ones, through s3fs; logged once.

        botocore trusts certificates that obstore refuses, such as one that signed itself and is
        also an authority, and it follows a bucket to its region.
        """
        is_obstore = isinstance(engine, _obstore.ObstoreEngine)
        if self.fetch.engine != "auto" or not is_obstore or not error.is_for_botocore:
            return False
        self._has_left_obstore = True
        self._needs_s3fs([f"what this server needs ({error})"])
        return True

    def _needs_s3fs(self, settings: Collection[str]) -> bool:
        """Whether any of these ``settings``, which obstore does not support, is set; logged once.

        ConfigError if there are some and ``fetch.engine`` is obstore.
        """
        if settings and self.fetch.engine == "obstore":
            raise ConfigError(
                f"cache.fetch.engine is obstore, which cannot do {', '.join(settings)}. Remove "
                "them, or set engine: auto."
            )
        if settings and self.fetch.engine == "auto":
            _warned.warning(
                (self.endpoint, *settings),
                logger,
                "%s is read through s3fs, which needs up to ten times the CPU: obstore cannot do "
                "%s (logged once)",
                self.endpoint,
                ", ".join(settings),
            )
        return bool(settings)

    def s3fs(self) -> _s3fs.S3fsEngine:
        """The s3fs engine of this process."""

        def make() -> _s3fs.S3fsEngine:
            # Over http:// too: aiobotocore loads them before it looks at the URL.
            check_certificates(trusted_by(self.options.kwargs))
            return _s3fs.S3fsEngine(self.name, self.options, self.fetch, self.in_flight)

        return self._opened("s3fs", make)

    def _opened(self, name: str, make: Callable[[], T]) -> T:
        key = (os.getpid(), name)
        engine = self._engines.get(key)
        if engine is None:
            # If two threads get here together, one of the two engines is kept.
            engine = self._engines.setdefault(key, make())
        opened: T = engine
        return opened

    def close(self, engine: object) -> None:
        """Forget an engine: the next request opens one with a new session and new credentials."""
        for key, opened in list(self._engines.items()):
            if opened is engine:
                self._engines.pop(key, None)


class Operation:
    """One operation on a bucket: its retry policy, and at most one renewal of the credentials.

    Credentials from a process, SSO or the instance are renewed by the clock, but a server may
    revoke them earlier.
    """

    def __init__(self, bucket: S3Bucket, retry: RetryConfig | None = None) -> None:
        self._bucket = bucket
        retry = retry or bucket.retry
        words = {"verb": "written", "advice": _WRITE_ADVICE} if bucket._writes else {}
        self.policy = RetryPolicy(retry, bucket.backoff, **words)
        # Keys in s3_kwargs cannot be renewed, and a single attempt leaves none for new ones.
        self._can_renew = bucket.options.key is None and retry.attempts > 1
        self._expired: object = None

    def error(self, error: S3Error, context: RequestContext, engine: object) -> Exception:
        """The exception to raise for ``error``; transient if expired credentials can be renewed.

        All requests that were in flight together are then repeated.
        """
        if self._can_renew and error.is_expired and self._expired in (None, engine):
            self._expired = engine
            self._bucket.close(engine)
            raised: Exception = TransientError(context.url, str(error))
            raised.__cause__ = error.__cause__ or error
            return raised
        return to_error(error, context)


class S3Origin:
    """The origin at a prefix of a bucket.

    Objects are read through obstore if possible. Listings go through s3fs, which shows whether they
    are complete. A process that lists directories and forks DataLoader workers thus does not import
    obstore, and the workers can use it.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``.
    s3_kwargs : mapping, optional
        As for ``s3fs.S3FileSystem``.
    fetch, retry, counters, node_dir
        See :func:`open_origin`.

    See Also
    --------
    Origin : contract of the methods.
    """

    def __init__(
        self,
        url: str,
        *,
        s3_kwargs: Mapping[str, Any] | None = None,
        fetch: FetchConfig = FetchConfig(),
        retry: RetryConfig = RetryConfig(),
        counters: Counters | None = None,
        node_dir: Path | None = None,
    ) -> None:
        bucket, prefix = split_s3_url(url)
        self._bucket = S3Bucket(
            bucket, s3_kwargs, fetch=fetch, retry=retry, counters=counters, node_dir=node_dir
        )
        self._prefix = f"{prefix}/" if prefix else ""
        self.url = url.rstrip("/")
        self.identity = self._bucket.endpoint
        self._reads = CheckedReads(self._bucket, self._prefix, self.url)

    def __repr__(self) -> str:
        return f"S3Origin({self.url!r}, endpoint={self.identity!r})"

    def url_of(self, key: str) -> str:
        """Full URL of a key."""
        return f"{self.url}/{key}"

    def below(self, path: str) -> S3Origin:
        """The origin of a prefix below this one, over the same connections."""
        origin = copy.copy(self)
        origin._prefix, origin.url = f"{self._prefix}{path}/", f"{self.url}/{path}"
        origin._reads = self._reads.below(path)
        return origin

    def pages(
        self, prefix: str = "", *, recursive: bool = False
    ) -> Iterator[tuple[list[ObjectInfo], list[str]]]:
        """Objects and directories below ``prefix``. See ``BrowsableOrigin.pages``."""
        start = len(self._prefix)
        for page in self._bucket.pages(
            self._prefix + prefix, self._context(prefix), delimiter="" if recursive else "/"
        ):
            yield (
                [dataclasses.replace(obj, key=obj.key[start:]) for obj in page.objects],
                [name[start:-1] for name in page.prefixes],
            )

    def list_names(self) -> list[str]:
        """Names directly below the prefix. See ``Origin.list_names``."""
        names: set[str] = set()
        for page in self._bucket.pages(self._prefix, self._context(""), delimiter="/"):
            names.update(p.removeprefix(self._prefix).rstrip("/") for p in page.prefixes)
            names.update(o.key.removeprefix(self._prefix) for o in page.objects)
        names.discard("")  # the marker object of the "directory" itself
        if not names:
            raise OriginNotFoundError(
                f"{self.url}: there is nothing below this prefix at {self.identity}. Check the URL "
                "and endpoint_url in s3_kwargs."
            )
        return sorted(names)

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object below ``prefix``. See ``Origin.list_objects``."""
        full = self._prefix + prefix
        context = self._context(prefix)
        if not prefix or prefix.endswith("/"):
            found = self._bucket.list_objects(full, context)
        else:
            one: ObjectInfo | None = self._bucket.call(
                lambda engine, patience_s: engine.head(full, patience_s=patience_s),
                context,
                open_engine=lambda: self._bucket.engine(full),
            )
            found = [] if one is None else [one]
        # Leave out the empty objects that some tools create for directories.
        start = len(self._prefix)
        return sorted(
            ObjectInfo(o.key[start:], o.size_bytes, o.etag, o.modified_s, o.listed_s)
            for o in found
            if len(o.key) > start and not o.key.endswith("/")
        )

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects. See ``Origin.fetch``."""
        return self._reads.fetch(objects)

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes of a listed object. See ``Origin.fetch_range``."""
        return self._reads.fetch_range(obj, start, stop)

    def _context(self, key: str) -> RequestContext:
        return self._bucket.context(self.url_of(key))
