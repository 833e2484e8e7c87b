"""The byte tier as an fsspec filesystem: ``zarrcache::s3://bucket/key``.

Registered through the ``fsspec.specs`` entry point, so that all code that takes an fsspec URL can
read through the cache.

fsspec keeps one instance per thread and set of arguments, for the life of the process. Instances
are therefore small: the cache, its connections and the open stores are in `_Shared`, one per
process and configuration.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import posixpath
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast

from fsspec.implementations.chained import ChainedFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile
from fsspec.utils import stringify_path, tokenize

from zarrcache._keys import ObjectInfo, source_digest
from zarrcache.cache import Cache, CachedStore, read_range
from zarrcache.config import CacheConfig
from zarrcache.errors import (
    ConfigError,
    IncompleteArrayError,
    OriginError,
    OriginNotFoundError,
)
from zarrcache.origin import BrowsableOrigin, make_s3fs
from zarrcache.stats import Counters, Stats

__all__ = ["ZarrCacheFileSystem"]

_S3 = ("s3", "s3a")
_LOCAL = ("file", "local")
_PREFIXES = ("zarrcache://", "zarrcache::", *(f"{name}://" for name in _S3 + _LOCAL))
#: Documents that zarr reads when it opens an array or group.
_METADATA = frozenset({".zarray", ".zattrs", ".zgroup", ".zmetadata", "zarr.json"})
#: A chunk's key below its array: ``0.0.0``, ``0/0/0`` (v2), ``c/0/0/0``, ``c.0.0.0``, ``c`` (v3).
_CHUNK = re.compile(r"(c|\d+)([./]\d+)*")
#: Stores whose listings are in memory, and objects in them: 30 MB.
_MAX_STORES = 64
_MAX_OBJECTS = 100_000
#: Stores whose version is remembered, 200 bytes each.
_MAX_VERSIONS = 100_000
_MAX_INVALIDATED = 1000

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
        self._origin_id = tokenize(self._is_s3, self._options)
        self._config = CacheConfig(**settings)
        self._opened = (os.getpid(), _shared(self._config))
        #: Errors of listing a path that is a file or absent. On S3 the listing has empty pages.
        self._absent_errors = () if self._is_s3 else (FileNotFoundError,)
        if not self._is_s3:
            self._strip_protocol = _strip_local  # type: ignore[method-assign]

    @property
    def _state(self) -> _Shared:
        if self._opened[0] != os.getpid():  # locks may be held by threads that a fork did not copy
            self._opened = (os.getpid(), _shared(self._config))
        return self._opened[1]

    @property
    def stats(self) -> Stats:
        """Counters of what this process has read through this cache."""
        return self._state.counters.snapshot()

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
        self._state.invalidate(
            self._origin_id, None if path is None else self._strip_protocol(path)
        )
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
            infos = self._buckets()
        else:
            infos = self._children(path, refresh=refresh)
            if not infos:
                info = self._info(path, refresh=refresh)
                infos = [info] if info["type"] == "file" else []
        infos.sort(key=_name)
        return infos if detail else [info["name"] for info in infos]

    def info(self, path: str, refresh: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Name, size in bytes, type, ETag and time of the last change.

        Raises
        ------
        FileNotFoundError
        """
        return self._info(self._plain_path(path, kwargs), refresh=refresh)

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
            return self._is_directory(self._plain_path(path))
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
        """As in fsspec, except that ``on_error="omit"`` omits only what is not there."""
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
            found = self._find_all(path, withdirs=withdirs, prefix=prefix, refresh=refresh)
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
            raise IsADirectoryError(f"{self._url(info['name'])} is a directory.")
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
        found = self._content(self._plain_path(path, kwargs))
        first, last, _ = slice(start, end).indices(found.obj.size_bytes)
        return self._read(found, first, max(first, last))

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
        files: dict[str, _Found] = {}
        parts: list[Any] = []
        for path, start, end in zip(paths, starts, ends, strict=True):
            try:
                if path not in files:
                    files[path] = self._content(self._plain_path(path, kwargs))
                first, last, _ = slice(start, end).indices(files[path].obj.size_bytes)
                parts.append(self._read(files[path], first, max(first, last)))
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
        found = self._find(path)
        if found is None:
            self._info(path)  # raises if there is nothing
            raise IsADirectoryError(f"{self._url(path)} is a directory. Name a file in it.")
        if etag is not None and etag != found.obj.etag:
            raise _changed(self._url(path))
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
        """Refused: a signed URL would go past the cache."""
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

    # -- lookups

    def _url(self, path: str) -> str:
        return f"s3://{path}" if self._is_s3 else path

    def _parent(self, path: str) -> str:
        return posixpath.dirname(str(self._strip_protocol(path)))

    def _place(self, path: str) -> _Place:
        """The origin of a path, its key there, and the store that contains it. No request."""
        if self._is_s3:
            bucket, _, key = path.partition("/")
            root, above = self._state.cache.origin(f"s3://{bucket}", self._options), f"{bucket}/"
        else:
            root, above, key = self._state.cache.origin("/"), "/", path.strip("/")
        origin = cast("BrowsableOrigin", root)
        parts = key.split("/")
        for i, part in enumerate(parts):
            if part.endswith(".zarr") and part != ".zarr":
                directory, inside = "/".join(parts[:i]), "/".join(parts[i + 1 :])
                store_id = (self._origin_id, above + "/".join(parts[: i + 1]))
                return _Place(origin, above, key, store_id, directory, part, inside)
        return _Place(origin, above, key)

    def _store(
        self, place: _Place, *, is_opening: bool = True, refresh: bool = False
    ) -> CachedStore | None:
        """The store that contains a place, if there is one with objects."""
        if place.store_id is None:
            return None
        with self._asking(place):
            return self._state.store(place, is_opening=is_opening, refresh=refresh)

    @contextlib.contextmanager
    def _asking(self, place: _Place) -> Iterator[None]:
        """Wrap requests: a bucket that answered before and is gone is an error of the origin."""
        bucket = (self._origin_id, place.above)
        try:
            yield
        except OriginNotFoundError as exc:
            if self._is_s3 and bucket in self._state.buckets:
                raise OriginError(str(exc)) from exc
            raise
        self._state.buckets.add(bucket)

    def _find(self, path: str, *, is_opening: bool = True) -> _Found | None:
        """A file; None if there is no such file."""
        place = self._place(path)
        store = self._store(place, is_opening=is_opening)
        if store is not None:
            obj = store.objects().get(place.inside)
            if not is_opening and self._config.revalidate == "epoch":
                listed = [] if obj is None else [obj]
                now = store.origin.list_objects(f"{store.name}/{place.inside}")
                if source_digest(now) != source_digest(listed):
                    raise self._state.changed(place, store)
            return None if obj is None else _Found(place, obj, store)
        obj = self._head(place)
        return _Found(place, obj, None) if obj is not None else None

    def _head(self, place: _Place) -> ObjectInfo | None:
        """An object outside of stores, looked up at the origin."""
        listed = place.origin.list_objects(place.key) if place.key else []
        if not listed:  # which says nothing about the bucket
            return None
        self._state.buckets.add((self._origin_id, place.above))
        return listed[0]

    def _content(self, path: str) -> _Found:
        """A file that is to be read, perhaps as a chunk of an open array."""
        try:
            found = self._find(path, is_opening=posixpath.basename(path) in _METADATA)
            if found is None:
                raise self._absent(path)
        except OriginNotFoundError as exc:
            if not self._is_s3 and posixpath.basename(path) in _METADATA:
                raise  # there is no such directory
            # zarr would take a FileNotFoundError for a chunk that was never written.
            raise IncompleteArrayError(str(exc)) from exc
        return found

    def _read(self, found: _Found, start: int, stop: int) -> bytes:
        origin, obj = found.place.origin, found.obj
        if found.store is not None:
            try:
                return found.store.read(obj, start, stop)
            except IncompleteArrayError:
                self._state.changed(found.place, found.store)
                raise
        tier = self._state.cache.bytes(origin)
        try:
            if tier is not None:
                return tier.read(obj, start, stop)
            return read_range(origin, obj, start, stop)
        except OriginNotFoundError as exc:
            raise IncompleteArrayError(str(exc)) from exc

    def _absent(self, path: str) -> Exception:
        """The error for a file that is not there: for a chunk, if its array is there."""
        place = self._place(path)
        store = self._store(place, is_opening=False)
        parts = (place.key if store is None else place.inside).split("/")
        splits = [(parts[:n], "/".join(parts[n:])) for n in range(len(parts))]
        documents = [
            "/".join([*array, name])
            for array, chunk in splits
            if _CHUNK.fullmatch(chunk)
            # The one of the chunk's format first.
            for name in sorted((".zarray", "zarr.json"), reverse=chunk[0] == "c")
        ]
        is_there = any(
            place.origin.list_objects(key) if store is None else key in store.objects()
            for key in documents
        )
        # Raises if the bucket is gone.
        with contextlib.suppress(*self._absent_errors):
            is_there = is_there or self._is_directory(path, is_opening=False)
        if documents and not is_there:
            return IncompleteArrayError(
                f"{self._url(path)} is not there, and no array that it is a chunk of (no zarr.json "
                "or .zarray above it). If the array was open, it was deleted meanwhile."
            )
        return _no_such_file(self._url(path))

    def _info(self, path: str, *, refresh: bool = False) -> dict[str, Any]:
        if path in ("", "/"):
            return _directory_info(path)
        place = self._place(path)
        store = self._store(place, refresh=refresh)
        obj = self._head(place) if store is None else store.objects().get(place.inside)
        if obj is not None:
            return self._file_info(path, obj)
        if self._is_directory(path, is_opening=False):
            return _directory_info(path)
        raise _no_such_file(self._url(path))

    def _is_directory(self, path: str, *, is_opening: bool = True) -> bool:
        if path in ("", "/"):
            return True
        place = self._place(path)
        if (store := self._store(place, is_opening=is_opening)) is not None:
            below = f"{place.inside}/"
            return not place.inside or any(key.startswith(below) for key in store.objects())
        with self._asking(place):
            # Stops at the first page with a name.
            is_full = any(map(any, place.origin.pages(place.below)))
        return is_full or not place.key or not self._is_s3

    def _children(self, path: str, *, refresh: bool) -> list[dict[str, Any]]:
        """Files and directories directly below a path; empty if it is not a directory."""
        place = self._place(path)
        store = self._store(place, refresh=refresh)
        if store is not None:
            below = f"{place.inside}/" if place.inside else ""
            names: dict[str, ObjectInfo | None] = {}
            for key, obj in store.objects().items():
                if key.startswith(below):
                    name, separator, _ = key[len(below) :].partition("/")
                    names[f"{path}/{name}"] = None if separator else obj
            return [
                _directory_info(name) if obj is None else self._file_info(name, obj)
                for name, obj in names.items()
            ]
        infos = []
        with contextlib.suppress(*self._absent_errors), self._asking(place):
            for objects, directories in place.origin.pages(place.below):
                infos += [self._file_info(place.above + obj.key, obj) for obj in objects]
                infos += [_directory_info(place.above + key) for key in directories]
        return infos

    def _find_all(self, path: str, *, withdirs: bool, prefix: str, refresh: bool) -> dict[str, Any]:
        place = self._place(path)
        store = self._store(place, refresh=refresh)
        start = place.below + prefix
        infos = []
        if store is not None:
            skipped = len(place.key) - len(place.inside)  # the store's key, and a slash
            for key, obj in store.objects().items():
                full = place.key[:skipped].rstrip("/") + f"/{key}"
                if full.startswith(start):
                    infos.append(self._file_info(place.above + full, obj))
        else:
            with self._asking(place):
                for objects, _ in place.origin.pages(start, recursive=True):
                    infos += [self._file_info(place.above + obj.key, obj) for obj in objects]
        if not infos and place.key and not prefix:
            with contextlib.suppress(FileNotFoundError):
                infos = [self._info(path)]
        if withdirs:
            # The directory itself is among them, as in s3fs, unless it is a bucket.
            found: set[str] = set()
            for info in infos:
                name = info["name"].rpartition("/")[0]
                while "/" in name and len(name) >= len(path) and name not in found:
                    found.add(name)
                    name = name.rpartition("/")[0]
            infos += [_directory_info(name) for name in found]
        return {info["name"]: info for info in sorted(infos, key=_name)}

    def _buckets(self) -> list[dict[str, Any]]:
        options = {**(self._options or {}), "use_listings_cache": False}
        options.pop("asynchronous", None)
        return [_directory_info(name) for name in make_s3fs(options).ls("", detail=False)]

    def _file_info(self, name: str, obj: ObjectInfo) -> dict[str, Any]:
        etag = f'"{obj.etag}"' if self._is_s3 and '"' not in obj.etag else obj.etag
        return {
            "name": name,
            "size": obj.size_bytes,
            "type": "file",
            "ETag": etag,
            "LastModified": datetime.datetime.fromtimestamp(obj.modified_s, datetime.UTC),
            "mtime": obj.modified_s,
        }


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a path is.

    Attributes
    ----------
    origin : BrowsableOrigin
        The bucket, or the root directory of the machine.
    above : str
        Part of the path before its key: ``bucket/`` or ``/``.
    key : str
        Below ``origin``; empty for the bucket.
    store_id : tuple of str or None
        Origin and path of the store that contains it, if there is a part ``*.zarr``.
    directory, name, inside : str
        Key of the store's directory, name of the store, key in the store.
    """

    origin: BrowsableOrigin
    above: str
    key: str
    store_id: tuple[str, str] | None = None
    directory: str = ""
    name: str = ""
    inside: str = ""

    @property
    def below(self) -> str:
        """Prefix of the keys below this one."""
        return f"{self.key}/" if self.key else ""

    @property
    def store_url(self) -> str:
        """URL of the store that contains it."""
        return self.origin.url_of(f"{self.directory}/{self.name}".lstrip("/"))


@dataclass(frozen=True, slots=True)
class _Found:
    """A file in the version that was listed. ``store`` is None for a file outside of stores."""

    place: _Place
    obj: ObjectInfo
    store: CachedStore | None


class _Shared:
    """State shared by the instances of a process with one configuration. Safe from any thread.

    Its memory and its descriptors are bounded, whatever the number of URLs.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.counters = Counters()
        self.cache = Cache(config, self.counters)
        #: Buckets that have answered.
        self.buckets: set[tuple[str, str]] = set()
        self._config = config
        self._lock = threading.Lock()
        self._stores: OrderedDict[tuple[str, str], CachedStore] = OrderedDict()
        self._n_objects: dict[tuple[str, str], int] = {}
        #: Digest of the listing of each store that was opened; None if it has changed since.
        self._versions: OrderedDict[tuple[str, str], str | None] = OrderedDict()
        self._invalidated: set[tuple[str, str]] = set()

    def store(self, place: _Place, *, is_opening: bool, refresh: bool) -> CachedStore | None:
        """An open store; None if it has no objects.

        Parameters
        ----------
        place : _Place
        is_opening : bool
            The caller begins to read, so a new version of the store is accepted. False: it reads a
            chunk, of the version that it has opened.
        refresh : bool
            List the store at the origin.

        Raises
        ------
        IncompleteArrayError
            The store was changed since it was opened.
        """
        assert place.store_id is not None
        store_id = place.store_id
        with self._lock:
            is_changed = self._versions.get(store_id, "") is None
            store = self._stores.get(store_id)
            if is_changed and not is_opening:
                raise _changed(place.store_url)
            relists = refresh or is_changed or self._config.revalidate == "epoch"
            if store is None or (is_opening and relists):
                origin = place.origin.below(place.directory) if place.directory else place.origin
                # A known version is newer than the call of invalidate_cache, which forgets it.
                is_invalidated = store_id not in self._versions and self._is_invalidated(store_id)
                relist = refresh or is_changed or is_invalidated
                store = CachedStore(origin, place.name, self.cache, relist=relist)
                # At once, so that threads that open it together send one LIST.
                self._stores.setdefault(store_id, store)
            elif store_id in self._n_objects:  # the many reads of chunks of an open store
                self._stores.move_to_end(store_id)
                return store
            self._stores.move_to_end(store_id)
        has_objects, version = bool(store.objects()), store.version
        with self._lock:
            known = self._versions.get(store_id, version)
            if not is_opening and known != version:
                self._drop(store_id)
                self._versions[store_id] = None
                raise _changed(place.store_url)
            if not has_objects:
                self._drop(store_id)
                self._versions.pop(store_id, None)
                return None
            self._versions[store_id] = version
            self._versions.move_to_end(store_id)
            if self._stores.get(store_id, store) is not store or store_id not in self._n_objects:
                self._keep(store_id, store)
        return store

    def _keep(self, store_id: tuple[str, str], store: CachedStore) -> None:
        """Keep an open store, and let go of others. Call while holding ``self._lock``."""
        self._stores[store_id] = store
        self._n_objects[store_id] = len(store.objects())
        while len(self._stores) > 1 and (
            len(self._stores) > _MAX_STORES or sum(self._n_objects.values()) > _MAX_OBJECTS
        ):
            self._drop(next(iter(self._stores)))
        while len(self._versions) > _MAX_VERSIONS:
            self._versions.popitem(last=False)

    def _drop(self, store_id: tuple[str, str]) -> None:
        """Let go of an open store. Call while holding ``self._lock``."""
        self._stores.pop(store_id, None)
        self._n_objects.pop(store_id, None)

    def changed(self, place: _Place, store: CachedStore) -> IncompleteArrayError:
        """Note that an open store has changed. Returns the error to raise."""
        assert place.store_id is not None
        with self._lock:
            # A late answer to a reader of the old version says nothing about the new one.
            if self._stores.get(place.store_id, store) is store:
                self._drop(place.store_id)
                self._versions[place.store_id] = None
        return _changed(place.store_url)

    def invalidate(self, origin_id: str, path: str | None) -> None:
        """List the stores at, above or below a path again at their next use; None: all."""
        marked = (origin_id, path or "")
        with self._lock:
            if len(self._invalidated) >= _MAX_INVALIDATED:
                self._invalidated = {(one, "") for one, _ in self._invalidated}
            self._invalidated.add(marked)
            for store_id in [s for s in self._stores if _concerns(marked, s)]:
                self._drop(store_id)
            for store_id in [s for s in self._versions if _concerns(marked, s)]:
                del self._versions[store_id]

    def _is_invalidated(self, store_id: tuple[str, str]) -> bool:
        return any(_concerns(marked, store_id) for marked in self._invalidated)


