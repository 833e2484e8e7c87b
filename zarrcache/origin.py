"""Where the data comes from: an S3 bucket, or a directory (``localorigin``)."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import ConfigError, IncompleteArrayError, OriginNotFoundError
from zarrcache.faults import Asked, S3Fault, to_error
from zarrcache.keys import ObjectInfo
from zarrcache.localorigin import LocalOrigin
from zarrcache.retry import RetryPolicy, TransientError, is_transient
from zarrcache.s3options import S3Options, split_s3_url
from zarrcache.stats import Counters

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from zarrcache.engine_obstore import ObstoreEngine
    from zarrcache.engine_s3fs import S3fsEngine
    from zarrcache.pump import Page, Received

__all__ = ["LocalOrigin", "Origin", "S3Origin", "open_origin"]

logger = logging.getLogger(__name__)

_MD5 = re.compile(r"[0-9a-f]{32}")
_PAGE_OBJECTS = 1000


class Origin(Protocol):
    """A place with stores below it.

    An origin is cheap to make, makes no request until it is asked for something, can be pickled, and may be used from any thread and on
    both sides of a fork: clients are opened when they are needed, one set for each process, and never cross over.

    Attributes
    ----------
    url : str
        The root: ``s3://bucket/prefix`` as it was written, or the absolute path of a directory; no slash at the end.
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
        """Every object below ``prefix``, keys relative to the root, sorted by key; ``[]`` if there is none.

        A prefix ends with ``/`` (``"mp-1.zarr/"``) or is empty; anything else is the key of one object (``"mp-1.zarr.zip"``).
        """

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects, each as soon as it is there, in any order.

        Every content is checked against the listing before it is handed over: version, size, and MD5 where the ETag is one.
        Requests are in flight while the consumer works on what it has got.

        Raises
        ------
        IncompleteArrayError
            An object is gone, was changed since it was listed, or does not have the listed content.
        OriginAccessError, OriginNotFoundError, OriginUnavailableError
        """

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of a listed object, of the listed version. Raises like ``fetch``."""

    def url_of(self, key: str) -> str:
        """Full URL or path of a key."""


def open_origin(
    url: str | os.PathLike[str],
    *,
    s3_kwargs: Mapping[str, Any] | None = None,
    fetch: FetchConfig = FetchConfig(),
    retry: RetryConfig = RetryConfig(),
    counters: Counters | None = None,
) -> Origin:
    """The origin at ``url``: ``s3://bucket/prefix``, a path, or ``file:///path``.

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
        return S3Origin(text, s3_kwargs=s3_kwargs, fetch=fetch, retry=retry, counters=counters)
    raise ConfigError(f"{text!r} is of scheme {scheme}://, which is not supported. Write s3://bucket/prefix, a path, or file:///path.")


class S3Origin:
    """A prefix of a bucket.

    Objects come through obstore; directories are listed through s3fs, so that the process which forks DataLoader workers does not touch
    obstore and the workers may use it.

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
    ) -> None:
        self.url = url.rstrip("/")
        self._bucket, prefix = split_s3_url(self.url)
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = S3Options.of(s3_kwargs)
        if fetch.engine == "obstore" and self._options.only_s3fs:
            raise ConfigError(
                f"cache.fetch.engine is obstore, which cannot do {', '.join(self._options.only_s3fs)} of s3_kwargs. Remove them, or set engine: auto."
            )
        self._fetch = fetch
        self._retry = retry
        self._counters = counters if counters is not None else Counters()
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
        for page in self._pages(self._s3fs(), self._prefix, delimiter="/"):
            names |= {p[len(self._prefix) :].rstrip("/") for p in page.prefixes} | {o.key[len(self._prefix) :] for o in page.objects}
        names.discard("")  # a marker object of the "directory" itself
        if not names:
            raise OriginNotFoundError(f"{self.url}: there is nothing below this prefix at {self.identity}. Check the URL and endpoint_url in s3_kwargs.")
        return sorted(names)

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object below ``prefix``. See ``Origin.list_objects``."""
        engine = self._engine()
        full = self._prefix + prefix
        if prefix and not prefix.endswith("/"):
            asked = self._asked(prefix)
            found = self._call(lambda patience_s: engine.head(full, patience_s=patience_s), asked)
            return [] if found is None else [self._relative(found)]
        objects = [self._relative(o) for page in self._pages(engine, full) for o in page.objects]
        return sorted(_without_markers(objects))

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects. See ``Origin.fetch``."""
        missing = {self._prefix + o.key: o for o in objects}
        tried: set[str] = set()
        policy = RetryPolicy(self._retry)
        for attempt in policy:
            failure: Exception | None = None
            wanted = [ObjectInfo(key, o.size_bytes, o.etag) for key, o in missing.items()]
            with contextlib.closing(self._engine().get_many(wanted, patience_s=policy.remaining_s)) as answers:
                for full, answer in answers:
                    if answer is None:
                        continue
                    obj = missing[full.key]
                    self._counters.add(requests=1, retries=int(full.key in tried))
                    tried.add(full.key)
                    problem = to_error(answer, self._asked(obj.key, obj)) if isinstance(answer, S3Fault) else self._problem(obj, answer)
                    if problem is None:
                        del missing[full.key]
                        self._counters.add(fetched_bytes=obj.size_bytes)
                        yield obj, answer.body
                        policy.progress()
                    elif is_transient(problem):
                        failure = problem
                    else:
                        raise problem
            if failure is None:
                return
            with attempt:
                raise failure

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes of a listed object. See ``Origin.fetch_range``."""
        full = ObjectInfo(self._prefix + obj.key, obj.size_bytes, obj.etag)
        engine = self._engine()

        def one(patience_s: float) -> bytes:
            received: Received = engine.get_range(full, start, stop, patience_s=patience_s)
            problem = self._problem(obj, received, part=stop - start)
            if problem is not None:
                raise problem
            return bytes(received.body)

        data = self._call(one, self._asked(obj.key, obj))
        self._counters.add(fetched_bytes=len(data))
        return data
