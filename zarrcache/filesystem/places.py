"""Resolve a path to its bytes: its origin, store and version, or the error if it is absent."""

from __future__ import annotations

import contextlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from fsspec.utils import tokenize

from zarrcache._keys import ObjectInfo, source_digest
from zarrcache.cache import CachedStore, read_range
from zarrcache.errors import IncompleteArrayError, OriginError, OriginNotFoundError
from zarrcache.filesystem.open_stores import OpenStores, Place
from zarrcache.origin import BrowsableOrigin

__all__ = ["Found", "Places"]

#: Documents that zarr reads when it opens an array or group.
_METADATA = frozenset({".zarray", ".zattrs", ".zgroup", ".zmetadata", "zarr.json"})
#: A chunk's key below its array: ``0.0.0``, ``0/0/0`` (v2), ``c/0/0/0``, ``c.0.0.0``, ``c`` (v3).
_CHUNK = re.compile(r"(c|\d+)([./]\d+)*")


@dataclass(frozen=True, slots=True)
class Found:
    """A file in the version that was listed. ``store`` is None for a file outside of stores."""

    place: Place
    obj: ObjectInfo
    store: CachedStore | None


class Places:
    """Finds and reads files by their paths, without protocol; ``""`` and ``/`` are the root.

    Parameters
    ----------
    stores : OpenStores
    options : mapping or None
        ``s3_kwargs``; None for directories of this machine.
    """

    def __init__(self, stores: OpenStores, options: Mapping[str, Any] | None) -> None:
        self.stores = stores
        self._options, self._is_s3 = options, options is not None
        self._origin_id = tokenize(self._is_s3, options)
        #: Errors of listing a path that is a file or absent. On S3 the listing has empty pages.
        self._absent_errors = () if self._is_s3 else (FileNotFoundError,)

    def url(self, path: str) -> str:
        """The URL of a path at the origin, for messages."""
        return f"s3://{path}" if self._is_s3 else path

    def invalidate(self, path: str | None) -> None:
        """List the stores at, above or below a path again at their next use; None: all."""
        self.stores.invalidate(self._origin_id, path)

    # -- what is where

    def entry(self, path: str, *, refresh: bool = False) -> ObjectInfo | None:
        """A file; None for a directory.

        Raises
        ------
        FileNotFoundError
        """
        if path in ("", "/"):
            return None
        place = self._place(path)
        store = self._store(place, refresh=refresh)
        obj = self._head(place) if store is None else store.objects().get(place.inside)
        if obj is None and not self.is_directory(path, is_opening=False):
            raise _no_such_file(self.url(path))
        return obj

    def is_directory(self, path: str, *, is_opening: bool = True) -> bool:
        """Whether there is a directory. ``is_opening``: see :meth:`OpenStores.store`."""
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

    def children(self, path: str, *, refresh: bool) -> list[tuple[str, ObjectInfo | None]]:
        """Paths of the files and directories (None) directly below one that may be a directory."""
        place = self._place(path)
        store = self._store(place, refresh=refresh)
        if store is not None:
            below = f"{place.inside}/" if place.inside else ""
            names: dict[str, ObjectInfo | None] = {}
            for key, obj in store.objects().items():
                if key.startswith(below):
                    name, separator, _ = key[len(below) :].partition("/")
                    names[f"{path}/{name}"] = None if separator else obj
            return list(names.items())
        found: list[tuple[str, ObjectInfo | None]] = []
        with contextlib.suppress(*self._absent_errors), self._asking(place):
            for objects, directories in place.origin.pages(place.below):
                found += [(place.above + obj.key, obj) for obj in objects]
                found += [(place.above + key, None) for key in directories]
        return found

    def files_below(self, path: str, prefix: str, *, refresh: bool) -> dict[str, ObjectInfo]:
        """Paths of all files below a directory whose key in it begins with ``prefix``.

        Without a prefix, a file is found at its own path.
        """
        place = self._place(path)
        store = self._store(place, refresh=refresh)
        start = place.below + prefix
        found: dict[str, ObjectInfo] = {}
        if store is not None:
            for inside, obj in store.objects().items():
                key = f"{place.store}/{inside}"
                if key.startswith(start):
                    found[place.above + key] = obj
        else:
            with self._asking(place):
                for objects, _ in place.origin.pages(start, recursive=True):
                    found |= {place.above + obj.key: obj for obj in objects}
        if not found and place.key and not prefix:
            with contextlib.suppress(FileNotFoundError):
                if (itself := self.entry(path)) is not None:
                    found[path] = itself
        return found

    # -- contents

    def find(self, path: str, *, is_opening: bool = True) -> Found | None:
        """A file; None if there is no such file."""
        place = self._place(path)
        store = self._store(place, is_opening=is_opening)
        if store is None:
            obj = self._head(place)
            return None if obj is None else Found(place, obj, None)
        obj = store.objects().get(place.inside)
        if not is_opening and self.stores.config.revalidate == "epoch":
            listed = [] if obj is None else [obj]
            now = store.origin.list_objects(f"{store.name}/{place.inside}")
            if source_digest(now) != source_digest(listed):
                raise self.stores.changed(place, store)
        return None if obj is None else Found(place, obj, store)

    def content(self, path: str) -> Found:
        """A file that is to be read, perhaps as a chunk of an open array.

        Raises
        ------
        FileNotFoundError
            There is no such file. Never because of an error of the origin.
        IncompleteArrayError
            The store was changed since it was opened, or the bucket or the array's metadata is
            gone.
        """
        try:
            found = self.find(path, is_opening=posixpath.basename(path) in _METADATA)
            if found is None:
                raise self._absent(path)
        except OriginNotFoundError as exc:
            if not self._is_s3 and posixpath.basename(path) in _METADATA:
                raise  # there is no such directory
            # zarr would take a FileNotFoundError for a chunk that was never written.
            raise IncompleteArrayError(str(exc)) from exc
        return found

    def read(self, found: Found, start: int, stop: int) -> bytes:
        """Read bytes of a file in the version that was found."""
        origin, obj = found.place.origin, found.obj
        if found.store is not None:
            try:
                return found.store.read(obj, start, stop)
            except IncompleteArrayError:
                self.stores.changed(found.place, found.store)
                raise
        tier = self.stores.cache.bytes(origin)
        try:
            if tier is not None:
                return tier.read(obj, start, stop)
            return read_range(origin, obj, start, stop)
        except OriginNotFoundError as exc:
            raise IncompleteArrayError(str(exc)) from exc

    # -- parts

    def _place(self, path: str) -> Place:
        """The origin of a path, its key there, and the store that contains it. No request."""
        if self._is_s3:
            bucket, _, key = path.partition("/")
            root, above = self.stores.cache.origin(f"s3://{bucket}", self._options), f"{bucket}/"
        else:
            root, above, key = self.stores.cache.origin("/"), "/", path.strip("/")
        origin = cast("BrowsableOrigin", root)
        parts = key.split("/")
        # The first part that is the name of a store.
        names = (n for n, part in enumerate(parts, 1) if part.endswith(".zarr") and part != ".zarr")
        end = next(names, 0)
        store, inside = "/".join(parts[:end]), "/".join(parts[end:])
        return Place(origin, above, key, store, inside, (self._origin_id, above + store))

    def _store(
        self, place: Place, *, is_opening: bool = True, refresh: bool = False
    ) -> CachedStore | None:
        """The store that contains a place, if there is one with objects."""
        if not place.store:
            return None
        with self._asking(place):
            return self.stores.store(place, is_opening=is_opening, refresh=refresh)

    @contextlib.contextmanager
    def _asking(self, place: Place) -> Iterator[None]:
        """Wrap requests: a bucket that answered before and is gone is an error of the origin."""
        bucket = (self._origin_id, place.above)
        try:
            yield
        except OriginNotFoundError as exc:
            if self._is_s3 and bucket in self.stores.buckets:
                raise OriginError(str(exc)) from exc
            raise
        self.stores.buckets.add(bucket)

    def _head(self, place: Place) -> ObjectInfo | None:
        """An object outside of stores, looked up at the origin."""
        listed = place.origin.list_objects(place.key) if place.key else []
        if not listed:  # which says nothing about the bucket
            return None
        self.stores.buckets.add((self._origin_id, place.above))
        return listed[0]

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
            is_there = is_there or self.is_directory(path, is_opening=False)
        if documents and not is_there:
            return IncompleteArrayError(
                f"{self.url(path)} does not exist, and neither does an array that it could belong "
                "to (no zarr.json or .zarray above it). If the array was open, it was deleted."
            )
        return _no_such_file(self.url(path))


def _no_such_file(url: str) -> FileNotFoundError:
    return FileNotFoundError(f"{url} does not exist.")
