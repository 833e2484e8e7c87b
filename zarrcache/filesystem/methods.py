"""The methods of an fsspec filesystem over `Places`: what users and fsspec call.

What the options of other filesystems mean here, and what is refused.
"""

from __future__ import annotations

import datetime
import io
import operator
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NoReturn, cast

from fsspec.implementations.chained import ChainedFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile
from fsspec.utils import stringify_path, tokenize

from zarrcache._keys import ObjectInfo
from zarrcache.config import CacheConfig
from zarrcache.errors import ConfigError
from zarrcache.filesystem.open_stores import changed_error, stores_of
from zarrcache.filesystem.places import Found, Places
from zarrcache.origin import make_s3fs
from zarrcache.stats import Stats

__all__ = ["ZarrCacheFileSystem"]

_S3 = ("s3", "s3a")
_LOCAL = ("file", "local")
_PREFIXES = ("zarrcache://", "zarrcache::", *(f"{name}://" for name in _S3 + _LOCAL))
#: Options of simplecache that mean something else here.
_INSTEAD = {
    "fs": "Give target_protocol and target_options, or the URL zarrcache::s3://bucket/key.",
    "cache_storage": "Write dir: the directory is that of the cache: block.",
    "compression": "Objects are cached as they are: give compression to fsspec.open.",
    **dict.fromkeys(
        ("expiry_time", "check_files", "cache_check"),
        "Write revalidate: epoch to compare with the origin at each read.",
    ),
    **dict.fromkeys(
        ("same_names", "cache_mapper"),
        "The files of the cache have no names; copy objects with get().",
    ),
}


