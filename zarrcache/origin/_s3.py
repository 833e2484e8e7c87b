"""Stores on S3: `S3Origin`, and `S3Bucket`, which chooses the engine for its requests."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec.asyn import get_loop

from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import ConfigError, OriginNotFoundError
from zarrcache.origin import _obstore, _s3fs
from zarrcache.origin._concurrent import PAGE_OBJECTS, Page, Received, concurrent_requests, run
from zarrcache.origin._retry import Backoff, RetryPolicy, TransientError
from zarrcache.origin._s3_errors import RequestContext, S3Error, changed, to_error
from zarrcache.origin._s3_options import S3Options, split_s3_url
from zarrcache.stats import Counters

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["S3Bucket", "S3Origin"]

T = TypeVar("T")
Engine = _obstore.ObstoreEngine | _s3fs.S3fsEngine

_MD5 = re.compile(r"[0-9a-f]{32}")
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
        self.options = S3Options.of(s3_kwargs)
        if fetch.engine == "obstore" and self.options.only_s3fs:
            raise ConfigError(
                "cache.fetch.engine is obstore, which cannot do "
                f"{', '.join(self.options.only_s3fs)} of s3_kwargs. Remove them, or set engine: "
                "auto."
            )
        self.endpoint = self.options.identity
        self.fetch = fetch
        self.retry = retry
        self.counters = counters if counters is not None else Counters()
        self.backoff = None if writes else Backoff(self.endpoint, node_dir)
        self._writes = writes
        self._region = self.options.region
        self._engines: dict[tuple[int, str], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engines": {}}

    def context(self, url: str, obj: ObjectInfo | None = None) -> RequestContext:
        """The context of a request for ``url``, for its error message."""
        return RequestContext(
            url, self.name, self.endpoint, obj, anon=self.options.anon, writes=self._writes
        )

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
        operation = Operation(self)

        def attempt(remaining_s: float) -> T:
            engine = open_engine()
            self.counters.add(requests=1)
            patience_s = min(self.fetch.read_timeout, remaining_s)
            try:
                answer = run(get_loop(), request(engine, patience_s))
            except S3Error as error:
                if self.backoff is not None:
                    self.backoff.note(error)
                raised = operation.error(error, context, engine)
                raise raised from raised.__cause__
            if self.backoff is not None:
                self.backoff.note(None)
            return answer

        return operation.policy.call(
            attempt, context.url, on_retry=lambda: self.counters.add(retries=1)
        )

    def call_all(
        self,
        request: Callable[[Any, ObjectInfo, float], Coroutine[Any, Any, Received]],
        objects: Collection[ObjectInfo],
        context: RequestContext,
        *,
        open_engine: Callable[[], Engine],
        retry: RetryConfig | None = None,
    ) -> dict[str, Received]:
        """Make one request per object, up to ``fetch.concurrency`` at once; answers by key.

        Parameters
        ----------
        request : callable
            Called with the engine, the object, and the seconds after which a silent server is
            given up.
        retry : RetryConfig, optional
            Overrides the bucket's.
        """
        operation = Operation(self, retry)
        engine: Engine

        def send(missing: list[ObjectInfo], remaining_s: float) -> Any:
            nonlocal engine
            engine = open_engine()
            patience_s = min(self.fetch.read_timeout, remaining_s)
            return concurrent_requests(
                get_loop(),
                lambda obj: request(engine, obj, patience_s),
                missing,
                self.fetch.concurrency,
                self.backoff,
            )

        def accept(obj: ObjectInfo, answer: Received | S3Error) -> tuple[str, Received] | Exception:
            if isinstance(answer, S3Error):
                return operation.error(answer, context, engine)
            return obj.key, answer

        return dict(operation.policy.call_all(objects, send, accept, url_of=lambda _: context.url))

    def list_objects(self, prefix: str, context: RequestContext) -> list[ObjectInfo]:
        """Every object whose key begins with ``prefix``, which ends with ``/`` or is empty."""
        try:
            pages = list(self.pages(prefix, context, open_engine=lambda: self.engine(prefix)))
        except _obstore.CannotNameError:
            pages = list(self.pages(prefix, context))
        return [obj for page in pages for obj in page.objects]

    def pages(
        self,
        prefix: str,
        context: RequestContext,
        *,
        open_engine: Callable[[], Engine] | None = None,
        **options: Any,
    ) -> Iterator[Page]:
        """Every page of a LIST, each with its own attempts; by default through s3fs."""
        token: str | None = None

        def request(engine: Any, patience_s: float) -> Coroutine[Any, Any, Page]:
            page: Coroutine[Any, Any, Page] = engine.list_page(
                prefix, patience_s=patience_s, token=token, **options
            )
            return page

        while True:
            page = self.call(request, context, open_engine=open_engine or self.s3fs)
            if len(page.objects) > PAGE_OBJECTS:  # obstore requests all pages by itself
                self.counters.add(requests=-(-len(page.objects) // PAGE_OBJECTS) - 1)
            yield page
            if (token := page.next_token) is None:
                return

    def engine(self, *paths: str) -> Engine:
        """The engine of this process for objects and prefixes with these full names."""
        if self.fetch.engine == "s3fs" or self.options.only_s3fs:
            return self.s3fs()
        opened: Engine | None = self._engines.get((os.getpid(), "obstore"))
        if opened is None and not _obstore.is_usable():
            return self.s3fs()
        if not all(map(_obstore.can_name, paths)):
            return self.s3fs()
        if opened is not None:
            return opened
        if self._region is None:
            # obstore does not follow redirects to another region
            self._region = (
                self.call(
                    lambda engine, patience_s: engine.bucket_region(patience_s=patience_s),
                    self.context(f"s3://{self.name}"),
                    open_engine=self.s3fs,
                )
                or "us-east-1"
            )
        region = self._region
        return self._opened(
            "obstore",
            lambda: _obstore.ObstoreEngine(self.name, self.options, region, self.fetch),
        )

    def s3fs(self) -> _s3fs.S3fsEngine:
        """The s3fs engine of this process."""
        return self._opened("s3fs", lambda: _s3fs.S3fsEngine(self.name, self.options, self.fetch))

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

    Objects are read through obstore if possible. Directories are listed through s3fs, so that a
    process that forks DataLoader workers does not import obstore, and the workers can use it.

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
        self._has_md5 = True  # an ETag of 32 hex digits is an MD5, until an object disproves it

    def __repr__(self) -> str:
        return f"S3Origin({self.url!r}, endpoint={self.identity!r})"

    def url_of(self, key: str) -> str:
        """Full URL of a key."""
        return f"{self.url}/{key}"

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
            ObjectInfo(o.key[start:], o.size_bytes, o.etag, o.modified_s)
            for o in found
            if len(o.key) > start and not o.key.endswith("/")
        )

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects. See ``Origin.fetch``."""
        listed = {self._prefix + obj.key: obj for obj in objects}
        wanted = [ObjectInfo(key, obj.size_bytes, obj.etag) for key, obj in listed.items()]
        operation = Operation(self._bucket)
        engine: Engine

        def send(missing: list[ObjectInfo], remaining_s: float) -> Any:
            nonlocal engine
            engine = self._bucket.engine(*(obj.key for obj in missing))
            return engine.get_many(missing, patience_s=remaining_s, backoff=self._bucket.backoff)

        def accept(
            full: ObjectInfo, answer: Received | S3Error
        ) -> tuple[ObjectInfo, Buffer] | Exception:
            obj = listed[full.key]
            if isinstance(answer, S3Error):
                return operation.error(answer, self._context(obj.key, obj), engine)
            return self._check(obj, answer, obj.size_bytes) or (obj, answer.body)

        return operation.policy.call_all(
            wanted,
            send,
            accept,
            url_of=lambda full: self.url_of(listed[full.key].key),
            counters=self._bucket.counters,
        )

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes of a listed object. See ``Origin.fetch_range``."""
        if start >= stop:
            return b""
        full = ObjectInfo(self._prefix + obj.key, obj.size_bytes, obj.etag)

        async def request(engine: Engine, patience_s: float) -> bytes:
            received = await engine.get(full, (start, stop), patience_s=patience_s)
            error = self._check(obj, received, stop - start, is_part=True)
            if error is not None:
                raise error
            return bytes(received.body)

        data = self._bucket.call(
            request,
            self._context(obj.key, obj),
            open_engine=lambda: self._bucket.engine(full.key),
        )
        self._bucket.counters.add(fetched_bytes=len(data))
        return data

    def _context(self, key: str, obj: ObjectInfo | None = None) -> RequestContext:
        return self._bucket.context(self.url_of(key), obj)

    def _check(
        self, obj: ObjectInfo, received: Received, size_bytes: int, *, is_part: bool = False
    ) -> Exception | None:
        """Compare ``received`` with the listing: version, length, and MD5 if the ETag is one.

        Returns the error, or None.
        """
        if received.etag and received.etag != obj.etag:
            return changed(self.url_of(obj.key))
        n = memoryview(received.body).nbytes
        if n != size_bytes:
            return TransientError(
                self.url_of(obj.key), f"{n} bytes arrived, {size_bytes} were announced"
            )
        if is_part or not self._has_md5 or not _MD5.fullmatch(obj.etag):
            return None
        if hashlib.md5(received.body, usedforsecurity=False).hexdigest() == obj.etag:
            return None
        # With a KMS key or a customer-provided key the ETag only looks like an MD5; one HEAD tells.
        # The HEAD is not retried by itself: a transient error repeats the whole attempt.
        self._bucket.counters.add(requests=1)
        try:
            self._has_md5 = not run(
                get_loop(),
                self._bucket.s3fs().is_md5_hidden(
                    self._prefix + obj.key, patience_s=self._bucket.fetch.read_timeout
                ),
            )
        except S3Error as error:
            return to_error(error, self._context(obj.key, obj))
        if not self._has_md5:
            return None
        return TransientError(
            self.url_of(obj.key), "the content that arrived does not match its MD5 (ETag)"
        )