#: By process and configuration, while an instance uses it.
_all_shared: weakref.WeakValueDictionary[tuple[int, CacheConfig], _Shared] = (
    weakref.WeakValueDictionary()
)


def _shared(config: CacheConfig) -> _Shared:
    key = (os.getpid(), config)
    shared = _all_shared.get(key)
    if shared is None:
        # If two threads get here together, one of the two is kept.
        shared = _all_shared.setdefault(key, _Shared(config))
    return shared


class _File(AbstractBufferedFile):  # type: ignore[misc]
    """A file in the version that it had when it was opened."""

    def __init__(self, fs: ZarrCacheFileSystem, path: str, found: _Found, **options: Any) -> None:
        self._found = found
        # Keyword arguments are passed to open() if the file is unpickled.
        super().__init__(fs, path, size=found.obj.size_bytes, etag=found.obj.etag, **options)
        self.details = fs._file_info(path, found.obj)

    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes = self.fs._read(self._found, start, min(end, self.size))
        return data


def _strip_local(path: Any) -> Any:
    if isinstance(path, list):
        return [_strip_local(p) for p in path]
    text = str(stringify_path(path)).removeprefix("zarrcache://").removeprefix("zarrcache::")
    return LocalFileSystem._strip_protocol(text)


def _directory_info(name: str) -> dict[str, Any]:
    return {"name": name, "size": 0, "type": "directory"}


def _name(info: Mapping[str, Any]) -> str:
    return str(info["name"])


def _concerns(marked: tuple[str, str], store_id: tuple[str, str]) -> bool:
    (origin_id, path), (origin_of_store, store) = marked, store_id
    if origin_id != origin_of_store:
        return False
    one, other = f"{path}/", f"{store}/"
    return path in ("", "/") or one.startswith(other) or other.startswith(one)


def _changed(url: str) -> IncompleteArrayError:
    return IncompleteArrayError(f"{url} was changed after it was opened. Open it again.")


def _no_such_file(url: str) -> FileNotFoundError:
    return FileNotFoundError(f"{url} does not exist.")


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