class ZarrCacheFileSystem(ChainedFileSystem):  # type: ignore[misc]
    """Reads files of S3 or of a directory through the byte tier. Read-only.

    >>> url = "zarrcache::s3://bucket/mp-1.zarr"
    >>> options = {"s3": {"anon": True}, "zarrcache": {"dir": "/scratch/me"}}
    >>> fsspec.open(f"{url}/.zattrs", **options)
    >>> zarr.open_group(url, mode="r", storage_options=options)

    Paths inside a Zarr store (a directory ``*.zarr``) are resolved by the store's listing. With
    ``revalidate: never`` the stored listing is used until `invalidate_cache`. With ``run`` a
    process lists a store once. With ``epoch`` it lists a store each time something in it is opened
    or listed, and compares each chunk with the origin before it is read. Paths outside of stores
    are looked up at the origin each time.

    A chunk that is not listed counts as "not written" only if the metadata of its array is
    there. A store that changes between two reads of its chunks raises `IncompleteArrayError` until
    something in it is opened again, so that one array is never read from two versions.

    Parameters
    ----------
    target_protocol : {"s3", "file"}
        Set by fsspec from the URL.
    target_options : mapping, optional
        ``s3_kwargs``.
    fo : str, optional
        The URL's path, which fsspec passes and which is not used.
    **settings
        Keys of the ``cache:`` block. Without ``dir``, ``ZARRCACHE_DIR`` must be set.

    Raises
    ------
    ConfigError
        Another protocol, or invalid settings.
    """

    protocol: ClassVar[str] = "zarrcache"
    cachable = True  # equal arguments share one instance
    # fsspec's own caching filesystems set it too: otherwise each URL would be another instance.
    _strip_tokenize_options = ("fo",)

    def __init__(
        self,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        fo: str | None = None,
        **settings: Any,
    ) -> None:
        if target_protocol not in _S3 + _LOCAL:
            raise ConfigError(
                f"zarrcache reads s3:// and files, not {target_protocol or 'nothing'}. Write "
                "zarrcache::s3://bucket/key."
            )
        # zarr passes it to every filesystem, and wraps one that is not asynchronous.
        settings.pop("asynchronous", None)
        for name in settings.keys() & _INSTEAD.keys():
            raise ConfigError(f"{name} is an option of simplecache. {_INSTEAD[name]}")
        super().__init__()
        self._is_s3 = target_protocol in _S3
        self._options = dict(target_options or {}) if self._is_s3 else None
        self._config = CacheConfig(**settings)
        self._opened = self._open_places()
        if not self._is_s3:
            self._strip_protocol = _strip_local  # type: ignore[method-assign]

    def _open_places(self) -> tuple[int, Places]:
        return os.getpid(), Places(stores_of(self._config), self._options)

    @property
    def _places(self) -> Places:
        if self._opened[0] != os.getpid():  # locks may be held by threads that a fork did not copy
            self._opened = self._open_places()
        return self._opened[1]

    @property
    def stats(self) -> Stats:
        """Counters of what this process has read through this cache."""
        return self._places.stores.counters.snapshot()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        text = str(stringify_path(path))
        if ":" in text:
            for prefix in _PREFIXES:
                text = text.removeprefix(prefix)
        return text.rstrip("/")

    def unstrip_protocol(self, name: str) -> str:
        """The URL of a path at the origin: ``s3://…`` or ``file://…``."""
        bare = name.removeprefix("zarrcache://")
        protocols = _S3 if self._is_s3 else _LOCAL
        if bare.startswith(tuple(f"{protocol}://" for protocol in protocols)):
            return bare
        return f"{protocols[0]}://{bare}"

    def invalidate_cache(self, path: str | None = None) -> None:
        """List stores again at their next use, at or below ``path`` or all.

        Cached objects are kept: they are found by their version.
        """
        self._places.invalidate(None if path is None else self._strip_protocol(path))
        super().invalidate_cache(path)

    # -- listings

    def ls(self, path: str, detail: bool = True, refresh: bool = False, **kwargs: Any) -> list[Any]:
        """List a directory; a file lists itself. ``""`` lists the buckets.

        Raises
        ------
        FileNotFoundError
        """
        path = self._plain_path(path, kwargs)
        if self._is_s3 and not path:
            found: list[tuple[str, ObjectInfo | None]] = [(name, None) for name in self._buckets()]
        else:
            found = self._places.children(path, refresh=refresh)
            if not found and (obj := self._places.entry(path, refresh=refresh)) is not None:
                found = [(path, obj)]
        found.sort(key=operator.itemgetter(0))
        return [self._info(name, obj) if detail else name for name, obj in found]

    def info(self, path: str, refresh: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Name, size in bytes, type, ETag and time of the last change.

        Raises
        ------
        FileNotFoundError
        """
        path = self._plain_path(path, kwargs)
        return self._info(path, self._places.entry(path, refresh=refresh))

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether there is a file or directory. Errors of the origin are raised, not False."""
        try:
            self.info(path, **kwargs)
        except FileNotFoundError:
            return False
        return True

    def isfile(self, path: str) -> bool:
        """Whether there is a file. Errors of the origin are raised, not False."""
        try:
            return bool(self.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def isdir(self, path: str) -> bool:
        """Whether there is a directory. Errors of the origin are raised, not False."""
        try:
            return self._places.is_directory(self._plain_path(path))
        except FileNotFoundError:
            return False

    def walk(
        self,
        path: str,
        maxdepth: int | None = None,
        topdown: bool = True,
        on_error: Any = "omit",
        **kwargs: Any,
    ) -> Iterator[Any]:
        """As in fsspec, except that ``on_error="omit"`` omits only paths that do not exist."""
        path = self._plain_path(path)
        self._refuse_root(path)
        if on_error == "omit":
            on_error = _raise_unless_absent
        is_absent = True
        for level in super().walk(path, maxdepth, topdown, on_error, **kwargs):
            is_absent = False
            yield level
        if is_absent:  # as s3fs
            yield (path, {}, {}) if kwargs.get("detail") else (path, [], [])

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        prefix: str = "",
        **kwargs: Any,
    ) -> Any:
        """Files below a directory.

        On S3 and without ``maxdepth``, one LIST per 1,000 objects.
        """
        path = self._plain_path(path, kwargs)
        self._refuse_root(path)
        if self._is_s3 and not maxdepth:
            refresh = bool(kwargs.get("refresh"))
            objects = self._places.files_below(path, prefix, refresh=refresh)
            entries: dict[str, ObjectInfo | None] = {**objects}
            for name in objects if withdirs else ():
                # The directory itself is among them, as in s3fs, unless it is a bucket.
                name = name.rpartition("/")[0]
                while "/" in name and len(name) >= len(path) and entries.get(name, "") is not None:
                    entries[name] = None
                    name = name.rpartition("/")[0]
            found = {name: self._info(name, entries[name]) for name in sorted(entries)}
        else:
            found = super().find(path, maxdepth, withdirs, detail=True, **kwargs)
            if path in found and not found[path]:  # fsspec has {} for a file
                found[path] = self.info(path)
            start = f"{path}/{prefix}"
            found = {n: i for n, i in found.items() if not prefix or n.startswith(start)}
        return found if detail else list(found)

    def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
        """As in fsspec. A pattern for the bucket is refused."""
        if self._is_s3 and self._strip_protocol(path)[:1] in ("*", "?", "["):
            self._refuse_root("")
        return super().glob(path, maxdepth, **kwargs)

    def du(
        self,
        path: str,
        total: bool = True,
        maxdepth: int | None = None,
        withdirs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Bytes below a directory: their sum, or by path."""
        found = self.find(path, maxdepth, withdirs, detail=True, **kwargs)
        sizes = {name: info["size"] for name, info in found.items()}
        return sum(sizes.values()) if total else sizes

    def modified(self, path: str) -> datetime.datetime:
        """Time of the last change of a file, by the origin's clock.

        Raises
        ------
        IsADirectoryError
        """
        info = self.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(f"{self._places.url(info['name'])} is a directory.")
        return cast("datetime.datetime", info["LastModified"])

    def checksum(self, path: str, refresh: bool = False) -> int:
        """A number that changes with the file's version."""
        info = self.info(path, refresh=refresh)
        digits = str(info.get("ETag", "")).strip('"').partition("-")[0]
        if self._is_s3 and re.fullmatch("[0-9a-fA-F]+", digits):
            return int(digits, 16)
        return int(tokenize(info), 16)

    # -- contents

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """Read a file or a range of it; negative positions count from the end.

        Raises
        ------
        FileNotFoundError
            There is no such file. Never because of an error of the origin.
        IncompleteArrayError
            The store was changed since it was opened, or the bucket or the array's metadata is
            gone.
        """
        found = self._places.content(self._plain_path(path, kwargs))
        first, last, _ = slice(start, end).indices(found.obj.size_bytes)
        return self._places.read(found, first, max(first, last))

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        """Read ranges of files; the ranges of one file are of one version."""
        if max_gap is not None:
            raise NotImplementedError("max_gap is not supported. Leave it out.")
        if not isinstance(paths, list):
            raise TypeError(f"paths is a {type(paths).__name__}; give a list.")
        starts = starts if isinstance(starts, list) else [starts] * len(paths)
        ends = ends if isinstance(ends, list) else [ends] * len(paths)
        if not len(paths) == len(starts) == len(ends):
            raise ValueError("paths, starts and ends differ in length.")
        files: dict[str, Found] = {}
        parts: list[Any] = []
        for path, start, end in zip(paths, starts, ends, strict=True):
            try:
                if path not in files:
                    files[path] = self._places.content(self._plain_path(path, kwargs))
                first, last, _ = slice(start, end).indices(files[path].obj.size_bytes)
                parts.append(self._places.read(files[path], first, max(first, last)))
            except Exception as exc:
                if on_error != "return":
                    raise
                parts.append(exc)
        return parts

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        cache_type: str = "readahead",
        cache_options: dict[str, Any] | None = None,
        etag: str | None = None,
        **kwargs: Any,
    ) -> _File:
        if mode != "rb":
            self._refuse(path)
        path = self._plain_path(path, kwargs)
        found = self._places.find(path)
        if found is None:
            self._places.entry(path)  # raises if there is nothing
            raise IsADirectoryError(f"{self._places.url(path)} is a directory. Name a file in it.")
        if etag is not None and etag != found.obj.etag:
            raise changed_error(self._places.url(path))
        return _File(
            self,
            path,
            found,
            block_size=block_size or self._config.bytes.block_size,
            cache_type=cache_type,
            cache_options=cache_options,
        )

    # -- what is refused

    def _refuse(self, path: Any = "", *args: Any, **kwargs: Any) -> NoReturn:
        raise io.UnsupportedOperation(
            f"zarrcache::{path} is read-only. To write, open it with its own filesystem."
        )

    mkdir = makedirs = rmdir = _refuse
    pipe = pipe_file = put = put_file = touch = start_transaction = _refuse
    cp_file = copy = mv = rm = rm_file = _rm = _refuse

    def _refuse_eviction(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "A file system does not empty the cache, which others use too. Run zarrcache evict "
            "and zarrcache status."
        )

    # Methods of simplecache.
    clear_cache = clear_expired_cache = pop_from_cache = cache_size = _refuse_eviction

    def sign(self, path: str, expiration: int = 100, **kwargs: Any) -> NoReturn:
        """Raise: a signed URL would bypass the cache."""
        raise NotImplementedError(
            f"zarrcache::{path} has no signed URL. Sign it with s3fs.S3FileSystem."
        )

    def _refuse_root(self, path: str) -> None:
        if self._is_s3 and not path:
            raise ValueError("Cannot traverse all of S3. Name a bucket.")

    def _plain_path(self, path: Any, options: Mapping[str, Any] | None = None) -> str:
        """Path without protocol."""
        plain = str(self._strip_protocol(path))
        options = options or {}
        is_version = self._options and self._options.get("version_aware") and "?versionId" in plain
        if is_version or options.get("versions") or options.get("version_id"):
            raise NotImplementedError(
                f"zarrcache::{plain}: only the current version of an object is read. Open others "
                "with s3fs.S3FileSystem(version_aware=True)."
            )
        return plain if self._is_s3 or plain else "/"

    def _parent(self, path: str) -> str:
        return posixpath.dirname(str(self._strip_protocol(path)))

    def _buckets(self) -> list[str]:
        options = {**(self._options or {}), "use_listings_cache": False}
        options.pop("asynchronous", None)
        names: list[str] = make_s3fs(options).ls("", detail=False)
        return names

    def _info(self, name: str, obj: ObjectInfo | None) -> dict[str, Any]:
        """The ``info`` of fsspec for a file, or for a directory (None)."""
        if obj is None:
            return {"name": name, "size": 0, "type": "directory"}
        etag = f'"{obj.etag}"' if self._is_s3 and '"' not in obj.etag else obj.etag
        return {
            "name": name,
            "size": obj.size_bytes,
            "type": "file",
            "ETag": etag,
            "LastModified": datetime.datetime.fromtimestamp(obj.modified_s, datetime.UTC),
            "mtime": obj.modified_s,
        }


class _File(AbstractBufferedFile):  # type: ignore[misc]
    """A file in the version that it had when it was opened."""

    def __init__(self, fs: ZarrCacheFileSystem, path: str, found: Found, **options: Any) -> None:
        self._found = found
        # Keyword arguments are passed to open() if the file is unpickled.
        super().__init__(fs, path, size=found.obj.size_bytes, etag=found.obj.etag, **options)
        self.details = fs._info(path, found.obj)

    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes = self.fs._places.read(self._found, start, min(end, self.size))
        return data


def _strip_local(path: Any) -> Any:
    if isinstance(path, list):
        return [_strip_local(p) for p in path]
    text = str(stringify_path(path)).removeprefix("zarrcache://").removeprefix("zarrcache::")
    return LocalFileSystem._strip_protocol(text)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
