"""Where the data comes from: an S3 bucket, or a directory (``localorigin``)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import ConfigError, IncompleteArrayError, OriginNotFoundError
from zarrcache.origin import _obstore as engine_obstore
from zarrcache.origin import _s3fs as engine_s3fs
from zarrcache.origin._backoff import Backoff
from zarrcache.origin._concurrent import PAGE_OBJECTS, Page, Received, note
from zarrcache.origin._local import LocalOrigin
from zarrcache.origin._renewal import Renewal
from zarrcache.origin._retry import RetryPolicy, TransientError
from zarrcache.origin._s3_errors import RequestContext, S3Fault, to_error
from zarrcache.origin._s3_options import S3Options, split_s3_url
from zarrcache.origin._s3fs import make_s3fs
from zarrcache.stats import Counters

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from zarrcache.origin._obstore import ObstoreEngine
    from zarrcache.origin._s3fs import S3fsEngine

__all__ = ["LocalOrigin", "Origin", "S3Origin", "make_s3fs", "open_origin"]

T = TypeVar("T")

_MD5 = re.compile(r"[0-9a-f]{32}")


class Origin(Protocol):
    """A place with stores below it.

    An origin is cheap to make, makes no request until it is asked for something, can be pickled,
    and may be used from any thread and on both sides of a fork: clients are opened when they are
    needed, one set for each process, and never cross over.

    Attributes
    ----------
    url : str
        The root: ``s3://bucket/prefix`` as it was written, or the absolute path of a directory; no
        slash at the end.
    identity : str
        Where ``url`` is resolved: ``file``, or the S3 endpoint. For ``ArrayKey.origin``.
    """

    @property
    def url(self) -> str: ...
    @property
    def identity(self) -> str: ...

    def list_names(self) -> list[str]:
        """Names of what is directly below the root (directories and objects), sorted.

        Raises
        ------
        OriginNotFoundError
            No such bucket or directory, or nothing below an S3 prefix.
        """

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object below ``prefix``, keys relative to the root, sorted by key; ``[]`` if there
        is none.

        A prefix ends with ``/`` (``"mp-1.zarr/"``) or is empty; anything else is the key of one
        object (``"mp-1.zarr.zip"``).
        """

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects, each as soon as it is there, in any order.

        Every content is checked against the listing before it is handed over: version, size, and
        MD5 where the ETag is one. Requests are in flight while the consumer works on what it has
        got.

        Raises
        ------
        IncompleteArrayError
            An object is gone, was changed since it was listed, or does not have the listed content.
        OriginAccessError, OriginNotFoundError, OriginUnavailableError
        """

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of a listed object, of the listed version. Raises
        like ``fetch``.
        """

    def url_of(self, key: str) -> str:
        """Full URL or path of a key."""


