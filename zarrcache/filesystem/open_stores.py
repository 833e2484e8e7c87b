"""The open stores of a process: one listing and one version of each, for all URLs of a cache.

fsspec keeps one instance per thread and set of arguments, for the life of the process. Instances
are therefore small: the cache, its connections and the open stores are in `OpenStores`, one per
process and configuration.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

from zarrcache.cache import Cache, CachedStore
from zarrcache.config import CacheConfig
from zarrcache.errors import IncompleteArrayError
from zarrcache.origin import BrowsableOrigin
from zarrcache.stats import Counters

__all__ = ["OpenStores", "Place", "changed_error", "stores_of"]

#: Stores whose listings are in memory, and objects in them: 30 MB.
_MAX_STORES = 64
_MAX_OBJECTS = 100_000
#: Stores whose version is remembered, 200 bytes each.
_MAX_VERSIONS = 100_000
_MAX_INVALIDATED = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a path.

    Attributes
    ----------
    origin : BrowsableOrigin
        The bucket, or the root directory of the machine.
    above : str
        Part of the path before its key: ``bucket/`` or ``/``.
    key : str
        Below ``origin``; empty for the bucket.
    store : str
        Key of the store that contains it; empty if no part is ``*.zarr``.
    inside : str
        Key in the store.
    store_id : (str, str)
        Identity of the origin, and the store's path.
    """

    origin: BrowsableOrigin
    above: str
    key: str
    store: str
    inside: str
    store_id: tuple[str, str]

    @property
    def below(self) -> str:
        """Prefix of the keys below this one."""
        return f"{self.key}/" if self.key else ""


class OpenStores:
    """State shared by the instances of a process with one configuration. Safe from any thread.

    Its memory and its descriptors are bounded for any number of URLs.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.counters = Counters()
        self.cache = Cache(config, self.counters)
        self.config = config
        #: Buckets that have answered.
        self.buckets: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._stores: OrderedDict[tuple[str, str], CachedStore] = OrderedDict()
        self._n_objects: dict[tuple[str, str], int] = {}
        #: Digest of the listing of each store that was opened; None if it has changed since.
        self._versions: OrderedDict[tuple[str, str], str | None] = OrderedDict()
        self._invalidated: set[tuple[str, str]] = set()

    def store(self, place: Place, *, is_opening: bool, refresh: bool) -> CachedStore | None:
        """An open store; None if it has no objects.

        Parameters
        ----------
        place : Place
            In a store.
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
        store_id = place.store_id
        with self._lock:
            is_changed = self._versions.get(store_id, "") is None
            store = self._stores.get(store_id)
            if is_changed and not is_opening:
                raise changed_error(place.origin.url_of(place.store))
            relists = refresh or is_changed or self.config.revalidate == "epoch"
            if store is None or (is_opening and relists):
                directory, _, name = place.store.rpartition("/")
                origin = place.origin.below(directory) if directory else place.origin
                # A known version is newer than the call of invalidate_cache, which forgets it.
                is_invalidated = store_id not in self._versions and self._is_invalidated(store_id)
                relist = refresh or is_changed or is_invalidated
                store = CachedStore(origin, name, self.cache, relist=relist)
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
                raise changed_error(place.origin.url_of(place.store))
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

    def changed(self, place: Place, store: CachedStore) -> IncompleteArrayError:
        """Note that an open store has changed. Returns the error to raise."""
        with self._lock:
            # A late answer to a reader of the old version says nothing about the new one.
            if self._stores.get(place.store_id, store) is store:
                self._drop(place.store_id)
                self._versions[place.store_id] = None
        return changed_error(place.origin.url_of(place.store))

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
_by_process: weakref.WeakValueDictionary[tuple[int, CacheConfig], OpenStores] = (
    weakref.WeakValueDictionary()
)


def stores_of(config: CacheConfig) -> OpenStores:
    """The open stores of this process with one configuration."""
    key = (os.getpid(), config)
    stores = _by_process.get(key)
    if stores is None:
        # If two threads get here together, one of the two is kept.
        stores = _by_process.setdefault(key, OpenStores(config))
    return stores


def _concerns(marked: tuple[str, str], store_id: tuple[str, str]) -> bool:
    (origin_id, path), (origin_of_store, store) = marked, store_id
    if origin_id != origin_of_store:
        return False
    one, other = f"{path}/", f"{store}/"
    return path in ("", "/") or one.startswith(other) or other.startswith(one)


def changed_error(url: str) -> IncompleteArrayError:
    """The error for a file or store whose listed version is gone."""
    return IncompleteArrayError(f"{url} was changed after it was opened. Open it again.")
