"""The `Origin` protocol, and the registry of origins by URL scheme, which packages can extend.

An origin for another kind of storage implements `Origin` and is registered under its URL scheme,
either in code, with `register_origin`, or by an entry point of the group ``zarrcache.origins``,
which also reaches the ``zarrcache`` commands and the worker processes that they start::

    [project.entry-points."zarrcache.origins"]
    gs = "my_package:GoogleOrigin"
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import ConfigError
from zarrcache.origin._local import LocalOrigin
from zarrcache.origin._s3 import S3Origin
from zarrcache.stats import Counters

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BrowsableOrigin",
    "Origin",
    "OriginFactory",
    "open_origin",
    "register_origin",
]

_ENTRY_POINTS = "zarrcache.origins"


class Origin(Protocol):
    """A directory or prefix with stores below it.

    An origin is cheap to create, sends no request until one of its methods is called, and can be
    pickled. It may be used from any thread and on both sides of a fork: clients are opened on
    demand, one set per process, and an inherited one is not used.

    Attributes
    ----------
    url : str
        The root: ``s3://bucket/prefix`` as given, or the absolute path of a directory, without a
        trailing slash.
    identity : str
        Where ``url`` is resolved: ``file``, or the S3 endpoint. Two origins with the same identity
        and URL have the same content, and share entries of a cache.
    """

    @property
    def url(self) -> str: ...
    @property
    def identity(self) -> str: ...

    def list_names(self) -> list[str]:
        """Names of directories and objects directly below the root, sorted.

        Raises
        ------
        OriginNotFoundError
            There is no such bucket or directory, or nothing below an S3 prefix.
        """

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object below ``prefix``, sorted by key; keys are relative to the root.

        A prefix ends with ``/`` (``"mp-1.zarr/"``) or is empty; any other text is the key of one
        object (``"mp-1.zarr.zip"``). Without objects the list is empty.
        """

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects, each as soon as it has arrived, in any order.

        Each is checked against the listing before it is yielded: version, size, and MD5 if the ETag
        is one. Requests are in flight while the consumer works on what has arrived.

        Raises
        ------
        IncompleteArrayError
            An object is gone, was changed since it was listed, or does not have the listed content.
        OriginAccessError, OriginNotFoundError, OriginUnavailableError
        """

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of a listed object.

        Raises
        ------
        As ``fetch``; and RangeIgnoredError if ranges are not supported: the object is then fetched.
        """

    def url_of(self, key: str) -> str:
        """Full URL or path of a key."""


class BrowsableOrigin(Origin, Protocol):
    """An origin whose directories ``zarrcache::`` URLs can list: S3 and local directories."""

    def below(self, path: str) -> BrowsableOrigin:
        """The origin of a directory below this one, over the same connections. No request."""

    def pages(
        self, prefix: str = "", *, recursive: bool = False
    ) -> Iterator[tuple[list[ObjectInfo], list[str]]]:
        """Objects and directories directly below ``prefix``, a page of the listing at a time.

        Parameters
        ----------
        prefix : str
            Ends with ``/`` or is empty.
        recursive : bool
            List the objects of all levels, and no directories.

        Raises
        ------
        OriginNotFoundError
            There is no such bucket or directory. An S3 prefix without objects has empty pages.
        """


class OriginFactory(Protocol):
    """Opens the origin at a URL. Makes no request."""

    def __call__(
        self,
        url: str,
        *,
        s3_kwargs: Mapping[str, Any] | None,
        fetch: FetchConfig,
        retry: RetryConfig,
        counters: Counters | None,
        node_dir: Path | None,
    ) -> Origin: ...


def _open_local(
    url: str, *, retry: RetryConfig, counters: Counters | None, **_: object
) -> LocalOrigin:
    return LocalOrigin(url.removeprefix("file://"), retry=retry, counters=counters)


#: Origins by URL scheme; "" for a path without a scheme.
_factories: dict[str, OriginFactory] = {"": _open_local, "file": _open_local, "s3": S3Origin}


def register_origin(scheme: str, factory: OriginFactory) -> None:
    """Open URLs ``scheme://...`` with ``factory``, in this process and in its forked children.

    Parameters
    ----------
    scheme : str
        ``"gs"`` for ``gs://bucket/prefix``. Replaces a registered one.
    factory : callable
        Called as ``factory(url, s3_kwargs=..., fetch=..., retry=..., counters=...,
        node_dir=...)``, see `open_origin`; returns an `Origin`. Accept ``**options`` for the
        arguments that your storage does not use.

    Raises
    ------
    ConfigError
        ``scheme`` is not the part of a URL before ``://``.
    """
    if not scheme or not scheme.replace("+", "").replace("-", "").replace(".", "").isalnum():
        raise ConfigError(f"{scheme!r} is not a URL scheme. Write for example 'gs', without '://'.")
    _factories[scheme] = factory


def open_origin(
    url: str | os.PathLike[str],
    *,
    s3_kwargs: Mapping[str, Any] | None = None,
    fetch: FetchConfig = FetchConfig(),
    retry: RetryConfig = RetryConfig(),
    counters: Counters | None = None,
    node_dir: Path | None = None,
) -> Origin:
    """Open the origin at ``url``. Sends no request.

    Parameters
    ----------
    url : str or path
        ``s3://bucket/prefix``, a path, ``file:///path``, or a URL of a registered scheme.
    s3_kwargs : mapping, optional
        As for ``s3fs.S3FileSystem``.
    fetch, retry : FetchConfig, RetryConfig
        Engine, concurrency and timeouts; attempts.
    counters : Counters, optional
        Counts requests, retries and fetched bytes.
    node_dir : Path, optional
        A directory that the node's processes share, to announce pauses of all requests to an
        endpoint. Without it, a pause applies to the threads of this process.

    Raises
    ------
    ConfigError
        The scheme is not registered, or ``s3_kwargs`` cannot be used.
    """
    text = os.fspath(url)
    scheme, separator, _ = text.partition("://")
    if text.startswith("s3:/") and not separator:  # what pathlib makes of a URL
        raise ConfigError(
            f"{text!r} has one slash after s3:. Write s3://bucket/prefix, as text: pathlib.Path "
            "drops a slash."
        )
    factory = _factory(scheme if separator else "")
    if factory is None:
        raise ConfigError(
            f"{text!r} is of scheme {scheme}://, which is not supported. Write s3://bucket/prefix, "
            "a path, or file:///path; or add the scheme with zarrcache.origin.register_origin."
        )
    return factory(
        text, s3_kwargs=s3_kwargs, fetch=fetch, retry=retry, counters=counters, node_dir=node_dir
    )


def _factory(scheme: str) -> OriginFactory | None:
    if scheme not in _factories:
        for entry_point in entry_points(group=_ENTRY_POINTS, name=scheme):
            register_origin(scheme, entry_point.load())
    return _factories.get(scheme)