def open_origin(
    url: str | os.PathLike[str],
    *,
    s3_kwargs: Mapping[str, Any] | None = None,
    fetch: FetchConfig = FetchConfig(),
    retry: RetryConfig = RetryConfig(),
    counters: Counters | None = None,
    node_dir: Path | None = None,
) -> Origin:
    """The origin at ``url``: ``s3://bucket/prefix``, a path, or ``file:///path``.

    Parameters
    ----------
    node_dir : Path, optional
        A directory of the node's processes, in which they tell each other to slow down; without,
        those of this process do. See `Backoff`.

    Raises
    ------
    ConfigError
        Another scheme, or ``s3_kwargs`` that cannot be used.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalOrigin(text, retry=retry, counters=counters)
    if scheme == "file":
        return LocalOrigin(rest, retry=retry, counters=counters)
    if scheme == "s3":
        return S3Origin(
            text,
            s3_kwargs=s3_kwargs,
            fetch=fetch,
            retry=retry,
            counters=counters,
            node_dir=node_dir,
        )
    raise ConfigError(
        f"{text!r} is of scheme {scheme}://, which is not supported. Write s3://bucket/prefix, a "
        "path, or file:///path."
    )


class S3Origin:
    """A prefix of a bucket.

    Objects come through obstore; directories are listed through s3fs, so that the process which
    forks DataLoader workers does not touch obstore and the workers may use it.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``.
    s3_kwargs : mapping, optional
        As for ``s3fs.S3FileSystem``.

    See Also
    --------
    Origin : what the methods promise.
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
        self._bucket, prefix = split_s3_url(url)
        self.url = url.rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = S3Options.of(s3_kwargs)
        if fetch.engine == "obstore" and self._options.only_s3fs:
            raise ConfigError(
                "cache.fetch.engine is obstore, which cannot do "
                f"{', '.join(self._options.only_s3fs)} of s3_kwargs. Remove them, or set engine: "
                "auto."
            )
        self._fetch = fetch
        self._retry = retry
        self._counters = counters if counters is not None else Counters()
        self._backoff = Backoff(self._options.identity, node_dir)
        self._region = self._options.region
        self._md5 = True  # ETags of 32 hex digits are MD5 sums until an object shows otherwise
        self._engines: dict[tuple[int, str], Any] = {}

    def __repr__(self) -> str:
        return f"S3Origin({self.url!r}, endpoint={self.identity!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engines": {}}

    @property
    def identity(self) -> str:
        """The endpoint."""
        return self._options.identity

    def url_of(self, key: str) -> str:
        """Full URL of a key."""
        return f"{self.url}/{key}"

    def list_names(self) -> list[str]:
        """Names directly below the prefix. See ``Origin.list_names``."""
        names = set()
        for page in self._pages(self._s3fs, self._prefix, delimiter="/"):
            names |= {p[len(self._prefix) :].rstrip("/") for p in page.prefixes} | {
                o.key[len(self._prefix) :] for o in page.objects
            }
        names.discard("")  # a marker object of the "directory" itself
        if not names:
            raise OriginNotFoundError(
                f"{self.url}: there is nothing below this prefix at {self.identity}. Check the URL "
                "and endpoint_url in s3_kwargs."
            )
        return sorted(names)

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object below ``prefix``. See ``Origin.list_objects``."""
        full = self._prefix + prefix
        if prefix and not prefix.endswith("/"):
            found: ObjectInfo | None = self._call(
                lambda: self._engine(full),
                lambda engine, patience_s: engine.head(full, patience_s=patience_s),
                self._context(prefix),
            )
            return [] if found is None else [self._relative(found)]
        try:
            pages = list(self._pages(lambda: self._engine(full), full))
        except engine_obstore.CannotNameError:
            pages = list(self._pages(self._s3fs, full))
        return sorted(_without_markers([self._relative(o) for page in pages for o in page.objects]))

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects. See ``Origin.fetch``."""
        missing = {self._prefix + o.key: o for o in objects}
        attempts: Counter[str] = Counter()
        policy = RetryPolicy(self._retry, self._backoff)
        renewal = self._renewal()
        for attempt in policy:
            failure: TransientError | None = None
            # a pass that a pause of the node has cut short is no attempt
            while missing and failure is None:
                failure = yield from self._pass(missing, attempts, policy, renewal)
            # there may have been failures all the same: an engine may ask again by itself for what
            # was late
            if not missing:
                return
            with attempt:
                assert failure is not None
                raise failure

    def _pass(
        self,
        missing: dict[str, ObjectInfo],
        attempts: Counter[str],
        policy: RetryPolicy,
        renewal: Renewal,
    ) -> Generator[tuple[ObjectInfo, Buffer], None, TransientError | None]:
        """Ask for all that is missing, and take off what comes. Returns the failure of what has had
        most attempts, None if nothing failed.
        """
        failure: TransientError | None = None
        asked: list[str] = []
        nbytes = 0
        try:
            policy.wait_for_turn(self.url_of(next(iter(missing.values())).key))
            wanted = [ObjectInfo(key, o.size_bytes, o.etag) for key, o in missing.items()]
            engine = self._engine(*missing)
            with contextlib.closing(
                engine.get_many(wanted, patience_s=policy.remaining_s, backoff=self._backoff)
            ) as answers:
                for full, answer in answers:
                    if answer is None:
                        continue
                    obj = missing[full.key]
                    asked.append(full.key)
                    if isinstance(answer, S3Fault):
                        problem: Exception | None = renewal.error(
                            answer, self._context(obj.key, obj), engine
                        )
                    elif (problem := self._problem(obj, answer)) is None:
                        del missing[full.key]
                        nbytes += obj.size_bytes
                        yield obj, answer.body
                        policy.progress()
                    if isinstance(problem, TransientError):
                        problem.attempt = attempts[full.key] + 1
                        failure = (
                            problem
                            if failure is None or problem.attempt > failure.attempt
                            else failure
                        )
                    elif problem is not None:
                        raise problem
        except TransientError as exc:  # it is not our turn before the time is up
            failure = exc
        finally:
            # Once a pass: each time the counters are written to the board that the processes share.
            retries = len(asked) - len(set(asked) - attempts.keys())
            self._counters.add(requests=len(asked), retries=retries, fetched_bytes=nbytes)
            # what was late and asked for again in this pass has had one
            attempts.update(set(asked))
        return failure

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes of a listed object. See ``Origin.fetch_range``."""
        if start >= stop:
            return b""
        full = ObjectInfo(self._prefix + obj.key, obj.size_bytes, obj.etag)

        def one(engine: ObstoreEngine | S3fsEngine, patience_s: float) -> bytes:
            received: Received = engine.get_range(full, start, stop, patience_s=patience_s)
            problem = self._problem(obj, received, part=stop - start)
            if problem is not None:
                raise problem
            return bytes(received.body)

        data = self._call(lambda: self._engine(full.key), one, self._context(obj.key, obj))
        self._counters.add(fetched_bytes=len(data))
        return data

    def _pages(
        self, open_engine: Callable[[], ObstoreEngine | S3fsEngine], prefix: str, **options: Any
    ) -> Iterator[Page]:
        """Every page of a LIST, each with its own attempts."""
        asked = self._context(prefix.removeprefix(self._prefix))
        token: str | None = None
        while True:
            more = {**options, "token": token}
            page: Page = self._call(
                open_engine,
                lambda engine, more=more, **patience: engine.list_page(prefix, **more, **patience),
                asked,
            )
            # obstore follows the pages by itself; each was a request.
            self._counters.add(requests=max(0, -(-len(page.objects) // PAGE_OBJECTS) - 1))
            yield page
            if (token := page.next_token) is None:
                return

    def _call(
        self, open_engine: Callable[[], Any], request: Callable[..., T], asked: RequestContext
    ) -> T:
        """One small request under the retry policy. ``request`` takes the engine and
        ``patience_s``.
        """
        policy = RetryPolicy(self._retry, self._backoff)
        renewal = self._renewal()

        def attempt() -> T:
            policy.wait_for_turn(asked.url)
            engine = open_engine()
            self._counters.add(requests=1)
            try:
                answer = request(
                    engine, patience_s=min(self._fetch.read_timeout, policy.remaining_s)
                )
            except S3Fault as fault:
                note(fault, self._backoff)
                raise renewal.error(fault, asked, engine) from fault.__cause__
            note(answer, self._backoff)
            return answer

        return policy.call(attempt, on_retry=lambda: self._counters.add(retries=1))

    def _engine(self, *paths: str) -> ObstoreEngine | S3fsEngine:
        """What these objects come through in this process."""
        if (
            self._fetch.engine == "s3fs"
            or self._options.only_s3fs
            or not engine_obstore.is_usable()
            or not all(map(engine_obstore.can_name, paths))
        ):
            return self._s3fs()
        if self._region is None:
            # obstore does not follow S3 to another region.
            self._region = (
                self._call(
                    self._s3fs,
                    lambda engine, **patience: engine.bucket_region(**patience),
                    self._context(""),
                )
                or "us-east-1"
            )
        region = self._region
        engine: ObstoreEngine = self._opened(
            "obstore",
            lambda: engine_obstore.ObstoreEngine(self._bucket, self._options, region, self._fetch),
        )
        return engine

    def _s3fs(self) -> S3fsEngine:
        engine: S3fsEngine = self._opened(
            "s3fs", lambda: engine_s3fs.S3fsEngine(self._bucket, self._options, self._fetch)
        )
        return engine

    def _opened(self, name: str, make: Callable[[], Any]) -> Any:
        """An engine of this process; what was inherited over a fork is left alone, not even closed."""
        key = (os.getpid(), name)
        engine = self._engines.get(key)
        if engine is None:
            # of two threads that come here together, one engine wins
            engine = self._engines.setdefault(key, make())
        return engine

    def _renewal(self) -> Renewal:
        # Explicit keys stay what they are, and an only attempt leaves nothing to try new ones in.
        return Renewal(
            self._engines if self._options.key is None and self._retry.attempts > 1 else None
        )

    def _context(self, key: str, obj: ObjectInfo | None = None) -> RequestContext:
        return RequestContext(
            self.url_of(key), self._bucket, self.identity, obj, self._options.anon
        )

    def _relative(self, obj: ObjectInfo) -> ObjectInfo:
        return ObjectInfo(obj.key[len(self._prefix) :], obj.size_bytes, obj.etag, obj.modified_s)

    def _problem(
        self, obj: ObjectInfo, received: Received, *, part: int | None = None
    ) -> Exception | None:
        """What is wrong with a body, None if it is what the listing promised. The version, then the
        length, then the MD5.
        """
        url = self.url_of(obj.key)
        if received.etag and received.etag != obj.etag:
            return IncompleteArrayError(
                f"{url} was changed while it was being read. Read it again when the writer has "
                "finished."
            )
        length, expected = (
            memoryview(received.body).nbytes,
            obj.size_bytes if part is None else part,
        )
        if length != expected:
            return TransientError(url, f"{length} bytes arrived, {expected} were announced")
        if part is not None or not self._md5 or not _MD5.fullmatch(obj.etag):
            return None
        if hashlib.md5(received.body, usedforsecurity=False).hexdigest() == obj.etag:
            return None
        # With a key of KMS or of the customer the ETag looks like an MD5 and is none. Only asked
        # for when one does not match. Not tried again here: the whole attempt is.
        self._counters.add(requests=1)
        try:
            if self._s3fs().is_md5_hidden(
                self._prefix + obj.key, patience_s=self._fetch.read_timeout
            ):
                self._md5 = False
                return None
        except S3Fault as fault:
            return to_error(fault, self._context(obj.key, obj))
        return TransientError(url, "the content that arrived does not match its MD5 (ETag)")


def _without_markers(objects: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    """Without the empty objects that some tools make for directories."""
    return [o for o in objects if o.key and not o.key.endswith("/")]
