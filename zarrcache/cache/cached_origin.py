"""An origin read through the cache: listings are stored, objects come from the byte tier."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zarrcache._keys import ObjectInfo
from zarrcache.arrays import is_object, stable_listing
from zarrcache.cache.byte_tier import read_range
from zarrcache.cache.cache import Cache
from zarrcache.errors import IncompleteArrayError
from zarrcache.origin import Origin

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CachedOrigin"]


class CachedOrigin:
    """An `Origin` that wraps another one, for readers of stores. Safe from any thread or process.

    Parameters
    ----------
    origin : Origin
    cache : Cache
    relist : bool
        List a store at the origin each time. False: use its stored listing if there is one.

    See Also
    --------
    zarrcache.origin.Origin : the contract of the methods.
    """

    def __init__(self, origin: Origin, cache: Cache, *, relist: bool) -> None:
        self._origin, self._cache, self._relist = origin, cache, relist
        self._bytes = cache.bytes(origin)
        self.url, self.identity = origin.url, origin.identity

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(CachedOrigin, relist=self._relist)
        return make, (self._origin, self._cache)

    def url_of(self, key: str) -> str:
        """Full URL or path of a key."""
        return self._origin.url_of(key)

    def list_names(self) -> list[str]:
        """Names directly below the root, from the origin."""
        return self._origin.list_names()

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects below ``prefix``, which begins with the name of a store.

        The whole store is listed and its listing stored, so further prefixes cost no request.
        """
        store = prefix.partition("/")[0]
        stored = None if self._relist else self._cache.stored_listing(self._origin, store)
        if stored is not None:
            listed = [ObjectInfo(*row) for row in stored]
        else:
            whole = store if is_object(store) else f"{store}/"
            listed = stable_listing(
                lambda: self._origin.list_objects(whole), self._origin.url_of(store)
            )
            if listed:
                rows = [(o.key, o.size_bytes, o.etag, o.modified_s) for o in listed]
                self._cache.store_listing(self._origin, store, rows)
        return [obj for obj in listed if obj.key.startswith(prefix)]

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects. Drops the stored listing if an object differs from it."""
        source = self._bytes or self._origin
        try:
            yield from source.fetch(objects)
        except IncompleteArrayError:
            self._forget(objects[0])
            raise

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes of a listed object. Drops the stored listing if the object differs from it."""
        try:
            if self._bytes is not None:
                return self._bytes.read(obj, start, stop)
            return read_range(self._origin, obj, start, stop)
        except IncompleteArrayError:
            self._forget(obj)
            raise

    def purge(self, obj: ObjectInfo, start: int, stop: int, why: str) -> None:
        """Drop what the byte tier has of these bytes of an object."""
        if self._bytes is not None:
            self._bytes.purge(obj, start, stop, why)

    def _forget(self, obj: ObjectInfo) -> None:
        # The next open of the store then lists it again.
        self._cache.forget_listing(self._origin, obj.key.partition("/")[0])
